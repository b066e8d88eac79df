//! Epochs: when one ends, and when it is committed.

use std::time::Duration;

use crate::ids::{Epoch, LinkId};
use crate::report::Report;
use crate::wire::message::Message;

use super::session::Standing;
use super::{Action, Phase, Primary, Settings, Stage};

/// Time between two questions about a standby's health.
const SENSE_INTERVAL: Duration = Duration::from_secs(1);

/// How long a standby may take for one step of the agreement: it builds a machine in one of them.
const JOIN_PATIENCE: Duration = Duration::from_secs(10);

/// How long a standby may take to acknowledge an epoch that has been sent: a slow link takes its time.
const COMMIT_PATIENCE: Duration = Duration::from_secs(30);

/// Where the current epoch stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    /// The guest runs; the epoch before was staged at `since`.
    Running { since: Duration },
    /// The pause has been ordered.
    Pausing,
    /// Sent or being sent; the acknowledgements are awaited.
    Committing { since: Duration },
    /// The last epoch before a hand-over is committed; this host finishes what it does for the guest.
    Draining,
}

impl Primary {
    /// Whoever is ready for its first epoch gets it at once, if no other one is on its way.
    pub(super) fn welcome(&mut self, actions: &mut Vec<Action>) {
        let ready = self.sessions.values().any(|session| session.standing == Standing::Ready);
        if !ready || !matches!(self.flow, Flow::Running { .. }) || self.renewing {
            return;
        }
        if !std::mem::replace(&mut self.holding, true) {
            actions.push(Action::Hold);
        }
        self.take_epoch(actions);
    }

    pub(super) fn take_epoch(&mut self, actions: &mut Vec<Action>) {
        let mut links = Vec::new();
        for (&link, session) in &mut self.sessions {
            session.takes_part = matches!(session.standing, Standing::Ready | Standing::Following);
            session.sent = None;
            if session.takes_part {
                links.push(link);
            }
        }
        self.flow = Flow::Pausing;
        self.pace.pauses(self.now);
        self.last = self.ended.is_some();
        if self.switching.is_some() && !self.last {
            self.standing = Some(self.now);
            actions.push(Action::StandStill);
        }
        actions.push(Action::TakeEpoch { epoch: self.epoch.next(), links });
    }

    pub(super) fn staged(&mut self, output_end: u64, actions: &mut Vec<Action>) {
        if !self.mirrors() || self.flow != Flow::Pausing {
            return;
        }
        self.pace.goes_on(self.now);
        let mut taken = false;
        for session in self.sessions.values_mut().filter(|session| session.takes_part) {
            // An epoch larger than staging was sent in part meanwhile: as for a round.
            session.heard = self.now;
            session.exposed = true;
            taken = true;
        }
        if !taken {
            self.flow = Flow::Running { since: self.now };
            self.welcome(actions);
            return;
        }
        self.flow = Flow::Committing { since: self.now };
        self.output_end = output_end;
        actions.push(Action::SendEpoch { epoch: self.epoch.next() });
    }

    pub(super) fn epoch_sent(&mut self, link: LinkId) {
        if let Some(session) = self.sessions.get_mut(&link) {
            session.sent = Some(self.now);
        }
    }

    pub(super) fn acknowledged(&mut self, link: LinkId, epoch: Epoch, actions: &mut Vec<Action>) {
        let next = self.epoch.next();
        let committing = matches!(self.flow, Flow::Committing { .. });
        match self.sessions.get_mut(&link) {
            Some(session)
                if committing && session.takes_part && epoch == next && session.acknowledged < next =>
            {
                session.acknowledged = epoch;
            }
            _ => {
                self.distrust(link, "CommitAck", actions);
                return;
            }
        }
        self.commit_if_whole(actions);
    }

