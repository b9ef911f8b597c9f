//! Does this text match what a rule wrote?
//!
//! Patterns are compiled once, and what could never match is refused there, with a sentence about what to write instead: a denial
//! that never fires is an open door. A dot is a dot and a star is a star except where a plan says otherwise, and nothing a caller
//! sends can make a pattern slow: expressions run in time linear in the text.
//!
//! Expressions are those of RE2 as Istio takes them: of the whole path, `\d \w \s \b` in ASCII, `.` any character but a line break.
//! Rust's own classes would take other scripts' digits too; so the short words are written out before compiling. Names of Unicode's
//! classes (`\p{…}`) are a mistake. Where case doesn't count an expression folds for itself, letter by letter, so that it is asked
//! about the path as it is: in a folded one there is no `ß` left for it to find. Denials look at the folded one as well.
use std::borrow::Cow;

use regex::{Regex, RegexBuilder};

use super::plan::{PathPlan, PeerPlan, TextPlan};
use super::View;
use crate::secure::path::is_canonical_text;

/// A longer expression is a program, not a rule.
const LONGEST_PATTERN: usize = 1024;
const LARGEST_PROGRAM: usize = 1 << 20;
/// The gate lets no longer target in. What is longer was never judged by an expression.
const LONGEST_TEXT: usize = 8192;
const SCHEME: &str = "spiffe://";

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerPattern {
    /// Also without an identity.
    Any,
    Exact(Box<str>),
    Prefix(Box<str>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum TextPattern {
    Any,
    Exact(Box<str>),
    Prefix(Box<str>),
    Suffix(Box<str>),
}

#[derive(Debug)]
pub(super) enum PathPattern {
    Exact(Box<str>),
    Prefix(Box<str>),
    Suffix(Box<str>),
    Template { text: Box<str>, segments: Vec<Segment> },
    Regex { text: Box<str>, regex: Box<Regex> },
}

#[derive(Debug)]
pub(super) enum Segment {
    Literal(Box<str>),
    One,
    Rest,
}

impl PeerPattern {
    pub fn compile(plan: &PeerPlan) -> Result<Self, String> {
        match plan {
            PeerPlan::Any => Ok(Self::Any),
            PeerPlan::Exact { value } if is_spiffe_id(value) => Ok(Self::Exact(value.as_str().into())),
            PeerPlan::Exact { value } => Err(format!(
                "the caller {value:?} is no SPIFFE ID of a workload; write the whole of it, as spiffe://shop.internal/ns/default/sa/orders"
            )),
            // A prefix that ends within the trust domain would let in every trust domain that begins alike.
            PeerPlan::Prefix { value } if value == SCHEME || is_spiffe_prefix(value) => {
                Ok(Self::Prefix(value.as_str().into()))
            }
            PeerPlan::Prefix { value } => Err(format!(
                "the callers {value:?}* are no prefix of SPIFFE IDs: name the whole trust domain, as spiffe://shop.internal/*"
            )),
        }
    }

    pub fn matches(&self, peer: Option<&str>) -> bool {
        match (self, peer) {
            (Self::Any, _) => true,
            (_, None) => false,
            (Self::Exact(value), Some(peer)) => &**value == peer,
            (Self::Prefix(value), Some(peer)) => peer.starts_with(&**value),
        }
    }

    /// Everyone, or everyone who has any identity.
    pub fn is_everybody(&self) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(_) => false,
            Self::Prefix(value) => &**value == SCHEME,
        }
    }

    pub(super) fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Any, _) => true,
            (Self::Prefix(value), Self::Exact(other) | Self::Prefix(other)) => other.starts_with(&**value),
            _ => self == other,
        }
    }

    pub(super) fn words(&self) -> String {
        match self {
            Self::Any => "anyone".to_owned(),
            Self::Exact(value) => value.to_string(),
            Self::Prefix(value) => format!("{value}*"),
        }
    }
}

fn is_spiffe_id(text: &str) -> bool {
    is_spiffe_prefix(text)
        && text
            .strip_prefix(SCHEME)
            .is_some_and(|rest| rest.split('/').skip(1).all(|segment| !matches!(segment, "" | "." | "..")))
}

/// With a whole trust domain; of the path only the last segment may be half a one.
fn is_spiffe_prefix(text: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    let is_domain = |byte: u8| is_word(byte) && !byte.is_ascii_uppercase();
    let Some((domain, path)) = text.strip_prefix(SCHEME).and_then(|rest| rest.split_once('/')) else { return false };
    let mut segments = path.rsplit('/');
    !domain.is_empty()
        && domain.bytes().all(is_domain)
        && path.bytes().all(|byte| is_word(byte) || byte == b'/')
        && segments.next().is_some()
        && segments.all(|segment| !matches!(segment, "" | "." | ".."))
}

