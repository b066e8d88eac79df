//! What the standby promises to whoever speaks to it.

mod sim;

use std::time::Duration;

use mirror::ids::{Epoch, Guid, Term};
use mirror::memory::{Layout, PAGE_SIZE, Region};
use mirror::report::Report;
use mirror::standby::{Action, Event, HEARTBEAT, Phase, WitnessView};
use mirror::wire::header::Kind;
use mirror::wire::message::{Access, Body, Commit, Message, Policy, Refusal, Space};
use mirror::witness::{Claim, Record};

use sim::guest::layout;
use sim::primary_host::{FIRST, GUID};
use sim::seat::{SPACE, Seat, allocate, header, reported, runs, said, witness};

fn space(bytes: u64, wait: bool) -> Message {
    Message::SpaceRequest { bytes, wait }
}

fn lost(link: u64) -> Event {
    Event::LinkLost { link, reason: "closed".into() }
}

#[test]
fn standby_rejects_stale_term() {
    let mut seat = Seat::shadowing(witness());
    let actions = seat.say_as(
        1,
        Term(FIRST.0 - 1),
        Epoch(1),
        Message::Heartbeat { released: 0, epoch_within_ms: 1000 },
    );
    assert_eq!(said(&actions), [(1, Message::Refused(Refusal::StaleTerm { newest: FIRST }))]);
    assert_eq!(seat.standby.sense().stale_frames, 1);
    assert_eq!(seat.standby.phase(), Phase::Shadowing);
}

#[test]
fn active_standby_tells_an_old_primary_that_comes_back() {
    let mut seat = Seat::shadowing(witness());
    seat.feed(lost(1));
    assert!(runs(&seat.feed(Event::Claimed(Claim::Granted(FIRST.next())))));
    let actions = seat.say(2, space(1, true));
    assert_eq!(said(&actions), [(2, Message::Refused(Refusal::StaleTerm { newest: FIRST.next() }))]);
}

#[test]
fn standby_without_complete_epoch_refuses_to_run() {
    let mut seat = Seat::receiving(witness());
    seat.round(1);
    seat.parts(Epoch(1), b"state");
    let actions = seat.feed(lost(1));
    let refused = |report: &Report| matches!(report, Report::Refused { reason } if reason.contains("no complete epoch"));
    assert!(reported(&actions).iter().any(refused), "{actions:?}");
    assert!(!runs(&actions));
    assert!(!actions.iter().any(|action| matches!(action, Action::Claim { .. })), "{actions:?}");
    assert!(!runs(&seat.feed(Event::Claimed(Claim::Granted(FIRST.next())))));
    assert!(!runs(&seat.feed(Event::Promote)));
    assert_eq!(seat.standby.phase(), Phase::Waiting);
}

#[test]
fn torn_epoch_is_never_visible() {
    type Damage = fn(&mut Commit);
    let damages: [Damage; 3] =
        [|commit| commit.pages += 1, |commit| commit.digest ^= 1, |commit| commit.output_end += 1];
    for damage in damages {
        let mut seat = Seat::shadowing(witness());
        seat.parts(Epoch(2), b"second");
        let mut commit = seat.commit(Epoch(2));
        damage(&mut commit);
        let actions = seat.say_as(1, FIRST, Epoch(2), Message::Commit(commit));
        assert!(
            !actions.iter().any(|action| matches!(action, Action::Apply(_) | Action::Write(_))),
            "{actions:?}"
        );
        assert!(
            matches!(said(&actions)[..], [(1, Message::Refused(Refusal::TornEpoch { .. }))]),
            "{actions:?}"
        );
        assert_eq!(seat.standby.epoch(), Epoch(1));
        let actions = seat.feed(Event::Claimed(Claim::Granted(FIRST.next())));
        let first = |action: &Action| {
            matches!(action, Action::Activate { state, output_start: 0, output, handed_over: false }
            if state == b"first" && output.len() == 10)
        };
        assert!(actions.iter().any(first), "{actions:?}");
    }
}

#[test]
fn pages_of_an_epoch_are_not_written_before_its_commit() {
    let mut seat = Seat::shadowing(witness());
    let written = |action: &Action| matches!(action, Action::Apply(_) | Action::Write(_));
    assert!(!seat.page(Epoch(2), 7, 7).iter().any(written));
    assert!(!seat.feed(lost(1)).iter().any(written));
}