    /// An epoch is committed when all that take part in it have acknowledged it: any of them may be the live side next.
    pub(super) fn commit_if_whole(&mut self, actions: &mut Vec<Action>) {
        let (Flow::Committing { since }, false) = (self.flow, self.renewing) else { return };
        let epoch = self.epoch.next();
        let mut part = self.sessions.values().filter(|session| session.takes_part).peekable();
        if part.peek().is_none() || part.any(|session| session.acknowledged != epoch) {
            return;
        }
        self.epoch = epoch;
        actions.push(Action::Release { epoch, output_end: self.output_end });
        let first = !self.follows();
        let ready = self
            .sessions
            .values_mut()
            .filter(|session| session.takes_part && session.standing == Standing::Ready);
        let gained = ready.map(|session| session.standing = Standing::Following).count();
        if first {
            actions.push(Action::Report(Report::Protected { epoch }));
            self.thaw(actions);
        } else if gained > 0 {
            let standbys = self.following();
            actions.push(Action::Report(Report::StandbyGained { epoch, standbys }));
        }
        self.flow = Flow::Running { since };
        if self.standing.is_some() {
            self.flow = Flow::Draining;
            actions.push(Action::Drain);
            return;
        }
        if let (true, Some(reason)) = (self.last, self.ended.clone()) {
            self.part_from_all(&reason, actions);
            actions.push(Action::PassOutput);
            self.close_all(actions);
            self.stage = Stage::Ended;
        } else if self.detaching {
            self.release_all(actions);
        } else {
            self.welcome(actions);
        }
    }

    pub(super) fn tick(&mut self, waits: bool, released: u64, dirty: Option<u64>, actions: &mut Vec<Action>) {
        let Settings { heartbeat, .. } = self.settings;
        match self.stage {
            Stage::Mirroring | Stage::HandingOver(_) => {}
            Stage::Deciding => {
                if self.now.saturating_sub(self.asked) >= heartbeat {
                    self.ask_witness(actions);
                }
                return;
            }
            _ => return,
        }
        for link in self.sessions.keys().copied().collect::<Vec<_>>() {
            if let Some(reason) = self.given_up(link) {
                self.lose(link, reason, actions);
            } else {
                self.keep_in_touch(link, released, actions);
            }
        }
        if self.renewing && self.now.saturating_sub(self.asked) >= heartbeat {
            self.renew(actions);
        }
        if let (Phase::Lockstep, Flow::Running { since }, false) = (self.phase(), self.flow, self.renewing) {
            let age = self.now.saturating_sub(since);
            if self.pace.is_over(&self.settings.pacing, age, waits, dirty) || self.ended.is_some() {
                self.take_epoch(actions);
            }
        }
    }

    /// Why a standby is no longer waited for, if so.
    fn given_up(&self, link: LinkId) -> Option<String> {
        let session = self.sessions.get(&link)?;
        let patience = self.settings.patience();
        if let (Flow::Committing { .. }, Some(sent)) = (self.flow, session.sent)
            && session.takes_part
            && session.acknowledged < self.epoch.next()
        {
            let waited = self.now.saturating_sub(sent);
            if waited > COMMIT_PATIENCE {
                let seconds = COMMIT_PATIENCE.as_secs();
                return Some(format!("it has not acknowledged an epoch for {seconds} s"));
            }
            let done = self.sessions.values().filter(|other| other.acknowledged == self.epoch.next()).count();
            if waited > patience && self.settings.quorum.is_some_and(|quorum| done >= quorum as usize) {
                let ms = waited.as_millis();
                return Some(format!("it lags {ms} ms behind {done} others, which are enough"));
            }
        }
        // Before the allocation is agreed the standby sends no heartbeats, and it may have us wait for space.
        let patience = match session.standing {
            Standing::Joining if session.queued => Duration::MAX,
            Standing::Joining => JOIN_PATIENCE,
            _ => patience,
        };
        let silence = self.now.saturating_sub(session.heard);
        (silence > patience).then(|| format!("nothing heard of the standby for {} ms", silence.as_millis()))
    }

    fn keep_in_touch(&mut self, link: LinkId, released: u64, actions: &mut Vec<Action>) {
        let Some(session) = self.sessions.get_mut(&link) else { return };
        let follows = session.standing == Standing::Following;
        let senses = follows && self.now.saturating_sub(session.sensed) >= SENSE_INTERVAL;
        if senses {
            session.sensed = self.now;
        }
        let silent = self.now.saturating_sub(session.spoke) >= self.settings.heartbeat;
        let committing = matches!(self.flow, Flow::Committing { .. });
        let waits_for_others = committing && session.takes_part && session.acknowledged == self.epoch.next();
        if silent && waits_for_others {
            self.send(link, Message::Waiting, actions);
        } else if silent && session.standing != Standing::Joining {
            self.beat(link, released, actions);
        }
        if senses {
            self.send(link, Message::SenseRequest, actions);
        }
    }
}
