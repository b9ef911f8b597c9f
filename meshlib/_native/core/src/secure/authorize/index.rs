//! Which of a thousand rules could match at all?
//!
//! A rule is filed under what it demands of the call together with what it demands of the place. Of the call: each identity that it
//! names, or each namespace, or the segments with which identities begin, or each network, or each value of a header, or each method;
//! else any. Of the place: each path that it names, or the segments with which paths begin, or the ends of paths, or each host; else
//! any. A question opens the few drawers that could hold a
//! match, and the rules in them are asked in full, in their order; so the index decides nothing, and a collision of hashes costs a
//! comparison. Short lists are simply walked.
//!
//! Where a fact is not known, a denial about it fires; so networks, hosts and headers have a drawer for "not known" too. Rules that demand
//! neither, and those whose paths begin alike for `DEPTH` segments, share a drawer and are walked too.
use core::net::IpAddr;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

use super::asked::Asked;
use super::clause::{namespaces, Test};
use super::pattern::{folded, PathPattern, PeerPattern, TextPattern};
use super::rule::Rule;
use super::Action;
use crate::secure::address::{masked, Cidr};

/// Up to here walking is quicker than looking up.
const SHORT: usize = 8;
/// A rule that names more combinations than this is filed as one for anyone and anything.
const MOST_KEYS: usize = 1024;
/// So many segments tell the paths of an API apart (`/api/v1/orders/…`); each costs a look-up.
const DEPTH: usize = 4;
/// A trust domain, and `/ns/<namespace>/sa` behind it.
const PEER_DEPTH: usize = 4;
/// Networks of so many lengths; each costs a look-up.
const MOST_LENGTHS: usize = 8;

type Set = HashSet<u64, BuildHasherDefault<Identity>>;

/// The rules of one action, in the order in which they were written.
#[derive(Debug)]
pub(super) struct Index {
    numbers: Vec<usize>,
    cabinet: Option<Cabinet>,
}

#[derive(Debug, Default)]
struct Cabinet {
    is_allow: bool,
    drawers: HashMap<u64, Vec<usize>, BuildHasherDefault<Identity>>,
    /// The halves of the keys that are in use: most questions touch few of them.
    callers: Set,
    places: Set,
    has_prefixes: bool,
    has_namespaces: bool,
    has_hosts: bool,
    has_endings: bool,
    has_folded: bool,
    has_methods: bool,
    /// Names of headers, sorted.
    headers: Vec<Box<str>>,
    sources: Vec<(bool, u8)>,
    remotes: Vec<(bool, u8)>,
    hasher: ahash::RandomState,
}

impl Index {
    pub fn new(action: Action, numbers: Vec<usize>, rules: &[Rule]) -> Self {
        if numbers.len() <= SHORT {
            return Self { numbers, cabinet: None };
        }
        let mut cabinet = Cabinet { is_allow: action == Action::Allow, ..Cabinet::default() };
        for &number in &numbers {
            if let Some(rule) = rules.get(number) {
                cabinet.file(number, rule);
            }
        }
        Self { numbers, cabinet: Some(cabinet) }
    }

    pub fn numbers(&self) -> &[usize] {
        &self.numbers
    }

    /// The first rule that matches.
    pub fn first(&self, question: &Asked<'_>, matches: impl Fn(usize) -> bool) -> Option<usize> {
        match &self.cabinet {
            Some(cabinet) => cabinet.first(question, matches),
            None => self.numbers.iter().copied().find(|number| matches(*number)),
        }
    }
}

impl Cabinet {
    fn file(&mut self, number: usize, rule: &Rule) {
        let (callers, places) = (condensed(self.callers_of(rule)), condensed(self.places_of(rule)));
        let (callers, places) =
            if callers.len() * places.len() > MOST_KEYS { (vec![ANY], vec![ANY]) } else { (callers, places) };
        for caller in &callers {
            for place in &places {
                let drawer = self.drawers.entry(key(*caller, *place)).or_default();
                if drawer.last() != Some(&number) {
                    drawer.push(number);
                }
            }
        }
        self.callers.extend(callers);
        self.places.extend(places);
    }

