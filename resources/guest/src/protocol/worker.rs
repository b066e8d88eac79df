//! What one vCPU does all its life: fill, then count, write and verify as each falls due.

use super::{
    Clock, Counter, EXIT_OK, Line, Pace, Page, Params, Pattern, check_page, fill_page, generation_of, mix,
};

/// What the work needs of the machine it runs on.
pub trait Platform {
    /// Nanoseconds from any origin. May jump: the worker does not trust it.
    fn now_ns(&mut self) -> u64;
    /// Prints one whole line, never mixed with the line of another vCPU.
    fn print(&mut self, line: &[u8]);
    /// Gives the processor away for about `ns` nanoseconds.
    fn idle_for(&mut self, ns: u64);
    /// Does what else there is to do on this vCPU, between two steps of the work.
    fn tend(&mut self) {}
    /// Ends the machine (or process) with this code.
    fn exit(&mut self, code: u8) -> !;
}

/// Shortest idle time: waking up more often than this costs more than it is worth.
const TICK_NS: u64 = 1_000_000;
/// Longest idle time, so that no arithmetic about the clock can put a vCPU to sleep for good.
const LONGEST_IDLE_NS: u64 = 100_000_000;
/// Pages written before the other work gets its turn.
const WRITE_BATCH: u64 = 64;
/// Pages checked before the other work gets its turn.
const CHECK_BATCH: u64 = 64;
/// A walk over all pages takes about this long, unless that were more than its share of the vCPU.
const WALK_NS: u64 = 750_000_000;
/// The share of the vCPU that verifying may take: three tenths.
const WALK_SHARE: (u64, u64) = (3, 10);
/// Verifying time that can be saved up.
const WALK_SAVED_NS: u64 = 20_000_000;
/// Most `wrong` lines in one walk.
const WRONG_LINES: u64 = 8;
const SECOND_NS: u64 = 1_000_000_000;

/// The work of one vCPU.
pub struct Worker<'a, P: Platform> {
    platform: P,
    params: Params,
    cpu: u32,
    counter: &'a mut Counter,
    pages: &'a mut [Page],
    /// What each page must hold. Only this vCPU writes them and the pages, so there is no race to lose.
    generations: &'a mut [u32],
    clock: Clock,
    count: Pace,
    write: Pace,
    walk: Pace,
    /// Time that verifying may still take.
    walk_budget_ns: u64,
    /// Where the walk is.
    walked: usize,
    pass: u64,
    wrong: u64,
    written: u64,
    /// The page written last by the sequential pattern.
    cursor: usize,
    /// State of the stream that random choices come from.
    choice: u64,
}

impl<'a, P: Platform> Worker<'a, P> {
    /// A worker for vCPU `cpu`. It owns its counter and its share of the pages, all shares being of equal size;
    /// `generations` must be as long as `pages` (what is beyond the shorter one is not used).
    pub fn new(
        platform: P,
        params: Params,
        cpu: u32,
        counter: &'a mut Counter,
        pages: &'a mut [Page],
        generations: &'a mut [u32],
    ) -> Self {
        let used = if params.has_working_set() { pages.len().min(generations.len()) } else { 0 };
        let (pages, generations) = (&mut pages[..used], &mut generations[..used]);
        let writes = if params.dirty && used > 0 { params.dirty_rate } else { 0 };
        let checks = if params.verify { used as u64 } else { 0 };
        counter.reset(cpu, params.seed);
        Self {
            platform,
            params,
            cpu,
            counter,
            pages,
            generations,
            clock: Clock::default(),
            count: Pace::new(if params.count { params.count_rate } else { 0 }, SECOND_NS),
            write: Pace::new(writes, SECOND_NS * u64::from(params.cpus)),
            walk: Pace::new(checks, WALK_NS),
            walk_budget_ns: 0,
            walked: 0,
            pass: 0,
            wrong: 0,
            written: 0,
            cursor: 0,
            choice: mix(params.seed ^ mix(!u64::from(cpu))),
        }
    }

    /// Prepares, then works for good.
    pub fn run(mut self) -> ! {
        self.prepare();
        loop {
            self.step();
        }
    }

    /// Fills the working set with generation 1 and says so.
    pub fn prepare(&mut self) {
        for (index, (page, generation)) in self.pages.iter_mut().zip(self.generations.iter_mut()).enumerate()
        {
            *generation = 1;
            fill_page(page, self.cpu, index as u64, 1, self.params.content);
        }
        let cpus = self.params.cpus;
        let pages = self.pages.len() as u64 * u64::from(cpus);
        self.print(&Line::Ready { cpu: self.cpu, cpus, pages });
    }

