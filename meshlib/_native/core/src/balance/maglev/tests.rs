//! Does the table give keys to whom Envoy gives them, evenly, and to whom while the owner is out?
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]
use super::super::golden::*;
use super::*;

fn picks(table: &Table) -> String {
    hashes(100).map(|hash| table.at(hash).unwrap().to_string()).collect()
}

#[test]
fn picks_are_those_of_envoy() {
    assert_eq!(picks(&Table::build(&seven(EQUAL), 65_537)), MAGLEV_EQUAL);
    assert_eq!(picks(&Table::build(&seven(UNEQUAL), 65_537)), MAGLEV_UNEQUAL);
    assert_eq!(picks(&Table::build(&seven(UNEQUAL), 1_009)), MAGLEV_SMALL);
}

#[test]
fn the_order_of_the_list_makes_no_difference() {
    let (given, mut turned) = (seven(UNEQUAL), seven(UNEQUAL));
    turned.reverse();
    assert_eq!(Table::build(&given, 1_009), Table::build(&turned, 1_009));
}

#[test]
fn shares_are_even_to_a_slot() {
    let names = names(100);
    let places = fill(&shares(&equal(&names)), 65_537);
    let mut counts = [0; 100];
    places.iter().for_each(|place| counts[*place as usize] += 1);
    assert!(counts.iter().all(|count| (655..=656).contains(count)), "{counts:?}");
}

#[test]
fn shares_follow_the_weights() {
    let table = Table::build(&[(5, "a", 1.0), (9, "b", 3.0)], 65_537);
    let owners = (0..65_537).filter(|slot| table.at(*slot) == Some(9)).count();
    assert_eq!(owners, 49_152);
}

#[test]
fn less_than_twice_the_keys_move_that_must_when_one_of_a_hundred_leaves() {
    let names = names(100);
    let before = Table::build(&equal(&names), 65_537);
    let rest: Vec<_> = equal(&names).into_iter().filter(|(index, _, _)| *index != 7).collect();
    let after = Table::build(&rest, 65_537);
    let moved: Vec<_> = (0..65_537).filter(|slot| before.at(*slot) != after.at(*slot)).collect();
    let own = moved.iter().filter(|slot| before.at(**slot) == Some(7)).count();
    assert_eq!((own, moved.len()), (655, 1_003));
}

#[test]
fn a_table_too_small_for_its_members_or_of_no_prime_size_grows() {
    assert_eq!(size_for(10, 1_009), 1_009);
    assert_eq!(size_for(11, 1_009), 65_537);
    assert_eq!(size_for(7, 65_536), 65_537);
    assert_eq!(size_for(655, 65_537), 65_537);
    assert_eq!(size_for(656, 65_537), 262_147);
    assert_eq!(size_for(10_000, 65_537), 1_048_583);
    assert_eq!(size_for(100_000, 65_537), 5_000_011);
    assert_eq!(size_for(1, usize::MAX), 5_000_011);
    assert!(SIZES.into_iter().all(is_prime));
    assert!(![0, 1, 4, 9, 65_535].into_iter().any(is_prime));
}

#[test]
fn the_queue_fills_as_the_turns_do() {
    let names = names(60);
    for heavy in [1.0, 2.5, 40.0, 1e6] {
        let weight = |index: u32| if index == 7 { heavy } else { 1.0 + f64::from(index % 10) / 7.0 };
        let given: Vec<_> = equal(&names).into_iter().map(|(index, key, _)| (index, key, weight(index))).collect();
        let members = shares(&given);
        let heaviest = members.iter().map(|(_, _, share)| *share).fold(0.0, f64::max);
        let (turns, queue) = (fill_in_turn(&members, heaviest, 65_537), fill_by_queue(&members, heaviest, 65_537));
        assert!(turns == queue, "weight {heavy}");
    }
}

#[test]
fn a_walk_begins_at_the_owner_and_meets_every_member() {
    let table = Table::build(&seven(UNEQUAL), 1_009);
    for hash in hashes(50) {
        let walk: Vec<_> = table.walk(hash).collect();
        assert_eq!((walk.len(), walk.first().copied()), (1 + 16 + 7, table.at(hash)));
        let mut last = walk[17..].to_vec();
        last.sort_unstable();
        assert_eq!(last, [0, 1, 2, 3, 4, 5, 6]);
    }
}

#[test]
fn the_keys_of_a_failed_owner_scatter_by_weight() {
    let table = Table::build(&[(0, "a", 1.0), (1, "b", 1.0), (2, "c", 2.0)], 65_537);
    let heirs: Vec<_> = hashes(9_000).filter(|hash| table.at(*hash) == Some(0)).collect();
    let to_c = heirs.iter().filter(|hash| table.walk(**hash).find(|index| *index != 0) == Some(2)).count();
    let share = to_c as f64 / heirs.len() as f64;
    assert!((0.62..0.71).contains(&share), "{share} of {}", heirs.len());
}

#[test]
fn places_that_fit_are_kept_in_two_bytes() {
    assert_eq!(Slots::of(vec![0, 65_535]), Slots::Narrow(vec![0, 65_535]));
    assert_eq!(Slots::of(vec![0, 65_536]), Slots::Wide(vec![0, 65_536]));
}

#[test]
fn nobody_owns_an_empty_table() {
    let table = Table::build(&[], 65_537);
    assert_eq!((table.size(), table.at(5), table.walk(5).count()), (0, None, 0));
}
