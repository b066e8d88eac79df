//! Requests that take their time: sent in a thread, while this one watches how far they are and for Ctrl-C.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use crate::process;

/// How often it is looked.
pub(crate) const GLANCE: Duration = Duration::from_millis(100);

/// Whether the process was asked to end.
#[derive(Clone, Debug, Default)]
pub(crate) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// From now on SIGINT, SIGTERM and SIGHUP only set this.
    ///
    /// # Errors
    /// As [`process::on_end_request`].
    pub(crate) fn watch() -> io::Result<Self> {
        let interrupt = Self::default();
        let asked = Arc::clone(&interrupt.0);
        process::on_end_request(move || asked.store(true, Ordering::Release))?;
        Ok(interrupt)
    }

    /// Whether it was.
    pub(crate) fn asked(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Does `request` in a thread and calls `glance` every [`GLANCE`] until that is done.
pub(crate) fn watched<T: Send>(request: impl FnOnce() -> T + Send, mut glance: impl FnMut()) -> T {
    thread::scope(|scope| {
        let (sender, answer) = channel();
        let asking = scope.spawn(move || {
            // The other end waits for it.
            let _ = sender.send(request());
        });
        loop {
            match answer.recv_timeout(GLANCE) {
                Ok(answer) => return answer,
                Err(RecvTimeoutError::Timeout) => glance(),
                Err(RecvTimeoutError::Disconnected) => match asking.join() {
                    Ok(()) => unreachable!("it has sent its answer"),
                    Err(panicked) => std::panic::resume_unwind(panicked),
                },
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_is_watched_until_it_is_answered() {
        let (go, told) = channel();
        let mut glances = 0;
        let answer = watched(
            move || told.recv().unwrap(),
            || {
                glances += 1;
                if glances == 2 {
                    go.send("done").unwrap();
                }
            },
        );
        assert_eq!(answer, "done");
        assert!(glances >= 2);
    }
}
