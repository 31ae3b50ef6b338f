//! What a job's machine may reach: a policy of names and addresses, from the request to the network that enforces it.
//!
//! A rule is a host (`example.org`), all names below one (`*.example.org`, not `example.org` itself), an IPv4 address or a
//! network (`10.0.0.0/8`), each with or without a port (`:443`). Names are ASCII, as DNS carries them (RFC 1035, 2.3.4), and
//! compared without regard to case. Machines have IPv4 alone, so there are no IPv6 rules.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use core::marker::PhantomData;
use core::net::Ipv4Addr;
use core::str::FromStr;

use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::ser::Serializer;
use serde::{Deserialize, Serialize};

use crate::bounded;

/// Most rules of one policy.
pub const MAX_RULES: usize = bounded::MAX_LIST;
/// Most bytes of a name (RFC 1035, 2.3.4, less the root's label).
pub const MAX_HOST: usize = 253;
/// Most bytes of one of a name's labels.
const MAX_LABEL: usize = 63;

/// What a machine may reach.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Egress {
    /// Nothing.
    None,
    /// All that the node lets any machine reach.
    #[default]
    All,
    /// What one of these allows, at most [`MAX_RULES`].
    Rules(Vec<EgressRule>),
}

/// One thing a machine may reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EgressRule {
    /// Where.
    pub to: Destination,
    /// The one TCP or UDP port; none: all of them, and ICMP.
    pub port: Option<u16>,
}

/// Where a rule lets a machine connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// The name itself, in lower case and without a dot at its end.
    Host(String),
    /// Every name below this one, in lower case; not the name itself.
    Below(String),
    /// Addresses that agree with `address` in their first `prefix` bits (0..=32).
    Network {
        /// The network's address; its bits beyond the prefix are zero.
        address: Ipv4Addr,
        /// How many bits count.
        prefix: u8,
    },
}

impl Egress {
    /// Whether a rule lets the machine connect to this port of a host by this name. The name is as DNS has it, in any case,
    /// with or without a dot at its end. [`Egress::All`] lets every name through.
    #[must_use]
    pub fn allows_name(&self, name: &str, port: Option<u16>) -> bool {
        self.allows(port, |to| to.matches_name(name))
    }

    /// Whether a rule lets the machine connect to this port of this address, whatever its name.
    #[must_use]
    pub fn allows_address(&self, address: Ipv4Addr, port: Option<u16>) -> bool {
        self.allows(port, |to| to.matches_address(address))
    }

    /// Whether a rule lets the machine connect to a host by this name at any port: whether it is worth resolving.
    #[must_use]
    pub fn knows_name(&self, name: &str) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::Rules(rules) => rules.iter().any(|rule| rule.to.matches_name(name)),
        }
    }

    /// `port` is none for protocols without ports (ICMP).
    fn allows(&self, port: Option<u16>, matches: impl Fn(&Destination) -> bool) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::Rules(rules) => {
                rules.iter().any(|rule| (rule.port.is_none() || rule.port == port) && matches(&rule.to))
            }
        }
    }

    /// Bytes of memory it takes, roughly.
    pub(crate) fn weight(&self) -> usize {
        let Self::Rules(rules) = self else { return 0 };
        let name = |rule: &EgressRule| match &rule.to {
            Destination::Host(name) | Destination::Below(name) => name.len(),
            Destination::Network { .. } => 0,
        };
        rules.iter().map(|rule| size_of::<EgressRule>().saturating_add(name(rule))).sum()
    }
}

impl Destination {
    /// Whether a name is meant; it may be in any case and end in a dot.
    #[must_use]
    pub fn matches_name(&self, name: &str) -> bool {
        let name = name.strip_suffix('.').unwrap_or(name);
        match self {
            Self::Host(host) => name.eq_ignore_ascii_case(host),
            Self::Below(host) => {
                let Some(start) = name.len().checked_sub(host.len()).filter(|start| *start >= 2) else {
                    return false;
                };
                let (above, below) = (name.get(start..), name.get(..start));
                above.is_some_and(|above| above.eq_ignore_ascii_case(host))
                    && below.is_some_and(|below| below.ends_with('.'))
            }
            Self::Network { .. } => false,
        }
    }

    /// Whether an address is meant.
    #[must_use]
    pub fn matches_address(&self, other: Ipv4Addr) -> bool {
        match self {
            Self::Network { address, prefix } => masked(other, *prefix) == *address,
            Self::Host(_) | Self::Below(_) => false,
        }
    }
}

