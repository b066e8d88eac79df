//! Putting a kernel into guest memory, and the first vCPU at its entry.

mod acpi;
mod bzimage;
mod elf;
mod initrd;
mod linux64;
mod map;
mod mptable;
mod pvh;
mod segments;

use std::borrow::Cow;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::PathBuf;

use kvm_bindings::{kvm_regs, kvm_sregs};
use linux_loader::loader::bootparam::setup_header;
use mirror::memory::{GuestRam, Layout};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, ReadVolatile};

use self::initrd::Initrd;
use crate::platform::MmioWindow;

/// Longest command line in bytes, without the NUL at its end, for a kernel that does not say (`COMMAND_LINE_SIZE` of
/// x86).
pub const MAX_CMDLINE: usize = 2047;

/// Where the command line is put.
const CMDLINE_ADDRESS: u64 = 0x2_0000;
/// Room for it.
const CMDLINE_ROOM: usize = 0x1_0000;

/// What to boot.
#[derive(Clone, Debug)]
pub struct Boot {
    /// The kernel.
    pub kernel: KernelImage,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// How a guest learns of its processors and virtio devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discovery {
    /// By ACPI tables.
    Acpi,
    /// By an MP table and by words on the kernel's command line.
    CommandLine,
}

impl Boot {
    /// A kernel that is told to leave ACPI alone, and the small guest that comes with the program, have no use for
    /// tables.
    pub fn discovery(&self) -> Discovery {
        let without_acpi = self.cmdline.split_ascii_whitespace().any(|word| word == "acpi=off");
        if without_acpi || matches!(self.kernel, KernelImage::Bytes(_)) {
            Discovery::CommandLine
        } else {
            Discovery::Acpi
        }
    }
}

/// The command line with a word for each virtio device (Linux, `virtio_mmio.device=`).
fn with_devices(cmdline: &str, windows: &[MmioWindow]) -> String {
    windows.iter().fold(cmdline.to_owned(), |mut line, MmioWindow { base, len, gsi }| {
        // Writing to a string does not fail.
        let _ = write!(line, " virtio_mmio.device={}K@{base:#x}:{gsi}", len >> 10);
        line
    })
}

/// Where a kernel comes from: an ELF file (by PVH if it has a PVH note, else by the 64-bit Linux entry) or a bzImage.
#[derive(Clone, Debug)]
pub enum KernelImage {
    /// A file.
    Path(PathBuf),
    /// The bytes of one.
    Bytes(Cow<'static, [u8]>),
}

/// Why a kernel cannot be booted.
#[derive(Debug, Error)]
pub enum BootError {
    /// The kernel file cannot be read.
    #[error("cannot read the kernel {path}: {cause}")]
    OpenKernel {
        /// The file.
        path: PathBuf,
        /// What the system answered.
        cause: io::Error,
    },
    /// It is no kernel.
    #[error("the kernel is neither an x86-64 ELF file nor a bzImage: {0}")]
    NotAKernel(String),
    /// It ends too early.
    #[error("the kernel is truncated: {0}")]
    Truncated(String),
    /// Reading it fails.
    #[error("reading the kernel: {0}")]
    ReadKernel(#[from] io::Error),
    /// The loader refuses it.
    #[error("loading the kernel: {0}")]
    Load(#[from] linux_loader::loader::Error),
    /// It does not fit guest memory.
    #[error(
        "the kernel needs guest memory from {start:#x} to {end:#x}, and this guest has {room}: give it more memory"
    )]
    KernelFit {
        /// Guest physical start.
        start: u64,
        /// Guest physical end.
        end: u64,
        /// What there is.
        room: String,
    },
    /// Its entry lies outside of memory.
    #[error("the kernel's entry {0:#x} lies outside of guest memory")]
    Entry(u64),
    /// A bzImage without 64-bit entry.
    #[error(
        "the bzImage has no 64-bit entry (boot protocol {version:#x}, xloadflags {flags:#x}); a 64-bit kernel of Linux 3.8 or later is needed"
    )]
    No64BitEntry {
        /// Boot protocol version.
        version: u16,
        /// The flags.
        flags: u16,
    },
    /// The command line is too long.
    #[error("the command line has {len} bytes, more than the {max} that this kernel takes")]
    CmdlineLength {
        /// Its length.
        len: usize,
        /// Most that the kernel takes.
        max: usize,
    },
    /// The command line has a NUL in it.
    #[error("the command line has a NUL byte in it")]
    CmdlineNul,
    /// The initial RAM disk cannot be read.
    #[error("cannot read the initrd {path}: {cause}")]
    Initrd {
        /// The file.
        path: PathBuf,
        /// What the system answered.
        cause: io::Error,
    },
    /// The initial RAM disk does not fit guest memory.
    #[error(
        "the initrd of {len} bytes does not fit between the kernel's end at {low:#x} and {high:#x}: give the guest more memory"
    )]
    InitrdFit {
        /// Its length.
        len: u64,
        /// End of the kernel.
        low: u64,
        /// End of the memory that it may use.
        high: u64,
    },
    /// What the loader writes does not fit.
    #[error("writing boot information to guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// How the first vCPU starts.
