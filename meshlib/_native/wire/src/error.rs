//! What went wrong on the wire, in words for people and in one kind for programs?
//!
//! One type for TLS and HTTP, so that the binding converts in one place. A message says what happened; the hint says the likely
//! cause and what to do. Neither ever holds key material, header values or bodies. Context (which endpoint, which call) is added
//! at the edge, by whoever knows it.
use std::borrow::Cow;
use std::fmt;

/// Which exception this becomes; nothing else in the program looks at the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The caller asked for what HTTP can't say, or in the wrong order. Nothing was written.
    Misuse,
    /// Our own key, certificate or bundle can't be used.
    Identity,
    /// Our own certificate belongs to a trust domain of which we have no bundle.
    TrustDomain,
    /// The other side did not prove the identity that we expect.
    PeerIdentity,
    /// The TLS layer failed for another reason.
    Tls,
    /// The connection ended before a byte of the answer came.
    Lost,
    /// The same, on a connection that had been kept open: it may have been closed before the request came there.
    Stale,
    /// The other side is going, and says that it did not process the request.
    Unprocessed,
    /// The other side stays, and says that it did not process this request.
    Declined,
    /// The other side does not speak correct HTTP.
    Protocol,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    pub kind: ErrorKind,
    pub message: Cow<'static, str>,
    pub hint: Cow<'static, str>,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn new(kind: ErrorKind, message: impl Into<Cow<'static, str>>, hint: impl Into<Cow<'static, str>>) -> Error {
        Error { kind, message: message.into(), hint: hint.into() }
    }

    pub fn misuse(message: impl Into<Cow<'static, str>>, hint: &'static str) -> Error {
        Error::new(ErrorKind::Misuse, message, hint)
    }

    /// Broken HTTP from the other side. The hint is the same for all: the bytes can't be trusted any more.
    pub fn protocol(message: impl Into<Cow<'static, str>>) -> Error {
        Error::new(
            ErrorKind::Protocol,
            message,
            "Likely cause: a faulty server, or a proxy in between that rewrites messages. The connection is closed; look at what \
             really listens at this address.",
        )
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.message, self.hint)
    }
}

impl std::error::Error for Error {}
