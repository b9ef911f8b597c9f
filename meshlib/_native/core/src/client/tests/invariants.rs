//! What holds whatever happens? Seeded walks over an engine, against a model that counts for itself.
//!
//! A walk begins, answers, hedges, cancels and drops calls, moves endpoints and time, and publishes plans, in an order that only its seed
//! knows. After each step the engine is compared with what the walk itself knows. A seed that fails is printed, and `SEED=n` runs it alone.
use std::collections::HashSet;

use serde_json::json;

use super::stage::{header, policy, Lines, Setting};
use super::*;
use crate::admit::breaker::State;
use crate::client::carried::deadline_ms;
use crate::client::fleet::{session_of, Backend, Fleet};
use crate::client::health::EndpointState;
use crate::model::Outcome::{Declined, Identity, Unwritten};

mod outages;

const SEEDS: u64 = 2400;
const STEPS: usize = 120;
const POLICIES: [&str; 6] = ["peak_ewma", "least_request", "round_robin", "random", "ring_hash", "maglev"];
const PANIC: f64 = 0.5;

/// The seed of a walk, told when the walk ends in a panic.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("it was seed {}: run it alone with SEED={}", self.0, self.0);
        }
    }
}

fn for_each_seed(count: u64, story: impl Fn(u64)) {
    let only = std::env::var("SEED").ok().and_then(|seed| seed.parse::<u64>().ok());
    for seed in only.map_or(0..count, |seed| seed..seed + 1) {
        let told = Seed(seed);
        story(seed);
        drop(told);
    }
}

// --- the walk

/// A call and what the walk itself knows of it.
struct Live {
    call: Call,
    /// What the call has pinned.
    service: Arc<Service>,
    fleet: Arc<Fleet>,
    subset: Option<Labels>,
    /// Token and endpoint of each attempt without a head.
    running: Vec<(u32, Arc<EndpointState>)>,
    /// The attempt whose body is under way.
    body: Option<(u32, Arc<EndpointState>)>,
    tried: Vec<Arc<EndpointState>>,
    method: &'static str,
    is_replayable: bool,
    most: u32,
    repeats: u32,
    hedges: u32,
    has_replayed: bool,
    is_waiting_by_hand: bool,
}

impl Live {
    fn backend(&self, story: &Record) -> Arc<Backend> {
        if let Some(labels) = &self.subset {
            return self.service.subset(&self.fleet, labels);
        }
        let route = self.service.routes.iter().position(|route| route.plan.name == story.route).unwrap();
        let plan = &self.service.routes[route].plan;
        let backend = plan.backends.iter().position(|backend| backend.name == story.backend).unwrap();
        self.fleet.backend(route, backend).unwrap().clone()
    }
}

struct Walk {
    chance: Random,
    policies: usize,
    setting: Setting,
    engine: Engine,
    now: f64,
    version: u64,
    addresses: Vec<Address>,
    live: Vec<Live>,
    /// Ended, but not dropped yet: what they held must be back already.
    ended: Vec<Call>,
    /// Every endpoint that there ever was.
    known: Vec<Arc<EndpointState>>,
    ratio: f64,
    per_second: f64,
    attempts: u32,
    limit: u32,
    pending: u32,
    most_ejected: f64,
    begun: Vec<f64>,
    repeated: Vec<f64>,
}

