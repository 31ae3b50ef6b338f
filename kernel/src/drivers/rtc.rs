//! The wall clock at boot, from the battery-backed CMOS clock.
//!
//! Motorola MC146818A, "Register A" (update in progress), "Register B" (24 hours, binary); IBM PC AT CMOS map
//! for the registers' numbers.

use x86_64::instructions::port::Port;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const UPDATE_IN_PROGRESS: u8 = 1 << 7;
const HOURS_ARE_24: u8 = 1 << 1;
const VALUES_ARE_BINARY: u8 = 1 << 2;
const AFTERNOON: u8 = 1 << 7;
/// How often a reading is tried again: an update takes 2 ms at most, a register read about a microsecond.
const ATTEMPTS: usize = 10_000;

/// Seconds since 1970-01-01T00:00:00Z, or `None` where there is no clock that gives a sane date between 2020
/// and 2099.
#[must_use]
pub fn unix_seconds() -> Option<u64> {
    let mut previous = None;
    for _ in 0..ATTEMPTS {
        if read(STATUS_A) & UPDATE_IN_PROGRESS != 0 {
            continue;
        }
        let reading = [SECONDS, MINUTES, HOURS, DAY, MONTH, YEAR].map(read);
        // Two equal readings in a row were not torn by an update.
        if previous == Some(reading) {
            return decode(reading, read(STATUS_B));
        }
        previous = Some(reading);
    }
    None
}

fn decode(reading: [u8; 6], status: u8) -> Option<u64> {
    let number =
        |value: u8| if status & VALUES_ARE_BINARY == 0 { (value >> 4) * 10 + (value & 0xf) } else { value };
    let [second, minute, raw_hour, day, month, year] = reading;
    let mut hour = number(raw_hour & !AFTERNOON);
    if status & HOURS_ARE_24 == 0 {
        hour = hour % 12 + if raw_hour & AFTERNOON == 0 { 0 } else { 12 };
    }
    let [second, minute, day, month, year] =
        [second, minute, day, month, year].map(|value| u64::from(number(value)));
    let year = 2000 + year;
    let valid = second < 60
        && minute < 60
        && hour < 24
        && (1..=31).contains(&day)
        && (1..=12).contains(&month)
        && (2020..2100).contains(&year);
    valid.then(|| ((days_since_1970(year, month, day) * 24 + u64::from(hour)) * 60 + minute) * 60 + second)
}

/// Days from 1970-01-01 to a date of the Gregorian calendar between 2000 and 2099, where every fourth year is
/// a leap year.
fn days_since_1970(year: u64, month: u64, day: u64) -> u64 {
    const BEFORE_MONTH: [u64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
    let years = year - 2000;
    let leap_day = u64::from(years.is_multiple_of(4) && month > 2);
    let before_month =
        usize::try_from(month - 1).ok().and_then(|index| BEFORE_MONTH.get(index)).copied().unwrap_or(0);
    // 10,957 days lie between 1970-01-01 and 2000-01-01.
    10_957 + years * 365 + years.div_ceil(4) + before_month + leap_day + day - 1
}

fn read(register: u8) -> u8 {
    // SAFETY: ports 0x70 and 0x71 are the CMOS clock on every PC; bit 7 of the index keeps NMIs off while the
    // index stands, and reading the clock's registers has no side effects that matter (no periodic interrupt
    // is used).
    unsafe {
        Port::<u8>::new(0x70).write(0x80 | register);
        Port::<u8>::new(0x71).read()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binary_and_decimal_readings_of_24_and_12_hours_are_understood() {
        // 2026-11-23 12:34:56, as `date -u -d @1795437296`.
        let expected = Some(1_795_437_296);
        assert_eq!(decode([56, 34, 12, 23, 11, 26], HOURS_ARE_24 | VALUES_ARE_BINARY), expected);
        assert_eq!(decode([0x56, 0x34, 0x12, 0x23, 0x11, 0x26], HOURS_ARE_24), expected);
        assert_eq!(decode([0x56, 0x34, 0x92, 0x23, 0x11, 0x26], 0), expected);
        assert_eq!(decode([0x56, 0x34, 0x12, 0x23, 0x11, 0x26], 0), expected.map(|noon| noon - 12 * 3600));
    }

    #[test]
    fn leap_days_count_from_the_day_they_come() {
        let day = |month, day, year| {
            decode([0, 0, 0, day, month, year], HOURS_ARE_24 | VALUES_ARE_BINARY).unwrap() / 86_400
        };
        assert_eq!(day(2, 29, 28) + 1, day(3, 1, 28));
        assert_eq!(day(2, 28, 27) + 1, day(3, 1, 27));
        assert_eq!(day(12, 31, 27) + 1, day(1, 1, 28));
        assert_eq!(day(12, 31, 28) + 1, day(1, 1, 29));
    }

    #[test]
    fn a_clock_that_is_not_there_gives_no_date() {
        assert_eq!(decode([0xff; 6], 0xff), None);
        assert_eq!(decode([0; 6], 0), None);
    }
}
