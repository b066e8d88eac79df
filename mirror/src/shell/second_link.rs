//! The second link: a standby that listens on one hears there, too, that the primary lives.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use super::Watcher;
use super::pulse::hurry;
use crate::ids::{Epoch, Guid, Term};
use crate::link::{Address, FrameWriter, Stream};
use crate::report::Report;
use crate::standby::HEARTBEAT;

/// Time between two attempts to connect.
const AGAIN: Duration = Duration::from_secs(1);

/// How long what was sent may remain unconfirmed before the link is made anew; shorter than the system would wait, which
/// after a cut sends again only after minutes.
const UNCONFIRMED: Duration = Duration::from_secs(2);

/// What a primary says on it.
#[derive(Clone)]
pub(super) struct SecondLink {
    pub(super) address: Address,
    pub(super) guid: Guid,
    /// May change.
    pub(super) term: Arc<AtomicU64>,
    /// Time between two signs of life.
    pub(super) interval: Duration,
    pub(super) watcher: Watcher,
}

/// A second link; dropping it ends it.
pub(super) struct Beating {
    up: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
}

impl Beating {
    /// Whether the link is there.
    pub(super) fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }
}

impl Drop for Beating {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
    }
}

impl SecondLink {
    /// Beats in a thread of its own, and connects again whenever the link is lost.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(super) fn start(self) -> std::io::Result<Beating> {
        let beating = Beating { up: Arc::default(), ended: Arc::default() };
        let (up, ended) = (Arc::clone(&beating.up), Arc::clone(&beating.ended));
        thread::Builder::new().name("mirror-second".into()).spawn(move || {
            hurry();
            while !ended.load(Ordering::Acquire) {
                let Ok(stream) = Stream::connect(&self.address) else {
                    thread::sleep(AGAIN);
                    continue;
                };
                self.tell(&up, true);
                self.beat(stream, &ended);
                self.tell(&up, false);
            }
        })?;
        Ok(beating)
    }

    /// Beats until the link is lost or of no more use.
    fn beat(&self, stream: Stream, ended: &AtomicBool) {
        if stream.set_write_timeout(UNCONFIRMED).and_then(|()| stream.limit_unconfirmed(UNCONFIRMED)).is_err()
        {
            return;
        }
        let mut writer = FrameWriter::new(Arc::new(stream));
        while !ended.load(Ordering::Acquire) {
            let stamp = (self.guid, Term(self.term.load(Ordering::Acquire)), Epoch::NONE);
            if writer.send(stamp, &HEARTBEAT).is_err() {
                return;
            }
            thread::sleep(self.interval);
        }
    }

    fn tell(&self, up: &AtomicBool, is_up: bool) {
        up.store(is_up, Ordering::Relaxed);
        (self.watcher)(Report::SecondLink { address: self.address.to_string(), up: is_up });
    }
}