#[test]
fn epoch_is_acknowledged_before_it_is_applied() {
    let mut seat = Seat::receiving(witness());
    seat.round(1);
    let actions = seat.epoch(Epoch(1), b"first");
    assert!(matches!(
        actions[..],
        [
            Action::Send { message: Message::CommitAck, .. },
            Action::Apply(_),
            Action::Report(Report::Protected { .. })
        ]
    ));
}

#[test]
fn epoch_out_of_order_is_refused() {
    for epoch in [1, 3] {
        let mut seat = Seat::shadowing(witness());
        let actions = seat.page(Epoch(epoch), 7, 7);
        assert!(matches!(said(&actions)[..], [(1, Message::Refused(Refusal::Protocol(_)))]), "{actions:?}");
    }
}

#[test]
fn epoch_without_complete_seeding_is_not_committed() {
    for begun in [false, true] {
        let mut seat = Seat::receiving(witness());
        if begun {
            seat.round(1);
            seat.page(Epoch::NONE, 9, 9);
            seat.digest();
        }
        let actions = seat.epoch(Epoch(1), b"first");
        assert!(
            matches!(said(&actions)[..], [(1, Message::Refused(Refusal::TornEpoch { .. }))]),
            "{actions:?}"
        );
        assert_eq!(seat.standby.phase(), Phase::Waiting);
    }
}

#[test]
fn round_that_is_not_whole_is_refused() {
    let mut seat = Seat::receiving(witness());
    seat.page(Epoch::NONE, 1, 1);
    let digest = seat.digest();
    let actions = seat.say(1, Message::RoundEnd { round: 1, pages: 2, digest });
    assert!(matches!(said(&actions)[..], [(1, Message::Refused(Refusal::Protocol(_)))]), "{actions:?}");
}

#[test]
fn primary_that_is_heard_of_but_whose_epochs_stand_still_is_lost() {
    let mut seat = Seat::shadowing(witness());
    let mut lost_after = None;
    for tick in 1..100 {
        seat.now += Duration::from_millis(20);
        let heartbeat = Message::Heartbeat { released: 0, epoch_within_ms: 1000 };
        seat.say_as(1, FIRST, Epoch(1), heartbeat);
        let actions = seat.feed(Event::Tick);
        if actions.iter().any(|action| matches!(action, Action::Claim { .. })) {
            lost_after = Some(tick * 20);
            break;
        }
    }
    assert_eq!(lost_after, Some(1020));
}

#[test]
fn piece_of_an_epoch_is_progress() {
    let mut seat = Seat::shadowing(witness());
    for _ in 0..100 {
        seat.now += Duration::from_millis(100);
        seat.say_as(1, FIRST, Epoch(1), Message::Heartbeat { released: 0, epoch_within_ms: 1000 });
        seat.say_as(1, FIRST, Epoch(2), Message::WriteState(vec![1]));
        let actions = seat.feed(Event::Tick);
        assert!(!actions.iter().any(|action| matches!(action, Action::Claim { .. })), "{actions:?}");
    }
}

#[test]
fn side_that_runs_a_guest_of_its_own_takes_no_other() {
    let mut seat = Seat::empty();
    seat.feed(Event::Occupied);
    let actions = seat.say(1, space(1, false));
    assert!(matches!(said(&actions)[..], [(1, Message::SpaceResponse(Space::Denied { .. }))]), "{actions:?}");
}

#[test]
fn side_whose_guest_has_gone_is_a_standby_again() {
    let mut seat = Seat::shadowing(witness());
    seat.feed(lost(1));
    assert!(runs(&seat.feed(Event::Claimed(Claim::Granted(FIRST.next())))));
    let waits = said(&seat.say_as(2, Term(FIRST.0 + 2), Epoch::NONE, space(1, true)));
    assert_eq!(waits, [(2, Message::SpaceResponse(Space::Queued { before: 0 }))]);

    let actions = seat.feed(Event::Vacated { space: SPACE });

    assert_eq!(said(&actions), [(2, Message::SpaceResponse(Space::Granted))]);
    assert!(!actions.iter().any(|action| matches!(action, Action::Release)), "the machine is not its own");
    assert_eq!((seat.standby.phase(), seat.standby.guid()), (Phase::Reserved, None));
}

