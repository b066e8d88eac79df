//! Fences of shared disks: what keeps a side that has lost its guest from writing to an image late.
//!
//! The witness decides who owns a guest, but an old owner that was stopped in the middle of a write does not hear of it:
//! when it goes on, so does the write. So a new owner does not rely on that. Between the witness's grant and its own first
//! write it makes sure that the old one *cannot* write any more: by a lock on the image, which is only free when
//! nobody who had it can write, or by a watchdog that has reset the old one's host by now.
//!
//! Whoever mirrors a guest holds the fences of its drives from before a standby is asked to the end, or until it has handed
//! the guest over.

mod holder;
mod lock;
#[cfg(test)]
mod tests;
mod watchdog;

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use thiserror::Error;

use self::lock::ImageLock;
use self::watchdog::Watchdog;
use super::config::FenceConfig;

/// Why an image is not this side's to write to.
#[derive(Debug, Error)]
pub enum FenceError {
    /// There are no locks where the image is.
    #[error(
        "drive {drive}: the image {path} cannot be locked, so nothing would keep an old primary from writing to it late: {cause}; put it on a file system with locks, give the drive a watchdog for a fence (\"replication\": {{\"mode\": \"shared\", \"fence\": \"watchdog\"}}), or each side an image of its own (\"replication\": {{\"mode\": \"replicated\"}})"
    )]
    NoLocks {
        /// The drive.
        drive: String,
        /// Its image.
        path: PathBuf,
        /// What the system answered.
        cause: io::Error,
    },
    /// Somebody else runs a guest from the image.
    #[error("drive {drive}: the image {path} is locked by {by}, which runs a guest from it; end that first")]
    Taken {
        /// The drive.
        drive: String,
        /// Its image.
        path: PathBuf,
        /// By whom.
        by: String,
    },
    /// The primary's lock does not reach this side.
    #[error(
        "drive {drive}: the primary's lock on its shared image cannot be seen here at {path}: this is another file, or what it is on does not carry locks from host to host, and nothing would keep an old primary from writing to it late; tell the standby where the image is (--drive {drive}=PATH), give the drive a watchdog for a fence (\"replication\": {{\"mode\": \"shared\", \"fence\": \"watchdog\"}}), or each side an image of its own (\"replication\": {{\"mode\": \"replicated\"}})"
    )]
    NotLocked {
        /// The drive.
        drive: String,
        /// The image.
        path: PathBuf,
    },
    /// The old owner has it still.
    #[error(
        "drive {drive}: the old primary can still write to the image {path}: its lock is held by {by}; the guest waits until it is free: end that process, or reset its host"
    )]
    Held {
        /// The drive.
        drive: String,
        /// Its image.
        path: PathBuf,
        /// By whom.
        by: String,
    },
    /// What was written before cannot be made durable.
    #[error("cannot make durable what was written to a shared disk: {0}")]
    Sync(io::Error),
    /// A watchdog without a witness.
    #[error(
        "a drive has a watchdog for a fence, which guards only where a witness decides: without one an operator's promotion could come when it is not armed; name a witness, or give the drive a lock for a fence"
    )]
    NoWitness,
    /// The watchdog.
    #[error("the watchdog {device} cannot be a fence: {reason}")]
    Watchdog {
        /// The device.
        device: PathBuf,
        /// Why not.
        reason: String,
    },
}

/// A drive that needs a fence.
pub(super) struct Fenced {
    pub(super) drive: String,
    pub(super) path: PathBuf,
    /// The open image: of a raw one the very description through which it is written to.
    pub(super) image: Arc<File>,
    pub(super) fence: FenceConfig,
}

/// An image that both sides reach.
struct SharedImage {
    drive: String,
    place: Mutex<(PathBuf, Arc<File>)>,
}

