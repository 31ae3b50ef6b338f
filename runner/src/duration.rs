//! Durations as people type them.

use std::time::Duration;

/// Reads `90`, `90s`, `10m` or `2h` as a duration; a bare number is seconds.
///
/// # Errors
/// A message for the user when the text is none of these, is zero, or is past `u32::MAX` seconds.
pub fn parse(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let (digits, unit) = match text.strip_suffix(['s', 'm', 'h']) {
        Some(digits) => (digits, &text[digits.len()..]),
        None => (text, "s"),
    };
    let factor = match unit {
        "h" => 3600,
        "m" => 60,
        _ => 1,
    };
    let seconds = digits
        .parse::<u32>()
        .ok()
        .and_then(|number| number.checked_mul(factor))
        .filter(|&seconds| seconds > 0)
        .ok_or_else(|| {
            format!("{text:?} is not a duration; give seconds, or a number with s, m or h, such as 10m")
        })?;
    Ok(Duration::from_secs(u64::from(seconds)))
}

/// A number of milliseconds as people read it: `850 ms`, `3.2 s`, `12 min 5 s`.
pub fn format_ms(milliseconds: u64) -> String {
    match milliseconds {
        0..1_000 => format!("{milliseconds} ms"),
        1_000..60_000 => format!("{}.{} s", milliseconds / 1_000, milliseconds % 1_000 / 100),
        60_000..3_600_000 => format!("{} min {} s", milliseconds / 60_000, milliseconds % 60_000 / 1_000),
        _ => format!("{} h {} min", milliseconds / 3_600_000, milliseconds % 3_600_000 / 60_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_minutes_and_hours_are_read() {
        assert_eq!(parse("90"), Ok(Duration::from_secs(90)));
        assert_eq!(parse("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse("10m"), Ok(Duration::from_secs(600)));
        assert_eq!(parse(" 2h "), Ok(Duration::from_secs(7200)));
    }

    #[test]
    fn what_is_no_duration_is_refused_with_an_example() {
        for text in ["", "s", "0", "-1", "1.5", "10d", "99999999999", "2000000h", "m5", "٣s"] {
            let message = parse(text).unwrap_err();
            assert!(message.contains("10m"), "{text}: {message}");
        }
    }

    #[test]
    fn milliseconds_are_written_in_the_unit_that_reads_best() {
        assert_eq!(format_ms(0), "0 ms");
        assert_eq!(format_ms(999), "999 ms");
        assert_eq!(format_ms(3_260), "3.2 s");
        assert_eq!(format_ms(725_000), "12 min 5 s");
        assert_eq!(format_ms(7_260_000), "2 h 1 min");
    }
}
