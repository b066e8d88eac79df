//! Guest memory whose missing pages this process provides: Linux's userfaultfd (ioctl_userfaultfd(2)).
//!
//! Whoever touches a missing page of registered memory, a vCPU, a device or the kernel on their behalf, sleeps until the
//! page is there.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use mirror::memory::{GuestRam, PAGE_SIZE};
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};

/// Where a userfaultfd is had by those whom the system call refuses.
const DEVICE: &str = "/dev/userfaultfd";

// linux/userfaultfd.h
const UFFDIO: u32 = 0xaa;
const VERSION: u64 = 0xaa;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;

#[repr(C)]
struct Api {
    version: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    /// Bytes copied, or a negative error number.
    copied: i64,
}

#[repr(C)]
struct ZeroPage {
    range: Range,
    mode: u64,
    zeroed: i64,
}

ioctl_io_nr!(USERFAULTFD_IOC_NEW, UFFDIO, 0x00);
ioctl_iowr_nr!(UFFDIO_API, UFFDIO, 0x3f, Api);
ioctl_iowr_nr!(UFFDIO_REGISTER, UFFDIO, 0x00, Register);
ioctl_ior_nr!(UFFDIO_UNREGISTER, UFFDIO, 0x01, Range);
ioctl_ior_nr!(UFFDIO_WAKE, UFFDIO, 0x02, Range);
ioctl_iowr_nr!(UFFDIO_COPY, UFFDIO, 0x03, Copy);
ioctl_iowr_nr!(UFFDIO_ZEROPAGE, UFFDIO, 0x04, ZeroPage);

/// Length of a message (struct uffd_msg), and where the address of a page fault is in it.
const MESSAGE: usize = 32;
const MESSAGE_ADDRESS: usize = 16;

/// Guest memory, registered. When this is dropped, pages that are missing then are zeros, and whoever waits goes on.
#[derive(Debug)]
pub(crate) struct Userfault {
    file: File,
    /// The registered mappings, kept as long as they are registered.
    ram: Arc<GuestRam>,
}

impl Userfault {
    /// Registers all of `ram`, which must be a shared mapping of ordinary pages.
    pub(crate) fn over(ram: &Arc<GuestRam>) -> io::Result<Self> {
        let this = Self { file: open()?, ram: Arc::clone(ram) };
        let mut api = Api { version: VERSION, features: FEATURE_MISSING_SHMEM, ioctls: 0 };
        // SAFETY: the kernel reads and writes the structure that this request is defined with.
        check(unsafe { ioctl_with_mut_ref(&this.file, UFFDIO_API(), &mut api) })?;
        for region in ram.iter() {
            let range = Range { start: host(region), len: region.len() };
            let mut register = Register { range, mode: MODE_MISSING, ioctls: 0 };
            // SAFETY: the range is a mapping that `this` keeps. Registering changes what a touch of a missing page
            // waits for, and nothing that is there already.
            check(unsafe { ioctl_with_mut_ref(&this.file, UFFDIO_REGISTER(), &mut register) })?;
        }
        Ok(this)
    }

    /// The missing page that somebody waits for, if there is one.
    pub(crate) fn next_fault(&self) -> io::Result<Option<u64>> {
        let mut message = [0; MESSAGE];
        loop {
            match rustix::io::read(&self.file, &mut message) {
                Ok(MESSAGE) if message[0] == EVENT_PAGEFAULT => {
                    let bytes = &message[MESSAGE_ADDRESS..MESSAGE_ADDRESS + 8];
                    let address = u64::from_ne_bytes(bytes.try_into().unwrap_or_default());
                    return self.page_at(address).map(Some);
                }
                // No other event was asked for.
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                Err(cause) => return Err(cause.into()),
            }
        }
    }

    /// Makes `bodies` the pages from `first` on, those of them that are missing, and wakes who waits for them. All must be
    /// of one region.
    pub(crate) fn provide(&self, first: u64, bodies: &[u8]) -> io::Result<()> {
        let start = self.address(first, bodies.len() as u64)?;
        let mut done = 0;
        while done < bodies.len() {
            let left = &bodies[done..];
            let mut copy = Copy {
                dst: start + done as u64,
                src: left.as_ptr() as u64,
                len: left.len() as u64,
                mode: 0,
                copied: 0,
            };
            // SAFETY: the kernel reads `len` bytes of `left`, and fills only pages that are missing in the registered
            // memory, of which nobody can have seen anything.
            let answer = check(unsafe { ioctl_with_mut_ref(&self.file, UFFDIO_COPY(), &mut copy) });
            match answer {
                Ok(()) => return Ok(()),
                // Some of it, or none because the address space is being changed.
                Err(cause) if cause.raw_os_error() == Some(libc::EAGAIN) => {
                    done += copy.copied.max(0) as usize;
                }
                Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => {
                    self.wake(copy.dst)?;
                    done += PAGE_SIZE;
                }
                Err(cause) => return Err(cause),
            }
        }
        Ok(())
    }

