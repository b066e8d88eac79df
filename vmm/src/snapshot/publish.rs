//! Files that appear under their name only when they are whole.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A file that is being written beside its final place. Dropped before it is published, it is removed.
pub(super) struct Unpublished {
    target: PathBuf,
    part: Option<PathBuf>,
}

impl Unpublished {
    /// Creates the file beside `target`, readable by this user alone: it holds a guest's memory.
    pub(super) fn create(target: &Path) -> io::Result<(Self, File)> {
        let mut name = OsString::from(target.file_name().ok_or(io::ErrorKind::InvalidInput)?);
        name.push(format!(".part-{}", std::process::id()));
        let part = target.with_file_name(name);
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&part)?;
        Ok((Self { target: target.into(), part: Some(part) }, file))
    }

    /// Gives the file, which is on stable storage, its final name.
    pub(super) fn publish(mut self) -> io::Result<()> {
        if let Some(part) = &self.part {
            fs::rename(part, &self.target)?;
        }
        self.part = None;
        let folder = self.target.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }
}

impl Drop for Unpublished {
    fn drop(&mut self) {
        if let Some(part) = &self.part {
            // Nothing more can be done about one that stays.
            let _ = fs::remove_file(part);
        }
    }
}
