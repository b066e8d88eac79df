//! A guest of 64 pages whose right content is known at every step.

use mirror::dirty::DirtySet;
use mirror::memory::{Layout, PAGE_SIZE, Region};
use xxhash_rust::xxh3::xxh3_64;

/// Pages of the guest.
pub const PAGES: u64 = 64;

/// Times that a guest can go on elsewhere, and is known to have.
pub const LIVES: usize = 4;

/// Pages that hold something before the first step; the others are zero and unknown to the hypervisor.
const POPULATED: u64 = 48;

/// The guest's memory layout.
pub fn layout() -> Layout {
    Layout::new(vec![Region { start: 0, pages: PAGES }]).expect("the region is aligned")
}

/// Number of a mix of small numbers.
pub fn mix(a: u64, b: u64, c: u64) -> u64 {
    let mut bytes = [0; 24];
    bytes[..8].copy_from_slice(&a.to_le_bytes());
    bytes[8..16].copy_from_slice(&b.to_le_bytes());
    bytes[16..].copy_from_slice(&c.to_le_bytes());
    xxh3_64(&bytes)
}

/// What is in `page` after it was written in `step` of the so-manieth life. Some pages become zero.
fn fill(page: u64, step: u64, life: u64, into: &mut [u8]) {
    let number = mix(page, step, life);
    if number.is_multiple_of(5) {
        into.fill(0);
        return;
    }
    into.fill(number as u8);
    for (index, word) in [number, page, step].into_iter().enumerate() {
        // At both ends of the page, so that half a page is no page.
        into[index * 8..][..8].copy_from_slice(&word.to_le_bytes());
        into[PAGE_SIZE - 24 + index * 8..][..8].copy_from_slice(&word.to_le_bytes());
    }
}

/// The pages that a step writes: one to three.
fn written(step: u64) -> impl Iterator<Item = u64> {
    let number = mix(step, 77, 0);
    (0..=number % 3).map(move |index| mix(step, index, 1) % PAGES)
}

/// Plain memory.
#[derive(Clone)]
pub struct Memory(Box<[u8]>);

impl Memory {
    /// Zeroed memory.
    pub fn zeroed() -> Self {
        Self(vec![0; PAGES as usize * PAGE_SIZE].into())
    }

    /// A page.
    pub fn page(&self, page: u64) -> &[u8] {
        &self.0[page as usize * PAGE_SIZE..][..PAGE_SIZE]
    }

    /// A page to write to.
    pub fn page_mut(&mut self, page: u64) -> &mut [u8] {
        &mut self.0[page as usize * PAGE_SIZE..][..PAGE_SIZE]
    }
}

/// What the processor knows: all of it travels as machine state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    /// Steps done.
    pub step: u64,
    /// Its other lives began after these steps: from there on the guest does what it would not have done before, as a
    /// guest does that gets other interrupts and other input.
    pub turned: [u64; LIVES],
    /// Position of its output.
    pub produced: u64,
}

impl Cpu {
    /// As machine state.
    pub fn save(&self) -> Vec<u8> {
        let words = [self.step, self.produced].into_iter().chain(self.turned);
        words.flat_map(u64::to_le_bytes).collect()
    }

    /// Which life a step is of.
    fn life(&self, step: u64) -> u64 {
        self.turned.iter().filter(|&&turned| step > turned).count() as u64
    }

    /// From machine state.
    pub fn restore(state: &[u8]) -> Option<Self> {
        let words: Vec<u64> = state
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()))
            .collect();
        let [step, produced, turned @ ..] = words.as_slice() else { return None };
        let whole = state.len() == (2 + LIVES) * 8;
        Some(Self { step: *step, produced: *produced, turned: turned.try_into().ok().filter(|_| whole)? })
    }
}

/// The guest.
pub struct Guest {
    /// Its memory.
    pub memory: Memory,
    /// Its processor.
    pub cpu: Cpu,
    /// The processor stands still.
    pub paused: bool,
    /// It ends by itself after this step.
    pub ends_after: u64,
    tracking: bool,
    dirty: DirtySet,
}

impl Guest {
    /// A guest that was just booted.
    pub fn booted(ends_after: u64) -> Self {
        let mut memory = Memory::zeroed();
        for page in 0..POPULATED {
            fill(page, 0, 0, memory.page_mut(page));
        }
        let cpu = Cpu { step: 0, turned: [u64::MAX; LIVES], produced: 0 };
        Self { memory, cpu, paused: false, ends_after, tracking: false, dirty: DirtySet::new(PAGES) }
    }

    /// A guest that goes on elsewhere.
    pub fn revived(memory: Memory, mut cpu: Cpu, ends_after: u64) -> Self {
        if let Some(next) = cpu.turned.iter_mut().find(|turned| **turned == u64::MAX) {
            *next = cpu.step;
        }
        Self { memory, cpu, paused: false, ends_after, tracking: false, dirty: DirtySet::new(PAGES) }
    }

    /// Whether it has nothing more to do.
    pub fn has_ended(&self) -> bool {
        self.cpu.step >= self.ends_after
    }

    /// Does one step and gives what it prints.
    pub fn step(&mut self) -> Vec<u8> {
        self.cpu.step += 1;
        let step = self.cpu.step;
        let life = self.cpu.life(step);
        for page in written(step) {
            fill(page, step, life, self.memory.page_mut(page));
            if self.tracking {
                self.dirty.insert(page);
            }
        }
        let output = match mix(step, 3, 0) % 3 {
            0 => format!("out {step}{}\n", char::from(b'a' + life as u8)).into_bytes(),
            _ => Vec::new(),
        };
        self.cpu.produced += output.len() as u64;
        output
    }

    /// Starts dirty tracking; gives the populated pages.
    pub fn start_tracking(&mut self) -> DirtySet {
        self.tracking = true;
        self.dirty.clear();
        let mut populated = DirtySet::new(PAGES);
        populated.insert_range(0, POPULATED);
        // What was written before tracking began is populated too.
        (1..=self.cpu.step).flat_map(written).for_each(|page| populated.insert(page));
        populated
    }

    /// Stops dirty tracking.
    pub fn stop_tracking(&mut self) {
        self.tracking = false;
    }

    /// Moves the pages written since the last harvest to `into`.
    pub fn harvest(&mut self, into: &mut DirtySet) {
        into.union(&self.dirty);
        self.dirty.clear();
    }

    /// Pages that a harvest would find.
    pub fn dirty(&self) -> &DirtySet {
        &self.dirty
    }
}

/// The first page of `memory` that is not what it must be for `cpu`.
pub fn wrong_page(memory: &Memory, cpu: &Cpu) -> Option<u64> {
    let mut known = DirtySet::new(PAGES);
    let mut right = vec![0; PAGE_SIZE];
    let mut judge = |page: u64, step: u64| {
        if known.contains(page) {
            return false;
        }
        known.insert(page);
        fill(page, step, cpu.life(step), &mut right);
        memory.page(page) != right.as_slice()
    };
    for step in (1..=cpu.step).rev() {
        // Of two writes of a step to one page both leave the same.
        if let Some(page) = written(step).find(|&page| judge(page, step)) {
            return Some(page);
        }
    }
    if let Some(page) = (0..POPULATED).find(|&page| judge(page, 0)) {
        return Some(page);
    }
    (POPULATED..PAGES).find(|&page| !known.contains(page) && memory.page(page).iter().any(|&byte| byte != 0))
}
