//! What waits for the standby's disks: an epoch or a round whose write log is being made durable.
//!
//! A log that is durable is applied, whatever else happens. So its epoch is committed when it is durable, also if the
//! primary was lost meanwhile: then nobody is told, and that loss is decided on afterwards.

use super::inbox::{OutputLog, WholeEpoch};
use super::{Action, LinkId, Standby};
use crate::ids::Epoch;
use crate::report::Report;
use crate::wire::header::Header;
use crate::wire::message::{Body, Message, Refusal};

/// What waits until its log is durable.
#[derive(Debug)]
pub(super) struct Keeping {
    number: u64,
    link: LinkId,
    /// Of the message that is answered then.
    header: Header,
    what: What,
    /// Why the primary counts as lost, if it was lost meanwhile.
    lost: Option<String>,
}

#[derive(Debug)]
enum What {
    Round(u32),
    /// The output that is committed with it, and the epoch itself.
    Epoch(OutputLog, WholeEpoch),
}

/// Whether a primary must not send this before what it has sent is acknowledged.
pub(super) fn must_wait(body: &Body) -> bool {
    match body {
        Body::Pages(_) => true,
        Body::Message(message) => matches!(
            message,
            Message::WriteState(_)
                | Message::WriteLog(_)
                | Message::WriteOutput { .. }
                | Message::Commit(_)
                | Message::RoundEnd { .. }
                | Message::ReleasePointer { .. }
        ),
    }
}

impl Standby {
    /// A round has arrived: it is acknowledged once what it brought for the disks is there.
    pub(super) fn end_of_round(
        &mut self,
        link: LinkId,
        header: &Header,
        round: u32,
        actions: &mut Vec<Action>,
    ) {
        let Some(allocation) = &mut self.allocation else { return };
        let log = std::mem::take(&mut allocation.round_log);
        if log.is_empty() {
            self.answer(link, header, Message::RoundAck { round }, actions);
        } else {
            self.keep(link, header, What::Round(round), Epoch::NONE, log, actions);
        }
    }

    /// A whole epoch has arrived: it is committed once what it brought for the disks is durable.
    pub(super) fn keep_epoch(
        &mut self,
        link: LinkId,
        header: &Header,
        output: OutputLog,
        mut epoch: WholeEpoch,
        actions: &mut Vec<Action>,
    ) {
        let log = std::mem::take(&mut epoch.log);
        if log.is_empty() {
            self.accept(link, header, output, epoch, actions);
        } else {
            self.keep(link, header, What::Epoch(output, epoch), header.epoch, log, actions);
        }
    }

    fn keep(
        &mut self,
        link: LinkId,
        header: &Header,
        what: What,
        epoch: Epoch,
        log: Vec<u8>,
        actions: &mut Vec<Action>,
    ) {
        let Some(allocation) = &mut self.allocation else { return };
        self.logs += 1;
        let number = self.logs;
        allocation.keeping = Some(Keeping { number, link, header: *header, what, lost: None });
        actions.push(Action::KeepLog { number, epoch, log });
    }

    /// Whether the loss of the primary has to wait for a log: then it is noted.
    pub(super) fn keeps(&mut self, lost: &str) -> bool {
        let keeping = self.allocation.as_mut().and_then(|allocation| allocation.keeping.as_mut());
        keeping.is_some_and(|keeping| {
            keeping.lost.get_or_insert_with(|| lost.into());
            true
        })
    }

    pub(super) fn log_kept(&mut self, number: u64, outcome: Result<(), String>, actions: &mut Vec<Action>) {
        let Some(allocation) = &mut self.allocation else { return };
        let Some(Keeping { link, header, what, lost, .. }) =
            allocation.keeping.take_if(|keeping| keeping.number == number)
        else {
            return;
        };
        // Nobody could make progress before that.
        allocation.progressed = self.now;
        match (outcome, what) {
            (Ok(()), What::Round(round)) if self.owner == Some(link) => {
                self.answer(link, &header, Message::RoundAck { round }, actions);
            }
            (Ok(()), What::Round(_)) => {}
            (Ok(()), What::Epoch(output, epoch)) => self.accept(link, &header, output, epoch, actions),
            (Err(reason), _) => {
                actions.push(Action::Report(Report::Failed { reason: reason.clone() }));
                if lost.is_none() {
                    let refusal = Refusal::Machine(reason);
                    let stamp = (header.guid, self.term(), self.epoch());
                    actions.push(Action::Send { link, stamp, message: Message::Refused(refusal.clone()) });
                    actions.push(Action::Close(link));
                    self.link_lost(link, refusal.to_string(), actions);
                }
            }
        }
        if let Some(reason) = lost {
            self.primary_lost(reason, actions);
        }
    }
}
