//! Which zone may take this call: the own one, or must some of the traffic leave it?
//!
//! Two questions with a number for an answer, after Envoy, whose tables people know. `loads`: zones ordered by preference, and how
//! much each takes when its endpoints fail; with 1.4 times the capacity in mind, nothing moves until more than 28 % are out.
//! `zone_shares`: all zones equal, and how much stays in the own one so that every endpoint still gets about the same. Both are pure,
//! allocate nothing and are meant to run when health or membership changes; only the `pick`s belong to the path of a call. Who is
//! healthy, which zones exist and whether panic overrides it all is the caller's word.
use crate::random::Random;

/// More priorities than this are not counted: the caller's last one should hold all the rest.
pub const PRIORITIES: usize = 16;

/// The endpoints of one priority.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Health {
    pub healthy: u32,
    pub total: u32,
}

/// How much of the traffic each priority takes, in percent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Loads {
    percent: [u8; PRIORITIES],
    /// The health of all together, 0 to 100. At 100 no priority needs to panic: the others have room for its traffic.
    pub health: u8,
}

impl Loads {
    pub fn of(&self, priority: usize) -> u8 {
        self.percent.get(priority).copied().unwrap_or(0)
    }

    /// Nothing is healthy enough to count: the loads go by the number of endpoints, well or not.
    pub fn is_panic(&self) -> bool {
        self.health == 0
    }

    /// None only if there is no endpoint at all.
    pub fn pick(&self, random: &Random) -> Option<usize> {
        let mut left = random.below(100);
        for (priority, percent) in self.percent.iter().map(|percent| usize::from(*percent)).enumerate() {
            if left < percent {
                return Some(priority);
            }
            left -= percent;
        }
        None
    }
}

/// Integer arithmetic as in Envoy's `load_balancer_impl.cc`, so that its documented tables hold to the last digit. What the truncation
/// leaves goes to the first priority that has any health. `overprovisioning_percent` is 140 for the usual factor 1.4.
pub fn loads(levels: &[Health], overprovisioning_percent: u32) -> Loads {
    let levels = levels.get(..PRIORITIES).unwrap_or(levels);
    let mut parts = [0u64; PRIORITIES];
    for (part, level) in parts.iter_mut().zip(levels) {
        let scaled = u64::from(overprovisioning_percent) * u64::from(level.healthy);
        *part = scaled.checked_div(u64::from(level.total)).unwrap_or(0).min(100);
    }
    let health = parts.iter().sum::<u64>().min(100);
    if health == 0 {
        for (part, level) in parts.iter_mut().zip(levels) {
            *part = u64::from(level.total);
        }
    }
    // In total panic the sizes are shared out in the same way; a sum of sizes is not bounded by 100.
    let whole = if health == 0 { parts.iter().sum::<u64>() } else { health };
    let mut loads = Loads { percent: [0; PRIORITIES], health: health as u8 };
    let mut left = 100;
    for (percent, part) in loads.percent.iter_mut().zip(parts) {
        let load = (part * 100).checked_div(whole).unwrap_or(0).min(left);
        left -= load;
        *percent = load as u8;
    }
    if let Some((percent, _)) = loads.percent.iter_mut().zip(parts).find(|(_, part)| *part > 0) {
        *percent += left as u8;
    }
    loads
}

/// What `zone_shares` decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// The own zone has room for all of its callers.
    Local,
    /// What the own zone has no room for goes to the zones with fewer callers than endpoints, in proportion to that difference.
    Residual,
    /// The own zone is unknown: every zone by its endpoints.
    Everywhere,
    /// No zone has a healthy endpoint; all shares are 0.
    Nowhere,
}

