//! The command line.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use nestling::bed::{BedKind, UnknownBed};
use nestling_image_builder::build::Source;

/// Run CI jobs, each in a fresh virtual machine of its own.
#[derive(Debug, Parser)]
#[command(
    name = "nestling",
    version,
    max_term_width = 100,
    disable_help_subcommand = true,
    after_help = "Start with:\n  nestling run -- uname -a\n\nThe first run starts a node on this computer and leaves it up; `nestling down` stops it."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Up(Up),
    Down(Down),
    Run(Run),
    Status(Status),
    Jobs(Jobs),
    Logs(Logs),
    Artifacts(Artifacts),
    Connections(Connections),
    Cancel(Cancel),
    #[command(subcommand)]
    Image(Image),
}

/// Which node a command talks to.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct NodeOptions {
    /// The node: a URL, or the name of a node on this computer [default: the one that is up]
    #[arg(
        long,
        env = "NESTLING_NODE",
        value_name = "URL|NAME",
        help_heading = "Node",
        hide_env_values = true
    )]
    pub(crate) node: Option<String>,
    /// The node's token; a node on this computer needs none here
    #[arg(long, env = "NESTLING_TOKEN", value_name = "TOKEN", help_heading = "Node", hide_env_values = true)]
    pub(crate) token: Option<String>,
}

/// What executes a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum BedChoice {
    /// KVM where it can nest, else QEMU's emulator.
    Auto,
    /// This one.
    Named(BedKind),
}

impl FromStr for BedChoice {
    type Err = String;

    fn from_str(name: &str) -> Result<BedChoice, String> {
        match name {
            "auto" => Ok(BedChoice::Auto),
            _ => name.parse().map(BedChoice::Named).map_err(|error: UnknownBed| format!("{error}, or auto")),
        }
    }
}

/// A size in MiB.
fn mib(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| "give a number of MiB without a unit, such as 4096 for 4 GiB".to_owned())
}

/// Start a node on this computer
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  nestling up
  nestling up --memory 4096 --cpus 4 --port 8080
  nestling up --name second --no-auth
  nestling up --bed bochs:corei7_skylake_x

Beds:
  auto           qemu-kvm where KVM can nest, else qemu-tcg
  qemu-tcg       QEMU's emulator of an AMD CPU: on any computer
  qemu-kvm       QEMU with KVM: kvm_amd or kvm_intel must be loaded with nested=1
  bochs[:MODEL]  Bochs: slower than qemu-tcg, but with Intel CPUs too; at most 2048 MiB of memory;
                 `bochs -help cpu` lists the models [default: corei7_haswell_4770]

