//! Which path does this request target mean?
//!
//! Servers and frameworks disagree about escaped slashes, dot segments, backslashes, fragments and absolute targets, and every
//! disagreement is a way around a rule. So a target is put into one canonical form, once, here; rules, routes, metrics and the
//! application all get that form. What two careful readers could read in two ways is refused. Where readers differ although each
//! is right (`;params`, a trailing slash), both readings are kept: a denial fires if any matches, a permission needs all.
//!
//! It does not fold case, normalise Unicode or look at the query.
use std::borrow::Cow;
use std::fmt;

pub mod profile;

/// A canonical path: `text` is decoded, `raw` is the same, percent-encoded for the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path {
    text: String,
    /// None: `text` needs no escapes.
    raw: Option<String>,
    /// The other reading, without `;params`; None where it is the same.
    bare: Option<String>,
}

/// Why a target has no canonical form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathError {
    RawByte,
    Asterisk,
    AbsoluteForm,
    Authority,
    NoSlash,
    Percent,
    EscapedTwice,
    Control,
    Utf8,
    Ambiguous,
    NotCanonical,
}

impl fmt::Display for PathError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PathError::RawByte => "the target has a byte outside 0x21 to 0x7e; such bytes are sent percent-encoded",
            PathError::Asterisk => "the target * belongs to OPTIONS only",
            PathError::AbsoluteForm => "an absolute target is http or https, without user information",
            PathError::Authority => "the authority of the absolute target is not the one of the Host header",
            PathError::NoSlash => "the target does not begin with a slash",
            PathError::Percent => "a percent sign is not followed by two hexadecimal digits",
            PathError::EscapedTwice => "a slash, dot, backslash, percent sign or control byte is escaped twice",
            PathError::Control => "the path has a control byte",
            PathError::Utf8 => "the path is not UTF-8 once it is decoded",
            PathError::Ambiguous => "the path means different things, depending on whether dot segments or double slashes go first",
            PathError::NotCanonical => {
                "the path has an escaped slash, a backslash or a dot segment, and `paths: strict` refuses what is not canonical"
            }
        })
    }
}

/// The canonical form of a target. `host` is the Host header's value (an absolute target must agree with it).
pub fn canonical(target: &[u8], method: &str, host: Option<&[u8]>, is_strict: bool) -> Result<Path, PathError> {
    match plain(target) {
        Some(text) => Ok(Path::new(text.to_owned(), None)),
        None => careful(target, method, host, is_strict),
    }
}

impl Path {
    fn new(text: String, raw: Option<String>) -> Self {
        let bare = if text.as_bytes().contains(&b';') {
            Some(without_params(&text)).filter(|bare| *bare != text)
        } else {
            None
        };
        Self { text, raw, bare }
    }

    /// A name that is exact by its grammar (a gRPC method): it has one reading, and nothing is to be escaped.
    pub fn exact(text: &str) -> Self {
        Self { text: text.to_owned(), raw: None, bare: None }
    }

    /// The same in another spelling, one that leaves slashes alone: for comparing only.
    pub(crate) fn mapped(&self, spelled: impl Fn(&str) -> String) -> Self {
        Self { text: spelled(&self.text), raw: None, bare: self.bare.as_deref().map(spelled) }
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    pub fn raw(&self) -> &str {
        self.raw.as_deref().unwrap_or(&self.text)
    }

    /// All ways to read it, each with and without its trailing slash. For rules that deny: one is enough.
    pub fn wide_readings(&self) -> impl Iterator<Item = &str> {
        let bare = self.bare.as_deref().map_or([None, None], wide);
        wide(&self.text).into_iter().chain(bare).flatten()
    }

    /// The ways to read it as it stands. For rules that allow: all of them count.
    pub fn readings(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.text.as_str()).chain(self.bare.as_deref())
    }
}

fn wide(path: &str) -> [Option<&str>; 2] {
    let is_trimmed = path.len() > 1 && path.ends_with('/');
    [Some(path), is_trimmed.then(|| without_slash(path))]
}

