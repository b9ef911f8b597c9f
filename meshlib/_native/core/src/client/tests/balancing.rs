//! Which endpoint takes the call? Weights, homes of keys, sessions, subsets, warming up, reported load: each policy, as users are told.
use serde_json::json;

use super::stage::*;
use super::*;

const BY_CHANCE: [&str; 3] = ["peak_ewma", "least_request", "random"];
const BY_KEY: [&str; 2] = ["ring_hash", "maglev"];

fn get() -> Request<'static> {
    request("GET", "/")
}

fn keyed(key: &str) -> Request<'_> {
    Request { key: Some(key), ..request("GET", "/") }
}

/// Where the keys `k0` to `k999` go.
fn homes(engine: &Engine, now: f64) -> Vec<String> {
    (0..1000).map(|n| send(&mut begin_with(engine, &keyed(&format!("k{n}")), &Vec::new(), now), now).1).collect()
}

// --- weights

/// Idle endpoints get calls in proportion to their weights (chi-square, p > 1e-6).
#[test]
fn idle_endpoints_share_calls_by_weight() {
    for name in BY_CHANCE {
        let engine = policy(name).engine(&weighted(&[1.0, 2.0, 3.0, 4.0]));
        let hits = spread(&engine, &get(), 20_000, 1.0);
        let distance = chi_square(&hits, &[("e0", 1.0), ("e1", 2.0), ("e2", 3.0), ("e3", 4.0)]);
        assert!(distance < CHANCE[3], "{name}: {distance} {hits:?}");
    }
}

/// Turns are exact, and those of a heavy endpoint are spread between those of the others.
#[test]
fn round_robin_is_exact_and_smooth() {
    let engine = policy("round_robin").engine(&weighted(&[5.0, 1.0, 1.0]));
    let turns: Vec<String> = (0..1400).map(|_| answered(&engine, &get(), &Vec::new(), 1.0)).collect();
    let count = |name: &str| turns.iter().filter(|turn| *turn == name).count();
    for (name, expected) in [("e0", 1000), ("e1", 200), ("e2", 200)] {
        assert!(count(name).abs_diff(expected) <= 1, "{name}: {}", count(name));
        let places: Vec<usize> = (0..turns.len()).filter(|n| turns[*n] == name).collect();
        let gaps = places.windows(2).map(|pair| pair[1] - pair[0]);
        let (least, most) = (gaps.clone().min().unwrap(), gaps.max().unwrap());
        let even = 1400 / expected;
        assert!(most <= even + 2 && least + 2 >= even, "{name}: gaps from {least} to {most}, even ones are {even}");
    }
}

/// With equal weights everybody comes once in each round.
#[test]
fn round_robin_of_equals_takes_each_once_in_a_round() {
    let engine = policy("round_robin").engine(&fleet(5));
    for _ in 0..20 {
        assert_eq!(spread(&engine, &get(), 5, 1.0).len(), 5);
    }
}

/// A key's chance to live at an endpoint is that endpoint's weight.
#[test]
fn keys_live_where_there_is_weight() {
    for name in BY_KEY {
        let engine = policy(name).with("/balance/hash/ring", json!(65_536)).engine(&weighted(&[1.0, 3.0, 0.0]));
        let mut hits: HashMap<String, usize> = HashMap::new();
        for n in 0..4000 {
            *hits.entry(answered(&engine, &keyed(&format!("key-{n}")), &Vec::new(), 1.0)).or_default() += 1;
        }
        let distance = chi_square(&hits, &[("e0", 1.0), ("e1", 3.0)]);
        assert!(distance < CHANCE[1], "{name}: {distance} {hits:?}");
    }
}

/// Of two the less busy one is taken, where busy is measured against the weight.
#[test]
fn least_request_goes_to_whoever_has_fewest_in_flight_for_its_weight() {
    let engine = policy("least_request").engine(&weighted(&[1.0, 3.0]));
    let held: Vec<Call> = (0..80)
        .map(|_| {
            let mut call = begin_with(&engine, &get(), &Vec::new(), 1.0);
            send(&mut call, 1.0);
            call
        })
        .collect();
    let busy = ["e0", "e1"].map(|name| row(&engine, name, 1.0).in_flight);
    assert!(busy[0].abs_diff(20) <= 1 && busy[1].abs_diff(60) <= 1, "{busy:?}");
    drop(held);
}