The node listens on 127.0.0.1 only. Its record, log and token are in $XDG_STATE_HOME/nestling/NAME
(~/.local/state/nestling/NAME), readable by you alone.")]
pub(crate) struct Up {
    /// What executes the node: auto, qemu-tcg, qemu-kvm or bochs[:MODEL]
    #[arg(long, value_name = "BED", default_value = "auto")]
    pub(crate) bed: BedChoice,
    /// The node's memory; jobs' machines are made from it
    #[arg(long, value_name = "MIB", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    pub(crate) memory: u32,
    /// The node's cores [default: in QEMU this computer's, at most 2; in Bochs 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=255))]
    pub(crate) cpus: Option<u32>,
    /// The port on 127.0.0.1; 0 is any free one
    #[arg(long, default_value_t = 0)]
    pub(crate) port: u16,
    /// A name, to have several nodes
    #[arg(long, default_value = nestling::state::DEFAULT_NODE)]
    pub(crate) name: String,
    /// The bundle of images [default: NESTLING_IMAGE, or the one in this checkout's target/images, or the one in
    /// $XDG_DATA_HOME/nestling/images]
    #[arg(long, value_name = "FILE")]
    pub(crate) image: Option<PathBuf>,
    /// The store of further images, see `nestling image` [default: $XDG_DATA_HOME/nestling/images.tar, where it is there]
    #[arg(long, value_name = "FILE")]
    pub(crate) store: Option<PathBuf>,
    /// The token clients must have [default: a random one]
    #[arg(long, env = "NESTLING_TOKEN", hide_env_values = true)]
    pub(crate) token: Option<String>,
    /// Ask clients for no token, whatever --token says: any user of this computer can run jobs
    #[arg(long)]
    pub(crate) no_auth: bool,
    /// Print only errors
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

/// Stop a node on this computer, with its jobs
#[derive(Debug, Args)]
pub(crate) struct Down {
    /// The node's name
    #[arg(default_value = nestling::state::DEFAULT_NODE)]
    pub(crate) name: String,
    /// All nodes on this computer
    #[arg(long, conflicts_with = "name")]
    pub(crate) all: bool,
}

/// Run a command as a job, in a fresh machine, and show its output
///
/// The words after -- are a program and exactly its arguments; for what a shell does, give sh -c '...'. Starts a node on this
/// computer when none is up and none is named, and leaves it up. Ctrl-C cancels the job; a second one leaves at once.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  nestling run -- uname -r
  nestling run -- sh -c 'uname -r; echo hi; exit 7'
  nestling run --env GREETING=hi --timeout 10m -- sh -c 'echo $GREETING; exit 7'
  nestling run --workspace . --artifact target/report.xml --artifact 'dist/**' -- make test
  nestling run --egress '*.debian.org:80' --egress 192.0.2.7:22 -- ./fetch
  nestling run --egress none -- make test
  nestling run --memory 512 -- dd if=/dev/zero of=/dev/null bs=1M count=100
  nestling run --image debian --memory 1024 --disk 8192 -- ./build-all

Exit code: the command's own (128+n when signal n killed it), or
  124  the job timed out
  125  the machine, the node or nestling failed
  126  the command is there but cannot be executed
  127  the command was not found
  130  the job was cancelled")]
pub(crate) struct Run {
    /// The image the machine boots
    #[arg(long, value_name = "NAME")]
    pub(crate) image: Option<String>,
    /// The machine's virtual CPUs
    #[arg(long, value_name = "N")]
    pub(crate) vcpus: Option<u32>,
    /// The machine's memory
    #[arg(long, value_name = "MIB", value_parser = mib)]
    pub(crate) memory: Option<u32>,
    /// Free space on the machine's disk, for images that have one [default: what the image says, as far as the node has it]
    #[arg(long, value_name = "MIB", value_parser = mib)]
    pub(crate) disk: Option<u32>,
    /// Boot the machine, rather than begin in a clone of one that has booted
    #[arg(long)]
    pub(crate) cold: bool,
    /// Set a variable; without =VALUE it is taken from the environment
    #[arg(long, short, value_name = "NAME[=VALUE]")]
    pub(crate) env: Vec<String>,
    /// Send this directory into the machine first; the command starts in it. What git ignores stays out, and so does .git
    #[arg(long, value_name = "DIR")]
    pub(crate) workspace: Option<PathBuf>,
    /// Bring files out of the workspace after the command, whether it failed or not: a path or a glob (*, ?, [a-z], and **
    /// for any directories), a directory for all in it; may be given again
    #[arg(long, value_name = "GLOB")]
    pub(crate) artifact: Vec<String>,
    /// Where those files go [default: the current directory]
    #[arg(long, value_name = "DIR", requires = "artifact", conflicts_with = "detach")]
    pub(crate) artifact_dir: Option<PathBuf>,
    /// What the machine may reach: none, all, or a host (example.org), names below one (*.example.org), an address or a
    /// network (10.0.0.0/8), with or without a port (:443); rules may be given again [default: all]
    #[arg(long, value_name = "none|all|RULE")]
    pub(crate) egress: Vec<String>,
    /// How long the job may run, such as 90, 90s, 10m or 2h [default: 1h]
    #[arg(long, value_name = "TIME", value_parser = nestling::duration::parse)]
    pub(crate) timeout: Option<Duration>,
    /// A name for people [default: the command]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// A label for people and schedulers; may be given again
    #[arg(long)]
    pub(crate) label: Vec<String>,
    /// Print the job's ID and leave; see `nestling logs -f` and `nestling artifacts`
    #[arg(long, short)]
    pub(crate) detach: bool,
    /// Delete the job and its log from the node once it is over
    #[arg(long, conflicts_with = "detach")]
    pub(crate) rm: bool,
    /// Print only the job's own output, and errors
    #[arg(long, short)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) node: NodeOptions,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

/// Show a node: what it runs on, its memory, its machines
#[derive(Debug, Args)]
pub(crate) struct Status {
    /// Print it as JSON, as the node's API has it
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) node: NodeOptions,
}

/// Which jobs to list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum StatusFilter {
    Queued,
    InProgress,
    Completed,
}

