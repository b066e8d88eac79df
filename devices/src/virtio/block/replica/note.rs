//! A durable note beside an image: which of its regions may differ from other sides' images.
//!
//! Images that once held the same are a *group*, which has a name; an image may be of several. Each side notes a region for
//! each of its groups before it first writes to it, and strikes it out once what it has written is durable on every side of
//! the group. So whenever two images of a group meet again, they differ at most in the regions that one of them has noted
//! for it; without a common group, they may differ everywhere.
//!
//! A standby writes nothing of its own and is of one group. It follows epoch by epoch, and an epoch is only sent when all
//! have the one before: where two standbys of a group have come to differ, one is an epoch ahead. So a standby that no longer
//! follows notes what the last epoch that it kept wrote to. When a standby is lost, those that go on are another group from
//! the next epoch on; the lost one's group stays in the note of the side that runs the guest, and nothing is struck from
//! that any more.
//!
//! The file: a header of one sector; from byte 4096 on, for each place that a group may have in the header, a bit for each
//! region. A bit that is set for nothing costs time, one that is missing costs data. So bits are set durably before the
//! write, and taken back at leisure.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::group::Group;
use super::header::{Header, ImageIdentity, Place, SECTOR};
use super::regions::Regions;
use super::store::Store;

/// Bytes of a region.
pub const REGION: u64 = 4 << 20;

const BITS: u64 = 4096;

/// What is known of a region that is noted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Use {
    /// Writes to it that are under way.
    busy: u32,
    /// The period in which the last one came to its end.
    last: u64,
}

struct State {
    header: Header,
    /// For the group in each place of the header.
    noted: Vec<Option<Regions>>,
    uses: HashMap<u64, Use>,
}

impl State {
    fn noted(&self, group: Group) -> Option<&Regions> {
        self.noted.get(self.header.place(group)?)?.as_ref()
    }
}

/// The note of an image.
pub(super) struct Note {
    store: Box<dyn Store>,
    image: ImageIdentity,
    /// Held while the file is written: what is noted changes only then.
    file: Mutex<()>,
    state: Mutex<State>,
}