impl TextPattern {
    pub fn compile(plan: &TextPlan) -> Result<Self, String> {
        let (TextPlan::Exact { value } | TextPlan::Prefix { value } | TextPlan::Suffix { value }) = plan else {
            return Ok(Self::Any);
        };
        if value.is_empty() {
            return Err("the text \"\" is never there; write \"*\" for anything that is present".to_owned());
        }
        if value.chars().any(|c| c < ' ' || c == '\u{7f}') {
            return Err(format!("the text {value:?} has a control character, and could never match"));
        }
        let value = value.as_str().into();
        Ok(match plan {
            TextPlan::Prefix { .. } => Self::Prefix(value),
            TextPlan::Suffix { .. } => Self::Suffix(value),
            _ => Self::Exact(value),
        })
    }

    /// A host, in lower case, without port and trailing dot.
    pub fn compile_host(plan: &TextPlan) -> Result<Self, String> {
        let folded = match plan {
            TextPlan::Any => TextPlan::Any,
            TextPlan::Exact { value } => TextPlan::Exact { value: value.to_ascii_lowercase() },
            TextPlan::Prefix { value } => TextPlan::Prefix { value: value.to_ascii_lowercase() },
            TextPlan::Suffix { value } => TextPlan::Suffix { value: value.to_ascii_lowercase() },
        };
        let pattern = Self::compile(&folded)?;
        let is_sound = match &pattern {
            Self::Any => true,
            Self::Exact(value) => host_of(value) == Some(value),
            Self::Prefix(value) | Self::Suffix(value) => {
                value.bytes().all(is_host_byte) && !value.contains("..") && (value.len() > 1 || &**value != ".")
            }
        } && !matches!(&pattern, Self::Prefix(value) if value.starts_with('.'))
            && !matches!(&pattern, Self::Suffix(value) if value.ends_with('.'));
        if is_sound {
            Ok(pattern)
        } else {
            Err(format!(
                "the host {:?} could never match: hosts are compared without port and trailing dot, and in ASCII (xn--…); ports have \
                 a clause of their own",
                pattern.text()
            ))
        }
    }

    pub fn matches(&self, text: &[u8]) -> bool {
        match self {
            Self::Any => !text.is_empty(),
            Self::Exact(value) => value.as_bytes() == text,
            Self::Prefix(value) => text.starts_with(value.as_bytes()),
            Self::Suffix(value) => text.ends_with(value.as_bytes()),
        }
    }

    /// The pattern is in lower case; is the text, but for case?
    pub fn matches_folded(&self, text: &[u8]) -> bool {
        match self {
            Self::Any => !text.is_empty(),
            Self::Exact(value) => text.eq_ignore_ascii_case(value.as_bytes()),
            Self::Prefix(value) => {
                text.get(..value.len()).is_some_and(|start| start.eq_ignore_ascii_case(value.as_bytes()))
            }
            Self::Suffix(value) => {
                let start = text.len().checked_sub(value.len());
                start.and_then(|at| text.get(at..)).is_some_and(|end| end.eq_ignore_ascii_case(value.as_bytes()))
            }
        }
    }

    pub fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Any, _) => true,
            (Self::Prefix(value), Self::Exact(other) | Self::Prefix(other)) => other.starts_with(&**value),
            (Self::Suffix(value), Self::Exact(other) | Self::Suffix(other)) => other.ends_with(&**value),
            _ => self == other,
        }
    }

    pub fn text(&self) -> &str {
        match self {
            Self::Any => "",
            Self::Exact(value) | Self::Prefix(value) | Self::Suffix(value) => value,
        }
    }
}

fn is_host_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b'[' | b']' | b':')
}

/// The host of an authority as it was sent, without port and trailing dot. None: two readers could find two hosts in it.
pub(super) fn host_of(authority: &str) -> Option<&str> {
    let is_port = |text: &str| text.len() <= 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    if let Some((address, rest)) = authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        let is_address = address.contains(':')
            && address.bytes().all(|byte| byte.is_ascii_hexdigit() || matches!(byte, b':' | b'.'));
        let is_sound = is_address && (rest.is_empty() || rest.strip_prefix(':').is_some_and(is_port));
        return if is_sound { authority.get(..address.len() + 2) } else { None };
    }
    let host = match authority.split_once(':') {
        Some((host, port)) if is_port(port) => host,
        Some(_) => return None,
        None => authority,
    };
    let host = host.strip_suffix('.').unwrap_or(host);
    let is_label = |label: &str| {
        !label.is_empty() && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    host.split('.').all(is_label).then_some(host)
}

