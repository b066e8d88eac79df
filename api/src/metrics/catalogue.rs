//! Every metric that there is: one table, for the exposition, the documentation and the tests.

use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;

/// What all names begin with.
pub const PREFIX: &str = "understudy";

/// A metric.
#[derive(Debug)]
pub struct Metric {
    /// Its name, without prefix, unit and suffix.
    pub name: &'static str,
    /// What it is in, if it is no plain number: the end of its name.
    pub unit: Option<Unit>,
    /// Counter, gauge or histogram.
    pub kind: MetricType,
    /// Its labels.
    pub labels: &'static [&'static str],
    /// What it tells.
    pub help: &'static str,
}

impl Metric {
    /// Its name, as those say it who ask Prometheus for it.
    pub fn full_name(&self) -> String {
        let unit = self.unit.as_ref().map(|unit| format!("_{}", unit.as_str())).unwrap_or_default();
        let total = if matches!(self.kind, MetricType::Counter) { "_total" } else { "" };
        format!("{PREFIX}_{}{unit}{total}", self.name)
    }
}

macro_rules! catalogue {
    ($($id:ident: $kind:ident $name:literal $($unit:ident)? [$($label:literal),*] $help:literal;)*) => {
        $(pub(super) static $id: Metric = Metric {
            name: $name,
            unit: catalogue!(@unit $($unit)?),
            kind: MetricType::$kind,
            labels: &[$($label),*],
            help: $help,
        };)*

        /// All of them, in the order in which they are told.
        pub static ALL: &[&Metric] = &[$(&$id),*];
    };
    (@unit) => { None };
    (@unit $unit:ident) => { Some(Unit::$unit) };
}

