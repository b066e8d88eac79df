//! Prometheus text, and OpenMetrics for whoever asks for it.

use std::fmt::{self, Write as _};

use devices::virtio::DeviceCounters;
use mirror::figures::Buckets;
use mirror::wire::message::Sense;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text};
use prometheus_client::registry::{Registry, Unit};

use super::Reading;
use super::catalogue as all;
use super::catalogue::{Metric, PREFIX};
use crate::server::{InstanceState, MirrorStatus};

/// The type of what [`openmetrics`] gives.
pub const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// The type of what [`plain`] gives.
pub const PLAIN: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What a metric comes to.
enum Value<'a> {
    Count(u64),
    Level(f64),
    Times(&'a Buckets),
}

/// Values by labels, of which there are as many as the metric has.
type Series<'a> = Vec<(Vec<(&'static str, String)>, Value<'a>)>;

/// `reading` as OpenMetrics text.
pub fn openmetrics(reading: Reading) -> String {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(reading));
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = text::encode(&mut out, &registry);
    out
}

/// `reading` in Prometheus's own text format, which has no units and names a counter as its values are named.
pub fn plain(reading: Reading) -> String {
    let mut out = String::new();
    let mut help = None;
    for line in openmetrics(reading).lines() {
        match line.split_once(' ').and_then(|(_, rest)| Some((line.get(..7)?, rest))) {
            // Whether it is a counter is said after it.
            Some(("# HELP ", _)) => help = Some(line),
            Some(("# TYPE ", rest)) => {
                let counter = rest.ends_with(" counter");
                for line in help.take().into_iter().chain([line]) {
                    let mut words = line.splitn(4, ' ');
                    let [hash, what, name, text] = std::array::from_fn(|_| words.next().unwrap_or_default());
                    let total = if counter { "_total" } else { "" };
                    // Writing to a string does not fail; so below.
                    let _ = writeln!(out, "{hash} {what} {name}{total} {text}");
                }
            }
            Some(("# UNIT ", _)) => {}
            _ if line == "# EOF" => {}
            _ => {
                out.push_str(line);
                out.push('\n');
            }
        }
    }
    out
}

struct Sheet<'a, 'e>(&'a mut DescriptorEncoder<'e>);

impl Sheet<'_, '_> {
    /// Tells of `metric`, if there is anything to tell.
    fn put(&mut self, metric: &Metric, series: Series<'_>) -> fmt::Result {
        if series.is_empty() {
            return Ok(());
        }
        let mut encoder =
            self.0.encode_descriptor(metric.name, metric.help, metric.unit.as_ref(), metric.kind)?;
        for (labels, value) in series {
            debug_assert!(labels.iter().map(|(name, _)| *name).eq(metric.labels.iter().copied()));
            if labels.is_empty() {
                write(&mut encoder, &value)?;
            } else {
                write(&mut encoder.encode_family(&labels)?, &value)?;
            }
        }
        Ok(())
    }

    fn one(&mut self, metric: &Metric, value: Value<'_>) -> fmt::Result {
        self.put(metric, vec![(Vec::new(), value)])
    }

    fn count(&mut self, metric: &Metric, count: u64) -> fmt::Result {
        self.one(metric, Value::Count(count))
    }

    fn level(&mut self, metric: &Metric, level: f64) -> fmt::Result {
        self.one(metric, Value::Level(level))
    }

    fn times(&mut self, metric: &Metric, times: &Buckets) -> fmt::Result {
        self.one(metric, Value::Times(times))
    }

    /// One value for each of the words that the metric's only label can say.
    fn each<'v>(
        &mut self,
        metric: &Metric,
        values: impl IntoIterator<Item = (&'v str, Value<'v>)>,
    ) -> fmt::Result {
        let label = metric.labels[0];
        let series = values.into_iter().map(|(word, value)| (vec![(label, word.to_owned())], value));
        self.put(metric, series.collect())
    }
}

