//! A guest's protection: which standby mirrors it, and what becomes of it without one.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use mirror::guest::Guest;
use mirror::ids::{Epoch, Term};
use mirror::link::{Address, Stream};
use mirror::primary::Settings;
use mirror::report::Report;
use mirror::shell::primary::{self, AttachError, AttachFailure, Outcome};
use mirror::witness::Record;
use uuid::Uuid;
use vmm::Machine;

use super::{Over, Run};
use crate::config::MirrorSection;
use crate::exit::ExitStatus;
use crate::guest::StartsMirrored;
use crate::stage::{Happening, MirrorHandles, Stage, lock};
use crate::standby::{Node, Setup};

/// Time to the first search for a standby: an old primary that is to become one needs a moment to leave its guest.
pub(super) const SEEK_FIRST: Duration = Duration::from_millis(100);
/// Longest time between two searches; it doubles from one to the next.
const SEEK_AGAIN: Duration = Duration::from_secs(2);
/// Longest time between two searches for one more standby of a guest that has some.
const SEEK_MORE: Duration = Duration::from_secs(10);

impl Run {
    /// Seeks a standby for the guest after `delay`, if it is to have one.
    pub(super) fn seek_standby(&mut self, delay: Duration) {
        self.seek_at = self.section.as_ref().map(|_| Instant::now() + delay);
    }

    /// Tries the addresses of standbys beside all else: one may take seconds not to answer.
    pub(super) fn seek(&mut self) {
        self.seek_at = None;
        let Some(section) = &self.section else { return };
        let (mut addresses, happen) = (section.standby.all().to_vec(), self.happen.clone());
        if self.running.is_none() {
            let have = self.standbys();
            if have.len() >= section.standbys_at_once as usize {
                self.seek_more(SEEK_FIRST);
                return;
            }
            addresses.retain(|address| !have.contains(address));
        }
        let first = self.turned_down % addresses.len().max(1);
        addresses.rotate_left(first);
        let seek = move || {
            let mut found = Err("no address is given".to_owned());
            for address in addresses {
                match Stream::connect(&address) {
                    Ok(stream) => {
                        found = Ok((address, stream));
                        break;
                    }
                    Err(error) => found = Err(error.to_string()),
                }
            }
            // At the end nobody waits for it any more.
            let _ = happen.send(Happening::Sought(found));
        };
        if let Err(error) = thread::Builder::new().name("seek-standby".into()).spawn(seek) {
            self.not_found(error.to_string());
        }
    }

    pub(super) fn not_found(&mut self, reason: String) {
        if self.sought.as_ref() != Some(&reason) {
            self.events.tell(Report::Seeking { reason: reason.clone() });
            self.sought = Some(reason);
        }
        self.seek_pause = (self.seek_pause * 2).min(SEEK_AGAIN);
        self.seek_standby(self.seek_pause);
    }

    /// Where the standbys are that the guest has, if it is mirrored.
    fn standbys(&self) -> Vec<Address> {
        let handles = lock(&self.mirror);
        let status = handles.as_ref().and_then(|handles| handles.status.status());
        status
            .map(|status| status.standbys.into_iter().map(|figures| figures.address).collect())
            .unwrap_or_default()
    }

    /// Looks after `pause` whether a mirrored guest has as many standbys as it is to have.
    fn seek_more(&mut self, pause: Duration) {
        let several = self.section.as_ref().is_some_and(|section| section.standbys_at_once > 1);
        if several && self.notifier.is_some() {
            self.seek_pause = pause;
            self.seek_standby(SEEK_AGAIN.max(pause));
        }
    }

