//! A request to a block device, as the guest writes it (virtio 1.2, 5.2.6).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::virtio::chain::Chain;
use crate::virtio::device::DeviceError;

/// Bytes in a sector.
pub(super) const SECTOR: u64 = 512;
/// Most sectors that one discard or one write of zeroes may cover: 1 GiB.
pub(super) const MAX_SPAN: u32 = 1 << 21;
/// Bytes of a disk's name.
pub(super) const ID_LEN: usize = 20;

/// Bytes of a request before its data.
pub(super) const HEADER: u32 = 16;
/// Bytes of what a discard covers: sector, count, flags.
const SPAN: u32 = 16;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = VIRTIO_BLK_S_OK as u8,
    IoError = VIRTIO_BLK_S_IOERR as u8,
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// What the image is to do. Positions and lengths are in bytes and lie within the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read {
        at: u64,
        len: u32,
    },
    Write {
        at: u64,
        len: u32,
    },
    Flush,
    /// What was there may become anything.
    Discard {
        at: u64,
        len: u64,
    },
    /// What was there becomes zeros; `unmap`: it need not be stored.
    Zero {
        at: u64,
        len: u64,
        unmap: bool,
    },
}

impl Operation {
    /// Whether the image is another afterwards: such a request waits for its epoch.
    pub(super) fn changes_the_image(self) -> bool {
        matches!(self, Self::Write { .. } | Self::Discard { .. } | Self::Zero { .. })
    }
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// The image has to do with it.
    Image(Operation),
    /// The disk's name is wanted.
    Id,
    /// It is answered at once.
    Refused(Status),
}

/// What of a disk a request is checked against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Length of the disk in sectors.
    pub(super) sectors: u64,
    pub(super) read_only: bool,
    /// Longest write in bytes.
    pub(super) longest_write: u32,
}

impl Request {
    /// Reads the request in `chain`.
    ///
    /// # Errors
    /// [`DeviceError`] for one that has no room for its answer.
    pub(super) fn parse(chain: &Chain, limits: Limits) -> Result<Self, DeviceError> {
        let mut header = [0; HEADER as usize];
        if chain.read(0, &mut header) < header.len() || chain.writable_len() == 0 {
            return Err(DeviceError::Request("a disk request without header or status byte"));
        }
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let mut sector = [0; 8];
        sector.copy_from_slice(&header[8..]);
        let sector = u64::from_le_bytes(sector);
        let (input, output) = (chain.writable_len() - 1, chain.readable_len() - HEADER);
        Ok(match kind {
            VIRTIO_BLK_T_IN => limits.bytes(sector, input, |at, len| Operation::Read { at, len }),
            VIRTIO_BLK_T_OUT if limits.read_only || output > limits.longest_write => {
                Self::Refused(Status::IoError)
            }
            VIRTIO_BLK_T_OUT => limits.bytes(sector, output, |at, len| Operation::Write { at, len }),
            VIRTIO_BLK_T_FLUSH => Self::Image(Operation::Flush),
            VIRTIO_BLK_T_GET_ID if input as usize >= ID_LEN => Self::Id,
            VIRTIO_BLK_T_GET_ID => Self::Refused(Status::IoError),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if limits.read_only => {
                Self::Refused(Status::IoError)
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => limits.span(chain, kind),
            _ => Self::Refused(Status::Unsupported),
        })
    }
}

impl Limits {
    fn bytes(self, sector: u64, len: u32, operation: impl Fn(u64, u32) -> Operation) -> Request {
        let whole = u64::from(len).is_multiple_of(SECTOR);
        if whole && self.hold(sector, u64::from(len) / SECTOR) {
            Request::Image(operation(sector * SECTOR, len))
        } else {
            Request::Refused(Status::IoError)
        }
    }

    /// What a discard or a write of zeroes covers. The device says that it takes one span at a time.
    fn span(self, chain: &Chain, kind: u32) -> Request {
        let mut span = [0; SPAN as usize];
        if chain.readable_len() != HEADER + SPAN || chain.read(HEADER, &mut span) < span.len() {
            return Request::Refused(Status::Unsupported);
        }
        let word = |at: usize| u32::from_le_bytes([span[at], span[at + 1], span[at + 2], span[at + 3]]);
        let sector = u64::from(word(0)) | u64::from(word(4)) << 32;
        let (sectors, flags) = (word(8), word(12));
        let discard = kind == VIRTIO_BLK_T_DISCARD;
        let known = if discard { 0 } else { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
        if flags & !known != 0 {
            return Request::Refused(Status::Unsupported);
        }
        if sectors > MAX_SPAN || !self.hold(sector, u64::from(sectors)) {
            return Request::Refused(Status::IoError);
        }
        let (at, len) = (sector * SECTOR, u64::from(sectors) * SECTOR);
        Request::Image(match (discard, len) {
            // Nothing to do, which the kernel would not take as a length.
            (_, 0) => return Request::Refused(Status::Ok),
            (true, _) => Operation::Discard { at, len },
            (false, _) => Operation::Zero { at, len, unmap: flags != 0 },
        })
    }

    fn hold(self, sector: u64, sectors: u64) -> bool {
        sector.checked_add(sectors).is_some_and(|end| end <= self.sectors)
    }
}
