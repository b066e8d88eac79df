//! What the workload promises, on a machine whose clock the test holds in its hand.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use resources::protocol::{
    Content, Counter, ExpectedCounter, Line, PAGE_WORDS, Page, Params, Platform, Worker, check_page,
};

const MS: u64 = 1_000_000;
const SECOND: u64 = 1000 * MS;

#[derive(Default)]
struct Machine {
    now_ns: u64,
    lines: Vec<Line>,
    longest_idle_ns: u64,
    idles: u64,
}

/// A platform on which nothing takes time but idling, and each reading of the clock a microsecond.
#[derive(Clone, Default)]
struct Simulated(Rc<RefCell<Machine>>);

impl Platform for Simulated {
    fn now_ns(&mut self) -> u64 {
        let mut machine = self.0.borrow_mut();
        machine.now_ns += 1000;
        machine.now_ns
    }

    fn print(&mut self, line: &[u8]) {
        let text = std::str::from_utf8(line).unwrap();
        self.0.borrow_mut().lines.push(Line::parse(text).unwrap_or_else(|| panic!("not a line: {text:?}")));
    }

    fn idle_for(&mut self, ns: u64) {
        let mut machine = self.0.borrow_mut();
        machine.now_ns += ns;
        machine.longest_idle_ns = machine.longest_idle_ns.max(ns);
        machine.idles += 1;
    }

    fn exit(&mut self, code: u8) -> ! {
        panic!("exit with code {code}")
    }
}

/// Memory of one vCPU.
struct Memory {
    counter: Box<Counter>,
    pages: Vec<Page>,
    generations: Vec<u32>,
}

impl Memory {
    fn of(pages: usize) -> Self {
        Self {
            counter: Box::new(Counter::blank()),
            pages: vec![[0; PAGE_WORDS]; pages],
            generations: vec![0; pages],
        }
    }

    fn worker(&mut self, machine: &Simulated, command_line: &str) -> Worker<'_, Simulated> {
        let params = Params::parse(command_line).unwrap();
        let mut worker = Worker::new(
            machine.clone(),
            params,
            0,
            &mut self.counter,
            &mut self.pages,
            &mut self.generations,
        );
        worker.prepare();
        worker
    }
}

fn run_for(worker: &mut Worker<'_, Simulated>, machine: &Simulated, ns: u64) {
    let end_ns = machine.0.borrow().now_ns + ns;
    while machine.0.borrow().now_ns < end_ns {
        worker.step();
    }
}

fn last_verify(machine: &Simulated) -> Option<(u64, u64, u64)> {
    machine.0.borrow().lines.iter().rev().find_map(|line| match *line {
        Line::Verify { pass, wrong, written, .. } => Some((pass, wrong, written)),
        _ => None,
    })
}

#[test]
fn counts_come_at_the_rate_asked_for_without_gaps_and_with_right_sums() {
    let machine = Simulated::default();
    let mut memory = Memory::of(0);
    let mut worker = memory.worker(&machine, "workload=count count.rate=50");

    run_for(&mut worker, &machine, 4 * SECOND);

    let mut expected = ExpectedCounter::new(0, 0);
    let machine = machine.0.borrow();
    assert_eq!(machine.lines[0], Line::Ready { cpu: 0, cpus: 1, pages: 0 });
    for line in &machine.lines[1..] {
        let (n, sum) = expected.advance();
        assert_eq!(*line, Line::Count { cpu: 0, n, sum });
    }
    assert!((195..=205).contains(&machine.lines.len()), "{} lines", machine.lines.len());
}

#[test]
fn pages_are_written_at_the_rate_asked_for_and_all_stay_right() {
    for pattern in ["seq", "random", "hotcold"] {
        let machine = Simulated::default();
        let mut memory = Memory::of(500);
        let command_line = format!("workload=dirty,verify dirty.rate=20000 dirty.pattern={pattern}");
        let mut worker = memory.worker(&machine, &command_line);

        run_for(&mut worker, &machine, 4 * SECOND);

        let (pass, wrong, written) = last_verify(&machine).expect("no walk was completed");
        assert_eq!(wrong, 0);
        assert!(pass >= 4, "{pattern}: {pass} walks");
        let expected = pass * 15_000;
        assert!(written.abs_diff(expected) < expected / 20, "{pattern}: {written} written in {pass} walks");
        for (index, (page, generation)) in memory.pages.iter().zip(&memory.generations).enumerate() {
            assert!(check_page(page, 0, index as u64, *generation, Content::Random));
        }
    }
}

