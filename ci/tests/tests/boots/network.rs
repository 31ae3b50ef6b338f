//! The network inside machines: out through the node's address, as far as the job's egress policy says.
//!
//! QEMU's user network stands for the outside: 10.0.2.2 is the host's loopback, where a test serves.

use nestling::bed::{Bed, BedBuilder, RunningBed};
use nestling::client::types::{
    Conclusion, Connection, ConnectionList, JobRequest, Network, Protocol, Status, Verdict,
};
use nestling_tests::job::{create, job, run, wait, wait_until};
use nestling_tests::node::{Shared, ready};
use nestling_tests::outside::{Dns, Echo};

/// The host's loopback as machines see it.
const HOST: &str = "10.0.2.2";

static NODE: Shared = Shared::new(Bed::builder);

/// A job that may reach what `egress` says.
fn allowed(egress: serde_json::Value, script: &str) -> JobRequest {
    let egress = serde_json::from_value(egress).expect("a policy");
    JobRequest { network: Some(Network { egress }), ..job(script) }
}

/// Runs a job that has to succeed; its output, and whom it connected to.
fn succeed(node: &RunningBed, request: &JobRequest) -> (String, ConnectionList) {
    let finished = run(node, request);
    let output = String::from_utf8_lossy(&finished.stdout).into_owned();
    let errors = String::from_utf8_lossy(&finished.stderr);
    let job = finished.job;
    assert_eq!(job.conclusion, Some(Conclusion::Success), "{output}\n{errors}\n{job:?}");
    let connections = node.client().connections(&job.id).expect("the job's connections");
    (output, connections)
}

/// Those to `port`.
fn to_port(list: &ConnectionList, port: u16) -> Vec<&Connection> {
    list.connections.iter().filter(|connection| connection.port == Some(port)).collect()
}

#[test]
fn megabytes_go_out_and_come_back_as_they_were_and_are_in_the_log() {
    const BYTES: u64 = 3_000_000;
    let echo = Echo::start();
    let script = format!(
        "head -c {BYTES} /dev/urandom > sent; nc {HOST} {} < sent > received; cmp sent received && echo same",
        echo.port()
    );
    let (output, connections) = succeed(NODE.get(), &job(&script));
    assert_eq!(output, "same\n");
    let [connection] = to_port(&connections, echo.port())[..] else { panic!("{connections:?}") };
    assert_eq!((connection.protocol, connection.verdict), (Protocol::Tcp, Verdict::Allowed));
    assert_eq!(connection.address.as_deref(), Some(HOST));
    assert!(connection.bytes_sent >= BYTES && connection.bytes_received >= BYTES, "{connection:?}");
}

#[test]
fn a_machine_finds_its_network_set_up_and_by_dhcp_finds_the_same() {
    let script = "ip -4 addr show eth0; ip route; cat /etc/resolv.conf; ping -c 2 192.0.0.1; \
                  udhcpc -n -q -i eth0 -s /bin/true";
    let (output, _) = succeed(NODE.get(), &job(script));
    for part in
        ["192.0.0.2/29", "default via 192.0.0.1 dev eth0", "nameserver 192.0.0.1", "2 packets received"]
    {
        assert!(output.contains(part), "{part}: {output}");
    }
}

#[test]
fn a_job_without_egress_is_refused_at_once_and_the_log_says_why() {
    let echo = Echo::start();
    // Both would wait for a minute if they were not answered.
    let script =
        format!("nc {HOST} {} < /dev/null && exit 1; nslookup example.org && exit 2; exit 0", echo.port());
    let (_, connections) = succeed(NODE.get(), &allowed("none".into(), &script));
    let [refused] = to_port(&connections, echo.port())[..] else { panic!("{connections:?}") };
    assert_eq!((refused.protocol, refused.verdict), (Protocol::Tcp, Verdict::Refused));
    assert!(refused.reason.as_ref().is_some_and(|reason| reason.contains("network.egress")), "{refused:?}");
    let name = connections.connections.iter().find(|connection| connection.protocol == Protocol::Dns);
    assert_eq!(name.and_then(|name| name.name.as_deref()), Some("example.org"), "{connections:?}");
    assert_eq!(echo.accepted(), 0);
}

