//! Who of a fleet belongs to one Backend, in which zones, and how many of them are well?
//!
//! Its members, its zones and its tables are made with the fleet and never change; what changes are counts, which `health.rs` tells.
use std::sync::atomic::{AtomicU32, Ordering};

use super::{
    locality, maglev, Alias, Backend, BalancePolicy, Fleet, LocalityPolicy, Random, Ring, Service, Stride, Table,
};

impl Backend {
    pub(super) fn new(
        members: Option<Box<[u32]>>,
        fleet: &Fleet,
        service: &Service,
        start: u64,
        is_whole: bool,
    ) -> Self {
        let mut backend = Self {
            members,
            zones: Box::default(),
            tiers: Box::default(),
            shares: Box::default(),
            able: 0,
            out: AtomicU32::new(0),
            told: 0,
            gone: AtomicU32::new(0),
            weight: 0.0,
            turn: Stride::new(start),
            table: Table::None,
        };
        let places: Vec<u32> =
            (0..backend.count(fleet)).filter_map(|n| backend.place(n)).map(|place| place as u32).collect();
        let able = || places.iter().filter_map(|place| fleet.endpoints.get(*place as usize)).filter(|e| e.weight > 0.0);
        backend.able = able().count() as u32;
        backend.told = backend.told(fleet);
        let (out, gone) = backend.counted(fleet);
        *backend.out.get_mut() = out;
        *backend.gone.get_mut() = gone;
        backend.weight = able().map(|e| e.weight).sum();
        backend.table = Table::build(&places, fleet, service, is_whole);
        if is_whole && fleet.zones.len() > 1 {
            let part = |list: Vec<u32>| Self::new(Some(list.into()), fleet, service, start, false);
            let by_number: Vec<usize> = (0..fleet.zones.len()).collect();
            backend.zones = divide(&places, fleet, &by_number).into_iter().map(part).collect();
            backend.shares = by_number.iter().map(|_| AtomicU32::new(0)).collect();
            if service.plan.balance.locality.policy == LocalityPolicy::Failover && !service.zone.is_empty() {
                backend.tiers = divide(&places, fleet, &ranks(fleet, service)).into_iter().map(part).collect();
            }
        }
        backend
    }

    /// The part of it that is in a zone.
    pub fn in_zone(&self, zone: u32) -> Option<&Backend> {
        self.zones.get(zone as usize)
    }

    pub fn count(&self, fleet: &Fleet) -> usize {
        self.members.as_ref().map_or(fleet.endpoints.len(), |members| members.len())
    }

    /// Members that are out.
    pub fn out(&self) -> usize {
        self.out.load(Ordering::Acquire) as usize
    }

    pub fn place(&self, index: usize) -> Option<usize> {
        self.members.as_ref().map_or(Some(index), |members| members.get(index).map(|m| *m as usize))
    }

    pub fn has(&self, place: usize) -> bool {
        self.members.as_ref().is_none_or(|members| members.binary_search(&(place as u32)).is_ok())
    }

    pub(super) fn count_out(&self, place: usize, is_out: bool, is_held: bool) {
        if !self.has(place) {
            return;
        }
        step(&self.out, is_out);
        if is_held && self.has_doubtful() {
            step(&self.gone, is_out);
        }
        for part in self.zones.iter().chain(&self.tiers) {
            part.count_out(place, is_out, is_held);
        }
    }

    /// How many are healthy, and how many there are. Who has no weight takes no traffic and counts for neither, and nor does who is out
    /// and isn't told either.
    pub fn health(&self) -> (u32, u32) {
        let healthy = self.able.saturating_sub(self.out() as u32);
        (healthy, self.able.saturating_sub(self.gone.load(Ordering::Acquire)).max(healthy))
    }

    /// The part of its members that is healthy.
    pub fn healthy_part(&self) -> f64 {
        f64::from(self.health().0.max(1)) / f64::from(self.able.max(1))
    }

    /// Its members' health from the beginning.
    pub(super) fn recount(&self, fleet: &Fleet) {
        let (out, gone) = self.counted(fleet);
        self.out.store(out, Ordering::Release);
        self.gone.store(gone, Ordering::Release);
        self.zones.iter().chain(&self.tiers).for_each(|part| part.recount(fleet));
    }

    pub(super) fn share_zones(&self, fleet: &Fleet) {
        let Some(own) = fleet.shared_from else { return };
        let healthy: Vec<u32> = self.zones.iter().map(|part| part.health().0).collect();
        let mut shares = vec![0.0f32; healthy.len()];
        locality::zone_shares(own as usize, &healthy, &fleet.callers.lock(), &mut shares);
        for (slot, share) in self.shares.iter().zip(shares) {
            slot.store(share.to_bits(), Ordering::Relaxed);
        }
    }

    /// A zone by its share of the calls.
    pub fn draw_zone(&self, random: &Random) -> Option<&Backend> {
        let shares = self.shares.iter().map(|share| f32::from_bits(share.load(Ordering::Relaxed)));
        self.zones.get(locality::pick_zone(shares, random)?)
    }
}

pub(super) fn step(count: &AtomicU32, is_up: bool) {
    let next = |n: u32| if is_up { n.checked_add(1) } else { n.checked_sub(1) };
    let _ = count.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
}

/// Of each zone, which place it has in the order of preference.
fn ranks(fleet: &Fleet, service: &Service) -> Vec<usize> {
    let order = &service.plan.balance.locality.order;
    let rank = |zone: &String| match order.iter().position(|wanted| wanted == zone) {
        _ if **zone == *service.zone => 0,
        Some(listed) => 1 + listed,
        None => 1 + order.len(),
    };
    // More priorities than are told apart share the last.
    fleet.zones.iter().map(|zone| rank(zone).min(locality::PRIORITIES - 1)).collect()
}

/// The members in lists by the rank of their zone.
fn divide(places: &[u32], fleet: &Fleet, ranks: &[usize]) -> Vec<Vec<u32>> {
    let mut lists = vec![Vec::new(); ranks.iter().max().map_or(0, |most| most + 1)];
    for place in places {
        let zone = fleet.endpoints.get(*place as usize).map_or(0, |e| usize::from(e.zone));
        if let Some(list) = ranks.get(zone).and_then(|at| lists.get_mut(*at)) {
            list.push(*place);
        }
    }
    lists
}

impl Table {
    fn build(places: &[u32], fleet: &Fleet, service: &Service, is_whole: bool) -> Self {
        let plan = &service.plan.balance;
        let endpoint = |place: &u32| fleet.endpoints.get(*place as usize);
        let members = || -> Vec<(u32, &str, f64)> {
            let found = places.iter().filter_map(endpoint).enumerate().filter(|(_, e)| e.weight > 0.0);
            found.map(|(n, e)| (n as u32, fleet.address(e), f64::from(e.weight))).collect()
        };
        match plan.policy {
            // A key has one home, whoever asks: zones have no tables of their own.
            BalancePolicy::RingHash if is_whole => Table::Ring(Ring::build(&members(), plan.hash.ring, MOST_RING)),
            BalancePolicy::Maglev if is_whole => Table::Maglev(maglev::Table::build(&members(), plan.hash.table)),
            BalancePolicy::RingHash | BalancePolicy::Maglev | BalancePolicy::RoundRobin => Table::None,
            BalancePolicy::PeakEwma | BalancePolicy::LeastRequest | BalancePolicy::Random => {
                Alias::build(places.iter().filter_map(endpoint).map(|e| e.weight)).map_or(Table::None, Table::Alias)
            }
        }
    }
}

/// Entries of a ring at most, as in Envoy.
const MOST_RING: usize = 8_388_608;
