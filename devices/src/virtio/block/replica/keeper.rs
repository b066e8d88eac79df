//! The standby's side: a thread that makes logs durable, tells so, and applies them to the images.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use thiserror::Error;

use super::journal::Journal;
use super::log::{BEGIN, LogError, Section, sections};
use super::regions::Regions;
use super::{Replica, ReplicaError, Replicas, beside, open_beside};

/// Bytes of the journal after which a new pass begins: then the images have to be made durable.
const PASS: u64 = 64 << 20;

/// Why a log cannot be kept, or the images cannot be run from.
#[derive(Debug, Error)]
pub enum KeepError {
    /// Not a log.
    #[error(transparent)]
    Log(#[from] LogError),
    /// It is of another disk.
    #[error("the write log is of drive {0:?}, of which this standby has no such image")]
    Unknown(String),
    /// The journal.
    #[error("cannot write the journal of the disks: {0}; see whether its file system is full or broken")]
    Journal(io::Error),
    /// An image.
    #[error(
        "cannot write to the image of drive {name}: {cause}; see whether its file system is full or broken"
    )]
    Image {
        /// The drive.
        name: String,
        /// What the system answered.
        cause: io::Error,
    },
    /// The files.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// The thread.
    #[error("the thread that writes to the disks cannot be started, or is gone: {0}")]
    Thread(String),
}

/// Hears whether a log is durable.
pub type Kept = Box<dyn FnOnce(Result<(), KeepError>) + Send>;

fn gone() -> KeepError {
    KeepError::Thread("it has ended".into())
}

enum Order {
    Keep { epoch: u64, log: Vec<u8>, kept: Kept },
    TakeOver(Sender<Result<(), KeepError>>),
}

/// Keeps what the primary writes to the disks. One journal does for all of them: an epoch is there for all or for none.
pub struct Keeper {
    orders: Option<Sender<Order>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Opens the journal beside the first of `replicas` and applies what it holds.
    ///
    /// # Errors
    /// [`KeepError`]
    pub fn open(replicas: &Replicas) -> Result<Self, KeepError> {
        let Some((first, others)) = replicas.split_first() else {
            return Ok(Self { orders: None, thread: None });
        };
        // Where another was the first, the journal is beside that.
        for other in others.iter().filter(|other| beside(&other.path, "journal").exists()) {
            Hand::open(replicas.clone(), Box::new(open_beside(other, "journal")?))?;
        }
        let store = Box::new(open_beside(first, "journal")?);
        let (sender, orders) = channel();
        let mut hand = Hand::open(replicas.clone(), store)?;
        let thread = thread::Builder::new().name("disk-keeper".into());
        let thread = thread.spawn(move || hand.work(&orders));
        let thread = thread.map_err(|error| KeepError::Thread(error.to_string()))?;
        Ok(Self { orders: Some(sender), thread: Some(thread) })
    }

    /// Makes the log of `epoch` (0: of a round before the first) durable, says so by `kept` in another thread, and applies it.
    ///
    /// # Errors
    /// [`KeepError`]: `kept` is not called.
    pub fn keep(&self, epoch: u64, log: Vec<u8>, kept: Kept) -> Result<(), KeepError> {
        let orders = self.orders.as_ref().ok_or_else(|| KeepError::Unknown("any".into()))?;
        orders.send(Order::Keep { epoch, log, kept }).map_err(|_| gone())
    }

