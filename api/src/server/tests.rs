use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::sync::Mutex;
use std::sync::mpsc::Sender;

use super::*;
use crate::client::{self, ClientError};
use mirror::link::Address;

#[derive(Default)]
struct Unmirrored(Meters, Option<Handover>);

/// A switchover that begins, and ends when it may.
struct Handover {
    begins: Sender<()>,
    may_end: Mutex<Receiver<()>>,
}

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

    fn switchover(&self, _to: Option<Address>) -> Result<Duration, String> {
        let handover = self.1.as_ref().ok_or("no")?;
        handover.begins.send(()).unwrap();
        handover.may_end.lock().unwrap().recv().unwrap();
        Ok(Duration::from_millis(7))
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

#[test]
fn answer_that_is_under_way_when_the_server_ends_arrives() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api.sock");
    let (begins, begun) = channel();
    let (end, may_end) = channel();
    let handover = Handover { begins, may_end: Mutex::new(may_end) };
    let server =
        Server::start(&path, Arc::new(Unmirrored(Meters::default(), Some(handover))), MAX_BODY).unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"PUT /mirror/switchover HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").unwrap();
    begun.recv().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            // The server has begun to end.
            while path.exists() {
                thread::yield_now();
            }
            end.send(()).unwrap();
        });
        drop(server);
        // A process that ends now would send nothing more.
        client.set_nonblocking(true).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert!(answer.contains(r#"{"pause_us":7000}"#), "{answer}");
    });
}
