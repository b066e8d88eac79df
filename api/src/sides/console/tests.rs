use proptest::prelude::*;
use resources::protocol::Counter;

use super::*;

const SEED: u64 = 7;

fn params(cpus: u32) -> Params {
    Params { cpus, seed: SEED, verify: true, dirty: true, ..Params::default() }
}

/// What a sound guest prints: `rounds` times a count of each vCPU, and a finished walk every five rounds.
fn sound_stream(cpus: u32, rounds: u64) -> Vec<u8> {
    let mut counters: Vec<Box<Counter>> = (0..cpus).map(|_| Box::new(Counter::blank())).collect();
    let mut stream = Vec::new();
    let mut print = |line: Line| stream.extend_from_slice(line.encode().as_bytes());
    for (cpu, counter) in (0..).zip(&mut counters) {
        counter.reset(cpu, SEED);
        print(Line::Ready { cpu, cpus, pages: 100 * u64::from(cpus) });
    }
    for round in 1..=rounds {
        for (cpu, counter) in (0..).zip(&mut counters) {
            let n = counter.advance();
            print(Line::Count { cpu, n, sum: counter.sum() });
            if round % 5 == 0 {
                print(Line::Verify { cpu, pass: round / 5, pages: 100, wrong: 0, written: round });
            }
        }
    }
    stream
}

/// The primary wrote `stream` up to `seen`; the standby goes on at `start`.
fn judge(cpus: u32, stream: &[u8], seen: usize, start: usize) -> Findings {
    judge_two(cpus, &stream[..seen], &stream[start..], start)
}

fn judge_two(cpus: u32, primary: &[u8], standby: &[u8], start: usize) -> Findings {
    check(&params(cpus), true, &Consoles { primary, standby, output_start: Some(start as u64) })
}

fn outputs_ending_in(stream: &[u8], range: std::ops::Range<usize>) -> u64 {
    console_lines(stream).filter(|found| is_output(found) && range.contains(&found.end)).count() as u64
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn sound_failover_is_clean_wherever_it_is_cut(
        cpus in 1_u32..4, seen in 0.0..1.0_f64, unheard in 0_usize..400,
    ) {
        let stream = sound_stream(cpus, 60);
        let seen = (seen * stream.len() as f64) as usize;
        let start = seen.saturating_sub(unheard);
        let findings = judge(cpus, &stream, seen, start);
        prop_assert!(findings.is_clean(), "{:?}", findings);
        prop_assert_eq!(findings.outputs_before, outputs_ending_in(&stream, 0..seen + 1));
        prop_assert_eq!(findings.outputs_after, outputs_ending_in(&stream, start + 1..stream.len() + 1));
        prop_assert_eq!(findings.outputs_repeated, outputs_ending_in(&stream, start + 1..seen + 1));
    }

    #[test]
    fn byte_that_is_missing_is_found(seen in 0.0..1.0_f64, missing in 1_usize..400) {
        let stream = sound_stream(2, 60);
        let seen = (seen * (stream.len() - missing) as f64) as usize;
        let findings = judge(2, &stream, seen, seen + missing);
        prop_assert!(findings.outputs_lost > 0, "{:?}", findings);
    }

    #[test]
    fn byte_that_is_missing_unsaid_is_found(seen in 0.0..1.0_f64, at in 0.0..1.0_f64) {
        let stream = sound_stream(2, 60);
        let seen = (seen * stream.len() as f64) as usize;
        let at = (at * (stream.len() - 1) as f64) as usize;
        let mut short = stream[..at].to_vec();
        short.extend_from_slice(&stream[at + 1..]);
        // All but the digits of `written`, which nobody can know from outside.
        prop_assume!(!in_written(&stream, at));
        let seen = seen.min(short.len());
        prop_assert!(!judge(2, &short, seen, seen).is_clean());
    }

    #[test]
    fn byte_that_is_changed_is_found(seen in 0.0..1.0_f64, at in 0.0..1.0_f64, change in 1_u8..=255) {
        let mut stream = sound_stream(2, 60);
        let seen = (seen * stream.len() as f64) as usize;
        let at = (at * (stream.len() - 1) as f64) as usize;
        prop_assume!(!in_written(&stream, at));
        stream[at] ^= change;
        prop_assert!(!judge(2, &stream, seen, seen).is_clean());
    }

    #[test]
    fn byte_that_contradicts_the_primary_is_found(
        start in 0.0..1.0_f64, overlap in 1_usize..400, at in 0.0..1.0_f64, change in 1_u8..=255,
    ) {
        let stream = sound_stream(2, 60);
        let start = (start * (stream.len() - overlap) as f64) as usize;
        let mut standby = stream[start..].to_vec();
        standby[(at * overlap as f64) as usize] ^= change;
        let findings = judge_two(2, &stream[..start + overlap], &standby, start);
        prop_assert!(findings.outputs_regressed > 0, "{:?}", findings);
    }

    #[test]
    fn output_that_comes_again_is_found(line in 2_usize..140) {
        let stream = sound_stream(2, 60);
        let ends: Vec<usize> = console_lines(&stream).map(|line| line.end).collect();
        let (begin, end) = (ends[line - 1], ends[line]);
        let mut again = stream[..end].to_vec();
        again.extend_from_slice(&stream[begin..]);
        prop_assert!(judge(2, &again, end, end).outputs_regressed > 0);
    }

    #[test]
    fn any_bytes_are_judged_without_panic(
        primary in proptest::collection::vec(any::<u8>(), 0..200),
        standby in proptest::collection::vec(any::<u8>(), 0..200),
        start in proptest::option::of(any::<u64>()),
    ) {
        check(&params(1), true, &Consoles { primary: &primary, standby: &standby, output_start: start });
    }
}