fn write(encoder: &mut MetricEncoder<'_>, value: &Value<'_>) -> fmt::Result {
    match value {
        Value::Count(count) => encoder.encode_counter::<NoLabelSet, u64, f64>(count, None),
        Value::Level(level) => encoder.encode_gauge(level),
        Value::Times(times) => {
            let seconds = |micros: u64| micros as f64 / 1e6;
            let buckets: Vec<(f64, u64)> =
                times.each().map(|(bound, count)| (bound.map_or(f64::INFINITY, seconds), count)).collect();
            encoder.encode_histogram::<NoLabelSet>(seconds(times.sum_us()), times.count(), &buckets, None)
        }
    }
}

impl Collector for Reading {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut sheet = Sheet(&mut encoder);
        self.instance(&mut sheet)?;
        self.seeding(&mut sheet)?;
        self.disks(&mut sheet)?;
        self.epochs(&mut sheet)?;
        self.losses(&mut sheet)?;
        self.standby(&mut sheet)?;
        self.snapshots(&mut sheet)?;
        self.requests(&mut sheet)?;
        self.devices(&mut sheet)?;
        let lost = [
            ("events", self.own.reports_lost),
            ("log", self.log_lines_lost),
            ("metrics", self.own.lines_lost + self.own.lines_failed),
        ];
        sheet.each(&all::LOST, lost.map(|(of, count)| (of, Value::Count(count))))
    }
}

impl Reading {
    fn instance(&self, sheet: &mut Sheet<'_, '_>) -> fmt::Result {
        let labels = vec![("version", self.info.vmm_version.clone()), ("id", self.info.id.clone())];
        sheet.put(&all::BUILD, vec![(labels, Value::Level(1.0))])?;
        sheet.level(&all::UPTIME, self.uptime.as_secs_f64())?;
        let states = [
            ("not_started", InstanceState::NotStarted),
            ("paused", InstanceState::Paused),
            ("running", InstanceState::Running),
        ];
        let level = |yes: bool| Value::Level(f64::from(u8::from(yes)));
        sheet.each(&all::GUEST, states.map(|(name, state)| (name, level(self.info.state == state))))?;
        let place = self.status.as_ref().map(MirrorStatus::place);
        if let Some(place) = place {
            let labels = vec![("role", place.role.to_owned()), ("phase", place.phase.to_owned())];
            sheet.put(&all::MIRROR, vec![(labels, Value::Level(1.0))])?;
        }
        sheet.one(&all::PROTECTED, level(self.mirror.protected))?;
        if let Some(place) = place {
            sheet.level(&all::TERM, place.term.0 as f64)?;
            sheet.level(&all::EPOCH, place.epoch.0 as f64)?;
        }
        if let Some(MirrorStatus::Primary(status)) = &self.status {
            sheet.level(&all::PAGES, status.pages as f64)?;
            let links = status.standbys.iter().filter_map(|standby| {
                Some((vec![("standby", standby.address.to_string())], level(standby.second_link_up?)))
            });
            sheet.put(&all::SECOND_LINK, links.collect())?;
        }
        sheet.count(&all::JOINED, self.mirror.joined)?;
        sheet.count(&all::DETACHED, self.mirror.detached)
    }

    fn seeding(&self, sheet: &mut Sheet<'_, '_>) -> fmt::Result {
        if let Some(MirrorStatus::Primary(status)) = &self.status {
            sheet.level(&all::ROUND, status.round.into())?;
            sheet.level(&all::ROUND_PAGES, status.round_pages as f64)?;
            sheet.level(&all::ROUND_SENT, status.round_sent as f64)?;
        }
        sheet.times(&all::ROUNDS, &self.mirror.rounds)?;
        sheet.times(&all::SEEDING, &self.mirror.seeding)?;
        sheet.count(&all::SEED_PAGES, self.mirror.seed_pages)?;
        sheet.count(&all::SEED_DIRTIED, self.mirror.seed_dirtied)?;
        sheet.count(&all::SEED_BYTES, self.mirror.seed_bytes)
    }

