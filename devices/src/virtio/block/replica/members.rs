//! Which standbys take part in epochs, as a group; and what may be struck from the note because all of it have it.

use std::collections::BTreeMap;
use std::io;

use super::group::Group;
use super::note::REGION;
use super::regions::Regions;
use super::twin::Twin;
use super::{LinkId, Replica, State};

/// Most regions that may be noted for writes that are long since everywhere: those that are written again and again need not be
/// noted each time.
const HOT_REGIONS: u64 = 64;
/// … and so large a part of a small disk.
const HOT_PART: u64 = 8;

impl Replica {
    /// From now on the standbys `links` take part in epochs. Called before the pause of each: where it is others than before,
    /// they become a group.
    ///
    /// # Errors
    /// The note cannot be written.
    pub fn follow(&self, links: &[LinkId]) -> io::Result<()> {
        let (common, keep, parted) = {
            let state = self.state();
            let new = |link: &LinkId| state.twins.get(link).is_some_and(|twin| !twin.follows);
            if !state.parted && !links.iter().any(new) {
                return Ok(());
            }
            let part = links.iter().filter_map(|link| state.twins.get(link));
            let mut common: Vec<Group> = part.map(|twin| state.group_of(twin)).collect();
            common.sort_unstable();
            common.dedup();
            (common, state.groups(), state.parted)
        };
        let group = match common[..] {
            [] => return Ok(()),
            // It is in no other group, and nobody else in its.
            [one] if !parted => one,
            _ => {
                let group = Group::new();
                let none = Regions::none(self.len, REGION);
                self.note.found(group, &common, none, &keep)?;
                group
            }
        };
        let mut state = self.state();
        (state.common, state.parted, state.lasting) = (group, false, 0);
        for link in links {
            if let Some(twin) = state.twins.get_mut(link) {
                twin.follows = true;
            }
        }
        Ok(())
    }

    /// The standby `link` is lost.
    pub fn part(&self, link: LinkId) {
        let mut state = self.state();
        let Some(twin) = state.twins.remove(&link) else { return };
        state.parted |= twin.follows;
        state.settle_parting();
        self.tell_of_room(&mut state);
    }

    /// Whether regions should be struck from the note: there are many that all have by now who take part in epochs.
    pub(in crate::virtio::block) fn note_is_long(&self) -> bool {
        let (common, lasting) = {
            let state = self.state();
            if state.struck == state.acknowledgements || state.parted {
                return false;
            }
            (state.common, state.lasting)
        };
        common != Group::NONE && self.is_long(common, lasting)
    }

    /// Whether in the note of `group` are many more regions than `lasting`.
    pub(super) fn is_long(&self, group: Group, lasting: u64) -> bool {
        let spare = (self.len.div_ceil(REGION) / HOT_PART).clamp(1, HOT_REGIONS);
        self.note.count(group) > lasting + spare
    }

    /// Strikes from the note what is durable at all that take part in epochs. It may take its time.
    pub(super) fn shorten_note(&self) -> io::Result<()> {
        let common = {
            let mut state = self.state();
            state.struck = state.acknowledgements;
            state.common
        };
        self.shorten_note_of(common)?;
        let left = self.note.count(common);
        let mut state = self.state();
        if state.common == common {
            state.lasting = left;
        }
        Ok(())
    }

    /// Strikes from the note of `group` what is durable at all that are of it.
    pub(super) fn shorten_note_of(&self, group: Group) -> io::Result<()> {
        let living = self.state().living();
        let Some(&acknowledged) = living.get(&group) else { return Ok(()) };
        let to_be_sent = |region: u64| {
            let state = self.state();
            let mut twins = state.twins.values().filter(|twin| state.group_of(twin) == group).peekable();
            // Where one is lost meanwhile, everything stays.
            twins.peek().is_none()
                || (state.parted && group == state.common)
                || twins.any(|twin| twin.todo.contains_any(twin.todo.touched(region * REGION, REGION)))
        };
        let groups: Vec<Group> = living.into_keys().collect();
        self.note.strike(group, &groups, acknowledged, to_be_sent, || self.image.sync())
    }
}

impl State {
    /// Which group of the note tells in what `twin` differs.
    pub(super) fn group_of(&self, twin: &Twin) -> Group {
        if twin.follows { self.common } else { twin.group }
    }

    /// All groups in which somebody's images are, or of which they still say that they are.
    pub(super) fn groups(&self) -> Vec<Group> {
        self.twins.values().flat_map(|twin| [twin.group, self.group_of(twin)]).collect()
    }

    /// The groups of all standbys that there are, each with the last period of which all that are of it have everything.
    /// Of a group of which one is lost nothing may be struck.
    pub(super) fn living(&self) -> BTreeMap<Group, u64> {
        let mut living = BTreeMap::new();
        for twin in self.twins.values() {
            let group = self.group_of(twin);
            if !(self.parted && group == self.common) {
                let least = living.entry(group).or_insert(twin.acknowledged);
                *least = twin.acknowledged.min(*least);
            }
        }
        living
    }

    /// One that is lost matters to those that go on; where none do, there is nothing to tell.
    pub(super) fn settle_parting(&mut self) {
        if !self.twins.values().any(|twin| twin.follows) {
            (self.parted, self.common) = (false, Group::NONE);
        }
    }
}