/// An address with all but its first `prefix` bits cleared.
fn masked(address: Ipv4Addr, prefix: u8) -> Ipv4Addr {
    let host_bits = 32_u32.saturating_sub(u32::from(prefix));
    let mask = u32::MAX.checked_shl(host_bits).unwrap_or(0);
    Ipv4Addr::from_bits(address.to_bits() & mask)
}

/// What is wrong with a rule, and what would be right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidRule(String);

impl fmt::Display for InvalidRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl core::error::Error for InvalidRule {}

fn invalid<T>(rule: &str, what: impl fmt::Display) -> Result<T, InvalidRule> {
    const SHOWN: usize = 80;
    let mut shown: String =
        rule.chars().take(SHOWN).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if rule.chars().nth(SHOWN).is_some() {
        shown.push('…');
    }
    Err(InvalidRule(format!("'{shown}' {what}")))
}

impl FromStr for EgressRule {
    type Err = InvalidRule;

    fn from_str(text: &str) -> Result<Self, InvalidRule> {
        if text == "none" || text == "all" {
            return invalid(text, "is no rule but a whole policy; give it alone, not in a list");
        }
        if text.contains("://") {
            return invalid(text, "is a URL; give its host and, if need be, port alone: example.org:443");
        }
        if text.starts_with('[') || text.bytes().filter(|byte| *byte == b':').count() > 1 {
            return invalid(text, "is IPv6, and machines have IPv4 alone; leave it out");
        }
        let (place, port) = match text.split_once(':') {
            None => (text, None),
            Some((place, port)) => match port.parse::<u16>() {
                Ok(number @ 1..) if port.bytes().all(|byte| byte.is_ascii_digit()) => (place, Some(number)),
                _ => return invalid(text, "has a port that is not a number from 1 to 65535"),
            },
        };
        Ok(Self { to: destination(text, place)?, port })
    }
}

fn destination(rule: &str, place: &str) -> Result<Destination, InvalidRule> {
    if place == "*" {
        return invalid(
            rule,
            "would allow every host; give 0.0.0.0/0 with a port, or \"all\" instead of the list",
        );
    }
    if let Some((address, prefix)) = place.split_once('/') {
        let Ok(address) = address.parse::<Ipv4Addr>() else {
            return invalid(rule, "is no network; give one such as 10.0.0.0/8, or a host without a path");
        };
        let digits = prefix.bytes().all(|byte| byte.is_ascii_digit());
        let Some(prefix) = prefix.parse::<u8>().ok().filter(|prefix| digits && *prefix <= 32) else {
            return invalid(rule, "has a prefix length that is not a number from 0 to 32");
        };
        let network = masked(address, prefix);
        if network != address {
            return invalid(rule, format_args!("has bits beyond its prefix; give {network}/{prefix}"));
        }
        return Ok(Destination::Network { address, prefix });
    }
    if let Ok(address) = place.parse::<Ipv4Addr>() {
        return Ok(Destination::Network { address, prefix: 32 });
    }
    let (below, name) = match place.strip_prefix("*.") {
        Some(name) => (true, name),
        None => (false, place),
    };
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    if let Some(what) = wrong_name(&name) {
        return invalid(rule, what);
    }
    Ok(if below { Destination::Below(name) } else { Destination::Host(name) })
}

/// What is wrong with a name in lower case, if something is.
fn wrong_name(name: &str) -> Option<&'static str> {
    let label_is_wrong = |label: &str| {
        let allowed =
            |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_');
        label.is_empty()
            || label.len() > MAX_LABEL
            || label.starts_with('-')
            || label.ends_with('-')
            || !label.bytes().all(allowed)
    };
    if name.is_empty() {
        Some("names no host; give one such as example.org, *.example.org or 10.0.0.0/8")
    } else if name.contains('*') {
        Some("has a * elsewhere than as its whole first label; give example.org or *.example.org")
    } else if !name.is_ascii() {
        Some("has letters beyond ASCII; give the name as DNS has it, with labels such as xn--bcher-kva")
    } else if name.len() > MAX_HOST {
        Some("is longer than a name in DNS can be, 253 bytes")
    } else if name.rsplit('.').next().is_some_and(|top| top.bytes().all(|byte| byte.is_ascii_digit())) {
        // No name ends in a label of digits (RFC 3696, 2), so an address was meant.
        Some("is no IPv4 address; give four numbers from 0 to 255, as in 192.0.2.7")
    } else if name.split('.').any(label_is_wrong) {
        Some(
            "is no host name: labels are 1 to 63 letters, digits, '-' and '_', with '-' neither first nor last",
        )
    } else {
        None
    }
}

