//! The pause at a given number of dirty pages per epoch, split into its phases.

use std::time::Duration;

use mirror::primary::{Pacing, Settings};
use mirror::report::{PausePhases, Report};
use serde::Serialize;
use tests::pair::{Pair, await_report};
use vmm::MachineConfig;

use crate::figures::{median, quantile};

/// Time between two epochs. Long enough for the guest to dirty what it shall, also with the most pages.
const INTERVAL: Duration = Duration::from_millis(100);
const EPOCHS: usize = 60;
/// An epoch counts if its pages are within this share of what was asked for.
const TOLERANCE: f64 = 0.25;

/// Medians of the phases in microseconds, for one number of dirty pages.
#[derive(Debug, Serialize)]
// The figures are named as they are reported.
#[allow(clippy::struct_field_names)]
pub(crate) struct Pause {
    dirty_pages: u64,
    vcpus: u8,
    epochs: usize,
    pause_p50_us: f64,
    pause_p99_us: f64,
    stop_us: f64,
    harvest_us: f64,
    copy_us: f64,
    capture_us: f64,
    resume_us: f64,
    commit_us: f64,
}

pub(crate) fn measure() -> Vec<Pause> {
    [(100, 1), (1000, 1), (10_000, 1), (1000, 2)].map(|(pages, vcpus)| at(pages, vcpus)).into()
}

fn at(dirty_pages: u64, vcpus: u8) -> Pause {
    let config = MachineConfig::new(vcpus, 256);
    let rate = dirty_pages * 1000 / INTERVAL.as_millis() as u64;
    let cmdline = format!("workload=dirty cpus={vcpus} dirty.rate={rate} dirty.set=128 dirty.pattern=seq");
    let settings = Settings {
        pacing: Pacing {
            interval: INTERVAL,
            min_interval: INTERVAL,
            dirty_budget: u64::MAX,
            ..Pacing::default()
        },
        ..Settings::default()
    };
    let pair = Pair::start_when(&config, &cmdline, "tcp:127.0.0.1:0", settings, |screen| {
        screen.matches("ready cpu=").count() == usize::from(vcpus)
    });
    let wanted = dirty_pages as f64 * (1.0 - TOLERANCE)..dirty_pages as f64 * (1.0 + TOLERANCE);
    let mut pauses: Vec<(PausePhases, u64)> = Vec::new();
    while pauses.len() < EPOCHS {
        let report = await_report(&pair.primary_reports, |report| matches!(report, Report::Committed { .. }));
        if let Report::Committed { pages, pause, commit_us, .. } = report
            && wanted.contains(&(pages as f64))
        {
            pauses.push((pause, commit_us));
        }
    }
    pair.end();
    let each = |get: fn(&(PausePhases, u64)) -> u64| pauses.iter().map(|p| get(p) as f64).collect::<Vec<_>>();
    let mut total = each(|(pause, _)| pause.total_us());
    Pause {
        dirty_pages,
        vcpus,
        epochs: pauses.len(),
        pause_p50_us: median(&mut total),
        pause_p99_us: quantile(&mut total, 0.99),
        stop_us: median(&mut each(|(pause, _)| pause.stop_us)),
        harvest_us: median(&mut each(|(pause, _)| pause.harvest_us)),
        copy_us: median(&mut each(|(pause, _)| pause.copy_us)),
        capture_us: median(&mut each(|(pause, _)| pause.capture_us)),
        resume_us: median(&mut each(|(pause, _)| pause.resume_us)),
        commit_us: median(&mut each(|(_, commit)| *commit)),
    }
}
