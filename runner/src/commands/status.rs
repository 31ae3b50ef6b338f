//! `nestling status`.

use anyhow::Result;
use nestling::client::types::{Host, ImageList, Vendor};
use nestling::duration::format_ms;
use nestling::ready::printable;

use super::target::Target;
use super::{table, target};
use crate::cli::Status;
use crate::terminal;

/// Frames of 4 KiB in a MiB.
const FRAMES_PER_MIB: u64 = 256;
/// Bytes in a KiB.
const KIB: u64 = 1024;

pub(crate) fn status(options: &Status) -> Result<u8> {
    let target = target::require(&options.node)?;
    let host = target.client.host()?;
    if options.json {
        terminal::print(&(serde_json::to_string_pretty(&host)? + "\n"))?;
        return Ok(0);
    }
    let images = target.client.images()?;
    terminal::print(&table::format(&rows(&target, &host, &images)))?;
    Ok(0)
}

fn rows(target: &Target, host: &Host, images: &ImageList) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    let mut row = |name: &str, value: String| rows.push(vec![name.to_owned(), printable(&value)]);
    row("node", format!("{} at {}", host.name, target.client.url()));
    row("version", host.version.clone());
    if let Some(local) = &target.local {
        row("runs in", format!("{}, process {}", local.bed, local.pid));
    }
    row("up for", format_ms(host.uptime_ms));
    let vendor = match host.vendor {
        Vendor::Amd => "AMD SVM",
        Vendor::Intel => "Intel VMX",
    };
    row("hardware", format!("{vendor}, {} core(s), TSC at {} MHz", host.cores, host.tsc_khz / 1000));
    row("features", features(host, true));
    row("not there", features(host, false));
    let memory = &host.memory;
    row(
        "memory",
        format!(
            "{} MiB; for machines {} MiB, {} MiB of it free; the node's own heap {} of {} KiB",
            memory.total_mib,
            memory.total_frames / FRAMES_PER_MIB,
            memory.free_frames / FRAMES_PER_MIB,
            memory.heap_used_bytes / KIB,
            memory.heap_total_bytes / KIB,
        ),
    );
    row("machines", host.machines.to_string());
    let names: Vec<&str> = images.images.iter().map(|image| image.name.as_str()).collect();
    row("images", or_none(names.join(", ")));
    row(
        "uplink",
        host.uplink.as_ref().map_or("none".to_owned(), |uplink| {
            let address = uplink.address.as_deref().unwrap_or("no address yet");
            let gateway = uplink.gateway.as_deref().unwrap_or("none");
            format!("{address}, gateway {gateway}, {} {}", uplink.driver, uplink.mac)
        }),
    );
    if let Some(ready) = host.boot.kernel_entry_to_ready_ms {
        row("booted in", format!("{ready:.0} ms"));
    }
    row("exits", exits(host));
    rows
}

fn features(host: &Host, there: bool) -> String {
    let names = host.features.iter().filter(|&(_, &value)| value == there).map(|(name, _)| name.as_str());
    or_none(names.collect::<Vec<_>>().join(", "))
}

/// The kinds of exits, most frequent first.
fn exits(host: &Host) -> String {
    let mut kinds: Vec<(&str, u64)> =
        host.exits.iter().map(|(kind, &count)| (kind.as_str(), count)).collect();
    kinds.sort_by_key(|&(kind, count)| (kind != "total", std::cmp::Reverse(count)));
    let shown = kinds.iter().filter(|(_, count)| *count > 0).map(|(kind, count)| format!("{kind} {count}"));
    or_none(shown.collect::<Vec<_>>().join(", "))
}

fn or_none(text: String) -> String {
    if text.is_empty() { "none".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Host {
        let json = serde_json::json!({
            "name": "local", "version": "0.1.0", "vendor": "amd", "features": {"npt": true, "nrip_save": false},
            "cores": 1, "memory": {"total_mib": 2048, "free_frames": 256_000, "total_frames": 512_000,
            "heap_used_bytes": 4096, "heap_total_bytes": 8192}, "machines": 1, "uptime_ms": 61_000,
            "boot": {"kernel_entry_to_ready_ms": 12.4}, "exits": {"cpuid": 3, "total": 10, "npf": 7, "msr": 0},
            "uplink": null, "tsc_khz": 1_000_000,
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn a_person_finds_what_the_host_reports() {
        let client = nestling::client::Client::new("http://127.0.0.1:8080", None).unwrap();
        let text = table::format(&rows(&Target { client, local: None }, &host(), &ImageList::default()));
        for words in [
            "up for     1 min 1 s",
            "AMD SVM, 1 core(s), TSC at 1000 MHz",
            "features   npt\n",
            "not there  nrip_save\n",
            "for machines 2000 MiB, 1000 MiB of it free",
            "exits      total 10, npf 7, cpuid 3\n",
            "images     none\n",
            "booted in  12 ms",
        ] {
            assert!(text.contains(words), "{words:?} is not in\n{text}");
        }
    }
}
