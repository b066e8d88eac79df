//! A standby is lost: who may go on, by the witness' word.
//!
//! Whoever has been sent a commit may hold everything, and may be the live side next. As long as others follow, those go
//! on with this side in the next term, which the lost one does not know: they are told of it first, so that each of them
//! can take over from this side in either term, then the witness is asked, and only with its grant does anything leave
//! that the lost one has not acknowledged.

use crate::ids::{LinkId, Term};
use crate::report::Report;
use crate::wire::message::Message;
use crate::witness::Claim;

use super::epochs::Flow;
use super::session::{Session, Standing};
use super::{Action, Alone, Primary, Stage};

impl Session {
    /// It may be the live side next, and goes on with this one.
    fn is_member(&self) -> bool {
        self.exposed && self.standing != Standing::Releasing
    }
}

impl Primary {
    /// A standby is lost, or is no longer to be trusted.
    pub(super) fn lose(&mut self, link: LinkId, reason: String, actions: &mut Vec<Action>) {
        let Some(session) = self.leave(link, actions) else { return };
        match self.stage {
            Stage::Mirroring => self.lost(link, &session, reason, actions),
            Stage::HandingOver(to) if to == link && !self.settings.has_witness => {
                let reason = format!(
                    "{reason}, after the guest was given to it, and there is no witness to ask whether it runs there; look, \
                     and start it where it does not"
                );
                self.freeze(&reason, actions);
            }
            Stage::HandingOver(to) if to == link => self.take_back(&session, reason, actions),
            // Whoever runs the guest next, this one does not know its term.
            _ => {}
        }
    }

    /// Closes the link to a standby. If it may be live next, this side goes on only in a term that it does not know.
    pub(super) fn leave(&mut self, link: LinkId, actions: &mut Vec<Action>) -> Option<Session> {
        let session = self.sessions.remove(&link)?;
        actions.push(Action::Close(link));
        if session.exposed {
            self.shut_out = self.shut_out.max(session.told).max(self.term);
        }
        Some(session)
    }

    /// This side can no longer be mirrored: all standbys are done without.
    pub(super) fn lose_all(&mut self, reason: String, actions: &mut Vec<Action>) {
        // The last one that may be live decides what follows.
        let mut links: Vec<_> =
            self.sessions.iter().map(|(&link, session)| (session.exposed, link)).collect();
        links.sort_unstable();
        if let Some((_, last)) = links.pop() {
            for (_, link) in links {
                self.leave(link, actions);
            }
            self.lose(last, reason, actions);
        }
    }

    /// The standby to which the guest was given does not run it, or has not said so: it is asked for again.
    pub(super) fn take_back(&mut self, session: &Session, reason: String, actions: &mut Vec<Action>) {
        self.stage = Stage::Mirroring;
        self.part_with(session, reason, actions);
    }

    fn lost(&mut self, link: LinkId, session: &Session, reason: String, actions: &mut Vec<Action>) {
        let in_flight = matches!(self.flow, Flow::Committing { .. } | Flow::Pausing);
        if in_flight && !self.sessions.values().any(|other| other.takes_part) {
            actions.push(Action::PutBack);
            if self.flow != Flow::Pausing {
                self.flow = Flow::Running { since: self.now };
            }
        }
        if session.exposed {
            let others = self.sessions.values().any(Session::is_member);
            if others && (self.switching == Some(link) || self.flow == Flow::Draining) {
                self.go_on_standing_no_longer("a standby was lost meanwhile", actions);
            }
            self.part_with(session, reason, actions);
        } else if self.sessions.is_empty() {
            // Nobody can hold a complete epoch: nobody else can be live. All is as it was before.
            let alone = if self.settings.suspended { Alone::Suspended } else { Alone::Solo };
            actions.push(Action::Report(Report::Unprotected { reason: reason.clone() }));
            self.go_on_alone(alone, reason, actions);
        } else {
            self.report_left(session, reason, actions);
            self.commit_if_whole(actions);
            self.welcome(actions);
        }
    }

