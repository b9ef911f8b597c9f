//! Under which policy do we let calls in? The inbound plan as Python writes it, compiled into the snapshot that requests use.
//!
//! Unknown keys, unknown words and rules that could never match are refused, all at once: a policy that is half understood would
//! be half enforced.
use serde::Deserialize;

use super::admission::{Admission, AdmissionPlan};
use super::facts::Listener;
use super::headers::Wanted;
use super::rates::{ByKind, Limit, RatePlan};
use crate::model::PathPlan;
use crate::route::PathPattern;
use crate::secure::address::{Proxies, ProxiesPlan};
use crate::secure::authorize::{self, Action, ConditionPlan, PeerPlan, RulePlan, Rules, TextPlan};
use crate::secure::jwt::{Place, PlaceKind, ProviderPlan, Providers};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ServerPlan {
    service: String,
    mode: Mode,
    identity: String,
    #[expect(
        dead_code,
        reason = "for the readers of a plan; callers of any domain whose bundle we hold are judged by the rules"
    )]
    trust_domain: String,
    paths: Paths,
    admission: AdmissionPlan,
    rules: Vec<RulePlan>,
    /// Those of the public listener, in the place of the others.
    public_rules: Vec<RulePlan>,
    routes: Vec<RouteLabel>,
    proxies: ProxiesPlan,
    xfcc: Xfcc,
    providers: Vec<ProviderPlan>,
    /// On these paths a token of one of the providers must be shown.
    jwt_required: Vec<authorize::PathPlan>,
    rates: Vec<RatePlan>,
    record: bool,
}

/// What becomes of x-forwarded-client-cert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Xfcc {
    /// It never gets in.
    Sanitize,
    /// It never gets in; the application is given one that says who the peer of this connection is.
    SanitizeSet,
    /// From a trusted proxy it gets in, with the proxy itself added.
    AppendForward,
}

impl Xfcc {
    pub fn word(self) -> &'static str {
        match self {
            Xfcc::Sanitize => "sanitize",
            Xfcc::SanitizeSet => "sanitize_set",
            Xfcc::AppendForward => "append_forward",
        }
    }
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

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Paths {
    Canonical,
    Strict,
    Redirect,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RouteLabel {
    name: String,
    path: PathPlan,
    on_disconnect: OnDisconnect,
}

/// What is stopped when the client goes away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnDisconnect {
    Nothing,
    /// The calls that the handler makes, where they can be made again.
    #[default]
    Calls,
    /// The handler too.
    Handler,
}

#[derive(Debug)]
struct Route {
    name: String,
    pattern: PathPattern,
    on_disconnect: OnDisconnect,
}

/// A compiled plan. Immutable; requests pin it.
#[derive(Debug)]
pub struct Snapshot {
    pub service: String,
    pub identity: String,
    pub mode: Mode,
    pub paths: Paths,
    pub(super) admission: Admission,
    rules: Rules,
    public_rules: Rules,
    pub wanted: Wanted,
    /// The rules, the rates or the tokens ask for more than caller, method and path.
    pub has_questions: bool,
    pub proxies: Proxies,
    pub xfcc: Xfcc,
    pub(super) providers: Option<Tokens>,
    pub(super) rates: Vec<Limit>,
    pub(super) global_rates: Vec<Limit>,
    pub is_recorded: bool,
    routes: Vec<Route>,
}

/// The providers of tokens together, and all the places where a token may be.
#[derive(Debug)]
pub(super) struct Tokens {
    pub providers: Providers,
    pub places: Vec<Place>,
    /// Those of each provider, and whether the application sees its tokens too, by the provider's number.
    pub terms: Vec<(Vec<Place>, bool)>,
}

