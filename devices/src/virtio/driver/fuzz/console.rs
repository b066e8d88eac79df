//! A console as a subject.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::input::Input;
use super::{Driver, Subject};
use crate::virtio::console::{COLUMNS, Console, ConsoleConfig, ConsolePlace, ROWS};
use crate::virtio::{DeviceState, VirtioDevice};

const RECEIVE: usize = 0;
const SEND: usize = 1;

/// A console on a socket, and somebody who reads and writes there at times.
pub struct ConsoleSubject {
    folder: TempDir,
    stream: Option<UnixStream>,
    seen: u64,
}

impl Default for ConsoleSubject {
    fn default() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), stream: None, seen: 0 }
    }
}

impl ConsoleSubject {
    fn connect(&mut self) {
        self.stream = UnixStream::connect(self.folder.path().join("console")).ok();
        if let Some(stream) = &self.stream {
            stream.set_nonblocking(true).unwrap();
        }
    }

    fn hang_up(&mut self) {
        if let Some(stream) = self.stream.take() {
            // Said aloud: a process that another test has just forked has the descriptor as well.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn read(&mut self) -> Vec<u8> {
        let (mut all, mut bytes) = (Vec::new(), [0; 4096]);
        while let Some(stream) = &mut self.stream {
            match stream.read(&mut bytes) {
                Ok(count @ 1..) => all.extend(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                _ => self.stream = None,
            }
        }
        self.seen += all.len() as u64;
        all
    }
}

impl Subject for ConsoleSubject {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let place = ConsolePlace::Socket(self.folder.path().join("console"));
        Box::new(Console::create(&ConsoleConfig { place, columns: COLUMNS, rows: ROWS }).unwrap())
    }

    fn request(&mut self, queue: usize, choices: &mut Input<'_>) -> (Vec<Vec<u8>>, Vec<usize>) {
        let len = 1 + usize::from(choices.word() % 6000);
        if queue == RECEIVE { (Vec::new(), vec![len]) } else { (vec![vec![b'x'; len]], Vec::new()) }
    }

    fn in_flight(&self, _state: &DeviceState, _queue: usize) -> usize {
        0
    }

    fn outside(&mut self, choices: &mut Input<'_>) {
        match choices.below(4) {
            0 if self.stream.is_none() => self.connect(),
            1 => drop(self.read()),
            2 => self.hang_up(),
            _ => {
                if let Some(stream) = &mut self.stream {
                    // As much as finds room.
                    let _ = stream.write(&vec![b'y'; choices.word().into()]);
                }
            }
        }
    }

    fn seen(&mut self) -> Vec<u8> {
        self.read();
        // What may be seen waits until somebody looks.
        if self.stream.is_none() {
            self.connect();
        }
        self.seen.to_le_bytes().into()
    }

    fn prove(&mut self, driver: &mut Driver) {
        let until = Instant::now() + Duration::from_secs(10);
        // What was written on the old connection, and never read, is not in the way of this.
        self.hang_up();
        while self.stream.is_none() {
            self.connect();
            driver.mmio.slot().ready(1);
            assert!(Instant::now() < until, "the device does not listen");
        }
        let request = driver.add(SEND, &[b"hello"], &[]);
        driver.ring(SEND);
        let (mut all, mut used) = (Vec::new(), Vec::new());
        while !all.ends_with(b"hello") || used.is_empty() {
            driver.mmio.slot().ready(0);
            all.extend(self.read());
            used.extend(driver.used(SEND));
            assert!(Instant::now() < until, "what the guest writes does not come");
            if self.stream.is_none() {
                self.connect();
            }
        }
        assert_eq!(used, [(request.head, 0)]);
        self.stream.as_mut().unwrap().write_all(b"\x01world").unwrap();
        let mut got = Vec::new();
        while !got.ends_with(b"\x01world") {
            let buffer = driver.add(RECEIVE, &[], &[4096]);
            driver.ring(RECEIVE);
            let mut used = driver.used(RECEIVE);
            while used.is_empty() {
                driver.mmio.slot().ready(0);
                used = driver.used(RECEIVE);
                assert!(Instant::now() < until, "what is written to the guest does not come");
            }
            got.extend(driver.read(buffer.writable[0].0, used[0].1 as usize));
        }
    }
}
