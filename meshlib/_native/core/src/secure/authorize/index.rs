//! Which of a thousand rules could match at all?
//!
//! A rule is filed under what it demands: each caller that it names (or any) together with each path that it names (or the segments
//! with which it begins, or any). A question opens the few drawers that could hold a match, and the rules in them are asked in full, in their
//! order; so the index decides nothing, and a collision of hashes costs a comparison. Short lists are simply walked.
//!
//! Rules for any caller whose paths begin alike for `DEPTH` segments share a drawer, and are walked too.
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::rule::{PathPattern, PeerPattern, Rule};
use super::{Action, Question};

/// Up to here walking is quicker than looking up.
const SHORT: usize = 8;
/// A rule that names more combinations than this is filed as one for anyone and anything.
const MOST_KEYS: usize = 1024;
/// So many segments tell the paths of an API apart (`/api/v1/orders/…`); each costs a look-up.
const DEPTH: usize = 4;

/// The rules of one action, in the order in which they were written.
#[derive(Debug)]
pub(super) struct Index {
    action: Action,
    numbers: Vec<usize>,
    drawers: Option<HashMap<u64, Vec<usize>, BuildHasherDefault<Identity>>>,
    hasher: ahash::RandomState,
}

impl Index {
    pub fn new(action: Action, numbers: Vec<usize>, rules: &[Rule]) -> Self {
        let mut index = Self { action, drawers: None, hasher: ahash::RandomState::default(), numbers };
        if index.numbers.len() > SHORT {
            let mut drawers: HashMap<u64, Vec<usize>, _> = HashMap::default();
            for &number in &index.numbers {
                let Some(rule) = rules.get(number) else { continue };
                for key in index.keys(rule) {
                    drawers.entry(key).or_default().push(number);
                }
            }
            index.drawers = Some(drawers);
        }
        index
    }

    pub fn numbers(&self) -> &[usize] {
        &self.numbers
    }

    /// The first rule that matches.
    pub fn first(&self, rules: &[Rule], question: &Question<'_>) -> Option<usize> {
        let matches = |number: &usize| rules.get(*number).is_some_and(|rule| rule.matches(question));
        let Some(drawers) = &self.drawers else { return self.numbers.iter().copied().find(matches) };
        let mut first: Option<usize> = None;
        let mut open = |key: u64| {
            let drawer = drawers.get(&key).map_or(&[][..], Vec::as_slice);
            let before = first.unwrap_or(usize::MAX);
            first = drawer.iter().copied().take_while(|number| *number < before).find(matches).or(first);
        };
        let peers = [Some(ANY), question.peer.map(|peer| self.hash(EXACT, peer))];
        let mut open_path = |path: u64| peers.iter().flatten().for_each(|peer| open(key(*peer, path)));
        open_path(ANY);
        let mut open_reading = |reading: &str| {
            open_path(self.hash(EXACT, reading));
            beginnings(reading).for_each(|beginning| open_path(self.hash(BEGINNING, beginning)));
        };
        match self.action {
            // A permission needs every reading, so that the plain one finds all of its candidates.
            Action::Allow => open_reading(question.path.text()),
            Action::Deny => question.path.wide_readings().for_each(open_reading),
        }
        first
    }

    fn keys(&self, rule: &Rule) -> Vec<u64> {
        let peers = rule.from.iter().map(|pattern| match pattern {
            PeerPattern::Exact(value) => self.hash(EXACT, value),
            PeerPattern::Any | PeerPattern::Prefix(_) => ANY,
        });
        let under = |whole: &str| beginnings(whole).last().map_or(ANY, |beginning| self.hash(BEGINNING, beginning));
        let paths = rule.paths.iter().map(|pattern| match pattern {
            PathPattern::Exact(value) => self.hash(EXACT, value),
            PathPattern::Prefix(value) => under(value.rsplit_once('/').map_or("", |(whole, _)| whole)),
            PathPattern::Template { text, .. } => under(text.split("/{").next().unwrap_or("")),
        });
        let (peers, paths) = (condensed(peers.collect()), condensed(paths.collect()));
        if peers.len() * paths.len() > MOST_KEYS {
            return vec![key(ANY, ANY)];
        }
        condensed(peers.iter().flat_map(|peer| paths.iter().map(|path| key(*peer, *path))).collect())
    }

    fn hash(&self, kind: u8, text: &str) -> u64 {
        self.hasher.hash_one((kind, text))
    }
}

const ANY: u64 = 0;
const EXACT: u8 = 1;
const BEGINNING: u8 = 2;

/// Each once; an empty clause, and one with "any" in it, is "any".
fn condensed(mut keys: Vec<u64>) -> Vec<u64> {
    if keys.is_empty() || keys.contains(&ANY) {
        return vec![ANY];
    }
    keys.sort_unstable();
    keys.dedup();
    keys
}

fn key(peer: u64, path: u64) -> u64 {
    peer.rotate_left(32).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ path
}

/// `/a/b/c` begins with `/a`, `/a/b` and `/a/b/c`.
fn beginnings(path: &str) -> impl Iterator<Item = &str> {
    let ends = path.char_indices().skip(1).filter(|(_, c)| *c == '/').map(|(place, _)| place);
    let whole = (!path.is_empty()).then_some(path.len());
    ends.chain(whole).take(DEPTH).filter_map(|end| path.get(..end))
}

/// The keys are hashes already.
#[derive(Debug, Default)]
struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}