#[test]
fn standby_that_asks_the_witness_acknowledges_nothing_more() {
    let mut seat = Seat::shadowing(witness());
    seat.now += Duration::from_secs(1);
    let actions = seat.feed(Event::Tick);
    assert!(
        matches!(actions[..], [Action::Report(Report::PrimaryLost { .. }), Action::Claim { .. }]),
        "{actions:?}"
    );
    let actions = seat.epoch(Epoch(2), b"second");
    assert!(actions.is_empty(), "{actions:?}");
    assert_eq!(seat.standby.epoch(), Epoch(1));
}

#[test]
fn silent_witness_is_asked_again_until_it_answers() {
    let mut seat = Seat::shadowing(witness());
    seat.feed(lost(1));
    for _ in 0..3 {
        assert!(!runs(&seat.feed(Event::Claimed(Claim::Unreachable("gone".into())))));
        assert!(matches!(seat.feed(Event::Tick)[..], [Action::Claim { expected: FIRST, .. }]));
    }
    assert!(runs(&seat.feed(Event::Claimed(Claim::Granted(FIRST.next())))));
}

#[test]
fn witness_that_lost_its_record_fences_nobody() {
    let mut seat = Seat::shadowing(witness());
    seat.feed(lost(1));
    let forgot = Claim::Refused { term: Term(0), owner: String::new() };
    let actions = seat.feed(Event::Claimed(forgot));
    assert!(matches!(reported(&actions)[..], [Report::WitnessSilent { .. }]), "{actions:?}");
    assert_eq!(seat.standby.phase(), Phase::Claiming);
}

#[test]
fn standby_that_loses_at_the_witness_is_fenced() {
    let mut seat = Seat::shadowing(witness());
    seat.feed(lost(1));
    let won = Claim::Refused { term: FIRST.next(), owner: "primary".into() };
    let actions = seat.feed(Event::Claimed(won));
    assert!(actions.iter().any(|action| matches!(action, Action::Release)), "{actions:?}");
    assert!(!runs(&actions));
    assert_eq!(seat.standby.phase(), Phase::Waiting);
}

#[test]
fn standby_without_witness_waits_for_an_operator() {
    let mut seat = Seat::shadowing(WitnessView::None);
    let actions = seat.feed(lost(1));
    assert!(reported(&actions).iter().any(|report| matches!(report, Report::AwaitingPromotion { .. })));
    assert!(!runs(&seat.feed(Event::Claimed(Claim::Granted(FIRST.next())))));
    assert!(runs(&seat.feed(Event::Promote)));
    assert_eq!(seat.standby.term(), FIRST.next());
}

#[test]
fn promotion_is_refused_while_the_primary_lives() {
    let mut seat = Seat::shadowing(WitnessView::None);
    let actions = seat.feed(Event::Promote);
    assert!(matches!(reported(&actions)[..], [Report::Failed { .. }]), "{actions:?}");
    assert!(!runs(&actions));
}

#[test]
fn second_primary_waits_in_queue_or_is_denied() {
    let mut seat = Seat::shadowing(witness());
    let denied = said(&seat.say(2, space(4096, false)));
    assert!(matches!(denied[..], [(2, Message::SpaceResponse(Space::Denied { .. }))]), "{denied:?}");
    for _ in 0..2 {
        let queued = said(&seat.say(3, space(4096, true)));
        assert_eq!(queued, [(3, Message::SpaceResponse(Space::Queued { before: 0 }))]);
    }
    let ended = said(&seat.say_as(1, FIRST, Epoch(1), Message::ReleaseMemory { reason: "done".into() }));
    assert_eq!(ended, [(1, Message::MemoryReleased), (3, Message::SpaceResponse(Space::Granted))]);
    // It waited once, so it is served once.
    assert!(said(&seat.feed(lost(3))).is_empty());
    assert_eq!(seat.standby.phase(), Phase::Waiting);
}

