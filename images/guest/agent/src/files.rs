//! What the node asks of the workspace: that it is filled before the steps, and its artifacts sent after them.

use std::path::PathBuf;

use nestling_api::agent::{
    AgentMessage, ArtifactsSent, HostMessage, ListArtifacts, SendArtifacts, WorkspaceFailed,
    WorkspaceUnpacked,
};

use crate::artifacts::{Artifacts, Sending};
use crate::connection::Connection;
use crate::unpack::Unpacker;

/// Most bytes of artifacts in one frame.
const MAX_DATA: usize = 32 * 1024;

/// The workspace's files on their way in and out.
pub(crate) struct Files {
    folder: PathBuf,
    arrival: Arrival,
    artifacts: Option<Artifacts>,
    sending: Option<Sending>,
}

/// How far the workspace is.
enum Arrival {
    Awaited,
    Arriving(Box<Unpacker>),
    /// It is there, or cannot be unpacked, which the node has been told.
    Over,
}

impl Files {
    /// A workspace in this folder.
    pub(crate) fn new(folder: PathBuf) -> Self {
        Self { folder, arrival: Arrival::Awaited, artifacts: None, sending: None }
    }

    /// Does what the node asks. Messages that are not about files come back.
    ///
    /// # Errors
    /// What the node should not have asked.
    pub(crate) fn obey(
        &mut self,
        message: HostMessage,
        connection: &mut Connection,
    ) -> Result<Option<HostMessage>, String> {
        match message {
            HostMessage::WorkspaceData(bytes) => self.unpack(Some(&bytes), connection)?,
            HostMessage::WorkspaceEnd => self.unpack(None, connection)?,
            HostMessage::ListArtifacts(ListArtifacts { patterns }) => {
                let found = Artifacts::find(&self.folder, &patterns);
                connection.say(&AgentMessage::ArtifactList(found.list()))?;
                self.artifacts = Some(found);
            }
            HostMessage::SendArtifacts(SendArtifacts { name }) => {
                let artifacts =
                    self.artifacts.as_ref().ok_or("the node asked for artifacts before their list")?;
                if self.sending.is_some() {
                    return Err("the node asked for artifacts while others are being sent".to_owned());
                }
                match artifacts.send(name.as_deref()) {
                    Ok(sending) => self.sending = Some(sending),
                    Err(message) => sent(Some(message), connection)?,
                }
            }
            // They may all have been sent while the node's word was on its way.
            HostMessage::StopArtifacts => {
                if self.sending.take().is_some() {
                    sent(Some("nobody wants the rest".to_owned()), connection)?;
                }
            }
            other => return Ok(Some(other)),
        }
        Ok(None)
    }

    /// Whether there is something to send as soon as the connection has room.
    pub(crate) fn is_sending(&self) -> bool {
        self.sending.is_some()
    }

    /// Sends more of the artifacts. Call it only when the connection is drained.
    pub(crate) fn advance(&mut self, connection: &mut Connection) -> Result<(), String> {
        let Some(sending) = &mut self.sending else { return Ok(()) };
        match sending.next(MAX_DATA) {
            Ok(Some(bytes)) => return connection.say(&AgentMessage::ArtifactData(bytes)),
            Ok(None) => sent(None, connection)?,
            Err(message) => sent(Some(message), connection)?,
        }
        self.sending = None;
        Ok(())
    }

    /// Unpacks more of the workspace; none is its end.
    fn unpack(&mut self, bytes: Option<&[u8]>, connection: &mut Connection) -> Result<(), String> {
        let arrival = std::mem::replace(&mut self.arrival, Arrival::Over);
        let unpacker = match arrival {
            Arrival::Awaited => Unpacker::new(&self.folder).map(Box::new),
            Arrival::Arriving(unpacker) => Ok(unpacker),
            Arrival::Over => return Ok(()),
        };
        let unpacked = match (unpacker, bytes) {
            (Ok(mut unpacker), Some(bytes)) => match unpacker.push(bytes) {
                Ok(()) => {
                    self.arrival = Arrival::Arriving(unpacker);
                    return Ok(());
                }
                Err(message) => Err(message),
            },
            (Ok(unpacker), None) => unpacker.finish(),
            (Err(message), _) => Err(message),
        };
        connection.say(&match unpacked {
            Ok(entries) => AgentMessage::WorkspaceUnpacked(WorkspaceUnpacked { entries }),
            Err(message) => AgentMessage::WorkspaceFailed(WorkspaceFailed { message }),
        })
    }
}

fn sent(failed: Option<String>, connection: &mut Connection) -> Result<(), String> {
    connection.say(&AgentMessage::ArtifactsSent(ArtifactsSent { failed }))
}
