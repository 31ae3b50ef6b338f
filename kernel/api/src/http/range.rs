//! The `Range` header (RFC 9110, 14.2), over bytes of which the oldest may be gone.

/// A range as asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// From one offset up to and with another.
    From(u64, Option<u64>),
    /// So many bytes at the end.
    Last(u64),
}

/// A range that can be given: from `start` up to but without `end`, never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Wanted {
    /// A header's one range of bytes. Several, other units and nonsense are none: such a header is to be ignored.
    pub(crate) fn parse(header: &str) -> Option<Self> {
        let (unit, range) = header.split_once('=')?;
        let (first, last) = range.trim().split_once('-')?;
        let number = |text: &str| text.parse().ok().filter(|_| text.bytes().all(|b| b.is_ascii_digit()));
        if !unit.trim().eq_ignore_ascii_case("bytes") {
            return None;
        }
        match (first, last) {
            ("", count) => number(count).map(Self::Last),
            (first, "") => Some(Self::From(number(first)?, None)),
            (first, last) => {
                let (first, last) = (number(first)?, number(last)?);
                (first <= last).then_some(Self::From(first, Some(last)))
            }
        }
    }

    /// What of it there is among the bytes from `start` up to but without `end`; none when that is nothing.
    pub(crate) fn within(self, start: u64, end: u64) -> Option<Range> {
        let range = match self {
            Self::From(first, last) => {
                let behind = last.map_or(end, |last| last.saturating_add(1));
                Range { start: first.max(start), end: behind.min(end) }
            }
            Self::Last(count) => Range { start: end.saturating_sub(count).max(start), end },
        };
        (range.start < range.end).then_some(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_and_nonsense_is_ignored() {
        assert_eq!(Wanted::parse("bytes=0-9"), Some(Wanted::From(0, Some(9))));
        assert_eq!(Wanted::parse("Bytes = 5-"), Some(Wanted::From(5, None)));
        assert_eq!(Wanted::parse("bytes=-7"), Some(Wanted::Last(7)));
        for text in [
            "",
            "bytes",
            "bytes=",
            "bytes=-",
            "bytes=a-b",
            "bytes=9-1",
            "bytes=0-1,3-4",
            "lines=1-2",
            "bytes=+1-2",
        ] {
            assert_eq!(Wanted::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_range_is_cut_to_what_there_is() {
        let within = |wanted: Wanted| wanted.within(10, 20).map(|range| (range.start, range.end));
        assert_eq!(within(Wanted::From(12, Some(14))), Some((12, 15)));
        assert_eq!(within(Wanted::From(0, Some(14))), Some((10, 15)));
        assert_eq!(within(Wanted::From(12, None)), Some((12, 20)));
        assert_eq!(within(Wanted::From(12, Some(u64::MAX))), Some((12, 20)));
        assert_eq!(within(Wanted::Last(3)), Some((17, 20)));
        assert_eq!(within(Wanted::Last(300)), Some((10, 20)));
        for gone in [Wanted::From(0, Some(9)), Wanted::From(20, None), Wanted::Last(0)] {
            assert_eq!(within(gone), None);
        }
        assert_eq!(Wanted::Last(5).within(0, 0), None);
    }
}
