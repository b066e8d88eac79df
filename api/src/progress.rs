//! How far something is that takes its time, on stderr: a bar on a terminal, a line a second elsewhere if asked for.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Time between two lines.
const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// Over how long the rate is taken.
const RATE_WINDOW: Duration = Duration::from_secs(2);

/// Bytes of a page of guest memory.
const PAGE: u64 = mirror::memory::PAGE_SIZE as u64;

/// Pages of guest memory on their way.
pub struct Progress {
    shown: Shown,
    began: Instant,
    meter: Meter,
}

enum Shown {
    No,
    Bar(ProgressBar),
    Lines(Option<Instant>),
}

impl Progress {
    /// Shown if stderr is a terminal, or if it is `wanted` anyway.
    pub fn new(wanted: bool) -> Self {
        let shown = if stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr_with_hz(15));
            let style = ProgressStyle::with_template("{msg} [{wide_bar}] {percent:>3}%{prefix}");
            bar.set_style(style.expect("a valid template").progress_chars("=> "));
            Shown::Bar(bar)
        } else if wanted {
            Shown::Lines(None)
        } else {
            Shown::No
        };
        Self { shown, began: Instant::now(), meter: Meter::default() }
    }

    /// Of what is called `name`, `done` pages of `all` are.
    pub fn tell(&mut self, name: &str, done: u64, all: u64) {
        let reading = self.meter.read(name, self.began.elapsed(), done, all);
        match &mut self.shown {
            Shown::No => {}
            Shown::Bar(bar) => {
                bar.set_length(all);
                bar.set_position(done);
                bar.set_prefix(reading.words());
                bar.set_message(name.to_owned());
            }
            Shown::Lines(last) => {
                if last.is_none_or(|last| last.elapsed() >= LINE_INTERVAL) {
                    *last = Some(Instant::now());
                    eprintln!("{name}: {}%{}", reading.percent(), reading.words());
                }
            }
        }
    }

    /// It is over: what does not stay goes.
    pub fn finish(&self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Takes the rate.
#[derive(Default)]
struct Meter {
    name: String,
    /// What was done when, within the window.
    seen: std::collections::VecDeque<(Duration, u64)>,
}

impl Meter {
    fn read(&mut self, name: &str, at: Duration, done: u64, all: u64) -> Reading {
        if self.name != name || self.seen.back().is_some_and(|(_, before)| done < *before) {
            // Something new begins.
            name.clone_into(&mut self.name);
            self.seen.clear();
        }
        while self.seen.len() > 1 && at.saturating_sub(self.seen[0].0) > RATE_WINDOW {
            self.seen.pop_front();
        }
        self.seen.push_back((at, done));
        let (since, before) = self.seen[0];
        let seconds = at.saturating_sub(since).as_secs_f64();
        let per_second = if seconds > 0.0 { (done - before) as f64 / seconds } else { 0.0 };
        Reading { done, all, per_second }
    }
}

struct Reading {
    done: u64,
    all: u64,
    per_second: f64,
}

impl Reading {
    fn percent(&self) -> u64 {
        self.done.min(self.all) * 100 / self.all.max(1)
    }

    /// Amount, rate and time left; what is not known yet is left out.
    fn words(&self) -> String {
        let amount = format!(" of {}", bytes(self.all * PAGE));
        if self.per_second < 1.0 {
            return amount;
        }
        let left = Duration::from_secs_f64(self.all.saturating_sub(self.done) as f64 / self.per_second);
        format!("{amount}, {}/s, {} left", bytes((self.per_second * PAGE as f64) as u64), span(left))
    }
}

/// An amount of memory for people: three digits and a unit.
pub fn bytes(amount: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (amount as f64, 0);
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value >= 99.95 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// A time to wait, for people.
fn span(time: Duration) -> String {
    match time.as_secs_f64().ceil() as u64 {
        seconds @ 0..100 => format!("{seconds} s"),
        seconds @ 100..6000 => format!("{} min", seconds.div_ceil(60)),
        seconds => format!("{} h", seconds.div_ceil(3600)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn rate_and_time_left_are_those_of_the_last_seconds() {
        let mut meter = Meter::default();
        assert_eq!(meter.read("x", Duration::ZERO, 0, 2560).words(), " of 10.0 MiB");
        assert_eq!(meter.read("x", SECOND, 256, 2560).words(), " of 10.0 MiB, 1.0 MiB/s, 9 s left");
        for second in 2..=8 {
            meter.read("x", SECOND * second, 256, 2560);
        }
        assert_eq!(
            meter.read("x", SECOND * 9, 256 + 1536, 2560).words(),
            " of 10.0 MiB, 3.0 MiB/s, 1 s left"
        );
    }

    #[test]
    fn another_round_has_its_own_rate() {
        let mut meter = Meter::default();
        meter.read("round 1", Duration::ZERO, 0, 1000);
        meter.read("round 1", SECOND, 1000, 1000);
        assert_eq!(meter.read("round 2", SECOND * 2, 10, 100).words(), " of 400 KiB");
        // Fewer than before: a round of the same name.
        assert_eq!(meter.read("round 2", SECOND * 3, 5, 100).words(), " of 400 KiB");
    }

    #[test]
    fn more_done_than_there_is_is_all() {
        let reading = Reading { done: 12, all: 10, per_second: 5.0 };
        assert_eq!(reading.percent(), 100);
        assert!(reading.words().ends_with("0 s left"));
        assert_eq!(Reading { done: 0, all: 0, per_second: 0.0 }.percent(), 0);
    }

    #[test]
    fn amounts_have_three_digits_and_a_unit() {
        let cases =
            [(0, "0 B"), (999, "999 B"), (1024, "1.0 KiB"), (1 << 20, "1.0 MiB"), (1000 << 20, "1.0 GiB")];
        for (amount, words) in cases {
            assert_eq!(bytes(amount), words);
        }
        assert_eq!(bytes(512 << 20), "512 MiB");
        assert_eq!(
            (span(SECOND * 99), span(SECOND * 100), span(SECOND * 7200)),
            ("99 s".into(), "2 min".into(), "2 h".into())
        );
    }
}