fn without_slash(path: &str) -> &str {
    match path.trim_end_matches('/') {
        "" => "/",
        trimmed => trimmed,
    }
}

/// The path of a target that is canonical as it stands: no escape, no `//`, no segment that begins with a dot. Nearly all are.
fn plain(target: &[u8]) -> Option<&str> {
    let mut before = b' ';
    let mut end = target.len();
    for (place, &byte) in target.iter().enumerate() {
        match byte {
            b'/' if before != b'/' => {}
            b'.' if before != b'/' => {}
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'~' | b':' | b'@' => {}
            b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b',' | b';' | b'=' => {}
            b'?' | b'#' => {
                end = place;
                break;
            }
            _ => return None,
        }
        before = byte;
    }
    let (path, rest) = target.split_at_checked(end)?;
    if path.first() != Some(&b'/') || has_raw_byte(rest) {
        return None;
    }
    std::str::from_utf8(path).ok()
}

// No early end: the compiler turns this into vector code.
fn has_raw_byte(target: &[u8]) -> bool {
    target.iter().fold(false, |found, byte| found | !(0x21..=0x7e).contains(byte))
}

#[cold]
fn careful(target: &[u8], method: &str, host: Option<&[u8]>, is_strict: bool) -> Result<Path, PathError> {
    if has_raw_byte(target) {
        return Err(PathError::RawByte);
    }
    // ASCII from here on.
    let target = std::str::from_utf8(target).map_err(|_| PathError::RawByte)?;
    if is_strict && is_refused_by_strict(target) {
        return Err(PathError::NotCanonical);
    }
    if target == "*" {
        // A framework may take it for its root: both readings count.
        let path = Path { text: "*".to_owned(), raw: None, bare: Some("/".to_owned()) };
        return if method == "OPTIONS" { Ok(path) } else { Err(PathError::Asterisk) };
    }
    let target = origin_form(target, host)?;
    if !target.starts_with('/') {
        return Err(PathError::NoSlash);
    }
    let decoded = decode(before_query(&target))?.replace('\\', "/");
    let text = merged(&resolved(&decoded));
    if text != resolved(&merged(&decoded)) {
        return Err(PathError::Ambiguous);
    }
    let raw = quoted(&text);
    Ok(Path::new(text, raw))
}

fn before_query(target: &str) -> &str {
    target.split(['?', '#']).next().unwrap_or(target)
}

/// `paths: strict`: what would have to be decoded or resolved to be understood.
fn is_refused_by_strict(target: &str) -> bool {
    let path = before_query(target).to_ascii_lowercase();
    let escapes = ["%2f", "%5c", "%00", "\\"];
    escapes.iter().any(|escape| path.contains(escape))
        || path.split('/').any(|segment| matches!(segment.replace("%2e", ".").as_str(), "." | ".."))
}

/// An absolute target (`http://host/path`) is reduced to its path, if it names our host.
fn origin_form<'a>(target: &'a str, host: Option<&[u8]>) -> Result<Cow<'a, str>, PathError> {
    let Some((scheme, authority, path)) = absolute(target) else { return Ok(Cow::Borrowed(target)) };
    if !(scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https")) || authority.contains('@') {
        return Err(PathError::AbsoluteForm);
    }
    let host = host.and_then(|host| std::str::from_utf8(host).ok()).unwrap_or("");
    let name = without_default_port(authority);
    if name.is_empty() || !name.eq_ignore_ascii_case(without_default_port(host)) {
        return Err(PathError::Authority);
    }
    Ok(if path.starts_with('/') { Cow::Borrowed(path) } else { Cow::Owned(format!("/{path}")) })
}

/// Scheme, authority and the rest of an absolute target; None: it is none.
fn absolute(target: &str) -> Option<(&str, &str, &str)> {
    let is_scheme = |text: &str| {
        text.starts_with(|c: char| c.is_ascii_alphabetic())
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'.' | b'-'))
    };
    let (scheme, rest) = target.split_once("://").filter(|(scheme, _)| is_scheme(scheme))?;
    let (authority, path) = rest.split_at_checked(rest.find(['/', '?', '#']).unwrap_or(rest.len()))?;
    Some((scheme, authority, path))
}

