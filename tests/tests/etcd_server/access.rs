//! TLS, certificates, users and passwords.

use std::fs;
use std::path::Path;

use mirror::ids::{Guid, Term};
use mirror::witness::{Claim, WitnessAccess, WitnessError};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair,
};
use tests::etcd::{Cluster, claim};

const GUEST: Guid = Guid::from_u128(1);

/// Writes an authority's certificate, and one by it for these hosts with this common name, with its key.
fn certificates(folder: &Path, hosts: &[String], name: Option<&str>) -> WitnessAccess {
    let authority = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new([]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&authority).unwrap();
    let issuer = Issuer::new(params, authority);
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(hosts).unwrap();
    params.distinguished_name = DistinguishedName::new();
    if let Some(name) = name {
        params.distinguished_name.push(DnType::CommonName, name);
    }
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let cert = params.signed_by(&key, &issuer).unwrap();
    let write = |name: &str, text: String| {
        let path = folder.join(name);
        fs::write(&path, text).unwrap();
        Some(path)
    };
    WitnessAccess {
        ca: write("ca.pem", ca.pem()),
        cert: write("cert.pem", cert.pem()),
        key: write("key.pem", key.serialize_pem()),
        ..WitnessAccess::default()
    }
}

/// A cluster that speaks TLS with those who have a certificate only.
fn closed(members: usize, name: Option<&str>) -> Cluster {
    Cluster::start_with(members, |folder, hosts| {
        let access = certificates(folder, hosts, name);
        let [ca, cert, key] =
            [&access.ca, &access.cert, &access.key].map(|path| path.as_ref().unwrap().display().to_string());
        let flags =
            ["--client-cert-auth", "--trusted-ca-file", &ca, "--cert-file", &cert, "--key-file", &key];
        (flags.map(Into::into).into(), access)
    })
}

#[test]
fn tls_lets_in_who_has_the_certificate_and_nobody_else() {
    let mut cluster = closed(3, Some("side"));
    let witness = cluster.witness();
    assert_eq!(witness.claim(GUEST, Term(0), "a").unwrap(), Claim::Granted(Term(1)));
    cluster.kill(0);
    assert_eq!(claim(&*witness, GUEST, Term(1), "a"), Claim::Granted(Term(2)));

    let folder = tempfile::tempdir().unwrap();
    let strangers = certificates(folder.path(), &["127.0.0.1".into()], None);
    let ours = cluster.access().clone();
    for (words, access) in [
        ("invalid peer certificate", WitnessAccess { ca: strangers.ca.clone(), ..ours.clone() }),
        ("ertificate", WitnessAccess { cert: None, key: None, ..ours.clone() }),
        (
            "ertificate",
            WitnessAccess { cert: strangers.cert.clone(), key: strangers.key.clone(), ..ours.clone() },
        ),
        ("", WitnessAccess::default()),
    ] {
        let error = cluster.member(1).open(&access).unwrap().read(GUEST).unwrap_err();
        assert!(matches!(error, WitnessError::Unreachable { .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }

    let missing = WitnessAccess { ca: Some("/nonexistent".into()), ..ours.clone() };
    let no_certificate = WitnessAccess { ca: ours.key.clone(), ..ours.clone() };
    let no_key = WitnessAccess { key: ours.cert.clone(), ..ours.clone() };
    let other_key = WitnessAccess { key: strangers.key, ..ours };
    for access in [missing, no_certificate, no_key, other_key] {
        let error = cluster.address().open(&access).unwrap_err();
        assert!(matches!(error, WitnessError::Access { .. }), "{error}");
    }
}

#[test]
fn user_is_let_in_by_password_to_what_it_may_write_and_again_when_its_token_is_gone() {
    let mut cluster = closed(1, None);
    for arguments in [
        &["user", "add", "root:secret"][..],
        &["user", "grant-role", "root", "root"],
        &["user", "add", "ours:word"],
        &["role", "add", "records"],
        &["role", "grant-permission", "--prefix=true", "records", "readwrite", "/understudy"],
        &["user", "grant-role", "ours", "records"],
        &["auth", "enable"],
    ] {
        cluster.etcdctl(arguments);
    }
    let file = |name: &str, text: &str| {
        let path = cluster.folder().join(name);
        fs::write(&path, text).unwrap();
        Some(path)
    };
    let password_file = file("password", "word\n");
    let anonymous = cluster.access().clone();
    let ours = WitnessAccess { user: Some("ours".into()), password_file, ..anonymous.clone() };
    let wrong = WitnessAccess { password_file: file("wrong", "Word"), ..ours.clone() };
    let empty = WitnessAccess { password_file: file("empty", "\n"), ..ours.clone() };

    let witness = cluster.address().open(&ours).unwrap();
    assert_eq!(witness.claim(GUEST, Term(0), "a").unwrap(), Claim::Granted(Term(1)));

    for (words, access) in [("invalid user ID or password", &wrong), ("user name is empty", &anonymous)] {
        let error = cluster.address().open(access).unwrap().claim(GUEST, Term(1), "b").unwrap_err();
        assert!(matches!(error, WitnessError::Denied { .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
    let elsewhere = cluster.address().to_string().replace("/understudy", "/elsewhere");
    let elsewhere = elsewhere.parse::<mirror::witness::WitnessAddress>().unwrap().open(&ours).unwrap();
    let error = elsewhere.claim(GUEST, Term(0), "a").unwrap_err();
    assert!(matches!(error, WitnessError::Denied { .. }), "{error}");
    assert!(error.to_string().contains("permission denied"), "{error}");
    assert!(matches!(cluster.address().open(&empty), Err(WitnessError::Access { .. })));

    // With the process its tokens are gone.
    cluster.kill(0);
    cluster.restart(0);
    assert_eq!(claim(&*witness, GUEST, Term(1), "a"), Claim::Granted(Term(2)));
}

#[test]
fn certificate_with_a_name_is_turned_down_by_etcd_with_users_and_the_error_says_so() {
    let cluster = closed(1, Some("side"));
    cluster.etcdctl(&["user", "add", "root:secret"]);
    cluster.etcdctl(&["user", "grant-role", "root", "root"]);
    cluster.etcdctl(&["auth", "enable"]);

    let error = cluster.witness().claim(GUEST, Term(0), "a").unwrap_err();

    assert!(matches!(error, WitnessError::Denied { .. }), "{error}");
    assert!(error.to_string().contains("no common name"), "{error}");
}
