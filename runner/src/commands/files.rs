//! What is sent into a job's machine and brought out of it.

use std::io::{self, Read};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nestling::artifacts::{self, UnpackError, Unpacked};
use nestling::client::types::{Artifacts, ArtifactsStatus, Job, Status, WorkspaceStatus};
use nestling::client::{Client, ClientError};
use nestling::ready::printable;
use nestling::workspace::Workspace;

use super::run::{phase, short};
use crate::terminal::{Progress, Transfer};

/// How often a job is asked whether its machine is ready for the workspace, or its artifacts for us.
const INTERVAL: Duration = Duration::from_millis(300);
/// Tries to fetch artifacts whose transfer breaks.
const TRIES: u32 = 3;

/// Walks a directory and says what of it is left out.
pub(super) fn scan(directory: &Path, progress: &Progress) -> Result<Workspace> {
    progress.phase(&format!("reading {}", directory.display()));
    let workspace = Workspace::scan(directory)?;
    for path in workspace.skipped() {
        progress.say(&format!(
            "{} is no file, directory or link and is left out",
            printable(&path.to_string_lossy())
        ));
    }
    Ok(workspace)
}

/// Sends the workspace once the job's machine is ready for it. The job may be over then, for reasons of its own.
pub(super) fn send(client: &Client, id: &str, workspace: &Workspace, progress: &Progress) -> Result<()> {
    loop {
        let job = client.job(id)?;
        if job.status == Status::Completed {
            return Ok(());
        }
        match job.workspace.map(|workspace| workspace.status) {
            Some(WorkspaceStatus::Pending) => {}
            Some(WorkspaceStatus::Awaited) => break,
            _ => bail!("the job {id} takes no workspace; is the node of another version?"),
        }
        if progress.is_live() {
            progress.phase(&format!("job {} {}", short(id), phase(&job)));
        }
        thread::sleep(INTERVAL);
    }
    let (files, bytes) = (workspace.len(), workspace.bytes());
    let what = format!("job {}: sending {files} files, {}", short(id), size(bytes));
    let transfer = progress.begin_transfer(&what, bytes);
    let failed = Arc::new(Mutex::new(None));
    let tar = Watched { tar: workspace.tar(), transfer, failed: Arc::clone(&failed) };
    let sent = client.put_workspace(id, tar, bytes);
    progress.end_transfer();
    let Err(error) = sent else { return Ok(()) };
    if let Some(error) = failed.lock().unwrap_or_else(PoisonError::into_inner).take() {
        bail!("the workspace could not be sent: {error}");
    }
    // A node that refuses in the middle may close before its answer is read. The job tells why.
    match client.job(id) {
        Ok(Job { status: Status::Completed, .. }) => Ok(()),
        _ => Err(error).context("the workspace could not be sent"),
    }
}

/// A tar that shows how far it is, and keeps its own error, which the connection would only call broken.
struct Watched<R> {
    tar: R,
    transfer: Transfer,
    failed: Arc<Mutex<Option<String>>>,
}

impl<R: Read> Read for Watched<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.tar.read(into);
        match &read {
            Ok(count) => self.transfer.advance(*count as u64),
            Err(error) => {
                *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
            }
        }
        read
    }
}

/// Artifacts to bring here.
pub(super) struct Fetch<'a> {
    pub(super) client: &'a Client,
    pub(super) id: &'a str,
    pub(super) directory: &'a Path,
    /// Which of them; what else comes is left out.
    pub(super) globs: &'a [String],
    pub(super) progress: &'a Progress,
    /// Nobody else follows the job: what it is at is shown, and it is not cancelled when they cannot be fetched.
    pub(super) alone: bool,
}

/// What became of it.
pub(super) enum Fetched {
    /// They are here.
    Here(Unpacked),
    /// There are none, which the user has been told.
    None,
    /// The job is over and they are not to be had.
    Over,
}

impl Fetch<'_> {
    /// Waits for the job's artifacts and brings them here. Ends early when the job is `over` without any.
    pub(super) fn run(&self, over: &AtomicBool) -> Result<Fetched> {
        let Fetch { client, id, progress, .. } = self;
        let mut tries = 0;
        loop {
            // Before the question, so that the answer to the last one is the job's last word.
            let last = over.load(Ordering::SeqCst);
            let job = client.job(id)?;
            if self.alone && progress.is_live() {
                progress.phase(&format!("job {} {}", short(id), phase(&job)));
            }
            let Some(artifacts) = job.artifacts else {
                bail!(
                    "the job {id} has no artifacts; say which it is to have with `nestling run --artifact GLOB`"
                );
            };
            match artifacts.status {
                ArtifactsStatus::Ready => {
                    tries += 1;
                    match self.now(&artifacts) {
                        Ok(unpacked) => return Ok(Fetched::Here(unpacked)),
                        Err(error) if tries < TRIES && may_pass(&error) => {
                            progress.say(&format!("{error:#}; trying again"));
                        }
                        Err(error) => {
                            if !self.alone {
                                // Nobody else will fetch them, and the job's result stands; it may be over by itself already.
                                let _ = client.cancel(id);
                            }
                            return Err(error.context("the artifacts could not be fetched"));
                        }
                    }
                }
                ArtifactsStatus::Pending | ArtifactsStatus::Gathering
                    if !last && job.status != Status::Completed => {}
                ArtifactsStatus::Empty => {
                    let why =
                        artifacts.message.unwrap_or_else(|| "nothing in the workspace matches".to_owned());
                    progress.say(&format!("no artifacts: {}", printable(&why)));
                    return Ok(Fetched::None);
                }
                // The job itself says why it ended.
                _ if job.status == Status::Completed => return Ok(Fetched::Over),
                _ => {}
            }
            thread::park_timeout(INTERVAL);
        }
    }

    fn now(&self, artifacts: &Artifacts) -> Result<Unpacked> {
        let (progress, directory) = (self.progress, self.directory);
        let tar = self.client.artifacts_tar(self.id)?;
        let unpacked = artifacts::unpack(tar, directory, self.globs)?;
        for (name, why) in &unpacked.refused {
            progress.say(&format!("the artifact {} is left out: {why}", printable(name)));
        }
        if let Some(message) = &artifacts.message {
            progress.say(&printable(message));
        }
        let files = match unpacked.files {
            1 => "1 artifact".to_owned(),
            files => format!("{files} artifacts"),
        };
        progress.say(&format!("{files}, {}, in {}", size(unpacked.bytes), directory.display()));
        Ok(unpacked)
    }
}

/// Whether another try may help.
fn may_pass(error: &anyhow::Error) -> bool {
    match error.downcast_ref::<UnpackError>() {
        Some(error) => matches!(error, UnpackError::Tar(_)),
        None => error.downcast_ref::<ClientError>().is_some_and(|error| {
            // A node that has not noticed yet that the transfer before broke off says that somebody reads them.
            error.status().is_none() || error.code() == Some("artifacts_not_ready")
        }),
    }
}

/// Bytes for people.
pub(super) fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} bytes"),
        1024..0x10_0000 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        _ => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
    }
}
