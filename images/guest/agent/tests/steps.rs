//! Runs the agent as a node would: over a socket, by the protocol, with real steps.

#[allow(dead_code, reason = "other tests use more of it")]
mod agent;

use std::io::Write;
use std::net::Shutdown;
use std::time::Duration;

use agent::{Agent, step};
use nestling_api::agent::{AgentMessage, HostMessage, Kind, RunStep, StepCompleted, encode};

#[test]
fn a_step_runs_and_its_streams_stay_apart() {
    let outcome = Agent::start().run("echo out; echo err >&2");
    assert_eq!((outcome.stdout().as_str(), outcome.stderr().as_str()), ("out\n", "err\n"));
    let completed = StepCompleted { index: 0, exit_code: Some(0), signal: None, timed_out: false };
    assert_eq!(outcome.completed, Some(completed));
}

#[test]
fn exit_codes_are_reported_as_they_are() {
    let mut agent = Agent::start();
    for code in [0, 1, 7, 127, 255] {
        assert_eq!(agent.run(&format!("exit {code}")).exit_code(), Some(code));
    }
}

#[test]
fn a_step_ends_at_its_first_failing_command() {
    let outcome = Agent::start().run("echo before; false; echo after");
    assert_eq!((outcome.stdout().as_str(), outcome.exit_code()), ("before\n", Some(1)));
}

#[test]
fn a_command_that_is_not_found_gives_127() {
    let outcome = Agent::start().run("no-such-command-here");
    assert_eq!(outcome.exit_code(), Some(127));
    assert!(outcome.stderr().contains("not found"), "{}", outcome.stderr());
}

#[test]
fn a_script_that_does_not_parse_fails() {
    assert_eq!(Agent::start().run("if true; then").exit_code(), Some(2));
}

#[test]
fn an_empty_script_succeeds() {
    assert_eq!(Agent::start().run("").exit_code(), Some(0));
}

#[test]
fn a_signal_is_reported_as_a_signal() {
    let mut agent = Agent::start();
    for signal in [6, 9, 11, 15, 34, 64] {
        let outcome = agent.run(&format!("kill -{signal} $$"));
        assert_eq!((outcome.exit_code(), outcome.signal()), (None, Some(signal)));
    }
}

#[test]
fn steps_follow_one_another_in_one_agent() {
    let mut agent = Agent::start();
    for index in 0..20 {
        agent.begin(RunStep { index, ..step("echo x >> file; wc -l < file") });
        let outcome = agent.finish();
        assert_eq!(outcome.stdout().trim(), (index + 1).to_string());
        assert_eq!(outcome.completed.unwrap().index, index);
    }
}

#[test]
fn a_step_has_its_own_environment_over_the_base_and_nothing_else() {
    let mut agent = Agent::start();
    let env = [("GREETING", "hi 'there' $HOME"), ("PATH", "/usr/bin:/bin"), ("EMPTY", "")];
    let env = env.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let script = "printf '%s|%s|%s|%s|%s' \"$GREETING\" \"$PATH\" \"$CI\" \"${EMPTY-unset}\" \"${FROM_OUTSIDE-unset}\"";
    agent.begin(RunStep { env: env.into(), ..step(script) });
    assert_eq!(agent.finish().stdout(), "hi 'there' $HOME|/usr/bin:/bin|true||unset");
}

#[test]
fn the_working_directory_can_be_chosen_and_has_to_exist() {
    let mut agent = Agent::start();
    assert_eq!(agent.run("pwd").stdout().trim(), agent.folder.join("work").to_str().unwrap());
    agent.begin(RunStep { working_directory: Some("/usr".into()), ..step("pwd") });
    assert_eq!(agent.finish().stdout(), "/usr\n");
    agent.begin(RunStep { working_directory: Some("/no/such/folder".into()), ..step("pwd") });
    let outcome = agent.finish();
    assert_eq!(outcome.exit_code(), Some(126));
    assert!(outcome.stderr().contains("/no/such/folder does not exist"), "{}", outcome.stderr());
    assert_eq!(agent.run("echo on").stdout(), "on\n", "the agent goes on");
}

#[test]
fn names_and_folders_with_zero_bytes_fail_their_step_alone() {
    let mut agent = Agent::start();
    agent.begin(RunStep { working_directory: Some("/usr\0/x".into()), ..step("pwd") });
    assert_eq!(agent.finish().exit_code(), Some(126));
    agent.begin(RunStep { env: [("A\0".into(), "b\0".into())].into(), ..step("true") });
    assert_eq!(agent.finish().exit_code(), Some(126));
    assert_eq!(agent.run("echo on").stdout(), "on\n");
}

