//! The files it takes to reach etcd: certificates, a key, a password.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use ureq::tls::{Certificate, ClientCert, PrivateKey, RootCerts, TlsConfig};

use crate::witness::{WitnessAccess, WitnessError};

/// How TLS is spoken, if it is.
pub(super) fn tls(witness: &str, access: &WitnessAccess) -> Result<Option<TlsConfig>, WitnessError> {
    let Some(ca) = &access.ca else { return Ok(None) };
    let roots = certificates(ca).map_err(|reason| unusable(witness, "certificates", ca, reason))?;
    let provider = Arc::new(ring::default_provider());
    let client = match (&access.cert, &access.key) {
        (Some(cert), Some(key)) => Some(client(witness, cert, key, &provider)?),
        _ => None,
    };
    let roots = roots.iter().map(|der| Certificate::from_der(der).to_owned()).collect();
    Ok(Some(
        TlsConfig::builder()
            .root_certs(RootCerts::Specific(Arc::new(roots)))
            .client_cert(client)
            .unversioned_rustls_crypto_provider(provider)
            .build(),
    ))
}

/// The user's password: the file's first line.
pub(super) fn password(witness: &str, path: &Path) -> Result<String, WitnessError> {
    let text = fs::read_to_string(path).and_then(|text| {
        let line = text.lines().next().unwrap_or_default();
        if line.is_empty() { Err(io::Error::other("its first line is empty")) } else { Ok(line.into()) }
    });
    text.map_err(|error| unusable(witness, "password", path, error.to_string()))
}

fn client(
    witness: &str,
    cert: &Path,
    key: &Path,
    provider: &CryptoProvider,
) -> Result<ClientCert, WitnessError> {
    let chain = certificates(cert).map_err(|reason| unusable(witness, "certificate", cert, reason))?;
    let wrong = |reason| unusable(witness, "key", key, reason);
    let pem = fs::read(key).map_err(|error| wrong(error.to_string()))?;
    let der = PrivateKeyDer::from_pem_slice(&pem).map_err(|error| wrong(error.to_string()))?;
    // What does not fit together would be noticed too late, and as a panic.
    CertifiedKey::from_der(chain.clone(), der, provider)
        .map_err(|error| wrong(format!("it does not fit the certificate in {}: {error}", cert.display())))?;
    let pem = PrivateKey::from_pem(&pem).map_err(|error| wrong(error.to_string()))?;
    let chain: Vec<_> = chain.iter().map(|der| Certificate::from_der(der).to_owned()).collect();
    Ok(ClientCert::new_with_certs(&chain, pem))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match certificates.map_err(|error| error.to_string())? {
        none if none.is_empty() => Err("there is no certificate (PEM) in it".into()),
        some => Ok(some),
    }
}

fn unusable(witness: &str, what: &'static str, path: &Path, reason: String) -> WitnessError {
    WitnessError::Access { witness: witness.into(), what, path: path.into(), reason }
}
