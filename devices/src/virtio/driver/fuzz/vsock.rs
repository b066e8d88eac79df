//! A socket device as a subject.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::input::Input;
use super::{Driver, Subject};
use crate::virtio::vsock::{Vsock, VsockConfig};
use crate::virtio::{DeviceState, VirtioDevice};

const CID: u8 = 3;
const RECEIVE: usize = 0;
const SEND: usize = 1;
/// Ports of the host that programs listen on.
const PORTS: [u32; 2] = [7, 8];
/// Most connections that programs keep.
const MAX_STREAMS: usize = 32;

/// A socket device, and programs of the host.
pub struct VsockSubject {
    folder: TempDir,
    listeners: Vec<UnixListener>,
    streams: Vec<UnixStream>,
    /// What has come from the guest: connections, bytes.
    seen: (u64, u64),
}

impl Default for VsockSubject {
    fn default() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listen = |port| {
            let listener = UnixListener::bind(folder.path().join(format!("vsock_{port}"))).unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        };
        let listeners = PORTS.into_iter().map(listen).collect();
        Self { folder, listeners, streams: Vec::new(), seen: (0, 0) }
    }
}

/// A packet from port `guest` to port `host`.
fn packet(host: u32, guest: u32, op: u16, flags: u32, data: &[u8]) -> Vec<Vec<u8>> {
    let mut header = vec![CID, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];
    header.extend(guest.to_le_bytes());
    header.extend(host.to_le_bytes());
    header.extend((data.len() as u32).to_le_bytes());
    header.extend([1, 0]);
    header.extend(op.to_le_bytes());
    header.extend(flags.to_le_bytes());
    header.extend(0x1_0000_u32.to_le_bytes());
    header.extend([0; 4]);
    vec![header, data.to_vec()]
}

impl VsockSubject {
    fn call(&mut self, request: &[u8]) {
        if self.streams.len() < MAX_STREAMS
            && let Ok(mut stream) = UnixStream::connect(self.folder.path().join("vsock"))
        {
            stream.set_nonblocking(true).unwrap();
            // The device may be gone.
            let _ = stream.write_all(request);
            self.streams.push(stream);
        }
    }

    fn hear(&mut self) {
        for listener in &self.listeners {
            while let Ok((stream, _)) = listener.accept() {
                self.seen.0 += 1;
                stream.set_nonblocking(true).unwrap();
                self.streams.push(stream);
            }
        }
        let seen = &mut self.seen.1;
        let mut bytes = vec![0; 1 << 16];
        self.streams.retain_mut(|stream| {
            loop {
                match stream.read(&mut bytes) {
                    Ok(0) => return false,
                    Ok(count) => *seen += count as u64,
                    Err(error) => return error.kind() == ErrorKind::WouldBlock,
                }
            }
        });
    }
}

impl Subject for VsockSubject {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let uds_path = self.folder.path().join("vsock");
        Box::new(Vsock::create(&VsockConfig { guest_cid: CID.into(), uds_path }).unwrap())
    }

    fn request(&mut self, queue: usize, choices: &mut Input<'_>) -> (Vec<Vec<u8>>, Vec<usize>) {
        match queue {
            RECEIVE => (Vec::new(), vec![44, 1 + usize::from(choices.word() % 4096)]),
            SEND => {
                // Of connections that the guest has asked for, or the host: those are counted from 2^30 on.
                let host = match choices.below(8) {
                    port @ 0..=4 => PORTS[port % 2],
                    port => (1 << 30) + port as u32 - 5,
                };
                let guest = if host < 1 << 30 { 1000 + u32::from(choices.byte() % 4) } else { 52 };
                let op = [1, 1, 2, 2, 3, 4, 5, 5, 5, 5, 6, 7][choices.below(12)];
                let len = if op == 5 { usize::from(choices.word() % 5000) } else { 0 };
                (packet(host, guest, op, u32::from(choices.byte() % 4), &vec![0x55; len]), Vec::new())
            }
            _ => (Vec::new(), vec![4]),
        }
    }

    fn in_flight(&self, state: &DeviceState, queue: usize) -> usize {
        let DeviceState::Vsock(state) = state else { panic!("another device's state: {state:?}") };
        if queue == SEND { state.in_flight.len() } else { 0 }
    }

    fn outside(&mut self, choices: &mut Input<'_>) {
        let which = choices.below(self.streams.len());
        match choices.below(10) {
            0..=2 => self.call(b"CONNECT 52\n"),
            3 => self.call(choices.rest()),
            4..=6 => {
                let len = usize::from(choices.word() % 9000);
                if let Some(stream) = self.streams.get_mut(which) {
                    // As much as finds room.
                    let _ = stream.write(&vec![0x66; len]);
                }
            }
            7 if which < self.streams.len() => drop(self.streams.swap_remove(which)),
            _ => self.hear(),
        }
    }

    fn seen(&mut self) -> Vec<u8> {
        self.hear();
        [self.seen.0.to_le_bytes(), self.seen.1.to_le_bytes()].concat()
    }

    fn prove(&mut self, driver: &mut Driver) {
        const PORT: u32 = 777;
        let until = Instant::now() + Duration::from_secs(10);
        let buffers: Vec<_> = (0..32).map(|_| driver.add(RECEIVE, &[], &[44, 256])).collect();
        driver.ring(RECEIVE);
        self.streams.clear();
        while self.streams.is_empty() {
            driver.mmio.slot().ready(1);
            self.call(format!("CONNECT {PORT}\n").as_bytes());
            assert!(Instant::now() < until, "the device does not listen");
        }
        let mut stream = self.streams.pop().unwrap();
        let received = |driver: &mut Driver, op: u8| {
            loop {
                driver.mmio.slot().ready(0);
                for (head, _) in driver.used(RECEIVE) {
                    let buffer = buffers.iter().find(|buffer| buffer.head == head).unwrap();
                    let header = driver.read(buffer.writable[0].0, 44);
                    if header[20..24] == PORT.to_le_bytes() && header[30] == op {
                        let host = u32::from_le_bytes(header[16..20].try_into().unwrap());
                        return (host, driver.read(buffer.writable[1].0, 5));
                    }
                }
                assert!(Instant::now() < until, "no packet of kind {op} comes");
            }
        };
        let (host, _) = received(driver, 1);
        for parts in [packet(host, PORT, 2, 0, &[]), packet(host, PORT, 5, 0, b"hello")] {
            driver.add(SEND, &[&parts[0], &parts[1]], &[]);
            driver.ring(SEND);
        }
        let expected = format!("OK {host}\nhello");
        let mut line: Vec<u8> = Vec::new();
        while line.len() < expected.len() {
            let mut bytes = [0; 64];
            match stream.read(&mut bytes) {
                Ok(count @ 1..) => line.extend(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => driver.mmio.slot().ready(0),
                other => panic!("the connection ends: {other:?}"),
            }
            assert!(Instant::now() < until, "the guest is not heard");
        }
        assert_eq!(line, expected.as_bytes());
        stream.write_all(b"world").unwrap();
        assert_eq!(received(driver, 5).1, b"world");
        driver.check_changes_are_marked();
    }
}
