//! `nestling cancel`.

use anyhow::Result;

use super::target;
use crate::cli::Cancel;
use crate::terminal;

pub(crate) fn cancel(options: &Cancel) -> Result<u8> {
    let client = target::require(&options.node)?.client;
    let mut code = 0;
    for text in &options.ids {
        match target::job_id(&client, text).and_then(|id| Ok(client.cancel(&id).map(|()| id)?)) {
            Ok(id) => terminal::print(&format!("{id}: cancelled\n"))?,
            // The others are still to be cancelled.
            Err(error) => {
                terminal::say(format_args!("{text}: {error:#}"));
                code = 1;
            }
        }
    }
    Ok(code)
}