    /// Makes page `page` zeros if it is missing, and wakes who waits for it.
    pub(crate) fn provide_zeros(&self, page: u64) -> io::Result<()> {
        let start = self.address(page, PAGE_SIZE as u64)?;
        loop {
            let range = Range { start, len: PAGE_SIZE as u64 };
            let mut zero = ZeroPage { range, mode: 0, zeroed: 0 };
            // SAFETY: only a page that is missing in the registered memory is filled.
            match check(unsafe { ioctl_with_mut_ref(&self.file, UFFDIO_ZEROPAGE(), &mut zero) }) {
                Err(cause) if cause.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => return self.wake(start),
                answer => return answer,
            }
        }
    }

    /// Lets memory be ordinary again: what is missing is zeros from now on, and whoever waits goes on.
    pub(crate) fn release(&self) -> io::Result<()> {
        self.ram.iter().try_for_each(|region| {
            let range = Range { start: host(region), len: region.len() };
            // SAFETY: the range was registered by `over`.
            check(unsafe { ioctl_with_ref(&self.file, UFFDIO_UNREGISTER(), &range) })
        })
    }

    fn wake(&self, start: u64) -> io::Result<()> {
        let range = Range { start, len: PAGE_SIZE as u64 };
        // SAFETY: the kernel only reads the range.
        check(unsafe { ioctl_with_ref(&self.file, UFFDIO_WAKE(), &range) })
    }

    /// Where `len` bytes from page `page` on are mapped.
    fn address(&self, page: u64, len: u64) -> io::Result<u64> {
        let mut offset = page * PAGE_SIZE as u64;
        for region in self.ram.iter() {
            if offset < region.len() {
                let fits = offset + len <= region.len();
                return if fits {
                    Ok(host(region) + offset)
                } else {
                    Err(io::ErrorKind::InvalidInput.into())
                };
            }
            offset -= region.len();
        }
        Err(io::ErrorKind::InvalidInput.into())
    }

    /// The page that is mapped at `address`.
    fn page_at(&self, address: u64) -> io::Result<u64> {
        let mut first = 0;
        for region in self.ram.iter() {
            if let Some(offset) = address.checked_sub(host(region)).filter(|&offset| offset < region.len()) {
                return Ok(first + offset / PAGE_SIZE as u64);
            }
            first += region.len() / PAGE_SIZE as u64;
        }
        Err(io::Error::other(format!("a page fault at {address:#x}, which is no guest memory")))
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn host(region: &<GuestRam as GuestMemoryBackend>::R) -> u64 {
    region.get_mmap().as_ptr() as u64
}

/// A userfaultfd that serves faults in the kernel, too: KVM's are of that kind.
fn open() -> io::Result<File> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: the descriptor changes nothing before memory is registered with it.
    let refused = match unsafe { userfaultfd(flags) } {
        Ok(fd) => return Ok(fd.into()),
        Err(cause) => cause,
    };
    let Ok(device) = File::options().read(true).write(true).open(DEVICE) else { return Err(refused.into()) };
    // SAFETY: the request takes the flags by value.
    let fd = unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), flags.bits().into()) };
    check(fd.min(0))?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

fn check(answer: i32) -> io::Result<()> {
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::{HOLE_END, Memory, layout};

    #[test]
    fn whoever_touches_a_missing_page_gets_what_is_provided() {
        let memory = Memory::new(layout(3200).unwrap(), false).unwrap();
        let userfault = Userfault::over(memory.ram()).unwrap();
        let ram = Arc::clone(memory.ram());
        let behind_the_hole = HOLE_END + 2 * PAGE_SIZE as u64;
        let reader = thread::spawn(move || ram.read_obj::<u8>(GuestAddress(behind_the_hole)).unwrap());
        let page = loop {
            rustix::event::poll(
                &mut [rustix::event::PollFd::new(&userfault, rustix::event::PollFlags::IN)],
                None,
            )
            .unwrap();
            if let Some(page) = userfault.next_fault().unwrap() {
                break page;
            }
        };
        assert_eq!(memory.layout().address(page), Some(behind_the_hole));
        // Some of them are there already the second time.
        userfault.provide(page, &[7; PAGE_SIZE]).unwrap();
        userfault.provide(page - 1, &[8; 3 * PAGE_SIZE]).unwrap();
        userfault.provide_zeros(page).unwrap();
        assert_eq!(reader.join().unwrap(), 7);
        let byte = |page| memory.ram().read_obj::<u8>(GuestAddress(memory.layout().address(page).unwrap()));
        assert_eq!([page - 1, page, page + 1].map(|page| byte(page).unwrap()), [8, 7, 8]);
        userfault.provide_zeros(page + 2).unwrap();
        assert_eq!(byte(page + 2).unwrap(), 0);
        // A run across the hole is of two regions.
        assert!(userfault.provide(page - 3, &[0; 3 * PAGE_SIZE]).is_err());
        userfault.release().unwrap();
        assert_eq!(byte(page + 3).unwrap(), 0);
    }
}
