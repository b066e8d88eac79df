//! The name of a group of images.

use serde::{Deserialize, Serialize};

/// The name of images that once held the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Group(pub(super) [u8; 16]);

impl Group {
    /// No group.
    pub(super) const NONE: Self = Self([0; 16]);

    /// A group that never was.
    pub(super) fn new() -> Self {
        Self(uuid::Uuid::new_v4().into_bytes())
    }
}
