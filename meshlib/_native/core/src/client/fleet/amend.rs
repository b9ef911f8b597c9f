//! What is the next fleet, if only a few endpoints have changed?
//!
//! A registry that watches ten thousand endpoints tells of one at a time, a hundred times a second in a rolling deployment. So nothing is
//! read, hashed by content or numbered anew that stays: its 32 bytes are copied, and what the old fleet keeps once (addresses, labels,
//! identities, zones) is taken over as it is. What nobody uses any more is left lying there, and cleared away when it has become as much
//! as the rest. The tables of the backends are built as for any fleet. The result is the fleet that `compile` would make of the same
//! addresses, but for the order of numbers that nobody sees.
use super::{AHashMap, AHashSet, Address, Arc, Duration, Endpoint, EndpointState, Fleet, Labels, Service};

/// Labels and identities that are compared before one more is kept: where there are thousands, hardly two are alike.
const COMPARED: usize = 256;

/// Bytes and lists that may lie unused in any case.
const SLACK: usize = 1024;

impl Fleet {
    /// `old`, with these endpoints instead of what it has of their addresses or beside it, and without those that are gone.
    pub fn amend(
        service: &Service,
        version: u64,
        changed: &[Address],
        gone: &[String],
        old: &Fleet,
        now: Duration,
    ) -> Self {
        // The last word about an address counts.
        let mut told: AHashMap<&str, &Address> = changed.iter().map(|found| (&*found.address, found)).collect();
        let gone: AHashSet<&str> = gone.iter().map(String::as_str).filter(|gone| !told.contains_key(gone)).collect();
        let warms_up = service.plan.balance.slow_start > 0.0 && !old.endpoints.is_empty();
        let mut fleet = Self {
            version,
            text: old.text.clone(),
            identities: old.identities.clone(),
            labels: old.labels.clone(),
            zones: old.zones.clone(),
            ..Self::default()
        };
        fleet.endpoints.reserve_exact(old.endpoints.len() + told.len());
        let new = || Arc::new(EndpointState::new(&service.plan.balance, warms_up, now));
        for (place, endpoint) in old.endpoints.iter().enumerate() {
            let address = old.address(endpoint);
            match told.remove(address) {
                Some(found) => {
                    let state = if old.begins_anew(place, found) { new() } else { endpoint.state.clone() };
                    fleet.add(service, found, state, (endpoint.at, endpoint.length));
                }
                None if gone.contains(address) => {}
                None => {
                    fleet.hold(old.is_held(place));
                    fleet.endpoints.push(endpoint.clone());
                }
            }
        }
        for found in changed {
            // What is left has no endpoint yet; once, also where it was told twice.
            let Some(found) = told.remove(&*found.address) else { continue };
            let place = (fleet.text.len() as u32, u16::try_from(found.address.len()).unwrap_or(u16::MAX));
            fleet.text.push_str(&found.address);
            fleet.add(service, found, new(), place);
        }
        if fleet.is_worn() {
            // Whose turn it is goes over too.
            fleet.distinct = old.distinct.clone();
            return Self::compile(service, version, &fleet.addresses(), &fleet, now);
        }
        fleet.settle(service, old, now);
        fleet
    }

    fn add(&mut self, service: &Service, found: &Address, state: Arc<EndpointState>, (at, length): (u32, u16)) {
        // As in `compile`.
        let is_common = found.identity.is_empty() || service.plan.identity.is_empty();
        let wanted = if is_common { &service.plan.identity } else { &found.identity };
        let endpoint = Endpoint {
            state,
            at,
            length,
            weight: found.weight.max(0.0) as f32,
            labels: number(&mut self.labels, |known| **known == found.labels, || Arc::new(found.labels.clone())),
            zone: number(&mut self.zones, |known| *known == found.zone, || found.zone.clone()).min(u32::from(u16::MAX))
                as u16,
            identity: number(&mut self.identities, |known| **known == **wanted, || Arc::from(&**wanted)),
            found_identity: number(
                &mut self.identities,
                |known| **known == *found.identity,
                || Arc::from(&*found.identity),
            ),
        };
        self.hold(found.is_held);
        self.endpoints.push(endpoint);
    }

    /// As they were told: what another fleet is made from.
    pub fn addresses(&self) -> Vec<Address> {
        let back = |(place, e): (usize, &Endpoint)| Address {
            address: self.address(e).to_owned(),
            weight: f64::from(e.weight),
            zone: self.zone_of(e).to_owned(),
            labels: self.labels.get(e.labels as usize).map_or_else(Labels::new, |labels| (**labels).clone()),
            identity: self.identities.get(e.found_identity as usize).map_or_else(String::new, |i| i.to_string()),
            is_held: self.is_held(place),
        };
        self.endpoints.iter().enumerate().map(back).collect()
    }

    /// Much of what it keeps is nobody's any more; or a zone is, which balancing would go on to reckon with.
    fn is_worn(&self) -> bool {
        let used: usize = self.endpoints.iter().map(|e| usize::from(e.length)).sum();
        let most = self.endpoints.len() + SLACK;
        self.text.len() > 2 * used + SLACK
            || self.labels.len() > most
            || self.identities.len() > 2 * most
            || self.zone_counts().iter().any(|(_, count)| *count == 0)
    }
}

#[cfg(test)]
impl Fleet {
    /// How much it keeps, used or not.
    pub fn kept(&self) -> usize {
        self.text.len() + self.labels.len() + self.identities.len()
    }
}

/// The number of what fits, kept anew if nothing does.
fn number<T>(kept: &mut Vec<T>, is_it: impl Fn(&T) -> bool, make: impl FnOnce() -> T) -> u32 {
    let found = kept.iter().take(COMPARED).position(is_it);
    found.unwrap_or_else(|| {
        kept.push(make());
        kept.len() - 1
    }) as u32
}
