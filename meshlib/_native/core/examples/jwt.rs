//! What does a token cost, seen for the first time and seen before, in nanoseconds? For `benchmarks/decide.py`, which says what is wanted.
//!
//! `jwt RS256|ES256 first|seen SECONDS`; one JSON object of figures. The tokens are of the size that identity providers hand out; the
//! keys that signed them are gone.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_core::secure::jwt::{KeySet, Providers};
use serde_json::json;

/// When the tokens are valid.
const WALL: f64 = 1_800_000_060.0;
const BLOCK: u32 = 64;

fn main() {
    let given: Vec<String> = std::env::args().skip(1).collect();
    let given: Vec<&str> = given.iter().map(String::as_str).collect();
    let [algorithm, what, seconds] = given[..] else { panic!("jwt RS256|ES256 first|seen SECONDS") };
    let token: &[u8] = if algorithm == "RS256" { RS256 } else { ES256 }.as_bytes();
    let providers = providers();
    let end = Instant::now() + Duration::from_secs_f64(seconds.parse().expect("seconds"));
    let mut blocks = Vec::new();
    while blocks.is_empty() || Instant::now() < end {
        let begun = Instant::now();
        for _ in 0..BLOCK {
            if what == "first" {
                providers.forget();
            }
            black_box(providers.verify(black_box(token), WALL).expect("the token is good"));
        }
        blocks.push(begun.elapsed().as_nanos() as f64 / f64::from(BLOCK));
    }
    blocks.sort_by(f64::total_cmp);
    println!("{}", json!({"ns": blocks[blocks.len() / 2]}));
}

fn providers() -> Providers {
    let plan = json!([{
        "name": "issuer", "issuer": "https://issuer.example/", "audiences": ["orders"], "algorithms": ["RS256", "ES256"],
        "leeway": 30.0, "longest": 86400.0, "from": [], "forward": false, "is_svid": false
    }]);
    let plans: Vec<_> = serde_json::from_value(plan).expect("the plan is one");
    let providers = Providers::compile(&plans).expect("the plan is right");
    let (keys, ignored) = KeySet::parse(KEYS.as_bytes()).expect("the keys are some");
    assert!(ignored.is_empty(), "{ignored:?}");
    providers.set_keys("issuer", Some(Arc::new(keys)));
    providers
}

const KEYS: &str = r#"{"keys":[{"kty":"RSA","n":"67GG5mzo7P-hapXRW_eocauFOC9Na1U20ii03KK6V_tk7Ic3DQu40g7xJibWsGvtCYSGN77fzZVW11cD0BtbLN_eWT34_1rGyr7bbgqxTIZCUM52Y6ICs9jhqffGoBkHOrZ0nWRckBIKQDfKYYOsBaF_Bp-f-SGXQGQ7hktiskmwi-d_RSmCctTYutC_7QIvRtQd3Cxk1jfVaGIKKp6GSaHFh47b5KsS_0dA5HzEa0ZhhLU3ufbBni-lSjAdkuYzin9rNSQg3E5LZtUTMb_8yUTwN3OKHXND43bF2PjDbWZGedA2Ox2gHlLyQSi2s36dikZebcfEIN4MHZP3KupvTQ","e":"AQAB","kid":"rsa","use":"sig","alg":"RS256"},
{"kty":"EC","crv":"P-256","x":"l7oNtav-m3v--3SgCXHSLGozCxyqssyCeXLLVhMU558","y":"Ok-tdgf3hwxNHKge0oERQTtsussYAddztZL9m55GVyM","kid":"ec","use":"sig","alg":"ES256"}]}"#;
const RS256: &str =
    "eyJhbGciOiJSUzI1NiIsImtpZCI6InJzYSIsInR5cCI6IkpXVCJ9.eyJpc3MiOiJodHRwczovL2lzc3Vlci5leGFtcGxlLyIsInN\
1YiI6ImF1dGgwfDVmN2M4ZWM3YzMzYzZjMDA0YmJhZmU4MiIsImF1ZCI6WyJvcmRlcnMiLCJodHRwczovL2lzc3Vlci5leGFtcGx\
lL3VzZXJpbmZvIl0sImF6cCI6Im15X2NsaWVudF9pZCIsImlhdCI6MTgwMDAwMDAwMCwiZXhwIjoxODAwMDAzNjAwLCJzY29wZSI\
6Im9wZW5pZCBwcm9maWxlIHJlYWQ6b3JkZXJzIHdyaXRlOm9yZGVycyIsInBlcm1pc3Npb25zIjpbInJlYWQ6b3JkZXJzIiwid3J\
pdGU6b3JkZXJzIl0sInJlYWxtIjp7InJvbGVzIjpbImNsZXJrIiwiYWRtaW4iXX19.NUVjZb7lYMUKTNpZckh61v7OGHSGPrtC9e\
BtAnbZonGXddejawvQIPbKuwBC6ju2X7X0ORip_Gprq3FJBJ3lLiqnOK8d-6mt0IAFHFXKU9H6HulksId2hcY-Voa0PB_SUUcrfU\
HirRvTt_XfanBrn47VtKTrkTon27Y_Q2aptIoH70UlIM1GQcvN_8r3lpYMHYGC70y77-PvwYJT8GJmwJ90VatQOUoAjGerM7Cy9h\
3hdMDauozBwsNYo7ZBZ4NmT4Fve3ECmnPQa2cnxrSKtGrgqW9_B2bgJJf09vIB8m5sYpDCp3Arnpm1w-684W25pmPIGput9Li0SA\
C3LueaSw";
const ES256: &str =
    "eyJhbGciOiJFUzI1NiIsImtpZCI6ImVjIiwidHlwIjoiSldUIn0.eyJpc3MiOiJodHRwczovL2lzc3Vlci5leGFtcGxlLyIsInN1\
YiI6ImF1dGgwfDVmN2M4ZWM3YzMzYzZjMDA0YmJhZmU4MiIsImF1ZCI6WyJvcmRlcnMiLCJodHRwczovL2lzc3Vlci5leGFtcGxl\
L3VzZXJpbmZvIl0sImF6cCI6Im15X2NsaWVudF9pZCIsImlhdCI6MTgwMDAwMDAwMCwiZXhwIjoxODAwMDAzNjAwLCJzY29wZSI6\
Im9wZW5pZCBwcm9maWxlIHJlYWQ6b3JkZXJzIHdyaXRlOm9yZGVycyIsInBlcm1pc3Npb25zIjpbInJlYWQ6b3JkZXJzIiwid3Jp\
dGU6b3JkZXJzIl0sInJlYWxtIjp7InJvbGVzIjpbImNsZXJrIiwiYWRtaW4iXX19.cjZwFo0W5svyrbwo3uiF8LpmNGa9clJPDda\
JWhHghAJ-lFoeGhbvZu_5CT8x4IcWyFRFnU-of8rWtyvFNxqyrA";
