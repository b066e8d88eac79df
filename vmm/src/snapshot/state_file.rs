//! The state file of a snapshot: everything but memory.

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::{FileError, Identity, Preamble};

const MAGIC: [u8; 8] = *b"USTYSTAT";
const WHAT: &str = "state";

#[derive(Serialize, Deserialize)]
struct Header {
    identity: Identity,
    description_len: u64,
    state_len: u64,
    checksum: u64,
}

/// What a state file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateFile {
    /// The snapshot.
    pub identity: Identity,
    /// What the machine is made of, encoded.
    pub description: Vec<u8>,
    /// The machine's state, encoded.
    pub state: Vec<u8>,
}

impl StateFile {
    /// The bytes of the file.
    ///
    /// # Errors
    /// A header that cannot be encoded, which none is.
    pub fn encode(&self) -> io::Result<Vec<u8>> {
        let body = [&self.description[..], &self.state].concat();
        let header = Header {
            identity: self.identity.clone(),
            description_len: self.description.len() as u64,
            state_len: self.state.len() as u64,
            checksum: xxh3_64(&body),
        };
        let mut bytes = Preamble::encode(MAGIC, &header).map_err(io::Error::other)?;
        bytes.extend(body);
        Ok(bytes)
    }

    /// Reads the file at `path`.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn read(path: &Path) -> Result<Self, FileError> {
        let bytes = fs::read(path).map_err(|cause| FileError::Read { path: path.into(), cause })?;
        Self::decode(&bytes, path)
    }

    /// Reads `bytes`; errors name `path` as the place they are from.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn decode(bytes: &[u8], path: &Path) -> Result<Self, FileError> {
        let (header, start): (Header, usize) = Preamble::decode(bytes, MAGIC, WHAT, path)?;
        let body = &bytes[start..];
        let wanted = header.description_len.saturating_add(header.state_len);
        if body.len() as u64 != wanted {
            let (len, wanted) = (bytes.len() as u64, wanted.saturating_add(start as u64));
            return Err(FileError::Truncated { path: path.into(), len, wanted });
        }
        if xxh3_64(body) != header.checksum {
            return Err(FileError::Damaged { path: path.into(), part: "content".into() });
        }
        let (description, state) = body.split_at(header.description_len as usize);
        Ok(Self { identity: header.identity, description: description.into(), state: state.into() })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::SnapshotId;
    use super::*;

    fn file() -> StateFile {
        let identity = Identity { id: SnapshotId([1; 16]), base: Some(SnapshotId([2; 16])) };
        StateFile { identity, description: b"a machine".to_vec(), state: vec![7; 1000] }
    }

    #[test]
    fn file_comes_back_as_it_was() {
        let bytes = file().encode().unwrap();
        assert_eq!(StateFile::decode(&bytes, Path::new("x")).unwrap(), file());
    }

    proptest! {
        #[test]
        fn any_flipped_bit_and_any_other_length_is_refused(at in 0_usize..10_000, bit in 0..8, cut in 0_usize..1100) {
            let good = file().encode().unwrap();
            let mut bad = good.clone();
            let at = at % bad.len();
            bad[at] ^= 1_u8 << bit;
            prop_assert!(StateFile::decode(&bad, Path::new("x")).is_err());
            let shorter = &good[..cut.min(good.len() - 1)];
            prop_assert!(StateFile::decode(shorter, Path::new("x")).is_err());
            let longer = [&good[..], &[0]].concat();
            prop_assert!(StateFile::decode(&longer, Path::new("x")).is_err());
        }

        #[test]
        fn rubbish_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(StateFile::decode(&bytes, Path::new("x")).is_err());
        }
    }
}
