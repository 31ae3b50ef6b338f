//! JSON from strangers, with errors that stay short.
//!
//! serde's errors quote what they found, a megabyte of it escaped to six if that is what was sent. Here every error is cut
//! while it is written: the deserializer asks serde_json for whatever there is, so that all complaints about it are made by
//! visitors, and hands them [`Error`] as the type to complain with.

use alloc::string::String;
use core::fmt::{self, Write};
use core::marker::PhantomData;

use serde::de::value::StrDeserializer;
use serde::de::{self, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, forward_to_deserialize_any};

/// Most bytes of an error's message.
pub(crate) const MAX_MESSAGE: usize = 512;

/// What is wrong with some JSON, in no more than [`MAX_MESSAGE`] bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Error(String);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl core::error::Error for Error {}

impl de::Error for Error {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(short(&message, MAX_MESSAGE))
    }
}

/// The first `limit` bytes of what something shows as, or fewer where a character would be cut. No more is ever made.
pub(crate) fn short(value: &impl fmt::Display, limit: usize) -> String {
    struct Short {
        text: String,
        limit: usize,
    }

    impl Write for Short {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            let room = self.limit.saturating_sub(self.text.len());
            if text.len() <= room {
                self.text.push_str(text);
                return Ok(());
            }
            let mut end = room;
            while !text.is_char_boundary(end) {
                end = end.saturating_sub(1);
            }
            self.text.push_str(text.get(..end).unwrap_or_default());
            self.limit = self.text.len();
            Err(fmt::Error)
        }
    }

    let mut short = Short { text: String::new(), limit };
    // The only error is that there is no more room.
    let _ = write!(short, "{value}");
    short.text
}

/// A value from JSON, and where in it the error is when there is one.
pub(crate) fn from_slice_with_path<'de, T: Deserialize<'de>>(json: &'de [u8]) -> Result<T, (String, Error)> {
    let mut json = serde_json::Deserializer::from_slice(json);
    let value = serde_path_to_error::deserialize(Bounded(&mut json)).map_err(|error| {
        let path = short(error.path(), MAX_MESSAGE);
        (path, error.into_inner())
    })?;
    json.end().map_err(|error| (String::new(), shorten(error)))?;
    Ok(value)
}

/// A value from JSON.
pub(crate) fn from_slice<'de, T: Deserialize<'de>>(json: &'de [u8]) -> Result<T, Error> {
    let mut json = serde_json::Deserializer::from_slice(json);
    let value = T::deserialize(Bounded(&mut json))?;
    json.end().map_err(shorten)?;
    Ok(value)
}

fn shorten<A: de::Error, B: de::Error>(error: A) -> B {
    B::custom(error)
}

/// Anything of serde's, with errors that stay short.
struct Bounded<T>(T);

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Bounded<D> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.0.deserialize_any(Bounded(visitor)).map_err(shorten)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.0.deserialize_option(Bounded(visitor)).map_err(shorten)
    }

    /// Enums are words here, none of them has content.
    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.0.deserialize_any(Bounded(Word(visitor, PhantomData))).map_err(shorten)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct
        newtype_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

/// Reads an enum from a string.
struct Word<'de, V>(V, PhantomData<&'de ()>);

impl<'de, V: Visitor<'de>> Visitor<'de> for Word<'de, V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<V::Value, E> {
        let word: StrDeserializer<'_, E> = text.into_deserializer();
        self.0.visit_enum(word)
    }
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Bounded<V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.expecting(f)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<V::Value, E> {
        self.0.visit_bool::<Error>(value).map_err(shorten)
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<V::Value, E> {
        self.0.visit_i64::<Error>(value).map_err(shorten)
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<V::Value, E> {
        self.0.visit_u64::<Error>(value).map_err(shorten)
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<V::Value, E> {
        self.0.visit_f64::<Error>(value).map_err(shorten)
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<V::Value, E> {
        self.0.visit_str::<Error>(value).map_err(shorten)
    }

    fn visit_borrowed_str<E: de::Error>(self, value: &'de str) -> Result<V::Value, E> {
        self.0.visit_borrowed_str::<Error>(value).map_err(shorten)
    }

    fn visit_none<E: de::Error>(self) -> Result<V::Value, E> {
        self.0.visit_none::<Error>().map_err(shorten)
    }

    fn visit_unit<E: de::Error>(self) -> Result<V::Value, E> {
        self.0.visit_unit::<Error>().map_err(shorten)
    }

    fn visit_some<D: Deserializer<'de>>(self, value: D) -> Result<V::Value, D::Error> {
        self.0.visit_some(Bounded(value)).map_err(shorten)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, values: A) -> Result<V::Value, A::Error> {
        self.0.visit_seq(Bounded(values)).map_err(shorten)
    }

    fn visit_map<A: MapAccess<'de>>(self, entries: A) -> Result<V::Value, A::Error> {
        self.0.visit_map(Bounded(entries)).map_err(shorten)
    }
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Bounded<S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, value: D) -> Result<S::Value, D::Error> {
        self.0.deserialize(Bounded(value)).map_err(shorten)
    }
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Bounded<A> {
    type Error = Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Error> {
        self.0.next_element_seed(Bounded(seed)).map_err(shorten)
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Bounded<A> {
    type Error = Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Error> {
        self.0.next_key_seed(Bounded(seed)).map_err(shorten)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Error> {
        self.0.next_value_seed(Bounded(seed)).map_err(shorten)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Condition, StepRequest};
    use alloc::format;
    use alloc::string::ToString;

    #[test]
    fn a_message_is_cut_at_a_character() {
        assert_eq!(short(&"häää", 4), "hä");
        assert_eq!(short(&format_args!("{}{}", "abc", "def"), 4), "abcd");
        assert_eq!(short(&"abc", 3), "abc");
    }

    #[test]
    fn good_json_is_what_serde_json_makes_of_it() {
        let json = br#"{"run":"a\tb","env":{"A":"1"},"timeout_seconds":5,"if":"always()","name":null}"#;
        let step: StepRequest = from_slice(json).unwrap();
        assert_eq!(step, serde_json::from_slice(json).unwrap());
        assert_eq!(step.condition, Some(Condition::Always));
    }

    #[test]
    fn whatever_is_wrong_the_message_is_short() {
        let long = "\u{7f}".repeat(100_000);
        for json in [
            format!("\"{long}\""),
            format!("{{\"{long}\":1}}"),
            format!("{{\"run\":[\"{long}\"]}}"),
            format!("{{\"run\":\"\",\"if\":\"{long}\"}}"),
            format!("{{\"run\":\"\",\"env\":\"{long}\"}}"),
            format!("{{\"run\":\"\",\"env\":{{\"{long}\":1}}}}"),
            format!("{{\"run\":\"\",\"timeout_seconds\":\"{long}\"}}"),
        ] {
            let message = from_slice::<StepRequest>(json.as_bytes()).unwrap_err().to_string();
            assert!((20..=MAX_MESSAGE).contains(&message.len()), "{message}");
            let (path, error) = from_slice_with_path::<StepRequest>(json.as_bytes()).unwrap_err();
            assert!(path.len() <= MAX_MESSAGE && error.to_string().len() <= MAX_MESSAGE);
        }
    }
}
