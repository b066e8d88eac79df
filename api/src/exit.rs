//! How the command ends: one place for exit statuses.

use std::process::ExitCode;

/// The exit statuses of the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitStatus {
    /// All is well: the guest ended with code 0; of a demo or drill nothing was lost.
    Success = 0,
    /// What the other statuses do not tell apart; of a demo or drill: something was lost, regressed or wrong.
    Failure = 1,
    /// The command line is wrong (as clap has it).
    Usage = 2,
    /// The guest ended with a code other than 0.
    GuestFailed = 3,
    /// The guest crashed, or KVM could not go on with it.
    GuestCrashed = 4,
    /// Another side runs the guest: this one has stopped and released nothing more.
    Frozen = 5,
    /// A standby with `--once` did not run the guest: nothing complete to run, or fenced by the witness.
    Refused = 6,
    /// A kernel or initrd cannot be read or loaded.
    NoKernel = 66,
    /// The host cannot run guests: no usable /dev/kvm.
    Unavailable = 69,
    /// The other process (standby, API socket) cannot be reached or turned the request down.
    Unreachable = 75,
    /// The configuration is wrong.
    Config = 78,
    /// Ended by a signal (SIGINT, SIGTERM, SIGHUP) before the guest had ended.
    Interrupted = 130,
}

impl ExitStatus {
    /// All of them.
    const ALL: [Self; 12] = [
        Self::Success,
        Self::Failure,
        Self::Usage,
        Self::GuestFailed,
        Self::GuestCrashed,
        Self::Frozen,
        Self::Refused,
        Self::NoKernel,
        Self::Unavailable,
        Self::Unreachable,
        Self::Config,
        Self::Interrupted,
    ];

    /// The status with this number.
    pub fn from_code(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|status| i32::from(*status as u8) == code)
    }
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        (status as u8).into()
    }
}

/// The table for `--help`.
pub const EXIT_STATUSES: &str = "\
Exit status:
   0  success: the guest ended with code 0; of a demo or drill: nothing was lost
   1  failure; of a demo or drill: something was lost, regressed or wrong
   2  wrong command line
   3  the guest ended with a code other than 0
   4  the guest crashed, or KVM could not go on with it
   5  another side runs the guest: this one is frozen
   6  standby --once: the guest was not run here
  66  a kernel or initrd cannot be read or loaded
  69  the host cannot run guests: no usable /dev/kvm
  75  the standby or the API socket cannot be reached, or turned the request down
  78  wrong configuration
 130  ended by SIGINT, SIGTERM or SIGHUP";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_is_in_the_table() {
        for status in ExitStatus::ALL {
            let start = format!("{:>4}  ", status as u8);
            assert!(EXIT_STATUSES.lines().any(|line| line.starts_with(&start)), "{status:?}");
        }
    }
}
