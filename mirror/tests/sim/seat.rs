//! The standby's state machine by itself, with whoever a test wants on its links.

use std::time::Duration;

use mirror::digest::Digest;
use mirror::ids::{Epoch, Guid, Term};
use mirror::memory::PAGE_SIZE;
use mirror::report::Report;
use mirror::standby::{Action, Event, LinkId, Standby, WitnessView};
use mirror::wire::header::{Header, Kind};
use mirror::wire::message::{Body, Commit, Message, Policy};
use mirror::wire::pages::{BatchEncoder, BufferPool};
use mirror::witness::Record;

use super::guest::layout;
use super::primary_host::{FIRST, GUID};

/// Bytes that this standby has for guests.
pub const SPACE: u64 = 1 << 30;

/// A header that somebody sends.
pub fn header(kind: Kind, guid: Guid, term: Term, epoch: Epoch, checksum: u64) -> Header {
    Header { kind, guid, term, epoch, sequence: 0, length: 0, checksum }
}

/// The allocation that the tests agree on.
pub fn allocate() -> Message {
    Message::Allocate {
        layout: layout(),
        policy: Policy { block_size: PAGE_SIZE as u32 },
        machine: b"machine".to_vec(),
        heartbeat_ms: 50,
        misses: 4,
    }
}

/// A standby, and the digest of what it was sent.
pub struct Seat {
    /// The state machine.
    pub standby: Standby,
    /// The time.
    pub now: Duration,
    digest: Digest,
    sent: u64,
}

impl Seat {
    /// A standby that nobody has spoken to.
    pub fn empty() -> Self {
        let standby = Standby::new("standby", SPACE);
        Self { standby, now: Duration::from_secs(1), digest: Digest::default(), sent: 0 }
    }

    /// A standby that receives from link 1 in the first term.
    pub fn receiving(witness: WitnessView) -> Self {
        let mut seat = Self::empty();
        seat.say(1, Message::SpaceRequest { bytes: layout().bytes(), wait: false });
        seat.say(1, allocate());
        seat.feed(Event::Allocated { machine: Ok(Vec::new()), witness });
        seat.say(1, Message::AllocateRead);
        seat
    }

    /// One that holds epoch 1.
    pub fn shadowing(witness: WitnessView) -> Self {
        let mut seat = Self::receiving(witness);
        seat.round(1);
        let actions = seat.epoch(Epoch(1), b"first");
        assert!(actions.iter().any(|action| matches!(action, Action::Apply(_))), "{actions:?}");
        seat
    }

    /// Feeds an event.
    pub fn feed(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        self.standby.handle(self.now, event, &mut actions);
        actions
    }

    /// A message in the first term, outside any epoch.
    pub fn say(&mut self, link: LinkId, message: Message) -> Vec<Action> {
        self.say_as(link, FIRST, Epoch::NONE, message)
    }

    /// A message in a term and an epoch.
    pub fn say_as(&mut self, link: LinkId, term: Term, epoch: Epoch, message: Message) -> Vec<Action> {
        self.sent += 1;
        if matches!(message, Message::WriteState(_) | Message::WriteLog(_) | Message::WriteOutput { .. }) {
            self.digest.add(self.sent);
        }
        let header = header(Kind::Message, GUID, term, epoch, self.sent);
        self.feed(Event::Received { link, header, body: Body::Message(message) })
    }

    /// A page full of `fill`.
    pub fn page(&mut self, epoch: Epoch, page: u32, fill: u8) -> Vec<Action> {
        self.sent += 1;
        self.digest.add(self.sent);
        let header = header(Kind::Pages, GUID, FIRST, epoch, self.sent);
        let mut encoder = BatchEncoder::new();
        let body = [fill; PAGE_SIZE];
        encoder.encode(&[page], &body);
        let payload = encoder.pieces(&body).collect::<Vec<_>>().concat();
        let mut buffer = BufferPool::default().take(payload.len());
        buffer.copy_from_slice(&payload);
        self.feed(Event::Received { link: 1, header, body: Body::Pages(buffer) })
    }

    /// The digest since it was last taken.
    pub fn digest(&mut self) -> u64 {
        std::mem::take(&mut self.digest).value()
    }

    /// A seeding round of one page.
    pub fn round(&mut self, round: u32) -> Vec<Action> {
        self.page(Epoch::NONE, 5, 1);
        let digest = self.digest();
        self.say(1, Message::RoundEnd { round, pages: 1, digest })
    }

    /// A whole epoch of one page and ten bytes of output.
    pub fn epoch(&mut self, epoch: Epoch, state: &[u8]) -> Vec<Action> {
        self.parts(epoch, state);
        let commit = self.commit(epoch);
        self.say_as(1, FIRST, epoch, Message::Commit(commit))
    }

    /// All of an epoch but its commit.
    pub fn parts(&mut self, epoch: Epoch, state: &[u8]) {
        self.page(epoch, 6, epoch.0 as u8);
        self.say_as(1, FIRST, epoch, Message::WriteState(state.to_vec()));
        let start = (epoch.0 - 1) * 10;
        self.say_as(1, FIRST, epoch, Message::WriteOutput { start, bytes: vec![b'x'; 10] });
    }

    /// The commit that goes with what was sent.
    pub fn commit(&mut self, epoch: Epoch) -> Commit {
        Commit { pages: 1, digest: self.digest(), output_end: epoch.0 * 10, released: 0 }
    }
}

/// A witness that knows the primary.
pub fn witness() -> WitnessView {
    WitnessView::Record(Some(Record { guid: GUID, term: FIRST, owner: "primary".into(), revision: 1 }))
}

/// The messages among `actions`, with the links they go to.
pub fn said(actions: &[Action]) -> Vec<(LinkId, Message)> {
    let message = |action: &Action| match action {
        Action::Send { link, message, .. } => Some((*link, message.clone())),
        _ => None,
    };
    actions.iter().filter_map(message).collect()
}

/// The reports among `actions`.
pub fn reported(actions: &[Action]) -> Vec<Report> {
    let report = |action: &Action| match action {
        Action::Report(report) => Some(report.clone()),
        _ => None,
    };
    actions.iter().filter_map(report).collect()
}

/// Whether `actions` run the guest.
pub fn runs(actions: &[Action]) -> bool {
    actions.iter().any(|action| matches!(action, Action::Activate { .. }))
}
