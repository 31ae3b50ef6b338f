//! Jobs in clones of a template.

use nestling::bed::{Bed, RunningBed};
use nestling::client::types::{Conclusion, JobRequest, MachineConfig, Template};
use nestling_tests::job::{job, run};
use nestling_tests::node::ready;

fn template(node: &RunningBed) -> Template {
    let list = node.client().templates().unwrap();
    assert_eq!(list.total_count, 1, "{list:?}");
    list.templates.into_iter().next().unwrap()
}

#[test]
fn the_first_job_makes_a_template_and_the_next_begins_in_a_clone_of_it() {
    let node = ready(Bed::builder());
    assert_eq!(node.client().templates().unwrap().total_count, 0);
    let first = run(&node, &job("echo first"));
    assert_eq!((&*first.stdout, first.job.conclusion), (&b"first\n"[..], Some(Conclusion::Success)));
    assert!(first.job.timings.cloned_ms.is_some(), "{:?}", first.job.timings);
    let second = run(&node, &job("echo second; cat /proc/uptime"));
    assert_eq!(second.job.conclusion, Some(Conclusion::Success), "{second:?}");
    assert!(second.stdout.starts_with(b"second\n"));
    let (one, two) = (first.job.timings, second.job.timings);
    assert!(two.first_output_ms.unwrap() * 4 < one.first_output_ms.unwrap(), "{one:?} {two:?}");
    let template = template(&node);
    assert_eq!((template.image.as_str(), template.clones_made, template.clones_alive), ("minimal", 2, 0));
    println!("{template:?} {one:?} {two:?} {:?}", second.job.memory);
    let cold = run(&node, &JobRequest { cold: true, ..job("echo cold") });
    assert_eq!((&*cold.stdout, cold.job.timings.cloned_ms), (&b"cold\n"[..], None));
    let other = JobRequest {
        machine_config: Some(MachineConfig { mem_size_mib: 128, ..MachineConfig::default() }),
        ..job("echo other")
    };
    assert_eq!(&*run(&node, &other).stdout, b"other\n");
    assert_eq!(node.client().templates().unwrap().total_count, 2, "one for each shape");
}
