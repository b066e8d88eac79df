//! Who carries requests out: they are handed in, and come back when they are done.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use io_uring::{IoUring, opcode, types};
use vmm_sys_util::eventfd::EventFd;

use super::image::{Image, vectors, whole, write_flags, zeroing};
use super::request::Operation;
use crate::virtio::chain::Chain;
use crate::virtio::iovec::IoVecs;

/// A request for the image.
pub(super) struct Job {
    pub(super) operation: Operation,
    pub(super) chain: Chain,
    /// What is written, if it is to be a copy of what the guest's memory holds; empty otherwise.
    pub(super) bytes: Vec<u8>,
    /// It has been carried out, and is being made durable.
    pub(super) synced: bool,
}

/// A request that has come to its end.
pub(super) struct Done {
    pub(super) job: Job,
    pub(super) result: io::Result<()>,
}

/// Carries requests out beside the device loop.
pub(super) trait Engine: Send {
    /// Takes a request. At most as many are under way as the engine was made for.
    fn submit(&mut self, job: Job);

    /// Lets begin what was submitted since the last call.
    fn begin(&mut self);

    /// Moves what is done to `done`.
    fn collect(&mut self, done: &mut VecDeque<Done>);

    /// Waits until nothing is under way. What is done is collected later.
    fn wait(&mut self);
}

/// io_uring on a raw image.
pub(super) struct Ring {
    uring: IoUring,
    image: Arc<Image>,
    fd: RawFd,
    finished: EventFd,
    /// By number, which io_uring carries along.
    under_way: Vec<Option<(Job, Option<IoVecs>)>>,
    /// Zeros that are there and are to be made durable.
    to_sync: Vec<usize>,
    free: Vec<usize>,
    done: VecDeque<Done>,
}

