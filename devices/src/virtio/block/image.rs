//! A disk image: a raw file, a block device, or qcow2.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use rustix::fs::{FallocateFlags, fallocate, fdatasync};
use thiserror::Error;

use super::config::ImageFormat;
use super::request::{Operation, SECTOR};
use crate::virtio::chain::Chain;
use crate::virtio::iovec::IoVecs;

/// How a qcow2 image begins.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// Why an image cannot be used.
#[derive(Debug, Error)]
pub enum ImageError {
    /// It cannot be opened.
    #[error("cannot open the disk image {path} for {}: {cause}", if *.writable { "reading and writing" } else { "reading" })]
    Open {
        /// Which.
        path: PathBuf,
        /// Whether it was to be written.
        writable: bool,
        /// What the system answered.
        cause: io::Error,
    },
    /// It is no file and no block device.
    #[error("the disk image {path} is neither a file nor a block device")]
    Kind {
        /// Which.
        path: PathBuf,
    },
    /// Its length is no number of sectors.
    #[error("the disk image {path} has {len} bytes, which is not a multiple of {SECTOR}: append zeros to it")]
    Length {
        /// Which.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
}

/// An open image.
pub(super) struct Image {
    format: Format,
    file: Arc<File>,
    /// What was written is on stable storage before it counts as done.
    write_through: AtomicBool,
}

enum Format {
    /// The file has the bytes of the disk.
    Raw,
    /// One request at a time: its tables are shared. It has opened the file once more.
    Qcow2(Box<Mutex<FormatAccess<imago::file::File>>>),
}

impl Image {
    /// Opens the image at `path`. Both sides of a mirrored guest have a shared image open; see [`super::fence`].
    pub(super) fn open(path: &Path, format: ImageFormat, writable: bool) -> Result<Self, ImageError> {
        let failed = |cause| ImageError::Open { path: path.into(), writable, cause };
        let mut file = OpenOptions::new().read(true).write(writable).open(path).map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !std::os::unix::fs::FileTypeExt::is_block_device(&kind) {
            return Err(ImageError::Kind { path: path.into() });
        }
        let is_qcow2 = match format {
            ImageFormat::Raw => false,
            ImageFormat::Qcow2 => true,
            ImageFormat::Detect => {
                let mut magic = [0; 4];
                let read = file.read(&mut magic).map_err(failed)?;
                read == magic.len() && magic == QCOW2_MAGIC
            }
        };
        let (file, write_through) = (Arc::new(file), AtomicBool::new(false));
        if !is_qcow2 {
            return Ok(Self { format: Format::Raw, file, write_through });
        }
        let image = Qcow2::<imago::file::File>::builder_path(path)
            .write(writable)
            .open(PermissiveImplicitOpenGate::default())
            .map_err(failed)?;
        let format = Format::Qcow2(Box::new(Mutex::new(FormatAccess::new(image))));
        Ok(Self { format, file, write_through })
    }

    /// Length in bytes.
    pub(super) fn len(&self) -> io::Result<u64> {
        match &self.format {
            Format::Raw => (&*self.file).seek(SeekFrom::End(0)),
            Format::Qcow2(image) => Ok(locked(image).size()),
        }
    }

    /// The open file; of a raw image the very one through which it is written to.
    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Whether the file has the bytes of the disk.
    pub(super) fn is_raw(&self) -> bool {
        matches!(self.format, Format::Raw)
    }

    /// From now on what is written is on stable storage before it counts as done, or no longer so.
    pub(super) fn set_write_through(&self, write_through: bool) {
        self.write_through.store(write_through, Ordering::Release);
    }

    /// Whether what is written is on stable storage before it counts as done.
    pub(super) fn writes_through(&self) -> bool {
        self.write_through.load(Ordering::Acquire)
    }

    /// Carries out `operation` on the bytes of `chain`, in the calling thread.
    pub(super) fn carry_out(&self, operation: Operation, chain: &Chain) -> io::Result<()> {
        let through = self.writes_through();
        match &self.format {
            Format::Raw => raw(&self.file, operation, chain, through),
            Format::Qcow2(image) => {
                let mut image = locked(image);
                qcow2(&mut image, operation, chain)?;
                if through && operation.changes_the_image() { image.sync() } else { Ok(()) }
            }
        }
    }

    /// Whether what was read of the image when it was opened becomes wrong when somebody else writes to it.
    pub(super) fn remembers(&self) -> bool {
        !self.is_raw()
    }

