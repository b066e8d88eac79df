//! What this process counts, and the forms in which it tells: Prometheus text ([`prometheus`]) and Firecracker's lines of
//! JSON ([`firecracker`]).
//!
//! Nothing here is touched inside a pause: the mirror's reports come after it, devices count by themselves
//! ([`devices::virtio::counters`]) and are read without their locks.

use std::collections::BTreeMap;
use std::sync::{Mutex, Weak};
use std::thread;
use std::time::{Duration, Instant};

use devices::virtio::DeviceCounters;
use mirror::figures::{Buckets, Figures};
use mirror::report::Stamped;
use vmm::DeviceLimits;
use vmm::snapshot::{Kind, SnapshotReport};

use crate::config::operator;
use crate::server::types::Progress;
use crate::server::{Instance, InstanceInfo, MirrorStatus, Request};
use crate::stage::lock;

pub mod catalogue;
pub mod firecracker;
mod http;
pub mod prometheus;
#[cfg(test)]
mod tests;

use firecracker::MetricsFile;
pub(crate) use http::count_requests;

/// How often a line of metrics is written.
const PERIOD: Duration = Duration::from_mins(1);

/// What a process counts.
#[derive(Debug)]
pub struct Meters {
    began: Instant,
    mirror: Mutex<Figures>,
    own: Mutex<Own>,
    file: Mutex<Option<MetricsFile>>,
}

impl Default for Meters {
    fn default() -> Self {
        let began = Instant::now();
        Self { began, mirror: Mutex::default(), own: Mutex::default(), file: Mutex::default() }
    }
}

/// What is counted here and not by the mirror or a device.
#[derive(Clone, Debug, Default)]
pub struct Own {
    /// Requests answered, by method, route and status.
    pub requests: BTreeMap<(String, String, u16), u64>,
    /// Snapshots, by kind.
    pub snapshots: BTreeMap<&'static str, Snapshots>,
    /// Microseconds that the last request of a kind took, by Firecracker's names.
    pub latencies: BTreeMap<&'static str, u64>,
    /// Reports that nobody was there to write in time.
    pub reports_lost: u64,
    /// Lines of metrics for which there was no room.
    pub lines_lost: u64,
    /// Lines of metrics that could not be written.
    pub lines_failed: u64,
}

/// What snapshots of a kind came to.
#[derive(Clone, Debug, Default)]
pub struct Snapshots {
    /// How many failed, or were broken off.
    pub failed: u64,
    /// How long the others took.
    pub took: Buckets,
    /// How long the guest stood still for them.
    pub pauses: Buckets,
    /// Pages that they wrote.
    pub pages: u64,
}

/// Everything at one moment.
#[derive(Debug)]
pub struct Reading {
    /// Who it is.
    pub info: InstanceInfo,
    /// For how long the process has run.
    pub uptime: Duration,
    /// The mirror, as reports tell of it.
    pub mirror: Figures,
    /// The mirror, as it is.
    pub status: Option<MirrorStatus>,
    /// Devices, by name.
    pub devices: Vec<(String, DeviceCounters)>,
    /// How often vCPUs left the guest, by reason; empty without a guest.
    pub exits: Vec<(&'static str, u64)>,
    /// The snapshot that is being taken.
    pub snapshot: Option<Progress>,
    /// All else.
    pub own: Own,
    /// Lines of the log that were lost.
    pub log_lines_lost: u64,
}

impl Reading {
    /// How `instance` is now.
    pub fn of(instance: &dyn Instance) -> Self {
        let meters = instance.meters();
        let guest = instance.guest();
        Self {
            info: instance.info(),
            uptime: meters.began.elapsed(),
            mirror: lock(&meters.mirror).clone(),
            status: instance.mirror(),
            devices: guest.as_ref().map(DeviceLimits::counters).unwrap_or_default(),
            exits: guest.as_ref().map(exits).unwrap_or_default(),
            snapshot: instance.snapshot_progress(),
            own: lock(&meters.own).clone(),
            log_lines_lost: crate::log::lines_lost(),
        }
    }
}

fn exits(guest: &DeviceLimits) -> Vec<(&'static str, u64)> {
    let exits = guest.exits();
    vec![
        ("io_in", exits.port_in.get()),
        ("io_out", exits.port_out.get()),
        ("mmio_read", exits.mmio_read.get()),
        ("mmio_write", exits.mmio_write.get()),
    ]
}

impl Meters {
    /// The mirror tells of something.
    pub fn note(&self, report: &Stamped) {
        lock(&self.mirror).note(report);
    }

