//! The names that a machine looked addresses up by: what makes rules with names hold for addresses.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::net::Ipv4Addr;

/// Most pairs of name and address of one machine; the one that was not used for longest goes first.
pub(crate) const MAX_NAMES: usize = 1024;
/// Most names of one address.
const MAX_NAMES_OF_ADDRESS: usize = 16;

#[derive(Debug)]
struct Known {
    name: Arc<str>,
    used: u64,
}

/// The names of addresses.
#[derive(Debug, Default)]
pub(crate) struct Names {
    addresses: BTreeMap<Ipv4Addr, Vec<Known>>,
    count: usize,
}

impl Names {
    /// The machine was told that `name` has this address. How long the answer holds is not asked: a program may keep it as long
    /// as it likes.
    pub(crate) fn learn(&mut self, address: Ipv4Addr, name: &Arc<str>, now: u64) {
        if self.count >= MAX_NAMES {
            self.forget_oldest();
        }
        let known = self.addresses.entry(address).or_default();
        if let Some(known) = known.iter_mut().find(|known| known.name == *name) {
            known.used = now;
            return;
        }
        if known.len() >= MAX_NAMES_OF_ADDRESS
            && let Some(oldest) = (0..known.len()).min_by_key(|at| known.get(*at).map(|known| known.used))
        {
            known.remove(oldest);
            self.count = self.count.saturating_sub(1);
        }
        known.push(Known { name: Arc::clone(name), used: now });
        self.count = self.count.saturating_add(1);
    }

    /// A name of an address for which `allows` holds, the latest first; asking is using.
    pub(crate) fn find(
        &mut self,
        address: Ipv4Addr,
        now: u64,
        allows: impl Fn(&str) -> bool,
    ) -> Option<Arc<str>> {
        let known = self.addresses.get_mut(&address)?;
        let found = known.iter_mut().filter(|known| allows(&known.name)).max_by_key(|known| known.used)?;
        found.used = now;
        Some(Arc::clone(&found.name))
    }

    fn forget_oldest(&mut self) {
        let used = |known: &Vec<Known>| known.iter().map(|known| known.used).min();
        let oldest = self.addresses.iter().min_by_key(|(_, known)| used(known)).map(|(address, _)| *address);
        let Some(address) = oldest else { return };
        let Some(known) = self.addresses.get_mut(&address) else { return };
        if let Some(at) = (0..known.len()).min_by_key(|at| known.get(*at).map(|known| known.used)) {
            known.remove(at);
            self.count = self.count.saturating_sub(1);
        }
        if known.is_empty() {
            self.addresses.remove(&address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;

    const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

    #[test]
    fn the_latest_name_that_will_do_is_found() {
        let mut names = Names::default();
        names.learn(ADDRESS, &"a".into(), 1);
        names.learn(ADDRESS, &"b".into(), 2);
        assert_eq!(names.find(ADDRESS, 3, |_| true).as_deref(), Some("b"));
        assert_eq!(names.find(ADDRESS, 3, |name| name == "a").as_deref(), Some("a"));
        assert_eq!(names.find(ADDRESS, 3, |name| name == "c"), None);
        assert_eq!(names.find(Ipv4Addr::new(192, 0, 2, 2), 3, |_| true), None);
    }

    #[test]
    fn names_are_bounded_and_those_in_use_stay() {
        let mut names = Names::default();
        names.learn(ADDRESS, &"kept".into(), 0);
        for count in 1..10_000_u32 {
            let address = Ipv4Addr::from_bits(0x0a00_0000 + count / 3);
            names.learn(address, &format!("n{count}").into(), u64::from(count));
            assert!(names.find(ADDRESS, u64::from(count), |_| true).is_some());
            assert!(names.count <= MAX_NAMES);
        }
        assert_eq!(names.count, names.addresses.values().map(Vec::len).sum::<usize>());
    }

    #[test]
    fn one_address_has_a_bounded_number_of_names() {
        let mut names = Names::default();
        for count in 0..100 {
            names.learn(ADDRESS, &format!("n{count}").into(), count);
        }
        assert_eq!(
            (names.count, names.addresses[&ADDRESS].len()),
            (MAX_NAMES_OF_ADDRESS, MAX_NAMES_OF_ADDRESS)
        );
    }
}
