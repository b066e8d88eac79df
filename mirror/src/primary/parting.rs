//! How a primary and its standby part by the operator's wish: the guest goes over to the standby, or stays alone.

use crate::ids::Term;
use crate::report::Report;
use crate::wire::message::Message;

use super::{Action, Flow, Phase, Primary};

/// What a standby that is wanted no longer is told.
const DETACHED: &str = "the primary has no more use for this standby";

impl Primary {
    pub(super) fn switch_over(&mut self, actions: &mut Vec<Action>) {
        if self.phase != Phase::Lockstep || self.ended.is_some() || self.detaching {
            let reason = format!(
                "the standby can take the guest over only while epochs flow; this side is {}",
                self.phase.name()
            );
            actions.push(Action::Report(Report::SwitchoverFailed { reason }));
            return;
        }
        self.switching = true;
        if matches!(self.flow, Flow::Running { .. }) {
            self.take_epoch(actions);
        }
    }

    /// The last epoch is committed, and this host has nothing more to do with the guest: it is the standby's.
    pub(super) fn drained(&mut self, released: Result<u64, String>, actions: &mut Vec<Action>) {
        if self.phase != Phase::Lockstep || !matches!(self.flow, Flow::Draining) {
            return;
        }
        match released {
            Ok(released) => {
                self.phase = Phase::HandingOver;
                self.heard = self.now;
                self.send(Message::ReleasePointer { released }, actions);
            }
            Err(reason) => {
                self.flow = Flow::Running { since: self.now };
                self.stand_no_longer(reason, actions);
            }
        }
    }

    pub(super) fn stand_no_longer(&mut self, reason: String, actions: &mut Vec<Action>) {
        if self.switching {
            self.switching = false;
            actions.push(Action::Report(Report::SwitchoverFailed { reason }));
        }
        if self.standing.take().is_some() {
            actions.push(Action::Resume);
        }
    }

    pub(super) fn handed_over(&mut self, term: Term, actions: &mut Vec<Action>) {
        self.phase = Phase::HandedOver;
        actions.push(Action::Freeze);
        actions.push(Action::Close);
        let since = self.standing.unwrap_or(self.now);
        let pause_us = self.now.saturating_sub(since).as_micros() as u64;
        actions.push(Action::Report(Report::HandedOver { term, pause_us }));
    }

    /// A standby without a complete epoch is simply left. One that holds an epoch could go on with it: it must have said
    /// that it has forgotten, or the witness that it may not, before this side releases anything by its own word.
    pub(super) fn detach(&mut self, actions: &mut Vec<Action>) {
        match self.phase {
            Phase::Idle | Phase::Joining | Phase::Seeding if !self.exposed && !self.takes_epoch() => {
                self.send(Message::ReleaseMemory { reason: DETACHED.into() }, actions);
                self.detaching = true;
                self.released(actions);
            }
            Phase::Seeding | Phase::Lockstep if !self.switching && self.ended.is_none() => {
                self.detaching = true;
                if self.phase == Phase::Lockstep && !self.takes_epoch() {
                    self.release_standby(actions);
                }
            }
            Phase::Releasing => {}
            phase => {
                let reason = format!("there is no standby to detach from; this side is {}", phase.name());
                actions.push(Action::Report(Report::DetachFailed { reason }));
            }
        }
    }

    fn takes_epoch(&self) -> bool {
        !matches!(self.flow, Flow::Running { .. })
    }

    /// Everything that was staged is committed: the standby may forget.
    pub(super) fn release_standby(&mut self, actions: &mut Vec<Action>) {
        self.phase = Phase::Releasing;
        self.heard = self.now;
        self.send(Message::ReleaseMemory { reason: DETACHED.into() }, actions);
    }

    /// The standby has forgotten the guest: nobody else can run it.
    pub(super) fn released(&mut self, actions: &mut Vec<Action>) {
        self.phase = if self.ended.is_some() { Phase::Ended } else { Phase::Solo };
        actions.push(Action::Close);
        actions.push(Action::Report(Report::Detached { term: self.term }));
        actions.push(Action::PassOutput);
        actions.push(Action::StopTracking);
    }
}