#[test]
fn rules_let_names_and_ports_through_and_nothing_else() {
    let (echo, other, dns) = (Echo::start(), Echo::start(), Dns::start([10, 0, 2, 2]));
    let node = ready(with_dns(&dns));
    let script = format!(
        "echo hello > sent; nc mirror.example.org {port} < sent > received || exit 1; cmp sent received || exit 2
         nc {HOST} {other} < sent && exit 3
         nc elsewhere.example.net {port} < sent && exit 4
         exit 0",
        port = echo.port(),
        other = other.port()
    );
    let rule = format!("*.example.org:{}", echo.port());
    let (_, connections) = succeed(&node, &allowed(serde_json::json!([rule]), &script));
    let [connection] = to_port(&connections, echo.port())[..] else { panic!("{connections:?}") };
    assert_eq!(connection.verdict, Verdict::Allowed);
    assert_eq!(connection.name.as_deref(), Some("mirror.example.org"));
    let [refused] = to_port(&connections, other.port())[..] else { panic!("{connections:?}") };
    assert_eq!(refused.verdict, Verdict::Refused);
    let names: Vec<_> =
        connections.connections.iter().filter(|connection| connection.protocol == Protocol::Dns).collect();
    assert!(names.iter().all(|name| name.name.as_deref() == Some("elsewhere.example.net")), "{names:?}");
    assert!(!names.is_empty() && !dns.asked().iter().any(|name| name.contains("example.net")));
    assert_eq!((echo.accepted(), other.accepted()), (1, 0));
}

#[test]
fn no_machine_reaches_the_node_or_the_clouds_metadata() {
    let script = "for to in 10.0.2.15:8080 169.254.169.254:80 192.0.0.1:8080; do
                    nc ${to%:*} ${to#*:} < /dev/null && exit 1; done; exit 0";
    let (_, connections) = succeed(NODE.get(), &job(script));
    for (port, address) in [(8080, "10.0.2.15"), (80, "169.254.169.254")] {
        let refused = to_port(&connections, port);
        let refused = refused.iter().find(|refused| refused.address.as_deref() == Some(address));
        assert!(refused.is_some_and(|refused| refused.verdict == Verdict::Refused), "{connections:?}");
    }
}

#[test]
fn a_flood_of_connections_of_one_job_leaves_another_its_network() {
    let (echo, node) = (Echo::start(), ready(Bed::builder()));
    // An address of the uplink's network that nobody has, so that no connection gets further than its SYN.
    let flood = "i=0; while true; do i=$((i + 1)); nc -w 1 10.0.2.77 $((i % 60000 + 1)) < /dev/null & \
                 [ $((i % 50)) = 0 ] && wait; done";
    let flood = create(&node, &job(&format!("echo flooding; {flood}")));
    wait_until(&node, &flood.id, |job| job.log.bytes > 0 && job.connections.total > 100);
    let script = format!("echo hello > sent; nc {HOST} {} < sent > received; cmp sent received", echo.port());
    succeed(&node, &job(&script));
    node.client().cancel(&flood.id).expect("cancelling");
    assert_eq!(wait(&node, &flood.id).status, Status::Completed);
}

#[test]
fn an_uplink_of_a_smaller_mtu_carries_megabytes_and_tells_machines_what_fits() {
    const BYTES: u64 = 1_000_000;
    let (echo, node) = (Echo::start(), ready(Bed::builder().append("mtu=1280")));
    // The first ping is too large and comes back as an error, by which the guest cuts the others.
    let script = format!(
        "head -c {BYTES} /dev/urandom > sent; nc {HOST} {} < sent > received; cmp sent received && echo same; \
         ping -c 3 -s 1400 {HOST} || true",
        echo.port()
    );
    let (output, connections) = succeed(&node, &job(&script));
    assert!(output.starts_with("same\n") && output.contains("2 packets received"), "{output}");
    let [connection] = to_port(&connections, echo.port())[..] else { panic!("{connections:?}") };
    assert!(connection.bytes_sent >= BYTES && connection.bytes_received >= BYTES, "{connection:?}");
}

fn with_dns(dns: &Dns) -> BedBuilder {
    Bed::builder().append(format!("dns={HOST}:{}", dns.port()))
}
