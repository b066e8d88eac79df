//! Shows a run while it happens: bars on a terminal, plain lines elsewhere, nothing with `--json`.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use mirror::report::Report;

use crate::sides::Side;
use crate::sides::tally::Tally;

/// Time between two lines that tell of the same thing.
const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// Where a run is shown.
pub(super) struct Display {
    shown: bool,
    /// On a terminal.
    bar: Option<ProgressBar>,
    started_us: u64,
    last_line: Option<Instant>,
}

impl Display {
    /// Shows nothing if not `shown`.
    pub(super) fn new(shown: bool) -> Self {
        let bar = (shown && stderr().is_terminal()).then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(15));
            bar.set_style(
                ProgressStyle::default_spinner().template("{spinner} {msg}").expect("a valid template"),
            );
            bar
        });
        Self { shown, bar, started_us: 0, last_line: None }
    }

    /// Times are told from `started_us` on.
    pub(super) fn start(&mut self, started_us: u64) {
        self.started_us = started_us;
    }

    /// A line that stays, about something at `at_us`.
    pub(super) fn line(&self, at_us: u64, text: &str) {
        if !self.shown {
            return;
        }
        let line = format!("{:>8.3} s  {text}", at_us.saturating_sub(self.started_us) as f64 / 1e6);
        match &self.bar {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }

    /// Something that changes all the time.
    fn ticker(&mut self, at_us: u64, text: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(text.to_owned());
            bar.tick();
        } else if self.last_line.is_none_or(|last| last.elapsed() >= LINE_INTERVAL) {
            self.last_line = Some(Instant::now());
            self.line(at_us, text);
        }
    }

    /// Something that fills up.
    fn fill(&mut self, at_us: u64, done: u64, all: u64, text: &str) {
        match &self.bar {
            Some(bar) => {
                if bar.length() != Some(all) || bar.position() > done {
                    let template = "{msg} [{bar:28}] {percent:>3}%";
                    let style = ProgressStyle::default_bar().template(template).expect("a valid template");
                    bar.set_style(style.progress_chars("=> "));
                    bar.set_length(all);
                }
                bar.set_position(done);
                bar.set_message(text.to_owned());
            }
            None => self.ticker(at_us, &format!("{text}: {}%", done * 100 / all.max(1))),
        }
    }

    /// A side reported something; `tally` is what it has told so far, this included.
    pub(super) fn told(&mut self, side: Side, at_us: u64, report: &Report, tally: &Tally) {
        if !self.shown {
            return;
        }
        match (side, report) {
            (
                Side::STANDBY,
                Report::Joined { .. } | Report::RoundProgress { .. } | Report::Protected { .. },
            ) => {}
            (_, Report::RoundStarted { round, pages }) => {
                self.fill(at_us, 0, *pages, &format!("round {round}, {pages} pages"));
            }
            (_, Report::RoundProgress { round, sent, pages }) => {
                self.fill(at_us, *sent, *pages, &format!("round {round}, {sent} of {pages} pages"));
            }
            (_, Report::Protected { .. }) => {
                if let Some(bar) = &self.bar {
                    let template = "{spinner} {msg}";
                    bar.set_style(
                        ProgressStyle::default_spinner().template(template).expect("a valid template"),
                    );
                }
                self.line(at_us, &format!("the guest is protected ({} seeding rounds)", tally.rounds));
            }
            (_, Report::Committed { epoch, pages, bytes, pause, .. }) => {
                let kib = bytes >> 10;
                let pause_ms = pause.total_us() as f64 / 1000.0;
                self.ticker(
                    at_us,
                    &format!("epoch {epoch}: {pages} pages, {kib} KiB, pause {pause_ms:.1} ms"),
                );
            }
            (_, report) => {
                if let Some(words) = short(report).or_else(|| crate::events::words(report)) {
                    self.line(at_us, &format!("{}: {words}", side.name()));
                }
            }
        }
    }

    /// The guest checks its memory in the standby.
    pub(super) fn checking(&mut self, at_us: u64, outputs: u64, verified: u32, vcpus: u32) {
        if self.shown {
            let text = format!(
                "checking: {outputs} outputs after it, memory of {verified} of {vcpus} vCPUs verified"
            );
            self.ticker(at_us, &text);
        }
    }

    /// The run is over: what does not stay goes.
    pub(super) fn finish(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// What of a report fits beside the time in 80 columns, where the usual words do not.
fn short(report: &Report) -> Option<String> {
    Some(match report {
        Report::Joined { pages, term, .. } => format!("mirroring {pages} pages, term {term}"),
        Report::RoundDone { round, pages, micros, dirtied, .. } => {
            let seconds = *micros as f64 / 1e6;
            format!("round {round}: {pages} pages in {seconds:.2} s, {dirtied} dirtied")
        }
        Report::PrimaryLost { epoch, .. } => format!("the primary is lost after epoch {epoch}"),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use mirror::ids::{Epoch, Guid, Term};

    use super::*;

    #[test]
    fn lines_of_a_sound_run_fit_80_columns() {
        let reports = [
            Report::Joined { guid: Guid::nil(), term: Term(1), pages: 268_435_456 },
            Report::RoundDone {
                round: 30,
                pages: 26_843_545,
                bytes: 1 << 40,
                micros: 99_990_000,
                dirtied: 999_999,
            },
            Report::PrimaryLost { reason: "x".repeat(100), epoch: Epoch(1 << 40), silent_us: 0 },
        ];
        for report in reports {
            let line = format!("{:>8.3} s  primary: {}", 100.0, short(&report).unwrap());
            assert!(line.chars().count() <= 80, "{line}");
        }
    }
}
