//! How much of its share may an endpoint have that has just come?
//!
//! Envoy's slow start: within the window after it came or came back, an endpoint counts for a part of its weight that grows with its
//! age, so that cold caches, pools and compilers do not meet a full share at once, and so that least-loaded choices do not send
//! everything to the one without a history. Whether it is healthy, and since when, is the caller's word.
use std::time::Duration;

/// The part of the weight, in `least..=1`: `age / window`, raised to `1 / aggression` (1: a straight line; above: steep first).
/// A window of 0 is no slow start.
pub fn factor(age: Duration, window: f64, least: f32, aggression: f32) -> f32 {
    let age = age.as_secs_f64();
    // Spelt so that a window which is no number has no effect either.
    if !(window > 0.0 && age < window) {
        return 1.0;
    }
    // Envoy counts the first millisecond as over: with a floor of 0 the newcomer would be unreachable at its first instant.
    let time = (age.max(0.001) / window).min(1.0) as f32;
    let grown = if aggression > 0.0 && aggression != 1.0 { time.powf(1.0 / aggression) } else { time };
    grown.max(least.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: f64, least: f32, aggression: f32) -> f32 {
        factor(Duration::from_secs_f64(seconds), 10.0, least, aggression)
    }

    #[test]
    fn the_ramp_is_a_straight_line_above_its_least() {
        assert_eq!([0.0, 0.5, 1.0, 2.5, 5.0, 9.0].map(|s| at(s, 0.1, 1.0)), [0.1, 0.1, 0.1, 0.25, 0.5, 0.9]);
    }

    #[test]
    fn after_the_window_the_share_is_whole() {
        assert_eq!([10.0, 10.1, 1e9].map(|s| at(s, 0.1, 1.0)), [1.0; 3]);
    }

    #[test]
    fn a_window_of_zero_is_no_slow_start() {
        assert_eq!([0.0, -1.0, f64::NAN].map(|window| factor(Duration::ZERO, window, 0.1, 1.0)), [1.0; 3]);
    }

    #[test]
    fn aggression_bends_the_ramp() {
        assert_eq!([2.0, 0.5].map(|aggression| at(2.5, 0.0, aggression)), [0.5, 0.0625]);
        assert_eq!([0.0, -1.0, f32::NAN].map(|aggression| at(2.5, 0.0, aggression)), [0.25; 3]);
    }

    #[test]
    fn a_newcomer_is_never_quite_unreachable() {
        assert_eq!(at(0.0, 0.0, 1.0), 0.0001);
    }

    #[test]
    fn the_least_share_is_at_most_the_whole() {
        assert_eq!([1.5, -0.5].map(|least| at(5.0, least, 1.0)), [1.0, 0.5]);
    }
}
