//! The control queue of a network card (virtio 1.2, 5.1.6.5).

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use crate::virtio::chain::Chain;
use crate::virtio::device::DeviceError;
use crate::virtio::queue::VirtQueue;

/// What a driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// It has announced the guest.
    Announced,
    /// It uses so many pairs of queues.
    Pairs(u16),
}

impl Command {
    /// Reads the command in `chain`; none if it is not known.
    ///
    /// # Errors
    /// [`DeviceError`] if there is no room for an answer.
    pub(super) fn parse(chain: &Chain) -> Result<Option<Self>, DeviceError> {
        if chain.writable_len() == 0 {
            return Err(DeviceError::Request("a network control request without room for its answer"));
        }
        let mut bytes = [0; 4];
        let count = chain.read(0, &mut bytes);
        Ok(match (u32::from(bytes[0]), u32::from(bytes[1]), count) {
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, 2..) => Some(Self::Announced),
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, 4) => {
                Some(Self::Pairs(u16::from_le_bytes([bytes[2], bytes[3]])))
            }
            _ => None,
        })
    }
}

/// Answers the request in `chain`.
pub(super) fn answer(chain: &Chain, queue: &mut VirtQueue, ok: bool) -> Result<(), DeviceError> {
    let status = if ok { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
    chain.write(0, &[status as u8]);
    Ok(queue.complete(chain.head(), 1)?)
}
