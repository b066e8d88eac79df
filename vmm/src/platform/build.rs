//! From configuration to virtio devices.

use std::sync::Arc;

use devices::virtio::{GuestRam, VirtioDevice};
use thiserror::Error;

use crate::config::DevicesConfig;

/// A device that cannot be had on this host.
#[derive(Debug, Error)]
pub enum DeviceCreateError {}

/// Builds the devices that `config` names, in the order in which the guest finds them: drives, network cards, sockets,
/// random numbers, balloon, console.
#[expect(clippy::unnecessary_wraps, reason = "the devices come next, and each can fail")]
pub(super) fn devices(
    _config: &DevicesConfig,
    _ram: &Arc<GuestRam>,
) -> Result<Vec<Box<dyn VirtioDevice>>, DeviceCreateError> {
    Ok(Vec::new())
}
