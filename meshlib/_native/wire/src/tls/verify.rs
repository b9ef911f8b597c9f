//! Who is the peer, as its certificate proves? The rules of X509-SVID, for servers and clients alike.
//!
//! rustls-webpki verifies the chain, but can't read URI names; the SPIFFE crates still check a DNS name. So the identity is read
//! here: exactly one URI SAN, in our own strict parser, and the chain is verified against the roots of that very trust domain and
//! no others. A DNS name or a CN is never looked at.
//!
//! What was verified in full is remembered by the digest of the chain, because a resumed session skips the verification: there the
//! memory answers for the signatures, and time and identity are judged anew. It holds for one generation of bundles.
use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use ahash::AHashMap;
use parking_lot::Mutex;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{verify_tls12_signature, verify_tls13_signature, CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::spiffe;
use crate::tls::server::Accepting;

/// Certificates in a peer's chain, the leaf included; path building can be made to take very long.
const MAX_CHAIN: usize = 8;
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
    NoBundle { id: String },
    WrongIdentity { id: String, expected: String },
    TooLong(usize),
    Expired,
    NotYetValid,
    Intermediate(&'static str),
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
            Refusal::Chain(webpki::Error::UnknownIssuer) => CertificateError::UnknownIssuer,
            other => CertificateError::Other(OtherError(Arc::new(other))),
        })
    }
}

/// The roots of one trust domain, each with its end: an anchor alone has no life, and an expired root signs for nobody.
#[derive(Debug, Default)]
pub struct Roots {
    anchors: Vec<TrustAnchor<'static>>,
    ends: Vec<u64>,
}

impl Roots {
    pub fn push(&mut self, anchor: TrustAnchor<'static>, not_after: u64) {
        self.anchors.push(anchor);
        self.ends.push(not_after);
    }

    /// Those in force, and until when all of them are. Mostly that is all, and nothing is copied.
    fn in_force(&self, now: u64) -> (Cow<'_, [TrustAnchor<'static>]>, u64) {
        let until = self.ends.iter().copied().filter(|end| *end >= now).min().unwrap_or(u64::MAX);
        if self.ends.iter().all(|end| *end >= now) {
            return (Cow::Borrowed(&self.anchors), until);
        }
        let kept =
            self.anchors.iter().zip(&self.ends).filter(|(_, end)| **end >= now).map(|(anchor, _)| anchor.clone());
        (Cow::Owned(kept.collect()), until)
    }

    /// The last second of the root with this name and key; of the longest, where it was issued again.
    fn end_of(&self, anchor: &TrustAnchor<'_>) -> u64 {
        let ends = self.anchors.iter().zip(&self.ends).filter(|(known, _)| {
            known.subject == anchor.subject && known.subject_public_key_info == anchor.subject_public_key_info
        });
        ends.map(|(_, end)| *end).max().unwrap_or(0)
    }
}

/// A peer that was verified in full, and until when none of the roots of that moment ends.
struct Remembered {
    peer: Arc<Peer>,
    until: u64,
}

