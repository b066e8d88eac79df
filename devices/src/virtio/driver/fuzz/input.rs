//! What a fuzzer's bytes mean: a list of operations, each of a fixed length, so that a fuzzer can leave one out, repeat it
//! or change it without touching the others.

use crate::virtio::driver::{BUFFERS, Layout};
use crate::virtio::held::OutputPolicy;

/// Bytes of one operation.
pub(super) const RECORD: usize = 24;
/// Most operations that are carried out; what follows is ignored.
pub(super) const MAX_OPERATIONS: usize = 96;

/// Bytes to make choices from. Behind their end are zeros.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// Choices from `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    /// The next two bytes.
    pub fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// The next four bytes.
    pub fn double(&mut self) -> u32 {
        u32::from(self.word()) | u32::from(self.word()) << 16
    }

    /// A number below `count`.
    pub fn below(&mut self, count: usize) -> usize {
        usize::from(self.byte()) % count.max(1)
    }

    /// Whether it is so, one time in `count`; never behind the end.
    pub fn one_in(&mut self, count: u8) -> bool {
        self.byte() % count == count - 1
    }

    /// All the bytes that are left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    /// A guest physical address: in memory, at its edges, in a queue's rings, or nowhere.
    fn address(&mut self) -> u64 {
        let (kind, offset) = (self.byte() % 12, u64::from(self.word()));
        match kind {
            0..=2 => BUFFERS + offset * 4,
            3 => BUFFERS + (offset & !0xf) * 8,
            4 => super::REGIONS[0].0 + super::REGIONS[0].1 as u64 - offset % 64,
            5 => super::REGIONS[1].0 + offset * 4,
            6 => super::REGIONS[1].0 + super::REGIONS[1].1 as u64 - offset % 0x1001,
            // The rings of the first queues.
            7 | 8 => 0x1_0000 * (1 + offset % 4) + 0x2000 * (offset >> 2 & 3) + (offset >> 4 & 0xff),
            9 => offset % 64,
            10 => u64::MAX - offset % 0x1001,
            _ => 0x80_0000 + offset,
        }
    }

    fn len(&mut self) -> u32 {
        let (kind, value) = (self.byte() % 12, u32::from(self.byte()));
        match kind {
            0..=3 => value,
            4..=6 => 512 * (value % 17),
            7 => 4096 * (value % 17) + value % 2,
            8 => 16 * (value % 65),
            9 => 0,
            10 => 1 << (value % 32),
            _ => u32::MAX - value,
        }
    }

    fn descriptor(&mut self) -> (u64, u32, u16) {
        let (address, len) = (self.address(), self.len());
        let flags = match self.byte() % 16 {
            0..=5 => 0,
            6..=11 => 2,
            12 => 4,
            13 => 1,
            other => u16::from(other),
        };
        (address, len, flags)
    }
}

/// One thing that a guest, its host or the mirror does.
#[derive(Clone, Debug)]
pub(super) enum Operation {
    /// The guest writes a register.
    Register { offset: u64, value: u32 },
    /// The guest reads or writes anything in the window.
    Access { offset: u64, write: bool, bytes: Vec<u8> },
    /// The guest begins anew, without the features in `without`, with queues as `places` have them.
    Begin { without: u64, places: Vec<Place> },
    /// A chain as it stands.
    Chain { queue: usize, descriptors: Vec<(u64, u32, u16)>, shape: Shape },
    /// A request that is valid but for `bends`.
    Request { queue: usize, choices: Vec<u8>, bends: Vec<Bend>, ring: bool },
    /// Many requests at once.
    Many { queue: usize, count: u16, choices: Vec<u8> },
    /// A descriptor is another, whatever chain it is in.
    Descriptor { queue: usize, index: u16, descriptor: (u64, u32, u16), next: u16 },
    /// Anything anywhere.
    Write { address: u64, bytes: Vec<u8> },
    /// A head is made available, once more perhaps.
    Available { queue: usize, head: u16 },
    /// A doorbell rings.
    Doorbell { queue: usize },
    /// The device loop finds a source ready, truly or not.
    Ready { source: usize },
    /// The device loop attends to the device.
    Attend,
    /// The device loop serves the device until nothing is left to do.
    Settle,
    /// Something happens outside.
    Outside { choices: Vec<u8> },
    /// Output is held, or not.
    Output(OutputPolicy),
    /// The device's work is waited for, and it is saved.
    Save,
    /// What the last save knows of is released.
    Release,
    /// Another device takes over, from the state as it is or with one word of it changed.
    FailOver { damage: Option<(u8, u32)> },
    /// What the device has written is compared with what it has marked.
    Check,
}

/// How the descriptors of a chain lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// One after the other.
    Plain,
    /// So, in an indirect table.
    Indirect,
    /// The last leads to the first again.
    Loop,
}

