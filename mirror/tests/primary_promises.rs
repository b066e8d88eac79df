//! What the primary promises whatever the standby says.

mod sim;

use std::time::Duration;

use mirror::ids::{Epoch, Guid, Term};
use mirror::memory::{Layout, PAGE_SIZE, Region};
use mirror::primary::{Action, Alone, Event, Pacing, Phase, Primary, Settings};
use mirror::report::Report;
use mirror::wire::header::Kind;
use mirror::wire::message::{Access, AllocationHeader, Message, Policy, Refusal, Space};
use mirror::witness::Claim;

use sim::guest::layout;
use sim::primary_host::{FIRST, GUID, LINK};
use sim::seat::header;

/// The primary's state machine by itself.
struct Seat {
    primary: Primary,
    now: Duration,
}

impl Seat {
    fn connected() -> Self {
        Self::connected_with(Settings::default())
    }

    fn connected_with(settings: Settings) -> Self {
        let primary = Primary::new(settings, GUID, FIRST, layout(), b"machine".to_vec());
        let mut seat = Self { primary, now: Duration::from_secs(1) };
        assert!(matches!(
            sent(&seat.feed(Event::Connected { link: LINK }))[..],
            [Message::SpaceRequest { .. }]
        ));
        seat
    }

    /// In the first seeding round.
    fn seeding() -> Self {
        Self::seeding_with(Settings::default())
    }

    fn seeding_with(settings: Settings) -> Self {
        let mut seat = Self::connected_with(settings);
        seat.hear(Message::SpaceResponse(Space::Granted));
        seat.hear(Message::Allocated);
        seat.hear(Message::LockResponse { term: FIRST, owner: "primary".into(), access: Access::None });
        seat.hear(Message::HeaderResponse(answer(layout())));
        assert_eq!(
            seat.hear(Message::AllocateReadResponse).last(),
            Some(&Action::StartTracking { link: LINK })
        );
        let actions = seat.feed(Event::Tracking { link: LINK, pages: 10 });
        assert_eq!(actions.last(), Some(&Action::SendRound { link: LINK, round: 1 }));
        seat.feed(Event::RoundSent { link: LINK, pages: 10, bytes: 40960 });
        seat
    }

    /// Seeded, with the first epoch ordered.
    fn pausing() -> Self {
        Self::pausing_with(Settings::default())
    }

    fn pausing_with(settings: Settings) -> Self {
        let mut seat = Self::seeding_with(settings);
        assert_eq!(seat.hear(Message::RoundAck { round: 1 }), [Action::Harvest { link: LINK }]);
        let actions = seat.feed(Event::Harvested { link: LINK, pages: 0, disks_lag: false });
        assert_eq!(actions[1..], [Action::Hold, Action::TakeEpoch { epoch: Epoch(1), links: vec![LINK] }]);
        seat
    }

    /// The first epoch is being sent; 10 bytes of output belong to it.
    fn committing() -> Self {
        let mut seat = Self::pausing();
        assert_eq!(seat.feed(Event::Staged { output_end: 10 }), [Action::SendEpoch { epoch: Epoch(1) }]);
        seat
    }

    /// The first epoch is committed.
    fn lockstep() -> Self {
        Self::lockstep_with(Settings::default())
    }

    fn lockstep_with(settings: Settings) -> Self {
        let mut seat = Self::pausing_with(settings);
        assert_eq!(seat.feed(Event::Staged { output_end: 10 }), [Action::SendEpoch { epoch: Epoch(1) }]);
        seat.feed(Event::EpochSent { link: LINK });
        let actions = seat.hear_as(FIRST, Epoch(1), Message::CommitAck);
        assert_eq!(actions[0], Action::Release { epoch: Epoch(1), output_end: 10 });
        seat
    }

    fn feed(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        self.primary.handle(self.now, event, &mut actions);
        actions
    }

    fn hear(&mut self, message: Message) -> Vec<Action> {
        self.hear_as(FIRST, Epoch::NONE, message)
    }

    fn hear_as(&mut self, term: Term, epoch: Epoch, message: Message) -> Vec<Action> {
        let header = header(Kind::Message, GUID, term, epoch, 0);
        self.feed(Event::Received { link: LINK, header, message })
    }