#[test]
fn link_that_is_gone_is_not_served() {
    let mut seat = Seat::shadowing(witness());
    seat.say(2, space(4096, true));
    seat.say(3, space(4096, true));
    seat.feed(lost(2));
    let ended = said(&seat.say_as(1, FIRST, Epoch(1), Message::ReleaseMemory { reason: "done".into() }));
    assert_eq!(ended[1..], [(3, Message::SpaceResponse(Space::Granted))]);
}

#[test]
fn queue_is_bounded() {
    let mut seat = Seat::shadowing(witness());
    let answers: Vec<_> = (2..200).flat_map(|link| said(&seat.say(link, space(4096, true)))).collect();
    let queued =
        |(_, answer): &&(u64, Message)| matches!(answer, Message::SpaceResponse(Space::Queued { .. }));
    assert_eq!(answers.iter().filter(queued).count(), 64);
    assert!(matches!(answers.last(), Some((_, Message::SpaceResponse(Space::Denied { .. })))));
}

#[test]
fn space_request_is_denied_when_too_large() {
    let mut seat = Seat::empty();
    for wait in [false, true] {
        let answer = said(&seat.say(1, space(SPACE + 1, wait)));
        assert!(
            matches!(&answer[..], [(1, Message::SpaceResponse(Space::Denied { available: SPACE, .. }))]),
            "{answer:?}"
        );
    }
    assert_eq!(seat.standby.phase(), Phase::Waiting);
}

#[test]
fn allocation_larger_than_the_space_is_refused() {
    let mut seat = Seat::empty();
    seat.say(1, space(4096, false));
    let regions = vec![Region { start: 0, pages: SPACE / PAGE_SIZE as u64 + 64 }];
    let message = Message::Allocate {
        layout: Layout::new(regions).unwrap(),
        policy: Policy { block_size: PAGE_SIZE as u32 },
        machine: Vec::new(),
        heartbeat_ms: 50,
        misses: 4,
    };
    let actions = seat.say(1, message);
    assert!(matches!(said(&actions)[..], [(1, Message::Refused(Refusal::Protocol(_)))]), "{actions:?}");
    assert!(!actions.iter().any(|action| matches!(action, Action::Allocate { .. })));
}

#[test]
fn term_without_a_successor_is_refused() {
    for term in [Term(0), Term(u64::MAX)] {
        let mut seat = Seat::empty();
        seat.say(1, space(4096, false));
        let actions = seat.say_as(1, term, Epoch::NONE, allocate());
        assert!(matches!(said(&actions)[..], [(1, Message::Refused(Refusal::Protocol(_)))]), "{actions:?}");
    }
}

#[test]
fn reservation_times_out() {
    let mut seat = Seat::empty();
    seat.say(1, space(4096, false));
    seat.say(2, space(4096, true));
    seat.now += Duration::from_secs(4);
    assert!(seat.feed(Event::Tick).is_empty());
    seat.now += Duration::from_secs(2);
    let actions = seat.feed(Event::Tick);
    assert!(actions.iter().any(|action| matches!(action, Action::Close(1))), "{actions:?}");
    assert_eq!(said(&actions), [(2, Message::SpaceResponse(Space::Granted))]);
}

#[test]
fn lock_header_sense_are_answered_to_anyone() {
    let mut seat = Seat::shadowing(witness());
    let lock = said(&seat.say(9, Message::LockRequest));
    let expected = Message::LockResponse { term: FIRST, owner: "primary".into(), access: Access::Read };
    assert_eq!(lock, [(9, expected)]);
    let answer = said(&seat.say(9, Message::HeaderRequest));
    let [(9, Message::HeaderResponse(answer))] = &answer[..] else { panic!("{answer:?}") };
    assert_eq!((&answer.layout, answer.guid, answer.epoch), (&layout(), GUID, Epoch(1)));
    let sense = said(&seat.say(9, Message::SenseRequest));
    let [(9, Message::SenseResponse(sense))] = &sense[..] else { panic!("{sense:?}") };
    assert_eq!((sense.rounds, sense.epochs, sense.pages), (1, 1, 2));
    assert_eq!(seat.standby.phase(), Phase::Shadowing);
}

