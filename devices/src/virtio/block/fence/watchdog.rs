//! A watchdog that resets a host on which an old owner may still write.
//!
//! An owner that can be superseded pets it only as long as it has fresh proof that it is not: an epoch that the standby has
//! committed, counted from the moment at which it was *captured*, because the answer may have been on its way for long. With
//! T the watchdog's time, a proof is fresh for T / 2. A process can be stopped for nearly T between the look at its proof
//! and the petting, without being reset; the host then lives for T more. So 2.5 T after a new owner was granted the guest,
//! the old one's host has been reset, or has stood down. (Linux, Documentation/watchdog/watchdog-api.rst.)

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::FenceError;
use crate::virtio::block::config::WatchdogConfig;

/// Sets the time in seconds, and gives back what it has become (linux/watchdog.h, `_IOWR('W', 6, int)`).
const WDIOC_SETTIMEOUT: libc::Ioctl = 0xc004_5706_u32 as libc::Ioctl;
/// What is written to say that the watchdog is closed on purpose.
const STAND_DOWN: &[u8] = b"V";
/// What is written to pet it: anything else.
const PET: &[u8] = b"\0";

/// Whether the watchdog may be petted.
pub(super) struct Leash {
    /// Times are microseconds since then.
    base: Instant,
    /// For how long a proof is fresh.
    fresh: Duration,
    captured: AtomicU64,
    proven: AtomicU64,
    lost: AtomicBool,
}

/// A proof that does not age: nobody can take over.
const ALONE: u64 = u64::MAX;

impl Leash {
    pub(super) fn new(timeout: Duration, now: Instant) -> Self {
        Self {
            base: now,
            fresh: timeout / 2,
            captured: AtomicU64::new(0),
            proven: AtomicU64::new(ALONE),
            lost: AtomicBool::new(false),
        }
    }

    fn micros(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.base).as_micros() as u64
    }

    pub(super) fn exposed(&self, now: Instant) {
        let now = self.micros(now);
        self.captured.store(now, Ordering::Relaxed);
        self.proven.store(now, Ordering::Release);
    }

    pub(super) fn captured(&self, now: Instant) {
        self.captured.store(self.micros(now), Ordering::Relaxed);
    }

    pub(super) fn committed(&self) {
        if self.proven.load(Ordering::Acquire) != ALONE {
            self.proven.store(self.captured.load(Ordering::Relaxed), Ordering::Release);
        }
    }

    pub(super) fn lost(&self) {
        self.lost.store(true, Ordering::Release);
    }

    /// Nobody can take over: as in the beginning.
    fn alone(&self) {
        self.proven.store(ALONE, Ordering::Release);
    }

    /// Whether there is fresh proof that this side owns the guest.
    pub(super) fn may_pet(&self, now: Instant) -> bool {
        let proven = self.proven.load(Ordering::Acquire);
        let age = Duration::from_micros(self.micros(now).saturating_sub(proven));
        !self.lost.load(Ordering::Acquire) && (proven == ALONE || age < self.fresh)
    }
}

/// How long after its grant a new owner waits.
pub(super) fn time_to_wait(timeout: Duration) -> Duration {
    timeout * 5 / 2
}

/// The thread that pets.
struct Keeper {
    stand_down: SyncSender<()>,
    thread: JoinHandle<()>,
}

/// A watchdog device.
pub(super) struct Watchdog {
    config: WatchdogConfig,
    leash: Arc<Leash>,
    keeper: Mutex<Option<Keeper>>,
}

impl Watchdog {
    pub(super) fn new(config: WatchdogConfig) -> Self {
        let leash = Arc::new(Leash::new(config.timeout(), Instant::now()));
        Self { config, leash, keeper: Mutex::default() }
    }

    pub(super) fn config(&self) -> &WatchdogConfig {
        &self.config
    }

    pub(super) fn leash(&self) -> &Leash {
        &self.leash
    }

