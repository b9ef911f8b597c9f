//! Invariant: a token that wasn't signed with the key is never accepted, and what a signed one must be to be accepted is read in it by
//! a reader that isn't ours, too. It has one spelling, and being remembered makes it neither younger nor another's.
//!
//! The first byte says whether the rest is a token, or header and claims (with 0xff between them), which are signed first.
use std::sync::{Arc, OnceLock};

use mesh_core::secure::jwt::{KeySet, Providers};
use ring::signature::{Ed25519KeyPair, KeyPair};
use serde_json::Value;

const WALL: f64 = 1_800_000_000.0;
const ISSUER: &str = "https://issuer";
const LEEWAY: f64 = 30.0;
const LONGEST: f64 = 3600.0;

struct World {
    key: Ed25519KeyPair,
    providers: Providers,
}

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let key = Ed25519KeyPair::from_seed_unchecked(&[7; 32]).expect("a seed of 32 bytes");
        let plan = serde_json::json!([{
            "name": "auth", "issuer": ISSUER, "audiences": ["orders"], "algorithms": ["EdDSA"], "leeway": LEEWAY, "longest": LONGEST,
            "from": [], "forward": false, "is_svid": false
        }, {
            "name": "mesh", "issuer": "shop.internal", "audiences": ["orders"], "algorithms": ["ES256"], "leeway": LEEWAY,
            "longest": LONGEST, "from": [], "forward": false, "is_svid": true
        }]);
        let plans: Vec<_> = serde_json::from_value(plan).expect("a plan");
        let providers = Providers::compile(&plans).expect("a good plan");
        let x = encoded(key.public_key().as_ref());
        let set = format!(r#"{{"keys":[{{"kty":"OKP","crv":"Ed25519","kid":"k1","x":"{x}"}}]}}"#);
        providers.set_keys("auth", Some(Arc::new(KeySet::parse(set.as_bytes()).expect("a set").0)));
        World { key, providers }
    })
}

pub fn check(input: &[u8]) {
    let Some((kind, rest)) = input.split_first() else { return };
    let World { key, providers } = world();
    if kind & 1 == 0 {
        assert!(providers.verify(rest, WALL).is_err(), "nobody has signed it");
        return;
    }
    let (header, claims) = match rest.iter().position(|byte| *byte == 0xff) {
        Some(place) => (&rest[..place], &rest[place + 1..]),
        None => (br#"{"alg":"EdDSA","kid":"k1"}"#.as_slice(), rest),
    };
    let message = format!("{}.{}", encoded(header), encoded(claims));
    let token = format!("{message}.{}", encoded(key.sign(message.as_bytes()).as_ref()));
    let Ok(found) = providers.verify(token.as_bytes(), WALL) else { return };

    let header: Value = serde_json::from_slice(header).expect("JSON");
    assert!(header["alg"] == "EdDSA" && (header.get("kid").is_none() || header["kid"] == "k1"));
    assert!(["crit", "zip", "b64"].iter().all(|name| header.get(name).is_none()));
    let read: Value = serde_json::from_slice(claims).expect("JSON");
    assert_eq!((read["iss"].as_str(), found.issuer()), (Some(ISSUER), ISSUER));
    assert!(read["aud"] == "orders" || read["aud"].as_array().is_some_and(|list| list.contains(&"orders".into())));
    assert_eq!(read.get("sub").map_or(Some(""), Value::as_str), Some(found.subject()));
    assert_eq!(found.json().as_bytes(), claims);
    let expires = read["exp"].as_f64().expect("a number");
    assert!(WALL < expires + LEEWAY && expires <= WALL + LONGEST + 2.0 * LEEWAY);
    assert!(["nbf", "iat"]
        .iter()
        .all(|name| read.get(name).is_none_or(|time| time.as_f64().expect("a number") <= WALL + LEEWAY)));

    let again = providers.verify(token.as_bytes(), WALL).expect("it was good a moment ago");
    assert!(Arc::ptr_eq(&found, &again));
    assert!(providers.verify(token.as_bytes(), expires + LEEWAY).is_err());
    for other in [format!("{token}="), format!("{token}."), format!(" {token}"), token.to_lowercase(), message] {
        assert!(other == token || providers.verify(other.as_bytes(), WALL).is_err(), "{other}");
    }
}

fn encoded(bytes: &[u8]) -> String {
    const SIGNS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let bits = group.iter().fold(0, |bits: u32, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        (0..=group.len()).for_each(|n| text.push(char::from(SIGNS[(bits >> (18 - 6 * n) & 63) as usize])));
    }
    text
}
