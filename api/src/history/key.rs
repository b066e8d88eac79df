//! One register or counter.
//!
//! Its versions are numbered: the writes of a register in the order in which its one writer made them, those of a counter
//! by their results. The write of version v has rank 2v, a read that found it 2v + 1. The answers can be explained if, and
//! only if, ranks never fall in time: what began after something had ended has no lower rank.

use std::collections::HashMap;
use std::fmt::Display;

use super::{Operation, Violations, What};

/// A key and all that was asked of it.
#[derive(Default)]
pub(super) struct Key<'a> {
    operations: Vec<&'a Operation>,
}

/// An operation in its place.
struct Ranked<'a> {
    operation: &'a Operation,
    rank: u64,
}

impl<'a> Key<'a> {
    pub(super) fn push(&mut self, operation: &'a Operation) {
        self.operations.push(operation);
    }

    /// Says what cannot be of the key `name`.
    pub(super) fn judge(mut self, name: &str, violations: &mut Violations) {
        self.operations.sort_by_key(|operation| operation.start_us);
        let has = |wanted: fn(&What) -> bool| self.operations.iter().any(|operation| wanted(&operation.what));
        let (sets, increments) =
            (has(|what| matches!(what, What::Set { .. })), has(|what| matches!(what, What::Incr { .. })));
        let mut complain = |text: &dyn Display| violations.add(format_args!("key {name}: {text}"));
        let ranked = if sets && increments {
            complain(&"it is both set and counted up, which cannot be judged");
            return;
        } else if increments {
            self.counter(&mut complain)
        } else {
            self.register(&mut complain)
        };
        in_time(&ranked, &mut complain);
        if !self.is_read_in_the_end() {
            complain(&"nobody read it after its last acknowledged write");
        }
    }

    fn register(&self, complain: &mut dyn FnMut(&dyn Display)) -> Vec<Ranked<'a>> {
        let mut versions = HashMap::from([(0, 0)]);
        let mut ranked = Vec::new();
        let mut free_us = Some(0);
        for operation in &self.operations {
            let What::Set { value, .. } = operation.what else { continue };
            if free_us.is_none_or(|free_us| operation.start_us < free_us) {
                complain(&"it is set while another set is under way, which cannot be judged");
            }
            free_us = operation.end_us;
            let version = versions.len() as u64;
            if versions.insert(value, version).is_some() {
                complain(&format_args!("{value} is set twice, which cannot be judged"));
            }
            ranked.push(Ranked { operation, rank: 2 * version });
        }
        for operation in &self.operations {
            let What::Get { value, .. } = operation.what else { continue };
            if operation.end_us.is_none() {
                continue;
            }
            match versions.get(&value.unwrap_or(0)) {
                Some(version) => ranked.push(Ranked { operation, rank: 2 * version + 1 }),
                None => complain(&format_args!("{} was read, which was never set", value.unwrap_or(0))),
            }
        }
        ranked
    }

    fn counter(&self, complain: &mut dyn FnMut(&dyn Display)) -> Vec<Ranked<'a>> {
        let mut ranked = Vec::new();
        let mut increments = HashMap::new();
        let mut unanswered = Vec::new();
        for operation in &self.operations {
            match operation.what {
                What::Incr { value: Some(value), .. } if operation.end_us.is_some() => {
                    if increments.insert(value, operation).is_some() {
                        complain(&format_args!("two were told that they counted it up to {value}"));
                    }
                    ranked.push(Ranked { operation, rank: value.saturating_mul(2) });
                }
                What::Incr { .. } => unanswered.push(operation.start_us),
                What::Get { value, .. } if operation.end_us.is_some() => {
                    let rank = value.unwrap_or(0).saturating_mul(2).saturating_add(1);
                    ranked.push(Ranked { operation, rank });
                }
                _ => {}
            }
        }
        let explained = Unseen { ranked: &ranked, unanswered: &unanswered };
        explained.check(|value| increments.contains_key(&value), complain);
        ranked
    }

    /// Whether something that looks at the key began after its last acknowledged write had ended.
    fn is_read_in_the_end(&self) -> bool {
        let writes = self.operations.iter().filter(|operation| !matches!(operation.what, What::Get { .. }));
        let Some(last_us) = writes.filter_map(|operation| operation.end_us).max() else { return true };
        self.operations.iter().any(|operation| {
            matches!(operation.what, What::Get { .. })
                && operation.end_us.is_some()
                && operation.start_us >= last_us
        })
    }
}

/// Values of a counter that nobody was told of.
struct Unseen<'a> {
    ranked: &'a [Ranked<'a>],
    /// When the increments without an answer began, in order.
    unanswered: &'a [u64],
}

impl Unseen<'_> {
    /// Each value up to the highest must be of an increment: one with an answer, or one without that began in time.
    fn check(&self, is_told: impl Fn(u64) -> bool, complain: &mut dyn FnMut(&dyn Display)) {
        let mut by_rank: Vec<(u64, u64)> =
            self.ranked.iter().filter_map(|op| Some((op.rank, op.operation.end_us?))).collect();
        by_rank.sort_unstable();
        // From when on a rank was known to be reached, at the latest.
        let mut earliest_us = u64::MAX;
        for (_, end_us) in by_rank.iter_mut().rev() {
            earliest_us = earliest_us.min(*end_us);
            *end_us = earliest_us;
        }
        let highest = by_rank.last().map_or(0, |(rank, _)| rank / 2);
        let mut free = self.unanswered.iter();
        let (mut value, mut place) = (0, 0);
        while value < highest {
            value += 1;
            if is_told(value) {
                continue;
            }
            while by_rank.get(place).is_some_and(|(rank, _)| *rank < 2 * value) {
                place += 1;
            }
            let reached_us = by_rank.get(place).map_or(u64::MAX, |(_, end_us)| *end_us);
            if free.next().is_none_or(|start_us| *start_us > reached_us) {
                complain(&format_args!("it was at {highest}, but no increment explains {value}"));
                return;
            }
        }
    }
}

/// Whether ranks never fall in time.
fn in_time(ranked: &[Ranked<'_>], complain: &mut dyn FnMut(&dyn Display)) {
    let mut by_start: Vec<&Ranked<'_>> = ranked.iter().collect();
    by_start.sort_by_key(|ranked| ranked.operation.start_us);
    let mut by_end: Vec<(u64, &Ranked<'_>)> =
        ranked.iter().filter_map(|ranked| Some((ranked.operation.end_us?, ranked))).collect();
    by_end.sort_by_key(|(end_us, _)| *end_us);
    let mut ended = by_end.into_iter().peekable();
    let mut highest: Option<&Ranked<'_>> = None;
    for next in by_start {
        while let Some((_, before)) = ended.next_if(|(end_us, _)| *end_us < next.operation.start_us) {
            if highest.is_none_or(|highest| before.rank > highest.rank) {
                highest = Some(before);
            }
        }
        if let Some(before) = highest.filter(|highest| highest.rank > next.rank) {
            complain(&format_args!("{} comes after {}", text(next.operation), text(before.operation)));
        }
    }
}

fn text(operation: &Operation) -> String {
    let what = match operation.what {
        What::Set { value, .. } => format!("set {value}"),
        What::Get { value, .. } => {
            format!("get → {}", value.map_or("nothing".into(), |value| value.to_string()))
        }
        What::Incr { value, .. } => format!("incr → {}", value.unwrap_or_default()),
        _ => String::new(),
    };
    let end_us = operation.end_us.map_or("never answered".into(), |end_us| format!("{end_us} µs"));
    format!("'{what}' ({} µs to {end_us})", operation.start_us)
}
