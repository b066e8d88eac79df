//! One connection of the service: requests in, replies out, one at a time.

use smoltcp::socket::tcp;

use super::Common;
use crate::protocol::{LONGEST_REQUEST, LineBuffer, Reply, Request, fill_block, read_block, stream_byte};
use crate::virtio::Operation;

/// Room for the longest reply.
const REPLY_ROOM: usize = 256;
/// Requests answered before others get their turn.
const BATCH: usize = 64;

/// What the session is about.
#[derive(Clone, Copy)]
enum Phase {
    /// The next request.
    Ready,
    /// Sending a stream: the next byte, and its end.
    Sending { at: u64, end: u64 },
    /// A request to the disk is under way.
    Disk { operation: Operation, block: u64 },
    /// It has come to its end.
    DiskDone { operation: Operation, block: u64, well: bool },
}

/// A connection.
pub struct Session {
    line: [u8; LONGEST_REQUEST],
    len: usize,
    /// The line is longer than any request: the rest of it is thrown away.
    too_long: bool,
    phase: Phase,
}

impl Session {
    /// Before its first request.
    pub const fn new() -> Self {
        Self { line: [0; LONGEST_REQUEST], len: 0, too_long: false, phase: Phase::Ready }
    }

    /// Whether the disk is at work for it.
    pub const fn waits_for_disk(&self) -> bool {
        matches!(self.phase, Phase::Disk { .. })
    }

    /// Its request to the disk has come to its end.
    pub const fn disk_done(&mut self, well: bool) {
        if let Phase::Disk { operation, block } = self.phase {
            self.phase = Phase::DiskDone { operation, block, well };
        }
    }

    /// Does what can be done now, in slot `slot` of the disk; whether that was anything.
    pub fn serve(&mut self, slot: usize, socket: &mut tcp::Socket, common: &mut Common) -> bool {
        let mut worked = false;
        for _ in 0..BATCH {
            let room = socket.send_capacity() - socket.send_queue();
            if !socket.may_send() || room < REPLY_ROOM {
                break;
            }
            match self.phase {
                Phase::Disk { .. } => break,
                Phase::Sending { at, end } => self.send_more(socket, at, end),
                Phase::DiskDone { operation, block, well } => {
                    self.go_on_with_disk(slot, socket, common, operation, block, well);
                }
                Phase::Ready => {
                    if !self.read_line(socket) {
                        break;
                    }
                    self.answer(slot, socket, common);
                }
            }
            worked = true;
        }
        // The peer has said all it wants to say, and has its answers.
        if !socket.may_recv() && matches!(self.phase, Phase::Ready) && socket.may_send() {
            socket.close();
        }
        worked
    }

    /// Whether a whole line is there; it is then in `line`, until the next call.
    fn read_line(&mut self, socket: &mut tcp::Socket) -> bool {
        while socket.can_recv() {
            let (line, len) = (&mut self.line, &mut self.len);
            let too_long = &mut self.too_long;
            let ended = socket.recv(|bytes| {
                let end = bytes.iter().position(|byte| *byte == b'\n');
                let text = bytes.get(..end.unwrap_or(bytes.len())).unwrap_or(bytes);
                match line.get_mut(*len..*len + text.len()) {
                    Some(room) => {
                        room.copy_from_slice(text);
                        *len += text.len();
                    }
                    None => *too_long = true,
                }
                (text.len() + usize::from(end.is_some()), end.is_some())
            });
            match ended {
                Ok(true) => return true,
                Ok(false) => {}
                Err(_) => return false,
            }
        }
        false
    }

    fn answer(&mut self, slot: usize, socket: &mut tcp::Socket, common: &mut Common) {
        let line = self.line;
        let line = line.get(..core::mem::take(&mut self.len)).unwrap_or_default();
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let too_long = core::mem::take(&mut self.too_long);
        let request = if too_long { None } else { Request::parse(line) };
        let reply = match request {
            None => Reply::Refused("no such request"),
            Some(Request::Echo { text }) => Reply::Echo(text),
            Some(Request::Get { register }) => Reply::Value(*common.register(register)),
            Some(Request::Set { register, value }) => {
                *common.register(register) = value;
                Reply::Done
            }
            Some(Request::Increment { register }) => {
                let register = common.register(register);
                *register = register.wrapping_add(1);
                Reply::Value(*register)
            }
            Some(Request::Download { bytes }) => {
                self.phase = Phase::Sending { at: 0, end: bytes };
                Reply::Bytes(bytes)
            }
            Some(Request::Store { block, value }) => {
                return self.use_disk(slot, socket, common, Operation::Write, block, value);
            }
            Some(Request::Load { block }) => {
                return self.use_disk(slot, socket, common, Operation::Read, block, 0);
            }
        };
        send(socket, &reply.encode());
    }

    fn use_disk(
        &mut self,
        slot: usize,
        socket: &mut tcp::Socket,
        common: &mut Common,
        operation: Operation,
        block: u64,
        value: u64,
    ) {
        let Some(disk) = &mut common.disk else {
            return send(socket, &Reply::Refused("there is no disk").encode());
        };
        if block >= disk.blocks() {
            return send(socket, &Reply::Refused("the disk is not so large").encode());
        }
        if operation == Operation::Write {
            fill_block(disk.data(slot), block, value);
        }
        disk.begin(slot, operation, block);
        self.phase = Phase::Disk { operation, block };
    }

    fn go_on_with_disk(
        &mut self,
        slot: usize,
        socket: &mut tcp::Socket,
        common: &mut Common,
        operation: Operation,
        block: u64,
        well: bool,
    ) {
        self.phase = Phase::Ready;
        let Some(disk) = &mut common.disk else { return };
        let reply = match operation {
            _ if !well => Reply::Refused("the disk failed"),
            Operation::Write if disk.has_cache() => {
                disk.begin(slot, Operation::Flush, block);
                self.phase = Phase::Disk { operation: Operation::Flush, block };
                return;
            }
            Operation::Write | Operation::Flush => Reply::Done,
            Operation::Read => read_block(disk.data(slot), block)
                .map_or(Reply::Refused("the block holds none"), Reply::Value),
        };
        send(socket, &reply.encode());
    }

    fn send_more(&mut self, socket: &mut tcp::Socket, at: u64, end: u64) {
        let sent = socket.send(|room| {
            let len = (end - at).min(room.len() as u64) as usize;
            for (byte, position) in room.iter_mut().zip(at..end) {
                *byte = stream_byte(position);
            }
            (len, len)
        });
        let at = at + sent.unwrap_or(0) as u64;
        self.phase = if at < end { Phase::Sending { at, end } } else { Phase::Ready };
    }
}

fn send(socket: &mut tcp::Socket, line: &LineBuffer) {
    // There is room: it was looked for before the request was taken.
    let _ = socket.send_slice(line.as_bytes());
}
