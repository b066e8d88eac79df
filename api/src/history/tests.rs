//! The checker must be able to fail: each test takes a sound history, breaks one promise in it, and wants to hear of it.

use std::fs;

use resources::protocol::{BLOCK_BYTES, fill_block};

use super::*;

fn set(start_us: u64, end_us: impl Into<Option<u64>>, key: &str, value: u64) -> Operation {
    Operation { connection: 1, start_us, end_us: end_us.into(), what: What::Set { key: key.into(), value } }
}

fn get(start_us: u64, end_us: u64, key: &str, value: impl Into<Option<u64>>) -> Operation {
    let what = What::Get { key: key.into(), value: value.into() };
    Operation { connection: 2, start_us, end_us: Some(end_us), what }
}

fn incr(start_us: u64, end_us: impl Into<Option<u64>>, value: impl Into<Option<u64>>) -> Operation {
    let what = What::Incr { key: "c".into(), value: value.into() };
    Operation { connection: 3, start_us, end_us: end_us.into(), what }
}

/// What the checker says; empty if nothing is wrong.
fn told(history: &[Operation]) -> String {
    check(history).violations.told.join("\n")
}

fn sound_register() -> Vec<Operation> {
    vec![
        get(1, 2, "r", 0),
        set(10, 20, "r", 5),
        // It may see either: both are under way.
        get(29, 45, "r", 7),
        get(30, 33, "r", 5),
        set(30, 40, "r", 7),
        get(50, 60, "r", 7),
        set(70, None, "r", 9),
        get(80, 90, "r", 7),
        get(91, 95, "r", 9),
    ]
}

fn sound_counter() -> Vec<Operation> {
    vec![
        incr(10, 20, 1),
        incr(12, 30, 3),
        incr(13, 31, 2),
        incr(40, None, None),
        incr(50, 60, 5),
        get(70, 80, "c", 5),
    ]
}

#[test]
fn sound_histories_pass() {
    for history in [sound_register(), sound_counter()] {
        assert_eq!(told(&history), "");
    }
}

#[test]
fn acknowledged_write_that_is_gone_is_found() {
    let history = [set(10, 20, "r", 5), set(30, 40, "r", 7), get(50, 60, "r", 5)];
    assert!(told(&history).contains("'get → 5' (50 µs to 60 µs) comes after 'set 7'"), "{}", told(&history));
    let history = [set(10, 20, "r", 5), get(50, 60, "r", None)];
    assert!(told(&history).contains("get → nothing"), "{}", told(&history));
}

#[test]
fn read_that_goes_back_in_time_is_found() {
    // The set is under way all the while: each read alone could be, but not in this order.
    let history = [
        set(10, 20, "r", 5),
        set(30, 90, "r", 7),
        get(40, 50, "r", 7),
        get(60, 70, "r", 5),
        get(99, 100, "r", 7),
    ];
    assert!(
        told(&history).contains("'get → 5' (60 µs to 70 µs) comes after 'get → 7'"),
        "{}",
        told(&history)
    );
}

#[test]
fn unanswered_write_that_was_seen_must_stay() {
    let history = [set(10, None, "r", 5), get(20, 30, "r", 5), get(40, 50, "r", 0)];
    assert!(told(&history).contains("'get → 0'"), "{}", told(&history));
}

#[test]
fn read_of_the_future_is_found() {
    let history = [get(1, 2, "r", 5), set(10, 20, "r", 5), get(30, 40, "r", 5)];
    assert!(told(&history).contains("'set 5'"), "{}", told(&history));
}

#[test]
fn value_that_nobody_wrote_is_found() {
    let history = [set(10, 20, "r", 5), get(30, 40, "r", 6), get(50, 60, "r", 5)];
    assert!(told(&history).contains("6 was read, which was never set"), "{}", told(&history));
}

#[test]
fn increments_that_two_sides_carried_out_are_found() {
    let history = [incr(10, 20, 1), incr(15, 25, 1), get(30, 40, "c", 1)];
    assert!(told(&history).contains("two were told"), "{}", told(&history));
}

#[test]
fn counter_that_falls_back_is_found() {
    let history = [incr(10, 20, 1), incr(30, 40, 2), get(50, 60, "c", 1)];
    assert!(told(&history).contains("'get → 1'"), "{}", told(&history));
}