/// Of the traffic of a caller in zone `local`: which share goes to which zone? `upstream` is the healthy endpoints per zone, `callers`
/// the callers per zone in the same order (and behind them, those in zones without endpoints). Without callers, or with none anywhere,
/// callers are taken to be spread evenly over the zones. `out` has one share per zone; they add up to 1.
///
/// Envoy's `regenerateLocalityRoutingStructures`, without its rounding to 1/10,000. It turns itself off if it cannot find itself among
/// the callers; here whoever asks counts as one.
pub fn zone_shares(local: usize, upstream: &[u32], callers: &[u32], out: &mut [f32]) -> Split {
    out.fill(0.0);
    let endpoints: u64 = upstream.iter().map(|count| u64::from(*count)).sum();
    if endpoints == 0 {
        return Split::Nowhere;
    }
    let share_of = |zone: usize| f64::from(upstream.get(zone).copied().unwrap_or(0)) / endpoints as f64;
    if local >= upstream.len() {
        out.iter_mut().enumerate().for_each(|(zone, share)| *share = share_of(zone) as f32);
        return Split::Everywhere;
    }
    let is_known = callers.iter().any(|count| *count > 0);
    let callers_in = |zone: usize| match (is_known, callers.get(zone).copied().unwrap_or(0)) {
        (false, _) => u64::from(zone < upstream.len()),
        (true, count) => u64::from(count).max(u64::from(zone == local)),
    };
    let all_callers: u64 = (0..upstream.len().max(callers.len())).map(callers_in).sum();
    let callers_share = |zone: usize| callers_in(zone) as f64 / all_callers as f64;

    // In whole numbers: two equal shares must not differ by a rounding.
    let own = u64::from(upstream.get(local).copied().unwrap_or(0));
    if u128::from(own) * u128::from(all_callers) >= u128::from(callers_in(local)) * u128::from(endpoints) {
        if let Some(share) = out.get_mut(local) {
            *share = 1.0;
        }
        return Split::Local;
    }
    let stays = share_of(local) / callers_share(local);
    let room = |zone: usize| (share_of(zone) - callers_share(zone)).max(0.0);
    // Whatever the own zone has not is elsewhere, so there is room, unless it is too little for a float.
    let rooms: f64 = (0..upstream.len()).map(room).sum::<f64>().max(f64::MIN_POSITIVE);
    for (zone, share) in out.iter_mut().enumerate() {
        *share = if zone == local { stays } else { (1.0 - stays) * room(zone) / rooms } as f32;
    }
    Split::Residual
}

