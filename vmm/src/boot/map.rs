//! The memory map that a guest is told: what of its physical addresses is memory.

use mirror::memory::{Layout, PAGE_SIZE};

/// End of conventional memory; from here to 1 MiB a PC has no memory, but firmware and a screen.
pub(super) const LOW_END: u64 = EBDA;
/// The extended BIOS data area, in the last KiB below 640 KiB, which holds the MP table.
pub(super) const EBDA: u64 = 0x9_fc00;
/// Where firmware would be, and its tables are.
pub(super) const FIRMWARE: u64 = 0xe_0000;
/// Where memory goes on.
pub(super) const HIGH_START: u64 = 0x10_0000;

/// Types of an E820 entry, which are also those of PVH's memory map.
pub(super) const RAM: u32 = 1;
pub(super) const RESERVED: u32 = 2;

/// A piece of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) start: u64,
    pub(super) len: u64,
    pub(super) kind: u32,
}

/// The map of `layout`.
pub(super) fn map(layout: &Layout) -> Vec<Piece> {
    let mut map = vec![
        Piece { start: 0, len: LOW_END, kind: RAM },
        Piece { start: EBDA, len: 0xa_0000 - EBDA, kind: RESERVED },
        Piece { start: FIRMWARE, len: HIGH_START - FIRMWARE, kind: RESERVED },
    ];
    for region in layout.regions() {
        let start = region.start.max(HIGH_START);
        let end = region.start + region.pages * PAGE_SIZE as u64;
        if end > start {
            map.push(Piece { start, len: end - start, kind: RAM });
        }
    }
    map
}

/// End of the memory below the hole, where kernel and initrd go.
pub(super) fn low_memory_end(layout: &Layout) -> u64 {
    layout.regions().first().map_or(0, |region| region.start + region.pages * PAGE_SIZE as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{HOLE_END, HOLE_START, layout};

    #[test]
    fn map_has_the_holes_of_a_pc() {
        let map = map(&layout(4096).unwrap());
        let ram: Vec<_> = map.iter().filter(|p| p.kind == RAM).map(|p| (p.start, p.start + p.len)).collect();
        assert_eq!(
            ram,
            [(0, 0x9_fc00), (0x10_0000, HOLE_START), (HOLE_END, HOLE_END + (1 << 30))],
            "640 KiB to 1 MiB and 3 to 4 GiB are no memory"
        );
        assert!(map.windows(2).all(|pair| pair[0].start + pair[0].len <= pair[1].start));
    }
}
