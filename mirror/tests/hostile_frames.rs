//! Whatever anybody sends to a standby in whatever phase: it neither panics nor runs what it must not run.

mod sim;

use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;

use mirror::ids::{Epoch, Guid, Term};
use mirror::standby::{Action, Event, Phase, Standby, WitnessView};
use mirror::wire::header::Kind;
use mirror::wire::message::{Body, Commit, Message, Policy};
use mirror::wire::pages::BufferPool;
use mirror::witness::Claim;

use sim::guest::layout;
use sim::primary_host::{FIRST, GUID};
use sim::seat::{Seat, allocate, header, runs, witness};

fn any_message() -> impl Strategy<Value = Message> {
    let number = || prop_oneof![0_u64..4, Just(10_u64), any::<u64>(), Just(u64::MAX)];
    let bytes = || vec(any::<u8>(), 0..40);
    prop_oneof![
        (number(), any::<bool>()).prop_map(|(bytes, wait)| Message::SpaceRequest { bytes, wait }),
        Just(allocate()),
        (bytes(), any::<u32>(), any::<u32>()).prop_map(|(machine, heartbeat_ms, misses)| Message::Allocate {
            layout: layout(),
            policy: Policy { block_size: 4096 },
            machine,
            heartbeat_ms,
            misses,
        }),
        Just(Message::LockRequest),
        Just(Message::HeaderRequest),
        Just(Message::SenseRequest),
        Just(Message::AllocateRead),
        Just(Message::AllocateWrite),
        Just(Message::CommitAck),
        (number(), number(), any::<u64>()).prop_map(|(round, pages, digest)| Message::RoundEnd {
            round: round as u32,
            pages,
            digest,
        }),
        bytes().prop_map(Message::WriteState),
        bytes().prop_map(Message::WriteLog),
        (number(), bytes()).prop_map(|(start, bytes)| Message::WriteOutput { start, bytes }),
        (number(), any::<u64>(), number(), number()).prop_map(|(pages, digest, output_end, released)| {
            Message::Commit(Commit { pages, digest, output_end, released })
        }),
        Just(Message::ReleaseMemory { reason: String::new() }),
        (number(), any::<u32>())
            .prop_map(|(released, epoch_within_ms)| Message::Heartbeat { released, epoch_within_ms }),
    ]
}

/// A frame that somebody invents, or an event of the standby's own.
#[derive(Clone, Debug)]
enum Hostile {
    Message(u64, bool, Term, Epoch, Message),
    Pages(u64, Epoch, Vec<u8>),
    Time(u64),
    Lost(u64),
    Allocated(bool),
    Kept(u64, bool),
    Claimed(u8),
    Promote,
}

fn hostile() -> impl Strategy<Value = Hostile> {
    // Mostly the primary's link and the epoch that is due: what is refused at the door tries nothing.
    let link = || prop_oneof![4 => Just(1_u64), 1 => 2_u64..4];
    let term = prop_oneof![4 => Just(FIRST), 1 => any::<u64>().prop_map(Term)];
    let epoch = || prop_oneof![4 => Just(Epoch(2)), 3 => (0_u64..4).prop_map(Epoch), 1 => any::<u64>().prop_map(Epoch)];
    let table =
        (1_u32..3, 0_u32..80, 0_u8..3, prop_oneof![Just(0_u16), Just(4096), any::<u16>()], 0_usize..5000)
            .prop_map(|(count, page, encoding, length, body)| {
                let mut payload = count.to_le_bytes().to_vec();
                payload.extend(page.to_le_bytes());
                payload.extend([encoding, 0]);
                payload.extend(length.to_le_bytes());
                payload.resize(payload.len() + body, 7);
                payload
            });
    prop_oneof![
        8 => (link(), prop::bool::weighted(0.9), term, epoch(), any_message())
            .prop_map(|(link, ours, term, epoch, message)| Hostile::Message(link, ours, term, epoch, message)),
        2 => (link(), epoch(), prop_oneof![table, vec(any::<u8>(), 0..64)])
            .prop_map(|(link, epoch, payload)| Hostile::Pages(link, epoch, payload)),
        1 => (0_u64..7000).prop_map(Hostile::Time),
        1 => link().prop_map(Hostile::Lost),
        1 => any::<bool>().prop_map(Hostile::Allocated),
        2 => (0_u64..4, any::<bool>()).prop_map(|(number, durable)| Hostile::Kept(number, durable)),
        1 => (0_u8..3).prop_map(Hostile::Claimed),
        1 => Just(Hostile::Promote),
    ]
}

