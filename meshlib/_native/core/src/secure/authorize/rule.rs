//! Does this one rule match this one question?
//!
//! A rule is compiled once: what could never match is refused here, with a sentence about what to write instead, because a denial
//! that never fires is an open door. Patterns compare text; none of them can be made slow by a caller.
use super::{Action, PathPlan, PeerPlan, Question, RulePlan};
use crate::secure::path::is_canonical_text;

#[derive(Debug)]
pub(super) struct Rule {
    pub name: String,
    action: Action,
    pub from: Vec<PeerPattern>,
    methods: Methods,
    pub paths: Vec<PathPattern>,
}

#[derive(Debug)]
pub(super) enum PeerPattern {
    Any,
    Exact(String),
    Prefix(String),
}

#[derive(Debug)]
struct Methods {
    listed: Vec<String>,
    has_head: bool,
}

#[derive(Debug)]
pub(super) enum PathPattern {
    Exact(String),
    Prefix(String),
    Template { text: String, segments: Vec<Segment> },
}

#[derive(Debug)]
pub(super) enum Segment {
    Literal(String),
    Name,
}

impl Rule {
    pub fn compile(plan: &RulePlan) -> Result<Self, Vec<String>> {
        let mut mistakes = Vec::new();
        let from = sorted_out(plan.from.iter().map(PeerPattern::compile), &mut mistakes);
        let paths = sorted_out(plan.paths.iter().map(PathPattern::compile), &mut mistakes);
        for method in plan.methods.iter().filter(|method| !is_method(method)) {
            mistakes.push(format!("the method {method:?} is not one; methods are written in upper case, as GET"));
        }
        // What a framework answers to HEAD is what it answers to GET: a denial of the one covers the other.
        let has = |name: &str| plan.methods.iter().any(|method| method == name);
        let has_head = has("HEAD") || (plan.action == Action::Deny && has("GET"));
        let methods = Methods { listed: plan.methods.clone(), has_head };
        if mistakes.is_empty() {
            Ok(Self { name: plan.name.clone(), action: plan.action, from, methods, paths })
        } else {
            Err(mistakes)
        }
    }

    pub fn matches(&self, question: &Question<'_>) -> bool {
        self.has_method(question) && self.is_from(question) && self.has_path(question)
    }

    pub fn is_from(&self, question: &Question<'_>) -> bool {
        self.from.is_empty() || self.from.iter().any(|pattern| pattern.matches(question.peer))
    }

    pub fn has_method(&self, question: &Question<'_>) -> bool {
        let listed = &self.methods.listed;
        listed.is_empty()
            || listed.iter().any(|method| method == question.method)
            || (self.methods.has_head && question.method == "HEAD")
    }

    pub fn has_path(&self, question: &Question<'_>) -> bool {
        let matches = |pattern: &PathPattern| match self.action {
            Action::Deny => question.path.wide_readings().any(|path| pattern.matches(path)),
            Action::Allow => question.path.readings().all(|path| pattern.matches(path)),
        };
        self.paths.is_empty() || self.paths.iter().any(matches)
    }

    /// `GET, POST on /orders/* to spiffe://…`: a few of each, so that it stays a sentence.
    pub fn scope(&self, preposition: &str) -> String {
        let few = |words: Vec<String>, all: &str| match words.len() {
            0 => all.to_owned(),
            1..=4 => words.join(", "),
            more => format!("{} and {} more", words.get(..3).unwrap_or_default().join(", "), more - 3),
        };
        let methods = few(self.methods.listed.clone(), "every method");
        let paths = few(self.paths.iter().map(PathPattern::words).collect(), "every path");
        let from = few(self.from.iter().map(PeerPattern::words).collect(), "anyone");
        format!("{methods} on {paths} {preposition} {from}")
    }
}

fn sorted_out<T>(results: impl Iterator<Item = Result<T, String>>, mistakes: &mut Vec<String>) -> Vec<T> {
    results.filter_map(|result| result.map_err(|mistake| mistakes.push(mistake)).ok()).collect()
}

