//! HTTP as the guest speaks it with the service. Status codes and texts are Firecracker's.

use std::time::Instant;

use httparse::{Request, Status};

use super::document::{Form, Unanswered};
use super::tokens::LIFETIME;
use super::{Metadata, MetadataConfig, MetadataVersion};

/// Longest request, with its body.
pub(super) const MAX_REQUEST: usize = 2560;
const MAX_HEADERS: usize = 32;

const TOKEN_PATH: [&str; 3] = ["latest", "api", "token"];
const TOKEN: [&str; 2] = ["X-metadata-token", "X-aws-ec2-metadata-token"];
const LIFETIME_HEADER: [&str; 2] = ["X-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token-ttl-seconds"];
const FORWARDED: &str = "X-Forwarded-For";

/// An answer, and what it answers.
#[derive(Debug)]
pub(super) struct Answer {
    /// It, on its way to the guest.
    pub(super) bytes: Vec<u8>,
    /// Bytes of the request.
    pub(super) request: usize,
    /// Whether no other follows.
    pub(super) last: bool,
}

/// What is answered, without the form that HTTP gives it.
struct Reply {
    status: &'static str,
    json: bool,
    /// A further header, complete.
    header: String,
    body: String,
}

impl Reply {
    fn text(status: &'static str, body: impl Into<String>) -> Self {
        Self { status, json: false, header: String::new(), body: body.into() }
    }

    fn bad(body: impl Into<String>) -> Self {
        Self::text("400 Bad Request", body)
    }

    fn write(&self, last: bool) -> Vec<u8> {
        let kind = if self.json { "application/json" } else { "text/plain" };
        let goes_on = if last { "close" } else { "keep-alive" };
        let Self { status, header, body, .. } = self;
        format!(
            "HTTP/1.1 {status}\r\nServer: Understudy\r\nConnection: {goes_on}\r\nContent-Type: {kind}\r\n\
             Content-Length: {}\r\n{header}\r\n{body}",
            body.len()
        )
        .into_bytes()
    }
}

/// Answers the first request in `bytes`; `None` if that is not complete.
pub(super) fn answer(bytes: &[u8], metadata: &Metadata, config: &MetadataConfig) -> Option<Answer> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = Request::new(&mut headers);
    // What cannot be understood has no end either: the connection has one.
    let broken = |text: &str| {
        let bytes_of_answer = Reply::bad(text).write(true);
        Some(Answer { bytes: bytes_of_answer, request: bytes.len(), last: true })
    };
    let too_long = || broken("The request is too long.");
    let head = match request.parse(bytes) {
        Ok(Status::Complete(head)) => head,
        Ok(Status::Partial) if bytes.len() < MAX_REQUEST => return None,
        Ok(Status::Partial) => return too_long(),
        Err(error) => return broken(&format!("Invalid request: {error}.")),
    };
    if find(&request, &["Transfer-Encoding"]).is_some() {
        return broken("Invalid header. Reason: Unsupported value. Key: Transfer-Encoding");
    }
    let body = match find(&request, &["Content-Length"]) {
        None => 0,
        Some((_, text)) => match text.parse::<usize>() {
            Ok(body) => body,
            Err(_) => return broken(&invalid_value("Content-Length", text)),
        },
    };
    let Some(end) = head.checked_add(body).filter(|&end| end <= MAX_REQUEST) else { return too_long() };
    if end > bytes.len() {
        return None;
    }
    let connection = find(&request, &["Connection"]).map_or("", |(_, text)| text);
    let last =
        if request.version == Some(1) { has(connection, "close") } else { !has(connection, "keep-alive") };
    let reply = reply(&request, metadata, config);
    Some(Answer { bytes: reply.write(last), request: end, last })
}

