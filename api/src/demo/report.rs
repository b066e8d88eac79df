//! The report of a run: one JSON object, or a table for people.

use std::fmt::Write as _;

use serde::Serialize;

use crate::sides::console::Findings;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The guest goes on in the standby and nothing is lost.
    Survived,
    /// The primary died before the standby had a complete epoch, and the standby did not run the guest. Nothing that was
    /// promised is lost.
    NotProtected,
    /// Something is lost, regressed or wrong.
    Lost,
}

/// Figures of the pauses, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Pauses {
    /// Half were at most this long.
    pub p50: u64,
    /// 99 of 100 were at most this long.
    pub p99: u64,
    /// The longest.
    pub max: u64,
}

/// One run.
#[derive(Clone, Debug, Serialize)]
pub struct RunReport {
    /// How it ended.
    pub outcome: Outcome,
    /// Counted from 1.
    pub run: u32,
    /// vCPUs of the guest.
    pub vcpus: u8,
    /// Memory of the guest in MiB.
    pub mem_mib: u32,
    /// Pages that the guest was to write per second.
    pub dirty_rate: u64,
    /// From the start of the primary to its death, in seconds.
    pub kill_after_s: f64,
    /// What the primary was doing when it was killed: starting, seeding, lockstep or unprotected.
    pub phase_at_kill: &'static str,
    /// The term in which the standby went on.
    pub term: Option<u64>,
    /// The epoch from which it went on.
    pub epoch: Option<u64>,
    /// Seeding rounds.
    pub seed_rounds: u32,
    /// Pages sent in them.
    pub seed_pages: u64,
    /// Bytes sent in them.
    pub seed_bytes: u64,
    /// Seconds that they took.
    pub seed_s: f64,
    /// Epochs that the primary knew to be committed.
    pub epochs_committed: u64,
    /// Pages sent in them.
    pub epoch_pages: u64,
    /// Bytes sent in them.
    pub epoch_bytes: u64,
    /// The pauses.
    pub pause_us: Pauses,
    /// From the kill until the standby noticed.
    pub detect_ms: Option<f64>,
    /// From there until the guest ran.
    pub resume_ms: Option<f64>,
    /// From the kill until the first output of the standby arrived.
    pub failover_ms: Option<f64>,
    /// How the standby noticed.
    pub noticed_by: Option<String>,
    /// Why the standby did not run the guest.
    pub refused: Option<String>,
    /// What was checked.
    #[serde(flatten)]
    pub findings: Findings,
}

impl RunReport {
    /// In one line.
    pub fn line(&self) -> String {
        let start = format!(
            "run {:>3}  killed after {:>7.3} s ({})",
            self.run, self.kill_after_s, self.phase_at_kill
        );
        match self.outcome {
            Outcome::Survived => format!(
                "{start}  survived: failover {:.1} ms, {} + {} outputs, {} pages verified",
                self.failover_ms.unwrap_or_default(),
                self.findings.outputs_before,
                self.findings.outputs_after,
                self.findings.pages_verified
            ),
            Outcome::NotProtected => format!("{start}  not protected yet; the standby refused to run it"),
            Outcome::Lost => format!("{start}  LOST: {}", self.findings.problems.join("; ")),
        }
    }

    /// For people, at most 80 columns wide where nothing went wrong.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let headline = match self.outcome {
            Outcome::Survived => "The guest survived the death of its primary, and nothing is lost.",
            Outcome::NotProtected => {
                "The primary died before the guest was protected. The standby did not run it,\nas promised."
            }
            Outcome::Lost => "SOMETHING WAS LOST.",
        };
        // Writing to a string does not fail, here and below.
        let _ = writeln!(out, "\n{headline}\n");
        self.times(&mut out);
        self.mirror(&mut out);
        self.checks(&mut out);
        for problem in &self.findings.problems {
            let _ = writeln!(out, "  problem: {problem}");
        }
        out
    }

    fn times(&self, out: &mut String) {
        let mut rows = Vec::new();
        if let Some(detect) = self.detect_ms {
            rows.push((detect, "standby noticed", self.noticed_by.clone().unwrap_or_default()));
            if let (Some(resume), Some(term), Some(epoch)) = (self.resume_ms, self.term, self.epoch) {
                rows.push((
                    detect + resume,
                    "guest ran again",
                    format!("from epoch {epoch}, in term {term}"),
                ));
            }
        }
        // Output that was committed and not yet seen comes before anything new.
        rows.extend(self.failover_ms.map(|ms| (ms, "first output of the standby", String::new())));
        rows.sort_by(|(ours, ..), (theirs, ..)| ours.total_cmp(theirs));
        let mut row = |what: &str, when: &str, more: &str| {
            let line = format!("  {what:<28}{when:>12}   {more}");
            let _ = writeln!(out, "{}", line.trim_end());
        };
        row(
            "primary killed (SIGKILL)",
            &format!("{:.3} s", self.kill_after_s),
            &format!("in {}", self.phase_at_kill),
        );
        for (ms, what, more) in &rows {
            row(what, &format!("+{ms:.1} ms"), &shortened(more));
        }
        if let Some(reason) = &self.refused {
            let _ = writeln!(out, "  standby refused: {reason}");
        }
        let _ = writeln!(out);
    }

    fn mirror(&self, out: &mut String) {
        let _ = writeln!(
            out,
            "  seeding   {} round{}, {} pages, {} in {:.2} s",
            self.seed_rounds,
            if self.seed_rounds == 1 { "" } else { "s" },
            self.seed_pages,
            mib(self.seed_bytes),
            self.seed_s
        );
        let Pauses { p50, p99, max } = self.pause_us;
        let _ = writeln!(
            out,
            "  lockstep  {} epochs, {} pages, {}\n  pause     p50 {}, p99 {}, max {} ms\n",
            self.epochs_committed,
            self.epoch_pages,
            mib(self.epoch_bytes),
            ms(p50),
            ms(p99),
            ms(max)
        );
    }

    fn checks(&self, out: &mut String) {
        let found = &self.findings;
        let survived = self.outcome == Outcome::Survived;
        let rows = [
            ("outputs before the kill", found.outputs_before, "every number and sum right"),
            (
                "outputs after it",
                found.outputs_after,
                if survived { "counting goes on without a gap" } else { "" },
            ),
            ("outputs seen twice", found.outputs_repeated, "identical, byte by byte"),
            ("outputs lost", found.outputs_lost, ""),
            ("outputs regressed", found.outputs_regressed, ""),
            ("pages verified", found.pages_verified, "compared by the guest afterwards"),
            ("pages wrong", found.pages_wrong, ""),
        ];
        let _ = writeln!(out, "  checked from outside");
        for (name, value, note) in rows {
            // Praise is only due where there is something to praise.
            let note = if value > 0 && found.is_clean() { note } else { "" };
            let line = format!("    {name:<26}{value:>12}   {note}");
            let _ = writeln!(out, "{}", line.trim_end());
        }
    }
}

