//! Running a bare guest, and what it reported.

use super::layout;
use crate::job::{create, job, wait};
use nestling::bed::RunningBed;
use nestling::client::types::{Conclusion, Job, JobRequest, MachineConfig};
use std::fmt;

/// Longest run of a guest in seconds; most end within a tenth of one.
const TIMEOUT_SECONDS: u32 = 60;

/// What became of an attempt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It ran to its end.
    Completed,
    /// It raised an exception.
    Fault {
        /// The vector.
        vector: u64,
        /// The error code, 0 if the vector has none.
        error_code: u64,
        /// RIP in the exception's frame, from the start of the attempt.
        offset: u64,
    },
}

/// What a guest reported, in order, and how it ended.
#[derive(Clone, Debug)]
pub struct Facts {
    image: String,
    facts: Vec<(String, Vec<u64>)>,
    /// The job, for what else can be said of it.
    pub job: Job,
}

/// Starts the guest `image`; [`finish`] waits for it. Guests that are started while others run take turns with them.
///
/// # Panics
/// When the node refuses the job.
pub fn start(node: &RunningBed, image: &str) -> Job {
    start_with(node, image, 1)
}

/// Starts the guest `image` on a machine of `vcpu_count` vCPUs.
///
/// # Panics
/// When the node refuses the job.
pub fn start_with(node: &RunningBed, image: &str, vcpu_count: u32) -> Job {
    let request = JobRequest {
        image: Some(image.to_owned()),
        timeout_seconds: Some(TIMEOUT_SECONDS),
        machine_config: Some(MachineConfig {
            vcpu_count,
            mem_size_mib: layout::MEMORY_MIB,
            ..MachineConfig::default()
        }),
        ..job("no agent will run this")
    };
    create(node, &request)
}

/// What the guest had reported when it ended, however it ended.
///
/// # Panics
/// When its report did not begin, or has lost its beginning: it was too long for the console.
pub fn finish(node: &RunningBed, started: &Job) -> Facts {
    let job = wait(node, &started.id);
    let console = job.console.clone().unwrap_or_default();
    let facts: Vec<(String, Vec<u64>)> = console.lines().filter_map(fact).collect();
    let facts = Facts { image: started.image.clone(), facts, job };
    assert!(
        facts.facts.first().is_some_and(|(name, _)| name == "begin"),
        "the report has no beginning: the guest did not start, or said more than a console keeps\n{facts}"
    );
    facts
}

/// Runs the guest `image` to its proper end.
///
/// # Panics
/// When it ends in any other way.
#[track_caller]
pub fn run(node: &RunningBed, image: &str) -> Facts {
    let facts = finish(node, &start(node, image));
    facts.assert_finished();
    facts
}

/// `name=hex hex`.
fn fact(line: &str) -> Option<(String, Vec<u64>)> {
    let (name, words) = line.split_once('=')?;
    let words: Result<Vec<u64>, _> =
        words.split_whitespace().map(|word| u64::from_str_radix(word, 16)).collect();
    Some((name.to_owned(), words.ok()?))
}

impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} reported:", self.image)?;
        for (name, words) in &self.facts {
            writeln!(f, "  {name} = {words:x?}")?;
        }
        write!(
            f,
            "and ended: {:?}, {:?}",
            self.job.conclusion,
            self.job.failure_reason.as_deref().unwrap_or("")
        )
    }
}

impl Facts {
    /// Whether a fact was reported.
    pub fn has(&self, name: &str) -> bool {
        self.facts.iter().any(|(known, _)| known == name)
    }

    /// A fact's words. If several have this name, the first's.
    ///
    /// # Panics
    /// When there is no such fact.
    #[track_caller]
    pub fn words(&self, name: &str) -> &[u64] {
        match self.facts.iter().find(|(known, _)| known == name) {
            Some((_, words)) => words,
            None => panic!("there is no fact {name}\n{self}"),
        }
    }

