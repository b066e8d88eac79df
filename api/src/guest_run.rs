//! A guest's run, from its first instruction to its end: what is asked of it, and what happens to its mirror.

use std::io;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use mirror::console::Console;
use mirror::ids::{Guid, Term};
use mirror::report::Report;
use mirror::shell::primary::{self, AttachError, AttachFailure, Notifier, Outcome};
use mirror::witness::{FileWitness, Record, Witness};
use uuid::Uuid;
use vmm::snapshot::{MemoryFill, SnapshotRequest};
use vmm::{DeviceLimits, Exit, ExitHandle, Machine, SerialInput};

use crate::cli::InstanceOptions;
use crate::config::MirrorSection;
use crate::events::EventLog;
use crate::exit::ExitStatus;
use crate::guest::{StartsMirrored, exit_status};
use crate::process::{self, Keyboard};
use crate::run::{Beginning, Ready, RunError};
use crate::server::{DriveChange, Request, TOO_LATE};
use crate::stage::{Answer, Happening, MirrorHandles, MirrorPlace, RunningGuest, SnapshotWatch, Stage, lock};

/// How long a paused guest's output may take to leave.
const CONSOLE_PATIENCE: Duration = Duration::from_secs(1);

/// How often it is told how much memory has come from a snapshot.
const FILL_REPORTS: Duration = Duration::from_millis(500);

/// How long the process of a guest whose memory is lost may take to end in order.
const ENDING_PATIENCE: Duration = Duration::from_secs(5);

/// Runs a machine on `stage` until its guest ends, and says how it ended. `asked` waits for its beginning.
///
/// # Errors
/// [`RunError`]: the guest has then not run, and `asked` has not been answered.
pub(crate) fn run_on(
    stage: &mut Stage,
    ready: Ready,
    options: &InstanceOptions,
    asked: Option<&Answer>,
) -> Result<ExitStatus, RunError> {
    let Ready { machine, console, beginning } = ready;
    stage.serve(options.api_sock.as_deref(), options.http_api_max_payload_size)?;
    let (exit, fill, serial) = (machine.exit_handle(), machine.memory_fill(), machine.serial());
    let mut run = Run {
        console,
        events: Arc::clone(&stage.events),
        happen: stage.happen.clone(),
        limits: machine.device_limits(),
        mirror: Arc::new(Mutex::new(None)),
        snapshot: Arc::default(),
        paused: Arc::default(),
        ending: Arc::clone(&stage.ending),
        running: None,
        notifier: None,
        guid: None,
        term: None,
        ended: None,
    };
    stage.hand_over_metadata(machine.metadata());
    run.begin(machine, &beginning, &options.id)?;
    let _keyboard = connect_keyboard(serial, options.serial_in)?;
    stage.seat(RunningGuest {
        exit: exit.clone(),
        limits: run.limits.clone(),
        mirror: Arc::clone(&run.mirror),
        paused: Arc::clone(&run.paused),
        snapshot: Arc::clone(&run.snapshot),
    });
    let (ended, ends) = (exit.clone(), stage.happen.clone());
    // At the end nobody waits for it any more.
    thread::Builder::new()
        .name("guest-exit".into())
        .spawn(move || drop(ends.send(Happening::GuestEnded(ended.wait()))))?;
    if let Some(fill) = fill {
        watch_fill(fill, exit, Arc::clone(&stage.events))?;
    }
    if let Some(asked) = asked {
        // Whoever asked may have gone.
        let _ = asked.send(Ok(()));
    }
    let status = run.carry_out(stage, &beginning, &options.id);
    stage.flush_metrics();
    run.events.close();
    Ok(status)
}

/// Tells how memory comes, and sees to it that the process ends if it does not.
fn watch_fill(fill: MemoryFill, exit: ExitHandle, events: Arc<EventLog>) -> io::Result<()> {
    let began = Instant::now();
    let watch = move || loop {
        let outcome = fill.wait(FILL_REPORTS);
        let (there, pages) = fill.pages();
        match outcome {
            Ok(false) => events.tell(Report::MemoryArriving { there, pages }),
            Ok(true) => {
                let micros = began.elapsed().as_micros() as u64;
                return events.tell(Report::MemoryComplete { pages, micros });
            }
            Err(_) if matches!(exit.get(), Some(Exit::Error(_))) => {
                // The main thread may itself wait for a page that never comes.
                thread::sleep(ENDING_PATIENCE);
                eprintln!("error: the process waits for memory that cannot be had; it is ended");
                std::process::exit((ExitStatus::GuestCrashed as u8).into());
            }
            Err(_) => return,
        }
    };
    thread::Builder::new().name("memory-fill".into()).spawn(watch)?;
    Ok(())
}

