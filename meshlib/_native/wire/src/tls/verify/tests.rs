#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType, PKCS_ECDSA_P384_SHA384, PKCS_ED25519,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::CertificateDer;

use super::{read_leaf, Peer, Refusal, Side, Verifier};
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
fn without_a_subject_the_names_are_critical() {
    let court = Court::new();
    let name = b"spiffe://td/a";
    let mut content = vec![0x30, name.len() as u8 + 2, 0x86, name.len() as u8];
    content.extend_from_slice(name);
    let with = |subject: Option<&'static str>| {
        court.issue(|leaf| {
            leaf.uris = vec![];
            leaf.subject = subject;
            leaf.extensions = vec![CustomExtension::from_oid_content(&[2, 5, 29, 17], content.clone())];
        })
    };
    let why = "its subject is empty, and its subject alternative name is not critical";
    assert_eq!(Err(Refusal::NotAnSvid(why.into())), with(None));
    assert!(with(Some("a")).is_ok());
}

#[test]
fn an_extension_that_can_not_be_read_is_not_an_absent_one() {
    let court = Court::new();
    for (number, what) in [(19, "basic constraints"), (15, "key usage"), (37, "extended key usage")] {
        let why = court.objection(|leaf| {
            leaf.is_ca = IsCa::NoCa;
            leaf.extensions = vec![CustomExtension::from_oid_content(&[2, 5, 29, number], vec![5, 0])];
            match number {
                15 => leaf.usages = vec![],
                37 => leaf.purposes = vec![],
                _ => {}
            }
        });
        assert_eq!(format!("its {what} can't be read"), why);
    }
}

#[test]
fn keys_of_p256_p384_and_ed25519_are_taken() {
    let court = Court::new();
    for algorithm in [&PKCS_ECDSA_P384_SHA384, &PKCS_ED25519] {
        assert!(court.issue(|leaf| leaf.algorithm = algorithm).is_ok(), "{algorithm:?}");
    }
    let root = Authority::of(KeyPair::generate_for(&PKCS_ED25519).unwrap(), |_| ());
    let verifier = Verifier::new(Side::Clients, testing::bundles(&[("td", &root.root)]), &provider());
    let svid = chain(&root.svid("spiffe://td/a"));
    assert!(verifier.verify_again(&svid, "", court.clock.now()).is_ok());
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
    let svid = chain(&root.svid("spiffe://td/a"));
    let judge = |ends: &[u64], now: u64| {
        let pem: String = ends.iter().map(|end| root.root_until(*end)).collect();
        let clock = Clock::new();
        clock.advance(now - START);
        let verifier = Verifier::new(Side::Servers, testing::bundles(&[("td", &pem)]), &provider());
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

/// The objection to an intermediate, if there is one.
fn objection_to_intermediate(change: impl FnOnce(&mut CertificateParams)) -> Option<&'static str> {
    let court = Court::new();
    let between = court.root.below(KeyPair::generate().unwrap(), |params| {
        params.distinguished_name.push(DnType::CommonName, "between");
        change(params);
    });
    match court.judge(&between.svid("spiffe://td/a"), "") {
        Err(Refusal::Intermediate(why)) => Some(why),
        Ok(_) => None,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_intermediate_may_sign_and_says_so() {
    use KeyUsagePurpose::{CrlSign, DigitalSignature, KeyCertSign};
    let with = |usages: Vec<_>| objection_to_intermediate(|params| params.key_usages = usages);
    assert_eq!(None, with(vec![KeyCertSign]));
    assert_eq!(None, with(vec![KeyCertSign, CrlSign, DigitalSignature]));
    assert_eq!(Some("has no key usage"), with(vec![]));
    assert_eq!(Some("may not sign certificates (its key usage lacks keyCertSign)"), with(vec![CrlSign]));
    let not_critical = objection_to_intermediate(|params| {
        params.key_usages = vec![];
        params.custom_extensions = vec![CustomExtension::from_oid_content(&[2, 5, 29, 15], vec![3, 2, 2, 4])];
    });
    assert_eq!(Some("has a key usage that is not critical"), not_critical);
}

#[test]
fn an_intermediate_is_of_the_trust_domain_if_it_is_of_any() {
    let with = |uri: &str| {
        objection_to_intermediate(|params| params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())])
    };
    assert_eq!(None, with("spiffe://td"));
    assert_eq!(Some("is of another trust domain"), with("spiffe://td2"));
    assert_eq!(Some("has the SPIFFE ID of a workload"), with("spiffe://td/ca"));
    assert_eq!(Some("has a URI name that is no SPIFFE ID"), with("https://td"));
}

#[test]
fn an_id_without_path_never_authenticates_whoever_shows_it() {
    let root = Authority::of(KeyPair::generate().unwrap(), |params| {
        params.subject_alt_names = vec![SanType::URI("spiffe://td".try_into().unwrap())];
    });
    let verifier = Verifier::new(Side::Clients, testing::bundles(&[("td", &root.root)]), &provider());
    let own = CertificateDer::from_pem_slice(root.root.as_bytes()).unwrap();
    let why = "its SPIFFE ID names a trust domain, not a workload";
    assert_eq!(Err(Refusal::NotAnSvid(why.into())), verifier.verify(&[&own], "", Clock::new().now()));
}

#[test]
fn a_root_is_held_to_what_it_says_of_itself() {
    let load = |change: &dyn Fn(&mut CertificateParams)| {
        let root = Authority::of(KeyPair::generate().unwrap(), change);
        crate::tls::bundles([("td", root.root.as_bytes())], []).map(|_| ()).map_err(|error| error.message.into_owned())
    };
    let named =
        |uri: &'static str| load(&move |params| params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())]);
    let unusable = |why: &str| Err(format!("The bundle of the trust domain \"td\" can't be used: one of its {why}."));
    assert_eq!(Ok(()), load(&|_| ()));
    assert_eq!(Ok(()), load(&|params| params.key_usages = vec![]));
    assert_eq!(Ok(()), named("spiffe://td"));
    assert_eq!(unusable("CAs is of another trust domain"), named("spiffe://td2"));
    assert_eq!(unusable("CAs has the SPIFFE ID of a workload"), named("spiffe://td/ca"));
    assert_eq!(unusable("certificates is not a CA"), load(&|params| params.is_ca = IsCa::ExplicitNoCa));
    assert_eq!(
        unusable("CAs may not sign certificates (its key usage lacks keyCertSign)"),
        load(&|params| params.key_usages = vec![KeyUsagePurpose::CrlSign])
    );
    let insisting = load(&|params| {
        let mut unknown = CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0]);
        unknown.set_criticality(true);
        params.custom_extensions = vec![unknown];
    });
    assert_eq!(unusable("CAs has a critical extension that we don't understand"), insisting);
}

