//! What does a verified token claim, and since when, until when?
//!
//! Who issued it, for whom, about whom: read once, so that rules compare text with text. The times are kept apart, because a token
//! that is remembered is judged by them anew. A claim that decides something and is of the wrong kind refuses the token; the others
//! are kept as they are, for rules that ask for them.
use serde_json::{Map, Value};

use super::plan::Provider;
use super::{spiffe, TokenFault};

#[derive(Debug)]
pub struct Claims {
    issuer: String,
    subject: String,
    principal: String,
    audiences: Vec<String>,
    presenter: String,
    members: Map<String, Value>,
    text: String,
    provider: usize,
    times: Times,
    size: usize,
}

/// Seconds since 1970, all of them finite: JSON knows no other numbers.
#[derive(Debug, Clone, Copy)]
struct Times {
    expires: f64,
    not_before: Option<f64>,
    issued: Option<f64>,
}

impl Claims {
    /// For a SPIFFE token its trust domain, whatever it claims to be issued by.
    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// "" if it names none.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// `iss/sub`; "" without a subject.
    pub fn principal(&self) -> &str {
        &self.principal
    }

    pub fn audiences(&self) -> &[String] {
        &self.audiences
    }

    /// The client that it was issued to (`azp`); "" if it doesn't say.
    pub fn presenter(&self) -> &str {
        &self.presenter
    }

    /// A claim, or one within a claim.
    pub fn claim(&self, names: &[&str]) -> Option<&Value> {
        let (first, inner) = names.split_first()?;
        inner.iter().try_fold(self.members.get(*first)?, |value, name| value.as_object()?.get(*name))
    }

    /// Seconds since 1970.
    pub fn expires(&self) -> u64 {
        self.times.expires as u64
    }

    /// All claims, as JSON.
    pub fn json(&self) -> &str {
        &self.text
    }

    /// The number of its provider, in the order of the plan.
    pub fn provider(&self) -> usize {
        self.provider
    }

    /// Claims that somebody has verified: this only reads them, by the rules of this provider.
    pub(super) fn read(
        mut members: Map<String, Value>,
        payload: Vec<u8>,
        provider: &Provider,
    ) -> Result<Self, TokenFault> {
        let mut payload = String::from_utf8(payload).map_err(|_| TokenFault::Malformed("it is not UTF-8"))?;
        if provider.is_svid {
            // The trust domain's keys may vouch for its own members only, so what else the token says of its origin is nothing.
            members.insert("iss".to_owned(), provider.issuer.as_str().into());
            payload = Value::Object(members.clone()).to_string();
        }
        let subject = text(&members, "sub", TokenFault::Claim("\"sub\" is not text"))?;
        if provider.is_svid && !spiffe::is_member(subject, &provider.issuer) {
            return Err(TokenFault::Claim("\"sub\" is no SPIFFE ID of its trust domain"));
        }
        let audiences = audiences(&members)?;
        if !audiences.iter().any(|audience| provider.audiences.contains(audience)) {
            return Err(TokenFault::Audience);
        }
        let times = Times {
            expires: seconds(&members, "exp", "\"exp\" is not a number")?
                .ok_or(TokenFault::Claim("\"exp\" is missing"))?,
            not_before: seconds(&members, "nbf", "\"nbf\" is not a number")?,
            issued: seconds(&members, "iat", "\"iat\" is not a number")?,
        };
        let texts = audiences.iter().map(|audience| ITEM + audience.len()).sum::<usize>() + 2 * subject.len();
        let size = payload.len() + texts + members_size(&members);
        Ok(Self {
            size,
            issuer: provider.issuer.clone(),
            principal: if subject.is_empty() { String::new() } else { format!("{}/{subject}", provider.issuer) },
            subject: subject.to_owned(),
            audiences,
            presenter: members.get("azp").and_then(Value::as_str).unwrap_or_default().to_owned(),
            members,
            text: payload,
            provider: provider.number,
            times,
        })
    }

