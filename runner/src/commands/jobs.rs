//! `nestling jobs`.

use anyhow::Result;
use nestling::client::JobQuery;
use nestling::client::types::{Job, JobList, Status, WaitingFor};
use nestling::duration::format_ms;
use nestling::ready::printable;

use super::{table, target};
use crate::cli::{Jobs, StatusFilter};
use crate::terminal;

/// Most jobs on a page of the API.
const PAGE: u32 = 100;
/// Digits of an ID that are shown; enough to tell jobs apart.
const SHORT_ID: usize = 12;

pub(crate) fn jobs(options: &Jobs) -> Result<u8> {
    let client = target::require(&options.node)?.client;
    let status = options.status.map(|status| match status {
        StatusFilter::Queued => Status::Queued,
        StatusFilter::InProgress => Status::InProgress,
        StatusFilter::Completed => Status::Completed,
    });
    let mut list = JobList { total_count: 0, jobs: Vec::new() };
    let limit = options.limit as usize;
    for page in client.job_pages(&JobQuery { status, per_page: Some(options.limit.min(PAGE)), page: None }) {
        let page = page?;
        list.total_count = page.total_count;
        list.jobs.extend(page.jobs);
        if list.jobs.len() >= limit {
            break;
        }
    }
    list.jobs.truncate(limit);
    if options.json {
        terminal::print(&(serde_json::to_string_pretty(&list)? + "\n"))?;
        return Ok(0);
    }
    terminal::print(&table::format(&rows(&list.jobs)))?;
    let hidden = list.total_count.saturating_sub(list.jobs.len() as u64);
    if hidden > 0 {
        terminal::say(format_args!("{hidden} more; see them with --limit {}", list.total_count));
    }
    Ok(0)
}

/// What a queued job waits for, after `before`; nothing when that is not known.
pub(super) fn waiting_for(job: &Job, before: &str) -> String {
    let what = match job.waiting_for {
        Some(WaitingFor::EarlierJobs) => "earlier jobs",
        Some(WaitingFor::Memory) => "memory",
        Some(WaitingFor::Cores) => "cores",
        Some(WaitingFor::Machines) => "another machine's end",
        None => return String::new(),
    };
    format!("{before}{what}")
}

fn rows(jobs: &[Job]) -> Vec<Vec<String>> {
    let mut rows = vec![["ID", "STATUS", "EXIT", "TOOK", "CREATED", "NAME"].map(str::to_owned).to_vec()];
    rows.extend(jobs.iter().map(|job| {
        vec![
            job.id.chars().take(SHORT_ID).collect(),
            state(job),
            job.exit_code.map_or("-".to_owned(), |code| code.to_string()),
            job.timings.completed_ms.map_or("-".to_owned(), format_ms),
            job.created_at.clone(),
            printable(&job.name),
        ]
    }));
    rows
}

/// Where a job stands, in one word or two.
fn state(job: &Job) -> String {
    match (job.conclusion, job.queue_position) {
        (Some(conclusion), _) => conclusion.as_str().to_owned(),
        (None, Some(position)) => format!("queued ({position}{})", waiting_for(job, ", for ")),
        (None, _) => job.status.as_str().to_owned(),
    }
}
