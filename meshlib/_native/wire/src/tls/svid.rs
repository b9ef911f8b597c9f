//! Is this certificate an X509-SVID, or one that may stand above an SVID? What must hold for one certificate alone.
//!
//! rustls-webpki verifies paths, but can't read URI names and asks nothing about key usage; the SPIFFE crates still check a DNS
//! name. So the rules of X509-SVID (sections 2 to 5) that concern one certificate are here, in our own reading: exactly one URI
//! name, the SPIFFE ID of a workload; no right to sign anything. A DNS name or a CN is never looked at.
//!
//! An extension that is there and can't be read is a reason to refuse, never taken for one that is absent.
use rustls::pki_types::{CertificateDer, TrustAnchor};
use x509_parser::certificate::BasicExtension;
use x509_parser::extensions::{BasicConstraints, GeneralName, KeyUsage, ParsedExtension};
use x509_parser::oid_registry::{
    Oid, OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384, OID_PKCS1_RSAENCRYPTION, OID_SIG_ED25519,
    OID_X509_EXT_BASIC_CONSTRAINTS, OID_X509_EXT_KEY_USAGE, OID_X509_EXT_NAME_CONSTRAINTS,
    OID_X509_EXT_SUBJECT_ALT_NAME, OID_X509_EXT_SUBJECT_KEY_IDENTIFIER,
};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::public_key::PublicKey;

use crate::spiffe;
use crate::tls::verify::{Peer, Refusal};

/// Bits of an RSA key: what the signatures of TLS can be verified with.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;
/// A subject with nothing in it.
const EMPTY_NAME: [u8; 2] = [0x30, 0];
/// What a root may say and insist on: of an anchor, webpki keeps name, key and name constraints, and the rest is ours to heed.
const UNDERSTOOD: [Oid<'static>; 4] = [
    OID_X509_EXT_BASIC_CONSTRAINTS,
    OID_X509_EXT_KEY_USAGE,
    OID_X509_EXT_NAME_CONSTRAINTS,
    OID_X509_EXT_SUBJECT_ALT_NAME,
];

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
            GeneralName::DirectoryName(name) => name.iter_attributes().any(|part| part.as_slice().contains(&0)),
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
    // Without a subject the names are all that it says, and who can't read them must refuse it too.
    if !names.critical && certificate.subject().as_raw() == EMPTY_NAME {
        return Err(refused("its subject is empty, and its subject alternative name is not critical"));
    }

    let constraints = basic_constraints(&certificate).map_err(|()| refused("its basic constraints can't be read"))?;
    if constraints.is_some_and(|constraints| constraints.ca) {
        return Err(refused("it is a signing certificate (cA is true)"));
    }
    let usage = key_usage(&certificate).map_err(refused)?.ok_or_else(|| refused("it has no key usage"))?;
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
    if !has_good_key(&certificate) {
        return Err(refused("its key is none of ECDSA P-256 and P-384, Ed25519, and RSA of 2048 to 8192 bits"));
    }
    let (not_before, not_after) = validity(&certificate);
    Ok(Peer { id: uri.to_owned(), not_before, not_after })
}

/// What a path is judged by in a certificate above the leaf.
#[derive(Debug)]
pub struct Signer {
    pub not_before: u64,
    pub not_after: u64,
    pub path_length: Option<u32>,
    /// Its subject key identifier: by that a list of revoked certificates says which key of a name it is of.
    pub key_id: Option<Vec<u8>>,
    /// Whether it may sign such lists.
    pub signs_lists: bool,
    /// Named by its own name: such a certificate hands a CA over to its new key, and does not count for the length of a path.
    pub is_self_issued: bool,
    /// Its key as it stands in the certificate.
    pub key: Vec<u8>,
}

/// Reads a signing certificate between leaf and root. If it must be of a trust domain, it is held to the rules of X509-SVID.
pub fn read_intermediate(der: &[u8], trust_domain: Option<&str>) -> Result<Signer, Refusal> {
    let refused = Refusal::Intermediate;
    let (_, certificate) = X509Certificate::from_der(der).map_err(|_| refused("can't be parsed"))?;
    let usage = key_usage(&certificate).map_err(|_| refused("has a key usage that can't be read"))?;
    if usage.as_ref().is_some_and(|usage| !usage.value.key_cert_sign()) {
        return Err(refused("may not sign certificates (its key usage lacks keyCertSign)"));
    }
    if let Some(trust_domain) = trust_domain {
        match &usage {
            None => return Err(refused("has no key usage")),
            Some(usage) if !usage.critical => return Err(refused("has a key usage that is not critical")),
            Some(_) => check_signer_names(&certificate, trust_domain).map_err(refused)?,
        }
    }
    signer(&certificate, usage.is_none_or(|usage| usage.value.crl_sign())).map_err(refused)
}

