//! Firecracker's metrics: a line of JSON for each moment, with the keys that its clients read, as far as there are figures for
//! them, and a section `mirror` besides.
//!
//! As Firecracker has it, what is counted is told as the difference to the line before; times, levels and states are told
//! as they are.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use devices::virtio::DeviceCounters;
use devices::virtio::counters::{BlockCounters, NetCounters, VsockCounters};
use serde_json::{Map, Value, json};

use super::Reading;
use crate::config::operator;
use crate::server::MirrorStatus;
use crate::server::types::Place;
use crate::sink::Sink;

/// Where lines go, and what they say besides the figures.
#[derive(Debug)]
pub struct MetricsFile {
    sink: Sink,
    emit_id: bool,
    properties: Option<Map<String, Value>>,
    /// What was counted when the line before was written.
    before: Counts,
}

/// What is counted, by section and key.
type Counts = BTreeMap<(String, String), u64>;

impl MetricsFile {
    /// Opens what `section` names.
    ///
    /// # Errors
    /// What cannot be opened, and why.
    pub fn open(section: &operator::Metrics) -> Result<Self, String> {
        let path = &section.metrics_path;
        let sink = Sink::open(path).map_err(|error| {
            format!(
                "metrics.metrics_path: cannot write to {}: {error}; name a file or a FIFO",
                path.display()
            )
        })?;
        let emit_id = section.emit_id.unwrap_or(false);
        Ok(Self { sink, emit_id, properties: section.properties.clone(), before: Counts::new() })
    }

    /// Writes a line; false if there is no room for it.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(&mut self, reading: &Reading) -> std::io::Result<bool> {
        let mut line = Line::default();
        line.fill(reading);
        let counts = std::mem::take(&mut line.counts);
        for (place, count) in &counts {
            let before = self.before.get(place).copied().unwrap_or(0);
            let (section, key) = (place.0.as_str(), place.1.as_str());
            line.put(section, key, json!(count.saturating_sub(before)));
        }
        let mut object = Map::new();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        object.insert("utc_timestamp_ms".into(), json!(now.as_millis() as u64));
        if self.emit_id {
            object.insert("id".into(), json!(reading.info.id));
        }
        if let Some(properties) = &self.properties {
            object.insert("properties".into(), Value::Object(properties.clone()));
        }
        object.extend(line.sections.into_iter().map(|(name, section)| (name, Value::Object(section))));
        let written = self.sink.write_line(serde_json::to_vec(&object)?)?;
        if written {
            self.before = counts;
        }
        Ok(written)
    }
}

/// A line in the making.
#[derive(Default)]
struct Line {
    sections: BTreeMap<String, Map<String, Value>>,
    counts: Counts,
}

impl Line {
    fn put(&mut self, section: &str, key: &str, value: Value) {
        self.sections.entry(section.to_owned()).or_default().insert(key.to_owned(), value);
    }

    /// Adds to what is counted there.
    fn count(&mut self, section: &str, key: &str, count: u64) {
        *self.counts.entry((section.to_owned(), key.to_owned())).or_default() += count;
    }

    fn fill(&mut self, reading: &Reading) {
        self.api(reading);
        for (key, micros) in &reading.own.latencies {
            self.put("latencies_us", key, json!(micros));
        }
        for (id, counters) in &reading.devices {
            match counters {
                DeviceCounters::None => {}
                DeviceCounters::Block(block) => {
                    self.block("block", block);
                    self.block(&format!("block_{id}"), block);
                }
                DeviceCounters::Net(net) => {
                    self.net("net", net);
                    self.net(&format!("net_{id}"), net);
                }
                DeviceCounters::Vsock(vsock) => self.vsock(vsock),
            }
        }
        for (reason, count) in &reading.exits {
            self.count("vcpu", &format!("exit_{reason}"), *count);
        }
        // A panic ends the process: whoever writes this has had none.
        self.count("vmm", "panic_count", 0);
        self.put("vmm", "uptime_ms", json!(reading.uptime.as_millis() as u64));
        self.count("logger", "missed_log_count", reading.log_lines_lost);
        self.count("logger", "missed_metrics_count", reading.own.lines_lost);
        self.count("logger", "metrics_fails", reading.own.lines_failed);
        self.mirror(reading);
    }

    fn api(&mut self, reading: &Reading) {
        for key in ["full_create_snapshot", "diff_create_snapshot", "load_snapshot", "pause_vm", "resume_vm"]
        {
            self.put("latencies_us", key, json!(0));
        }
        for (_, _, section, key) in KEYS {
            self.count(section, &format!("{key}_count"), 0);
            if *section != "get_api_requests" {
                self.count(section, &format!("{key}_fails"), 0);
            }
        }
        self.count("api_server", "requests_count", 0);
        self.count("api_server", "requests_fails", 0);
        for ((method, route, status), count) in &reading.own.requests {
            let failed = *status >= 400;
            self.count("api_server", "requests_count", *count);
            if failed {
                self.count("api_server", "requests_fails", *count);
            }
            let known = |(m, r, _, _): &&(&str, &str, &str, &str)| m == method && r == route;
            if let Some((_, _, section, key)) = KEYS.iter().find(known) {
                self.count(section, &format!("{key}_count"), *count);
                if failed && *section != "get_api_requests" {
                    self.count(section, &format!("{key}_fails"), *count);
                }
            }
        }
    }

