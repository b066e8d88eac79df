//! How a primary and its standbys part by the operator's wish: the guest goes over to a standby, or stays alone.

use crate::ids::{LinkId, Term};
use crate::report::Report;
use crate::wire::message::Message;

use super::epochs::Flow;
use super::session::Standing;
use super::{Action, Phase, Primary, Stage};

/// What a standby that is wanted no longer is told.
const DETACHED: &str = "the primary has no more use for this standby";

impl Primary {
    /// `to`: the standby that is to run the guest; any that follows, if not given.
    pub(super) fn switch_over(&mut self, to: Option<LinkId>, actions: &mut Vec<Action>) {
        let follows = |link: &LinkId| {
            self.sessions.get(link).is_some_and(|session| session.standing == Standing::Following)
        };
        let to = to.or_else(|| self.sessions.keys().copied().find(follows)).filter(follows);
        let refused = self.phase() != Phase::Lockstep
            || self.ended.is_some()
            || self.detaching
            || self.switching.is_some();
        let Some(to) = to.filter(|_| !refused) else {
            let reason = format!(
                "the standby can take the guest over only while epochs flow; this side is {}",
                self.phase().name()
            );
            actions.push(Action::Report(Report::SwitchoverFailed { reason }));
            return;
        };
        self.switching = Some(to);
        if matches!(self.flow, Flow::Running { .. }) && !self.renewing {
            self.take_epoch(actions);
        }
    }

    /// The last epoch is committed, and this host has nothing more to do with the guest: it is the standby's.
    pub(super) fn drained(&mut self, released: Result<u64, String>, actions: &mut Vec<Action>) {
        let (true, Flow::Draining, Some(to)) = (self.mirrors(), self.flow, self.switching) else { return };
        match released {
            Ok(released) => {
                self.stage = Stage::HandingOver(to);
                if let Some(session) = self.sessions.get_mut(&to) {
                    session.heard = self.now;
                }
                self.send(to, Message::ReleasePointer { released }, actions);
            }
            Err(reason) => {
                self.flow = Flow::Running { since: self.now };
                self.stand_no_longer(reason, actions);
            }
        }
    }

    pub(super) fn switchover_failed(&mut self, reason: String, actions: &mut Vec<Action>) {
        if self.switching.take().is_some() {
            actions.push(Action::Report(Report::SwitchoverFailed { reason }));
        }
    }

    pub(super) fn stand_no_longer(&mut self, reason: String, actions: &mut Vec<Action>) {
        self.switchover_failed(reason, actions);
        if self.standing.take().is_some() {
            actions.push(Action::Resume);
        }
    }

    pub(super) fn handed_over(&mut self, term: Term, actions: &mut Vec<Action>) {
        self.stage = Stage::HandedOver;
        actions.push(Action::Freeze);
        self.close_all(actions);
        let since = self.standing.unwrap_or(self.now);
        let pause_us = self.now.saturating_sub(since).as_micros() as u64;
        actions.push(Action::Report(Report::HandedOver { term, pause_us }));
    }

    /// A standby without a complete epoch is simply left. One that holds an epoch could go on with it: it must have said
    /// that it has forgotten, or the witness that it may not, before this side releases anything by its own word.
    pub(super) fn detach(&mut self, actions: &mut Vec<Action>) {
        let phase = self.phase();
        let possible = matches!(phase, Phase::Idle | Phase::Joining | Phase::Seeding | Phase::Lockstep);
        if possible && self.switching.is_none() && self.ended.is_none() {
            self.detaching = true;
            if matches!(self.flow, Flow::Running { .. }) && !self.renewing {
                self.release_all(actions);
            }
        } else if phase != Phase::Releasing {
            let reason = format!("there is no standby to detach from; this side is {}", phase.name());
            actions.push(Action::Report(Report::DetachFailed { reason }));
        }
    }

    /// Everything that was staged is committed: the standbys may forget.
    pub(super) fn release_all(&mut self, actions: &mut Vec<Action>) {
        for link in self.sessions.keys().copied().collect::<Vec<_>>() {
            self.send(link, Message::ReleaseMemory { reason: DETACHED.into() }, actions);
            let Some(session) = self.sessions.get_mut(&link) else { continue };
            if session.exposed {
                session.standing = Standing::Releasing;
                session.heard = self.now;
            } else {
                self.sessions.remove(&link);
                actions.push(Action::Close(link));
            }
        }
        self.alone_if_released(actions);
    }

    /// A standby has forgotten the guest.
    pub(super) fn released(&mut self, link: LinkId, actions: &mut Vec<Action>) {
        self.sessions.remove(&link);
        actions.push(Action::Close(link));
        self.alone_if_released(actions);
    }

    /// Once all have forgotten the guest nobody else can run it.
    fn alone_if_released(&mut self, actions: &mut Vec<Action>) {
        if !self.sessions.is_empty() {
            return;
        }
        self.stage = if self.ended.is_some() { Stage::Ended } else { Stage::Solo };
        actions.push(Action::Report(Report::Detached { term: self.term }));
        actions.push(Action::PassOutput);
        actions.push(Action::StopTracking);
        self.thaw(actions);
    }

    pub(super) fn guest_ended(&mut self, reason: &str, actions: &mut Vec<Action>) {
        self.ended = Some(reason.to_owned());
        match self.stage {
            Stage::Mirroring if !self.sessions.values().any(|session| session.exposed) => {
                self.part_from_all(reason, actions);
                self.close_all(actions);
                self.stage = Stage::Ended;
                actions.push(Action::PassOutput);
            }
            Stage::Solo => self.stage = Stage::Ended,
            // One more epoch carries the last output; the next tick takes it.
            _ => {}
        }
    }

    /// The guest has come to its end, and the standbys are told.
    pub(super) fn part_from_all(&mut self, reason: &str, actions: &mut Vec<Action>) {
        for link in self.sessions.keys().copied().collect::<Vec<_>>() {
            self.send(link, Message::ReleaseMemory { reason: reason.into() }, actions);
        }
    }
}
