//! Running other programs, and times for people.

use std::process::{Command, Stdio};
use std::time::Duration;

pub(crate) use nestling_image_builder::process::{find, output, run, shown};

/// True if `command` starts and succeeds; its output is thrown away.
pub(crate) fn succeeds(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// A span of time for people: `840 ms`, `3.7 s`, `4 min 12 s`.
pub(crate) fn span(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 1.0 {
        format!("{:.0} ms", seconds * 1000.0)
    } else if seconds < 60.0 {
        format!("{seconds:.1} s")
    } else {
        format!("{} min {} s", time.as_secs() / 60, time.as_secs() % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_shown_in_the_unit_that_fits() {
        assert_eq!(span(Duration::from_millis(840)), "840 ms");
        assert_eq!(span(Duration::from_millis(3720)), "3.7 s");
        assert_eq!(span(Duration::from_secs(252)), "4 min 12 s");
    }
}
