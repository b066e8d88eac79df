//! The lines a guest prints: ASCII, one line each, `\n` at the end, written and parsed without `core::fmt`.

use super::{Key, MAX_CPUS};

/// One line of guest output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// `ready cpu=0 cpus=2 pages=49152`: this vCPU has filled its share of the working set.
    Ready {
        /// The vCPU that prints.
        cpu: u32,
        /// vCPUs at work.
        cpus: u32,
        /// Pages of the working set, all vCPUs together; 0 without one.
        pages: u64,
    },
    /// `count cpu=0 n=123 sum=0123456789abcdef`: step `n` of this vCPU's counter.
    Count {
        /// The vCPU that prints.
        cpu: u32,
        /// From 1, without gaps.
        n: u64,
        /// Sum over the whole counter state; see [`Counter::sum`](super::Counter::sum).
        sum: u64,
    },
    /// `verify cpu=0 pass=4 pages=24576 wrong=0 written=123456`: one completed walk over this vCPU's pages.
    Verify {
        /// The vCPU that prints.
        cpu: u32,
        /// Walks completed, from 1.
        pass: u64,
        /// Pages checked in this walk.
        pages: u64,
        /// Pages that did not hold what they must, in this walk.
        wrong: u64,
        /// Pages this vCPU has written since it was ready.
        written: u64,
    },
    /// `wrong cpu=0 page=17 want=5 found=4`: a page that does not hold what it must (at most 8 a walk are printed).
    Wrong {
        /// The vCPU that owns the page.
        cpu: u32,
        /// Number of the page among those of its vCPU.
        page: u64,
        /// Generation that it must hold.
        want: u32,
        /// Generation that its header claims; equal to `want` if the damage is elsewhere in the page.
        found: u32,
    },
    /// `exit code=0`: the guest ends.
    Exit {
        /// The byte written to the exit port next.
        code: u8,
    },
    /// `error key=cpus`: the value of this command line key cannot be honoured.
    Error {
        /// The key at fault.
        key: Key,
    },
    /// `panic vector=14 rip=… err=… cr2=…` (16 hex digits each): an exception that must not happen.
    Panic {
        /// Exception vector.
        vector: u8,
        /// Instruction that faulted.
        rip: u64,
        /// Error code of the exception, or 0.
        err: u64,
        /// Last page fault address.
        cr2: u64,
    },
}

impl Line {
    /// Reads one line, with or without its line end. `None` if it is not exactly what a guest writes.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.strip_suffix('\n').unwrap_or(text);
        let text = text.strip_suffix('\r').unwrap_or(text);
        let (kind, rest) = text.split_once(' ')?;
        let mut fields = Fields(rest);
        let line = match kind {
            "ready" => Self::Ready {
                cpu: fields.cpu()?,
                cpus: fields.decimal("cpus")?,
                pages: fields.decimal("pages")?,
            },
            "count" => Self::Count { cpu: fields.cpu()?, n: fields.decimal("n")?, sum: fields.hex("sum")? },
            "verify" => Self::Verify {
                cpu: fields.cpu()?,
                pass: fields.decimal("pass")?,
                pages: fields.decimal("pages")?,
                wrong: fields.decimal("wrong")?,
                written: fields.decimal("written")?,
            },
            "wrong" => Self::Wrong {
                cpu: fields.cpu()?,
                page: fields.decimal("page")?,
                want: fields.decimal("want")?,
                found: fields.decimal("found")?,
            },
            "exit" => Self::Exit { code: fields.decimal("code")? },
            "error" => Self::Error { key: Key::from_name(fields.value("key")?)? },
            "panic" => Self::Panic {
                vector: fields.decimal("vector")?,
                rip: fields.hex("rip")?,
                err: fields.hex("err")?,
                cr2: fields.hex("cr2")?,
            },
            _ => return None,
        };
        // Writing it again leaves no room for signs, leading zeroes or words at the end.
        let written = line.encode();
        (written.as_bytes().strip_suffix(b"\n") == Some(text.as_bytes())).then_some(line)
    }

    /// The line as bytes, line end included.
    #[must_use]
    pub fn encode(&self) -> LineBuffer {
        let mut out = LineBuffer::new();
        match *self {
            Self::Ready { cpu, cpus, pages } => out
                .text("ready")
                .decimal("cpu", cpu.into())
                .decimal("cpus", cpus.into())
                .decimal("pages", pages),
            Self::Count { cpu, n, sum } => {
                out.text("count").decimal("cpu", cpu.into()).decimal("n", n).hex("sum", sum)
            }
            Self::Verify { cpu, pass, pages, wrong, written } => out
                .text("verify")
                .decimal("cpu", cpu.into())
                .decimal("pass", pass)
                .decimal("pages", pages)
                .decimal("wrong", wrong)
                .decimal("written", written),
            Self::Wrong { cpu, page, want, found } => out
                .text("wrong")
                .decimal("cpu", cpu.into())
                .decimal("page", page)
                .decimal("want", want.into())
                .decimal("found", found.into()),
            Self::Exit { code } => out.text("exit").decimal("code", code.into()),
            Self::Error { key } => out.text("error key=").text(key.name()),
            Self::Panic { vector, rip, err, cr2 } => out
                .text("panic")
                .decimal("vector", vector.into())
                .hex("rip", rip)
                .hex("err", err)
                .hex("cr2", cr2),
        };
        out.text("\n");
        out
    }
}