impl Walk {
    fn new(seed: u64) -> Self {
        let chance = Random::new(seed ^ 0x5eed);
        let one = |list: &[f64]| list[chance.below(list.len())];
        let (ratio, per_second) = (one(&[0.0, 0.2, 0.2]), one(&[0.0, 0.3, 10.0]));
        let (attempts, most_ejected) = (chance.below(4) as u32, one(&[0.5, 0.5, 1.0]));
        let (limit, pending) = (one(&[3.0, 8.0, 1024.0]) as u32, one(&[0.0, 2.0]) as u32);
        // A table of Maglev takes long to build, so few walks know that policy.
        let policies = if seed % 300 == 0 { 6 } else { 5 };
        let mut setting = policy(POLICIES[chance.below(policies)])
            .whole("/zone", json!(["", "a", "b"][chance.below(3)]))
            .with("/budget/ratio", json!(ratio))
            .with("/budget/per_second", json!(per_second))
            .with("/balance/hash/bound", json!(one(&[0.0, 1.25])))
            .with("/admit/in_flight", json!(limit))
            .with("/admit/pending", json!(pending))
            .with("/admit/breaker/slow", json!(one(&[0.0, 0.05])))
            .with("/admit/breaker/max_ejected", json!(most_ejected))
            .with("/balance/slow_start", json!(one(&[0.0, 10.0])))
            .with("/balance/hash/ring", json!(16))
            .with("/balance/hash/table", json!(31))
            .with("/balance/hash/on", json!([{"kind": "header", "name": "x-user"}]))
            .with("/balance/locality", locality(&chance));
        if chance.below(3) == 0 {
            setting = setting.with("/balance/sticky", json!({"kind": "header", "name": "x-session"}));
        }
        for route in 0..2 {
            setting = setting.with(&format!("/routes/{route}/retry/attempts"), json!(attempts));
        }
        let addresses: Vec<Address> = (0..1 + chance.below(8)).map(|n| somewhere(&chance, n)).collect();
        let engine = setting.seeded(seed, &addresses);
        let mut walk = Self {
            chance,
            policies,
            setting,
            engine,
            now: 0.0,
            version: 1,
            addresses,
            live: Vec::new(),
            ended: Vec::new(),
            known: Vec::new(),
            ratio,
            per_second,
            attempts,
            limit,
            pending,
            most_ejected,
            begun: Vec::new(),
            repeated: Vec::new(),
        };
        walk.meet();
        walk
    }

    fn service(&self) -> Arc<Service> {
        self.engine.find("orders").unwrap()
    }

    /// Remember the endpoints that there are now.
    fn meet(&mut self) {
        for endpoint in &self.service().fleet().endpoints {
            if !self.known.iter().any(|state| Arc::ptr_eq(state, &endpoint.state)) {
                self.known.push(endpoint.state.clone());
            }
        }
    }

    fn step(&mut self) {
        self.now += self.chance.unit() * 0.02;
        match self.chance.below(100) {
            0..=24 => self.begin(),
            25..=49 => self.next(),
            50..=69 => self.head(),
            70..=74 => self.finish(),
            75..=79 => self.hedge(),
            80..=82 => self.give_up(),
            83..=85 => self.now += self.chance.unit() * [0.5, 3.0, 20.0][self.chance.below(3)],
            86..=88 => self.resolve(),
            89..=90 => {
                let (name, is_isolated) = (self.some_address(), self.chance.below(2) == 0);
                self.engine.isolate("orders", &name, is_isolated, at(self.now));
            }
            91..=94 => {
                let (name, is_healthy) = (self.some_address(), self.chance.below(3) > 0);
                self.engine.check("orders", &name, is_healthy, at(self.now));
            }
            95..=96 => self.publish(),
            97 => self.engine.tend(at(self.now)),
            _ => self.stop_or_wait(),
        }
        if self.chance.below(4) == 0 {
            self.ended.clear();
        }
        self.permits_are_conserved();
        self.counts_equal_a_recount();
    }

    fn some_address(&self) -> String {
        let n = self.chance.below(self.addresses.len().max(1));
        self.addresses.get(n).map_or_else(String::new, |found| found.address.clone())
    }

    fn begin(&mut self) {
        if self.live.len() > 12 {
            return;
        }
        let chance = &self.chance;
        // A call on whose behalf this one is made, and what that one told us of its end.
        let parent = (!self.live.is_empty() && chance.below(3) == 0).then(|| chance.below(self.live.len()));
        let parent = parent.map(|n| self.live[n].call.deadline()).filter(|end| *end > at(self.now));
        let told = parent.map(|end| at(self.now) + Duration::from_millis(deadline_ms(at(self.now), end)));
        let (method, is_replayable) = (["GET", "GET", "POST"][chance.below(3)], chance.below(5) > 0);
        let key = format!("k{}", chance.below(20));
        let session = format!("{:016x}", session_of(&self.some_address()));
        let headers: Lines = match chance.below(3) {
            0 => header("x-user", &key),
            1 => header("x-session", &session),
            _ => Vec::new(),
        };
        let labels: Labels = [("version".to_owned(), ["v1", "v2", "v9"][chance.below(3)].to_owned())].into();
        let wanted = (chance.below(8) == 0).then_some(&labels);
        let retries = (chance.below(4) == 0).then(|| chance.below(4) as u32);
        let request = Request {
            deadline: told,
            timeout: (chance.below(3) == 0).then(|| at(0.05 + chance.unit())),
            retries,
            hedge: (chance.below(3) == 0).then(|| at(0.03)),
            zone: (chance.below(6) == 0).then_some("b"),
            key: (chance.below(6) == 0).then_some(&*key),
            labels: wanted,
            is_replayable,
            ..request(method, ["/", "/split"][chance.below(2)])
        };
        let known = self.live.len();
        let answer = self.engine.begin(&request, &headers, at(self.now));
        let is_full = known as u32 >= self.limit + self.pending;
        match answer {
            Ok(call) => {
                assert!(!is_full, "let in above the limit");
                // The next hop is never told 0 ms: what is left below that is the one exception.
                let least = Duration::from_millis(1);
                assert!(
                    parent.is_none_or(|end| call.deadline() <= end.max(at(self.now) + least)),
                    "beyond the parent's end"
                );
                self.begun.push(self.now);
                let service = self.service();
                self.live.push(Live {
                    call,
                    fleet: service.fleet(),
                    service,
                    subset: wanted.cloned(),
                    running: Vec::new(),
                    body: None,
                    tried: Vec::new(),
                    method,
                    is_replayable,
                    most: retries.unwrap_or(self.attempts),
                    repeats: 0,
                    hedges: 0,
                    has_replayed: false,
                    is_waiting_by_hand: false,
                });
            }
            // Permits that are free belong to those who wait.
            Err(Refusal::LimitExceeded(_)) => assert!(known as u32 >= self.limit, "refused below the limit"),
            Err(Refusal::DeadlineExceeded(_)) => assert!(told.is_some_and(|end| end <= at(self.now))),
            Err(other) => panic!("{other:?}"),
        }
    }

