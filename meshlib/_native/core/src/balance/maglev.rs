//! Whose is this hash in a table of fixed size?
//!
//! Maglev (Eisenbud and others, NSDI 2016): each member has its own order of all slots (offset and skip, two hashes
//! of its address), and the members take turns, each taking the first slot of its order that is still free. A pick is one
//! look-up however many members there are, and the shares are even to a slot, which a ring reaches only with far
//! more memory. The price: when a member leaves, some slots of the others change hands too. Of the keys that must move,
//! 1.04 times as many do with 10 members in 65,537 slots, 1.6 times with 100, 5.7 times with 500 (that is 1.1 % of all).
//! Offset, skip, sorting and weights are those of Envoy's `maglev`, so that both send a key to the same endpoint; a test
//! holds the picks of a real Envoy. A member of weight w takes part in w / heaviest of the rounds.
//!
//! Unlike Envoy a table that is small for its members is made larger: below 100 slots each it gets the next of `SIZES`,
//! as the shares would differ by a percent or more. Growing moves nearly every key once, hence the wide steps (at 656,
//! 2,622 and 10,486 members from the default size on): who comes near one sets the size beforehand, in all clients. Beyond
//! 50,000 members the largest has to do.
//!
//! It doesn't know who is well or busy: the caller takes the first of `walk` that it may.
use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::hash::{shares, xxh64};

/// Primes: only then does every skip come through all slots. The last is the largest that Envoy takes.
pub const SIZES: [usize; 4] = [65_537, 262_147, 1_048_583, 5_000_011];
const SLOTS_EACH: usize = 100;
/// Second choices by another look-up, which keep to the weights, before members are tried in turn, which needn't.
const REHASHES: u64 = 16;
/// Up to this ratio of the heaviest weight to the mean, asking each member in each round is quicker than a queue.
const UNEVEN: f64 = 32.0;

/// 2 bytes a slot up to 65,536 members, and 4 bytes a member.
#[derive(Debug, Clone, PartialEq)]
pub struct Table {
    slots: Slots,
    members: Vec<u32>,
}

/// Slots hold places in `members`, so that they are small whatever the indices are.
#[derive(Debug, Clone, PartialEq)]
enum Slots {
    Narrow(Vec<u16>),
    Wide(Vec<u32>),
}

impl Slots {
    fn of(places: Vec<u32>) -> Self {
        let narrow: Result<_, _> = places.iter().map(|place| u16::try_from(*place)).collect();
        narrow.map_or_else(|_| Self::Wide(places), Self::Narrow)
    }
}

impl Table {
    /// Members are (index that a pick gives back, unique key, weight); the key is the address as text, as in Envoy.
    pub fn build(members: &[(u32, &str, f64)], size: usize) -> Self {
        let members = shares(members);
        let size = size_for(members.len(), size);
        let slots = Slots::of(fill(&members, size as u32));
        Self { slots, members: members.iter().map(|(index, _, _)| *index).collect() }
    }

    /// The number of slots; 0 without members.
    pub fn size(&self) -> usize {
        match &self.slots {
            Slots::Narrow(slots) => slots.len(),
            Slots::Wide(slots) => slots.len(),
        }
    }

    /// The owner; None without members.
    pub fn at(&self, hash: u64) -> Option<u32> {
        let slot = hash.checked_rem(self.size() as u64)? as usize;
        let place = match &self.slots {
            Slots::Narrow(slots) => usize::from(*slots.get(slot)?),
            Slots::Wide(slots) => *slots.get(slot)? as usize,
        };
        self.members.get(place).copied()
    }

    /// The owner, then who is to stand in for it, always in the same order: the owners of other hashes made from this one,
    /// then each member once. Keys of one owner scatter over all others when it is out. Envoy's second choices aren't
    /// followed: it complements the hash, which mirrors the slot, and in a table of few members the mirror has a pattern.
    pub fn walk(&self, hash: u64) -> impl Iterator<Item = u32> + '_ {
        let again = (1..=REHASHES).filter_map(move |turn| self.at(xxh64(&hash.to_le_bytes(), turn)));
        self.at(hash).into_iter().chain(again).chain(self.scan(hash))
    }

    /// Each member once. A step without a common divisor with their number, so that those behind a failed one in the
    /// list aren't the only ones who inherit.
    fn scan(&self, hash: u64) -> impl Iterator<Item = u32> + '_ {
        let count = self.members.len() as u64;
        let mixed = xxh64(&hash.to_le_bytes(), 0);
        let start = mixed.checked_rem(count).unwrap_or(0);
        let wish = (mixed >> 32).checked_rem(count).unwrap_or(0);
        let step = (wish..).find(|step| divisor(*step, count) <= 1).unwrap_or(1);
        (0..count).filter_map(move |turn| self.members.get(((start + turn * step) % count) as usize).copied())
    }
}

