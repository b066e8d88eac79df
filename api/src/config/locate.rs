//! Which field of a JSON text a position is in.

/// The keys that lead to `line` and `column` (both from 1, as serde_json counts them), joined by dots; empty at the top.
pub(super) fn field_at(text: &str, line: usize, column: usize) -> String {
    let before = text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum::<usize>();
    let end = (before + column).min(text.len());
    // What closes or follows a value is read before the value is judged: the position is still the value's.
    let read =
        text.as_bytes()[..end].strip_suffix(b"}").or_else(|| text.as_bytes()[..end].strip_suffix(b","));
    let mut bytes = read.unwrap_or(&text.as_bytes()[..end]).iter().copied();
    // One entry for each open object or array: the key whose value is being read.
    let mut keys: Vec<String> = Vec::new();
    let mut last = String::new();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => last = string(&mut bytes),
            b'{' | b'[' => keys.push(String::new()),
            b'}' | b']' => drop(keys.pop()),
            b':' => {
                if let Some(key) = keys.last_mut() {
                    key.clone_from(&last);
                }
            }
            b',' => {
                last.clear();
                if let Some(key) = keys.last_mut() {
                    key.clear();
                }
            }
            _ => {}
        }
    }
    // A key that serde does not know is reported at its own end, before its colon.
    if keys.last().is_some_and(String::is_empty) {
        keys.pop();
        keys.push(last);
    }
    keys.retain(|key| !key.is_empty());
    keys.join(".")
}

/// The rest of a string whose opening quote has been read. Escapes are kept as written.
fn string(bytes: &mut impl Iterator<Item = u8>) -> String {
    let mut content = Vec::new();
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => break,
            b'\\' => {
                content.push(byte);
                content.extend(bytes.next());
            }
            _ => content.push(byte),
        }
    }
    String::from_utf8_lossy(&content).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"{
  "a": {"b": 1, "c": "x:{\"y"},
  "d": [1, 2],
  "e": {"f": true}
}"#;

    fn field(marker: &str) -> String {
        let at = TEXT.find(marker).unwrap() + marker.len();
        let line = TEXT[..at].matches('\n').count() + 1;
        let column = at - TEXT[..at].rfind('\n').map_or(0, |newline| newline + 1);
        field_at(TEXT, line, column)
    }

    #[test]
    fn values_are_found_under_their_keys() {
        assert_eq!(field("\"b\": 1"), "a.b");
        assert_eq!(field("\"c\": \"x:{"), "a.c");
        assert_eq!(field("[1, 2"), "d");
        assert_eq!(field("true"), "e.f");
        assert_eq!(field("true}"), "e.f");
        assert_eq!(field("\"b\": 1,"), "a.b");
    }

    #[test]
    fn key_before_its_colon_is_named() {
        assert_eq!(field("\"f\""), "e.f");
        assert_eq!(field("\"d\""), "d");
    }

    #[test]
    fn any_position_of_any_text_is_no_panic() {
        for text in ["", "}}]]", "\"", "{\"a", "\"\\", "ü{:,"] {
            for line in 0..3 {
                for column in 0..9 {
                    field_at(text, line, column);
                }
            }
        }
    }
}
