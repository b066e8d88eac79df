//! What a side counts of its mirror: reports in, figures out. No I/O and no clock.

use crate::report::{PerPhase, Report, Stamped};

/// Upper bounds of the buckets that times are counted in, in microseconds: 10 µs to a minute. What takes longer is in a
/// bucket of its own behind the last.
pub const BOUNDS_US: [u64; 21] = [
    10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000,
    1_000_000, 2_500_000, 5_000_000, 10_000_000, 30_000_000, 60_000_000,
];

/// Times counted in buckets: exact counts and an exact sum, in a fixed size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Buckets {
    counts: [u64; BOUNDS_US.len() + 1],
    sum_us: u64,
}

impl Buckets {
    /// Adds a time in microseconds.
    pub fn record(&mut self, micros: u64) {
        self.counts[BOUNDS_US.partition_point(|&bound| bound < micros)] += 1;
        self.sum_us = self.sum_us.saturating_add(micros);
    }

    /// How many times were added.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Their sum in microseconds.
    pub fn sum_us(&self) -> u64 {
        self.sum_us
    }

    /// By bucket: its upper bound in microseconds, `None` for the last, and how many times lie in it and not in one before.
    pub fn each(&self) -> impl Iterator<Item = (Option<u64>, u64)> + '_ {
        BOUNDS_US.iter().copied().map(Some).chain([None]).zip(self.counts)
    }

    /// By bucket: its upper bound in microseconds, `None` for the last, and how many times are at most that.
    pub fn cumulative(&self) -> impl Iterator<Item = (Option<u64>, u64)> + '_ {
        let mut so_far = 0;
        self.each().map(move |(bound, count)| {
            so_far += count;
            (bound, so_far)
        })
    }
}

/// Everything that a side counts, over all standbys that its guest has had. A restart of the process begins anew.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Standbys, or primaries, that the side has come to terms with.
    pub joined: u64,
    /// Seeding rounds that the standby has received.
    pub rounds: Buckets,
    /// Pages sent in them.
    pub seed_pages: u64,
    /// Bytes on the wire for them.
    pub seed_bytes: u64,
    /// Pages that the guest dirtied meanwhile.
    pub seed_dirtied: u64,
    /// From the first agreement to protection.
    pub seeding: Buckets,
    /// Epochs committed.
    pub epochs: u64,
    /// Those that did not fit staging.
    pub epochs_stalled: u64,
    /// Pages sent in epochs.
    pub epoch_pages: u64,
    /// Bytes on the wire for them.
    pub epoch_bytes: u64,
    /// From one commit to the next.
    pub intervals: Buckets,
    /// The pauses of epochs.
    pub pauses: PerPhase<Buckets>,
    /// From the end of a pause to the standby's answer.
    pub commits: Buckets,
    /// How long the first output of an epoch was held.
    pub held: Buckets,
    /// Silence of a standby before it was known to be lost.
    pub standby_losses: Buckets,
    /// Silence of a primary before it was known to be lost.
    pub primary_losses: Buckets,
    /// From a known loss to the witness's decision for this side.
    pub decisions: Buckets,
    /// From the decision to the guest's running here.
    pub activations: Buckets,
    /// From a known loss to the guest's running here.
    pub failovers: Buckets,
    /// Times that the guest went on without protection, other than by wish.
    pub unprotected: u64,
    /// Times that this side froze, since another was the live one.
    pub frozen: u64,
    /// Times that this side, a standby, did not run a guest whose primary was lost.
    pub refused: u64,
    /// Questions that a witness did not answer.
    pub witness_silences: u64,
    /// Times that the guest was made to stand still until it was known that it may go on.
    pub suspensions: u64,
    /// How long the guest ran on neither side in switchovers.
    pub switchovers: Buckets,
    /// Switchovers that did not come about.
    pub switchovers_failed: u64,
    /// Standbys given up by wish.
    pub detached: u64,
    /// Things that failed and did not end the guest.
    pub failures: u64,
    /// Pages of memory that have come from a snapshot, and that there are.
    pub filled: (u64, u64),
    /// Bytes of the disks of which the standby has images of its own, and how many of them it was still to be sent.
    pub disks: (u64, u64),
    /// Whether the standby can take over.
    pub protected: bool,
    joined_at: Option<u64>,
    committed_at: Option<u64>,
    lost_at: Option<u64>,
    won_at: Option<u64>,
}

