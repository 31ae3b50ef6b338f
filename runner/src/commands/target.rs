//! Which node a command talks to, and which job a user means.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use nestling::client::types::Job;
use nestling::client::{Client, ClientError, JobQuery};
use nestling::state::{DEFAULT_NODE, LocalNode, State};

use crate::cli::NodeOptions;

/// How long a node may be silent on a connection, in QEMU.
const SILENCE: Duration = Duration::from_secs(60);
/// How long a node in Bochs is given to answer at first, and how often.
const WAKE_PATIENCE: Duration = Duration::from_secs(2);
const WAKE_TRIES: u32 = 3;
/// Jobs asked for at once.
const PAGE: u32 = 100;
/// Length of a whole job ID.
const ID_LENGTH: usize = 32;
/// Least letters of an ID's beginning.
const MIN_PREFIX: usize = 2;

/// A node to talk to.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) client: Client,
    /// Its record, when it is a node this computer started.
    pub(super) local: Option<LocalNode>,
}

impl Target {
    pub(super) fn of_local(node: LocalNode) -> Result<Target> {
        if node.url.is_empty() {
            bail!(
                "the node {} is still starting; try again, or, if the command that started it is gone, start it anew with \
                 `nestling up --name {0}`",
                node.name
            );
        }
        let client = Client::new(&node.url, node.token.as_deref())?;
        let client = client.with_silence_limit(SILENCE * node.bed.slowness());
        if !node.bed.is_qemu() {
            // Bochs' user network loses the first connection to a node that has idled for half a minute, and only that one.
            let _ = (0..WAKE_TRIES).find(|_| client.ready_within(WAKE_PATIENCE).is_ok());
        }
        Ok(Target { client, local: Some(node) })
    }
}

/// The node the options name, or the one that is up; none when none is named and none is up.
pub(super) fn find(options: &NodeOptions) -> Result<Option<Target>> {
    match options.node.as_deref().filter(|node| !node.is_empty()) {
        Some(url) if url.contains("://") => {
            Ok(Some(Target { client: Client::new(url, options.token.as_deref())?, local: None }))
        }
        Some(name) => {
            let state = State::of_user()?;
            let node = state.node(name)?.read()?.filter(LocalNode::is_running);
            let node = node.with_context(|| {
                format!(
                    "the node {name} is not up on this computer; start it with `nestling up --name {name}`"
                )
            })?;
            Ok(Some(Target::of_local(node)?))
        }
        None => {
            // One that is still starting has no URL yet: `up`, which `run` goes through, waits for it.
            let mut running = State::of_user()?.running();
            running.retain(|node| !node.url.is_empty());
            choose(running)?.map(Target::of_local).transpose()
        }
    }
}

/// As [`find`], for commands that make no sense without a node.
pub(super) fn require(options: &NodeOptions) -> Result<Target> {
    find(options)?.context(
        "no node is up on this computer; start one with `nestling up`, or name one elsewhere with --node URL or NESTLING_NODE",
    )
}

/// The one to talk to of those that run.
fn choose(running: Vec<LocalNode>) -> Result<Option<LocalNode>> {
    if let Some(node) = running.iter().find(|node| node.name == DEFAULT_NODE) {
        return Ok(Some(node.clone()));
    }
    if running.len() > 1 {
        let names: Vec<&str> = running.iter().map(|node| node.name.as_str()).collect();
        bail!("several nodes are up on this computer: name one of {} with --node", names.join(", "));
    }
    Ok(running.into_iter().next())
}

/// The ID of the job a user means: a whole ID, the beginning of one, or `last`.
pub(super) fn job_id(client: &Client, text: &str) -> Result<String> {
    if text == "last" {
        let newest =
            client.jobs(&JobQuery { per_page: Some(1), ..JobQuery::default() })?.jobs.into_iter().next();
        return newest.map(|job| job.id).context("the node has no jobs");
    }
    if !text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        || !(MIN_PREFIX..=ID_LENGTH).contains(&text.len())
    {
        bail!(
            "{text:?} is not a job's ID: give its {MIN_PREFIX} to {ID_LENGTH} first digits as `nestling jobs` shows them, or \
             `last`"
        );
    }
    if text.len() == ID_LENGTH {
        return Ok(text.to_owned());
    }
    let mut matching = all_jobs(client)?.into_iter().map(|job| job.id).filter(|id| id.starts_with(text));
    match (matching.next(), matching.next()) {
        (Some(id), None) => Ok(id),
        (Some(one), Some(other)) => {
            bail!("several jobs' IDs start with {text}, {one} and {other} among them; give more digits")
        }
        (None, _) => bail!("the node has no job whose ID starts with {text}; see `nestling jobs`"),
    }
}

/// Every job of the node, newest first.
fn all_jobs(client: &Client) -> Result<Vec<Job>, ClientError> {
    let mut jobs = Vec::new();
    for page in client.job_pages(&JobQuery { per_page: Some(PAGE), ..JobQuery::default() }) {
        jobs.extend(page?.jobs);
    }
    Ok(jobs)
}

#[cfg(test)]
mod tests {
    use nestling::bed::BedKind;

    use super::*;

    fn node(name: &str) -> LocalNode {
        LocalNode {
            name: name.into(),
            url: "http://127.0.0.1:1".into(),
            token: None,
            pid: 1,
            control: "/nonexistent".into(),
            bed: BedKind::QemuTcg,
            image: "/minimal.tar".into(),
            memory_mib: 2048,
        }
    }

    #[test]
    fn the_usual_node_comes_first_and_then_the_only_one() {
        assert_eq!(choose(vec![]).unwrap(), None);
        assert_eq!(choose(vec![node("a")]).unwrap(), Some(node("a")));
        assert_eq!(choose(vec![node("a"), node("local")]).unwrap(), Some(node("local")));
        let error = choose(vec![node("a"), node("b")]).unwrap_err().to_string();
        assert!(error.contains("a, b with --node"), "{error}");
    }

    #[test]
    fn what_cannot_be_an_id_is_refused_without_asking_the_node() {
        let client = Client::new("http://127.0.0.1:1", None).unwrap();
        for text in ["", "a", "xyz", "../host", "ABC", &"a".repeat(33)] {
            let error = job_id(&client, text).unwrap_err().to_string();
            assert!(error.contains("is not a job's ID"), "{text}: {error}");
        }
        assert_eq!(job_id(&client, &"a".repeat(32)).unwrap(), "a".repeat(32));
    }
}
