//! Has the CA taken back what it signed? Lists of revoked certificates (X.509 CRLs), which lie beside the bundle.
//!
//! They come the way the bundle comes, as a file; nobody is asked while a peer waits. So three questions had to be settled:
//!
//! - *No list of an issuer*: its certificates are good. Most systems live by short lives and have no list at all.
//! - *A list past its `nextUpdate`*: it goes on counting, as in rustls and webpki, and unlike OpenSSL and Envoy, which refuse every
//!   certificate of that issuer. What is revoked stays revoked. But a CA that is down for a day must not cut every connection, among
//!   them those by which it is repaired; and who has published a list once must not be worse off than who never did. What an old
//!   list misses is bounded by the life of the certificates. `until` says when the first list is old, so that an alarm can.
//! - *A list that is not signed by the issuer that it names*: refused when it is loaded where the issuer is a root, and otherwise
//!   every certificate of that issuer is refused. A list is damaged or forged; who knows what it said?
//!
//! webpki reads the lists, but it asks only the first list of an issuer's name. A file may hold an old list beside a new one, or
//! those of two keys of one CA: here every list of the name is asked which its key has signed. A certificate on hold is revoked.
//! Delta lists, indirect ones and those by reason are refused when they are loaded.
//!
//! Whose a list is, its signature says. The key identifier in it never takes a list away from the key that signed it, for CAs
//! compute it in several ways; and none excuses a list in the name of a root that no root of that name signed. Names are compared
//! as RFC 5280 (7.1) has it, not as bytes; and what a root signed under a name that is not its own counts for it all the same.
//! A list whose issuer is no root and has signed for nobody who came is kept, and does nothing: one left over from a root that was
//! rotated away must not keep the next bundle out. An intermediate may have keys of one name that we never saw: only there does
//! the identifier tell that a list which its key did not sign is another key's.
use std::sync::Arc;

use ahash::AHashMap;
use parking_lot::Mutex;
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateRevocationListDer, SubjectPublicKeyInfoDer};
use webpki::{CertRevocationList, OwnedCertRevocationList, RawPublicKeyEntity};
use x509_parser::asn1_rs::Any;
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::{CertificateRevocationList, FromDer};

use self::name::comparable;
use crate::tls::svid::Signer;
use crate::tls::verify::Refusal;

/// Keys per list of which it is remembered whether they signed it.
const MAX_KEYS: usize = 64;

/// The lists of one trust domain, by the name of their issuer as it is compared.
#[derive(Debug, Default)]
pub struct Lists(AHashMap<Vec<u8>, Vec<Arc<List>>>);

#[derive(Debug)]
struct List {
    revoked: CertRevocationList<'static>,
    key_id: Option<Vec<u8>>,
    next_update: u64,
    signed: Vec<u8>,
    algorithm: Vec<u8>,
    signature: Vec<u8>,
    /// Which keys signed it, and which did not.
    keys: Mutex<Vec<(Vec<u8>, bool)>>,
}

impl Lists {
    /// From PEM, one list or more.
    pub fn from_pem(pem: &[u8]) -> Result<Lists, String> {
        let mut lists = Lists::default();
        for der in CertificateRevocationListDer::pem_slice_iter(pem) {
            let list = List::from_der(&der.map_err(|_| "it is not PEM")?)?;
            lists.0.entry(comparable(list.revoked.issuer())).or_default().push(Arc::new(list));
        }
        if lists.0.is_empty() {
            return Err("it holds no list (X509 CRL)".to_owned());
        }
        Ok(lists)
    }

    /// When the first list should have been replaced, in Unix seconds.
    pub fn until(&self) -> Option<u64> {
        self.0.values().flatten().map(|list| list.next_update).min()
    }

