//! How loaded does the endpoint say it is, and which weight follows from that?
//!
//! ORCA (Open Request Cost Aggregation): the endpoint reports its load in a header of each answer, and the client weighs endpoints by
//! what they serve per unit of load: gRFC A58, `qps / (utilisation + eps / qps * penalty)`. Two machines of different size then end at
//! the same utilisation without anybody knowing their sizes, and one that answers errors quickly does not look strong.
//!
//! A weight counts only once reports have come for a while (`blackout`), so that the first samples of a cold endpoint do not set it,
//! and no longer than `expiry` after the last. An endpoint without one takes the mean of the others. When the weights of all are put
//! together, and who picks by them, is the caller's word; so is where the header comes from.
mod parse;

use std::time::Duration;

pub use parse::{parse, Fault};

/// What an endpoint said of itself. Zero is also "nothing said": the format does not tell them apart.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Report {
    /// A fraction of the CPU, above 1 beyond the soft limit.
    pub cpu: f64,
    /// What the application itself holds to be its utilisation; it goes before `cpu`.
    pub application_utilization: f64,
    pub mem: f64,
    /// Queries per second, of all callers.
    pub qps: f64,
    /// Errors per second, of all callers.
    pub eps: f64,
}

/// None if the report does not say enough: then the weight stays what it was. `error_penalty` is 1 by default, 0 ignores errors.
pub fn weight(report: &Report, error_penalty: f64) -> Option<f32> {
    let used = if report.application_utilization > 0.0 { report.application_utilization } else { report.cpu };
    if !(used > 0.0 && report.qps > 0.0) {
        return None;
    }
    let weight = (report.qps / (used + report.eps / report.qps * error_penalty.max(0.0))) as f32;
    (weight.is_finite() && weight > 0.0).then_some(weight)
}

/// When a weight counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Terms {
    pub blackout: Duration,
    pub expiry: Duration,
}

/// The weight of one endpoint by its reports: twelve bytes, because there is one for each endpoint.
///
/// Times are tenths of a second since the clock's start, which lasts 13 years and then stands still.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Weight {
    /// 0: none yet.
    value: f32,
    /// The last report.
    at: u32,
    /// The first of the unbroken series of reports.
    since: u32,
}

impl Weight {
    pub fn add(&mut self, value: f32, terms: &Terms, now: Duration) {
        let tick = ticks(now);
        if self.value == 0.0 || self.is_expired(terms, tick) {
            self.since = tick;
        }
        self.value = value;
        self.at = self.at.max(tick);
    }

    /// The weight, if it counts now.
    pub fn read(&self, terms: &Terms, now: Duration) -> Option<f32> {
        let tick = ticks(now);
        let is_usable = self.value > 0.0
            && !self.is_expired(terms, tick)
            && tick.saturating_sub(self.since) >= ticks(terms.blackout);
        is_usable.then_some(self.value)
    }

    /// The endpoint was away: what it said before does not hold, and the blackout begins anew with its next report.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    fn is_expired(&self, terms: &Terms, tick: u32) -> bool {
        tick.saturating_sub(self.at) >= ticks(terms.expiry)
    }
}

fn ticks(time: Duration) -> u32 {
    u32::try_from(time.as_millis() / 100).unwrap_or(u32::MAX)
}

/// What an endpoint without a weight of its own counts for: the mean of those that have one. None if fewer than two have one, for
/// then there is nothing to compare and all are equal.
pub fn mean(weights: impl Iterator<Item = Option<f32>>) -> Option<f32> {
    let (sum, count) = weights.flatten().fold((0.0f64, 0u32), |(sum, count), w| (sum + f64::from(w), count + 1));
    (count >= 2).then(|| (sum / f64::from(count)) as f32)
}

