//! Which of a core's vCPUs runs next, and for how long: the one that has run least, until it has run a slice more than the next.
//!
//! Every vCPU counts alike. One that has slept is owed a slice and no more, so that it is answered at once after a rest and cannot save up
//! rights for hours.

/// How much more than another that waits a vCPU may run before they change places.
pub const SLICE_NS: u64 = 5_000_000;
/// The least that a vCPU runs before another takes its place, in nanoseconds: a change of vCPU costs some microseconds.
pub const LEAST_NS: u64 = 300_000;

/// What a vCPU of the core would do now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wants {
    /// Go on.
    Run,
    /// Go on, after a rest.
    Wake,
    /// Nothing until this time, if any, unless it is woken.
    Rest {
        /// Nanoseconds since boot.
        until: Option<u64>,
    },
}

/// A vCPU, as the choice sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entity {
    /// How long it has run, in nanoseconds; see [`Choice::ran_ns`].
    pub ran_ns: u64,
    /// What it would do.
    pub wants: Wants,
}

/// The vCPU that runs next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Choice {
    /// Its place among those that were given.
    pub index: usize,
    /// How long it counts as having run: at least what it would have, had it not rested.
    pub ran_ns: u64,
    /// How long it may run now, in nanoseconds, if another waits.
    pub slice_ns: Option<u64>,
    /// What the one that waits longest has run.
    pub next_ran_ns: Option<u64>,
    /// When the first of those that rest will want to run, in nanoseconds since boot.
    pub next_wake_ns: Option<u64>,
}

/// Chooses. `floor_ns` is how long everybody has run at least who was there all the time: it only grows, and a new vCPU starts with it.
pub fn choose(entities: impl Iterator<Item = Entity> + Clone, floor_ns: &mut u64) -> Option<Choice> {
    let rested = floor_ns.saturating_sub(SLICE_NS);
    let runnable = entities.clone().enumerate().filter_map(|(index, entity)| match entity.wants {
        Wants::Run => Some((index, entity.ran_ns)),
        Wants::Wake => Some((index, entity.ran_ns.max(rested))),
        Wants::Rest { .. } => None,
    });
    let (index, ran_ns) = runnable.clone().min_by_key(|(_, ran_ns)| *ran_ns)?;
    *floor_ns = (*floor_ns).max(ran_ns);
    let next_ran_ns = runnable.filter(|(other, _)| *other != index).map(|(_, ran_ns)| ran_ns).min();
    let slice = |next: u64| next.saturating_add(SLICE_NS).saturating_sub(ran_ns).max(LEAST_NS);
    let next_wake_ns = entities
        .filter_map(|entity| match entity.wants {
            Wants::Rest { until } => until,
            Wants::Run | Wants::Wake => None,
        })
        .min();
    Some(Choice { index, ran_ns, slice_ns: next_ran_ns.map(slice), next_ran_ns, next_wake_ns })
}

/// The core that a new vCPU goes to: the one with the fewest, the first core's own work counting as half a vCPU. `loads` are the numbers of
/// vCPUs by core.
pub fn place(loads: impl Iterator<Item = usize>) -> usize {
    let weights = loads.enumerate().map(|(core, load)| (core, 2 * load + usize::from(core == 0)));
    weights.min_by_key(|(_, weight)| *weight).map_or(0, |(core, _)| core)
}
