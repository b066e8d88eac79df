//! The metadata service in a configuration.

use std::net::Ipv4Addr;

use devices::metadata::{DEFAULT_ADDRESS, MetadataConfig, MetadataVersion};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::devices::NetworkInterface;

/// Firecracker's MmdsConfig: where and how the guest reads the metadata that is put.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// What the guest needs to read.
    #[serde(default)]
    pub version: MmdsVersion,
    /// The network interfaces that the service is on, by name.
    #[schema(min_items = 1)]
    pub network_interfaces: Vec<String>,
    /// Its address, which is link-local.
    #[serde(default = "default_address")]
    #[schema(value_type = String, default = "169.254.169.254")]
    pub ipv4_address: Ipv4Addr,
    /// Whether it answers in plain text whatever it is asked for, as EC2's does.
    #[serde(default)]
    pub imds_compat: bool,
}

/// What the guest needs to read metadata.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum MmdsVersion {
    /// Nothing.
    #[default]
    V1,
    /// A session token.
    V2,
}

fn default_address() -> Ipv4Addr {
    DEFAULT_ADDRESS
}

impl MmdsConfig {
    /// The service that it asks for.
    pub fn service(&self) -> MetadataConfig {
        MetadataConfig {
            version: match self.version {
                MmdsVersion::V1 => MetadataVersion::V1,
                MmdsVersion::V2 => MetadataVersion::V2,
            },
            interfaces: self.network_interfaces.clone(),
            address: self.ipv4_address,
            imds_compat: self.imds_compat,
        }
    }

    pub(super) fn check(&self, interfaces: &[NetworkInterface]) -> Result<(), (&'static str, String)> {
        if self.network_interfaces.is_empty() {
            let reason =
                "The list of network interface IDs that allow forwarding MMDS requests is empty; name one";
            return Err(("mmds-config.network_interfaces", reason.into()));
        }
        let unknown = |id: &&String| !interfaces.iter().any(|interface| interface.iface_id == **id);
        if let Some(id) = self.network_interfaces.iter().find(unknown) {
            let reason = format!(
                "The list of network interface IDs provided contains at least one ID that does not correspond to any \
                 existing network interface: {id:?}; put the interface first"
            );
            return Err(("mmds-config.network_interfaces", reason));
        }
        // The first and the last 256 addresses are reserved (RFC 3927, 2.1).
        let usable = self.ipv4_address.is_link_local() && !matches!(self.ipv4_address.octets()[2], 0 | 255);
        if !usable {
            let reason = format!(
                "The MMDS IPv4 address is not link local: {}; give one from 169.254.1.0 to 169.254.254.255",
                self.ipv4_address
            );
            return Err(("mmds-config.ipv4_address", reason));
        }
        Ok(())
    }
}
