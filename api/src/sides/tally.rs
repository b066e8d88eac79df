//! What a side has told of itself so far.

use mirror::ids::{Epoch, Term};
use mirror::report::{Report, Stamped};
use mirror::shell::metrics::PauseTimes;

/// A side's reports, summed up.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    /// Where it listens.
    pub(crate) listening: Option<String>,
    /// When the two sides agreed.
    pub(crate) joined_us: Option<u64>,
    /// The seeding round, counted from 1; 0 before.
    pub(crate) round: u32,
    /// Completed rounds.
    pub(crate) rounds: u32,
    /// Pages sent in rounds.
    pub(crate) seed_pages: u64,
    /// Bytes sent in rounds.
    pub(crate) seed_bytes: u64,
    /// Time spent in rounds.
    pub(crate) seed_us: u64,
    /// When the guest was protected.
    pub(crate) protected_us: Option<u64>,
    /// The last committed epoch.
    pub(crate) epoch: Epoch,
    /// Committed epochs.
    pub(crate) epochs: u64,
    /// Pages sent in epochs.
    pub(crate) epoch_pages: u64,
    /// Bytes sent in epochs.
    pub(crate) epoch_bytes: u64,
    /// The pauses.
    pub(crate) times: PauseTimes,
    /// When the primary was lost, and how that was noticed.
    pub(crate) lost: Option<(u64, String)>,
    /// When the guest ran here, from which epoch, in which term, its output from which position.
    pub(crate) active: Option<(u64, Epoch, Term, u64)>,
    /// Why the guest is not run here.
    pub(crate) refused: Option<String>,
    /// Why the guest goes on without protection.
    pub(crate) unprotected: Option<String>,
    /// What failed last.
    pub(crate) failed: Option<String>,
}

impl Tally {
    /// Takes a report in.
    pub(crate) fn note(&mut self, stamped: &Stamped) {
        let at_us = stamped.at_us;
        match &stamped.report {
            Report::Listening { address } => self.listening = Some(address.clone()),
            Report::Joined { .. } => self.joined_us = Some(at_us),
            Report::RoundStarted { round, .. } => self.round = *round,
            Report::RoundDone { pages, bytes, micros, .. } => {
                self.rounds += 1;
                self.seed_pages += pages;
                self.seed_bytes += bytes;
                self.seed_us += micros;
            }
            Report::Committed { epoch, pages, bytes, pause, commit_us, .. } => {
                self.epoch = *epoch;
                self.epochs += 1;
                self.epoch_pages += pages;
                self.epoch_bytes += bytes;
                self.times.record_pause(pause);
                self.times.record_commit(*commit_us);
            }
            Report::Protected { .. } => self.protected_us = Some(at_us),
            Report::PrimaryLost { reason, .. } => self.lost = Some((at_us, reason.clone())),
            Report::Active { epoch, term, output_start } => {
                self.active = Some((at_us, *epoch, *term, *output_start));
            }
            Report::Refused { reason } => self.refused = Some(reason.clone()),
            Report::Unprotected { reason } | Report::StandbyLost { reason, .. } => {
                self.unprotected = Some(reason.clone());
            }
            Report::Failed { reason } => self.failed = Some(reason.clone()),
            _ => {}
        }
    }

    /// What a primary that told this is doing, in a word.
    pub(crate) fn phase(&self) -> &'static str {
        if self.unprotected.is_some() {
            "unprotected"
        } else if self.protected_us.is_some() {
            "lockstep"
        } else if self.joined_us.is_some() {
            "seeding"
        } else {
            "starting"
        }
    }
}
