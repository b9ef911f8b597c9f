#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
use serde_json::{json, Value};

use super::*;
use crate::secure::crypto::signing::Signer;

const WALL: f64 = 1_800_000_000.0;
const ISSUER: &str = "https://issuer.example";

/// One provider, and the key that it signs with.
struct World {
    providers: Providers,
    signer: Signer,
}

fn plan(change: Value) -> ProviderPlan {
    let mut plan = json!({
        "name": "auth", "issuer": ISSUER, "audiences": ["orders"], "algorithms": ["ES256", "EdDSA"], "leeway": 30.0,
        "longest": 86400.0, "from": [{"kind": "header", "name": "authorization", "prefix": "Bearer "}],
        "forward": false, "is_svid": false
    });
    change.as_object().unwrap().iter().for_each(|(name, value)| plan[name] = value.clone());
    serde_json::from_value(plan).unwrap()
}

fn svid_plan() -> ProviderPlan {
    plan(json!({"name": "mesh", "issuer": "shop.internal", "algorithms": ["ES256"], "is_svid": true}))
}

fn jwk(signer: &Signer, change: Value) -> Value {
    let public = signer.public();
    let mut key = match signer {
        Signer::Es256(_) => {
            json!({"kty": "EC", "crv": "P-256", "x": encoded(&public[1..33]), "y": encoded(&public[33..])})
        }
        Signer::EdDsa(_) => json!({"kty": "OKP", "crv": "Ed25519", "x": encoded(public)}),
    };
    key["kid"] = "k1".into();
    change.as_object().unwrap().iter().for_each(|(name, value)| key[name] = value.clone());
    key
}

fn set_of(keys: &[Value]) -> Arc<KeySet> {
    Arc::new(KeySet::parse(json!({ "keys": keys }).to_string().as_bytes()).unwrap().0)
}

fn world_of(plan: ProviderPlan, key: Value) -> World {
    let (providers, signer) = (Providers::compile(&[plan]).unwrap(), Signer::es256());
    let name = providers.providers[0].name.clone();
    assert!(providers.set_keys(&name, Some(set_of(&[jwk(&signer, key)]))));
    World { providers, signer }
}

fn world() -> World {
    world_of(plan(json!({})), json!({}))
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

fn signed(signer: &Signer, header: &str, claims: &str) -> Vec<u8> {
    let message = format!("{}.{}", encoded(header.as_bytes()), encoded(claims.as_bytes()));
    format!("{message}.{}", encoded(&signer.sign(message.as_bytes()))).into_bytes()
}

/// The usual claims with these; null takes one away.
fn claims(change: Value) -> String {
    let mut claims = json!({"iss": ISSUER, "aud": "orders", "sub": "ada", "exp": WALL + 60.0});
    for (name, value) in change.as_object().unwrap() {
        match value {
            Value::String(text) if text == "(gone)" => drop(claims.as_object_mut().unwrap().remove(name)),
            value => claims[name] = value.clone(),
        }
    }
    claims.to_string()
}

const HEADER: &str = r#"{"alg":"ES256","kid":"k1"}"#;

impl World {
    fn claiming(&self, change: Value) -> Result<Arc<Claims>, TokenFault> {
        self.providers.verify(&signed(&self.signer, HEADER, &claims(change)), WALL)
    }

    fn with_header(&self, header: &str) -> Result<Arc<Claims>, TokenFault> {
        self.providers.verify(&signed(&self.signer, header, &claims(json!({}))), WALL)
    }
}

fn word(result: Result<Arc<Claims>, TokenFault>) -> &'static str {
    result.map_or_else(|fault| fault.word(), |_| "accepted")
}

#[test]
fn a_good_token_tells_what_it_claims() {
    let world = world();
    let extra = json!({"azp": "web", "aud": ["x", "orders"], "realm": {"roles": ["admin"]}, "exp": WALL + 60.5});
    let found = world.claiming(extra).unwrap();
    assert_eq!((found.issuer(), found.subject(), found.presenter()), (ISSUER, "ada", "web"));
    assert_eq!(found.principal(), "https://issuer.example/ada");
    assert_eq!(found.audiences(), ["x", "orders"]);
    assert_eq!(found.claim(&["realm", "roles"]), Some(&json!(["admin"])));
    assert_eq!(found.claim(&["realm", "roles", "0"]), None);
    assert_eq!((found.claim(&["nobody"]), found.claim(&[])), (None, None));
    assert_eq!((found.expires(), found.provider()), (1_800_000_060, 0));
    assert_eq!(serde_json::from_str::<Value>(found.json()).unwrap()["azp"], "web");
}