    fn some_live(&self) -> Option<usize> {
        (!self.live.is_empty()).then(|| self.chance.below(self.live.len()))
    }

    fn next(&mut self) {
        // As drivers do: nothing is asked for while an attempt is under way, unless two are.
        let may_ask = |live: &Live| live.body.is_none() && (live.running.is_empty() || live.hedges > 0);
        let Some(n) = self.some_live().filter(|n| may_ask(&self.live[*n])) else { return };
        let before = self.states();
        let (now, live) = (at(self.now), &mut self.live[n]);
        match live.call.next(now) {
            Ok(Next::Send { token, place, .. }) => {
                assert!(now < live.call.deadline(), "sent after the deadline");
                let told = Duration::from_millis(deadline_ms(now, live.call.deadline()));
                assert!(
                    told <= (live.call.deadline() - now).max(Duration::from_millis(1)),
                    "the next hop is told more than is left"
                );
                let state = live.fleet.endpoints[place as usize].state.clone();
                assert!(live.running.is_empty(), "another attempt beside one that is under way");
                live.running.push((token, state.clone()));
                live.tried.push(state);
                picks_are_of_healthy_ones(&self.live[n], place, &before);
            }
            Ok(Next::Wait(wait)) => {
                assert!(live.is_waiting_by_hand || now + wait <= live.call.deadline(), "it waits for nothing");
                assert!(live.running.is_empty());
            }
            Ok(Next::Await) => assert!(!live.running.is_empty(), "it awaits nothing"),
            Err(_) => self.end(n),
        }
    }

    fn head(&mut self) {
        let Some(n) = self.some_live().filter(|n| !self.live[*n].running.is_empty()) else { return };
        let before = self.states();
        let service = self.service();
        let chance = &self.chance;
        let (now, live) = (at(self.now), &mut self.live[n]);
        let (token, state) = live.running.swap_remove(chance.below(live.running.len()));
        let (any, _) = Outcome::ALL[chance.below(Outcome::ALL.len())];
        let outcome = if chance.below(2) == 0 { Response } else { any };
        let status = if outcome == Response { [200, 200, 404, 429, 503][chance.below(5)] } else { 0 };
        let pushback = match chance.below(6) {
            0 => Pushback::Never,
            1 => Pushback::After(at(0.01)),
            _ => Pushback::Unsaid,
        };
        let had_others = !live.running.is_empty();
        let is_free = matches!(outcome, Refused | Identity) && service.is_doubtful(&state);
        match live.call.head(token, outcome, status, pushback, now).unwrap() {
            Reply::Await => assert!(had_others),
            Reply::Retry => {
                assert!(!had_others, "a retry beside another attempt");
                assert!(live.is_replayable || matches!(outcome, Refused | Identity), "half a body was sent again");
                let is_safe = live.method == "GET" || matches!(outcome, Refused | Unwritten | Declined | Identity);
                assert!(is_safe, "{outcome:?} was repeated");
                if matches!(outcome, Stale | Unwritten) && !live.has_replayed {
                    live.has_replayed = true; // one for which the budget isn't asked
                } else {
                    live.repeats += 1;
                    assert!(live.repeats <= live.most, "more retries than asked for");
                    if !is_free {
                        self.repeated.push(self.now);
                    }
                }
            }
            Reply::Deliver if outcome == Response => {
                live.running.clear();
                live.body = Some((token, state));
            }
            Reply::Deliver => self.end(n),
        }
        if self.repeated.last() == Some(&self.now) {
            self.retries_are_within_the_budget();
        }
        self.ejections_are_allowed(&before);
    }