    /// A standby can be reached. A running guest goes on if it cannot be mirrored, unless it is live elsewhere: then this
    /// side ends.
    pub(super) fn found(&mut self, address: Address, stream: Stream) -> Option<Over> {
        let section = self.section.clone()?;
        if let Some(notifier) = &self.notifier {
            notifier.join(address, stream);
            // One that does not take the guest is not tried at once again.
            self.turned_down += 1;
            self.seek_more((self.seek_pause * 2).min(SEEK_MORE));
            return None;
        }
        // Meanwhile it was stopped, or attached by hand.
        if self.paused.load(Ordering::Acquire) || self.ended.is_some() {
            self.seek_standby(self.seek_pause);
            return None;
        }
        let machine = self.running.take()?;
        let failure = self.mirror_over(Some(stream), address, machine, &section).err()?;
        let AttachFailure { error, guest } = *failure;
        let reason = error.to_string();
        if matches!(error, AttachError::NotOwner { .. }) {
            self.running = Some(guest.machine);
            self.console.freeze();
            self.events.tell(Report::Frozen { reason });
            return Some(Over::Elsewhere(ExitStatus::Frozen));
        }
        self.running = Some(guest.machine);
        self.not_found(reason);
        None
    }

    /// Opens the place where this side waits once another one runs the guest, so that it is known to be had.
    pub(super) fn open_node(&mut self, section: &MirrorSection) -> Result<(), AttachError> {
        let (Some(listen), None) = (&section.listen, &self.node) else { return Ok(()) };
        let setup = Setup {
            listen: listen.clone(),
            second_listen: section.second_listen.clone(),
            name: self.name.replacen("primary", "standby", 1),
            witness: section.open_witness()?,
            console: Arc::clone(&self.console),
            resources: self.places.clone(),
            occupied: true,
        };
        self.node = Some(Node::open(setup, Arc::clone(&self.events), self.happen.clone())?);
        Ok(())
    }

    /// Mirrors the guest to the first standby that can be reached.
    pub(super) fn mirror(
        &mut self,
        machine: Machine,
        section: &MirrorSection,
    ) -> Result<(), Box<AttachFailure<StartsMirrored>>> {
        let mut guest = StartsMirrored { machine, suspended: false };
        let mut last = None;
        for address in section.standby.all() {
            match self.mirror_over(None, address.clone(), guest.machine, section) {
                Ok(()) => return Ok(()),
                Err(failure) => {
                    guest = failure.guest;
                    let unreachable = matches!(failure.error, AttachError::Link(_));
                    last = Some(failure.error);
                    if !unreachable {
                        break;
                    }
                }
            }
        }
        let error = last.unwrap_or_else(|| io::Error::other("no standby is named").into());
        Err(Box::new(AttachFailure { error, guest }))
    }

    pub(super) fn mirror_over(
        &mut self,
        stream: Option<Stream>,
        standby: Address,
        machine: Machine,
        section: &MirrorSection,
    ) -> Result<(), Box<AttachFailure<StartsMirrored>>> {
        let suspended = self.suspended.load(Ordering::Acquire);
        let guest = StartsMirrored { machine, suspended };
        let witness = match section.open_witness() {
            Ok(witness) => witness,
            Err(error) => return Err(Box::new(AttachFailure { error: error.into(), guest })),
        };
        if let Err(error) = guest.machine.fence_disks(witness.is_some()) {
            let error = AttachError::Guest(Box::new(error));
            return Err(Box::new(AttachFailure { error, guest }));
        }
        let options = primary::Options {
            settings: Settings { suspended, ..section.settings() },
            guid: section.guid.or(self.guid).unwrap_or_else(Uuid::new_v4),
            name: self.name.clone(),
            term: self.term,
            witness,
            standby,
            staging_pages: section.staging_pages(),
        };
        let guid = options.guid;
        let log = Arc::clone(&self.events);
        let watcher = Arc::new(move |report| log.tell(report));
        let console = Arc::clone(&self.console);
        let attached = match stream {
            Some(stream) => primary::attach_over(stream, guest, console, options, watcher),
            None => primary::attach(guest, console, options, watcher),
        };
        let handle = attached.map_err(Box::new)?;
        self.guid = Some(guid);
        self.sought = None;
        self.notifier = Some(handle.notifier());
        let (status, notifier) = (handle.status_handle(), Some(handle.notifier()));
        *lock(&self.mirror) = Some(MirrorHandles { status, notifier });
        self.seek_more(SEEK_FIRST);
        let happen = self.happen.clone();
        let waiting = thread::Builder::new().name("mirror-end".into()).spawn(move || {
            let (outcome, guest) = handle.wait();
            let _ = happen.send(Happening::MirrorEnded(outcome, Box::new(guest)));
        });
        if let Err(error) = waiting {
            // The mirror goes on; only its end will not be noticed here.
            self.events.tell(Report::Failed { reason: format!("cannot start a thread: {error}") });
        }
        Ok(())
    }