fn connect_keyboard(serial: SerialInput, even_if_no_terminal: bool) -> io::Result<Option<Keyboard>> {
    use std::io::IsTerminal;
    if !even_if_no_terminal && !io::stdin().is_terminal() {
        return Ok(None);
    }
    let keyboard = Keyboard::take();
    // An interrupt that cannot be raised loses the key: the next one raises it again.
    process::forward_stdin(move |bytes| serial.send(bytes).unwrap_or(bytes.len()))?;
    Ok(Some(keyboard))
}

/// A guest's run, from its first instruction to its end.
struct Run {
    console: Arc<Console>,
    events: Arc<EventLog>,
    happen: Sender<Happening>,
    /// Of the guest's devices, whoever has it.
    limits: DeviceLimits,
    /// For the API.
    mirror: MirrorPlace,
    /// The snapshot that is being taken, for the API.
    snapshot: Arc<SnapshotWatch>,
    /// The guest was told to stand still.
    paused: Arc<AtomicBool>,
    /// The process was asked to end.
    ending: Arc<AtomicBool>,
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
    /// Lets the guest begin.
    fn begin(&mut self, mut machine: Machine, beginning: &Beginning, id: &str) -> Result<(), RunError> {
        match beginning {
            Beginning::Paused => {
                self.paused.store(true, Ordering::Release);
                self.running = Some(machine);
            }
            // Not admitted, it does not run.
            Beginning::Mirrored(section) if section.delay_ms == 0 => {
                self.mirror(machine, section, id).map_err(|failure| failure.error)?;
            }
            Beginning::Mirrored(section) => {
                refuse_if_live_elsewhere(section)?;
                machine.start();
                self.running = Some(machine);
            }
            Beginning::Running => {
                machine.start();
                self.running = Some(machine);
            }
        }
        Ok(())
    }

    /// Does what is asked until the guest has ended, and says how.
    fn carry_out(&mut self, stage: &Stage, beginning: &Beginning, id: &str) -> ExitStatus {
        let mut attach_at = match beginning {
            Beginning::Mirrored(section) if section.delay_ms > 0 => {
                Some((section, Instant::now() + Duration::from_millis(section.delay_ms.into())))
            }
            _ => None,
        };
        loop {
            let happening = match attach_at {
                None => stage.happenings.recv().ok(),
                Some((section, at)) => {
                    let wait = at.saturating_duration_since(Instant::now());
                    if let Ok(happening) = stage.happenings.recv_timeout(wait) {
                        Some(happening)
                    } else {
                        attach_at = None;
                        if let Some(status) = self.attach_running(section, id) {
                            return status;
                        }
                        continue;
                    }
                }
            };
            let ends =
                happening.map_or(Some(ExitStatus::Failure), |happening| self.take(happening, stage, id));
            if let Some(status) = ends {
                return status;
            }
        }
    }

    /// A running guest goes on if it cannot be mirrored, unless it is live elsewhere: then this side ends.
    fn attach_running(&mut self, section: &MirrorSection, id: &str) -> Option<ExitStatus> {
        let machine = self.running.take()?;
        let failure = self.mirror(machine, section, id).err()?;
        let reason = failure.error.to_string();
        if matches!(failure.error, AttachError::NotOwner { .. }) {
            self.console.freeze();
            self.events.tell(Report::Frozen { reason });
            return Some(ExitStatus::Frozen);
        }
        self.events.tell(Report::Unprotected { reason });
        self.running = Some(failure.guest.0);
        None
    }

