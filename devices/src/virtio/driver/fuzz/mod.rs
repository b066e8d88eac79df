//! A hostile guest, a busy host and a mirror that take turns at a device, in an order that a fuzzer makes up.
//!
//! [`run`] carries out what the fuzzer's bytes mean ([`input`]) on one device with its world, a [`Subject`], and panics if
//! the device breaks a promise:
//!
//! - it does not panic, and every call to it ends soon;
//! - every page that it writes is marked dirty;
//! - served by its loop it comes to rest: no source stays ready for good;
//! - a chain that it has taken is in flight, as its saved state says, or has been given back, once;
//! - one that needs a reset says so until it is reset, and touches no memory before;
//! - its state can be restored, and the successor's state is the same; a damaged state is refused or does no harm;
//! - while output is held, nothing is seen outside;
//! - whatever has happened: after a reset it serves a correct driver.

pub mod balloon;
pub mod block;
pub mod console;
mod greed;
pub mod input;
pub mod net;
pub mod rng;
#[cfg(test)]
mod tests;
pub mod vsock;
mod watchdog;

pub use greed::outlast;

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use virtio_bindings::virtio_mmio as register;
use virtio_queue::desc::split::Descriptor;
use vm_memory::ByteValued;
use vmm_sys_util::epoll::EventSet;

use self::input::{Bend, Input, Operation, Shape, operations};
use super::{Driver, memory_of};
use crate::bus::BusDevice;
use crate::virtio::held::OutputPolicy;
use crate::virtio::{DeviceState, VirtioDevice, VirtioState};

/// Guest memory: small, so that it is compared quickly, with a hole.
pub const REGIONS: [(u64, usize); 2] = [(0, 0x18_0000), (0x80_0000, 0x8_0000)];

/// Longest time for one call.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most rounds until a device comes to rest.
const MAX_ROUNDS: usize = 5000;
const STATUS: u64 = register::VIRTIO_MMIO_STATUS as u64;
const DRIVER_OK: u32 = 4;

/// A kind of device, with the world that it works on.
pub trait Subject {
    /// A new device on this world. No other works on it at the time.
    fn device(&mut self) -> Box<dyn VirtioDevice>;

    /// A valid request for `queue`: what the device reads, and how much it has to write.
    fn request(&mut self, queue: usize, choices: &mut Input<'_>) -> (Vec<Vec<u8>>, Vec<usize>);

    /// How many chains of `queue` are in flight by `state`.
    fn in_flight(&self, state: &DeviceState, queue: usize) -> usize;

    /// How many requests for `queue` the device keeps for later, of any that come.
    fn kept(&self, _queue: usize) -> u16 {
        0
    }

    /// Something happens in the world.
    fn outside(&mut self, _choices: &mut Input<'_>) {}

    /// What the world has seen of the device so far.
    fn seen(&mut self) -> Vec<u8> {
        Vec::new()
    }

    /// Has valid requests served by a device that was just set up with all its features. Panics if they are not.
    fn prove(&mut self, driver: &mut Driver);
}

/// Carries out the operations that `bytes` stand for, and prints them first if SHOW_OPERATIONS is set.
pub fn run(subject: &mut dyn Subject, bytes: &[u8]) {
    let operations = operations(bytes);
    let _guard = watchdog::watch(&operations);
    let ram = memory_of(&REGIONS);
    let mut driver = Driver::idle(ram, subject.device());
    driver.negotiate(u64::MAX);
    let mut case = Case {
        subject,
        driver,
        state: VirtioState::default(),
        broken: false,
        damaged: false,
        spoilt: false,
        policy: OutputPolicy::Pass,
        seen: None,
    };
    let show = std::env::var_os("SHOW_OPERATIONS").is_some();
    for operation in &operations {
        if show {
            eprintln!("{operation:?}");
        }
        case = case.step(operation);
    }
    case.end();
}

struct Case<'a> {
    subject: &'a mut dyn Subject,
    driver: Driver,
    state: VirtioState,
    /// The device needs a reset.
    broken: bool,
    /// It was restored from a damaged state: what is in flight may be anything.
    damaged: bool,
    /// A chain in flight may not be what it was when it was taken.
    spoilt: bool,
    policy: OutputPolicy,
    /// What the world had seen when nothing was left that may be seen.
    seen: Option<Vec<u8>>,
}

impl Case<'_> {
    fn step(mut self, operation: &Operation) -> Self {
        let was_broken = self.broken;
        let may_heal = matches!(
            operation,
            Operation::Begin { .. }
                | Operation::FailOver { .. }
                | Operation::Register { .. }
                | Operation::Access { write: true, .. }
        );
        if was_broken && may_heal {
            self.check_untouched();
        }
        let begin = Instant::now();
        if let Operation::FailOver { damage } = operation {
            self = self.fail_over(*damage);
        } else {
            self.carry_out(operation);
        }
        let elapsed = begin.elapsed();
        assert!(elapsed < PATIENCE, "{operation:?} took {elapsed:?}");
        self.broken = self.driver.needs_reset();
        let healed = match operation {
            Operation::Begin { .. } | Operation::FailOver { damage: Some(_) } => true,
            _ => may_heal && self.driver.get(register::VIRTIO_MMIO_STATUS) == 0,
        };
        assert!(!was_broken || self.broken || healed, "{operation:?} healed a device that needs a reset");
        if self.broken && (healed || !was_broken) {
            self.driver.check_changes_are_marked();
        }
        self
    }

