//! `understudy attach` and `detach`: a standby for a guest that runs, and none any more.

use std::path::Path;
use std::time::{Duration, Instant};

use mirror::link::Address;
use thiserror::Error;

use crate::cli::{AttachOptions, PaceOptions, SocketOptions, StandbyOptions};
use crate::client::{self, ClientError, Method};
use crate::config::{BadValue, MirrorSection};
use crate::exit::ExitStatus;
use crate::long::{GLANCE, Interrupt, watched};
use crate::progress::Progress;
use crate::server::{InstanceInfo, InstanceState, MirrorStatus};

/// How long a standby may take to be reached: it may wait for space.
const LONG: Duration = Duration::from_hours(24);

/// How long the mirror may take to tell of itself.
const FIRST_SIGN: Duration = Duration::from_secs(10);

/// How long it may take to let go of a standby.
const PATIENCE: Duration = Duration::from_mins(1);

/// Why a guest is not protected.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The question.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The process.
    #[error("cannot set up the process: {0}")]
    Process(#[from] std::io::Error),
    /// It did not come to lockstep.
    #[error(
        "the guest is not protected: the mirror is {0}; the messages of both sides say why. Attach again when that is mended"
    )]
    Over(String),
    /// It says nothing.
    #[error("the mirror does not tell of itself; ask again with `understudy status`")]
    Silent,
}

/// Attaches a standby, and waits until the guest is protected.
///
/// # Errors
/// [`AttachError`]: the guest runs on without protection, if it ran.
pub fn attach(options: &AttachOptions) -> Result<ExitStatus, AttachError> {
    let socket = &options.api_sock;
    let interrupt = Interrupt::watch()?;
    let section = section(options);
    let info: InstanceInfo = client::get(socket, "/")?;
    // A standby that is reached after a Ctrl-C is detached again below.
    watched(|| client::send(socket, Method::PUT, "/mirror", &section, LONG), || {})?;
    if info.state == InstanceState::NotStarted {
        println!("the guest will be mirrored to {} from its first instruction on", section.standby);
        return Ok(ExitStatus::Success);
    }
    let mut progress = Progress::new(options.progress);
    let asked = Instant::now();
    loop {
        if interrupt.asked() {
            progress.finish();
            return Ok(break_off(socket));
        }
        // A standby's own status would be no news of this guest's.
        match client::mirror(socket)?.and_then(MirrorStatus::primary) {
            None if asked.elapsed() > FIRST_SIGN => return Err(AttachError::Silent),
            None => {}
            Some(status) => match status.phase.as_str() {
                "lockstep" | "handing over" | "handed over" => {
                    progress.finish();
                    println!(
                        "the guest is protected by {}: term {}, epoch {}, after seeding round {}",
                        status.standby, status.term, status.epoch, status.round
                    );
                    return Ok(ExitStatus::Success);
                }
                "solo" | "suspended" | "frozen" | "ended" | "releasing" => {
                    return Err(AttachError::Over(status.phase));
                }
                _ if status.round > 0 => {
                    let name = format!("seeding round {}", status.round);
                    progress.tell(&name, status.round_sent, status.round_pages);
                }
                _ => {}
            },
        }
        std::thread::sleep(GLANCE);
    }
}

fn break_off(socket: &Path) -> ExitStatus {
    match client::send(socket, Method::DELETE, "/mirror", &(), PATIENCE) {
        Ok(()) => eprintln!("broken off: the guest runs on WITHOUT PROTECTION"),
        Err(error) => eprintln!("error: seeding is not broken off: {error}"),
    }
    ExitStatus::Interrupted
}

fn section(options: &AttachOptions) -> MirrorSection {
    let standbys: Vec<Address> = options.standby.iter().map(seen_from_anywhere).collect();
    let (witness, witness_access) = options.witness.seen_from_anywhere();
    MirrorSection {
        witness,
        witness_access,
        guid: options.guid,
        listen: options.listen.as_ref().map(seen_from_anywhere),
        second_listen: options.second_listen.as_ref().map(seen_from_anywhere),
        wait_for_space: options.wait_for_space,
        ..options.pace.section(standbys)
    }
}

