//! What the guest's network service and its clients say to each other, and what it writes to its disk.

use proptest::prelude::*;
use resources::protocol::{
    BLOCK_BYTES, LONGEST_REQUEST, REGISTERS, Reply, Request, fill_block, read_block, stream_byte,
};

fn text() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>().prop_filter("a line", |byte| *byte != b'\n'), 0..100)
}

proptest! {
    #[test]
    fn request_is_read_as_it_was_written(
        register in 0..REGISTERS, value: u64, block: u64, echoed in text(), kind in 0..7,
    ) {
        let request = match kind {
            0 => Request::Get { register },
            1 => Request::Set { register, value },
            2 => Request::Increment { register },
            3 => Request::Echo { text: &echoed },
            4 => Request::Download { bytes: value },
            5 => Request::Store { block, value },
            _ => Request::Load { block },
        };
        let line = request.encode();
        prop_assert_eq!(Request::parse(line.as_bytes().strip_suffix(b"\n").unwrap()), Some(request));
    }

    #[test]
    fn reply_is_read_as_it_was_written(value: u64, echoed in text(), kind in 0..5) {
        let reply = match kind {
            0 => Reply::Done,
            1 => Reply::Value(value),
            2 => Reply::Echo(&echoed),
            3 => Reply::Bytes(value),
            _ => Reply::Refused("no such request"),
        };
        let line = reply.encode();
        prop_assert_eq!(Reply::parse(line.as_bytes().strip_suffix(b"\n").unwrap()), Some(reply));
    }

    #[test]
    fn no_line_is_more_than_refused(line in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Some(request) = Request::parse(&line) {
            prop_assert!(line.len() <= LONGEST_REQUEST);
            if let Request::Get { register } | Request::Set { register, .. } | Request::Increment { register } = request {
                prop_assert!(register < REGISTERS);
            }
        }
    }

    #[test]
    fn block_tells_its_value_and_any_damage(
        block: u64, value: u64, other: u64, byte in 0..BLOCK_BYTES, bit in 0..8,
    ) {
        let mut bytes = [0; BLOCK_BYTES];
        prop_assert_eq!(read_block(&bytes, block), None);
        fill_block(&mut bytes, block, value);
        prop_assert_eq!(read_block(&bytes, block), Some(value));
        prop_assert_eq!(read_block(&bytes, block.wrapping_add(other | 1)), None);
        bytes[byte] ^= 1_u8 << bit;
        prop_assert_eq!(read_block(&bytes, block), None);
    }
}

#[test]
fn malformed_requests_are_none() {
    for line in [
        "", "get", "get ", "get 1024", "get 1 2", "get  1", "set 1", "set 1 -1", "GET 1", "incr 1 ",
        "load +1",
    ] {
        assert_eq!(Request::parse(line.as_bytes()), None, "{line:?}");
    }
}

#[test]
fn stream_is_the_same_from_wherever_it_is_read() {
    let whole: Vec<u8> = (0..64).map(stream_byte).collect();
    assert!((8..64).all(|position| stream_byte(position as u64) == whole[position]));
    assert_ne!(whole[..8], whole[8..16]);
}
