//! What a side counts and measures.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::report::{PausePhases, PerPhase};

/// Longest time that is told apart, in microseconds: a minute.
const LONGEST_US: u64 = 60_000_000;

/// A distribution of times.
#[derive(Clone, Debug)]
pub struct Times {
    histogram: Histogram<u64>,
    sum: u64,
}

impl Default for Times {
    fn default() -> Self {
        // Only bounds out of order or absurd precision make this fail.
        let histogram = Histogram::new_with_bounds(1, LONGEST_US, 3).expect("the bounds are in order");
        Self { histogram, sum: 0 }
    }
}

impl Times {
    /// Adds a time in microseconds.
    pub fn record(&mut self, micros: u64) {
        self.histogram.saturating_record(micros);
        self.sum = self.sum.saturating_add(micros);
    }

    /// The figures that people ask for.
    pub fn summary(&self) -> Summary {
        Summary {
            count: self.histogram.len(),
            sum: self.sum,
            p50: self.histogram.value_at_quantile(0.5),
            p99: self.histogram.value_at_quantile(0.99),
            max: self.histogram.max(),
        }
    }
}

/// Figures of a distribution of times in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Summary {
    /// How many times were recorded.
    pub count: u64,
    /// All of them together.
    #[serde(default)]
    pub sum: u64,
    /// Half were at most this.
    pub p50: u64,
    /// 99 of 100 were at most this.
    pub p99: u64,
    /// The longest.
    pub max: u64,
}

/// The distributions of the pause and its phases, and of the time from its end to the standby's answer.
#[derive(Clone, Debug, Default)]
pub struct PauseTimes {
    phases: PerPhase<Times>,
    commit: Times,
}

impl PauseTimes {
    /// Adds a pause.
    pub fn record_pause(&mut self, phases: &PausePhases) {
        self.phases.record(phases, Times::record);
    }

    /// Adds the time from the end of a pause to the standby's answer.
    pub fn record_commit(&mut self, micros: u64) {
        self.commit.record(micros);
    }

    /// Figures of all of them.
    pub fn summary(&self) -> PauseSummary {
        PauseSummary {
            pause_us: self.phases.total.summary(),
            stop_us: self.phases.stop.summary(),
            harvest_us: self.phases.harvest.summary(),
            copy_us: self.phases.copy.summary(),
            capture_us: self.phases.capture.summary(),
            resume_us: self.phases.resume.summary(),
            commit_us: self.commit.summary(),
        }
    }
}

/// Figures of the pause, its phases and the commit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct PauseSummary {
    /// The whole pause.
    pub pause_us: Summary,
    /// Stopping the vCPUs.
    pub stop_us: Summary,
    /// Taking the dirty set.
    pub harvest_us: Summary,
    /// Copying pages to staging.
    pub copy_us: Summary,
    /// Capturing state.
    pub capture_us: Summary,
    /// Letting the vCPUs run again.
    pub resume_us: Summary,
    /// From the end of the pause to the standby's answer.
    pub commit_us: Summary,
}