impl Ring {
    /// For up to `depth` requests at once, each of which is counted by `finished`; `None` if the image is not raw.
    ///
    /// # Errors
    /// The kernel has no io_uring for this process.
    pub(super) fn new(image: &Arc<Image>, depth: u16, finished: &EventFd) -> io::Result<Option<Self>> {
        if !image.is_raw() {
            return Ok(None);
        }
        let ring = IoUring::new(u32::from(depth))?;
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let wanted =
            [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
        if !wanted.iter().all(|&code| probe.is_supported(code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let finished = finished.try_clone()?;
        ring.submitter().register_eventfd(finished.as_raw_fd())?;
        Ok(Some(Self {
            uring: ring,
            fd: image.file().as_raw_fd(),
            image: Arc::clone(image),
            finished,
            under_way: (0..depth).map(|_| None).collect(),
            to_sync: Vec::new(),
            free: (0..usize::from(depth)).collect(),
            done: VecDeque::new(),
        }))
    }

    fn reap(&mut self) {
        for completion in self.uring.completion() {
            let number = completion.user_data() as usize;
            let Some((mut job, vectors)) = self.under_way.get_mut(number).and_then(Option::take) else {
                continue;
            };
            let zeros = matches!(job.operation, Operation::Zero { .. });
            if zeros && completion.result() >= 0 && self.image.writes_through() && !job.synced {
                job.synced = true;
                self.under_way[number] = Some((job, None));
                self.to_sync.push(number);
                continue;
            }
            self.free.push(number);
            let result = match (completion.result(), job.operation) {
                (errno @ ..0, _) => Err(io::Error::from_raw_os_error(-errno)),
                (count, Operation::Read { len, .. }) => {
                    if let Some(vectors) = &vectors {
                        vectors.mark_dirty(count as usize);
                    }
                    whole(count as usize, len)
                }
                (count, Operation::Write { len, .. }) => whole(count as usize, len),
                _ => Ok(()),
            };
            self.done.push_back(Done { job, result });
        }
        while let Some(number) = self.to_sync.pop() {
            let fsync = opcode::Fsync::new(types::Fd(self.fd)).flags(types::FsyncFlags::DATASYNC).build();
            self.push(number, &fsync.user_data(number as u64));
        }
    }

    /// Hands over `entry` of request `number`.
    fn push(&mut self, number: usize, entry: &io_uring::squeue::Entry) {
        // SAFETY: descriptor, vectors and the memory they lead to are kept in `under_way` until the request has completed
        // (also when this is dropped, which waits).
        let pushed = unsafe { self.uring.submission().push(entry) };
        if pushed.is_err()
            && let Some((job, _)) = self.under_way[number].take()
        {
            self.free.push(number);
            self.done.push_back(Done { job, result: Err(io::ErrorKind::ResourceBusy.into()) });
        }
    }
}

impl Engine for Ring {
    fn submit(&mut self, job: Job) {
        let Some(number) = self.free.pop() else {
            // The device never has more under way than the ring was made for.
            self.done.push_back(Done { job, result: Err(io::ErrorKind::ResourceBusy.into()) });
            return;
        };
        let vectors = vectors(job.operation, &job.chain);
        let slice = vectors.as_ref().map_or(&[][..], IoVecs::as_slice);
        let (pointer, count) = (slice.as_ptr(), slice.len() as u32);
        let fd = types::Fd(self.fd);
        let entry = match job.operation {
            Operation::Read { at, .. } => opcode::Readv::new(fd, pointer, count).offset(at).build(),
            Operation::Write { at, .. } => {
                let flags = write_flags(self.image.writes_through());
                opcode::Writev::new(fd, pointer, count).offset(at).rw_flags(flags).build()
            }
            Operation::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Operation::Discard { at, len } => fallocate_entry(fd, at, len, true),
            Operation::Zero { at, len, unmap } => fallocate_entry(fd, at, len, unmap),
        };
        let entry = entry.user_data(number as u64);
        self.under_way[number] = Some((job, vectors));
        self.push(number, &entry);
    }

    fn begin(&mut self) {
        // An error leaves the entries in the queue, and the next call submits them.
        let _ = self.uring.submit();
    }

    fn collect(&mut self, done: &mut VecDeque<Done>) {
        let _ = self.finished.read();
        self.reap();
        done.append(&mut self.done);
    }

    fn wait(&mut self) {
        while self.free.len() < self.under_way.len() {
            match self.uring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The kernel has lost the ring: nothing is known of what is under way.
                Err(_) => return,
            }
            self.reap();
        }
        if !self.done.is_empty() {
            let _ = self.finished.write(1);
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel writes to guest memory as long as a request is under way.
        self.wait();
        debug_assert!(Arc::strong_count(&self.image) > 0);
    }
}

fn fallocate_entry(fd: types::Fd, at: u64, len: u64, unmap: bool) -> io_uring::squeue::Entry {
    opcode::Fallocate::new(fd, len).offset(at).mode(zeroing(unmap).bits() as i32).build()
}

/// Threads.
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    image: Arc<Image>,
    work: Mutex<Work>,
    changed: Condvar,
    finished: EventFd,
}

#[derive(Default)]
struct Work {
    waiting: VecDeque<Job>,
    busy: usize,
    done: VecDeque<Done>,
    ended: bool,
}

impl Pool {
    /// As many threads as the image has use for; each request that they have carried out is counted by `finished`.
    ///
    /// # Errors
    /// They cannot be started.
    pub(super) fn new(image: &Arc<Image>, finished: &EventFd) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            image: Arc::clone(image),
            work: Mutex::default(),
            changed: Condvar::new(),
            finished: finished.try_clone()?,
        });
        let mut this = Self { shared, threads: Vec::new() };
        for _ in 0..image.parallelism() {
            let shared = Arc::clone(&this.shared);
            this.threads.push(thread::Builder::new().name("disk".into()).spawn(move || shared.work())?);
        }
        Ok(this)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut work = self.lock();
        loop {
            if let Some(job) = work.waiting.pop_front() {
                work.busy += 1;
                drop(work);
                let result = self.image.carry_out(job.operation, &job.chain);
                work = self.lock();
                work.busy -= 1;
                work.done.push_back(Done { job, result });
                let _ = self.finished.write(1);
                self.changed.notify_all();
            } else if work.ended {
                return;
            } else {
                work = self.changed.wait(work).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

impl Engine for Pool {
    fn submit(&mut self, job: Job) {
        self.shared.lock().waiting.push_back(job);
    }

    fn begin(&mut self) {
        self.shared.changed.notify_all();
    }

    fn collect(&mut self, done: &mut VecDeque<Done>) {
        let _ = self.shared.finished.read();
        done.append(&mut self.shared.lock().done);
    }

    fn wait(&mut self) {
        self.begin();
        let mut work = self.shared.lock();
        while work.busy > 0 || !work.waiting.is_empty() {
            work = self.shared.changed.wait(work).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}
