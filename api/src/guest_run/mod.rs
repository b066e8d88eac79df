//! A guest's run, from its first instruction to its end: what is asked of it, and what happens to its mirror.

use std::io;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use mirror::console::Console;
use mirror::ids::{Guid, Term};
use mirror::report::Report;
use mirror::shell::primary::Notifier;
use uuid::Uuid;
use vmm::snapshot::SnapshotRequest;
use vmm::{DeviceLimits, Exit, ExitHandle, HostResources, Machine};

use crate::config::MirrorSection;
use crate::events::EventLog;
use crate::exit::ExitStatus;
use crate::guest::exit_status;
use crate::run::{Beginning, RunError};
use crate::seat::{RunningGuest, SnapshotWatch};
use crate::server::{DriveChange, Request, TOO_LATE};
use crate::stage::{Happening, MirrorPlace, Stage};
use crate::standby::Node;

mod protection;
mod turns;

use protection::{SEEK_FIRST, refuse_if_live_elsewhere};
pub(crate) use turns::{run_on, stand_by};

/// How long a paused guest's output may take to leave.
const CONSOLE_PATIENCE: Duration = Duration::from_secs(1);

/// How a guest's run is over on this side.
enum Over {
    /// The process has nothing more to do.
    Ended(ExitStatus),
    /// Another side runs the guest. A process that waits nowhere as a standby ends so.
    Elsewhere(ExitStatus),
}

/// A guest's run on this side, from its first instruction here to its last.
struct Run {
    /// The so-manieth guest of this process.
    number: u64,
    /// By which the witness knows this side.
    name: String,
    console: Arc<Console>,
    events: Arc<EventLog>,
    happen: Sender<Happening>,
    /// Of the guest's devices, whoever has it.
    limits: DeviceLimits,
    /// Where those are on this host.
    places: HostResources,
    /// For the API.
    mirror: MirrorPlace,
    /// The snapshot that is being taken, for the API.
    snapshot: Arc<SnapshotWatch>,
    /// The guest was told to stand still.
    paused: Arc<AtomicBool>,
    /// The guest stands still, and its output is held, until it is protected.
    suspended: Arc<AtomicBool>,
    /// The process was asked to end.
    ending: Arc<AtomicBool>,
    /// How the guest is to be mirrored.
    section: Option<MirrorSection>,
    /// When a standby is to be sought.
    seek_at: Option<Instant>,
    /// How long to the search after that; short again once a guest has been protected.
    seek_pause: Duration,
    /// Standbys that could be reached and did not take the guest, since one did.
    turned_down: usize,
    /// What the search last came to.
    sought: Option<String>,
    /// Where this side waits once another one runs the guest.
    node: Option<Node>,
    /// The guest, unless the mirror has it.
    running: Option<Machine>,
    /// The mirror, while it has the guest.
    notifier: Option<Notifier>,
    /// The name by which standbys and witness know the guest, once it has been mirrored.
    guid: Option<Guid>,
    /// The term in which the guest runs here, once it has been mirrored.
    term: Option<Term>,
    ended: Option<Exit>,
}

impl Run {
    /// A run of `machine`, which has not begun.
    fn new(stage: &Stage, machine: &Machine, console: Arc<Console>, id: &str, number: u64) -> Self {
        Self {
            number,
            // A claim that was not answered is made again, and must then be known as one's own.
            name: format!("primary {id} {}", Uuid::new_v4().as_fields().0),
            console,
            events: Arc::clone(&stage.events),
            happen: stage.happen.clone(),
            limits: machine.device_limits(),
            places: machine.config().devices.places(),
            mirror: Arc::new(Mutex::new(None)),
            snapshot: Arc::default(),
            paused: Arc::default(),
            suspended: Arc::default(),
            ending: Arc::clone(&stage.ending),
            section: None,
            seek_at: None,
            seek_pause: SEEK_FIRST,
            turned_down: 0,
            sought: None,
            node: None,
            running: None,
            notifier: None,
            guid: None,
            term: None,
            ended: None,
        }
    }

    /// Lets the guest begin.
    fn begin(&mut self, mut machine: Machine, beginning: Beginning) -> Result<(), RunError> {
        match beginning {
            Beginning::Paused => {
                self.paused.store(true, Ordering::Release);
                self.running = Some(machine);
            }
            // Not admitted, it does not run.
            Beginning::Mirrored(section) if section.delay_ms == 0 => {
                self.open_node(&section)?;
                self.section = Some(section.clone());
                self.mirror(machine, &section).map_err(|failure| failure.error)?;
            }
            Beginning::Mirrored(section) => {
                self.open_node(&section)?;
                refuse_if_live_elsewhere(&section)?;
                machine.start();
                self.running = Some(machine);
                let delay = Duration::from_millis(section.delay_ms.into());
                self.section = Some(section);
                self.seek_standby(delay);
            }
            Beginning::Running => {
                machine.start();
                self.running = Some(machine);
            }
        }
        Ok(())
    }

    /// The API tells of the guest from now on, and its end is noticed.
    fn take_seat(&self, stage: &mut Stage, exit: ExitHandle) -> io::Result<()> {
        stage.events.speak_as("primary");
        stage.seat(RunningGuest {
            exit: exit.clone(),
            limits: self.limits.clone(),
            mirror: Arc::clone(&self.mirror),
            paused: Arc::clone(&self.paused),
            suspended: Arc::clone(&self.suspended),
            snapshot: Arc::clone(&self.snapshot),
        });
        let (ends, number) = (stage.happen.clone(), self.number);
        // At the end nobody waits for it any more.
        let watch = move || drop(ends.send(Happening::GuestEnded(number, exit.wait())));
        thread::Builder::new().name("guest-exit".into()).spawn(watch)?;
        Ok(())
    }