#[test]
fn a_step_cannot_stop_the_next_one_with_what_it_leaves_in_the_scripts_place() {
    let mut agent = Agent::start();
    let scripts = agent.folder.join("scripts");
    let scripts = scripts.display();
    std::fs::write(agent.folder.join("kept"), "kept").unwrap();
    for leave in ["mkfifo", "ln -s ../kept", "ln -s nowhere"] {
        let left = agent.run(&format!("rm -f {scripts}/step-1.sh; {leave} {scripts}/step-1.sh"));
        assert_eq!(left.exit_code(), Some(0), "{}", left.stderr());
        agent.begin(RunStep { index: 1, ..step("echo ran") });
        assert_eq!(agent.finish().stdout(), "ran\n", "{leave}");
    }
    assert_eq!(std::fs::read(agent.folder.join("kept")).unwrap(), b"kept");
}

#[test]
fn standard_input_is_empty() {
    let outcome = Agent::start().run("cat; echo end");
    assert_eq!(outcome.stdout(), "end\n");
}

#[test]
fn zero_bytes_and_invalid_utf_8_pass_unchanged() {
    let outcome = Agent::start().run("printf '\\000\\377\\376 a\\200\\n'; printf '\\000\\303' >&2");
    assert_eq!(outcome.stdout, [0, 0xff, 0xfe, b' ', b'a', 0x80, b'\n']);
    assert_eq!(outcome.stderr, [0, 0xc3]);
}