#[test]
fn without_a_subject_there_is_no_principal() {
    let world = world();
    assert_eq!(world.claiming(json!({"sub": "(gone)"})).unwrap().principal(), "");
    assert_eq!(world.claiming(json!({"sub": ""})).unwrap().principal(), "");
    assert_eq!(word(world.claiming(json!({"sub": 7}))), "claim");
}

#[test]
fn the_header_asks_for_nothing_that_is_not_known() {
    let world = world();
    for (header, expected) in [
        (HEADER, "accepted"),
        (r#"{"alg":"ES256"}"#, "accepted"),
        (r#"{"alg":"ES256","kid":"k1","typ":"jwt"}"#, "accepted"),
        (r#"{"alg":"ES256","kid":"k1","typ":"application/at+jwt"}"#, "accepted"),
        (r#"{"alg":"ES256","kid":"k1","jku":"https://evil","jwk":{},"x5c":[],"x5u":"x"}"#, "accepted"),
        (r#"{"alg":"ES256","kid":"k1","typ":"secevent+jwt"}"#, "header"),
        (r#"{"alg":"ES256","kid":"k1","typ":1}"#, "header"),
        (r#"{"alg":"ES256","kid":"k1","typ":"é"}"#, "header"),
        (r#"{"alg":"ES256","kid":"k1","crit":[]}"#, "header"),
        (r#"{"alg":"ES256","kid":"k1","crit":["exp"]}"#, "header"),
        (r#"{"alg":"ES256","kid":"k1","b64":true}"#, "header"),
        (r#"{"alg":"ES256","kid":"k1","zip":"DEF"}"#, "header"),
        (r#"{"alg":"ES256","kid":7}"#, "header"),
        (r#"{"alg":"ES256","kid":"k2"}"#, "unknown_key"),
        (r#"{"alg":"ES256","kid":""}"#, "unknown_key"),
        (r#"{"alg":"EdDSA","kid":"k1"}"#, "key"),
        (r#"{"alg":"ES384","kid":"k1"}"#, "algorithm"),
        (r#"{"alg":"HS256","kid":"k1"}"#, "algorithm"),
        (r#"{"alg":"none"}"#, "algorithm"),
        (r#"{"alg":"es256","kid":"k1"}"#, "algorithm"),
        (r#"{"alg":["ES256"],"kid":"k1"}"#, "header"),
        (r#"{"kid":"k1"}"#, "header"),
        (r#"{"alg":"ES256","alg":"ES256"}"#, "malformed"),
        (r#"["ES256"]"#, "malformed"),
        ("", "malformed"),
    ] {
        assert_eq!(word(world.with_header(header)), expected, "{header}");
    }
    let long = format!(r#"{{"alg":"ES256","kid":"{}"}}"#, "k".repeat(257));
    assert_eq!(word(world.with_header(&long)), "header");
}

#[test]
fn issuer_and_audience_are_compared_whole() {
    let world = world();
    for (change, expected) in [
        (json!({"iss": "https://issuer.exampl"}), "unknown_issuer"),
        (json!({"iss": "https://issuer.example/"}), "unknown_issuer"),
        (json!({"iss": "HTTPS://ISSUER.EXAMPLE"}), "unknown_issuer"),
        (json!({"iss": [ISSUER]}), "unknown_issuer"),
        (json!({"iss": "(gone)"}), "unknown_issuer"),
        (json!({"aud": ["x", "orders"]}), "accepted"),
        (json!({"aud": "order"}), "audience"),
        (json!({"aud": "orders "}), "audience"),
        (json!({"aud": "ORDERS"}), "audience"),
        (json!({"aud": []}), "audience"),
        (json!({"aud": ["orders", 7]}), "claim"),
        (json!({"aud": {"orders": 1}}), "claim"),
        (json!({"aud": null}), "claim"),
        (json!({"aud": "(gone)"}), "claim"),
    ] {
        assert_eq!(word(world.claiming(change.clone())), expected, "{change}");
    }
}

#[test]
fn times_are_numbers_within_leeway_and_bounds() {
    let world = world();
    for (change, expected) in [
        (json!({"exp": WALL - 29.5}), "accepted"),
        (json!({"exp": WALL - 30.0}), "expired"),
        (json!({"exp": -1}), "expired"),
        (json!({"exp": WALL + 86_430.0}), "accepted"),
        (json!({"exp": WALL + 86_431.0}), "too_long"),
        (json!({"exp": 1e300}), "too_long"),
        (json!({"exp": u64::MAX}), "too_long"),
        (json!({"exp": "1800000060"}), "claim"),
        (json!({"exp": null}), "claim"),
        (json!({"exp": true}), "claim"),
        (json!({"exp": [1_800_000_060]}), "claim"),
        (json!({"exp": "(gone)"}), "claim"),
        (json!({"nbf": WALL + 30.0}), "accepted"),
        (json!({"nbf": WALL + 31.0}), "not_yet"),
        (json!({"nbf": "0"}), "claim"),
        (json!({"nbf": null}), "claim"),
        (json!({"iat": WALL + 30.0}), "accepted"),
        (json!({"iat": WALL + 31.0}), "not_yet"),
        (json!({"iat": WALL - 86_340.0}), "accepted"),
        (json!({"iat": WALL - 86_400.0}), "too_long"),
        (json!({"iat": "0"}), "claim"),
    ] {
        assert_eq!(word(world.claiming(change.clone())), expected, "{change}");
    }
    for wall in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0] {
        assert!(world.providers.verify(&signed(&world.signer, HEADER, &claims(json!({}))), wall).is_err(), "{wall}");
    }
}

#[test]
fn every_changed_byte_is_refused() {
    let world = world();
    let token = signed(&world.signer, HEADER, &claims(json!({})));
    assert!(world.providers.verify(&token, WALL).is_ok());
    for place in 0..token.len() {
        let mut other = token.clone();
        other[place] = if other[place] == b'A' { b'B' } else { b'A' };
        assert!(world.providers.verify(&other, WALL).is_err(), "at {place}");
    }
    for end in 0..token.len() {
        assert!(world.providers.verify(&token[..end], WALL).is_err(), "cut at {end}");
    }
    assert!(world.providers.verify(&[token.as_slice(), b"="].concat(), WALL).is_err());
}

#[test]
fn claims_that_can_be_read_in_two_ways_are_refused() {
    let world = world();
    let usual = claims(json!({}));
    let twice = usual.replacen('{', r#"{"sub":"root","#, 1);
    for text in [twice.as_str(), "[]", "null", "x", "", r#"{"exp":NaN}"#] {
        assert_eq!(word(world.providers.verify(&signed(&world.signer, HEADER, text), WALL)), "malformed", "{text}");
    }
}

#[test]
fn a_token_without_a_key_name_needs_exactly_one_that_fits() {
    let (first, second, other) = (Signer::es256(), Signer::es256(), Signer::eddsa());
    let providers = Providers::compile(&[plan(json!({}))]).unwrap();
    let token = signed(&first, r#"{"alg":"ES256"}"#, &claims(json!({})));
    let with = |keys: &[Value]| {
        providers.set_keys("auth", Some(set_of(keys)));
        word(providers.verify(&token, WALL))
    };
    let (one, two) = (jwk(&first, json!({})), jwk(&second, json!({"kid": "k2"})));
    assert_eq!(with(&[one.clone(), jwk(&other, json!({"kid": "k3"}))]), "accepted");
    assert_eq!(with(&[one, two.clone()]), "key");
    assert_eq!(with(&[two]), "signature");
    assert_eq!(with(&[]), "unknown_key");
}

#[test]
fn eddsa_is_verified_where_it_is_configured() {
    let signer = Signer::eddsa();
    let token = signed(&signer, r#"{"alg":"EdDSA","kid":"k1"}"#, &claims(json!({})));
    let with = |algorithms: Value| {
        let providers = Providers::compile(&[plan(json!({ "algorithms": algorithms }))]).unwrap();
        providers.set_keys("auth", Some(set_of(&[jwk(&signer, json!({}))])));
        word(providers.verify(&token, WALL))
    };
    assert_eq!((with(json!(["EdDSA"])), with(json!(["ES256"]))), ("accepted", "algorithm"));
}

#[test]
fn without_keys_nothing_is_accepted() {
    let world = world();
    let token = signed(&world.signer, HEADER, &claims(json!({})));
    assert_eq!(word(world.providers.verify(&token, WALL)), "accepted");
    world.providers.set_keys("auth", None);
    let fault = world.providers.verify(&token, WALL).unwrap_err();
    assert_eq!((fault.word(), fault.wants_keys()), ("no_keys", "auth"));
    world.providers.set_keys("auth", Some(set_of(&[])));
    let fault = world.providers.verify(&token, WALL).unwrap_err();
    assert_eq!((fault.word(), fault.wants_keys()), ("unknown_key", "auth"));
    assert!(!world.providers.set_keys("nobody", None));
}

#[test]
fn a_token_seen_before_is_judged_anew_for_time_and_keys() {
    let world = world();
    let token = signed(&world.signer, HEADER, &claims(json!({"nbf": WALL})));
    let first = world.providers.verify(&token, WALL).unwrap();
    assert!(Arc::ptr_eq(&first, &world.providers.verify(&token, WALL + 1.0).unwrap()));
    assert_eq!(word(world.providers.verify(&token, WALL + 90.0)), "expired");
    assert_eq!(word(world.providers.verify(&token, WALL - 31.0)), "not_yet");

    // The same set again is no change; another one is, even if it holds the key.
    let same = jwk(&world.signer, json!({}));
    world.providers.set_keys("auth", Some(set_of(std::slice::from_ref(&same))));
    assert!(Arc::ptr_eq(&first, &world.providers.verify(&token, WALL).unwrap()));
    world.providers.set_keys("auth", Some(set_of(&[same, jwk(&Signer::es256(), json!({"kid": "k2"}))])));
    assert!(!Arc::ptr_eq(&first, &world.providers.verify(&token, WALL).unwrap()));
    world.providers.set_keys("auth", Some(set_of(&[jwk(&Signer::es256(), json!({}))])));
    assert_eq!(word(world.providers.verify(&token, WALL)), "signature");
}

#[test]
fn what_is_remembered_is_bounded_and_what_was_refused_is_not_remembered() {
    let world = world();
    let many = 5_000;
    let tokens: Vec<_> = (0..many).map(|n| signed(&world.signer, HEADER, &claims(json!({ "jti": n })))).collect();
    tokens.iter().for_each(|token| drop(world.providers.verify(token, WALL).unwrap()));
    assert!((2_048..=4_096).contains(&world.providers.remembered()), "{}", world.providers.remembered());
    world.providers.forget();
    assert_eq!(world.providers.remembered(), 0);
    assert!(world.claiming(json!({"aud": "x"})).is_err());
    assert_eq!(world.providers.remembered(), 0);
    // Large ones are fewer.
    for n in 0..1_000 {
        world.claiming(json!({"jti": n, "padding": "x".repeat(11_000)})).unwrap();
    }
    assert!(world.providers.remembered() * 11_000 < 9 << 20, "{}", world.providers.remembered());
}

#[test]
fn a_found_token_outlives_those_that_nobody_asks_for() {
    let world = world();
    let token = signed(&world.signer, HEADER, &claims(json!({})));
    let first = world.providers.verify(&token, WALL).unwrap();
    for n in 0..10_000 {
        world.claiming(json!({ "jti": n })).unwrap();
        if n % 1_000 == 0 {
            assert!(Arc::ptr_eq(&first, &world.providers.verify(&token, WALL).unwrap()), "forgotten at {n}");
        }
    }
}

#[test]
fn a_spiffe_token_is_one_of_its_trust_domain_whatever_its_issuer() {
    let world = world_of(svid_plan(), json!({"use": "jwt-svid"}));
    let id = "spiffe://shop.internal/ns/default/sa/web";
    let found = world.claiming(json!({"iss": "https://oidc.example", "sub": id})).unwrap();
    assert_eq!((found.issuer(), found.subject()), ("shop.internal", id));
    assert_eq!(found.principal(), format!("shop.internal/{id}"));
    // No claim of the token's own can pass for that of a provider.
    assert_eq!(found.claim(&["iss"]), Some(&json!("shop.internal")));
    assert!(found.json().contains("\"iss\":\"shop.internal\""), "{}", found.json());
    for (sub, expected) in [
        ("spiffe://shop.internal", "unknown_issuer"),
        ("spiffe://shop.internal/", "claim"),
        ("spiffe://shop.internal/a//b", "claim"),
        ("spiffe://other.internal/ns/default/sa/web", "unknown_issuer"),
        ("web", "unknown_issuer"),
    ] {
        assert_eq!(word(world.claiming(json!({ "sub": sub }))), expected, "{sub}");
    }
    assert_eq!(word(world.claiming(json!({"sub": id, "aud": "(gone)"}))), "claim");
    assert_eq!(word(world.claiming(json!({"sub": id, "exp": "(gone)"}))), "claim");
}

#[test]
fn a_spiffe_token_has_three_headers_at_most_and_its_own_keys() {
    let claims = claims(json!({"sub": "spiffe://shop.internal/a"}));
    let with = |use_: &str, header: &str| {
        let world = world_of(svid_plan(), json!({ "use": use_ }));
        word(world.providers.verify(&signed(&world.signer, header, &claims), WALL))
    };
    assert_eq!(with("jwt-svid", r#"{"alg":"ES256","kid":"k1","typ":"JOSE"}"#), "accepted");
    assert_eq!(with("jwt-svid", r#"{"alg":"ES256","kid":"k1","typ":"at+jwt"}"#), "header");
    assert_eq!(with("jwt-svid", r#"{"alg":"ES256","kid":"k1","jku":"x"}"#), "header");
    assert_eq!(with("sig", HEADER), "unknown_key");
    // Nor the other way round.
    assert_eq!(word(world_of(plan(json!({})), json!({"use": "jwt-svid"})).claiming(json!({}))), "unknown_key");
}

#[test]
fn a_subject_can_not_borrow_the_name_of_another_issuer() {
    let signer = Signer::es256();
    let longer = json!({"name": "tenant", "issuer": format!("{ISSUER}/tenant")});
    let providers = Providers::compile(&[plan(json!({})), plan(longer)]).unwrap();
    providers.set_keys("auth", Some(set_of(&[jwk(&signer, json!({}))])));
    let verdict = |sub: &str| word(providers.verify(&signed(&signer, HEADER, &claims(json!({ "sub": sub }))), WALL));
    assert_eq!(verdict("tenant/ada"), "claim");
    assert_eq!((verdict("tenants/ada"), verdict("tenant")), ("accepted", "accepted"));
}

#[test]
fn a_provider_that_would_take_too_much_does_not_load() {
    for (change, expected) in [
        (json!({"audiences": []}), "audiences"),
        (json!({"audiences": [""]}), "audiences"),
        (json!({"issuer": ""}), "issuer is empty"),
        (json!({"algorithms": []}), "names no algorithm"),
        (json!({"algorithms": ["HS256"]}), "\"HS256\" isn't supported: these are RS256"),
        (json!({"algorithms": ["none"]}), "isn't supported"),
        (json!({"leeway": 301.0}), "leeway"),
        (json!({"leeway": -1.0}), "leeway"),
        (json!({"longest": 0.0}), "longest"),
        (json!({"is_svid": true}), "no trust domain"),
        (json!({"is_svid": true, "issuer": "shop.internal"}), "EdDSA"),
    ] {
        let mistakes = Providers::compile(&[plan(change.clone())]).unwrap_err().join("\n");
        assert!(mistakes.contains(expected), "{change}: {mistakes}");
    }
    let twice = Providers::compile(&[plan(json!({})), plan(json!({}))]).unwrap_err();
    assert_eq!(twice.len(), 2, "{twice:?}");
}

#[cfg(not(feature = "aws-lc"))]
#[test]
fn es512_is_refused_by_name_where_the_library_lacks_it() {
    let mistakes = Providers::compile(&[plan(json!({"algorithms": ["ES512"]}))]).unwrap_err().join("\n");
    assert!(mistakes.contains("\"ES512\" isn't supported: these are RS256, RS384"), "{mistakes}");
}

#[test]
fn only_plain_public_keys_for_signatures_are_used() {
    let signer = Signer::es256();
    let rsa = |bytes: usize, exponent: &str| json!({"kty": "RSA", "kid": "r", "n": encoded(&vec![0xa7; bytes]), "e": exponent});
    for (key, expected) in [
        (jwk(&signer, json!({})), ""),
        (jwk(&signer, json!({"use": "sig", "alg": "ES256", "key_ops": ["verify"], "x5c": ["MIIB"]})), ""),
        (jwk(&Signer::eddsa(), json!({})), ""),
        (rsa(256, "AQAB"), ""),
        (rsa(128, "AQAB"), "shorter than 2048"),
        (rsa(2048, "AQAB"), "longer than 8192"),
        (rsa(256, "AQ"), "no RSA key's"),
        (json!({"kty": "oct", "k": "AAAA", "kid": "k1"}), "shared secret"),
        (json!({"kid": "k1"}), "no \"kty\""),
        (json!({"kty": 7}), "should be text"),
        (json!("k1"), "not an object"),
        (jwk(&signer, json!({"kty": "XY"})), "kind that isn't supported"),
        (jwk(&signer, json!({"use": "enc"})), "another use"),
        (jwk(&signer, json!({"use": "x509-svid"})), "another use"),
        (jwk(&signer, json!({"use": "jwt-svid", "kid": ""})), "no \"kid\""),
        (jwk(&signer, json!({"key_ops": ["encrypt"]})), "other operations"),
        (jwk(&signer, json!({"key_ops": []})), "other operations"),
        (jwk(&signer, json!({"key_ops": "verify"})), "no list"),
        (jwk(&signer, json!({"alg": "ES384"})), "another kind than its algorithm"),
        (jwk(&signer, json!({"alg": "HS256"})), "algorithm that isn't supported"),
        (jwk(&signer, json!({"crv": "secp256k1"})), "curve that isn't supported"),
        (jwk(&signer, json!({"crv": "P-384"})), "wrong length"),
        (jwk(&signer, json!({"x": encoded(&[7; 32])})), "no point of its curve"),
        (jwk(&signer, json!({"x": encoded(&[0; 32]), "y": encoded(&[0; 32])})), "no point of its curve"),
        (jwk(&signer, json!({"x": "===="})), "base64url"),
        (jwk(&signer, json!({"d": encoded(&[7; 32])})), "private part"),
        (jwk(&Signer::eddsa(), json!({"crv": "X25519"})), "curve that isn't supported"),
        (jwk(&Signer::eddsa(), json!({"x": "AAAA"})), "wrong length"),
    ] {
        let (set, ignored) = KeySet::parse(json!({"keys": [key]}).to_string().as_bytes()).unwrap();
        assert_eq!((set.names().len(), ignored.len()), if expected.is_empty() { (1, 0) } else { (0, 1) }, "{key}");
        assert!(ignored.iter().all(|why| why.contains(expected)), "{key}: {ignored:?}");
    }
}

#[test]
fn keys_of_one_name_are_both_left_out_and_the_others_stay() {
    let (first, second) = (jwk(&Signer::es256(), json!({})), jwk(&Signer::es256(), json!({})));
    let third = jwk(&Signer::es256(), json!({"kid": "k3"}));
    let (set, ignored) = KeySet::parse(json!({"keys": [first, second, third]}).to_string().as_bytes()).unwrap();
    assert_eq!((set.names(), ignored.len()), (vec!["k3"], 2));
    // A key for encryption of the same name is none of ours.
    let other = jwk(&Signer::es256(), json!({"use": "enc"}));
    let (set, _) =
        KeySet::parse(json!({"keys": [jwk(&Signer::es256(), json!({})), other]}).to_string().as_bytes()).unwrap();
    assert_eq!(set.names(), ["k1"]);
}

#[test]
fn a_key_set_that_is_none_is_refused_whole() {
    let key = jwk(&Signer::es256(), json!({})).to_string();
    for (document, expected) in [
        ("{}".to_owned(), "no list \"keys\""),
        (r#"{"keys":{}}"#.to_owned(), "no list \"keys\""),
        ("[]".to_owned(), "not a JSON object"),
        ("<html>".to_owned(), "not JSON"),
        (format!(r#"{{"keys":[{key}],"keys":[]}}"#), "twice"),
        (format!(r#"{{"keys":[{}]}}"#, key.replacen('{', r#"{"kid":"k1","#, 1)), "twice"),
        (format!(r#"{{"keys":[{}]}}"#, vec![key; 257].join(",")), "more than 256"),
        (" ".repeat(keys::LARGEST + 1), "larger than 512 KiB"),
    ] {
        let error = KeySet::parse(document.as_bytes()).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    assert!(KeySet::parse(br#"{"keys":[]}"#).unwrap().0.names().is_empty());
}

#[test]
fn no_fault_shows_the_token() {
    let world = world();
    for (header, change) in [
        (r#"{"alg":"HS256secret"}"#, json!({})),
        (r#"{"alg":"ES256","kid":"secret"}"#, json!({})),
        (HEADER, json!({"iss": "secret"})),
        (HEADER, json!({"aud": "secret"})),
        (HEADER, json!({"exp": "secret"})),
    ] {
        let fault = world.providers.verify(&signed(&world.signer, header, &claims(change)), WALL).unwrap_err();
        assert!(!format!("{fault} {fault:?}").contains("secret"), "{fault:?}");
    }
}
