//! A file as a replica uses it. Behind a trait, so that a loss of power can be tried at every moment.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, fdatasync, flock};

/// Zeros at a time, where a file system cannot make them itself.
const ZEROS: usize = 1 << 20;

/// A file of bytes. What was written is there after a loss of power once [`sync`](Self::sync) has returned; what was
/// written after it may be there in part: any of its sectors of 512 bytes, but each of them whole or not at all.
pub(super) trait Store: Send + Sync {
    /// Reads all of `into` from `at`; beyond the end there are zeros.
    ///
    /// # Errors
    /// What the system answers.
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()>;

    /// Writes all of `bytes` at `at`.
    ///
    /// # Errors
    /// What the system answers; a part may be written.
    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes `len` bytes from `at` zeros; `unmap`: they need not be stored. The file does not grow.
    ///
    /// # Errors
    /// What the system answers; a part may be zeros.
    fn zero(&self, at: u64, len: u64, unmap: bool) -> io::Result<()>;

    /// Makes what was written durable.
    ///
    /// # Errors
    /// What the system answers: nothing is known of what was written then.
    fn sync(&self) -> io::Result<()>;
}

impl Store for File {
    fn read(&self, mut at: u64, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            match self.read_at(into, at) {
                Ok(0) => {
                    into.fill(0);
                    return Ok(());
                }
                Ok(count) => {
                    at += count as u64;
                    into = &mut into[count..];
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, at)
    }

    fn zero(&self, at: u64, len: u64, unmap: bool) -> io::Result<()> {
        let how = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match fallocate(self, how | FallocateFlags::KEEP_SIZE, at, len) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP) => {
                let zeros = vec![0; ZEROS.min(len as usize)];
                let mut done = 0;
                while done < len {
                    let piece = (len - done).min(ZEROS as u64);
                    self.write_all_at(&zeros[..piece as usize], at + done)?;
                    done += piece;
                }
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        Ok(fdatasync(self)?)
    }
}

/// Opens, or creates, a file beside an image, for this process alone.
///
/// # Errors
/// What the system answers; [`io::ErrorKind::WouldBlock`]: another has it.
pub(super) fn open_alone(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    // A file that was only now created must be found again, too.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()?;
    Ok(file)
}
