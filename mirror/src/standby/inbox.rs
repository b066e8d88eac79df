//! Where the standby gathers an epoch until it is whole. Nothing of it is visible before.

use crate::digest::Digest;
use crate::wire::message::{Commit, MAX_LOG, MAX_OUTPUT, MAX_STATE};
use crate::wire::pages::PageBatch;

/// The parts of an epoch that have arrived.
#[derive(Debug, Default)]
pub struct Inbox {
    batches: Vec<PageBatch>,
    pages: u64,
    state: Vec<u8>,
    log: Vec<u8>,
    output: Option<(u64, Vec<u8>)>,
    digest: Digest,
}

/// Appends a piece to a write log.
///
/// # Errors
/// The log grows beyond [`MAX_LOG`].
pub(super) fn add_to_log(log: &mut Vec<u8>, bytes: &[u8]) -> Result<(), String> {
    if log.len() + bytes.len() > MAX_LOG {
        return Err(format!("a write log of more than {MAX_LOG} bytes"));
    }
    log.extend_from_slice(bytes);
    Ok(())
}

/// A whole epoch.
#[derive(Debug)]
pub struct WholeEpoch {
    /// Its pages, in the order they were sent.
    pub batches: Vec<PageBatch>,
    /// The machine state at its end.
    pub state: Vec<u8>,
    /// What was written to disks of which each side has an image of its own.
    pub log: Vec<u8>,
}

impl Inbox {
    /// Takes a batch of pages.
    ///
    /// # Errors
    /// More than `most` pages, which is what the guest has: no honest epoch is that large.
    pub fn add_pages(&mut self, batch: PageBatch, checksum: u64, most: u64) -> Result<(), String> {
        self.pages += batch.len() as u64;
        if self.pages > most {
            return Err(format!("more pages in one epoch than the guest has ({most})"));
        }
        self.digest.add(checksum);
        self.batches.push(batch);
        Ok(())
    }

    /// Takes a piece of the machine state.
    ///
    /// # Errors
    /// The state grows beyond [`MAX_STATE`].
    pub fn add_state(&mut self, bytes: &[u8], checksum: u64) -> Result<(), String> {
        if self.state.len() + bytes.len() > MAX_STATE {
            return Err(format!("machine state of more than {MAX_STATE} bytes"));
        }
        self.digest.add(checksum);
        self.state.extend_from_slice(bytes);
        Ok(())
    }

    /// Takes a piece of the write log.
    ///
    /// # Errors
    /// The log grows beyond [`MAX_LOG`].
    pub fn add_log(&mut self, bytes: &[u8], checksum: u64) -> Result<(), String> {
        add_to_log(&mut self.log, bytes)?;
        self.digest.add(checksum);
        Ok(())
    }

    /// Takes a piece of output.
    ///
    /// # Errors
    /// It does not follow the piece before, grows beyond [`MAX_OUTPUT`], or ends beyond the last position there is.
    pub fn add_output(&mut self, start: u64, bytes: &[u8], checksum: u64) -> Result<(), String> {
        let (first, output) = self.output.get_or_insert_with(|| (start, Vec::new()));
        if *first + output.len() as u64 != start {
            return Err(format!("output from position {start} does not follow the piece before"));
        }
        if output.len() + bytes.len() > MAX_OUTPUT {
            return Err(format!("more than {MAX_OUTPUT} bytes of output in one epoch"));
        }
        if start.checked_add(bytes.len() as u64).is_none() {
            return Err(format!("{} bytes of output cannot begin at position {start}", bytes.len()));
        }
        self.digest.add(checksum);
        output.extend_from_slice(bytes);
        Ok(())
    }

    /// Whether anything has arrived.
    pub fn is_empty(&self) -> bool {
        self.batches.is_empty() && self.state.is_empty() && self.log.is_empty() && self.output.is_none()
    }

    /// Checks the epoch against its commit and empties the inbox: with a whole epoch, or with the reason why it is
    /// none. `log` takes the epoch's output if all is well.
    ///
    /// # Errors
    /// What differs.
    pub fn close(&mut self, commit: &Commit, log: &mut OutputLog) -> Result<WholeEpoch, String> {
        let inbox = std::mem::take(self);
        if inbox.pages != commit.pages {
            return Err(format!("{} pages arrived, {} were sent", inbox.pages, commit.pages));
        }
        if inbox.digest.value() != commit.digest {
            return Err("its digest differs from the sender's".into());
        }
        if inbox.state.is_empty() {
            return Err("it has no machine state".into());
        }
        log.commit(inbox.output, commit)?;
        Ok(WholeEpoch { batches: inbox.batches, state: inbox.state, log: inbox.log })
    }
}