    fn finish(&mut self) {
        let Some(n) = self.some_live() else { return };
        let Some((token, _)) = self.live[n].body.clone() else { return };
        let before = self.states();
        let outcome = if self.chance.below(4) == 0 { Reset } else { Response };
        self.live[n].call.finish(token, outcome, at(self.now)).unwrap();
        self.end(n);
        self.ejections_are_allowed(&before);
    }

    fn hedge(&mut self) {
        let may_ask = |live: &Live| live.running.len() == 1;
        let Some(n) = self.some_live().filter(|n| may_ask(&self.live[*n])) else { return };
        let before = self.states();
        let (now, live) = (at(self.now), &mut self.live[n]);
        if live.call.hedge(true, false, now) != Some(Duration::ZERO) {
            return;
        }
        live.hedges += 1;
        self.repeated.push(self.now);
        assert!(live.hedges == 1 && live.method == "GET" && live.is_replayable, "a hedge that may not be");
        let Ok(Next::Send { token, place, .. }) = live.call.next(now) else { panic!("a hedge that doesn't go out") };
        let state = live.fleet.endpoints[place as usize].state.clone();
        assert!(!live.tried.iter().any(|tried| Arc::ptr_eq(tried, &state)), "a hedge to the same endpoint");
        live.running.push((token, state.clone()));
        live.tried.push(state);
        picks_are_of_healthy_ones(&self.live[n], place, &before);
        self.retries_are_within_the_budget();
    }

    fn give_up(&mut self) {
        let Some(n) = self.some_live() else { return };
        if self.chance.below(2) == 0 {
            self.live[n].call.abandon(at(self.now));
            self.end(n);
        } else {
            drop(self.live.swap_remove(n));
        }
    }

    fn end(&mut self, n: usize) {
        self.ended.push(self.live.swap_remove(n).call);
    }

    fn resolve(&mut self) {
        if self.chance.below(4) == 0 {
            // The registry has lost them, or found them again.
            let is_held = self.chance.below(2) == 0;
            let some = 1 + self.chance.below(3);
            self.addresses.iter_mut().step_by(some).for_each(|found| found.is_held = is_held);
        } else if self.chance.below(2) == 0 && self.addresses.len() > 1 {
            self.addresses.swap_remove(self.chance.below(self.addresses.len()));
        } else {
            let known: HashSet<&String> = self.addresses.iter().map(|found| &found.address).collect();
            let Some(new) = (0..8).map(|n| somewhere(&self.chance, n)).find(|found| !known.contains(&found.address))
            else {
                return;
            };
            self.addresses.push(new);
        }
        self.version += 1;
        self.engine.resolve("orders", self.version, &self.addresses, at(self.now)).unwrap();
        self.meet();
    }

    fn publish(&mut self) {
        let chance = &self.chance;
        self.setting = self
            .setting
            .clone()
            .with("/balance/policy", json!(POLICIES[chance.below(self.policies)]))
            .with("/balance/locality", locality(chance));
        self.engine.publish(&self.setting.text(), at(self.now)).unwrap();
        self.meet();
    }

    fn stop_or_wait(&mut self) {
        let Some(n) = self.some_live() else { return };
        let live = &mut self.live[n];
        if self.chance.below(2) == 0 {
            live.call.stop();
            live.most = live.repeats;
        } else {
            live.call.wait(at(self.chance.unit()), at(self.now));
            live.is_waiting_by_hand = true;
        }
    }

    // --- the rules

    fn states(&self) -> Vec<(Arc<EndpointState>, State)> {
        self.known.iter().map(|state| (state.clone(), state.health.lock().breaker.state)).collect()
    }