    fn carry_out(&mut self, operation: &Operation) {
        self.spoilt |= match operation {
            Operation::Chain { .. } | Operation::Descriptor { .. } | Operation::Write { .. } => true,
            Operation::Request { bends, .. } => !bends.is_empty(),
            Operation::Begin { places, .. } => !places.is_empty(),
            _ => false,
        };
        let slot = self.driver.mmio.slot().clone();
        match operation {
            Operation::Register { offset, value } => self.driver.mmio.write(*offset, &value.to_le_bytes()),
            Operation::Access { offset, write: true, bytes } => self.driver.mmio.write(*offset, bytes),
            Operation::Access { offset, bytes, .. } => self.driver.mmio.read(*offset, &mut bytes.clone()),
            Operation::Begin { without, places } => {
                self.damaged = false;
                self.driver.negotiate_with(!without, |queue, mut layout| {
                    for place in places {
                        place.change(queue, &mut layout);
                    }
                    layout
                });
            }
            Operation::Chain { queue, descriptors, shape } => {
                let queue = self.queue(*queue);
                match shape {
                    Shape::Plain => {
                        self.driver.add_chain(queue, descriptors);
                    }
                    Shape::Indirect => self.add_indirect(queue, descriptors),
                    Shape::Loop => self.add_loop(queue, descriptors),
                }
                self.ring(queue);
            }
            Operation::Request { queue, choices, bends, ring } => {
                let queue = self.queue(*queue);
                self.request(queue, choices, bends);
                if *ring {
                    self.ring(queue);
                }
            }
            Operation::Many { queue, count, choices } => {
                let queue = self.queue(*queue);
                for _ in 0..*count {
                    self.request(queue, choices, &[]);
                }
                self.ring(queue);
            }
            Operation::Descriptor { queue, index, descriptor: (address, len, flags), next } => {
                let table = self.driver.layout(self.queue(*queue)).table;
                let descriptor = Descriptor::new(*address, *len, *flags, *next);
                let entry = table.wrapping_add(16 * u64::from(*index));
                self.driver.view().write(entry, descriptor.as_slice());
            }
            Operation::Write { address, bytes } => {
                self.driver.view().write(*address, bytes);
            }
            Operation::Available { queue, head } => {
                self.driver.make_available(self.queue(*queue), *head);
            }
            Operation::Doorbell { queue } => self.ring(self.queue(*queue)),
            Operation::Ready { source } => {
                let count = slot.sources().len();
                if count > 0 {
                    slot.ready(source % count);
                }
            }
            Operation::Attend => slot.attend(),
            Operation::Settle => self.settle(),
            Operation::Outside { choices } => self.subject.outside(&mut Input::new(choices)),
            Operation::Output(policy) => self.set_output(*policy),
            Operation::Save => self.save(),
            Operation::Release => {
                self.check_silence();
                slot.release_output();
                slot.attend();
                self.listen();
            }
            Operation::FailOver { .. } => {}
            Operation::Check => self.check(),
        }
    }

    fn queue(&self, queue: usize) -> usize {
        queue % self.driver.queue_count()
    }

    fn ring(&mut self, queue: usize) {
        self.driver.ring(queue);
    }

    fn add_indirect(&mut self, queue: usize, descriptors: &[(u64, u32, u16)]) {
        let table = self.driver.allocate(16 * descriptors.len());
        for (index, &(address, len, flags)) in descriptors.iter().enumerate() {
            let next = index + 1 < descriptors.len();
            let descriptor = Descriptor::new(address, len, flags | u16::from(next), index as u16 + 1);
            self.driver.write(table + 16 * index as u64, descriptor.as_slice());
        }
        self.driver.add_chain(queue, &[(table, 16 * descriptors.len() as u32, 4)]);
    }

