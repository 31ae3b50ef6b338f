//! Logs that grow faster than they are read.

use super::*;

#[test]
fn without_readers_the_log_drops_its_oldest_and_holds_nobody_back() {
    let mut jobs = JobStore::new(Limits { log_bytes: 100_000, ..Limits::default() });
    let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
    say(&mut jobs, job, &started(0), at(0));
    for _ in 0..50 {
        assert!(jobs.receive_capacity(job, at(0)) > 70_000);
        say(&mut jobs, job, &stdout(&"x".repeat(10_000)), at(0));
    }
    let info = jobs.log_info(job).unwrap();
    assert!(info.truncated && info.bytes == 500_000 && info.start_offset > 400_000, "{info:?}");
}

/// Lets a job write as long as it may, up to this much; how much it wrote.
fn write(jobs: &mut JobStore, job: JobId, most: usize, now: Clock) -> usize {
    let mut written = 0;
    while written < most {
        let room = jobs.receive_capacity(job, now).min(8192);
        if room < 100 {
            break;
        }
        say(jobs, job, &stdout(&"x".repeat(room - 5)), now);
        written += room - 5;
    }
    written
}

#[test]
fn a_follower_that_reads_slowly_holds_the_job_back_and_loses_nothing() {
    let mut jobs = JobStore::new(Limits { log_bytes: 600_000, ..Limits::default() });
    let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
    say(&mut jobs, job, &started(0), at(0));
    let mut reader =
        jobs.open_log(job, ReadOptions { follow: true, ..ReadOptions::default() }, at(0)).unwrap();
    let (mut read, mut written) = (0, 0);
    for tick in 0..100 {
        let now = at(tick * 500);
        written += write(&mut jobs, job, usize::MAX, now);
        let mut out = vec![];
        assert_eq!(jobs.read_log(&mut reader, &mut out, 20_000, now), ReadState::More);
        assert!(!out.starts_with(b"[nestling"), "after {read} bytes");
        read += out.len();
    }
    assert!(read == 2_000_000 && written > read && written < read + 600_000, "{read} {written}");
}

#[test]
fn a_follower_that_reads_nothing_for_10_s_loses_output_instead() {
    let mut jobs = JobStore::new(Limits { log_bytes: 600_000, ..Limits::default() });
    let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
    say(&mut jobs, job, &started(0), at(0));
    let mut reader =
        jobs.open_log(job, ReadOptions { follow: true, ..ReadOptions::default() }, at(0)).unwrap();
    // It has read everything there is, so its patience counts from the first output after that.
    assert_eq!(jobs.read_log(&mut reader, &mut vec![], 1000, at(1000)), ReadState::Waiting);
    write(&mut jobs, job, 900_000, at(60_000));
    assert_eq!(jobs.receive_capacity(job, at(60_000)), 0);
    assert_eq!(jobs.deadline(at(60_000)), Some(at(70_000).monotonic_ns));
    assert_eq!(jobs.receive_capacity(job, at(69_999)), 0);
    assert!(jobs.receive_capacity(job, at(70_000)) > 0);
    write(&mut jobs, job, 900_000, at(70_000));
    let mut out = vec![];
    let _ = jobs.read_log(&mut reader, &mut out, 1000, at(70_000));
    assert!(out.starts_with(b"[nestling: "), "it is told");
}

#[test]
fn a_follower_that_leaves_holds_nobody_back() {
    let mut jobs = JobStore::new(Limits { log_bytes: 600_000, ..Limits::default() });
    let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
    say(&mut jobs, job, &started(0), at(0));
    let reader = jobs.open_log(job, ReadOptions { follow: true, ..ReadOptions::default() }, at(0)).unwrap();
    assert!(write(&mut jobs, job, 900_000, at(0)) < 600_000);
    drop(reader);
    assert!(write(&mut jobs, job, 900_000, at(0)) >= 900_000);
}

#[test]
fn output_held_back_does_not_hold_up_a_timeout() {
    let mut jobs = JobStore::new(Limits { log_bytes: 600_000, ..Limits::default() });
    let request = JobRequest { timeout_seconds: Some(3), ..steps(vec![step("a")]) };
    let job = begin(&mut jobs, 1, request, at(0));
    say(&mut jobs, job, &started(0), at(0));
    let _reader = jobs.open_log(job, ReadOptions { follow: true, ..ReadOptions::default() }, at(0)).unwrap();
    write(&mut jobs, job, 900_000, at(0));
    assert_eq!(jobs.deadline(at(0)), Some(at(3000).monotonic_ns));
    jobs.poll(at(3000));
    assert!(jobs.finished(job));
}