    fn mirror(
        &mut self,
        machine: Machine,
        section: &MirrorSection,
        id: &str,
    ) -> Result<(), Box<AttachFailure<StartsMirrored>>> {
        let options = primary::Options {
            settings: section.settings(),
            guid: section.guid.or(self.guid).unwrap_or_else(Uuid::new_v4),
            name: format!("primary {id} {}", Uuid::new_v4().as_fields().0),
            term: self.term,
            witness: section.witness.as_ref().map(FileWitness::new),
            standby: section.standby.clone(),
            staging_pages: section.staging_pages(),
        };
        let guid = options.guid;
        let log = Arc::clone(&self.events);
        let watcher = Arc::new(move |report| log.tell(report));
        let handle = primary::attach(StartsMirrored(machine), Arc::clone(&self.console), options, watcher)
            .map_err(Box::new)?;
        self.guid = Some(guid);
        self.notifier = Some(handle.notifier());
        let (status, notifier) = (handle.status_handle(), Some(handle.notifier()));
        *lock(&self.mirror) = Some(MirrorHandles { status, notifier });
        let happen = self.happen.clone();
        let waiting = thread::Builder::new().name("mirror-end".into()).spawn(move || {
            let (outcome, guest) = handle.wait();
            let _ = happen.send(Happening::MirrorEnded(outcome, Box::new(guest)));
        });
        if let Err(error) = waiting {
            // The mirror goes on; only its end will not be noticed here.
            self.events.tell(Report::Failed { reason: format!("cannot start a thread: {error}") });
        }
        Ok(())
    }

    fn obey(&mut self, request: Request, stage: &Stage, id: &str) -> Result<(), String> {
        match request {
            Request::Pause => {
                self.own_machine()?.stand_still().map_err(|error| error.to_string())?;
                // What it has printed is out before anybody counts on its standing still.
                self.console.flush_within(CONSOLE_PATIENCE);
                self.paused.store(true, Ordering::Release);
                Ok(())
            }
            Request::Resume => {
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
            Request::Attach(section) => self.attach(&section, stage, id),
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

    /// Begins to mirror a guest that runs.
    fn attach(&mut self, section: &MirrorSection, stage: &Stage, id: &str) -> Result<(), String> {
        if self.paused.load(Ordering::Acquire) {
            return Err("a guest that stands still cannot be mirrored; resume it first".into());
        }
        let mirrored = "the guest is mirrored already; detach it from its standby first";
        let machine = self.running.take().ok_or(mirrored)?;
        match self.mirror(machine, section, id) {
            Ok(()) => {
                stage.note_mirror(section);
                Ok(())
            }
            Err(failure) => {
                self.running = Some(failure.guest.0);
                Err(failure.error.to_string())
            }
        }
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

    /// Takes notice of what happened; says how the process ends, if it does.
    fn take(&mut self, happening: Happening, stage: &Stage, id: &str) -> Option<ExitStatus> {
        match happening {
            Happening::GuestEnded(exit) => {
                if let Some(notifier) = &self.notifier {
                    notifier.guest_ended(exit.to_string());
                }
                self.ended = Some(exit);
            }
            Happening::MirrorEnded(Outcome::Frozen, _) => return Some(ExitStatus::Frozen),
            Happening::MirrorEnded(Outcome::HandedOver, _) => return Some(ExitStatus::Success),
            Happening::MirrorEnded(outcome, guest) => {
                if let Outcome::Solo(term) = outcome {
                    self.term = Some(term);
                }
                let mut machine = guest.0;
                if !self.paused.load(Ordering::Acquire) {
                    // It has not run yet if the standby turned it down.
                    machine.start();
                }
                self.notifier = None;
                if let Some(handles) = &mut *lock(&self.mirror) {
                    handles.notifier = None;
                }
                self.running = Some(machine);
            }
            Happening::EndRequested => return Some(ExitStatus::Interrupted),
            Happening::Asked(request, answer) => {
                // Whoever asked may have gone.
                let _ = answer.send(self.obey(request, stage, id));
            }
        }
        // An end that is not committed yet is the mirror's to finish.
        let (Some(exit), Some(_)) = (&self.ended, &self.running) else { return None };
        self.console.flush();
        self.events.tell(Report::Ended { reason: exit.to_string() });
        Some(exit_status(exit))
    }
}

/// A guest that runs before it is mirrored owns no term yet: it must not run at all if somebody else does.
fn refuse_if_live_elsewhere(section: &MirrorSection) -> Result<(), AttachError> {
    let (Some(path), Some(guid)) = (&section.witness, section.guid) else { return Ok(()) };
    match FileWitness::new(path).read()? {
        Some(Record { guid: theirs, term, owner }) if theirs == guid => {
            Err(AttachError::NotOwner { guid, term, owner })
        }
        _ => Ok(()),
    }
}