    /// As lists of these roots (by subject): each that names one must be signed by one of that name, and what one of them signed
    /// under another name stands under its own as well.
    pub fn of_roots<'a>(
        mut self,
        roots: impl Iterator<Item = (&'a [u8], &'a Signer)>,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Result<Lists, &'static str> {
        let roots: Vec<_> = roots.map(|(subject, root)| (comparable(subject), root)).collect();
        let mut misnamed = Vec::new();
        for (issuer, lists) in &self.0 {
            for list in lists {
                let mut signed = roots.iter().filter(|(_, root)| list.is_signed_by(root, algorithms));
                if roots.iter().any(|(name, _)| name == issuer) {
                    if !signed.any(|(name, _)| name == issuer) {
                        return Err("a list in it is not signed by the root that it names");
                    }
                } else {
                    misnamed.extend(signed.map(|(name, _)| (name.clone(), Arc::clone(list))));
                }
            }
        }
        for (name, list) in misnamed {
            self.0.entry(name).or_default().push(list);
        }
        Ok(self)
    }

    /// Whether the signer has taken back the certificate of this serial number.
    pub fn check(
        &self,
        issuer: &[u8],
        serial: &[u8],
        is_leaf: bool,
        signer: &Signer,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Result<(), Refusal> {
        if self.0.is_empty() {
            return Ok(());
        }
        let Some(lists) = self.0.get(&comparable(issuer)) else { return Ok(()) };
        let (mut is_known, mut may_be_known) = (false, false);
        for list in lists {
            if !list.is_signed_by(signer, algorithms) {
                may_be_known |= list.may_be_of(signer);
                continue;
            }
            is_known = true;
            if !matches!(list.revoked.find_serial(serial), Ok(None)) {
                return Err(Refusal::Revoked { is_leaf });
            }
        }
        if (is_known || may_be_known) && !signer.signs_lists {
            return Err(Refusal::List("is signed by a CA that may not sign lists (its key usage lacks cRLSign)"));
        }
        if may_be_known && !is_known {
            return Err(Refusal::List("is not signed by the CA that it names"));
        }
        Ok(())
    }
}

impl List {
    fn from_der(der: &[u8]) -> Result<List, String> {
        let revoked =
            OwnedCertRevocationList::from_der(der).map_err(|error| format!("a list can't be read: {error}"))?;
        let unreadable = "a list can't be read";
        let (_, parsed) = CertificateRevocationList::from_der(der).map_err(|_| unreadable)?;
        let key_id = parsed.extensions().iter().find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::AuthorityKeyIdentifier(id) => id.key_identifier.as_ref().map(|id| id.0.to_vec()),
            _ => None,
        });
        let next_update = parsed.next_update().map_or(0, |time| u64::try_from(time.timestamp()).unwrap_or_default());
        let (signed, algorithm, signature) = parts(der).ok_or(unreadable)?;
        let revoked = CertRevocationList::from(revoked);
        Ok(List { revoked, key_id, next_update, signed, algorithm, signature, keys: Mutex::default() })
    }

    /// Of two keys of one name, the list may say which it is of: asked only where its signature is not this signer's.
    fn may_be_of(&self, signer: &Signer) -> bool {
        match (&self.key_id, &signer.key_id) {
            (Some(own), Some(key_id)) => own == key_id,
            _ => true,
        }
    }

    fn is_signed_by(&self, signer: &Signer, algorithms: &WebPkiSupportedAlgorithms) -> bool {
        if let Some((_, is_signed)) = self.keys.lock().iter().find(|(key, _)| *key == signer.key) {
            return *is_signed;
        }
        let key = SubjectPublicKeyInfoDer::from(signer.key.as_slice());
        let is_signed = RawPublicKeyEntity::try_from(&key).is_ok_and(|key| {
            let mut fitting =
                algorithms.all.iter().filter(|algorithm| algorithm.signature_alg_id().as_ref() == self.algorithm);
            fitting.any(|algorithm| key.verify_signature(*algorithm, &self.signed, &self.signature).is_ok())
        });
        let mut keys = self.keys.lock();
        if keys.len() >= MAX_KEYS {
            keys.clear();
        }
        keys.push((signer.key.clone(), is_signed));
        is_signed
    }
}

/// What is signed, by which algorithm (as webpki names it, without tag and length), and the signature.
fn parts(der: &[u8]) -> Option<(Vec<u8>, Vec<u8>, Vec<u8>)> {
    let (_, outer) = Any::from_der(der).ok()?;
    let (after, _) = Any::from_der(outer.data).ok()?;
    let signed = outer.data.get(..outer.data.len().checked_sub(after.len())?)?;
    let (after, algorithm) = Any::from_der(after).ok()?;
    let (_, signature) = Any::from_der(after).ok()?;
    // The first byte of a bit string counts the bits that are missing at its end: none.
    let (0, signature) = signature.data.split_first().map(|(unused, rest)| (*unused, rest))? else { return None };
    Some((signed.to_vec(), algorithm.data.to_vec(), signature.to_vec()))
}

mod name;
#[cfg(test)]
mod tests;
