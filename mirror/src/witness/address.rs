//! Where a witness is, what it takes to reach it, and how it is opened.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{EtcdWitness, FileWitness, Witness, WitnessError};

/// Where records are in etcd, unless the address says otherwise.
const PREFIX: &str = "/understudy";

/// Bounds of the time in which etcd must answer, in milliseconds.
const TIMEOUT_MS: std::ops::RangeInclusive<u32> = 10..=60_000;

/// A witness as people name it: the path of a file, or `etcd:HOST:PORT,HOST:PORT[/prefix]` (`etcd://` is understood, too).
///
/// A file whose name begins with `etcd:` is written `./etcd:…`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum WitnessAddress {
    /// A file on storage that both sides share.
    File(PathBuf),
    /// A cluster of etcd.
    Etcd {
        /// Its members, `HOST:PORT` each.
        endpoints: Vec<String>,
        /// Where the records are: the key of a guest's record is this, `/` and its GUID.
        prefix: String,
    },
}

impl WitnessAddress {
    /// The witness there. A file need not exist, and etcd is not asked yet.
    ///
    /// # Errors
    /// [`WitnessError::Misfit`]: as [`Self::check`]; [`WitnessError::Access`]: a file that `access` names cannot be used.
    pub fn open(&self, access: &WitnessAccess) -> Result<Arc<dyn Witness>, WitnessError> {
        self.check(access).map_err(|reason| WitnessError::Misfit { witness: self.to_string(), reason })?;
        Ok(match self {
            Self::File(path) => Arc::new(FileWitness::new(path)),
            Self::Etcd { endpoints, prefix } => Arc::new(EtcdWitness::new(endpoints, prefix, access)?),
        })
    }

    /// Whether `access` fits this witness and itself.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, access: &WitnessAccess) -> Result<(), String> {
        let WitnessAccess { ca, cert, key, user, password_file, timeout_ms } = access;
        let wrong = if matches!(self, Self::File(_)) && *access != WitnessAccess::default() {
            format!(
                "the witness {self} is a file; certificates, a user and a timeout are for etcd: leave them out"
            )
        } else if cert.is_some() != key.is_some() {
            "a certificate and its key belong together; give both".into()
        } else if cert.is_some() && ca.is_none() {
            "a certificate is shown by TLS only; give ca, the authority that the members are known by".into()
        } else if user.is_some() != password_file.is_some() {
            "a user and a password file belong together; give both".into()
        } else if !TIMEOUT_MS.contains(timeout_ms) {
            let (least, most) = TIMEOUT_MS.into_inner();
            format!("a timeout of {timeout_ms} ms is out of range; give {least} to {most} ms")
        } else {
            return Ok(());
        };
        Err(wrong)
    }
}

impl FromStr for WitnessAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some(rest) = text.strip_prefix("etcd:") else {
            return match text {
                "" => Err("'' is no witness: write a file's path or etcd:HOST:PORT,HOST:PORT".into()),
                path => Ok(Self::File(path.into())),
            };
        };
        let rest = rest.strip_prefix("//").unwrap_or(rest);
        let (hosts, prefix) = match rest.find('/') {
            Some(slash) => (&rest[..slash], rest[slash..].trim_end_matches('/')),
            None => (rest, PREFIX),
        };
        let endpoints: Vec<String> = hosts.split(',').map(Into::into).collect();
        if let Some(wrong) = endpoints.iter().find(|endpoint| !is_endpoint(endpoint)) {
            return Err(format!(
                "'{wrong}' in '{text}' is no member of etcd: write etcd:HOST:PORT,HOST:PORT[/prefix]"
            ));
        }
        Ok(Self::Etcd { endpoints, prefix: prefix.into() })
    }
}

/// It becomes part of a URL, and is to be nothing but its host and port there.
fn is_endpoint(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let name = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(inner) => inner.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b)),
    };
    name && port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0)
}

impl TryFrom<String> for WitnessAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<WitnessAddress> for String {
    fn from(address: WitnessAddress) -> Self {
        address.to_string()
    }
}

impl fmt::Display for WitnessAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            // A prefix of nothing is written as its slash; that is not the default.
            Self::Etcd { endpoints, prefix } if prefix.is_empty() => {
                write!(f, "etcd:{}/", endpoints.join(","))
            }
            Self::Etcd { endpoints, prefix } => write!(f, "etcd:{}{prefix}", endpoints.join(",")),
        }
    }
}

