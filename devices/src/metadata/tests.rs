//! What the guest is told, and that nothing it sends does harm.

mod client;
mod hostile;

use serde_json::{Map, Value, json};

pub(crate) use self::client::Client;
use super::*;

pub(crate) fn object(value: Value) -> Map<String, Value> {
    let Value::Object(fields) = value else { panic!("{value} is no object") };
    fields
}

/// Metadata with something in it.
pub(crate) fn metadata() -> Metadata {
    let metadata = Metadata::default();
    let document = json!({"latest": {"meta-data": {"ami-id": "ami-1", "tags": {"a": "b"}, "count": 3}}});
    metadata.put(object(document), 51_200).unwrap();
    metadata
}

pub(crate) fn config(version: MetadataVersion) -> MetadataConfig {
    MetadataConfig { version, interfaces: vec!["eth0".into()], address: DEFAULT_ADDRESS, imds_compat: false }
}

fn stack(version: MetadataVersion) -> Stack {
    Stack::new(&metadata(), &config(version), 1500).unwrap()
}

/// The answer to one whole request.
fn answer(request: &str, metadata: &Metadata, config: &MetadataConfig) -> String {
    let answer = http::answer(request.as_bytes(), metadata, config).expect("the request is whole");
    String::from_utf8(answer.bytes).unwrap()
}

