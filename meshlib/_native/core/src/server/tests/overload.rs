//! More than the service can do: what comes through, for whom, and how soon does everybody know?
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::*;
use crate::random::Random;

const MILLI: Duration = Duration::from_millis(1);
/// Twenty workers, 10 to 30 ms each: a thousand a second at the most. Twice as many may be in flight, so that no worker is idle.
const WORKERS: usize = 20;
const PLACES: u32 = 40;
/// How long 99 % take at most while there is no load.
const EASY: Duration = Duration::from_millis(30);
const LEVELS: [&str; 3] = ["critical_plus", "critical", "sheddable"];

#[derive(Debug, Default)]
struct Tally {
    offered: u32,
    /// How long those who were served and those who were refused waited for their answer.
    served: Vec<Duration>,
    refused: Vec<Duration>,
}

impl Tally {
    fn share(&self) -> f64 {
        self.served.len() as f64 / f64::from(self.offered)
    }
}

fn p99(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times.get(times.len() * 99 / 100).copied().unwrap_or_default()
}

struct Call {
    entry: Entry,
    level: usize,
    /// How often it has been tried before.
    tried: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    WorkEnds(usize),
    PatienceEnds(usize),
    /// Another try of a call of this level.
    Retry(usize, u32),
}

/// Callers that come by chance and leave 250 ms, and a service that works for some of them.
struct Stage {
    gate: Gate,
    calls: Vec<Option<Call>>,
    events: BTreeSet<(Duration, u64, Event)>,
    number: u64,
    parked: BTreeMap<u64, usize>,
    /// Calls that are in and have no worker yet.
    inside: VecDeque<usize>,
    working: usize,
    random: Random,
    tallies: [Tally; 3],
    /// How often who was refused tries again.
    tries: u32,
}

impl Stage {
    fn new(queue: f64) -> Self {
        let gate = gate_of(|plan| {
            let admission = &mut plan["admission"];
            admission["in_flight"] = json!(PLACES);
            admission["queue"] = json!(queue);
            admission["priorities"] = json!([{"from": [{"kind": "exact", "value": SHOP}], "paths": [], "as": "told"}]);
        });
        Self {
            gate,
            calls: Vec::new(),
            events: BTreeSet::new(),
            number: 0,
            parked: BTreeMap::new(),
            inside: VecDeque::new(),
            working: 0,
            random: Random::new(11),
            tallies: Default::default(),
            tries: 0,
        }
    }

    fn plan(&mut self, at: Duration, event: Event) {
        self.number += 1;
        self.events.insert((at, self.number, event));
    }

    fn arrive(&mut self, level: usize, tried: u32, now: Duration) {
        let fields = [("x-mesh-priority", LEVELS[level]), ("x-mesh-deadline-ms", "250")];
        let entry = come(&self.gate, now, "/", SHOP, &fields);
        let place = self.calls.len();
        let (ticket, status, patience) = (entry.ticket(), entry.status(), entry.patience());
        self.calls.push(Some(Call { entry, level, tried }));
        if ticket > 0 {
            self.parked.insert(ticket, place);
            self.plan(now + patience, Event::PatienceEnds(place));
        } else if status == 0 {
            self.inside.push_back(place);
        } else {
            self.refuse(place, now);
        }
        self.call(self.gate.called(), now);
    }

    fn refuse(&mut self, place: usize, now: Duration) {
        let Call { entry, level, tried } = self.calls[place].take().unwrap();
        self.tallies[level].refused.push(now - entry.begun());
        if tried < self.tries {
            self.plan(now + 20 * MILLI, Event::Retry(level, tried + 1));
        }
    }

    fn call(&mut self, tickets: Vec<u64>, now: Duration) {
        for ticket in tickets {
            let place = self.parked.remove(&ticket).unwrap();
            self.resume(place, now);
        }
    }

    fn resume(&mut self, place: usize, now: Duration) {
        if self.calls[place].as_ref().unwrap().entry.resume(now) {
            self.inside.push_back(place);
        } else {
            self.refuse(place, now);
            self.call(self.gate.called(), now);
        }
    }

    fn happen(&mut self, event: Event, now: Duration) {
        match event {
            Event::WorkEnds(place) => {
                let Call { entry, level, .. } = self.calls[place].take().unwrap();
                self.tallies[level].served.push(now - entry.begun());
                self.working -= 1;
                self.call(entry.finish(200, now), now);
            }
            Event::PatienceEnds(place) => {
                let ticket = self.calls[place].as_ref().map_or(0, |call| call.entry.ticket());
                if self.parked.remove(&ticket).is_some() {
                    self.resume(place, now);
                }
            }
            Event::Retry(level, tried) => self.arrive(level, tried, now),
        }
        self.work(now);
    }