/// Which side is judged: whoever signs for the one side only doesn't sign for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Servers,
    Clients,
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

    /// The peer of a full handshake. `expected` is a SPIFFE ID, or empty for any in the bundles.
    pub fn verify(&self, chain: &[&CertificateDer<'_>], expected: &str, now: UnixTime) -> Result<Arc<Peer>, Refusal> {
        let Some((leaf_der, intermediates)) = chain.split_first() else {
            return Err(Refusal::NotAnSvid("there is none".into()));
        };
        if chain.len() > MAX_CHAIN {
            return Err(Refusal::TooLong(chain.len()));
        }
        let leaf = read_leaf(leaf_der)?;
        let trust_domain = spiffe::parse(&leaf.id).map_or("", |id| id.trust_domain);
        let Some(roots) = self.bundles.get(trust_domain) else {
            return Err(Refusal::NoBundle { id: leaf.id });
        };
        check_identity(&leaf, expected)?;
        check_time(&leaf, now)?;

        let (in_force, until) = roots.in_force(now.as_secs());
        let usage = match self.side {
            Side::Servers => KeyUsage::server_auth(),
            Side::Clients => KeyUsage::client_auth(),
        };
        let certificate = EndEntityCert::try_from(*leaf_der).map_err(Refusal::Chain)?;
        let intermediates: Vec<CertificateDer<'_>> = intermediates.iter().map(|der| (**der).clone()).collect();
        let path = certificate
            .verify_for_usage(self.algorithms.all, &in_force, &intermediates, now, usage, None, None)
            .map_err(|error| match error {
                webpki::Error::CertExpired { .. } => Refusal::Expired,
                webpki::Error::CertNotValidYet { .. } => Refusal::NotYetValid,
                // A root of the same name with another key is still another root.
                webpki::Error::InvalidSignatureForPublicKey => Refusal::Chain(webpki::Error::UnknownIssuer),
                other => Refusal::Chain(other),
            })?;
        let mut peer = leaf.clone();
        for intermediate in path.intermediate_certificates() {
            let (not_before, not_after) = read_intermediate(&intermediate.der(), trust_domain)?;
            peer.not_before = peer.not_before.max(not_before);
            peer.not_after = peer.not_after.min(not_after);
        }
        peer.not_after = peer.not_after.min(roots.end_of(path.anchor()));
        let peer = Arc::new(peer);
        let mut remembered = self.remembered.lock();
        if remembered.len() >= MAX_REMEMBERED {
            remembered.clear();
        }
        remembered.insert(digest(chain), Remembered { peer: peer.clone(), until });
        Ok(peer)
    }

    /// The peer of an established session, whose chain comes from a handshake just done or from a ticket.
    pub fn verify_again(
        &self,
        chain: &[CertificateDer<'_>],
        expected: &str,
        now: UnixTime,
    ) -> Result<Arc<Peer>, Refusal> {
        let chain: Vec<&CertificateDer<'_>> = chain.iter().collect();
        let known = self
            .remembered
            .lock()
            .get(&digest(&chain))
            .filter(|known| now.as_secs() <= known.until)
            .map(|known| known.peer.clone());
        match known {
            Some(peer) => {
                check_identity(&peer, expected)?;
                check_time(&peer, now)?;
                Ok(peer)
            }
            None => self.verify(&chain, expected, now),
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

/// Reads a leaf as an X509-SVID, without regard to who signed it.
pub fn read_leaf(der: &[u8]) -> Result<Peer, Refusal> {
    let refused = |why: &str| Refusal::NotAnSvid(why.to_owned());
    let (rest, certificate) = X509Certificate::from_der(der).map_err(|_| refused("it can't be parsed"))?;
    if !rest.is_empty() {
        return Err(refused("bytes follow the certificate"));
    }
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| refused("its subject alternative name can't be read"))?
        .ok_or_else(|| refused("it has no subject alternative name"))?;
    let mut uri = None;
    for name in &names.value.general_names {
        let has_nul = match name {
            GeneralName::URI(text) => {
                if uri.replace(*text).is_some() {
                    return Err(refused("it has more than one URI name"));
                }
                text.contains('\0')
            }
            GeneralName::DNSName(text) | GeneralName::RFC822Name(text) => text.contains('\0'),
            GeneralName::OtherName(_, bytes) => bytes.contains(&0),
            GeneralName::Invalid(..) => return Err(refused("one of its names is malformed")),
            _ => false,
        };
        if has_nul {
            return Err(refused("one of its names holds a NUL"));
        }
    }
    let uri = uri.ok_or_else(|| refused("it has no URI name"))?;
    let id = spiffe::parse(uri).map_err(|why| refused(&format!("its URI name is no SPIFFE ID, {why}")))?;
    if id.path.is_empty() {
        return Err(refused("its SPIFFE ID names a trust domain, not a workload"));
    }

    let constraints = certificate.basic_constraints().map_err(|_| refused("its basic constraints can't be read"))?;
    if constraints.is_some_and(|constraints| constraints.value.ca) {
        return Err(refused("it is a signing certificate (cA is true)"));
    }
    let usage = certificate
        .key_usage()
        .map_err(|_| refused("its key usage can't be read"))?
        .ok_or_else(|| refused("it has no key usage"))?;
    if !usage.critical {
        return Err(refused("its key usage is not critical"));
    }
    if !usage.value.digital_signature() {
        return Err(refused("its key usage lacks digitalSignature"));
    }
    if usage.value.key_cert_sign() || usage.value.crl_sign() {
        return Err(refused("its key usage allows signing certificates"));
    }
    let purposes = certificate.extended_key_usage().map_err(|_| refused("its extended key usage can't be read"))?;
    if purposes.is_some_and(|purposes| !(purposes.value.server_auth && purposes.value.client_auth)) {
        return Err(refused("its extended key usage lacks serverAuth or clientAuth"));
    }
    let (not_before, not_after) = validity(&certificate);
    Ok(Peer { id: uri.to_owned(), not_before, not_after })
}

/// Reads a signing certificate between leaf and root; answers its validity. webpki has checked the rest.
fn read_intermediate(der: &[u8], trust_domain: &str) -> Result<(u64, u64), Refusal> {
    let refused = Refusal::Intermediate;
    let (_, certificate) = X509Certificate::from_der(der).map_err(|_| refused("can't be parsed"))?;
    let usage = certificate.key_usage().map_err(|_| refused("has a key usage that can't be read"))?;
    if !usage.is_some_and(|usage| usage.value.key_cert_sign()) {
        return Err(refused("may not sign certificates (its key usage lacks keyCertSign)"));
    }
    let names = certificate.subject_alternative_name().map_err(|_| refused("has names that can't be read"))?;
    for name in names.iter().flat_map(|names| &names.value.general_names) {
        let id = match name {
            GeneralName::URI(text) => {
                spiffe::parse(text).map_err(|_| refused("has a URI name that is no SPIFFE ID"))?
            }
            GeneralName::Invalid(..) => return Err(refused("has a malformed name")),
            _ => continue,
        };
        if id.trust_domain != trust_domain {
            return Err(refused("is of another trust domain"));
        }
        if !id.path.is_empty() {
            return Err(refused("has the SPIFFE ID of a workload"));
        }
    }
    Ok(validity(&certificate))
}

/// Unix seconds; times before 1970 count as 1970.
pub fn validity(certificate: &X509Certificate<'_>) -> (u64, u64) {
    let seconds = |time: i64| u64::try_from(time).unwrap_or_default();
    let validity = certificate.validity();
    (seconds(validity.not_before.timestamp()), seconds(validity.not_after.timestamp()))
}

fn digest(chain: &[&CertificateDer<'_>]) -> [u8; 32] {
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
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
        self.verifier.verify(&chain(leaf, intermediates), &self.expected, now)?;
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
        let peer = self.verifier.verify(&chain(leaf, intermediates), "", now)?;
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
