//! How a guest's run ends, and who is told.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// How a guest's run ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// The guest wrote this code to the exit port.
    Code(u8),
    /// The guest asked for a reset.
    Reset,
    /// The guest turned its machine off.
    PowerOff,
    /// The guest shut down, most likely by a triple fault.
    Shutdown,
    /// A vCPU cannot go on; why.
    Error(String),
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "the guest ended with exit code {code}"),
            Self::PowerOff => write!(f, "the guest turned its machine off"),
            Self::Reset => write!(f, "the guest asked for a reset"),
            Self::Shutdown => write!(f, "the guest shut down (triple fault)"),
            Self::Error(why) => write!(f, "the guest cannot go on: {why}"),
        }
    }
}

#[derive(Default)]
struct Cell {
    exit: Mutex<Option<Exit>>,
    set: Condvar,
}

/// Waits for the end of a guest's run. Clones wait for the same end.
#[derive(Clone, Default)]
pub struct ExitHandle(Arc<Cell>);

impl ExitHandle {
    /// Waits until the run has ended.
    pub fn wait(&self) -> Exit {
        let mut exit = self.lock();
        loop {
            if let Some(exit) = &*exit {
                return exit.clone();
            }
            exit = self.0.set.wait(exit).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until the run has ended, at most `timeout`.
    pub fn wait_timeout(&self, timeout: Duration) -> Option<Exit> {
        let end = Instant::now() + timeout;
        let mut exit = self.lock();
        while exit.is_none() {
            let left = end.checked_duration_since(Instant::now())?;
            (exit, _) = self.0.set.wait_timeout(exit, left).unwrap_or_else(PoisonError::into_inner);
        }
        exit.clone()
    }

    /// How the run ended, if it has.
    pub fn get(&self) -> Option<Exit> {
        self.lock().clone()
    }

    /// The run has ended. The first end is the end.
    pub(crate) fn set(&self, exit: Exit) {
        self.lock().get_or_insert(exit);
        self.0.set.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Option<Exit>> {
        self.0.exit.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
