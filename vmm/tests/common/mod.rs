//! Tiny guests in machine code, and a console that a test can read.
#![allow(dead_code, unreachable_pub)]

pub mod pool;
pub mod snapshots;
pub mod watch;

use std::borrow::Cow;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use mirror::console::Console;
use vmm::{Boot, KernelImage, Machine, MachineConfig};

/// Where the code of a tiny guest is loaded.
pub const CODE: u64 = 0x10_0000;
/// Where tiny guests write.
pub const DATA: u64 = 0x20_0000;
/// Longer than anything takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_mins(1);

pub const SMALL: MachineConfig = MachineConfig::new(1, 16).tracked();

/// The sink of a console: sends on what is written.
struct Pipe(Sender<Vec<u8>>);

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.send(bytes.to_vec()).map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the guest has written.
pub struct Output {
    receiver: Receiver<Vec<u8>>,
    pub bytes: Vec<u8>,
}

impl Output {
    /// Waits until there are at least `count` bytes.
    pub fn wait_for(&mut self, count: usize) -> &[u8] {
        let end = Instant::now() + PATIENCE;
        while self.bytes.len() < count {
            let left = end.saturating_duration_since(Instant::now());
            let more = self.receiver.recv_timeout(left);
            self.bytes.extend(more.unwrap_or_else(|_| panic!("only {:?} came out", self.bytes)));
        }
        &self.bytes
    }

    /// Waits for more, at most `patience`.
    pub fn wait_more(&mut self, patience: Duration) {
        if let Ok(more) = self.receiver.recv_timeout(patience) {
            self.bytes.extend(more);
        }
    }

    /// What has come out by now.
    pub fn now(&mut self) -> &[u8] {
        self.bytes.extend(self.receiver.try_iter().flatten());
        &self.bytes
    }
}

pub fn console() -> (Arc<Console>, Output) {
    let (sender, receiver) = channel();
    (Console::new(Pipe(sender)).unwrap(), Output { receiver, bytes: Vec::new() })
}

/// Code that means the same in 32-bit and 64-bit mode.
#[derive(Clone, Default)]
pub struct Code(pub Vec<u8>);

impl Code {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// mov dx, port
    fn port(self, port: u16) -> Self {
        self.bytes(&[0x66, 0xba]).bytes(&port.to_le_bytes())
    }

    /// mov al, value; out dx, al
    pub fn out(self, port: u16, value: u8) -> Self {
        self.port(port).bytes(&[0xb0, value, 0xee])
    }

    pub fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out(0x3f8, byte))
    }

    pub fn exit(self, code: u8) -> Self {
        self.out(0x501, code)
    }

    /// mov al, bl; out 0x3f8
    pub fn print_bl(self) -> Self {
        self.port(0x3f8).bytes(&[0x88, 0xd8, 0xee])
    }

    /// mov edi, address; mov ecx, count; each: mov dword [edi], value; add edi, 0x1000; sub ecx, 1; jnz each
    pub fn write_pages(self, address: u64, count: u32) -> Self {
        self.bytes(&[0xbf])
            .bytes(&(address as u32).to_le_bytes())
            .bytes(&[0xb9])
            .bytes(&count.to_le_bytes())
            .bytes(&[0xc7, 0x07, 1, 2, 3, 4, 0x81, 0xc7, 0, 0x10, 0, 0, 0x83, 0xe9, 1, 0x75, 0xef])
    }

    /// Waits until the byte at `address` is not zero any more. (cmp byte [edi], 0; je back)
    pub fn wait_for_byte(self, address: u64) -> Self {
        self.bytes(&[0xbf]).bytes(&(address as u32).to_le_bytes()).bytes(&[0x80, 0x3f, 0, 0x74, 0xfb])
    }

    /// Jumps to offset `target` of the code.
    pub fn jump(self, target: usize) -> Self {
        let distance = target as i32 - (self.0.len() as i32 + 5);
        self.bytes(&[0xe9]).bytes(&distance.to_le_bytes())
    }

    /// jmp self
    pub fn spin(self) -> Self {
        self.bytes(&[0xeb, 0xfe])
    }

    /// hlt for ever
    pub fn halt(self) -> Self {
        self.bytes(&[0xf4, 0xeb, 0xfd])
    }

    /// Prints 0, 1, 2, … for ever.
    pub fn counter() -> Self {
        let code = Self::new().bytes(&[0x31, 0xdb]);
        let start = code.0.len();
        code.print_bl().bytes(&[0x83, 0xc3, 1]).jump(start)
    }
}

/// An ELF file that loads `code` at [`CODE`]; with a PVH note if `pvh`.
pub fn elf(code: &[u8], pvh: bool) -> Vec<u8> {
    let mut note = Vec::new();
    if pvh {
        note.extend([4_u32, 4, 18].iter().flat_map(|word| word.to_le_bytes()));
        note.extend(b"Xen\0");
        note.extend((CODE as u32).to_le_bytes());
    }
    let code_offset = 64 + 2 * 56 + note.len();
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend(2_u16.to_le_bytes());
    file.extend(62_u16.to_le_bytes());
    file.extend(1_u32.to_le_bytes());
    file.extend(CODE.to_le_bytes());
    file.extend(64_u64.to_le_bytes());
    file.extend(0_u64.to_le_bytes());
    file.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 2, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let mut header = |kind: u32, offset: usize, address: u64, len: usize| {
        file.extend(kind.to_le_bytes());
        file.extend(7_u32.to_le_bytes());
        for word in [offset as u64, address, address, len as u64, len as u64, 4] {
            file.extend(word.to_le_bytes());
        }
    };
    header(4, 64 + 2 * 56, 0, note.len());
    header(1, code_offset, CODE, code.len());
    file.extend(note);
    file.extend(code);
    file
}

pub fn boot(image: Vec<u8>) -> Boot {
    Boot { kernel: KernelImage::Bytes(Cow::Owned(image)), initrd: None, cmdline: String::new() }
}

/// A machine that is about to run `code`.
pub fn machine(config: &MachineConfig, code: &Code) -> (Machine, Output) {
    let (console, output) = console();
    let mut machine = Machine::create(config, console).unwrap();
    machine.load(&boot(elf(&code.0, true))).unwrap();
    (machine, output)
}
