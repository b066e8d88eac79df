//! `understudy top`: a pair, live, on the whole screen.

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyEventKind};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use thiserror::Error;

use crate::cli::SocketOptions;
use crate::client::{self, ClientError};
use crate::exit::ExitStatus;
use crate::long::Interrupt;

mod keys;
mod model;
mod view;

use keys::{Order, Step, step};
use model::{Model, Sample};
use view::Footer;

/// Time between two questions.
const SAMPLING: Duration = Duration::from_millis(250);

/// How long a key, an answer or a signal may wait.
const GLANCE: Duration = Duration::from_millis(50);

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
    let (instance, mirror) = (client::get(socket, "/")?, client::mirror(socket)?);
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

impl View {
    fn run(mut self, terminal: &mut DefaultTerminal, interrupt: &Interrupt) -> io::Result<ExitStatus> {
        loop {
            terminal.draw(|frame| view::draw(frame, &self.model, &self.footer))?;
            if !key_or_glance()? {
                return Ok(ExitStatus::Interrupted);
            }
            if event::poll(Duration::ZERO)?
                && let Event::Key(key) = event::read()?
                && key.kind == KeyEventKind::Press
            {
                match step(key, &self.footer, self.model.orders()) {
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
            let words = order.carry_out(&socket);
            let words = words.unwrap_or_else(|error| format!("not done: {}", brief(error)));
            // The view may have been left.
            let _ = tell.send(Heard::Done(words));
        })?;
        Ok(())
    }
}

/// Waits until a key is pressed, or for [`GLANCE`]; false if the terminal is gone: to read from it would never end.
fn key_or_glance() -> io::Result<bool> {
    let stdin = io::stdin();
    let mut fds = [PollFd::new(&stdin, PollFlags::IN)];
    match poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: GLANCE.as_nanos() as i64 })) {
        Ok(_) | Err(Errno::INTR) => Ok(!fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests;
