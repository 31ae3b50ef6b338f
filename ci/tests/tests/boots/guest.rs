//! Guests that break, run wild or attack: their job ends with a reason, and the node goes on.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use nestling::bed::{Bed, BedBuilder, RunningBed};
use nestling::client::Finished;
use nestling::client::types::{Conclusion, Job, JobRequest};
use nestling_tests::guest::{bundle, program};
use nestling_tests::job::{create, job, run, wait};
use nestling_tests::node::{Shared, memory};
use std::path::PathBuf;

/// A node for guests that are Linux.
static LINUX: Shared = Shared::new(Bed::builder);
/// A node that has the bare guests of this file as images, beside `minimal`.
static BARE: Shared = Shared::new(bare_node);

fn bare_node() -> BedBuilder {
    let minimal = nestling::image::find(None).unwrap_or_else(|error| panic!("{error}"));
    Bed::builder().image(bundle(&bundle_path(), &minimal, &guests()))
}

/// Where the images of [`BARE`] are until it has read them.
fn bundle_path() -> PathBuf {
    std::env::temp_dir().join(format!("nestling-guests-{}.tar", std::process::id()))
}

/// The node with the bare guests.
fn bare() -> &'static RunningBed {
    let node = BARE.get();
    let _ = std::fs::remove_file(bundle_path());
    node
}

/// Every bare guest by its image's name.
fn guests() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("endless-loop", program(endless_loop)),
        ("halted", program(halted)),
        ("triple-fault", program(triple_fault)),
        ("exit-storm", program(exit_storm)),
        ("serial-flood", program(serial_flood)),
        ("random-access", program(random_access)),
        ("no-virtualization", program(no_virtualization)),
        ("rng-rubbish", program(|guest| rubbish_in_virtqueues(guest, 0x1044, 1))),
        ("vsock-rubbish", program(|guest| rubbish_in_virtqueues(guest, 0x1053, 3))),
    ]
}

/// Interrupts off, and round and round.
fn endless_loop(guest: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut again = guest.create_label();
    guest.cli()?;
    guest.set_label(&mut again)?;
    guest.jmp(again)
}

/// Waits for an interrupt that cannot come.
fn halted(guest: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut again = guest.create_label();
    guest.cli()?;
    guest.set_label(&mut again)?;
    guest.hlt()?;
    guest.jmp(again)
}

/// A breakpoint without an interrupt descriptor table.
fn triple_fault(guest: &mut CodeAssembler) -> Result<(), IcedError> {
    guest.push(0)?;
    guest.push(0)?;
    guest.lidt(ptr(rsp))?;
    guest.int3()
}

/// An exit every few instructions, for ever.
fn exit_storm(guest: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut again = guest.create_label();
    guest.set_label(&mut again)?;
    guest.xor(eax, eax)?;
    guest.cpuid()?;
    guest.in_(al, 0x80)?;
    guest.jmp(again)
}

/// The serial port's data register, for ever, without asking whether it is ready.
fn serial_flood(guest: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut again = guest.create_label();
    guest.mov(dx, 0x3F8)?;
    guest.mov(al, u32::from(b'x'))?;
    guest.set_label(&mut again)?;
    guest.out(dx, al)?;
    guest.jmp(again)
}

