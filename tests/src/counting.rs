//! The embedded guest counts on its console: what of it was seen, on whichever side it ran.

use mirror::report::Report;

use crate::pair::await_report;
use crate::process::Process;

/// Waits until `side` is protected, or protects.
pub fn await_protection(side: &Process) {
    await_report(&side.reports, |report| matches!(report, Report::Protected { .. }));
}

/// Waits until `side` runs the guest, and tells the position of the first byte that it prints of it.
pub fn await_active(side: &Process) -> usize {
    let active = await_report(&side.reports, |report| matches!(report, Report::Active { .. }));
    let Report::Active { output_start, .. } = active else { unreachable!() };
    output_start as usize
}

/// The numbers that the guest has counted, in lines that are whole.
pub fn counts(text: &str) -> Vec<u64> {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let counts = whole.lines().filter_map(|line| line.strip_prefix("count cpu=0 n="));
    counts.filter_map(|rest| rest.split(' ').next()?.parse().ok()).collect()
}

/// Waits until the guest has counted on, from now.
pub fn counts_on(side: &Process) {
    let seen = counts(&side.console.text()).len();
    side.console.await_text(|text| counts(text).len() > seen + 10);
}

/// What an observer saw: `before`, and from byte `start` of the stream on what came then.
pub fn joined(before: &str, start: usize, then: &str) -> String {
    assert!(start <= before.len(), "{} bytes are missing", start - before.len());
    let known = then.len().min(before.len() - start);
    assert_eq!(before[start..start + known], then[..known], "what was seen is contradicted");
    format!("{}{then}", &before[..start])
}

/// The guest has counted without a gap in `text`.
///
/// # Panics
/// If it has not.
pub fn assert_nothing_missing(text: &str) {
    let numbers = counts(text);
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{numbers:?}");
}
