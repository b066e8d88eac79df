//! Each standby's link, and what it is sent while it is seeded.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Driver, Failure};
use crate::guest::Guest;
use crate::ids::{Epoch, LinkId};
use crate::link::{Address, FrameWriter, Stream};
use crate::primary::{Event, Phase, Settings};
use crate::report::Report;
use crate::resync::Seed;
use crate::shell::primary::handle::Input;
use crate::shell::primary::peer::{Peer, start_reader};
use crate::shell::pulse::{Pulse, calmly};
use crate::shell::second_link::SecondLink;

/// How long the reader of a closed link may take to come to its end.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// A link that takes nothing for as long as the other side may be silent is lost; earlier where others would take the wait
/// for a standstill of this side: it is theirs as well, and all but one of them may have this side wait, one after the other.
pub(in crate::shell::primary) fn limit_patience(stream: &Stream, settings: &Settings) -> io::Result<()> {
    let silence = settings.heartbeat * settings.misses;
    let others = settings.standbys.saturating_sub(1);
    stream.set_write_timeout(if others > 0 { silence.min(settings.stall / (2 * others)) } else { silence })
}

impl<G: Guest + 'static> Driver<G> {
    /// Starts the threads of one more standby.
    pub(super) fn link_to(&mut self, address: Address, stream: Stream) -> io::Result<LinkId> {
        limit_patience(&stream, self.core.settings())?;
        let (link, stream) = (self.next_link, Arc::new(stream));
        self.next_link += 1;
        start_reader(link, Arc::clone(&stream), self.sender.clone())?;
        let writer = FrameWriter::new(stream);
        let pulse = Pulse {
            writer: writer.clone(),
            guid: self.core.guid(),
            term: Arc::clone(&self.term),
            console: Arc::clone(&self.console),
            interval: self.core.settings().heartbeat,
            epoch_within_ms: Arc::clone(&self.epoch_within_ms),
        };
        pulse.start()?;
        self.peers.insert(link, Peer::new(address, writer, self.memory.layout().pages()));
        Ok(link)
    }

    /// A link could not be written to. If the other side has closed it, what it said last tells why, and its reader comes
    /// to that end by itself.
    pub(super) fn link_failed(&mut self, link: LinkId, error: &io::Error) -> Vec<Event> {
        let mut events = Vec::new();
        if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) {
            let mut others = VecDeque::new();
            let until = Instant::now() + LAST_WORDS;
            let mut heard = std::mem::take(&mut self.backlog);
            loop {
                let next = heard.pop_front().or_else(|| {
                    self.inputs.recv_timeout(until.saturating_duration_since(Instant::now())).ok()
                });
                match next {
                    Some(Input::Frame(from, header, message)) if from == link => {
                        events.push(Event::Received { link, header, message });
                    }
                    Some(Input::LinkLost(from, reason)) if from == link => {
                        events.push(Event::LinkLost { link, reason });
                        break;
                    }
                    Some(other) => others.push_back(other),
                    None => break,
                }
            }
            others.append(&mut heard);
            self.backlog = others;
        }
        events.push(Event::LinkLost { link, reason: error.to_string() });
        events
    }

    pub(super) fn close(&mut self, link: LinkId) {
        let Some(peer) = self.peers.remove(&link) else { return };
        self.guest.part(link);
        if self.core.phase() == Phase::Ended {
            peer.close(Shutdown::Write);
            self.farewells.insert(link, peer.writer);
        } else {
            peer.close(Shutdown::Both);
        }
    }

    pub(super) fn agree(&mut self, link: LinkId, disks: &[u8]) -> Result<(), Failure> {
        if let Some(peer) = self.peers.get_mut(&link) {
            peer.has_disks = !disks.is_empty();
            // Others may have the right images.
            self.guest.agree(link, disks).map_err(|error| Failure::Link(link, error.to_string()))?;
            self.report_disks(link);
        }
        Ok(())
    }

    /// A standby names an address for the second link. It must be of the kind by which it was reached: nobody is to choose
    /// among this host's own sockets.
    pub(super) fn beat_at(&mut self, link: LinkId, address: &str) -> Result<(), Failure> {
        let Some(peer) = self.peers.get(&link) else { return Ok(()) };
        let second = match address.parse::<Address>() {
            Ok(second) if second.is_like(&peer.address) => second,
            Ok(second) => {
                let reason = format!(
                    "the second link of {} cannot be {second}, an address of another kind",
                    peer.address
                );
                return Err(Failure::Link(link, reason));
            }
            Err(reason) => return Err(Failure::Link(link, format!("its second link: {reason}"))),
        };
        let beating = SecondLink {
            address: second,
            guid: self.core.guid(),
            term: Arc::clone(&self.term),
            interval: self.core.settings().heartbeat,
            watcher: Arc::clone(&self.watcher),
        };
        let beating = beating.start().map_err(|error| Failure::Io(link, error))?;
        self.second_links.insert(link, beating);
        Ok(())
    }

    /// Finds out what a standby is to be sent, from now on.
    pub(super) fn track(&mut self, link: LinkId) -> Result<Option<Event>, Failure> {
        if !self.tracking {
            // The guest may begin with it.
            calmly(|| self.guest.start_tracking())?;
            self.tracking = true;
        }
        let seed = Seed::of(self.core.guid(), self.core.term());
        let Some(peer) = self.peers.get_mut(&link) else { return Ok(None) };
        self.guest.populated(&mut peer.dirty)?;
        std::mem::take(&mut peer.held).leave_out(&mut peer.dirty, &self.memory, seed);
        Ok(Some(Event::Tracking { link, pages: peer.dirty.count() }))
    }

    pub(super) fn harvest(&mut self, link: LinkId) -> Result<Option<Event>, Failure> {
        self.fresh.clear();
        let harvested = self.guest.harvest(&mut self.fresh);
        for peer in self.peers.values_mut() {
            peer.dirty.union(&self.fresh);
        }
        harvested?;
        self.flight.note_given_back(&mut self.guest, &self.fresh);
        let disks_lag = self.guest.disk_sync(Some(link)).lags;
        let peer = self.peers.get(&link);
        Ok(peer.map(|peer| Event::Harvested { link, pages: peer.dirty.count(), disks_lag }))
    }

    pub(super) fn send_round(&mut self, link: LinkId, round: u32) -> Result<(), Failure> {
        let mut log = Vec::new();
        if self.peers.get(&link).is_some_and(|peer| peer.has_disks) {
            self.guest.sync_disks(link, &mut log)?;
            self.report_disks(link);
        }
        let stamp = self.stamp(Epoch::NONE);
        let others = (self.sender.clone(), Arc::clone(&self.watcher));
        let memory = self.memory.clone();
        let Some(peer) = self.peers.get_mut(&link) else { return Ok(()) };
        peer.send_round(link, round, memory, stamp, log, others).map_err(|error| Failure::Io(link, error))
    }

    /// Tells how much of the disks is still to be sent.
    fn report_disks(&self, link: LinkId) {
        let sync = self.guest.disk_sync(Some(link));
        if sync.bytes > 0 {
            (self.watcher)(Report::DiskSync { bytes: sync.bytes, left: sync.left });
        }
    }
}