    /// One that may be live next is lost.
    fn part_with(&mut self, session: &Session, reason: String, actions: &mut Vec<Action>) {
        if !self.sessions.values().any(Session::is_member) {
            for link in self.sessions.keys().copied().collect::<Vec<_>>() {
                self.leave(link, actions);
            }
            let silent_us = self.silence(session);
            self.decide(reason, silent_us, actions);
            return;
        }
        self.report_left(session, reason, actions);
        // Who does not follow yet is sought again: it would not know the next term.
        let others: Vec<_> =
            self.sessions.iter().filter(|(_, other)| !other.is_member()).map(|(&link, _)| link).collect();
        for link in others {
            self.leave(link, actions);
        }
        self.renew(actions);
    }

    fn silence(&self, session: &Session) -> u64 {
        self.now.saturating_sub(session.heard).as_micros() as u64
    }

    fn report_left(&self, session: &Session, reason: String, actions: &mut Vec<Action>) {
        let (silent_us, standbys) = (self.silence(session), self.following());
        actions.push(Action::Report(Report::StandbyLeft { reason, silent_us, standbys }));
    }

    pub(super) fn decide(&mut self, reason: String, silent_us: u64, actions: &mut Vec<Action>) {
        self.stage = Stage::Deciding;
        self.renewing = false;
        actions.push(Action::Report(Report::StandbyLost { reason, silent_us }));
        self.ask_witness(actions);
    }

    /// Tells those who follow of the next term, and asks for it once they know.
    pub(super) fn renew(&mut self, actions: &mut Vec<Action>) {
        self.renewing = true;
        let next = self.term.next();
        let untold: Vec<_> =
            self.sessions.iter().filter(|(_, session)| session.told < next).map(|(&link, _)| link).collect();
        for link in untold {
            if let Some(session) = self.sessions.get_mut(&link) {
                session.told = next;
            }
            self.send(link, Message::Renew { term: next }, actions);
        }
        if self.sessions.values().all(|session| session.knows >= next) {
            self.ask_witness(actions);
        }
    }

    pub(super) fn renewed(&mut self, link: LinkId, term: Term, actions: &mut Vec<Action>) {
        let Some(session) = self.sessions.get_mut(&link) else { return };
        if term != session.told {
            self.distrust(link, "Renewed", actions);
            return;
        }
        session.knows = term;
        if self.renewing {
            self.renew(actions);
        }
    }

    pub(super) fn ask_witness(&mut self, actions: &mut Vec<Action>) {
        self.asked = self.now;
        actions.push(Action::Claim { expected: self.term });
    }

    pub(super) fn claimed(&mut self, claim: Claim, actions: &mut Vec<Action>) {
        if self.stage != Stage::Deciding && !(self.mirrors() && self.renewing) {
            return;
        }
        match claim {
            // One that was lost knows this term, too: it was told of it before it was lost.
            Claim::Granted(term) if term <= self.shut_out => {
                self.term = term;
                if self.stage == Stage::Mirroring {
                    self.renew(actions);
                } else {
                    self.ask_witness(actions);
                }
            }
            Claim::Granted(term) if self.stage == Stage::Mirroring => self.go_on_in(term, actions),
            Claim::Granted(term) => {
                self.term = term;
                let alone = if self.ended.is_some() { Alone::Solo } else { self.settings.alone };
                if alone == Alone::Solo {
                    actions.push(Action::Report(Report::Solo { term }));
                }
                self.go_on_alone(alone, "the standby is lost".into(), actions);
            }
            // Only a witness that has lost its record knows an older term; nobody has won by that.
            Claim::Refused { term, .. } if term < self.term => {
                let reason =
                    format!("it knows term {term}, this side has term {}; restore its record", self.term);
                actions.push(Action::Report(Report::WitnessSilent { reason }));
            }
            Claim::Refused { term, owner } => {
                self.freeze(&format!("{owner} runs the guest in term {term}"), actions);
            }
            // Not live by anyone's word: what is held stays held, and the question is asked again.
            Claim::Unreachable(reason) => {
                actions.push(Action::Report(Report::WitnessSilent { reason: reason.clone() }));
                if self.stage == Stage::Deciding {
                    let reason = format!("the standby is lost, and the witness does not answer: {reason}");
                    self.suspend(reason, actions);
                }
            }
        }
    }