    fn lose(&mut self) -> Vec<Action> {
        self.feed(Event::LinkLost { link: LINK, reason: "closed".into() })
    }

    /// So many milliseconds later, with output up to here.
    fn tick(&mut self, ms: u64, produced: u64) -> Vec<Action> {
        self.now += Duration::from_millis(ms);
        self.feed(Event::Tick { produced, released: 0, waits: false, dirty: None })
    }
}

fn answer(layout: Layout) -> AllocationHeader {
    let policy = Policy { block_size: PAGE_SIZE as u32 };
    AllocationHeader { layout, guid: GUID, epoch: Epoch::NONE, policy }
}

fn sent(actions: &[Action]) -> Vec<Message> {
    let message = |action: &Action| match action {
        Action::Send { message, .. } => Some(message.clone()),
        _ => None,
    };
    actions.iter().filter_map(message).collect()
}

fn has(actions: &[Action], wanted: &Action) -> bool {
    actions.contains(wanted)
}

fn lets_output_leave(actions: &[Action]) -> bool {
    actions.iter().any(|action| matches!(action, Action::Release { .. } | Action::PassOutput))
}

const ASKED: Action = Action::Claim { expected: FIRST };

#[test]
fn output_waits_for_ack_or_grant() {
    let mut seat = Seat::lockstep();
    assert!(has(&seat.tick(10, 20), &Action::TakeEpoch { epoch: Epoch(2), links: vec![LINK] }));
    assert!(!lets_output_leave(&seat.feed(Event::Staged { output_end: 20 })));
    assert!(!lets_output_leave(&seat.tick(10, 30)));
    assert!(!lets_output_leave(&seat.lose()));
    assert!(!lets_output_leave(&seat.feed(Event::Claimed(Claim::Unreachable("gone".into())))));
    assert!(!lets_output_leave(&seat.hear_as(FIRST, Epoch(2), Message::CommitAck)));
    assert!(has(&seat.feed(Event::Claimed(Claim::Granted(FIRST.next()))), &Action::PassOutput));
}

#[test]
fn answer_to_another_epoch_releases_nothing() {
    for epoch in [0, 1, 3] {
        let mut seat = Seat::lockstep();
        seat.tick(30, 20);
        seat.feed(Event::Staged { output_end: 20 });
        let actions = seat.hear_as(FIRST, Epoch(epoch), Message::CommitAck);
        assert!(!lets_output_leave(&actions), "epoch {epoch}: {actions:?}");
        assert!(has(&actions, &ASKED), "epoch {epoch}: {actions:?}");
    }
}

#[test]
fn answer_without_a_commit_releases_nothing() {
    for epoch in [1, 2] {
        let mut seat = Seat::lockstep();
        let actions = seat.hear_as(FIRST, Epoch(epoch), Message::CommitAck);
        assert!(!lets_output_leave(&actions) && has(&actions, &ASKED), "{actions:?}");
    }
}

#[test]
fn primary_whose_commit_may_have_arrived_asks_the_witness() {
    let mut seat = Seat::committing();
    let actions = seat.lose();
    assert!(has(&actions, &ASKED) && has(&actions, &Action::PutBack), "{actions:?}");
    assert!(!lets_output_leave(&actions));
    assert_eq!(seat.primary.phase(), Phase::Deciding);
}

#[test]
fn lost_standby_before_first_commit_needs_no_witness() {
    for mut seat in [Seat::connected(), Seat::seeding(), Seat::pausing()] {
        let actions = seat.lose();
        assert!(has(&actions, &Action::PassOutput) && !has(&actions, &ASKED), "{actions:?}");
        assert_eq!((seat.primary.phase(), seat.primary.term()), (Phase::Solo, FIRST));
    }
}

#[test]
fn pages_of_an_unacknowledged_epoch_are_put_back() {
    let mut seat = Seat::lockstep();
    assert!(!has(&seat.lose(), &Action::PutBack), "nothing is staged between two epochs");
    let mut seat = Seat::lockstep();
    seat.tick(30, 10);
    assert!(has(&seat.lose(), &Action::PutBack));
    let mut seat = Seat::lockstep();
    seat.tick(30, 10);
    seat.feed(Event::Staged { output_end: 10 });
    assert!(has(&seat.lose(), &Action::PutBack));
}

