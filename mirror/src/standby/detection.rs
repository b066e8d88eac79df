//! When the primary counts as lost. Detection is not decision: the witness decides.
//!
//! The mirror's link tells: it closes, it falls silent, or what comes on it is no progress. A primary that is still heard
//! on a second link is not dead, and goes on better than its guest moves: it is given time to have the witness' word for
//! going on alone, until it is silent there, too, or its epochs have stood still for longer than it has promised.

use std::time::Duration;

use crate::report::Report;
use crate::wire::header::Header;
use crate::wire::message::{Body, Message};

use super::inbox::Inbox;
use super::{Action, Allocation, Epoch, HEARTBEAT, LinkId, Phase, RESERVATION, Standby};

impl Allocation {
    /// The primary is heard on the mirror's link.
    pub(super) fn hear(&mut self, now: Duration, body: &Body) {
        self.heard = now;
        self.doubt = None;
        if !matches!(body, Body::Message(Message::Heartbeat { .. })) {
            self.progressed = now;
        }
    }

    /// For how long nothing may be heard of the primary.
    fn patience(&self) -> Duration {
        self.heartbeat * self.misses
    }

    /// Whether the primary lives, by the second link, and is to make progress soon.
    fn is_heard_elsewhere(&self, now: Duration) -> bool {
        self.epoch_within.is_some()
            && self.heard_elsewhere.is_some_and(|at| now.saturating_sub(at) <= self.patience())
    }

    /// For how long epochs have stood still, if that is too long.
    fn stands_still(&self, now: Duration) -> Option<Duration> {
        let standstill = now.saturating_sub(self.progressed);
        // What was sent may still be on its way to this side's disks.
        let late = self.keeping.is_none() && self.epoch_within.is_some_and(|within| standstill > within);
        late.then_some(standstill)
    }
}

impl Standby {
    /// A sign of life that came on another link than the mirror's.
    pub(super) fn heard_elsewhere(&mut self, header: &Header) {
        if let Some(allocation) = &mut self.allocation
            && allocation.guid == header.guid
            && header.term >= allocation.term
        {
            allocation.heard_elsewhere = Some(self.now);
        }
    }

    pub(super) fn tick(&mut self, actions: &mut Vec<Action>) {
        let now = self.now;
        if let (Phase::Reserved, Some(link)) = (self.phase, self.owner)
            && now.saturating_sub(self.reserved) > RESERVATION
        {
            actions.push(Action::Close(link));
            self.link_lost(link, "space was promised, but nothing was allocated".into(), actions);
        }
        let Some(allocation) = &mut self.allocation else { return };
        match (self.phase, self.owner) {
            (Phase::Claiming, _) => {
                actions.push(Action::Claim { guid: allocation.guid, expected: allocation.term });
            }
            (Phase::Allocated | Phase::Receiving | Phase::Shadowing, Some(link)) => {
                let silence = now.saturating_sub(allocation.heard);
                if silence > allocation.patience() {
                    // The link stays open: the primary may only be slow, and then learns by it what became of it.
                    let reason = format!("nothing heard of the primary for {} ms", silence.as_millis());
                    if !self.doubt(&reason, actions) {
                        self.primary_lost(reason, actions);
                        return;
                    }
                }
                if self.standstill(actions) {
                    return;
                }
                let Some(allocation) = &mut self.allocation else { return };
                // In doubt it is silent itself: it is the primary that is to notice, and to decide.
                if allocation.doubt.is_none() && now.saturating_sub(allocation.spoke) >= allocation.heartbeat
                {
                    allocation.spoke = now;
                    let stamp = (allocation.guid, allocation.term, allocation.epoch);
                    actions.push(Action::Send { link, stamp, message: HEARTBEAT });
                }
            }
            (Phase::Shadowing, None) => {
                if allocation.is_heard_elsewhere(now) {
                    self.standstill(actions);
                } else {
                    let doubt = allocation.doubt.take().unwrap_or_default();
                    let reason = format!("{doubt}, and it is not heard on the second link any more");
                    self.primary_lost(reason, actions);
                }
            }
            _ => {}
        }
    }

    /// A primary whose epochs stand still counts as lost, wherever it is heard; tells whether it is.
    fn standstill(&mut self, actions: &mut Vec<Action>) -> bool {
        let allocation = self.allocation.as_ref().filter(|_| self.phase == Phase::Shadowing);
        let Some(standstill) = allocation.and_then(|allocation| allocation.stands_still(self.now)) else {
            return false;
        };
        let millis = standstill.as_millis();
        let reason = format!("it is heard of, but its epochs have stood still for {millis} ms");
        self.primary_lost(reason, actions);
        true
    }

    /// Whether a primary that would count as lost, for `reason`, is given time, because it is heard elsewhere.
    fn doubt(&mut self, reason: &str, actions: &mut Vec<Action>) -> bool {
        let (now, phase) = (self.now, self.phase);
        let heard =
            |allocation: &&mut Allocation| phase == Phase::Shadowing && allocation.is_heard_elsewhere(now);
        let Some(allocation) = self.allocation.as_mut().filter(heard) else { return false };
        if allocation.doubt.is_none() {
            allocation.doubt = Some(reason.into());
            actions.push(Action::Report(Report::HeardElsewhere { reason: reason.into() }));
        }
        true
    }

    pub(super) fn link_lost(&mut self, link: LinkId, reason: String, actions: &mut Vec<Action>) {
        self.queue.retain(|(waiting, ..)| *waiting != link);
        if self.owner != Some(link) {
            return;
        }
        self.owner = None;
        match self.phase {
            Phase::Waiting | Phase::Claiming | Phase::Orphaned | Phase::Active => {}
            Phase::Reserved => {
                self.forget(actions);
                self.serve_next(actions);
            }
            Phase::Allocating | Phase::Allocated | Phase::Receiving | Phase::Shadowing => {
                if !self.doubt(&reason, actions) {
                    self.primary_lost(reason, actions);
                }
            }
        }
    }

    pub(super) fn primary_lost(&mut self, reason: String, actions: &mut Vec<Action>) {
        if self.keeps(&reason) {
            return;
        }
        let Some(allocation) = &mut self.allocation else { return };
        // What has arrived of an epoch that was not committed was never seen by anyone.
        allocation.inbox = Inbox::default();
        let (epoch, guid, expected) = (allocation.epoch, allocation.guid, allocation.term);
        let silent_us = self.now.saturating_sub(allocation.heard).as_micros() as u64;
        actions.push(Action::Report(Report::PrimaryLost { reason, epoch, silent_us }));
        if epoch == Epoch::NONE {
            actions.push(Action::Report(Report::Refused {
                reason: "there is no complete epoch: the primary was lost while seeding, and a guest is never run from a part of its memory".into(),
            }));
            self.drop_guest(actions);
        } else if allocation.witness {
            self.phase = Phase::Claiming;
            actions.push(Action::Claim { guid, expected });
        } else {
            self.phase = Phase::Orphaned;
            actions.push(Action::Report(Report::AwaitingPromotion {
                reason: "no witness is configured, so nothing proves that the primary does not run; promote this standby if it is dead".into(),
            }));
        }
    }
}