    /// The mirror has given the guest back.
    pub(super) fn mirror_ended(&mut self, outcome: Outcome, guest: StartsMirrored) -> Option<Over> {
        let StartsMirrored { mut machine, .. } = guest;
        match outcome {
            Outcome::Frozen | Outcome::HandedOver => {
                self.running = Some(machine);
                let frozen = outcome == Outcome::Frozen;
                return Some(Over::Elsewhere(if frozen { ExitStatus::Frozen } else { ExitStatus::Success }));
            }
            Outcome::Solo(term) | Outcome::Detached(term) | Outcome::Suspended(term) => {
                self.term = Some(term);
            }
            Outcome::Ended => {}
        }
        let suspended = matches!(outcome, Outcome::Suspended(_));
        self.suspended.store(suspended, Ordering::Release);
        if !suspended && !self.paused.load(Ordering::Acquire) {
            // It has not run yet if the standby turned it down.
            machine.start();
        }
        self.notifier = None;
        if let Some(handles) = &mut *lock(&self.mirror) {
            handles.notifier = None;
            if handles.status.status().is_some_and(|status| status.epoch != Epoch::NONE) {
                (self.seek_pause, self.turned_down) = (SEEK_FIRST, 0);
            } else {
                // The next one is tried first, then.
                self.turned_down += 1;
            }
        }
        self.running = Some(machine);
        match outcome {
            Outcome::Solo(_) | Outcome::Suspended(_) => {
                self.seek_pause = (self.seek_pause * 2).min(SEEK_AGAIN);
                self.seek_standby(self.seek_pause);
            }
            // As was wished.
            _ => self.seek_at = None,
        }
        None
    }

    /// A guest that stands still because it has no standby goes on without one.
    pub(super) fn go_on_alone(&mut self) -> Result<(), String> {
        let machine = self.running.as_mut().ok_or("the guest is being mirrored again; wait for that")?;
        self.console.pass();
        Guest::pass_output(machine);
        if !self.paused.load(Ordering::Acquire) {
            machine.start();
        }
        self.suspended.store(false, Ordering::Release);
        let term = self.term.unwrap_or(Term(0));
        self.events.tell(Report::Thawed { term });
        self.events.tell(Report::Solo { term });
        Ok(())
    }

    /// Begins to mirror a guest that runs.
    pub(super) fn attach(&mut self, section: &MirrorSection, stage: &Stage) -> Result<(), String> {
        if self.paused.load(Ordering::Acquire) {
            return Err("a guest that stands still cannot be mirrored; resume it first".into());
        }
        section.check().map_err(|(field, reason)| format!("{field}: {reason}"))?;
        let mirrored = "the guest is mirrored already; detach it from its standby first";
        let machine = self.running.take().ok_or(mirrored)?;
        let waits = self.node.is_some();
        if let Err(error) = self.open_node(section) {
            self.running = Some(machine);
            return Err(error.to_string());
        }
        match self.mirror(machine, section) {
            Ok(()) => {
                self.section = Some(section.clone());
                self.seek_at = None;
                self.seek_more(SEEK_FIRST);
                stage.note_mirror(section);
                Ok(())
            }
            Err(failure) => {
                self.running = Some(failure.guest.machine);
                if !waits {
                    self.node = None;
                }
                Err(failure.error.to_string())
            }
        }
    }
}

/// A guest that runs before it is mirrored owns no term yet: it must not run at all if somebody else does.
pub(super) fn refuse_if_live_elsewhere(section: &MirrorSection) -> Result<(), AttachError> {
    let (Some(witness), Some(guid)) = (section.open_witness()?, section.guid) else { return Ok(()) };
    match witness.read(guid)? {
        Some(Record { term, owner, .. }) => Err(AttachError::NotOwner { guid, term, owner }),
        None => Ok(()),
    }
}
