//! The report of drills: one page that needs nothing else.

use std::time::{SystemTime, UNIX_EPOCH};

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::chart;
use super::options::Name;
use super::record::{Quantiles, Run, TIMES, Timeline};

/// What is shown before the fault and after the first answer in the picture of the failover itself, in microseconds.
const CLOSE_UP: u64 = 150_000;

/// Most runs that have a line of their own in the table; those that went wrong always have.
const LINES: usize = 200;

/// The page about `runs`, which `seed` determined.
pub(super) fn page(runs: &[Run], seed: u64) -> String {
    let bad = runs.iter().filter(|run| !run.is_good()).count();
    let markup = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { "Understudy: drills" }
                style { (PreEscaped(include_str!("page.css"))) }
            }
            body {
                h1 { "Drills" }
                p {
                    @if bad == 0 {
                        span.good { (runs.len()) " runs, nothing lost, nothing there twice." }
                    } @else {
                        span.bad { (bad) " of " (runs.len()) " runs went wrong." }
                    }
                }
                p.soft { "understudy " (env!("CARGO_PKG_VERSION")) " · seed " (seed) " · " (date()) }
                (drills(runs))
                (checked(runs))
                (timelines(runs))
                (lines(runs))
            }
        }
    };
    markup.into_string()
}

/// Today, in UTC.
fn date() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let now =
        time::OffsetDateTime::from_unix_timestamp(seconds as i64).unwrap_or(time::OffsetDateTime::UNIX_EPOCH);
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02} UTC",
        now.year(),
        u8::from(now.month()),
        now.day(),
        now.hour(),
        now.minute()
    )
}

fn names(runs: &[Run]) -> Vec<Name> {
    let mut names: Vec<Name> = runs.iter().map(|run| run.drill).collect();
    names.dedup();
    names
}

fn of(runs: &[Run], name: Name) -> impl Iterator<Item = &Run> + Clone {
    runs.iter().filter(move |run| run.drill == name)
}

fn verdict(good: bool, text: &str) -> Markup {
    html! { span class=(if good { "good" } else { "bad" }) { (text) } }
}

/// A table of all drills and their times.
fn drills(runs: &[Run]) -> Markup {
    html! {
        h2 { "From the fault on" }
        p.soft { "Milliseconds: half of the runs / 99 of 100. Moments are chosen at random." }
        div.wide {
            table {
                thead { tr {
                    th { "drill" } th.number { "runs" } th { "outcome" }
                    @for (title, _) in TIMES { th.number { (title) } }
                    th { "what it does" }
                } }
                tbody {
                    @for name in names(runs) {
                        tr {
                            td { (name.text()) }
                            td.number { (of(runs, name).count()) }
                            td { (outcomes(of(runs, name))) }
                            @for (_, pick) in TIMES {
                                td.number { (quantiles(of(runs, name).filter_map(|run| pick(&run.times)))) }
                            }
                            td.text { (name.help()) }
                        }
                    }
                }
            }
        }
    }
}

fn outcomes<'a>(runs: impl Iterator<Item = &'a Run>) -> Markup {
    let mut counts: std::collections::BTreeMap<_, usize> = std::collections::BTreeMap::new();
    let mut good = true;
    for run in runs {
        *counts.entry(run.outcome).or_default() += 1;
        good &= run.is_good();
    }
    let told: Vec<String> =
        counts.iter().map(|(outcome, count)| format!("{count} {}", outcome.text())).collect();
    verdict(good, &told.join(", "))
}

fn quantiles(values: impl Iterator<Item = u64>) -> String {
    Quantiles::of(values).map_or("–".into(), |found| format!("{} / {}", ms(found.p50), ms(found.p99)))
}

fn ms(us: u64) -> String {
    format!("{:.1}", us as f64 / 1000.0)
}

