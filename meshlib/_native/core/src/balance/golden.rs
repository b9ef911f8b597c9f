//! Where does a real Envoy send a key?
//!
//! Recorded from Envoy 1.40.0: static clusters with these seven endpoints, a route with a `hash_policy` on a header, and the
//! keys `user-0` to `user-99`. The n-th digit is the place in `ADDRESSES` of the endpoint that answered key n. Its whole
//! rings and tables, as its trace log prints them, were equal as well. For tests only.
use super::hash::xxh64;

/// In the order neither of text nor of numbers.
pub const ADDRESSES: [&str; 7] = [
    "127.0.0.11:7101",
    "127.0.0.2:7101",
    "127.0.0.30:7102",
    "127.0.0.4:79",
    "127.0.0.5:7101",
    "127.0.0.16:7103",
    "127.0.0.7:7101",
];
pub const EQUAL: [f64; 7] = [1.0; 7];
pub const UNEQUAL: [f64; 7] = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0];

/// `minimum_ring_size` 1024.
pub const RING_EQUAL: &str =
    "6324564140225524661230265335020514212021465043552110566404210143200360440215234300431431351220365315";
pub const RING_UNEQUAL: &str =
    "5524514140225554164255525555520554252024525045455550555404254146245364440255204300460455555220355554";
/// `minimum_ring_size` 10, `maximum_ring_size` 20, endpoints listed by address.
pub const RING_CUT: &str =
    "4325022550350650204016020050040455640044660506562256025165151521064554520604225040101545045404352055";
/// `table_size` 65537.
pub const MAGLEV_EQUAL: &str =
    "6103000010532350436230563335300422340551311004532406615312426050530426556054032305560340610341332544";
pub const MAGLEV_UNEQUAL: &str =
    "6403000050552550420240563455500422545555311004552406515222426050530455556054542305500340550345232544";
/// `table_size` 1009.
pub const MAGLEV_SMALL: &str =
    "5511055425625456256006455315366553206520544244240505545555622655252540555525652655565564450465515265";

pub fn seven(weights: [f64; 7]) -> Vec<(u32, &'static str, f64)> {
    ADDRESSES.iter().zip(weights).zip(0..).map(|((address, weight), index)| (index, *address, weight)).collect()
}

pub fn hashes(count: usize) -> impl Iterator<Item = u64> {
    (0..count).map(|i| xxh64(format!("user-{i}").as_bytes(), 0))
}

pub fn names(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("10.0.{}.{}:8080", i / 256, i % 256)).collect()
}

/// Members of equal weight.
pub fn equal(names: &[String]) -> Vec<(u32, &str, f64)> {
    names.iter().zip(0..).map(|(name, index)| (index, name.as_str(), 1.0)).collect()
}