#[test]
fn a_hundred_megabytes_of_output_arrive_whole() {
    let mut agent = Agent::start();
    agent.begin(step("head -c 104857600 /dev/zero | tr '\\000' x; echo end >&2"));
    let (mut total, mut stderr) = (0_usize, Vec::new());
    loop {
        match agent.next().unwrap() {
            AgentMessage::Stdout(bytes) => {
                assert!(bytes.iter().all(|&byte| byte == b'x'));
                total += bytes.len();
            }
            AgentMessage::Stderr(bytes) => stderr.extend(bytes),
            AgentMessage::StepCompleted(completed) => {
                assert_eq!(completed.exit_code, Some(0));
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((total, stderr.as_slice()), (104_857_600, b"end\n".as_slice()));
}

#[test]
fn all_output_comes_before_the_result_even_to_a_slow_reader() {
    let mut agent = Agent::start();
    agent.begin(step("head -c 3000000 /dev/zero"));
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(agent.finish().stdout.len(), 3_000_000);
}

#[test]
fn what_was_written_before_the_end_is_not_lost_to_a_background_process() {
    let mut agent = Agent::start();
    agent.begin(step("sleep 30 & head -c 60000 /dev/zero; head -c 60000 /dev/zero >&2"));
    std::thread::sleep(Duration::from_secs(3));
    let outcome = agent.finish();
    assert_eq!((outcome.stdout.len(), outcome.stderr.len()), (60_000, 60_000));
    assert_eq!(outcome.exit_code(), Some(0));
}

#[test]
fn a_background_process_outlives_its_step_and_its_output_goes_nowhere() {
    let mut agent = Agent::start();
    agent.begin(step("(while :; do echo noise; sleep 0.05; done) & echo $! > pid; exit 3"));
    assert_eq!(agent.finish().exit_code(), Some(3));
    let outcome = agent.run("sleep 0.3; kill -0 $(cat pid) && echo alive; kill $(cat pid)");
    assert_eq!(outcome.stdout(), "alive\n");
}

#[test]
fn a_background_process_that_floods_the_pipes_does_not_hold_its_step() {
    let mut agent = Agent::start();
    agent.begin(step("yes & echo $! > pid; exit 0"));
    assert_eq!(agent.finish().exit_code(), Some(0));
    assert_eq!(agent.run("kill $(cat pid); echo next").stdout(), "next\n");
}

#[test]
fn orphans_are_reaped_and_do_not_disturb_the_result() {
    let mut agent = Agent::start();
    let outcome =
        agent.run("i=0; while [ $i -lt 200 ]; do (sh -c 'exit 5' &) ; i=$((i+1)); done; sleep 0.5; exit 4");
    assert_eq!(outcome.exit_code(), Some(4));
    for _ in 0..500 {
        if agent.children().is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("left over: {:?}", agent.children());
}

#[test]
fn a_step_out_of_time_is_terminated_and_says_so() {
    let mut agent = Agent::start();
    agent.begin(RunStep { timeout_seconds: Some(1), ..step("echo started; sleep 600") });
    let outcome = agent.finish();
    assert_eq!(outcome.stdout(), "started\n");
    let completed = outcome.completed.unwrap();
    assert_eq!((completed.exit_code, completed.signal, completed.timed_out), (None, Some(15), true));
}

#[test]
fn a_step_that_ignores_sigterm_is_killed_with_its_children() {
    let mut agent = Agent::start();
    let script =
        "trap '' TERM; sh -c 'echo $$ > pid; while :; do sleep 30; done' & while :; do sleep 30; done";
    agent.begin(RunStep { timeout_seconds: Some(1), ..step(script) });
    let completed = agent.finish().completed.unwrap();
    assert_eq!((completed.signal, completed.timed_out), (Some(9), true));
    assert_eq!(agent.run("sleep 0.2; kill -0 $(cat pid) 2>/dev/null || echo gone").stdout(), "gone\n");
}

#[test]
fn a_step_can_clean_up_when_it_is_terminated() {
    let mut agent = Agent::start();
    let script = "trap 'echo cleaning; exit 9' TERM; echo ready; while :; do sleep 0.05; done";
    agent.begin(step(script));
    agent.await_output("ready");
    agent.say(&HostMessage::CancelStep);
    let outcome = agent.finish();
    assert_eq!(outcome.stdout(), "cleaning\n");
    assert_eq!((outcome.exit_code(), outcome.completed.unwrap().timed_out), (Some(9), false));
}

#[test]
fn a_cancelled_step_takes_its_group_along() {
    let mut agent = Agent::start();
    agent.begin(step("(trap '' TERM; exec sleep 601) & echo $! > pid; echo ready; wait"));
    agent.await_output("ready");
    agent.say(&HostMessage::CancelStep);
    assert_eq!(agent.finish().signal(), Some(15));
    assert_eq!(agent.run("sleep 0.2; kill -0 $(cat pid) 2>/dev/null || echo gone").stdout(), "gone\n");
}

#[test]
fn a_step_can_be_cancelled_while_nobody_reads_its_output() {
    let mut agent = Agent::start();
    agent.begin(step("yes"));
    std::thread::sleep(Duration::from_millis(500));
    agent.say(&HostMessage::CancelStep);
    assert_eq!(agent.finish().signal(), Some(15));
}

#[test]
fn cancelling_nothing_does_nothing() {
    let mut agent = Agent::start();
    agent.say(&HostMessage::CancelStep);
    assert_eq!(agent.run("echo on").stdout(), "on\n");
}

#[test]
fn a_second_step_at_once_is_a_failure_with_its_reason() {
    let mut agent = Agent::start();
    agent.begin(step("exec sleep 600"));
    agent.say(&HostMessage::RunStep(RunStep { index: 1, ..step("true") }));
    match agent.next() {
        Some(AgentMessage::Failure(failure)) => {
            assert_eq!(failure.message, "the node asked for step 1 while another one runs");
        }
        other => panic!("{other:?}"),
    }
    assert!(agent.next().is_none());
    assert!(!agent.process.wait().unwrap().success());
}

#[test]
fn rubbish_from_the_node_is_a_failure_with_its_reason() {
    for (bytes, reason) in [
        (vec![0, 0, 0, 0, 0x42], "unknown frame kind 0x42"),
        (vec![0xff, 0xff, 0xff, 0x7f, 0x01], "RunStep frame of 2147483647 bytes"),
        (encode(Kind::RunStep, b"{\"index\":").unwrap(), "malformed RunStep frame"),
        (encode(Kind::RunStep, &[0xff; 64]).unwrap(), "malformed RunStep frame"),
        (encode(Kind::Stdout, b"hi").unwrap(), "unexpected Stdout frame"),
    ] {
        let mut agent = Agent::start();
        agent.socket.write_all(&bytes).unwrap();
        match agent.next() {
            Some(AgentMessage::Failure(failure)) => {
                assert!(failure.message.contains(reason), "{}", failure.message)
            }
            other => panic!("{other:?}"),
        }
        assert!(!agent.process.wait().unwrap().success());
    }
}

#[test]
fn the_agent_ends_and_kills_its_step_when_the_node_hangs_up() {
    let mut agent = Agent::start();
    agent.begin(step("echo $$; sleep 602"));
    let Some(AgentMessage::Stdout(pid)) = agent.next() else { panic!("no output") };
    agent.socket.shutdown(Shutdown::Both).unwrap();
    assert!(agent.process.wait().unwrap().success());
    let folder = format!("/proc/{}", String::from_utf8(pid).unwrap().trim());
    for _ in 0..500 {
        // Gone, or a zombie that its next parent has not reaped yet.
        match std::fs::read_to_string(format!("{folder}/stat")) {
            Ok(stat) if !stat.contains(") Z ") => std::thread::sleep(Duration::from_millis(20)),
            _ => return,
        }
    }
    panic!("the step still runs");
}

#[test]
fn a_script_close_to_the_limit_of_a_message_runs() {
    let mut agent = Agent::start();
    let script = format!("#{}\necho end", "x".repeat(900_000));
    assert_eq!(agent.run(&script).stdout(), "end\n");
}
