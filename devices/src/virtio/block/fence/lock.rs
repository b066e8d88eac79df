//! A lock on an image that is only free when nobody who had it can write.
//!
//! It is a lock of the *open file description* (fcntl(2), F_OFD_SETLK) through which the image is written to. A description
//! ends with its last user: each thread inside of a write counts, and so does each request that io_uring has under way,
//! also of a process that was killed. So when the lock is free, no write of an earlier owner can come any more. It is not
//! lost when another descriptor of the same file is closed, as POSIX's record locks are. (The descriptions that the qcow2
//! library opens are not this one; but it writes within system calls of the process's own threads, and those end before any
//! of the process's descriptions is closed.)
//!
//! A network file system that carries locks makes it one between hosts. There the server frees what a dead host had, and takes
//! no more writes of it: with NFS version 4, at the end of its lease.

use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::holder::Holder;
use super::{FenceError, SharedImage};

/// The byte that is locked. It is far behind the end of any image, and nobody but this program has use for it.
pub(super) const PLACE: libc::off_t = 0x5544_5953_4855_4e44;

/// How long an old owner that can still be heard of may take to notice that it has lost its guest.
const GRACE: Duration = Duration::from_secs(1);
/// How long one attempt takes at most.
const PATIENCE: Duration = Duration::from_secs(5);
/// Time between two looks at the lock.
const GLANCE: Duration = Duration::from_millis(2);

/// A lock on an image.
pub(super) struct ImageLock {
    image: Arc<SharedImage>,
    /// Who had it when this side became a standby.
    holders: Mutex<Vec<Holder>>,
}

impl ImageLock {
    pub(super) fn new(image: Arc<SharedImage>) -> Self {
        Self { image, holders: Mutex::default() }
    }

    /// Takes it if it is free.
    pub(super) fn hold(&self) -> Result<(), FenceError> {
        if self.take()? {
            return Ok(());
        }
        let (drive, path, by) = self.held();
        Err(FenceError::Taken { drive, path, by })
    }

    pub(super) fn release(&self) {
        // What is not locked need not be unlocked.
        let _ = self.call(libc::F_OFD_SETLK, libc::F_UNLCK);
    }

    /// Notes who has it.
    ///
    /// # Errors
    /// Nobody has it, as far as can be seen here.
    pub(super) fn note_holders(&self) -> Result<(), FenceError> {
        let found = self.call(libc::F_OFD_GETLK, libc::F_WRLCK).map_err(|cause| self.no_locks(cause))?;
        if found == libc::F_UNLCK {
            let (path, _) = self.image.place();
            return Err(FenceError::NotLocked { drive: self.image.drive.clone(), path });
        }
        *self.holders() = Holder::find(&self.image.place().1);
        Ok(())
    }

    /// Takes it from whoever had it when [`note_holders`](Self::note_holders) was called: a process of this host that does
    /// not let go of it is killed. One of another host, and anybody else, is only waited for.
    pub(super) fn take_over(&self, tell: &mut dyn FnMut(String)) -> Result<(), FenceError> {
        let began = Instant::now();
        loop {
            if self.take()? {
                return Ok(());
            }
            let waited = began.elapsed();
            for holder in self.holders().iter_mut().filter(|holder| !holder.is_killed()) {
                if waited >= GRACE || holder.is_stopped() {
                    let (drive, name) = (&self.image.drive, holder.to_string());
                    tell(match holder.kill() {
                        Ok(()) => format!("{name} could still write to drive {drive}, and was killed"),
                        Err(cause) => {
                            format!("{name} can still write to drive {drive}, and cannot be killed: {cause}")
                        }
                    });
                }
            }
            if waited >= PATIENCE {
                let (drive, path, by) = self.held();
                return Err(FenceError::Held { drive, path, by });
            }
            thread::sleep(GLANCE);
        }
    }

    fn holders(&self) -> MutexGuard<'_, Vec<Holder>> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this side has it now.
    fn take(&self) -> Result<bool, FenceError> {
        match self.call(libc::F_OFD_SETLK, libc::F_WRLCK) {
            Ok(_) => Ok(true),
            Err(cause) if matches!(cause.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
            Err(cause) => Err(self.no_locks(cause)),
        }
    }

    fn no_locks(&self, cause: io::Error) -> FenceError {
        FenceError::NoLocks { drive: self.image.drive.clone(), path: self.image.place().0, cause }
    }

    /// Drive, image, and who has it.
    fn held(&self) -> (String, PathBuf, String) {
        let (path, file) = self.image.place();
        (self.image.drive.clone(), path, described(&Holder::find(&file)))
    }

    /// Calls fcntl with `command` and a lock of `kind` on [`PLACE`], and gives the kind that came back.
    fn call(&self, command: libc::c_int, kind: libc::c_int) -> io::Result<libc::c_int> {
        let mut lock = libc::flock {
            l_type: kind as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: PLACE,
            l_len: 1,
            l_pid: 0,
        };
        let (_, file) = self.image.place();
        // SAFETY: the descriptor is open, and these commands read and write one `flock`, which is there.
        let outcome = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) };
        if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(lock.l_type.into()) }
    }
}

fn described(holders: &[Holder]) -> String {
    if holders.is_empty() {
        return "another host, or a process that cannot be seen from here".into();
    }
    holders.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
