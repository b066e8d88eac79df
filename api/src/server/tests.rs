use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::client::{self, ClientError};

#[derive(Default)]
struct Unmirrored(Meters);

impl Instance for Unmirrored {
    fn info(&self) -> InstanceInfo {
        InstanceInfo::new("test", InstanceState::Running)
    }

    fn draft(&self) -> Draft {
        Draft::default()
    }

    fn mirror(&self) -> Option<MirrorStatus> {
        None
    }

    fn meters(&self) -> &Meters {
        &self.0
    }

    fn balloon_statistics(&self) -> Result<BalloonStats, String> {
        Err("none".into())
    }

    fn ask(&self, _request: Request) -> Result<(), String> {
        Ok(())
    }

    fn switchover(&self) -> Result<Duration, String> {
        Err("no".into())
    }
}

fn server() -> (tempfile::TempDir, PathBuf, Server) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api.sock");
    let server = Server::start(&path, Arc::new(Unmirrored::default()), MAX_BODY).unwrap();
    (folder, path, server)
}

#[test]
fn instance_tells_who_it_is_as_firecracker_does() {
    let (_folder, path, _server) = server();
    let info: serde_json::Value = client::get(&path, "/").unwrap();
    assert_eq!(info["id"], "test");
    assert_eq!(info["state"], "Running");
    assert_eq!(info["app_name"], "Understudy");
    let version: Version = client::get(&path, "/version").unwrap();
    assert_eq!(version.firecracker_version, env!("CARGO_PKG_VERSION"));
}

#[test]
fn what_is_not_there_is_a_fault_with_a_message() {
    let (_folder, path, _server) = server();
    let fault = |path_of_request| match client::get::<serde_json::Value>(&path, path_of_request) {
        Err(ClientError::Fault { status, message, .. }) => (status, message),
        other => panic!("{other:?}"),
    };
    assert_eq!(
        fault("/mirror"),
        (404, "This guest is not mirrored; PUT /mirror with the address of a standby.".into())
    );
    assert_eq!(fault("/nope"), (400, "Invalid request method and/or path: GET /nope.".into()));
}

#[test]
fn socket_is_private_and_goes_with_the_server() {
    let (_folder, path, server) = server();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    drop(server);
    assert!(!path.exists());
}

#[test]
fn socket_in_use_is_refused_and_one_left_behind_is_replaced() {
    let (folder, path, _server) = server();
    assert!(matches!(
        Server::start(&path, Arc::new(Unmirrored::default()), MAX_BODY),
        Err(ServerError::InUse(_))
    ));

    let left_behind = folder.path().join("old.sock");
    drop(UnixListener::bind(&left_behind).unwrap());
    let _server = Server::start(&left_behind, Arc::new(Unmirrored::default()), MAX_BODY).unwrap();
    client::get::<InstanceInfo>(&left_behind, "/").unwrap();
}
