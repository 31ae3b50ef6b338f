//! Starting the other cores.
//!
//! Intel SDM vol. 3, 9.4 (multiple-processor initialization), 9.4.4 (INIT and start-up interrupts), 10.8.5 (entering IA-32e mode); AMD APM
//! vol. 2, 14.8 (long mode), 16.5 (interprocessor interrupts).
//!
//! One core is started at a time. It goes from real mode straight to long mode on the boot page tables, takes its stack, and sets itself up;
//! then it waits until all have come and the first core lets them work. A core that does not come is left out, also if it comes later.

use super::{apic, barriers, clock, descriptors, local};
use crate::memory::paging;
use alloc::vec::Vec;
use core::arch::global_asm;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use spin::Once;

/// Bytes of a core's stack, above a page that is not mapped.
pub const STACK_BYTES: u64 = 64 << 10;
const PAGE: usize = 4096;

/// How long a core has to come. An emulator with little time needs some milliseconds.
const PATIENCE_NS: u64 = 200_000_000;
/// How long after the first start-up interrupt the second is sent: a processor may have missed the first.
const AGAIN_NS: u64 = 1_000_000;
/// How often the counters are compared.
const COMPARISONS: u32 = 20;

// What runs at the start-up page, in real mode, with CS at the page. It is copied there, so every address is relative to its start but those in
// the kernel, which lies below 4 GiB.
global_asm!(
    r#"
    .section .rodata
    .code16
    .global start_up_code
start_up_code:
    cli
    cld
    movw %cs, %ax
    movw %ax, %ds
    lgdtl start_up_gdt_pointer - start_up_code
    movl %cr4, %eax
    orl $0x20, %eax
    movl %eax, %cr4
    movl $boot_pml4, %eax
    movl %eax, %cr3
    # NXE and LME.
    movl $0xC0000080, %ecx
    xorl %edx, %edx
    movl $0x900, %eax
    wrmsr
    # PG, WP, ET and PE; caches on.
    movl $0x80010011, %eax
    movl %eax, %cr0
    ljmpl $0x08, $start_up_64
    .balign 4
start_up_gdt_pointer:
    .word 23
    .long boot_gdt
    .global start_up_code_end
start_up_code_end:

    .text
    .code64
start_up_64:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    xorl %ebp, %ebp
    # Who takes the stack is in; a core that comes too late finds none.
    xchgq %rax, {stack}(%rip)
    testq %rax, %rax
    jz 2f
    movq {root}(%rip), %rcx
    movq %rcx, %cr3
    movq %rax, %rsp
    call {main}
2:  cli
    hlt
    jmp 2b
    "#,
    stack = sym STACK,
    root = sym PAGE_TABLES,
    main = sym secondary_main,
    options(att_syntax)
);

unsafe extern "C" {
    static start_up_code: u8;
    static start_up_code_end: u8;
}

/// Top of the stack of the core that is being started; zero when none is.
static STACK: AtomicU64 = AtomicU64::new(0);
/// Physical address of L1's page tables.
static PAGE_TABLES: AtomicU64 = AtomicU64::new(0);
/// Number of the core that is being started.
static INDEX: AtomicUsize = AtomicUsize::new(0);
/// Where that core is: one of the following.
static STATE: AtomicU32 = AtomicU32::new(STARTING);
const STARTING: u32 = 0;
const SET_UP: u32 = 1;
const REFUSED: u32 = 2;
const ACCEPTED: u32 = 3;
const LEFT: u32 = 4;

/// The first core asks for the counter; the other answers.
static ASKS: AtomicBool = AtomicBool::new(false);
static ANSWER: AtomicU64 = AtomicU64::new(0);

/// What a core does to be of use; it returns whether it is.
pub type Prepare = &'static (dyn Fn() -> bool + Sync);
/// What a core does for ever, given its number.
pub type Work = &'static (dyn Fn(usize) + Sync);

static PREPARE: Once<Prepare> = Once::new();
static WORK: Once<Work> = Once::new();

