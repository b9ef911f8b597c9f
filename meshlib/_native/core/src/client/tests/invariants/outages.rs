//! What if all of them are down, and what when one comes back? Attempts are bounded by calls, and a return is noticed at any rate of calls.
use serde_json::json;

use super::super::stage::{fleet, policy, setting, Setting};
use super::*;

/// Attempts stay below 1.2 for each call, ten a second and the first reserve, whatever fails and however often a route may retry.
#[test]
fn an_outage_of_all_is_answered_with_a_fifth_more_attempts_and_no_storm() {
    for_each_seed(300, |seed| {
        let chance = Random::new(seed ^ 0x0dd);
        let size = 1 + chance.below(12);
        let engine = policy(POLICIES[chance.below(6)])
            .with("/routes/1/retry/attempts", json!(1 + chance.below(8)))
            .with("/routes/1/retry/backoff_base", json!(0.001))
            .with("/admit/breaker/max_ejected", json!([0.5, 0.0][chance.below(2)]))
            .seeded(seed, &fleet(size));
        let (rate, seconds) = ([2.0, 50.0, 400.0][chance.below(3)], 1.0 + chance.unit() * 14.0);
        let calls = ((rate * seconds) as usize).min(600);
        let outcomes = [Refused, Reset, Response, Outcome::Timeout];
        let mut attempts = 0;
        let mut end = 0.0f64;
        for n in 0..calls {
            let mut now = n as f64 / rate;
            let hedge = (chance.below(2) == 0).then(|| at(0.01));
            let mut call = engine.begin(&Request { hedge, ..request("GET", "/") }, &Vec::new(), at(now)).unwrap();
            let mut running = Vec::new();
            loop {
                match call.next(at(now)) {
                    Ok(Next::Wait(wait)) => now += wait.as_secs_f64(),
                    Ok(Next::Send { token, .. }) => {
                        attempts += 1;
                        running.push(token);
                        now += 0.011;
                        if call.hedge(true, false, at(now)) == Some(Duration::ZERO) {
                            continue;
                        }
                    }
                    Ok(Next::Await) => {}
                    Err(_) => break,
                }
                if let Some(token) = running.pop() {
                    let outcome = outcomes[chance.below(4)];
                    if call
                        .head(token, outcome, if outcome == Response { 503 } else { 0 }, Pushback::Unsaid, at(now))
                        .unwrap()
                        == Reply::Deliver
                    {
                        break;
                    }
                }
            }
            end = end.max(now);
        }
        let allowed = 1.2 * calls as f64 + 10.0 * end + 100.0;
        assert!(
            f64::from(attempts) <= allowed,
            "{attempts} attempts for {calls} calls in {end:.1} s: {allowed:.0} are allowed"
        );
    });
}

/// Calls at a steady rate to a fleet of which one is dead until `back`. Returns when it was first used again, and when that was due: the
/// end of its wait, known by counting its openings, and one call later. None: nobody had noticed that it was dead.
fn first_use_after_return(setting: &Setting, seed: u64, size: usize, rate: f64, method: &str) -> Option<(f64, f64)> {
    let engine = setting.seeded(seed, &fleet(size));
    let chance = Random::new(seed);
    let death = 1.0 / rate;
    let back = death + (5.0 + 40.0 * chance.unit()).max(4.0 / rate);
    // A wait that began before the return, and one interval until the call that finds it over.
    let (mut openings, mut opened) = (0, 0.0);
    for n in 0.. {
        let now = f64::from(n) / rate;
        let mut call = engine.begin(&request(method, "/"), &Vec::new(), at(now)).unwrap();
        let mut later = now;
        loop {
            match call.next(at(later)).unwrap() {
                Next::Wait(wait) => later += wait.as_secs_f64(),
                Next::Await => panic!("nothing else is under way"),
                Next::Send { token, place, .. } => {
                    let is_killed = call.address(place) == "e0";
                    if is_killed && now >= back {
                        if openings == 0 {
                            return None;
                        }
                        let wait = 2.0f64.powi(openings - 1).min(60.0) * 1.25;
                        return Some((now, (opened + wait).max(back) + 1.0 / rate));
                    }
                    let is_dead = is_killed && now >= death;
                    let outcome = if is_dead { Refused } else { Response };
                    if is_dead {
                        (openings, opened) = (openings + 1, later);
                    }
                    let reply =
                        call.head(token, outcome, if is_dead { 0 } else { 200 }, Pushback::Unsaid, at(later)).unwrap();
                    if reply == Reply::Deliver {
                        if !is_dead {
                            call.finish(token, Response, at(later)).unwrap();
                        }
                        break;
                    }
                }
            }
        }
        assert!(
            now < back + 200.0,
            "the killed endpoint, back since {back:.1}, is still unused after {openings} openings"
        );
    }
    unreachable!()
}

/// From a call in ten seconds to a thousand a second, in every policy that spreads calls.
#[test]
fn a_killed_endpoint_that_returns_is_used_again_within_its_probe_interval() {
    let rates = [(0.1, 60), (1.0, 60), (10.0, 30), (100.0, 6), (1000.0, 1)];
    for (rate, seeds) in rates {
        for_each_seed(seeds, |seed| {
            let name = ["peak_ewma", "least_request", "round_robin", "random"][seed as usize % 4];
            let setting = policy(name).with("/balance/slow_start", json!([0.0, 10.0][seed as usize / 4 % 2]));
            let method = ["GET", "POST"][seed as usize % 2];
            let Some((used, due)) = first_use_after_return(&setting, seed, 2 + seed as usize % 5, rate, method) else {
                return;
            };
            assert!(used <= due + 1e-6, "{name} at {rate} calls/s: used at {used:.2}, due at {due:.2}");
        });
    }
}

/// Retries that budgets of many processes allow add up layer by layer, so only the first layer retries.
#[test]
fn what_is_called_as_a_retry_does_not_retry() {
    let engine = setting().engine(&fleet(3));
    let mut call = engine.begin(&Request { layer: 1, ..request("GET", "/") }, &Vec::new(), at(0.0)).unwrap();
    let (token, _) = send(&mut call, 0.0);
    assert_eq!(call.head(token, Refused, 0, Pushback::Unsaid, at(0.0)).unwrap(), Reply::Deliver);
}