/// Reads and writes of random widths and values all over the devices' memory and the ports.
fn random_access(guest: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut again = guest.create_label();
    // The configuration space of bus 0, device memory, the I/O APIC and the local APIC.
    let regions: [(u64, u64); 4] =
        [(0xE000_0000, 0xF_FFFF), (0xE010_0000, 0x1F_FFFF), (0xFEC0_0000, 0xFFF), (0xFEE0_0000, 0xFFF)];
    guest.cli()?;
    guest.mov(r15, 0x9E37_79B9_7F4A_7C15_u64)?;
    guest.set_label(&mut again)?;
    for (base, mask) in regions {
        // xorshift64: r15 is the state.
        for (shift, left) in [(13, true), (7, false), (17, true)] {
            guest.mov(rax, r15)?;
            if left {
                guest.shl(rax, shift)?
            } else {
                guest.shr(rax, shift)?
            }
            guest.xor(r15, rax)?;
        }
        guest.mov(rbx, r15)?;
        guest.and(ebx, mask as i32)?;
        guest.mov(rcx, base)?;
        guest.add(rcx, rbx)?;
        guest.mov(rax, r15)?;
        guest.mov(dword_ptr(rcx), eax)?;
        guest.mov(qword_ptr(rcx), rax)?;
        guest.mov(byte_ptr(rcx), al)?;
        guest.movzx(eax, word_ptr(rcx))?;
        guest.mov(rax, r15)?;
        guest.shr(rax, 32)?;
        guest.xchg(dword_ptr(rcx), eax)?;
    }
    guest.mov(rdx, r15)?;
    guest.shr(rdx, 20)?;
    guest.mov(rax, r15)?;
    // Not the ports that end the machine: this guest is to go on.
    guest.and(edx, 0xF8FF)?;
    guest.or(edx, 0x1000)?;
    guest.out(dx, eax)?;
    guest.out(dx, al)?;
    guest.in_(ax, dx)?;
    guest.jmp(again)
}

/// An instruction of the virtualization extensions, which a machine does not have.
fn no_virtualization(guest: &mut CodeAssembler) -> Result<(), IcedError> {
    guest.vmmcall()?;
    guest.vmrun()?;
    guest.int3()
}

