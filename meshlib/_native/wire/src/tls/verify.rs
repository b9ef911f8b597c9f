//! Who is the peer, as its certificate proves? The rules of X509-SVID, for servers and clients alike.
//!
//! The identity is read from the leaf (`svid`), and the chain is verified (`path`) against the roots of that very trust domain and
//! no others. Nothing that the peer says about itself elsewhere is looked at.
//!
//! What was verified in full is remembered by the digest of the chain, because a resumed session skips the verification: there the
//! memory answers for the signatures, and time and identity are judged anew. It holds for one generation of bundles and of lists of
//! revoked certificates: a new list makes a new generation, which remembers nothing.
use std::fmt;
use std::sync::Arc;

use ahash::AHashMap;
use parking_lot::Mutex;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{verify_tls12_signature, verify_tls13_signature, CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};

use crate::spiffe;
use crate::tls::crypto::digest::{Context, SHA256};
use crate::tls::path::MAX_CHAIN;
pub use crate::tls::path::{Roots, Side};
use crate::tls::server::Accepting;
pub use crate::tls::svid::read_leaf;

/// Chains remembered per generation; above that the memory starts anew.
const MAX_REMEMBERED: usize = 1024;

/// What a peer proved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub id: String,
    /// Unix seconds between which every certificate of the verified path is valid, the root's end included.
    pub not_before: u64,
    pub not_after: u64,
}

/// Why a certificate was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    NotAnSvid(String),
    NoBundle {
        id: String,
    },
    WrongIdentity {
        id: String,
        expected: String,
    },
    TooLong(usize),
    Expired,
    NotYetValid,
    Intermediate(&'static str),
    Revoked {
        is_leaf: bool,
    },
    /// The list of what its CA has revoked can't be believed.
    List(&'static str),
    Chain(webpki::Error),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::NotAnSvid(why) => write!(f, "its certificate is no X509-SVID: {why}"),
            Refusal::NoBundle { id } => write!(f, "it is {id}, and there is no bundle of that trust domain"),
            Refusal::WrongIdentity { id, expected } => write!(f, "it is {id}, but {expected} was expected"),
            Refusal::TooLong(count) => write!(f, "its chain has {count} certificates, more than {MAX_CHAIN}"),
            Refusal::Expired => f.write_str("its certificate has expired"),
            Refusal::NotYetValid => f.write_str("its certificate is not valid yet"),
            Refusal::Intermediate(why) => write!(f, "an intermediate certificate of its chain {why}"),
            Refusal::Revoked { is_leaf: true } => f.write_str("its certificate was revoked by its CA"),
            Refusal::Revoked { is_leaf: false } => f.write_str("an intermediate certificate of its chain was revoked"),
            Refusal::List(why) => write!(f, "our list of what its CA has revoked {why}"),
            Refusal::Chain(webpki::Error::UnknownIssuer) => {
                f.write_str("no root in the bundle of its trust domain signed its certificate")
            }
            Refusal::Chain(error) => write!(f, "its chain can't be verified: {error}"),
        }
    }
}

impl std::error::Error for Refusal {}

impl From<Refusal> for rustls::Error {
    fn from(refusal: Refusal) -> rustls::Error {
        // The variants that have an alert of their own; the rest becomes certificate_unknown and keeps its text.
        rustls::Error::InvalidCertificate(match refusal {
            Refusal::Expired => CertificateError::Expired,
            Refusal::NotYetValid => CertificateError::NotValidYet,
            Refusal::Revoked { is_leaf: true } => CertificateError::Revoked,
            Refusal::Chain(webpki::Error::UnknownIssuer) => CertificateError::UnknownIssuer,
            other => CertificateError::Other(OtherError(Arc::new(other))),
        })
    }
}

/// A peer that was verified in full, and until when none of the roots of that moment ends.
struct Remembered {
    peer: Arc<Peer>,
    until: u64,
}

/// Verifies peers of one side by one generation of bundles.
pub struct Verifier {
    side: Side,
    bundles: AHashMap<String, Roots>,
    algorithms: WebPkiSupportedAlgorithms,
    remembered: Mutex<AHashMap<[u8; 32], Remembered>>,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier").field("trust_domains", &self.bundles.keys()).finish_non_exhaustive()
    }
}

impl Verifier {
    pub fn new(side: Side, bundles: AHashMap<String, Roots>, provider: &CryptoProvider) -> Verifier {
        Verifier { side, bundles, algorithms: provider.signature_verification_algorithms, remembered: Mutex::default() }
    }

