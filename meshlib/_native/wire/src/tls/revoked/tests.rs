#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
use rcgen::{BasicConstraints, DnType, DnValue, KeyIdMethod, KeyPair, KeyUsagePurpose, RevocationReason};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::CertificateDer;

use crate::testing::{self, leaf, moment, revoked_at, Authority, Clock, Issued, Leaf, HOUR, START};
use crate::tls::verify::{Refusal, Side, Verifier};
use crate::tls::{bundles, provider};

/// The answer to a peer of trust domain td, by this bundle and these lists.
fn judge(bundle: &str, lists: &str, issued: &Issued) -> Result<(), Refusal> {
    judge_at(START, bundle, lists, issued)
}

fn judge_at(now: u64, bundle: &str, lists: &str, issued: &Issued) -> Result<(), Refusal> {
    let loaded = bundles([("td", bundle.as_bytes())], [("td", lists.as_bytes())]).unwrap();
    let verifier = Verifier::new(Side::Clients, loaded, &provider());
    let chain: Vec<_> = CertificateDer::pem_slice_iter(issued.chain.as_bytes()).map(|der| der.unwrap()).collect();
    let clock = Clock::new();
    clock.advance(now - START);
    verifier.verify_again(&chain, "", clock.now()).map(|_| ())
}

fn load(bundle: &str, lists: &str) -> String {
    let error = bundles([("td", bundle.as_bytes())], [("td", lists.as_bytes())]).err().unwrap();
    let before = "The list of revoked certificates of the trust domain \"td\" can't be used: ";
    error.message.strip_prefix(before).unwrap_or_else(|| panic!("{error}")).to_owned()
}

fn svid(authority: &Authority, serial: u64) -> Issued {
    authority.issue(Leaf { serial: Some(serial), ..leaf("spiffe://td/a") })
}

/// A list with another key identifier than that of its issuer.
fn of_other_id(authority: &Authority, revoked: &[u64]) -> String {
    authority.list(revoked, |list| list.key_identifier_method = KeyIdMethod::PreSpecified(vec![9; 20]))
}

/// Another name for the same key.
fn renamed(authority: &Authority, name: impl Into<DnValue>) -> Authority {
    Authority::of(KeyPair::from_pem(&authority.key).unwrap(), |params| {
        params.distinguished_name.push(DnType::CommonName, name);
    })
}

const UNSIGNED: &str = "a list in it is not signed by the root that it names.";
const REVOKED: Result<(), Refusal> = Err(Refusal::Revoked { is_leaf: true });

#[test]
fn what_is_listed_is_refused_and_nothing_else() {
    let root = Authority::new("root");
    let list = root.list(&[7, 300], |_| ());
    assert_eq!(REVOKED, judge(&root.root, &list, &svid(&root, 7)));
    assert_eq!(REVOKED, judge(&root.root, &list, &svid(&root, 300)));
    assert_eq!(Ok(()), judge(&root.root, &list, &svid(&root, 8)));
    assert_eq!(Ok(()), judge(&root.root, &root.list(&[], |_| ()), &svid(&root, 7)));
}

#[test]
fn intermediates_are_taken_back_too() {
    let root = Authority::new("root");
    let between = |serial: u64| {
        root.below(KeyPair::generate().unwrap(), |params| {
            params.distinguished_name.push(DnType::CommonName, "between");
            params.serial_number = Some(serial.into());
        })
    };
    let list = root.list(&[7], |_| ());
    assert_eq!(Err(Refusal::Revoked { is_leaf: false }), judge(&root.root, &list, &svid(&between(7), 1)));
    assert_eq!(Ok(()), judge(&root.root, &list, &svid(&between(8), 1)));
    // A serial number is one of its issuer: the root's 7 is not the intermediate's.
    assert_eq!(Ok(()), judge(&root.root, &list, &svid(&between(8), 7)));
    let own = between(8);
    let both = format!("{list}{}", own.list(&[1], |_| ()));
    assert_eq!(REVOKED, judge(&root.root, &both, &svid(&own, 1)));
    assert_eq!(Ok(()), judge(&root.root, &both, &svid(&own, 2)));
}

#[test]
fn an_issuer_without_a_list_has_revoked_nothing() {
    let root = Authority::new("root");
    let between = root.intermediate("between", BasicConstraints::Constrained(0));
    assert_eq!(Ok(()), judge(&root.root, &between.list(&[1], |_| ()), &svid(&root, 1)));
    let stranger = Authority::new("stranger");
    assert_eq!(Ok(()), judge(&root.root, &stranger.list(&[1], |_| ()), &svid(&root, 1)));
}

#[test]
fn each_list_of_an_issuer_counts_the_old_and_the_new() {
    let root = Authority::new("root");
    let (old, new) = (root.list(&[1], |_| ()), root.list(&[1, 2], |list| list.crl_number = 2.into()));
    for lists in [format!("{old}{new}"), format!("{new}{old}")] {
        assert_eq!(REVOKED, judge(&root.root, &lists, &svid(&root, 2)));
        assert_eq!(Ok(()), judge(&root.root, &lists, &svid(&root, 3)));
    }
}