/// Reads a root. What stands in a bundle was put there by us, so that less is asked of it: it must be a CA, and must not say itself
/// that it can't be this one.
pub fn read_root(
    der: &CertificateDer<'_>,
    trust_domain: Option<&str>,
) -> Result<(TrustAnchor<'static>, Signer), String> {
    let not_a_ca = "one of its certificates is not a CA";
    let (_, certificate) = X509Certificate::from_der(der).map_err(|_| not_a_ca)?;
    if !basic_constraints(&certificate).is_ok_and(|constraints| constraints.is_some_and(|it| it.ca)) {
        return Err(not_a_ca.to_owned());
    }
    let is_understood = |oid: &Oid<'_>| UNDERSTOOD.iter().any(|known| known == oid);
    if certificate.extensions().iter().any(|extension| extension.critical && !is_understood(&extension.oid)) {
        return Err("one of its CAs has a critical extension that we don't understand".to_owned());
    }
    let usage = key_usage(&certificate)?;
    if usage.as_ref().is_some_and(|usage| !usage.value.key_cert_sign()) {
        return Err("one of its CAs may not sign certificates (its key usage lacks keyCertSign)".to_owned());
    }
    if let Some(trust_domain) = trust_domain {
        check_signer_names(&certificate, trust_domain).map_err(|why| format!("one of its CAs {why}"))?;
    }
    let anchor = webpki::anchor_from_trusted_cert(der).map_err(|error| error.to_string())?.to_owned();
    let signer = signer(&certificate, usage.is_none_or(|usage| usage.value.crl_sign()))?;
    Ok((anchor, signer))
}

/// A signing certificate needs no SPIFFE ID; one that has any has that of its trust domain, and none of a workload.
fn check_signer_names(certificate: &X509Certificate<'_>, trust_domain: &str) -> Result<(), &'static str> {
    let names = certificate.subject_alternative_name().map_err(|_| "has names that can't be read")?;
    for name in names.iter().flat_map(|names| &names.value.general_names) {
        let id = match name {
            GeneralName::URI(text) => spiffe::parse(text).map_err(|_| "has a URI name that is no SPIFFE ID")?,
            GeneralName::Invalid(..) => return Err("has a malformed name"),
            _ => continue,
        };
        if id.trust_domain != trust_domain {
            return Err("is of another trust domain");
        }
        if !id.path.is_empty() {
            return Err("has the SPIFFE ID of a workload");
        }
    }
    Ok(())
}

fn signer(certificate: &X509Certificate<'_>, signs_lists: bool) -> Result<Signer, &'static str> {
    let (not_before, not_after) = validity(certificate);
    let constraints = basic_constraints(certificate).map_err(|()| "has basic constraints that can't be read")?;
    let key_id = certificate
        .get_extension_unique(&OID_X509_EXT_SUBJECT_KEY_IDENTIFIER)
        .map_err(|_| "has more than one key identifier")?
        .and_then(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_vec()),
            _ => None,
        });
    Ok(Signer {
        not_before,
        not_after,
        path_length: constraints.and_then(|constraints| constraints.path_len_constraint),
        key_id,
        signs_lists,
        is_self_issued: certificate.subject().as_raw() == certificate.issuer().as_raw(),
        key: certificate.public_key().raw.to_vec(),
    })
}

/// The parser's own function takes constraints that it can't read for none.
fn basic_constraints<'a>(certificate: &'a X509Certificate<'_>) -> Result<Option<&'a BasicConstraints>, ()> {
    match certificate.get_extension_unique(&OID_X509_EXT_BASIC_CONSTRAINTS).map_err(|_| ())? {
        None => Ok(None),
        Some(extension) => match extension.parsed_extension() {
            ParsedExtension::BasicConstraints(constraints) => Ok(Some(constraints)),
            _ => Err(()),
        },
    }
}

fn key_usage<'a>(certificate: &'a X509Certificate<'_>) -> Result<Option<BasicExtension<&'a KeyUsage>>, &'static str> {
    certificate.key_usage().map_err(|_| "its key usage can't be read")
}

fn has_good_key(certificate: &X509Certificate<'_>) -> bool {
    let key = certificate.public_key();
    let kind = &key.algorithm.algorithm;
    if *kind == OID_SIG_ED25519 {
        return true;
    }
    if *kind == OID_KEY_TYPE_EC_PUBLIC_KEY {
        let curve = key.algorithm.parameters.as_ref().and_then(|parameters| Oid::try_from(parameters).ok());
        return curve.is_some_and(|curve| curve == OID_EC_P256 || curve == OID_NIST_EC_P384);
    }
    match key.parsed() {
        Ok(PublicKey::RSA(rsa)) if *kind == OID_PKCS1_RSAENCRYPTION => RSA_BITS.contains(&rsa.key_size()),
        _ => false,
    }
}

/// Unix seconds; times before 1970 count as 1970.
pub fn validity(certificate: &X509Certificate<'_>) -> (u64, u64) {
    let seconds = |time: i64| u64::try_from(time).unwrap_or_default();
    let validity = certificate.validity();
    (seconds(validity.not_before.timestamp()), seconds(validity.not_after.timestamp()))
}