#[test]
fn active_side_says_that_it_holds_the_lock() {
    let mut seat = Seat::shadowing(witness());
    seat.feed(lost(1));
    seat.feed(Event::Claimed(Claim::Granted(FIRST.next())));
    let lock = said(&seat.say_as(9, FIRST.next(), Epoch::NONE, Message::LockRequest));
    let expected =
        Message::LockResponse { term: FIRST.next(), owner: "standby".into(), access: Access::Write };
    assert_eq!(lock, [(9, expected)]);
}

#[test]
fn question_about_an_unknown_guest_is_refused() {
    let mut seat = Seat::empty();
    for message in [Message::LockRequest, Message::HeaderRequest] {
        let actions = seat.say(9, message);
        assert_eq!(said(&actions), [(9, Message::Refused(Refusal::UnknownAllocation(GUID)))]);
    }
}

#[test]
fn stranger_cannot_touch_a_mirrored_guest() {
    let strange = [
        Message::ReleaseMemory { reason: "no reason".into() },
        Message::WriteState(b"state".to_vec()),
        Message::Commit(Commit { pages: 0, digest: 0, output_end: 10, released: 10 }),
        Message::RoundEnd { round: 2, pages: 0, digest: 0 },
        Message::AllocateRead,
        allocate(),
    ];
    for message in strange {
        let mut seat = Seat::shadowing(witness());
        let actions = seat.say_as(9, FIRST, Epoch(2), message);
        assert!(
            matches!(said(&actions)[..], [(9, Message::Refused(Refusal::WrongPhase { .. }))]),
            "{actions:?}"
        );
        assert_eq!((seat.standby.phase(), seat.standby.epoch()), (Phase::Shadowing, Epoch(1)));
    }
}

#[test]
fn witness_of_other_storage_is_refused() {
    let other =
        |guid, term| WitnessView::Record(Some(Record { guid, term, owner: "primary".into(), revision: 1 }));
    let views = [
        WitnessView::Record(None),
        WitnessView::Failed("no such storage".into()),
        other(GUID, FIRST.next()),
        other(Guid::from_u128(1), FIRST),
    ];
    for witness in views {
        let mut seat = Seat::empty();
        seat.say(1, space(4096, false));
        seat.say(1, allocate());
        let actions = seat.feed(Event::Allocated { machine: Ok(Vec::new()), witness });
        assert!(matches!(said(&actions)[..], [(1, Message::Refused(Refusal::Witness(_)))]), "{actions:?}");
        assert!(actions.iter().any(|action| matches!(action, Action::Release)));
        assert_eq!(seat.standby.phase(), Phase::Waiting);
    }
}

#[test]
fn machine_that_cannot_be_built_is_refused() {
    let mut seat = Seat::empty();
    seat.say(1, space(4096, false));
    seat.say(1, allocate());
    let actions = seat.feed(Event::Allocated { machine: Err("no such device".into()), witness: witness() });
    assert_eq!(said(&actions), [(1, Message::Refused(Refusal::Machine("no such device".into())))]);
}

#[test]
fn output_at_the_end_of_all_positions_is_refused() {
    let mut seat = Seat::shadowing(witness());
    let message = Message::WriteOutput { start: u64::MAX, bytes: b"xx".to_vec() };
    let actions = seat.say_as(1, FIRST, Epoch(2), message);
    assert!(matches!(said(&actions)[..], [(1, Message::Refused(Refusal::Protocol(_)))]), "{actions:?}");
}

#[test]
fn output_goes_on_where_the_primary_is_known_to_have_been() {
    let mut seat = Seat::shadowing(witness());
    seat.epoch(Epoch(2), b"second");
    seat.say_as(1, FIRST, Epoch(2), Message::Heartbeat { released: 14, epoch_within_ms: 1000 });
    seat.feed(lost(1));
    let actions = seat.feed(Event::Claimed(Claim::Granted(FIRST.next())));
    let from_14 = |action: &Action| matches!(action, Action::Activate { output_start: 14, output, .. } if output.len() == 6);
    assert!(actions.iter().any(from_14), "{actions:?}");
}

