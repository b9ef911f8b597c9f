//! Is this key within its rate?
//!
//! GCRA (the cell rate algorithm of ATM): of each key one time is kept, at which its bucket will be empty again; a call moves it
//! on by the interval of one call and passes if it is then no further ahead than the burst. No refill, no timer, and what it refuses
//! costs the key nothing. The keys come from outside, so their number is bounded: a full table drops keys whose time has passed,
//! which changes nothing, and then those nearest to that. Whoever is unknown afterwards is taken for the fullest of the dropped
//! ones: a flood of invented keys grows no memory and gives nobody a fresh bucket; beyond the whole table per interval, strangers
//! share one rate, and known keys keep theirs. It does not know what a key stands for: the caller hashes
//! that, with a secret seed.
use std::time::Duration;

use ahash::AHashMap;
use parking_lot::Mutex;

const SHARDS: usize = 16;
/// Seven eighths of a power of two, where a hash table is full as well: 57,344 keys in all, about 1.1 MB.
const SHARD_KEYS: usize = 3584;

/// A century in nanoseconds: no time that is reckoned with is beyond the range of its type.
const LONGEST: f64 = 3e18;

/// So many calls in so much time, and so many of them at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Nanoseconds between two calls.
    interval: u64,
    /// Nanoseconds that a key may be ahead.
    depth: u64,
}

impl Rate {
    /// `per` is in seconds. A burst below one call would let nothing through and counts as one; a rate of none does let nothing
    /// through.
    pub fn new(calls: f64, per: f64, burst: f64) -> Self {
        if calls <= 0.0 {
            return Self { interval: LONGEST as u64, depth: 0 };
        }
        let interval = (per * 1e9 / calls).round().clamp(1.0, LONGEST);
        Self { interval: interval as u64, depth: (interval * burst.max(1.0)).round().min(LONGEST) as u64 }
    }

    /// The time of a key after one more call, or for how long that is too early.
    fn after(self, time: u64, now: u64) -> Result<u64, u64> {
        // No further than a full bucket: a new plan may know a smaller one.
        let next = time.min(now.saturating_add(self.depth)).max(now).saturating_add(self.interval);
        match (next - now).saturating_sub(self.depth) {
            0 => Ok(next),
            early => Err(early),
        }
    }
}

/// One rate, kept for many keys. State of a Service.
#[derive(Debug, Default)]
pub struct Limiter {
    shards: [Mutex<Shard>; SHARDS],
}

#[derive(Debug, Default)]
struct Shard {
    times: AHashMap<u64, u64>,
    /// The time of whoever is not in the table.
    stranger: u64,
}

impl Limiter {
    /// One call of this key, or how long it has to wait for one.
    pub fn take(&self, key: u64, rate: Rate, now: Duration) -> Result<(), Duration> {
        let (now, Some(shard)) = (nanos(now), self.shard(key)) else { return Ok(()) };
        let mut shard = shard.lock();
        let next = rate.after(shard.time_of(key), now).map_err(Duration::from_nanos)?;
        if shard.times.len() >= SHARD_KEYS && !shard.times.contains_key(&key) {
            shard.make_room(now);
        }
        shard.times.insert(key, next);
        Ok(())
    }

    /// What `take` would say, with nothing taken.
    pub fn peek(&self, key: u64, rate: Rate, now: Duration) -> Result<(), Duration> {
        let Some(shard) = self.shard(key) else { return Ok(()) };
        let time = shard.lock().time_of(key);
        rate.after(time, nanos(now)).map(|_| ()).map_err(Duration::from_nanos)
    }

    /// A call that was taken did not go after all.
    pub fn give_back(&self, key: u64, rate: Rate) {
        if let Some(shard) = self.shard(key) {
            if let Some(time) = shard.lock().times.get_mut(&key) {
                *time = time.saturating_sub(rate.interval);
            }
        }
    }

