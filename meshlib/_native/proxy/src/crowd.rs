//! Has this one enough already? How many places each of many holds, so that nobody takes those of the others.
use std::sync::Arc;

use ahash::AHashMap;
use parking_lot::Mutex;

type Held = Mutex<AHashMap<Arc<str>, usize>>;

/// Places of one kind; each name may hold so many.
pub struct Crowd {
    most: usize,
    held: Arc<Held>,
}

/// A place, until it is dropped.
pub struct Seat {
    name: Arc<str>,
    held: Arc<Held>,
}

impl Crowd {
    pub fn of(most: usize) -> Crowd {
        Crowd { most, held: Arc::default() }
    }

    /// None: this one has as many as it may.
    pub fn take(&self, name: &Arc<str>) -> Option<Seat> {
        let mut held = self.held.lock();
        let count = held.entry(name.clone()).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(Seat { name: name.clone(), held: self.held.clone() })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut held = self.held.lock();
        let is_last = held.get_mut(&self.name).is_some_and(|count| {
            *count = count.saturating_sub(1);
            *count == 0
        });
        if is_last {
            held.remove(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
    use super::*;

    #[test]
    fn one_that_is_full_leaves_room_for_another() {
        let crowd = Crowd::of(2);
        let (one, other): (Arc<str>, Arc<str>) = ("one".into(), "other".into());
        let held: Vec<_> = [crowd.take(&one), crowd.take(&one)].into_iter().flatten().collect();
        assert!(held.len() == 2 && crowd.take(&one).is_none() && crowd.take(&other).is_some());
        drop(held);
        assert!(crowd.take(&one).is_some() && crowd.held.lock().is_empty());
    }
}
