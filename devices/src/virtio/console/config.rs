//! What a console is made from.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Columns of a console that was given no size.
pub const COLUMNS: u16 = 80;
/// Rows of a console that was given no size.
pub const ROWS: u16 = 25;

/// What a console is made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleConfig {
    /// Where its other end is.
    pub place: ConsolePlace,
    /// Characters in a row.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

/// Where the other end of a console is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConsolePlace {
    /// A Unix socket, on which one program at a time reads and writes.
    Socket(PathBuf),
    /// A file, FIFO or terminal that is written to; a terminal is read from as well.
    Output(PathBuf),
}

impl ConsolePlace {
    /// The path, whatever is there.
    pub fn path(&self) -> &Path {
        match self {
            Self::Socket(path) | Self::Output(path) => path,
        }
    }

    /// The path, whatever is there.
    pub fn path_mut(&mut self) -> &mut PathBuf {
        match self {
            Self::Socket(path) | Self::Output(path) => path,
        }
    }
}

/// Why a console cannot be had.
#[derive(Debug, Error)]
pub enum ConsoleError {
    /// Descriptors.
    #[error("cannot set up the console: {0}")]
    Descriptors(#[from] io::Error),
    /// The folder of the socket is not there.
    #[error("the folder of the console's socket {0} is not there: create it")]
    Folder(PathBuf),
    /// The output cannot be opened.
    #[error("cannot open {path} for the console's output: {cause}")]
    Output {
        /// The path.
        path: PathBuf,
        /// What the system says.
        cause: io::Error,
    },
}