/// What it takes to reach etcd, beside its address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct WitnessAccess {
    /// The certificates (PEM) of the authority that the members are known by. With it TLS is spoken, without it not.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub ca: Option<PathBuf>,
    /// The certificate (PEM) that this side shows.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub cert: Option<PathBuf>,
    /// Its key (PEM).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub key: Option<PathBuf>,
    /// The user of etcd, where it asks for one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The file whose first line is the user's password.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub password_file: Option<PathBuf>,
    /// The time, in milliseconds, within which a question is answered or given up. Each member gets an equal share of
    /// what is left of it.
    #[cfg_attr(feature = "schema", schema(minimum = 10, maximum = 60_000, default = 1500))]
    pub timeout_ms: u32,
}

impl Default for WitnessAccess {
    fn default() -> Self {
        // A member that hangs takes a third of it from the other two; a new leader is found in about a second.
        Self { ca: None, cert: None, key: None, user: None, password_file: None, timeout_ms: 1500 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn etcd(endpoints: &[&str], prefix: &str) -> WitnessAddress {
        let endpoints = endpoints.iter().map(|&endpoint| endpoint.into()).collect();
        WitnessAddress::Etcd { endpoints, prefix: prefix.into() }
    }

    #[test]
    fn address_is_a_path_unless_it_says_etcd() {
        for path in ["witness", "/shared/witness", "./etcd:a:1", "etcd", "C:/x"] {
            assert_eq!(path.parse(), Ok(WitnessAddress::File(path.into())));
        }
        for (text, address) in [
            ("etcd:a:2379", etcd(&["a:2379"], "/understudy")),
            ("etcd://a:1,b.example:2", etcd(&["a:1", "b.example:2"], "/understudy")),
            ("etcd:192.0.2.1:2379,[2001:db8::1]:2379/", etcd(&["192.0.2.1:2379", "[2001:db8::1]:2379"], "")),
            ("etcd:a:1/of/ours/", etcd(&["a:1"], "/of/ours")),
        ] {
            assert_eq!(text.parse(), Ok(address.clone()), "{text}");
            assert_eq!(address.to_string().parse(), Ok(address), "{text}");
        }
    }

    #[test]
    fn address_that_is_none_is_named_in_the_error() {
        for text in [
            "etcd:",
            "etcd://",
            "etcd:a",
            "etcd:a:",
            "etcd::1",
            "etcd:a:0",
            "etcd:a:65536",
            "etcd:a:+1",
            "etcd:a:1,",
            "etcd:a:1,,b:2",
            "etcd:u@a:1",
            "etcd:a?b:1",
            "etcd:a b:1",
            "etcd:http://a:1",
            "etcd:::1:2379",
            "etcd:[x]:1",
        ] {
            let error = text.parse::<WitnessAddress>().unwrap_err();
            assert!(error.contains(text) && error.contains("HOST:PORT"), "{text}: {error}");
        }
        assert!("".parse::<WitnessAddress>().is_err());
    }

    #[test]
    fn access_that_does_not_fit_is_refused() {
        let file: WitnessAddress = "witness".parse().unwrap();
        let etcd: WitnessAddress = "etcd:a:1".parse().unwrap();
        let some = || Some("x".into());
        let plain = WitnessAccess::default();
        let whole = WitnessAccess {
            ca: some(),
            cert: some(),
            key: some(),
            user: Some("u".into()),
            password_file: some(),
            timeout_ms: 10,
        };
        for (address, access) in [(&file, &plain), (&etcd, &plain), (&etcd, &whole)] {
            assert_eq!(address.check(access), Ok(()));
        }
        for (words, address, access) in [
            ("is a file", &file, whole.clone()),
            ("give both", &etcd, WitnessAccess { key: None, ..whole.clone() }),
            ("give both", &etcd, WitnessAccess { cert: None, ..whole.clone() }),
            ("give ca", &etcd, WitnessAccess { ca: None, ..whole.clone() }),
            ("give both", &etcd, WitnessAccess { user: None, ..whole.clone() }),
            ("give both", &etcd, WitnessAccess { password_file: None, ..whole.clone() }),
            ("out of range", &etcd, WitnessAccess { timeout_ms: 9, ..plain.clone() }),
            ("out of range", &etcd, WitnessAccess { timeout_ms: 60_001, ..plain.clone() }),
        ] {
            let reason = address.check(&access).unwrap_err();
            assert!(reason.contains(words), "{access:?}: {reason}");
            let error = address.open(&access).unwrap_err();
            assert!(matches!(error, WitnessError::Misfit { .. }), "{error}");
        }
    }
}
