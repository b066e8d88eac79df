use mirror::ids::{Epoch, Guid, Term};
use mirror::shell::metrics::{PauseSummary, Summary};
use mirror::shell::{primary, standby};
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::*;
use crate::server::{InstanceInfo, InstanceState, MirrorStatus};

/// A primary of which `second` seconds of lockstep have passed: ten epochs of 100 pages each, every one.
fn lockstep(second: u64) -> primary::Status {
    let epochs = second * 10;
    let times =
        |mean: u64| Summary { count: epochs, sum: epochs * mean, p50: mean, p99: mean * 4, max: mean * 9 };
    primary::Status {
        role: "primary".into(),
        phase: "lockstep".into(),
        guid: Guid::from_u128(0x1234_5678 << 96),
        term: Term(3),
        epoch: Epoch(epochs),
        standby: "tcp:192.0.2.2:7000".parse().unwrap(),
        witness: true,
        round: 2,
        round_pages: 100,
        round_sent: 100,
        pages: 131_072,
        seed_pages: 131_172,
        seed_bytes: 512 << 20,
        epoch_pages: epochs * 100,
        epoch_bytes: epochs * 409_600,
        epochs_stalled: 0,
        held_bytes: 42,
        disk_sync: mirror::guest::DiskSync::default(),
        standby_sense: mirror::wire::message::Sense::default(),
        standbys: Vec::new(),
        times: PauseSummary { pause_us: times(500), commit_us: times(1200), ..PauseSummary::default() },
    }
}

fn sample(began: Instant, second: u64, mirror: Option<MirrorStatus>) -> Sample {
    let instance = InstanceInfo::new("vm1", InstanceState::Running);
    Sample { at: began + Duration::from_secs(second), instance, mirror }
}

fn after_lockstep(seconds: u64) -> Model {
    let (mut model, began) = (Model::default(), Instant::now());
    for second in 0..=seconds {
        model.take(sample(began, second, Some(MirrorStatus::Primary(Box::new(lockstep(second))))));
    }
    model
}

fn screen(model: &Model, footer: &Footer, width: u16, height: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| view::draw(frame, model, footer)).unwrap();
    terminal.backend().to_string()
}

#[test]
fn rates_are_of_what_grew_in_the_last_second() {
    let model = after_lockstep(5);
    assert_eq!(model.epochs.now(), 100);
    assert_eq!(model.dirty.now(), 100);
    assert_eq!(model.wire.now(), 4_096_000);
    assert_eq!(model.pause.now(), 500);
    assert_eq!(model.lag.now(), 1200);
    assert_eq!(model.held.now(), 42);
}

#[test]
fn another_mirror_of_the_guest_is_not_compared_with_the_one_before() {
    let mut model = after_lockstep(5);
    let points = model.epochs.points.len();
    let mut other = lockstep(9);
    other.standby = "tcp:192.0.2.3:7000".parse().unwrap();
    model.take(sample(Instant::now(), 60, Some(MirrorStatus::Primary(Box::new(other)))));
    assert_eq!(model.epochs.points.len(), points);
}

#[test]
fn everything_is_to_be_seen_at_80_and_at_200_columns() {
    let model = after_lockstep(5);
    for (width, height) in [(80, 24), (200, 50)] {
        let screen = screen(&model, &Footer::Keys, width, height);
        for wanted in [
            "vm1",
            "running",
            "lockstep",
            "term 3",
            "epoch 50",
            "tcp:192.0.2.2:7000",
            "seeding rounds 2   seeded 512 MiB",
            "pause",
            "500 µs",
            "p50 500 µs p99 2.0 ms",
            "standby lag",
            "1.2 ms",
            "100 pages an epoch",
            "3.9 MiB/s",
            "10.0/s",
            "42 B",
            "q quit",
            "█",
        ] {
            assert!(screen.contains(wanted), "{wanted:?} is not on\n{screen}");
        }
    }
}

