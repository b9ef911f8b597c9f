//! Under which policy do we let calls in? The inbound plan as Python writes it, compiled into the snapshot that requests use.
//!
//! Unknown keys, unknown words and rules that could never match are refused, all at once: a policy that is half understood would
//! be half enforced.
use serde::Deserialize;

use crate::model::PathPlan;
use crate::route::PathPattern;
use crate::secure::authorize::{RulePlan, Rules};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ServerPlan {
    service: String,
    mode: Mode,
    identity: String,
    paths: Paths,
    in_flight: u32,
    rules: Vec<RulePlan>,
    routes: Vec<RouteLabel>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    Observe,
    Permissive,
    Enforce,
}

impl Mode {
    /// Does the verdict of the rules bind? In the other modes it is reported.
    pub fn enforces(self) -> bool {
        self == Mode::Enforce
    }

    pub fn word(self) -> &'static str {
        match self {
            Mode::Observe => "observe",
            Mode::Permissive => "permissive",
            Mode::Enforce => "enforce",
        }
    }
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Paths {
    Canonical,
    Strict,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RouteLabel {
    name: String,
    path: PathPlan,
}

/// A compiled plan. Immutable; requests pin it.
#[derive(Debug)]
pub struct Snapshot {
    pub service: String,
    pub identity: String,
    pub mode: Mode,
    pub is_strict: bool,
    pub in_flight: u32,
    pub rules: Rules,
    routes: Vec<(String, PathPattern)>,
}

impl Snapshot {
    pub fn compile(json: &[u8]) -> Result<Self, String> {
        let plan: ServerPlan =
            serde_json::from_slice(json).map_err(|error| format!("the server plan can't be read: {error}"))?;
        let rules = Rules::compile(&plan.rules).map_err(|mistakes| mistakes.join("\n"))?;
        Ok(Self {
            service: plan.service,
            identity: plan.identity,
            mode: plan.mode,
            is_strict: plan.paths == Paths::Strict,
            in_flight: plan.in_flight,
            rules,
            routes: plan.routes.into_iter().map(|route| (route.name, PathPattern::compile(&route.path))).collect(),
        })
    }

    /// The first route whose path matches.
    pub fn route(&self, path: &str) -> Option<usize> {
        self.routes.iter().position(|(_, pattern)| pattern.matches(path))
    }

    pub fn route_name(&self, route: usize) -> &str {
        self.routes.get(route).map_or("", |(name, _)| name)
    }
}
