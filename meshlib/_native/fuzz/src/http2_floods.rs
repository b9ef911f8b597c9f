//! Invariant: whatever frames come, the watch over a server's connection answers the same however they are cut, knows where a frame
//! of ours ends, and never takes more resets at once than it allows.
//!
//! The first byte of the input chooses the cuts; the rest is read behind a client's preface and its SETTINGS.
use mesh_wire::http2::floods::Floods;

const HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";

pub fn check(input: &[u8]) {
    let [seed, bytes @ ..] = input else { return };
    let (mut whole, mut cut) = (Floods::default(), Floods::default());
    let all = [HELLO, bytes].concat();
    let is_taken = whole.read(&all, 1).is_ok();
    let size = usize::from(*seed % 13) + 1;
    // A flood that ends within what came is seen wherever the cut is.
    let is_taken_in_pieces = all.chunks(size).all(|piece| cut.read(piece, 1).is_ok());
    assert_eq!(is_taken, is_taken_in_pieces);
    if is_taken {
        assert_eq!(whole.is_in_head(), cut.is_in_head());
        assert!(resets(bytes) <= 200, "resets without end");
    }
    let (mut once, mut often) = (Floods::default(), Floods::default());
    once.wrote(bytes);
    bytes.chunks(size).for_each(|piece| often.wrote(piece));
    assert_eq!(once.is_between_frames(), often.is_between_frames());
}

/// RST_STREAM frames, if there are no more than twice as many streams.
fn resets(mut bytes: &[u8]) -> usize {
    let (mut resets, mut streams) = (0, 0);
    while let [high, middle, low, kind, _, _, _, _, _, rest @ ..] = bytes {
        let size = usize::from(*high) << 16 | usize::from(*middle) << 8 | usize::from(*low);
        resets += usize::from(*kind == 3);
        streams += usize::from(*kind == 1);
        bytes = rest.get(size..).unwrap_or_default();
    }
    if resets * 2 > streams {
        resets
    } else {
        0
    }
}