#[test]
fn primary_that_loses_at_the_witness_freezes_for_good() {
    let mut seat = Seat::lockstep();
    seat.lose();
    let won = Claim::Refused { term: FIRST.next(), owner: "standby".into() };
    assert!(has(&seat.feed(Event::Claimed(won)), &Action::Freeze));
    let later = [
        seat.feed(Event::Claimed(Claim::Granted(FIRST.next()))),
        seat.hear_as(FIRST, Epoch(2), Message::CommitAck),
        seat.feed(Event::GuestEnded { reason: "done".into() }),
        seat.tick(1000, 99),
    ];
    assert!(later.iter().all(Vec::is_empty), "{later:?}");
    assert_eq!(seat.primary.phase(), Phase::Frozen);
}

#[test]
fn silent_witness_is_asked_again_at_every_heartbeat() {
    let mut seat = Seat::lockstep();
    seat.lose();
    for _ in 0..3 {
        seat.feed(Event::Claimed(Claim::Unreachable("gone".into())));
        assert!(seat.tick(10, 99).is_empty());
        assert_eq!(seat.tick(40, 99), [ASKED]);
    }
}

#[test]
fn guest_stands_still_while_neither_standby_nor_witness_answers_and_thaws_with_the_grant() {
    let mut seat = Seat::lockstep();
    assert!(!has(&seat.lose(), &Action::Suspend));
    let silent = || Event::Claimed(Claim::Unreachable("gone".into()));
    let actions = seat.feed(silent());
    assert!(has(&actions, &Action::Suspend) && !lets_output_leave(&actions), "{actions:?}");
    assert!(!has(&seat.feed(silent()), &Action::Suspend), "it stands still already");
    let actions = seat.feed(Event::Claimed(Claim::Granted(FIRST.next())));
    assert!(has(&actions, &Action::PassOutput) && has(&actions, &Action::Resume), "{actions:?}");
    assert_eq!(seat.primary.phase(), Phase::Solo);
}

#[test]
fn guest_that_stood_still_stays_so_when_another_side_has_won() {
    let mut seat = Seat::lockstep();
    seat.lose();
    seat.feed(Event::Claimed(Claim::Unreachable("gone".into())));
    let refused = Claim::Refused { term: FIRST.next(), owner: "standby".into() };
    let actions = seat.feed(Event::Claimed(refused));
    assert!(has(&actions, &Action::Freeze) && !has(&actions, &Action::Resume), "{actions:?}");
    assert!(!lets_output_leave(&actions), "{actions:?}");
}

#[test]
fn guest_that_may_not_run_alone_stands_still_and_holds_its_output() {
    let mut seat = Seat::lockstep_with(Settings { alone: Alone::Suspended, ..Settings::default() });
    seat.lose();
    let actions = seat.feed(Event::Claimed(Claim::Granted(FIRST.next())));
    assert!(has(&actions, &Action::Suspend) && !lets_output_leave(&actions), "{actions:?}");
    assert_eq!(seat.primary.phase(), Phase::Suspended);
}

#[test]
fn suspended_guest_goes_on_when_it_is_protected_and_not_before() {
    let settings = Settings { alone: Alone::Suspended, suspended: true, ..Settings::default() };
    let mut seat = Seat::pausing_with(settings);
    assert!(!has(&seat.feed(Event::Staged { output_end: 10 }), &Action::Resume));
    let actions = seat.hear_as(FIRST, Epoch(1), Message::CommitAck);
    assert!(has(&actions, &Action::Resume), "{actions:?}");
}

#[test]
fn suspended_guest_that_no_standby_takes_is_left_as_it_was() {
    let settings = Settings { alone: Alone::Suspended, suspended: true, ..Settings::default() };
    let mut seat = Seat::seeding_with(settings);
    let actions = seat.lose();
    assert!(!lets_output_leave(&actions) && !has(&actions, &Action::Resume), "{actions:?}");
    assert_eq!(seat.primary.phase(), Phase::Suspended);
}

