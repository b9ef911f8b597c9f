//! Is the request sound, and may its caller do that? The secure phase of an entry; None is "go on".
//!
//! In this order: is it one request to all who read it (target, method, header list); what does the policy ask about, and is the token
//! that was shown a good one; what do the rules of this listener say. What a verdict of them leads to depends on the mode, and on
//! the door: in mode enforce nobody comes in without an identity, except by the public one, whose rules are all that
//! counts there.
use std::sync::Arc;

use super::facts::{Facts, Listener, Origin};
use super::plan::{Paths, Snapshot, Tokens};
use super::tokens::{self, Found};
use super::traffic::Observed;
use super::{Arrival, Entry, Headers, Refusal, LONGEST_TARGET};
use crate::secure::address::{self, client_of};
use crate::secure::authorize::{is_grpc_method, is_method, Verdict};
use crate::secure::jwt::{PlaceKind, TokenFault};
use crate::secure::path::profile::redirect;
use crate::secure::path::{canonical, Path};

impl Entry {
    pub(super) fn secure(&mut self, arrival: &Arrival<'_>) -> Option<Refusal> {
        let Some(snapshot) = &self.snapshot else { return Some(Refusal::NotReady) };
        if arrival.target.len() > LONGEST_TARGET {
            return Some(Refusal::TargetTooLong);
        }
        if !is_method(arrival.method) {
            return Some(Refusal::Method);
        }
        if let Some(fault) = arrival.headers.fault() {
            return Some(Refusal::Headers(fault));
        }
        match canonical(arrival.target, arrival.method, arrival.headers.host_value(), snapshot.paths == Paths::Strict) {
            Ok(path) => {
                if snapshot.paths == Paths::Redirect {
                    self.location = redirect(arrival.target, &path);
                    if self.location.is_some() {
                        return Some(Refusal::Redirect);
                    }
                }
                self.route = snapshot.route(path.text());
                self.path = Some(path);
            }
            Err(error) => return Some(Refusal::Path(error)),
        }
        // TRACE gives the caller back what proxies added on the way, credentials too.
        // CONNECT asks for a tunnel, which no application behind the mesh means by a 200.
        matches!(arrival.method, "TRACE" | "CONNECT").then_some(Refusal::Trace)
    }

    pub(super) fn secure_grpc(&mut self, method: &str) -> Option<Refusal> {
        let Some(snapshot) = &self.snapshot else { return Some(Refusal::NotReady) };
        if !is_grpc_method(method) {
            return Some(Refusal::GrpcMethod);
        }
        self.route = snapshot.route(method);
        self.path = Some(Path::exact(method));
        None
    }

    /// Gathers what the policy asks about, and judges a token, if one was shown.
    pub(super) fn learn(&mut self, headers: &mut Headers, origin: &Origin<'_>, target: &[u8]) -> Option<Refusal> {
        let snapshot = Arc::clone(self.snapshot.as_ref()?);
        if self.listener == Listener::Public {
            // That somebody comes without an identity is what it is there for.
        } else if !self.is_tls {
            self.state.traffic.note_plain(address::parse(origin.source));
        } else if self.peer.is_none() {
            self.state.traffic.note_anonymous();
        }
        if !snapshot.has_questions {
            return None;
        }
        let source = address::parse(origin.source);
        let is_believed = snapshot.proxies.is_trusted(source, self.peer.as_deref());
        let forwarded: Vec<&[u8]> =
            headers.kept.iter().filter(|(name, _)| &**name == "x-forwarded-for").map(|(_, value)| &value[..]).collect();
        let mut facts = Facts {
            host: headers.host_value().and_then(|host| std::str::from_utf8(host).ok()).map(str::to_owned),
            port: origin.port,
            source,
            remote: client_of(source, is_believed, &forwarded, snapshot.proxies.hops()),
            sni: origin.sni.into(),
            is_believed,
            // An address is no identity: it is believed about addresses, and about nothing else.
            is_from_proxy: snapshot.proxies.is_trusted(None, self.peer.as_deref()),
            ..Facts::default()
        };
        facts.headers = std::mem::take(&mut headers.kept);
        let refusal =
            snapshot.providers.as_ref().and_then(|tokens| self.verify(tokens, &mut facts, target, origin.wall));
        self.facts = Some(Box::new(facts));
        // A mode is about trust: where the rules don't bind, a bad token is none, and reported.
        self.is_misled = refusal.is_some();
        refusal.filter(|_| snapshot.mode.enforces())
    }

    fn verify(&self, tokens: &Tokens, facts: &mut Facts, target: &[u8], wall: f64) -> Option<Refusal> {
        let (token, place) = match tokens::find(&tokens.places, &facts.headers, target) {
            Found::Nothing => return None,
            Found::Several => return Some(Refusal::Token),
            Found::Token(token, place) => (token, place),
        };
        match tokens.providers.verify(token, wall) {
            Ok(claims) => {
                let (places, is_forwarded) = tokens.terms.get(claims.provider())?;
                if !places.contains(place) {
                    facts.fault =
                        Some(TokenFault::Header("is in a place where this provider's tokens are not looked for"));
                    return Some(Refusal::Token);
                }
                if place.kind == PlaceKind::Header && !is_forwarded {
                    facts.token_header = Some(place.name.as_str().into());
                }
                facts.claims = Some(claims);
                None
            }
            Err(fault) => {
                facts.fault = Some(fault);
                Some(Refusal::Token)
            }
        }
    }

    pub(super) fn authorize(&mut self) -> Option<Refusal> {
        let Some(snapshot) = &self.snapshot else { return Some(Refusal::NotReady) };
        let Some(question) = self.question() else { return Some(Refusal::NotReady) };
        let verdict = snapshot.rules(self.listener).judge(&question);
        self.verdict = Some(verdict);
        if snapshot.is_recorded {
            self.record(snapshot, verdict);
        }
        if !snapshot.mode.enforces() {
            return None;
        }
        // At the public listener a rule for everybody is for everybody.
        if self.listener == Listener::Public {
            return match verdict.is_allowed {
                true => None,
                false if verdict.needs_token => Some(Refusal::NoToken),
                false => Some(Refusal::Denied),
            };
        }
        // Enforce means mutual TLS: a rule for everybody is one for everybody who proved to be somebody. Who proved nothing may try
        // again with an identity, unless a rule denies this to all the world.
        match (self.peer.is_none(), verdict.is_allowed) {
            (true, true) => Some(Refusal::NoIdentity),
            (true, false) if verdict.rule.is_none() => Some(Refusal::NoIdentity),
            (false, false) if verdict.needs_token => Some(Refusal::NoToken),
            (_, false) => Some(Refusal::Denied),
            (false, true) => None,
        }
    }

    fn record(&self, snapshot: &Snapshot, verdict: Verdict) {
        self.state.traffic.note(Observed {
            peer: self.peer.clone().unwrap_or_default(),
            method: self.method.to_string(),
            path: self.path().to_owned(),
            route: self.route.map_or("", |route| snapshot.route_path(route)).to_owned(),
            principal: self.claims().map_or("", |claims| claims.principal()).to_owned(),
            is_allowed: verdict.is_allowed,
            is_grpc: self.is_grpc,
        });
    }
}
