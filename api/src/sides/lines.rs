//! Finds the guest's lines in a console stream that a kernel may have written to as well.

use resources::protocol::Line;

/// A line of a console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConsoleLine {
    /// What the guest's workload said; `None` for any other text.
    pub line: Option<Line>,
    /// Index after its line end.
    pub end: usize,
}

/// The complete lines of `bytes`. What follows the last line end is left out.
///
/// A kernel may put a message of its own into the midst of a line (printk does not wait for user space); such a line is
/// put together again.
pub fn console_lines(bytes: &[u8]) -> impl Iterator<Item = ConsoleLine> {
    let mut end = 0;
    let mut broken_off: Vec<u8> = Vec::new();
    bytes.split_inclusive(|&byte| byte == b'\n').filter(|text| text.ends_with(b"\n")).map(move |text| {
        end += text.len();
        let mut line = parse(text);
        if line.is_none() && !broken_off.is_empty() {
            broken_off.extend_from_slice(text);
            line = parse(&broken_off);
        }
        broken_off.clear();
        if line.is_none() {
            broken_off.extend_from_slice(before_kernel_message(text));
        }
        ConsoleLine { line, end }
    })
}

fn parse(text: &[u8]) -> Option<Line> {
    Line::parse(std::str::from_utf8(text).ok()?)
}

/// What stands before the time stamp of a kernel message, `[   12.345678] `; nothing if there is none.
fn before_kernel_message(text: &[u8]) -> &[u8] {
    let starts = text.iter().enumerate().filter(|(_, byte)| **byte == b'[').map(|(at, _)| at);
    starts.into_iter().find(|&at| is_time_stamp(&text[at..])).map_or(&[], |at| &text[..at])
}

fn is_time_stamp(text: &[u8]) -> bool {
    let Some(length) = text.iter().position(|&byte| byte == b']') else { return false };
    let inner = text[1..length].trim_ascii_start();
    let Some(point) = inner.iter().position(|&byte| byte == b'.') else { return false };
    let (seconds, micros) = (&inner[..point], &inner[point + 1..]);
    !seconds.is_empty() && micros.len() == 6 && [seconds, micros].concat().iter().all(u8::is_ascii_digit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(text: &str) -> Vec<u64> {
        let count = |line: ConsoleLine| match line.line {
            Some(Line::Count { n, .. }) => Some(n),
            _ => None,
        };
        console_lines(text.as_bytes()).filter_map(count).collect()
    }

    #[test]
    fn lines_among_kernel_messages_are_found() {
        let text = "[    0.000000] Linux version 6.12\r\n\
                    count cpu=0 n=1 sum=0000000000000001\r\n\
                    \u{fffd}shell ready\n\
                    count cpu=0 n=2 sum=0000000000000002\n\
                    count cpu=0 n=3 su";
        assert_eq!(counts(text), [1, 2]);
    }

    #[test]
    fn line_with_a_kernel_message_in_its_midst_is_put_together() {
        let text = "count cpu=0 n=1[   12.345678] random: crng init done\r\n sum=0000000000000001\n";
        assert_eq!(counts(text), [1]);
        let text = "count cpu=0 n=1[not a stamp] x\n sum=0000000000000001\n";
        assert!(counts(text).is_empty());
    }

    #[test]
    fn ends_are_where_the_lines_end() {
        let ends: Vec<usize> = console_lines(b"a\n\nbc\nd").map(|line| line.end).collect();
        assert_eq!(ends, [2, 3, 6]);
    }
}
