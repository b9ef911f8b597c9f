//! Is this token good, and what does it claim?
//!
//! `verify` goes one way, and every doubt on it refuses: the text (`compact`), its JSON (`json`), the header, the provider that the
//! token names as its issuer (`plan`), a key of that provider's (`keys`), the signature, and only then what is claimed (`claims`). A
//! token of an unknown issuer is a bad token, never "no token": otherwise whoever is anonymous could do what a rule denies to those it
//! knows. Keys come from the configuration and from nowhere else: `jku`, `jwk`, `x5u` and `x5c` in a token are words of whoever sent it.
//!
//! Why our own: the libraries at hand take padding, duplicate members, tokens without an end and keys for encryption. Cryptography is
//! another's (`crypto`). It fetches nothing: keys that are missing are told by `TokenFault::wants_keys`.
use std::sync::Arc;

use serde_json::{Map, Value};

use super::crypto::{sha256, Algorithm};

mod claims;
mod compact;
mod fault;
mod json;
mod keys;
mod plan;
mod rsa;
mod seen;
mod spiffe;

pub use claims::Claims;
use compact::Compact;
pub use fault::TokenFault;
pub use keys::KeySet;
use keys::Purpose;
use plan::Provider;
pub use plan::{Place, PlaceKind, ProviderPlan};
use seen::{Known, Seen};

/// Longer names of keys are nobody's.
const LONGEST_NAME: usize = 256;

/// All whose tokens are taken, with their keys, and the tokens that were verified already.
#[derive(Debug, Default)]
pub struct Providers {
    providers: Vec<Provider>,
    seen: Seen,
}

impl Providers {
    /// All mistakes at once. No provider has keys yet, so that nothing is accepted.
    pub fn compile(plans: &[ProviderPlan]) -> Result<Self, Vec<String>> {
        let (mut providers, mut mistakes) = (Vec::with_capacity(plans.len()), Vec::new());
        for (number, plan) in plans.iter().enumerate() {
            let before = || plans.iter().take(number);
            if before().any(|other| other.name == plan.name) {
                mistakes.push(format!("two providers are named {:?}", plan.name));
            }
            if before().any(|other| other.issuer == plan.issuer) {
                mistakes.push(format!(
                    "two providers have the issuer {:?}: a token tells only that, so write one with the audiences of both",
                    plan.issuer
                ));
            }
            match Provider::compile(plan, number) {
                Ok(provider) => providers.push(provider),
                Err(found) => mistakes.extend(found),
            }
        }
        if mistakes.is_empty() {
            Ok(Self { providers, seen: Seen::default() })
        } else {
            Err(mistakes)
        }
    }

    pub fn is_empty(&self) -> bool {
        self.providers.is_empty()
    }

    /// The keys of a provider from now on; None: they aren't known, and all its tokens are refused. False: no such provider.
    pub fn set_keys(&self, name: &str, keys: Option<Arc<KeySet>>) -> bool {
        let provider = self.providers.iter().find(|provider| provider.name == name);
        provider.map(|provider| provider.set_keys(keys)).is_some()
    }

    /// Tokens that are remembered.
    pub fn remembered(&self) -> usize {
        self.seen.count()
    }

    /// Forget what was verified, but not the keys.
    pub fn forget(&self) {
        self.seen.forget();
    }

    /// What this token claims, if it is good at `wall`, in seconds since 1970.
    pub fn verify(&self, token: &[u8], wall: f64) -> Result<Arc<Claims>, TokenFault> {
        if token.len() > compact::LONGEST {
            return Err(TokenFault::Malformed("it is longer than 16 KiB"));
        }
        let digest = sha256(token);
        if let Some(known) = self.seen.find(&digest) {
            let provider = self.providers.get(known.claims.provider()).ok_or(TokenFault::UnknownIssuer)?;
            if provider.generation() == known.generation {
                return known.claims.judge(wall, provider).map(|()| known.claims);
            }
        }
        let compact = Compact::parse(token)?;
        let header = Header::read(&compact.header)?;
        let members = json::object(&compact.payload).map_err(TokenFault::Malformed)?;
        let provider = self.provider_of(&members)?;
        header.check(provider)?;
        let keys = provider.keys();
        let set = keys.set.as_ref().ok_or_else(|| TokenFault::NoKeys { provider: provider.name.clone() })?;
        let purpose = if provider.is_svid { Purpose::JwtSvid } else { Purpose::Jwt };
        header.verify(&compact, set, &provider.name, purpose)?;
        let claims = Claims::read(members, compact.payload, provider)?;
        self.refuse_borrowed_name(&claims, provider)?;
        claims.judge(wall, provider)?;
        let claims = Arc::new(claims);
        self.seen.keep(digest, Known { claims: claims.clone(), generation: keys.generation });
        Ok(claims)
    }

