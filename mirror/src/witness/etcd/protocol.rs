//! What is said to etcd's JSON gateway: the messages of its API v3 (`rpc.proto`), of which only what is used here.
//!
//! Bytes are base64, 64-bit numbers are strings, and fields at their defaults are left out.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Bytes as the gateway writes them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Base64(pub(super) Vec<u8>);

impl From<String> for Base64 {
    fn from(text: String) -> Self {
        Self(text.into_bytes())
    }
}

impl Serialize for Base64 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Base64 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map(Self).map_err(D::Error::custom)
    }
}

/// A 64-bit number; the gateway writes it as a string.
fn number<'de, D: Deserializer<'de>, N: DeserializeOwned + std::str::FromStr>(
    deserializer: D,
) -> Result<N, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(|_| D::Error::custom(format!("'{text}' is no number")))
}

/// Of every answer.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct ResponseHeader {
    #[serde(default, deserialize_with = "number")]
    pub(super) cluster_id: u64,
    #[serde(default, deserialize_with = "number")]
    pub(super) revision: i64,
}

/// An answer with the header by which its cluster is known.
pub(super) trait Answer: DeserializeOwned {
    fn header(&self) -> &ResponseHeader;
}

/// `kv/range`: a linearizable read of one key.
#[derive(Serialize)]
pub(super) struct Range {
    pub(super) key: Base64,
}

#[derive(Debug, Deserialize)]
pub(super) struct RangeAnswer {
    pub(super) header: ResponseHeader,
    #[serde(default)]
    pub(super) kvs: Vec<KeyValue>,
}

impl Answer for RangeAnswer {
    fn header(&self) -> &ResponseHeader {
        &self.header
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct KeyValue {
    #[serde(deserialize_with = "number")]
    pub(super) mod_revision: i64,
    #[serde(default)]
    pub(super) value: Base64,
}

/// `kv/txn`.
#[derive(Serialize)]
pub(super) struct Txn {
    compare: [Compare; 1],
    success: [PutOp; 1],
    failure: [RangeOp; 1],
}

#[derive(Serialize)]
struct Compare {
    key: Base64,
    target: &'static str,
    result: &'static str,
    mod_revision: String,
}

#[derive(Serialize)]
struct PutOp {
    request_put: Put,
}

#[derive(Serialize)]
struct Put {
    key: Base64,
    value: Base64,
}

#[derive(Serialize)]
struct RangeOp {
    request_range: Range,
}

impl Txn {
    /// Puts `value` if `key` was last changed at `revision` (0: if it is not there), and reads it if not.
    pub(super) fn replace(key: Base64, revision: i64, value: Base64) -> Self {
        let compare =
            Compare { key: key.clone(), target: "MOD", result: "EQUAL", mod_revision: revision.to_string() };
        Self {
            compare: [compare],
            success: [PutOp { request_put: Put { key: key.clone(), value } }],
            failure: [RangeOp { request_range: Range { key } }],
        }
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct TxnAnswer {
    pub(super) header: ResponseHeader,
    #[serde(default)]
    pub(super) succeeded: bool,
    #[serde(default)]
    pub(super) responses: Vec<OpAnswer>,
}

impl Answer for TxnAnswer {
    fn header(&self) -> &ResponseHeader {
        &self.header
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct OpAnswer {
    pub(super) response_range: Option<RangeOfOp>,
}

/// As [`RangeAnswer`]; its header lacks the cluster.
#[derive(Debug, Deserialize)]
pub(super) struct RangeOfOp {
    #[serde(default)]
    pub(super) kvs: Vec<KeyValue>,
}

/// `auth/authenticate`.
#[derive(Serialize)]
pub(super) struct Authenticate<'a> {
    pub(super) name: &'a str,
    pub(super) password: &'a str,
}

#[derive(Debug, Deserialize)]
pub(super) struct AuthenticateAnswer {
    pub(super) header: ResponseHeader,
    pub(super) token: String,
}

impl Answer for AuthenticateAnswer {
    fn header(&self) -> &ResponseHeader {
        &self.header
    }
}

/// A refusal: gRPC's code and etcd's words.
#[derive(Debug, Deserialize)]
pub(super) struct Fault {
    #[serde(default)]
    pub(super) code: u32,
    #[serde(default)]
    pub(super) message: String,
}
