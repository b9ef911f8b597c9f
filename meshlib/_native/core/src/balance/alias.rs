//! Which one, at random, if some are likelier than others?
//!
//! Vose's form of Walker's alias method ("A Linear Algorithm For Generating Random Numbers With a Given Distribution", IEEE TSE 17,
//! 1991): every member gets a column of equal width, filled up with a part of at most one other member. A draw is a column and a
//! point in it: constant time for any number of members, one random number, eight bytes each. Building is linear, so it is done
//! when weights change, not per call. It knows nothing of eligibility: the caller draws again.
use crate::random::Random;

/// A member's column: its own part, and whose the rest is.
#[derive(Debug, Clone, Copy)]
struct Column {
    own: f32,
    other: u32,
}

#[derive(Debug, Clone)]
pub struct Alias(Box<[Column]>);

impl Alias {
    /// None if all are equal, because a plain draw does, and if none is positive. What is not a positive finite number is never drawn.
    pub fn build(weights: impl Iterator<Item = f32>) -> Option<Self> {
        let mut parts: Vec<f64> = weights.map(|w| if w.is_finite() && w > 0.0 { f64::from(w) } else { 0.0 }).collect();
        let (first, count) = (parts.first().copied()?, u32::try_from(parts.len()).ok()?);
        if parts.iter().all(|part| *part == first) {
            return None;
        }
        let mean = parts.iter().sum::<f64>() / f64::from(count);
        parts.iter_mut().for_each(|part| *part /= mean);
        // What rounding leaves over at the end is full to within that rounding: never a member without weight.
        let mut columns: Box<[Column]> = (0..count).map(|index| Column { own: 1.0, other: index }).collect();
        let (mut small, mut large): (Vec<u32>, Vec<u32>) =
            (0..count).partition(|index| parts.get(*index as usize).is_some_and(|part| *part < 1.0));
        while let (Some(under), Some(over)) = (small.pop(), large.last().copied()) {
            let own = parts.get(under as usize).copied().unwrap_or(0.0);
            if let Some(column) = columns.get_mut(under as usize) {
                *column = Column { own: own as f32, other: over };
            }
            if let Some(rest) = parts.get_mut(over as usize) {
                *rest = (*rest + own) - 1.0;
                if *rest < 1.0 {
                    large.pop();
                    small.push(over);
                }
            }
        }
        Some(Self(columns))
    }

    pub fn draw(&self, random: &Random) -> usize {
        // The high half of the product is a column, the low half is uniform within it.
        let product = u128::from(random.next()) * self.0.len() as u128;
        let (index, point) = ((product >> 64) as usize, (product as u64 >> 40) as f32 / (1u32 << 24) as f32);
        match self.0.get(index) {
            Some(column) if point >= column.own => column.other as usize,
            _ => index,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::*;

    fn drawn(weights: &[f32], draws: usize) -> Vec<f64> {
        let (alias, random) = (Alias::build(weights.iter().copied()).unwrap(), Random::new(20));
        let mut counts = vec![0.0; weights.len()];
        for _ in 0..draws {
            counts[alias.draw(&random)] += 1.0;
        }
        counts
    }

    /// Sum of squared deviations over the expectation.
    fn chi_square(weights: &[f32], draws: usize) -> f64 {
        let sum: f64 = weights.iter().map(|w| f64::from(*w)).sum();
        drawn(weights, draws)
            .iter()
            .zip(weights)
            .filter(|(_, weight)| **weight > 0.0)
            .map(|(count, weight)| {
                let expected = f64::from(*weight) / sum * draws as f64;
                (count - expected).powi(2) / expected
            })
            .sum()
    }

    #[test]
    fn draws_follow_the_weights() {
        // Critical values of chi-square at one in a thousand: 4, 9 and 99 degrees of freedom.
        assert!(chi_square(&[5.0, 1.0, 1.0, 2.0, 0.5], 100_000) < 18.47);
        assert!(chi_square(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 1000.0], 1_000_000) < 27.88);
        let hundred: Vec<f32> = (1..=100).map(|n| n as f32).collect();
        assert!(chi_square(&hundred, 1_000_000) < 148.2);
    }

    #[test]
    fn the_columns_add_up_to_the_weights() {
        let weights = [0.3f32, 7.0, 0.0, 1.1, 2.6, 2.6, 1e-3];
        let alias = Alias::build(weights.into_iter()).unwrap();
        let mut parts = [0.0f64; 7];
        for (index, column) in alias.0.iter().enumerate() {
            parts[index] += f64::from(column.own);
            parts[column.other as usize] += 1.0 - f64::from(column.own);
        }
        let sum: f64 = weights.iter().map(|w| f64::from(*w)).sum();
        for (part, weight) in parts.iter().zip(weights) {
            assert!((part / 7.0 - f64::from(weight) / sum).abs() < 1e-6, "{parts:?}");
        }
    }

    #[test]
    fn one_without_weight_is_never_drawn() {
        let counts = drawn(&[0.0, 1.0, f32::NAN, 2.0, -3.0, f32::INFINITY], 50_000);
        assert_eq!([counts[0], counts[2], counts[4], counts[5]], [0.0; 4]);
        assert!(counts[1] > 0.0 && counts[3] > 0.0);
    }

    #[test]
    fn rounding_does_not_revive_one_without_weight() {
        // Thirds and sevenths do not add up exactly in binary; for every size a column may be left over.
        for size in 2..200usize {
            let weights = (0..size).map(|n| if n % 3 == 0 { 0.0 } else { 1.0 / (n % 7 + 1) as f32 });
            let alias = Alias::build(weights).unwrap();
            for (index, column) in alias.0.iter().enumerate() {
                assert!(index % 3 != 0 || column.own == 0.0, "{index} of {size}");
                assert!(column.own >= 1.0 || column.other % 3 != 0, "{index} of {size} leads to {}", column.other);
            }
        }
    }

    #[test]
    fn equal_or_absent_weights_need_no_table() {
        assert!(Alias::build([2.0; 4].into_iter()).is_none());
        assert!(Alias::build([7.0].into_iter()).is_none());
        assert!(Alias::build([0.0, -1.0, f32::NAN].into_iter()).is_none());
        assert!(Alias::build([].into_iter()).is_none());
    }

    #[test]
    fn a_member_takes_eight_bytes() {
        assert_eq!(std::mem::size_of::<Column>(), 8);
    }
}
