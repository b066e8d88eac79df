//! What is to be said of a run: when what happened, and which promise is broken.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use mirror::report::{Report, Stamped};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use understudy::history::{self, Findings, Operation, Violations};

use crate::frames::Heard;

/// What the drill did, in `run.json`. Times are microseconds of this machine's clock.
#[derive(Debug, Deserialize)]
struct Run {
    fault: String,
    #[serde(rename = "run")]
    number: u32,
    /// The side that ran the guest, and the other.
    primary: String,
    standby: String,
    /// When the fault was done.
    fault_us: u64,
    /// When it was undone.
    back_us: Option<u64>,
    /// By how much this machine's clock is ahead of each side's.
    offset_us: BTreeMap<String, i64>,
    /// What the drill itself found wrong.
    complaints: Vec<String>,
}

/// What is told: a line.
#[derive(Debug, Default, Serialize)]
struct Verdict {
    drill: &'static str,
    fault: String,
    run: u32,
    primary: String,
    live: Option<String>,
    outcome: &'static str,
    /// From the fault until it was noticed by the side that went on, until the guest ran there, until an answer to a client
    /// came from there, and until a frame came that told the switch where the guest is.
    detected_ms: Option<f64>,
    resumed_ms: Option<f64>,
    announced_ms: Option<f64>,
    answered_ms: Option<f64>,
    /// … until the primary that lost knew that it must not go on.
    stopped_ms: Option<f64>,
    /// The longest time in which no client got an answer.
    silence_ms: f64,
    /// From the end of the fault until the guest was protected again.
    reprotected_ms: Option<f64>,
    requests: u64,
    acknowledged: u64,
    unanswered: u64,
    connections_lost: u64,
    /// Frames in the guest's name from the side that did not go on, from the fault on, and how long after it the last came.
    loser_frames: usize,
    loser_last_ms: Option<f64>,
    /// How the drive of the side that came back was made the same, `delta` or `whole`; MiB that it was sent, and all of it.
    drive_sync: Option<&'static str>,
    drive_sent_mib: Option<f64>,
    drive_mib: Option<f64>,
    /// Keys that were read from the image on the side that went on.
    drive_keys: usize,
    violations: u64,
    told: Vec<String>,
}

/// Prints the verdict on the run whose records are in `folder`; whether nothing is wrong.
pub(crate) fn judge(folder: &Path) -> io::Result<bool> {
    let run: Run = serde_json::from_reader(File::open(folder.join("run.json"))?)?;
    let history = |name: &str| {
        let history = File::open(folder.join(name))?;
        history::read(BufReader::new(history)).map_err(io::Error::other)
    };
    let on_the_drive = if folder.join("recovered").exists() { history("recovered")? } else { Vec::new() };
    let history = history("history")?;
    let frames: Vec<Heard> = lines(&folder.join("frames"))?;
    let events = |side: &str| -> io::Result<Vec<Stamped>> {
        let offset_us = run.offset_us.get(side).copied().unwrap_or_default();
        let path = folder.join(format!("{side}.events"));
        // A host that was killed has taken them with it.
        let mut events: Vec<Stamped> = if path.exists() { lines(&path)? } else { Vec::new() };
        for event in &mut events {
            event.at_us = event.at_us.saturating_add_signed(offset_us);
        }
        events.retain(|event| event.at_us >= run.fault_us);
        Ok(events)
    };
    let (primary, standby) = (events(&run.primary)?, events(&run.standby)?);
    let verdict = verdict(&run, (&history, &on_the_drive), &frames, &primary, &standby);
    println!("{}", serde_json::to_string(&verdict)?);
    Ok(verdict.violations == 0 && verdict.outcome != "lost")
}

/// The lines of a file; what is there of a last one that is not whole does not count.
fn lines<T: DeserializeOwned>(path: &Path) -> io::Result<Vec<T>> {
    let lines: Vec<String> = BufReader::new(File::open(path)?).lines().collect::<io::Result<_>>()?;
    let whole = lines.iter().enumerate().filter_map(|(index, line)| match serde_json::from_str(line) {
        Err(_) if index + 1 == lines.len() => None,
        parsed => Some(parsed.map_err(io::Error::from)),
    });
    whole.collect()
}