#[test]
fn of_two_keys_of_one_name_each_has_its_own_list() {
    let (old, new) = (Authority::new("root"), Authority::new("root"));
    let bundle = format!("{}{}", old.root, new.root);
    let of_old = old.list(&[1], |_| ());
    assert_eq!(REVOKED, judge(&bundle, &of_old, &svid(&old, 1)));
    assert_eq!(Ok(()), judge(&bundle, &of_old, &svid(&new, 1)));

    // Where the identifiers don't tell the keys apart, the signatures do.
    let same = || KeyIdMethod::PreSpecified(vec![1, 2, 3]);
    let named = || {
        Authority::of(KeyPair::generate().unwrap(), |params| {
            params.distinguished_name.push(DnType::CommonName, "root");
            params.key_identifier_method = same();
        })
    };
    let list =
        |authority: &Authority, serial: u64| authority.list(&[serial], |list| list.key_identifier_method = same());
    let (old, new) = (named(), named());
    let bundle = format!("{}{}", old.root, new.root);
    let both = format!("{}{}", list(&old, 1), list(&new, 2));
    assert_eq!([REVOKED, Ok(())], [1, 2].map(|serial| judge(&bundle, &both, &svid(&old, serial))));
    assert_eq!([Ok(()), REVOKED], [1, 2].map(|serial| judge(&bundle, &both, &svid(&new, serial))));
    assert_eq!(UNSIGNED, load(&old.root, &both));
}

#[test]
fn a_key_identifier_takes_no_list_away_from_who_signed_it() {
    let root = Authority::new("root");
    assert_eq!(REVOKED, judge(&root.root, &of_other_id(&root, &[1]), &svid(&root, 1)));
    assert_eq!(Ok(()), judge(&root.root, &of_other_id(&root, &[1]), &svid(&root, 2)));
    let between = root.intermediate("between", BasicConstraints::Unconstrained);
    assert_eq!(REVOKED, judge(&root.root, &of_other_id(&between, &[1]), &svid(&between, 1)));

    // Nor from a root whose own identifier is not a hash of its key.
    let key = KeyPair::from_pem(&root.key).unwrap();
    let own = Authority::of(key, |params| {
        params.distinguished_name.push(DnType::CommonName, "root");
        params.key_identifier_method = KeyIdMethod::PreSpecified(vec![1; 20]);
    });
    assert_eq!(REVOKED, judge(&own.root, &root.list(&[1], |_| ()), &svid(&own, 1)));
}

#[test]
fn a_list_in_the_name_of_a_root_that_none_of_that_name_signed_is_not_loaded_whatever_its_key_identifier() {
    let (root, stranger) = (Authority::new("root"), Authority::new("root"));
    assert_eq!(UNSIGNED, load(&root.root, &of_other_id(&stranger, &[1])));
    assert_eq!(UNSIGNED, load(&root.root, &stranger.list(&[1], |_| ())));
    let good = root.list(&[1], |_| ());
    assert_eq!(
        UNSIGNED,
        load(&root.root, &format!("{good}{}", of_other_id(&stranger, &[]))),
        "not even beside a good one"
    );
    let spelt = renamed(&stranger, DnValue::PrintableString("ROOT".try_into().unwrap()));
    assert_eq!(UNSIGNED, load(&root.root, &spelt.list(&[1], |_| ())));
    // A root of another name can't sign for it.
    let other = Authority::new("other");
    let both = format!("{}{}", root.root, other.root);
    assert_eq!(UNSIGNED, load(&both, &renamed(&other, "root").list(&[1], |_| ())));
}

#[test]
fn a_list_counts_however_the_name_of_its_issuer_is_written() {
    let root = Authority::new("My root");
    let printable = |name: &str| DnValue::PrintableString(name.try_into().unwrap());
    for name in [printable("My root"), DnValue::Utf8String("MY  Root".into()), printable("my root ")] {
        let list = renamed(&root, name.clone()).list(&[1], |_| ());
        assert_eq!(REVOKED, judge(&root.root, &list, &svid(&root, 1)), "{name:?}");
        assert_eq!(Ok(()), judge(&root.root, &list, &svid(&root, 2)), "{name:?}");
    }
}

#[test]
fn what_a_root_signed_under_another_name_counts_for_it() {
    let (root, other) = (Authority::new("root"), Authority::new("other"));
    let bundle = format!("{}{}", root.root, other.root);
    let list = renamed(&root, "nobody").list(&[1], |_| ());
    assert_eq!(REVOKED, judge(&bundle, &list, &svid(&root, 1)));
    assert_eq!(Ok(()), judge(&bundle, &list, &svid(&root, 2)));
    assert_eq!(Ok(()), judge(&bundle, &list, &svid(&other, 1)));
}

