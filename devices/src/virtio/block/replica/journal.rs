//! Where a standby keeps the logs of epochs before they are in its images: a file of checksummed records.
//!
//! A record that is whole is an epoch that may have been acknowledged. The records of one pass through the file have the
//! same salt, so that what is left of the pass before is never taken for one of them. A pass begins anew only when the
//! images hold all of the one before, durably, and that one cannot be found any more: a part of it would lead back. So
//! wherever a loss of power cuts the file, what it holds leads from the images to an epoch that is whole, and no older than
//! the last one acknowledged.

use std::io;

use xxhash_rust::xxh3::Xxh3;

use super::store::Store;

const MAGIC: [u8; 8] = *b"UNDYJRNL";
/// magic 8, salt 8, epoch 8, length 8, checksum 8
const HEADER: usize = 40;
/// Longest log that is accepted: what the mirror sends at most, and some room.
const MAX_LOG: u64 = 300 << 20;

/// The journal of a standby.
pub(super) struct Journal {
    store: Box<dyn Store>,
    salt: u64,
    /// Where the next record goes.
    at: u64,
    /// A record could not be made durable: nobody knows whether it is there.
    broken: bool,
}

impl Journal {
    /// Opens the journal in `store`; calls `apply` with the epoch and log of each whole record, in order.
    pub(super) fn open(
        store: Box<dyn Store>,
        mut apply: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<Self> {
        let mut this = Self { store, salt: 0, at: 0, broken: false };
        let mut newest = 0;
        while let Some((salt, epoch, log)) = this.record()? {
            if (this.at > 0 && salt != this.salt) || epoch <= newest {
                break;
            }
            apply(epoch, &log)?;
            (this.salt, newest) = (salt, epoch);
            this.at += (HEADER + log.len()) as u64;
        }
        Ok(this)
    }

    /// The record that begins here, if it is whole.
    fn record(&self) -> io::Result<Option<(u64, u64, Vec<u8>)>> {
        let mut header = [0; HEADER];
        self.store.read(self.at, &mut header)?;
        let word = |index: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&header[index * 8..][..8]);
            u64::from_le_bytes(word)
        };
        let (salt, epoch, len) = (word(1), word(2), word(3));
        if header[..8] != MAGIC || len > MAX_LOG {
            return Ok(None);
        }
        let mut log = vec![0; len as usize];
        self.store.read(self.at + HEADER as u64, &mut log)?;
        Ok((word(4) == checksum(salt, epoch, &log)).then_some((salt, epoch, log)))
    }

    /// Where the next record goes: how much there is in this pass.
    pub(super) fn len(&self) -> u64 {
        self.at
    }

    /// Appends `log` and makes it durable.
    pub(super) fn append(&mut self, epoch: u64, log: &[u8]) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::other("an earlier log could not be made durable"));
        }
        let mut record = Vec::with_capacity(HEADER + log.len());
        record.extend_from_slice(&MAGIC);
        for word in [self.salt, epoch, log.len() as u64, checksum(self.salt, epoch, log)] {
            record.extend_from_slice(&word.to_le_bytes());
        }
        record.extend_from_slice(log);
        self.broken = true;
        self.store.write(self.at, &record)?;
        self.store.sync()?;
        self.broken = false;
        self.at += record.len() as u64;
        Ok(())
    }

    /// The images hold everything, durably: a new pass. Nothing is found in the file from now on.
    pub(super) fn clear(&mut self) -> io::Result<()> {
        (self.salt, self.at) = (uuid::Uuid::new_v4().as_u64_pair().0, 0);
        self.broken = true;
        self.store.write(0, &[0; HEADER])?;
        self.store.sync()?;
        self.broken = false;
        Ok(())
    }
}

fn checksum(salt: u64, epoch: u64, log: &[u8]) -> u64 {
    let mut hash = Xxh3::with_seed(salt);
    hash.update(&epoch.to_le_bytes());
    hash.update(&(log.len() as u64).to_le_bytes());
    hash.update(log);
    hash.digest()
}