/// Upper-case letters, digits, `-` and `_`, beginning with a letter: every method in use. Lower-case ones are different methods
/// that some servers turn into the upper-case ones.
pub fn is_method(text: &str) -> bool {
    let is_tail = |byte: u8| matches!(byte, b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_');
    text.len() <= 32 && matches!(text.as_bytes().first(), Some(b'A'..=b'Z')) && text.bytes().all(is_tail)
}

/// `/package.Service/Method`, letter for letter; never normalised.
pub fn is_grpc_method(text: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let Some((service, method)) = text.strip_prefix('/').and_then(|rest| rest.split_once('/')) else { return false };
    !service.is_empty()
        && !method.is_empty()
        && service.bytes().all(|byte| is_word(byte) || byte == b'.')
        && method.bytes().all(is_word)
}

impl PeerPattern {
    fn compile(plan: &PeerPlan) -> Result<Self, String> {
        match plan {
            PeerPlan::Any => Ok(Self::Any),
            PeerPlan::Exact { value } => match value.strip_prefix("spiffe://") {
                Some(rest) if !rest.is_empty() && !value.contains('*') => Ok(Self::Exact(value.clone())),
                _ => Err(format!("the caller {value:?} is no SPIFFE ID; it begins with spiffe:// and names a trust domain")),
            },
            // A prefix that ends within the trust domain would let in every trust domain that begins alike.
            PeerPlan::Prefix { value } => match value.strip_prefix("spiffe://") {
                Some(rest) if (rest.is_empty() || rest.find('/').is_some_and(|at| at > 0)) && !value.contains('*') => {
                    Ok(Self::Prefix(value.clone()))
                }
                _ => Err(format!(
                    "the callers {value:?}* are no prefix of SPIFFE IDs: name the whole trust domain, as spiffe://shop.internal/*"
                )),
            },
        }
    }

    fn matches(&self, peer: Option<&str>) -> bool {
        match (self, peer) {
            (Self::Any, _) => true,
            (_, None) => false,
            (Self::Exact(value), Some(peer)) => value == peer,
            (Self::Prefix(value), Some(peer)) => peer.starts_with(value),
        }
    }

    fn words(&self) -> String {
        match self {
            Self::Any => "anyone".to_owned(),
            Self::Exact(value) => value.clone(),
            Self::Prefix(value) => format!("{value}*"),
        }
    }
}

impl PathPattern {
    fn compile(plan: &PathPlan) -> Result<Self, String> {
        let (value, is_whole) = match plan {
            PathPlan::Exact { value } | PathPlan::Template { value } => (value, true),
            PathPlan::Prefix { value } => (value, false),
        };
        // "*" as a whole is the target of OPTIONS *; an empty prefix is every path.
        let is_special = value == "*" || (value.is_empty() && !is_whole);
        if !is_special && !is_canonical_text(value, is_whole) {
            return Err(format!(
                "the path {value:?} could never match: paths begin with a slash and have no //, /./, /../, backslash or control character"
            ));
        }
        if has_escape(value) {
            return Err(format!("the path {value:?} could never match: rules are compared with decoded paths; write the character itself"));
        }
        match plan {
            PathPlan::Exact { .. } => Ok(Self::Exact(value.clone())),
            PathPlan::Prefix { .. } => Ok(Self::Prefix(value.clone())),
            PathPlan::Template { .. } => {
                let segments: Result<Vec<_>, _> = value.split('/').map(Segment::compile).collect();
                Ok(Self::Template { text: value.clone(), segments: segments? })
            }
        }
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            Self::Exact(value) => value == path,
            Self::Prefix(value) => path.starts_with(value),
            Self::Template { segments, .. } => {
                let mut found = path.split('/');
                segments.iter().all(|wanted| match (wanted, found.next()) {
                    (Segment::Literal(literal), Some(segment)) => literal == segment,
                    (Segment::Name, Some(segment)) => !segment.is_empty(),
                    (_, None) => false,
                }) && found.next().is_none()
            }
        }
    }

    fn words(&self) -> String {
        match self {
            Self::Exact(text) | Self::Template { text, .. } => text.clone(),
            Self::Prefix(value) => format!("{value}*"),
        }
    }
}

fn has_escape(text: &str) -> bool {
    text.as_bytes().windows(3).any(|w| matches!(w, [b'%', a, b] if a.is_ascii_hexdigit() && b.is_ascii_hexdigit()))
}

impl Segment {
    fn compile(text: &str) -> Result<Self, String> {
        match text.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')) {
            Some(name) if !name.is_empty() && !name.contains(['{', '}']) => Ok(Self::Name),
            None if !text.contains(['{', '}']) => Ok(Self::Literal(text.to_owned())),
            _ => Err(format!("the segment {text:?} of a template is neither text nor one {{name}}")),
        }
    }
}