    /// Returns when the images hold all that was kept, durably, and the journal holds nothing: this side writes to them from
    /// now on.
    ///
    /// # Errors
    /// [`KeepError`]: the guest must not run from these images.
    pub fn take_over(&self) -> Result<(), KeepError> {
        let Some(orders) = &self.orders else { return Ok(()) };
        let (sender, done) = channel();
        orders.send(Order::TakeOver(sender)).map_err(|_| gone())?;
        done.recv().map_err(|_| gone())?
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

/// Regions of images.
type Touched = Vec<(Arc<Replica>, Regions)>;

/// What the thread works with.
pub(super) struct Hand {
    replicas: Replicas,
    journal: Journal,
    /// Where the last epoch that was kept wrote to: where another standby has another image than this one, it is there.
    last: Touched,
    /// A log that is in the journal could not be applied.
    behind: bool,
    /// Bytes of a pass through the journal.
    pub(super) pass: u64,
}

impl Hand {
    pub(super) fn open(replicas: Replicas, store: Box<dyn super::store::Store>) -> Result<Self, KeepError> {
        let mut last = Touched::new();
        let replay = |_, log: &[u8]| {
            last.clear();
            // What belongs to other images of that name, or is of a part of a copy that was begun anew, leads nowhere.
            for section in sections(log).map_err(io::Error::other)? {
                if let Some(replica) = find(&replicas, &section) {
                    last.push((Arc::clone(replica), replica.touched(&section).map_err(io::Error::other)?));
                    replica.apply(&section)?;
                }
            }
            Ok(())
        };
        let journal = Journal::open(store, replay).map_err(KeepError::Journal)?;
        let mut this = Self { replicas, journal, last, behind: false, pass: PASS };
        this.follow_no_longer()?;
        Ok(this)
    }

    fn work(&mut self, orders: &Receiver<Order>) {
        for order in orders {
            match order {
                Order::Keep { epoch: 0, log, kept } => kept(self.copy(&log)),
                Order::Keep { epoch, log, kept } => match self.keep(epoch, &log) {
                    Ok(()) => {
                        kept(Ok(()));
                        self.behind |= self.apply(&log).is_err();
                    }
                    Err(error) => kept(Err(error)),
                },
                // Who waits for it may have gone.
                Order::TakeOver(done) => drop(done.send(self.take_over())),
            }
        }
    }

    /// What comes before the first epoch goes straight to the images: they are a part of a copy as it is.
    pub(super) fn copy(&mut self, log: &[u8]) -> Result<(), KeepError> {
        let sections = sections(log)?;
        if sections.iter().any(|section| section.flags & BEGIN != 0) {
            self.empty_journal()?;
            self.last.clear();
        }
        for section in sections {
            if section.flags & BEGIN != 0 {
                let named = self.replicas.iter().find(|replica| replica.name() == section.name);
                let replica = named.ok_or_else(|| KeepError::Unknown(section.name.into()))?;
                replica.adopt(section.group).map_err(|cause| image_failed(replica, cause))?;
            }
        }
        self.touched(log)?;
        self.apply(log)?;
        sync(&self.replicas)
    }

    /// Makes the log of an epoch durable.
    pub(super) fn keep(&mut self, epoch: u64, log: &[u8]) -> Result<(), KeepError> {
        let touched = self.touched(log)?;
        if self.behind {
            return Err(KeepError::Journal(io::Error::other("an earlier log is not in the images")));
        }
        if self.journal.len() >= self.pass {
            self.empty_journal()?;
        }
        self.journal.append(epoch, log).map_err(KeepError::Journal)?;
        self.last = touched;
        Ok(())
    }

    /// Where `log` writes to; an error before anything of it counts.
    fn touched(&self, log: &[u8]) -> Result<Touched, KeepError> {
        let mut touched = Touched::new();
        for section in sections(log)? {
            let replica = find(&self.replicas, &section);
            let replica = replica.ok_or_else(|| KeepError::Unknown(section.name.into()))?;
            touched.push((Arc::clone(replica), replica.touched(&section)?));
        }
        Ok(touched)
    }

    pub(super) fn apply(&self, log: &[u8]) -> Result<(), KeepError> {
        for section in sections(log)? {
            if let Some(replica) = find(&self.replicas, &section) {
                replica.apply(&section).map_err(|cause| image_failed(replica, cause))?;
            }
        }
        Ok(())
    }

    pub(super) fn take_over(&mut self) -> Result<(), KeepError> {
        if self.behind {
            return Err(KeepError::Journal(io::Error::other("a log is not in the images")));
        }
        for replica in &self.replicas {
            replica.check_complete()?;
        }
        self.follow_no_longer()
    }

    /// What was kept last may be on no other side; it is noted as long as the journal still holds it.
    fn follow_no_longer(&mut self) -> Result<(), KeepError> {
        for (replica, regions) in self.last.drain(..) {
            let noted = replica.note.add(&regions.iter().collect::<Vec<_>>());
            noted.map_err(|cause| image_failed(&replica, cause))?;
        }
        self.empty_journal()
    }

    /// The images hold durably what the journal holds, and then it holds nothing.
    fn empty_journal(&mut self) -> Result<(), KeepError> {
        sync(&self.replicas)?;
        self.journal.clear().map_err(KeepError::Journal)
    }
}

/// The replica that `section` is of.
fn find<'a>(replicas: &'a Replicas, section: &Section<'_>) -> Option<&'a Arc<Replica>> {
    replicas.iter().find(|replica| replica.name() == section.name && replica.note.is_of(section.group))
}

fn sync(replicas: &Replicas) -> Result<(), KeepError> {
    replicas.iter().try_for_each(|replica| replica.image.sync().map_err(|cause| image_failed(replica, cause)))
}

fn image_failed(replica: &Replica, cause: io::Error) -> KeepError {
    KeepError::Image { name: replica.name().into(), cause }
}