#[test]
fn guest_that_was_never_protected_is_not_stopped_by_a_standby_that_fails() {
    let mut seat = Seat::seeding_with(Settings { alone: Alone::Suspended, ..Settings::default() });
    let actions = seat.lose();
    assert!(has(&actions, &Action::PassOutput) && !has(&actions, &Action::Suspend), "{actions:?}");
    assert_eq!(seat.primary.phase(), Phase::Solo);
}

#[test]
fn standby_that_is_heard_of_but_acknowledges_nothing_is_lost() {
    let mut seat = Seat::committing();
    seat.feed(Event::EpochSent { link: LINK });
    let mut asked = false;
    for _ in 0..400 {
        seat.hear(Message::Heartbeat { released: 0, epoch_within_ms: 0 });
        asked |= has(&seat.tick(100, 10), &ASKED);
    }
    assert!(asked);
}

#[test]
fn longer_epochs_are_announced_before_they_begin() {
    let mut seat = Seat::lockstep();
    let pacing = Pacing { interval: Duration::from_secs(20), ..Pacing::default() };
    let said = sent(&seat.feed(Event::Retune(pacing)));
    assert!(
        matches!(said[..], [Message::Heartbeat { epoch_within_ms, .. }] if epoch_within_ms > 20_000),
        "{said:?}"
    );
}

#[test]
fn witness_that_lost_its_record_freezes_nobody() {
    let mut seat = Seat::lockstep();
    seat.lose();
    let forgot = Claim::Refused { term: Term(0), owner: String::new() };
    let actions = seat.feed(Event::Claimed(forgot));
    assert!(matches!(actions[..], [Action::Report(Report::WitnessSilent { .. })]), "{actions:?}");
    assert_eq!(seat.tick(50, 99), [ASKED]);
}

#[test]
fn silent_standby_is_lost_after_its_missed_heartbeats() {
    let mut seat = Seat::lockstep();
    assert!(!has(&seat.tick(200, 10), &ASKED));
    assert!(has(&seat.tick(1, 10), &ASKED));
    let mut seat = Seat::lockstep();
    seat.tick(199, 10);
    seat.hear_as(FIRST, Epoch(1), Message::Heartbeat { released: 0, epoch_within_ms: 1000 });
    assert!(!has(&seat.tick(200, 10), &ASKED));
}

#[test]
fn time_that_sending_a_round_takes_is_not_the_standbys_silence() {
    let mut seat = Seat::seeding();
    seat.now += Duration::from_millis(500);
    seat.feed(Event::RoundSent { link: LINK, pages: 10, bytes: 40960 });
    seat.tick(200, 0);
    assert_eq!(seat.primary.phase(), Phase::Seeding);
    seat.tick(1, 0);
    assert_eq!(seat.primary.phase(), Phase::Solo, "silence after the round counts");
}

#[test]
fn primary_that_waits_for_space_is_patient() {
    let mut seat = Seat::connected();
    seat.hear(Message::SpaceResponse(Space::Queued { before: 3 }));
    assert!(seat.tick(3_600_000, 0).is_empty());
    let actions = seat.hear(Message::SpaceResponse(Space::Granted));
    assert!(matches!(sent(&actions)[..], [Message::Allocate { .. }]));
    assert!(
        has(&seat.tick(10_001, 0), &Action::PassOutput),
        "a granted allocation is not waited for for ever"
    );
}

#[test]
fn denied_space_leaves_the_guest_running_unprotected() {
    let mut seat = Seat::connected();
    let denied = Space::Denied { available: 5, reason: "full".into() };
    let actions = seat.hear(Message::SpaceResponse(denied));
    let says = |action: &Action| matches!(action, Action::Report(Report::Unprotected { reason }) if reason.contains("5 available"));
    assert!(actions.iter().any(says) && has(&actions, &Action::PassOutput), "{actions:?}");
}

