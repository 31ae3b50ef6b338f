//! `nestling connections`.

use anyhow::Result;
use nestling::client::types::{Connection, Verdict};
use nestling::ready::printable;

use super::{table, target};
use crate::cli::Connections;
use crate::terminal;

pub(crate) fn connections(options: &Connections) -> Result<u8> {
    let client = target::require(&options.node)?.client;
    let id = target::job_id(&client, &options.id)?;
    let list = client.connections(&id)?;
    if options.json {
        terminal::print(&(serde_json::to_string_pretty(&list)? + "\n"))?;
        return Ok(0);
    }
    let wanted = |connection: &&Connection| !options.refused || connection.verdict == Verdict::Refused;
    terminal::print(&table::format(&rows(list.connections.iter().filter(wanted))))?;
    if list.omitted_count > 0 {
        terminal::say(format_args!(
            "the node kept {} of {} connections, of which {} were refused",
            list.connections.len(),
            list.total_count,
            list.refused_count
        ));
    }
    Ok(0)
}

fn rows<'a>(connections: impl Iterator<Item = &'a Connection>) -> Vec<Vec<String>> {
    let head = ["TIME", "PROTOCOL", "TO", "ADDRESS", "SENT", "RECEIVED", "VERDICT"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    rows.extend(connections.map(|connection| {
        let address = connection.address.as_deref().unwrap_or("-");
        let verdict = match &connection.reason {
            Some(reason) => format!("{}: {}", connection.verdict.as_str(), printable(reason)),
            None => connection.verdict.as_str().to_owned(),
        };
        vec![
            connection.time.clone(),
            connection.protocol.as_str().to_owned(),
            connection.name.as_deref().map_or("-".to_owned(), printable),
            connection.port.map_or(address.to_owned(), |port| format!("{address}:{port}")),
            connection.bytes_sent.to_string(),
            connection.bytes_received.to_string(),
            verdict,
        ]
    }));
    rows
}

#[cfg(test)]
mod tests {
    use nestling::client::types::Protocol;

    use super::*;

    #[test]
    fn a_row_says_whom_how_much_and_why_not() {
        let connection = Connection {
            time: "2026-01-31T23:59:59.042Z".into(),
            protocol: Protocol::Tcp,
            name: Some("example.org".into()),
            address: Some("192.0.2.7".into()),
            port: Some(443),
            bytes_sent: 0,
            bytes_received: 0,
            verdict: Verdict::Refused,
            reason: Some("no rule\nallows it".into()),
        };
        let dns = Connection { protocol: Protocol::Dns, address: None, port: None, ..connection.clone() };
        let rows = rows([&connection, &dns].into_iter());
        let expected =
            ["2026-01-31T23:59:59.042Z", "tcp", "example.org", "192.0.2.7:443", "0", "0", "refused: no rule"];
        assert!(rows[1][6].starts_with(expected[6]) && !rows[1][6].contains('\n'), "{rows:?}");
        assert_eq!(rows[1][..6], expected[..6]);
        assert_eq!((rows[2][1].as_str(), rows[2][3].as_str()), ("dns", "-"));
    }
}
