//! The network inside a machine, over whichever card the bed has.

use crate::job::ALONE;
use crate::node;
use nestling::client::types::{Conclusion, JobRequest, Network, Verdict};
use nestling_tests::job::{job, run};
use nestling_tests::outside::Echo;

#[test]
fn what_a_job_sends_comes_back_from_the_outside_and_what_its_policy_forbids_does_not_go_there() {
    let (echo, other) = (Echo::start(), Echo::start());
    let script = format!(
        "ping -c 1 192.0.0.1 > pings || exit 1
         head -c 200000 /dev/urandom > sent
         nc 10.0.2.2 {} < sent > received && cmp sent received || exit 2
         nc 10.0.2.2 {} < /dev/null && exit 3
         exit 0",
        echo.port(),
        other.port()
    );
    let egress = serde_json::json!([format!("10.0.2.2:{}", echo.port()), "192.0.2.0/24"]);
    let network = Some(Network { egress: serde_json::from_value(egress).unwrap() });
    let node = node();
    let _alone = ALONE.lock();
    let finished = run(node, &JobRequest { network, ..job(&script) });
    assert_eq!(finished.job.conclusion, Some(Conclusion::Success), "{:?}", finished.job);
    let list = node.client().connections(&finished.job.id).unwrap();
    for (port, verdict) in [(echo.port(), Verdict::Allowed), (other.port(), Verdict::Refused)] {
        let found = list.connections.iter().find(|connection| connection.port == Some(port));
        assert_eq!(found.map(|connection| connection.verdict), Some(verdict), "{list:?}");
    }
    // Bochs' slirp may connect again for a SYN that was sent again.
    assert!(echo.accepted() > 0);
    assert_eq!(other.accepted(), 0);
}