    fn add_loop(&mut self, queue: usize, descriptors: &[(u64, u32, u16)]) {
        let head = self.driver.add_chain(queue, descriptors);
        let layout = self.driver.layout(queue);
        let last = (usize::from(head) + descriptors.len() - 1) % usize::from(layout.size);
        let (address, len, flags) = descriptors[descriptors.len() - 1];
        let descriptor = Descriptor::new(address, len, flags | 1, head);
        self.driver.view().write(layout.table.wrapping_add(16 * last as u64), descriptor.as_slice());
    }

    fn request(&mut self, queue: usize, choices: &[u8], bends: &[Bend]) {
        let (mut readable, writable) = self.subject.request(queue, &mut Input::new(choices));
        for bend in bends {
            if let Bend::Byte { at, value } = *bend
                && let Some(byte) = readable.iter_mut().flatten().nth(at.into())
            {
                *byte = value;
            }
        }
        let mut descriptors = Vec::new();
        for bytes in &readable {
            let address = self.driver.allocate(bytes.len());
            self.driver.write(address, bytes);
            descriptors.push((address, bytes.len() as u32, 0));
        }
        for len in writable {
            descriptors.push((self.driver.allocate(len), len as u32, 2));
        }
        let count = descriptors.len();
        for bend in bends {
            match *bend {
                Bend::Byte { .. } => {}
                Bend::Len { buffer, len } => descriptors[usize::from(buffer) % count].1 = len,
                Bend::Address { buffer, address } => descriptors[usize::from(buffer) % count].0 = address,
                Bend::Flags { buffer, flags } => descriptors[usize::from(buffer) % count].2 = flags,
            }
        }
        self.driver.add_chain(queue, &descriptors);
    }

    fn settle(&mut self) {
        settle(&self.driver);
    }

    fn set_output(&mut self, policy: OutputPolicy) {
        if self.policy == OutputPolicy::Freeze {
            return;
        }
        self.check_silence();
        if policy == OutputPolicy::Pass {
            self.seen = None;
        } else if self.policy == OutputPolicy::Pass {
            self.driver.mmio.slot().attend();
            self.settle();
        }
        self.policy = policy;
        self.driver.mmio.slot().set_output(policy);
        self.driver.mmio.slot().attend();
        if policy != OutputPolicy::Pass {
            self.listen();
        }
    }

    /// From now on nothing may be seen.
    fn listen(&mut self) {
        if self.policy == OutputPolicy::Pass {
            return;
        }
        for _ in 0..2 {
            self.settle();
            self.seen = Some(self.subject.seen());
        }
    }

    fn check_silence(&mut self) {
        if self.seen.is_some() {
            self.settle();
            let seen = Some(self.subject.seen());
            assert!(self.seen == seen, "something of what is held was seen outside");
        }
    }

    fn save(&mut self) {
        self.driver.mmio.save(&mut self.state);
        self.check_in_flight();
    }

    /// Checks that every chain that was taken is in flight or has been given back.
    fn check_in_flight(&mut self) {
        if self.damaged {
            return;
        }
        let VirtioState { transport, device } = &self.state;
        let active = transport.status & DRIVER_OK != 0 && !transport.needs_reset;
        for (index, ring) in transport.queues.iter().enumerate() {
            let taken = ring.next_available.wrapping_sub(ring.next_used);
            let taken = if active && ring.ready { usize::from(taken) } else { 0 };
            assert_eq!(self.subject.in_flight(device, index), taken, "in flight of queue {index}");
        }
    }

    fn fail_over(mut self, damage: Option<(u8, u32)>) -> Self {
        self.check_silence();
        self.save();
        let state = self.state.clone();
        self.driver = self.driver.replace(|| self.subject.device());
        (self.policy, self.seen) = (OutputPolicy::Pass, None);
        let mut damaged = state.clone();
        if let Some((what, value)) = damage {
            harm(&mut damaged, what, value);
            if self.driver.mmio.restore(&damaged).is_err() {
                self.driver = self.driver.replace(|| self.subject.device());
                damaged.clone_from(&state);
            }
        }
        if damaged == state {
            self.driver.mmio.restore(&state).expect("what was saved can be restored");
            self.driver.mmio.save(&mut self.state);
            let spoilt = self.spoilt && self.driver.needs_reset();
            assert!(
                spoilt || self.state == state,
                "{:?} is not the successor's state: {state:?}",
                self.state
            );
        } else {
            self.damaged = true;
        }
        self.driver.go_on();
        self
    }

