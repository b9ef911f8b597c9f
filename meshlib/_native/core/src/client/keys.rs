//! For whom is this call? The parts of a call that a hash or a rate limit goes by: header, cookie, path variable, peer, service, route.
//!
//! A consistent hash must come out alike in every process, and like Envoy's next door; the key of a rate limit must not be
//! guessable, or a caller could share another's limit. So the same parts are hashed in two ways. What is absent is left out.
use std::hash::{BuildHasher, Hash, Hasher};

use super::call::Request;
use crate::balance::hash::{combine, of_values, xxh64};
use crate::model::{KeyKind, KeyPlan};
use crate::route::{Headers, Route};

/// A call, as far as keys are concerned.
pub struct Asked<'a> {
    pub request: &'a Request<'a>,
    pub headers: &'a dyn Headers,
    pub service: &'a str,
    pub route: &'a Route,
}

impl Asked<'_> {
    /// The key that picks a home: the application's own word, or what is configured. None: this call has none.
    pub fn hash(&self, parts: &[KeyPlan]) -> Option<u64> {
        if let Some(own) = self.request.key {
            return Some(xxh64(own.as_bytes(), 0));
        }
        combine(parts.iter().map(|part| {
            let mut values: Vec<Vec<u8>> = Vec::new();
            self.with(part, &mut |value| values.push(value.to_vec()));
            of_values(&mut values.iter().map(Vec::as_slice).collect::<Vec<_>>())
        }))
    }

    /// The key under which a limit counts. An absent part counts too: all calls without it share one limit.
    pub fn limit(&self, parts: &[KeyPlan], hasher: &ahash::RandomState) -> u64 {
        let mut state = hasher.build_hasher();
        for part in parts {
            let mut is_there = false;
            self.with(part, &mut |value| {
                is_there = true;
                value.hash(&mut state);
            });
            is_there.hash(&mut state);
        }
        state.finish()
    }

    fn with(&self, part: &KeyPlan, then: &mut dyn FnMut(&[u8])) {
        match part.kind {
            KeyKind::Service => then(self.service.as_bytes()),
            KeyKind::Route => then(self.route.name().as_bytes()),
            KeyKind::Peer => self.request.peer.into_iter().for_each(|peer| then(peer.as_bytes())),
            KeyKind::Path => {
                let found = self.route.path.variable(&part.name, self.request.path);
                found.into_iter().for_each(|value| then(value.as_bytes()));
            }
            KeyKind::Header => {
                // All of them: nobody may choose which one counts by adding another.
                self.headers.any(&part.name, &mut |value| {
                    then(value);
                    false
                });
            }
            KeyKind::Cookie => {
                self.cookie(&part.name, then);
            }
        }
    }

    /// The first cookie of this name.
    pub fn cookie(&self, name: &str, then: &mut dyn FnMut(&[u8])) -> bool {
        self.headers.any("cookie", &mut |line| {
            let pairs = line.split(|byte| *byte == b';').map(<[u8]>::trim_ascii);
            let found = pairs.filter_map(|pair| pair.strip_prefix(name.as_bytes())?.strip_prefix(b"=")).next();
            found.map(&mut *then).is_some()
        })
    }

    /// The session that the caller came back with.
    pub fn session(&self, kind: crate::model::StickyKind, name: &str) -> Option<u64> {
        use crate::model::StickyKind;
        let mut session = None;
        let mut read = |value: &[u8]| {
            session = std::str::from_utf8(value)
                .ok()
                .filter(|text| text.len() == 16)
                .and_then(|t| u64::from_str_radix(t, 16).ok());
        };
        match kind {
            StickyKind::None => {}
            StickyKind::Cookie => {
                self.cookie(name, &mut read);
            }
            StickyKind::Header => {
                self.headers.any(name, &mut |value| {
                    read(value);
                    true
                });
            }
        }
        session
    }
}