    fn block(&mut self, section: &str, block: &BlockCounters) {
        for (key, counter) in [
            ("read_count", &block.reads),
            ("read_bytes", &block.read_bytes),
            ("write_count", &block.writes),
            ("write_bytes", &block.written_bytes),
            ("flush_count", &block.flushes),
            ("execute_fails", &block.errors),
            ("rate_limiter_throttled_events", &block.limited),
        ] {
            self.count(section, key, counter.get());
        }
    }

    fn net(&mut self, section: &str, net: &NetCounters) {
        for (key, counter) in [
            ("rx_count", &net.received),
            ("rx_packets_count", &net.received),
            ("rx_bytes_count", &net.received_bytes),
            ("tx_count", &net.sent),
            ("tx_packets_count", &net.sent),
            ("tx_bytes_count", &net.sent_bytes),
            ("tx_fails", &net.errors),
            ("rx_rate_limiter_throttled", &net.receive_limited),
            ("tx_rate_limiter_throttled", &net.send_limited),
        ] {
            self.count(section, key, counter.get());
        }
    }

    fn vsock(&mut self, vsock: &VsockCounters) {
        for (key, counter) in [
            ("rx_packets_count", &vsock.received),
            ("rx_bytes_count", &vsock.received_bytes),
            ("tx_packets_count", &vsock.sent),
            ("tx_bytes_count", &vsock.sent_bytes),
            ("conns_added", &vsock.from_host),
            ("conns_added", &vsock.from_guest),
            ("conns_removed", &vsock.closed),
            ("conns_killed", &vsock.errors),
        ] {
            self.count("vsock", key, counter.get());
        }
    }

    fn mirror(&mut self, reading: &Reading) {
        let mirror = &reading.mirror;
        for (key, count) in [
            ("attachments", mirror.joined),
            ("seeding_rounds", mirror.rounds.count()),
            ("seeding_pages", mirror.seed_pages),
            ("seeding_bytes", mirror.seed_bytes),
            ("seeding_sum_us", mirror.rounds.sum_us()),
            ("epochs", mirror.epochs),
            ("epochs_stalled", mirror.epochs_stalled),
            ("epoch_pages", mirror.epoch_pages),
            ("epoch_bytes", mirror.epoch_bytes),
            ("pause_sum_us", mirror.pauses.total.sum_us()),
            ("commit_sum_us", mirror.commits.sum_us()),
            ("output_holds", mirror.held.count()),
            ("output_hold_sum_us", mirror.held.sum_us()),
            ("standby_losses", mirror.standby_losses.count()),
            ("primary_losses", mirror.primary_losses.count()),
            ("failovers", mirror.failovers.count()),
            ("failover_sum_us", mirror.failovers.sum_us()),
            ("switchovers", mirror.switchovers.count()),
            ("switchover_sum_us", mirror.switchovers.sum_us()),
        ] {
            self.count("mirror", key, count);
        }
        self.put("mirror", "protected", json!(mirror.protected));
        let Some(status) = &reading.status else {
            self.put("mirror", "role", json!("none"));
            return;
        };
        let Place { role, phase, term, epoch } = status.place();
        self.put("mirror", "role", json!(role));
        self.put("mirror", "phase", json!(phase));
        self.put("mirror", "term", json!(term.0));
        self.put("mirror", "epoch", json!(epoch.0));
        match status {
            MirrorStatus::Primary(status) => {
                self.put("mirror", "held_bytes", json!(status.held_bytes));
                for (name, times) in [("pause", status.times.pause_us), ("commit", status.times.commit_us)] {
                    self.put("mirror", &format!("{name}_p50_us"), json!(times.p50));
                    self.put("mirror", &format!("{name}_p99_us"), json!(times.p99));
                    self.put("mirror", &format!("{name}_max_us"), json!(times.max));
                }
            }
            MirrorStatus::Standby(status) => {
                self.count("mirror", "received_pages", status.sense.pages);
                self.count("mirror", "received_epochs", status.sense.epochs);
                self.count("mirror", "stale_frames", status.sense.stale_frames);
            }
        }
    }
}

/// Firecracker's names for requests: method, route, section, key.
const KEYS: &[(&str, &str, &str, &str)] = &[
    ("GET", "/", "get_api_requests", "instance_info"),
    ("GET", "/machine-config", "get_api_requests", "machine_cfg"),
    ("GET", "/version", "get_api_requests", "vmm_version"),
    ("PUT", "/actions", "put_api_requests", "actions"),
    ("PUT", "/boot-source", "put_api_requests", "boot_source"),
    ("PUT", "/cpu-config", "put_api_requests", "cpu_cfg"),
    ("PUT", "/drives/{drive_id}", "put_api_requests", "drive"),
    ("PUT", "/logger", "put_api_requests", "logger"),
    ("PUT", "/machine-config", "put_api_requests", "machine_cfg"),
    ("PUT", "/metrics", "put_api_requests", "metrics"),
    ("PUT", "/network-interfaces/{iface_id}", "put_api_requests", "network"),
    ("PUT", "/serial", "put_api_requests", "serial"),
    ("PUT", "/vsock", "put_api_requests", "vsock"),
    ("PATCH", "/drives/{drive_id}", "patch_api_requests", "drive"),
    ("PATCH", "/machine-config", "patch_api_requests", "machine_cfg"),
    ("PATCH", "/network-interfaces/{iface_id}", "patch_api_requests", "network"),
];
