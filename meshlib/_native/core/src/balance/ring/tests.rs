//! Does the ring give keys to whom Envoy gives them, and leave the others alone?
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]
use super::super::golden::*;
use super::*;

fn picks(ring: &Ring) -> String {
    hashes(100).map(|hash| ring.walk(hash).next().unwrap().to_string()).collect()
}

/// How many of 10,000 keys move when the member leaves: its own, and others.
fn moved(count: usize, least: usize, leaver: u32) -> (usize, usize) {
    let names = names(count);
    let before = Ring::build(&equal(&names), least, 1 << 23);
    let rest: Vec<_> = equal(&names).into_iter().filter(|(index, _, _)| *index != leaver).collect();
    let after = Ring::build(&rest, least, 1 << 23);
    let pairs = hashes(10_000).map(|hash| (before.walk(hash).next().unwrap(), after.walk(hash).next().unwrap()));
    let (own, others): (Vec<_>, Vec<_>) = pairs.filter(|(a, b)| a != b).partition(|(a, _)| *a == leaver);
    (own.len(), others.len())
}

#[test]
fn picks_are_those_of_envoy() {
    assert_eq!(picks(&Ring::build(&seven(EQUAL), 1024, 1 << 23)), RING_EQUAL);
    assert_eq!(picks(&Ring::build(&seven(UNEQUAL), 1024, 1 << 23)), RING_UNEQUAL);
}

#[test]
fn a_ring_cut_to_its_largest_size_is_that_of_envoy() {
    // Weights of 25 make 25 points of a least of 10; cut to 20, shares are fractions and their rounding adds one.
    assert_eq!(Ring::build(&seven(UNEQUAL), 10, 50).size(), 25);
    let cut = Ring::build(&seven(UNEQUAL), 10, 20);
    assert_eq!((cut.size(), picks(&cut)), (21, RING_CUT.to_string()));
}

#[test]
fn the_order_of_the_list_makes_no_difference() {
    let (given, mut turned) = (seven(UNEQUAL), seven(UNEQUAL));
    turned.reverse();
    assert_eq!(Ring::build(&given, 100, 333), Ring::build(&turned, 100, 333));
}

#[test]
fn only_the_keys_of_the_one_that_left_move() {
    // 21 points each among 50 and among 49.
    let (own, others) = moved(50, 1024, 7);
    assert!((100..300).contains(&own), "{own}");
    assert_eq!(others, 0);
}

#[test]
fn other_keys_move_too_where_the_points_of_each_change() {
    // 128 points each among 8, 147 among 7.
    let (own, others) = moved(8, 1024, 7);
    assert!((1_000..1_500).contains(&own), "{own}");
    assert!((600..1_100).contains(&others), "{others}");
}

#[test]
fn a_weight_of_three_has_three_times_the_points() {
    let ring = Ring::build(&[(5, "a", 1.0), (9, "b", 3.0)], 1000, 4000);
    let points = |of: u32| ring.owners.iter().filter(|owner| **owner == of).count();
    assert_eq!((points(5), points(9)), (250, 750));
}

#[test]
fn load_is_even_to_a_third_with_a_hundred_points_each() {
    let names = names(10);
    let ring = Ring::build(&equal(&names), 1000, 1 << 23);
    let mut counts = [0; 10];
    hashes(100_000).for_each(|hash| counts[ring.walk(hash).next().unwrap() as usize] += 1);
    assert!(counts.iter().all(|count| (7_500..13_300).contains(count)), "{counts:?}");
}

#[test]
fn a_walk_turns_once_and_begins_at_the_owner() {
    let ring = Ring { hashes: vec![10, 20, 30], owners: vec![7, 8, 9] };
    let walk = |hash| ring.walk(hash).collect::<Vec<_>>();
    assert_eq!(walk(0), [7, 8, 9]);
    assert_eq!(walk(20), [8, 9, 7]);
    assert_eq!(walk(21), [9, 7, 8]);
    assert_eq!(walk(31), [7, 8, 9]);
    assert_eq!(Ring::default().walk(5).next(), None);
}

#[test]
fn nobody_owns_an_empty_ring() {
    assert_eq!(Ring::build(&[], 1024, 1 << 23), Ring::default());
    assert_eq!(Ring::build(&[(0, "a", 0.0)], 1024, 1 << 23), Ring::default());
}