    fn check_untouched(&mut self) {
        assert_eq!(self.driver.check_changes_are_marked(), 0, "it works although it needs a reset");
    }

    fn check(&mut self) {
        self.settle();
        if self.broken && self.driver.needs_reset() {
            self.check_untouched();
        } else {
            self.driver.check_changes_are_marked();
        }
    }

    fn end(mut self) {
        self.check_silence();
        self.check();
        self.save();
        if self.policy == OutputPolicy::Freeze {
            self = self.fail_over(None);
        }
        self.driver.mmio.slot().set_output(OutputPolicy::Pass);
        self.driver.mmio.slot().attend();
        self.driver.mmio.write(STATUS, &[0; 4]);
        self.settle();
        self.driver.check_changes_are_marked();
        self.driver.negotiate(u64::MAX);
        self.settle();
        self.subject.prove(&mut self.driver);
        self.driver.check_changes_are_marked();
    }
}

/// Serves the device as its loop does, until nothing is left to do. Panics if that does not come.
pub fn settle(driver: &Driver) {
    let slot = driver.mmio.slot();
    let sources = slot.sources();
    for round in 0.. {
        // What the host carries out is done, so that it is not waited for in rounds.
        slot.drain();
        let rung = |&index: &usize| is_ready(slot.doorbells()[index].as_raw_fd());
        let ready = |&index: &usize| {
            let edge = sources[index].events.contains(EventSet::EDGE_TRIGGERED);
            if edge { round == 0 } else { is_ready(sources[index].fd) }
        };
        let rung: Vec<_> = (0..slot.doorbells().len()).filter(rung).collect();
        let ready: Vec<_> = (0..sources.len()).filter(ready).collect();
        if rung.is_empty() && ready.is_empty() {
            break;
        }
        assert!(
            round < MAX_ROUNDS,
            "the device does not come to rest: doorbells {rung:?}, sources {ready:?}"
        );
        for index in rung {
            slot.doorbell(index);
        }
        for index in ready {
            slot.ready(index);
        }
    }
}

fn is_ready(fd: RawFd) -> bool {
    // SAFETY: the device that it belongs to lives.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    poll(
        &mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)],
        Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 }),
    )
    .is_ok_and(|count| count > 0)
}

/// Changes a word of `state`.
fn harm(state: &mut VirtioState, what: u8, value: u32) {
    let transport = &mut state.transport;
    let index = usize::from(what >> 4) % transport.queues.len();
    let ring = &mut transport.queues[index];
    match what & 0xf {
        0 => transport.status = value,
        1 => transport.driver_features ^= u64::from(value) << (what >> 4),
        2 => transport.queue_select = value,
        3 => transport.needs_reset = !transport.needs_reset,
        4 => ring.size = value as u16,
        5 => ring.ready = !ring.ready,
        6 => ring.table = u64::from(value) << (what >> 4),
        7 => ring.available = u64::from(value) << (what >> 4),
        8 => ring.used = u64::from(value) << (what >> 4),
        9 => ring.next_available = value as u16,
        10 => ring.next_used = value as u16,
        11 => transport.queues.truncate(index),
        12 => transport.interrupt_status = value,
        _ => harm_device(&mut state.device, index, value),
    }
}

fn harm_device(state: &mut DeviceState, index: usize, value: u32) {
    let heads = |heads: &mut Vec<u16>| {
        if value & 1 == 0 { heads.push((value >> 1) as u16) } else { heads.resize(value as u16 as usize, 0) }
    };
    match state {
        DeviceState::None => *state = DeviceState::Block(crate::virtio::block::BlockState::default()),
        DeviceState::Balloon(state) => state.statistics = Some(value as u16),
        DeviceState::Block(state) => heads(&mut state.in_flight),
        DeviceState::Net(state) => match (index % 2, value % 5) {
            (_, 0) => state.pairs = (value >> 3) as u16,
            (0, _) => state.receiving.iter_mut().for_each(heads),
            _ => state.sending.iter_mut().for_each(heads),
        },
        DeviceState::Vsock(state) => heads(&mut state.in_flight),
        DeviceState::Console(state) => {
            state.output.resize(value as usize % 0x1_0000, b'z');
            state.taken = value.rotate_left(index as u32);
        }
    }
}