/// The committed output that is not known to have left the primary.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OutputLog {
    /// Position of the first byte kept; `None` before the first commit.
    start: Option<u64>,
    bytes: Vec<u8>,
}

impl OutputLog {
    /// Position of the first byte kept, and the bytes.
    pub fn unreleased(&self) -> (u64, &[u8]) {
        (self.start.unwrap_or(0), &self.bytes)
    }

    /// Forgets what has left the primary.
    pub fn released(&mut self, position: u64) {
        if let Some(start) = &mut self.start {
            let gone = position.saturating_sub(*start).min(self.bytes.len() as u64);
            self.bytes.drain(..gone as usize);
            *start += gone;
        }
    }

    /// Appends the output of an epoch, which must begin where the log ends and end where the commit says.
    fn commit(&mut self, output: Option<(u64, Vec<u8>)>, commit: &Commit) -> Result<(), String> {
        let (start, bytes) = output.unwrap_or((commit.output_end, Vec::new()));
        let end = self.start.map_or(start, |first| first + self.bytes.len() as u64);
        if start != end || start + bytes.len() as u64 != commit.output_end {
            return Err(format!(
                "its output runs from {start} to {}, it should run from {end} to {}",
                start + bytes.len() as u64,
                commit.output_end
            ));
        }
        if self.bytes.len() + bytes.len() > MAX_OUTPUT {
            return Err(format!(
                "more than {MAX_OUTPUT} bytes of committed output that the primary has not released"
            ));
        }
        self.start.get_or_insert(start);
        self.bytes.extend_from_slice(&bytes);
        self.released(commit.released);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commit(digest: Digest, output_end: u64, released: u64) -> Commit {
        Commit { pages: 0, digest: digest.value(), output_end, released }
    }

    fn inbox(output: &[u8], start: u64) -> Inbox {
        let mut inbox = Inbox::default();
        inbox.add_state(b"state", 1).unwrap();
        inbox.add_output(start, output, 2).unwrap();
        inbox
    }

    fn digest() -> Digest {
        let mut digest = Digest::default();
        digest.add(1);
        digest.add(2);
        digest
    }

    #[test]
    fn whole_epoch_is_accepted_and_its_output_kept_until_released() {
        let mut log = OutputLog::default();
        inbox(b"abcdef", 10).close(&commit(digest(), 16, 12), &mut log).unwrap();
        assert_eq!(log.unreleased(), (12, &b"cdef"[..]));
        log.released(15);
        assert_eq!(log.unreleased(), (15, &b"f"[..]));
        log.released(99);
        assert_eq!(log.unreleased(), (16, &b""[..]));
    }

    #[test]
    fn epoch_with_a_missing_part_is_torn() {
        let mut log = OutputLog::default();
        let wrong = Commit { pages: 1, ..commit(digest(), 13, 0) };
        assert!(inbox(b"abc", 10).close(&wrong, &mut log).is_err());
        assert!(inbox(b"abc", 10).close(&commit(Digest::default(), 13, 0), &mut log).is_err());
        assert_eq!(log, OutputLog::default());
    }

    #[test]
    fn output_with_a_gap_is_refused() {
        let mut log = OutputLog::default();
        inbox(b"abc", 10).close(&commit(digest(), 13, 10), &mut log).unwrap();
        assert!(inbox(b"abc", 14).close(&commit(digest(), 17, 10), &mut log).is_err());
        assert!(inbox(b"abc", 13).close(&commit(digest(), 15, 10), &mut log).is_err());
        inbox(b"abc", 13).close(&commit(digest(), 16, 10), &mut log).unwrap();
        assert_eq!(log.unreleased(), (10, &b"abcabc"[..]));
    }

    #[test]
    fn epoch_without_state_is_not_runnable() {
        let mut inbox = Inbox::default();
        assert!(inbox.close(&commit(Digest::default(), 0, 0), &mut OutputLog::default()).is_err());
    }
}