    /// Is it valid at this time, and no longer than it may be? Comparisons are such that a time that is no number refuses.
    pub(super) fn judge(&self, wall: f64, provider: &Provider) -> Result<(), TokenFault> {
        let Times { expires, not_before, issued } = self.times;
        let (leeway, longest) = (provider.leeway, provider.longest);
        let is_alive = wall < expires + leeway;
        if !is_alive {
            return Err(TokenFault::Expired);
        }
        let has_begun = |begin: Option<f64>| begin.is_none_or(|begin| begin <= wall + leeway);
        if !has_begun(not_before) || !has_begun(issued) {
            return Err(TokenFault::NotYet);
        }
        let is_short = expires <= issued.unwrap_or(wall) + longest + leeway;
        if !is_short {
            return Err(TokenFault::TooLong);
        }
        Ok(())
    }

    /// What keeping it costs in memory, rather too much than too little.
    pub(super) fn size(&self) -> usize {
        self.size
    }
}

/// Of a value, or a text by itself: its place in a list that has grown, and what is allocated around it.
const ITEM: usize = 64;
/// Of a first member, and of every sixth after it: a node of the tree that an object is.
const NODE: usize = 640;

/// A text of `[[[0],[0],…` or of objects with one member takes a hundred times its length in memory.
fn size_of(value: &Value) -> usize {
    match value {
        Value::String(text) => ITEM + text.len(),
        Value::Array(list) => 3 * ITEM + list.iter().map(size_of).sum::<usize>(),
        Value::Object(members) => ITEM + members_size(members),
        _ => ITEM,
    }
}

fn members_size(members: &Map<String, Value>) -> usize {
    let nodes = members.len().div_ceil(6) * NODE;
    nodes + members.iter().map(|(name, value)| name.len() + ITEM / 2 + size_of(value)).sum::<usize>()
}

fn audiences(members: &Map<String, Value>) -> Result<Vec<String>, TokenFault> {
    let bad = TokenFault::Claim("\"aud\" is neither text nor a list of text");
    match members.get("aud") {
        None => Err(TokenFault::Claim("\"aud\" is missing")),
        Some(Value::String(one)) => Ok(vec![one.clone()]),
        Some(Value::Array(list)) => {
            list.iter().map(|one| one.as_str().map(str::to_owned)).collect::<Option<_>>().ok_or(bad)
        }
        Some(_) => Err(bad),
    }
}

fn text<'a>(members: &'a Map<String, Value>, name: &str, otherwise: TokenFault) -> Result<&'a str, TokenFault> {
    match members.get(name) {
        None => Ok(""),
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(otherwise),
    }
}

fn seconds(members: &Map<String, Value>, name: &str, otherwise: &'static str) -> Result<Option<f64>, TokenFault> {
    match members.get(name) {
        None => Ok(None),
        Some(Value::Number(number)) => number.as_f64().map(Some).ok_or(TokenFault::Claim(otherwise)),
        Some(_) => Err(TokenFault::Claim(otherwise)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn claims_are_measured_in_memory_and_not_in_text() {
        // Each entry is a few bytes of text; in memory a node of a tree (632 bytes), a list of four places, a text of its own.
        for (entry, least) in [(r#"{"a":1}"#, 632 + 32), ("[0]", 4 * 32 + 32), (r#""a""#, 32 + 16)] {
            let text = format!(r#"{{"roles":[{}]}}"#, vec![entry; 1_000].join(","));
            let Value::Object(members) = serde_json::from_str(&text).unwrap() else { unreachable!() };
            assert!(members_size(&members) >= 1_000 * least, "{entry} {}", members_size(&members));
        }
        // What is usual stays small, so that as many tokens as there are places for are remembered.
        let usual =
            r#"{"iss":"https://issuer","sub":"ada","aud":"orders","exp":1060,"iat":1000,"jti":"1","scope":"read"}"#;
        let Value::Object(members) = serde_json::from_str(usual).unwrap() else { unreachable!() };
        assert!(members_size(&members) < 4 << 10, "{}", members_size(&members));
    }
}