#[test]
fn seeding_has_a_bar_with_its_part() {
    let status = primary::Status { phase: "seeding".into(), round_sent: 50, ..lockstep(0) };
    let mut model = Model::default();
    model.take(sample(Instant::now(), 0, Some(MirrorStatus::Primary(Box::new(status)))));
    let screen = screen(&model, &Footer::Keys, 80, 24);
    assert!(screen.contains("seeding round 2") && screen.contains("50% of 100 pages"), "{screen}");
}

fn shadowing() -> standby::Status {
    standby::Status {
        role: "standby".into(),
        phase: "shadowing".into(),
        listen: "unix:/run/standby".parse().unwrap(),
        second_listen: None,
        guid: None,
        term: Term(1),
        epoch: Epoch(77),
        witness: false,
        sense: mirror::wire::message::Sense::default(),
    }
}

#[test]
fn standby_and_guest_without_one_are_shown_too() {
    let mut model = Model::default();
    model.take(sample(Instant::now(), 0, Some(MirrorStatus::Standby(Box::new(shadowing())))));
    let shown = screen(&model, &Footer::Keys, 80, 24);
    assert!(shown.contains("shadowing") && shown.contains("epoch 77"), "{shown}");
    let mut model = Model::default();
    model.take(sample(Instant::now(), 0, None));
    assert!(screen(&model, &Footer::Keys, 80, 24).contains("not mirrored"));
}

#[test]
fn last_figures_stay_when_nobody_answers_and_it_is_said() {
    let mut model = after_lockstep(3);
    model.silence = Some("Connection refused".into());
    let screen = screen(&model, &Footer::Keys, 80, 24);
    assert!(screen.contains("no answer: Connection refused") && screen.contains("epoch 30"), "{screen}");
}

#[test]
fn any_size_of_terminal_is_drawn_on() {
    let model = after_lockstep(5);
    for (width, height) in [(1, 1), (2, 24), (20, 5), (80, 8), (119, 24), (500, 200)] {
        screen(&model, &Footer::Question(Order::Switchover), width, height);
    }
}

#[test]
fn what_cannot_be_taken_back_is_asked_for_twice_and_everything_else_says_no() {
    let press = |letter| KeyEvent::new(KeyCode::Char(letter), KeyModifiers::NONE);
    for order in [Order::Switchover, Order::Promote] {
        let question = Footer::Question(order);
        let letter = order.key().0;
        assert_eq!(step(press(letter), &Footer::Keys, &[order]), Step::Show(Footer::Question(order)));
        assert_eq!(step(press('y'), &question, &[order]), Step::Do(order));
        assert_eq!(step(press(letter), &question, &[order]), Step::Show(Footer::Keys));
        assert_eq!(step(press('y'), &Footer::Keys, &[order]), Step::Nothing);
        // Of a process that cannot do it, it is not to be had.
        assert_eq!(step(press(letter), &Footer::Keys, &[]), Step::Nothing);
        assert_eq!(
            step(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL), &question, &[]),
            Step::Quit
        );
    }
    assert_eq!(step(press('p'), &Footer::Keys, &[Order::Pause]), Step::Do(Order::Pause));
    assert_eq!(step(press('q'), &Footer::Keys, &[]), Step::Quit);
}

#[test]
fn keys_are_those_of_the_side_that_is_shown() {
    let mut status = shadowing();
    let shown = |status: &standby::Status| {
        let mut model = Model::default();
        model.take(sample(Instant::now(), 0, Some(MirrorStatus::Standby(Box::new(status.clone())))));
        screen(&model, &Footer::Keys, 80, 24)
    };
    let screen = shown(&status);
    assert!(screen.contains("q quit") && !screen.contains("pause  "), "{screen}");
    assert!(!screen.contains("promote"), "{screen}");
    status.phase = "orphaned".into();
    assert!(shown(&status).contains("f promote"));
}