    /// How many requests can be carried out at once with use.
    pub(super) fn parallelism(&self) -> usize {
        match self.format {
            Format::Raw => 4,
            Format::Qcow2(_) => 1,
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The bytes of a read or write as the kernel takes them.
pub(super) fn vectors(operation: Operation, chain: &Chain) -> Option<IoVecs> {
    match operation {
        Operation::Read { len, .. } => Some(IoVecs::writable(chain, 0, len)),
        // Behind the header.
        Operation::Write { len, .. } => Some(IoVecs::readable(chain, 16, len)),
        _ => None,
    }
}

/// How fallocate makes a hole or zeros.
pub(super) fn zeroing(unmap: bool) -> FallocateFlags {
    let how = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
    how | FallocateFlags::KEEP_SIZE
}

/// How a write is to be carried out (pwritev2(2)).
pub(super) fn write_flags(through: bool) -> libc::c_int {
    if through { libc::RWF_DSYNC } else { 0 }
}

fn raw(file: &File, operation: Operation, chain: &Chain, through: bool) -> io::Result<()> {
    match operation {
        Operation::Read { at, len } => {
            let vectors = IoVecs::writable(chain, 0, len);
            let count = vector_call(&vectors, |pointer, count| {
                // SAFETY: the vectors lead to guest memory, which `vectors` keeps mapped; no Rust reference to it exists.
                unsafe { libc::preadv(file.as_raw_fd(), pointer, count, at as libc::off_t) }
            })?;
            vectors.mark_dirty(count);
            whole(count, len)
        }
        Operation::Write { at, len } => {
            let vectors = IoVecs::readable(chain, 16, len);
            let count = vector_call(&vectors, |pointer, count| {
                // SAFETY: as above; the kernel only reads.
                unsafe {
                    libc::pwritev2(file.as_raw_fd(), pointer, count, at as libc::off_t, write_flags(through))
                }
            })?;
            whole(count, len)
        }
        Operation::Flush => Ok(fdatasync(file)?),
        Operation::Discard { at, len } => Ok(fallocate(file, zeroing(true), at, len)?),
        Operation::Zero { at, len, unmap } => {
            fallocate(file, zeroing(unmap), at, len)?;
            if through { Ok(fdatasync(file)?) } else { Ok(()) }
        }
    }
}

fn vector_call(
    vectors: &IoVecs,
    call: impl Fn(*const libc::iovec, libc::c_int) -> isize,
) -> io::Result<usize> {
    let slice = vectors.as_slice();
    loop {
        if let Ok(count) = usize::try_from(call(slice.as_ptr(), slice.len() as libc::c_int)) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// An image that has become shorter, or a disk that is full, carries out a part.
pub(super) fn whole(count: usize, len: u32) -> io::Result<()> {
    if count == len as usize { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// What changes the image is in its file before it counts as done, with the tables that lead to it: whoever goes on with the
/// guest when this process is gone opens that file.
/// Calls `copy` with the offset of each piece of `len` bytes and room for it: a guest may ask for gigabytes at once.
fn in_pieces(len: u32, mut copy: impl FnMut(u32, &mut [u8]) -> io::Result<()>) -> io::Result<()> {
    const PIECE: u32 = 1 << 20;
    let mut bytes = vec![0; len.min(PIECE) as usize];
    for offset in (0..len).step_by(PIECE as usize) {
        copy(offset, &mut bytes[..(len - offset).min(PIECE) as usize])?;
    }
    Ok(())
}

fn qcow2(image: &mut FormatAccess<imago::file::File>, operation: Operation, chain: &Chain) -> io::Result<()> {
    match operation {
        Operation::Read { at, len } => in_pieces(len, |offset, bytes| {
            image.read(&mut *bytes, at + u64::from(offset))?;
            chain.write(offset, bytes);
            Ok(())
        }),
        Operation::Write { at, len } => {
            in_pieces(len, |offset, bytes| {
                chain.read(16 + offset, bytes);
                image.write(&*bytes, at + u64::from(offset))
            })?;
            image.flush()
        }
        Operation::Flush => {
            image.flush()?;
            image.sync()
        }
        Operation::Discard { at, len } => {
            image.discard_to_any(at, len)?;
            image.flush()
        }
        Operation::Zero { at, len, unmap: true } => {
            image.discard_to_zero(at, len)?;
            image.flush()
        }
        Operation::Zero { at, len, unmap: false } => {
            image.write_zeroes(at, len)?;
            image.flush()
        }
    }
}
