//! The frame header: 64 bytes, little-endian.

use thiserror::Error;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::ids::{Epoch, Guid, Term};

/// First bytes of every frame: "UNDY".
pub const MAGIC: u32 = u32::from_le_bytes(*b"UNDY");

/// Version of the protocol that this code speaks.
pub const VERSION: u16 = 3;

/// Length of a header in bytes.
pub const HEADER_LEN: usize = size_of::<RawHeader>();

/// Longest payload of any frame in bytes: a full batch of pages with its table, and some room.
pub const MAX_PAYLOAD: usize = (1 << 20) + (16 << 10);

/// What a payload holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// A postcard-encoded [`Message`](super::message::Message).
    Message = 1,
    /// A [`PageBatch`](super::pages::PageBatch).
    Pages = 2,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    version: U16,
    kind: U16,
    guid: [u8; 16],
    term: U64,
    epoch: U64,
    sequence: U64,
    length: U32,
    reserved: U32,
    checksum: U64,
}

/// What stands before every payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the payload holds.
    pub kind: Kind,
    /// The allocation that the frame is about.
    pub guid: Guid,
    /// The sender's term.
    pub term: Term,
    /// The epoch that the frame belongs to; [`Epoch::NONE`] while seeding.
    pub epoch: Epoch,
    /// Counts the frames of this direction of this link from 0.
    pub sequence: u64,
    /// Length of the payload in bytes.
    pub length: u32,
    /// XXH3 of the header (with this field zero) and the payload.
    pub checksum: u64,
}

/// Why bytes are not a frame.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    /// Not our protocol.
    #[error(
        "the peer does not speak the mirror protocol (its first bytes are {0:#010x}); check the address and port"
    )]
    Magic(u32),
    /// Our protocol in another version.
    #[error(
        "the peer speaks version {theirs} of the mirror protocol, this side version {VERSION}; run the same release on both sides"
    )]
    Version {
        /// The peer's version.
        theirs: u16,
    },
    /// A kind that this version does not have.
    #[error("the peer sent a frame of unknown kind {0}")]
    Kind(u16),
    /// Longer than allowed.
    #[error("the peer announced a payload of {0} bytes, more than the {MAX_PAYLOAD} allowed")]
    Length(u32),
    /// Damaged on the way.
    #[error("frame {sequence} is damaged: its checksum does not match")]
    Checksum {
        /// Its number.
        sequence: u64,
    },
    /// A frame is missing or came twice.
    #[error("expected frame {expected} of the link, got frame {got}")]
    Sequence {
        /// The number that was due.
        expected: u64,
        /// The number that came.
        got: u64,
    },
    /// The payload is not what its kind says.
    #[error("frame {sequence} cannot be decoded: {reason}")]
    Payload {
        /// Its number.
        sequence: u64,
        /// What is wrong with it.
        reason: String,
    },
}

impl Header {
    /// The header of `payload`, which may lie in several pieces.
    pub fn seal<'a>(
        kind: Kind,
        (guid, term, epoch): (Guid, Term, Epoch),
        sequence: u64,
        payload: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Self {
        let length = payload.clone().map(<[u8]>::len).sum::<usize>() as u32;
        let mut header = Self { kind, guid, term, epoch, sequence, length, checksum: 0 };
        header.checksum = header.checksum_over(payload);
        header
    }

    /// Reads a header; nothing of the payload is looked at.
    ///
    /// # Errors
    /// [`FrameError`] if magic, version, kind or length are not acceptable.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, FrameError> {
        let raw = RawHeader::ref_from_bytes(bytes).map_err(|_| FrameError::Magic(0))?;
        if raw.magic.get() != MAGIC {
            return Err(FrameError::Magic(raw.magic.get()));
        }
        if raw.version.get() != VERSION {
            return Err(FrameError::Version { theirs: raw.version.get() });
        }
        let kind = match raw.kind.get() {
            1 => Kind::Message,
            2 => Kind::Pages,
            other => return Err(FrameError::Kind(other)),
        };
        if raw.length.get() as usize > MAX_PAYLOAD {
            return Err(FrameError::Length(raw.length.get()));
        }
        Ok(Self {
            kind,
            guid: Guid::from_bytes(raw.guid),
            term: Term(raw.term.get()),
            epoch: Epoch(raw.epoch.get()),
            sequence: raw.sequence.get(),
            length: raw.length.get(),
            checksum: raw.checksum.get(),
        })
    }

    /// The header as it goes on the wire.
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes.copy_from_slice(self.raw(self.checksum).as_bytes());
        bytes
    }

    /// Checks that this is frame `expected` of the link and that it arrived undamaged.
    ///
    /// # Errors
    /// [`FrameError::Checksum`] or [`FrameError::Sequence`].
    pub fn verify(&self, expected: u64, payload: &[u8]) -> Result<(), FrameError> {
        if self.checksum_over(std::iter::once(payload)) != self.checksum {
            return Err(FrameError::Checksum { sequence: self.sequence });
        }
        if self.sequence != expected {
            return Err(FrameError::Sequence { expected, got: self.sequence });
        }
        Ok(())
    }

    fn checksum_over<'a>(&self, payload: impl Iterator<Item = &'a [u8]>) -> u64 {
        let mut hash = Xxh3::with_seed(xxh3_64(self.raw(0).as_bytes()));
        payload.for_each(|piece| hash.update(piece));
        hash.digest()
    }

    fn raw(&self, checksum: u64) -> RawHeader {
        RawHeader {
            magic: MAGIC.into(),
            version: VERSION.into(),
            kind: (self.kind as u16).into(),
            guid: self.guid.into_bytes(),
            term: self.term.0.into(),
            epoch: self.epoch.0.into(),
            sequence: self.sequence.into(),
            length: self.length.into(),
            reserved: 0.into(),
            checksum: checksum.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(payload: &[u8]) -> Header {
        let id = (Guid::from_u128(7), Term(3), Epoch(9));
        Header::seal(Kind::Message, id, 5, [payload].into_iter())
    }

    #[test]
    fn header_survives_the_wire() {
        let sealed = header(b"hello");
        assert_eq!(Header::parse(&sealed.to_bytes()), Ok(sealed));
        assert_eq!(sealed.verify(5, b"hello"), Ok(()));
    }

    #[test]
    fn missing_and_repeated_frames_are_noticed() {
        assert_eq!(header(b"x").verify(4, b"x"), Err(FrameError::Sequence { expected: 4, got: 5 }));
    }

    #[test]
    fn other_version_is_named() {
        let mut bytes = header(b"").to_bytes();
        bytes[4] = VERSION as u8 + 1;
        assert_eq!(Header::parse(&bytes), Err(FrameError::Version { theirs: VERSION + 1 }));
    }

    #[test]
    fn oversized_payload_is_refused_before_it_is_read() {
        let mut bytes = header(b"").to_bytes();
        bytes[48..52].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Header::parse(&bytes), Err(FrameError::Length(u32::MAX)));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_noticed(bit in 0_usize..(HEADER_LEN + 16) * 8, payload: [u8; 16]) {
            let mut frame = [&header(&payload).to_bytes()[..], &payload].concat();
            frame[bit / 8] ^= 1 << (bit % 8);
            let (head, body) = frame.split_at(HEADER_LEN);
            let outcome = Header::parse(head.try_into().unwrap()).and_then(|h| h.verify(5, body).map(|()| h));
            // The reserved field is not looked at, so that a later version may use it.
            prop_assert!(outcome.is_err() || (52..56).contains(&(bit / 8)));
        }
    }
}
