//! Which of the published keys may judge a token?
//!
//! A key set is what somebody else serves, so each key is asked for everything that it says of itself: kind, use, operations,
//! algorithm, curve and size. One that isn't plainly a public key for signatures is left out with the reason, and the others stay;
//! a set that can be read in two ways is refused whole. Two keys of one name are both left out: which of them was meant would be for
//! each reader to choose. A key that is published with its private part is anybody's.
//!
//! Where a token names no key, one key must fit, and not two. The set doesn't know whose it is, nor how old.
use serde_json::{Map, Value};

use super::compact::decoded;
use super::json;
use super::rsa;
use super::TokenFault;
use crate::secure::crypto::{sha256, Algorithm, Curve, PublicKey};

/// Bytes of a whole set.
pub const LARGEST: usize = 512 * 1024;
/// Keys of a set: far more than anybody turns over, and few enough to check.
const MOST: usize = 256;

/// The usable keys of a provider. Empty is fine: then nothing of the provider's is accepted.
#[derive(Debug)]
pub struct KeySet {
    keys: Vec<Key>,
    digest: [u8; 32],
}

#[derive(Debug)]
struct Key {
    name: Option<String>,
    purpose: Purpose,
    algorithm: Option<Algorithm>,
    key: PublicKey,
}

/// What a token needs a key for: SPIFFE marks the keys of its tokens, and they are for nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    Jwt,
    JwtSvid,
}

impl KeySet {
    /// The set, and what was left out of it and why.
    pub fn parse(document: &[u8]) -> Result<(Self, Vec<String>), String> {
        if document.len() > LARGEST {
            return Err(format!("the key set is larger than {} KiB", LARGEST / 1024));
        }
        let members = json::object(document).map_err(|why| format!("the key set can't be used: {why}"))?;
        let Some(Value::Array(entries)) = members.get("keys") else {
            return Err("the key set has no list \"keys\"".to_owned());
        };
        if entries.len() > MOST {
            return Err(format!("the key set holds more than {MOST} keys"));
        }
        let (mut keys, mut ignored) = (Vec::new(), Vec::new());
        for (place, entry) in entries.iter().enumerate() {
            let read = entry.as_object().ok_or("is not an object").and_then(Key::read);
            match read {
                Ok(key) => keys.push(key),
                Err(why) => ignored.push(format!("{} {why}", shown(place, entry))),
            }
        }
        let is_twice = |key: &Key| {
            let same = |other: &&Key| other.name == key.name && other.purpose == key.purpose;
            key.name.is_some() && keys.iter().filter(same).count() > 1
        };
        let twice: Vec<bool> = keys.iter().map(is_twice).collect();
        let mut kept = Vec::with_capacity(keys.len());
        for (key, is_twice) in keys.into_iter().zip(twice) {
            if is_twice {
                let name = key.name.as_deref().unwrap_or_default();
                ignored.push(format!("the key {:?} stands in the set twice", cut(name)));
            } else {
                kept.push(key);
            }
        }
        Ok((Self { keys: kept, digest: sha256(document) }, ignored))
    }

    /// The names of the keys; "" for one without.
    pub fn names(&self) -> Vec<&str> {
        self.keys.iter().map(|key| key.name.as_deref().unwrap_or_default()).collect()
    }

    /// Of the document that it was read from.
    pub(super) fn digest(&self) -> &[u8; 32] {
        &self.digest
    }

    pub(super) fn choose(
        &self,
        provider: &str,
        name: Option<&str>,
        algorithm: Algorithm,
        purpose: Purpose,
    ) -> Result<&PublicKey, TokenFault> {
        let unknown = || TokenFault::UnknownKey { provider: provider.to_owned() };
        let mut fitting = self.keys.iter().filter(|key| key.purpose == purpose && key.fits(algorithm));
        if let Some(name) = name {
            let is_named = |key: &&Key| key.name.as_deref() == Some(name);
            let found = self.keys.iter().filter(|key| key.purpose == purpose).find(is_named).ok_or_else(unknown)?;
            let not_for_it = TokenFault::Key("is not for the token's algorithm");
            return if found.fits(algorithm) { Ok(&found.key) } else { Err(not_for_it) };
        }
        match (fitting.next(), fitting.next()) {
            (Some(key), None) => Ok(&key.key),
            (None, _) => Err(unknown()),
            _ => Err(TokenFault::Key("isn't named, and several would fit")),
        }
    }
}

