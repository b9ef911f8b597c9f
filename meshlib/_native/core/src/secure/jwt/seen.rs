//! Was this very token verified before?
//!
//! A signature costs tens of microseconds, and a client shows one token a thousand times. So the claims of verified tokens are kept
//! under the SHA-256 of the whole token: an attacker who could make another text with the same digest could break much more.
//! Tokens that were refused are not kept, for their number is up to whoever sends them.
//!
//! Two halves, young and old: a find moves to the young half, and when that is full, the old one is thrown away whole. Bounded in
//! number and in bytes, without a clock and without a search. Whether a token is still valid, and whether the keys are still those
//! that it was verified with, is judged by whoever asks.
use std::sync::Arc;

use parking_lot::Mutex;

use super::Claims;

/// Tokens of one half, and the memory of their claims.
const HALF: usize = 2048;
const HALF_BYTES: usize = 8 << 20;

pub type Digest = [u8; 32];

#[derive(Debug, Clone)]
pub struct Known {
    pub claims: Arc<Claims>,
    /// Of the keys that it was verified with.
    pub generation: u64,
}

#[derive(Debug, Default)]
pub struct Seen(Mutex<Halves>);

#[derive(Debug, Default)]
struct Halves {
    young: Half,
    old: Half,
}

#[derive(Debug, Default)]
struct Half {
    tokens: ahash::HashMap<Digest, Known>,
    bytes: usize,
}

impl Seen {
    pub fn find(&self, digest: &Digest) -> Option<Known> {
        let mut halves = self.0.lock();
        if let Some(known) = halves.young.tokens.get(digest) {
            return Some(known.clone());
        }
        let known = halves.old.tokens.get(digest)?.clone();
        halves.keep(*digest, known.clone());
        Some(known)
    }

    pub fn keep(&self, digest: Digest, known: Known) {
        self.0.lock().keep(digest, known);
    }

    pub fn forget(&self) {
        *self.0.lock() = Halves::default();
    }

    pub fn count(&self) -> usize {
        let halves = self.0.lock();
        let only_old = halves.old.tokens.keys().filter(|digest| !halves.young.tokens.contains_key(*digest));
        halves.young.tokens.len() + only_old.count()
    }
}

impl Halves {
    fn keep(&mut self, digest: Digest, known: Known) {
        let size = known.claims.size();
        if self.young.tokens.len() >= HALF || self.young.bytes.saturating_add(size) > HALF_BYTES {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.bytes += size;
        if let Some(before) = self.young.tokens.insert(digest, known) {
            self.young.bytes = self.young.bytes.saturating_sub(before.claims.size());
        }
    }
}