    fn epochs(&self, sheet: &mut Sheet<'_, '_>) -> fmt::Result {
        let mirror = &self.mirror;
        sheet.count(&all::EPOCHS, mirror.epochs)?;
        sheet.count(&all::STALLED, mirror.epochs_stalled)?;
        sheet.count(&all::EPOCH_PAGES, mirror.epoch_pages)?;
        sheet.count(&all::EPOCH_BYTES, mirror.epoch_bytes)?;
        sheet.times(&all::INTERVAL, &mirror.intervals)?;
        sheet.times(&all::PAUSE, &mirror.pauses.total)?;
        let phases = [
            ("stop", &mirror.pauses.stop),
            ("harvest", &mirror.pauses.harvest),
            ("copy", &mirror.pauses.copy),
            ("capture", &mirror.pauses.capture),
            ("resume", &mirror.pauses.resume),
        ];
        sheet.each(&all::PHASE, phases.map(|(name, times)| (name, Value::Times(times))))?;
        sheet.times(&all::COMMIT, &mirror.commits)?;
        sheet.times(&all::HELD, &mirror.held)?;
        if let Some(MirrorStatus::Primary(status)) = &self.status {
            sheet.level(&all::HELD_BYTES, status.held_bytes as f64)?;
        }
        Ok(())
    }

    fn losses(&self, sheet: &mut Sheet<'_, '_>) -> fmt::Result {
        let mirror = &self.mirror;
        let lost = [("standby", &mirror.standby_losses), ("primary", &mirror.primary_losses)];
        sheet.each(&all::DETECTION, lost.map(|(side, times)| (side, Value::Times(times))))?;
        sheet.times(&all::DECISION, &mirror.decisions)?;
        sheet.times(&all::ACTIVATION, &mirror.activations)?;
        sheet.times(&all::FAILOVER, &mirror.failovers)?;
        sheet.count(&all::FROZEN, mirror.frozen)?;
        sheet.count(&all::REFUSED, mirror.refused)?;
        sheet.count(&all::UNPROTECTED, mirror.unprotected)?;
        sheet.count(&all::SILENCES, mirror.witness_silences)?;
        sheet.count(&all::SUSPENSIONS, mirror.suspensions)?;
        sheet.times(&all::SWITCHOVER, &mirror.switchovers)?;
        sheet.count(&all::SWITCHOVER_FAILED, mirror.switchovers_failed)?;
        sheet.count(&all::FAILURES, mirror.failures)
    }

    fn disks(&self, sheet: &mut Sheet<'_, '_>) -> fmt::Result {
        let Some(MirrorStatus::Primary(status)) = &self.status else { return Ok(()) };
        let sync = &status.disk_sync;
        if sync.bytes == 0 {
            return Ok(());
        }
        let states = [("left", sync.left), ("all", sync.bytes)];
        sheet.each(&all::DISKS, states.map(|(name, bytes)| (name, Value::Level(bytes as f64))))
    }

    fn standby(&self, sheet: &mut Sheet<'_, '_>) -> fmt::Result {
        let Sense { epoch, rounds, epochs, pages, stale_frames } = match &self.status {
            None => return Ok(()),
            Some(MirrorStatus::Primary(status)) => &status.standby_sense,
            Some(MirrorStatus::Standby(status)) => &status.sense,
        };
        sheet.level(&all::STANDBY_EPOCH, epoch.0 as f64)?;
        sheet.count(&all::STANDBY_ROUNDS, *rounds)?;
        sheet.count(&all::STANDBY_EPOCHS, *epochs)?;
        sheet.count(&all::STANDBY_PAGES, *pages)?;
        sheet.count(&all::STANDBY_STALE, *stale_frames)
    }

