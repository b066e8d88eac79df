//! Makes the standby's image that of the primary while the guest runs.
//!
//! What may differ is known in blocks. While many are left, a block that is written after it was sent is simply sent again.
//! When few are left, writes are logged instead, and the rest is sent; from then on the logs lead from one epoch to the next.
//! A block is read before its log is closed, and comes before the writes of that log: whatever was written to it until then
//! is in it or behind it.

use std::io;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::group::Group;
use super::log::{BEGIN, COMPLETE, Entry, Section};
use super::note::REGION;
use super::regions::Regions;
use super::twin::{Mode, Twin};
use super::{LOG_LIMIT, LinkId, Replica};

/// Bytes that are read and sent at once.
pub(super) const BLOCK: u64 = 64 << 10;

/// Bytes of a round after which no more blocks are read for it.
const ROUND: usize = 16 << 20;

/// Blocks that a round looks at: reading zeros takes time, too.
const ROUND_BLOCKS: usize = 4096;

/// So much less a round is while other standbys follow: their epochs wait until it is read.
const WITH_OTHERS: usize = 8;

/// Most ranges of regions in an answer, so that it fits a message.
const MAX_RANGES: usize = 4096;

/// How far the standby's image is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SyncProgress {
    /// Bytes of the disk.
    pub bytes: u64,
    /// Bytes that are still to be sent.
    pub left: u64,
    /// Whether an epoch has to wait for them.
    pub lags: bool,
}

/// What a standby has of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Answer {
    name: String,
    len: u64,
    /// The groups of its image, each with the regions in which it may differ from the others of that.
    groups: Vec<(Group, Vec<(u64, u64)>)>,
}

/// Why the images of a standby cannot become replicas of the primary's.
#[derive(Debug, Error)]
pub enum AgreeError {
    /// It speaks otherwise.
    #[error("the standby's answer about its disks cannot be read ({0}); run the same release on both sides")]
    Unreadable(String),
    /// A drive is missing.
    #[error("the standby has no image of its own for drive {0}; run the same release on both sides")]
    Missing(String),
    /// An image is of another length.
    #[error(
        "the standby's image of drive {name} has {theirs} bytes, the primary's {ours}; make it as long: truncate -s {ours} IMAGE"
    )]
    Length {
        /// The drive.
        name: String,
        /// Its length here.
        ours: u64,
        /// Its length there.
        theirs: u64,
    },
    /// The note.
    #[error("drive {name}: cannot note in what the standby's image differs: {cause}")]
    Note {
        /// The drive.
        name: String,
        /// What the system answered.
        cause: io::Error,
    },
}

/// What a standby with `replicas` answers, for [`agree`].
pub fn answer(replicas: &[std::sync::Arc<Replica>]) -> Vec<u8> {
    if replicas.is_empty() {
        return Vec::new();
    }
    let answers: Vec<Answer> = replicas.iter().map(|replica| replica.answer()).collect();
    // Nothing in it that cannot be written.
    serde_json::to_vec(&answers).unwrap_or_default()
}

/// On the side of the primary: takes the [`answer`] of the standby `link`, and finds out what it has to be sent.
///
/// # Errors
/// [`AgreeError`]
pub fn agree(replicas: &[std::sync::Arc<Replica>], link: LinkId, answer: &[u8]) -> Result<(), AgreeError> {
    let answers: Vec<Answer> =
        serde_json::from_slice(answer).map_err(|error| AgreeError::Unreadable(error.to_string()))?;
    for replica in replicas {
        let theirs = answers.iter().find(|answer| answer.name == replica.name);
        replica.agree(link, theirs.ok_or_else(|| AgreeError::Missing(replica.name.clone()))?)?;
    }
    Ok(())
}

impl Replica {
    fn answer(&self) -> Answer {
        let groups = self.note.groups();
        let most = MAX_RANGES / groups.len().max(1);
        let noted = |group| {
            let ranges = self.note.noted(group).ranges(most);
            (group, ranges.into_iter().map(|range| (range.start, range.end)).collect())
        };
        Answer { name: self.name.clone(), len: self.len, groups: groups.into_iter().map(noted).collect() }
    }

    fn agree(&self, link: LinkId, theirs: &Answer) -> Result<(), AgreeError> {
        let name = || self.name.clone();
        if theirs.len != self.len {
            return Err(AgreeError::Length { name: name(), ours: self.len, theirs: theirs.len });
        }
        self.part(link);
        let (like, differs) = self.differences(theirs);
        let group = Group::new();
        let keep = self.state().groups();
        let founded = self.note.found(group, &like, differs, &keep);
        founded.map_err(|cause| AgreeError::Note { name: name(), cause })?;
        // The guest runs: from here on what it writes is in the twin's list, and what it wrote before is noted.
        self.state().twins.insert(link, Twin::new(group, self.len, BEGIN));
        let noted = self.note.noted(group);
        if let Some(twin) = self.state().twins.get_mut(&link) {
            self.send_noted(twin, &noted);
        }
        Ok(())
    }