impl PathPattern {
    pub fn compile(plan: &PathPlan, is_folded: bool) -> Result<Self, String> {
        let kept = |value: &str| -> Box<str> {
            if is_folded {
                folded(value).into()
            } else {
                value.into()
            }
        };
        match plan {
            PathPlan::Regex { value } => {
                return Ok(Self::Regex { text: value.as_str().into(), regex: Box::new(expression(value, is_folded)?) })
            }
            PathPlan::Exact { value } | PathPlan::Template { value } => check_path(value, value, true, value == "*")?,
            // An empty prefix is every path.
            PathPlan::Prefix { value } => check_path(value, value, false, value == "*" || value.is_empty())?,
            PathPlan::Suffix { value } => check_path(value, &format!("/x{value}"), true, value.is_empty())?,
        }
        Ok(match plan {
            PathPlan::Prefix { value } => Self::Prefix(kept(value)),
            PathPlan::Suffix { value } => Self::Suffix(kept(value)),
            PathPlan::Template { value } => {
                let segments = value.split('/').map(|segment| Segment::compile(segment, is_folded));
                let segments = segments.collect::<Result<Vec<_>, _>>()?;
                if segments.iter().skip_while(|segment| !matches!(segment, Segment::Rest)).skip(1).any(Segment::is_open)
                {
                    return Err(format!("the template {value:?} has a name behind {{**}}; behind it stands only text"));
                }
                Self::Template { text: value.as_str().into(), segments }
            }
            PathPlan::Exact { value } | PathPlan::Regex { value } => Self::Exact(kept(value)),
        })
    }

    pub fn matches(&self, path: &str, view: View) -> bool {
        match self {
            Self::Exact(value) => &**value == path,
            Self::Prefix(value) => path.starts_with(&**value),
            Self::Suffix(value) => path.ends_with(&**value),
            Self::Template { segments, .. } => fits(segments, path),
            Self::Regex { regex, .. } if path.len() <= LONGEST_TEXT => regex.is_match(path),
            Self::Regex { .. } => view == View::Possibly,
        }
    }

    /// Of a rule for which case doesn't count: this path, and the same folded.
    pub fn matches_either(&self, path: &str, folded: &str, view: View) -> bool {
        match self {
            Self::Regex { .. } => {
                self.matches(path, view) || (view == View::Possibly && path != folded && self.matches(folded, view))
            }
            _ => self.matches(folded, view),
        }
    }

    pub fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Prefix(value), _) if value.is_empty() => true,
            (Self::Prefix(value), Self::Exact(other) | Self::Prefix(other)) => other.starts_with(&**value),
            (Self::Suffix(value), Self::Exact(other) | Self::Suffix(other)) => other.ends_with(&**value),
            (Self::Exact(value), Self::Exact(other)) => value == other,
            (Self::Template { text, .. }, Self::Template { text: other, .. })
            | (Self::Regex { text, .. }, Self::Regex { text: other, .. }) => text == other,
            _ => false,
        }
    }

    pub fn words(&self) -> String {
        match self {
            Self::Exact(text) | Self::Template { text, .. } => text.to_string(),
            Self::Prefix(value) => format!("{value}*"),
            Self::Suffix(value) => format!("*{value}"),
            Self::Regex { text, .. } => format!("({text})"),
        }
    }
}

/// `path` is `value` as part of a whole path. "*" as a whole is the target of OPTIONS *.
fn check_path(value: &str, path: &str, is_whole: bool, is_special: bool) -> Result<(), String> {
    if !is_special && !is_canonical_text(path, is_whole) {
        return Err(format!(
            "the path {value:?} could never match: paths begin with a slash and have no //, /./, /../, backslash or control character"
        ));
    }
    if has_escape(value) {
        return Err(format!(
            "the path {value:?} could never match: rules are compared with decoded paths; write the character itself"
        ));
    }
    Ok(())
}

fn has_escape(text: &str) -> bool {
    text.as_bytes().windows(3).any(|w| matches!(w, [b'%', a, b] if a.is_ascii_hexdigit() && b.is_ascii_hexdigit()))
}

