//! The documents that are made from the code are current. `UNDERSTUDY_WRITE_DOCUMENTS=1 cargo test -p understudy --test
//! documents` writes them.

use std::fmt::Write;
use std::path::Path;

use serde_json::Value;
use understudy::server::firecracker::{OPERATIONS, Operation};
use understudy::server::{When, openapi};

fn assert_current(path: &str, text: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    if std::env::var_os("UNDERSTUDY_WRITE_DOCUMENTS").is_some() {
        std::fs::write(&file, text).unwrap();
    }
    let found = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(
        found == text,
        "{path} is not as the code has it; UNDERSTUDY_WRITE_DOCUMENTS=1 cargo test -p understudy --test documents \
         writes it"
    );
}

/// The method, path and title of each operation that the document describes.
fn described() -> Vec<(String, String, String)> {
    let document: Value = serde_json::from_str(&openapi()).unwrap();
    let mut found = Vec::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            let title = operation["summary"].as_str().unwrap_or_default();
            found.push((method.to_uppercase(), path.clone(), title.to_owned()));
        }
    }
    found
}

fn is_described(operation: &Operation) -> bool {
    described().iter().any(|(method, path, _)| method == operation.method && path == operation.path)
}

fn when(operation: &Operation) -> &'static str {
    match operation.when {
        When::Before => "before the start",
        When::After => "after the start",
        When::Always => "always",
    }
}

fn table() -> String {
    let mut text = String::from(
        "# The API\n\n\
         HTTP on a Unix socket (`--api-sock`), for its owner alone. Bodies, fields and answers are in \
         [openapi.json](../resources/openapi.json),\nwhich a process serves at `/openapi.json` too. What Firecracker has is \
         as Firecracker has it: 204 for a change, 200 for what is shown,\n400 with a `fault_message` for what is refused; \
         nothing has changed then.\n\n\
         This page is made from the code; a test keeps it current.\n\n\
         ## Firecracker's operations\n\n\
         | operation | possible | what it does |\n|---|---|---|\n",
    );
    let described = described();
    for operation in OPERATIONS {
        let Operation { method, path, missing, .. } = operation;
        let title = described.iter().find(|found| (found.0.as_str(), found.1.as_str()) == (method, path));
        let (when, what) = match missing {
            Some(why) => ("no", (*why).to_owned()),
            None => (when(operation), title.map(|found| found.2.clone()).unwrap_or_default()),
        };
        writeln!(text, "| `{method} {path}` | {when} | {what} |").unwrap();
    }
    text.push_str("\n## Understudy's own\n\n| operation | what it does |\n|---|---|\n");
    for (method, path, title) in described {
        if !OPERATIONS.iter().any(|operation| operation.method == method && operation.path == path) {
            writeln!(text, "| `{method} {path}` | {title} |").unwrap();
        }
    }
    text
}

#[test]
fn openapi_document_is_current() {
    assert_current("resources/openapi.json", &openapi());
}

#[test]
fn table_of_operations_is_current() {
    assert_current("docs/api.md", &table());
}

#[test]
fn document_describes_each_operation_that_is_here_and_none_that_is_not() {
    for operation in OPERATIONS {
        let Operation { method, path, missing, .. } = operation;
        assert_eq!(is_described(operation), missing.is_none(), "{method} {path}");
    }
}
