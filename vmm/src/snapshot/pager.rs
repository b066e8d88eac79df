//! Memory that comes from a snapshot on demand: a thread provides the pages that are touched, and the rest meanwhile.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use mirror::dirty::DirtySet;
use mirror::memory::{GuestRam, PAGE_SIZE};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use thiserror::Error;

use super::FileError;
use super::pages::PageReader;
use crate::userfault::Userfault;

/// Pages that are fetched together. Whoever touches a page waits for this many of them, and once for as many that are
/// being fetched already.
const CHUNK: u64 = 16;
/// How often whoever waits for all pages is asked whether to go on.
const GLANCE: Duration = Duration::from_millis(50);

/// Why memory cannot come on demand.
#[derive(Debug, Error)]
pub enum PagerError {
    /// The kernel does not let us serve its page faults.
    #[error(
        "memory cannot be provided on demand, the kernel refuses userfaultfd: {0}; run as root or allow access to /dev/userfaultfd, or map or copy memory"
    )]
    Userfault(io::Error),
    /// There is no thread for it.
    #[error("starting the thread that provides memory: {0}")]
    Thread(io::Error),
}

/// Pages of guest memory cannot be had any more: the machine has ended, and its memory must not be looked at.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("guest memory cannot be fetched from the snapshot: {0}")]
pub struct MemoryLost(pub String);

/// Why somebody no longer waits for all of memory.
pub(crate) enum NotWhole {
    Lost(MemoryLost),
    Cancelled,
}

/// What happens if pages cannot be had.
type OnLoss = Box<dyn FnOnce(MemoryLost) + Send>;

/// Provides the missing pages of guest memory. Dropped, it leaves those that are missing still as zeros: nobody may be at
/// work on the memory then.
pub(crate) struct Pager {
    inner: Arc<Inner>,
    thread: Option<JoinHandle<()>>,
}

/// Tells how much of a restored guest's memory is there.
#[derive(Clone)]
pub struct MemoryFill(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    changed: Condvar,
    /// Fetch pages that nobody has touched, too.
    eager: AtomicBool,
    stopped: AtomicBool,
    /// Wakes the thread to look at the two above.
    wake: OwnedFd,
}

struct State {
    /// Pages that are there, or that no snapshot has.
    done: DirtySet,
    /// Pages that a snapshot has.
    total: u64,
    left: u64,
    end: Option<Result<(), MemoryLost>>,
    on_loss: Option<OnLoss>,
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // It fails only if the counter is full: then the thread is being woken as it is.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

impl State {
    fn mark(&mut self, page: u64) {
        if !self.done.contains(page) {
            self.done.insert(page);
            self.left -= 1;
        }
    }

    fn lost(&self) -> Option<MemoryLost> {
        self.end.clone()?.err()
    }
}

impl MemoryFill {
    /// Pages that are there, of those that the snapshot has.
    pub fn pages(&self) -> (u64, u64) {
        let state = self.0.lock();
        (state.total - state.left, state.total)
    }

    /// Waits at most `patience` until all pages are there, and says whether they are.
    ///
    /// # Errors
    /// They never will be.
    pub fn wait(&self, patience: Duration) -> Result<bool, MemoryLost> {
        let state = self.0.lock();
        let (state, _) = self
            .0
            .changed
            .wait_timeout_while(state, patience, |state| state.end.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        state.end.clone().map_or(Ok(false), |end| end.map(|()| true))
    }
}

impl Pager {
    /// Provides the pages of `ram` from `chain`, of each page the newest that there is; also those that nobody has
    /// touched if `eager`.
    pub(crate) fn start(
        ram: &Arc<GuestRam>,
        chain: Vec<Arc<PageReader>>,
        eager: bool,
    ) -> Result<Self, PagerError> {
        let userfault = Userfault::over(ram).map_err(PagerError::Userfault)?;
        let pages = chain.first().map_or(0, |base| base.header().layout.pages());
        let mut present = DirtySet::new(pages);
        for reader in &chain {
            present.union(reader.present());
        }
        let total = present.count();
        let absent: Vec<u64> = present.words().iter().map(|word| !word).collect();
        let mut done = DirtySet::new(pages);
        done.insert_words(0, &absent);
        let state = State { done, total, left: total, end: None, on_loss: None };
        let threadless = |cause: rustix::io::Errno| PagerError::Thread(cause.into());
        let inner = Arc::new(Inner {
            state: Mutex::new(state),
            changed: Condvar::new(),
            eager: AtomicBool::new(eager),
            stopped: AtomicBool::new(false),
            wake: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).map_err(threadless)?,
        });
        let body = vec![0; CHUNK as usize * PAGE_SIZE];
        let work = Work { inner: Arc::clone(&inner), userfault, chain, body, pages, next: 0 };
        let thread = thread::Builder::new()
            .name("pager".into())
            .spawn(move || work.run())
            .map_err(PagerError::Thread)?;
        Ok(Self { inner, thread: Some(thread) })
    }

