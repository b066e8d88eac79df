//! The sides of a guest as processes of this program, everything that can be observed of them from outside, and the judge
//! of what their consoles show. The demo and the drills are made of it.

pub mod console;
pub mod lines;
pub(crate) mod process;
pub(crate) mod tally;

pub use process::Side;
