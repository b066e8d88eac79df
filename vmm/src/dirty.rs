//! Which pages the guest has written: KVM's dirty log by one of two protocols, and the bitmap of the VMM's own writes.

mod log;

use kvm_bindings::{KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_enable_cap};
use kvm_ioctls::VmFd;
use mirror::dirty::DirtySet;
use mirror::memory::{GuestRam, PAGE_SIZE};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::{Slot, Slots};

/// How KVM tells of dirty pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TrackerKind {
    /// GET reads and CLEAR protects again (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).
    Manual,
    /// GET does both.
    Legacy,
}

/// What KVM answered to a request about its dirty log.
#[derive(Debug, Error)]
#[error("{request} of slot {slot}: {cause}")]
pub struct DirtyError {
    request: &'static str,
    slot: u32,
    cause: kvm_ioctls::Error,
}

/// Takes the pages written out of KVM's log.
pub(crate) trait Tracker: Send {
    /// Moves the pages written since the last harvest to `into`, without allocating.
    fn harvest(&mut self, vm: &VmFd, slots: &Slots, into: &mut DirtySet) -> Result<(), DirtyError>;

    /// How many pages a harvest would find; `None` if it cannot be known without harvesting.
    fn peek(&mut self, vm: &VmFd, slots: &Slots) -> Result<Option<u64>, DirtyError>;
}

/// A tracker of `kind` for `vm`. The manual protocol is switched on for the whole VM.
///
/// # Errors
/// What KVM answers to KVM_ENABLE_CAP.
pub(crate) fn tracker(
    kind: TrackerKind,
    vm: &VmFd,
    slots: &Slots,
) -> Result<Box<dyn Tracker>, kvm_ioctls::Error> {
    let bitmaps = Bitmaps::new(slots);
    Ok(match kind {
        TrackerKind::Legacy => Box::new(Legacy(bitmaps)),
        TrackerKind::Manual => {
            // Not INITIALLY_SET: it makes enabling cheap (0.06 instead of 14 ms a GiB) but reports every page as
            // dirty once, and seeding knows better what is populated.
            let mut cap = kvm_enable_cap {
                cap: kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                ..kvm_enable_cap::default()
            };
            cap.args[0] = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
            vm.enable_cap(&cap)?;
            Box::new(Manual(bitmaps))
        }
    })
}

/// One bitmap a slot, for KVM to write to.
struct Bitmaps(Vec<Vec<u64>>);

impl Bitmaps {
    fn new(slots: &Slots) -> Self {
        Self(slots.iter().map(|slot| vec![0; slot.pages.div_ceil(64) as usize]).collect())
    }

    /// KVM's log of each slot.
    fn get<'a>(
        &'a mut self,
        vm: &'a VmFd,
        slots: &'a Slots,
    ) -> impl Iterator<Item = Result<(&'a Slot, &'a [u64]), DirtyError>> {
        slots.iter().zip(&mut self.0).map(move |(slot, bitmap)| {
            log::get(vm, slot.id, bitmap).map_err(|cause| DirtyError {
                request: "KVM_GET_DIRTY_LOG",
                slot: slot.id,
                cause,
            })?;
            Ok((slot, &bitmap[..]))
        })
    }
}

struct Legacy(Bitmaps);

impl Tracker for Legacy {
    fn harvest(&mut self, vm: &VmFd, slots: &Slots, into: &mut DirtySet) -> Result<(), DirtyError> {
        for log in self.0.get(vm, slots) {
            let (slot, bitmap) = log?;
            into.insert_words(slot.first_page, bitmap);
        }
        Ok(())
    }

    fn peek(&mut self, _vm: &VmFd, _slots: &Slots) -> Result<Option<u64>, DirtyError> {
        Ok(None)
    }
}

struct Manual(Bitmaps);

impl Tracker for Manual {
    fn harvest(&mut self, vm: &VmFd, slots: &Slots, into: &mut DirtySet) -> Result<(), DirtyError> {
        for log in self.0.get(vm, slots) {
            let (slot, bitmap) = log?;
            let Some(first) = bitmap.iter().position(|&word| word != 0) else { continue };
            let last = bitmap.iter().rposition(|&word| word != 0).unwrap_or(first);
            let words = &bitmap[first..=last];
            // Cleared first: a page that cannot be cleared stays in KVM's log, and none is in neither.
            log::clear(vm, slot.id, first as u64 * 64, words).map_err(|cause| DirtyError {
                request: "KVM_CLEAR_DIRTY_LOG",
                slot: slot.id,
                cause,
            })?;
            into.insert_words(slot.first_page + first as u64 * 64, words);
        }
        Ok(())
    }

    fn peek(&mut self, vm: &VmFd, slots: &Slots) -> Result<Option<u64>, DirtyError> {
        let mut count = 0;
        for log in self.0.get(vm, slots) {
            let (_, bitmap) = log?;
            count += bitmap.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
        }
        Ok(Some(count))
    }
}

/// Moves the pages that the VMM itself has written to `into`.
///
/// vm-memory gives the words of its bitmap only as a new vector (one bit a page: 4 KiB for 128 MiB of guest memory);
/// asking for each bit would take ten times as long.
pub(crate) fn harvest_own_writes(ram: &GuestRam, into: &mut DirtySet) {
    let mut first_page = 0;
    for region in ram.iter() {
        into.insert_words(first_page, &region.get_mmap().bitmap().get_and_reset());
        first_page += region.len() / PAGE_SIZE as u64;
    }
}