#[test]
fn hot_pages_get_nine_writes_in_ten() {
    let machine = Simulated::default();
    let mut memory = Memory::of(1000);
    let mut worker =
        memory.worker(&machine, "workload=dirty dirty.rate=20000 dirty.pattern=hotcold dirty.content=zero");

    run_for(&mut worker, &machine, 5 * SECOND);

    let writes = |range: std::ops::Range<usize>| -> u64 {
        memory.generations[range].iter().map(|generation| u64::from(*generation) - 1).sum()
    };
    let (hot, all) = (writes(0..100), writes(0..1000));
    assert!((all * 88..all * 92).contains(&(hot * 100)), "{hot} of {all}");
}

#[test]
fn a_clock_that_jumps_makes_no_burst_and_no_standstill() {
    let machine = Simulated::default();
    let mut memory = Memory::of(64);
    let mut worker = memory.worker(&machine, "workload=count,dirty,verify dirty.rate=1000");
    run_for(&mut worker, &machine, SECOND);
    let lines_before = machine.0.borrow().lines.len();

    // An hour ahead, then to the beginning of time.
    machine.0.borrow_mut().now_ns += 3600 * SECOND;
    for _ in 0..20 {
        worker.step();
    }
    machine.0.borrow_mut().now_ns = 0;
    run_for(&mut worker, &machine, SECOND);

    let (_, wrong, written) = last_verify(&machine).unwrap();
    assert_eq!(wrong, 0);
    assert!((1000..2200).contains(&written), "{written} pages written in two seconds");
    let lines = machine.0.borrow().lines.len() - lines_before;
    assert!((48..60).contains(&lines), "{lines} lines in the second after the jumps");
    assert!(machine.0.borrow().longest_idle_ns <= 100 * MS);
}

#[test]
fn a_lost_write_is_reported_with_both_generations() {
    let machine = Simulated::default();
    let mut memory = Memory::of(16);
    let mut worker = memory.worker(&machine, "workload=dirty dirty.rate=1000 dirty.pattern=seq");
    run_for(&mut worker, &machine, SECOND);
    let (old, generation) = (memory.pages[3], memory.generations[3]);

    // What a mirror does that loses a page: its table says the write was done, the page is the one before.
    memory.generations[3] += 1;
    let lost = HashMap::from([(3, (generation + 1, generation))]);
    assert!(check_page(&old, 0, 3, generation, Content::Random));
    let wrong = walk_once(&mut memory);

    assert_eq!(wrong, lost);
}

#[test]
fn a_torn_page_is_reported_and_at_most_eight_a_walk_are_printed() {
    let machine = Simulated::default();
    let mut memory = Memory::of(32);
    memory.worker(&machine, "workload=verify");
    for page in &mut memory.pages {
        page[500] ^= 1;
    }

    let wrong = walk_once(&mut memory);

    assert_eq!(wrong, (0..8).map(|page| (page, (1, 1))).collect());
}

/// Lets a worker walk over `memory` as it is; returns what it calls wrong: page, wanted and found generation.
fn walk_once(memory: &mut Memory) -> HashMap<u64, (u32, u32)> {
    let machine = Simulated::default();
    let params = Params::parse("workload=verify").unwrap();
    let mut worker = Worker::new(
        machine.clone(),
        params,
        0,
        &mut memory.counter,
        &mut memory.pages,
        &mut memory.generations,
    );
    while last_verify(&machine).is_none() {
        worker.step();
    }
    let machine = machine.0.borrow();
    let wrong_lines = machine.lines.iter().filter_map(|line| match *line {
        Line::Wrong { page, want, found, .. } => Some((page, (want, found))),
        _ => None,
    });
    wrong_lines.collect()
}

#[test]
fn an_idle_worker_wakes_only_when_something_is_due() {
    let machine = Simulated::default();
    let mut memory = Memory::of(0);
    let mut worker = memory.worker(&machine, "workload=count count.rate=10");

    run_for(&mut worker, &machine, 10 * SECOND);

    let idles = machine.0.borrow().idles;
    assert!(idles <= 220, "{idles} wake-ups for 100 lines");
}

#[test]
#[should_panic(expected = "exit with code 0")]
fn the_run_ends_itself_after_as_many_lines_as_asked() {
    let machine = Simulated::default();
    let mut memory = Memory::of(0);
    let mut worker = memory.worker(&machine, "count.limit=3");
    let end = std::panic::AssertUnwindSafe(|| run_for(&mut worker, &machine, SECOND));
    let ended = std::panic::catch_unwind(end);
    let lines = machine.0.borrow().lines.clone();
    assert_eq!(lines.len(), 5);
    assert_eq!(lines[4], Line::Exit { code: 0 });
    std::panic::resume_unwind(ended.expect_err("the run went on"));
}
