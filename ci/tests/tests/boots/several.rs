//! Several machines at once, machines of several vCPUs, nodes of several cores.

use nestling::bed::Bed;
use nestling::client::types::{Conclusion, JobRequest, MachineConfig, Status, WaitingFor};
use nestling_tests::job::{create, job, refusal, run, wait, wait_until, warm_up};
use nestling_tests::node::{Shared, memory, ready};

/// Two cores, and so eight vCPUs at most.
static TWO_CORES: Shared = Shared::new(|| Bed::builder().cores(2));

fn machine(vcpu_count: u32, mem_size_mib: u32) -> Option<MachineConfig> {
    Some(MachineConfig { vcpu_count, mem_size_mib, ..MachineConfig::default() })
}

/// A job that counts to `number` in as many processes as `processes` says.
fn counting(processes: u32, number: u32) -> String {
    let count = format!("(i=0; while [ $i -lt {number} ]; do i=$((i+1)); done; echo $i) &");
    format!("{} wait", count.repeat(processes as usize))
}

#[test]
fn eight_machines_at_once_all_finish_their_work_while_a_ninth_waits() {
    let node = ready(Bed::builder().cores(2));
    assert_eq!(node.client().host().unwrap().cores, 2);
    let request = JobRequest { machine_config: machine(1, 128), ..job(&counting(1, 3000)) };
    warm_up(&node, &request);
    let before = memory(&node).free_frames;
    let jobs: Vec<_> = (0..9).map(|_| create(&node, &request).id).collect();
    let ninth = node.client().job(&jobs[8]).unwrap();
    assert_eq!((ninth.status, ninth.waiting_for), (Status::Queued, Some(WaitingFor::Machines)), "{ninth:?}");
    assert_eq!(node.client().host().unwrap().machines, 8);
    for id in &jobs {
        let job = wait(&node, id);
        assert_eq!(job.conclusion, Some(Conclusion::Success), "{job:?}");
    }
    assert_eq!(memory(&node).free_frames, before);
}

#[test]
fn a_machine_that_never_halts_does_not_keep_another_from_its_work() {
    let node = ready(Bed::builder());
    let busy = create(&node, &job("echo begun; while :; do :; done")).id;
    wait_until(&node, &busy, |job| job.timings.first_output_ms.is_some());
    let other = run(&node, &job("echo there"));
    assert_eq!((&*other.stdout, other.job.conclusion), (&b"there\n"[..], Some(Conclusion::Success)));
    node.client().cancel(&busy).unwrap();
    assert_eq!(wait(&node, &busy).conclusion, Some(Conclusion::Cancelled));
}

/// What `/proc/stat` says of each vCPU: whether it has run a program.
const WHO_RAN: &str =
    "grep '^cpu[0-9]' /proc/stat | while read cpu user rest; do [ $user -gt 0 ] && echo $cpu ran; done";

#[test]
fn a_job_on_two_vcpus_sees_two_and_runs_both() {
    let request = JobRequest {
        machine_config: machine(2, 256),
        ..job(&format!("nproc; {{ {}; }} >&2; {WHO_RAN}", counting(4, 10_000)))
    };
    let finished = run(TWO_CORES.get(), &request);
    assert_eq!(String::from_utf8_lossy(&finished.stdout), "2\ncpu0 ran\ncpu1 ran\n", "{finished:?}");
}

#[test]
fn four_vcpus_share_one_core() {
    let node = ready(Bed::builder());
    let request = JobRequest {
        machine_config: machine(4, 256),
        ..job(&format!("nproc; {}; {WHO_RAN}", counting(8, 3000)))
    };
    let finished = run(&node, &request);
    let output = String::from_utf8_lossy(&finished.stdout);
    let lines = |line: &str| output.lines().filter(|other| *other == line).count();
    assert_eq!((lines("4"), lines("3000")), (1, 8), "{output}");
    for cpu in 0..4 {
        assert_eq!(lines(&format!("cpu{cpu} ran")), 1, "{output}");
    }
}

#[test]
fn machines_that_are_cancelled_at_any_time_give_everything_back() {
    let node = TWO_CORES.get();
    let request = JobRequest { machine_config: machine(4, 128), ..job("while :; do :; done") };
    warm_up(node, &request);
    let before = memory(node).free_frames;
    for round in 0..6 {
        let jobs: Vec<_> = (0..2).map(|_| create(node, &request).id).collect();
        for (index, id) in (0_u64..).zip(&jobs) {
            wait_until(node, id, |job| {
                job.exits.get("total").is_some_and(|exits| *exits > 300 * round * (index + 1))
            });
            node.client().cancel(id).unwrap();
        }
        for id in &jobs {
            assert_eq!(wait(node, id).conclusion, Some(Conclusion::Cancelled));
        }
    }
    assert_eq!(memory(node).free_frames, before);
}

#[test]
fn a_machine_that_can_never_have_its_vcpus_is_refused_with_the_number() {
    let node = TWO_CORES.get();
    for vcpus in [0, 9, 1000] {
        let request = JobRequest { machine_config: machine(vcpus, 128), ..job("true") };
        let error = node.client().create_job(&request);
        let text = format!("{error:?}");
        assert!(text.contains("1 to 8 vCPUs"), "{text}");
        assert_eq!(refusal(error), "validation_failed");
    }
}

#[test]
fn the_command_line_decides_how_many_cores_and_vcpus_are_used() {
    let node = ready(Bed::builder().cores(2).append("cores=1 vcpus_per_core=2"));
    assert_eq!(node.client().host().unwrap().cores, 1);
    let request = JobRequest { machine_config: machine(3, 128), ..job("true") };
    assert_eq!(refusal(node.client().create_job(&request)), "validation_failed");
    assert_eq!(run(&node, &job("true")).job.conclusion, Some(Conclusion::Success));
}