impl fmt::Display for EgressRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.to {
            Destination::Host(name) => f.write_str(name)?,
            Destination::Below(name) => write!(f, "*.{name}")?,
            Destination::Network { address, prefix: 32 } => write!(f, "{address}")?,
            Destination::Network { address, prefix } => write!(f, "{address}/{prefix}")?,
        }
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

impl Serialize for EgressRule {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for EgressRule {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Rule;

        impl Visitor<'_> for Rule {
            type Value = EgressRule;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a rule such as \"example.org:443\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<EgressRule, E> {
                text.parse().map_err(E::custom)
            }
        }

        from.deserialize_str(Rule)
    }
}

impl Serialize for Egress {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::None => to.serialize_str("none"),
            Self::All => to.serialize_str("all"),
            Self::Rules(rules) => to.collect_seq(rules),
        }
    }
}

impl<'de> Deserialize<'de> for Egress {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Policy;

        impl<'de> Visitor<'de> for Policy {
            type Value = Egress;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"none\", \"all\" or a list of rules such as [\"example.org\", \"10.0.0.0/8\"]")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<Egress, E> {
                match word {
                    "none" => Ok(Egress::None),
                    "all" => Ok(Egress::All),
                    _ => {
                        let shown: String = word.chars().take(80).collect();
                        Err(E::custom(format!(
                            "is '{shown}'; give \"none\", \"all\" or a list of rules such as [\"example.org\"]"
                        )))
                    }
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, rules: A) -> Result<Egress, A::Error> {
                bounded::List(PhantomData).visit_seq(rules).map(Egress::Rules)
            }
        }

        from.deserialize_any(Policy)
    }
}

