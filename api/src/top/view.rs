//! Draws the model.

use std::iter;
use std::time::Duration;

use mirror::shell::metrics::Summary;
use mirror::shell::{primary, standby};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, BorderType, Gauge, Paragraph, RenderDirection, Sparkline};

use super::keys::Order;
use super::model::{Curve, Model, Sample};
use crate::progress::bytes;
use crate::server::{InstanceState, MirrorStatus};

/// From this width on, three charts stand side by side.
const WIDE: u16 = 120;

/// What the last line shows instead of the keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Footer {
    /// The keys.
    #[default]
    Keys,
    /// A question that y answers.
    Question(Order),
    /// How something went.
    Said(String),
}

/// Draws all of it.
pub(super) fn draw(frame: &mut Frame, model: &Model, footer: &Footer) {
    let [header, pair, charts, last] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(5),
        Constraint::Min(0),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    draw_header(frame, header, model);
    match model.now() {
        Some(Sample { mirror: Some(MirrorStatus::Primary(status)), .. }) => {
            draw_primary(frame, pair, status);
            draw_charts(frame, charts, &primary_charts(model, status));
        }
        Some(Sample { mirror: Some(MirrorStatus::Standby(status)), .. }) => {
            draw_standby(frame, pair, status);
            draw_charts(frame, charts, &standby_charts(model));
        }
        Some(Sample { mirror: None, .. }) => {
            let words =
                Paragraph::new("This guest is not mirrored. Give it a standby with `understudy attach`.");
            frame.render_widget(words.block(framed("mirror")), pair);
        }
        None => {}
    }
    draw_footer(frame, last, footer, model.orders());
}

fn draw_header(frame: &mut Frame, area: Rect, model: &Model) {
    let mut words = vec![" understudy ".bold().reversed(), " ".into()];
    if let Some(Sample { instance, .. }) = model.now() {
        words.push(instance.id.clone().bold());
        words.push(match instance.state {
            InstanceState::Running => "  running".green(),
            InstanceState::Paused => "  paused".yellow(),
            InstanceState::NotStarted => "  not running here".dark_gray(),
        });
    }
    if let Some(silence) = &model.silence {
        words.push(format!("  no answer: {silence}").red().bold());
    }
    frame.render_widget(Line::from(words), area);
}

fn draw_footer(frame: &mut Frame, area: Rect, footer: &Footer, orders: &[Order]) {
    let line = match footer {
        Footer::Keys => {
            let keys = iter::once(('q', "quit")).chain(orders.iter().map(|order| order.key()));
            let spans = keys.flat_map(|(key, does)| [format!(" {key} ").bold(), format!("{does}  ").into()]);
            spans.collect::<Line>()
        }
        Footer::Question(order) => Line::from(vec![
            format!(" {} ", order.question().unwrap_or_default()).yellow().bold(),
            " y ".bold(),
            "yes  ".into(),
            " n ".bold(),
            "no".into(),
        ]),
        Footer::Said(words) => Line::from(format!(" {words}")).bold(),
    };
    frame.render_widget(line, area);
}

fn framed(title: &str) -> Block<'static> {
    Block::bordered()
        .border_type(BorderType::Rounded)
        .border_style(Style::new().fg(Color::DarkGray))
        .title(format!(" {title} ").bold())
}

/// Rows of names and values, side by side as far as there is room.
fn row(cells: Vec<(&'static str, Span<'static>)>) -> Line<'static> {
    let mut spans = Vec::new();
    for (name, value) in cells {
        if !spans.is_empty() {
            spans.push("   ".into());
        }
        spans.push(format!("{name} ").dark_gray());
        spans.push(value);
    }
    Line::from(spans)
}

fn plain(text: &(impl ToString + ?Sized)) -> Span<'static> {
    text.to_string().into()
}

fn draw_primary(frame: &mut Frame, area: Rect, status: &primary::Status) {
    let block = framed("pair");
    let inside = block.inner(area);
    frame.render_widget(block, area);
    let [first, second, third] = Layout::vertical([Constraint::Length(1); 3]).areas(inside);
    let witness = if status.witness { "yes".into() } else { "none".yellow() };
    let line = row(vec![
        ("primary", phase(&status.phase)),
        ("term", plain(&status.term)),
        ("epoch", plain(&status.epoch).bold()),
        ("witness", witness),
        ("memory", plain(&bytes(status.pages * mirror::memory::PAGE_SIZE as u64))),
    ]);
    frame.render_widget(line, first);
    let line = row(vec![
        ("standby epoch", plain(&status.standby_sense.epoch)),
        ("stalled epochs", plain(&status.epochs_stalled)),
        ("guest", plain(&short(&status.guid.to_string()))),
        // It may be longer than there is room.
        ("at", plain(&status.standby)),
    ]);
    frame.render_widget(line, second);
    if status.phase == "seeding" {
        draw_seeding(frame, third, status);
    } else {
        let line = row(vec![
            ("seeding rounds", plain(&status.round)),
            ("seeded", plain(&bytes(status.seed_bytes))),
            ("epochs", plain(&format!("{} pages, {}", status.epoch_pages, bytes(status.epoch_bytes)))),
        ]);
        frame.render_widget(line, third);
    }
}

fn draw_seeding(frame: &mut Frame, area: Rect, status: &primary::Status) {
    let name = format!("seeding round {} ", status.round);
    let [left, right] =
        Layout::horizontal([Constraint::Length(name.len() as u16), Constraint::Min(0)]).areas(area);
    frame.render_widget(Span::from(name).dark_gray(), left);
    let part = status.round_sent.min(status.round_pages) as f64 / status.round_pages.max(1) as f64;
    let label = format!("{:.0}% of {} pages", part * 100.0, status.round_pages);
    let gauge = Gauge::default()
        .ratio(part)
        .label(label)
        .gauge_style(Style::new().fg(Color::Yellow).bg(Color::Black));
    frame.render_widget(gauge, right);
}

