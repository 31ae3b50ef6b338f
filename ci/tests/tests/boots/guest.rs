//! Guests that break, run wild or attack: their job ends with a reason, and the node goes on.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use nestling::bed::{Bed, BedBuilder, RunningBed};
use nestling::client::Finished;
use nestling::client::types::{Conclusion, Job, JobRequest};
use nestling_tests::guest::{bundle, program};
use nestling_tests::job::{create, job, run, wait};
use nestling_tests::node::{Shared, memory};

/// A node for guests that are Linux.
static LINUX: Shared = Shared::new(Bed::builder);
/// A node that has the bare guests of this file as images, beside `minimal`.
static BARE: Shared = Shared::new(bare_node);

fn bare_node() -> BedBuilder {
    let minimal = nestling::image::find(None).unwrap_or_else(|error| panic!("{error}"));
    let file = format!("nestling-guests-{}.tar", std::process::id());
    let path = bundle(&std::env::temp_dir().join(file), &minimal, &guests());
    Bed::builder().image(path)
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
    let (mut again, mut devices) = (guest.create_label(), guest.create_label());
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
    guest.set_label(&mut devices)?;
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

/// Runs a bare guest until its job's time is over or it ends itself.
fn run_bare(image: &str) -> Job {
    let node = BARE.get();
    let request = JobRequest {
        image: Some(image.into()),
        timeout_seconds: Some(5),
        ..job("echo no agent will run this")
    };
    let id = create(node, &request).id;
    let job = wait(node, &id);
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
    assert!(job.console.as_deref().unwrap_or_default().contains("Kernel panic"), "{job:?}");
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
fn a_virtqueue_filled_with_rubbish_breaks_only_its_own_machine() {
    let node = LINUX.get();
    // The rng device is taken from its driver; then its queue is laid over the kernel's own text and kicked.
    let script = r"
        for device in /sys/bus/pci/devices/*; do
            case $(cat $device/device) in 0x1044) break;; esac
        done
        name=${device##*/}
        echo $name > /sys/bus/pci/drivers/virtio-pci/unbind
        echo 1 > $device/enable
        bar=$(awk '$1 != $2 && $1 ~ /^0x0000000[^0]/ { print $1; exit }' $device/resource)
        port=$(awk '$1 != $2 && $1 ~ /^0x000000000000[^0]/ { print $1; exit }' $device/resource)
        echo bar $bar port $port
        common=$((bar))
        write() { devmem $((common + $1)) $2 $3; }
        write 0x14 8 0; write 0x14 8 1; write 0x14 8 3
        write 0x08 32 1; write 0x0c 32 1
        write 0x14 8 11
        write 0x16 16 0
        for at in 0x20 0x28 0x30; do write $at 32 0x1000000; write $((at + 4)) 32 0; done
        write 0x1c 16 1
        write 0x14 8 15
        for kick in 1 2 3 4 5 6 7 8; do
            printf '\0\0' | dd of=/dev/port bs=2 seek=$((port / 2)) conv=notrunc 2>/dev/null
        done
        write 0x20 32 0xffffffff; write 0x24 32 0xffffffff
        printf '\0\0' | dd of=/dev/port bs=2 seek=$((port / 2)) conv=notrunc 2>/dev/null
        echo kicked
    ";
    let finished = run(node, &job(script));
    // What becomes of this machine is its own affair: the device broke, or wrote over its kernel as it was told to.
    let output = String::from_utf8_lossy(&finished.stdout).into_owned();
    assert!(output.contains("bar 0x") && output.contains("port 0x"), "{output}\n{finished:?}");
    assert_serves(node);
}

#[test]
fn a_hostile_guest_leaves_no_frame_behind() {
    let node = BARE.get();
    run_bare("triple-fault");
    let before = memory(node).free_frames;
    run_bare("random-access");
    run_bare("triple-fault");
    assert!(memory(node).free_frames >= before);
}