/// List jobs, newest first
#[derive(Debug, Args)]
pub(crate) struct Jobs {
    /// Only jobs that stand here
    #[arg(long, value_enum)]
    pub(crate) status: Option<StatusFilter>,
    /// How many at most
    #[arg(long, short = 'n', default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) limit: u32,
    /// Print them as JSON, as the node's API has them
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) node: NodeOptions,
}

/// Show a job's output: its standard output on ours, its standard error on ours
#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// The job's ID, the beginning of it, or `last`
    pub(crate) id: String,
    /// Follow it until the job is over
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Only the standard output
    #[arg(long, conflicts_with = "stderr")]
    pub(crate) stdout: bool,
    /// Only the standard error
    #[arg(long)]
    pub(crate) stderr: bool,
    #[command(flatten)]
    pub(crate) node: NodeOptions,
}

/// Fetch a job's artifacts, as of one that was started with --detach, and list them
///
/// Waits until the command has ended. The node keeps the machine for 60 s from then on, and until all artifacts were fetched once.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  id=$(nestling run --detach --artifact 'dist/**' -- make) && nestling artifacts $id
  nestling artifacts last --dir out
  nestling artifacts last --dir . --artifact 'dist/*.tar'")]
pub(crate) struct Artifacts {
    /// The job's ID, the beginning of it, or `last`
    pub(crate) id: String,
    /// Where they go: a directory that is new or empty, unless --artifact says what to take [default: artifacts-ID]
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Take only these; the others are gone then. May be given again [default: all that the job was created with]
    #[arg(long, value_name = "GLOB")]
    pub(crate) artifact: Vec<String>,
    /// Print only the list, and errors
    #[arg(long, short)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) node: NodeOptions,
}

/// Show whom a job's machine connected to, or tried to
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  nestling connections last
  nestling connections --refused 4f1a30c
  nestling connections --json last")]
pub(crate) struct Connections {
    /// The job's ID, the beginning of it, or `last`
    pub(crate) id: String,
    /// Only connections that were refused
    #[arg(long, conflicts_with = "json")]
    pub(crate) refused: bool,
    /// Print them as JSON, as the node's API has them
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) node: NodeOptions,
}

/// Cancel jobs that wait or run
#[derive(Debug, Args)]
pub(crate) struct Cancel {
    /// Their IDs, the beginnings of them, or `last`
    #[arg(required = true)]
    pub(crate) ids: Vec<String>,
    #[command(flatten)]
    pub(crate) node: NodeOptions,
}

/// Build images that machines boot, and keep them in a store that nodes read
#[derive(Debug, Subcommand)]
pub(crate) enum Image {
    Build(ImageBuild),
    Add(ImageAdd),
    List(ImageList),
    Remove(ImageRemove),
}

/// Build an image from a root file system: a tar, a folder, or an OCI image
///
/// The agent is added, and a kernel: Debian's for virtual machines by apt, unless --kernel says otherwise. Needs no privileges; what is in
/// an archive comes out with its owners, devices and attributes.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  docker export $(docker create my-ci) > root.tar && nestling image build my-ci --from root.tar
  skopeo copy docker://debian:12 oci:debian12 && nestling image build debian12 --from oci:debian12
  buildah push my-ci oci:layout:latest && nestling image build my-ci --from oci:layout:latest
  nestling image build mine --from ./root --kernel own --free 8192