    /// The process ends: nothing is written for the guest any more, whoever has it.
    fn leave_disks(&self) {
        self.limits.leave_disks();
    }

    /// Has no more part in the guest; gives the place at which it is waited for again, if there is one.
    fn leave(self, stage: &mut Stage) -> Option<Node> {
        stage.unseat();
        if let (Some(node), Some(guid), Some(machine)) = (&self.node, self.guid, self.running) {
            node.vacate(guid, machine);
        }
        self.node
    }

    /// Does what is asked until the guest is over here, and says how.
    fn carry_out(&mut self, stage: &Stage) -> Over {
        loop {
            let happening = match self.seek_at {
                None => stage.happenings.recv().ok(),
                Some(at) => {
                    let wait = at.saturating_duration_since(Instant::now());
                    match stage.happenings.recv_timeout(wait) {
                        Ok(happening) => Some(happening),
                        Err(RecvTimeoutError::Timeout) => {
                            self.seek();
                            continue;
                        }
                        Err(RecvTimeoutError::Disconnected) => None,
                    }
                }
            };
            let over = match happening {
                Some(happening) => self.take(happening, stage),
                None => Some(Over::Ended(ExitStatus::Failure)),
            };
            if let Some(over) = over {
                return over;
            }
        }
    }

    fn obey(&mut self, request: Request, stage: &Stage) -> Result<(), String> {
        match request {
            Request::Pause => {
                self.own_machine()?.stand_still().map_err(|error| error.to_string())?;
                // What it has printed is out before anybody counts on its standing still.
                self.console.flush_within(CONSOLE_PATIENCE);
                self.paused.store(true, Ordering::Release);
                Ok(())
            }
            Request::Resume => {
                if self.suspended.load(Ordering::Acquire) {
                    return Err("the guest stands still because it has no standby; attach one, or promote this side to let the guest go on without".into());
                }
                self.own_machine()?.start();
                self.paused.store(false, Ordering::Release);
                Ok(())
            }
            Request::Snapshot(request) => self.take_snapshot(&request),
            Request::Drive(change) => self.change_drive(&change).map_err(|reason| {
                format!("Unable to patch the block device: {reason}. Please verify the request arguments")
            }),
            Request::Net { id, receive, send } => {
                self.limits.update_net(&id, &receive, &send).map_err(|error| error.to_string())
            }
            Request::Attach(section) => self.attach(&section, stage),
            Request::Failover => self.go_on_alone(),
            Request::Configure(_) | Request::Start | Request::Load(_) => Err(TOO_LATE.into()),
            other => Err(format!("{other:?} is not possible here")),
        }
    }

    fn take_snapshot(&mut self, request: &SnapshotRequest) -> Result<(), String> {
        let (ending, watch) = (Arc::clone(&self.ending), Arc::clone(&self.snapshot));
        let mut progress = |done, pages| {
            if watch.tell(done, pages) && !ending.load(Ordering::Acquire) {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        };
        let machine = self.own_machine()?;
        watch.begin();
        let taken = machine.snapshot(request, &mut progress);
        watch.end();
        self.events.meters().snapshot(request.kind, taken.as_ref().ok());
        taken.map(drop).map_err(|error| error.to_string())
    }

    fn change_drive(&mut self, DriveChange { id, image, limits }: &DriveChange) -> Result<(), String> {
        if let Some(image) = image {
            let mirrored = "the guest is mirrored, and its standby would go on with the old image; leave path_on_host out";
            let machine = self.running.as_mut().ok_or(mirrored)?;
            machine.change_image(id, image).map_err(|error| error.to_string())?;
        }
        self.limits.update_drive(id, limits).map_err(|error| error.to_string())
    }

    /// The machine, unless the mirror has it.
    fn own_machine(&mut self) -> Result<&mut Machine, String> {
        let mirrored =
            "the guest is mirrored; a snapshot of it is not possible yet: detach its standby first";
        self.running.as_mut().ok_or_else(|| mirrored.into())
    }

    /// Takes notice of what happened; says how the run is over, if it is.
    fn take(&mut self, happening: Happening, stage: &Stage) -> Option<Over> {
        match happening {
            Happening::GuestEnded(number, exit) if number == self.number => {
                if let Some(notifier) = &self.notifier {
                    notifier.guest_ended(exit.to_string());
                }
                self.ended = Some(exit);
            }
            Happening::MirrorEnded(outcome, guest) => {
                if let Some(over) = self.mirror_ended(outcome, *guest) {
                    return Some(over);
                }
            }
            Happening::Sought(Ok((address, stream))) => return self.found(address, stream),
            Happening::Sought(Err(reason)) => self.not_found(reason),
            Happening::EndRequested => return Some(Over::Ended(ExitStatus::Interrupted)),
            Happening::Asked(request, answer) => {
                // Whoever asked may have gone.
                let _ = answer.send(self.obey(request, stage));
            }
            // Of a guest that has left, or of the standby that this side was.
            Happening::GuestEnded(..) | Happening::Told(_) => {}
        }
        // An end that is not committed yet is the mirror's to finish.
        let (Some(exit), Some(_)) = (&self.ended, &self.running) else { return None };
        self.console.flush();
        self.events.tell(Report::Ended { reason: exit.to_string() });
        Some(Over::Ended(exit_status(exit)))
    }
}