fn reply(request: &Request<'_, '_>, metadata: &Metadata, config: &MetadataConfig) -> Reply {
    let path = path(request.path.unwrap_or_default());
    if path.is_empty() {
        return Reply::bad("Invalid URI.");
    }
    match request.method {
        Some("GET") => {
            if config.version == MetadataVersion::V2
                && let Err(refusal) = check_token(request, metadata)
            {
                return refusal;
            }
            read(request, path, metadata, config)
        }
        Some("PUT") => give_token(request, path, metadata),
        _ => Reply {
            header: "Allow: GET, PUT\r\n".into(),
            ..Reply::text("405 Method Not Allowed", "Not allowed HTTP method.")
        },
    }
}

fn read(request: &Request<'_, '_>, path: &str, metadata: &Metadata, config: &MetadataConfig) -> Reply {
    let accept = find(request, &["Accept"]).map_or("", |(_, text)| text);
    let json = !config.imds_compat && has(accept, "application/json");
    let document = metadata.now().document.clone();
    let form = if json { Form::Json } else { Form::Text };
    match document.ok_or(Unanswered::NotFound).and_then(|document| document.read(path, form)) {
        Ok(body) => Reply { status: "200 OK", json, header: String::new(), body },
        Err(Unanswered::NotFound) => not_found(path),
        Err(Unanswered::NoText) => {
            Reply::text("501 Not Implemented", "Cannot retrieve value. The value has an unsupported type.")
        }
    }
}

fn not_found(path: &str) -> Reply {
    Reply::text("404 Not Found", format!("Resource not found: {path}."))
}

fn check_token(request: &Request<'_, '_>, metadata: &Metadata) -> Result<(), Reply> {
    let refusal = |text: &str| Reply::text("401 Unauthorized", text);
    let (_, token) = find(request, &TOKEN).ok_or_else(|| {
        refusal(
            "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to specify the session \
             token.",
        )
    })?;
    if metadata.now().tokens.is_good(token, Instant::now()) {
        Ok(())
    } else {
        Err(refusal("MMDS token not valid."))
    }
}

fn give_token(request: &Request<'_, '_>, path: &str, metadata: &Metadata) -> Reply {
    // Whoever comes by a proxy is not the guest itself.
    if let Some((name, _)) = find(request, &[FORWARDED]) {
        return Reply::bad(format!("Invalid header. Reason: Unsupported header name. Key: {name}"));
    }
    if !path.split('/').filter(|part| !part.is_empty()).eq(TOKEN_PATH) {
        return not_found(path);
    }
    let Some((name, text)) = find(request, &LIFETIME_HEADER) else {
        return Reply::bad(
            "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or \
             `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.",
        );
    };
    let Ok(seconds) = text.parse::<u32>() else { return Reply::bad(invalid_value(name, text)) };
    if !LIFETIME.contains(&seconds) {
        return Reply::bad(format!(
            "Invalid time to live value provided for token: {seconds}. Please provide a value between {} and {}.",
            LIFETIME.start(),
            LIFETIME.end()
        ));
    }
    match metadata.now().tokens.give(seconds, Instant::now()) {
        Some(token) => Reply { header: format!("{name}: {seconds}\r\n"), ..Reply::text("200 OK", token) },
        None => Reply::bad("No token can be made now."),
    }
}

fn invalid_value(name: &str, value: &str) -> String {
    format!("Invalid header. Reason: Invalid value. Key:{name}; Value:{value}")
}

/// The path of a URI, which may name the service as well.
fn path(uri: &str) -> &str {
    match uri.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("", |at| &rest[at..]),
        None if uri.starts_with('/') => uri,
        None => "",
    }
}

/// The first header of one of `names`, as `names` writes it, and its value.
fn find<'a>(request: &Request<'_, 'a>, names: &[&'static str]) -> Option<(&'static str, &'a str)> {
    request.headers.iter().find_map(|header| {
        let name = names.iter().find(|name| header.name.eq_ignore_ascii_case(name))?;
        Some((*name, std::str::from_utf8(header.value).ok()?.trim()))
    })
}

/// Whether `word` is in a list of words with commas, each perhaps with parameters.
fn has(list: &str, word: &str) -> bool {
    list.split(',').any(|item| item.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case(word))
}
