//! What a process is to its guest, in turn: it runs it, waits for it as a standby, runs it again.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use mirror::report::Report;
use vmm::snapshot::MemoryFill;
use vmm::{Exit, ExitHandle, SerialInput};

use super::protection::SEEK_FIRST;
use super::{Over, Run};
use crate::cli::InstanceOptions;
use crate::events::EventLog;
use crate::exit::ExitStatus;
use crate::process::{self, Keyboard};
use crate::run::{Ready, RunError};
use crate::stage::{Answer, Stage};
use crate::standby::{Node, TakenOver};

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
    let mut run = Run::new(stage, &machine, console, &options.id, 0);
    stage.hand_over_metadata(machine.metadata());
    run.begin(machine, beginning)?;
    let _keyboard = connect_keyboard(serial, options.serial_in)?;
    run.take_seat(stage, exit.clone())?;
    if let Some(fill) = fill {
        watch_fill(fill, exit, Arc::clone(&stage.events))?;
    }
    if let Some(asked) = asked {
        // Whoever asked may have gone.
        let _ = asked.send(Ok(()));
    }
    Ok(take_turns(stage, run))
}

/// Lets `run` be carried out, and then whatever this process is to its guest next, until it has no more part in it.
fn take_turns(stage: &mut Stage, mut run: Run) -> ExitStatus {
    let status = loop {
        match run.carry_out(stage) {
            Over::Ended(status) => {
                run.leave_disks();
                break status;
            }
            Over::Elsewhere(status) => {
                // Without a place to wait at, it ends.
                let Some(node) = run.leave(stage) else { break status };
                match wait_at(stage, node, false) {
                    Ok(next) => run = next,
                    Err(status) => break status,
                }
            }
        }
    };
    stage.flush_metrics();
    stage.events.close();
    status
}

/// Stands by at `node`, runs the guest that it takes over, stands by again, and so on; says how the process ends.
pub(crate) fn stand_by(stage: &mut Stage, node: Node, once: bool) -> ExitStatus {
    match wait_at(stage, node, once) {
        Ok(run) => take_turns(stage, run),
        Err(status) => {
            stage.flush_metrics();
            stage.events.close();
            status
        }
    }
}

/// Waits at `node` for a guest to run; what was not to be waited for ends the process.
fn wait_at(stage: &mut Stage, node: Node, once: bool) -> Result<Run, ExitStatus> {
    stage.events.speak_as("standby");
    let TakenOver { machine, guid, term } = node.wait(stage, once)?;
    let mut run = Run::new(stage, &machine, node.console(), node.name(), node.guests());
    (run.guid, run.term) = (Some(guid), Some(term));
    run.section = stage.draft().mirror;
    stage.hand_over_metadata(machine.metadata());
    let exit = machine.exit_handle();
    run.running = Some(machine);
    run.node = Some(node);
    run.seek_standby(SEEK_FIRST);
    if let Err(error) = run.take_seat(stage, exit) {
        run.events.tell(Report::Failed { reason: format!("the guest's end will not be noticed: {error}") });
    }
    Ok(run)
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