/// The fields of a line that are still to be read, in their fixed order.
struct Fields<'a>(&'a str);

impl<'a> Fields<'a> {
    fn value(&mut self, name: &str) -> Option<&'a str> {
        let (field, rest) = self.0.split_once(' ').unwrap_or((self.0, ""));
        self.0 = rest;
        field.strip_prefix(name)?.strip_prefix('=')
    }

    fn decimal<T: core::str::FromStr>(&mut self, name: &str) -> Option<T> {
        self.value(name)?.parse().ok()
    }

    fn cpu(&mut self) -> Option<u32> {
        self.decimal("cpu").filter(|cpu| *cpu < MAX_CPUS)
    }

    fn hex(&mut self, name: &str) -> Option<u64> {
        u64::from_str_radix(self.value(name)?, 16).ok()
    }
}

/// A line on its way out: a fixed buffer, longer than any line can get.
pub struct LineBuffer {
    bytes: [u8; Self::CAPACITY],
    len: usize,
}

impl LineBuffer {
    /// The longest line is `echo` with a text of 128 bytes: 134 bytes.
    const CAPACITY: usize = 160;

    pub(super) const fn new() -> Self {
        Self { bytes: [0; Self::CAPACITY], len: 0 }
    }

    /// What was written so far.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or(&self.bytes)
    }

    fn byte(&mut self, byte: u8) {
        if let Some(slot) = self.bytes.get_mut(self.len) {
            *slot = byte;
            self.len += 1;
        }
    }

    pub(super) fn text(&mut self, text: &str) -> &mut Self {
        self.raw(text.as_bytes())
    }

    pub(super) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        for byte in bytes {
            self.byte(*byte);
        }
        self
    }

    fn name(&mut self, name: &str) {
        self.text(" ").text(name).text("=");
    }

    fn decimal(&mut self, name: &str, value: u64) -> &mut Self {
        self.name(name);
        self.number(value)
    }

    pub(super) fn number(&mut self, value: u64) -> &mut Self {
        let mut power = 1;
        while value / power >= 10 {
            power *= 10;
        }
        while power > 0 {
            self.byte(b'0' + (value / power % 10) as u8);
            power /= 10;
        }
        self
    }

    fn hex(&mut self, name: &str, value: u64) -> &mut Self {
        self.name(name);
        for place in (0..16).rev() {
            let digit = (value >> (4 * place) & 0xf) as u8;
            self.byte(if digit < 10 { b'0' + digit } else { b'a' + digit - 10 });
        }
        self
    }
}