impl SharedImage {
    /// Where it is, and the open file.
    fn place(&self) -> (PathBuf, Arc<File>) {
        self.place.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The fences of a machine's drives.
#[derive(Default)]
pub struct Fences {
    locks: Vec<ImageLock>,
    watchdogs: Vec<Watchdog>,
    images: Vec<Arc<SharedImage>>,
    let_go: AtomicBool,
}

impl Fences {
    /// Adds that of `disk`, if it needs one.
    pub fn add(&mut self, disk: &super::Block) {
        let Some(Fenced { drive, path, image, fence }) = disk.fenced() else { return };
        let image = Arc::new(SharedImage { drive, place: Mutex::new((path, image)) });
        self.images.push(Arc::clone(&image));
        match fence {
            FenceConfig::Lock => self.locks.push(ImageLock::new(image)),
            // One guards all drives of a host.
            FenceConfig::Watchdog(config) if self.watchdogs.iter().any(|dog| *dog.config() == config) => {}
            FenceConfig::Watchdog(config) => self.watchdogs.push(Watchdog::new(config)),
        }
    }

    /// `disk` has another image from now on. What fences it is to be taken before it is shared.
    pub fn image_changed(&self, disk: &super::Block) {
        let Some(Fenced { drive, path, image, .. }) = disk.fenced() else { return };
        for changed in self.images.iter().filter(|image| image.drive == drive) {
            *changed.place.lock().unwrap_or_else(PoisonError::into_inner) =
                (path.clone(), Arc::clone(&image));
        }
    }

    /// Whether they do where `witness` says whether a witness decides who owns the guest.
    ///
    /// # Errors
    /// [`FenceError::NoWitness`]
    pub fn suffice(&self, witness: bool) -> Result<(), FenceError> {
        if witness || self.watchdogs.is_empty() { Ok(()) } else { Err(FenceError::NoWitness) }
    }

    /// Whether no drive needs one.
    pub fn is_empty(&self) -> bool {
        self.locks.is_empty() && self.watchdogs.is_empty()
    }

    /// This side is to be mirrored: takes them if nobody else has them. What this side has already it keeps.
    ///
    /// # Errors
    /// [`FenceError`]
    pub fn hold(&self) -> Result<(), FenceError> {
        self.locks.iter().try_for_each(ImageLock::hold)?;
        self.watchdogs.iter().try_for_each(Watchdog::arm)?;
        self.let_go.store(false, Ordering::Release);
        Ok(())
    }

    /// Takes them again if they were let go for another side that then did not want them.
    ///
    /// # Errors
    /// [`FenceError`]: it has them, and this side must not go on.
    pub fn hold_again(&self) -> Result<(), FenceError> {
        if self.let_go.load(Ordering::Acquire) { self.hold() } else { Ok(()) }
    }

    /// Makes durable what was written so far: pages that only this host knows of are lost with it.
    ///
    /// # Errors
    /// [`FenceError::Sync`]
    pub fn sync(&self) -> Result<(), FenceError> {
        let sync = |image: &Arc<SharedImage>| rustix::fs::fdatasync(image.place().1);
        self.images.iter().try_for_each(sync).map_err(|error| FenceError::Sync(error.into()))
    }

    /// Nothing that the guest asked for is being carried out here any more, and nothing will be: another side may have them.
    pub fn let_go(&self) {
        self.locks.iter().for_each(ImageLock::release);
        self.watchdogs.iter().for_each(Watchdog::stand_down);
        self.let_go.store(true, Ordering::Release);
    }

    /// At a standby: whether they would keep the primary from writing once this side has taken them over. Notes who has them.
    ///
    /// # Errors
    /// [`FenceError`]
    pub fn check(&self) -> Result<(), FenceError> {
        self.locks.iter().try_for_each(ImageLock::note_holders)?;
        self.watchdogs.iter().try_for_each(Watchdog::check)
    }

    /// This side owns the guest: returns when nobody else can write to the images. `since`: when that was decided;
    /// `handed_over`: the old owner has let go by itself. What is done is told by `tell`. Does not wait for ever for a lock:
    /// after an error it is to be tried again.
    ///
    /// # Errors
    /// [`FenceError`]: the old owner can still write.
    pub fn take_over(
        &self,
        since: Instant,
        handed_over: bool,
        tell: &mut dyn FnMut(String),
    ) -> Result<(), FenceError> {
        self.locks.iter().try_for_each(|lock| lock.take_over(tell))?;
        if !handed_over {
            self.watchdogs.iter().for_each(|dog| dog.wait_out(since, tell));
        }
        // What was read here before the other side's last write.
        self.images.iter().for_each(|image| forget_cache(&image.place().1));
        self.let_go.store(false, Ordering::Release);
        Ok(())
    }

    // What the watchdogs want to know. None of it takes a lock or allocates.

    /// The machine's state is being captured.
    pub fn captured(&self) {
        self.watchdogs.iter().for_each(|dog| dog.leash().captured(Instant::now()));
    }

    /// A standby has the state that was captured last, and so has not taken over before that.
    pub fn committed(&self) {
        self.watchdogs.iter().for_each(|dog| dog.leash().committed());
    }

    /// From now on a standby may take over.
    pub fn exposed(&self) {
        self.watchdogs.iter().for_each(|dog| dog.leash().exposed(Instant::now()));
    }

    /// No standby can take over any more: there is nothing to guard.
    pub fn alone(&self) {
        self.watchdogs.iter().for_each(Watchdog::stand_down);
    }

    /// Another side owns the guest.
    pub fn lost(&self) {
        self.watchdogs.iter().for_each(|dog| dog.leash().lost());
    }
}

/// Drops what this host keeps of an image in memory, as far as it has been written back.
fn forget_cache(image: &Arc<File>) {
    // Only advice; a file system that carries locks drops it by itself when one is taken.
    let _ = rustix::fs::fadvise(image, 0, None, rustix::fs::Advice::DontNeed);
    let is_device = image
        .metadata()
        .is_ok_and(|metadata| std::os::unix::fs::FileTypeExt::is_block_device(&metadata.file_type()));
    if is_device {
        // SAFETY: BLKFLSBUF takes no argument that leads anywhere. It needs CAP_SYS_ADMIN; without it the advice must do.
        unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&**image), BLKFLSBUF) };
    }
}

/// Writes back and drops what is kept of a block device (linux/fs.h).
const BLKFLSBUF: libc::Ioctl = 0x1261;