#[test]
fn a_follower_that_reads_steadily_loses_nothing_of_large_frames() {
    for size in [32 * 1024, 64 * 1024] {
        let mut jobs = JobStore::new(Limits { log_bytes: 600_000, ..Limits::default() });
        let job = begin(&mut jobs, 1, steps(vec![step("a")]), at(0));
        say(&mut jobs, job, &started(0), at(0));
        let options = ReadOptions { follow: true, ..ReadOptions::default() };
        let mut reader = jobs.open_log(job, options, at(0)).unwrap();
        let frame = stdout(&"x".repeat(size)).encode().unwrap();
        let (mut sent, mut out) = (0, vec![]);
        let total = frame.len() * 60;
        for tick in 0.. {
            let now = at(tick);
            while sent < total {
                let room = jobs.receive_capacity(job, now).min(4096);
                let bytes = &frame[sent % frame.len()..];
                let bytes = &bytes[..bytes.len().min(room)];
                if bytes.is_empty() {
                    break;
                }
                jobs.receive(job, bytes, now);
                sent += bytes.len();
            }
            let state = jobs.read_log(&mut reader, &mut out, 5000, now);
            if sent == total && state == ReadState::Waiting {
                break;
            }
            assert!(tick < 60_000, "it goes on");
        }
        assert_eq!(out.len(), size * 60, "nothing dropped of frames of {size}");
        assert!(out.iter().all(|byte| *byte == b'x'));
    }
}

#[test]
fn a_slow_follower_decides_no_conclusion() {
    let mut jobs = JobStore::new(Limits { log_bytes: 600_000, ..Limits::default() });
    let slow = StepRequest { timeout_seconds: Some(2), ..step("a") };
    let job = begin(&mut jobs, 1, steps(vec![slow]), at(0));
    say(&mut jobs, job, &started(0), at(0));
    let options = ReadOptions { follow: true, ..ReadOptions::default() };
    let mut reader = jobs.open_log(job, options, at(0)).unwrap();
    write(&mut jobs, job, usize::MAX, at(0));
    // The step has ended, and cannot say so: the follower reads a little every now and then.
    for second in 1..60 {
        let now = at(second * 1000);
        jobs.poll(now);
        assert!(!jobs.finished(job), "after {second} s");
        assert_eq!(jobs.receive_capacity(job, now), 0, "after {second} s");
        let _ = jobs.read_log(&mut reader, &mut vec![], 200, now);
    }
    assert_eq!(jobs.deadline(at(59_000)), Some(at(60_000).monotonic_ns));
    jobs.poll(at(60_000));
    assert!(jobs.receive_capacity(job, at(60_000)) > 0, "a minute is all there is");
    jobs.poll(at(76_999));
    say(&mut jobs, job, &exited(0, 0), at(76_999));
    assert_eq!(finish(&mut jobs, job, at(76_999)).conclusion, Some(Conclusion::Success));
}

#[test]
fn all_logs_together_are_bounded_and_the_oldest_completed_one_shrinks_first() {
    let mut jobs =
        JobStore::new(Limits { log_bytes: 100_000, logs_total_bytes: 250_000, ..Limits::default() });
    for number in 1..=3 {
        let job = begin(&mut jobs, number, steps(vec![step("a")]), at(0));
        say(&mut jobs, job, &started(0), at(0));
        write(&mut jobs, job, 200_000, at(0));
        say(&mut jobs, job, &exited(0, 0), at(0));
        finish(&mut jobs, job, at(0));
        let real: usize = jobs.jobs.values().map(|record| record.log.memory()).sum();
        assert_eq!(jobs.logs_total, real);
        assert!(real <= 250_000, "{real}");
    }
    let kept = |number| {
        let info = jobs.log_info(id(number)).unwrap();
        info.bytes - info.start_offset
    };
    assert!(kept(1) < 60_000 && kept(2) > 80_000 && kept(3) > 80_000, "{} {} {}", kept(1), kept(2), kept(3));
}