    /// The most telling of the clauses about the caller.
    fn callers_of(&mut self, rule: &Rule) -> Vec<u64> {
        let mut best: Option<(u8, Vec<u64>)> = None;
        for clause in rule.clauses.iter().filter(|clause| !clause.is_negative) {
            let (rank, keys) = match &clause.test {
                Test::Peers(patterns) => {
                    let is_exact = patterns.iter().all(|pattern| matches!(pattern, PeerPattern::Exact(_)));
                    (
                        if is_exact { 0 } else { 2 },
                        patterns.iter().map(|pattern| self.peer(pattern)).collect::<Vec<_>>(),
                    )
                }
                Test::Namespaces(patterns) => {
                    (1, patterns.iter().map(|pattern| self.exact(NAMESPACE, pattern)).collect())
                }
                Test::Sources(networks) => (3, self.networks(SOURCE, networks)),
                Test::Remotes(networks) => (3, self.networks(REMOTE, networks)),
                Test::Header { name, patterns } => {
                    let list = self.hash(LIST, name);
                    (4, patterns.iter().map(|pattern| self.header(name, pattern)).chain([list]).collect())
                }
                Test::Methods(methods) => (5, self.methods(methods)),
                _ => continue,
            };
            if !keys.contains(&ANY) && best.as_ref().is_none_or(|(known, _)| rank < *known) {
                best = Some((rank, keys));
            }
        }
        best.map_or(Vec::new(), |(_, keys)| keys)
    }

    fn peer(&mut self, pattern: &PeerPattern) -> u64 {
        match pattern {
            PeerPattern::Any => ANY,
            PeerPattern::Exact(value) => self.hash(EXACT, value),
            PeerPattern::Prefix(value) => {
                let whole = value.rsplit_once('/').map_or("", |(whole, _)| whole);
                match peer_beginnings(whole).last() {
                    Some(beginning) => {
                        self.has_prefixes = true;
                        self.hash(BEGINNING, beginning)
                    }
                    None => ANY,
                }
            }
        }
    }

    fn exact(&mut self, kind: u8, pattern: &TextPattern) -> u64 {
        match pattern {
            TextPattern::Exact(value) => {
                self.has_namespaces |= kind == NAMESPACE;
                self.has_hosts |= kind == HOST;
                self.hash(kind, value)
            }
            _ => ANY,
        }
    }

    fn networks(&mut self, kind: u8, networks: &[Cidr]) -> Vec<u64> {
        let lengths = if kind == SOURCE { &mut self.sources } else { &mut self.remotes };
        let mut longer = lengths.clone();
        for network in networks {
            let length = (network.base().is_ipv4(), network.length());
            if !longer.contains(&length) {
                longer.push(length);
            }
        }
        if longer.len() > MOST_LENGTHS {
            return vec![ANY];
        }
        *lengths = longer;
        let known = networks.iter().map(|network| self.network(kind, network.base(), network.length()));
        known.chain([self.hash(kind, "")]).collect()
    }

    fn header(&mut self, name: &str, pattern: &TextPattern) -> u64 {
        let TextPattern::Exact(value) = pattern else { return ANY };
        if let Err(place) = self.headers.binary_search_by(|known| (**known).cmp(name)) {
            self.headers.insert(place, name.into());
        }
        self.field(name, value.as_bytes())
    }

    fn field(&self, name: &str, value: &[u8]) -> u64 {
        distinct(self.hasher.hash_one((HEADER, name, value)))
    }

    fn methods(&mut self, methods: &[Box<str>]) -> Vec<u64> {
        self.has_methods = true;
        let also = methods.iter().any(|method| **method == *"GET").then_some("HEAD");
        methods.iter().map(|method| &**method).chain(also).map(|method| self.hash(METHOD, method)).collect()
    }

    fn network(&self, kind: u8, base: IpAddr, length: u8) -> u64 {
        distinct(self.hasher.hash_one((kind, base, length)))
    }

