//! The rows of the benchmark: what is compared, and what has to hold.

use serde::Serialize;
use std::fmt;

/// What one run of one side gave; `None` where it was not measured. Times in seconds.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Samples {
    /// QEMU's start to the API's first answer (ours) or to userland (the peer's).
    pub(super) cold: Option<f64>,
    /// The same from the L1 kernel's first byte on the serial port.
    pub(super) boot: Option<f64>,
    /// The kernel's own count from its first instruction to ready.
    pub(super) entry: Option<f64>,
    /// The job's request to the agent's hello (ours), or the VMM's exec to userland (the peer's).
    pub(super) job: Option<f64>,
    /// The job's request to the first byte of its output, or the VMM's exec to userland's first output.
    pub(super) first_output: Option<f64>,
    /// Exits of one L2 from its boot to its power-off.
    pub(super) exits: Option<f64>,
}

/// What has to hold for a row to be fine.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Goal {
    /// Our median over the peer's is at most this.
    Ratio(f64),
    /// Our median is at most this.
    AtMost(f64),
    /// Nothing: the row informs.
    None,
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ratio(ratio) => write!(f, "<= {ratio:.2} x"),
            Self::AtMost(value) => write!(f, "<= {value}"),
            Self::None => f.write_str("-"),
        }
    }
}

/// One comparison.
pub(super) struct Row {
    /// What the command line calls it.
    pub(super) name: &'static str,
    /// What is measured, ours and the peer's.
    pub(super) figure: &'static str,
    /// Its unit.
    pub(super) unit: &'static str,
    /// What has to hold.
    pub(super) goal: Goal,
    /// Whether the node has to run jobs for it.
    pub(super) needs_jobs: bool,
    ours: fn(&Samples) -> Option<f64>,
    peer: fn(&Samples) -> Option<f64>,
}

/// Every row.
pub(super) const ROWS: [Row; 6] = [
    Row {
        name: "boot",
        figure: "L1 kernel start to API ready / to userland",
        unit: "s",
        goal: Goal::Ratio(0.25),
        needs_jobs: false,
        ours: |run| run.boot,
        peer: |run| run.boot,
    },
    Row {
        name: "boot-own",
        figure: "the same, ours by the kernel's own clock",
        unit: "s",
        goal: Goal::Ratio(0.25),
        needs_jobs: false,
        ours: |run| run.entry,
        peer: |run| run.boot,
    },
    Row {
        name: "cold",
        figure: "QEMU start to API ready / to userland",
        unit: "s",
        goal: Goal::None,
        needs_jobs: false,
        ours: |run| run.cold,
        peer: |run| run.cold,
    },
    Row {
        name: "job",
        figure: "job request to agent ready / VMM exec to L2 userland",
        unit: "s",
        goal: Goal::Ratio(1.0),
        needs_jobs: true,
        ours: |run| run.job,
        peer: |run| run.job,
    },
    Row {
        name: "first-output",
        figure: "job request to its first output / VMM exec to L2 userland",
        unit: "s",
        goal: Goal::None,
        needs_jobs: true,
        ours: |run| run.first_output,
        peer: |run| run.first_output,
    },
    Row {
        name: "exits",
        figure: "exits of one L2, boot to power-off",
        unit: "exits",
        goal: Goal::AtMost(2500.0),
        needs_jobs: true,
        ours: |run| run.exits,
        peer: |run| run.exits,
    },
];

/// One side's runs of one row.
#[derive(Debug, Serialize)]
pub(super) struct Side {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
    /// Every run, in the order they were made.
    pub(super) runs: Vec<f64>,
}

impl Side {
    /// `None` if there is no run.
    fn of(runs: Vec<f64>) -> Option<Self> {
        let mut sorted = runs.clone();
        sorted.sort_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        Some(Self { median, min, max, runs })
    }
}

/// A row with its figures.
pub(super) struct Result {
    pub(super) row: &'static Row,
    pub(super) ours: Option<Side>,
    pub(super) peer: Option<Side>,
}

impl Result {
    /// The row's figures out of every run's samples (ours, peer's).
    pub(super) fn of(row: &'static Row, samples: &[(Samples, Samples)]) -> Self {
        Self {
            row,
            ours: Side::of(samples.iter().filter_map(|(ours, _)| (row.ours)(ours)).collect()),
            peer: Side::of(samples.iter().filter_map(|(_, peer)| (row.peer)(peer)).collect()),
        }
    }

    /// Our median over the peer's.
    pub(super) fn ratio(&self) -> Option<f64> {
        match (&self.ours, &self.peer) {
            (Some(ours), Some(peer)) if peer.median > 0.0 => Some(ours.median / peer.median),
            _ => None,
        }
    }

    /// Whether the goal holds; a row that could not be measured misses it.
    pub(super) fn ok(&self) -> bool {
        match self.row.goal {
            Goal::Ratio(most) => self.ratio().is_some_and(|ratio| ratio <= most),
            Goal::AtMost(most) => self.ours.as_ref().is_some_and(|ours| ours.median <= most),
            Goal::None => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_of_runs_lies_between_the_middle_two() {
        let side = Side::of(vec![4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!((side.median, side.min, side.max), (2.5, 1.0, 4.0));
        assert_eq!(Side::of(vec![9.0, 1.0, 5.0]).unwrap().median, 5.0);
        assert!(Side::of(vec![]).is_none());
    }

    #[test]
    fn a_row_without_figures_misses_its_goal() {
        assert!(!Result::of(&ROWS[0], &[(Samples::default(), Samples::default())]).ok());
    }

    #[test]
    fn a_ratio_is_held_against_the_goal() {
        let ours = Samples { boot: Some(0.4), ..Samples::default() };
        let peer = Samples { boot: Some(2.0), ..Samples::default() };
        let result = Result::of(&ROWS[0], &[(ours, peer)]);
        assert_eq!(result.ratio(), Some(0.2));
        assert!(result.ok());
    }

    #[test]
    fn row_names_are_unique() {
        for (index, row) in ROWS.iter().enumerate() {
            assert!(ROWS[..index].iter().all(|other| other.name != row.name), "{}", row.name);
        }
    }
}
