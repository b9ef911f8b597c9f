//! Whose tokens do we take, and under which terms?
//!
//! A provider is written down whole: who issues, for whom, with which algorithms, how long at most. There is no default that makes a
//! provider wider, and one that would take anybody's token (no audience) or anybody's key (a shared secret) doesn't load.
use std::sync::Arc;

use parking_lot::RwLock;
use serde::Deserialize;

use super::{spiffe, KeySet};
use crate::secure::crypto::Algorithm;

/// Clocks that are further apart are broken.
const MOST_LEEWAY: f64 = 300.0;

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProviderPlan {
    pub name: String,
    /// For SPIFFE tokens: the trust domain.
    pub issuer: String,
    pub audiences: Vec<String>,
    pub algorithms: Vec<String>,
    pub leeway: f64,
    pub longest: f64,
    pub from: Vec<Place>,
    pub forward: bool,
    pub is_svid: bool,
}

/// Where in a request its tokens are looked for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    pub kind: PlaceKind,
    pub name: String,
    pub prefix: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PlaceKind {
    Header,
    Cookie,
    Query,
}

/// A plan that was checked, and the keys that are in force.
#[derive(Debug)]
pub struct Provider {
    pub(super) number: usize,
    pub(super) name: String,
    pub(super) issuer: String,
    pub(super) audiences: Vec<String>,
    pub(super) algorithms: Vec<Algorithm>,
    pub(super) leeway: f64,
    pub(super) longest: f64,
    pub(super) is_svid: bool,
    keys: RwLock<Keys>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Keys {
    /// Counts the changes: what was verified with other keys is verified again.
    pub generation: u64,
    /// None: not known, so that nothing is accepted.
    pub set: Option<Arc<KeySet>>,
}

impl Provider {
    pub(super) fn compile(plan: &ProviderPlan, number: usize) -> Result<Self, Vec<String>> {
        let mut mistakes = Vec::new();
        if plan.issuer.is_empty() {
            mistakes.push("the issuer is empty".to_owned());
        } else if plan.is_svid && !spiffe::is_trust_domain(&plan.issuer) {
            mistakes.push(format!("{:?} is no trust domain", plan.issuer));
        }
        if plan.audiences.is_empty() || plan.audiences.iter().any(String::is_empty) {
            mistakes.push(
                "it needs audiences that aren't empty: without them it would take tokens that are meant for others"
                    .to_owned(),
            );
        }
        if plan.algorithms.is_empty() {
            mistakes.push(format!("it names no algorithm; supported are {}", supported()));
        }
        let mut algorithms = Vec::with_capacity(plan.algorithms.len());
        for name in &plan.algorithms {
            match Algorithm::named(name) {
                Some(Algorithm::EdDsa) if plan.is_svid => {
                    mistakes.push("SPIFFE tokens are signed by RSA or by ECDSA, not by EdDSA".to_owned());
                }
                Some(algorithm) => algorithms.push(algorithm),
                None => mistakes.push(format!("the algorithm {name:?} isn't supported: these are {}", supported())),
            }
        }
        if !(0.0..=MOST_LEEWAY).contains(&plan.leeway) {
            mistakes.push(format!("a leeway of {} s is not within 0 and {MOST_LEEWAY}", plan.leeway));
        }
        if !(plan.longest > 0.0 && plan.longest.is_finite()) {
            mistakes.push(format!("a longest life of {} s is none", plan.longest));
        }
        if !mistakes.is_empty() {
            return Err(mistakes.into_iter().map(|text| format!("the provider {:?}: {text}", plan.name)).collect());
        }
        Ok(Self {
            number,
            name: plan.name.clone(),
            issuer: plan.issuer.clone(),
            audiences: plan.audiences.clone(),
            algorithms,
            leeway: plan.leeway,
            longest: plan.longest,
            is_svid: plan.is_svid,
            keys: RwLock::default(),
        })
    }

    pub(super) fn keys(&self) -> Keys {
        self.keys.read().clone()
    }

    pub(super) fn generation(&self) -> u64 {
        self.keys.read().generation
    }

    /// The same set again changes nothing.
    pub(super) fn set_keys(&self, set: Option<Arc<KeySet>>) {
        let mut keys = self.keys.write();
        let is_same = match (&keys.set, &set) {
            (Some(old), Some(new)) => old.digest() == new.digest(),
            (None, None) => true,
            _ => false,
        };
        if !is_same {
            *keys = Keys { generation: keys.generation + 1, set };
        }
    }
}

fn supported() -> String {
    Algorithm::supported().map(|(_, name)| name).collect::<Vec<_>>().join(", ")
}