/// How a queue differs from what it usually is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    queue: u32,
    what: u8,
    value: u64,
}

impl Place {
    /// Changes the layout of `queue` if it is meant.
    pub(super) fn change(self, queue: u32, layout: &mut Layout) {
        if self.queue != queue {
            return;
        }
        match self.what % 8 {
            // Sizes are powers of two up to the usual.
            0..=3 => layout.size = (layout.size >> (self.value % 9)).max(1),
            4 => layout.size = (self.value as u16).max(1),
            5 => layout.table = self.value & !0xf,
            6 => layout.available = self.value & !1,
            _ => layout.used = self.value & !3,
        }
    }
}

/// How a request differs from a valid one.
#[derive(Clone, Copy, Debug)]
pub(super) enum Bend {
    /// A byte of what the device reads is another.
    Byte { at: u8, value: u8 },
    /// A buffer has another length.
    Len { buffer: u8, len: u32 },
    /// A buffer is elsewhere.
    Address { buffer: u8, address: u64 },
    /// A buffer has other flags.
    Flags { buffer: u8, flags: u16 },
}

/// The operations that `bytes` stand for.
pub(super) fn operations(bytes: &[u8]) -> Vec<Operation> {
    let records = bytes.chunks(RECORD).take(MAX_OPERATIONS);
    records.map(|record| operation(&mut Input::new(record))).collect()
}

fn operation(input: &mut Input) -> Operation {
    let kind = input.byte();
    let queue = usize::from(kind % 5);
    match kind {
        0..=79 => {
            let (ring, bent) = (!input.one_in(4), input.one_in(3));
            let bends = (0..if bent { 1 + input.below(2) } else { 0 }).map(|_| bend(input)).collect();
            Operation::Request { queue, choices: input.rest().into(), bends, ring }
        }
        80..=89 => Operation::Many { queue, count: 1 + input.word() % 300, choices: input.rest().into() },
        90..=114 => {
            let shape = match input.byte() % 8 {
                0..=4 => Shape::Plain,
                5 | 6 => Shape::Indirect,
                _ => Shape::Loop,
            };
            let count = 1 + input.below(3);
            let descriptors = (0..count).map(|_| input.descriptor()).collect();
            Operation::Chain { queue, descriptors, shape }
        }
        115..=119 => Operation::Available { queue, head: input.word() % 300 },
        120..=124 => {
            let index = input.word() % 300;
            Operation::Descriptor { queue, index, descriptor: input.descriptor(), next: input.word() % 300 }
        }
        125..=134 => {
            let address = input.address();
            let len = 1 + input.below(16);
            Operation::Write { address, bytes: (0..len).map(|_| input.byte()).collect() }
        }
        135..=149 => Operation::Doorbell { queue },
        150..=159 => Operation::Ready { source: input.byte().into() },
        160..=164 => Operation::Attend,
        165..=174 => Operation::Settle,
        175..=194 => Operation::Outside { choices: input.rest().into() },
        195..=204 => Operation::Output(match input.below(8) {
            0..=2 => OutputPolicy::Pass,
            3..=6 => OutputPolicy::Hold,
            _ => OutputPolicy::Freeze,
        }),
        205..=214 => Operation::Save,
        215..=219 => Operation::Release,
        220..=227 => {
            let damage = input.one_in(3).then(|| (input.byte(), input.double()));
            Operation::FailOver { damage }
        }
        228..=235 => {
            let without = if input.one_in(2) { 1 << (input.byte() % 64) } else { 0 };
            let without = without | if input.one_in(4) { u64::from(input.double()) } else { 0 };
            let count = if input.one_in(2) { 1 + input.below(3) } else { 0 };
            let place = |input: &mut Input<'_>| {
                let (queue, what) = (input.below(5) as u32, input.byte());
                let value = if input.one_in(2) { input.address() } else { input.word().into() };
                Place { queue, what, value }
            };
            Operation::Begin { without, places: (0..count).map(|_| place(input)).collect() }
        }
        236..=243 => Operation::Register {
            offset: u64::from(input.byte()) * 4,
            value: if input.one_in(2) { input.double() } else { input.byte().into() },
        },
        244..=251 => {
            let (write, offset) = (input.one_in(2), u64::from(input.word() % 0x1010));
            let len = 1 + input.below(8);
            Operation::Access { offset, write, bytes: (0..len).map(|_| input.byte()).collect() }
        }
        _ => Operation::Check,
    }
}

fn bend(input: &mut Input) -> Bend {
    let at = input.byte();
    match input.below(8) {
        0..=3 => Bend::Byte { at: at % 64, value: input.byte() },
        4 | 5 => Bend::Len { buffer: at, len: input.len() },
        6 => Bend::Address { buffer: at, address: input.address() },
        _ => Bend::Flags { buffer: at, flags: input.word() % 8 },
    }
}