impl PaceOptions {
    /// A guest mirrored to the first of `standbys` that takes it, so as is said here.
    fn section(&self, standbys: Vec<Address>) -> MirrorSection {
        let default = MirrorSection::to(standbys);
        MirrorSection {
            interval_ms: self.interval_ms.unwrap_or(default.interval_ms),
            // An interval shorter than the shortest by default is meant.
            min_interval_ms: self
                .min_interval_ms
                .unwrap_or(default.min_interval_ms.min(self.interval_ms.unwrap_or(u32::MAX))),
            pause_budget_ms: self.pause_budget_ms.unwrap_or(default.pause_budget_ms),
            dirty_budget_pages: self.dirty_budget_pages.unwrap_or(default.dirty_budget_pages),
            heartbeat_ms: self.heartbeat_ms.unwrap_or(default.heartbeat_ms),
            heartbeat_misses: self.heartbeat_misses.unwrap_or(default.heartbeat_misses),
            stall_ms: self.stall_ms.unwrap_or(default.stall_ms),
            standbys_at_once: self.standbys_at_once.unwrap_or(default.standbys_at_once),
            standbys_needed: self.standbys_needed,
            staging_mib: self.staging_mib.unwrap_or(default.staging_mib),
            standby_lost: self.standby_lost.unwrap_or_default(),
            ..default
        }
    }
}

impl StandbyOptions {
    /// How the guest is to be mirrored once it runs here; `None` if nobody was named.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn mirror_section(&self) -> Result<Option<MirrorSection>, BadValue> {
        if self.standby.is_empty() {
            return Ok(None);
        }
        let section = MirrorSection {
            witness: self.witness.witness.clone(),
            witness_access: self.witness.access(),
            ..self.pace.section(self.standby.clone())
        };
        section.check()?;
        Ok(Some(section))
    }
}

/// The process that runs the guest has a folder of its own.
fn seen_from_anywhere(address: &Address) -> Address {
    match address {
        Address::Unix(path) => Address::Unix(client::absolute(path)),
        Address::Tcp(_) => address.clone(),
    }
}

/// Lets the standby forget the guest, which runs on alone.
///
/// # Errors
/// [`ClientError`]
pub fn detach(options: &SocketOptions) -> Result<(), ClientError> {
    client::send(&options.api_sock, Method::DELETE, "/mirror", &(), PATIENCE)?;
    println!("the standby has forgotten the guest, which runs on WITHOUT PROTECTION");
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use mirror::witness::{WitnessAccess, WitnessAddress};

    use super::*;
    use crate::cli::{Cli, Command};

    fn parsed(arguments: &[&str]) -> MirrorSection {
        let line = ["understudy", "attach", "--api-sock", "s", "--standby"];
        let cli = Cli::try_parse_from(line.iter().chain(arguments)).unwrap();
        let Some(Command::Attach(options)) = cli.command else { panic!("another command") };
        section(&options)
    }

    #[test]
    fn what_is_not_said_is_as_by_default() {
        let address: Address = "tcp:192.0.2.2:7000".parse().unwrap();
        assert_eq!(parsed(&["tcp:192.0.2.2:7000"]), MirrorSection::to(address));
    }

    #[test]
    fn paths_are_sent_as_the_other_process_sees_them() {
        let section = parsed(&["unix:here/s", "--witness", "w"]);
        let here = std::env::current_dir().unwrap();
        assert_eq!(section.witness, Some(WitnessAddress::File(here.join("w"))));
        assert_eq!(section.standby.all(), [Address::Unix(here.join("here/s"))]);
    }

    #[test]
    fn etcd_and_the_files_it_takes_are_sent_as_the_other_process_sees_them() {
        let section = parsed(&["unix:/s", "--witness", "etcd:a:1,b:2", "--witness-ca", "ca.pem"]);
        assert_eq!(section.witness, Some("etcd:a:1,b:2".parse().unwrap()));
        let ca = Some(std::env::current_dir().unwrap().join("ca.pem"));
        assert_eq!(section.witness_access, WitnessAccess { ca, ..WitnessAccess::default() });
    }

    #[test]
    fn interval_shorter_than_the_shortest_by_default_is_taken() {
        let section = parsed(&["unix:/s", "--interval-ms", "1"]);
        assert_eq!((section.interval_ms, section.min_interval_ms), (1, 1));
    }
}
