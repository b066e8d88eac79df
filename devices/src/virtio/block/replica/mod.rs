//! A disk of which each side of a mirrored guest has an image of its own.
//!
//! Writes go to the local image and are completed at once. What was written is noted in the log of the epoch, in the
//! order in which it was completed, and travels with the epoch; the standby makes it durable in a journal before
//! it acknowledges the epoch, and then applies it. So the standby's image is always that of an epoch, and never older than
//! the last one acknowledged. What was written here beyond that is in no log that counts: the note beside the image
//! names the regions, so that this side can become a standby again without being sent everything.
//!
//! There may be several standbys, each with a log of its own: one may follow while another is still sent what it lacks.

mod group;
mod header;
mod journal;
mod keeper;
mod log;
mod members;
mod note;
mod regions;
mod store;
mod sync;
#[cfg(test)]
mod tests;
mod twin;
mod writers;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

pub use keeper::{KeepError, Keeper, Kept};
pub use log::LogError;
pub use note::REGION;
pub use sync::{AgreeError, SyncProgress, agree, answer};
pub(super) use writers::Replicating;

use self::group::Group;
use self::header::ImageIdentity;
use self::log::{COMPLETE, Entry, Section};
use self::note::Note;
use self::regions::Regions;
use self::store::{Store, open_alone};
use self::twin::Twin;
use super::request::Operation;

/// Names a standby, as long as there is a link to it.
pub type LinkId = u64;

/// Most bytes of a drive's log of one epoch, and most bytes of writes under way.
pub const LOG_LIMIT: usize = 8 << 20;

/// Longest write, which a driver that keeps to what it is told never exceeds.
pub(super) const MAX_WRITE: u32 = 4 << 20;
/// Longest buffer of a request, told to the driver: as many as a request may have come to [`MAX_WRITE`] at most.
pub(super) const SIZE_MAX: u32 = 16 << 10;

/// A log with so much in it ends its epoch early.
const LOG_URGENT: usize = LOG_LIMIT / 2;

/// Longest span of zeros that could not be made of which is read what is there instead.
const READ_BACK: u64 = 64 << 10;

/// Why a drive cannot be replicated.
#[derive(Debug, Error)]
pub enum ReplicaError {
    /// A file beside the image.
    #[error("cannot use {path}, which a replicated drive keeps beside its image: {cause}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system answered.
        cause: io::Error,
    },
    /// Another process has the image.
    #[error(
        "the disk image {path} is in use by another process; each side of a mirrored guest has an image of its own: tell the standby where its own is (--drive ID=PATH)"
    )]
    Taken {
        /// Which.
        path: PathBuf,
    },
    /// The note is damaged.
    #[error(
        "{path} is damaged; if the image beside it is whole, remove it: the next standby is then sent all of the image"
    )]
    Damaged {
        /// The note.
        path: PathBuf,
    },
    /// The image is a part of one.
    #[error(
        "the disk image {path} is a part of a copy that was never completed: start the side that has the whole image, or remove {path}.replica to use it all the same"
    )]
    Incomplete {
        /// Which.
        path: PathBuf,
    },
}

struct State {
    /// Where writes that are under way go to, and the bytes of each.
    under_way: Vec<(u64, u64)>,
    /// What they will take in a log.
    reserved: usize,
    /// A write waits for room.
    clogged: bool,
    /// The images of the standbys.
    twins: BTreeMap<LinkId, Twin>,
    /// The group of those that take part in epochs.
    common: Group,
    /// One of that group is lost.
    parted: bool,
    /// Counts the pieces of time that end with a log.
    period: u64,
    /// The last one that ended with an epoch.
    taken: u64,
    /// Counts the epochs that were acknowledged.
    acknowledgements: u64,
    /// How many there were when it was last looked what may be struck from the note for those that take part in them.
    struck: u64,
    /// Regions that were left in the note of their group then.
    lasting: u64,
}

/// A replicated disk: what its device, the mirror and a standby know of it together.
pub struct Replica {
    name: String,
    path: PathBuf,
    len: u64,
    image: Box<dyn Store>,
    note: Note,
    state: Mutex<State>,
    /// Wakes the device when a write that waits may find room.
    room: EventFd,
}