/// The average of round trips decides between two: one that was slow once, or failed fast, is left alone for now.
#[test]
fn peak_ewma_prefers_the_quick_and_counts_failures_as_slow() {
    for (status, took) in [(200, 0.5), (503, 0.001), (429, 0.001)] {
        let engine = setting().with("/routes/1/retry/attempts", json!(0)).engine(&fleet(2));
        let mut call = begin_with(&engine, &get(), &Vec::new(), 1.0);
        let (token, bad) = send(&mut call, 1.0);
        call.head(token, Response, status, Pushback::Unsaid, at(1.0 + took)).unwrap();
        let good = if bad == "e0" { "e1" } else { "e0" };
        assert_eq!(spread(&engine, &get(), 50, 3.0), [(good.to_owned(), 50)].into(), "after {status} in {took} s");
    }
}

/// What an endpoint asks for with Retry-After counts as its round trip, up to 300 s.
#[test]
fn retry_after_is_felt_by_balance() {
    let engine = setting().engine(&fleet(1));
    let mut call = begin_with(&engine, &get(), &Vec::new(), 1.0);
    let (token, _) = send(&mut call, 1.0);
    call.head(token, Response, 429, Pushback::After(at(60.0)), at(1.01)).unwrap();
    assert_eq!(row(&engine, "e0", 1.01).ewma.round(), 60.0);
}

// --- keys

/// Header, cookie, variable of the path, peer and the application's own key: the same one has the same home, others have others.
#[test]
fn a_key_has_a_home_wherever_it_comes_from() {
    for name in BY_KEY {
        for kind in ["header", "cookie", "path", "peer", "own"] {
            let parts = if kind == "own" { json!([]) } else { json!([{"kind": kind, "name": "user"}]) };
            let engine = policy(name)
                .with("/balance/hash/on", parts)
                .with("/routes/1/match/path", json!({"kind": "template", "value": "/users/{user}/orders"}))
                .engine(&fleet(5));
            let home = |key: &str| {
                let (path, peer) = (format!("/users/{key}/orders"), format!("spiffe://shop/{key}"));
                let other = "/users/0/orders";
                let ask = Request { path: if kind == "path" { &path } else { other }, ..get() };
                let lines = match kind {
                    "header" => header("User", key),
                    "cookie" => header("Cookie", &format!("a=b; user={key}; c=d")),
                    _ => Vec::new(),
                };
                let ask =
                    Request { key: (kind == "own").then_some(key), peer: (kind == "peer").then_some(&peer), ..ask };
                answered(&engine, &ask, &lines, 1.0)
            };
            let all: std::collections::HashSet<String> = (0..60)
                .map(|n| {
                    let key = format!("u{n}");
                    let first = home(&key);
                    assert!((0..3).all(|_| home(&key) == first), "{name} by {kind}: {key} moves");
                    first
                })
                .collect();
            assert_eq!(all.len(), 5, "{name} by {kind}");
        }
    }
}

/// All parts that are there make the key, and a part that is absent is left out; a call with none of them goes anywhere.
#[test]
fn parts_of_a_key_are_combined() {
    let parts = json!([{"kind": "header", "name": "x-user"}, {"kind": "cookie", "name": "shop"}]);
    let engine = policy("ring_hash").with("/balance/hash/on", parts).engine(&fleet(16));
    let both = |user: &str, shop: &str| [header("x-user", user), header("cookie", &format!("shop={shop}"))].concat();
    let home = |lines: &Lines| answered(&engine, &get(), lines, 1.0);
    let differ = |a: &dyn Fn(usize) -> Lines, b: &dyn Fn(usize) -> Lines| {
        (0..40).filter(|n| home(&a(*n)) != home(&b(*n))).count()
    };
    let of = |n: usize| format!("{n}");
    assert_eq!(differ(&|n| both(&of(n), "s"), &|n| both(&of(n), "s")), 0);
    assert!(differ(&|n| both(&of(n), "s"), &|n| both(&of(n), "t")) > 30);
    assert!(differ(&|n| both(&of(n), "s"), &|n| header("x-user", &of(n))) > 30);
    assert!((0..100).map(|_| home(&Vec::new())).collect::<std::collections::HashSet<_>>().len() > 8);
}

