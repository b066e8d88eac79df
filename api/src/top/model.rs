//! What the view shows: figures of now, rates, and how they went.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use mirror::memory::PAGE_SIZE;
use mirror::shell::metrics::Summary;
use mirror::shell::primary;

use super::keys::{Order, orders};
use crate::server::{InstanceInfo, MirrorStatus};

/// Points of a curve that are kept: more than a terminal has columns.
const HISTORY: usize = 512;

/// Over how long rates are taken.
const WINDOW: Duration = Duration::from_secs(1);

/// What a process said of itself at one moment.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    pub(super) at: Instant,
    pub(super) instance: InstanceInfo,
    pub(super) mirror: Option<MirrorStatus>,
}

/// A figure and how it went.
#[derive(Debug, Default)]
pub(super) struct Curve {
    /// The newest is the last.
    pub(super) points: VecDeque<u64>,
}

impl Curve {
    fn push(&mut self, point: u64) {
        if self.points.len() == HISTORY {
            self.points.pop_front();
        }
        self.points.push_back(point);
    }

    /// The highest of the last `count` points.
    pub(super) fn peak(&self, count: usize) -> u64 {
        self.points.iter().rev().take(count).copied().max().unwrap_or(0)
    }

    /// The newest.
    pub(super) fn now(&self) -> u64 {
        self.points.back().copied().unwrap_or(0)
    }
}

/// Counters that only grow, whichever side tells them.
#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    epochs: u64,
    pages: u64,
    bytes: u64,
    pause: (u64, u64),
    commit: (u64, u64),
}

impl Counters {
    fn of(status: &MirrorStatus) -> Self {
        match status {
            MirrorStatus::Primary(status) => {
                let times = &status.times;
                let sums = |summary: &Summary| (summary.count, summary.sum);
                Self {
                    epochs: times.pause_us.count,
                    pages: status.epoch_pages,
                    bytes: status.epoch_bytes + seed_bytes(status),
                    pause: sums(&times.pause_us),
                    commit: sums(&times.commit_us),
                }
            }
            MirrorStatus::Standby(status) => {
                Self { epochs: status.sense.epochs, pages: status.sense.pages, ..Self::default() }
            }
        }
    }
}

/// What has been sent of seeding; of the round that is on its way as its pages are.
fn seed_bytes(status: &primary::Status) -> u64 {
    let on_the_way = status.phase == "seeding" && status.round_sent < status.round_pages;
    status.seed_bytes + if on_the_way { status.round_sent * PAGE_SIZE as u64 } else { 0 }
}

/// Everything that is shown.
#[derive(Debug, Default)]
pub(super) struct Model {
    /// The newest, and those before it within the window.
    samples: VecDeque<Sample>,
    /// Why the last question was not answered.
    pub(super) silence: Option<String>,
    /// Mean pause, in microseconds.
    pub(super) pause: Curve,
    /// Mean time from the end of a pause to the standby's answer, in microseconds.
    pub(super) lag: Curve,
    /// Pages of an epoch.
    pub(super) dirty: Curve,
    /// Bytes a second.
    pub(super) wire: Curve,
    /// Epochs a second, in tenths.
    pub(super) epochs: Curve,
    /// Bytes that wait for their epoch.
    pub(super) held: Curve,
    /// Pages a second.
    pub(super) pages: Curve,
}

impl Model {
    /// What can be ordered of the process, as far as is known.
    pub(super) fn orders(&self) -> &'static [Order] {
        self.now().map_or(&[], |sample| orders(sample.mirror.as_ref()))
    }

    /// The newest sample.
    pub(super) fn now(&self) -> Option<&Sample> {
        self.samples.back()
    }

    /// Takes another sample.
    pub(super) fn take(&mut self, sample: Sample) {
        self.silence = None;
        while self.samples.len() > 1 && sample.at.saturating_duration_since(self.samples[1].at) >= WINDOW {
            self.samples.pop_front();
        }
        let one_guest = |a: &Sample, b: &Sample| mirror_of(a) == mirror_of(b);
        if self.samples.back().is_some_and(|before| !one_guest(before, &sample)) {
            // Another mirror counts anew.
            self.samples.clear();
        }
        if let (Some(first), Some(after)) = (self.samples.front(), &sample.mirror) {
            let before = first.mirror.as_ref().map_or_else(Counters::default, Counters::of);
            let seconds = sample.at.saturating_duration_since(first.at).as_secs_f64().max(0.001);
            self.grow(&before, &Counters::of(after), seconds);
        }
        if let Some(MirrorStatus::Primary(status)) = &sample.mirror {
            self.held.push(status.held_bytes);
        }
        self.samples.push_back(sample);
    }

    fn grow(&mut self, before: &Counters, after: &Counters, seconds: f64) {
        let epochs = after.epochs.saturating_sub(before.epochs);
        let pages = after.pages.saturating_sub(before.pages);
        let rate = |grown: u64| (grown as f64 / seconds).round() as u64;
        self.epochs.push(rate(epochs * 10));
        self.pages.push(rate(pages));
        self.wire.push(rate(after.bytes.saturating_sub(before.bytes)));
        self.dirty.push(pages.checked_div(epochs).unwrap_or(0));
        self.pause.push(mean(before.pause, after.pause));
        self.lag.push(mean(before.commit, after.commit));
    }
}

fn mean(before: (u64, u64), after: (u64, u64)) -> u64 {
    after.1.saturating_sub(before.1).checked_div(after.0.saturating_sub(before.0)).unwrap_or(0)
}

/// Which guest is mirrored where, and by which role.
fn mirror_of(sample: &Sample) -> Option<(String, String)> {
    Some(match sample.mirror.as_ref()? {
        MirrorStatus::Primary(status) => (status.guid.to_string(), status.standby.to_string()),
        MirrorStatus::Standby(status) => (status.guid?.to_string(), status.role.clone()),
    })
}
