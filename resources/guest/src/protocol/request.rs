//! What the guest's network service is asked, and answers: lines of ASCII over TCP, one request each, answered in order.

use super::LineBuffer;

/// Registers that the service keeps, each a 64-bit number, 0 at first.
pub const REGISTERS: u64 = 1024;
/// Bytes of a disk block of the service.
pub const BLOCK_BYTES: usize = 4096;
/// Longest request, in bytes, without its line end.
pub const LONGEST_REQUEST: usize = 128;

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// `get R`: answered by the register's [`Reply::Value`].
    Get {
        /// Below [`REGISTERS`].
        register: u64,
    },
    /// `set R V`: answered by [`Reply::Done`].
    Set {
        /// Below [`REGISTERS`].
        register: u64,
        /// What it becomes.
        value: u64,
    },
    /// `incr R`: adds one, answered by the register's new [`Reply::Value`].
    Increment {
        /// Below [`REGISTERS`].
        register: u64,
    },
    /// `echo TEXT`: answered by [`Reply::Echo`].
    Echo {
        /// Any text without a line end.
        text: &'a [u8],
    },
    /// `download N`: answered by [`Reply::Bytes`] and then so many bytes of [`stream_byte`].
    Download {
        /// Bytes wanted.
        bytes: u64,
    },
    /// `store B V`: writes a block that holds a number and a checksum to the disk, flushes, then answers [`Reply::Done`].
    Store {
        /// Which of the disk's blocks of [`BLOCK_BYTES`].
        block: u64,
        /// What it holds.
        value: u64,
    },
    /// `load B`: reads a block from the disk: [`Reply::Value`], or [`Reply::Refused`] if it holds no such block.
    Load {
        /// Which of the disk's blocks.
        block: u64,
    },
}

/// The answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply<'a> {
    /// `ok`.
    Done,
    /// `value V`.
    Value(u64),
    /// `echo TEXT`.
    Echo(&'a [u8]),
    /// `bytes N`: so many follow.
    Bytes(u64),
    /// `refused WHY`.
    Refused(&'a str),
}

impl<'a> Request<'a> {
    /// Reads a request, without its line end; `None` if it is none.
    #[must_use]
    pub fn parse(line: &'a [u8]) -> Option<Self> {
        if line.len() > LONGEST_REQUEST {
            return None;
        }
        if let Some(text) = line.strip_prefix(b"echo ") {
            return Some(Self::Echo { text });
        }
        let mut words = core::str::from_utf8(line).ok()?.split(' ');
        let verb = words.next()?;
        let mut number = || words.next().and_then(decimal);
        let register = |number: Option<u64>| number.filter(|register| *register < REGISTERS);
        let request = match verb {
            "get" => Self::Get { register: register(number())? },
            "set" => Self::Set { register: register(number())?, value: number()? },
            "incr" => Self::Increment { register: register(number())? },
            "download" => Self::Download { bytes: number()? },
            "store" => Self::Store { block: number()?, value: number()? },
            "load" => Self::Load { block: number()? },
            _ => return None,
        };
        words.next().is_none().then_some(request)
    }

    /// The request as bytes, line end included.
    #[must_use]
    pub fn encode(&self) -> LineBuffer {
        let mut out = LineBuffer::new();
        match *self {
            Self::Get { register } => out.text("get ").number(register),
            Self::Set { register, value } => out.text("set ").number(register).text(" ").number(value),
            Self::Increment { register } => out.text("incr ").number(register),
            Self::Echo { text } => out.text("echo ").raw(text),
            Self::Download { bytes } => out.text("download ").number(bytes),
            Self::Store { block, value } => out.text("store ").number(block).text(" ").number(value),
            Self::Load { block } => out.text("load ").number(block),
        };
        out.text("\n");
        out
    }
}

impl<'a> Reply<'a> {
    /// Reads a reply, without its line end; `None` if it is none.
    #[must_use]
    pub fn parse(line: &'a [u8]) -> Option<Self> {
        if line == b"ok" {
            return Some(Self::Done);
        }
        if let Some(text) = line.strip_prefix(b"echo ") {
            return Some(Self::Echo(text));
        }
        let (verb, rest) = core::str::from_utf8(line).ok()?.split_once(' ')?;
        match verb {
            "value" => decimal(rest).map(Self::Value),
            "bytes" => decimal(rest).map(Self::Bytes),
            "refused" => Some(Self::Refused(rest)),
            _ => None,
        }
    }

    /// The reply as bytes, line end included.
    #[must_use]
    pub fn encode(&self) -> LineBuffer {
        let mut out = LineBuffer::new();
        match *self {
            Self::Done => out.text("ok"),
            Self::Value(value) => out.text("value ").number(value),
            Self::Echo(text) => out.text("echo ").raw(text),
            Self::Bytes(bytes) => out.text("bytes ").number(bytes),
            Self::Refused(why) => out.text("refused ").text(why),
        };
        out.text("\n");
        out
    }
}

/// Byte `position` of what [`Request::Download`] sends.
#[must_use]
pub const fn stream_byte(position: u64) -> u8 {
    super::mix(position / 8).to_le_bytes()[(position % 8) as usize]
}

fn decimal(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok())?
}