/// While an endpoint is out only its own keys move, and all come home when it is back; the same where it leaves and joins again.
#[test]
fn a_key_survives_the_ejection_of_another_endpoint_and_returns_home() {
    for name in BY_KEY {
        let engine = policy(name).engine(&fleet(8));
        let before = homes(&engine, 1.0);
        assert!(engine.isolate("orders", "e3", true, at(1.0)));
        let meanwhile = homes(&engine, 1.0);
        for (was, is) in before.iter().zip(&meanwhile) {
            assert!(if was == "e3" { is != "e3" } else { was == is }, "{name}: {was} to {is}");
        }
        let refuges: std::collections::HashSet<_> =
            before.iter().zip(&meanwhile).filter(|(was, _)| *was == "e3").map(|(_, is)| is).collect();
        assert!(refuges.len() > 4, "{name}: all of its keys went to {refuges:?}");
        engine.isolate("orders", "e3", false, at(2.0));
        assert_eq!(homes(&engine, 3.0), before);
        let others: Vec<Address> = fleet(8).into_iter().filter(|found| found.address != "e3").collect();
        engine.resolve("orders", 2, &others, at(3.0)).unwrap();
        let moved = before.iter().zip(homes(&engine, 3.0)).filter(|(was, is)| *was != "e3" && *was != is).count();
        // Some more than must: a table is filled anew, and a ring of the same size gives those who stay more points (as Envoy's does).
        assert!(moved < 150, "{name}: {moved} moved for nothing");
        engine.resolve("orders", 3, &fleet(8), at(3.0)).unwrap();
        assert_eq!(homes(&engine, 3.0), before);
    }
}

/// With a bound nobody has more in flight than so many times the mean, rounded up, however popular a key is.
#[test]
fn bounded_load_spreads_a_popular_key() {
    for name in BY_KEY {
        let engine = policy(name).with("/balance/hash/bound", json!(1.25)).engine(&fleet(4));
        let mut held = Vec::new();
        for total in 1..=200 {
            let mut call = begin_with(&engine, &keyed("popular"), &Vec::new(), 1.0);
            send(&mut call, 1.0);
            held.push(call);
            let most = (1.25 * f64::from(total) / 4.0).ceil() as u32;
            let busy: Vec<u32> = (0..4).map(|n| row(&engine, &format!("e{n}"), 1.0).in_flight).collect();
            assert!(busy.iter().all(|n| *n <= most), "{name}: {busy:?} of {total}");
        }
        held.clear();
        let home = answered(&engine, &keyed("popular"), &Vec::new(), 1.0);
        assert!((0..10).all(|_| answered(&engine, &keyed("popular"), &Vec::new(), 1.0) == home));
    }
}

/// A retry leaves the home of its key, and the next call is back at it.
#[test]
fn a_retry_leaves_the_home() {
    for name in BY_KEY {
        let engine = policy(name).engine(&fleet(4));
        let mut call = begin_with(&engine, &keyed("k"), &Vec::new(), 1.0);
        let (token, home) = send(&mut call, 1.0);
        assert_eq!(call.head(token, Response, 503, Pushback::Unsaid, at(1.0)).unwrap(), Reply::Retry);
        assert_ne!(send(&mut call, 1.5).1, home);
        assert_eq!(answered(&engine, &keyed("k"), &Vec::new(), 2.0), home);
    }
}

// --- sessions

/// The first answer sets a session, and who comes back with it meets the same endpoint and gets no other.
#[test]
fn a_session_sticks_until_its_endpoint_is_out() {
    for kind in ["cookie", "header"] {
        let engine = setting().with("/balance/sticky", json!({"kind": kind, "name": "x-home"})).engine(&fleet(6));
        let lines = |session: u64| match kind {
            "cookie" => header("cookie", &format!("theme=dark; x-home={session:016x}")),
            _ => header("X-Home", &format!("{session:016x}")),
        };
        let visit = |lines: &Lines, now: f64| {
            let mut call = begin_with(&engine, &get(), lines, now);
            let (token, name) = send(&mut call, now);
            call.head(token, Response, 200, Pushback::Unsaid, at(now)).unwrap();
            let new = call.new_session().map(|(_, name, session)| {
                assert_eq!(name, "x-home");
                session
            });
            call.finish(token, Response, at(now)).unwrap();
            (name, new)
        };
        let (home, first) = visit(&Vec::new(), 1.0);
        let first = first.unwrap();
        for n in 0..50 {
            assert_eq!(visit(&lines(first), 1.0 + f64::from(n)), (home.clone(), None), "{kind}");
        }
        engine.isolate("orders", &home, true, at(60.0));
        let (refuge, second) = visit(&lines(first), 60.0);
        let second = second.unwrap();
        assert!(refuge != home && second != first, "{kind}");
        engine.isolate("orders", &home, false, at(61.0));
        // It was told of its new endpoint, and stays there.
        assert_eq!(
            (0..20).map(|_| visit(&lines(second), 70.0)).filter(|seen| *seen == (refuge.clone(), None)).count(),
            20
        );
    }
}

