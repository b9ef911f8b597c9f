//! Does a path lead from this certificate to a root of ours, and may each certificate on it do what it does there?
//!
//! webpki builds the path and verifies signatures, times, basic constraints, name constraints and purposes; no more than 100
//! signatures are checked, in chains of no more than 8 certificates, since a path can be made very long to find. What webpki leaves
//! out is judged for each path that it finds, so that it goes on searching if there is another: key usage and names of the
//! intermediates, the end and the path length of the root, and whether the CA has taken a certificate back.
//!
//! A CA whose name constraints speak of URIs signs for nobody here: webpki can't judge them and refuses (which is why it must not
//! be older than 0.103.12), and a path that nobody judged is none.
use std::borrow::Cow;
use std::cell::RefCell;

use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, KeyUsage, VerifiedPath};

use crate::tls::revoked::Lists;
use crate::tls::svid::{read_intermediate, read_root, Signer};
use crate::tls::verify::Refusal;

/// Certificates in a peer's chain, the leaf included.
pub const MAX_CHAIN: usize = 8;

/// Which side is judged: whoever signs for the one side only doesn't sign for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Servers,
    Clients,
}

/// Between which seconds all is valid that stands above the leaf, the root's end included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Path {
    pub not_before: u64,
    pub not_after: u64,
    /// Until when no root of the bundle ends: so long the same answer would be given again.
    pub until: u64,
}

/// The roots of one trust domain, and what they have taken back. An anchor alone has no life; an expired root signs for nobody.
#[derive(Debug, Default)]
pub struct Roots {
    anchors: Vec<TrustAnchor<'static>>,
    signers: Vec<Signer>,
    lists: Lists,
}