#[test]
fn increment_that_nobody_asked_for_is_found() {
    let mut history = sound_counter();
    history.retain(|operation| operation.end_us.is_some());
    assert!(told(&history).contains("no increment explains 4"), "{}", told(&history));
    // One that was asked for only afterwards does not explain it.
    history.push(incr(85, None, None));
    assert!(told(&history).contains("no increment explains 4"), "{}", told(&history));
}

#[test]
fn increment_without_an_answer_explains_one_value_only() {
    let history = [incr(10, None, None), incr(20, 30, 3), get(40, 50, "c", 3)];
    assert!(told(&history).contains("no increment explains 2"), "{}", told(&history));
}

#[test]
fn key_that_is_not_read_in_the_end_is_not_taken_for_sound() {
    assert!(told(&[set(10, 20, "r", 5), get(15, 19, "r", 5)]).contains("nobody read it"));
    assert!(told(&[incr(10, 20, 1)]).contains("nobody read it"));
}

#[test]
fn history_that_breaks_the_rules_is_not_taken_for_sound() {
    let overlapping = [set(10, 20, "r", 5), set(15, 25, "r", 6), get(30, 40, "r", 6)];
    let after_unanswered = [set(10, None, "r", 5), set(25, 30, "r", 6), get(35, 40, "r", 6)];
    let twice = [set(10, 20, "r", 5), set(25, 30, "r", 5), get(35, 40, "r", 5)];
    for history in [&overlapping[..], &after_unanswered, &twice] {
        assert!(told(history).contains("cannot be judged"), "{}", told(history));
    }
}

#[test]
fn streams_are_prefixes_of_what_was_sent() {
    let stream = |end_us, got, wrong_at| {
        told(&[Operation {
            connection: 4,
            start_us: 1,
            end_us,
            what: What::Stream { bytes: 100, got, wrong_at },
        }])
    };
    assert_eq!(stream(Some(9), 100, None), "");
    assert_eq!(stream(None, 40, None), "");
    assert!(stream(None, 40, Some(7)).contains("byte 7"));
    assert!(stream(Some(9), 99, None).contains("99 bytes"));
    assert!(stream(None, 101, None).contains("101 bytes"));
    let garbled = What::Garbled { answer: "val".into() };
    assert!(told(&[Operation { connection: 4, start_us: 1, end_us: None, what: garbled }]).contains("'val'"));
}

#[test]
fn history_is_read_as_it_was_written_and_a_damaged_line_is_named() {
    let history = [sound_register(), sound_counter()].concat();
    let mut text = Vec::new();
    write(&history, &mut text).unwrap();
    assert_eq!(read(&text[..]).unwrap(), history);
    let error = read(&b"\n{\"op\":\"get\"}\n"[..]).unwrap_err().to_string();
    assert!(error.contains("line 2"), "{error}");
}

#[test]
fn image_must_hold_every_acknowledged_block() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let mut bytes = vec![0; 3 * BLOCK_BYTES];
    for (number, value) in [(0, 10), (1, 21), (2, 30)] {
        let at = number as usize * BLOCK_BYTES;
        fill_block((&mut bytes[at..at + BLOCK_BYTES]).try_into().unwrap(), number, value);
    }
    fs::write(&path, &bytes).unwrap();
    let stored = [
        set(1, 2, "block/0", 10),
        set(3, 4, "block/1", 20),
        set(5, None, "block/1", 21),
        set(6, 7, "block/2", 30),
        get(8, 9, "r", 0),
    ];
    let found = |history: &[Operation]| image::check(history, &path).unwrap();

    assert_eq!((found(&stored).blocks, found(&stored).violations.count), (3, 0));
    let newer = [&stored[..], &[set(8, 9, "block/0", 11)]].concat();
    assert!(found(&newer).violations.told[0].contains("holds 10, but 11"));
    let mut older = stored.to_vec();
    older[2].start_us = 2;
    assert!(found(&older).violations.told[0].contains("holds 21, but 20"), "an older store is not enough");
    // A bit of the data is lost.
    bytes[2 * BLOCK_BYTES + 100] ^= 1;
    fs::write(&path, &bytes).unwrap();
    assert!(found(&stored).violations.told[0].contains("block 2 of the image is not whole"));
    fs::write(&path, &bytes[..BLOCK_BYTES]).unwrap();
    assert!(image::check(&stored, &path).is_err());
}
