//! A side as a standby: where it waits, what it holds, and what the API is told of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;

use mirror::console::Console;
use mirror::ids::{Guid, Term};
use mirror::link::{Address, Listener};
use mirror::report::Report;
use mirror::shell::standby::{self, Handle, Options};
use mirror::witness::Witness;
use vmm::{HostResources, Machine, StandbyHost};

use super::NodeError;
use crate::events::EventLog;
use crate::exit::ExitStatus;
use crate::server::MirrorStatus;
use crate::stage::{Happening, Stage};

/// What it takes to stand by.
pub(crate) struct Setup {
    /// Where to wait.
    pub(crate) listen: Address,
    /// Where primaries are to be heard besides.
    pub(crate) second_listen: Option<Address>,
    /// By which the witness knows this side as a standby.
    pub(crate) name: String,
    pub(crate) witness: Option<Arc<dyn Witness>>,
    /// Where a guest's console goes that runs here.
    pub(crate) console: Arc<Console>,
    /// Where the guest's devices are on this host.
    pub(crate) resources: HostResources,
    /// It runs a guest already, and waits once that has gone.
    pub(crate) occupied: bool,
}

/// A guest that runs here from now on.
pub(crate) struct TakenOver {
    pub(crate) machine: Machine,
    pub(crate) guid: Guid,
    pub(crate) term: Term,
}

/// This side as a standby.
pub(crate) struct Node {
    standing_by: Arc<StandingBy>,
    console: Arc<Console>,
    /// Guests that were taken over here.
    guests: AtomicU64,
}

impl Node {
    /// Begins to listen. What there is to tell goes to `events` and, as a happening, to `happen`.
    ///
    /// # Errors
    /// [`NodeError`]
    pub(crate) fn open(
        setup: Setup,
        events: Arc<EventLog>,
        happen: Sender<Happening>,
    ) -> Result<Self, NodeError> {
        let listener = Listener::bind(&setup.listen)?;
        let machine = StandbyHost::new(Arc::clone(&setup.console)).with_resources(setup.resources);
        let watcher = Arc::new(move |report: Report| {
            events.tell(report.clone());
            // At the end nobody waits for it any more.
            let _ = happen.send(Happening::Told(report));
        });
        let options = Options {
            name: setup.name.clone(),
            witness: setup.witness,
            occupied: setup.occupied,
            second_listen: setup.second_listen,
        };
        let handle = standby::serve(listener, machine, Arc::clone(&setup.console), options, watcher)?;
        Ok(Self {
            standing_by: Arc::new(StandingBy { name: setup.name, handle }),
            console: setup.console,
            guests: AtomicU64::new(0),
        })
    }

    /// For the API.
    pub(crate) fn standing_by(&self) -> Arc<StandingBy> {
        Arc::clone(&self.standing_by)
    }

    /// Where a guest's console goes that runs here.
    pub(crate) fn console(&self) -> Arc<Console> {
        Arc::clone(&self.console)
    }

    /// By which the witness knows this side as a standby.
    pub(crate) fn name(&self) -> &str {
        &self.standing_by.name
    }

    /// How many guests have been taken over here.
    pub(crate) fn guests(&self) -> u64 {
        self.guests.load(Ordering::Relaxed)
    }

    /// The guest `guid`, whose `machine` ran here, is another side's now: this side waits again.
    pub(crate) fn vacate(&self, guid: Guid, machine: Machine) {
        let handle = &self.standing_by.handle;
        handle.with_machine(|host| host.remember(guid, machine));
        handle.vacate();
    }

    /// Waits until a guest is to run here.
    ///
    /// # Errors
    /// How the process ends instead: with `once`, when its first guest is not run here.
    pub(crate) fn wait(&self, stage: &mut Stage, once: bool) -> Result<TakenOver, ExitStatus> {
        stage.stand_by(self.standing_by());
        while let Ok(happening) = stage.happenings.recv() {
            match happening {
                Happening::EndRequested => return Err(ExitStatus::Interrupted),
                Happening::Told(Report::Active { .. }) => {
                    if let Some(taken_over) = self.take() {
                        return Ok(taken_over);
                    }
                }
                Happening::Told(Report::Refused { .. }) if once => return Err(ExitStatus::Refused),
                // It has ended at its primary: there is nothing left to take over.
                Happening::Told(Report::Ended { .. }) if once => return Err(ExitStatus::Success),
                Happening::Told(Report::Failed { .. }) if once => return Err(ExitStatus::Failure),
                Happening::Asked(_, answer) => {
                    let gone = "the guest is another side's now; ask that";
                    // Whoever asked may have gone.
                    let _ = answer.send(Err(gone.into()));
                }
                // Of a guest that has left.
                Happening::Told(_)
                | Happening::GuestEnded(..)
                | Happening::MirrorEnded(..)
                | Happening::Sought(_) => {}
            }
        }
        Err(ExitStatus::Failure)
    }

    fn take(&self) -> Option<TakenOver> {
        let status = self.standing_by.handle.status();
        let machine = self.standing_by.handle.with_machine(StandbyHost::take_machine)?;
        self.guests.fetch_add(1, Ordering::Relaxed);
        Some(TakenOver { machine, guid: status.guid?, term: status.term })
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.standing_by.handle.stop();
    }
}

/// What the API tells of it and asks of it.
pub(crate) struct StandingBy {
    name: String,
    handle: Handle<StandbyHost>,
}

impl StandingBy {
    /// How it is.
    pub(crate) fn status(&self) -> MirrorStatus {
        MirrorStatus::Standby(Box::new(self.handle.status()))
    }

    /// Whether the guest that it held runs here.
    pub(crate) fn runs(&self) -> bool {
        let status = self.handle.status();
        status.role == "active" && status.phase != standby::FENCING
    }

    /// An operator says that the primary is dead: the guest is to run here.
    pub(crate) fn promote(&self) -> Result<(), String> {
        let before = self.handle.status();
        if before.phase != "orphaned" {
            return Err(format!(
                "a standby is promoted when its primary is lost and no witness can decide; this one is {}",
                before.phase
            ));
        }
        self.handle.promote();
        let after = self.handle.status();
        if after.role == "active" {
            return Ok(());
        }
        Err(format!("the guest is not run here: this side is {}; its messages say why", after.phase))
    }
}