impl Figures {
    /// Takes a report in.
    pub fn note(&mut self, Stamped { at_us: now, report }: &Stamped) {
        let now = *now;
        match report {
            Report::Joined { .. } => {
                self.joined += 1;
                self.joined_at = Some(now);
                (self.lost_at, self.won_at, self.committed_at) = (None, None, None);
            }
            Report::RoundDone { pages, bytes, micros, dirtied, .. } => {
                self.rounds.record(*micros);
                self.seed_pages += pages;
                self.seed_bytes += bytes;
                self.seed_dirtied += dirtied;
            }
            Report::Committed { pages, bytes, pause, commit_us, held_us, stalled, .. } => {
                self.epochs += 1;
                self.epochs_stalled += u64::from(*stalled);
                self.epoch_pages += pages;
                self.epoch_bytes += bytes;
                since(&mut self.intervals, self.committed_at.replace(now), now);
                self.pauses.record(pause, Buckets::record);
                self.commits.record(*commit_us);
                if let Some(micros) = held_us {
                    self.held.record(*micros);
                }
            }
            Report::Protected { .. } => {
                self.protected = true;
                since(&mut self.seeding, self.joined_at.take(), now);
            }
            Report::StandbyGained { .. } => since(&mut self.seeding, self.joined_at.take(), now),
            Report::StandbyLeft { silent_us, standbys, .. } => {
                self.standby_losses.record(*silent_us);
                self.protected = *standbys > 0;
                self.lost_at = Some(now);
            }
            Report::Renewed { .. } => since(&mut self.decisions, self.lost_at.take(), now),
            Report::Unprotected { .. } => {
                self.unprotected += 1;
                self.protected = false;
            }
            Report::StandbyLost { silent_us, .. } => {
                self.standby_losses.record(*silent_us);
                self.lost(now);
            }
            Report::PrimaryLost { silent_us, .. } => {
                self.primary_losses.record(*silent_us);
                self.lost(now);
            }
            Report::Won { .. } => {
                since(&mut self.decisions, self.lost_at, now);
                self.won_at = Some(now);
            }
            Report::Solo { .. } => {
                since(&mut self.decisions, self.lost_at.take(), now);
                self.unprotected += 1;
            }
            Report::Active { .. } => {
                self.protected = false;
                since(&mut self.activations, self.won_at.take(), now);
                since(&mut self.failovers, self.lost_at.take(), now);
            }
            Report::Frozen { .. } => {
                self.frozen += 1;
                self.protected = false;
            }
            Report::Refused { .. } => {
                self.refused += 1;
                self.protected = false;
            }
            Report::WitnessSilent { .. } => self.witness_silences += 1,
            Report::HandedOver { pause_us, .. } => {
                self.switchovers.record(*pause_us);
                self.protected = false;
            }
            Report::SwitchoverFailed { .. } => self.switchovers_failed += 1,
            Report::Detached { .. } => {
                self.detached += 1;
                self.protected = false;
            }
            Report::Failed { .. } | Report::DetachFailed { .. } => self.failures += 1,
            Report::DiskSync { bytes, left } => self.disks = (*bytes, *left),
            Report::MemoryArriving { there, pages } => self.filled = (*there, *pages),
            Report::MemoryComplete { pages, .. } => self.filled = (*pages, *pages),
            Report::Ended { .. } => self.protected = false,
            Report::Suspended { .. } => self.suspensions += 1,
            Report::Listening { .. }
            | Report::Thawed { .. }
            | Report::Seeking { .. }
            | Report::Fencing { .. }
            | Report::HeardElsewhere { .. }
            | Report::SecondLink { .. }
            | Report::RoundStarted { .. }
            | Report::RoundProgress { .. }
            | Report::AwaitingPromotion { .. } => {}
        }
    }

    fn lost(&mut self, now: u64) {
        self.protected = false;
        self.lost_at = Some(now);
    }
}

