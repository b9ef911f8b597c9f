//! Why is this token refused? A word for programs, a sentence for people, and never a piece of the token.
use std::fmt;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenFault {
    /// It isn't a JWS in compact form with JSON objects in it.
    Malformed(&'static str),
    /// A header that isn't understood, or not allowed.
    Header(&'static str),
    /// Not one of the provider's algorithms.
    Algorithm,
    /// Nobody of that name is configured here.
    UnknownIssuer,
    /// The provider's keys aren't known (any more): nothing of its can be accepted.
    NoKeys {
        provider: String,
    },
    /// The key may be newer than the set that we have: fetch it again.
    UnknownKey {
        provider: String,
    },
    /// There is such a key, but not for this.
    Key(&'static str),
    Signature,
    /// A claim that is missing, or of another kind than it should be.
    Claim(&'static str),
    Audience,
    Expired,
    NotYet,
    /// It would live longer than the provider's tokens may.
    TooLong,
}

impl TokenFault {
    pub fn word(&self) -> &'static str {
        match self {
            TokenFault::Malformed(_) => "malformed",
            TokenFault::Header(_) => "header",
            TokenFault::Algorithm => "algorithm",
            TokenFault::UnknownIssuer => "unknown_issuer",
            TokenFault::NoKeys { .. } => "no_keys",
            TokenFault::UnknownKey { .. } => "unknown_key",
            TokenFault::Key(_) => "key",
            TokenFault::Signature => "signature",
            TokenFault::Claim(_) => "claim",
            TokenFault::Audience => "audience",
            TokenFault::Expired => "expired",
            TokenFault::NotYet => "not_yet",
            TokenFault::TooLong => "too_long",
        }
    }

    /// Whose keys should be fetched because of it; "": nobody's.
    pub fn wants_keys(&self) -> &str {
        match self {
            TokenFault::NoKeys { provider } | TokenFault::UnknownKey { provider } => provider,
            _ => "",
        }
    }
}

impl fmt::Display for TokenFault {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TokenFault::Malformed(why) => write!(to, "it is no token in compact form: {why}"),
            TokenFault::Header(why) => write!(to, "the token's header {why}"),
            TokenFault::Algorithm => to.write_str("the token's algorithm is none that its provider is configured with"),
            TokenFault::UnknownIssuer => to.write_str("the token was issued by nobody who is configured here"),
            TokenFault::NoKeys { provider } => write!(to, "the keys of the provider {provider:?} are not known"),
            TokenFault::UnknownKey { provider } => {
                write!(to, "the token names a key that the provider {provider:?} has not published")
            }
            TokenFault::Key(why) => write!(to, "the token's key {why}"),
            TokenFault::Signature => to.write_str("the token's signature is wrong"),
            TokenFault::Claim(why) => write!(to, "the token's claim {why}"),
            TokenFault::Audience => to.write_str("the token is meant for somebody else"),
            TokenFault::Expired => to.write_str("the token has expired"),
            TokenFault::NotYet => to.write_str("the token is not valid yet: is a clock wrong?"),
            TokenFault::TooLong => to.write_str("the token would live longer than its provider's tokens may"),
        }
    }
}

impl std::error::Error for TokenFault {}
