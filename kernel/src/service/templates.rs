//! The node's templates: which image and shape each is of, which to give up for want of memory.
//!
//! A template is made on first use: the first job of an image and shape has its machine boot, and frozen once the agent waits for work; the job then
//! goes on in a clone, as all later ones begin in one.

#![forbid(unsafe_code)]

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use nestling_api::types::{self, MachineConfig};

use super::images::Image;
use super::machines::Machines;

/// More images and shapes than are worth keeping apart.
const KNOWN_MAX: usize = 64;

/// What makes two machines alike before they have run anything: image and size.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Key {
    image: String,
    digests: Vec<String>,
    machine_config: MachineConfig,
}

impl Key {
    /// For machines of this image and size.
    #[must_use]
    pub fn new(image: &Image, machine_config: MachineConfig) -> Self {
        Self { image: image.name.clone(), digests: image.sha256.values().cloned().collect(), machine_config }
    }

    /// The image's name.
    #[must_use]
    pub fn image(&self) -> &str {
        &self.image
    }
}

/// Whether there is a template.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State<T> {
    /// A machine is booting that is to become it.
    Building,
    /// There is.
    Ready(T),
    /// There will be none: machines boot.
    Refused,
}

/// What to do for a job.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way<T> {
    /// A clone of this template.
    Clone(T),
    /// A machine that boots, and then becomes a template.
    BootAndFreeze,
    /// A machine that boots.
    Boot,
}

/// The templates, the one used last at the end.
pub struct Templates<T> {
    known: Vec<(Key, State<T>)>,
    is_on: bool,
}

impl<T: Copy + PartialEq> Templates<T> {
    /// None; with `is_on` false there never will be one.
    #[must_use]
    pub const fn new(is_on: bool) -> Self {
        Self { known: Vec::new(), is_on }
    }

    /// What to do for a job on a machine of this image and size.
    pub fn choose(&mut self, key: &Key) -> Way<T> {
        if !self.is_on {
            return Way::Boot;
        }
        let Some(index) = self.known.iter().position(|(other, _)| other == key) else {
            return Way::BootAndFreeze;
        };
        let entry = self.known.remove(index);
        let way = match entry.1 {
            State::Ready(template) => Way::Clone(template),
            State::Building | State::Refused => Way::Boot,
        };
        self.known.push(entry);
        way
    }

    /// A machine boots that is to become the template. False when the node knows enough.
    pub fn begin(&mut self, key: &Key) -> bool {
        if self.known.len() >= KNOWN_MAX {
            let refused = self.known.iter().position(|(_, state)| *state == State::Refused);
            match refused {
                Some(index) => drop(self.known.remove(index)),
                None => return false,
            }
        }
        self.known.push((key.clone(), State::Building));
        true
    }

    fn set(&mut self, key: &Key, state: Option<State<T>>) {
        self.known.retain(|(other, _)| other != key);
        self.known.extend(state.map(|state| (key.clone(), state)));
    }

    /// It was frozen.
    pub fn ready(&mut self, key: &Key, template: T) {
        self.set(key, Some(State::Ready(template)));
    }

    /// It came to nothing, and may be tried again.
    pub fn abandon(&mut self, key: &Key) {
        self.set(key, None);
    }

    /// It cannot be frozen, and is not tried again.
    pub fn refuse(&mut self, key: &Key) {
        self.set(key, Some(State::Refused));
    }

    /// Gives up the template that was not used for the longest time and has no clone. False when there is none.
    pub fn evict<M: Machines<Template = T>>(&mut self, machines: &mut M) -> bool {
        let idle = self.known.iter().position(|(_, state)| match state {
            State::Ready(template) => {
                machines.template_figures(*template).is_none_or(|figures| figures.clones_alive == 0)
            }
            State::Building | State::Refused => false,
        });
        let Some(index) = idle else { return false };
        let (key, state) = self.known.remove(index);
        if let State::Ready(template) = state {
            log::info!("template of {} given up", key.image);
            machines.drop_template(template);
        }
        true
    }

    /// Gives up templates until the others keep within their budget, or have clones.
    pub fn keep_budget<M: Machines<Template = T>>(&mut self, machines: &mut M) {
        while self.shared_bytes(machines) > machines.template_budget_bytes() && self.evict(machines) {}
    }

    fn shared_bytes<M: Machines<Template = T>>(&self, machines: &M) -> u64 {
        let figures = |(_, state): &(Key, State<T>)| match state {
            State::Ready(template) => machines.template_figures(*template),
            State::Building | State::Refused => None,
        };
        self.known.iter().filter_map(figures).map(|figures| figures.shared_bytes).sum()
    }

    /// For `GET /v1/templates`: the one used last first.
    pub fn describe<M: Machines<Template = T>>(&self, machines: &M) -> Vec<types::Template> {
        let describe = |(key, state): &(Key, State<T>)| {
            let State::Ready(template) = state else { return None };
            let figures = machines.template_figures(*template)?;
            let ended = figures.clones_made.saturating_sub(figures.clones_alive).saturating_sub(1);
            Some(types::Template {
                id: figures.number.to_string(),
                image: key.image.clone(),
                machine_config: key.machine_config,
                shared_bytes: figures.shared_bytes,
                clones_alive: figures.clones_alive,
                clones_made: figures.clones_made,
                working_set_pages: figures.working_set_pages,
                first_clone_copies: figures.first_faults,
                later_clone_copies: figures.later_faults.checked_div(ended).unwrap_or(0),
            })
        };
        self.known.iter().rev().filter_map(describe).collect()
    }
}

/// Why a machine was not frozen in time.
#[must_use]
pub fn not_frozen(image: &str, reason: &str) -> String {
    format!("no template of {image}: {reason}; its machines boot")
}