fn strike(standby: &mut Standby, now: &mut Duration, blow: Hostile, with_witness: bool) -> Vec<Action> {
    let event = match blow {
        Hostile::Message(link, ours, term, epoch, message) => {
            let guid = if ours { GUID } else { Guid::from_u128(9) };
            let header = header(Kind::Message, guid, term, epoch, 1);
            Event::Received { link, header, body: Body::Message(message) }
        }
        Hostile::Pages(link, epoch, payload) => {
            let mut buffer = BufferPool::default().take(payload.len());
            buffer.copy_from_slice(&payload);
            let header = header(Kind::Pages, GUID, FIRST, epoch, 1);
            Event::Received { link, header, body: Body::Pages(buffer) }
        }
        Hostile::Time(ms) => {
            *now += Duration::from_millis(ms);
            Event::Tick
        }
        Hostile::Lost(link) => Event::LinkLost { link, reason: "closed".into() },
        Hostile::Allocated(good) => {
            let machine = if good { Ok(Vec::new()) } else { Err("no".into()) };
            Event::Allocated { machine, witness: if with_witness { witness() } else { WitnessView::None } }
        }
        Hostile::Kept(number, durable) => {
            let outcome = if durable { Ok(()) } else { Err("the disk is full".into()) };
            Event::LogKept { number, outcome }
        }
        Hostile::Claimed(0) => Event::Claimed(Claim::Granted(FIRST.next())),
        Hostile::Claimed(1) => Event::Claimed(Claim::Refused { term: FIRST.next(), owner: "x".into() }),
        Hostile::Claimed(_) => Event::Claimed(Claim::Unreachable("gone".into())),
        Hostile::Promote => Event::Promote,
    };
    let mut actions = Vec::new();
    standby.handle(*now, event, &mut actions);
    actions
}

proptest! {
    // These are quick, and most of them are turned away early.
    #![proptest_config(ProptestConfig::with_cases(16 * ProptestConfig::default().cases))]

    #[test]
    fn hostile_frames_never_panic_standby(
        stage in 0_u8..4,
        with_witness: bool,
        blows in vec(hostile(), 1..40),
    ) {
        let view = || if with_witness { witness() } else { WitnessView::None };
        let Seat { mut standby, mut now, .. } = match stage {
            0 => Seat::empty(),
            1 => Seat::receiving(view()),
            2 => Seat::shadowing(view()),
            _ => {
                let mut seat = Seat::shadowing(view());
                seat.feed(Event::LinkLost { link: 1, reason: "closed".into() });
                seat
            }
        };
        let mut running = false;
        for blow in blows {
            let before = (standby.phase(), standby.epoch());
            let granted = matches!(blow, Hostile::Claimed(0) | Hostile::Promote);
            let actions = strike(&mut standby, &mut now, blow, with_witness);
            if runs(&actions) {
                prop_assert!(granted && !running && before.1 != Epoch::NONE, "{before:?}: {actions:?}");
                prop_assert!(matches!(before.0, Phase::Claiming | Phase::Orphaned), "{before:?}");
                running = true;
            }
            let released = actions.iter().any(|action| matches!(action, Action::Release));
            prop_assert!(!running || !released, "a running guest's memory was released");
        }
    }
}
