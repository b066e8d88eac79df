use virtio_bindings::virtio_mmio as register;

use super::*;
use crate::virtio::driver::{Driver, memory};
use crate::virtio::held::OutputPolicy;
use crate::virtio::{
    DeviceError, DeviceState, DeviceType, Held, RestoreError, Source, VirtQueue, VirtioDevice,
};

/// (address, length, flags) of each.
type Descriptors<'a> = &'a [(u64, u32, u16)];

/// Answers each request with its own bytes, turned around.
#[derive(Default)]
struct Mirror {
    held: Held<u16>,
}

impl VirtioDevice for Mirror {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }
    fn features(&self) -> u64 {
        1
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::virtio::device::read_config(b"config", offset, data);
    }
    fn activate(&mut self, _features: u64, _queues: &mut [VirtQueue]) {}
    fn reset(&mut self) {
        self.held.clear();
    }
    fn doorbell(&mut self, index: usize, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        while let Some(chain) = queues[index].pop()? {
            self.held.push(chain.head());
        }
        self.attend(queues)
    }
    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }
    fn set_output(&mut self, policy: OutputPolicy) {
        self.held.set_policy(policy);
    }
    fn attend(&mut self, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        while let Some(head) = self.held.pop() {
            let chain = queues[0].chain(head)?;
            let mut bytes = vec![0; chain.readable_len() as usize];
            chain.read(0, &mut bytes);
            bytes.reverse();
            let written = chain.write(0, &bytes);
            queues[0].complete(head, written as u32)?;
        }
        Ok(queues[0].notify()?)
    }
    fn save(&mut self, _state: &mut DeviceState) {
        self.held.mark();
    }
    fn restore(&mut self, _: &DeviceState, _: &mut [VirtQueue]) -> Result<(), RestoreError> {
        Ok(())
    }
}

fn driver() -> Driver {
    Driver::start(Box::<Mirror>::default(), 0)
}

#[test]
fn request_goes_through_the_device_and_its_answer_is_marked_dirty() {
    let mut driver = driver();
    let request = driver.add(0, &[b"abc", b"def"], &[4, 100]);
    driver.begin_watch();
    driver.ring(0);
    assert!(driver.check_changes_are_marked() >= 2, "an answer and a used ring");
    assert_eq!(driver.used(0), [(request.head, 6)]);
    assert_eq!(driver.read(request.writable[0].0, 4), b"fedc");
    assert_eq!(driver.read(request.writable[1].0, 3), b"ba\0");
    assert_eq!(driver.take_interrupt(), 1);
    assert_eq!(driver.take_interrupt(), 0);
}

