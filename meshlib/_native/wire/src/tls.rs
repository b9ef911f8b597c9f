//! What do we prove to peers, and what must they prove to us? TLS by rustls, in generations.
//!
//! A generation is our SVID with its key and the bundles of that moment. Whatever was won under it, tickets above all, lives in the
//! `TlsClient` or `TlsServer` of the generation and dies with it: so a rotation of identity or bundle can't leave a session behind
//! that was proved under the old one. Keys stay in memory that rustls wipes; no `Debug` here shows them.
//!
//! TLS 1.2 and 1.3, never 0-RTT, no renegotiation, no key log, resumption only with extended master secret.
pub mod client;
pub mod counts;
pub mod crypto;
pub mod path;
pub mod revoked;
pub mod server;
pub mod session;
pub mod svid;
pub mod tickets;
pub mod verify;

use std::sync::Arc;
use std::time::Duration;

use ahash::AHashMap;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
pub use rustls::pki_types::CertificateDer;
use rustls::pki_types::{PrivateKeyDer, UnixTime};
use rustls::sign::CertifiedKey;
pub use rustls::CommonState;
use rustls::{AlertDescription, CertificateError, CipherSuite, Error as RustlsError, ProtocolVersion};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::error::{Error, ErrorKind, Result};
use crate::spiffe;
use counts::Failed;
use path::{Roots, MAX_CHAIN};
use revoked::Lists;
use verify::{Peer, Refusal};

/// The crypto of every connection, with rustls' order of suites, but AES-128 with SHA-256 first. It is as strong as the key
/// exchange and the signatures beside it, and SHA-384, for which processors have no instructions, takes a fifth of the time of a
/// resumed handshake.
pub fn provider() -> Arc<CryptoProvider> {
    let mut provider = crypto::provider();
    provider.cipher_suites.sort_by_key(|suite| {
        !matches!(
            suite.suite(),
            CipherSuite::TLS13_AES_128_GCM_SHA256
                | CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
                | CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256
        )
    });
    Arc::new(provider)
}

/// Our own certificate and key, checked against one another.
pub struct Svid {
    pub key: Arc<CertifiedKey>,
    pub peer: Peer,
}

impl Svid {
    /// From PEM; the leaf first. It must be a certificate that our own verifier would read.
    pub fn from_pem(chain: &[u8], key: &[u8], provider: &CryptoProvider) -> Result<Svid> {
        let hint = "Likely cause: the files of two different certificates got mixed, or a file is cut off. Issue the identity again.";
        let certificates = certificates(chain).map_err(|why| {
            Error::new(ErrorKind::Identity, format!("Our certificate chain can't be read: {why}."), hint)
        })?;
        if certificates.len() > MAX_CHAIN {
            let what =
                format!("Our certificate chain has {} certificates; peers read {MAX_CHAIN}.", certificates.len());
            return Err(Error::new(ErrorKind::Identity, what, "Leave out roots, and what stands in it twice."));
        }
        // The parser's own error could quote the key file: it is dropped.
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| {
            Error::new(ErrorKind::Identity, "Our private key is not PEM (PKCS#8, PKCS#1 or SEC1).", hint)
        })?;
        let leaf = certificates
            .first()
            .map(|leaf| svid::read_leaf(leaf))
            .unwrap_or_else(|| Err(Refusal::NotAnSvid("there is none".into())));
        let peer = leaf.map_err(|refusal| {
            Error::new(ErrorKind::Identity, format!("We can't use our own certificate: {refusal}."), hint)
        })?;
        let key = CertifiedKey::from_der(certificates, key, provider).map_err(|error| {
            let what = match error {
                RustlsError::InconsistentKeys(_) => "Our private key does not belong to our certificate.",
                _ => "Our private key is of a kind that TLS can't use.",
            };
            Error::new(ErrorKind::Identity, what, hint)
        })?;
        Ok(Svid { key: Arc::new(key), peer })
    }

    /// Unix seconds at which the first certificate of what we show ends. One that has ended already is a leftover that no peer needs.
    pub fn not_after(&self, now: u64) -> u64 {
        let ends = self.key.cert.iter().skip(1).filter_map(|der| X509Certificate::from_der(der).ok());
        let ends = ends.map(|(_, certificate)| svid::validity(&certificate).1).filter(|end| *end > now);
        ends.fold(self.peer.not_after, u64::min)
    }

    /// There must be a bundle of our own trust domain: else no peer of ours could be verified.
    pub fn check_trust_domain<T>(&self, bundles: &AHashMap<String, T>) -> Result<()> {
        let trust_domain = spiffe::parse(&self.peer.id).map_or("", |id| id.trust_domain);
        if bundles.contains_key(trust_domain) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::TrustDomain,
            format!("Our certificate is {}, and there is no bundle of the trust domain {trust_domain}.", self.peer.id),
            "Likely cause: the identity was issued by the CA of another mesh. Issue it with this mesh's CA, or add the bundle.",
        ))
    }
}