/// As in a request, for a table or a message: `none`, `all`, or the rules with commas between them.
impl fmt::Display for Egress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::All => f.write_str("all"),
            Self::Rules(rules) => {
                let rules: Vec<_> = rules.iter().map(ToString::to_string).collect();
                f.write_str(&rules.join(", "))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn rule(text: &str) -> EgressRule {
        text.parse().unwrap()
    }

    fn network(a: [u8; 4], prefix: u8) -> Destination {
        Destination::Network { address: Ipv4Addr::from(a), prefix }
    }

    #[test]
    fn a_rule_is_a_host_a_wildcard_an_address_or_a_network_with_or_without_a_port() {
        for (text, to, port) in [
            ("example.org", Destination::Host("example.org".into()), None),
            ("Example.ORG.:443", Destination::Host("example.org".into()), Some(443)),
            ("registry", Destination::Host("registry".into()), None),
            ("_srv.xn--bcher-kva.de", Destination::Host("_srv.xn--bcher-kva.de".into()), None),
            ("*.debian.org:80", Destination::Below("debian.org".into()), Some(80)),
            ("192.0.2.7", network([192, 0, 2, 7], 32), None),
            ("192.0.2.7:22", network([192, 0, 2, 7], 32), Some(22)),
            ("10.0.0.0/8", network([10, 0, 0, 0], 8), None),
            ("0.0.0.0/0:65535", network([0, 0, 0, 0], 0), Some(65535)),
            ("192.0.2.7/32", network([192, 0, 2, 7], 32), None),
        ] {
            assert_eq!(rule(text), EgressRule { to, port }, "{text}");
        }
    }

    #[test]
    fn what_is_no_rule_is_told_with_what_would_be() {
        for (text, words) in [
            ("", "names no host"),
            (":443", "names no host"),
            ("*.", "names no host"),
            ("all", "give it alone, not in a list"),
            ("none", "give it alone, not in a list"),
            ("*", "\"all\" instead of the list"),
            ("*:443", "0.0.0.0/0 with a port"),
            ("https://example.org/", "give its host"),
            ("example.org/path", "without a path"),
            ("[2001:db8::1]:443", "machines have IPv4 alone"),
            ("2001:db8::/32", "machines have IPv4 alone"),
            ("::1", "machines have IPv4 alone"),
            ("example.org:0", "from 1 to 65535"),
            ("example.org:65536", "from 1 to 65535"),
            ("example.org:", "from 1 to 65535"),
            ("example.org:+1", "from 1 to 65535"),
            ("example.org:https", "from 1 to 65535"),
            ("10.0.0.0/33", "from 0 to 32"),
            ("10.0.0.0/", "from 0 to 32"),
            ("10.0.0.0/+8", "from 0 to 32"),
            ("10.1.2.3/8", "give 10.0.0.0/8"),
            ("10.0.0.256", "no IPv4 address"),
            ("10.0.0", "no IPv4 address"),
            ("a.*.org", "whole first label"),
            ("*debian.org", "whole first label"),
            ("bücher.de", "beyond ASCII"),
            ("a..b", "no host name"),
            (".a", "no host name"),
            ("-a.b", "no host name"),
            ("a-.b", "no host name"),
            ("a b", "no host name"),
            ("a\0b", "no host name"),
        ] {
            let error = text.parse::<EgressRule>().unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        let long = format!("{}.org", "a.".repeat(130));
        assert!(long.parse::<EgressRule>().unwrap_err().to_string().contains("253 bytes"));
        assert!("a".repeat(64).parse::<EgressRule>().is_err());
        assert!("x".repeat(1 << 20).parse::<EgressRule>().unwrap_err().to_string().len() < 500);
    }

    #[test]
    fn a_wildcard_means_the_names_below_and_not_the_name_itself() {
        let below = rule("*.debian.org").to;
        for name in ["www.debian.org", "a.b.debian.org", "WWW.Debian.Org."] {
            assert!(below.matches_name(name), "{name}");
        }
        for name in ["debian.org", ".debian.org", "xdebian.org", "debian.org.evil", "ädebian.org", "org", ""]
        {
            assert!(!below.matches_name(name), "{name}");
        }
        assert!(rule("debian.org").to.matches_name("Debian.org."));
        assert!(!rule("debian.org").to.matches_name("www.debian.org"));
    }

    #[test]
    fn a_port_in_a_rule_is_the_only_one_it_allows() {
        let policy = Egress::Rules(vec![rule("example.org:443"), rule("10.0.0.0/8"), rule("192.0.2.7:22")]);
        assert!(policy.allows_name("example.org", Some(443)) && !policy.allows_name("example.org", Some(80)));
        assert!(!policy.allows_name("example.org", None), "no ICMP through a rule for one port");
        assert!(policy.knows_name("example.org") && !policy.knows_name("example.com"));
        let ten = Ipv4Addr::new(10, 255, 0, 1);
        assert!(policy.allows_address(ten, Some(1)) && policy.allows_address(ten, None));
        assert!(!policy.allows_address(Ipv4Addr::new(11, 0, 0, 1), Some(1)));
        let one = Ipv4Addr::new(192, 0, 2, 7);
        assert!(policy.allows_address(one, Some(22)) && !policy.allows_address(one, Some(23)));
    }

    #[test]
    fn none_allows_nothing_and_all_everything() {
        let address = Ipv4Addr::LOCALHOST;
        assert!(!Egress::None.allows_name("a", Some(1)) && !Egress::None.allows_address(address, None));
        assert!(!Egress::None.knows_name("a") && Egress::All.knows_name("a"));
        assert!(Egress::All.allows_name("a", Some(1)) && Egress::All.allows_address(address, None));
        assert!(!Egress::Rules(vec![]).allows_name("a", Some(1)), "an empty list is as none");
    }

    #[test]
    fn policies_survive_json() {
        for json in [json!("none"), json!("all"), json!([]), json!(["example.org", "*.a.b:1", "10.0.0.0/8"])]
        {
            let policy: Egress = serde_json::from_value(json.clone()).unwrap();
            assert_eq!(serde_json::to_value(&policy).unwrap(), json);
        }
        for json in [Value::Null, json!(1), json!("some"), json!([1]), json!({}), json!(vec!["a"; 101])] {
            assert!(serde_json::from_value::<Egress>(json.clone()).is_err(), "{json}");
        }
        let rules = serde_json::from_value(json!(["a", "10.0.0.0/8:1"])).unwrap();
        assert_eq!(<Egress as ToString>::to_string(&rules), "a, 10.0.0.0/8:1");
    }

    proptest! {
        #[test]
        fn whatever_parses_means_the_same_after_it_was_written(text in "[a-cA-C0-9.*:/_-]{0,20}") {
            if let Ok(rule) = text.parse::<EgressRule>() {
                prop_assert_eq!(rule.to_string().parse::<EgressRule>(), Ok(rule));
            }
        }

        #[test]
        fn no_text_panics(text in any::<String>(), name in any::<String>()) {
            if let Ok(rule) = text.parse::<EgressRule>() {
                let _ = rule.to.matches_name(&name);
            }
            let _ = rule("*.example.org").to.matches_name(&name);
        }

        #[test]
        fn a_network_has_the_addresses_that_share_its_prefix(base: u32, other: u32, prefix in 0_u8..=32) {
            let address = masked(Ipv4Addr::from_bits(base), prefix);
            let agrees = (0..u32::from(prefix)).all(|bit| (base ^ other) >> (31 - bit) & 1 == 0);
            let to = Destination::Network { address, prefix };
            prop_assert_eq!(to.matches_address(Ipv4Addr::from_bits(other)), agrees);
        }
    }
}