fn check(version: MetadataVersion, request: &str, status: &str, body: &str) {
    let answer = answer(request, &metadata(), &config(version));
    assert!(answer.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{request}: {answer}");
    assert!(answer.ends_with(&format!("\r\n\r\n{body}")), "{request}: {answer}");
    assert!(answer.contains(&format!("Content-Length: {}\r\n", body.len())));
}

#[test]
fn guest_reads_json_or_text_as_it_asks() {
    let v1 = |request: &str, status: &str, body: &str| check(MetadataVersion::V1, request, status, body);
    let get =
        |path: &str, accept: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n");
    v1(&get("/latest/meta-data/ami-id", "*/*"), "200 OK", "ami-1");
    v1(&get("/latest/meta-data/", "text/plain"), "200 OK", "ami-id\ncount\ntags/");
    v1(&get("/latest/meta-data/tags", "application/json"), "200 OK", "{\"a\":\"b\"}");
    v1(&get("//latest//meta-data/ami-id", "application/json, text/html"), "200 OK", "\"ami-1\"");
    v1(&get("http://169.254.169.254/latest/meta-data/ami-id", ""), "200 OK", "ami-1");
    v1(&get("/nowhere", "*/*"), "404 Not Found", "Resource not found: /nowhere.");
    v1(
        &get("/latest/meta-data/count", "*/*"),
        "501 Not Implemented",
        "Cannot retrieve value. The value has an unsupported type.",
    );
    v1(&get("nowhere", "*/*"), "400 Bad Request", "Invalid URI.");
    let compatible = MetadataConfig { imds_compat: true, ..config(MetadataVersion::V1) };
    let answer = answer(&get("/latest/meta-data/ami-id", "application/json"), &metadata(), &compatible);
    assert!(answer.contains("Content-Type: text/plain") && answer.ends_with("\r\n\r\nami-1"), "{answer}");
}

#[test]
fn other_methods_are_refused_with_those_that_there_are() {
    for method in ["POST", "PATCH", "DELETE", "HEAD"] {
        let request = format!("{method} / HTTP/1.1\r\nContent-Length: 0\r\n\r\n");
        check(MetadataVersion::V2, &request, "405 Method Not Allowed", "Not allowed HTTP method.");
        assert!(answer(&request, &metadata(), &config(MetadataVersion::V1)).contains("Allow: GET, PUT\r\n"));
    }
}

#[test]
fn second_version_wants_a_token_that_is_good() {
    let v2 = |request: &str, status: &str, body: &str| check(MetadataVersion::V2, request, status, body);
    v2(
        "GET / HTTP/1.1\r\n\r\n",
        "401 Unauthorized",
        "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to specify the session \
         token.",
    );
    v2("GET / HTTP/1.1\r\nX-metadata-token: foo\r\n\r\n", "401 Unauthorized", "MMDS token not valid.");
    for prefix in ["X-metadata-token", "x-AWS-ec2-metadata-token"] {
        let (metadata, config) = (metadata(), config(MetadataVersion::V2));
        let put = format!("PUT /latest/api/token HTTP/1.1\r\n{prefix}-ttl-seconds: 60\r\n\r\n");
        let answered = answer(&put, &metadata, &config);
        assert!(answered.starts_with("HTTP/1.1 200 OK\r\n"), "{answered}");
        assert!(answered.to_lowercase().contains(&format!("{}-ttl-seconds: 60", prefix.to_lowercase())));
        let token = answered.rsplit("\r\n").next().unwrap();
        let get = format!("GET /latest/meta-data/ami-id HTTP/1.1\r\n{prefix}: {token}\r\n\r\n");
        assert!(answer(&get, &metadata, &config).ends_with("\r\n\r\nami-1"));
    }
}

#[test]
fn tokens_are_given_for_an_allowed_time_at_their_path_to_the_guest_itself() {
    let v2 = |headers: &str, path: &str, status: &str, body: &str| {
        check(MetadataVersion::V2, &format!("PUT {path} HTTP/1.1\r\n{headers}\r\n"), status, body);
    };
    let (bad, path) = ("400 Bad Request", "/latest/api/token");
    v2(
        "",
        path,
        bad,
        "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or \
         `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.",
    );
    for seconds in ["0", "21601"] {
        v2(
            &format!("X-metadata-token-ttl-seconds: {seconds}\r\n"),
            path,
            bad,
            &format!(
                "Invalid time to live value provided for token: {seconds}. Please provide a value between 1 and 21600."
            ),
        );
    }
    v2(
        "X-metadata-token-ttl-seconds: soon\r\n",
        path,
        bad,
        "Invalid header. Reason: Invalid value. Key:X-metadata-token-ttl-seconds; Value:soon",
    );
    v2(
        "X-Forwarded-For: 10.0.0.1\r\nX-metadata-token-ttl-seconds: 60\r\n",
        path,
        bad,
        "Invalid header. Reason: Unsupported header name. Key: X-Forwarded-For",
    );
    v2(
        "X-metadata-token-ttl-seconds: 60\r\n",
        "/latest/api/toke",
        "404 Not Found",
        "Resource not found: /latest/api/toke.",
    );
}

#[test]
fn request_that_is_broken_or_too_long_is_the_last_of_its_connection() {
    let (metadata, config) = (metadata(), config(MetadataVersion::V1));
    let long = format!("GET /{} HTTP/1.1\r\n", "x".repeat(http::MAX_REQUEST));
    for request in [
        "\0\0\0\0",
        "GET / HTTP/9.9\r\n\r\n",
        "GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        "GET / HTTP/1.1\r\nContent-Length: 18446744073709551615\r\n\r\n",
        "GET / HTTP/1.1\r\nContent-Length: 99999\r\n\r\n",
        "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
        &format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(40)),
        &long[..http::MAX_REQUEST],
    ] {
        let answer = http::answer(request.as_bytes(), &metadata, &config).unwrap();
        assert!(answer.bytes.starts_with(b"HTTP/1.1 400"), "{request}");
        assert!(answer.last);
    }
    for part in ["", "GET / HT", "GET / HTTP/1.1\r\nA: b\r\n", "PUT / HTTP/1.1\r\nContent-Length: 2\r\n\r\nx"]
    {
        assert!(http::answer(part.as_bytes(), &metadata, &config).is_none(), "{part}");
    }
}

#[test]
fn metadata_over_the_limit_or_patched_before_it_is_there_stays_as_it_was() {
    let metadata = Metadata::default();
    let patch = || object(json!({"b": "c"}));
    assert_eq!(metadata.patch(patch(), 100), Err(MetadataError::Nothing));
    assert_eq!(metadata.put(patch(), 8), Err(MetadataError::TooLong { bytes: 9, limit: 8 }));
    assert_eq!(metadata.document(), None);
    metadata.put(object(json!({"a": 1})), 9).unwrap();
    assert_eq!(metadata.patch(patch(), 14), Err(MetadataError::TooLong { bytes: 15, limit: 14 }));
    metadata.patch(patch(), 15).unwrap();
    assert_eq!(metadata.document(), Some(json!({"a": 1, "b": "c"})));
}