    /// The one that the token names. It proves nothing yet: it only says whose keys must prove it.
    fn provider_of(&self, members: &Map<String, Value>) -> Result<&Provider, TokenFault> {
        let named = |name: &str| members.get(name).and_then(Value::as_str);
        let by_issuer = named("iss")
            .and_then(|issuer| self.providers.iter().find(|provider| !provider.is_svid && provider.issuer == issuer));
        let by_subject = || {
            let domain = spiffe::trust_domain_of(named("sub")?)?;
            self.providers.iter().find(|provider| provider.is_svid && provider.issuer == domain)
        };
        by_issuer.or_else(by_subject).ok_or(TokenFault::UnknownIssuer)
    }

    /// `iss/sub` is what rules compare, and `https://a` + `b/c` reads as `https://a/b` + `c`. If both are configured, the first must
    /// not speak for the second.
    fn refuse_borrowed_name(&self, claims: &Claims, provider: &Provider) -> Result<(), TokenFault> {
        let is_borrowed = self.providers.iter().any(|other| {
            let begins = claims.principal().strip_prefix(other.issuer.as_str());
            other.issuer.len() > provider.issuer.len() && begins.is_some_and(|rest| rest.starts_with('/'))
        });
        if is_borrowed {
            return Err(TokenFault::Claim("\"sub\" reads as one of another issuer"));
        }
        Ok(())
    }
}

/// The payload of a signed token, by any key of the set and these algorithms alone: no claims are read. For tests with vectors of others.
pub fn payload_of(token: &[u8], keys: &KeySet, algorithms: &[&str]) -> Result<Vec<u8>, TokenFault> {
    let compact = Compact::parse(token)?;
    let header = Header::read(&compact.header)?;
    let is_allowed = algorithms.iter().any(|name| Algorithm::named(name) == Some(header.algorithm));
    if !is_allowed {
        return Err(TokenFault::Algorithm);
    }
    header.verify(&compact, keys, "", Purpose::Jwt)?;
    Ok(compact.payload)
}

struct Header {
    algorithm: Algorithm,
    key: Option<String>,
    kind: Option<String>,
    has_others: bool,
}

impl Header {
    fn read(text: &[u8]) -> Result<Self, TokenFault> {
        let members = json::object(text).map_err(TokenFault::Malformed)?;
        if ["crit", "zip", "b64"].iter().any(|name| members.contains_key(*name)) {
            return Err(TokenFault::Header("asks for an extension (crit, zip, b64), and none is known here"));
        }
        let text = |name: &str| match members.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.as_str())),
            Some(_) => Err(TokenFault::Header("has a member that should be text and isn't")),
        };
        let algorithm = text("alg")?.ok_or(TokenFault::Header("names no algorithm"))?;
        let key = text("kid")?;
        if key.is_some_and(|name| name.len() > LONGEST_NAME) {
            return Err(TokenFault::Header("names a key by more than 256 bytes"));
        }
        Ok(Self {
            algorithm: Algorithm::named(algorithm).ok_or(TokenFault::Algorithm)?,
            key: key.map(str::to_owned),
            kind: text("typ")?.map(str::to_owned),
            has_others: members.keys().any(|name| !matches!(name.as_str(), "alg" | "kid" | "typ")),
        })
    }

    fn check(&self, provider: &Provider) -> Result<(), TokenFault> {
        if !provider.algorithms.contains(&self.algorithm) {
            return Err(TokenFault::Algorithm);
        }
        // A media type is compared without case, and may come with its "application/" (RFC 7515, 4.1.9); SPIFFE's two are words.
        let is_fine = self.kind.as_deref().is_none_or(|kind| {
            let short = match kind.get(..12) {
                Some(start) if start.eq_ignore_ascii_case("application/") => kind.get(12..).unwrap_or_default(),
                _ => kind,
            };
            let is_one_of = |known: &[&str]| known.iter().any(|known| short.eq_ignore_ascii_case(known));
            if provider.is_svid {
                matches!(kind, "JWT" | "JOSE")
            } else {
                is_one_of(&["JWT", "at+jwt", "JOSE"])
            }
        });
        if !is_fine {
            return Err(TokenFault::Header("says that it is something else than a token of access"));
        }
        if provider.is_svid && self.has_others {
            return Err(TokenFault::Header("has more than SPIFFE allows: alg, kid and typ"));
        }
        Ok(())
    }

    fn verify(&self, token: &Compact<'_>, keys: &KeySet, provider: &str, purpose: Purpose) -> Result<(), TokenFault> {
        let key = keys.choose(provider, self.key.as_deref(), self.algorithm, purpose)?;
        if key.verifies(self.algorithm, token.message, &token.signature) {
            Ok(())
        } else {
            Err(TokenFault::Signature)
        }
    }
}

#[cfg(test)]
mod tests;