    /// The words of every fact of this name, in order.
    pub fn all(&self, name: &str) -> Vec<&[u64]> {
        self.facts.iter().filter(|(known, _)| known == name).map(|(_, words)| words.as_slice()).collect()
    }

    /// A fact of one word.
    ///
    /// # Panics
    /// When there is none, or it has another number of words.
    #[track_caller]
    pub fn value(&self, name: &str) -> u64 {
        match self.words(name) {
            [value] => *value,
            words => panic!("{name} is not one word but {words:x?}\n{self}"),
        }
    }

    /// What became of an attempt.
    ///
    /// # Panics
    /// When there is no such fact, or it is no attempt's.
    #[track_caller]
    pub fn outcome(&self, name: &str) -> Outcome {
        match *self.words(name) {
            [] => Outcome::Completed,
            [vector, error_code, offset] => Outcome::Fault { vector, error_code, offset },
            ref words => panic!("{name} is not an attempt's outcome but {words:x?}\n{self}"),
        }
    }

    /// The fact is this word.
    ///
    /// # Panics
    /// When it is not.
    #[track_caller]
    pub fn assert(&self, name: &str, expected: u64) {
        self.assert_words(name, &[expected]);
    }

    /// The fact is these words.
    ///
    /// # Panics
    /// When it is not.
    #[track_caller]
    pub fn assert_words(&self, name: &str, expected: &[u64]) {
        let found = self.words(name);
        assert!(found == expected, "{name}: expected {expected:x?}, found {found:x?}\n{self}");
    }

    /// The attempt raised no exception.
    ///
    /// # Panics
    /// When it did.
    #[track_caller]
    pub fn assert_completed(&self, name: &str) {
        let found = self.outcome(name);
        assert!(found == Outcome::Completed, "{name}: expected no exception, found {found:x?}\n{self}");
    }

    /// The attempt's first instruction faulted: RIP is at the start of the attempt.
    ///
    /// # Panics
    /// When it did not, or otherwise.
    #[track_caller]
    pub fn assert_fault(&self, name: &str, vector: u64, error_code: u64) {
        self.assert_outcome(name, Outcome::Fault { vector, error_code, offset: 0 });
    }

    /// The attempt ended like this.
    ///
    /// # Panics
    /// When it did not.
    #[track_caller]
    pub fn assert_outcome(&self, name: &str, expected: Outcome) {
        let found = self.outcome(name);
        assert!(found == expected, "{name}: expected {expected:x?}, found {found:x?}\n{self}");
    }

    /// Whatever `holds` of the fact's word.
    ///
    /// # Panics
    /// When it does not hold; the message says `expected`.
    #[track_caller]
    pub fn assert_that(&self, name: &str, expected: &str, holds: impl FnOnce(u64) -> bool) {
        let found = self.value(name);
        assert!(holds(found), "{name}: expected {expected}, found {found:#x}\n{self}");
    }

    /// The guest came to its end and switched its machine off.
    ///
    /// # Panics
    /// When it did not.
    #[track_caller]
    pub fn assert_finished(&self) {
        assert!(self.has("end"), "the guest did not come to its end\n{self}");
        self.assert_ended("powered itself off");
    }

    /// The machine ended without a job's result, for a reason that has `reason` in it.
    ///
    /// # Panics
    /// When it ended otherwise.
    #[track_caller]
    pub fn assert_ended(&self, reason: &str) {
        let told = self.job.failure_reason.as_deref().unwrap_or_default();
        assert!(
            self.job.conclusion == Some(Conclusion::SystemFailure) && told.contains(reason),
            "expected an end with {reason:?}\n{self}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_name_and_words_in_hexadecimal() {
        assert_eq!(fact("rax=1f 0 "), Some(("rax".into(), vec![0x1F, 0])));
        assert_eq!(fact("end="), Some(("end".into(), vec![])));
        assert_eq!(fact("no fact"), None);
        assert_eq!(fact("a=words"), None);
    }
}