/// A table of what was checked, in sum.
fn checked(runs: &[Run]) -> Markup {
    let sum = |pick: fn(&Run) -> u64| runs.iter().map(pick).sum::<u64>();
    let rows: [(&str, u64, &str); 10] = [
        (
            "requests of clients",
            sum(|run| run.service.operations),
            "each with its time, its answer and the answer's time",
        ),
        (
            "acknowledged writes",
            sum(|run| run.service.acknowledged),
            "each is there afterwards; no read goes back in time",
        ),
        (
            "registers and counters",
            sum(|run| run.service.keys),
            "an order of all requests explains all answers",
        ),
        ("bytes of streams", sum(|run| run.service.stream_bytes), "each is the one that belongs there"),
        ("connections lost", sum(|run| run.service.connections_lost), "they are to survive, too"),
        ("disk blocks", sum(|run| run.image_blocks), "the image holds what was acknowledged, whole"),
        (
            "disks compared",
            sum(|run| u64::from(run.images_equal)),
            "both sides have the same when a side that had lost the guest holds its mirror",
        ),
        (
            "lines of consoles",
            sum(|run| run.console.outputs_before + run.console.outputs_after),
            "numbers without a gap, sums over the guest's state right",
        ),
        (
            "pages of memory",
            sum(|run| run.console.pages_verified),
            "compared by the guest after the failover",
        ),
        ("violations", sum(|run| run.violations.len() as u64), ""),
    ];
    html! {
        h2 { "What was checked from outside" }
        div.wide { table { tbody {
            @for (what, count, how) in rows {
                tr { td { (what) } td.number { (thousands(count)) } td.text { (how) } }
            }
        } } }
        @for run in runs.iter().filter(|run| !run.violations.is_empty()) {
            p.bad { (run.drill.text()) ", run " (run.run) }
            ul { @for violation in &run.violations { li { pre { (violation) } } } }
        }
    }
}

fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    out
}

/// The pictures.
fn timelines(runs: &[Run]) -> Markup {
    html! {
        h2 { "Timelines" }
        p.soft { "The bars show who runs the guest. Zero is the fault. Scales are logarithmic; a line breaks off where nothing came." }
        @for (run, timeline) in runs.iter().filter_map(|run| Some((run, run.timeline.as_ref()?))) {
            details open[run.run == 1 || !run.is_good()] {
                summary {
                    h3 { (run.drill.text()) ", run " (run.run) ": " (verdict(run.is_good(), run.outcome.text())) }
                    span.soft { " · " (run.how) }
                }
                (pictures(run, timeline))
            }
        }
    }
}

fn pictures(run: &Run, timeline: &Timeline) -> Markup {
    let start_us =
        timeline.requests.iter().map(|(start_us, _)| *start_us).min().unwrap_or(timeline.started_us);
    let end_us = timeline.started_us + run.times.run_us;
    let fault_us = timeline.started_us + run.times.fault_us;
    let settled_us = fault_us + run.times.answered_us.or(run.times.resumed_us).unwrap_or_default();
    let close_up = fault_us.saturating_sub(CLOSE_UP).max(start_us)..(settled_us + CLOSE_UP).min(end_us);
    let picture = |range: std::ops::Range<u64>| match chart::draw(timeline, fault_us, range) {
        Ok(svg) => html! { div.picture { (PreEscaped(svg)) } },
        Err(error) => html! { p.bad { "There is no picture: " (error) } },
    };
    html! {
        @if close_up.end > close_up.start {
            p.soft.caption { "Around the fault" }
            (picture(close_up))
        }
        p.soft.caption { "The whole run" }
        (picture(start_us.min(fault_us)..end_us.max(fault_us + 1)))
    }
}

/// A line for each run.
fn lines(runs: &[Run]) -> Markup {
    let cell = |us: Option<u64>| us.map_or("–".into(), ms);
    let shown = |(index, run): &(usize, &Run)| *index < LINES || !run.is_good();
    html! {
        h2 { "Runs" }
        div.wide { table {
            thead { tr {
                th { "drill" } th.number { "run" } th { "outcome" } th.number { "detected" } th.number { "went on" }
                th.number { "first answer" } th.number { "writes" } th.number { "violations" } th { "how" }
            } }
            tbody {
                @for (_, run) in runs.iter().enumerate().filter(shown) {
                    tr {
                        td { (run.drill.text()) }
                        td.number { (run.run) }
                        td { (verdict(run.is_good(), run.outcome.text())) }
                        td.number { (cell(run.times.detected_us)) }
                        td.number { (cell(run.times.resumed_us)) }
                        td.number { (cell(run.times.answered_us)) }
                        td.number { (thousands(run.service.acknowledged)) }
                        td.number { (run.violations.len()) }
                        td.text { (run.how) }
                    }
                }
            }
        } }
        @if runs.len() > LINES { p.soft { "The first " (LINES) " of " (runs.len()) "." } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_thousands() {
        assert_eq!(thousands(7), "7");
        assert_eq!(thousands(1_234_567).replace('\u{202f}', " "), "1 234 567");
    }

    #[test]
    fn colours_that_the_style_sheet_replaces_are_those_of_the_picture() {
        let css = include_str!("page.css");
        for colour in [chart::TEXT, chart::GRID, chart::FAULT, chart::TOLD] {
            let name = format!("=\"#{:02X}{:02X}{:02X}\"]", colour.0, colour.1, colour.2);
            assert!(css.to_uppercase().contains(&name), "{name}");
        }
    }
}