    /// Does what is due now, or idles until something is.
    pub fn step(&mut self) {
        self.platform.tend();
        let elapsed_ns = self.tell_time();
        self.count.earn(elapsed_ns);
        self.write.earn(elapsed_ns);
        self.walk.earn(elapsed_ns);
        self.walk_budget_ns =
            (self.walk_budget_ns + elapsed_ns * WALK_SHARE.0 / WALK_SHARE.1).min(WALK_SAVED_NS);

        if self.count.take(1) == 1 {
            self.print_count();
        }
        for _ in 0..self.write.take(WRITE_BATCH) {
            self.write_page();
        }
        if self.walk_budget_ns > 0 {
            self.verify_some();
        }

        let walk_wait_ns = if self.walk_budget_ns > 0 { self.walk.wait_ns() } else { TICK_NS };
        let wait_ns = self.count.wait_ns().min(self.write.wait_ns()).min(walk_wait_ns);
        if wait_ns > 0 {
            self.platform.idle_for(wait_ns.clamp(TICK_NS, LONGEST_IDLE_NS));
        }
    }

    fn tell_time(&mut self) -> u64 {
        let now_ns = self.platform.now_ns();
        self.clock.elapsed(now_ns)
    }

    fn print(&mut self, line: &Line) {
        self.platform.print(line.encode().as_bytes());
    }

    fn print_count(&mut self) {
        let n = self.counter.advance();
        let sum = self.counter.sum();
        self.print(&Line::Count { cpu: self.cpu, n, sum });
        if self.cpu == 0 && self.params.count_limit == Some(n) {
            self.print(&Line::Exit { code: EXIT_OK });
            self.platform.exit(EXIT_OK);
        }
    }

    fn write_page(&mut self) {
        let index = self.choose_page();
        let Some(generation) = self.generations.get_mut(index) else { return };
        let Some(page) = self.pages.get_mut(index) else { return };
        *generation = generation.wrapping_add(1);
        fill_page(page, self.cpu, index as u64, *generation, self.params.content);
        self.written += 1;
    }

    fn choose_page(&mut self) -> usize {
        let pages = self.pages.len();
        match self.params.pattern {
            Pattern::Sequential => {
                let index = self.cursor;
                self.cursor = if index + 1 < pages { index + 1 } else { 0 };
                index
            }
            Pattern::Random => self.choose_below(pages),
            Pattern::HotCold => {
                let hot = pages.div_ceil(10);
                if self.choose_below(10) > 0 || hot == pages {
                    self.choose_below(hot)
                } else {
                    hot + self.choose_below(pages - hot)
                }
            }
        }
    }

    /// A number below `bound`, near enough equally likely.
    fn choose_below(&mut self, bound: usize) -> usize {
        self.choice = self.choice.wrapping_add(0x9e37_79b9_7f4a_7c15);
        ((u128::from(mix(self.choice)) * bound as u128) >> 64) as usize
    }

    /// Checks the next few pages of the walk, and charges the time that takes.
    fn verify_some(&mut self) {
        let due = self.walk.take(CHECK_BATCH);
        if due == 0 {
            return;
        }
        for _ in 0..due {
            self.verify_page();
        }
        // The clock is read here as well: what it says is earned by all paces, or they would run slow.
        let spent_ns = self.tell_time();
        self.count.earn(spent_ns);
        self.write.earn(spent_ns);
        self.walk.earn(spent_ns);
        self.walk_budget_ns = self.walk_budget_ns.saturating_sub(spent_ns);
    }

    fn verify_page(&mut self) {
        let index = self.walked;
        if let (Some(page), Some(&want)) = (self.pages.get(index), self.generations.get(index))
            && !check_page(page, self.cpu, index as u64, want, self.params.content)
        {
            let found = generation_of(page);
            self.wrong += 1;
            if self.wrong <= WRONG_LINES {
                self.print(&Line::Wrong { cpu: self.cpu, page: index as u64, want, found });
            }
        }
        self.walked += 1;
        if self.walked >= self.pages.len() {
            self.finish_walk();
        }
    }

    fn finish_walk(&mut self) {
        self.pass += 1;
        self.print(&Line::Verify {
            cpu: self.cpu,
            pass: self.pass,
            pages: self.pages.len() as u64,
            wrong: self.wrong,
            written: self.written,
        });
        self.walked = 0;
        self.wrong = 0;
    }
}
