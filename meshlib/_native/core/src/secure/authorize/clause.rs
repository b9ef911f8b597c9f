//! Does this one clause hold for this one question?
//!
//! Not everything about a call is known, and some of it can be read in two ways. So a clause is seen in one of two ways. What is
//! *surely* so is so in every reading, and known; what is *possibly* so is so in one, or isn't known. Permissions need what is
//! surely so; denials and custom rules take what is possibly so. A negated clause turns the view around: it is possibly not there if it is not surely
//! there.
//!
//! What is absent is not unknown: a header that wasn't sent has none of the values. But neither does its absence prove anything, so
//! that a negated clause about it holds for denials only. Unknown, and in doubt for everyone: addresses and our port where the driver
//! doesn't tell them, the server's name (SNI), a Host that has two readings, claims that are no text, truth, number or list of such.
use core::net::IpAddr;

use serde_json::Value;

use super::asked::{Asked, Header};
use super::pattern::{PathPattern, PeerPattern, TextPattern};
use super::Question;
use crate::secure::address::Cidr;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum View {
    Surely,
    Possibly,
}

#[derive(Debug)]
pub(super) struct Clause {
    /// As it is called in the configuration: `not_from`, or the key of a condition.
    pub key: Box<str>,
    /// Among the clauses as they were written.
    pub place: usize,
    pub is_negative: bool,
    pub is_condition: bool,
    pub test: Test,
}

#[derive(Debug)]
pub(super) enum Test {
    Peers(Vec<PeerPattern>),
    Namespaces(Vec<TextPattern>),
    TokenPrincipals(Vec<TextPattern>),
    Audiences(Vec<TextPattern>),
    Presenters(Vec<TextPattern>),
    Claim { names: Vec<Box<str>>, patterns: Vec<TextPattern> },
    Sources(Vec<Cidr>),
    Remotes(Vec<Cidr>),
    Methods(Vec<Box<str>>),
    Paths { patterns: Vec<PathPattern>, is_folded: bool },
    Hosts(Vec<TextPattern>),
    Ports(Vec<u16>),
    Header { name: Box<str>, patterns: Vec<TextPattern> },
    Snis(Vec<TextPattern>),
}

impl Clause {
    pub fn holds(&self, question: &Asked<'_>, view: View) -> bool {
        match (self.is_negative, view) {
            (false, _) => self.test.matches(question, view),
            (true, View::Surely) => self.test.is_present(question) && !self.test.matches(question, View::Possibly),
            (true, View::Possibly) => !self.test.matches(question, View::Surely),
        }
    }

    /// Would another token change it?
    pub fn asks_token(&self) -> bool {
        matches!(self.test, Test::TokenPrincipals(_) | Test::Audiences(_) | Test::Presenters(_) | Test::Claim { .. })
    }
}

impl Test {
    pub fn matches(&self, question: &Asked<'_>, view: View) -> bool {
        match self {
            Self::Peers(patterns) => patterns.iter().any(|pattern| pattern.matches(question.peer)),
            Self::Namespaces(patterns) => {
                let is_one = |namespace: &str| patterns.iter().any(|pattern| pattern.matches(namespace.as_bytes()));
                match view {
                    View::Surely => question.peer.and_then(namespace).is_some_and(is_one),
                    View::Possibly => question.peer.is_some_and(|peer| namespaces(peer).any(is_one)),
                }
            }
            Self::TokenPrincipals(patterns) => principal(question).is_some_and(|found| is_any(patterns, found)),
            Self::Audiences(patterns) => question.claims.is_some_and(|claims| {
                claims.audiences().iter().any(|audience| {
                    let audience: &str = audience.as_ref();
                    is_any(patterns, audience)
                })
            }),
            Self::Presenters(patterns) => question.claims.is_some_and(|claims| is_any(patterns, claims.presenter())),
            Self::Claim { names, patterns } => {
                claim(question, names).is_some_and(|value| claims(value, is_list_of_words(names), patterns, view))
            }
            Self::Sources(networks) => is_in(networks, question.source, view),
            Self::Remotes(networks) => is_in(networks, question.remote, view),
            // What a framework answers to HEAD is what it answers to GET.
            Self::Methods(methods) => methods.iter().any(|method| {
                **method == *question.method
                    || (view == View::Possibly && **method == *"GET" && question.method == "HEAD")
            }),
            Self::Paths { patterns, is_folded } => paths(question, patterns, *is_folded, view),
            Self::Hosts(patterns) => match question.known_host() {
                Some(host) => patterns.iter().any(|pattern| pattern.matches_folded(host.as_bytes())),
                None => view == View::Possibly,
            },
            Self::Ports(ports) => match question.port {
                0 => view == View::Possibly,
                port => ports.contains(&port),
            },
            Self::Header { name, patterns } => question.header(name).is_some_and(|found| header(found, patterns, view)),
            Self::Snis(patterns) => match question.sni {
                "" => view == View::Possibly,
                sni => {
                    let name = sni.strip_suffix('.').unwrap_or(sni);
                    patterns.iter().any(|pattern| pattern.matches_folded(name.as_bytes()))
                }
            },
        }
    }