    fn snapshots(&self, sheet: &mut Sheet<'_, '_>) -> fmt::Result {
        let of = |value: fn(&super::Snapshots) -> Value<'_>| {
            self.own.snapshots.iter().map(move |(kind, snapshots)| (*kind, value(snapshots)))
        };
        sheet.each(&all::SNAPSHOT, of(|snapshots| Value::Times(&snapshots.took)))?;
        sheet.each(&all::SNAPSHOT_PAUSE, of(|snapshots| Value::Times(&snapshots.pauses)))?;
        sheet.each(&all::SNAPSHOT_PAGES, of(|snapshots| Value::Count(snapshots.pages)))?;
        sheet.each(&all::SNAPSHOT_FAILED, of(|snapshots| Value::Count(snapshots.failed)))?;
        if let Some(progress) = &self.snapshot {
            let states = [("done", progress.done), ("all", progress.pages)];
            sheet
                .each(&all::SNAPSHOT_DONE, states.map(|(name, pages)| (name, Value::Level(pages as f64))))?;
        }
        if let (there, pages @ 1..) = self.mirror.filled {
            let states = [("there", there), ("all", pages)];
            sheet.each(&all::FILL, states.map(|(name, pages)| (name, Value::Level(pages as f64))))?;
        }
        Ok(())
    }

    fn requests(&self, sheet: &mut Sheet<'_, '_>) -> fmt::Result {
        let series = self.own.requests.iter().map(|((method, route, status), count)| {
            let labels =
                vec![("method", method.clone()), ("route", route.clone()), ("status", status.to_string())];
            (labels, Value::Count(*count))
        });
        sheet.put(&all::REQUESTS, series.collect())
    }

    fn devices(&self, sheet: &mut Sheet<'_, '_>) -> fmt::Result {
        let (mut requests, mut bytes, mut limited) = (Series::new(), Series::new(), Series::new());
        let (mut errors, mut connections, mut open) = (Series::new(), Series::new(), Series::new());
        for (id, counters) in &self.devices {
            let doing = |operation: &str| vec![("device", id.clone()), ("operation", operation.to_owned())];
            let of = |operations: &[(&str, u64)]| -> Series<'_> {
                let one = |&(name, count): &(&str, u64)| (doing(name), Value::Count(count));
                operations.iter().map(one).collect()
            };
            let failed = |count| (vec![("device", id.clone())], Value::Count(count));
            match counters {
                DeviceCounters::None => {}
                DeviceCounters::Block(block) => {
                    requests.extend(of(&[
                        ("read", block.reads.get()),
                        ("write", block.writes.get()),
                        ("flush", block.flushes.get()),
                        ("discard", block.discards.get()),
                    ]));
                    bytes.extend(of(&[
                        ("read", block.read_bytes.get()),
                        ("write", block.written_bytes.get()),
                    ]));
                    limited.extend(of(&[("any", block.limited.get())]));
                    errors.push(failed(block.errors.get()));
                }
                DeviceCounters::Net(net) => {
                    requests.extend(of(&[("receive", net.received.get()), ("send", net.sent.get())]));
                    bytes
                        .extend(of(&[("receive", net.received_bytes.get()), ("send", net.sent_bytes.get())]));
                    limited.extend(of(&[
                        ("receive", net.receive_limited.get()),
                        ("send", net.send_limited.get()),
                    ]));
                    errors.push(failed(net.errors.get()));
                }
                DeviceCounters::Vsock(vsock) => {
                    requests.extend(of(&[("receive", vsock.received.get()), ("send", vsock.sent.get())]));
                    bytes.extend(of(&[
                        ("receive", vsock.received_bytes.get()),
                        ("send", vsock.sent_bytes.get()),
                    ]));
                    errors.push(failed(vsock.errors.get()));
                    let (host, guest) = (vsock.from_host.get(), vsock.from_guest.get());
                    for (from, count) in [("host", host), ("guest", guest)] {
                        connections.push((vec![("from", from.to_owned())], Value::Count(count)));
                    }
                    let now = (host + guest).saturating_sub(vsock.closed.get());
                    open.push((Vec::new(), Value::Level(now as f64)));
                }
            }
        }
        sheet.put(&all::DEVICE_REQUESTS, requests)?;
        sheet.put(&all::DEVICE_BYTES, bytes)?;
        sheet.put(&all::DEVICE_ERRORS, errors)?;
        sheet.put(&all::DEVICE_LIMITED, limited)?;
        sheet.put(&all::CONNECTIONS, connections)?;
        sheet.put(&all::CONNECTIONS_OPEN, open)?;
        sheet.each(&all::EXITS, self.exits.iter().map(|(reason, count)| (*reason, Value::Count(*count))))
    }
}

/// The table of all metrics, in Markdown.
pub fn table() -> String {
    let mut out = String::from("| name | type | unit | labels | what it tells |\n|---|---|---|---|---|\n");
    for metric in all::ALL {
        let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        let unit = metric.unit.as_ref().map_or("", Unit::as_str);
        let name = metric.full_name();
        let (kind, help) = (metric.kind.as_str(), metric.help);
        let _ = writeln!(out, "| `{name}` | {kind} | {unit} | {} | {help} |", labels.join(", "));
    }
    out
}
