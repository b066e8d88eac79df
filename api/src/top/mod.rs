//! `understudy top`: a pair, live, on the whole screen.

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use thiserror::Error;

use crate::cli::SocketOptions;
use crate::client::{self, ClientError, Method};
use crate::exit::ExitStatus;
use crate::long::Interrupt;
use crate::server::types::{Vm, VmState};
use crate::server::{InstanceInfo, MirrorStatus, Switchover};

mod model;
mod view;

use model::{Model, Sample};
use view::Footer;

/// Time between two questions.
const SAMPLING: Duration = Duration::from_millis(250);

/// How long a key, an answer or a signal may wait.
const GLANCE: Duration = Duration::from_millis(50);

/// How long an order may take.
const PATIENCE: Duration = Duration::from_mins(1);

/// Why there is no live view.
#[derive(Debug, Error)]
pub enum TopError {
    /// The process that is watched.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Nobody could see it.
    #[error("a live view needs a terminal; elsewhere, use `understudy status --watch`")]
    NoTerminal,
    /// The terminal.
    #[error("cannot draw on this terminal: {0}")]
    Terminal(#[from] io::Error),
}

/// What the view waits for.
enum Heard {
    Sample(Box<Sample>),
    Silence(String),
    Done(String),
}

/// Shows how a process is until q is pressed.
///
/// # Errors
/// [`TopError`]; the terminal is as it was.
pub fn top(options: &SocketOptions) -> Result<ExitStatus, TopError> {
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return Err(TopError::NoTerminal);
    }
    let first = ask(&options.api_sock)?;
    let interrupt = Interrupt::watch()?;
    let (tell, heard) = channel();
    let (socket, telling) = (options.api_sock.clone(), tell.clone());
    thread::Builder::new().name("sampler".into()).spawn(move || sample(&socket, &telling))?;
    let mut model = Model::default();
    model.take(first);
    let view = View { model, footer: Footer::Keys, socket: options.api_sock.clone(), tell, heard };
    // It also restores the terminal in a panic, before the process ends.
    let mut terminal = ratatui::try_init()?;
    let outcome = view.run(&mut terminal, &interrupt);
    ratatui::try_restore()?;
    Ok(outcome?)
}

fn ask(socket: &Path) -> Result<Sample, ClientError> {
    let instance: InstanceInfo = client::get(socket, "/")?;
    let mirror: Option<MirrorStatus> = match client::get(socket, "/mirror") {
        Err(ClientError::Fault { status: 404, .. }) => None,
        answer => Some(answer?),
    };
    Ok(Sample { at: Instant::now(), instance, mirror })
}

/// Asks until nobody listens.
fn sample(socket: &Path, tell: &Sender<Heard>) {
    loop {
        let heard = ask(socket)
            .map_or_else(|error| Heard::Silence(brief(error)), |sample| Heard::Sample(Box::new(sample)));
        if tell.send(heard).is_err() {
            return;
        }
        thread::sleep(SAMPLING);
    }
}

/// What of an error fits into a line.
fn brief(error: ClientError) -> String {
    match error {
        ClientError::Connect { source, .. } => source.to_string(),
        ClientError::Fault { message, .. } => message,
        ClientError::Answer { reason, .. } => reason,
    }
}

struct View {
    model: Model,
    footer: Footer,
    socket: PathBuf,
    tell: Sender<Heard>,
    heard: Receiver<Heard>,
}

/// What a key leads to.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Nothing,
    Quit,
    Show(Footer),
    Do(Order),
}

/// What can be ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    State(VmState),
    Switchover,
}

const SWITCHOVER: &str = "Let the standby run the guest from now on?";

impl View {
    fn run(mut self, terminal: &mut DefaultTerminal, interrupt: &Interrupt) -> io::Result<ExitStatus> {
        loop {
            terminal.draw(|frame| view::draw(frame, &self.model, &self.footer))?;
            // A key is acted on at once; samples and signals when they are looked for.
            if event::poll(GLANCE)?
                && let Event::Key(key) = event::read()?
                && key.kind == KeyEventKind::Press
            {
                match step(key, &self.footer) {
                    Step::Nothing => {}
                    Step::Quit => return Ok(ExitStatus::Success),
                    Step::Show(footer) => self.footer = footer,
                    Step::Do(order) => self.order(order)?,
                }
            }
            if interrupt.asked() {
                return Ok(ExitStatus::Interrupted);
            }
            while let Ok(heard) = self.heard.try_recv() {
                match heard {
                    Heard::Sample(sample) => self.model.take(*sample),
                    Heard::Silence(why) => self.model.silence = Some(why),
                    Heard::Done(words) => self.footer = Footer::Said(words),
                }
            }
        }
    }

    /// Has it done in a thread: the view goes on.
    fn order(&mut self, order: Order) -> io::Result<()> {
        self.footer = Footer::Said("asked …".into());
        let (socket, tell) = (self.socket.clone(), self.tell.clone());
        thread::Builder::new().name("order".into()).spawn(move || {
            let words =
                carry_out(&socket, order).unwrap_or_else(|error| format!("not done: {}", brief(error)));
            // The view may have been left.
            let _ = tell.send(Heard::Done(words));
        })?;
        Ok(())
    }
}

fn step(key: KeyEvent, footer: &Footer) -> Step {
    if key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL) {
        return Step::Quit;
    }
    match (footer, key.code) {
        (Footer::Question(_), KeyCode::Char('y')) => Step::Do(Order::Switchover),
        (Footer::Question(_), _) => Step::Show(Footer::Keys),
        (_, KeyCode::Char('q')) => Step::Quit,
        (_, KeyCode::Char('p')) => Step::Do(Order::State(VmState::Paused)),
        (_, KeyCode::Char('r')) => Step::Do(Order::State(VmState::Resumed)),
        (_, KeyCode::Char('s')) => Step::Show(Footer::Question(SWITCHOVER)),
        (Footer::Said(_), _) => Step::Show(Footer::Keys),
        _ => Step::Nothing,
    }
}

fn carry_out(socket: &Path, order: Order) -> Result<String, ClientError> {
    match order {
        Order::State(state) => {
            client::send(socket, Method::PATCH, "/vm", &Vm { state }, PATIENCE)?;
            let words = match state {
                VmState::Paused => "the guest stands still",
                VmState::Resumed => "the guest runs",
            };
            Ok(words.into())
        }
        Order::Switchover => {
            let done: Switchover = client::put(socket, "/mirror/switchover", PATIENCE)?;
            Ok(format!(
                "the standby runs the guest; it stood still for {:.1} ms",
                done.pause_us as f64 / 1000.0
            ))
        }
    }
}

#[cfg(test)]
mod tests;