    fn places_of(&mut self, rule: &Rule) -> Vec<u64> {
        let mut hosts = Vec::new();
        for clause in rule.clauses.iter().filter(|clause| !clause.is_negative) {
            match &clause.test {
                Test::Paths { patterns, is_folded } => {
                    self.has_folded |= *is_folded;
                    let keys: Vec<u64> = patterns.iter().map(|pattern| self.path(pattern, *is_folded)).collect();
                    if !keys.contains(&ANY) {
                        return keys;
                    }
                }
                Test::Hosts(patterns) => {
                    hosts = patterns.iter().map(|pattern| self.exact(HOST, pattern)).collect();
                    hosts.push(self.hash(HOST, ""));
                }
                _ => {}
            }
        }
        hosts
    }

    fn path(&mut self, pattern: &PathPattern, is_folded: bool) -> u64 {
        let under = |whole: &str| beginnings(whole).last().map_or(ANY, |beginning| self.hash(BEGINNING, beginning));
        match pattern {
            PathPattern::Exact(value) => self.hash(EXACT, value),
            PathPattern::Prefix(value) => under(value.rsplit_once('/').map_or("", |(whole, _)| whole)),
            PathPattern::Template { text, .. } => {
                let start = text.split("/{").next().unwrap_or("");
                if is_folded {
                    under(&folded(start))
                } else {
                    under(start)
                }
            }
            PathPattern::Suffix(value) => match ending(value) {
                Some(end) => {
                    self.has_endings = true;
                    self.hash(ENDING, end)
                }
                None => ANY,
            },
            PathPattern::Regex { .. } => ANY,
        }
    }

    fn first(&self, question: &Asked<'_>, matches: impl Fn(usize) -> bool) -> Option<usize> {
        let places = self.places(question);
        let mut first: Option<usize> = None;
        self.callers(question, |caller| {
            for place in places.iter() {
                let drawer = self.drawers.get(&key(caller, place)).map_or(&[][..], Vec::as_slice);
                let before = first.unwrap_or(usize::MAX);
                first = drawer
                    .iter()
                    .copied()
                    .take_while(|number| *number < before)
                    .find(|number| matches(*number))
                    .or(first);
            }
        });
        first
    }

    fn callers(&self, question: &Asked<'_>, mut open: impl FnMut(u64)) {
        let mut open = |caller: u64| {
            if self.callers.contains(&caller) {
                open(caller);
            }
        };
        open(ANY);
        if let Some(peer) = question.peer {
            open(self.hash(EXACT, peer));
            if self.has_prefixes {
                peer_beginnings(peer).for_each(|beginning| open(self.hash(BEGINNING, beginning)));
            }
            if self.has_namespaces {
                namespaces(peer).for_each(|namespace| open(self.hash(NAMESPACE, namespace)));
            }
        }
        if self.has_methods {
            open(self.hash(METHOD, question.method));
        }
        if !self.headers.is_empty() {
            question.each_header(|name, header| {
                if self.headers.binary_search_by(|known| (**known).cmp(name)).is_err() {
                    return;
                }
                if header.is_too_long && !self.is_allow {
                    open(self.hash(LIST, name));
                }
                header.lone.iter().chain(header.others).for_each(|value| open(self.field(name, value)));
            });
        }
        for (kind, lengths, address) in
            [(SOURCE, &self.sources, question.source), (REMOTE, &self.remotes, question.remote)]
        {
            match address.map(|address| address.to_canonical()) {
                _ if lengths.is_empty() => {}
                None => open(self.hash(kind, "")),
                Some(address) => {
                    for (_, length) in lengths.iter().filter(|(is_ipv4, _)| *is_ipv4 == address.is_ipv4()) {
                        open(self.network(kind, masked(address, *length), *length));
                    }
                }
            }
        }
    }