fn verdict(
    run: &Run,
    (history, on_the_drive): (&[Operation], &[Operation]),
    frames: &[Heard],
    primary: &[Stamped],
    standby: &[Stamped],
) -> Verdict {
    let Findings { operations, answered, acknowledged, connections_lost, mut violations, .. } =
        history::check(history);
    drive(history, on_the_drive, &mut violations);
    run.complaints.iter().for_each(|complaint| violations.add(complaint));

    let taken_over = first(standby, |report| matches!(report, Report::Active { .. }));
    let alone = first(primary, |report| matches!(report, Report::Solo { .. } | Report::Thawed { .. }));
    let live = match (taken_over, alone) {
        (Some(at_us), None) => Some((&run.standby, standby, at_us)),
        (None, Some(at_us)) => Some((&run.primary, primary, at_us)),
        (Some(_), Some(_)) => {
            violations.add("both sides went on with the guest");
            None
        }
        (None, None) => None,
    };
    let mut verdict = Verdict {
        drill: "two-hosts",
        fault: run.fault.clone(),
        run: run.number,
        primary: run.primary.clone(),
        outcome: "lost",
        silence_ms: silence_ms(history),
        requests: operations,
        acknowledged,
        unanswered: operations - connections_lost - answered,
        connections_lost,
        drive_keys: on_the_drive.iter().filter(|read| read.end_us.is_some()).count(),
        ..Verdict::default()
    };
    let since = |at_us: u64| Some((at_us.saturating_sub(run.fault_us)) as f64 / 1000.0);
    if let Some((side, events, resumed_us)) = live {
        verdict.live = Some(side.clone());
        let noticed =
            |report: &Report| matches!(report, Report::PrimaryLost { .. } | Report::StandbyLost { .. });
        verdict.detected_ms = first(events, noticed).and_then(since);
        verdict.resumed_ms = since(resumed_us);
        let answers = history.iter().filter_map(|operation| operation.end_us);
        verdict.answered_ms = answers.filter(|end_us| *end_us > resumed_us).min().and_then(since);
        let protected = events.iter().find(|event| {
            run.back_us.is_some_and(|back_us| event.at_us > back_us)
                && matches!(event.report, Report::Protected { .. })
        });
        verdict.reprotected_ms = protected
            .zip(run.back_us)
            .map(|(event, back_us)| event.at_us.saturating_sub(back_us) as f64 / 1000.0);
        if let Some((bytes, left)) = events.iter().find_map(|event| match event.report {
            Report::DiskSync { bytes, left } if run.back_us.is_some_and(|back_us| event.at_us > back_us) => {
                Some((bytes, left))
            }
            _ => None,
        }) {
            let mib = |bytes: u64| Some(bytes as f64 / f64::from(1 << 20));
            verdict.drive_sync = Some(if left < bytes { "delta" } else { "whole" });
            (verdict.drive_sent_mib, verdict.drive_mib) = (mib(left), mib(bytes));
        }
        verdict.outcome = match (verdict.answered_ms, verdict.reprotected_ms) {
            (None, _) => "lost",
            (_, Some(_)) => "reprotected",
            _ if *side == run.standby => "switched",
            _ => "survived",
        };
        // A host without power tells nothing.
        if *side == run.standby && run.fault != "power" {
            let stopped =
                |report: &Report| matches!(report, Report::Suspended { .. } | Report::Frozen { .. });
            verdict.stopped_ms = first(primary, stopped).and_then(since);
            if verdict.stopped_ms.is_none() {
                violations.add("the primary that lost did not stop its guest");
            }
        }
        one_speaker(run, side, frames, &mut verdict, &mut violations);
    }
    verdict.violations = violations.count;
    verdict.told = violations.told;
    verdict
}

/// What was read from the image of the side that went on, once all else was over, goes on from what clients were told.
fn drive(history: &[Operation], on_the_drive: &[Operation], violations: &mut Violations) {
    let all: Vec<Operation> = history.iter().chain(on_the_drive).cloned().collect();
    let found = history::check(&all).violations;
    if found.count > violations.count {
        let new = found.told.iter().filter(|text| !violations.told.contains(text));
        let told: Vec<String> = new.map(|text| format!("on the drive: {text}")).collect();
        violations.count += found.count - violations.count;
        violations.told.extend(told);
    }
}

/// Only the side that lives speaks for the guest once it has begun to.
fn one_speaker(
    run: &Run,
    live: &String,
    frames: &[Heard],
    verdict: &mut Verdict,
    violations: &mut Violations,
) {
    let frames = || frames.iter().filter(|frame| frame.at_us >= run.fault_us);
    let since = |at_us: u64| (at_us - run.fault_us) as f64 / 1000.0;
    let of_live = frames().filter(|frame| frame.port == *live).map(|frame| frame.at_us).min();
    let of_other: Vec<_> = frames().filter(|frame| frame.port != *live).collect();
    verdict.loser_frames = of_other.len();
    verdict.loser_last_ms = of_other.iter().map(|frame| frame.at_us).max().map(since);
    if *live != run.primary {
        // RARP and ARP: the guest is announced.
        let announced =
            frames().find(|frame| frame.port == *live && ["8035", "0806"].contains(&&*frame.kind));
        verdict.announced_ms = announced.map(|frame| since(frame.at_us));
    }
    // A primary that goes on was speaking all the while.
    let from_us = if *live == run.primary { Some(run.fault_us) } else { of_live };
    let late = of_other.iter().filter(|frame| from_us.is_some_and(|from_us| frame.at_us > from_us)).count();
    if late > 0 {
        violations.add(format_args!("{late} frames of the guest came from the side that did not go on"));
    }
}

fn first(events: &[Stamped], wanted: impl Fn(&Report) -> bool) -> Option<u64> {
    events.iter().find(|event| wanted(&event.report)).map(|event| event.at_us)
}

/// The longest time between two answers.
fn silence_ms(history: &[Operation]) -> f64 {
    let mut answers: Vec<u64> = history.iter().filter_map(|operation| operation.end_us).collect();
    answers.sort_unstable();
    answers.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default() as f64 / 1000.0
}
