//! Who of a fleet is only held, and what follows from it?
//!
//! The registry doesn't tell these endpoints any more, and discovery keeps them in case that it is wrong. As long as they answer they are
//! endpoints like all others. One that is out as well, while others are told, is gone: it is missing to nobody, so that neither panic nor the
//! cap on ejections counts it (`health.rs`). Where nobody is told, there is nobody to go by but those that are held. There are none most of
//! the time, so their places stand in a list of their own, and cost the endpoints nothing.
use super::{Address, Backend, Endpoint, Fleet};

impl Fleet {
    /// Note whether the next endpoint is only held.
    pub(super) fn hold(&mut self, is_held: bool) {
        if is_held {
            self.held.push(self.endpoints.len() as u32);
        }
    }

    /// Whether the source doesn't tell it any more.
    pub fn is_held(&self, place: usize) -> bool {
        self.held.binary_search(&(place as u32)).is_ok()
    }

    /// Whether it is held while the source tells others. Where it tells nobody, there is nobody to go by but those that are held.
    pub fn is_doubtful(&self, place: usize) -> bool {
        self.has_told && self.is_held(place)
    }

    /// Of those, how many are out, so that both the source and the calls say that they are gone.
    pub fn gone(&self) -> usize {
        let is_out = |place: &&u32| self.endpoints.get(**place as usize).is_some_and(|e| e.state.is_out());
        if self.has_told {
            self.held.iter().filter(is_out).count()
        } else {
            0
        }
    }

    /// It was held, and calls found nobody there; now that it is told again it is like one that came.
    pub(super) fn begins_anew(&self, place: usize, found: &Address) -> bool {
        !found.is_held
            && self.is_held(place)
            && self.endpoints.get(place).is_some_and(|endpoint| endpoint.state.is_found_dead())
    }

    /// Whether somebody is told who takes traffic.
    pub(super) fn tells(&self) -> bool {
        let is_told = |(place, e): (usize, &Endpoint)| e.weight > 0.0 && !self.is_held(place);
        self.endpoints.iter().enumerate().any(is_told)
    }
}

impl Backend {
    /// It has members that are told, and others that are only held.
    pub fn has_doubtful(&self) -> bool {
        0 < self.told && self.told < self.able
    }

    /// It has members that are told.
    pub fn has_told(&self) -> bool {
        self.told > 0
    }

    /// How many of its members that take traffic are told.
    pub(super) fn told(&self, fleet: &Fleet) -> u32 {
        let takes_traffic = |place: usize| fleet.endpoints.get(place).is_some_and(|e| e.weight > 0.0);
        let held = fleet.held.iter().map(|place| *place as usize);
        self.able.saturating_sub(held.filter(|place| takes_traffic(*place) && self.has(*place)).count() as u32)
    }

    /// How many are out, and how many of those are gone.
    pub(super) fn counted(&self, fleet: &Fleet) -> (u32, u32) {
        let is_out = |place: &usize| fleet.endpoints.get(*place).is_some_and(|e| e.weight > 0.0 && e.state.is_out());
        let out = || (0..self.count(fleet)).filter_map(|n| self.place(n)).filter(is_out);
        let gone = if self.has_doubtful() { out().filter(|place| fleet.is_held(*place)).count() } else { 0 };
        (out().count() as u32, gone as u32)
    }
}
