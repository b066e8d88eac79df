//! The header of a note: what image it is of, and the groups of that.

use std::io;

use xxhash_rust::xxh3::xxh3_64;

use super::group::Group;
use super::store::Store;

/// Bytes of the header, which a loss of power leaves whole or as it was.
pub(super) const SECTOR: u64 = 512;

/// Most groups that an image is known to be of.
const PLACES: usize = 16;

const MAGIC: [u8; 8] = *b"UNDYNOTE";
const VERSION: u32 = 2;
/// magic 8, version 4, complete 4, length 8, identity 8, then the places
const FIXED: usize = 32;
/// group 16, turn 8
const PLACE: usize = 24;
const CHECKSUM: usize = FIXED + PLACES * PLACE;

/// What the image is that a note is of: another image of the same name has another note.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ImageIdentity {
    pub(super) len: u64,
    /// Its inode.
    pub(super) inode: u64,
}

/// A place for a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Place {
    /// [`Group::NONE`]: it is free.
    pub(super) group: Group,
    /// Counts up from group to group: those that were of use last have the highest.
    pub(super) turn: u64,
}

/// What the header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Whether the image holds a disk, and not a part of one that was being sent.
    pub(super) complete: bool,
    pub(super) places: [Place; PLACES],
}

impl Header {
    /// That of an image of which nobody knows.
    pub(super) fn new() -> Self {
        Self { complete: true, places: [Place::default(); PLACES] }
    }

    /// That of an image which is of `group` alone.
    pub(super) fn of_one(group: Group, complete: bool) -> Self {
        let mut header = Self { complete, ..Self::new() };
        header.places[0] = Place { group, turn: 1 };
        header
    }

    /// Where `group` is.
    pub(super) fn place(&self, group: Group) -> Option<usize> {
        self.places.iter().position(|place| place.group == group && group != Group::NONE)
    }

    /// The groups, those that were of use last first.
    pub(super) fn groups(&self) -> Vec<Group> {
        let mut places: Vec<_> = self.places.iter().filter(|place| place.group != Group::NONE).collect();
        places.sort_unstable_by_key(|place| std::cmp::Reverse(place.turn));
        places.into_iter().map(|place| place.group).collect()
    }

    /// The place for one more group: a free one, or that of the group which was of use longest ago, and is not in `keep`.
    pub(super) fn room(&self, keep: &[Group]) -> Option<usize> {
        let free = |index: &usize| self.places[*index].group == Group::NONE;
        (0..PLACES).find(free).or_else(|| {
            let spare = (0..PLACES).filter(|&index| !keep.contains(&self.places[index].group));
            spare.min_by_key(|&index| self.places[index].turn)
        })
    }

    /// `group` is at `index` now, and it and those in `used` are of use.
    pub(super) fn put(&mut self, index: usize, group: Group, used: &[Group]) {
        let next = 1 + self.places.iter().map(|place| place.turn).max().unwrap_or(0);
        self.places[index] = Place { group, turn: next };
        for place in &mut self.places {
            if used.contains(&place.group) && place.group != Group::NONE {
                place.turn = next;
            }
        }
    }

    fn encode(&self, image: ImageIdentity) -> [u8; SECTOR as usize] {
        let mut bytes = [0; SECTOR as usize];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(&MAGIC);
        put(&VERSION.to_le_bytes());
        put(&u32::from(self.complete).to_le_bytes());
        put(&image.len.to_le_bytes());
        put(&image.inode.to_le_bytes());
        for place in &self.places {
            put(&place.group.0);
            put(&place.turn.to_le_bytes());
        }
        let sum = xxh3_64(&bytes[..CHECKSUM]);
        bytes[CHECKSUM..CHECKSUM + 8].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// `None`: it is damaged.
    fn decode(bytes: &[u8; SECTOR as usize]) -> Option<(Self, ImageIdentity)> {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        let sound = bytes[..8] == MAGIC && bytes[8..12] == VERSION.to_le_bytes();
        if !sound || word(CHECKSUM) != xxh3_64(&bytes[..CHECKSUM]) {
            return None;
        }
        let mut header = Self { complete: bytes[12] == 1, ..Self::new() };
        for (index, place) in header.places.iter_mut().enumerate() {
            let at = FIXED + index * PLACE;
            place.group.0.copy_from_slice(&bytes[at..at + 16]);
            place.turn = word(at + 16);
        }
        Some((header, ImageIdentity { len: word(16), inode: word(24) }))
    }

    /// Reads the header in `store`; `None` if there is none, or if it is of another image than `image`.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`]: it is damaged; whatever the system answers.
    pub(super) fn read(store: &dyn Store, image: ImageIdentity) -> io::Result<Option<Self>> {
        let mut sector = [0; SECTOR as usize];
        store.read(0, &mut sector)?;
        if sector == [0; SECTOR as usize] {
            return Ok(None);
        }
        let (header, of) = Self::decode(&sector).ok_or(io::ErrorKind::InvalidData)?;
        Ok((of == image).then_some(header))
    }

    /// Writes it durably.
    ///
    /// # Errors
    /// What the system answers.
    pub(super) fn write(&self, store: &dyn Store, image: ImageIdentity) -> io::Result<()> {
        store.write(0, &self.encode(image))?;
        store.sync()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_that_was_of_use_longest_ago_makes_room_for_another() {
        let group = |number: usize| Group([number as u8 + 1; 16]);
        let mut header = Header::new();
        for number in 0..PLACES {
            let index = header.room(&[]).unwrap();
            header.put(index, group(number), &[]);
        }
        assert_eq!(header.groups()[0], group(PLACES - 1));
        // The oldest is kept, the next one has just been of use.
        let index = header.room(&[group(0)]).unwrap();
        assert_eq!(header.places[index].group, group(1));
        header.put(index, group(100), &[group(2)]);
        assert_eq!(header.place(group(1)), None);
        let index = header.room(&[group(0)]).unwrap();
        assert_eq!(header.places[index].group, group(3));
        let all = header.groups();
        assert_eq!(header.room(&all), None);
    }

    #[test]
    fn header_is_read_as_it_was_written_and_damage_is_seen() {
        let image = ImageIdentity { len: 77, inode: 5 };
        let header = Header::of_one(Group([9; 16]), false);
        let bytes = header.encode(image);
        assert_eq!(Header::decode(&bytes), Some((header, image)));
        for at in 0..CHECKSUM + 8 {
            let mut damaged = bytes;
            damaged[at] ^= 1;
            assert_eq!(Header::decode(&damaged), None, "byte {at}");
        }
    }
}
