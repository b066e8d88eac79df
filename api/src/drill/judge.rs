//! What a run must show, whatever happened in it.

use std::collections::BTreeMap;

use mirror::ids::{Epoch, Term};
use mirror::report::Report;

use super::record::Times;
use super::scene::{Observed, Scene};
use crate::history::{self, Operation, What};
use crate::sides::Side;
use crate::sides::console::{self, Consoles};

/// The consoles of all sides that ran the guest, one after the other.
pub(super) fn consoles(scene: &Scene<'_>) -> console::Findings {
    let mut heirs: Vec<(Side, u64, u64)> = scene
        .observed
        .iter()
        .filter_map(|(side, observed)| {
            observed.tally.active.map(|(at_us, _, _, start)| (*side, at_us, start))
        })
        .collect();
    heirs.sort_by_key(|(_, at_us, _)| *at_us);
    let mut before = scene.observed.get(&Side::PRIMARY).map(|side| side.console.clone()).unwrap_or_default();
    let plan = scene.plan;
    let judge = |primary: &[u8], standby: &[u8], output_start| {
        console::check(&plan.params, plan.embedded, &Consoles { primary, standby, output_start })
    };
    let Some(((last, _, start), earlier)) = heirs.split_last() else { return judge(&before, &[], None) };
    let mut contradictions = Vec::new();
    for (side, _, start) in earlier {
        let next = &scene.of(*side).console;
        contradictions.extend(judge(&before, next, Some(*start)).problems);
        before.truncate(*start as usize);
        before.extend_from_slice(next);
    }
    let mut findings = judge(&before, &scene.of(*last).console, Some(*start));
    findings.problems.extend(contradictions);
    findings
}

/// When what happened.
pub(super) fn times(scene: &Scene<'_>, history: &[Operation], ended_us: u64) -> Times {
    let run_us = ended_us.saturating_sub(scene.started_us);
    let Some(fault_us) = scene.fault_us else { return Times { run_us, ..Times::default() } };
    let first = |from_us: u64, wanted: fn(&Report) -> bool| {
        scene.observed.values().filter_map(|side| side.when(from_us, wanted)).min()
    };
    let lost = |report: &Report| matches!(report, Report::PrimaryLost { .. } | Report::StandbyLost { .. });
    let live = |report: &Report| matches!(report, Report::Active { .. } | Report::Solo { .. });
    let resumed_us = first(fault_us, live);
    let answered_us = resumed_us
        .and_then(|at_us| answers(history).map(|(_, end_us)| end_us).filter(|end_us| *end_us >= at_us).min());
    let after = |at_us: Option<u64>| at_us.map(|at_us| at_us - fault_us);
    Times {
        fault_us: fault_us - scene.started_us,
        detected_us: after(first(fault_us, lost)),
        resumed_us: after(resumed_us),
        answered_us: after(answered_us),
        reprotected_us: after(
            resumed_us
                .and_then(|at_us| first(at_us, |report| matches!(report, Report::Protected { .. })))
                .filter(|at_us| scene.returned_us.is_none_or(|returned_us| *at_us < returned_us)),
        ),
        run_us,
    }
}

/// Starts and ends of the requests that were answered by the guest.
pub(super) fn answers(history: &[Operation]) -> impl Iterator<Item = (u64, u64)> {
    history
        .iter()
        .filter(|operation| !matches!(operation.what, What::Lost { .. } | What::Garbled { .. }))
        .filter_map(|operation| Some((operation.start_us, operation.end_us?)))
}

/// Judges everything but the consoles; `served` is what came of the clients' history.
pub(super) fn judge(scene: &Scene<'_>, history: &[Operation], served: &history::Findings) -> Vec<String> {
    let mut violations = served.violations.told.clone();
    for operation in history {
        if let What::Lost { reason } = &operation.what {
            violations.push(format!("connection {} was lost: {reason}", operation.connection));
        }
    }
    terms(&scene.observed, &mut violations);
    commits(&scene.observed, &mut violations);
    silence(scene, history, &mut violations);
    violations
}

