//! The timeline of a run as SVG: who runs the guest, what each epoch costs, and what clients feel of it.

use std::error::Error;
use std::ops::Range;

use mirror::report::{Report, Stamped};
use plotters::coord::Shift;
use plotters::coord::combinators::{IntoLogRange, LogCoord};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::record::{Mark, Timeline};
use crate::sides::Side;

/// Width of a picture in points; pages scale it.
const WIDTH: u32 = 900;
const LANE_HEIGHT: u32 = 22;
const MARK_HEIGHT: u32 = 16;
const PANEL_HEIGHT: u32 = 118;
const AXIS_HEIGHT: u32 = 20;
const MARGIN_LEFT: u32 = 62;
const MARGIN_RIGHT: u32 = 14;

// Colours that a page's style sheet replaces by its own, for light and dark: see `page.css`.
pub(super) const TEXT: RGBColor = RGBColor(0x20, 0x21, 0x22);
pub(super) const GRID: RGBColor = RGBColor(0xd0, 0xd1, 0xd2);
pub(super) const FAULT: RGBColor = RGBColor(0xc0, 0x21, 0x22);
pub(super) const TOLD: RGBColor = RGBColor(0x62, 0x66, 0x6d);
/// One for each side, readable on light and dark.
const SIDES: [RGBColor; 3] =
    [RGBColor(0x2f, 0x80, 0xc8), RGBColor(0xd0, 0x7a, 0x10), RGBColor(0x2c, 0x9a, 0x5c)];

/// Width of what is put together into one point of a line, in points.
const BIN: u32 = 2;

/// A line is broken where nothing comes for so many bins.
const GAP: u64 = 4;

type Picture<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn Error>>;

/// A value of a side at a time of the monotonic clock.
type Point = (Side, u64, f64);

/// A panel: its title, and what it shows.
struct Panel {
    title: &'static str,
    bounds: Range<f64>,
    points: Vec<Point>,
}

/// Draws what happened in `timeline` between two times of the monotonic clock; times are shown from `zero_us` on.
///
/// # Errors
/// What the picture cannot take.
pub(super) fn draw(
    timeline: &Timeline,
    zero_us: u64,
    shown_us: Range<u64>,
) -> Result<String, Box<dyn Error>> {
    let lanes = lanes(timeline);
    let marks = labels(timeline, &shown_us);
    let marks_height = MARK_HEIGHT * (marks.len().max(1) as u32);
    let panels = panels(timeline);
    let lanes_height = LANE_HEIGHT * lanes_count(&lanes);
    let height = marks_height + lanes_height + PANEL_HEIGHT * panels.len() as u32 + AXIS_HEIGHT;
    let mut svg = String::new();
    {
        let picture = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        let scale = Scale { shown_us, zero_us };
        let (marks_area, rest) = picture.split_vertically(marks_height);
        let (lanes_area, rest) = rest.split_vertically(lanes_height);
        draw_marks(&marks_area, &scale, &marks)?;
        draw_lanes(&lanes_area, &scale, &lanes)?;
        let mut rest = rest;
        let count = panels.len();
        for (index, panel) in panels.into_iter().enumerate() {
            let is_last = index + 1 == count;
            let (area, below) = rest.split_vertically(PANEL_HEIGHT + if is_last { AXIS_HEIGHT } else { 0 });
            draw_panel(&area, &scale, &panel, is_last)?;
            rest = below;
        }
        for mark in &marks {
            let x = scale.x(mark.at_us);
            let line = [(x, marks_height as i32), (x, (height - AXIS_HEIGHT) as i32)];
            picture.draw(&PathElement::new(line, mark.colour))?;
        }
        picture.present()?;
    }
    Ok(svg)
}

/// Times across the picture.
struct Scale {
    shown_us: Range<u64>,
    zero_us: u64,
}

impl Scale {
    fn x(&self, at_us: u64) -> i32 {
        let width = f64::from(WIDTH - MARGIN_LEFT - MARGIN_RIGHT);
        let at_us = at_us.clamp(self.shown_us.start, self.shown_us.end);
        let length_us = (self.shown_us.end - self.shown_us.start).max(1) as f64;
        MARGIN_LEFT as i32 + ((at_us - self.shown_us.start) as f64 / length_us * width) as i32
    }

    /// In milliseconds from the zero.
    fn ms(&self, at_us: u64) -> f64 {
        (at_us as f64 - self.zero_us as f64) / 1000.0
    }
}

fn text(size: u32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&TEXT)
}

fn colour(side: Side) -> RGBColor {
    SIDES[usize::from(side.0) % SIDES.len()]
}

/// Something at a time, named above the picture.
struct Label {
    at_us: u64,
    text: String,
    colour: RGBColor,
}

