//! What a primary with several standbys promises, and they to it.

mod sim;

use std::time::Duration;

use mirror::ids::{Epoch, LinkId, Term};
use mirror::memory::PAGE_SIZE;
use mirror::primary::{Action, Event, Phase, Primary, Settings, Standing};
use mirror::report::Report;
use mirror::standby;
use mirror::wire::header::Kind;
use mirror::wire::message::{Access, AllocationHeader, Message, Policy, Space};
use mirror::witness::Claim;

use sim::guest::layout;
use sim::primary_host::{FIRST, GUID};
use sim::seat::{self, header, reported, runs, said, witness};

const A: LinkId = 1;
const B: LinkId = 2;
const C: LinkId = 3;

/// The primary's state machine by itself.
struct Seat {
    primary: Primary,
    now: Duration,
}

impl Seat {
    /// In lockstep with these.
    fn with(links: &[LinkId], settings: Settings) -> Self {
        let primary = Primary::new(settings, GUID, FIRST, layout(), b"machine".to_vec());
        let mut seat = Self { primary, now: Duration::from_secs(1) };
        for &link in links {
            seat.seed(link);
            let epoch = seat.primary.epoch().next();
            seat.feed(Event::Staged { output_end: 10 * epoch.0 });
            let part: Vec<LinkId> = seat.primary.sessions().keys().copied().collect();
            for &link in &part {
                seat.feed(Event::EpochSent { link });
            }
            for &link in &part {
                seat.acknowledge(link, epoch);
            }
            assert_eq!(seat.primary.epoch(), epoch);
        }
        seat
    }

    fn three() -> Self {
        Self::with(&[A, B, C], Settings { has_witness: true, ..Settings::default() })
    }

    /// One more standby, until it is ready for its first epoch.
    fn seed(&mut self, link: LinkId) {
        let policy = Policy { block_size: PAGE_SIZE as u32 };
        let header = AllocationHeader { layout: layout(), guid: GUID, epoch: Epoch::NONE, policy };
        self.feed(Event::Connected { link });
        self.hear(link, Message::SpaceResponse(Space::Granted));
        self.hear(link, Message::Allocated);
        let term = self.primary.term();
        self.hear(link, Message::LockResponse { term, owner: "primary".into(), access: Access::None });
        self.hear(link, Message::HeaderResponse(header));
        self.hear(link, Message::AllocateReadResponse);
        self.feed(Event::Tracking { link, pages: 0 });
        self.feed(Event::RoundSent { link, pages: 0, bytes: 0 });
        self.hear(link, Message::RoundAck { round: 1 });
        self.feed(Event::Harvested { link, pages: 0, disks_lag: false });
    }

    /// The next epoch has been sent to everybody.
    fn committing(&mut self) -> Epoch {
        let next = self.primary.epoch().next();
        self.tick(30);
        self.feed(Event::Staged { output_end: 10 * next.0 });
        for link in self.primary.sessions().keys().copied().collect::<Vec<_>>() {
            self.feed(Event::EpochSent { link });
        }
        next
    }

    fn feed(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        self.primary.handle(self.now, event, &mut actions);
        actions
    }

    fn hear(&mut self, link: LinkId, message: Message) -> Vec<Action> {
        let header = header(Kind::Message, GUID, self.primary.term(), Epoch::NONE, 0);
        self.feed(Event::Received { link, header, message })
    }

    fn acknowledge(&mut self, link: LinkId, epoch: Epoch) -> Vec<Action> {
        let header = header(Kind::Message, GUID, self.primary.term(), epoch, 0);
        self.feed(Event::Received { link, header, message: Message::CommitAck })
    }

    fn lose(&mut self, link: LinkId) -> Vec<Action> {
        self.feed(Event::LinkLost { link, reason: "closed".into() })
    }

    fn tick(&mut self, ms: u64) -> Vec<Action> {
        self.now += Duration::from_millis(ms);
        let produced = 10 * self.primary.epoch().0;
        self.feed(Event::Tick { produced, released: 0, waits: false, dirty: None })
    }

    fn grant(&mut self, term: Term) -> Vec<Action> {
        self.feed(Event::Claimed(Claim::Granted(term)))
    }
}

fn sent(actions: &[Action]) -> Vec<(LinkId, Message)> {
    let message = |action: &Action| match action {
        Action::Send { link, message, .. } => Some((*link, message.clone())),
        _ => None,
    };
    actions.iter().filter_map(message).collect()
}