    /// In what the image of a standby may differ from this one: where both are of a group, in what is noted for that here, and
    /// in the regions that are given; else everywhere.
    fn differences(&self, theirs: &Answer) -> (Vec<Group>, Regions) {
        let all = self.note.all();
        let common = theirs.groups.iter().filter(|(group, _)| self.note.is_of(*group));
        let differs = common.map(|(group, ranges)| {
            let mut regions = Regions::none(self.len, REGION);
            regions.extend(ranges.iter().flat_map(|&(start, end)| start..end.min(all.count())));
            (*group, regions)
        });
        let least = differs.min_by_key(|(group, regions)| {
            let mut both = self.note.noted(*group);
            both.extend(regions.iter());
            both.count()
        });
        least.map_or((Vec::new(), all), |(group, regions)| (vec![group], regions))
    }

    /// All blocks of the regions in `noted` are to be sent.
    fn send_noted(&self, twin: &mut Twin, noted: &Regions) {
        for region in noted.iter() {
            twin.todo.extend(twin.todo.touched(region * REGION, REGION.min(self.len - region * REGION)));
        }
    }

    /// Appends to `out` what the standby `link` is to be sent next; what was appended the last time is durable there.
    ///
    /// # Errors
    /// The image cannot be read.
    pub fn sync_round(&self, link: LinkId, out: &mut Vec<u8>) -> io::Result<()> {
        let unknown = || io::Error::other("the standby has said nothing of its disks");
        let (group, part) = {
            let mut state = self.state();
            let others = state.twins.values().any(|twin| twin.follows);
            let twin = state.twins.get_mut(&link).ok_or_else(unknown)?;
            twin.acknowledged = twin.sent;
            if twin.todo.count() * BLOCK <= LOG_LIMIT as u64 / 2 {
                twin.mode = Mode::Logging;
            }
            (twin.group, if others { WITH_OTHERS } else { 1 })
        };
        // It may be interrupted: every region counts.
        if self.is_long(group, 0) {
            self.shorten_note_of(group)?;
        }
        let mut entries = Vec::new();
        let mut block = vec![0; BLOCK as usize];
        for _ in 0..ROUND_BLOCKS / part {
            if out.len() + entries.len() >= ROUND / part {
                break;
            }
            let Some(next) = self.next_block(link) else { break };
            let at = next * BLOCK;
            let bytes = &mut block[..BLOCK.min(self.len - at) as usize];
            self.image.read(at, bytes)?;
            if bytes.iter().all(|&byte| byte == 0) {
                Entry::Zero { at, len: bytes.len() as u64 }.append_to(&mut entries);
            } else {
                Entry::Write { at, bytes }.append_to(&mut entries);
            }
        }
        let mut state = self.state();
        let period = state.turn();
        self.tell_of_room(&mut state);
        let twin = state.twins.get_mut(&link).ok_or_else(unknown)?;
        entries.append(&mut twin.log);
        twin.sent = period;
        let flags = std::mem::take(&mut twin.flags) & BEGIN;
        if twin.is_in_step() {
            // For the first epoch.
            twin.flags = COMPLETE;
        }
        if !entries.is_empty() || flags != 0 {
            Section::new(&self.name, twin.group, flags, &entries).append_to(out);
        }
        Ok(())
    }

    /// Takes the next block from what is to be sent.
    fn next_block(&self, link: LinkId) -> Option<u64> {
        let (block, period) = {
            let state = self.state();
            let Twin { todo, cursor, .. } = state.twins.get(&link)?;
            (todo.next(*cursor).or_else(|| todo.next(0))?, state.period)
        };
        // First of all, so that there is no moment in which its region seems to be everywhere.
        self.note.sent(block * BLOCK / REGION, period);
        let mut state = self.state();
        let twin = state.twins.get_mut(&link)?;
        // Whoever writes to it from here on puts it back, or logs the write.
        twin.todo.remove(block);
        twin.cursor = block + 1;
        Some(block)
    }

    /// How far the image of the standby `link` is; without one, that of the standby that lacks most. Where there is none, what
    /// one would have to be sent that comes back now.
    pub fn progress(&self, link: Option<LinkId>) -> SyncProgress {
        let state = self.state();
        let twins = state.twins.iter().filter(|(other, _)| link.is_none_or(|link| link == **other));
        let most = twins.map(|(_, twin)| (twin.lacks(self.len), !twin.is_in_step())).max();
        drop(state);
        let (left, lags) = most.unwrap_or_else(|| {
            let newest = self.note.groups().first().copied().unwrap_or(Group::NONE);
            ((self.note.count(newest) * REGION).min(self.len), true)
        });
        SyncProgress { bytes: self.len, left, lags }
    }
}