catalogue! {
    BUILD: Gauge "build_info" ["version", "id"] "1; which program this is, and the name of its instance.";
    UPTIME: Gauge "uptime" Seconds [] "For how long the process has run.";
    GUEST: Gauge "guest_state" ["state"] "1 for what the guest does here: running, paused or not_started; 0 for the others.";
    MIRROR: Gauge "mirror_phase" ["role", "phase"] "1 for what this side is in the mirror and what it does; nothing without a mirror.";
    PROTECTED: Gauge "protected" [] "Whether the standby could take over now.";
    TERM: Gauge "term" [] "The newest term that this side knows.";
    EPOCH: Gauge "epoch" [] "The last epoch that the standby holds whole.";
    PAGES: Gauge "guest_pages" [] "Pages of 4 KiB of the mirrored guest's memory.";
    SECOND_LINK: Gauge "second_link_up" ["standby"] "Whether the second link to the standby at this address is there; nothing for one without.";
    JOINED: Counter "attachments" [] "Times that a primary and a standby came to terms.";
    DETACHED: Counter "detachments" [] "Standbys given up by wish.";

    ROUND: Gauge "seeding_round" [] "The seeding round, from 1.";
    ROUND_PAGES: Gauge "seeding_round_pages" [] "Pages of this round.";
    ROUND_SENT: Gauge "seeding_round_sent_pages" [] "Pages of this round that have been sent.";
    ROUNDS: Histogram "seeding_round_duration" Seconds [] "From the first page of a seeding round to the standby's answer.";
    SEEDING: Histogram "seeding_duration" Seconds [] "From the agreement of the two sides to protection, final pause and first commit included.";
    SEED_PAGES: Counter "seeding_pages" [] "Pages sent in seeding rounds.";
    SEED_DIRTIED: Counter "seeding_dirtied_pages" [] "Pages that the guest dirtied while rounds were sent.";
    SEED_BYTES: Counter "seeding_wire" Bytes [] "Sent in seeding rounds.";
    DISKS: Gauge "disk_sync" Bytes ["state"] "Of the disks of which the standby has images of its own: still to be sent to it (left), and all.";

    EPOCHS: Counter "epochs" [] "Epochs committed.";
    STALLED: Counter "epochs_stalled" [] "Those that did not fit staging, so that their pause waited for the link.";
    EPOCH_PAGES: Counter "epoch_pages" [] "Pages sent in epochs.";
    EPOCH_BYTES: Counter "epoch_wire" Bytes [] "Sent in epochs.";
    INTERVAL: Histogram "epoch_interval" Seconds [] "From one commit to the next.";
    PAUSE: Histogram "pause_duration" Seconds [] "How long the guest stood still for an epoch.";
    PHASE: Histogram "pause_phase_duration" Seconds ["phase"] "The parts of that: stop, harvest, copy, capture, resume.";
    COMMIT: Histogram "commit_duration" Seconds [] "From the end of a pause to the standby's acknowledgement.";
    HELD: Histogram "output_hold_duration" Seconds [] "How long the first output of an epoch waited for its commit.";
    HELD_BYTES: Gauge "output_held" Bytes [] "Console output that waits for its commit.";

    DETECTION: Histogram "detection_duration" Seconds ["lost"] "Silence of the other side (standby, primary) before it was known to be lost.";
    DECISION: Histogram "decision_duration" Seconds [] "From a known loss to the witness's decision for this side.";
    ACTIVATION: Histogram "activation_duration" Seconds [] "From that decision to the guest's running at the standby.";
    FAILOVER: Histogram "failover_duration" Seconds [] "From a known loss of the primary to the guest's running at the standby.";
    FROZEN: Counter "frozen" [] "Times that this side froze, since another was the live one.";
    REFUSED: Counter "refused" [] "Guests that this standby did not run though their primary was lost.";
    UNPROTECTED: Counter "unprotected" [] "Times that the guest went on without protection, other than by wish.";
    SUSPENSIONS: Counter "suspensions" [] "Times that the guest was made to stand still until it was known that it may go on.";
    SILENCES: Counter "witness_silences" [] "Questions that the witness did not answer.";
    SWITCHOVER: Histogram "switchover_pause_duration" Seconds [] "How long the guest ran on neither side in switchovers.";
    SWITCHOVER_FAILED: Counter "switchovers_failed" [] "Switchovers that did not come about.";
    FAILURES: Counter "mirror_failures" [] "Things that failed in the mirror and did not end the guest.";

    STANDBY_EPOCH: Gauge "standby_epoch" [] "The last complete epoch, as the standby says.";
    STANDBY_ROUNDS: Counter "standby_rounds" [] "Seeding rounds that the standby has received.";
    STANDBY_EPOCHS: Counter "standby_epochs" [] "Epochs that the standby has committed.";
    STANDBY_PAGES: Counter "standby_pages" [] "Pages that the standby has received.";
    STANDBY_STALE: Counter "standby_stale_frames" [] "Frames that the standby has refused because their term was stale.";

    SNAPSHOT: Histogram "snapshot_duration" Seconds ["kind"] "How long a snapshot (full, diff) took.";
    SNAPSHOT_PAUSE: Histogram "snapshot_pause_duration" Seconds ["kind"] "How long the guest stood still for a snapshot.";
    SNAPSHOT_PAGES: Counter "snapshot_pages" ["kind"] "Pages written in snapshots.";
    SNAPSHOT_FAILED: Counter "snapshots_failed" ["kind"] "Snapshots that failed or were broken off.";
    SNAPSHOT_DONE: Gauge "snapshot_progress_pages" ["state"] "Pages of the round of the snapshot that is being taken: done, and all; nothing if none is.";
    FILL: Gauge "restore_pages" ["state"] "Pages of a snapshot that come on demand: there, and all.";

    REQUESTS: Counter "api_requests" ["method", "route", "status"] "API requests answered; the route is none for a path that there is not.";
    DEVICE_REQUESTS: Counter "device_requests" ["device", "operation"] "Requests, frames and packets carried out: read, write, flush, discard; receive, send (as the guest sees it).";
    DEVICE_BYTES: Counter "device" Bytes ["device", "operation"] "Bytes of those that have some.";
    DEVICE_ERRORS: Counter "device_errors" ["device"] "Requests, frames and packets that failed or were malformed.";
    DEVICE_LIMITED: Counter "device_limited" ["device", "operation"] "Times that a rate limiter let some wait (any: reads and writes alike).";
    CONNECTIONS: Counter "vsock_connections" ["from"] "Connections that the host, and the guest, have asked for.";
    CONNECTIONS_OPEN: Gauge "vsock_connections_open" [] "Connections that there are.";
    EXITS: Counter "vcpu_exits" ["reason"] "Times that a vCPU left the guest for the VMM: io_in, io_out, mmio_read, mmio_write.";
    LOST: Counter "lines_lost" ["of"] "Lines that were lost because nobody took them in time: of events, log, metrics.";
}