/// Roots by trust domain, never in one pool; and what their CAs have revoked, also by trust domain.
pub fn bundles<'a>(
    pems: impl IntoIterator<Item = (&'a str, &'a [u8])>,
    lists: impl IntoIterator<Item = (&'a str, &'a [u8])>,
) -> Result<AHashMap<String, Roots>> {
    let mut bundles = AHashMap::new();
    for (trust_domain, pem) in pems {
        let unusable = |why: String| {
            Error::new(
                ErrorKind::Identity,
                format!("The bundle of the trust domain {trust_domain:?} can't be used: {why}."),
                "A bundle is the PEM of one or more CA certificates. Fetch or write it again.",
            )
        };
        spiffe::check_trust_domain(trust_domain).map_err(|why| unusable(why.to_owned()))?;
        let certificates = certificates(pem).map_err(|why| unusable(why.to_owned()))?;
        bundles.insert(trust_domain.to_owned(), Roots::new(&certificates, Some(trust_domain)).map_err(unusable)?);
    }
    let algorithms = crypto::provider().signature_verification_algorithms;
    for (trust_domain, pem) in lists {
        let unusable = |why: String| {
            Error::new(
                ErrorKind::Identity,
                format!("The list of revoked certificates of the trust domain {trust_domain:?} can't be used: {why}."),
                "It is the PEM of one or more X509 CRLs, each signed by a CA of that trust domain. Fetch or write it again, or \
                 take it away: then nothing counts as revoked.",
            )
        };
        // Lists that nobody asks for are a name that was misspelt.
        let roots = bundles.remove(trust_domain).ok_or_else(|| unusable("there is no bundle of it".to_owned()))?;
        let lists = Lists::from_pem(pem).map_err(unusable)?;
        let roots = roots.revoking(lists, &algorithms).map_err(|why| unusable(why.to_owned()))?;
        bundles.insert(trust_domain.to_owned(), roots);
    }
    Ok(bundles)
}

fn certificates(pem: &[u8]) -> std::result::Result<Vec<CertificateDer<'static>>, &'static str> {
    let certificates: Vec<_> =
        CertificateDer::pem_slice_iter(pem).collect::<std::result::Result<_, _>>().map_err(|_| "it is not PEM")?;
    if certificates.is_empty() {
        return Err("it holds no certificate");
    }
    Ok(certificates)
}

pub fn is_resumed(state: &CommonState) -> bool {
    state.handshake_kind() == Some(rustls::HandshakeKind::Resumed)
}

/// The version as Python's `ssl` writes it.
pub fn version(state: &CommonState) -> Option<&'static str> {
    match state.protocol_version()? {
        ProtocolVersion::TLSv1_2 => Some("TLSv1.2"),
        ProtocolVersion::TLSv1_3 => Some("TLSv1.3"),
        _ => None,
    }
}

/// The cipher suite by its IANA name.
pub fn cipher(state: &CommonState) -> Option<String> {
    let suite = state.negotiated_cipher_suite()?.suite();
    Some(suite.as_str().map_or_else(|| format!("{suite:?}"), |name| name.replacen("TLS13_", "TLS_", 1)))
}

/// An error that the handshake ends with: rustls' own, or what the check after it found.
#[derive(Debug)]
pub enum Failure {
    Rustls(RustlsError),
    Refused(Refusal),
}