/// Finds the virtio device with this PCI device ID, sets its queues up as a driver does, and then fills their memory with random words
/// and kicks them, over and over; a device that breaks is set up again. Every other time the available ring is a plausible one, so that
/// random descriptors get their turn.
fn rubbish_in_virtqueues(guest: &mut CodeAssembler, device: u32, queues: u32) -> Result<(), IcedError> {
    const ECAM: u64 = 0xE000_0000;
    // Each queue's descriptors, available and used ring, 16 KiB apart.
    const QUEUES: u32 = 0x20_0000;
    const EACH: u32 = 0xC000;
    // Registers of the common configuration (virtio 1.2, 4.1.4.3) and the notifications, at the start of the I/O BAR.
    const FEATURE_SELECT: u32 = 0x08;
    const FEATURE: u32 = 0x0C;
    const STATUS: u32 = 0x14;
    const SELECT: u32 = 0x16;
    const ENABLE: u32 = 0x1C;
    const ADDRESSES: u32 = 0x20;
    const NOTIFY: u32 = 0x60;
    let mut labels = [(); 8].map(|()| guest.create_label());
    let [next_device, next_bar, found, setup, fill, again, words, kick] = &mut labels;

    guest.cli()?;
    guest.mov(r15, 0x9E37_79B9_7F4A_7C15_u64)?;
    guest.xor(r13d, r13d)?;
    guest.mov(rbx, ECAM - 0x8000)?;
    guest.set_label(next_device)?;
    guest.add(rbx, 0x8000)?;
    guest.cmp(word_ptr(rbx + 2), device as i32)?;
    guest.jne(*next_device)?;
    guest.mov(rcx, 0x10_u64 - 4)?;
    guest.set_label(next_bar)?;
    guest.add(rcx, 4)?;
    guest.mov(r14d, dword_ptr(rbx + rcx))?;
    guest.test(r14d, 1)?;
    guest.je(*next_bar)?;
    guest.set_label(found)?;
    guest.and(r14d, 0xFFFC)?;
    // Command register: I/O, bus master.
    guest.mov(word_ptr(rbx + 4), 5)?;

    let write = |guest: &mut CodeAssembler, register: u32, width: u32, value: u32| {
        guest.lea(rdx, ptr(r14 + register))?;
        guest.mov(eax, value)?;
        match width {
            1 => guest.out(dx, al),
            2 => guest.out(dx, ax),
            _ => guest.out(dx, eax),
        }
    };
    guest.set_label(setup)?;
    for status in [0, 1, 3] {
        write(guest, STATUS, 1, status)?;
    }
    write(guest, FEATURE_SELECT, 4, 1)?;
    write(guest, FEATURE, 4, 1)?;
    write(guest, STATUS, 1, 11)?;
    for queue in 0..queues {
        write(guest, SELECT, 2, queue)?;
        for (part, at) in (0..).zip([0, 0x4000, 0x8000]) {
            write(guest, ADDRESSES + part * 8, 4, QUEUES + queue * EACH + at)?;
            write(guest, ADDRESSES + part * 8 + 4, 4, 0)?;
        }
        write(guest, ENABLE, 2, 1)?;
    }
    write(guest, STATUS, 1, 15)?;
    guest.xor(r12d, r12d)?;

    guest.set_label(again)?;
    guest.mov(edi, QUEUES)?;
    guest.mov(ecx, queues * EACH / 8)?;
    guest.set_label(words)?;
    // xorshift64: r15 is the state.
    for (shift, left) in [(13, true), (7, false), (17, true)] {
        guest.mov(rax, r15)?;
        if left {
            guest.shl(rax, shift)?
        } else {
            guest.shr(rax, shift)?
        }
        guest.xor(r15, rax)?;
    }
    // Keep the low 28 bits of some words, so that addresses meet RAM now and then.
    guest.mov(rax, r15)?;
    guest.test(r15d, 0x10)?;
    guest.je(*fill)?;
    guest.and(rax, 0x0FFF_FFFF)?;
    guest.set_label(fill)?;
    guest.mov(qword_ptr(rdi), rax)?;
    guest.add(rdi, 8)?;
    guest.dec(ecx)?;
    guest.jne(*words)?;
    guest.inc(r13d)?;
    guest.test(r13d, 1)?;
    guest.je(*kick)?;
    guest.inc(r12d)?;
    for queue in 0..queues {
        let available = u64::from(QUEUES + queue * EACH + 0x4000);
        guest.mov(rdi, available)?;
        guest.mov(word_ptr(rdi + 2), r12w)?;
        // Every head in range, whatever the queue's size is.
        guest.mov(rcx, 0x300_u64)?;
        let mut heads = guest.create_label();
        guest.set_label(&mut heads)?;
        guest.and(word_ptr(rdi + rcx * 2 + 2), 0x3F)?;
        guest.dec(ecx)?;
        guest.jne(heads)?;
    }
    guest.set_label(kick)?;
    for queue in 0..queues {
        write(guest, NOTIFY + queue * 4, 2, queue)?;
    }
    guest.lea(rdx, ptr(r14 + STATUS))?;
    guest.in_(al, dx)?;
    guest.test(al, 0x40)?;
    guest.jne(*setup)?;
    guest.jmp(*again)
}

/// Runs a bare guest until its job's time is over or it ends itself.
fn run_bare(image: &str) -> Job {
    let node = bare();
    let request = JobRequest {
        image: Some(image.into()),
        timeout_seconds: Some(5),
        ..job("echo no agent will run this")
    };
    let id = create(node, &request).id;
    let job = wait(node, &id);
    println!("{image}: {:?}, {:?}, {:?}", job.conclusion, job.failure_reason, job.exits);
    assert_serves(node);
    job
}

/// The node still runs jobs.
fn assert_serves(node: &RunningBed) {
    let finished = run(node, &job("echo still here"));
    assert_eq!(
        (finished.job.conclusion, &finished.stdout[..]),
        (Some(Conclusion::Success), &b"still here\n"[..])
    );
}

/// The job's machine ended without a result, for this reason.
fn assert_system_failure(job: &Job, reason: &str) {
    assert_eq!(job.conclusion, Some(Conclusion::SystemFailure), "{job:?}");
    let told = job.failure_reason.as_deref().unwrap_or_default();
    assert!(told.to_lowercase().contains(reason), "expected {reason:?} in {told:?}");
    assert_eq!(job.exit_code, None);
}