impl Segment {
    fn compile(text: &str, is_folded: bool) -> Result<Self, String> {
        match text.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')) {
            Some("**") => Ok(Self::Rest),
            Some("*") => Ok(Self::One),
            Some(name) if !name.is_empty() && !name.contains(['{', '}', '*']) => Ok(Self::One),
            None if !text.contains(['{', '}', '*']) => {
                Ok(Self::Literal(if is_folded { folded(text).into() } else { text.into() }))
            }
            _ => {
                Err(format!("the segment {text:?} of a template is neither text nor one of {{name}}, {{*}} and {{**}}"))
            }
        }
    }

    fn is_open(&self) -> bool {
        !matches!(self, Self::Literal(_))
    }

    fn matches(&self, segment: &str) -> bool {
        match self {
            Self::Literal(literal) => &**literal == segment,
            Self::One => !segment.is_empty(),
            Self::Rest => true,
        }
    }
}

fn fits(segments: &[Segment], path: &str) -> bool {
    let mut found = path.split('/');
    let mut wanted = segments.iter();
    while let Some(segment) = wanted.next() {
        match (segment, found.next()) {
            (_, None) => return false,
            // One segment at least is its own; as many as stand behind it in the template are not.
            (Segment::Rest, Some(_)) => {
                let mut from_the_end = found.rev();
                return wanted.rev().all(|last| from_the_end.next().is_some_and(|text| last.matches(text)));
            }
            (segment, Some(text)) if segment.matches(text) => {}
            _ => return false,
        }
    }
    found.next().is_none()
}

/// Case apart, in all of Unicode: as Python's `casefold`. The dotless i is a letter of its own.
pub(super) fn folded(text: &str) -> String {
    if text.is_ascii() {
        return text.to_ascii_lowercase();
    }
    let alike = |c: char| {
        let is_own = c == '\u{131}';
        let upper = c.to_lowercase().flat_map(char::to_uppercase).flat_map(char::to_lowercase).filter(move |_| !is_own);
        is_own.then_some(c).into_iter().chain(upper)
    };
    let mut made = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_ascii() {
            made.push(c.to_ascii_lowercase());
        } else {
            made.extend(alike(c));
        }
    }
    made
}

fn expression(pattern: &str, is_folded: bool) -> Result<Regex, String> {
    if pattern.chars().count() > LONGEST_PATTERN {
        return Err(format!(
            "an expression of more than {LONGEST_PATTERN} characters is a program; make several rules of it"
        ));
    }
    if has_escape(pattern) {
        return Err(format!(
            "the expression {pattern:?} could never match: rules are compared with decoded paths; write the character itself"
        ));
    }
    if begins_with_text(pattern) {
        return Err(format!("the expression {pattern:?} could never match: it is compared with the whole path, which begins with a slash"));
    }
    let plain = in_ascii(pattern);
    let compiled = |text: &str| {
        RegexBuilder::new(text)
            .case_insensitive(is_folded)
            .size_limit(LARGEST_PROGRAM)
            .dfa_size_limit(LARGEST_PROGRAM)
            .build()
    };
    // By itself first: a bracket too many would end the group, and with it the anchors.
    compiled(&plain).and_then(|_| compiled(&format!(r"\A(?:{plain})\z"))).map_err(|error| {
        let last = error.to_string();
        let reason = last.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it can't be read").trim();
        format!("the expression {pattern:?} can't be used: {}", reason.trim_start_matches("error: "))
    })
}

/// `orders/.*`: a letter that has to be there, where every path has its slash.
fn begins_with_text(pattern: &str) -> bool {
    let mut chars = pattern.trim_start_matches('^').chars();
    let is_letter = chars.next().is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
    is_letter && !pattern.contains('|') && !chars.next().is_some_and(|c| matches!(c, '?' | '*' | '{'))
}

/// Perl's short words, written out: in Rust they would mean all of Unicode. They may stand in a class as well.
fn in_ascii(pattern: &str) -> Cow<'_, str> {
    if !pattern.contains('\\') {
        return Cow::Borrowed(pattern);
    }
    let mut made = String::with_capacity(pattern.len() + 32);
    let mut chars = pattern.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            made.push(c);
            continue;
        }
        match chars.next() {
            Some('d') => made.push_str("[0-9]"),
            Some('D') => made.push_str("[^0-9]"),
            Some('w') => made.push_str("[0-9A-Za-z_]"),
            Some('W') => made.push_str("[^0-9A-Za-z_]"),
            Some('s') => made.push_str(r"[\t\n\f\r ]"),
            Some('S') => made.push_str(r"[^\t\n\f\r ]"),
            Some('b') => made.push_str(r"(?-u:\b)"),
            Some(other) => made.extend(['\\', other]),
            None => made.push('\\'),
        }
    }
    Cow::Owned(made)
}
