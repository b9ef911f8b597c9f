//! Has an endpoint more than its share of the calls in flight?
//!
//! Consistent hashing sends a key to one endpoint however busy that is; a popular key overloads it. With bounded load
//! (Mirrokni, Thorup, Zadimoghaddam: "Consistent hashing with bounded loads", arXiv 1608.01350) nobody holds more than
//! `bound` times the mean, counting the call that is about to start and rounding up: an owner at its limit is passed
//! over, and the walk goes on to the next. The limits add up to more than the calls, so that among all members there is
//! always one below its own. The nearer the bound is to 1, the evener the load, the longer the walk, and the more keys
//! leave their owner.
//!
//! Envoy's `hash_balance_factor` is the same rule one call looser (an endpoint exactly at its limit is still taken). The
//! walk after it isn't decided here: clockwise on a ring (the paper), by jumps in a Maglev table, so that the neighbour of
//! a busy endpoint doesn't get busy in turn (the concern of arXiv 1908.08762). It doesn't know who may be chosen at all: the
//! caller gives shares among those, or the limits of the others stay unused, and takes the first of the walk if all are full.

/// `weight_share`: its part of the weights of all, 1/n if they are equal. `bound`: 1.25 for a quarter above the mean;
/// 1 or below means no bound (as 0 does in the configuration).
pub fn is_overloaded(in_flight: u64, total_in_flight: u64, weight_share: f64, bound: f64) -> bool {
    if bound <= 1.0 {
        return false;
    }
    // A billionth less, or 1.5 * 0.2 * 10 would come to 4 in binary fractions.
    let limit = (bound * weight_share * (total_in_flight.saturating_add(1)) as f64 - 1e-9).ceil();
    in_flight as f64 >= limit.max(1.0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::expect_used, clippy::indexing_slicing)]
    use super::*;

    #[test]
    fn the_limit_is_the_rounded_bound_times_the_mean_with_the_new_call() {
        // Ten endpoints, 39 calls: with this one the mean is 4, a quarter more is 5.
        assert!(!is_overloaded(4, 39, 0.1, 1.25));
        assert!(is_overloaded(5, 39, 0.1, 1.25));
    }

    #[test]
    fn an_idle_endpoint_is_never_overloaded() {
        assert!(!is_overloaded(0, 0, 1e-9, 1.05));
        assert!(!is_overloaded(0, 3, 0.0, 1.05));
    }

    #[test]
    fn a_bound_of_zero_bounds_nothing() {
        assert!(!is_overloaded(1_000, 1_000, 0.001, 0.0));
    }

    #[test]
    fn a_heavier_endpoint_may_hold_more() {
        assert!(is_overloaded(3, 9, 0.2, 1.5));
        assert!(!is_overloaded(3, 9, 0.4, 1.5));
    }

    #[test]
    fn somebody_always_has_room_and_nobody_passes_the_limit() {
        let shares = [0.5, 0.25, 0.125, 0.125];
        let mut held = [0u64; 4];
        for total in 0..1_000u64 {
            let free = (0..4).find(|&i| !is_overloaded(held[i], total, shares[i], 1.05));
            held[free.expect("one is below its limit")] += 1;
        }
        assert_eq!(held, [525, 263, 131, 81]);
    }
}