    /// Is there anything to be matched? What is unknown matches possibly, and needs no word here.
    pub fn is_present(&self, question: &Asked<'_>) -> bool {
        match self {
            Self::Peers(_) => question.peer.is_some(),
            Self::Namespaces(_) => question.peer.and_then(namespace).is_some(),
            Self::TokenPrincipals(_) => principal(question).is_some(),
            Self::Audiences(_) => question.claims.is_some_and(|claims| !claims.audiences().is_empty()),
            Self::Presenters(_) => question.claims.is_some_and(|claims| !claims.presenter().is_empty()),
            Self::Claim { names, .. } => claim(question, names).is_some(),
            Self::Header { name, .. } => {
                question.header(name).and_then(|header| header.lone).is_some_and(|value| !value.is_empty())
            }
            _ => true,
        }
    }
}

fn is_any(patterns: &[TextPattern], text: &str) -> bool {
    patterns.iter().any(|pattern| pattern.matches(text.as_bytes()))
}

fn is_in(networks: &[Cidr], address: Option<IpAddr>, view: View) -> bool {
    match address {
        Some(address) => networks.iter().any(|network| network.contains(address)),
        None => view == View::Possibly,
    }
}

/// The namespace of `spiffe://domain/ns/<namespace>/…`.
pub(super) fn namespace(peer: &str) -> Option<&str> {
    let (_, path) = peer.strip_prefix("spiffe://")?.split_once('/')?;
    let (namespace, rest) = path.strip_prefix("ns/")?.split_once('/')?;
    (!namespace.is_empty() && !rest.is_empty()).then_some(namespace)
}

/// Wherever a reader could see one.
pub(super) fn namespaces(peer: &str) -> impl Iterator<Item = &str> {
    // Not "/ns/": of `/ns/ns/a` it would see the first only.
    let is_segment = |at: usize| at.checked_sub(1).and_then(|before| peer.as_bytes().get(before)) == Some(&b'/');
    let after = peer.match_indices("ns/").filter(move |(at, _)| is_segment(*at));
    after.filter_map(|(at, word)| peer.get(at + word.len()..)?.split('/').next())
}

fn principal<'a>(question: &Question<'a>) -> Option<&'a str> {
    let claims = question.claims?;
    (!claims.issuer().is_empty() && !claims.subject().is_empty()).then(|| claims.principal())
}

/// As deep as a condition may reach into the claims.
pub(super) const DEEPEST: usize = 8;

/// The value, if it is there and not empty.
fn claim<'a>(question: &Question<'a>, names: &[Box<str>]) -> Option<&'a Value> {
    let mut way = [""; DEEPEST];
    way.iter_mut().zip(names).for_each(|(place, name)| *place = name);
    let value = question.claims?.claim(way.get(..names.len())?)?;
    let is_empty = match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    };
    (!is_empty).then_some(value)
}

/// These two are lists of words although they are text.
fn is_list_of_words(names: &[Box<str>]) -> bool {
    matches!(names, [name] if matches!(&**name, "scope" | "permission"))
}

fn claims(value: &Value, is_list: bool, patterns: &[TextPattern], view: View) -> bool {
    match value {
        Value::String(text) => {
            is_any(patterns, text) || (is_list && text.split(' ').any(|word| is_any(patterns, word)))
        }
        Value::Bool(value) => is_any(patterns, if *value { "true" } else { "false" }),
        Value::Number(number) if !number.is_f64() => is_any(patterns, &number.to_string()),
        // One level: a list in a list is no claim that Istio knows.
        Value::Array(list) => list.iter().any(|item| match item {
            Value::Array(_) => view == View::Possibly,
            item => claims(item, false, patterns, view),
        }),
        _ => view == View::Possibly,
    }
}

fn paths(question: &Asked<'_>, patterns: &[PathPattern], is_folded: bool, view: View) -> bool {
    let path = question.path;
    if is_folded {
        // Folding leaves slashes and semicolons alone, so that the readings are the same ones.
        let folded = question.folded_path();
        let is_one = |pattern: &PathPattern, (path, folded): (&str, &str)| pattern.matches_either(path, folded, view);
        let both = || path.readings().zip(folded.readings());
        let wide = || path.wide_readings().zip(folded.wide_readings());
        return match view {
            View::Surely => patterns.iter().any(|pattern| both().all(|pair| is_one(pattern, pair))),
            View::Possibly => patterns.iter().any(|pattern| wide().any(|pair| is_one(pattern, pair))),
        };
    }
    match view {
        View::Surely => patterns.iter().any(|pattern| path.readings().all(|path| pattern.matches(path, view))),
        View::Possibly => patterns.iter().any(|pattern| path.wide_readings().any(|path| pattern.matches(path, view))),
    }
}

/// Two fields, or one with a comma, may be one value to the one and two to the other.
fn header(found: Header<'_>, patterns: &[TextPattern], view: View) -> bool {
    let Header { lone, others, is_too_long } = found;
    let is_one = |value: &[u8]| patterns.iter().any(|pattern| pattern.matches(value));
    match view {
        View::Surely => lone.is_some_and(|value| {
            // Who wrote commas has meant a list of so many; any other pattern is about each of them.
            let is_all_of = |pattern: &TextPattern| {
                let parts = pattern.text().bytes().filter(|byte| *byte == b',').count() + 1;
                others.len() == parts || others.iter().all(|part| is_one(part))
            };
            patterns.iter().any(|pattern| {
                pattern.matches(value) && (*pattern == TextPattern::Any || (!is_too_long && is_all_of(pattern)))
            })
        }),
        View::Possibly => {
            is_too_long
                || lone.is_some_and(is_one)
                || others.iter().any(|value| is_one(value))
                // It is there, if only as an empty field.
                || patterns.contains(&TextPattern::Any)
        }
    }
}