fn releases(actions: &[Action]) -> bool {
    actions.iter().any(|action| matches!(action, Action::Release { .. } | Action::PassOutput))
}

fn asks(actions: &[Action]) -> Option<Term> {
    actions.iter().find_map(|action| match action {
        Action::Claim { expected } => Some(*expected),
        _ => None,
    })
}

const NEXT: Term = Term(FIRST.0 + 1);
const AFTER: Term = Term(FIRST.0 + 2);

#[test]
fn epoch_is_released_when_everybody_that_follows_has_acknowledged_it() {
    let mut seat = Seat::three();
    let epoch = seat.committing();

    assert!(!releases(&seat.acknowledge(B, epoch)));
    assert!(!releases(&seat.acknowledge(A, epoch)));
    assert!(releases(&seat.acknowledge(C, epoch)));
}

#[test]
fn standby_that_is_being_seeded_holds_no_epoch_up() {
    let mut seat = Seat::with(&[A], Settings::default());
    seat.feed(Event::Connected { link: B });
    let epoch = seat.committing();

    assert!(releases(&seat.acknowledge(A, epoch)));
}

#[test]
fn acknowledgement_that_comes_twice_counts_once() {
    let mut seat = Seat::with(&[A, B], Settings::default());
    let epoch = seat.committing();
    seat.acknowledge(A, epoch);

    assert!(!releases(&seat.acknowledge(A, epoch)));
    assert!(!seat.primary.sessions().contains_key(&A), "who says so twice is not trusted");
}

#[test]
fn nothing_is_released_between_the_loss_of_one_that_follows_and_the_grant() {
    let mut seat = Seat::three();
    let epoch = seat.committing();
    seat.acknowledge(B, epoch);
    seat.acknowledge(C, epoch);

    let told = seat.lose(A);
    assert_eq!(
        sent(&told),
        [(B, Message::Renew { term: NEXT }), (C, Message::Renew { term: NEXT })],
        "those who are left learn of the term first"
    );
    assert!(!releases(&told) && asks(&told).is_none());
    assert!(asks(&seat.hear(B, Message::Renewed { term: NEXT })).is_none());
    let asked = seat.hear(C, Message::Renewed { term: NEXT });
    assert_eq!(asks(&asked), Some(FIRST));
    assert!(!releases(&asked));
    assert!(!releases(&seat.feed(Event::Claimed(Claim::Unreachable("gone".into())))));
    let granted = seat.grant(NEXT);
    assert!(releases(&granted), "{granted:?}");
    assert_eq!((seat.primary.phase(), seat.primary.term()), (Phase::Lockstep, NEXT));
}

#[test]
fn one_that_was_told_of_the_next_term_and_is_lost_then_is_shut_out_by_the_one_after() {
    let mut seat = Seat::three();
    seat.lose(A);
    seat.hear(B, Message::Renewed { term: NEXT });

    // It may have heard of the term, too, and its answer be lost.
    let asked = seat.lose(C);
    assert_eq!(asks(&asked), Some(FIRST));
    let granted = seat.grant(NEXT);
    assert!(!releases(&granted));
    assert_eq!(sent(&granted), [(B, Message::Renew { term: AFTER })]);
    assert_eq!(asks(&seat.hear(B, Message::Renewed { term: AFTER })), Some(NEXT));
    seat.grant(AFTER);
    let epoch = seat.committing();
    assert!(releases(&seat.acknowledge(B, epoch)));
}

#[test]
fn the_last_one_that_was_told_of_the_next_term_and_is_lost_is_shut_out_before_the_guest_goes_on_alone() {
    let mut seat = Seat::with(&[A, B], Settings::default());
    seat.lose(A);

    assert_eq!(asks(&seat.lose(B)), Some(FIRST));
    let granted = seat.grant(NEXT);
    assert!(!releases(&granted));
    assert_eq!(asks(&granted), Some(NEXT));
    assert!(releases(&seat.grant(AFTER)));
    assert_eq!(seat.primary.phase(), Phase::Solo);
}

#[test]
fn primary_whose_lost_standby_has_won_freezes_although_others_follow() {
    let mut seat = Seat::with(&[A, B], Settings { has_witness: true, ..Settings::default() });
    seat.lose(A);
    seat.hear(B, Message::Renewed { term: NEXT });

    let actions = seat.feed(Event::Claimed(Claim::Refused { term: NEXT, owner: "standby a".into() }));

    assert!(actions.contains(&Action::Freeze) && actions.contains(&Action::Close(B)), "{actions:?}");
}