impl Key {
    fn fits(&self, algorithm: Algorithm) -> bool {
        self.algorithm.is_none_or(|own| own == algorithm) && self.key.fits(algorithm)
    }

    fn read(members: &Map<String, Value>) -> Result<Self, &'static str> {
        if ["d", "p", "q", "dp", "dq", "qi", "oth", "priv"].iter().any(|name| members.contains_key(*name)) {
            return Err("is published with its private part");
        }
        let purpose = match text(members, "use")? {
            None | Some("sig") => Purpose::Jwt,
            Some("jwt-svid") => Purpose::JwtSvid,
            Some(_) => return Err("is for another use than signatures"),
        };
        if let Some(operations) = members.get("key_ops") {
            let operations = operations.as_array().ok_or("has \"key_ops\" that is no list")?;
            if !operations.iter().any(|one| one == "verify") {
                return Err("is for other operations than \"verify\"");
            }
        }
        let name = text(members, "kid")?.map(str::to_owned);
        if purpose == Purpose::JwtSvid && name.as_deref().is_none_or(str::is_empty) {
            return Err("has no \"kid\", which SPIFFE demands");
        }
        let algorithm = match text(members, "alg")? {
            None => None,
            Some(name) => Some(Algorithm::named(name).ok_or("is for an algorithm that isn't supported")?),
        };
        let key = public_key(members)?;
        if algorithm.is_some_and(|algorithm| !key.fits(algorithm)) {
            return Err("is of another kind than its algorithm");
        }
        Ok(Self { name, purpose, algorithm, key })
    }
}

fn public_key(members: &Map<String, Value>) -> Result<PublicKey, &'static str> {
    match text(members, "kty")?.ok_or("has no \"kty\"")? {
        "RSA" => {
            let (modulus, exponent) = (number(members, "n")?, number(members, "e")?);
            rsa::checked(&modulus, &exponent)?;
            Ok(PublicKey::Rsa { modulus, exponent })
        }
        "EC" => {
            let curve = text(members, "crv")?.and_then(Curve::named).ok_or("is on a curve that isn't supported")?;
            let (x, y) = (number_of_curve(members, "x", curve)?, number_of_curve(members, "y", curve)?);
            PublicKey::on_curve(curve, &x, &y).ok_or("is no point of its curve")
        }
        "OKP" if text(members, "crv")? == Some("Ed25519") => {
            let point = bytes(members, "x")?;
            let is_whole = point.len() == 32;
            is_whole.then_some(PublicKey::Ed25519 { point }).ok_or("has a coordinate of the wrong length")
        }
        "OKP" => Err("is on a curve that isn't supported"),
        "oct" => Err("is a shared secret"),
        _ => Err("is of a kind that isn't supported"),
    }
}

fn text<'a>(members: &'a Map<String, Value>, name: &str) -> Result<Option<&'a str>, &'static str> {
    match members.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err("has a member that should be text and isn't"),
    }
}

fn bytes(members: &Map<String, Value>, name: &str) -> Result<Vec<u8>, &'static str> {
    text(members, name)?.and_then(|text| decoded(text.as_bytes())).ok_or("lacks a part, or it isn't base64url")
}

/// Without leading zeros, which some libraries write though they shouldn't: they change nothing.
fn number(members: &Map<String, Value>, name: &str) -> Result<Vec<u8>, &'static str> {
    let mut found = bytes(members, name)?;
    let zeros = found.iter().take_while(|byte| **byte == 0).count();
    found.drain(..zeros);
    Ok(found)
}

fn number_of_curve(members: &Map<String, Value>, name: &str, curve: Curve) -> Result<Vec<u8>, &'static str> {
    let found = bytes(members, name)?;
    if found.len() == curve.size() {
        Ok(found)
    } else {
        Err("has a coordinate of the wrong length")
    }
}

fn shown(place: usize, entry: &Value) -> String {
    match entry.get("kid").and_then(Value::as_str) {
        Some(name) => format!("the key {:?}", cut(name)),
        None => format!("the key at place {}", place + 1),
    }
}

fn cut(name: &str) -> &str {
    name.char_indices().nth(64).and_then(|(end, _)| name.get(..end)).unwrap_or(name)
}