    /// When the first list of revoked certificates should have been replaced, in Unix seconds.
    pub fn lists_until(&self) -> Option<u64> {
        self.bundles.values().filter_map(Roots::lists_until).min()
    }

    /// The peer whose chain was never seen in this generation. `expected` is a SPIFFE ID, or empty for any in the bundles.
    pub fn verify(&self, chain: &[&CertificateDer<'_>], expected: &str, now: UnixTime) -> Result<Arc<Peer>, Refusal> {
        let Some(leaf) = chain.first() else {
            return Err(Refusal::NotAnSvid("there is none".into()));
        };
        let mut peer = read_leaf(leaf)?;
        let trust_domain = spiffe::parse(&peer.id).map_or("", |id| id.trust_domain);
        let Some(roots) = self.bundles.get(trust_domain) else {
            return Err(Refusal::NoBundle { id: peer.id });
        };
        check_identity(&peer, expected)?;
        check_time(&peer, now)?;
        let path = roots.path(chain, Some(trust_domain), self.side, now, &self.algorithms)?;
        peer.not_before = peer.not_before.max(path.not_before);
        peer.not_after = peer.not_after.min(path.not_after);
        let peer = Arc::new(peer);
        let mut remembered = self.remembered.lock();
        if remembered.len() >= MAX_REMEMBERED {
            remembered.clear();
        }
        remembered.insert(digest(chain), Remembered { peer: peer.clone(), until: path.until });
        Ok(peer)
    }

    /// The peer of an established session, whose chain comes from a handshake just done or from a ticket.
    pub fn verify_again(
        &self,
        chain: &[CertificateDer<'_>],
        expected: &str,
        now: UnixTime,
    ) -> Result<Arc<Peer>, Refusal> {
        self.recall(&chain.iter().collect::<Vec<_>>(), expected, now)
    }

    /// The same chain under the same bundles needs no second look but at the time. It proves nothing by itself: whose it is, is
    /// proved by the signature of the handshake, which is checked each time.
    fn recall(&self, chain: &[&CertificateDer<'_>], expected: &str, now: UnixTime) -> Result<Arc<Peer>, Refusal> {
        let known = self
            .remembered
            .lock()
            .get(&digest(chain))
            .filter(|known| now.as_secs() <= known.until)
            .map(|known| known.peer.clone());
        match known {
            Some(peer) => {
                check_identity(&peer, expected)?;
                check_time(&peer, now)?;
                Ok(peer)
            }
            None => self.verify(chain, expected, now),
        }
    }
}

fn check_identity(peer: &Peer, expected: &str) -> Result<(), Refusal> {
    if expected.is_empty() || peer.id == expected {
        return Ok(());
    }
    Err(Refusal::WrongIdentity { id: peer.id.clone(), expected: expected.to_owned() })
}

fn check_time(peer: &Peer, now: UnixTime) -> Result<(), Refusal> {
    if now.as_secs() > peer.not_after {
        return Err(Refusal::Expired);
    }
    if now.as_secs() < peer.not_before {
        return Err(Refusal::NotYetValid);
    }
    Ok(())
}

fn digest(chain: &[&CertificateDer<'_>]) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    for der in chain {
        context.update(&(der.len() as u64).to_be_bytes());
        context.update(der);
    }
    let mut answer = [0u8; 32];
    answer.copy_from_slice(context.finish().as_ref());
    answer
}

fn chain<'a>(leaf: &'a CertificateDer<'a>, intermediates: &'a [CertificateDer<'a>]) -> Vec<&'a CertificateDer<'a>> {
    std::iter::once(leaf).chain(intermediates).collect()
}

/// The client's verifier: servers of one expected identity.
#[derive(Debug)]
pub struct ExpectServer {
    pub verifier: Arc<Verifier>,
    pub expected: String,
}

impl ServerCertVerifier for ExpectServer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verifier.recall(&chain(leaf, intermediates), &self.expected, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, signature, &self.verifier.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, signature, &self.verifier.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.algorithms.supported_schemes()
    }
}

/// The server's verifier: any client of the bundles, noted down for the connection's tickets.
#[derive(Debug)]
pub struct AnyClient {
    pub verifier: Arc<Verifier>,
    pub accepting: Arc<Accepting>,
    pub is_required: bool,
}

impl ClientCertVerifier for AnyClient {
    fn client_auth_mandatory(&self) -> bool {
        self.is_required
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let peer = self.verifier.recall(&chain(leaf, intermediates), "", now)?;
        self.accepting.note_proof(peer.not_after);
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, signature, &self.verifier.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, signature, &self.verifier.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests;