    /// Whether there is one that could be armed here, too. It cannot be opened to find out: that arms it.
    pub(super) fn check(&self) -> Result<(), FenceError> {
        let metadata = std::fs::metadata(&self.config.device);
        let metadata = metadata.map_err(|cause| self.wrong(format!("{cause}; is its driver loaded?")))?;
        if metadata.file_type().is_char_device() { Ok(()) } else { Err(self.wrong("it is no device")) }
    }

    /// Arms it, if it is not.
    pub(super) fn arm(&self) -> Result<(), FenceError> {
        let mut keeper = self.keeper();
        if keeper.is_some() {
            return Ok(());
        }
        self.check()?;
        let device = OpenOptions::new().write(true).open(&self.config.device);
        let mut device = device.map_err(|cause| self.wrong(format!("it cannot be opened: {cause}")))?;
        if let Err(reason) = set_timeout(&device, self.config.timeout_s) {
            let _ = device.write(STAND_DOWN);
            return Err(self.wrong(reason));
        }
        self.leash.alone();
        *keeper = Some(keep(device, Arc::clone(&self.leash), self.config.timeout()).map_err(|cause| {
            // The device was closed without a word: this host is reset.
            self.wrong(format!("cannot start a thread: {cause}"))
        })?);
        Ok(())
    }

    /// Disarms it: nobody needs to be kept from anything.
    pub(super) fn stand_down(&self) {
        if let Some(Keeper { stand_down, thread }) = self.keeper().take() {
            // It may have ended because the device failed.
            let _ = stand_down.send(());
            let _ = thread.join();
        }
        self.leash.alone();
    }

    /// Waits until the old owner's host has been reset, if it had to be.
    pub(super) fn wait_out(&self, since: Instant, tell: &mut dyn FnMut(String)) {
        let until = since + time_to_wait(self.config.timeout());
        let left = until.saturating_duration_since(Instant::now());
        if !left.is_zero() {
            tell(format!(
                "the guest waits {:.1} s, until the watchdog has reset the old primary's host",
                left.as_secs_f64()
            ));
            thread::sleep(left);
        }
    }

    fn keeper(&self) -> MutexGuard<'_, Option<Keeper>> {
        self.keeper.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wrong(&self, reason: impl Into<String>) -> FenceError {
        FenceError::Watchdog { device: self.config.device.clone(), reason: reason.into() }
    }
}

fn set_timeout(device: &File, seconds: u32) -> Result<(), String> {
    let mut becomes = seconds as libc::c_int;
    // SAFETY: the descriptor is open, and the request reads and writes one int, which is there.
    let outcome = unsafe { libc::ioctl(device.as_raw_fd(), WDIOC_SETTIMEOUT, &raw mut becomes) };
    if outcome < 0 {
        let cause = io::Error::last_os_error();
        return Err(format!("its time cannot be set to {seconds} s: {cause}"));
    }
    if becomes as u32 != seconds {
        return Err(format!("it makes {becomes} s of {seconds} s; give the drive that time (timeout_s)"));
    }
    Ok(())
}

/// Pets `device` as long as `leash` allows it, until it is told to stand down. Where it ends without that, the device is closed
/// unpetted, and the host is reset.
fn keep(mut device: impl Write + Send + 'static, leash: Arc<Leash>, timeout: Duration) -> io::Result<Keeper> {
    let (stand_down, told) = sync_channel(1);
    let thread = thread::Builder::new().name("watchdog".into()).spawn(move || {
        loop {
            match told.recv_timeout(timeout / 8) {
                Err(RecvTimeoutError::Timeout) if leash.may_pet(Instant::now()) => {
                    if device.write_all(PET).is_err() {
                        return;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Ok(()) => {
                    let _ = device.write_all(STAND_DOWN);
                    return;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    })?;
    Ok(Keeper { stand_down, thread })
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    /// A keeper of something that is no device; the first stands it down.
    pub(in super::super) fn keep_other(
        device: impl Write + Send + 'static,
        leash: Arc<Leash>,
        timeout: Duration,
    ) -> impl FnOnce() {
        let Keeper { stand_down, thread } = keep(device, leash, timeout).unwrap();
        move || {
            stand_down.send(()).unwrap();
            thread.join().unwrap();
        }
    }
}
