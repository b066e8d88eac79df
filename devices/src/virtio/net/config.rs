//! What a network card is made from.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::rate_limiter::RateLimiterConfig;

/// A network card's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// A new address from this host's own range (locally administered, for one card).
    ///
    /// # Errors
    /// The kernel has no random numbers, which no kernel has not.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 6];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        bytes[0] = bytes[0] & !1 | 2;
        Ok(Self(bytes))
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error = || format!("{text:?} is no MAC address; write six bytes like 06:00:c0:a8:00:02");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(error)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() {
            return Err(error());
        }
        if bytes[0] & 1 != 0 {
            return Err(format!("{text:?} is the address of a group; a card has one of its own"));
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Mac {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02x}", if index == 0 { "" } else { ":" })?;
        }
        Ok(())
    }
}

/// A virtio network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// Its name.
    pub id: String,
    /// The tap device on the host; it is created if there is none.
    pub tap: String,
    /// Its address.
    pub mac: Mac,
    /// Longest packet that it tells the guest to send, in bytes without the Ethernet header; none: 1500.
    pub mtu: Option<u16>,
    /// Pairs of queues, 1 to [`MAX_QUEUE_PAIRS`]; more than one need a tap with as many queues.
    pub queue_pairs: u16,
    /// Limits on what the guest receives.
    pub receive_limits: Option<RateLimiterConfig>,
    /// Limits on what it sends.
    pub send_limits: Option<RateLimiterConfig>,
}

/// Most pairs of queues of a card.
pub const MAX_QUEUE_PAIRS: u16 = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses_are_read_and_written_and_others_refused() {
        assert_eq!("06:00:c0:A8:00:02".parse::<Mac>().unwrap().to_string(), "06:00:c0:a8:00:02");
        for wrong in [
            "",
            "06:00:c0:a8:00",
            "06:00:c0:a8:00:02:03",
            "6:0:c:a:0:2",
            "06:00:c0:a8:00:0g",
            "01:00:00:00:00:01",
        ] {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn made_up_address_is_local_and_of_one_card() {
        let Mac(bytes) = Mac::random().unwrap();
        assert_eq!(bytes[0] & 3, 2);
    }
}