    fn places(&self, question: &Asked<'_>) -> Places {
        let mut found = Places::default();
        let mut add = |place: u64| {
            if self.places.contains(&place) {
                found.add(place);
            }
        };
        add(ANY);
        let mut reading = |path: &str| {
            add(self.hash(EXACT, path));
            beginnings(path).for_each(|beginning| add(self.hash(BEGINNING, beginning)));
            if self.has_endings {
                endings(path).into_iter().flatten().for_each(|end| add(self.hash(ENDING, end)));
            }
        };
        // Rules for which case doesn't count are filed with the others, under the folded path.
        let folded = if self.has_folded { question.differently_folded_path() } else { None };
        for path in [Some(question.path), folded].into_iter().flatten() {
            if self.is_allow {
                // A permission needs every reading, so that the plain one finds all of its candidates.
                reading(path.text());
            } else {
                path.wide_readings().for_each(&mut reading);
            }
        }
        if self.has_hosts {
            match question.known_host() {
                Some(host) if host.bytes().any(|byte| byte.is_ascii_uppercase()) => {
                    add(self.hash(HOST, &host.to_ascii_lowercase()));
                }
                host => add(self.hash(HOST, host.unwrap_or(""))),
            }
        }
        found
    }

    fn hash(&self, kind: u8, text: &str) -> u64 {
        distinct(self.hasher.hash_one((kind, text)))
    }
}

const ANY: u64 = 0;
const EXACT: u8 = 1;
const BEGINNING: u8 = 2;
const NAMESPACE: u8 = 3;
const HOST: u8 = 4;
const SOURCE: u8 = 5;
const REMOTE: u8 = 6;
const ENDING: u8 = 7;
const METHOD: u8 = 8;
const HEADER: u8 = 9;
/// Of a header that is too long to be looked at.
const LIST: u8 = 10;

/// "Any" is no hash.
fn distinct(hash: u64) -> u64 {
    hash.max(1)
}

/// Any, a host, and for each of four readings, as it is and folded, itself, its beginnings and two ends.
const MOST_PLACES: usize = 2 + 8 * (1 + DEPTH + 2);

/// The places of one question that are in use.
#[derive(Debug)]
struct Places {
    keys: [u64; MOST_PLACES],
    count: usize,
}

impl Default for Places {
    fn default() -> Self {
        Self { keys: [ANY; MOST_PLACES], count: 0 }
    }
}

impl Places {
    fn add(&mut self, key: u64) {
        if self.iter().any(|known| known == key) {
            return;
        }
        if let Some(place) = self.keys.get_mut(self.count) {
            *place = key;
            self.count += 1;
        }
    }

    fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.keys.iter().copied().take(self.count)
    }
}

/// Each once; an empty clause, and one with "any" in it, is "any".
fn condensed(mut keys: Vec<u64>) -> Vec<u64> {
    if keys.is_empty() || keys.contains(&ANY) {
        return vec![ANY];
    }
    keys.sort_unstable();
    keys.dedup();
    keys
}

fn key(caller: u64, place: u64) -> u64 {
    caller.rotate_left(32).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ place
}

/// `/a/b/c` begins with `/a`, `/a/b` and `/a/b/c`.
fn beginnings(path: &str) -> impl Iterator<Item = &str> {
    let ends = path.char_indices().skip(1).filter(|(_, c)| *c == '/').map(|(place, _)| place);
    let whole = (!path.is_empty()).then_some(path.len());
    ends.chain(whole).take(DEPTH).filter_map(|end| path.get(..end))
}

/// What a path has to end with, as far as it can be looked up: its last segment, or what stands behind the last dot.
fn ending(suffix: &str) -> Option<&str> {
    suffix.rfind(['/', '.']).and_then(|at| suffix.get(at..))
}

/// Both of them.
fn endings(path: &str) -> [Option<&str>; 2] {
    let from = |at: Option<usize>| at.and_then(|at| path.get(at..));
    [from(path.rfind('/')), from(path.rfind('.'))]
}

/// The same of a SPIFFE ID, from its trust domain on.
fn peer_beginnings(peer: &str) -> impl Iterator<Item = &str> {
    const SCHEME: usize = "spiffe://".len();
    let rest = peer.get(SCHEME..).unwrap_or("");
    let ends = rest.char_indices().filter(|(_, c)| *c == '/').map(|(place, _)| place);
    let whole = (!rest.is_empty()).then_some(rest.len());
    ends.chain(whole).take(PEER_DEPTH).filter_map(|end| peer.get(..SCHEME + end))
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