/// What the drill did, and what the sides decided.
fn labels(timeline: &Timeline, shown_us: &Range<u64>) -> Vec<Label> {
    let done = timeline.marks.iter().map(|Mark { at_us, text }| Label {
        at_us: *at_us,
        text: text.clone(),
        colour: FAULT,
    });
    let told = timeline.told.iter().filter_map(|(side, stamped)| {
        let what = match &stamped.report {
            Report::PrimaryLost { .. } | Report::StandbyLost { .. } => "notices",
            Report::Active { .. } => "runs the guest",
            Report::Solo { .. } => "goes on alone",
            Report::Frozen { .. } => "is frozen",
            Report::Refused { .. } => "steps back",
            _ => return None,
        };
        Some(Label { at_us: stamped.at_us, text: format!("{} {what}", side.name()), colour: TOLD })
    });
    let mut labels: Vec<Label> = done.chain(told).filter(|label| shown_us.contains(&label.at_us)).collect();
    labels.sort_by_key(|label| label.at_us);
    labels
}

fn draw_marks(area: &Picture<'_>, scale: &Scale, marks: &[Label]) -> Drawn {
    for (row, mark) in marks.iter().enumerate() {
        let x = scale.x(mark.at_us);
        let y = (MARK_HEIGHT * row as u32) as i32;
        let label = format!("{} ({:+.1} ms)", mark.text, scale.ms(mark.at_us));
        let width = area.estimate_text_size(&label, &text(12))?.0 as i32;
        // To the left where it would not fit to the right.
        let fits = x + 6 + width < WIDTH as i32;
        area.draw_text(&label, &text(12), (if fits { x + 6 } else { x - 6 - width }, y + 2))?;
        let height = area.dim_in_pixel().1 as i32;
        area.draw(&PathElement::new([(x, y + 2), (x, height)], mark.colour))?;
    }
    Ok(())
}

/// A side runs the guest from one time to another.
struct Lane {
    side: Side,
    from_us: u64,
    until_us: u64,
}

fn lanes(timeline: &Timeline) -> Vec<Lane> {
    let end_us = timeline.told.iter().map(|(_, stamped)| stamped.at_us).max().unwrap_or(timeline.started_us);
    let end_us = timeline.requests.iter().map(|(_, end_us)| *end_us).max().unwrap_or(0).max(end_us);
    let mut begins: Vec<(u64, Side)> = vec![(timeline.started_us, Side::PRIMARY)];
    begins.extend(timeline.told.iter().filter_map(|(side, stamped)| {
        matches!(stamped.report, Report::Active { .. }).then_some((stamped.at_us, *side))
    }));
    begins.sort_unstable_by_key(|(at_us, _)| *at_us);
    let lane = |(index, (from_us, side)): (usize, &(u64, Side))| {
        let gives_up = |(other, stamped): &&(Side, Stamped)| {
            let given_up = matches!(stamped.report, Report::Frozen { .. } | Report::HandedOver { .. });
            other == side && stamped.at_us >= *from_us && given_up
        };
        let gave_up_us = timeline.told.iter().find(gives_up).map(|(_, stamped)| stamped.at_us);
        let died_us = timeline.ended.iter().find(|(other, _)| other == side).map(|(_, at_us)| *at_us);
        let followed_us = begins.get(index + 1).map(|(at_us, _)| *at_us);
        let until_us = [gave_up_us, died_us, followed_us].into_iter().flatten().fold(end_us, u64::min);
        Lane { side: *side, from_us: *from_us, until_us }
    };
    begins.iter().enumerate().map(lane).collect()
}

fn lanes_count(lanes: &[Lane]) -> u32 {
    lanes.iter().map(|lane| u32::from(lane.side.0) + 1).max().unwrap_or(1)
}

fn draw_lanes(area: &Picture<'_>, scale: &Scale, lanes: &[Lane]) -> Drawn {
    let mut named = Vec::new();
    for lane in lanes {
        let top = (u32::from(lane.side.0) * LANE_HEIGHT) as i32;
        let (from, until) = (scale.x(lane.from_us), scale.x(lane.until_us));
        let shape = [(from, top + 3), (until.max(from + 1), top + LANE_HEIGHT as i32 - 3)];
        if lane.until_us > scale.shown_us.start && lane.from_us < scale.shown_us.end {
            area.draw(&Rectangle::new(shape, colour(lane.side).filled()))?;
        }
        if !named.contains(&lane.side) {
            named.push(lane.side);
            area.draw_text(lane.side.name(), &text(12), (4, top + 4))?;
        }
    }
    Ok(())
}

fn panels(timeline: &Timeline) -> Vec<Panel> {
    let (mut pauses, mut pages, mut lags) = (Vec::new(), Vec::new(), Vec::new());
    for (side, stamped) in &timeline.told {
        if let Report::Committed { pages: dirty, pause, commit_us, .. } = &stamped.report {
            pauses.push((*side, stamped.at_us, pause.total_us() as f64 / 1000.0));
            pages.push((*side, stamped.at_us, *dirty as f64));
            lags.push((*side, stamped.at_us, *commit_us as f64 / 1000.0));
        }
    }
    let lanes = lanes(timeline);
    let served_by = |at_us: u64| {
        lanes.iter().rev().find(|lane| at_us >= lane.from_us).map_or(Side::PRIMARY, |lane| lane.side)
    };
    let waits = timeline.requests.iter().map(|(start_us, end_us)| {
        (served_by(*end_us), *end_us, end_us.saturating_sub(*start_us) as f64 / 1000.0)
    });
    vec![
        Panel { title: "pause, ms", bounds: 0.05..200.0, points: pauses },
        Panel { title: "dirty pages an epoch", bounds: 1.0..20_000.0, points: pages },
        Panel { title: "lag: pause to commit, ms", bounds: 0.05..2000.0, points: lags },
        Panel { title: "a client's wait for its answer, ms", bounds: 0.05..2000.0, points: waits.collect() },
    ]
}

