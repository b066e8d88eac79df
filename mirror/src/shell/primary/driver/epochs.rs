//! An epoch: taken in the pause, sent, and released once it is committed.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use super::{Driver, Failure};
use crate::guest::Guest;
use crate::ids::{Epoch, LinkId};
use crate::primary::Event;
use crate::report::Report;
use crate::shell::outlets::Outlet;

impl<G: Guest + 'static> Driver<G> {
    pub(super) fn take_epoch(&mut self, epoch: Epoch, links: &[LinkId]) -> Result<Event, Failure> {
        // What comes after the pause is to be told anew.
        self.output_told.store(false, Ordering::Relaxed);
        self.outlets.clear();
        self.flight.pages.clear();
        for &link in links {
            let Some(peer) = self.peers.get_mut(&link) else { continue };
            self.flight.pages.union(&peer.dirty);
            peer.dirty.clear();
            self.outlets.push(Outlet::new(link, peer.writer.clone(), peer.output_known));
        }
        self.guest.follow(links)?;
        let stamp = self.stamp(epoch);
        let keep_paused = self.standing || self.suspended || self.quiesced || self.quiesce.is_some();
        self.flight.take(
            &mut self.guest,
            &self.memory,
            &self.console,
            (&mut self.outlets, stamp),
            keep_paused,
        )?;
        self.owe_epoch();
        self.quiesced |= self.quiesce.is_some() && !self.standing;
        self.flight.output_since = self.output_since.take();
        Ok(Event::Staged { output_end: self.flight.output_end })
    }

    /// Whoever does not take part in the epoch is still to be sent what is in it.
    fn owe_epoch(&mut self) {
        for (link, peer) in &mut self.peers {
            if !self.outlets.iter().any(|outlet| outlet.link == *link) {
                peer.dirty.union(&self.flight.pages);
            }
        }
    }

    pub(super) fn send_epoch(&mut self, epoch: Epoch, events: &mut VecDeque<Event>) -> Result<(), Failure> {
        let stamp = self.stamp(epoch);
        self.flight.send(&mut self.guest, &self.console, &mut self.outlets, stamp)?;
        // It has been told of pages that were given back, too.
        self.owe_epoch();
        for mut outlet in std::mem::take(&mut self.outlets) {
            let link = outlet.link;
            if let Some(error) = outlet.failure.take() {
                events.extend(self.link_failed(link, &error));
            } else {
                if let Some(peer) = self.peers.get_mut(&link) {
                    peer.output_known = outlet.output_known;
                }
                events.push_back(Event::EpochSent { link });
            }
        }
        Ok(())
    }

    pub(super) fn release(&mut self, epoch: Epoch, output_end: u64) {
        self.console.allow(output_end);
        self.guest.release_output();
        let commit_us = self.flight.resumed.elapsed().as_micros() as u64;
        self.times.record_pause(&self.flight.pause);
        self.times.record_commit(commit_us);
        self.counters.epoch_pages += self.flight.sent_pages;
        self.counters.epoch_bytes += self.flight.sent_bytes;
        self.counters.epochs_stalled += u64::from(self.flight.stalled);
        (self.watcher)(Report::Committed {
            epoch,
            pages: self.flight.sent_pages,
            bytes: self.flight.sent_bytes,
            pause: self.flight.pause,
            commit_us,
            released: output_end,
            held_us: self.flight.output_since.take().map(|since| since.elapsed().as_micros() as u64),
            stalled: self.flight.stalled,
        });
        // A question that came after this epoch's pause is answered by the next.
        if self.quiesced
            && let Some(done) = self.quiesce.take()
        {
            // Whoever asked may have gone.
            let _ = done.send(epoch);
        }
    }
}