Then: nestling image add my-ci.tar && nestling run --image my-ci -- make")]
pub(crate) struct ImageBuild {
    /// The image's name
    pub(crate) name: String,
    /// The root: a tar (also .gz, .xz, .zst), a folder, or oci:DIR[:TAG]
    #[arg(long, value_name = "SOURCE")]
    pub(crate) from: Source,
    /// The bundle to write [default: NAME.tar]
    #[arg(long, short, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// The kernel: a bzImage, or `own` for the newest in the root's /boot [default: Debian's cloud kernel]
    #[arg(long, value_name = "FILE|own")]
    pub(crate) kernel: Option<PathBuf>,
    /// The modules of --kernel FILE: /lib/modules/RELEASE, or a folder that has it
    #[arg(long, value_name = "DIR", requires = "kernel")]
    pub(crate) modules: Option<PathBuf>,
    /// What a machine's disk has free
    #[arg(long, value_name = "MIB", default_value_t = nestling_image_builder::build::FREE_MIB)]
    pub(crate) free: u32,
    /// Print only errors
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

/// Add images to a store; nodes that start afterwards have them
#[derive(Debug, Args)]
pub(crate) struct ImageAdd {
    /// Bundles, as `nestling image build` and `cargo xtask image` make them
    #[arg(required = true, value_name = "BUNDLE")]
    pub(crate) bundles: Vec<PathBuf>,
    /// The store: a file, which is made if it is not there, or a disk, perhaps with a partition named nestling-images
    /// [default: $XDG_DATA_HOME/nestling/images.tar]
    #[arg(long, value_name = "STORE")]
    pub(crate) to: Option<PathBuf>,
    /// Replace images of the same names
    #[arg(long)]
    pub(crate) replace: bool,
}

/// List the images of a store or a bundle
#[derive(Debug, Args)]
pub(crate) struct ImageList {
    /// The store or bundle [default: $XDG_DATA_HOME/nestling/images.tar]
    #[arg(value_name = "STORE")]
    pub(crate) store: Option<PathBuf>,
}

/// Remove an image from a store
#[derive(Debug, Args)]
pub(crate) struct ImageRemove {
    /// The image's name
    pub(crate) name: String,
    /// The store [default: $XDG_DATA_HOME/nestling/images.tar]
    #[arg(long, value_name = "STORE")]
    pub(crate) from: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn all_words_after_the_dashes_are_the_command() {
        let cli =
            Cli::parse_from(["nestling", "run", "--env", "A=b", "--", "sh", "-c", "exit 7", "--env", "--"]);
        let Command::Run(run) = cli.command else { panic!("not run") };
        assert_eq!(run.command, ["sh", "-c", "exit 7", "--env", "--"]);
        assert_eq!(run.env, ["A=b"]);
    }

    #[test]
    fn a_bed_is_named_with_its_model_and_others_are_refused_with_those_there_are() {
        let up = |bed: &str| match Cli::try_parse_from(["nestling", "up", "--bed", bed]) {
            Ok(Cli { command: Command::Up(up) }) => Ok(up.bed),
            other => Err(format!("{other:?}")),
        };
        assert_eq!(up("auto").unwrap(), BedChoice::Auto);
        assert_eq!(up("bochs:ryzen").unwrap(), BedChoice::Named(BedKind::Bochs { model: "ryzen".into() }));
        let error = up("vmware").unwrap_err();
        assert!(error.contains("qemu-tcg, qemu-kvm, bochs or bochs:MODEL, or auto"), "{error}");
    }

    #[test]
    fn sizes_are_numbers_of_mib() {
        for size in ["4G", "-1", "", "4294967296"] {
            for option in ["--memory", "--disk"] {
                let words = ["nestling", "run", &format!("{option}={size}"), "--", "true"];
                let error = Cli::try_parse_from(words).unwrap_err().to_string();
                assert!(error.contains("give a number of MiB") && error.contains(option), "{error}");
            }
        }
    }

    #[test]
    fn a_command_is_needed() {
        assert!(Cli::try_parse_from(["nestling", "run"]).is_err());
        assert!(Cli::try_parse_from(["nestling", "run", "--"]).is_err());
        assert!(Cli::try_parse_from(["nestling", "run", "--timeout", "soon", "--", "true"]).is_err());
    }
}
