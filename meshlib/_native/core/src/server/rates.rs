//! Is this caller within the rates of this service?
//!
//! The inbound limits in calls per time. Their counts live beside the snapshots, by the name of the rate, so that publishing a plan
//! forgives nobody. Whoever has no identity is one caller, "nobody", and never unlimited; addresses of IPv6 count by their /64, which
//! is what one subscriber is given.
use core::net::{IpAddr, Ipv6Addr};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::Deserialize;

use crate::admit::rate::{take_all, Ask, Limiter, Rate};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RatePlan {
    pub name: String,
    pub calls: f64,
    pub per: f64,
    pub burst: f64,
    pub by: Vec<By>,
    /// Counted by a store that all instances share, and here only while that is away.
    pub is_global: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct By {
    pub kind: ByKind,
    pub name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum ByKind {
    Service,
    Route,
    Peer,
    Client,
    Header,
}

/// A rate of the plan in force.
#[derive(Debug)]
pub(super) struct Limit {
    name: String,
    rate: Rate,
    by: Vec<By>,
}

impl Limit {
    pub fn new(plan: RatePlan) -> Self {
        let mut by = plan.by;
        by.iter_mut().for_each(|by| by.name.make_ascii_lowercase());
        Self { rate: Rate::new(plan.calls, plan.per, plan.burst), name: plan.name, by }
    }
}

/// Of whom a call is, in each way in which it may be counted.
pub(super) struct Caller<'a> {
    pub route: &'a str,
    pub peer: &'a str,
    pub client: Option<IpAddr>,
    pub header: &'a dyn Fn(&str) -> &'a [u8],
}

/// The counts of all rates. State of the Service that we are.
#[derive(Debug, Default)]
pub(super) struct Counts {
    hasher: ahash::RandomState,
    limiters: Mutex<HashMap<String, Arc<Limiter>, ahash::RandomState>>,
}

impl Counts {
    /// None: it fits. Otherwise nothing is counted, and it is told how long it takes until it fits.
    pub fn take(&self, limits: &[Limit], caller: &Caller<'_>, now: Duration) -> Option<Duration> {
        let limiters: Vec<_> = limits.iter().map(|limit| self.limiter(&limit.name)).collect();
        let asks: Vec<_> = limits
            .iter()
            .zip(&limiters)
            .map(|(limit, limiter)| Ask { limiter, key: self.key(limit, caller), rate: limit.rate })
            .collect();
        take_all(&asks, now).err().map(|excess| excess.wait)
    }

    /// What `take` would say, with nothing counted.
    pub fn peek(&self, limits: &[Limit], caller: &Caller<'_>, now: Duration) -> Option<Duration> {
        let wait = |limit: &Limit| self.limiter(&limit.name).peek(self.key(limit, caller), limit.rate, now).err();
        limits.iter().filter_map(wait).max()
    }

    fn limiter(&self, name: &str) -> Arc<Limiter> {
        let mut limiters = self.limiters.lock();
        match limiters.get(name) {
            Some(limiter) => Arc::clone(limiter),
            None => Arc::clone(limiters.entry(name.to_owned()).or_default()),
        }
    }

    fn key(&self, limit: &Limit, caller: &Caller<'_>) -> u64 {
        limit.by.iter().fold(0, |key, by| {
            let part = match by.kind {
                ByKind::Service => self.hasher.hash_one(0u8),
                ByKind::Route => self.hasher.hash_one((1u8, caller.route)),
                ByKind::Peer => self.hasher.hash_one((2u8, caller.peer)),
                ByKind::Client => self.hasher.hash_one((3u8, caller.client.map(network))),
                ByKind::Header => self.hasher.hash_one((4u8, (caller.header)(&by.name))),
            };
            self.hasher.hash_one((key, part))
        })
    }
}

/// A subscriber's addresses as one: of IPv6 the first 64 bits.
pub(super) fn network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(whole) => {
            let [a, b, c, d, ..] = whole.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
    }
}