#[test]
fn the_length_that_a_root_allows_counts() {
    let root = Authority::of(KeyPair::generate().unwrap(), |params| {
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.distinguished_name.push(DnType::CommonName, "root");
    });
    let verifier = Verifier::new(Side::Clients, testing::bundles(&[("td", &root.root)]), &provider());
    let judge = |issued: &Issued| verifier.verify_again(&chain(issued), "", Clock::new().now()).map(|_| ());
    assert_eq!(Ok(()), judge(&root.svid("spiffe://td/a")));
    let below = root.intermediate("below", BasicConstraints::Unconstrained);
    let too_long = Err(Refusal::Chain(webpki::Error::PathLenConstraintViolated));
    assert_eq!(too_long, judge(&below.svid("spiffe://td/a")));
    // A CA that hands over to its next key, under its own name, is no further one.
    let next = root.intermediate("root", BasicConstraints::Unconstrained);
    assert_eq!(Ok(()), judge(&next.svid("spiffe://td/a")));
}

/// What makes path building take longest: each certificate could be above each other one.
#[test]
fn a_chain_made_to_be_searched_for_long_runs_into_a_limit() {
    let court = Court::new();
    let key = || KeyPair::generate().unwrap();
    let name = |params: &mut CertificateParams| params.distinguished_name.push(DnType::CommonName, "root");
    let mut shown = chain(&court.root.below(key(), name).svid("spiffe://td/a"));
    for _ in 0..6 {
        let another = court.root.below(key(), name).svid("spiffe://td/a");
        shown.push(chain(&another).remove(1));
    }
    // The right one is among them: it is found.
    let judge = |shown: &[CertificateDer<'static>]| {
        court.verifier.verify(&shown.iter().collect::<Vec<_>>(), "", court.clock.now()).map(|_| ())
    };
    assert_eq!((8, Ok(())), (shown.len(), judge(&shown)));
    shown[0] = chain(&Authority::of(key(), name).below(key(), name).svid("spiffe://td/a")).remove(0);
    assert_eq!(Err(Refusal::Chain(webpki::Error::MaximumSignatureChecksExceeded)), judge(&shown));
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
