//! Lists and maps in a request that end being read at their limit, not after a megabyte of entries.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// Most entries of an environment.
pub(crate) const MAX_ENV: usize = 256;
/// Most entries of a list.
pub(crate) const MAX_LIST: usize = 100;

/// Visits a list of no more than [`MAX_LIST`] entries.
pub(crate) struct List<T>(pub(crate) PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for List<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<Vec<T>, A::Error> {
        let mut list = Vec::new();
        while let Some(entry) = entries.next_element()? {
            if list.len() >= MAX_LIST {
                return Err(too_many(MAX_LIST));
            }
            list.push(entry);
        }
        Ok(list)
    }
}

/// A list of no more than [`MAX_LIST`] entries.
pub(crate) fn list<'de, T: Deserialize<'de>, D: Deserializer<'de>>(list: D) -> Result<Vec<T>, D::Error> {
    list.deserialize_seq(List(PhantomData))
}

/// An environment of no more than [`MAX_ENV`] variables.
pub(crate) fn env<'de, D: Deserializer<'de>>(env: D) -> Result<BTreeMap<String, String>, D::Error> {
    struct Env;

    impl<'de> Visitor<'de> for Env {
        type Value = BTreeMap<String, String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map of strings")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
            let mut env = BTreeMap::new();
            while let Some((name, value)) = entries.next_entry()? {
                env.insert(name, value);
                if env.len() > MAX_ENV {
                    return Err(too_many(MAX_ENV));
                }
            }
            Ok(env)
        }
    }

    env.deserialize_map(Env)
}

fn too_many<E: Error>(limit: usize) -> E {
    E::custom(format_args!("has too many entries; at most {limit} are allowed"))
}