/// All runs, in a few lines.
pub fn totals(reports: &[RunReport]) -> String {
    let count = |outcome| reports.iter().filter(|report| report.outcome == outcome).count();
    let mut failovers: Vec<f64> = reports.iter().filter_map(|report| report.failover_ms).collect();
    failovers.sort_by(f64::total_cmp);
    let mut out = format!(
        "{} runs: {} survived, {} not protected yet, {} lost",
        reports.len(),
        count(Outcome::Survived),
        count(Outcome::NotProtected),
        count(Outcome::Lost)
    );
    if let (Some(median), Some(longest)) = (failovers.get(failovers.len() / 2), failovers.last()) {
        let _ = write!(out, "; failover p50 {median:.1} ms, max {longest:.1} ms");
    }
    out
}

/// Cut to what fits beside the other columns.
fn shortened(text: &str) -> String {
    const WIDTH: usize = 35;
    if text.chars().count() <= WIDTH {
        return text.into();
    }
    text.chars().take(WIDTH - 1).chain(['…']).collect()
}

fn mib(bytes: u64) -> String {
    format!("{:.0} MiB", bytes as f64 / 1_048_576.0)
}

fn ms(us: u64) -> String {
    format!("{:.1}", us as f64 / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn survived() -> RunReport {
        RunReport {
            outcome: Outcome::Survived,
            run: 1,
            vcpus: 2,
            mem_mib: 512,
            dirty_rate: 20_000,
            kill_after_s: 3.25,
            phase_at_kill: "lockstep",
            term: Some(2),
            epoch: Some(118),
            seed_rounds: 3,
            seed_pages: 140_000,
            seed_bytes: 573_440_000,
            seed_s: 0.9,
            epochs_committed: 118,
            epoch_pages: 60_000,
            epoch_bytes: 245_760_000,
            pause_us: Pauses { p50: 1200, p99: 3400, max: 11_200 },
            detect_ms: Some(0.8),
            resume_ms: Some(3.1),
            failover_ms: Some(6.5),
            noticed_by: Some("the link was closed by the other side".into()),
            refused: None,
            findings: Findings {
                outputs_before: 320,
                outputs_after: 300,
                pages_verified: 114_688,
                ..Findings::default()
            },
        }
    }

    #[test]
    fn json_has_the_keys_that_others_read() {
        let json = serde_json::to_value(survived()).unwrap();
        let keys = [
            "outcome",
            "seed_rounds",
            "seed_bytes",
            "epochs_committed",
            "detect_ms",
            "resume_ms",
            "failover_ms",
            "outputs_before",
            "outputs_after",
            "outputs_repeated",
            "outputs_lost",
            "outputs_regressed",
            "pages_verified",
            "pages_wrong",
        ];
        for key in keys {
            assert!(!json[key].is_null(), "{key}");
        }
        assert_eq!(json["outcome"], "survived");
        assert_eq!(json["pause_us"]["p99"], 3400);
    }

    #[test]
    fn text_fits_a_terminal_of_80_columns() {
        let mut not_protected = survived();
        not_protected.outcome = Outcome::NotProtected;
        for report in [survived(), not_protected] {
            let text = report.text();
            assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        }
    }

    #[test]
    fn loss_is_told_with_its_problems_and_without_praise() {
        let mut lost = survived();
        lost.outcome = Outcome::Lost;
        lost.findings.outputs_lost = 2;
        lost.findings.problems = vec!["vCPU 0 counted 7 after 4: 2 are missing".into()];
        let text = lost.text();
        assert!(text.contains("LOST") && text.contains("7 after 4") && !text.contains("right"), "{text}");
        assert!(totals(&[lost, survived()]).starts_with("2 runs: 1 survived, 0 not protected yet, 1 lost"));
    }
}