impl Note {
    /// Reads the note in `store` of `image`; begins one if there is none, or if it is of another image.
    pub(super) fn open(store: Box<dyn Store>, image: ImageIdentity) -> io::Result<Self> {
        let header = Header::read(&*store, image)?.unwrap_or(Header::new());
        let regions = image.len.div_ceil(REGION);
        let mut noted = Vec::new();
        for (index, place) in header.places.iter().enumerate() {
            if place.group == Group::NONE {
                noted.push(None);
                continue;
            }
            let mut bits = vec![0; regions.div_ceil(8) as usize];
            store.read(bits_at(image, index), &mut bits)?;
            let set = |region: &u64| bits[(region / 8) as usize] & 1 << (region % 8) != 0;
            let mut found = Regions::none(image.len, REGION);
            (0..regions).filter(set).for_each(|region| {
                found.insert(region);
            });
            noted.push(Some(found));
        }
        let state = State { header, noted, uses: HashMap::new() };
        Ok(Self { store, image, file: Mutex::default(), state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self) -> MutexGuard<'_, ()> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The groups of the image, those that were of use last first.
    pub(super) fn groups(&self) -> Vec<Group> {
        self.state().header.groups()
    }

    /// Whether the image is of `group`.
    pub(super) fn is_of(&self, group: Group) -> bool {
        self.state().header.place(group).is_some()
    }

    pub(super) fn is_complete(&self) -> bool {
        self.state().header.complete
    }

    /// The regions in which it may differ from others of `group`; all, if it is not of that.
    pub(super) fn noted(&self, group: Group) -> Regions {
        let noted = self.state().noted(group).cloned();
        noted.unwrap_or_else(|| self.all())
    }

    /// How many these are.
    pub(super) fn count(&self, group: Group) -> u64 {
        self.state().noted(group).map_or(self.image.len.div_ceil(REGION), Regions::count)
    }

    /// All regions.
    pub(super) fn all(&self) -> Regions {
        let mut all = Regions::none(self.image.len, REGION);
        for region in 0..self.image.len.div_ceil(REGION) {
            all.insert(region);
        }
        all
    }

    /// Before a write to `len` bytes from `at`: notes its regions durably.
    pub(super) fn begin(&self, at: u64, len: u64) -> io::Result<()> {
        let regions = regions(at, len);
        let missing = {
            let mut state = self.state();
            regions.clone().for_each(|region| state.uses.entry(region).or_default().busy += 1);
            let mut groups = state.noted.iter().flatten();
            groups.any(|noted| regions.clone().any(|region| !noted.contains(region)))
        };
        if missing { self.add(&regions.collect::<Vec<_>>()) } else { Ok(()) }
    }

    /// Notes `regions` durably for every group.
    pub(super) fn add(&self, regions: &[u64]) -> io::Result<()> {
        let _file = self.file();
        let mut with = self.state().noted.clone();
        let mut changed = false;
        for (index, noted) in with.iter_mut().enumerate() {
            let Some(noted) = noted else { continue };
            let new: Vec<u64> = regions.iter().copied().filter(|&region| noted.insert(region)).collect();
            if let (Some(first), Some(last)) = (new.iter().min(), new.iter().max()) {
                self.write_bits(index, noted, *first..last + 1)?;
                changed = true;
            }
        }
        if changed {
            self.store.sync()?;
            self.state().noted = with;
        }
        Ok(())
    }

    /// After that write, in `period`.
    pub(super) fn end(&self, at: u64, len: u64, period: u64) {
        let mut state = self.state();
        let alone = state.noted.iter().all(Option::is_none);
        for region in regions(at, len) {
            if let Some(used) = state.uses.get_mut(&region) {
                used.busy = used.busy.saturating_sub(1);
                used.last = period;
                if used.busy == 0 && alone {
                    state.uses.remove(&region);
                }
            }
        }
    }

    /// What was read of `region` went to another side in `period`.
    pub(super) fn sent(&self, region: u64, period: u64) {
        self.state().uses.entry(region).or_default().last = period;
    }

    /// Strikes out for `group` the regions to which nothing was written after `period`, the last of which all its other sides
    /// have everything; `still` are to stay. `sync` makes the image durable. In `living` are all groups for which regions are
    /// struck.
    pub(super) fn strike(
        &self,
        group: Group,
        living: &[Group],
        period: u64,
        still: impl Fn(u64) -> bool,
        sync: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let candidates: Vec<(u64, Use)> = {
            let state = self.state();
            let settled = |region: u64| {
                let used = state.uses.get(&region).copied().unwrap_or_default();
                (used.busy == 0 && used.last <= period).then_some((region, used))
            };
            state.noted(group).map(|noted| noted.iter().filter_map(settled).collect()).unwrap_or_default()
        };
        if candidates.is_empty() {
            return Ok(());
        }
        sync()?;
        let _file = self.file();
        let mut struck = Vec::new();
        let (index, noted) = {
            let mut state = self.state();
            let state = &mut *state;
            let Some(index) = state.header.place(group) else { return Ok(()) };
            for (region, used) in candidates {
                let unchanged = state.uses.get(&region).copied().unwrap_or_default() == used;
                if unchanged && !still(region) {
                    if let Some(noted) = &mut state.noted[index] {
                        noted.remove(region);
                    }
                    let counts =
                        |group: &Group| state.noted(*group).is_some_and(|noted| noted.contains(region));
                    if !living.iter().any(counts) {
                        state.uses.remove(&region);
                    }
                    struck.push(region);
                }
            }
            (index, state.noted[index].clone())
        };
        match (struck.first(), struck.last(), noted) {
            (Some(first), Some(last), Some(noted)) => self.write_bits(index, &noted, *first..last + 1),
            _ => Ok(()),
        }
    }

    /// From now on the image is of `group`, too: it differs from others of that at most in what is noted for those in `like`,
    /// or in `more`. Those in `keep` stay; the group that was of use longest ago may have to make room.
    ///
    /// While the file is held nothing is noted newly: a write to a region that is not noted for a group in `like` waits, and
    /// then is noted for this one, too. Where `like` is empty `more` must be everything.
    pub(super) fn found(
        &self,
        group: Group,
        like: &[Group],
        mut more: Regions,
        keep: &[Group],
    ) -> io::Result<()> {
        let _file = self.file();
        let mut header = self.state().header;
        let kept = [like, keep].concat();
        let index =
            header.room(&kept).ok_or_else(|| io::Error::other("there are too many groups of images"))?;
        if header.places[index].group != Group::NONE {
            // Its bits are about to be another's.
            header.places[index] = Place::default();
            self.write_header(&header)?;
            self.state().noted[index] = None;
        }
        {
            let state = self.state();
            like.iter().filter_map(|&group| state.noted(group)).for_each(|noted| more.extend(noted.iter()));
        }
        self.write_bits(index, &more, 0..self.image.len.div_ceil(REGION))?;
        self.store.sync()?;
        header.put(index, group, like);
        self.write_header(&header)?;
        self.state().noted[index] = Some(more);
        Ok(())
    }

    /// This image is to become one of `group`; it holds a part from now on, and is of no other.
    pub(super) fn adopt(&self, group: Group) -> io::Result<()> {
        self.be_of_one(group, false)
    }

    /// This image, which is as complete as it was, is of `group` now and of no other, and differs in nothing.
    pub(super) fn go_over_to(&self, group: Group) -> io::Result<()> {
        self.be_of_one(group, self.is_complete())
    }

    fn be_of_one(&self, group: Group, complete: bool) -> io::Result<()> {
        let _file = self.file();
        // Bits that are there for another group are too many, which costs time and no more.
        self.write_header(&Header::of_one(group, complete))?;
        let none = Regions::none(self.image.len, REGION);
        {
            let mut state = self.state();
            state.noted.fill(None);
            state.noted[0] = Some(none.clone());
            state.uses.clear();
        }
        self.write_bits(0, &none, 0..self.image.len.div_ceil(REGION))
    }

    /// This image holds what the others of its group hold.
    pub(super) fn complete(&self) -> io::Result<()> {
        let _file = self.file();
        let header = self.state().header;
        self.write_header(&Header { complete: true, ..header })
    }

    fn write_header(&self, header: &Header) -> io::Result<()> {
        header.write(&*self.store, self.image)?;
        self.state().header = *header;
        Ok(())
    }

    /// Writes the sectors with the bits of `regions` for the group in place `index`.
    fn write_bits(&self, index: usize, noted: &Regions, regions: Range<u64>) -> io::Result<()> {
        let per_sector = SECTOR * 8;
        let sectors = regions.start / per_sector..regions.end.div_ceil(per_sector);
        let mut bytes = vec![0; ((sectors.end - sectors.start) * SECTOR) as usize];
        let first = sectors.start * per_sector;
        let mut part = noted.next(first);
        while let Some(region) = part.filter(|&region| region < sectors.end * per_sector) {
            let bit = region - first;
            bytes[(bit / 8) as usize] |= 1 << (bit % 8);
            part = noted.next(region + 1);
        }
        self.store.write(bits_at(self.image, index) + sectors.start * SECTOR, &bytes)
    }
}

/// The regions that `len` bytes from `at` touch.
pub(super) fn regions(at: u64, len: u64) -> Range<u64> {
    at / REGION..(at + len).div_ceil(REGION)
}

/// Where the bits of the group in place `index` begin.
fn bits_at(image: ImageIdentity, index: usize) -> u64 {
    let sectors = image.len.div_ceil(REGION).div_ceil(8).div_ceil(SECTOR);
    BITS + index as u64 * sectors * SECTOR
}
