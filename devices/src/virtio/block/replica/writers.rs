//! Who carries out writes to a replicated disk: threads, since a write may have to wait for the note. All else is as on any
//! disk.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::EventFd;

use super::Replica;
use crate::virtio::block::engine::{Done, Engine, Job};

/// Writes at once.
const THREADS: usize = 4;

/// An engine whose writes go by way of the replica.
pub(in crate::virtio::block) struct Replicating {
    others: Box<dyn Engine>,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    replica: Arc<Replica>,
    work: Mutex<Work>,
    changed: Condvar,
    finished: EventFd,
}

#[derive(Default)]
struct Work {
    waiting: VecDeque<Job>,
    busy: usize,
    done: VecDeque<Done>,
    /// The note is to be shortened.
    long_note: bool,
    ended: bool,
}

impl Replicating {
    /// Reads and flushes by `others`; what is done is counted by `finished`.
    ///
    /// # Errors
    /// Its threads cannot be started.
    pub(in crate::virtio::block) fn new(
        others: Box<dyn Engine>,
        replica: &Arc<Replica>,
        finished: &EventFd,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            replica: Arc::clone(replica),
            work: Mutex::default(),
            changed: Condvar::new(),
            finished: finished.try_clone()?,
        });
        let mut this = Self { others, shared, threads: Vec::new() };
        for _ in 0..THREADS {
            let shared = Arc::clone(&this.shared);
            this.threads.push(thread::Builder::new().name("disk-write".into()).spawn(move || shared.work())?);
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
            if let Some(mut job) = work.waiting.pop_front() {
                work.busy += 1;
                drop(work);
                let result = self.replica.carry_out(job.operation, &mut job.bytes);
                work = self.lock();
                work.busy -= 1;
                work.done.push_back(Done { job, result });
                let _ = self.finished.write(1);
                self.changed.notify_all();
            } else if work.ended {
                return;
            } else if std::mem::take(&mut work.long_note) {
                drop(work);
                // What stays in the note for nothing costs time later, and no more.
                let _ = self.replica.shorten_note();
                work = self.lock();
            } else {
                work = self.changed.wait(work).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

impl Engine for Replicating {
    fn submit(&mut self, job: Job) {
        if job.operation.changes_the_image() {
            self.shared.lock().waiting.push_back(job);
        } else {
            self.others.submit(job);
        }
    }

    fn begin(&mut self) {
        self.others.begin();
        if self.shared.replica.note_is_long() {
            self.shared.lock().long_note = true;
        }
        self.shared.changed.notify_all();
    }

    fn collect(&mut self, done: &mut VecDeque<Done>) {
        self.others.collect(done);
        done.append(&mut self.shared.lock().done);
    }

    fn wait(&mut self) {
        self.others.wait();
        self.shared.changed.notify_all();
        let mut work = self.shared.lock();
        while work.busy > 0 || !work.waiting.is_empty() {
            work = self.shared.changed.wait(work).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Replicating {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}
