//! `nestling down`.

use anyhow::Result;
use nestling::local;
use nestling::state::State;

use crate::cli::Down;
use crate::terminal;

pub(crate) fn down(options: &Down) -> Result<u8> {
    let state = State::of_user()?;
    let names = if options.all {
        state.running().into_iter().map(|node| node.name).collect()
    } else {
        vec![options.name.clone()]
    };
    if names.is_empty() {
        terminal::print("no node is up\n")?;
    }
    for name in names {
        let dir = state.node(&name)?;
        let stopped = match dir.path().is_dir() {
            true => {
                let _lock = dir.lock()?;
                match dir.read()? {
                    Some(node) => local::stop(&dir, &node)?,
                    None => false,
                }
            }
            false => false,
        };
        let words = if stopped { "stopped" } else { "not up" };
        terminal::print(&format!("node {name}: {words}\n"))?;
    }
    Ok(0)
}