    /// Every call holds one permit of the Service or one place in its queue, and every attempt one of its endpoint.
    fn permits_are_conserved(&self) {
        let service = self.service();
        let (in_flight, pending) = (service.state.in_flight.count(), service.state.in_flight.pending());
        assert_eq!(in_flight + pending, self.live.len() as u32, "calls");
        assert!(in_flight <= self.limit && pending <= self.pending, "{in_flight} in flight, {pending} wait");
        for state in &self.known {
            let held = |live: &Live| {
                live.running.iter().chain(&live.body).filter(|(_, held)| Arc::ptr_eq(held, state)).count()
            };
            assert_eq!(state.in_flight.count() as usize, self.live.iter().map(held).sum::<usize>(), "attempts");
        }
    }

    /// 20 % of the calls and some a second, over ten seconds in ten buckets, for retries and hedges together.
    fn retries_are_within_the_budget(&self) {
        let bucket = |time: &f64| *time as i64;
        let recent =
            |times: &[f64]| times.iter().rev().take_while(|time| bucket(time) > bucket(&self.now) - 10).count() as f64;
        let (repeats, calls) = (recent(&self.repeated), recent(&self.begun));
        let allowed = self.ratio * calls + self.per_second * 10.0;
        assert!(repeats <= allowed + 1e-9, "{repeats} repeats for {calls} calls, {allowed} are allowed");
    }

    /// At most the share that is configured (half), and never the last one; of those that are told, where some are only held. One that is
    /// held and dead may always be.
    fn ejections_are_allowed(&self, before: &[(Arc<EndpointState>, State)]) {
        let fleet = self.service().fleet();
        let all = || fleet.endpoints.iter().enumerate();
        let all = || all().map(|(n, e)| (n, &e.state, e.state.health.lock().breaker.state));
        let was_closed =
            |state: &Arc<EndpointState>| before.iter().any(|(s, was)| Arc::ptr_eq(s, state) && *was == State::Closed);
        let has_told = fleet.endpoints.iter().enumerate().any(|(n, e)| e.weight > 0.0 && !fleet.is_held(n));
        let is_doubtful = |n: usize| has_told && fleet.is_held(n);
        for (n, state, _) in all().filter(|(_, state, is)| *is == State::Open && was_closed(state)) {
            if is_doubtful(n) && state.health.lock().breaker.is_dead() {
                continue;
            }
            let is_gone = |(at, _, is): &(usize, &Arc<EndpointState>, State)| {
                !is_doubtful(n) && is_doubtful(*at) && *is != State::Closed
            };
            let states = || all().filter(|each| !is_gone(each));
            let ejected = states().filter(|(_, _, is)| matches!(is, State::Open | State::HalfOpen)).count();
            let (out, total) = (states().filter(|(_, _, is)| *is != State::Closed).count(), states().count());
            assert!(out < total, "the last of {total} is out");
            assert!(ejected as f64 <= total as f64 * self.most_ejected, "{ejected} of {total} are ejected");
        }
    }

    /// What panic and zones go by is what a count of the endpoints says, in each Backend and each part of one.
    fn counts_equal_a_recount(&self) {
        let service = self.service();
        let fleet = service.fleet();
        let is_out = |n: usize| fleet.endpoints[n].state.health.lock().breaker.state != State::Closed;
        let recount = |backend: &Backend| {
            let members = (0..backend.count(&fleet)).filter_map(|n| backend.place(n));
            let out = members.filter(|place| fleet.endpoints[*place].weight > 0.0 && is_out(*place)).count();
            assert_eq!(backend.out(), out, "members that are out");
            let able = (0..backend.count(&fleet)).filter_map(|n| backend.place(n));
            let able: Vec<usize> = able.filter(|place| fleet.endpoints[*place].weight > 0.0).collect();
            let gone = gone_of(&able, &fleet, |place| is_out(*place)).len();
            assert_eq!(backend.health(), ((able.len() - out) as u32, (able.len() - gone) as u32), "how many there are");
        };
        for (route, of_route) in service.routes.iter().enumerate() {
            for backend in (0..of_route.plan.backends.len()).map(|n| fleet.backend(route, n).unwrap()) {
                recount(backend);
                backend.tiers.iter().for_each(recount);
                (0..9).filter_map(|zone| backend.in_zone(zone)).for_each(recount);
            }
        }
        let states = || fleet.endpoints.iter().enumerate();
        assert!(states().all(|(n, endpoint)| endpoint.state.is_out() == is_out(n)), "the flag that balance reads");
        let ejected = |state: State| matches!(state, State::Open | State::HalfOpen);
        let count = states().filter(|(_, e)| ejected(e.state.health.lock().breaker.state)).count();
        assert_eq!(service.state.ejected.lock().len(), count, "the list in which probes are found");
        assert_eq!(service.state.ejected_count.load(std::sync::atomic::Ordering::Relaxed) as usize, count);
    }
}