impl Snapshot {
    pub fn compile(json: &[u8]) -> Result<Self, String> {
        let plan: ServerPlan =
            serde_json::from_slice(json).map_err(|error| format!("the server plan can't be read: {error}"))?;
        let mut mistakes = Vec::new();
        let (mut own, mut public) = (plan.rules, plan.public_rules);
        // First of all: a token is missing before anything else is forbidden.
        if !plan.jwt_required.is_empty() {
            let required = required(format!("{}/jwt", plan.service), plan.jwt_required);
            public.insert(0, required.clone());
            own.insert(0, required);
        }
        let rules = Rules::compile(&own).map_err(|found| mistakes.extend(found)).ok();
        // Most of them are the same, and so are their mistakes.
        let mut note_new = |found: Vec<String>| {
            for mistake in found {
                if !mistakes.contains(&mistake) {
                    mistakes.push(mistake);
                }
            }
        };
        let public_rules = Rules::compile(&public).map_err(&mut note_new).ok();
        let proxies = Proxies::compile(&plan.proxies).map_err(&mut note_new).ok();
        let providers = Tokens::compile(plan.providers).map_err(&mut note_new).ok();
        let admission = Admission::compile(plan.admission).map_err(&mut note_new).ok();
        let (Some(rules), Some(public_rules), Some(proxies), Some(providers), Some(admission)) =
            (rules, public_rules, proxies, providers, admission)
        else {
            return Err(mistakes.join("\n"));
        };
        let plans = || own.iter().chain(&public);
        let places = providers.iter().flat_map(|tokens| &tokens.places).filter_map(|place| match place.kind {
            PlaceKind::Header => Some(place.name.as_str()),
            PlaceKind::Cookie => Some("cookie"),
            PlaceKind::Query => None,
        });
        let counted = plan.rates.iter().flat_map(|rate| &rate.by).filter(|by| by.kind == ByKind::Header);
        let forwarded = (!proxies.is_empty()).then_some("x-forwarded-for");
        let names = places.chain(counted.map(|by| by.name.as_str())).chain(forwarded).map(Box::from);
        let wanted = Wanted::new(
            rules.wanted_headers().into_iter().chain(public_rules.wanted_headers()).chain(names),
            plans().any(|rule| !rule.hosts.is_empty() || !rule.not_hosts.is_empty()),
        );
        let asks_client = plan.rates.iter().flat_map(|rate| &rate.by).any(|by| by.kind == ByKind::Client);
        let (global, local): (Vec<_>, Vec<_>) = plan.rates.into_iter().partition(|rate| rate.is_global);
        Ok(Self {
            service: plan.service,
            identity: plan.identity,
            mode: plan.mode,
            paths: plan.paths,
            admission,
            has_questions: wanted.is_host
                || !wanted.names().is_empty()
                || rules.wants_source()
                || public_rules.wants_source()
                || plans().any(asks)
                || providers.is_some()
                || asks_client,
            rules,
            public_rules,
            wanted,
            proxies,
            xfcc: plan.xfcc,
            providers,
            rates: local.into_iter().map(Limit::new).collect(),
            global_rates: global.into_iter().map(Limit::new).collect(),
            is_recorded: plan.record,
            routes: plan
                .routes
                .into_iter()
                .map(|route| Route {
                    name: route.name,
                    pattern: PathPattern::compile(&route.path),
                    on_disconnect: route.on_disconnect,
                })
                .collect(),
        })
    }

    pub fn rules(&self, listener: Listener) -> &Rules {
        match listener {
            Listener::Mesh => &self.rules,
            Listener::Public => &self.public_rules,
        }
    }

    /// The first route whose path matches.
    pub fn route(&self, path: &str) -> Option<usize> {
        self.routes.iter().position(|route| route.pattern.matches(path))
    }

    pub fn route_name(&self, route: usize) -> &str {
        self.routes.get(route).map_or("", |route| &route.name)
    }

    /// What the route's path was written as.
    pub fn route_path(&self, route: usize) -> &str {
        self.routes.get(route).map_or("", |route| route.pattern.text())
    }

    pub fn on_disconnect(&self, route: usize) -> OnDisconnect {
        self.routes.get(route).map_or(OnDisconnect::default(), |route| route.on_disconnect)
    }
}

/// Does this rule speak of our port, or put a condition?
fn asks(rule: &RulePlan) -> bool {
    !(rule.ports.is_empty() && rule.not_ports.is_empty() && rule.when.is_empty())
}

/// A denial of those who show no token. Every good one has an audience; a subject it need not have.
fn required(name: String, paths: Vec<authorize::PathPlan>) -> RulePlan {
    RulePlan {
        name,
        action: Action::Deny,
        from: vec![PeerPlan::Any],
        when: vec![ConditionPlan {
            key: "request.auth.audiences".to_owned(),
            not_values: vec![TextPlan::Any],
            ..ConditionPlan::default()
        }],
        paths,
        ..RulePlan::default()
    }
}

impl Tokens {
    fn compile(plans: Vec<ProviderPlan>) -> Result<Option<Self>, Vec<String>> {
        if plans.is_empty() {
            return Ok(None);
        }
        let mut places: Vec<Place> = Vec::new();
        for place in plans.iter().flat_map(|plan| &plan.from) {
            if !places.contains(place) {
                places.push(place.clone());
            }
        }
        let terms = plans.iter().map(|plan| (plan.from.clone(), plan.forward)).collect();
        Ok(Some(Self { providers: Providers::compile(&plans)?, places, terms }))
    }
}