/// The size that a table gets: the one wished for, if that is a prime and large enough for so many members.
pub fn size_for(members: usize, wish: usize) -> usize {
    let needed = wish.max(members.saturating_mul(SLOTS_EACH));
    let [.., largest] = SIZES;
    if needed == wish && wish <= largest && is_prime(wish) {
        return wish;
    }
    SIZES.into_iter().find(|size| *size >= needed).unwrap_or(largest)
}

fn is_prime(number: usize) -> bool {
    number > 1 && (2..).take_while(|divisor| divisor * divisor <= number).all(|divisor| number % divisor != 0)
}

fn divisor(a: u64, b: u64) -> u64 {
    if b == 0 {
        a
    } else {
        divisor(b, a % b)
    }
}

/// The place of the owner of each slot. In a round t a member takes a slot if t * share has come to its target, which
/// then grows by the heaviest share.
fn fill(members: &[(u32, &str, f64)], size: u32) -> Vec<u32> {
    let heaviest = members.iter().map(|(_, _, share)| *share).fold(0.0, f64::max);
    if members.is_empty() {
        Vec::new()
    } else if heaviest * members.len() as f64 <= UNEVEN {
        fill_in_turn(members, heaviest, size)
    } else {
        fill_by_queue(members, heaviest, size)
    }
}

fn fill_in_turn(members: &[(u32, &str, f64)], heaviest: f64, size: u32) -> Vec<u32> {
    let mut free = Free::new(members, size);
    let mut targets = vec![0.0; members.len()];
    for round in 1..=size {
        for (place, ((_, _, share), target)) in members.iter().zip(&mut targets).enumerate() {
            if f64::from(round) * share >= *target {
                *target += heaviest;
                if !free.take(place) {
                    return free.owners;
                }
            }
        }
    }
    free.owners
}

/// The same from a queue of next rounds: where one outweighs all others, most turns would pass without a slot taken.
fn fill_by_queue(members: &[(u32, &str, f64)], heaviest: f64, size: u32) -> Vec<u32> {
    let mut free = Free::new(members, size);
    let mut queue: BinaryHeap<_> = (0..members.len()).map(|place| Reverse((1u32, place))).collect();
    let mut targets = vec![0.0; members.len()];
    while let Some(mut next) = queue.peek_mut() {
        let Reverse((round, place)) = *next;
        if !free.take(place) {
            break;
        }
        let (Some(target), Some((_, _, share))) = (targets.get_mut(place), members.get(place)) else { break };
        *target += heaviest;
        *next = Reverse((due(*target, *share, round), place));
    }
    free.owners
}

/// The first round after `round` in which round * share is no less than the target. To the last bit of what a loop that
/// multiplies and compares comes to, hence no trust in the division.
fn due(target: f64, share: f64, round: u32) -> u32 {
    let guess = (target / share).ceil() as u32;
    let near = guess.saturating_sub(1).max(round.saturating_add(1));
    (near..near.saturating_add(3)).find(|round| f64::from(*round) * share >= target).unwrap_or(u32::MAX)
}

/// Which slots are free, and where each member looks next. A bit per slot, so that the search stays in the cache.
struct Free {
    owners: Vec<u32>,
    taken: Vec<u64>,
    left: u32,
    size: u32,
    orders: Vec<(u32, u32)>,
}

impl Free {
    fn new(members: &[(u32, &str, f64)], size: u32) -> Self {
        let order = |key: &str| {
            let (offset, skip) = (xxh64(key.as_bytes(), 0), xxh64(key.as_bytes(), 1));
            ((offset % u64::from(size)) as u32, (skip % u64::from(size - 1)) as u32 + 1)
        };
        Self {
            owners: vec![0; size as usize],
            taken: vec![0; size.div_ceil(64) as usize],
            left: size,
            size,
            orders: members.iter().map(|(_, key, _)| order(key)).collect(),
        }
    }

    /// Give the member the first free slot of its order; false if there is none.
    fn take(&mut self, place: usize) -> bool {
        let Some((next, skip)) = self.orders.get_mut(place).filter(|_| self.left > 0) else { return false };
        loop {
            let slot = *next;
            *next = slot + *skip;
            if *next >= self.size {
                *next -= self.size;
            }
            let Some(word) = self.taken.get_mut((slot >> 6) as usize) else { return false };
            let bit = 1u64 << (slot & 63);
            if *word & bit == 0 {
                *word |= bit;
                if let Some(owner) = self.owners.get_mut(slot as usize) {
                    *owner = place as u32;
                }
                self.left -= 1;
                return true;
            }
        }
    }
}

#[cfg(test)]
mod tests;