/// Each term has one owner.
fn terms(observed: &BTreeMap<Side, Observed>, violations: &mut Vec<String>) {
    let mut owners: BTreeMap<Term, Side> = BTreeMap::new();
    for (side, observed) in observed {
        for stamped in &observed.told {
            let (Report::Won { term } | Report::Solo { term } | Report::Active { term, .. }) =
                &stamped.report
            else {
                continue;
            };
            let owner = *owners.entry(*term).or_insert(*side);
            if owner != *side {
                violations.push(format!("{} and {} are both live in term {term}", owner.name(), side.name()));
            }
        }
    }
}

/// Who took over holds every epoch that its primary knew to be committed, and its primary released nothing beyond.
fn commits(observed: &BTreeMap<Side, Observed>, violations: &mut Vec<String>) {
    for (side, heir) in observed {
        let Some((active_us, epoch, ..)) = heir.tally.active else { continue };
        // The one that was mirrored to it: whose last agreement before was at the same time.
        let Some(joined_us) = heir.tally.joined_us else { continue };
        let primary = observed.iter().filter(|(other, _)| *other != side).find_map(|(other, observed)| {
            let joined = observed.when(0, |report| matches!(report, Report::Joined { .. }))?;
            let last = observed.tally.joined_us.unwrap_or(joined);
            (last.abs_diff(joined_us) < 2_000_000).then_some((other, observed))
        });
        let Some((other, primary)) = primary else { continue };
        let mut released = None;
        for stamped in &primary.told {
            let Report::Committed { epoch: committed, released: until, .. } = &stamped.report else {
                continue;
            };
            if stamped.at_us < joined_us.min(active_us) {
                continue;
            }
            released = Some(*until);
            if *committed > epoch {
                violations.push(format!(
                    "the {} went on from epoch {epoch}, but the {} knew epoch {committed} to be committed",
                    side.name(),
                    other.name()
                ));
                break;
            }
        }
        let wrote = primary.console.len() as u64;
        // What it said last may have been lost with it; one that lived on has told of all.
        let gave_up = |report: &Report| matches!(report, Report::Frozen { .. } | Report::HandedOver { .. });
        let lived_on = primary.when(0, gave_up).is_some();
        if let Some(released) = released.filter(|released| wrote > *released && lived_on) {
            violations.push(format!(
                "the {} wrote {} bytes more to its console than was committed",
                other.name(),
                wrote - released
            ));
        }
    }
}

/// From the moment at which a side is lost until one is known to be live, nothing new is answered: there is neither a
/// commit nor a grant.
fn silence(scene: &Scene<'_>, history: &[Operation], violations: &mut Vec<String>) {
    // Nothing of a guest that is not protected waits, whoever is lost.
    let (mut lost_us, mut protected) = (None, false);
    let mut told: Vec<_> = scene.observed.values().flat_map(|side| &side.told).collect();
    told.sort_by_key(|stamped| stamped.at_us);
    for stamped in told {
        match &stamped.report {
            Report::Protected { .. } => protected = true,
            // A standby that was still seeded: nothing waits for it.
            Report::PrimaryLost { epoch: Epoch::NONE, .. } => {}
            Report::PrimaryLost { .. } | Report::StandbyLost { .. } if protected => {
                lost_us.get_or_insert(stamped.at_us);
            }
            // The grant: the guest may run a moment before its side tells so.
            Report::Won { .. } | Report::Active { .. } | Report::Solo { .. } => {
                protected = false;
                let Some(from_us) = lost_us.take() else { continue };
                let early = answers(history)
                    .filter(|(start_us, end_us)| *start_us > from_us && *end_us < stamped.at_us)
                    .count();
                if early > 0 {
                    violations
                        .push(format!("{early} requests were answered while no side was known to be live"));
                }
            }
            _ => {}
        }
    }
}