impl From<RustlsError> for Failure {
    fn from(error: RustlsError) -> Failure {
        Failure::Rustls(error)
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Failure {
        Failure::Refused(refusal)
    }
}

/// Under which reason the failure is counted.
pub fn kind_of(failure: &Failure) -> Failed {
    match failure {
        Failure::Refused(_)
        | Failure::Rustls(RustlsError::InvalidCertificate(_) | RustlsError::NoCertificatesPresented) => {
            Failed::Identity
        }
        Failure::Rustls(RustlsError::AlertReceived(alert)) if is_about_certificates(*alert) => Failed::Refused,
        Failure::Rustls(_) => Failed::Protocol,
    }
}

/// What happened, for people. `is_open`: the handshake was done before it happened.
pub fn explain(failure: Failure, is_open: bool) -> Error {
    let error = match failure {
        Failure::Refused(refusal) => return refused(&refusal),
        Failure::Rustls(error) => error,
    };
    match error {
        RustlsError::InvalidCertificate(certificate) => match &certificate {
            CertificateError::Expired => refused(&Refusal::Expired),
            CertificateError::NotValidYet => refused(&Refusal::NotYetValid),
            CertificateError::Revoked => refused(&Refusal::Revoked { is_leaf: true }),
            CertificateError::UnknownIssuer => refused(&Refusal::Chain(webpki::Error::UnknownIssuer)),
            CertificateError::Other(other) => match other.0.downcast_ref::<Refusal>() {
                Some(refusal) => refused(refusal),
                None => refused(&Refusal::NotAnSvid(certificate.to_string())),
            },
            other => refused(&Refusal::NotAnSvid(other.to_string())),
        },
        RustlsError::NoCertificatesPresented => Error::new(
            ErrorKind::PeerIdentity,
            "The peer showed no certificate.",
            "Likely cause: a caller outside the mesh. In mode enforce every caller needs an identity; permissive admits those without.",
        ),
        RustlsError::AlertReceived(alert) if is_about_certificates(alert) => Error::new(
            ErrorKind::Tls,
            format!("The peer refused our certificate (alert {}).", name(alert)),
            "Likely cause: our certificate expired, or the peer has no bundle of our trust domain or expects another identity. \
             Compare our SPIFFE ID with what the peer is configured to accept, and both bundles.",
        ),
        RustlsError::AlertReceived(alert) => Error::new(
            ErrorKind::Tls,
            format!("The peer ended the TLS connection with the alert {}.", name(alert)),
            "Look at the peer's log: it knows the reason.",
        ),
        RustlsError::InvalidMessage(_) if !is_open => Error::new(
            ErrorKind::Tls,
            "The peer does not speak TLS.",
            "Likely cause: it listens without TLS (mode observe) while we are to use mTLS. Set one mode on both sides, or \
             permissive on the peer while you move.",
        ),
        RustlsError::PeerIncompatible(_) | RustlsError::NoApplicationProtocol => Error::new(
            ErrorKind::Tls,
            format!("The peer and we have no TLS parameters in common: {error}."),
            "Likely cause: it allows only versions below TLS 1.2, or another application protocol than HTTP/1.1.",
        ),
        other => Error::new(
            ErrorKind::Tls,
            format!("The TLS connection failed: {other}."),
            "Likely cause: damaged bytes or a faulty peer. The connection is closed; if it happens again, look at the peer's log.",
        ),
    }
}

/// A moment in Unix seconds; one before 1970 counts as 1970.
pub fn unix_time(seconds: f64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX))
}

pub fn refused(refusal: &Refusal) -> Error {
    let hint = match refusal {
        Refusal::WrongIdentity { .. } => {
            "Likely cause: discovery gives the address of another service, or the service's identity in the configuration is not the \
             one that was issued. Nothing was sent."
        }
        Refusal::NoBundle { .. } | Refusal::Chain(webpki::Error::UnknownIssuer) => {
            "Likely cause: it belongs to another mesh, or its CA was rotated and our bundle is older. Compare the bundles of both \
             sides."
        }
        Refusal::Expired | Refusal::NotYetValid => {
            "Likely cause: its rotation has stopped, or one of the two clocks is wrong. Check the peer's identity and both clocks."
        }
        Refusal::Revoked { .. } => {
            "Its CA has taken it back, as our list of revoked certificates says. If the peer is genuine, issue its identity again."
        }
        Refusal::List(_) => {
            "Likely cause: the list beside our bundle is damaged, or of an older key of the CA. Fetch it again, or take it away: \
             then nothing counts as revoked."
        }
        Refusal::NotAnSvid(_) | Refusal::TooLong(_) | Refusal::Intermediate(_) | Refusal::Chain(_) => {
            "Likely cause: it was not issued for the mesh. A peer needs an X509-SVID from a CA in our bundles."
        }
    };
    Error::new(ErrorKind::PeerIdentity, format!("The peer did not prove its identity: {refusal}."), hint)
}

fn is_about_certificates(alert: AlertDescription) -> bool {
    matches!(
        alert,
        AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateRequired
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied
            | AlertDescription::NoCertificate
    )
}

fn name(alert: AlertDescription) -> String {
    alert.as_str().map_or_else(|| format!("{alert:?}"), str::to_owned)
}

#[cfg(test)]
mod tests;
