//! `cargo xtask demo`: a node, a real job on it, and what both cost. Everything goes through the `nestling` command, as a user's would.

use crate::build::{image, runner};
use crate::process::{output, shown, span, succeeds};
use crate::setup::Toolchain;
use anyhow::{Context, Result, bail};
use nestling_api::types::{Host, Job, JobList};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// What to show.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Let the job fail at its end (exit code 7), to see how that is reported
    #[arg(long)]
    fail: bool,
}

/// The node's name, apart from a user's own.
const NODE: &str = "demo";
/// The job's script.
const SCRIPT: &str = include_str!("job.sh");

/// A node that is stopped when dropped.
struct Node {
    nestling: PathBuf,
}

impl Node {
    fn start(nestling: PathBuf, images: &PathBuf) -> Result<Self> {
        let node = Self { nestling };
        // One left over from a demonstration that was killed.
        succeeds(node.command("down").arg(NODE));
        let status = node
            .command("up")
            .args(["--name", NODE, "--image"])
            .arg(images)
            .stdin(Stdio::null())
            .status()
            .context("cannot start nestling")?;
        if !status.success() {
            bail!("the node did not start ({status})");
        }
        Ok(node)
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(&self.nestling);
        command.arg(name).env_remove("NESTLING_NODE").env_remove("NESTLING_TOKEN");
        command
    }

    fn host(&self) -> Result<Host> {
        let json = output(self.command("status").args(["--json", "--node", NODE]))?;
        serde_json::from_str(&json).context("`nestling status --json`")
    }

    fn last_job(&self) -> Result<Job> {
        let json = output(self.command("jobs").args(["--json", "-n", "1", "--node", NODE]))?;
        let list: JobList = serde_json::from_str(&json).context("`nestling jobs --json`")?;
        list.jobs.into_iter().next().context("the node has no job")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        succeeds(self.command("down").arg(NODE));
    }
}

/// Builds everything, runs the job and prints the summary; exits with the job's own code.
pub(crate) fn run(toolchain: &Toolchain, arguments: &Arguments) -> Result<ExitCode> {
    let began = Instant::now();
    let (nestling, images) = (runner(toolchain)?, image("minimal")?);
    let built = began.elapsed();

    println!("\n== a node: `nestling up`");
    let began = Instant::now();
    let node = Node::start(nestling, &images)?;
    let started = began.elapsed();
    let before = node.host()?;

    println!("\n== a job in a machine of its own: `nestling run -- sh -c '...'`");
    let mut command = node.command("run");
    command.args(["--node", NODE, "--name", "demonstration"]);
    if arguments.fail {
        command.args(["--env", "FAIL=yes"]);
    }
    command.args(["--", "sh", "-ec", SCRIPT]).stdin(Stdio::null());
    let status = command.status().with_context(|| format!("cannot start `{}`", shown(&command)))?;
    let job = node.last_job()?;
    let after = node.host()?;
    drop(node);

    print!("{}", summary(built, started, &before, &after, &job));
    let code = status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
    if code != 0 && !arguments.fail {
        eprintln!("error: the job was to succeed, but `nestling run` exited with {code}");
    }
    Ok(ExitCode::from(code))
}

/// Phases, exits and memory, as a person reads them.
fn summary(built: Duration, started: Duration, before: &Host, after: &Host, job: &Job) -> String {
    let mut text = String::from("\n== summary\n");
    let mut line = |name: &str, value: String| text.push_str(&format!("   {name:<36} {value}\n"));
    let milliseconds =
        |value: Option<u64>| value.map_or("-".to_owned(), |value| span(Duration::from_millis(value)));

    let conclusion = job.conclusion.map_or("unknown", |conclusion| conclusion.as_str());
    let code = job.exit_code.map_or(String::new(), |code| format!(", exit code {code}"));
    line("the job's conclusion", format!("{conclusion}{code}"));
    line("build, with what was there before", span(built));
    line("node: QEMU start to ready", span(started));
    if let Some(own) = before.boot.kernel_entry_to_ready_ms {
        line("  of it the node's own kernel", format!("{own:.0} ms"));
    }
    line("job: left the queue after", milliseconds(job.timings.queued_ms));
    // The first job's machine: it boots, is frozen, and a clone of it runs the job.
    line("  booted and cloned, agent ready after", milliseconds(job.timings.agent_ready_ms));
    line("  first output after", milliseconds(job.timings.first_output_ms));
    line("  over after", milliseconds(job.timings.completed_ms));

    let total = job.exits.get("total").copied().unwrap_or_default();
    line("exits of its machine", total.to_string());
    let mut kinds: Vec<_> =
        job.exits.iter().filter(|(kind, count)| *kind != "total" && **count > 0).collect();
    kinds.sort_by(|one, other| other.1.cmp(one.1));
    for (kind, count) in kinds {
        line(&format!("  {kind}"), count.to_string());
    }

    let mib = |frames: u64| frames * 4096 / (1 << 20);
    line("the machine's memory", format!("{} MiB", job.machine_config.mem_size_mib));
    line("  of it ever backed", job.memory.peak_mib.map_or("-".to_owned(), |peak| format!("{peak} MiB")));
    line("the node's own heap", format!("{} KiB", after.memory.heap_used_bytes / 1024));
    let (free, free_before) = (after.memory.free_frames, before.memory.free_frames);
    line("free for machines before", format!("{} MiB", mib(free_before)));
    line("  after, with a template kept", format!("{} MiB", mib(free)));
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_is_one_a_shell_understands() {
        assert!(succeeds(Command::new("sh").args(["-n", "-c", SCRIPT])));
    }
}