#[test]
fn guest_gets_an_answer_by_tcp_from_the_address() {
    let mut stack = stack(MetadataVersion::V1);
    let mut client = Client::new(1);
    let answer = client.ask(&mut stack, "GET /latest/meta-data/ami-id HTTP/1.0\r\n\r\n");
    assert!(answer.ends_with("\r\n\r\nami-1"), "{answer}");
}

#[test]
fn connection_serves_one_request_after_the_other_and_several_in_one_go() {
    let mut stack = stack(MetadataVersion::V1);
    let mut client = Client::new(1);
    let (get, last) = ("GET /latest HTTP/1.1\r\n\r\n", "GET /latest HTTP/1.1\r\nConnection: close\r\n\r\n");
    let answer = client.ask(&mut stack, &format!("{get}{get}{last}{get}"));
    assert_eq!(answer.matches("\r\n\r\nmeta-data/").count(), 3, "{answer}");
}

#[test]
fn document_that_is_longer_than_any_buffer_comes_whole() {
    let metadata = Metadata::default();
    let text = "0123456789abcdef".repeat(2000);
    metadata.put(object(json!({ "a": text })), 51_200).unwrap();
    let mut stack = Stack::new(&metadata, &config(MetadataVersion::V1), 1500).unwrap();
    let answer = Client::new(1).ask(&mut stack, "GET /a HTTP/1.0\r\n\r\n");
    assert!(answer.ends_with(&text));
}

#[test]
fn connections_may_follow_one_another_without_end() {
    let mut stack = stack(MetadataVersion::V1);
    for number in 0..3 * MAX_CALLERS as u16 {
        let answer = Client::new(number).ask(&mut stack, "GET /latest HTTP/1.0\r\n\r\n");
        assert!(answer.ends_with("meta-data/"), "{number}: {answer:?}");
    }
    assert_eq!(stack.callers().count(), 0);
}

#[test]
fn connections_under_way_are_reset_where_the_guest_goes_on() {
    let mut before = stack(MetadataVersion::V1);
    let mut client = Client::new(1);
    client.open(&mut before);
    assert!(client.is_open());
    let callers: Vec<_> = before.callers().collect();
    assert_eq!(callers.len(), 1);
    let mut after = stack(MetadataVersion::V1);
    after.reset_callers(before.guest(), callers.into_iter());
    client.exchange(&mut after);
    assert!(!client.is_open(), "the guest knows that its connection is gone");
    let answer = Client::new(2).ask(&mut after, "GET /latest HTTP/1.0\r\n\r\n");
    assert!(answer.ends_with("meta-data/"));
}

#[test]
fn tokens_and_document_go_along_with_the_guest() {
    let (before, after) = (metadata(), Metadata::default());
    let config = config(MetadataVersion::V2);
    let put = "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n\r\n";
    let answered = answer(put, &before, &config);
    let token = answered.rsplit("\r\n").next().unwrap();
    let mut state = MetadataState::with_room();
    before.save(&mut state);
    assert!(after.restore(&state));
    assert_eq!(after.document(), before.document());
    let get = format!("GET /latest HTTP/1.1\r\nX-metadata-token: {token}\r\n\r\n");
    assert!(answer(&get, &after, &config).ends_with("meta-data/"));
    assert!(!after.restore(&MetadataState { document: Some("[]".into()), tokens: vec![] }));
}

#[test]
fn only_what_is_for_the_address_is_taken() {
    let stack = stack(MetadataVersion::V1);
    let mut arp = [0; FRAME_START];
    arp[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    arp[38..].copy_from_slice(&DEFAULT_ADDRESS.octets());
    assert!(stack.is_for_it(&arp));
    let mut ip = [0; FRAME_START];
    ip[12..14].copy_from_slice(&[8, 0]);
    ip[30..34].copy_from_slice(&DEFAULT_ADDRESS.octets());
    assert!(stack.is_for_it(&ip) && stack.is_for_it(&ip[..34]));
    for (frame, at) in [(arp, 21), (arp, 13), (arp, 41), (ip, 13), (ip, 33)] {
        let mut other = frame;
        other[at] ^= 7;
        assert!(!stack.is_for_it(&other), "{at}");
    }
    assert!(!stack.is_for_it(&arp[..41]) && !stack.is_for_it(&ip[..33]) && !stack.is_for_it(&[]));
}
