//! What of a virtio device is saved.

use serde::{Deserialize, Serialize};

use super::balloon::BalloonState;
use super::block::BlockState;
use super::console::ConsoleState;
use super::net::NetState;
use super::queue::RingState;
use super::vsock::VsockState;

/// The transport's registers and the queues.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// DeviceFeaturesSel.
    pub device_features_select: u32,
    /// DriverFeaturesSel.
    pub driver_features_select: u32,
    /// Features that the driver has accepted so far.
    pub driver_features: u64,
    /// QueueSel.
    pub queue_select: u32,
    /// Status, without DEVICE_NEEDS_RESET.
    pub status: u32,
    /// InterruptStatus.
    pub interrupt_status: u32,
    /// ConfigGeneration.
    pub config_generation: u32,
    /// Whether the device needs a reset.
    pub needs_reset: bool,
    /// The queues.
    pub queues: Vec<RingState>,
}

/// A virtio device with its transport.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioState {
    /// Registers and queues.
    pub transport: TransportState,
    /// What the device itself holds.
    pub device: DeviceState,
}

/// What a device itself holds, by kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// Nothing beyond registers and queues.
    #[default]
    None,
    /// A memory balloon.
    Balloon(BalloonState),
    /// A disk.
    Block(BlockState),
    /// A network card.
    Net(NetState),
    /// A socket device.
    Vsock(VsockState),
    /// A console.
    Console(ConsoleState),
}