#[test]
fn standby_with_other_layout_is_refused_by_primary() {
    let other = Layout::new(vec![Region { start: 0x10_0000, pages: 64 }]).unwrap();
    let mut wrong = [answer(other), answer(layout()), answer(layout())];
    wrong[1].policy.block_size = 2 << 20;
    wrong[2].epoch = Epoch(7);
    for header in wrong {
        let mut seat = Seat::connected();
        seat.hear(Message::SpaceResponse(Space::Granted));
        seat.hear(Message::Allocated);
        seat.hear(Message::LockResponse { term: FIRST, owner: "primary".into(), access: Access::None });
        let actions = seat.hear(Message::HeaderResponse(header));
        let says = |action: &Action| matches!(action, Action::Report(Report::Unprotected { reason }) if reason.contains("laid out otherwise"));
        assert!(actions.iter().any(says), "{actions:?}");
        assert!(sent(&actions).is_empty());
    }
}

#[test]
fn answer_to_a_round_that_is_heard_before_what_was_sent_is_known_is_not_counted_as_nothing() {
    let mut seat = Seat::seeding();
    seat.hear(Message::RoundAck { round: 1 });
    seat.feed(Event::Harvested { link: LINK, pages: 5, disks_lag: true });
    // The thread that has sent the second one is slow to say so.
    assert_eq!(seat.hear(Message::RoundAck { round: 2 }), []);
    let sent = Event::RoundSent { link: LINK, pages: 5, bytes: 7 };
    assert_eq!(seat.feed(sent), [Action::Harvest { link: LINK }]);
    let actions = seat.feed(Event::Harvested { link: LINK, pages: 0, disks_lag: false });
    let told = |action: &Action| {
        matches!(action, Action::Report(Report::RoundDone { round: 2, pages: 5, bytes: 7, .. }))
    };
    assert!(actions.iter().any(told), "{actions:?}");
}

#[test]
fn steps_of_the_agreement_cannot_be_skipped() {
    let early = [
        Message::Allocated,
        Message::LockResponse { term: FIRST, owner: "primary".into(), access: Access::None },
        Message::HeaderResponse(answer(layout())),
        Message::AllocateReadResponse,
        Message::RoundAck { round: 0 },
        Message::CommitAck,
    ];
    for message in early {
        let mut seat = Seat::connected();
        let name = message.name();
        let actions = seat.hear(message);
        let says = |action: &Action| matches!(action, Action::Report(Report::Unprotected { reason }) if reason.contains(name));
        assert!(actions.iter().any(says), "{actions:?}");
        assert!(has(&actions, &Action::Close(LINK)));
    }
}

#[test]
fn round_is_answered_once() {
    let mut seat = Seat::seeding();
    assert_eq!(seat.hear(Message::RoundAck { round: 1 }), [Action::Harvest { link: LINK }]);
    let actions = seat.hear(Message::RoundAck { round: 1 });
    assert!(
        !has(&actions, &Action::Harvest { link: LINK }) && has(&actions, &Action::Close(LINK)),
        "{actions:?}"
    );
}

#[test]
fn newer_term_is_taken_to_the_witness_even_before_the_first_commit() {
    let newer = FIRST.next();
    let stale = Message::Refused(Refusal::StaleTerm { newest: newer });
    for (term, message) in
        [(FIRST, stale), (newer, Message::Heartbeat { released: 0, epoch_within_ms: 1000 })]
    {
        for mut seat in [Seat::connected(), Seat::seeding(), Seat::lockstep()] {
            let actions = seat.hear_as(term, Epoch::NONE, message.clone());
            assert!(has(&actions, &ASKED) && !lets_output_leave(&actions), "{actions:?}");
            let won = Claim::Refused { term: newer, owner: "standby".into() };
            assert!(has(&seat.feed(Event::Claimed(won)), &Action::Freeze));
        }
    }
    let mut seat = Seat::connected();
    seat.hear(Message::SpaceResponse(Space::Granted));
    seat.hear(Message::Allocated);
    let lock = Message::LockResponse { term: newer, owner: "standby".into(), access: Access::Write };
    let actions = seat.hear(lock);
    assert!(has(&actions, &ASKED) && has(&actions, &Action::Hold), "{actions:?}");
}

