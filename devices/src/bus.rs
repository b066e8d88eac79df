//! A bus: which device answers at an address. One is used for port I/O and one for memory-mapped I/O.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

/// What a read gives where no device answers, in every byte.
pub const FLOATING: u8 = 0xff;

/// A device on a bus. Accesses come from a guest: any offset within its range, any length, any value.
pub trait BusDevice: Send {
    /// Fills `data` with what the guest reads `offset` bytes into the device's range.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes what the guest writes `offset` bytes into the device's range.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Why a device cannot be put on a bus.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or ends beyond the address space.
    #[error("a device range of {len:#x} bytes at {base:#x} is empty or leaves the address space")]
    Range {
        /// First address asked for.
        base: u64,
        /// Length asked for.
        len: u64,
    },
    /// Another device answers there.
    #[error("a device range of {len:#x} bytes at {base:#x} overlaps the one at {other:#x}")]
    Overlap {
        /// First address asked for.
        base: u64,
        /// Length asked for.
        len: u64,
        /// First address of the range that is in the way.
        other: u64,
    },
}

struct Entry {
    last: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// Devices by address.
#[derive(Default)]
pub struct Bus {
    /// By first address; ranges do not overlap.
    entries: BTreeMap<u64, Entry>,
}

impl Bus {
    /// A bus without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `device` answer at the `len` addresses from `base` on.
    ///
    /// # Errors
    /// [`BusError`] if the range is no range or taken.
    pub fn insert(&mut self, base: u64, len: u64, device: Arc<Mutex<dyn BusDevice>>) -> Result<(), BusError> {
        let last = len
            .checked_sub(1)
            .and_then(|span| base.checked_add(span))
            .ok_or(BusError::Range { base, len })?;
        let before_end = self.entries.range(..=last).next_back();
        if let Some((&other, _)) = before_end.filter(|(_, entry)| entry.last >= base) {
            return Err(BusError::Overlap { base, len, other });
        }
        self.entries.insert(base, Entry { last, device });
        Ok(())
    }

    /// Reads at `address`; [`FLOATING`] if nobody answers for the whole access.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
            }
            None => data.fill(FLOATING),
        }
    }

    /// Writes at `address`; lost if nobody answers for the whole access.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, &Mutex<dyn BusDevice>)> {
        let (base, entry) = self.entries.range(..=address).next_back()?;
        let last = address.checked_add((len as u64).checked_sub(1)?)?;
        (last <= entry.last).then(|| (address - base, &*entry.device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers what was written last.
    #[derive(Default)]
    struct Register(Vec<(u64, Vec<u8>)>);

    impl BusDevice for Register {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    fn register() -> Arc<Mutex<Register>> {
        Arc::default()
    }

    #[test]
    fn access_reaches_the_device_of_its_range_with_the_offset_in_it() {
        let (low, high) = (register(), register());
        let mut bus = Bus::new();
        bus.insert(0x10, 8, low.clone()).unwrap();
        bus.insert(0x18, 8, high.clone()).unwrap();

        bus.write(0x17, &[1]);
        bus.write(0x1c, &[2, 3, 4, 5]);
        let mut byte = [0];
        bus.read(0x1f, &mut byte);

        assert_eq!(low.lock().unwrap().0, [(7, vec![1])]);
        assert_eq!(high.lock().unwrap().0, [(4, vec![2, 3, 4, 5])]);
        assert_eq!(byte, [7]);
    }

    #[test]
    fn unclaimed_addresses_and_accesses_across_an_end_float() {
        let device = register();
        let mut bus = Bus::new();
        bus.insert(0x10, 8, device.clone()).unwrap();
        for address in [0, 0xf, 0x15, 0x18, u64::MAX] {
            let mut data = [0; 4];
            bus.read(address, &mut data);
            bus.write(address, &data);
            assert_eq!(data, [FLOATING; 4], "at {address:#x}");
        }
        bus.read(0x10, &mut []);
        assert!(device.lock().unwrap().0.is_empty());
    }

    #[test]
    fn ranges_that_overlap_or_are_none_are_refused() {
        let mut bus = Bus::new();
        bus.insert(0x10, 8, register()).unwrap();
        for (base, len) in [(0x10, 8), (0x17, 1), (0, 0x11), (0, u64::MAX), (0x12, 2)] {
            assert_eq!(bus.insert(base, len, register()), Err(BusError::Overlap { base, len, other: 0x10 }));
        }
        for (base, len) in [(0x20, 0), (u64::MAX, 2)] {
            assert_eq!(bus.insert(base, len, register()), Err(BusError::Range { base, len }));
        }
        bus.insert(u64::MAX, 1, register()).unwrap();
    }
}
