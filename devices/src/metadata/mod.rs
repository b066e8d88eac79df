//! The metadata service of Firecracker (MMDS): a JSON document that the operator puts, and that the guest reads by HTTP at
//! an address which exists on its network card alone.
//!
//! [`Metadata`] is the document and the session tokens, shared by everybody who has to do with it. [`Stack`] is what
//! answers on one card: it takes the frames that the guest sends to the service and gives back frames for the guest.
//! Nothing of that ever leaves the machine, so none of it is held for an epoch. Document and tokens are part of the
//! guest's state; a connection under way is reset where the guest goes on elsewhere.

mod document;
mod http;
mod stack;
mod tokens;

#[cfg(test)]
pub(crate) mod tests;

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use thiserror::Error;

use self::document::Document;
pub use self::stack::{Caller, FRAME_START, MAX_CALLERS, Stack};
use self::tokens::Tokens;
pub use self::tokens::{MAX_TOKENS, SavedToken};

/// Where the service is unless it is told otherwise.
pub const DEFAULT_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// What the guest needs to read metadata.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MetadataVersion {
    /// Nothing.
    #[default]
    V1,
    /// A session token.
    V2,
}

/// The service, as the guest finds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetadataConfig {
    /// What the guest needs to read.
    pub version: MetadataVersion,
    /// The network cards that it is on, by name.
    pub interfaces: Vec<String>,
    /// Its address.
    pub address: Ipv4Addr,
    /// Whether it answers in plain text whatever it is asked for, as EC2's does.
    pub imds_compat: bool,
}

/// Why metadata stays as it is.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum MetadataError {
    /// There is nothing to be patched.
    #[error("The MMDS data store is not initialized: put what is to be changed first")]
    Nothing,
    /// It would be too long.
    #[error(
        "The metadata would have {bytes} bytes of JSON, and at most {limit} are kept (--mmds-size-limit)"
    )]
    TooLong {
        /// Its length.
        bytes: usize,
        /// The most that are taken.
        limit: usize,
    },
}

/// What of the metadata service is saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetadataState {
    /// The document in JSON, if there is one.
    pub document: Option<Arc<str>>,
    /// The session tokens.
    pub tokens: Vec<SavedToken>,
}

impl MetadataState {
    /// Room for everything that may be saved.
    pub fn with_room() -> Self {
        Self { document: None, tokens: Vec::with_capacity(MAX_TOKENS) }
    }
}

/// A guest's metadata. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Metadata(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// Held by whoever changes the document, for as long as that takes.
    change: Mutex<()>,
    /// Held for moments only: the guest's pause takes it.
    now: Mutex<Now>,
}

#[derive(Debug, Default)]
struct Now {
    document: Option<Arc<Document>>,
    tokens: Tokens,
}

impl Metadata {
    /// The whole document; `None` if none was put.
    pub fn document(&self) -> Option<Value> {
        let document = self.now().document.clone()?;
        Some(document.value().clone())
    }

    /// Puts `document` in the place of the one that is there, if it has at most `limit` bytes.
    ///
    /// # Errors
    /// [`MetadataError::TooLong`]; nothing has changed then.
    pub fn put(&self, document: Map<String, Value>, limit: usize) -> Result<(), MetadataError> {
        let _one_at_a_time = lock(&self.0.change);
        self.set(Document::new(Value::Object(document)), limit)
    }

    /// Changes the document by `patch` (JSON merge patch, RFC 7386), if it then has at most `limit` bytes.
    ///
    /// # Errors
    /// [`MetadataError`]; nothing has changed then.
    pub fn patch(&self, patch: Map<String, Value>, limit: usize) -> Result<(), MetadataError> {
        let _one_at_a_time = lock(&self.0.change);
        let before = self.now().document.clone().ok_or(MetadataError::Nothing)?;
        self.set(before.patched(patch), limit)
    }

    fn set(&self, document: Document, limit: usize) -> Result<(), MetadataError> {
        let bytes = document.text().len();
        if bytes > limit {
            return Err(MetadataError::TooLong { bytes, limit });
        }
        let document = Some(Arc::new(document));
        let before = std::mem::replace(&mut self.now().document, document);
        drop(before);
        Ok(())
    }

    /// Copies what is there to `state`, which has had room for it since [`MetadataState::with_room`].
    pub fn save(&self, state: &mut MetadataState) {
        let now = self.now();
        state.document = now.document.as_ref().map(|document| Arc::clone(document.text()));
        now.tokens.save(&mut state.tokens, Instant::now());
    }

    /// Has what `state` says; false if that is no metadata.
    #[must_use]
    pub fn restore(&self, state: &MetadataState) -> bool {
        let document = match state.document.as_deref().map(Document::parse) {
            Some(None) => return false,
            Some(document) => document.map(Arc::new),
            None => None,
        };
        let tokens = Tokens::restore(&state.tokens, Instant::now());
        *self.now() = Now { document, tokens };
        true
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        lock(&self.0.now)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
