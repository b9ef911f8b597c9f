//! Which number does a call hash to?
//!
//! xxHash64 (Collet, "xxHash fast digest algorithm"), because it is the default of Envoy and the only function of gRPC's
//! ring: a fleet that moves from a sidecar to meshlib, or runs both, sends a key to the same endpoint from either side.
//! Several keys are folded by "rotate left by one, then xor", as an Envoy route does with its list of `hash_policy`: the
//! rotation keeps two keys of equal text from cancelling out, and makes their order count. A key that the call doesn't
//! carry is passed over, as if it were not in the list.
//!
//! It doesn't look into calls: where the text of a key comes from is the caller's business. It is no protection either:
//! whoever chooses the key can choose the endpoint.
use twox_hash::XxHash64;

pub fn xxh64(bytes: &[u8], seed: u64) -> u64 {
    XxHash64::oneshot(seed, bytes)
}

/// The hash of a header that occurs several times: its values in sorted order, each the seed of the next, so that a proxy
/// on the way may reorder them. A single value is its plain hash; None without values.
pub fn of_values(values: &mut [&[u8]]) -> Option<u64> {
    values.sort_unstable();
    (!values.is_empty()).then(|| values.iter().fold(0, |seed, value| xxh64(value, seed)))
}

/// The hash of a call by the hashes of its keys, in the order of the configuration; None if it carries none of them.
pub fn combine(keys: impl IntoIterator<Item = Option<u64>>) -> Option<u64> {
    keys.into_iter().flatten().fold(None, |sum, key| Some(sum.unwrap_or(0u64).rotate_left(1) ^ key))
}

/// Who may be given calls, in an order that depends on nothing but the set: (index, key, share of the weight), by key.
///
/// Whoever lists the same members in another order must build the same structure, or two clients would disagree about
/// the owner of a key. A weight that is no positive number takes the member out.
pub(super) fn shares<'a>(members: &[(u32, &'a str, f64)]) -> Vec<(u32, &'a str, f64)> {
    let mut kept: Vec<_> =
        members.iter().copied().filter(|(_, _, weight)| weight.is_finite() && *weight > 0.0).collect();
    kept.sort_unstable_by_key(|(index, key, _)| (*key, *index));
    let sum: f64 = kept.iter().map(|(_, _, weight)| weight).sum();
    kept.iter_mut().for_each(|(_, _, weight)| *weight /= sum);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_that_of_the_specification() {
        // The vectors of the reference implementation for the empty input, and for texts below and above its block of 32 bytes.
        assert_eq!(xxh64(b"", 0), 0xef46_db37_51d8_e999);
        assert_eq!(xxh64(b"abc", 0), 0x44bc_2cf5_ad77_0999);
        assert_eq!(xxh64(b"Nobody inspects the spammish repetition", 0), 0xfbce_a83c_8a37_8bf1);
    }

    #[test]
    fn a_call_without_any_of_the_keys_has_no_hash() {
        assert_eq!(combine([]), None);
        assert_eq!(combine([None, None]), None);
        assert_eq!(of_values(&mut []), None);
    }

    #[test]
    fn one_key_is_its_own_hash_and_absent_keys_do_not_count() {
        assert_eq!(combine([Some(5)]), Some(5));
        assert_eq!(combine([None, Some(5), None]), Some(5));
    }

    #[test]
    fn keys_of_equal_text_do_not_cancel_out() {
        assert_eq!(combine([Some(5), Some(5)]), Some(10 ^ 5));
        assert_eq!(combine([Some(1 << 63), Some(0)]), Some(1));
    }

    #[test]
    fn values_of_a_header_count_in_sorted_order() {
        let expected = xxh64(b"b", xxh64(b"a", 0));
        assert_eq!(of_values(&mut [b"b", b"a"]), Some(expected));
        assert_eq!(of_values(&mut [b"a", b"b"]), Some(expected));
        assert_eq!(of_values(&mut [b"a"]), Some(xxh64(b"a", 0)));
    }

    #[test]
    fn shares_are_sorted_and_leave_out_what_has_no_weight() {
        let given =
            [(0, "c", 1.0), (1, "a", 3.0), (2, "b", 0.0), (3, "d", f64::NAN), (4, "e", -1.0), (5, "f", f64::INFINITY)];
        assert_eq!(shares(&given), [(1, "a", 0.75), (0, "c", 0.25)]);
        assert_eq!(shares(&[]), []);
    }
}