#[test]
fn primary_told_of_its_replacement_freezes_without_asking() {
    // Without a witness a shell would answer the question with yes.
    for mut seat in [Seat::committing(), Seat::lockstep()] {
        let actions = seat.hear_as(FIRST.next(), Epoch(1), Message::AllocateWrite);
        assert!(has(&actions, &Action::Freeze) && !has(&actions, &ASKED), "{actions:?}");
        assert!(!lets_output_leave(&actions));
        assert_eq!(seat.primary.phase(), Phase::Frozen);
    }
}

#[test]
fn message_about_another_guest_is_not_believed() {
    let mut seat = Seat::committing();
    let header = header(Kind::Message, Guid::from_u128(4), FIRST, Epoch(1), 0);
    let actions = seat.feed(Event::Received { link: LINK, header, message: Message::CommitAck });
    assert!(has(&actions, &ASKED) && !lets_output_leave(&actions), "{actions:?}");
}

#[test]
fn guest_end_is_committed_before_release() {
    let mut seat = Seat::lockstep();
    assert!(seat.feed(Event::GuestEnded { reason: "done".into() }).is_empty());
    assert!(has(&seat.tick(1, 20), &Action::TakeEpoch { epoch: Epoch(2), links: vec![LINK] }));
    assert!(!lets_output_leave(&seat.feed(Event::Staged { output_end: 20 })));
    let actions = seat.hear_as(FIRST, Epoch(2), Message::CommitAck);
    assert_eq!(actions[0], Action::Release { epoch: Epoch(2), output_end: 20 });
    assert_eq!(sent(&actions), [Message::ReleaseMemory { reason: "done".into() }]);
    assert_eq!(seat.primary.phase(), Phase::Ended);
}

#[test]
fn guest_that_ends_in_the_middle_of_a_commit_gets_an_epoch_of_its_own() {
    let mut seat = Seat::committing();
    seat.feed(Event::GuestEnded { reason: "done".into() });
    let actions = seat.hear_as(FIRST, Epoch(1), Message::CommitAck);
    assert!(sent(&actions).is_empty(), "{actions:?}");
    assert!(has(&seat.tick(0, 30), &Action::TakeEpoch { epoch: Epoch(2), links: vec![LINK] }));
}

#[test]
fn guest_that_ends_while_the_witness_is_asked_waits_for_the_answer() {
    let mut seat = Seat::lockstep();
    seat.lose();
    assert!(seat.feed(Event::GuestEnded { reason: "done".into() }).is_empty());
    let actions = seat.feed(Event::Claimed(Claim::Granted(FIRST.next())));
    assert!(has(&actions, &Action::PassOutput));
    assert_eq!(seat.primary.phase(), Phase::Ended);
}

#[test]
fn guest_that_ends_while_seeding_needs_no_epoch() {
    let mut seat = Seat::seeding();
    let actions = seat.feed(Event::GuestEnded { reason: "done".into() });
    assert_eq!(sent(&actions), [Message::ReleaseMemory { reason: "done".into() }]);
    assert!(has(&actions, &Action::PassOutput));
}

#[test]
fn failing_machine_does_not_end_the_guest() {
    let mut seat = Seat::lockstep();
    let actions = seat.feed(Event::Failed { reason: "the log cannot be read".into() });
    assert!(has(&actions, &ASKED), "{actions:?}");
    assert!(has(&seat.feed(Event::Claimed(Claim::Granted(FIRST.next()))), &Action::PassOutput));
    assert_eq!(seat.primary.phase(), Phase::Solo);
}

#[test]
fn no_epoch_is_taken_while_the_disks_of_the_standby_lag_behind() {
    let mut seat = Seat::seeding();
    for round in 1..40 {
        seat.hear(Message::RoundAck { round });
        let actions = seat.feed(Event::Harvested { link: LINK, pages: 0, disks_lag: true });
        assert_eq!(actions.last(), Some(&Action::SendRound { link: LINK, round: round + 1 }));
        seat.feed(Event::RoundSent { link: LINK, pages: 0, bytes: 0 });
    }
    seat.hear(Message::RoundAck { round: 40 });
    let actions = seat.feed(Event::Harvested { link: LINK, pages: 0, disks_lag: false });
    assert_eq!(actions[1..], [Action::Hold, Action::TakeEpoch { epoch: Epoch(1), links: vec![LINK] }]);
}
