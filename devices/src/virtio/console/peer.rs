//! The other end of a console: whoever has connected to its socket, or the file or terminal that it writes to.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

use super::config::{ConsoleError, ConsolePlace};
use crate::virtio::listener::Listener;

/// Marks among the descriptors.
const LISTENER: u64 = 0;
const LINE: u64 = 1;

/// What became of bytes that were to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Written {
    /// So many were, at least one.
    Some(usize),
    /// There is no room now; the descriptor tells when there is.
    Blocked,
    /// Nobody is there.
    Nobody,
}

/// An open way out, and perhaps in.
struct Line {
    fd: OwnedFd,
    /// Whether it is read from at all.
    two_way: bool,
    /// Whether there may be something to read.
    readable: bool,
    /// Whether it took bytes when it was last tried.
    open: bool,
    /// Gives a terminal its modes back.
    _modes: Option<Modes>,
}

/// The other end of a console.
pub(super) struct Peer {
    /// Where to listen; none if the line is a file.
    socket: Option<PathBuf>,
    listener: Option<Listener>,
    line: Option<Line>,
    epoll: OwnedFd,
}

impl Peer {
    /// Opens the file at `place`, or sees whether there can be a socket; it is made by [`Self::listen`].
    pub(super) fn open(place: &ConsolePlace) -> Result<Self, ConsoleError> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io::Error::from)?;
        match place {
            ConsolePlace::Socket(path) => {
                let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
                if folder.is_some_and(|folder| !folder.is_dir()) {
                    return Err(ConsoleError::Folder(path.clone()));
                }
                Ok(Self { socket: Some(path.clone()), listener: None, line: None, epoll })
            }
            ConsolePlace::Output(path) => {
                let line = open(path).map_err(|cause| ConsoleError::Output { path: path.clone(), cause })?;
                // A regular file cannot be waited for, and need not be.
                let _ = watch(&epoll, &line.fd, LINE);
                Ok(Self { socket: None, listener: None, line: Some(line), epoll })
            }
        }
    }

    /// Becomes readable when something has happened here.
    pub(super) fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Listens, if there is a socket to listen on. False: it has to be tried again, since the side that had the guest
    /// before may have the socket still.
    pub(super) fn listen(&mut self) -> bool {
        let Some(path) = self.socket.as_ref().filter(|_| self.listener.is_none()) else { return true };
        let Ok(listener) = Listener::bind(path) else { return false };
        if watch(&self.epoll, &listener, LISTENER).is_err() {
            return false;
        }
        self.listener = Some(listener);
        true
    }

    /// Takes notice of what has happened.
    pub(super) fn hear(&mut self) {
        let mut events =
            [const { epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) } }; 4];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let count = epoll::wait(&self.epoll, &mut events[..], Some(&now)).unwrap_or(0);
        for event in &events[..count] {
            // Copied: the event is packed.
            let (flags, data) = (event.flags, event.data);
            if let (LINE, Some(line)) = (data.u64(), &mut self.line) {
                let gone = flags.intersects(EventFlags::HUP | EventFlags::ERR);
                line.readable |= line.two_way && (gone || flags.contains(EventFlags::IN));
                line.open &= !gone;
            }
        }
        self.accept();
    }

    /// Takes the next program that wants to connect, if there is none. One that has gone stays until what it has sent is
    /// read, unless there is another.
    fn accept(&mut self) {
        if self.is_there() {
            return;
        }
        if let Some(stream) = self.listener.as_ref().and_then(Listener::accept)
            && watch(&self.epoll, &stream, LINE).is_ok()
        {
            let fd = stream.into();
            self.line = Some(Line { fd, two_way: true, readable: true, open: true, _modes: None });
        }
    }

    /// Writes what of `bytes` can be written now.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Written {
        // A file may take bytes again later; a program that has gone does not.
        let may_try = |line: &&mut Line| line.open || self.socket.is_none();
        let Some(line) = self.line.as_mut().filter(may_try) else { return Written::Nobody };
        loop {
            let outcome = rustix::io::write(&line.fd, bytes);
            line.open = matches!(outcome, Ok(1..) | Err(Errno::INTR | Errno::AGAIN));
            match outcome {
                Ok(count @ 1..) => return Written::Some(count),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Written::Blocked,
                Ok(0) | Err(_) => return Written::Nobody,
            }
        }
    }

    /// Whether there is somebody who takes bytes.
    pub(super) fn is_there(&self) -> bool {
        self.line.as_ref().is_some_and(|line| line.open)
    }

    /// Whether there may be something to read.
    pub(super) fn may_read(&self) -> bool {
        self.line.as_ref().is_some_and(|line| line.readable)
    }

    /// Reads what has come, as far as there is room; nothing: there is nothing now.
    pub(super) fn read(&mut self, into: &mut [u8]) -> usize {
        let Some(line) = &mut self.line else { return 0 };
        loop {
            match rustix::io::read(&line.fd, &mut *into) {
                Ok(count @ 1..) => return count,
                Err(Errno::INTR) => {}
                // One that sends no more may still listen.
                Ok(0) | Err(_) => break,
            }
        }
        line.readable = false;
        if self.socket.is_some() && !line.open {
            self.line = None;
            self.accept();
        }
        0
    }

    /// Lets go of the socket: the live side wants it.
    pub(super) fn close(&mut self) {
        if self.socket.is_some() {
            self.listener = None;
            self.line = None;
        }
    }
}

fn watch(epoll: &OwnedFd, what: impl AsFd, mark: u64) -> rustix::io::Result<()> {
    let flags = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
    epoll::add(epoll, what, EventData::new_u64(mark), flags)
}

/// Opens the file, FIFO or terminal at `path`, which is made if it is not there.
fn open(path: &Path) -> io::Result<Line> {
    let kind = std::fs::metadata(path).map(|metadata| metadata.file_type());
    // A FIFO that nobody reads yet can only be opened both ways.
    let both = kind.is_ok_and(|kind| kind.is_fifo() || kind.is_char_device());
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = OpenOptions::new().append(true).read(both).create(true).custom_flags(flags).open(path)?;
    let modes = Modes::of(&file)?;
    let two_way = modes.is_some();
    Ok(Line { fd: file.into(), two_way, readable: two_way, open: true, _modes: modes })
}

/// A terminal whose keys come one by one and unechoed: the guest echoes. Undone when dropped.
struct Modes {
    terminal: OwnedFd,
    before: Termios,
}

impl Modes {
    /// Changes the modes of `file` if it is a terminal.
    fn of(file: &File) -> io::Result<Option<Self>> {
        let Ok(before) = tcgetattr(file) else { return Ok(None) };
        let mut modes = before.clone();
        modes.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO);
        tcsetattr(file, OptionalActions::Now, &modes)?;
        Ok(Some(Self { terminal: file.as_fd().try_clone_to_owned()?, before }))
    }
}

impl Drop for Modes {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing more.
        let _ = tcsetattr(&self.terminal, OptionalActions::Now, &self.before);
    }
}