fn without_default_port(authority: &str) -> &str {
    authority.strip_suffix(":80").or_else(|| authority.strip_suffix(":443")).unwrap_or(authority)
}

/// Decode once. A second decoding behind us must not find structure, so what is escaped twice and structural is refused.
fn decode(path: &str) -> Result<String, PathError> {
    let mut decoded = Vec::with_capacity(path.len());
    let mut bytes = path.as_bytes();
    while let Some((&byte, rest)) = bytes.split_first() {
        bytes = rest;
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let [high, low, rest @ ..] = rest else { return Err(PathError::Percent) };
        let (Some(high), Some(low)) = (digit(*high), digit(*low)) else { return Err(PathError::Percent) };
        let byte = high * 16 + low;
        if byte == b'%' && is_structure(rest) {
            return Err(PathError::EscapedTwice);
        }
        if byte < 0x20 || byte == 0x7f {
            return Err(PathError::Control);
        }
        decoded.push(byte);
        bytes = rest;
    }
    String::from_utf8(decoded).map_err(|_| PathError::Utf8)
}

fn digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).and_then(|value| u8::try_from(value).ok())
}

/// The two digits behind an escaped percent sign: `/` `.` `%` `\` or a control byte.
fn is_structure(rest: &[u8]) -> bool {
    match rest {
        [b'2', b'f' | b'F' | b'e' | b'E' | b'5', ..] | [b'5', b'c' | b'C', ..] | [b'7', b'f' | b'F', ..] => true,
        [b'0' | b'1', low, ..] => low.is_ascii_hexdigit(),
        _ => false,
    }
}

/// Dot segments resolved as in RFC 3986 section 5.2.4: it stops at the root, and empty segments count.
fn resolved(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut segments = path.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        match segment {
            "." | ".." => {
                if segment == ".." {
                    kept.pop();
                }
                if segments.peek().is_none() {
                    kept.push("");
                }
            }
            _ => kept.push(segment),
        }
    }
    format!("/{}", kept.join("/"))
}

fn merged(path: &str) -> String {
    let mut result = String::with_capacity(path.len());
    for c in path.chars() {
        if c != '/' || !result.ends_with('/') {
            result.push(c);
        }
    }
    result
}

fn without_params(path: &str) -> String {
    let bare: Vec<&str> = path.split('/').map(|segment| segment.split(';').next().unwrap_or(segment)).collect();
    merged(&resolved(&bare.join("/")))
}

/// Percent-encoded, where a character is neither a slash nor allowed in a segment by RFC 3986; None where nothing is to be done.
fn quoted(path: &str) -> Option<String> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~!$&'()*+,;=:@".contains(&byte);
    if path.bytes().all(is_allowed) {
        return None;
    }
    let mut raw = String::with_capacity(path.len() + 16);
    for byte in path.bytes() {
        if is_allowed(byte) {
            raw.push(char::from(byte));
        } else {
            raw.push_str(&format!("%{byte:02X}"));
        }
    }
    Some(raw)
}

/// Is this the decoded, canonical text of a path, as a rule has to write it? `is_whole` is false for the beginning of a path.
pub fn is_canonical_text(text: &str, is_whole: bool) -> bool {
    let Some(rest) = text.strip_prefix('/') else { return false };
    let segments: Vec<&str> = rest.split('/').collect();
    let last = segments.len() - 1;
    !text.chars().any(|c| c == '\\' || c < ' ' || c == '\u{7f}')
        && segments.iter().enumerate().all(|(place, segment)| {
            if place == last {
                !(is_whole && matches!(*segment, "." | ".."))
            } else {
                !matches!(*segment, "" | "." | "..")
            }
        })
}

#[cfg(test)]
mod tests;