fn draw_standby(frame: &mut Frame, area: Rect, status: &standby::Status) {
    let guid = status.guid.map_or_else(|| "none".into(), |guid| guid.to_string());
    let lines = vec![
        row(vec![
            ("standby", phase(&status.phase)),
            ("term", plain(&status.term)),
            ("epoch", plain(&status.epoch).bold()),
            ("witness", if status.witness { "yes".into() } else { "none".yellow() }),
        ]),
        row(vec![("listens on", plain(&status.listen)), ("guest", plain(&short(&guid)))]),
        row(vec![(
            "received",
            plain(&format!(
                "{} rounds, {} epochs, {} pages",
                status.sense.rounds, status.sense.epochs, status.sense.pages
            )),
        )]),
    ];
    frame.render_widget(Paragraph::new(lines).block(framed("standby")), area);
}

/// A name of 36 letters by its first eight.
fn short(guid: &str) -> String {
    guid.chars().take(8).collect()
}

fn phase(phase: &str) -> Span<'static> {
    let style = Style::new().add_modifier(Modifier::BOLD);
    let color = match phase {
        "lockstep" | "shadowing" | "active" => Color::Green,
        "solo" | "frozen" | "orphaned" | "deciding" | "claiming" => Color::Red,
        _ => Color::Yellow,
    };
    Span::styled(phase.to_owned(), style.fg(color))
}

/// One curve with what is said above it.
struct Chart<'a> {
    title: &'static str,
    now: String,
    more: String,
    curve: &'a Curve,
    color: Color,
    /// How the peak is written.
    write: fn(u64) -> String,
}

fn primary_charts<'a>(model: &'a Model, status: &primary::Status) -> Vec<Chart<'a>> {
    let spread = |summary: &Summary| format!("p50 {} p99 {}", time(summary.p50), time(summary.p99));
    vec![
        Chart {
            title: "pause",
            now: time(model.pause.now()),
            more: spread(&status.times.pause_us),
            curve: &model.pause,
            color: Color::Cyan,
            write: time,
        },
        Chart {
            title: "standby lag",
            now: time(model.lag.now()),
            more: spread(&status.times.commit_us),
            curve: &model.lag,
            color: Color::Magenta,
            write: time,
        },
        Chart {
            title: "dirty",
            now: format!("{} pages an epoch", model.dirty.now()),
            more: String::new(),
            curve: &model.dirty,
            color: Color::Yellow,
            write: |pages| pages.to_string(),
        },
        Chart {
            title: "wire",
            now: format!("{}/s", bytes(model.wire.now())),
            more: String::new(),
            curve: &model.wire,
            color: Color::Blue,
            write: |rate| format!("{}/s", bytes(rate)),
        },
        epochs_chart(model),
        Chart {
            title: "held output",
            now: bytes(status.held_bytes),
            more: String::new(),
            curve: &model.held,
            color: Color::Red,
            write: bytes,
        },
    ]
}

fn epochs_chart(model: &Model) -> Chart<'_> {
    Chart {
        title: "epochs",
        now: format!("{}/s", tenths(model.epochs.now())),
        more: String::new(),
        curve: &model.epochs,
        color: Color::Green,
        write: |rate| format!("{}/s", tenths(rate)),
    }
}

fn standby_charts(model: &Model) -> Vec<Chart<'_>> {
    vec![
        epochs_chart(model),
        Chart {
            title: "pages received",
            now: format!("{}/s", model.pages.now()),
            more: String::new(),
            curve: &model.pages,
            color: Color::Blue,
            write: |rate| format!("{rate}/s"),
        },
    ]
}

fn draw_charts(frame: &mut Frame, area: Rect, charts: &[Chart]) {
    let across = if area.width >= WIDE { 3 } else { 2 }.min(charts.len());
    let down = charts.len().div_ceil(across);
    let rows = Layout::vertical(vec![Constraint::Fill(1); down]).split(area);
    for (row, charts) in rows.iter().zip(charts.chunks(across)) {
        let cells = Layout::horizontal(vec![Constraint::Fill(1); across]).split(*row);
        for (cell, chart) in cells.iter().zip(charts) {
            draw_chart(frame, *cell, chart);
        }
    }
}

fn draw_chart(frame: &mut Frame, area: Rect, chart: &Chart) {
    let peak = chart.curve.peak(usize::from(area.width.saturating_sub(2)));
    let mut block = framed(chart.title)
        .title(Line::from(format!(" {} ", chart.now)).fg(chart.color).bold())
        .title_bottom(Line::from(format!(" peak {} ", (chart.write)(peak))).right_aligned());
    if !chart.more.is_empty() {
        block = block.title_bottom(format!(" {} ", chart.more));
    }
    let points = chart.curve.points.iter().rev().copied();
    let curve = Sparkline::default()
        .data(points)
        .direction(RenderDirection::RightToLeft)
        .max(peak.max(1))
        .style(Style::new().fg(chart.color))
        .block(block);
    frame.render_widget(curve, area);
}

/// Microseconds, for people.
fn time(micros: u64) -> String {
    match micros {
        0..1000 => format!("{micros} µs"),
        1000..100_000 => format!("{:.1} ms", micros as f64 / 1000.0),
        100_000..10_000_000 => format!("{} ms", micros / 1000),
        _ => format!("{} s", Duration::from_micros(micros).as_secs()),
    }
}

fn tenths(value: u64) -> String {
    format!("{}.{}", value / 10, value % 10)
}
