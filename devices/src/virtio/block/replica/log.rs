//! What was written to a disk, as bytes: in the log of an epoch, on the wire and in the journal.
//!
//! A log is a row of sections. A section is of one disk: its name, the group that the image is of (see
//! [`note`](super::note)), and what was written, in the order in which it was completed. Numbers are little-endian.

use thiserror::Error;

use super::group::Group;

/// The image of the standby becomes one of this group: what it holds is a part from now on.
pub(super) const BEGIN: u8 = 1;
/// With this section the image of the standby is that of the primary at the end of the epoch.
pub(super) const COMPLETE: u8 = 2;
/// With this section the image goes over to another group, whose name it has in the place of entries.
const GO_OVER: u8 = 4;

/// Bytes of an entry before its data.
pub(super) const ENTRY: usize = 17;

const WRITE: u8 = 1;
const ZERO: u8 = 2;

/// Bytes that are no log.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("the write log is malformed: {0}")]
pub struct LogError(&'static str);

/// Something that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry<'a> {
    /// These bytes at a position.
    Write {
        /// The position.
        at: u64,
        /// The bytes.
        bytes: &'a [u8],
    },
    /// Zeros.
    Zero {
        /// From here.
        at: u64,
        /// How many.
        len: u64,
    },
}

impl Entry<'_> {
    /// Appends it to `log`.
    pub(super) fn append_to(&self, log: &mut Vec<u8>) {
        let (kind, at, len, bytes) = match *self {
            Self::Write { at, bytes } => (WRITE, at, bytes.len() as u64, bytes),
            Self::Zero { at, len } => (ZERO, at, len, &[][..]),
        };
        log.push(kind);
        log.extend_from_slice(&at.to_le_bytes());
        log.extend_from_slice(&len.to_le_bytes());
        log.extend_from_slice(bytes);
    }
}

/// A disk's part of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Section<'a> {
    /// The disk.
    pub(super) name: &'a str,
    /// The group that its image is of.
    pub(super) group: Group,
    /// What it means beyond its entries.
    pub(super) flags: u8,
    entries: &'a [u8],
}

impl<'a> Section<'a> {
    /// A section of `entries`, which were [appended](Entry::append_to).
    pub(super) fn new(name: &'a str, group: Group, flags: u8, entries: &'a [u8]) -> Self {
        Self { name, group, flags, entries }
    }

    /// The section with which the image goes over to the group `to`.
    pub(super) fn going_over(name: &'a str, group: Group, to: &'a Group) -> Self {
        Self { name, group, flags: GO_OVER, entries: &to.0 }
    }

    /// To which group the image goes over, if it does.
    pub(super) fn goes_over(&self) -> Option<Group> {
        if self.flags & GO_OVER == 0 { None } else { self.entries.try_into().ok().map(Group) }
    }

    /// Appends it to `log`.
    pub(super) fn append_to(&self, log: &mut Vec<u8>) {
        log.push(self.name.len().min(u8::MAX.into()) as u8);
        log.extend_from_slice(&self.name.as_bytes()[..self.name.len().min(u8::MAX.into())]);
        log.extend_from_slice(&self.group.0);
        log.push(self.flags);
        log.extend_from_slice(&(self.entries.len() as u64).to_le_bytes());
        log.extend_from_slice(self.entries);
    }

    /// Its entries, all of which lie in a disk of `disk` bytes.
    ///
    /// # Errors
    /// [`LogError`] in the place of the first that is none.
    pub(super) fn entries(&self, disk: u64) -> impl Iterator<Item = Result<Entry<'a>, LogError>> + use<'a> {
        let mut reader = Reader(if self.flags & GO_OVER == 0 { self.entries } else { &[] });
        std::iter::from_fn(move || {
            if reader.0.is_empty() {
                return None;
            }
            let entry = reader.entry(disk);
            if entry.is_err() {
                reader.0 = &[];
            }
            Some(entry)
        })
    }
}

/// The sections of `log`.
///
/// # Errors
/// [`LogError`]
pub(super) fn sections(log: &[u8]) -> Result<Vec<Section<'_>>, LogError> {
    let mut reader = Reader(log);
    let mut sections = Vec::new();
    while !reader.0.is_empty() {
        let [name_len] = reader.array()?;
        let name = std::str::from_utf8(reader.take(name_len.into())?);
        let name = name.map_err(|_| LogError("a name is no text"))?;
        let group = Group(reader.array()?);
        let [flags] = reader.array()?;
        let len = u64::from_le_bytes(reader.array()?);
        let len = usize::try_from(len).map_err(|_| LogError("a section is too long"))?;
        if flags & GO_OVER != 0 && len != size_of::<Group>() {
            return Err(LogError("a group has no such name"));
        }
        sections.push(Section { name, group, flags, entries: reader.take(len)? });
    }
    Ok(sections)
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], LogError> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(LogError("it ends in the middle"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], LogError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn entry(&mut self, disk: u64) -> Result<Entry<'a>, LogError> {
        let [kind] = self.array()?;
        let (at, len) = (u64::from_le_bytes(self.array()?), u64::from_le_bytes(self.array()?));
        if at.checked_add(len).is_none_or(|end| end > disk) {
            return Err(LogError("something lies beyond the end of the disk"));
        }
        match kind {
            WRITE => {
                let len = usize::try_from(len).map_err(|_| LogError("a write is too long"))?;
                Ok(Entry::Write { at, bytes: self.take(len)? })
            }
            ZERO => Ok(Entry::Zero { at, len }),
            _ => Err(LogError("an entry is of an unknown kind")),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn log_is_read_as_it_was_written() {
        let entries = [
            Entry::Write { at: 512, bytes: b"hello" },
            Entry::Zero { at: 0, len: 1024 },
            Entry::Write { at: 7, bytes: b"" },
        ];
        let mut bytes = Vec::new();
        for entry in &entries {
            entry.append_to(&mut bytes);
        }
        assert_eq!(bytes.len(), 3 * ENTRY + 5);
        let mut log = Vec::new();
        Section::new("root", Group([7; 16]), BEGIN, &[]).append_to(&mut log);
        Section::new("data", Group([9; 16]), 0, &bytes).append_to(&mut log);
        Section::going_over("data", Group([9; 16]), &Group([5; 16])).append_to(&mut log);
        let read = sections(&log).unwrap();
        assert_eq!((read[2].goes_over(), read[2].entries(0).count()), (Some(Group([5; 16])), 0));
        assert_eq!(read[1].goes_over(), None);
        assert_eq!((read[0].name, read[0].group, read[0].flags), ("root", Group([7; 16]), BEGIN));
        assert_eq!(read[1].entries(1024).collect::<Result<Vec<_>, _>>().unwrap(), entries);
        let beyond: Vec<_> = read[1].entries(1023).collect();
        assert_eq!((beyond.len(), beyond[1].is_err()), (2, true));
    }

    proptest! {
        #[test]
        fn hostile_log_is_an_error_and_no_crash(bytes in prop::collection::vec(any::<u8>(), 0..200), disk: u64) {
            for section in sections(&bytes).unwrap_or_default() {
                section.entries(disk).for_each(drop);
            }
        }
    }
}
