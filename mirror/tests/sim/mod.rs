//! A world in one thread: a small guest, a shell for each side, a link that carries real frames, a witness, and whoever
//! watches from outside. A schedule decides who does the next small thing; after each of them the promises are checked.

// Each test program uses its part of this.
#![allow(dead_code, unreachable_pub)]

pub mod console;
pub mod guest;
pub mod link;
pub mod outside;
pub mod primary_host;
pub mod schedule;
pub mod seat;
pub mod standby_host;
pub mod witness;
pub mod world;

/// One of the two sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Runs the guest from the start.
    Primary,
    /// Mirrors it.
    Standby,
}

impl Side {
    /// The name it claims terms by.
    pub fn name(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Standby => "standby",
        }
    }

    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Self::Primary => Self::Standby,
            Self::Standby => Self::Primary,
        }
    }
}
