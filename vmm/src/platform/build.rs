//! From configuration to virtio devices.

use std::io;

use devices::metadata::Metadata;
use devices::virtio::VirtioDevice;
use devices::virtio::balloon::Balloon;
use devices::virtio::block::{Block, BlockError};
use devices::virtio::console::{Console, ConsoleError};
use devices::virtio::net::{Net, NetError};
use devices::virtio::rng::Rng;
use devices::virtio::vsock::{Vsock, VsockError};
use thiserror::Error;

use crate::config::DevicesConfig;
use crate::memory::Returned;

/// A device that cannot be had on this host.
#[derive(Debug, Error)]
pub enum DeviceCreateError {
    /// A disk.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// A network card.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The metadata service.
    #[error("cannot set up the metadata service: {0}")]
    Metadata(io::Error),
    /// Sockets.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// The balloon.
    #[error("cannot set up the balloon: {0}")]
    Balloon(io::Error),
    /// The console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// Random numbers.
    #[error("cannot set up the source of random numbers: {0}")]
    Rng(io::Error),
}

/// Builds the devices that `config` names, in the order in which the guest finds them: drives, network cards, sockets,
/// random numbers, balloon, console. The guest reads what is in `metadata`.
pub(super) fn devices(
    config: &DevicesConfig,
    returned: &Returned,
    metadata: &Metadata,
) -> Result<Vec<Box<dyn VirtioDevice>>, DeviceCreateError> {
    let mut list: Vec<Box<dyn VirtioDevice>> = Vec::new();
    for drive in &config.drives {
        list.push(Box::new(Block::create(drive)?));
    }
    let mut keeper = true;
    for net in &config.nets {
        let mut card = Net::create(net)?;
        if let Some(service) = config.metadata.as_ref().filter(|service| service.interfaces.contains(&net.id))
        {
            card.serve_metadata(metadata, service, keeper).map_err(DeviceCreateError::Metadata)?;
            keeper = false;
        }
        list.push(Box::new(card));
    }
    if let Some(vsock) = &config.vsock {
        list.push(Box::new(Vsock::create(vsock)?));
    }
    if let Some(entropy) = &config.entropy {
        list.push(Box::new(Rng::create(entropy).map_err(DeviceCreateError::Rng)?));
    }
    if let Some(balloon) = &config.balloon {
        let balloon = Balloon::create(balloon, Box::new(returned.clone()));
        list.push(Box::new(balloon.map_err(DeviceCreateError::Balloon)?));
    }
    if let Some(console) = &config.console {
        list.push(Box::new(Console::create(console)?));
    }
    Ok(list)
}