pub(crate) struct Entry {
    pub(crate) regs: kvm_regs,
    pub(crate) sregs: kvm_sregs,
}

/// What a kernel is told at its entry.
struct Told {
    initrd: Option<Initrd>,
    cmdline_len: usize,
    /// Where ACPI's tables begin; 0 without them.
    rsdp: u64,
}

/// A kernel in guest memory.
struct Loaded {
    protocol: Protocol,
    /// First byte behind the kernel and what it uses before it knows of the memory map.
    end: u64,
}

/// How a kernel is entered.
enum Protocol {
    /// In 32-bit mode with a start-info structure.
    Pvh { entry: u64 },
    /// In 64-bit mode with a zero page.
    Linux64 { entry: u64, header: Option<setup_header> },
}

/// Loads `boot` into the fresh memory `ram`. `sregs` are those of the first vCPU after reset.
///
/// # Errors
/// [`BootError`]; guest memory then holds part of it.
pub(crate) fn load(
    boot: &Boot,
    ram: &GuestRam,
    layout: &Layout,
    (vcpus, windows): (u8, &[MmioWindow]),
    sregs: &kvm_sregs,
) -> Result<Entry, BootError> {
    let loaded = match &boot.kernel {
        KernelImage::Path(path) => {
            let open = || -> io::Result<File> {
                if !std::fs::metadata(path)?.is_file() {
                    return Err(io::Error::other("it is not a file"));
                }
                File::open(path)
            };
            let mut file = open().map_err(|cause| BootError::OpenKernel { path: path.clone(), cause })?;
            load_kernel(&mut file, ram, layout)?
        }
        KernelImage::Bytes(bytes) => load_kernel(&mut Cursor::new(&bytes[..]), ram, layout)?,
    };
    let header = match &loaded.protocol {
        Protocol::Linux64 { header, .. } => *header,
        Protocol::Pvh { .. } => None,
    };
    let max_cmdline = header.map_or(MAX_CMDLINE, |header| header.cmdline_size as usize);
    let cmdline = match boot.discovery() {
        Discovery::Acpi => boot.cmdline.clone(),
        Discovery::CommandLine => with_devices(&boot.cmdline, windows),
    };
    write_cmdline(ram, &cmdline, max_cmdline.min(CMDLINE_ROOM - 1))?;
    let initrd_limit = header.map_or(u64::MAX, |header| u64::from(header.initrd_addr_max) + 1);
    let initrd = match &boot.initrd {
        Some(path) => Some(initrd::load(path, ram, layout, loaded.end, initrd_limit)?),
        None => None,
    };
    let rsdp = match boot.discovery() {
        Discovery::Acpi => acpi::write(ram, vcpus, windows)?,
        Discovery::CommandLine => {
            mptable::write(ram, vcpus)?;
            0
        }
    };
    segments::write_gdt(ram)?;
    let told = Told { initrd, cmdline_len: cmdline.len(), rsdp };
    match loaded.protocol {
        Protocol::Pvh { entry } => pvh::prepare(ram, layout, entry, &told, sregs),
        Protocol::Linux64 { entry, header } => linux64::prepare(ram, layout, entry, header, &told, sregs),
    }
}

fn load_kernel<F>(image: &mut F, ram: &GuestRam, layout: &Layout) -> Result<Loaded, BootError>
where
    F: Read + ReadVolatile + Seek,
{
    let len = image.seek(SeekFrom::End(0))?;
    image.rewind()?;
    let mut magic = [0; 4];
    if len < magic.len() as u64 {
        return Err(BootError::Truncated(format!("it has {len} bytes")));
    }
    image.read_exact(&mut magic)?;
    if magic == elf::MAGIC {
        elf::load(image, len, ram, layout)
    } else {
        bzimage::load(image, len, ram, layout)
    }
}

fn write_cmdline(ram: &GuestRam, cmdline: &str, max: usize) -> Result<(), BootError> {
    if cmdline.len() > max {
        return Err(BootError::CmdlineLength { len: cmdline.len(), max });
    }
    if cmdline.contains('\0') {
        return Err(BootError::CmdlineNul);
    }
    ram.write_slice(cmdline.as_bytes(), GuestAddress(CMDLINE_ADDRESS))?;
    ram.write_slice(&[0], GuestAddress(CMDLINE_ADDRESS + cmdline.len() as u64))?;
    Ok(())
}