    /// A report was not written.
    pub(crate) fn report_lost(&self) {
        lock(&self.own).reports_lost += 1;
    }

    /// A snapshot has been taken, or not.
    pub(crate) fn snapshot(&self, kind: Kind, outcome: Option<&SnapshotReport>) {
        let name = match kind {
            Kind::Full => "full",
            Kind::Diff => "diff",
        };
        let mut own = lock(&self.own);
        let snapshots = own.snapshots.entry(name).or_default();
        match outcome {
            None => snapshots.failed += 1,
            Some(report) => {
                snapshots.took.record(report.took.as_micros() as u64);
                snapshots.pauses.record(report.pause.as_micros() as u64);
                snapshots.pages += report.pages;
            }
        }
    }

    /// Has `work` done, and notes under `name`, if it has one, how long it took.
    pub(crate) fn time<T, E>(
        &self,
        name: Option<&'static str>,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let began = Instant::now();
        let outcome = work();
        if let (Some(name), Ok(_)) = (name, &outcome) {
            lock(&self.own).latencies.insert(name, began.elapsed().as_micros() as u64);
        }
        outcome
    }

    /// Lines of metrics go where `section` says from now on.
    ///
    /// # Errors
    /// It cannot be written there; lines go where they went before then.
    pub fn write_to(&self, section: &operator::Metrics) -> Result<(), String> {
        let file = MetricsFile::open(section)?;
        *lock(&self.file) = Some(file);
        Ok(())
    }

    /// Writes a line of metrics of `instance`, whose meters these are, if it was said where to.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn flush(&self, instance: &dyn Instance) -> Result<(), String> {
        if lock(&self.file).is_none() {
            return Ok(());
        }
        let reading = Reading::of(instance);
        let written = lock(&self.file).as_mut().map_or(Ok(true), |file| file.write(&reading));
        match written {
            Ok(true) => Ok(()),
            Ok(false) => {
                lock(&self.own).lines_lost += 1;
                Err("the metrics were not written: nobody reads them, and the FIFO is full".into())
            }
            Err(error) => {
                lock(&self.own).lines_failed += 1;
                Err(format!("the metrics were not written: {error}"))
            }
        }
    }
}

/// The name that Firecracker's metrics have for the time that `request` takes.
pub(crate) fn latency_of(request: &Request) -> Option<&'static str> {
    match request {
        Request::Pause => Some("pause_vm"),
        Request::Resume => Some("resume_vm"),
        Request::Load(_) => Some("load_snapshot"),
        Request::Snapshot(snapshot) if snapshot.kind == Kind::Full => Some("full_create_snapshot"),
        Request::Snapshot(_) => Some("diff_create_snapshot"),
        _ => None,
    }
}

/// Writes a line of metrics of `instance`, which ends, and logs it if that fails.
pub(crate) fn flush_last(instance: &dyn Instance) {
    if let Err(reason) = instance.meters().flush(instance) {
        tracing::error!("{reason}");
    }
}

/// Writes a line of metrics of `instance` now and every minute, as long as it is there.
pub(crate) fn write_regularly<I: Instance + 'static>(instance: Weak<I>) {
    let write = move || {
        while let Some(instance) = instance.upgrade() {
            // It is counted.
            let _ = instance.meters().flush(&*instance);
            drop(instance);
            thread::sleep(PERIOD);
        }
    };
    if let Err(error) = thread::Builder::new().name("metrics".into()).spawn(write) {
        tracing::error!("metrics are only written when they are flushed: cannot start a thread: {error}");
    }
}