#[test]
fn registers_say_what_the_device_is() {
    let mut driver = Driver::idle(memory(), Box::<Mirror>::default());
    assert_eq!(driver.get(register::VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(driver.get(register::VIRTIO_MMIO_VERSION), 2);
    assert_eq!(driver.get(register::VIRTIO_MMIO_DEVICE_ID), 4);
    assert_eq!(driver.config(2, 8), b"nfig\0\0\0\0");
    driver.set(register::VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(driver.get(register::VIRTIO_MMIO_QUEUE_NUM_MAX), 8);
    driver.set(register::VIRTIO_MMIO_QUEUE_SEL, 2);
    assert_eq!(driver.get(register::VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
    // Of another width than a register has: nothing.
    let mut two = [7; 2];
    driver.mmio.read(0, &mut two);
    assert_eq!(two, [0; 2]);
}

#[test]
fn driver_that_takes_features_which_are_not_offered_is_refused() {
    for features in [VERSION_1 | 1 << 63, 1] {
        let mut driver = Driver::idle(memory(), Box::<Mirror>::default());
        driver.set(register::VIRTIO_MMIO_STATUS, 3);
        for half in 0..2 {
            driver.set(register::VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            driver.set(register::VIRTIO_MMIO_DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        driver.set(register::VIRTIO_MMIO_STATUS, 0xb);
        assert_eq!(driver.get(register::VIRTIO_MMIO_STATUS), 3);
        driver.set(register::VIRTIO_MMIO_STATUS, 0xf);
        assert_eq!(driver.get(register::VIRTIO_MMIO_STATUS), 3, "not ready without features");
    }
}

#[test]
fn impossible_queue_makes_the_device_need_a_reset_and_the_reset_heals_it() {
    // Table and available ring over each other, outside of memory, at the end of the address space.
    for (table, available) in
        [(0x1000, 0x1010), (5 << 20, 0x1000), (u64::MAX - 0xf, 0x1000), (0x1001, 0x2000)]
    {
        let mut driver = Driver::idle(memory(), Box::<Mirror>::default());
        driver.negotiate(u64::MAX);
        driver.set(register::VIRTIO_MMIO_STATUS, 0);
        driver.set(register::VIRTIO_MMIO_STATUS, 3);
        driver.set(register::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        driver.set(register::VIRTIO_MMIO_DRIVER_FEATURES, 1);
        driver.set(register::VIRTIO_MMIO_STATUS, 0xb);
        driver.set(register::VIRTIO_MMIO_QUEUE_DESC_LOW, table as u32);
        driver.set(register::VIRTIO_MMIO_QUEUE_DESC_HIGH, (table >> 32) as u32);
        driver.set(register::VIRTIO_MMIO_QUEUE_AVAIL_LOW, available);
        driver.set(register::VIRTIO_MMIO_QUEUE_USED_LOW, 0x3000);
        driver.set(register::VIRTIO_MMIO_QUEUE_READY, 1);
        driver.set(register::VIRTIO_MMIO_STATUS, 0xf);
        assert!(driver.needs_reset(), "{table:#x}");
        assert_eq!(driver.take_interrupt(), 2);
        driver.negotiate(u64::MAX);
        assert!(!driver.needs_reset());
        driver.add(0, &[b"x"], &[1]);
        driver.ring(0);
        assert_eq!(driver.used(0).len(), 1);
    }
}

#[test]
fn malformed_chains_make_the_device_need_a_reset() {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    let inside = 0x20_0000;
    let cases: [(&str, Descriptors); 8] = [
        ("leaves memory", &[(inside, 16, 0), ((4 << 20) - 8, 16, WRITE)]),
        ("wraps", &[(u64::MAX - 7, 16, 0)]),
        ("loops", &[(inside, 16, NEXT); 16]),
        ("reads behind writes", &[(inside, 16, WRITE), (inside + 64, 16, 0)]),
        ("writes over what it reads", &[(inside, 16, 0), (inside + 8, 16, WRITE)]),
        ("writes twice", &[(inside, 16, WRITE), (inside + 64, 16, WRITE), (inside + 8, 8, WRITE)]),
        ("indirect table of half a descriptor", &[(inside, 24, INDIRECT)]),
        ("indirect and next", &[(inside, 16, INDIRECT | NEXT), (inside, 16, 0)]),
    ];
    for (what, chain) in cases {
        let mut driver = driver();
        driver.add_chain(0, chain);
        driver.ring(0);
        assert!(driver.needs_reset(), "{what}");
        assert!(driver.mmio.slot().fault().is_some(), "{what}");
        driver.add(0, &[b"x"], &[1]);
        driver.ring(0);
        assert!(driver.used(0).is_empty(), "{what}: works on although it needs a reset");
    }
}

#[test]
fn buffer_across_the_end_of_a_region_is_refused_and_indirect_tables_work() {
    let mut driver = driver();
    let table = driver.allocate(32);
    let (input, output) = (driver.allocate(8), driver.allocate(8));
    for (index, (address, flags, next)) in [(input, 1, 1), (output, 2, 0)].into_iter().enumerate() {
        use vm_memory::ByteValued;
        let descriptor = virtio_queue::desc::split::Descriptor::new(address, 8, flags, next);
        driver.write(table + 16 * index as u64, descriptor.as_slice());
    }
    let head = driver.add_chain(0, &[(table, 32, 4)]);
    driver.ring(0);
    assert_eq!(driver.used(0), [(head, 8)]);
    driver.add_chain(0, &[((4 << 20) - 8, 16, 2)]);
    driver.ring(0);
    assert!(driver.needs_reset());
}

#[test]
fn index_further_on_than_the_queue_is_long_needs_a_reset() {
    let mut driver = driver();
    for _ in 0..17 {
        driver.make_available(0, 0);
    }
    driver.ring(0);
    assert!(driver.needs_reset());
}

#[test]
fn held_request_is_completed_only_when_its_epoch_is_committed() {
    let mut driver = driver();
    driver.mmio.slot().set_output(OutputPolicy::Hold);
    driver.add(0, &[b"abc"], &[3]);
    driver.ring(0);
    assert!(driver.used(0).is_empty());
    driver.mmio.slot().set_output(OutputPolicy::Pass);
    driver.mmio.slot().attend();
    assert_eq!(driver.used(0).len(), 1);
}

#[test]
fn interrupt_that_was_not_acknowledged_is_raised_again_at_the_successor() {
    let mut driver = driver();
    driver.add(0, &[b"abc"], &[3]);
    driver.ring(0);
    let mut next = driver.fail_over(Box::<Mirror>::default());
    assert_eq!(next.take_interrupt(), 1);
    assert_eq!(next.used(0).len(), 1);
    next.add(0, &[b"abc"], &[3]);
    next.ring(0);
    assert_eq!(next.used(0).len(), 1);
    assert_eq!(next.take_interrupt(), 1);
}

#[test]
fn state_of_registers_that_no_device_here_has_is_refused() {
    let mut driver = driver();
    let mut state = VirtioState::default();
    driver.mmio.save(&mut state);
    let with = |change: &dyn Fn(&mut TransportState)| {
        let mut state = state.clone();
        change(&mut state.transport);
        state
    };
    for state in [
        with(&|registers| registers.status |= 0x40),
        with(&|registers| registers.driver_features |= 1 << 63),
        with(&|registers| registers.queues[0].size = 3),
        with(&|registers| registers.queues.truncate(1)),
    ] {
        assert!(driver.mmio.restore(&state).is_err(), "{state:?}");
    }
    driver.mmio.restore(&state).unwrap();
}

#[test]
fn broken_device_has_nothing_in_flight_and_its_state_can_be_restored() {
    let mut driver = driver();
    driver.mmio.slot().set_output(OutputPolicy::Hold);
    driver.add(0, &[b"abc"], &[3]);
    driver.add_chain(0, &[(u64::MAX, 16, 0)]);
    driver.ring(0);
    assert!(driver.needs_reset());
    let mut next = driver.fail_over(Box::<Mirror>::default());
    assert!(next.needs_reset());
    assert!(next.used(0).is_empty());
    next.negotiate(u64::MAX);
    next.add(0, &[b"abc"], &[3]);
    next.ring(0);
    assert_eq!(next.used(0).len(), 1);
}
