//! Whose is this hash on the ring, and who comes after?
//!
//! Each member has many points on a circle of 64-bit numbers, a hash belongs to the member of the first point at or
//! after it (Karger and others, STOC 1997; the form is ketama's). When a member leaves, its arcs fall to the points
//! behind them: what belonged to the others stays. The points are those of Envoy's `ring_hash` with xxHash64, the hash
//! of `<address>_<i>`, so that both send a key to the same endpoint; a test holds the picks of a real Envoy. As there,
//! the ring is made at least `least` points large, such that the member of least weight has a whole number of
//! them, and cut to `most`; the others have points in proportion, rounded over the running sum.
//!
//! Two things follow from that rule. Equal members have `ceil(least / n)` points each; where that number changes with n,
//! they all gain or lose points and more keys move than must: when one of 8 leaves a ring of 1,024, a further 9 % of all
//! keys change hands beside its own 12 %; when one of 50 leaves (21 points each before and after), none. A `least` of a
//! fixed number of points for each member moves none ever. And the load deviates by about 1 / sqrt(points each): with 100
//! each, 1,000 members get 0.75 to 1.44 of the mean; with one each, some get nothing and some nine times the mean.
//!
//! Unlike Envoy the members are sorted by key before points are dealt out, so that every client has the same ring however
//! discovery ordered its list. It makes a difference only where shares are fractions of a point (a ring that is cut, weights
//! without a common measure): there Envoy's order may give a member one point more or less.
//!
//! Weights far apart cost memory, since the lightest has at least one point: 1 beside 1,000,000 makes a million of them,
//! or `most`. Weights that change all the time (reported load, a slow start) don't belong here: each change moves keys.
//!
//! It doesn't know who is well or busy: the caller takes the first of `walk` that it may.
use std::fmt::Write as _;

use super::hash::{shares, xxh64};

/// 12 bytes a point.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ring {
    hashes: Vec<u64>,
    owners: Vec<u32>,
}

impl Ring {
    /// Members are (index that the walk gives back, unique key, weight); the key is the address as text, as in Envoy.
    pub fn build(members: &[(u32, &str, f64)], least: usize, most: usize) -> Self {
        let members = shares(members);
        let lightest = members.iter().map(|(_, _, share)| *share).fold(1.0, f64::min);
        let scale = ((lightest * least as f64).ceil() / lightest).min(most as f64);
        let mut points = Vec::with_capacity(if members.is_empty() { 0 } else { scale.ceil() as usize });
        let (mut text, mut target) = (String::new(), 0.0);
        for (place, (_, key, share)) in members.iter().enumerate() {
            target += scale * share;
            let first = points.len();
            while (points.len() as f64) < target {
                text.clear();
                text.push_str(key);
                text.push('_');
                let _ = write!(text, "{}", points.len() - first);
                // The place breaks a tie of hashes, whatever the indices are.
                points.push((xxh64(text.as_bytes(), 0), place as u32));
            }
        }
        points.sort_unstable();
        let owner = |place: u32| members.get(place as usize).map_or(0, |(index, _, _)| *index);
        let owners = points.iter().map(|(_, place)| owner(*place)).collect();
        Self { hashes: points.into_iter().map(|(hash, _)| hash).collect(), owners }
    }

    /// The number of points.
    pub fn size(&self) -> usize {
        self.hashes.len()
    }

    /// The owner of the hash, then those of the points clockwise, for one full turn: every member is met, most more than once.
    pub fn walk(&self, hash: u64) -> impl Iterator<Item = u32> + '_ {
        let start = self.hashes.partition_point(|point| *point < hash);
        let (before, from) = self.owners.split_at_checked(start).unwrap_or_default();
        from.iter().chain(before).copied()
    }
}

#[cfg(test)]
mod tests;
