#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
use std::sync::Arc;

use rcgen::{BasicConstraints, CustomExtension, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::CertificateDer;

use super::{read_leaf, Peer, Refusal, Roots, Side, Verifier};
use crate::testing::{self, leaf, Authority, Clock, Issued, Leaf, HOUR, START};
use crate::tls::provider;

fn chain(issued: &Issued) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(issued.chain.as_bytes()).map(|der| der.unwrap()).collect()
}

/// Judges a chain against bundles of td (this root) and td2 (another one).
struct Court {
    root: Authority,
    verifier: Verifier,
    clock: Arc<Clock>,
}

impl Court {
    fn new() -> Court {
        let (root, other) = (Authority::new("root"), Authority::new("other"));
        let bundles = testing::bundles(&[("td", &root.root), ("td2", &other.root)]);
        Court { root, verifier: Verifier::new(Side::Clients, bundles, &provider()), clock: Clock::new() }
    }

    fn judge(&self, issued: &Issued, expected: &str) -> Result<Arc<Peer>, Refusal> {
        let chain = chain(issued);
        self.verifier.verify(&chain.iter().collect::<Vec<_>>(), expected, self.clock.now())
    }

    fn issue(&self, change: impl FnOnce(&mut Leaf)) -> Result<Arc<Peer>, Refusal> {
        let mut params = leaf("spiffe://td/a");
        change(&mut params);
        self.judge(&self.root.issue(params), "")
    }

