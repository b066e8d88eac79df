//! What every long-running subcommand does with its process: signals, its parent, its terminal.

use std::io::{self, IsTerminal, Read};
use std::thread;

use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::signal::unix::{SignalKind, signal};

/// Ends this process when the process `parent` ends. Returns `false` if it has ended already.
///
/// # Errors
/// The kernel refuses, which no kernel does.
pub fn end_with_parent(parent: i32) -> io::Result<bool> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    Ok(getppid().is_some_and(|pid| pid.as_raw_nonzero().get() == parent))
}

/// Calls `ended` when the process is asked to end (SIGINT, SIGTERM, SIGHUP), each time.
///
/// # Errors
/// The signals or the thread that waits for them cannot be set up.
pub fn on_end_request(ended: impl Fn() + Send + 'static) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let mut signals = {
        let _context = runtime.enter();
        [signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?]
    };
    thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(async {
            loop {
                let [first, second, third] = &mut signals;
                tokio::select! {
                    _ = first.recv() => {}
                    _ = second.recv() => {}
                    _ = third.recv() => {}
                }
                ended();
            }
        });
    })?;
    Ok(())
}

/// Stdin as the guest's keyboard: single keys, no echo (the guest echoes). Undone when dropped.
pub struct Keyboard {
    before: Option<Termios>,
}

impl Keyboard {
    /// Takes the keyboard if stdin is a terminal. Ctrl-C and its like still reach this process.
    pub fn take() -> Self {
        let before = io::stdin().is_terminal().then(|| tcgetattr(io::stdin()).ok()).flatten();
        if let Some(mut modes) = before.clone() {
            modes.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO);
            // A terminal that does not take it stays as it is.
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, &modes);
        }
        Self { before }
    }
}

impl Drop for Keyboard {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            // A terminal that is gone needs nothing more.
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
        }
    }
}

/// Gives what comes from stdin to `send`, which says how many bytes it took, until stdin ends. In a thread of its own.
///
/// # Errors
/// The thread cannot be started.
pub fn forward_stdin(mut send: impl FnMut(&[u8]) -> usize + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name("serial-in".into()).spawn(move || {
        let mut chunk = [0; 4096];
        let mut stdin = io::stdin().lock();
        while let Ok(count @ 1..) = stdin.read(&mut chunk) {
            let mut left = &chunk[..count];
            while !left.is_empty() {
                left = &left[send(left).min(left.len())..];
                if !left.is_empty() {
                    // The guest reads slowly; nothing tells when there is room again.
                    thread::sleep(std::time::Duration::from_millis(10));
                }
            }
        }
    })?;
    Ok(())
}