/// The weight to pick by.
pub fn effective(own: Option<f32>, mean: Option<f32>) -> f32 {
    match (own, mean) {
        (_, None) => 1.0,
        (Some(own), Some(_)) => own,
        (None, Some(mean)) => mean,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const TERMS: Terms = Terms { blackout: Duration::from_secs(10), expiry: Duration::from_secs(180) };

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    fn reported(times: &[f64]) -> Weight {
        let mut weight = Weight::default();
        times.iter().for_each(|time| weight.add(5.0, &TERMS, at(*time)));
        weight
    }

    #[test]
    fn weight_is_queries_per_utilisation() {
        assert_eq!(weight(&Report { cpu: 0.5, qps: 100.0, ..Report::default() }, 1.0), Some(200.0));
    }

    #[test]
    fn what_the_application_says_goes_before_the_cpu() {
        let report = Report { cpu: 0.5, application_utilization: 0.25, qps: 100.0, ..Report::default() };
        assert_eq!(weight(&report, 1.0), Some(400.0));
    }

    #[test]
    fn errors_make_lighter_by_the_penalty() {
        let report = Report { cpu: 0.5, qps: 100.0, eps: 50.0, ..Report::default() };
        assert_eq!([0.0, 1.0, 3.0].map(|penalty| weight(&report, penalty)), [Some(200.0), Some(100.0), Some(50.0)]);
    }

    #[test]
    fn a_report_without_load_or_queries_gives_no_weight() {
        for report in [
            Report::default(),
            Report { cpu: 0.5, ..Report::default() },
            Report { qps: 10.0, ..Report::default() },
            Report { cpu: 0.5, eps: 1.0, ..Report::default() },
            Report { cpu: 1e-300, qps: 1e300, ..Report::default() },
            Report { cpu: 1e300, qps: 1e-300, ..Report::default() },
        ] {
            assert_eq!(weight(&report, 1.0), None, "{report:?}");
        }
    }

    #[test]
    fn a_weight_counts_only_after_the_blackout() {
        let weight = reported(&[100.0, 105.0]);
        assert_eq!([105.0, 109.9, 110.0].map(|now| weight.read(&TERMS, at(now))), [None, None, Some(5.0)]);
        assert_eq!(Weight::default().read(&TERMS, at(1e6)), None);
    }

    #[test]
    fn a_weight_expires_after_the_last_report() {
        let weight = reported(&[100.0, 200.0]);
        assert_eq!([379.9, 380.0].map(|now| weight.read(&TERMS, at(now))), [Some(5.0), None]);
    }

    #[test]
    fn after_expiry_the_blackout_begins_anew() {
        let weight = reported(&[100.0, 200.0, 380.0]);
        assert_eq!([381.0, 389.9, 390.0].map(|now| weight.read(&TERMS, at(now))), [None, None, Some(5.0)]);
        let unbroken = reported(&[100.0, 200.0, 379.9]);
        assert_eq!(unbroken.read(&TERMS, at(381.0)), Some(5.0));
    }

    #[test]
    fn an_endpoint_that_was_away_begins_anew() {
        let mut weight = reported(&[100.0, 200.0]);
        weight.forget();
        assert_eq!(weight.read(&TERMS, at(201.0)), None);
        weight.add(7.0, &TERMS, at(202.0));
        assert_eq!([203.0, 212.0].map(|now| weight.read(&TERMS, at(now))), [None, Some(7.0)]);
    }

    #[test]
    fn without_a_blackout_the_first_report_counts() {
        let terms = Terms { blackout: Duration::ZERO, ..TERMS };
        let mut weight = Weight::default();
        weight.add(3.0, &terms, at(0.0));
        assert_eq!(weight.read(&terms, at(0.0)), Some(3.0));
    }

    #[test]
    fn a_clock_that_steps_back_does_no_harm() {
        let mut weight = reported(&[100.0, 200.0]);
        weight.add(6.0, &TERMS, at(50.0));
        assert_eq!([200.0, 379.0].map(|now| weight.read(&TERMS, at(now))), [Some(6.0); 2]);
    }

    #[test]
    fn an_endpoint_without_a_weight_takes_the_mean_of_the_others() {
        let own = [Some(100.0), None, Some(300.0)];
        let mean = mean(own.into_iter());
        assert_eq!(own.map(|own| effective(own, mean)), [100.0, 200.0, 300.0]);
    }

    #[test]
    fn with_fewer_than_two_weights_all_are_equal() {
        for own in [[None, Some(100.0)], [None, None]] {
            let mean = mean(own.into_iter());
            assert_eq!(own.map(|own| effective(own, mean)), [1.0, 1.0]);
        }
    }

    #[test]
    fn a_weight_takes_twelve_bytes() {
        assert_eq!(std::mem::size_of::<Weight>(), 12);
    }
}