#[test]
fn one_that_lags_is_done_without_where_enough_have_acknowledged() {
    let settings = Settings { quorum: Some(2), ..Settings::default() };
    let mut seat = Seat::with(&[A, B, C], settings.clone());
    let epoch = seat.committing();
    seat.acknowledge(A, epoch);
    let heard = |seat: &mut Seat| {
        for link in [A, B, C] {
            seat.hear(link, standby::HEARTBEAT);
        }
    };
    for _ in 0..6 {
        heard(&mut seat);
        seat.tick(50);
    }
    assert_eq!(seat.primary.sessions().len(), 3, "one is not enough");
    seat.acknowledge(B, epoch);
    heard(&mut seat);
    let left = seat.tick(50);
    assert!(left.contains(&Action::Close(C)), "{left:?}");
    seat.hear(A, Message::Renewed { term: NEXT });
    seat.hear(B, Message::Renewed { term: NEXT });
    assert!(releases(&seat.grant(NEXT)));
}

#[test]
fn those_who_have_acknowledged_are_told_that_others_are_waited_for() {
    let mut seat = Seat::with(&[A, B], Settings::default());
    let epoch = seat.committing();
    seat.acknowledge(A, epoch);

    let told = sent(&seat.tick(50));

    assert!(told.contains(&(A, Message::Waiting)), "{told:?}");
    assert!(!told.contains(&(B, Message::Waiting)), "{told:?}");
}

#[test]
fn one_that_does_not_follow_yet_is_left_without_the_witness() {
    let mut seat = Seat::with(&[A], Settings::default());
    seat.feed(Event::Connected { link: B });
    let actions = seat.lose(B);
    assert!(asks(&actions).is_none());
    assert!(matches!(actions[1], Action::Report(Report::StandbyLeft { standbys: 1, .. })), "{actions:?}");
    assert_eq!(seat.primary.phase(), Phase::Lockstep);
}

#[test]
fn standby_that_was_named_gets_the_guest() {
    let mut seat = Seat::three();
    seat.feed(Event::Switchover { to: Some(B) });
    let epoch = seat.primary.epoch().next();
    seat.feed(Event::Staged { output_end: 10 * epoch.0 });
    for link in [A, B, C] {
        seat.acknowledge(link, epoch);
    }
    let told = sent(&seat.feed(Event::Drained(Ok(0))));
    assert_eq!(told, [(B, Message::ReleasePointer { released: 0 })]);
    assert_eq!(seat.primary.sessions()[&A].standing(), Standing::Following);
}

/// A standby that has been told of the next term.
fn announced() -> seat::Seat {
    let mut seat = seat::Seat::shadowing(witness());
    let actions = seat.say(1, Message::Renew { term: NEXT });
    assert_eq!(said(&actions), [(1, Message::Renewed { term: NEXT })]);
    seat
}

fn lost() -> standby::Event {
    standby::Event::LinkLost { link: 1, reason: "closed".into() }
}

fn refused(owner: &str) -> standby::Event {
    standby::Event::Claimed(Claim::Refused { term: NEXT, owner: owner.into() })
}

#[test]
fn standby_takes_over_from_its_primary_in_the_term_that_was_announced() {
    let mut seat = announced();
    seat.feed(lost());
    let actions = seat.feed(refused("primary"));
    assert!(matches!(actions[..], [standby::Action::Claim { expected: NEXT, .. }]), "{actions:?}");
    assert!(runs(&seat.feed(standby::Event::Claimed(Claim::Granted(AFTER)))));
}

#[test]
fn standby_does_not_follow_another_side_into_the_term_that_was_announced() {
    let mut seat = announced();
    seat.feed(lost());
    let actions = seat.feed(refused("standby b"));
    assert!(matches!(reported(&actions)[..], [Report::Refused { .. }]), "{actions:?}");
}

#[test]
fn standby_does_not_follow_its_primary_into_a_term_that_was_not_announced() {
    let mut seat = seat::Seat::shadowing(witness());
    seat.feed(lost());
    let actions = seat.feed(refused("primary"));
    assert!(matches!(reported(&actions)[..], [Report::Refused { .. }]), "{actions:?}");
}

#[test]
fn only_the_next_term_can_be_announced() {
    let mut seat = seat::Seat::shadowing(witness());
    let actions = seat.say(1, Message::Renew { term: AFTER });
    assert!(actions.iter().any(|action| matches!(action, standby::Action::Close(1))), "{actions:?}");
}