/// A zone, drawn by its share; None if no share is positive.
pub fn pick_zone(shares: impl Iterator<Item = f32>, random: &Random) -> Option<usize> {
    let mut left = random.unit();
    let mut last = None;
    for (zone, share) in shares.enumerate().filter(|(_, share)| *share > 0.0) {
        left -= f64::from(share);
        // Shares that rounding left short of 1: the last one has the rest.
        last = Some(zone);
        if left < 0.0 {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::*;

    fn percentages(healthy: &[u32]) -> Vec<u8> {
        let levels: Vec<Health> = healthy.iter().map(|healthy| Health { healthy: *healthy, total: 100 }).collect();
        let loads = loads(&levels, 140);
        (0..healthy.len()).map(|priority| loads.of(priority)).collect()
    }

    #[test]
    fn every_row_of_the_documented_tables_holds() {
        let rows: [(&[u32], &[u8]); 16] = [
            (&[100, 100], &[100, 0]),
            (&[72, 100], &[100, 0]),
            (&[71, 100], &[99, 1]),
            (&[50, 100], &[70, 30]),
            (&[25, 100], &[35, 65]),
            (&[0, 100], &[0, 100]),
            (&[72, 72], &[100, 0]),
            (&[71, 71], &[99, 1]),
            (&[50, 50], &[70, 30]),
            (&[25, 25], &[50, 50]),
            (&[72, 72, 100], &[100, 0, 0]),
            (&[71, 71, 100], &[99, 1, 0]),
            (&[50, 50, 100], &[70, 30, 0]),
            (&[25, 100, 100], &[35, 65, 0]),
            (&[25, 25, 100], &[35, 35, 30]),
            (&[25, 25, 20], &[37, 35, 28]),
        ];
        for (healthy, expected) in rows {
            assert_eq!(expected, percentages(healthy), "{healthy:?}");
        }
    }

    #[test]
    fn what_truncation_leaves_goes_to_the_first_healthy_priority() {
        assert_eq!(percentages(&[0, 25, 25, 20]), [0, 37, 35, 28]);
    }

    #[test]
    fn without_overprovisioning_every_failure_moves_traffic() {
        let levels = [Health { healthy: 9, total: 10 }, Health { healthy: 10, total: 10 }];
        assert_eq!([0, 1].map(|priority| loads(&levels, 100).of(priority)), [90, 10]);
    }

    #[test]
    fn loads_always_add_up_to_all_of_the_traffic() {
        for a in 0..=20 {
            for b in 0..=20 {
                for c in 0..=20 {
                    let levels = [(a, 20), (b, 13), (c, 7)].map(|(healthy, total)| Health { healthy, total });
                    let sum: u32 = (0..3).map(|priority| u32::from(loads(&levels, 140).of(priority))).sum();
                    assert_eq!(sum, 100, "{levels:?}");
                }
            }
        }
    }

    #[test]
    fn in_total_panic_the_size_decides() {
        let levels = [(0, 10), (0, 0), (0, 20)].map(|(healthy, total)| Health { healthy, total });
        let loads = loads(&levels, 140);
        assert!(loads.is_panic());
        assert_eq!([0, 1, 2].map(|priority| loads.of(priority)), [34, 0, 66]);
    }

    #[test]
    fn without_endpoints_nobody_is_picked() {
        let none = loads(&[Health::default(); 3], 140);
        assert_eq!((none, none.pick(&Random::new(1))), (Loads::default(), None));
        assert_eq!(loads(&[], 140), Loads::default());
    }

    #[test]
    fn more_healthy_than_there_are_and_too_many_priorities_do_no_harm() {
        let many = [Health { healthy: u32::MAX, total: 1 }; 40];
        let loads = loads(&many, u32::MAX);
        assert_eq!((loads.of(0), loads.of(1), loads.of(39), loads.health), (100, 0, 0, 100));
    }

    #[test]
    fn priorities_are_picked_by_their_load() {
        let (random, mut counts) = (Random::new(3), [0; 3]);
        let levels = [25, 25, 100].map(|healthy| Health { healthy, total: 100 });
        let loads = loads(&levels, 140);
        for _ in 0..100_000 {
            counts[loads.pick(&random).unwrap()] += 1;
        }
        for (count, expected) in counts.iter().zip([35_000, 35_000, 30_000]) {
            assert!((expected - 600..expected + 600).contains(count), "{counts:?}");
        }
    }

    fn shares(local: usize, upstream: &[u32], callers: &[u32]) -> (Split, Vec<f32>) {
        let mut out = vec![9.0; upstream.len()];
        let split = zone_shares(local, upstream, callers, &mut out);
        (split, out)
    }

    #[test]
    fn all_stays_in_a_zone_that_has_room() {
        assert_eq!(shares(0, &[5, 5, 5], &[4, 4, 4]), (Split::Local, vec![1.0, 0.0, 0.0]));
        assert_eq!(shares(1, &[25, 50, 25], &[40, 40, 20]), (Split::Local, vec![0.0, 1.0, 0.0]));
    }

    #[test]
    fn the_example_in_the_source_of_envoy_holds() {
        // Callers 40/40/20 %, endpoints 25/50/25 %: 62.5 % stay, the rest goes 10 to 5.
        assert_eq!(shares(0, &[25, 50, 25], &[40, 40, 20]), (Split::Residual, vec![0.625, 0.25, 0.125]));
    }

    #[test]
    fn half_stays_where_the_callers_are_twice_the_endpoints() {
        let (split, out) = shares(0, &[1, 4], &[2, 3]);
        assert_eq!((split, out), (Split::Residual, vec![0.5, 0.5]));
    }

    #[test]
    fn every_endpoint_gets_the_same_whatever_the_callers() {
        for (upstream, callers) in [([3, 9, 6], [7, 1, 4]), ([10, 1, 1], [1, 1, 1]), ([2, 5, 11], [50, 3, 20])] {
            let (total, all): (u32, u32) = (upstream.iter().sum(), callers.iter().sum());
            let mut arrived = [0.0; 3];
            for zone in 0..3 {
                for (sum, share) in arrived.iter_mut().zip(shares(zone, &upstream, &callers).1) {
                    *sum += f64::from(share) * f64::from(callers[zone]);
                }
            }
            for (sum, count) in arrived.iter().zip(upstream) {
                let fair = f64::from(all) * f64::from(count) / f64::from(total);
                assert!((sum - fair).abs() < 1e-3, "{arrived:?} for {upstream:?} from {callers:?}");
            }
        }
    }

    #[test]
    fn unknown_callers_are_taken_to_be_everywhere_alike() {
        // A third of the callers, a sixth of the endpoints: half stays, and the room elsewhere is 1/6 to 0.
        for callers in [&[] as &[u32], &[0, 0, 0], &[0, 0, 0, 0, 0]] {
            let (split, out) = shares(0, &[1, 3, 2], callers);
            assert_eq!((split, out), (Split::Residual, vec![0.5, 0.5, 0.0]));
        }
        assert_eq!(shares(1, &[1, 3, 2], &[]).0, Split::Local);
    }

    #[test]
    fn a_zone_without_healthy_endpoints_sends_everything_away() {
        let (split, out) = shares(0, &[0, 6, 6], &[1, 1, 1]);
        assert_eq!((split, out), (Split::Residual, vec![0.0, 0.5, 0.5]));
    }

    #[test]
    fn callers_in_zones_without_endpoints_take_their_room() {
        // Zone 0 has 30 % of the endpoints, and 30 % of the callers only if those elsewhere count.
        assert_eq!(shares(0, &[3, 7], &[3, 3, 4]).0, Split::Local);
    }

    #[test]
    fn whoever_asks_counts_as_a_caller() {
        assert_eq!(shares(0, &[1, 1], &[0, 9]), (Split::Local, vec![1.0, 0.0]));
        assert_eq!(shares(0, &[0, 1], &[0, 9]), (Split::Residual, vec![0.0, 1.0]));
    }

    #[test]
    fn an_unknown_zone_goes_by_the_endpoints_and_no_endpoint_nowhere() {
        assert_eq!(shares(7, &[1, 3], &[2, 2]), (Split::Everywhere, vec![0.25, 0.75]));
        assert_eq!(shares(0, &[0, 0], &[2, 2]), (Split::Nowhere, vec![0.0, 0.0]));
        assert_eq!(shares(0, &[], &[]), (Split::Nowhere, vec![]));
    }

    #[test]
    fn zones_are_picked_by_their_share() {
        let (random, mut counts) = (Random::new(5), [0; 4]);
        for _ in 0..100_000 {
            counts[pick_zone([0.625, 0.0, 0.25, 0.125].into_iter(), &random).unwrap()] += 1;
        }
        for (count, expected) in counts.iter().zip([62_500i32, 0, 25_000, 12_500]) {
            assert!((count - expected).abs() < 600, "{counts:?}");
        }
        assert_eq!(counts[1], 0);
        assert_eq!(pick_zone([0.0, 0.0].into_iter(), &random), None);
        assert_eq!(
            (0..50).map(|_| pick_zone([0.0, 1e-9, 0.0].into_iter(), &random)).collect::<Vec<_>>(),
            [Some(1); 50]
        );
    }
}