/// Records the time from `start`, if there is one, to `now`.
fn since(times: &mut Buckets, start: Option<u64>, now: u64) {
    if let Some(start) = start {
        times.record(now.saturating_sub(start));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Epoch, Guid, Term};
    use crate::report::PausePhases;

    fn told(reports: impl IntoIterator<Item = (u64, Report)>) -> Figures {
        let mut figures = Figures::default();
        for (at_us, report) in reports {
            figures.note(&Stamped { at_us, report });
        }
        figures
    }

    fn joined() -> Report {
        Report::Joined { guid: Guid::nil(), term: Term(1), pages: 10 }
    }

    fn committed(held_us: Option<u64>) -> Report {
        let pause =
            PausePhases { stop_us: 1, harvest_us: 20, copy_us: 300, capture_us: 4000, resume_us: 50_000 };
        let (epoch, commit_us) = (Epoch(1), 900);
        Report::Committed {
            epoch,
            pages: 3,
            bytes: 70,
            pause,
            commit_us,
            released: 0,
            held_us,
            stalled: true,
        }
    }

    #[test]
    fn times_lie_in_the_first_bucket_whose_bound_they_do_not_exceed() {
        let mut times = Buckets::default();
        for micros in [0, 10, 11, 60_000_000, 60_000_001, u64::MAX] {
            times.record(micros);
        }
        let cumulative: Vec<_> = times.cumulative().collect();
        assert_eq!(cumulative[0], (Some(10), 2));
        assert_eq!(cumulative[1], (Some(25), 3));
        assert_eq!(cumulative[20], (Some(60_000_000), 4));
        assert_eq!(cumulative[21], (None, 6));
        assert_eq!(times.count(), 6);
        assert_eq!(times.each().map(|(_, count)| count).sum::<u64>(), 6);
    }

    #[test]
    fn bounds_are_in_order() {
        assert!(BOUNDS_US.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn epochs_are_counted_with_every_phase_of_their_pause() {
        let figures = told([(0, joined()), (5000, committed(Some(1500))), (9000, committed(None))]);
        assert_eq!((figures.epochs, figures.epochs_stalled), (2, 2));
        assert_eq!((figures.epoch_pages, figures.epoch_bytes), (6, 140));
        let pauses = &figures.pauses;
        let sums = [&pauses.stop, &pauses.harvest, &pauses.copy, &pauses.capture, &pauses.resume];
        assert_eq!(sums.map(Buckets::sum_us), [2, 40, 600, 8000, 100_000]);
        assert_eq!(pauses.total.sum_us(), 2 * 54_321);
        assert_eq!((figures.commits.count(), figures.commits.sum_us()), (2, 1800));
        assert_eq!((figures.held.count(), figures.held.sum_us()), (1, 1500));
        assert_eq!((figures.intervals.count(), figures.intervals.sum_us()), (1, 4000));
    }

    #[test]
    fn failover_is_measured_from_the_known_loss_through_the_decision_to_the_running_guest() {
        let lost = Report::PrimaryLost { reason: "x".into(), epoch: Epoch(7), silent_us: 30_000 };
        let active = Report::Active { epoch: Epoch(7), term: Term(2), output_start: 0 };
        let figures = told([
            (0, joined()),
            (400, Report::Protected { epoch: Epoch(1) }),
            (1000, lost),
            (1300, Report::Won { term: Term(2) }),
            (2000, active),
        ]);
        assert_eq!(figures.seeding.sum_us(), 400);
        assert_eq!(figures.primary_losses.sum_us(), 30_000);
        assert_eq!(figures.decisions.sum_us(), 300);
        assert_eq!(figures.activations.sum_us(), 700);
        assert_eq!(figures.failovers.sum_us(), 1000);
        assert!(!figures.protected);
    }

    #[test]
    fn primary_that_goes_on_alone_is_no_failover_and_not_protected() {
        let lost = Report::StandbyLost { reason: "x".into(), silent_us: 9 };
        let figures = told([
            (0, joined()),
            (1, Report::Protected { epoch: Epoch(1) }),
            (10, lost),
            (15, Report::Solo { term: Term(2) }),
        ]);
        assert_eq!((figures.failovers.count(), figures.decisions.sum_us()), (0, 5));
        assert_eq!((figures.standby_losses.count(), figures.unprotected), (1, 1));
        assert!(!figures.protected);
    }
}