/// Starts the cores with these APIC ids. Returns those that have come, in the order of their numbers, which start with 1. They wait until
/// [`release`].
///
/// `page` is the address of a page of RAM below 1 MiB that is free; `stack` gives the top of a stack of [`STACK_BYTES`] each time it is asked.
pub fn start(ids: &[u32], page: u64, mut stack: impl FnMut() -> Option<u64>, prepare: Prepare) -> Vec<u32> {
    PREPARE.call_once(|| prepare);
    PAGE_TABLES.store(paging::root(), Ordering::SeqCst);
    // SAFETY: the code lies between the two symbols; the page is free RAM that is mapped writable, and the code fits in.
    unsafe {
        let code = &raw const start_up_code;
        let bytes = (&raw const start_up_code_end).offset_from(code) as usize;
        assert!(bytes <= PAGE);
        ptr::copy_nonoverlapping(code, page as *mut u8, bytes);
    }
    let mut up = Vec::new();
    for &id in ids {
        let started = match stack() {
            Some(stack) => start_one(id, page, stack, up.len() + 1),
            None => Err("there is no memory for its stack"),
        };
        match started {
            Ok(()) => up.push(id),
            Err(why) => log::warn!("core with APIC id {id} is left out: {why}"),
        }
    }
    up
}

fn start_one(id: u32, page: u64, stack: u64, index: usize) -> Result<(), &'static str> {
    if !apic::is_reachable(id) {
        return Err("its id needs x2APIC mode, which this VM does not have");
    }
    INDEX.store(index, Ordering::SeqCst);
    STATE.store(STARTING, Ordering::SeqCst);
    STACK.store(stack, Ordering::SeqCst);
    // Processors with virtualization need no pause after INIT.
    apic::send_init(id);
    apic::send_start_up(id, (page >> 12) as u8);
    let start = clock::now_ns();
    let took_stack = || STACK.load(Ordering::SeqCst) == 0;
    if !wait(start + AGAIN_NS, took_stack) {
        apic::send_start_up(id, (page >> 12) as u8);
    }
    if !wait(start + PATIENCE_NS, took_stack) && STACK.swap(0, Ordering::SeqCst) != 0 {
        return Err("it does not start");
    }
    // It runs L1's code now, which ends.
    while STATE.load(Ordering::SeqCst) == STARTING {
        core::hint::spin_loop();
    }
    if STATE.load(Ordering::SeqCst) == REFUSED {
        return Err("it cannot do what the first core does");
    }
    let agree = (0..COMPARISONS).all(|_| compare_counters());
    STATE.store(if agree { ACCEPTED } else { REFUSED }, Ordering::SeqCst);
    // The words above are the next core's from here on.
    while STATE.load(Ordering::SeqCst) != LEFT {
        core::hint::spin_loop();
    }
    if agree { Ok(()) } else { Err("its time-stamp counter does not agree with the first core's") }
}

/// Whether the other core's counter, asked between two looks at this one's, lies between them.
fn compare_counters() -> bool {
    ANSWER.store(0, Ordering::SeqCst);
    let before = clock::tsc();
    ASKS.store(true, Ordering::SeqCst);
    while ASKS.load(Ordering::SeqCst) {
        core::hint::spin_loop();
    }
    let after = clock::tsc();
    (before..=after).contains(&ANSWER.load(Ordering::SeqCst))
}

fn wait(until_ns: u64, done: impl Fn() -> bool) -> bool {
    while !done() {
        if clock::now_ns() >= until_ns {
            return false;
        }
        core::hint::spin_loop();
    }
    true
}

/// Lets the cores work that [`start`] has started.
pub fn release(work: Work) {
    WORK.call_once(|| work);
}

/// First Rust code of another core: on its own stack, L1's page tables, interrupts off.
extern "C" fn secondary_main() -> ! {
    let index = INDEX.load(Ordering::SeqCst);
    local::init(index);
    descriptors::init();
    apic::init_secondary();
    barriers::init_here();
    let is_of_use = PREPARE.get().is_some_and(|prepare| prepare());
    STATE.store(if is_of_use { SET_UP } else { REFUSED }, Ordering::SeqCst);
    while is_of_use && STATE.load(Ordering::SeqCst) == SET_UP {
        if ASKS.load(Ordering::SeqCst) {
            ANSWER.store(clock::tsc(), Ordering::SeqCst);
            ASKS.store(false, Ordering::SeqCst);
        }
        core::hint::spin_loop();
    }
    if !is_of_use {
        super::halt_forever();
    }
    if STATE.swap(LEFT, Ordering::SeqCst) != ACCEPTED {
        super::halt_forever();
    }
    let work = loop {
        match WORK.get() {
            Some(work) => break work,
            None => core::hint::spin_loop(),
        }
    };
    work(index);
    super::halt_forever()
}
