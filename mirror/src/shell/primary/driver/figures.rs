//! What is told to whoever asks.

use std::sync::atomic::Ordering;

use super::Driver;
use crate::guest::Guest;
use crate::ids::LinkId;
use crate::primary::Session;
use crate::shell::primary::status::{StandbyFigures, Status};
use crate::shell::second_link::Beating;

impl<G: Guest + 'static> Driver<G> {
    pub(super) fn publish(&self) {
        let figures = |(link, session): (&LinkId, &Session)| {
            let peer = self.peers.get(link)?;
            Some(StandbyFigures {
                address: peer.address.clone(),
                standing: session.standing().name().into(),
                acknowledged: session.acknowledged(),
                second_link_up: self.second_links.get(link).map(Beating::is_up),
                seeding_round: session.round(),
                seeding_pages: peer.round_pages,
                seeding_sent: peer.round_sent.load(Ordering::Relaxed),
            })
        };
        let standbys: Vec<_> = self.core.sessions().iter().filter_map(figures).collect();
        let first = standbys.first();
        let sense = self.core.sessions().values().next().map(|session| session.sense().clone());
        self.shared.publish(Status {
            role: "primary".into(),
            phase: self.core.phase().name().into(),
            guid: self.core.guid(),
            term: self.core.term(),
            epoch: self.core.epoch(),
            standby: first.map_or_else(|| self.options.standby.clone(), |first| first.address.clone()),
            witness: self.options.witness.is_some(),
            round: first.map_or(0, |first| first.seeding_round),
            round_pages: first.map_or(0, |first| first.seeding_pages),
            round_sent: first.map_or(0, |first| first.seeding_sent),
            pages: self.memory.layout().pages(),
            seed_pages: self.counters.seed_pages,
            seed_bytes: self.counters.seed_bytes,
            epoch_pages: self.counters.epoch_pages,
            epoch_bytes: self.counters.epoch_bytes,
            epochs_stalled: self.counters.epochs_stalled,
            held_bytes: self.console.held(),
            disk_sync: self.guest.disk_sync(None),
            standby_sense: sense.unwrap_or_default(),
            standbys,
            times: self.times.summary(),
        });
    }
}