/// Whether the byte at `at` belongs to the number after `written=`.
fn in_written(stream: &[u8], at: usize) -> bool {
    let line_start = stream[..at].iter().rposition(|&byte| byte == b'\n').map_or(0, |newline| newline + 1);
    let marker = b"written=";
    let line = &stream[line_start..at];
    stream[at].is_ascii_digit() && line.windows(marker.len()).any(|window| window == marker)
}

#[test]
fn memory_counts_as_verified_after_a_walk_that_began_after_the_failover() {
    let stream = sound_stream(2, 60);
    let middle = stream.len() / 2;
    let whole = judge(2, &stream, middle, middle);
    assert!(whole.complete);
    assert_eq!((whole.pages_verified, whole.vcpus_verified), (200, 2));

    let walks: Vec<usize> = console_lines(&stream[middle..])
        .filter(|found| matches!(found.line, Some(Line::Verify { cpu: 1, .. })))
        .map(|found| found.end)
        .collect();
    let two_walks = judge_two(2, &stream[..middle], &stream[middle..middle + walks[1]], middle);
    assert!(!two_walks.complete);
    let three_walks = judge_two(2, &stream[..middle], &stream[middle..middle + walks[2]], middle);
    assert!(three_walks.complete);
}

#[test]
fn wrong_pages_are_counted_once_also_in_a_walk_that_was_not_finished() {
    let mut stream = sound_stream(1, 4);
    let mut print = |line: Line| stream.extend_from_slice(line.encode().as_bytes());
    print(Line::Wrong { cpu: 0, page: 3, want: 2, found: 1 });
    print(Line::Verify { cpu: 0, pass: 1, pages: 100, wrong: 1, written: 5 });
    print(Line::Wrong { cpu: 0, page: 4, want: 2, found: 1 });
    let findings = judge(1, &stream, stream.len(), stream.len());
    assert_eq!(findings.pages_wrong, 2);
    assert!(!findings.is_clean());
}

#[test]
fn guest_that_started_anew_or_panicked_has_regressed() {
    let stream = sound_stream(1, 10);
    let again = judge_two(1, &stream, &stream, stream.len());
    assert!(again.outputs_regressed > 0);
    assert!(again.problems.iter().any(|text| text.contains("started anew")), "{:?}", again.problems);

    let mut panicked = stream.clone();
    let line = Line::Panic { vector: 14, rip: 1, err: 2, cr2: 3 };
    panicked.extend_from_slice(line.encode().as_bytes());
    assert!(!judge(1, &panicked, stream.len(), stream.len()).is_clean());
}

#[test]
fn standby_that_never_took_over_must_be_silent() {
    let stream = sound_stream(1, 10);
    let silent = Consoles { primary: &stream, standby: b"", output_start: None };
    assert!(check(&params(1), true, &silent).is_clean());
    let talking = Consoles { standby: b"x", ..silent };
    assert!(check(&params(1), true, &talking).outputs_regressed > 0);
}

#[test]
fn absurd_gap_is_counted_and_does_not_take_forever() {
    let mut stream = sound_stream(1, 4);
    stream.extend_from_slice(Line::Count { cpu: 0, n: u64::MAX, sum: 0 }.encode().as_bytes());
    let findings = judge(1, &stream, stream.len(), stream.len());
    assert_eq!(findings.outputs_lost, u64::MAX - 5);
}

#[test]
fn kernel_messages_are_no_damage_where_a_kernel_writes() {
    let mut stream = b"[    0.000000] Linux version\r\n".to_vec();
    stream.extend(sound_stream(1, 20));
    let consoles = Consoles { primary: &stream[..200], standby: &stream[150..], output_start: Some(150) };
    assert!(check(&params(1), false, &consoles).is_clean());
    assert!(!check(&params(1), true, &consoles).is_clean());
}