/// Who of these is out and not told any more, where others are told.
fn gone_of(able: &[usize], fleet: &Fleet, is_out: impl Fn(&usize) -> bool) -> Vec<usize> {
    let has_told = able.iter().any(|place| !fleet.is_held(*place));
    able.iter().copied().filter(|place| has_told && fleet.is_held(*place) && is_out(place)).collect()
}

/// Who is out is chosen only as a probe, in panic, once more on a fresh connection, or for want of anybody healthy; and nobody who is
/// isolated is.
fn picks_are_of_healthy_ones(live: &Live, place: u32, before: &[(Arc<EndpointState>, State)]) {
    let fleet = &live.fleet;
    let chosen = &fleet.endpoints[place as usize].state;
    let was =
        |state: &Arc<EndpointState>| before.iter().find(|(s, _)| Arc::ptr_eq(s, state)).map(|(_, was)| *was).unwrap();
    let story = live.call.record(at(0.0));
    let word = story.events.iter().rev().find(|event| event.phase == "balance").unwrap().what;
    let state = was(chosen);
    if word == "sent again on a fresh connection" || state == State::Closed {
        return assert_ne!(word, "probe");
    }
    assert_ne!(state, State::Isolated, "an isolated endpoint was {word}");
    if word == "probe" {
        return assert_eq!(state, State::Open, "one probe at a time, and none where checks fail");
    }
    let backend = live.backend(&story);
    let members: Vec<usize> = (0..backend.count(fleet)).filter_map(|n| backend.place(n)).collect();
    let is_healthy = |place: &usize| was(&fleet.endpoints[*place].state) == State::Closed;
    if word == "picked again, for want of another" {
        let is_better = |place: &usize| is_healthy(place) && fleet.endpoints[*place].weight > 0.0;
        return assert!(!members.iter().any(is_better), "a {state:?} endpoint was {word}, and there is a healthy one");
    }
    // A fleet that is not the newest any more has the counts of its last moment; only calls that began before go by it.
    if !Arc::ptr_eq(fleet, &live.service.newest()) {
        return;
    }
    // Panic, by our own count: of the backend, or of the priority.
    let is_few = |places: &Vec<usize>| {
        let able: Vec<usize> = places.iter().copied().filter(|n| fleet.endpoints[*n].weight > 0.0).collect();
        let gone = gone_of(&able, fleet, |place| !is_healthy(place));
        let able = || able.iter().filter(|place| !gone.contains(place));
        (able().filter(|place| is_healthy(place)).count() as f64) < able().count() as f64 * PANIC
    };
    let tiers =
        backend.tiers.iter().map(|tier| (0..tier.count(fleet)).filter_map(|n| tier.place(n)).collect::<Vec<_>>());
    let mut tiers = tiers.filter(|tier| tier.contains(&(place as usize)));
    assert!(is_few(&members) || tiers.any(|tier| is_few(&tier)), "a {state:?} endpoint was {word}");
}

fn locality(chance: &Random) -> serde_json::Value {
    let order: &[&str] = [&["b", "a"][..], &[]][chance.below(2)];
    let (policy, least) = (["off", "failover", "zone_aware"][chance.below(3)], 2 + 4 * chance.below(2));
    json!({"policy": policy, "order": order, "overprovisioning": 1.4, "least_endpoints": least})
}

fn somewhere(chance: &Random, n: usize) -> Address {
    let zone = ["a", "b", "c"][chance.below(3)].to_owned();
    let weight = [1.0, 1.0, 3.0, 0.0][chance.below(4)];
    let is_held = chance.below(4) == 0;
    Address { zone, weight, is_held, ..address(&format!("e{n}"), ["v1", "v2"][chance.below(2)]) }
}

/// Permits, budget, picks, deadlines, ejections and counts, whatever happens in whatever order.
#[test]
fn every_rule_holds_on_thousands_of_random_walks() {
    for_each_seed(SEEDS, |seed| {
        let mut walk = Walk::new(seed);
        for _ in 0..STEPS {
            walk.step();
        }
        walk.live.clear();
        walk.permits_are_conserved();
        walk.counts_equal_a_recount();
        assert!(walk.known.iter().all(|state| state.in_flight.count() == 0));
        assert_eq!((walk.service().state.in_flight.count(), walk.service().state.in_flight.pending()), (0, 0));
    });
}
