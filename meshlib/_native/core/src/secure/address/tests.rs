#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
use super::*;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn networks_hold_the_addresses_that_begin_alike() {
    for (network, inside, outside) in [
        ("10.0.0.0/8", "10.255.0.1", "11.0.0.1"),
        ("10.1.2.3/8", "10.255.0.1", "11.0.0.1"),
        ("10.0.0.1", "10.0.0.1", "10.0.0.2"),
        ("10.0.0.0/31", "10.0.0.1", "10.0.0.2"),
        ("2001:db8::/32", "2001:db8:1::1", "2001:db9::1"),
        ("::1", "::1", "::2"),
        ("0.0.0.0/0", "1.2.3.4", "::1"),
        ("::/0", "::1", "1.2.3.4"),
        // However it is written, it is IPv4.
        ("::ffff:10.0.0.0/104", "10.1.2.3", "11.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1", "10.0.0.2"),
        ("10.0.0.0/8", "::ffff:10.0.0.1", "::ffff:11.0.0.1"),
        ("10.0.0.0/8", "::ffff:a00:1", "::10.0.0.1"),
    ] {
        let cidr = Cidr::parse(network).unwrap();
        assert!(cidr.contains(ip(inside)), "{network} {inside}");
        assert!(!cidr.contains(ip(outside)), "{network} {outside}");
    }
}

#[test]
fn what_is_no_network_is_refused() {
    for text in [
        "",
        "10",
        "10.0.0",
        "10.0.0.0/",
        "10.0.0.0/33",
        "10.0.0.0/-1",
        "10.0.0.0/+8",
        "10.0.0.0/008x",
        "::/129",
        "010.0.0.1",
        "10.0.0.0/8/8",
        "localhost",
        "10.0.0.*",
        " 10.0.0.1",
        "[::1]",
        "fe80::1%eth0",
        "10.0.0.0/0x8",
        "10.0.0.0/1000",
    ] {
        assert!(Cidr::parse(text).is_err(), "{text}");
    }
}

#[test]
fn a_network_covers_the_smaller_ones_in_it() {
    let cidr = |text| Cidr::parse(text).unwrap();
    assert!(cidr("10.0.0.0/8").covers(&cidr("10.1.0.0/16")) && cidr("10.0.0.0/8").covers(&cidr("10.0.0.0/8")));
    assert!(!cidr("10.1.0.0/16").covers(&cidr("10.0.0.0/8")) && !cidr("::/0").covers(&cidr("10.0.0.0/8")));
    assert_eq!(cidr("10.1.2.3/8").to_string(), "10.0.0.0/8");
}

#[test]
fn addresses_are_read_as_proxies_write_them() {
    for (text, expected) in [
        ("1.2.3.4", "1.2.3.4"),
        (" 1.2.3.4\t", "1.2.3.4"),
        ("1.2.3.4:567", "1.2.3.4"),
        ("2001:db8::1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("[::ffff:a00:1]:80", "10.0.0.1"),
        ("fe80::1%eth0", "fe80::1"),
    ] {
        assert_eq!(parse(text), Some(ip(expected)), "{text}");
    }
    for text in [
        "",
        "unknown",
        "1.2.3",
        "1.2.3.4:",
        "1.2.3.4:x",
        "01.2.3.4",
        "1.2.3.4:567:8",
        "[1.2.3.4]",
        "[::1",
        "[::1]x",
        "1.2.3.4%a",
        "::1%",
    ] {
        assert_eq!(parse(text), None, "{text}");
    }
}

#[test]
fn the_client_is_the_nth_from_the_right_and_only_behind_a_trusted_proxy() {
    let proxy = "10.0.0.1";
    for (is_trusted, values, hops, expected) in [
        (false, &["1.2.3.4"][..], 1, proxy),
        (true, &["1.2.3.4"], 0, proxy),
        (true, &["1.2.3.4"], 1, "1.2.3.4"),
        // What the client itself wrote stands left of what the proxies wrote.
        (true, &["6.6.6.6, 1.2.3.4"], 1, "1.2.3.4"),
        (true, &["6.6.6.6, 1.2.3.4, 10.0.0.9"], 2, "1.2.3.4"),
        (true, &["6.6.6.6", "1.2.3.4,10.0.0.9"], 2, "1.2.3.4"),
        (true, &["1.2.3.4", "10.0.0.9"], 2, "1.2.3.4"),
        // Too short, or unreadable: the proxies are not what they were said to be.
        (true, &["1.2.3.4"], 3, proxy),
        (true, &[], 1, proxy),
        (true, &["1.2.3.4, unknown"], 1, proxy),
        (true, &["1.2.3.4,"], 1, proxy),
        (true, &["1.2.3.4, \u{e9}"], 1, proxy),
        (true, &["::ffff:10.2.0.1"], 1, "10.2.0.1"),
        (true, &["[2001:db8::7]:999"], 1, "2001:db8::7"),
    ] {
        let fields: Vec<&[u8]> = values.iter().map(|value| value.as_bytes()).collect();
        assert_eq!(client_of(Some(ip(proxy)), is_trusted, &fields, hops), Some(ip(expected)), "{values:?} {hops}");
    }
    assert_eq!(client_of(None, true, &[b"1.2.3.4"], 1), Some(ip("1.2.3.4")));
    assert_eq!(client_of(None, false, &[b"1.2.3.4"], 1), None);
    assert_eq!(client_of(Some(ip("::ffff:10.0.0.1")), false, &[], 1), Some(ip("10.0.0.1")));
    assert_eq!(client_of(Some(ip(proxy)), true, &[b"\xff\xfe"], 1), Some(ip(proxy)));
}

fn proxies(json: &str) -> Result<Proxies, Vec<String>> {
    Proxies::compile(&serde_json::from_str(json).unwrap())
}

#[test]
fn proxies_are_known_by_network_or_by_identity() {
    let known = proxies(
        r#"{"identities":[{"kind":"exact","value":"spiffe://td/ns/edge/sa/gateway"}],"cidrs":["10.0.0.0/8"],"hops":2}"#,
    )
    .unwrap();
    assert_eq!((known.hops(), known.is_empty()), (2, false));
    assert!(known.is_trusted(Some(ip("10.1.1.1")), None));
    assert!(known.is_trusted(Some(ip("::ffff:10.1.1.1")), None));
    assert!(known.is_trusted(None, Some("spiffe://td/ns/edge/sa/gateway")));
    assert!(!known.is_trusted(Some(ip("11.1.1.1")), Some("spiffe://td/ns/edge/sa/gateway2")));
    assert!(!known.is_trusted(None, None));
    let nobody = proxies(r#"{"identities":[],"cidrs":[],"hops":1}"#).unwrap();
    assert!(nobody.is_empty() && !nobody.is_trusted(Some(ip("127.0.0.1")), Some("spiffe://td/a")));
}

#[test]
fn nobody_may_believe_everybody() {
    let found = proxies(
        r#"{"identities":[{"kind":"any"},{"kind":"prefix","value":"spiffe://"},{"kind":"exact","value":"gateway"}],
            "cidrs":["0.0.0.0/0","::/0","x"],"hops":99}"#,
    )
    .unwrap_err();
    assert_eq!(found.len(), 7, "{found:?}");
    assert!(serde_json::from_str::<ProxiesPlan>(r#"{"identities":[],"cidrs":[]}"#).is_err());
    assert!(serde_json::from_str::<ProxiesPlan>(r#"{"identities":[],"cidrs":[],"hops":1,"trust":[]}"#).is_err());
}