    fn work(&mut self, now: Duration) {
        while self.working < WORKERS {
            let Some(place) = self.inside.pop_front() else { break };
            self.working += 1;
            let took = 10 * MILLI + 20 * MILLI * self.random.below(1000) as u32 / 1000;
            self.plan(now + took, Event::WorkEnds(place));
        }
    }

    fn until(&mut self, end: Duration) {
        while let Some((at, number, event)) = self.events.first().copied().filter(|(at, ..)| *at <= end) {
            self.events.remove(&(at, number, event));
            self.happen(event, at);
        }
    }

    /// So many of each level in a second come by chance. How many were served in that time.
    fn run(&mut self, seconds: std::ops::Range<u32>, rates: [u32; 3]) -> usize {
        let random = Random::new(7);
        let served = |stage: &Self| stage.tallies.iter().map(|tally| tally.served.len()).sum::<usize>();
        let before = served(self);
        for step in seconds.start * 10_000..seconds.end * 10_000 {
            let now = NOW + step * MILLI / 10;
            self.until(now);
            for (level, rate) in rates.into_iter().enumerate() {
                if random.below(10_000) < rate as usize {
                    self.tallies[level].offered += 1;
                    self.arrive(level, 0, now);
                    self.work(now);
                }
            }
            assert!(self.gate.load().in_flight <= PLACES);
        }
        served(self) - before
    }

    /// Nobody comes any more. Nothing may be left.
    fn end(mut self) -> [Tally; 3] {
        self.until(Duration::MAX);
        let load = self.gate.load();
        assert_eq!((load.in_flight, load.waiting, self.parked.len(), self.inside.len()), (0, 0, 0, 0));
        assert!(self.calls.iter().all(Option::is_none));
        self.tallies
    }
}

#[test]
fn under_three_times_the_load_the_service_does_all_it_can_and_what_matters_comes_through() {
    for rates in [[200, 300, 2500], [300, 500, 2200], [50, 100, 2850]] {
        let mut stage = Stage::new(0.5);
        let goodput = stage.run(0..10, rates) as f64 / 10_000.0;
        let [plus, critical, sheddable] = &mut stage.end();
        assert!(goodput >= 0.95, "{rates:?}: {goodput}");
        assert!(plus.share() >= 0.999 && critical.share() >= 0.99, "{} {}", plus.share(), critical.share());
        assert!(sheddable.share() < 0.4, "{}", sheddable.share());
        let served: Vec<Duration> =
            [&plus.served, &critical.served, &sheddable.served].into_iter().flatten().copied().collect();
        assert!(p99(&mut served.clone()) <= 3 * EASY, "{rates:?}: {:?}", p99(&mut served.clone()));
        assert!(p99(&mut sheddable.refused) <= 5 * MILLI, "{rates:?}: {:?}", p99(&mut sheddable.refused));
    }
}

#[test]
fn where_even_what_matters_most_is_too_much_nothing_else_is_let_in_and_no_work_is_lost() {
    let mut stage = Stage::new(0.5);
    let goodput = stage.run(0..10, [3000, 500, 500]) as f64 / 10_000.0;
    let [plus, critical, sheddable] = &mut stage.end();
    assert!(goodput >= 0.98, "{goodput}");
    assert!(critical.share() + sheddable.share() < 0.01, "{} {}", critical.share(), sheddable.share());
    assert!(p99(&mut plus.served) <= 3 * EASY && p99(&mut plus.refused) <= 5 * MILLI);
}

#[test]
fn however_long_a_queue_may_be_nobody_waits_long_in_it() {
    // Two thousand may wait, which is two seconds of work.
    let mut stage = Stage::new(50.0);
    let goodput = stage.run(0..20, [3000, 0, 0]) as f64 / 20_000.0;
    let [plus, ..] = &mut stage.end();
    assert!(goodput >= 0.98, "{goodput}");
    assert!(p99(&mut plus.served) <= 3 * EASY && p99(&mut plus.refused) <= 5 * MILLI);
}

#[test]
fn after_an_overload_with_retries_the_service_is_itself_again_at_once() {
    // 1.3 times what it can do for ten seconds, and who is refused tries three times more; then 0.8 times.
    let mut stage = Stage::new(0.5);
    stage.tries = 3;
    let over = stage.run(0..10, [100, 1000, 200]);
    let after = stage.run(10..12, [80, 600, 120]);
    assert!(over >= 9500 && after as f64 >= 0.95 * 1600.0, "{over} {after}");
    stage.end();
}

#[test]
fn a_burst_is_served_by_the_queue() {
    let run = |queue: f64| {
        let mut stage = Stage::new(queue);
        // Fifty at once, once in a while: forty find a place, and ten are let in as those are done.
        for burst in 1..=10 {
            let now = NOW + burst * 100 * MILLI;
            stage.until(now);
            (0..50).for_each(|_| stage.arrive(0, 0, now));
            stage.work(now);
        }
        stage.end()[0].served.len()
    };
    assert_eq!((run(0.5), run(0.0)), (500, 400));
}
