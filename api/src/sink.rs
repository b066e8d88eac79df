//! Where lines go that nobody may have to wait for: a file or a FIFO, which is appended to.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

/// Takes lines, and never waits for whoever reads them.
#[derive(Debug)]
pub(crate) struct Sink {
    file: File,
    /// The end of a line that was taken in part: it goes first.
    rest: Vec<u8>,
}

impl Sink {
    /// Opens `path`, which is made if it is not there.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let fifo = path.metadata().is_ok_and(|metadata| metadata.file_type().is_fifo());
        let mut options = OpenOptions::new();
        options.append(true).create(true).custom_flags(OFlags::NONBLOCK.bits() as i32);
        // Also for reading, a FIFO can be opened before anybody reads it, and outlives its readers.
        options.read(fifo);
        Ok(Self { file: options.open(path)?, rest: Vec::new() })
    }

    /// Writes `line`, to which the line break is added, whole or not at all. False if there was no room.
    ///
    /// # Errors
    /// What the system says: the disk is full, for instance.
    pub(crate) fn write_line(&mut self, mut line: Vec<u8>) -> io::Result<bool> {
        if !self.write_rest()? {
            return Ok(false);
        }
        line.push(b'\n');
        let written = self.write(&line)?;
        if written > 0 {
            self.rest.extend_from_slice(&line[written..]);
        }
        Ok(written > 0)
    }

    fn write_rest(&mut self) -> io::Result<bool> {
        let rest = std::mem::take(&mut self.rest);
        let written = if rest.is_empty() { 0 } else { self.write(&rest)? };
        self.rest.extend_from_slice(&rest[written..]);
        Ok(self.rest.is_empty())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.file.write(bytes) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(0),
                outcome => return outcome,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    fn fifo() -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        (folder, path)
    }

    #[test]
    fn file_is_appended_to() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lines");
        std::fs::write(&path, "before\n").unwrap();
        assert!(Sink::open(&path).unwrap().write_line(b"after".to_vec()).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "before\nafter\n");
    }

    #[test]
    fn fifo_that_nobody_reads_loses_lines_and_blocks_nobody_and_tears_none() {
        let (_folder, path) = fifo();
        let mut sink = Sink::open(&path).unwrap();
        let line = vec![b'x'; 9_999];
        let mut taken = 0;
        while sink.write_line(line.clone()).unwrap() {
            taken += 1;
        }

        let mut reader =
            OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(&path).unwrap();
        let mut text = Vec::new();
        // It ends with nothing more to read, not with the end of the file: the sink still has it.
        let _ = reader.read_to_end(&mut text);
        assert!(sink.write_line(line.clone()).unwrap());
        let _ = reader.read_to_end(&mut text);
        let lines: Vec<_> = text.strip_suffix(b"\n").unwrap().split(|&byte| byte == b'\n').collect();
        assert_eq!(lines.len(), taken + 1);
        assert!(lines.iter().all(|found| *found == line));
    }

    #[test]
    fn folder_and_path_in_a_missing_folder_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Sink::open(folder.path()).is_err());
        assert!(Sink::open(&folder.path().join("none/lines")).is_err());
    }
}
