//! Did the caller show a token, and where?
//!
//! Providers say where their tokens are looked for: in a header, a cookie, or a parameter of the query. Two tokens in one request
//! are one too many: which of them counts would be for each reader to choose. What is found is only cut out here; `jwt` judges it.
use super::headers::Kept;
use crate::secure::jwt::{Place, PlaceKind};

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found<'a> {
    Nothing,
    /// The token, and where it was.
    Token(&'a [u8], &'a Place),
    Several,
}

/// The one token of a request, in any of these places.
pub(super) fn find<'a>(places: &'a [Place], headers: &'a [Kept], target: &'a [u8]) -> Found<'a> {
    let mut found = Found::Nothing;
    for place in places {
        let name = place.name.as_str();
        let mut note = |token: &'a [u8]| {
            found = match found {
                Found::Nothing => Found::Token(token, place),
                _ => Found::Several,
            };
        };
        let values = |wanted: &'a str| headers.iter().filter(move |(name, _)| **name == *wanted);
        match place.kind {
            PlaceKind::Header => {
                values(name).filter_map(|(_, value)| without_prefix(value, &place.prefix)).for_each(&mut note)
            }
            PlaceKind::Cookie => values("cookie")
                .flat_map(|(_, value)| value.split(|byte| *byte == b';'))
                .filter_map(|pair| value_of(pair.trim_ascii(), name))
                .for_each(&mut note),
            PlaceKind::Query => {
                query(target).split(|byte| *byte == b'&').filter_map(|pair| value_of(pair, name)).for_each(note)
            }
        }
    }
    found
}

/// Schemes are compared without case. Another scheme (Basic …) is no token at all. This one without a token, with something else
/// than a space behind it, or in a list, is a bad one: another reader of the same field might find a token there.
fn without_prefix<'a>(value: &'a [u8], prefix: &str) -> Option<&'a [u8]> {
    let scheme = prefix.trim_end().as_bytes();
    if !scheme.is_empty() && value.contains(&b',') {
        return Some(value);
    }
    let is_space = |byte: &u8| !byte.is_ascii_graphic();
    let begun = value.iter().position(|byte| !is_space(byte)).unwrap_or(value.len());
    let (found, rest) = value.get(begun..)?.split_at_checked(scheme.len())?;
    if !found.eq_ignore_ascii_case(scheme) {
        return None;
    }
    match rest {
        [b' ', token @ ..] => Some(if begun == 0 { token } else { value }),
        [] => Some(rest),
        _ if scheme.is_empty() => Some(rest),
        // `Bearerer` is another word.
        [next, ..] if next.is_ascii_alphanumeric() || matches!(next, b'-' | b'_') => None,
        _ => Some(value),
    }
}

fn value_of<'a>(pair: &'a [u8], name: &str) -> Option<&'a [u8]> {
    pair.strip_prefix(name.as_bytes())?.strip_prefix(b"=")
}

fn query(target: &[u8]) -> &[u8] {
    let mut parts = target.splitn(2, |byte| *byte == b'?');
    let _path = parts.next();
    parts.next().and_then(|rest| rest.split(|byte| *byte == b'#').next()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing)]
    use super::*;

    fn place(kind: PlaceKind, name: &str, prefix: &str) -> Place {
        Place { kind, name: name.to_owned(), prefix: prefix.to_owned() }
    }

    #[test]
    fn a_token_is_found_where_a_provider_looks_for_it() {
        let bearer = [place(PlaceKind::Header, "authorization", "Bearer ")];
        let found = |token| Found::Token(token, &bearer[0]);
        for (value, expected) in [
            ("Bearer a.b.c", found(b"a.b.c" as &[u8])),
            ("bearer a.b.c", found(b"a.b.c")),
            // The parser refuses the space.
            ("Bearer  a.b.c", found(b" a.b.c")),
            ("Bearer", found(b"")),
            ("Basic YTpi", Found::Nothing),
            ("Bearera.b.c", Found::Nothing),
            // What some readers take for a token is a bad one, and never none.
            ("Bearer\ta.b.c", found(b"Bearer\ta.b.c")),
            (" Bearer a.b.c", found(b" Bearer a.b.c")),
            ("Bearer:a.b.c", found(b"Bearer:a.b.c")),
            ("Basic x, Bearer a.b.c", found(b"Basic x, Bearer a.b.c")),
            ("", Found::Nothing),
        ] {
            let headers = [("authorization".into(), value.as_bytes().to_vec())];
            assert_eq!(find(&bearer, &headers, b"/"), expected, "{value}");
        }
    }

    #[test]
    fn cookies_and_queries_hold_tokens_only_where_a_provider_says_so() {
        let headers = [("cookie".into(), b"a=1; session=x.y.z;session2=q".to_vec())];
        let cookie = [place(PlaceKind::Cookie, "session", "")];
        assert_eq!(find(&cookie, &headers, b"/?session=n"), Found::Token(b"x.y.z", &cookie[0]));
        let query = [place(PlaceKind::Query, "token", "")];
        assert_eq!(find(&query, &headers, b"/x?a=1&token=x.y.z#token=f"), Found::Token(b"x.y.z", &query[0]));
        assert_eq!(find(&query, &headers, b"/token=x"), Found::Nothing);
    }

    #[test]
    fn two_tokens_are_one_too_many() {
        let places = [place(PlaceKind::Header, "authorization", "Bearer "), place(PlaceKind::Cookie, "session", "")];
        let one = ("authorization".into(), b"Bearer a.b.c".to_vec());
        let twice = [one.clone(), one.clone()];
        assert_eq!(find(&places, &twice, b"/"), Found::Several);
        let both = [one, ("cookie".into(), b"session=a.b.c".to_vec())];
        assert_eq!(find(&places, &both, b"/"), Found::Several);
    }
}
