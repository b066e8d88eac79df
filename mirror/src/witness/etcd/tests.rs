//! Faults that a real etcd cannot be made to show: whatever else may answer at its address.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::witness::{Witness, WitnessAddress};

const GUEST: Guid = Guid::from_u128(1);
const TIMEOUT_MS: u32 = 300;

/// Answers each request with `answer`, piece by piece.
fn responder(answer: Vec<String>, pause: Duration) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let respond = move |mut stream: TcpStream| {
        // Requests are small and come in one piece or two; the answer does not depend on them.
        let mut bytes = [0; 4096];
        while stream.read(&mut bytes).is_ok_and(|count| count > 0) {
            for piece in &answer {
                if stream.write_all(piece.as_bytes()).is_err() {
                    return;
                }
                thread::sleep(pause);
            }
        }
    };
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let respond = respond.clone();
            thread::spawn(move || respond(stream));
        }
    });
    address
}

fn http(status: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
}

fn witness(endpoints: &[String]) -> EtcdWitness {
    let access = WitnessAccess { timeout_ms: TIMEOUT_MS, ..WitnessAccess::default() };
    EtcdWitness::new(endpoints, "/understudy", &access).unwrap()
}

fn error_of(answer: String) -> WitnessError {
    witness(&[responder(vec![answer], Duration::ZERO)]).claim(GUEST, Term(0), "a").unwrap_err()
}

#[test]
fn answer_that_is_not_of_etcd_is_named_as_such() {
    for answer in [
        http("200 OK", "<html>welcome</html>"),
        http("200 OK", "{}"),
        http("200 OK", "[]"),
        http("200 OK", r#"{"header": {"cluster_id": "many"}}"#),
        http("200 OK", r#"{"header": {}, "kvs": [{"mod_revision": "1", "value": "no base64"}]}"#),
        http("404 Not Found", "Not Found"),
        http("500 Internal Server Error", "{}"),
        "HTTP/1.1 307 Temporary Redirect\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
            .into(),
        "SSH-2.0-OpenSSH\r\n".into(),
    ] {
        let error = error_of(answer.clone());
        assert!(matches!(error, WitnessError::Unreachable { .. }), "{answer}: {error}");
    }
    assert!(error_of(http("404 Not Found", "Not Found")).to_string().contains("not etcd's"));
}

#[test]
fn record_longer_than_any_is_damaged_and_an_endless_answer_is_not_read() {
    let kvs = |bytes: usize| {
        let value = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, vec![b' '; bytes]);
        http(
            "200 OK",
            &format!(r#"{{"header": {{}}, "kvs": [{{"mod_revision": "1", "value": "{value}"}}]}}"#),
        )
    };
    assert!(matches!(error_of(kvs(MAX_RECORD + 1)), WitnessError::Damaged { .. }));
    assert!(matches!(error_of(kvs(16 * MAX_RECORD)), WitnessError::Unreachable { .. }));
}

#[test]
fn answer_that_trickles_in_is_given_up_in_time_and_the_next_endpoint_is_asked() {
    let head = "HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n".to_owned();
    let pieces = std::iter::once(head).chain(std::iter::repeat_n(" ".to_owned(), 10_000)).collect();
    let slow = responder(pieces, Duration::from_millis(5));
    let empty = responder(vec![http("200 OK", r#"{"header": {"cluster_id": "7"}}"#)], Duration::ZERO);
    let asked = Instant::now();

    let read = witness(&[slow.clone(), empty]).read(GUEST).unwrap();
    let error = witness(&[slow]).read(GUEST).unwrap_err();

    assert_eq!(read, None);
    assert!(matches!(error, WitnessError::Unreachable { .. }), "{error}");
    assert!(asked.elapsed() < Duration::from_millis(2 * u64::from(TIMEOUT_MS)) + Duration::from_secs(1));
}

#[test]
fn refusal_that_tells_of_no_decision_is_not_taken_for_one() {
    let no_space =
        http("429 Too Many Requests", r#"{"code": 8, "message": "mvcc: database space exceeded"}"#);
    let error = error_of(no_space);
    assert!(matches!(error, WitnessError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("database space exceeded"), "{error}");
    // Nothing was put, and nothing is there: somebody removes the record in between, again and again.
    let header = r#""header": {"cluster_id": "7", "revision": "5"}"#;
    let error =
        error_of(http("200 OK", &format!(r#"{{{header}, "responses": [{{"response_range": {{}}}}]}}"#)));
    assert!(matches!(error, WitnessError::Unreachable { .. }), "{error}");
}

#[test]
fn error_names_the_address_that_was_given() {
    let error = witness(&["127.0.0.1:1".into()]).read(GUEST).unwrap_err().to_string();
    let address: WitnessAddress = "etcd:127.0.0.1:1".parse().unwrap();
    assert!(error.contains(&address.to_string()) && error.contains("refused"), "{error}");
}
