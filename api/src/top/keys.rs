//! The keys, and what they lead to.

use std::path::Path;

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::view::Footer;
use crate::client::{self, ClientError};
use crate::server::MirrorStatus;
use crate::server::types::{Switchover as Done, VmState};
use crate::switchover::PROMOTED;

/// What can be ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Pause,
    Resume,
    Switchover,
    Promote,
}

use Order::{Pause, Promote, Resume, Switchover};

/// What a key leads to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    Nothing,
    Quit,
    Show(Footer),
    Do(Order),
}

/// What can be ordered of a process with this mirror.
pub(super) fn orders(mirror: Option<&MirrorStatus>) -> &'static [Order] {
    match mirror {
        None => &[Pause, Resume],
        Some(MirrorStatus::Primary(_)) => &[Pause, Resume, Switchover],
        // Whether its primary is lost, or only out of sight, is for an operator to say.
        Some(MirrorStatus::Standby(status)) if status.phase == "orphaned" => &[Promote],
        Some(MirrorStatus::Standby(_)) => &[],
    }
}

/// What `key` leads to where these can be ordered.
pub(super) fn step(key: KeyEvent, footer: &Footer, orders: &[Order]) -> Step {
    if key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL) {
        return Step::Quit;
    }
    match (footer, key.code) {
        (Footer::Question(order), KeyCode::Char('y')) => Step::Do(*order),
        (Footer::Question(_), _) => Step::Show(Footer::Keys),
        (_, KeyCode::Char('q')) => Step::Quit,
        (_, KeyCode::Char(letter))
            if let Some(order) = orders.iter().find(|order| order.key().0 == letter) =>
        {
            if order.question().is_some() { Step::Show(Footer::Question(*order)) } else { Step::Do(*order) }
        }
        (Footer::Said(_), _) => Step::Show(Footer::Keys),
        _ => Step::Nothing,
    }
}

impl Order {
    /// Its key, and what it is called.
    pub(super) fn key(self) -> (char, &'static str) {
        match self {
            Pause => ('p', "pause"),
            Resume => ('r', "resume"),
            Switchover => ('s', "switchover"),
            Promote => ('f', "promote"),
        }
    }

    /// What is asked first, where it cannot be taken back.
    pub(super) fn question(self) -> Option<&'static str> {
        match self {
            Pause | Resume => None,
            Switchover => Some("Let the standby run the guest from now on?"),
            Promote => Some("Run the guest here? Only if its primary is surely dead."),
        }
    }

    /// Has it done by the process at `socket`, and says how it went.
    pub(super) fn carry_out(self, socket: &Path) -> Result<String, ClientError> {
        match self {
            Pause => client::set_state(socket, VmState::Paused).map(|()| "the guest stands still".into()),
            Resume => client::set_state(socket, VmState::Resumed).map(|()| "the guest runs".into()),
            Switchover => client::switchover(socket, None).map(Done::words),
            Promote => client::promote(socket).map(|()| PROMOTED.into()),
        }
    }
}
