//! Changes to the devices of a machine while its guest runs.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use devices::i8042::KeyboardError;
use devices::rate_limiter::RateLimiterConfig;
use devices::virtio::balloon::Balloon;
use devices::virtio::block::{Block, BlockError};
use devices::virtio::net::Net;
use devices::virtio::{DeviceCounters, OutputPolicy, VirtioSlot};
use thiserror::Error;

use crate::config::{DevicesConfig, UnknownDevice};
use crate::machine::Machine;
use crate::vcpu::{ExitCounters, Shared};

/// Why a disk keeps the image that it has.
#[derive(Debug, Error)]
pub enum ChangeImageError {
    /// There is no such disk.
    #[error(transparent)]
    Unknown(#[from] UnknownDevice),
    /// The new image.
    #[error(transparent)]
    Block(#[from] BlockError),
}

/// Changes the limits on a machine's devices, also while the machine belongs to somebody else. They are part of the guest's
/// state: they hold as well where it is restored or taken over. Also presses keys. Clones change the same machine.
#[derive(Clone)]
pub struct DeviceLimits {
    shared: Arc<Shared>,
    drives: Vec<String>,
    nets: Vec<String>,
    /// Where the balloon is among the devices.
    balloon: Option<usize>,
}

/// What a balloon's guest tells of its memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BalloonFigures {
    /// Pages of 4 KiB that the guest is asked to give back.
    pub target: u32,
    /// Pages that it has given.
    pub actual: u32,
    /// Its figures by tag (virtio 1.2, 5.5.6.4).
    pub by_tag: BTreeMap<u16, u64>,
}

impl DeviceLimits {
    /// What the disks, the cards and the socket device have done so far, by their names. Takes no lock.
    pub fn counters(&self) -> Vec<(String, DeviceCounters)> {
        let names = self.drives.iter().chain(&self.nets).map(String::as_str).chain(["vsock"]);
        let counted = |(slot, name): (&VirtioSlot, &str)| (name.to_owned(), slot.counters().clone());
        let all = self.shared.platform.virtio.slots().iter().zip(names).map(counted);
        all.filter(|(_, counters)| !matches!(counters, DeviceCounters::None)).collect()
    }

    /// How often vCPUs have left the guest so far, by reason. Takes no lock.
    pub fn exits(&self) -> &ExitCounters {
        &self.shared.exits
    }

    pub(crate) fn new(shared: &Arc<Shared>, devices: &DevicesConfig) -> Self {
        Self {
            shared: Arc::clone(shared),
            drives: devices.drives.iter().map(|drive| drive.id.clone()).collect(),
            nets: devices.nets.iter().map(|net| net.id.clone()).collect(),
            balloon: devices.balloon.as_ref().map(|_| {
                // Disks, cards, the vsock device and the source of random numbers come before it.
                let before = usize::from(devices.vsock.is_some()) + usize::from(devices.entropy.is_some());
                devices.drives.len() + devices.nets.len() + before
            }),
        }
    }

    /// Other limits on the disk `id`; what `change` does not name stays as it is.
    ///
    /// # Errors
    /// There is no such disk.
    pub fn update_drive(&self, id: &str, change: &RateLimiterConfig) -> Result<(), UnknownDevice> {
        let place = UnknownDevice::find("drive", id, &self.drives)?;
        self.shared.platform.virtio.change(place, |block: &mut Block| block.update_limits(change));
        Ok(())
    }

    /// This process is about to end: what is held is never carried out, what is under way is waited for, and then another
    /// side may have the shared disks at once.
    pub fn leave_disks(&self) {
        let virtio = &self.shared.platform.virtio;
        if virtio.fences().is_empty() {
            return;
        }
        virtio.set_output(OutputPolicy::Freeze);
        virtio.drain();
        virtio.fences().let_go();
    }

    /// Presses Ctrl, Alt and Del on the guest's keyboard and lets them go: what it then does is its own affair.
    ///
    /// # Errors
    /// [`KeyboardError`] if the guest would not hear of it.
    pub fn press_ctrl_alt_del(&self) -> Result<(), KeyboardError> {
        self.shared.platform.keyboard().press_ctrl_alt_del()
    }

    /// Asks the guest to give back `mib` MiB in all. False if there is no balloon.
    pub fn inflate_balloon(&self, mib: u32) -> bool {
        let Some(place) = self.balloon else { return false };
        self.shared.platform.virtio.change(place, |balloon: &mut Balloon| balloon.set_amount(mib)).is_some()
    }

    /// Looks at the guest's figures every `seconds` from now on. False if that was not agreed with the guest at its start.
    pub fn watch_balloon(&self, seconds: u16) -> bool {
        let change = |balloon: &mut Balloon| balloon.set_interval(seconds);
        self.balloon.and_then(|place| self.shared.platform.virtio.change(place, change)).unwrap_or(false)
    }

    /// What the guest tells of its memory; `None` if there is no balloon.
    pub fn balloon_figures(&self) -> Option<BalloonFigures> {
        let look = |balloon: &mut Balloon| {
            let (by_tag, actual) = balloon.statistics();
            BalloonFigures { target: balloon.target(), actual, by_tag: by_tag.clone() }
        };
        self.shared.platform.virtio.change(self.balloon?, look)
    }

    /// Other limits on what the network card `id` receives and sends; what the changes do not name stays as it is.
    ///
    /// # Errors
    /// There is no such card.
    pub fn update_net(
        &self,
        id: &str,
        receive: &RateLimiterConfig,
        send: &RateLimiterConfig,
    ) -> Result<(), UnknownDevice> {
        let place = UnknownDevice::find("network interface", id, &self.nets)?;
        let change = |net: &mut Net| net.update_limits(receive, send);
        // Cards come behind the disks.
        self.shared.platform.virtio.change(self.drives.len() + place, change);
        Ok(())
    }
}

impl Machine {
    /// Gives the disk `id` the image at `path`, and tells the guest. The configuration has it from now on: a snapshot or a
    /// standby that comes later asks for it.
    ///
    /// # Errors
    /// [`ChangeImageError`]; the disk then has the image that it had.
    pub fn change_image(&mut self, id: &str, path: &Path) -> Result<(), ChangeImageError> {
        let (config, virtio) = self.devices_to_change();
        let drives: Vec<&str> = config.drives.iter().map(|drive| drive.id.as_str()).collect();
        let place = UnknownDevice::find("drive", id, &drives)?;
        virtio.change(place, |block: &mut Block| block.change_image(path)).transpose()?;
        virtio.change(place, |block: &mut Block| virtio.fences().image_changed(block));
        virtio.tell_of_change(place);
        config.drives[place].path = path.into();
        Ok(())
    }
}
