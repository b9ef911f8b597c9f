//! Do two names of CAs say the same?
//!
//! A name is written by whoever issues, and a list of revoked certificates is often written by another program than the
//! certificate was: the same text as another kind of string. RFC 5280 (7.1) compares what is said: of text, neither the kind nor
//! the case nor the width of the gaps counts. To find the path of a certificate is webpki's, which compares bytes; that errs by
//! refusing. A list that isn't found would err by believing.
use x509_parser::asn1_rs::{Any, Tag};
use x509_parser::prelude::FromDer;

/// A name (as webpki gives it, without tag and length) in the form in which it is compared. One that can't be read stays as it is.
pub fn comparable(name: &[u8]) -> Vec<u8> {
    let read = || {
        let mut form = Vec::with_capacity(name.len());
        let mut rest = name;
        while !rest.is_empty() {
            let (after, parts) = Any::from_der(rest).ok()?;
            rest = after;
            // Several attributes in one part stand in the order of their bytes, in which the kind of text counts.
            let mut attributes = attributes(parts.data)?;
            attributes.sort_unstable();
            put(&mut form, &attributes.concat());
        }
        Some(form)
    };
    read().unwrap_or_else(|| name.to_vec())
}

fn attributes(mut rest: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut found = Vec::new();
    while !rest.is_empty() {
        let (after, attribute) = Any::from_der(rest).ok()?;
        rest = after;
        let (value, kind) = Any::from_der(attribute.data).ok()?;
        let (_, value) = Any::from_der(value).ok()?;
        let mut form = Vec::new();
        put(&mut form, kind.data);
        match text(&value) {
            Some(text) => {
                let words: Vec<&str> = text.split_whitespace().collect();
                put(&mut form, words.join(" ").to_lowercase().as_bytes());
            }
            None => {
                put(&mut form, &value.tag().0.to_be_bytes());
                put(&mut form, value.data);
            }
        }
        found.push(form);
    }
    Some(found)
}

/// With its length before it, so that no two forms run into one.
fn put(form: &mut Vec<u8>, piece: &[u8]) {
    form.extend_from_slice(&piece.len().to_be_bytes());
    form.extend_from_slice(piece);
}

/// What a string of any kind says.
fn text(value: &Any<'_>) -> Option<String> {
    let bytes = value.data;
    match value.tag() {
        Tag::Utf8String | Tag::PrintableString | Tag::Ia5String | Tag::VisibleString | Tag::NumericString => {
            String::from_utf8(bytes.to_vec()).ok()
        }
        // In practice it is Latin-1.
        Tag::T61String => Some(bytes.iter().map(|byte| char::from(*byte)).collect()),
        Tag::BmpString => {
            let (units, odd) = split(bytes);
            let units: Vec<u16> = units.map(u16::from_be_bytes).collect();
            odd.is_empty().then(|| String::from_utf16(&units).ok())?
        }
        Tag::UniversalString => {
            let (units, odd) = split(bytes);
            odd.is_empty().then(|| units.map(|unit| char::from_u32(u32::from_be_bytes(unit))).collect())?
        }
        _ => None,
    }
}

/// In pieces of one size, and what is left over.
fn split<const SIZE: usize>(bytes: &[u8]) -> (impl Iterator<Item = [u8; SIZE]> + '_, &[u8]) {
    let pieces = bytes.chunks_exact(SIZE);
    let rest = pieces.remainder();
    (pieces.filter_map(|piece| piece.try_into().ok()), rest)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
    use super::comparable;

    fn tagged(tag: u8, content: &[u8]) -> Vec<u8> {
        [&[tag, u8::try_from(content.len()).unwrap()], content].concat()
    }

    fn attribute(kind: u8, tag: u8, text: &[u8]) -> Vec<u8> {
        tagged(0x30, &[vec![6, 3, 0x55, 4, kind], tagged(tag, text)].concat())
    }

    /// A name of parts of attributes.
    fn name(parts: &[&[(u8, u8, &[u8])]]) -> Vec<u8> {
        let part = |attributes: &&[(u8, u8, &[u8])]| {
            tagged(
                0x31,
                &attributes.iter().flat_map(|(kind, tag, text)| attribute(*kind, *tag, text)).collect::<Vec<_>>(),
            )
        };
        parts.iter().flat_map(part).collect()
    }

    const CN: u8 = 3;
    const O: u8 = 10;
    const UTF8: u8 = 12;
    const PRINTABLE: u8 = 19;

    #[test]
    fn names_that_say_the_same_are_the_same() {
        let root = comparable(&name(&[&[(CN, UTF8, b"My Root")]]));
        for (tag, text) in [
            (PRINTABLE, b"My Root".as_slice()),
            (UTF8, b" my  ROOT "),
            (20, b"My Root"),
            (22, b"My Root"),
            (30, b"\0M\0y\0 \0R\0o\0o\0t"),
            (28, b"\0\0\0M\0\0\0y\0\0\0 \0\0\0R\0\0\0o\0\0\0o\0\0\0t"),
        ] {
            assert_eq!(root, comparable(&name(&[&[(CN, tag, text)]])), "{tag}");
        }
        let (one, other) = (
            &[(O, PRINTABLE, b"z".as_slice()), (CN, UTF8, b"a")],
            &[(CN, PRINTABLE, b"a".as_slice()), (O, UTF8, b"z")],
        );
        assert_eq!(comparable(&name(&[one])), comparable(&name(&[other])));
    }

    #[test]
    fn names_that_say_something_else_are_others() {
        let root = name(&[&[(CN, UTF8, b"root"), (O, UTF8, b"a")]]);
        for other in [
            name(&[&[(CN, UTF8, b"root")], &[(O, UTF8, b"a")]]),
            name(&[&[(O, UTF8, b"root"), (CN, UTF8, b"a")]]),
            name(&[&[(CN, UTF8, b"roo"), (O, UTF8, b"ta")]]),
            name(&[&[(CN, UTF8, b"root")]]),
            name(&[&[(CN, UTF8, b"ro ot"), (O, UTF8, b"a")]]),
            // Bits are not text, whatever they would read as.
            name(&[&[(CN, 3, b"root"), (O, UTF8, b"a")]]),
            vec![],
        ] {
            assert_ne!(comparable(&root), comparable(&other), "{other:?}");
        }
    }

    #[test]
    fn a_name_that_can_not_be_read_is_compared_as_it_is() {
        for broken in [b"\x31\x05".as_slice(), b"root", &name(&[&[(CN, UTF8, b"root")]])[..5]] {
            assert_eq!(broken, comparable(broken));
        }
        let half = name(&[&[(CN, 30, b"\0a\0")]]);
        assert_ne!(comparable(&half), comparable(&name(&[&[(CN, 30, b"\0a")]])));
    }
}
