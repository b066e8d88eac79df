//! Links between the two sides: addresses, sockets, and frames on them.

pub mod frames;
pub mod socket;

pub use frames::{Frame, FrameReader, FrameWriter, ReadError};
pub use socket::{Address, LinkError, Listener, Stream};