    /// The reason why a leaf is no SVID.
    fn objection(&self, change: impl FnOnce(&mut Leaf)) -> String {
        match self.issue(change) {
            Err(Refusal::NotAnSvid(why)) => why,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_correct_svid_proves_its_id_and_its_life() {
    let peer = Court::new().issue(|_| ()).unwrap();
    let expected = Peer { id: "spiffe://td/a".into(), not_before: START - 60, not_after: START + 24 * HOUR };
    assert_eq!(expected, *peer);
}

#[test]
fn dns_names_and_missing_purposes_do_not_matter() {
    let court = Court::new();
    assert!(court.issue(|leaf| leaf.dns = vec!["other.example".into()]).is_ok());
    assert!(court.issue(|leaf| leaf.purposes = vec![]).is_ok());
}

#[test]
fn a_leaf_has_exactly_one_uri_name() {
    let court = Court::new();
    let with = |uris: &[&str]| {
        let uris = uris.iter().map(|uri| (*uri).to_owned()).collect();
        court.objection(|leaf| leaf.uris = uris)
    };
    assert_eq!("it has more than one URI name", with(&["spiffe://td/a", "https://x"]));
    assert_eq!("it has more than one URI name", with(&["spiffe://td/a", "spiffe://td/a"]));
    let none = court.objection(|leaf| {
        leaf.uris = vec![];
        leaf.dns = vec!["a.td".into()];
    });
    assert_eq!("it has no URI name", none);
    assert_eq!("it has no subject alternative name", court.objection(|leaf| leaf.uris = vec![]));
}

#[test]
fn its_uri_name_is_a_spiffe_id_of_a_workload() {
    let court = Court::new();
    for uri in ["https://td/a", "spiffe://td/", "spiffe://td//a", "spiffe://TD/a", "spiffe://td/a?x", "spiffe://td:1/a"]
    {
        let why = court.objection(|leaf| leaf.uris = vec![uri.into()]);
        assert!(why.starts_with("its URI name is no SPIFFE ID"), "{uri}: {why}");
    }
    let why = court.objection(|leaf| leaf.uris = vec!["spiffe://td".into()]);
    assert_eq!("its SPIFFE ID names a trust domain, not a workload", why);
}

#[test]
fn a_nul_in_any_name_is_refused() {
    let court = Court::new();
    let nul = "one of its names holds a NUL";
    assert_eq!(nul, court.objection(|leaf| leaf.uris = vec!["spiffe://td/a\0.evil".into()]));
    assert_eq!(nul, court.objection(|leaf| leaf.dns = vec!["a\0.evil".into()]));
}

#[test]
fn a_leaf_can_not_sign_and_says_so() {
    use KeyUsagePurpose::{CrlSign, DigitalSignature, KeyAgreement, KeyCertSign};
    let court = Court::new();
    let ca = court.objection(|leaf| leaf.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    assert_eq!("it is a signing certificate (cA is true)", ca);
    for (usages, why) in [
        (vec![], "it has no key usage"),
        (vec![KeyAgreement], "its key usage lacks digitalSignature"),
        (vec![DigitalSignature, CrlSign], "its key usage allows signing certificates"),
        (vec![DigitalSignature, KeyCertSign], "its key usage allows signing certificates"),
    ] {
        assert_eq!(why, court.objection(|leaf| leaf.usages = usages));
    }
    let not_critical = court.objection(|leaf| {
        leaf.usages = vec![];
        // keyUsage digitalSignature, without the critical flag that rcgen sets
        leaf.extensions = vec![CustomExtension::from_oid_content(&[2, 5, 29, 15], vec![3, 2, 7, 0x80])];
    });
    assert_eq!("its key usage is not critical", not_critical);
}

#[test]
fn purposes_if_given_are_both() {
    use ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
    let court = Court::new();
    for purposes in [vec![ServerAuth], vec![ClientAuth]] {
        let why = court.objection(|leaf| leaf.purposes = purposes);
        assert_eq!("its extended key usage lacks serverAuth or clientAuth", why);
    }
}

#[test]
fn an_unknown_critical_extension_is_refused() {
    let refused = Court::new().issue(|leaf| {
        let mut unknown = CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0]);
        unknown.set_criticality(true);
        leaf.extensions = vec![unknown];
    });
    assert_eq!(Err(Refusal::Chain(webpki::Error::UnsupportedCriticalExtension)), refused);
}

#[test]
fn only_the_bundle_of_its_own_trust_domain_can_vouch_for_a_leaf() {
    let court = Court::new();
    let with = |uri: &str| court.issue(|leaf| leaf.uris = vec![uri.into()]);
    assert_eq!(Err(Refusal::Chain(webpki::Error::UnknownIssuer)), with("spiffe://td2/a"));
    assert_eq!(Err(Refusal::NoBundle { id: "spiffe://td3/a".into() }), with("spiffe://td3/a"));
    assert_eq!(Err(Refusal::NoBundle { id: "spiffe://td.evil/a".into() }), with("spiffe://td.evil/a"));
    assert_eq!(Err(Refusal::NoBundle { id: "spiffe://t/a".into() }), with("spiffe://t/a"));
    let stranger = Authority::new("root").svid("spiffe://td/a");
    assert_eq!(Err(Refusal::Chain(webpki::Error::UnknownIssuer)), court.judge(&stranger, ""));
}

#[test]
fn the_expected_identity_is_compared_by_equality() {
    let court = Court::new();
    let svid = court.root.svid("spiffe://td/a");
    assert!(court.judge(&svid, "spiffe://td/a").is_ok());
    for expected in ["spiffe://td/A", "spiffe://td/a/", "spiffe://td/aa", "spiffe://td2/a", "spiffe://td/"] {
        let refusal = Refusal::WrongIdentity { id: "spiffe://td/a".into(), expected: expected.into() };
        assert_eq!(Err(refusal), court.judge(&svid, expected));
    }
}

#[test]
fn a_certificate_proves_nothing_before_or_after_its_life() {
    let court = Court::new();
    assert_eq!(Err(Refusal::NotYetValid), court.issue(|leaf| leaf.not_before = START + HOUR));
    assert_eq!(Err(Refusal::Expired), court.issue(|leaf| leaf.not_after = START - 1));
    let svid = court.root.svid("spiffe://td/a");
    court.clock.advance(24 * HOUR);
    assert!(court.judge(&svid, "").is_ok());
    court.clock.advance(1);
    assert_eq!(Err(Refusal::Expired), court.judge(&svid, ""));
}

#[test]
fn a_proof_ends_with_its_root_and_goes_on_with_one_of_the_same_key() {
    let root = Authority::new("root");
    let der = CertificateDer::from_pem_slice(root.root.as_bytes()).unwrap();
    let svid = chain(&root.svid("spiffe://td/a"));
    let judge = |ends: &[u64], now: u64| {
        let mut roots = Roots::default();
        for end in ends {
            roots.push(webpki::anchor_from_trusted_cert(&der).unwrap().to_owned(), *end);
        }
        let clock = Clock::new();
        clock.advance(now - START);
        let verifier = Verifier::new(Side::Servers, [("td".to_owned(), roots)].into_iter().collect(), &provider());
        verifier.verify_again(&svid, "", clock.now()).map(|peer| peer.not_after)
    };
    assert_eq!(Ok(START + HOUR), judge(&[START + HOUR], START));
    assert_eq!(Err(Refusal::Chain(webpki::Error::UnknownIssuer)), judge(&[START + HOUR], START + HOUR + 1));
    assert_eq!(Ok(START + 2 * HOUR), judge(&[START + HOUR, START + 2 * HOUR], START + HOUR + 1));
    assert_eq!(Ok(START + 24 * HOUR), judge(&[START + 48 * HOUR], START));
}

#[test]
fn chains_go_through_intermediates_within_limits() {
    let court = Court::new();
    let last = court.root.intermediate("i1", BasicConstraints::Constrained(0));
    assert!(court.judge(&last.svid("spiffe://td/a"), "").is_ok());
    let too_deep = last.intermediate("i2", BasicConstraints::Unconstrained);
    let refused = court.judge(&too_deep.svid("spiffe://td/a"), "");
    assert_eq!(Err(Refusal::Chain(webpki::Error::PathLenConstraintViolated)), refused);

    let mut authority = court.root.intermediate("i", BasicConstraints::Unconstrained);
    for length in 2..=9 {
        let answer = court.judge(&authority.svid("spiffe://td/a"), "");
        match length {
            // webpki's own limit is 6 signing certificates below the root
            ..=7 => assert!(answer.is_ok(), "{length}: {answer:?}"),
            8 => assert_eq!(Err(Refusal::Chain(webpki::Error::MaximumPathDepthExceeded)), answer),
            _ => assert_eq!(Err(Refusal::TooLong(9)), answer),
        }
        authority = authority.intermediate(&format!("i{length}"), BasicConstraints::Unconstrained);
    }
}

#[test]
fn garbage_is_no_certificate() {
    let der = chain(&Authority::new("root").svid("spiffe://td/a")).remove(0);
    assert!(read_leaf(&[]).is_err());
    assert!(read_leaf(&[&der[..], &[0]].concat()).is_err());
    for length in 0..der.len() {
        assert!(read_leaf(&der[..length]).is_err());
    }
}

#[test]
fn a_remembered_chain_is_judged_anew_by_time_and_identity() {
    let court = Court::new();
    let svid = chain(&court.root.svid("spiffe://td/a"));
    let again = |expected| court.verifier.verify_again(&svid, expected, court.clock.now());
    assert!(again("").is_ok());
    assert!(matches!(again("spiffe://td/b"), Err(Refusal::WrongIdentity { .. })));
    court.clock.advance(24 * HOUR + 1);
    assert_eq!(Err(Refusal::Expired), again(""));
    let stranger = chain(&Authority::new("root").svid("spiffe://td/a"));
    assert!(court.verifier.verify_again(&stranger, "", court.clock.now()).is_err());
}