#[test]
fn a_list_of_a_root_that_was_rotated_away_keeps_no_bundle_out() {
    let (old, new) = (Authority::new("root 1"), Authority::new("root 2"));
    let left_over = old.list(&[1], |_| ());
    let both = format!("{left_over}{}", new.list(&[2], |_| ()));
    assert_eq!(Ok(()), judge(&new.root, &left_over, &svid(&new, 1)));
    assert_eq!([Ok(()), REVOKED], [1, 2].map(|serial| judge(&new.root, &both, &svid(&new, serial))));
}

#[test]
fn an_old_list_goes_on_counting() {
    let root = Authority::new("root");
    let list = root.list(&[1], |list| list.next_update = moment(START + HOUR).into());
    let later = START + 2 * HOUR;
    assert_eq!(REVOKED, judge_at(later, &root.root, &list, &svid(&root, 1)));
    assert_eq!(Ok(()), judge_at(later, &root.root, &list, &svid(&root, 2)));
    let until = |lists: &str| {
        let loaded = bundles([("td", root.root.as_bytes())], [("td", lists.as_bytes())]).unwrap();
        Verifier::new(Side::Servers, loaded, &provider()).lists_until()
    };
    assert_eq!(Some(START + HOUR), until(&format!("{}{list}", root.list(&[], |_| ()))));
    assert_eq!(None, Verifier::new(Side::Servers, testing::bundles(&[("td", &root.root)]), &provider()).lists_until());
}

#[test]
fn a_certificate_on_hold_is_revoked() {
    let root = Authority::new("root");
    let list = root.list(&[], |list| {
        let mut held = revoked_at(1, START);
        held.reason_code = Some(RevocationReason::CertificateHold);
        list.revoked_certs.push(held);
    });
    assert_eq!(REVOKED, judge(&root.root, &list, &svid(&root, 1)));
}

#[test]
fn a_list_that_can_not_be_believed_is_refused_when_it_is_loaded() {
    let root = Authority::new("root");
    let list = root.list(&[1], |_| ());
    assert_eq!("it holds no list (X509 CRL).", load(&root.root, ""));
    assert_eq!("it holds no list (X509 CRL).", load(&root.root, &root.root));
    assert_eq!("it is not PEM.", load(&root.root, &list.replace("-----END X509 CRL-----", "")));
    let garbage = "-----BEGIN X509 CRL-----\nMAA=\n-----END X509 CRL-----\n";
    assert!(load(&root.root, garbage).starts_with("a list can't be read"));
    assert!(
        load(&root.root, &format!("{list}{garbage}")).starts_with("a list can't be read"),
        "not even beside a good one"
    );

    let lines: Vec<&str> = list.trim_end().lines().collect();
    let mut forged: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
    let last = forged.len() - 2;
    let swapped = if forged[last].starts_with('A') { "B" } else { "A" };
    forged[last].replace_range(0..1, swapped);
    assert_eq!(UNSIGNED, load(&root.root, &forged.join("\n")));

    let error = bundles([("td", root.root.as_bytes())], [("tb", list.as_bytes())]).err().unwrap();
    assert!(error.message.ends_with("\"tb\" can't be used: there is no bundle of it."), "{error}");
}

#[test]
fn under_a_list_that_its_intermediate_did_not_sign_nobody_is_believed() {
    let root = Authority::new("root");
    let named = |key: KeyPair| {
        root.below(key, |params| {
            params.distinguished_name.push(DnType::CommonName, "between");
            // The same identifier for whatever key.
            params.key_identifier_method = KeyIdMethod::PreSpecified(vec![1, 2, 3]);
        })
    };
    let (right, wrong) = (named(KeyPair::generate().unwrap()), named(KeyPair::generate().unwrap()));
    let of_wrong = wrong.list(&[], |list| list.key_identifier_method = KeyIdMethod::PreSpecified(vec![1, 2, 3]));
    let refused = judge(&root.root, &of_wrong, &svid(&right, 1));
    assert_eq!(Err(Refusal::List("is not signed by the CA that it names")), refused);
    assert_eq!(Ok(()), judge(&root.root, &of_wrong, &svid(&wrong, 1)));
}

#[test]
fn only_who_may_sign_lists_can_revoke() {
    let root = Authority::new("root");
    let between = root.intermediate("between", BasicConstraints::Unconstrained);
    let list = between.list(&[], |_| ());
    assert_eq!(Ok(()), judge(&root.root, &list, &svid(&between, 1)));
    // The same name and key, without the right.
    let lesser = root.below(KeyPair::from_pem(&between.key).unwrap(), |params| {
        params.distinguished_name.push(DnType::CommonName, "between");
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    });
    let why = "is signed by a CA that may not sign lists (its key usage lacks cRLSign)";
    assert_eq!(Err(Refusal::List(why)), judge(&root.root, &list, &svid(&lesser, 1)));
}