    /// From now on the guest may run. If pages cannot be had from now on, `on_loss` is called, and whoever touches one
    /// never goes on: nothing may be done with memory that is wrong. Until now, they would have been zeros.
    pub(crate) fn arm(&self, on_loss: impl FnOnce(MemoryLost) + Send + 'static) -> Result<(), MemoryLost> {
        let mut state = self.inner.lock();
        state.lost().map_or(Ok(()), Err)?;
        state.on_loss = Some(Box::new(on_loss));
        Ok(())
    }

    /// Fetches all pages and waits for them. `progress` is told how many are there, of how many, and may break it off.
    pub(crate) fn complete(
        &self,
        progress: &mut dyn FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<(), NotWhole> {
        self.inner.eager.store(true, Ordering::Release);
        self.inner.wake();
        let fill = self.fill();
        while !fill.wait(GLANCE).map_err(NotWhole::Lost)? {
            let (there, all) = fill.pages();
            if progress(there, all).is_break() {
                return Err(NotWhole::Cancelled);
            }
        }
        Ok(())
    }

    pub(crate) fn fill(&self) -> MemoryFill {
        MemoryFill(Arc::clone(&self.inner))
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.inner.lock().lost().is_some()
    }

    /// Adds the pages that are missing.
    pub(crate) fn missing(&self, into: &mut DirtySet) {
        let missing: Vec<u64> = self.inner.lock().done.words().iter().map(|word| !word).collect();
        into.insert_words(0, &missing);
    }

    /// Makes `count` pages from `first` on zeros, which `discard` does with what is there of them.
    pub(crate) fn give_up(&self, first: u64, count: u64, discard: impl FnOnce()) {
        let mut state = self.inner.lock();
        (first..first + count).for_each(|page| state.mark(page));
        discard();
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.inner.stopped.store(true, Ordering::Release);
        self.inner.wake();
        if let Some(thread) = self.thread.take()
            // The last owner may be the thread itself, telling of a loss.
            && thread.thread().id() != thread::current().id()
        {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

/// Why the thread does not go on.
#[derive(Debug, Error)]
enum WorkError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("userfaultfd: {0}")]
    Userfault(#[from] io::Error),
}

struct Work {
    inner: Arc<Inner>,
    userfault: Userfault,
    /// The full snapshot first.
    chain: Vec<Arc<PageReader>>,
    body: Vec<u8>,
    pages: u64,
    /// The chunk that is looked at next when nobody waits.
    next: u64,
}

impl Work {
    fn run(mut self) {
        let outcome = self.provide().map_err(|cause| MemoryLost(cause.to_string()));
        let mut state = self.inner.lock();
        let gone = || MemoryLost("the machine was taken down before all of it was there".into());
        state.end = Some(outcome.clone().and(if state.left == 0 { Ok(()) } else { Err(gone()) }));
        let on_loss = state.on_loss.take();
        drop(state);
        self.inner.changed.notify_all();
        if let (Err(lost), Some(on_loss)) = (outcome, on_loss) {
            // Whoever waits for a page must not go on, and would if the descriptor was closed.
            std::mem::forget(self.userfault);
            on_loss(lost);
        }
    }

    /// Provides pages until all are there or nobody wants them any more.
    fn provide(&mut self) -> Result<(), WorkError> {
        while !self.inner.stopped.load(Ordering::Acquire) {
            while let Some(page) = self.userfault.next_fault()? {
                self.fetch(page / CHUNK)?;
                // If the snapshots do not have it, or the guest has given it back.
                self.userfault.provide_zeros(page)?;
            }
            if self.inner.lock().left == 0 {
                return Ok(self.userfault.release()?);
            }
            if self.inner.eager.load(Ordering::Acquire) {
                self.fetch(self.next)?;
                self.next = (self.next + 1) % self.pages.div_ceil(CHUNK);
            } else {
                self.wait()?;
            }
        }
        Ok(())
    }

    /// Waits until somebody touches a missing page, or says something.
    fn wait(&self) -> io::Result<()> {
        let mut sources =
            [PollFd::new(&self.userfault, PollFlags::IN), PollFd::new(&self.inner.wake, PollFlags::IN)];
        match poll(&mut sources, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(cause) => return Err(cause.into()),
        }
        // Nothing to read is no error: it was a page.
        let _ = rustix::io::read(&self.inner.wake, &mut [0; 8]);
        Ok(())
    }

    /// Provides the pages of `chunk` that are missing.
    fn fetch(&mut self, chunk: u64) -> Result<(), WorkError> {
        let (mut page, end) = (chunk * CHUNK, ((chunk + 1) * CHUNK).min(self.pages));
        while let Some((first, count, source)) = self.run_of_missing(page, end) {
            let body = &mut self.body[..count as usize * PAGE_SIZE];
            self.chain[source].read_run(first, body)?;
            self.hand_over(first, count)?;
            page = first + count;
        }
        Ok(())
    }

    /// The first pages within `page..end` that are missing and in one file: the first of them, how many, and which file.
    fn run_of_missing(&self, page: u64, end: u64) -> Option<(u64, u64, usize)> {
        let state = self.inner.lock();
        let source = |page| {
            let has = |reader: &Arc<PageReader>| reader.present().contains(page);
            if state.done.contains(page) { None } else { self.chain.iter().rposition(has) }
        };
        let (first, file) = (page..end).find_map(|page| Some((page, source(page)?)))?;
        let count = (first..end).take_while(|&page| source(page) == Some(file)).count() as u64;
        Some((first, count, file))
    }

    /// Makes the pages `first..first + count`, which are in the buffer, those of the guest.
    fn hand_over(&self, first: u64, count: u64) -> io::Result<()> {
        // Under the lock: a page that the guest gives back meanwhile is not to come again.
        let mut state = self.inner.lock();
        let body = |page: u64, count: u64| {
            let at = (page - first) as usize * PAGE_SIZE;
            &self.body[at..at + count as usize * PAGE_SIZE]
        };
        // A page of zeros stays missing: it takes no memory before it is touched.
        let wanted = |page| !state.done.contains(page) && body(page, 1).iter().any(|&byte| byte != 0);
        let mut page = first;
        while page < first + count {
            let run = (page..first + count).take_while(|&page| wanted(page)).count() as u64;
            if run > 0 {
                self.userfault.provide(page, body(page, run))?;
            }
            page += run.max(1);
        }
        (first..first + count).for_each(|page| state.mark(page));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    mod userfault {
        use devices::virtio::balloon::Discard;
        use tempfile::TempDir;
        use vm_memory::{Bytes, GuestAddress};

        use super::super::super::pages::PageWriter;
        use super::super::super::{Identity, SnapshotId};
        use super::super::*;
        use crate::memory::{HOLE_END, HOLE_START, Memory, layout};

        const PAGE: u64 = PAGE_SIZE as u64;
        /// The number of the first page above the hole.
        const ABOVE: u64 = HOLE_START / PAGE;

        /// Memory with a hole, whose pages come on demand from a file that has page `n` filled with `value` for each of
        /// `pages`.
        fn memory(folder: &TempDir, pages: &[(u64, u8)]) -> Memory {
            let memory = Memory::new(layout(3200).unwrap(), false).unwrap();
            let path = folder.path().join("memory");
            let file = std::fs::File::create(&path).unwrap();
            let mut writer = PageWriter::new(file, memory.layout()).unwrap();
            for &(page, value) in pages {
                writer.write(page, &[value; PAGE_SIZE]).unwrap();
            }
            writer.finish(Identity { id: SnapshotId([1; 16]), base: None }).unwrap();
            let reader = Arc::new(PageReader::open(&path).unwrap());
            let pager = Pager::start(memory.ram(), vec![reader], false).unwrap();
            memory.provided_by(pager)
        }

        fn byte(memory: &Memory, page: u64) -> u8 {
            let at = memory.layout().address(page).unwrap() + 100;
            memory.ram().read_obj(GuestAddress(at)).unwrap()
        }

        #[test]
        fn pages_come_when_they_are_touched_and_only_then() {
            let folder = TempDir::new().unwrap();
            let memory = memory(&folder, &[(3, 1), (5, 2), (6, 0), (200, 3), (ABOVE, 4), (ABOVE + 1, 5)]);
            let fill = memory.pager().unwrap().fill();
            assert_eq!(fill.pages(), (0, 6));
            assert_eq!([3, 4, 5, 6].map(|page| byte(&memory, page)), [1, 0, 2, 0]);
            assert_eq!(fill.pages(), (3, 6));
            let mut populated = DirtySet::new(memory.layout().pages());
            memory.populated(&mut populated).unwrap();
            assert!([200, ABOVE, ABOVE + 1].iter().all(|&page| populated.contains(page)));
            assert!(!populated.contains(ABOVE + 100));
            assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(HOLE_END + PAGE)).unwrap(), 5);
            assert_eq!(byte(&memory, 200), 3);
            assert_eq!(fill.wait(Duration::from_secs(20)), Ok(true));
            assert_eq!(fill.pages(), (6, 6));
        }

        #[test]
        fn page_that_the_guest_has_given_back_does_not_come_again() {
            let folder = TempDir::new().unwrap();
            let memory = memory(&folder, &[(3, 1), (5, 2), (100, 3)]);
            assert_eq!(byte(&memory, 3), 1);
            let mut returned = memory.returned().clone();
            returned.discard(3 * PAGE, PAGE);
            returned.discard(100 * PAGE, PAGE);
            assert_eq!([3, 5, 100].map(|page| byte(&memory, page)), [0, 2, 0]);
            let complete = memory.pager().unwrap().complete(&mut |_, _| ControlFlow::Continue(()));
            assert!(complete.is_ok());
            assert_eq!([3, 5, 100].map(|page| byte(&memory, page)), [0, 2, 0]);
        }

        #[test]
        fn loss_before_the_guest_may_run_is_told_and_later_calls_whoever_wants_to_know() {
            let folder = TempDir::new().unwrap();
            let damage = || {
                let file = std::fs::File::options().write(true).open(folder.path().join("memory")).unwrap();
                file.set_len(super::super::super::pages::DATA).unwrap();
            };
            let early = memory(&folder, &[(3, 1)]);
            damage();
            assert_eq!(byte(&early, 3), 0);
            assert!(early.pager().unwrap().arm(|_| ()).is_err());

            let late = memory(&folder, &[(3, 1)]);
            let (tell, told) = std::sync::mpsc::channel();
            late.pager().unwrap().arm(move |lost| tell.send(lost).unwrap()).unwrap();
            damage();
            let ram = Arc::clone(late.ram());
            // It touches the page and never goes on.
            thread::spawn(move || ram.read_obj::<u8>(GuestAddress(3 * PAGE)));
            let lost: MemoryLost = told.recv_timeout(Duration::from_secs(20)).unwrap();
            assert!(lost.to_string().contains("memory"), "{lost}");
            assert!(late.pager().unwrap().is_lost());
        }
    }
}