#[test]
fn an_endless_loop_with_interrupts_off_ends_with_the_jobs_time() {
    assert_eq!(run_bare("endless-loop").conclusion, Some(Conclusion::TimedOut));
}

#[test]
fn a_guest_that_halts_with_interrupts_off_does_not_stay() {
    let conclusion = run_bare("halted").conclusion;
    assert!(matches!(conclusion, Some(Conclusion::TimedOut | Conclusion::SystemFailure)), "{conclusion:?}");
}

#[test]
fn a_triple_fault_is_a_system_failure() {
    assert_system_failure(&run_bare("triple-fault"), "triple fault");
}

#[test]
fn a_storm_of_exits_does_not_starve_the_node() {
    assert_eq!(run_bare("exit-storm").conclusion, Some(Conclusion::TimedOut));
}

#[test]
fn a_flood_on_the_serial_port_is_bounded() {
    let job = run_bare("serial-flood");
    assert_eq!(job.conclusion, Some(Conclusion::TimedOut));
    assert!(job.console.is_none_or(|console| console.len() < 64 << 10));
}

#[test]
fn random_accesses_to_every_device_harm_nobody_else() {
    let conclusion = run_bare("random-access").conclusion;
    assert!(matches!(conclusion, Some(Conclusion::TimedOut | Conclusion::SystemFailure)), "{conclusion:?}");
}

#[test]
fn virtualization_instructions_are_undefined_in_a_machine() {
    assert_system_failure(&run_bare("no-virtualization"), "triple fault");
}

#[test]
fn a_kernel_panic_is_a_system_failure_with_the_console() {
    let job = run(LINUX.get(), &job("echo c > /proc/sysrq-trigger; sleep 100")).job;
    assert_eq!(job.conclusion, Some(Conclusion::SystemFailure), "{job:?}");
    assert!(job.console.as_deref().unwrap_or_default().contains("panic"), "{job:?}");
}

#[test]
fn a_machine_that_powers_off_in_mid_job_is_a_system_failure() {
    assert_system_failure(&run(LINUX.get(), &job("echo begun; poweroff -f; sleep 100")).job, "power");
}

#[test]
fn a_machine_that_resets_in_mid_job_is_a_system_failure() {
    assert_system_failure(&run(LINUX.get(), &job("echo begun; reboot -f; sleep 100")).job, "reset");
}

#[test]
fn a_machine_that_cuts_its_agents_connection_is_a_system_failure() {
    let script = "cd /sys/bus/virtio/drivers/vmw_vsock_virtio_transport; echo begun
        for device in virtio*; do echo $device > unbind; done; sleep 1000";
    let job = run(LINUX.get(), &job(script)).job;
    assert_eq!(job.conclusion, Some(Conclusion::SystemFailure), "{job:?}");
}

#[test]
fn a_job_that_takes_all_memory_meets_the_guests_own_oom_killer() {
    let script = "awk 'BEGIN { while (1) a[i++] = \"some memory that is kept for ever\" i }'";
    let Finished { job, .. } = run(LINUX.get(), &job(script));
    assert_eq!((job.conclusion, job.exit_code), (Some(Conclusion::Failure), Some(128 + 9)), "{job:?}");
}

#[test]
fn virtqueues_filled_with_rubbish_break_only_their_own_machine() {
    for image in ["rng-rubbish", "vsock-rubbish"] {
        let conclusion = run_bare(image).conclusion;
        let expected = matches!(conclusion, Some(Conclusion::TimedOut | Conclusion::SystemFailure));
        assert!(expected, "{image}: {conclusion:?}");
    }
}

#[test]
fn a_hostile_guest_leaves_no_frame_behind() {
    let node = bare();
    run_bare("triple-fault");
    let before = memory(node).free_frames;
    run_bare("random-access");
    run_bare("triple-fault");
    assert!(memory(node).free_frames >= before);
}