    /// Keys in the table now.
    pub fn keys(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().times.len()).sum()
    }

    fn shard(&self, key: u64) -> Option<&Mutex<Shard>> {
        self.shards.get((key >> 60) as usize % SHARDS)
    }
}

impl Shard {
    fn time_of(&self, key: u64) -> u64 {
        self.times.get(&key).copied().unwrap_or(self.stranger)
    }

    /// An eighth at once, so that looking at all keys is paid by hundreds of new ones.
    fn make_room(&mut self, now: u64) {
        self.times.retain(|_, time| *time > now);
        let excess = self.times.len().saturating_sub(SHARD_KEYS - SHARD_KEYS / 8);
        if excess == 0 {
            return;
        }
        let mut times: Vec<u64> = self.times.values().copied().collect();
        let (_, last, _) = times.select_nth_unstable(excess - 1);
        self.stranger = self.stranger.max(*last);
        let last = *last;
        self.times.retain(|_, time| *time > last);
    }
}

/// One of several rates that a call has to pass.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    pub limiter: &'a Limiter,
    pub key: u64,
    pub rate: Rate,
}

/// Which of the asked rates holds a call back the longest, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Excess {
    pub place: usize,
    pub wait: Duration,
}

/// One call of each, or of none: what one rate refuses must not use up another.
pub fn take_all(asks: &[Ask<'_>], now: Duration) -> Result<(), Excess> {
    let waits = asks.iter().enumerate().filter_map(|(place, ask)| {
        let wait = ask.limiter.peek(ask.key, ask.rate, now).err()?;
        Some(Excess { place, wait })
    });
    if let Some(longest) = waits.max_by_key(|excess| (excess.wait, std::cmp::Reverse(excess.place))) {
        return Err(longest);
    }
    for (place, ask) in asks.iter().enumerate() {
        if let Err(wait) = ask.limiter.take(ask.key, ask.rate, now) {
            // Another thread was quicker.
            asks.iter().take(place).for_each(|taken| taken.limiter.give_back(taken.key, taken.rate));
            return Err(Excess { place, wait });
        }
    }
    Ok(())
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::*;
    use crate::random::Random;

    const NOW: Duration = Duration::from_secs(1000);
    const MILLI: Duration = Duration::from_millis(1);

    /// A leaky bucket as one would draw it: a level that sinks with time, in nanoseconds of calls.
    #[derive(Clone, Copy)]
    struct Bucket {
        level: u64,
        at: u64,
    }

    impl Bucket {
        fn take(&mut self, interval: u64, depth: u64, now: u64) -> Result<(), Duration> {
            self.level = self.level.saturating_sub(now - self.at);
            self.at = now;
            if self.level + interval > depth {
                return Err(Duration::from_nanos(self.level + interval - depth));
            }
            self.level += interval;
            Ok(())
        }
    }

    #[test]
    fn a_limiter_without_keys_is_small() {
        assert_eq!(std::mem::size_of::<Rate>(), 16);
        assert!(std::mem::size_of::<Limiter>() <= SHARDS * 80, "{}", std::mem::size_of::<Limiter>());
    }

    #[test]
    fn a_burst_goes_at_once_and_the_rest_at_the_rate() {
        let (limiter, rate) = (Limiter::default(), Rate::new(10.0, 1.0, 3.0));
        assert_eq!((0..5).filter(|_| limiter.take(7, rate, NOW).is_ok()).count(), 3);
        assert_eq!(limiter.take(7, rate, NOW), Err(100 * MILLI));
        assert_eq!(limiter.take(7, rate, NOW + 99 * MILLI), Err(MILLI));
        assert_eq!(limiter.take(7, rate, NOW + 100 * MILLI), Ok(()));
        assert_eq!(limiter.take(8, rate, NOW + 100 * MILLI), Ok(()));
    }

    #[test]
    fn it_says_what_a_leaky_bucket_says() {
        for seed in 0..2000 {
            let random = Random::new(seed);
            let interval = 1 + random.below(1000) as u64;
            let burst = 1 + random.below(20) as u64;
            let rate = Rate { interval, depth: interval * burst };
            let (limiter, mut now) = (Limiter::default(), 1_000_000u64);
            let mut buckets = [Bucket { level: 0, at: now }; 4];
            for _ in 0..100 {
                now += random.below(1 + interval as usize * [0, 1, 2, 40][random.below(4)]) as u64;
                let key = random.below(4);
                let expected = buckets[key].take(interval, rate.depth, now);
                let hash = (key as u64) << 59 | 5;
                assert_eq!(limiter.peek(hash, rate, Duration::from_nanos(now)), expected, "seed {seed}");
                assert_eq!(limiter.take(hash, rate, Duration::from_nanos(now)), expected, "seed {seed}");
            }
        }
    }

    #[test]
    fn all_or_none_says_what_leaky_buckets_say() {
        for seed in 0..2000 {
            let random = Random::new(seed);
            let rates: Vec<Rate> = (0..3)
                .map(|_| {
                    let interval = 1 + random.below(300) as u64;
                    Rate { interval, depth: interval * (1 + random.below(6) as u64) }
                })
                .collect();
            let limiters = [Limiter::default(), Limiter::default(), Limiter::default()];
            let mut now = 1_000_000u64;
            let mut buckets = [[Bucket { level: 0, at: now }; 2]; 3];
            for _ in 0..100 {
                now += random.below(200) as u64;
                let keys: Vec<usize> = (0..3).map(|_| random.below(2)).collect();
                let asks: Vec<Ask<'_>> =
                    (0..3).map(|n| Ask { limiter: &limiters[n], key: keys[n] as u64, rate: rates[n] }).collect();
                let mut after = buckets;
                let waits: Vec<Option<Duration>> =
                    (0..3).map(|n| after[n][keys[n]].take(rates[n].interval, rates[n].depth, now).err()).collect();
                let expected = match waits.iter().max().copied().flatten() {
                    None => {
                        buckets = after;
                        Ok(())
                    }
                    Some(wait) => Err(Excess { place: waits.iter().position(|w| *w == Some(wait)).unwrap(), wait }),
                };
                assert_eq!(take_all(&asks, Duration::from_nanos(now)), expected, "seed {seed}");
            }
        }
    }

    #[test]
    fn what_is_given_back_can_be_taken_again() {
        let (limiter, rate) = (Limiter::default(), Rate::new(1.0, 60.0, 2.0));
        assert_eq!((0..3).map(|_| limiter.take(7, rate, NOW).is_ok()).collect::<Vec<_>>(), [true, true, false]);
        limiter.give_back(7, rate);
        assert_eq!((0..2).map(|_| limiter.take(7, rate, NOW).is_ok()).collect::<Vec<_>>(), [true, false]);
        limiter.give_back(8, rate);
        assert_eq!(limiter.keys(), 1);
    }

    #[test]
    fn threads_together_get_no_more_than_the_burst() {
        let (limiters, rate) = ([Limiter::default(), Limiter::default()], Rate::new(1.0, 3600.0, 100.0));
        let passed: usize = std::thread::scope(|scope| {
            let work = |_| {
                let asks = [Ask { limiter: &limiters[0], key: 1, rate }, Ask { limiter: &limiters[1], key: 2, rate }];
                scope.spawn(move || (0..200).filter(|_| take_all(&asks, NOW).is_ok()).count())
            };
            let threads: Vec<_> = (0..4).map(work).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(passed, 100);
    }

    #[test]
    fn what_fails_in_the_middle_gives_back_what_it_has() {
        // Twice the same key stands for another thread that comes in between.
        let (first, second, rate) = (Limiter::default(), Limiter::default(), Rate::new(1.0, 60.0, 1.0));
        let (one, other) = (Ask { limiter: &first, key: 1, rate }, Ask { limiter: &second, key: 2, rate });
        let wait = Duration::from_secs(60);
        assert_eq!(take_all(&[one, other, other], NOW), Err(Excess { place: 2, wait }));
        assert_eq!(take_all(&[one, other], NOW), Ok(()));
        assert_eq!(take_all(&[one, other], NOW), Err(Excess { place: 0, wait }));
    }

    #[test]
    fn a_new_plan_with_a_higher_rate_frees_who_waited_for_the_old_one() {
        let (limiter, slow, fast) = (Limiter::default(), Rate::new(1.0, 3600.0, 5.0), Rate::new(10.0, 1.0, 5.0));
        (0..5).for_each(|_| limiter.take(7, slow, NOW).unwrap());
        assert_eq!(limiter.take(7, fast, NOW), Err(100 * MILLI));
        assert_eq!(limiter.take(7, fast, NOW + 100 * MILLI), Err(100 * MILLI));
    }

    #[test]
    fn nothing_passes_at_a_rate_of_none() {
        let (limiter, rate) = (Limiter::default(), Rate::new(0.0, 1.0, 5.0));
        assert!(limiter.take(7, rate, NOW).is_err());
        assert!(limiter.take(7, rate, NOW * 1000).is_err());
    }

    #[test]
    fn keys_whose_time_has_passed_make_room_without_a_trace() {
        let (limiter, rate, random) = (Limiter::default(), Rate::new(10.0, 1.0, 3.0), Random::new(1));
        for n in 0..100_000u32 {
            // All but 20,000 at a time are empty again.
            assert_eq!(limiter.take(random.next(), rate, NOW + n * MILLI / 200), Ok(()));
        }
        assert!(limiter.keys() <= SHARDS * SHARD_KEYS);
        assert!(limiter.shards.iter().all(|shard| shard.lock().stranger == 0));
    }

    #[test]
    fn a_flood_of_invented_keys_grows_no_memory_and_lifts_no_limit() {
        let (limiter, rate, random) = (Limiter::default(), Rate::new(1.0, 60.0, 10.0), Random::new(1));
        let known = random.next();
        let (mut passed, mut now) = (0, NOW);
        for n in 0..240_000u32 {
            now += Duration::from_micros(250);
            let _ = limiter.take(random.next(), rate, now);
            if n % 1000 == 0 {
                passed += u32::from(limiter.take(known, rate, now).is_ok());
            }
        }
        // A minute has gone by.
        assert!((1..=11).contains(&passed), "{passed}");
        assert!(limiter.keys() <= SHARDS * SHARD_KEYS && SHARDS * SHARD_KEYS <= 65_536);
    }

    #[test]
    fn a_key_that_a_flood_drove_out_gets_no_fresh_bucket() {
        let (limiter, rate) = (Limiter::default(), Rate::new(1.0, 60.0, 2.0));
        assert_eq!(limiter.take(7, rate, NOW), Ok(()));
        (100..4100).for_each(|key| assert_eq!(limiter.take(key, rate, NOW + MILLI), Ok(())));
        assert!(!limiter.shards[0].lock().times.contains_key(&7));
        let rest: Vec<bool> = (0..2).map(|_| limiter.take(7, rate, NOW + 2 * MILLI).is_ok()).collect();
        assert_eq!(rest, [true, false]);
    }

    #[test]
    fn a_flood_does_not_touch_whom_it_finds_with_a_full_bucket() {
        let (limiter, rate, random) = (Limiter::default(), Rate::new(1.0, 60.0, 3.0), Random::new(1));
        let known = random.next();
        (0..3).for_each(|_| limiter.take(known, rate, NOW).unwrap());
        (0..70_000).for_each(|_| {
            let _ = limiter.take(random.next(), rate, NOW);
        });
        assert_eq!(limiter.take(known, rate, NOW), Err(Duration::from_secs(60)));
        assert_eq!(limiter.take(known, rate, NOW + Duration::from_secs(60)), Ok(()));
    }
}
