//! What others ask of a mirrored guest.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use super::Outcome;
use super::status::{Shared, StatusHandle};
use crate::ids::{Epoch, LinkId};
use crate::link::{Address, Stream};
use crate::primary::Pacing;
use crate::shell::seeding::Seeder;
use crate::wire::header::Header;
use crate::wire::message::Message;

/// What the driver is told from outside.
pub(super) enum Input {
    /// One more standby can be reached.
    Join(Address, Stream),
    Frame(LinkId, Header, Message),
    LinkLost(LinkId, String),
    /// A seeding round has been sent: pages and bytes.
    RoundSent {
        link: LinkId,
        outcome: std::io::Result<(u64, u64)>,
        seeder: Seeder,
    },
    GuestEnded(String),
    /// A device has output that waits.
    OutputWaits,
    Switchover(Option<Address>, Sender<Result<Duration, String>>),
    Detach(Sender<Result<(), String>>),
    Retune(Pacing),
    Quiesce(Sender<Epoch>),
    Unquiesce,
}

/// A mirrored guest.
pub struct Handle<G> {
    pub(super) inputs: Sender<Input>,
    pub(super) shared: Arc<Shared>,
    pub(super) driver: JoinHandle<(Outcome, G)>,
}

/// Tells the driver of a mirrored guest what happened to it; can be cloned.
#[derive(Clone)]
pub struct Notifier(Sender<Input>);

impl Notifier {
    /// Mirrors the guest to one more standby, which was reached at `address`. What comes of it the reports tell.
    pub fn join(&self, address: Address, stream: Stream) {
        // A driver that has finished closes it.
        let _ = self.0.send(Input::Join(address, stream));
    }

    /// The guest has ended by itself: what it has said is committed and released, and the standby forgets it.
    pub fn guest_ended(&self, reason: impl Into<String>) {
        // A driver that has finished has no more use for it.
        let _ = self.0.send(Input::GuestEnded(reason.into()));
    }

    /// Lets the standby forget the guest, which goes on here alone; returns when it has, and when [`Handle::wait`] is
    /// about to return.
    ///
    /// # Errors
    /// Why it was not to be had; where the guest is then, [`Handle::wait`] and the reports tell.
    pub fn detach(&self) -> Result<(), String> {
        let over = || "the guest is no longer mirrored".to_owned();
        let (sender, outcome) = channel();
        self.0.send(Input::Detach(sender)).map_err(|_| over())?;
        outcome.recv().map_err(|_| over())?
    }

    /// As [`Handle::quiesce`].
    pub fn quiesce(&self) -> Option<Epoch> {
        let (sender, done) = channel();
        self.0.send(Input::Quiesce(sender)).ok()?;
        done.recv().ok()
    }

    /// As [`Handle::unquiesce`].
    pub fn unquiesce(&self) {
        // A driver that has finished has no more use for it.
        let _ = self.0.send(Input::Unquiesce);
    }

    /// Lets epochs end otherwise from now on.
    pub fn retune(&self, pacing: Pacing) {
        // A driver that has finished has no more use for it.
        let _ = self.0.send(Input::Retune(pacing));
    }

    /// As [`Handle::switchover`]; to the standby at `to`, or to any that follows.
    ///
    /// # Errors
    /// As there.
    pub fn switchover(&self, to: Option<Address>) -> Result<Duration, String> {
        let over = || "the guest is no longer mirrored".to_owned();
        let (sender, outcome) = channel();
        self.0.send(Input::Switchover(to, sender)).map_err(|_| over())?;
        outcome.recv().map_err(|_| over())?
    }
}

impl<G> Handle<G> {
    /// What the primary is doing.
    pub fn status_handle(&self) -> StatusHandle {
        StatusHandle::new(Arc::clone(&self.shared))
    }

    /// For whoever learns of the guest's end.
    pub fn notifier(&self) -> Notifier {
        Notifier(self.inputs.clone())
    }

    /// Lets the standby run the guest from now on, and returns how long the guest ran on neither side.
    ///
    /// # Errors
    /// Why the standby does not run it; where the guest is then, [`Self::wait`] and the reports tell.
    pub fn switchover(&self) -> Result<Duration, String> {
        self.notifier().switchover(None)
    }

    /// Stops the guest at an epoch and returns once the standby has committed it: both sides hold the same then.
    /// `None` if there is no lockstep any more.
    pub fn quiesce(&self) -> Option<Epoch> {
        self.notifier().quiesce()
    }

    /// Lets a quiesced guest run again.
    pub fn unquiesce(&self) {
        self.notifier().unquiesce();
    }

    /// Waits until mirroring has ended and gives the guest back: running if this side is live.
    pub fn wait(self) -> (Outcome, G) {
        match self.driver.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}