impl Replica {
    /// Opens what lies beside the raw image at `path` of the drive `name`; `room` wakes the device.
    pub(super) fn open(name: &str, path: &Path, len: u64, room: EventFd) -> Result<Self, ReplicaError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |cause| ReplicaError::File { path, cause }
        };
        let image = OpenOptions::new().read(true).write(true).open(path).map_err(failed(path))?;
        let inode = image.metadata().map_err(failed(path))?.ino();
        let beside = beside(path, "replica");
        let store = open_alone(&beside).map_err(|cause| match cause.kind() {
            io::ErrorKind::WouldBlock => ReplicaError::Taken { path: path.into() },
            _ => failed(&beside)(cause),
        })?;
        let note = Note::open(Box::new(store), ImageIdentity { len, inode });
        let note = note.map_err(|cause| match cause.kind() {
            io::ErrorKind::InvalidData => ReplicaError::Damaged { path: beside.clone() },
            _ => failed(&beside)(cause),
        })?;
        Ok(Self::on(name, path, len, Box::new(image), note, room))
    }

    fn on(name: &str, path: &Path, len: u64, image: Box<dyn Store>, note: Note, room: EventFd) -> Self {
        let state = State {
            under_way: Vec::new(),
            reserved: 0,
            clogged: false,
            twins: BTreeMap::new(),
            common: Group::NONE,
            parted: false,
            period: 1,
            taken: 0,
            acknowledgements: 0,
            struck: 0,
            lasting: 0,
        };
        Self { name: name.into(), path: path.into(), len, image, note, state: Mutex::new(state), room }
    }

    /// The drive's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Length of the disk in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether its image may be run from.
    ///
    /// # Errors
    /// [`ReplicaError::Incomplete`]
    pub fn check_complete(&self) -> Result<(), ReplicaError> {
        if self.note.is_complete() {
            return Ok(());
        }
        Err(ReplicaError::Incomplete { path: self.path.clone() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // --- for the device

    /// Whether `operation`, which changes the image, may begin: nothing that is under way touches the same bytes, so that
    /// both sides have them in the same order, and there is room for it in the log. If not, the device is woken when it may
    /// be worth another try.
    pub(super) fn admit(&self, operation: Operation) -> bool {
        let Some((at, len)) = operation.span() else { return true };
        let mut state = self.state();
        let cost = operation.cost();
        let overlaps = |&(other, bytes): &(u64, u64)| at < other + bytes && other < at + len;
        if state.under_way.iter().any(overlaps) {
            return false;
        }
        let used = state.reserved + state.logged();
        if used > 0 && used + cost > LOG_LIMIT {
            state.clogged = true;
            return false;
        }
        state.under_way.push((at, len));
        state.reserved += cost;
        true
    }

    /// Carries out a write of `bytes` or zeros, in the calling thread: it may take its time. If it fails, `bytes` is what the
    /// image then holds, as far as that can be known: the standby is to have the same.
    fn carry_out(&self, operation: Operation, bytes: &mut Vec<u8>) -> io::Result<()> {
        let Some((at, len)) = operation.span() else { return Ok(()) };
        let outcome = self.note.begin(at, len).and_then(|()| match operation {
            Operation::Write { .. } => self.image.write(at, bytes),
            // Discarded bytes could be anything; they are to be the same on both sides.
            Operation::Zero { unmap: false, .. } => self.image.zero(at, len, false),
            _ => self.image.zero(at, len, true),
        });
        if outcome.is_err() && len <= (bytes.len() as u64).max(READ_BACK) {
            bytes.resize(len as usize, 0);
            // If not even that can be read, it is taken as it was meant.
            let _ = self.image.read(at, bytes);
        }
        outcome
    }

    /// `operation` has come to its end, with `bytes`.
    pub(super) fn complete(&self, operation: Operation, bytes: &[u8]) {
        let Some((at, len)) = operation.span() else { return };
        let mut state = self.state();
        if let Some(index) = state.under_way.iter().position(|&span| span == (at, len)) {
            state.under_way.swap_remove(index);
        }
        state.reserved = state.reserved.saturating_sub(operation.cost());
        for twin in state.twins.values_mut() {
            twin.written(at, len, bytes);
        }
        let period = state.period;
        // The note asks for this state while it is locked itself.
        drop(state);
        self.note.end(at, len, period);
    }

    /// Everything under way is forgotten: the device has been reset, after it had come to its end.
    pub(super) fn reset(&self) {
        let mut state = self.state();
        (state.reserved, state.clogged) = (0, false);
        state.under_way.clear();
    }

    /// Whether the epoch should end soon, so that there is room in the log.
    pub(super) fn log_is_urgent(&self) -> bool {
        let state = self.state();
        let mut logged = state.twins.values().filter(|twin| twin.follows).map(Twin::logged);
        logged.any(|logged| state.clogged || logged >= LOG_URGENT)
    }

    /// Inside the pause: the log of the epoch ends here. Allocates nothing.
    pub(super) fn close_log(&self) {
        let mut state = self.state();
        // The others' logs go with their rounds.
        for twin in state.twins.values_mut().filter(|twin| twin.follows) {
            twin.cut = twin.log.len();
        }
        state.taken = state.turn();
        self.tell_of_room(&mut state);
    }

    /// The log that was closed last is durable at all standbys that were sent it.
    pub(super) fn acknowledged(&self) {
        let mut state = self.state();
        for twin in state.twins.values_mut() {
            if std::mem::take(&mut twin.in_epoch) {
                twin.acknowledged = twin.sent;
            }
        }
        state.acknowledgements += 1;
    }

    /// There is no standby any more.
    pub(super) fn go_alone(&self) {
        let mut state = self.state();
        state.twins.clear();
        state.settle_parting();
        self.tell_of_room(&mut state);
    }

    fn tell_of_room(&self, state: &mut State) {
        if std::mem::take(&mut state.clogged) {
            // It fails only if the counter is full: then the device is being woken as it is.
            let _ = self.room.write(1);
        }
    }

    // --- for the mirror

    /// After the pause: appends the log of the epoch for the standby `link` to `out`, if there is anything to say.
    pub fn encode_log(&self, link: LinkId, out: &mut Vec<u8>) {
        let mut state = self.state();
        let (common, taken) = (state.common, state.taken);
        let Some(twin) = state.twins.get_mut(&link).filter(|twin| twin.follows) else { return };
        let flags = std::mem::take(&mut twin.flags);
        if twin.cut > 0 || flags != 0 {
            Section::new(&self.name, twin.group, flags, &twin.log[..twin.cut]).append_to(out);
        }
        if twin.group != common {
            Section::going_over(&self.name, twin.group, &common).append_to(out);
            twin.group = common;
        }
        twin.log.drain(..twin.cut);
        (twin.cut, twin.sent, twin.in_epoch) = (0, taken, true);
    }

    // --- for a standby

    /// Applies what `section` says to the image.
    fn apply(&self, section: &Section<'_>) -> io::Result<()> {
        for entry in section.entries(self.len) {
            match entry.map_err(io::Error::other)? {
                Entry::Write { at, bytes } => self.image.write(at, bytes)?,
                Entry::Zero { len: 0, .. } => {}
                Entry::Zero { at, len } => self.image.zero(at, len, true)?,
            }
        }
        if section.flags & COMPLETE != 0 && !self.note.is_complete() {
            self.image.sync()?;
            self.note.complete()?;
        }
        if let Some(group) = section.goes_over() {
            // Logs of the group before are of no more use then.
            self.image.sync()?;
            self.note.go_over_to(group)?;
        }
        Ok(())
    }

    /// The image becomes one of `group`, and is a part until it is said to be complete.
    fn adopt(&self, group: Group) -> io::Result<()> {
        self.note.adopt(group)
    }

    /// The regions that `section` writes to.
    fn touched(&self, section: &Section<'_>) -> Result<Regions, LogError> {
        let mut touched = Regions::none(self.len, REGION);
        for entry in section.entries(self.len) {
            let (at, len) = match entry? {
                Entry::Write { at, bytes } => (at, bytes.len() as u64),
                Entry::Zero { at, len } => (at, len),
            };
            touched.extend(note::regions(at, len));
        }
        Ok(touched)
    }
}

impl State {
    /// The most that is logged for one standby.
    fn logged(&self) -> usize {
        self.twins.values().map(Twin::logged).max().unwrap_or(0)
    }

    /// A period has ended: which.
    fn turn(&mut self) -> u64 {
        self.period += 1;
        self.period - 1
    }
}

impl Operation {
    /// The bytes that it changes, if it does.
    fn span(self) -> Option<(u64, u64)> {
        match self {
            Self::Write { at, len } => Some((at, len.into())),
            Self::Discard { at, len } | Self::Zero { at, len, .. } => Some((at, len)),
            Self::Read { .. } | Self::Flush => None,
        }
    }

    /// What it takes in a log.
    fn cost(self) -> usize {
        match self {
            Self::Write { len, .. } => log::ENTRY + len as usize,
            _ => log::ENTRY,
        }
    }
}

/// The file with `ending` beside the image at `path`.
fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(ending);
    name.into()
}

/// Opens the file with `ending` beside the image of `replica` for this process alone.
fn open_beside(replica: &Replica, ending: &str) -> Result<File, ReplicaError> {
    let path = beside(&replica.path, ending);
    open_alone(&path).map_err(|cause| ReplicaError::File { path, cause })
}

/// The replicated disks of a machine.
pub type Replicas = Vec<Arc<Replica>>;
