//! What is known of a run when it is over.

use mirror::report::Stamped;
use serde::Serialize;

use super::options::Name;
use crate::history;
use crate::sides::Side;
use crate::sides::console;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The standby went on after the primary was lost.
    Survived,
    /// The guest was handed over.
    Switched,
    /// The guest went on where it was, and a new standby was seeded.
    Reprotected,
    /// Nobody goes on with the guest, or something is lost, taken back, or there twice.
    Lost,
}

impl Outcome {
    /// As it is written.
    pub fn text(self) -> &'static str {
        match self {
            Self::Survived => "survived",
            Self::Switched => "switched",
            Self::Reprotected => "reprotected",
            Self::Lost => "lost",
        }
    }
}

/// When what happened. Microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Times {
    /// From the start of the run to the fault.
    pub fault_us: u64,
    /// From the fault until a side noticed.
    pub detected_us: Option<u64>,
    /// From the fault until the guest could go on, in the standby or where it was.
    pub resumed_us: Option<u64>,
    /// From the fault to the first answer that a client got after that.
    pub answered_us: Option<u64>,
    /// From the fault until the guest was protected again.
    pub reprotected_us: Option<u64>,
    /// The whole run.
    pub run_us: u64,
}

/// Reads one of the times from the fault on.
pub(super) type Pick = fn(&Times) -> Option<u64>;

/// The times from the fault on, as they are called.
pub(super) const TIMES: [(&str, Pick); 4] = [
    ("detected", |times| times.detected_us),
    ("went on", |times| times.resumed_us),
    ("first answer", |times| times.answered_us),
    ("protected again", |times| times.reprotected_us),
];

/// A run.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// Which drill.
    #[serde(serialize_with = "name")]
    pub drill: Name,
    /// Counted from 1.
    pub run: u32,
    /// By which the moments were chosen, together with the drill and the number of the run.
    pub seed: u64,
    /// What exactly was done.
    pub how: String,
    /// How it ended.
    pub outcome: Outcome,
    /// What must not be.
    pub violations: Vec<String>,
    /// When what happened.
    #[serde(flatten)]
    pub times: Times,
    /// What the clients' requests showed.
    pub service: history::Findings,
    /// Blocks of the disk's image that were compared.
    pub image_blocks: u64,
    /// Whether the images of the guest's disk on both sides were compared in the end, and were the same.
    pub images_equal: bool,
    /// What the consoles showed.
    pub console: console::Findings,
    /// For the timeline.
    #[serde(skip)]
    pub timeline: Option<Timeline>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes so")]
fn name<S: serde::Serializer>(name: &Name, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&name.text())
}

/// All that happened in a run.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    /// The beginning, on the monotonic clock.
    pub started_us: u64,
    /// What the sides told.
    pub told: Vec<(Side, Stamped)>,
    /// When processes ended.
    pub ended: Vec<(Side, u64)>,
    /// What the drill did.
    pub marks: Vec<Mark>,
    /// Start and end of each request with an answer.
    pub requests: Vec<(u64, u64)>,
}

/// Something that the drill did.
#[derive(Clone, Debug)]
pub struct Mark {
    /// When, on the monotonic clock.
    pub at_us: u64,
    /// What.
    pub text: String,
}

impl Run {
    /// In one line.
    pub fn line(&self) -> String {
        let ms = |us: Option<u64>| us.map_or("–".into(), |us| format!("{:.1}", us as f64 / 1000.0));
        let head = format!("{:<10} run {:>3}  {:<11}", self.drill.text(), self.run, self.outcome.text());
        let times = format!(
            "detected {} ms, went on {} ms, first answer {} ms",
            ms(self.times.detected_us),
            ms(self.times.resumed_us),
            ms(self.times.answered_us)
        );
        let mut line = format!(
            "{head} {times}; {} writes, {} blocks{}  ({})",
            self.service.acknowledged,
            self.image_blocks,
            if self.images_equal { ", images equal" } else { "" },
            self.how
        );
        for violation in &self.violations {
            line.push_str("\n    VIOLATION: ");
            line.push_str(violation);
        }
        line
    }

    /// Whether it ended as it must.
    pub fn is_good(&self) -> bool {
        self.outcome != Outcome::Lost && self.violations.is_empty()
    }
}

/// A time that half of the runs, 99 of 100, and all did not exceed, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quantiles {
    /// How many there are.
    pub count: usize,
    /// Half.
    pub p50: u64,
    /// 99 of 100.
    pub p99: u64,
    /// All.
    pub max: u64,
}

impl Quantiles {
    /// Of `values`; `None` without any.
    pub fn of(values: impl Iterator<Item = u64>) -> Option<Self> {
        let mut values: Vec<u64> = values.collect();
        values.sort_unstable();
        let max = *values.last()?;
        // The smallest that so many of 100 do not exceed.
        let at = |percent: usize| values[(values.len() * percent).div_ceil(100).max(1) - 1];
        Some(Self { count: values.len(), p50: at(50), p99: at(99), max })
    }
}

impl std::fmt::Display for Quantiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms = |us: u64| us as f64 / 1000.0;
        write!(f, "p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms", ms(self.p50), ms(self.p99), ms(self.max))
    }
}

/// All runs of a drill, in a few lines.
pub fn totals(runs: &[Run]) -> String {
    use std::fmt::Write;
    let mut out = String::new();
    let mut names: Vec<Name> = runs.iter().map(|run| run.drill).collect();
    names.dedup();
    for name in names {
        let of_it = || runs.iter().filter(move |run| run.drill == name);
        let good = of_it().filter(|run| run.is_good()).count();
        let violations: usize = of_it().map(|run| run.violations.len()).sum();
        // Writing to a string does not fail, here and below.
        let _ =
            write!(out, "{}: {} runs, {good} good, {violations} violations", name.text(), of_it().count());
        for (what, pick) in TIMES {
            if let Some(quantiles) = Quantiles::of(of_it().filter_map(|run| pick(&run.times))) {
                let _ = write!(out, "\n    {what:<16} {quantiles}");
            }
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_there() {
        assert_eq!(Quantiles::of([].into_iter()), None);
        let of = |values: &[u64]| Quantiles::of(values.iter().copied()).unwrap();
        assert_eq!(of(&[7]), Quantiles { count: 1, p50: 7, p99: 7, max: 7 });
        let hundred: Vec<u64> = (1..=200).rev().collect();
        assert_eq!(of(&hundred), Quantiles { count: 200, p50: 100, p99: 198, max: 200 });
    }
}