/// A session that nobody gave out is as good as none: no error, and a new one.
#[test]
fn a_forged_session_is_replaced() {
    let engine = setting().with("/balance/sticky", json!({"kind": "cookie", "name": "s"})).engine(&fleet(3));
    for value in
        ["", "e0", "0000000000000000", "+000000000000001", "zzzzzzzzzzzzzzzz", "00000000000000000000000000000001"]
    {
        let mut call = begin_with(&engine, &get(), &header("cookie", &format!("s={value}")), 1.0);
        send(&mut call, 1.0);
        assert!(call.new_session().is_some(), "{value:?}");
    }
}

// --- subsets

fn labelled(labels: &[(&str, &str)]) -> Labels {
    labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// A call that names labels meets only endpoints that carry all of them, its retries too.
#[test]
fn labels_of_a_call_choose_a_subset() {
    for name in ["peak_ewma", "round_robin", "ring_hash"] {
        let found = vec![address("a", "v1"), address("b", "v2"), address("c", "v2"), address("d", "v1")];
        let engine = policy(name).with("/routes/1/retry/attempts", json!(3)).engine(&found);
        let wanted = labelled(&[("version", "v2")]);
        for n in 0..40 {
            let now = 10.0 * f64::from(n);
            let mut call =
                begin_with(&engine, &Request { labels: Some(&wanted), key: Some("k"), ..get() }, &Vec::new(), now);
            let mut tried = Vec::new();
            for later in 0..3 {
                let (token, address) = send(&mut call, now + f64::from(later));
                tried.push(address);
                call.head(token, Response, 503, Pushback::Unsaid, at(now + f64::from(later))).unwrap();
            }
            assert!(tried.iter().all(|address| address == "b" || address == "c"), "{name}: {tried:?}");
        }
    }
}

/// Labels that nobody carries are no endpoint, not some other one.
#[test]
fn unknown_labels_are_no_endpoint() {
    let engine = setting().engine(&fleet(3));
    for wanted in [labelled(&[("version", "v9")]), labelled(&[("version", "v1"), ("region", "eu")])] {
        let mut call = begin_with(&engine, &Request { labels: Some(&wanted), ..get() }, &Vec::new(), 1.0);
        assert!(matches!(call.next(at(1.0)), Err(Refusal::NoEndpoint(_))), "{wanted:?}");
        assert_eq!(in_flight(&engine), 0);
    }
}

// --- slow start

/// Ten percent of its share at first, in a straight line to the whole of it; a fleet of which all is new has nobody to spare.
#[test]
fn a_newcomer_warms_up_and_the_first_fleet_does_not() {
    // Not peak EWMA: it also has to learn first how quick the newcomer is.
    for name in ["random", "round_robin", "least_request"] {
        let engine = policy(name).with("/balance/slow_start", json!(10.0)).engine(&fleet(3));
        let hits = spread(&engine, &get(), 6000, 0.1);
        assert!(chi_square(&hits, &[("e0", 1.0), ("e1", 1.0), ("e2", 1.0)]) < CHANCE[2], "{name}: {hits:?}");
        engine.resolve("orders", 2, &fleet(4), at(100.0)).unwrap();
        for (age, part) in [(0.0, 0.1), (5.0, 0.5), (10.0, 1.0)] {
            let hits = spread(&engine, &get(), 12_000, 100.0 + age);
            let expected = part / (3.0 + part);
            let share = hits["e3"] as f64 / 12_000.0;
            assert!((share / expected - 1.0).abs() < 0.25, "{name} after {age} s: {share:.4}, expected {expected:.4}");
        }
    }
}

/// Who was ejected and comes back warms up as well.
#[test]
fn an_endpoint_warms_up_after_its_probe() {
    let engine = policy("random").with("/balance/slow_start", json!(10.0)).engine(&fleet(3));
    while row(&engine, "e0", 1.0).breaker == "closed" {
        drive(&engine, "GET", 1.0, |name| if name == "e0" { (Refused, 0) } else { (Response, 200) });
    }
    assert_eq!(drive(&engine, "GET", 50.0, |_| (Response, 200)).0, ["e0"]);
    for (age, part) in [(0.5, 0.1), (5.0, 0.5), (11.0, 1.0)] {
        let share = spread(&engine, &get(), 12_000, 50.0 + age)["e0"] as f64 / 12_000.0;
        let expected = part / (2.0 + part);
        assert!((share / expected - 1.0).abs() < 0.25, "after {age} s: {share:.4}, expected {expected:.4}");
    }
}

// --- reported load

fn reporting(engine: &Engine, from: u32, to: u32, loads: &[(&str, f64)]) {
    for second in from..to {
        for _ in 0..40 {
            let now = f64::from(second);
            let mut call = begin_with(engine, &get(), &Vec::new(), now);
            let (token, name) = send(&mut call, now);
            call.head(token, Response, 200, Pushback::Unsaid, at(now)).unwrap();
            if let Some((_, cpu)) = loads.iter().find(|(known, _)| *known == name) {
                call.report(token, format!("TEXT cpu_utilization={cpu},rps_fractional=100").as_bytes(), at(now));
            }
            call.finish(token, Response, at(now)).unwrap();
        }
        engine.tend(at(f64::from(second)));
    }
}

/// Equal for the first ten seconds of reports, then by what is reported; the silent one counts as the mean, and all are equal again when
/// the reports have stopped for three minutes.
#[test]
fn reported_load_weighs_after_the_blackout_until_it_expires() {
    for name in ["random", "round_robin"] {
        let engine = policy(name).with("/balance/weights", json!("orca")).engine(&fleet(3));
        let loads = [("e0", 0.25), ("e1", 0.75)];
        reporting(&engine, 1, 9, &loads);
        let equal = [("e0", 1.0), ("e1", 1.0), ("e2", 1.0)];
        let hits = spread(&engine, &get(), 6000, 9.0);
        assert!(chi_square(&hits, &equal) < CHANCE[2], "{name}, blackout: {hits:?}");
        reporting(&engine, 9, 20, &loads);
        // 400 and 133 calls per unit of load, and their mean.
        let hits = spread(&engine, &get(), 12_000, 20.0);
        let distance = chi_square(&hits, &[("e0", 3.0), ("e1", 1.0), ("e2", 2.0)]);
        assert!(distance < CHANCE[2], "{name}: {distance} {hits:?}");
        engine.tend(at(201.0));
        let hits = spread(&engine, &get(), 6000, 201.0);
        assert!(chi_square(&hits, &equal) < CHANCE[2], "{name}, expired: {hits:?}");
    }
}

/// Errors that an endpoint reports make it look loaded.
#[test]
fn reported_errors_count_as_load() {
    let engine = policy("random").with("/balance/weights", json!("orca")).engine(&fleet(2));
    for second in 1..20 {
        for _ in 0..20 {
            let now = f64::from(second);
            let mut call = begin_with(&engine, &get(), &Vec::new(), now);
            let (token, name) = send(&mut call, now);
            call.head(token, Response, 200, Pushback::Unsaid, at(now)).unwrap();
            // 100 / 0.5 against 100 / (0.5 + 50 / 100).
            let eps = if name == "e1" { 50 } else { 0 };
            call.report(token, format!("TEXT cpu_utilization=0.5,rps_fractional=100,eps={eps}").as_bytes(), at(now));
            call.finish(token, Response, at(now)).unwrap();
        }
        engine.tend(at(f64::from(second)));
    }
    let hits = spread(&engine, &get(), 9000, 20.0);
    assert!(chi_square(&hits, &[("e0", 2.0), ("e1", 1.0)]) < CHANCE[1], "{hits:?}");
}