impl Roots {
    /// From certificates; the names in them are judged if they must be of a trust domain.
    pub fn new<'a>(
        certificates: impl IntoIterator<Item = &'a CertificateDer<'a>>,
        trust_domain: Option<&str>,
    ) -> Result<Roots, String> {
        let (mut anchors, mut signers) = (Vec::new(), Vec::new());
        for certificate in certificates {
            let (anchor, signer) = read_root(certificate, trust_domain)?;
            anchors.push(anchor);
            signers.push(signer);
        }
        Ok(Roots { anchors, signers, lists: Lists::default() })
    }

    /// With these lists of revoked certificates, as far as they are signed by a root.
    pub fn revoking(mut self, lists: Lists, algorithms: &WebPkiSupportedAlgorithms) -> Result<Roots, &'static str> {
        let signers = self.anchors.iter().map(|anchor| anchor.subject.as_ref()).zip(&self.signers);
        self.lists = lists.of_roots(signers, algorithms)?;
        Ok(self)
    }

    /// When the first list of revoked certificates should have been replaced.
    pub fn lists_until(&self) -> Option<u64> {
        self.lists.until()
    }

    /// Those in force, and until when all of them are. Mostly that is all, and nothing is copied.
    fn in_force(&self, now: u64) -> (Cow<'_, [TrustAnchor<'static>]>, u64) {
        let ends = self.signers.iter().map(|signer| signer.not_after);
        let until = ends.clone().filter(|end| *end >= now).min().unwrap_or(u64::MAX);
        if ends.clone().all(|end| end >= now) {
            return (Cow::Borrowed(&self.anchors), until);
        }
        let kept = self.anchors.iter().zip(ends).filter(|(_, end)| *end >= now).map(|(anchor, _)| anchor.clone());
        (Cow::Owned(kept.collect()), until)
    }

    /// The path of this chain (the leaf first). Intermediates must be of `trust_domain`, if there is one to be of.
    pub fn path(
        &self,
        chain: &[&CertificateDer<'_>],
        trust_domain: Option<&str>,
        side: Side,
        now: UnixTime,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Result<Path, Refusal> {
        let Some((leaf, intermediates)) = chain.split_first() else {
            return Err(Refusal::NotAnSvid("there is none".into()));
        };
        if chain.len() > MAX_CHAIN {
            return Err(Refusal::TooLong(chain.len()));
        }
        let usage = match side {
            Side::Servers => KeyUsage::server_auth(),
            Side::Clients => KeyUsage::client_auth(),
        };
        let (in_force, until) = self.in_force(now.as_secs());
        let certificate = EndEntityCert::try_from(*leaf).map_err(Refusal::Chain)?;
        let intermediates: Vec<CertificateDer<'_>> = intermediates.iter().map(|der| (**der).clone()).collect();
        let judged = RefCell::new(None);
        let judge = |found: &VerifiedPath<'_>| {
            let (refused, verdict) = match self.judge(found, trust_domain, now.as_secs(), algorithms) {
                Ok((not_before, not_after)) => (Ok(()), Ok(Path { not_before, not_after, until })),
                Err(refusal) => (Err(webpki::Error::UnknownIssuer), Err(refusal)),
            };
            judged.replace(Some(verdict));
            refused
        };
        let found =
            certificate.verify_for_usage(algorithms.all, &in_force, &intermediates, now, usage, None, Some(&judge));
        match (found, judged.take()) {
            (Ok(_), Some(verdict)) => verdict,
            // A path that was found and then refused tells more than why there is no other.
            (Err(_), Some(Err(refusal))) => Err(refusal),
            (Err(error), _) => Err(refusal_of(error)),
            (Ok(_), None) => Err(Refusal::Chain(webpki::Error::UnknownIssuer)),
        }
    }

    /// What webpki does not ask of a path.
    fn judge(
        &self,
        found: &VerifiedPath<'_>,
        trust_domain: Option<&str>,
        now: u64,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Result<(u64, u64), Refusal> {
        let mut signers = Vec::with_capacity(MAX_CHAIN);
        for intermediate in found.intermediate_certificates() {
            signers.push(read_intermediate(&intermediate.der(), trust_domain)?);
        }
        let below = signers.iter().filter(|signer| !signer.is_self_issued).count();
        let root = self.root_of(found.anchor(), below, now)?;

        let serials = std::iter::once((found.end_entity().issuer(), found.end_entity().serial()))
            .chain(found.intermediate_certificates().map(|above| (above.issuer(), above.serial())));
        let issuers = signers.iter().chain(std::iter::once(root));
        for (number, ((issuer, serial), signer)) in serials.zip(issuers).enumerate() {
            self.lists.check(issuer, serial, number == 0, signer, algorithms)?;
        }

        let not_before = signers.iter().map(|signer| signer.not_before).fold(0, u64::max);
        let not_after = signers.iter().map(|signer| signer.not_after).fold(root.not_after, u64::min);
        Ok((not_before, not_after))
    }

    /// The root of this name and key that allows so many intermediates; the one that lives longest, where it was issued again.
    fn root_of(&self, anchor: &TrustAnchor<'_>, below: usize, now: u64) -> Result<&Signer, Refusal> {
        let known = self.anchors.iter().zip(&self.signers).filter(|(known, signer)| {
            known.subject == anchor.subject
                && known.subject_public_key_info == anchor.subject_public_key_info
                && signer.not_after >= now
        });
        let allows = |signer: &Signer| signer.path_length.is_none_or(|most| below as u64 <= u64::from(most));
        known
            .map(|(_, signer)| signer)
            .filter(|signer| allows(signer))
            .max_by_key(|signer| signer.not_after)
            .ok_or(Refusal::Chain(webpki::Error::PathLenConstraintViolated))
    }
}

fn refusal_of(error: webpki::Error) -> Refusal {
    match error {
        webpki::Error::CertExpired { .. } => Refusal::Expired,
        webpki::Error::CertNotValidYet { .. } => Refusal::NotYetValid,
        // A root of the same name with another key is still another root.
        webpki::Error::InvalidSignatureForPublicKey => Refusal::Chain(webpki::Error::UnknownIssuer),
        other => Refusal::Chain(other),
    }
}
