//! Frames that no correct guest sends.

use std::time::Instant;

use proptest::collection::vec;
use proptest::prelude::*;

use super::{Client, stack};
use crate::metadata::stack::IDLE;
use crate::metadata::{DEFAULT_ADDRESS, FRAME_START, MAX_CALLERS, MetadataVersion, Stack};

/// What is done with the next frame of a guest that speaks correctly.
#[derive(Clone, Debug)]
enum Fate {
    Arrive,
    Vanish,
    Twice,
    Change(usize, u8),
    Cut(usize),
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        4 => Just(Fate::Arrive),
        1 => Just(Fate::Vanish),
        1 => Just(Fate::Twice),
        4 => (14..200_usize, any::<u8>()).prop_map(|(at, bits)| Fate::Change(at, bits)),
        1 => (0..200_usize).prop_map(Fate::Cut),
    ]
}

/// An IPv4 packet with TCP for the service, whatever else is in it.
fn packet() -> impl Strategy<Value = Vec<u8>> {
    (any::<[u8; 4]>(), any::<u8>(), any::<u8>(), vec(any::<u8>(), 0..120), any::<bool>()).prop_map(
        |(source, flags, offset, payload, sound)| {
            let mut frame = vec![2; 12];
            let total = (20 + 20 + payload.len()) as u16;
            frame.extend([8, 0, 0x45, 0]);
            frame.extend(total.to_be_bytes());
            frame.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
            frame.extend(source);
            frame.extend(DEFAULT_ADDRESS.octets());
            frame.extend([source[0], source[1], 0, 80]);
            frame.extend([0, 0, 0, source[2], 0, 0, 0, source[3]]);
            frame.extend([if sound { 0x50 } else { offset }, flags, 4, 0, 0, 0, 0, 0]);
            frame.extend(payload);
            frame
        },
    )
}

fn pass(stack: &mut Stack, frame: &[u8]) {
    if stack.is_for_it(&frame[..frame.len().min(FRAME_START)]) {
        stack.take(frame);
    }
    assert!(stack.callers().count() <= MAX_CALLERS);
}

fn drain(stack: &mut Stack) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    while let Some(frame) = stack.front() {
        frames.push(frame.to_vec());
        stack.pop();
    }
    assert!(frames.len() <= 64, "what waits for the guest is bounded");
    frames
}

/// The service is as it was.
fn prove(stack: &mut Stack) {
    stack.reset();
    let answer = Client::new(60_000).ask(stack, "GET /latest HTTP/1.0\r\n\r\n");
    assert!(answer.ends_with("meta-data/"), "{answer}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_frame_does_harm(frames in vec(packet(), 1..80), take in any::<bool>()) {
        let mut stack = stack(MetadataVersion::V1);
        for frame in frames {
            pass(&mut stack, &frame);
            if take {
                drain(&mut stack);
            }
        }
        stack.next_work();
        drain(&mut stack);
        prove(&mut stack);
    }

    #[test]
    fn no_bytes_for_the_address_do_harm(kind in any::<bool>(), bytes in vec(any::<u8>(), 0..3000)) {
        let mut stack = stack(MetadataVersion::V1);
        let mut frame = vec![2; 12];
        frame.extend(if kind { [8, 0] } else { [8, 6] });
        frame.extend(bytes);
        if frame.len() >= 42 {
            let (at, fixed) = if kind { (30, 34) } else { (38, 42) };
            frame[at..fixed].copy_from_slice(&DEFAULT_ADDRESS.octets());
        }
        if !kind && frame.len() >= 22 {
            frame[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
        }
        pass(&mut stack, &frame);
        drain(&mut stack);
        prove(&mut stack);
    }

    #[test]
    fn no_spoilt_conversation_does_harm(fates in vec(fate(), 0..60), requests in vec("[ -~\r\n]{0,60}", 0..4)) {
        let mut stack = stack(MetadataVersion::V1);
        let mut client = Client::new(1);
        let mut fates = fates.into_iter();
        let mut requests = requests.into_iter();
        for _ in 0..40 {
            for frame in client.turn(drain(&mut stack)) {
                let mut frame = frame;
                match fates.next().unwrap_or(Fate::Arrive) {
                    Fate::Arrive => pass(&mut stack, &frame),
                    Fate::Vanish => {}
                    Fate::Twice => (0..2).for_each(|_| pass(&mut stack, &frame)),
                    Fate::Change(at, bits) => {
                        if let Some(byte) = frame.get_mut(at) {
                            *byte ^= bits;
                        }
                        pass(&mut stack, &frame);
                    }
                    Fate::Cut(len) => pass(&mut stack, &frame[..len.min(frame.len())]),
                }
            }
            if client.is_open() && let Some(request) = requests.next() {
                client.say(&format!("GET /{request} HTTP/1.1\r\n\r\n"));
            }
            stack.work();
        }
        drain(&mut stack);
        prove(&mut stack);
    }
}

#[test]
fn guest_that_opens_more_connections_than_there_are_is_refused_the_rest() {
    let mut stack = stack(MetadataVersion::V1);
    let mut clients: Vec<_> = (0..40).map(Client::new).collect();
    for client in &mut clients {
        client.open(&mut stack);
    }
    assert_eq!(clients.iter().filter(|client| client.is_open()).count(), MAX_CALLERS);
    // One that ends makes room for another.
    clients[0].say("GET /latest HTTP/1.0\r\n\r\n");
    clients[0].exchange(&mut stack);
    let answer = Client::new(100).ask(&mut stack, "GET /latest HTTP/1.0\r\n\r\n");
    assert!(answer.ends_with("meta-data/"));
}

#[test]
fn guest_that_takes_no_frames_makes_nobody_busy() {
    let mut stack = stack(MetadataVersion::V1);
    let syn = Client::new(1).turn([]);
    // The client asks by ARP before all else; it is never answered here.
    for _ in 0..200 {
        for frame in &syn {
            pass(&mut stack, frame);
        }
    }
    assert_eq!(drain(&mut stack).len(), 64);
    assert_eq!(stack.next_work(), None);
}

#[test]
fn connection_on_which_nothing_goes_on_is_reset() {
    let mut stack = stack(MetadataVersion::V1);
    let mut client = Client::new(1);
    client.open(&mut stack);
    stack.work_at(Instant::now() + IDLE / 2);
    assert_eq!(stack.callers().count(), 1);
    stack.work_at(Instant::now() + IDLE);
    assert_eq!(stack.callers().count(), 0);
    client.exchange(&mut stack);
    assert!(!client.is_open());
}

#[test]
fn first_connection_after_a_long_silence_is_not_taken_for_an_idle_one() {
    let mut stack = stack(MetadataVersion::V1);
    let mut client = Client::new(1);
    client.silence = IDLE * 2;
    client.open(&mut stack);
    assert!(client.is_open());
    assert_eq!(stack.callers().count(), 1);
}