/// Epoch 2 with a write log, up to the order to keep it; gives the log's number.
fn epoch_with_a_log(seat: &mut Seat) -> u64 {
    seat.parts(Epoch(2), b"second");
    seat.say_as(1, FIRST, Epoch(2), Message::WriteLog(b"wri".to_vec()));
    seat.say_as(1, FIRST, Epoch(2), Message::WriteLog(b"tten".to_vec()));
    let commit = seat.commit(Epoch(2));
    let actions = seat.say_as(1, FIRST, Epoch(2), Message::Commit(commit));
    assert!(said(&actions).is_empty(), "{actions:?}");
    match &actions[..] {
        [Action::KeepLog { number, epoch: Epoch(2), log }] if log == b"written" => *number,
        other => panic!("{other:?}"),
    }
}

#[test]
fn epoch_is_acknowledged_and_applied_only_when_its_log_is_durable() {
    let mut seat = Seat::shadowing(witness());
    let number = epoch_with_a_log(&mut seat);
    assert_eq!(seat.standby.epoch(), Epoch(1));
    assert!(seat.feed(Event::LogKept { number: number + 1, outcome: Ok(()) }).is_empty());
    let actions = seat.feed(Event::LogKept { number, outcome: Ok(()) });
    assert!(
        matches!(&actions[..], [Action::Send { message: Message::CommitAck, .. }, Action::Apply(_)]),
        "{actions:?}"
    );
    assert_eq!(seat.standby.epoch(), Epoch(2));
}

#[test]
fn epoch_whose_log_cannot_be_kept_is_refused_and_the_guest_goes_on_from_the_one_before() {
    let mut seat = Seat::shadowing(witness());
    let number = epoch_with_a_log(&mut seat);
    let actions = seat.feed(Event::LogKept { number, outcome: Err("disk full".into()) });
    let refused = |(_, message): &(u64, Message)| matches!(message, Message::Refused(Refusal::Machine(reason)) if reason == "disk full");
    assert!(said(&actions).iter().any(refused), "{actions:?}");
    assert!(actions.iter().any(|action| matches!(action, Action::Claim { .. })), "{actions:?}");
    let actions = seat.feed(Event::Claimed(Claim::Granted(FIRST.next())));
    let first = |action: &Action| matches!(action, Action::Activate { state, output, .. } if state == b"first" && output.len() == 10);
    assert!(actions.iter().any(first), "{actions:?}");
}

#[test]
fn loss_of_the_primary_is_decided_on_when_the_log_is_durable() {
    let mut seat = Seat::shadowing(witness());
    let number = epoch_with_a_log(&mut seat);
    assert!(seat.feed(lost(1)).is_empty());
    let actions = seat.feed(Event::LogKept { number, outcome: Ok(()) });
    assert!(said(&actions).is_empty(), "nobody is left to tell: {actions:?}");
    assert!(actions.iter().any(|action| matches!(action, Action::Claim { .. })), "{actions:?}");
    let actions = seat.feed(Event::Claimed(Claim::Granted(FIRST.next())));
    let second = |action: &Action| matches!(action, Action::Activate { state, output, .. } if state == b"second" && output.len() == 20);
    assert!(actions.iter().any(second), "{actions:?}");
}

#[test]
fn nothing_more_of_an_epoch_is_taken_while_one_is_being_kept() {
    let mut seat = Seat::shadowing(witness());
    epoch_with_a_log(&mut seat);
    let actions = seat.say_as(1, FIRST, Epoch(2), Message::WriteState(b"again".to_vec()));
    assert!(matches!(said(&actions)[..], [(1, Message::Refused(Refusal::Protocol(_)))]), "{actions:?}");
}

#[test]
fn round_that_brings_blocks_of_disks_is_acknowledged_when_they_are_there() {
    let mut seat = Seat::receiving(witness());
    seat.page(Epoch::NONE, 5, 1);
    seat.say(1, Message::WriteLog(b"block".to_vec()));
    let digest = seat.digest();
    let actions = seat.say(1, Message::RoundEnd { round: 1, pages: 1, digest });
    assert!(said(&actions).is_empty(), "{actions:?}");
    let keep = |action: &Action| match action {
        Action::KeepLog { number, epoch: Epoch::NONE, log } if log == b"block" => Some(*number),
        _ => None,
    };
    let number = actions.iter().find_map(keep).expect("the blocks are kept");
    let actions = seat.feed(Event::LogKept { number, outcome: Ok(()) });
    assert_eq!(said(&actions), [(1, Message::RoundAck { round: 1 })]);
}