fn draw_panel(area: &Picture<'_>, scale: &Scale, panel: &Panel, with_axis: bool) -> Drawn {
    let range = scale.ms(scale.shown_us.start)..scale.ms(scale.shown_us.end);
    let mut chart = ChartBuilder::on(area)
        .margin_right(MARGIN_RIGHT)
        .margin_top(18)
        .set_label_area_size(LabelAreaPosition::Left, MARGIN_LEFT)
        .set_label_area_size(LabelAreaPosition::Bottom, if with_axis { AXIS_HEIGHT } else { 0 })
        .build_cartesian_2d(range, panel.bounds.clone().log_scale())?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(GRID)
        .x_labels(9)
        .y_labels(4)
        .y_label_formatter(&|value| format!("{value}"))
        .x_label_formatter(&|ms| if with_axis { format!("{ms:+.0} ms") } else { String::new() })
        .label_style(text(11))
        .draw()?;
    area.draw_text(panel.title, &text(12), (MARGIN_LEFT as i32 + 4, 3))?;
    let mut sides: Vec<Side> = panel.points.iter().map(|(side, ..)| *side).collect();
    sides.sort_unstable();
    sides.dedup();
    for side in sides {
        for line in lines(scale, panel, side) {
            draw_line(&mut chart, line, colour(side))?;
        }
    }
    Ok(())
}

type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, LogCoord<f64>>>;

fn draw_line(chart: &mut Chart<'_, '_>, line: Vec<(f64, f64)>, colour: RGBColor) -> Drawn {
    if let [alone] = line[..] {
        chart.draw_series([Circle::new(alone, 2, colour.filled())])?;
    } else {
        chart.draw_series(LineSeries::new(line, colour))?;
    }
    Ok(())
}

/// The points of a side, the highest of each bin, broken where nothing came for a while.
fn lines(scale: &Scale, panel: &Panel, side: Side) -> Vec<Vec<(f64, f64)>> {
    let length_us = scale.shown_us.end - scale.shown_us.start;
    let bin_us = (length_us * u64::from(BIN) / u64::from(WIDTH)).max(1);
    let mut points: Vec<(u64, f64)> = panel
        .points
        .iter()
        .filter(|(of, at_us, _)| *of == side && scale.shown_us.contains(at_us))
        .map(|(_, at_us, value)| ((at_us - scale.shown_us.start) / bin_us, *value))
        .collect();
    points.sort_unstable_by_key(|(bin, _)| *bin);
    let mut lines: Vec<Vec<(f64, f64)>> = Vec::new();
    let mut last: Option<u64> = None;
    for (bin, value) in points {
        let at = scale.ms(scale.shown_us.start + bin * bin_us);
        let value = value.clamp(panel.bounds.start, panel.bounds.end);
        match (last, lines.last_mut()) {
            (Some(before), Some(line)) if before == bin => {
                if let Some(point) = line.last_mut() {
                    point.1 = point.1.max(value);
                }
            }
            // Epochs are as far apart as they are; a gap is what is longer than any of them.
            (Some(before), Some(line)) if (bin - before) * bin_us <= 60_000.max(GAP * bin_us) => {
                line.push((at, value));
            }
            _ => lines.push(vec![(at, value)]),
        }
        last = Some(bin);
    }
    lines
}

#[cfg(test)]
mod tests {
    use mirror::ids::{Epoch, Term};

    use super::*;

    #[test]
    fn picture_shows_fault_and_both_sides() {
        let told = |side, at_us, report| (side, Stamped { at_us, report });
        let active = Report::Active { epoch: Epoch(7), term: Term(2), output_start: 0 };
        let timeline = Timeline {
            started_us: 0,
            told: vec![told(Side::STANDBY, 600_000, active)],
            ended: vec![(Side::PRIMARY, 500_000)],
            marks: vec![Mark { at_us: 500_000, text: "SIGKILL <&> co".into() }],
            requests: vec![(100_000, 110_000), (490_000, 620_000), (640_000, 641_000)],
        };
        let svg = draw(&timeline, 500_000, 0..1_000_000).unwrap();
        for wanted in ["SIGKILL &lt;&amp;&gt; co (+0.0 ms)", "standby runs the guest", "-400 ms", "#C02122"] {
            assert!(svg.contains(wanted), "{wanted} in {svg}");
        }
        assert!(svg.len() < 40_000, "{}", svg.len());
    }
}