    /// The lost one is out; those who follow go on with this side.
    fn go_on_in(&mut self, term: Term, actions: &mut Vec<Action>) {
        self.term = term;
        self.renewing = false;
        let standbys = self.following();
        actions.push(Action::Report(Report::Renewed { term, standbys }));
        for link in self.sessions.keys().copied().collect::<Vec<_>>() {
            self.beat(link, 0, actions);
        }
        if self.flow == Flow::Draining {
            self.go_on_standing_no_longer("the standby was lost before it answered", actions);
        }
        self.commit_if_whole(actions);
    }

    fn go_on_standing_no_longer(&mut self, reason: &str, actions: &mut Vec<Action>) {
        if self.flow == Flow::Draining {
            self.flow = Flow::Running { since: self.now };
        }
        self.stand_no_longer(reason.into(), actions);
    }

    /// There is a newer term than this side's: somebody else may be live, and only the witness can tell. That holds
    /// even while the standby has nothing of this primary.
    pub(super) fn superseded(&mut self, link: LinkId, reason: String, actions: &mut Vec<Action>) {
        if let Some(session) = self.sessions.get_mut(&link) {
            session.exposed = true;
            if !std::mem::replace(&mut self.holding, true) {
                actions.push(Action::Hold);
            }
        }
        self.lose(link, reason, actions);
    }

    /// A standby itself says that it runs the guest now, by the witness' grant or by an operator's word: then there
    /// is nothing left to ask, least of all where there is no witness.
    pub(super) fn replaced(&mut self, term: Term, actions: &mut Vec<Action>) {
        if matches!(self.stage, Stage::Solo | Stage::Frozen | Stage::Ended) {
            return;
        }
        self.freeze(&format!("the standby runs the guest in term {term}"), actions);
    }

    pub(super) fn freeze(&mut self, reason: &str, actions: &mut Vec<Action>) {
        self.close_all(actions);
        self.stage = Stage::Frozen;
        actions.push(Action::Freeze);
        self.switchover_failed("the standby was lost before it answered".into(), actions);
        let reason = format!("{reason}; this side was live in term {}", self.term);
        actions.push(Action::Report(Report::Frozen { reason }));
    }

    /// Nobody else can run the guest.
    fn go_on_alone(&mut self, alone: Alone, reason: String, actions: &mut Vec<Action>) {
        match alone {
            Alone::Solo => {
                self.stage = if self.ended.is_some() { Stage::Ended } else { Stage::Solo };
                actions.push(Action::PassOutput);
                actions.push(Action::StopTracking);
                self.thaw(actions);
                self.stand_no_longer(reason, actions);
            }
            Alone::Suspended => {
                self.stage = Stage::Suspended;
                self.suspend(reason.clone(), actions);
                actions.push(Action::StopTracking);
                self.switchover_failed(reason, actions);
            }
        }
    }

    fn suspend(&mut self, reason: String, actions: &mut Vec<Action>) {
        if !self.suspended && self.ended.is_none() {
            self.suspended = true;
            actions.push(Action::Suspend);
            actions.push(Action::Report(Report::Suspended { reason }));
        }
    }

    pub(super) fn thaw(&mut self, actions: &mut Vec<Action>) {
        if std::mem::take(&mut self.suspended) {
            actions.push(Action::Report(Report::Thawed { term: self.term }));
            if self.standing.is_none() {
                actions.push(Action::Resume);
            }
        }
    }
}