/// A heartbeat of a primary, on a link that is not the mirror's.
fn beat(seat: &mut Seat, guid: Guid, term: Term) {
    let header = header(Kind::Message, guid, term, Epoch::NONE, 0);
    let actions = seat.feed(Event::Received { link: 2, header, body: Body::Message(HEARTBEAT) });
    assert!(actions.is_empty(), "{actions:?}");
}

/// A standby that knows within which time epochs make progress, and has just heard its primary on the second link.
fn heard_twice() -> Seat {
    let mut seat = Seat::shadowing(witness());
    seat.say(1, Message::Heartbeat { released: 0, epoch_within_ms: 1000 });
    beat(&mut seat, GUID, FIRST);
    seat
}

/// The same, and its mirror's link has just fallen silent, or is closed; and what came of that.
fn heard_elsewhere(closed: bool) -> (Seat, Vec<Action>) {
    let mut seat = heard_twice();
    let actions = if closed { seat.feed(lost(1)) } else { Vec::new() };
    (seat, actions)
}

/// Lets time pass in which the primary is heard on the second link alone; what came of it at the end.
fn with_beats(seat: &mut Seat, for_ms: u64) -> Vec<Action> {
    let mut actions = Vec::new();
    for _ in 0..for_ms / 25 {
        seat.now += Duration::from_millis(25);
        beat(seat, GUID, FIRST);
        actions.extend(seat.feed(Event::Tick));
    }
    actions
}

#[test]
fn primary_that_is_heard_on_the_second_link_is_not_lost_with_the_mirror_link() {
    for closed in [false, true] {
        let (mut seat, mut actions) = heard_elsewhere(closed);
        actions.extend(with_beats(&mut seat, 900));
        assert_eq!(seat.standby.phase(), Phase::Shadowing);
        let heard = |report: &Report| matches!(report, Report::HeardElsewhere { .. });
        assert_eq!(reported(&actions).iter().filter(|report| heard(report)).count(), 1, "{actions:?}");
        // The primary is to notice, too, whichever way the link is cut.
        assert_eq!(said(&with_beats(&mut heard_twice(), 225)).len(), 4);
        assert!(said(&actions).len() <= 4, "{actions:?}");
    }
}

#[test]
fn primary_that_is_silent_on_both_links_is_lost() {
    for closed in [false, true] {
        let (mut seat, _) = heard_elsewhere(closed);
        with_beats(&mut seat, 500);
        seat.now += Duration::from_millis(201);
        let actions = seat.feed(Event::Tick);
        assert!(actions.iter().any(|action| matches!(action, Action::Claim { .. })), "{actions:?}");
    }
}

#[test]
fn primary_whose_epochs_stand_still_is_lost_wherever_it_is_heard() {
    for closed in [false, true] {
        let (mut seat, _) = heard_elsewhere(closed);
        let actions = with_beats(&mut seat, 1050);
        assert!(actions.iter().any(|action| matches!(action, Action::Claim { .. })), "{actions:?}");
    }
}

#[test]
fn mirror_link_that_was_only_silent_goes_on() {
    let mut seat = heard_twice();
    with_beats(&mut seat, 500);
    let actions = seat.epoch(Epoch(2), b"second");
    assert!(actions.iter().any(|action| matches!(action, Action::Apply(_))), "{actions:?}");
}

#[test]
fn signs_of_life_of_another_guest_or_an_older_term_count_for_nothing() {
    for (guid, term) in [(Guid::from_u128(1), FIRST), (GUID, Term(FIRST.0 - 1))] {
        let mut seat = Seat::shadowing(witness());
        seat.say(1, Message::Heartbeat { released: 0, epoch_within_ms: 1000 });
        beat(&mut seat, guid, term);
        let actions = seat.feed(lost(1));
        assert!(actions.iter().any(|action| matches!(action, Action::Claim { .. })), "{actions:?}");
    }
}

#[test]
fn standby_without_a_complete_epoch_waits_for_no_second_link() {
    let mut seat = Seat::receiving(witness());
    seat.say(1, Message::Heartbeat { released: 0, epoch_within_ms: 1000 });
    beat(&mut seat, GUID, FIRST);
    seat.feed(lost(1));
    assert_eq!(seat.standby.phase(), Phase::Waiting);
}
