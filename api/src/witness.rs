//! The flags that name a witness and what it takes to reach it.

use std::path::PathBuf;

use clap::Args;
use mirror::witness::{WitnessAccess, WitnessAddress};

use crate::client::absolute;

/// Who decides which side lives.
#[derive(Debug, Args)]
pub struct WitnessOptions {
    /// The witness: a file on storage that both sides share, or etcd:HOST:PORT,HOST:PORT[/prefix]; without it there is
    /// no automatic failover
    #[arg(long, value_name = "FILE|ETCD")]
    pub witness: Option<WitnessAddress>,
    /// Speak TLS with etcd, whose members are known by these certificates
    #[arg(long, value_name = "FILE", requires = "witness")]
    pub witness_ca: Option<PathBuf>,
    /// The certificate to show to etcd
    #[arg(long, value_name = "FILE", requires_all = ["witness_ca", "witness_key"])]
    pub witness_cert: Option<PathBuf>,
    /// Its key
    #[arg(long, value_name = "FILE", requires = "witness_cert")]
    pub witness_key: Option<PathBuf>,
    /// The user of etcd
    #[arg(long, value_name = "NAME", requires_all = ["witness", "witness_password_file"])]
    pub witness_user: Option<String>,
    /// The file whose first line is the user's password
    #[arg(long, value_name = "FILE", requires = "witness_user")]
    pub witness_password_file: Option<PathBuf>,
    /// How long etcd may take to answer before the question is given up, and asked again
    #[arg(long, value_name = "MS", requires = "witness", default_value_t = WitnessAccess::default().timeout_ms)]
    pub witness_timeout_ms: u32,
}

impl WitnessOptions {
    /// What it takes to reach the witness, as this process sees it.
    pub fn access(&self) -> WitnessAccess {
        WitnessAccess {
            ca: self.witness_ca.clone(),
            cert: self.witness_cert.clone(),
            key: self.witness_key.clone(),
            user: self.witness_user.clone(),
            password_file: self.witness_password_file.clone(),
            timeout_ms: self.witness_timeout_ms,
        }
    }

    /// The witness and what it takes to reach it, for a process that has a folder of its own.
    pub fn seen_from_anywhere(&self) -> (Option<WitnessAddress>, WitnessAccess) {
        let witness = self.witness.clone().map(|witness| match witness {
            WitnessAddress::File(path) => WitnessAddress::File(absolute(&path)),
            etcd @ WitnessAddress::Etcd { .. } => etcd,
        });
        let path = |path: Option<PathBuf>| path.as_deref().map(absolute);
        let WitnessAccess { ca, cert, key, user, password_file, timeout_ms } = self.access();
        let (ca, cert, key, password_file) = (path(ca), path(cert), path(key), path(password_file));
        (witness, WitnessAccess { ca, cert, key, user, password_file, timeout_ms })
    }
}
