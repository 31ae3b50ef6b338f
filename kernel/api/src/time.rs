//! The time as the caller gives it, and how the API writes it (RFC 3339).

use alloc::format;
use alloc::string::String;

/// Nanoseconds in a second.
pub const SECOND: u64 = 1_000_000_000;
/// Nanoseconds in a millisecond.
pub const MILLISECOND: u64 = 1_000_000;

/// A moment, by both of the node's clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clock {
    /// Nanoseconds since the node booted. Never goes back; every duration and deadline is measured by it.
    pub monotonic_ns: u64,
    /// Nanoseconds since 1970-01-01 00:00:00 UTC. Only ever shown.
    pub unix_ns: u64,
}

/// A moment as RFC 3339 writes it in UTC, to the millisecond: `2026-01-31T23:59:59.042Z`.
#[must_use]
pub fn rfc3339(unix_ns: u64) -> String {
    let (seconds, millis) = (unix_ns / SECOND, unix_ns % SECOND / MILLISECOND);
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_from_days(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

/// A moment as HTTP's headers write it (RFC 9110, 5.6.7): `Sat, 31 Jan 2026 23:59:59 GMT`.
#[must_use]
pub(crate) fn http_date(unix_ns: u64) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let seconds = unix_ns / SECOND;
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_from_days(days);
    let name = |names: &[&'static str], index: u64| {
        usize::try_from(index).ok().and_then(|index| names.get(index).copied()).unwrap_or_default()
    };
    let (weekday, month) = (name(&DAYS, days % 7), name(&MONTHS, month.saturating_sub(1)));
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{weekday}, {day:02} {month} {year:04} {hour:02}:{minute:02}:{second:02} GMT")
}

/// Year, month and day of the proleptic Gregorian calendar, for days since 1970-01-01.
///
/// Counts years from 1 March, so that the leap day is a year's last: months then start at `(153 * m + 2) / 5` days.
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    const DAYS_FROM_MARCH_OF_YEAR_0: u64 = 719_468;
    const DAYS_IN_400_YEARS: u64 = 146_097;
    let days = days + DAYS_FROM_MARCH_OF_YEAR_0;
    let (era, day_of_era) = (days / DAYS_IN_400_YEARS, days % DAYS_IN_400_YEARS);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments_are_written_as_date_writes_them() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000Z"),
            (1_795_435_719, "2026-11-23T12:08:39.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(seconds * SECOND), text);
        }
    }

    #[test]
    fn headers_write_moments_with_their_weekday() {
        assert_eq!(http_date(784_111_777 * SECOND), "Sun, 06 Nov 1994 08:49:37 GMT");
    }

    #[test]
    fn fractions_are_cut_to_milliseconds() {
        assert_eq!(rfc3339(1_999_999), "1970-01-01T00:00:00.001Z");
    }

    #[test]
    fn every_day_of_four_hundred_years_follows_the_one_before() {
        let (mut year, mut month, mut day) = (1970, 1, 1);
        for days in 0..146_097 {
            assert_eq!(civil_from_days(days), (year, month, day));
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let last = match month {
                2 => 28 + u64::from(leap),
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            (month, day) = if day < last { (month, day + 1) } else { (month + 1, 1) };
            (year, month) = if month > 12 { (year + 1, 1) } else { (year, month) };
        }
    }

    #[test]
    fn the_last_moment_does_not_overflow() {
        assert_eq!(rfc3339(u64::MAX), "2554-07-21T23:34:33.709Z");
    }
}
