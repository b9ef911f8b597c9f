//! How did it end, and what is known of a call that came in? The way back of the inbound way.
//!
//! ```text
//! phase   was it counted?    what it holds                  how it goes on
//! Waits   no                 a ticket, or a place by it     resume: In or Over; any end: Over
//! In      as in flight       a place, unless it is a probe  any end: Over
//! Over    with its code      nothing                        not at all
//! ```
//!
//! An entry ends once: by `finish`, by a refusal that came late, or by being dropped, which is how a cancelled handler ends. What it
//! can tell is put into words only when somebody asks.
use core::net::IpAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::facts::Listener;
use super::plan::{Mode, OnDisconnect, Xfcc};
use super::{Entry, Refusal};
use crate::secure::authorize::{Question, Rules, Verdict};
use crate::secure::jwt::{Claims, TokenFault};
use crate::secure::path::Path;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Phase {
    Waits,
    In,
    Over,
}

impl Phase {
    fn of(number: u8) -> Self {
        match number {
            0 => Self::Waits,
            1 => Self::In,
            _ => Self::Over,
        }
    }
}

impl Entry {
    /// The call ended: with an HTTP status, or for gRPC with its code; 0 is no status at all (HTTP). Only the first end counts. The
    /// answer is the tickets that are called now: nearly always none, and then nothing is locked.
    pub fn finish(&self, status: u16, now: Duration) -> Vec<u64> {
        self.end(status, Some(now), None);
        self.state.queue.called()
    }

    /// The authorizer that a CUSTOM rule names did not allow it: the call is refused, and over.
    pub fn veto(&self) -> Vec<u64> {
        self.turn_away(Refusal::Custom)
    }

    /// A rate that others count with us is used up: the call is refused, and over.
    pub fn outrun(&self, wait: Duration) -> Vec<u64> {
        self.turn_away(Refusal::Rate(wait))
    }

    /// It was let in, and somebody else said no.
    pub(super) fn turn_away(&self, refusal: Refusal) -> Vec<u64> {
        self.end(self.code(refusal), None, Some(refusal));
        self.state.queue.called()
    }

    fn end(&self, code: u16, now: Option<Duration>, refusal: Option<Refusal>) {
        let phase = Phase::of(self.phase.swap(Phase::Over as u8, Ordering::AcqRel));
        if phase == Phase::Over {
            return;
        }
        if let Some(series) = &self.series {
            if phase == Phase::Waits {
                series.begin(self.would_deny());
            }
            match refusal {
                Some(_) => series.veto(code),
                None => series.end(code, now.map(|now| now.saturating_sub(self.begun).saturating_add(self.before))),
            }
        }
        if let Some(refusal) = refusal {
            // Nobody was quicker: only one end comes here.
            let _ = self.late.set(refusal);
        }
        self.go_out(phase, code, now);
    }

    /// The same as it is counted.
    pub(super) fn code(&self, refusal: Refusal) -> u16 {
        if self.is_grpc {
            refusal.grpc_status()
        } else {
            refusal.status()
        }
    }

    pub fn refusal(&self) -> Option<Refusal> {
        self.refusal.or_else(|| self.late.get().copied())
    }

    /// It has ended or was refused: nothing can come after.
    pub fn is_over(&self) -> bool {
        self.phase() == Phase::Over
    }

    pub(super) fn phase(&self) -> Phase {
        Phase::of(self.phase.load(Ordering::Acquire))
    }

    /// In which form the caller wants to be told of our load; "" if it doesn't. It is for those who may call us: not for strangers,
    /// unless nobody has an identity yet, and not for whom the rules refuse.
    pub fn load_format(&self) -> &'static str {
        let is_stranger = self.peer.is_none() && (self.is_public() || self.mode() != Some(Mode::Observe));
        if is_stranger || self.refusal().is_some_and(|refusal| !refusal.is_of_admission()) {
            return "";
        }
        self.load_format.word()
    }

    /// What is stopped when the client goes away: nothing (0), the calls that the handler makes (1), or the handler too (2).
    pub fn on_disconnect(&self) -> u8 {
        match (&self.snapshot, self.route) {
            (Some(snapshot), Some(route)) => snapshot.on_disconnect(route) as u8,
            _ => OnDisconnect::default() as u8,
        }
    }

    /// It came in by the door for everybody.
    pub fn is_public(&self) -> bool {
        self.listener == Listener::Public
    }

    fn rules(&self) -> Option<&Rules> {
        self.snapshot.as_ref().map(|snapshot| snapshot.rules(self.listener))
    }

    /// The authorizer that has to be asked before the call goes on; "" for none. Only rules that bind ask.
    pub fn authorizer(&self) -> &str {
        let custom = self.verdict.and_then(|verdict| verdict.custom).filter(|_| self.refusal.is_none());
        match (self.rules(), custom) {
            (Some(rules), Some(rule)) if self.mode().is_some_and(Mode::enforces) => rules.authorizer(rule),
            _ => "",
        }
    }

    /// What a good token claims.
    pub fn claims(&self) -> Option<&Claims> {
        self.facts.as_deref().and_then(|facts| facts.claims.as_deref())
    }

    /// The provider whose keys don't know the token's, or aren't known themselves: it may have new ones.
    pub fn wants_keys(&self) -> &str {
        self.facts.as_deref().and_then(|facts| facts.fault.as_ref()).map_or("", TokenFault::wants_keys)
    }

    /// The header of a token that was for us alone.
    pub fn token_header(&self) -> &str {
        self.facts.as_deref().and_then(|facts| facts.token_header.as_deref()).unwrap_or("")
    }

    /// The client's own address, as far as proxies that are trusted tell it; None where no policy asks for it.
    pub fn client(&self) -> Option<IpAddr> {
        self.facts.as_deref().and_then(|facts| facts.remote)
    }

    /// The connection comes from a proxy that is trusted to say where a call comes from.
    pub fn is_from_proxy(&self) -> bool {
        self.facts.as_deref().is_some_and(|facts| facts.is_from_proxy)
    }

    /// Our own SPIFFE ID.
    pub fn identity(&self) -> &str {
        self.snapshot.as_ref().map_or("", |snapshot| &snapshot.identity)
    }

    /// What it says about where a call comes from counts: the proxy is trusted, or the rules don't bind yet.
    pub fn is_believed(&self) -> bool {
        !self.snapshot.as_ref().is_some_and(|snapshot| snapshot.mode.enforces())
            || self.facts.as_deref().is_some_and(|facts| facts.is_believed)
    }

    pub fn xfcc(&self) -> Xfcc {
        self.snapshot.as_ref().map_or(Xfcc::Sanitize, |snapshot| snapshot.xfcc)
    }

    /// Where `paths: redirect` sends the caller; "" for nowhere.
    pub fn location(&self) -> &str {
        self.location.as_deref().unwrap_or("")
    }

    /// Seconds until the next call fits into the rate that this one was too much for.
    pub fn retry_after(&self) -> Option<Duration> {
        match self.refusal() {
            Some(Refusal::Rate(wait)) => Some(wait),
            _ => None,
        }
    }

    /// 0: it may go on.
    pub fn status(&self) -> u16 {
        self.refusal().map_or(0, Refusal::status)
    }

    pub fn reason(&self) -> &'static str {
        self.refusal().map_or("", Refusal::reason)
    }

    /// The mode lets it pass, and the rules (or a dry-run rule) would not.
    pub fn would_deny(&self) -> bool {
        self.status() == 0
            && (self.is_misled || self.verdict.is_some_and(|verdict| !verdict.is_allowed || !verdict.shadow.0))
    }

    /// The rule that decided; "" where none allowed it, or none was asked.
    pub fn rule(&self) -> &str {
        self.named(self.verdict.and_then(|verdict| verdict.rule))
    }

    /// The dry-run rule that would change the decision; "" for none.
    pub fn dry_run_rule(&self) -> &str {
        let changed = self.verdict.filter(|verdict| verdict.shadow != (verdict.is_allowed, verdict.rule));
        self.named(changed.and_then(|verdict| verdict.shadow.1))
    }

    fn named(&self, rule: Option<usize>) -> &str {
        self.rules().map_or("", |rules| rules.rule_name(rule))
    }

    /// The rule that came nearest to allowing what no rule allowed.
    pub fn nearest_rule(&self) -> &str {
        match (self.rules(), self.question(), self.verdict) {
            (Some(rules), Some(question), Some(Verdict { is_allowed: false, rule: None, .. })) => {
                rules.nearest_name(&question)
            }
            _ => "",
        }
    }

    pub(super) fn question(&self) -> Option<Question<'_>> {
        let facts = self.facts.as_deref();
        self.path.as_ref().map(|path| Question {
            peer: self.peer.as_deref(),
            method: &self.method,
            path,
            host: facts.and_then(|facts| facts.host.as_deref()),
            port: facts.map_or(0, |facts| facts.port),
            source: facts.and_then(|facts| facts.source),
            remote: facts.and_then(|facts| facts.remote),
            sni: facts.map_or("", |facts| &facts.sni),
            headers: facts.map_or(&[], |facts| &facts.headers),
            claims: facts.and_then(|facts| facts.claims.as_deref()),
        })
    }

    /// What happened and what to do, for the one who runs this service; "" if nothing happened. It names rules: not for callers.
    pub fn detail(&self) -> String {
        match self.refusal() {
            Some(refusal @ Refusal::Token) => match self.facts.as_deref().and_then(|facts| facts.fault.as_ref()) {
                Some(fault) => format!("{refusal} {fault}"),
                None => format!("{refusal} There are two of them, and only one can be meant."),
            },
            Some(refusal @ Refusal::Custom) => {
                format!(
                    "{refusal} (authorizer {:?})",
                    self.rules().map_or("", |rules| {
                        self.verdict.and_then(|verdict| verdict.custom).map_or("", |rule| rules.authorizer(rule))
                    })
                )
            }
            // A rule may let everybody in, but in enforce nobody is everybody.
            Some(refusal @ Refusal::NoIdentity) if self.verdict.is_some_and(|verdict| verdict.is_allowed) => {
                refusal.to_string()
            }
            Some(Refusal::NoIdentity | Refusal::NoToken | Refusal::Denied) => self.explanation(),
            Some(Refusal::Shed) => format!(
                "{} (priority {}, waited {:.0} ms)",
                Refusal::Shed,
                self.priority(),
                self.waited().as_secs_f64() * 1e3
            ),
            Some(refusal) => refusal.to_string(),
            None if self.would_deny() => self.explanation(),
            None => String::new(),
        }
    }

    fn explanation(&self) -> String {
        let (Some(rules), Some(question), Some(verdict)) = (self.rules(), self.question(), self.verdict) else {
            return String::new();
        };
        let rule = if verdict.is_allowed { verdict.shadow.1 } else { verdict.rule };
        rules.explain(rule, &question)
    }

    pub fn path(&self) -> &str {
        self.path.as_ref().map_or("", Path::text)
    }

    pub fn raw_path(&self) -> &str {
        self.path.as_ref().map_or("", Path::raw)
    }

    pub fn route(&self) -> &str {
        match (&self.snapshot, self.route) {
            (Some(snapshot), Some(route)) => snapshot.route_name(route),
            _ => "",
        }
    }

    pub fn method(&self) -> &str {
        &self.method
    }

    pub fn peer(&self) -> Option<&str> {
        self.peer.as_deref()
    }

    pub fn deadline(&self) -> Option<Duration> {
        self.deadline
    }

    /// A call that the handler made has failed, with all that may be tried for it.
    pub fn spend(&self) {
        self.is_spent.store(true, Ordering::Relaxed);
    }

    /// What was to be tried has been tried further down: an answer that says so is not to be repeated, or each layer would multiply
    /// the attempts of the next.
    pub fn is_spent(&self) -> bool {
        self.is_spent.load(Ordering::Relaxed)
    }

    /// In which attempt of a caller we run: 0 in the first.
    pub fn layer(&self) -> u32 {
        self.layer
    }

    /// It had waited for so long in the process when it was asked about: counted as its time, and as nobody's work.
    pub fn waited_before(&mut self, time: Duration) {
        self.before = time;
    }

    pub fn begun(&self) -> Duration {
        self.begun
    }

    pub fn is_grpc(&self) -> bool {
        self.is_grpc
    }

    pub fn is_tls(&self) -> bool {
        self.is_tls
    }

    pub fn mode(&self) -> Option<Mode> {
        self.snapshot.as_ref().map(|snapshot| snapshot.mode)
    }

    pub fn service(&self) -> &str {
        self.snapshot.as_ref().map_or("", |snapshot| &snapshot.service)
    }

    /// What the rules said: "allow", "deny", or "" where they were not asked.
    pub fn verdict(&self) -> &'static str {
        self.verdict.map_or("", |verdict| if verdict.is_allowed { "allow" } else { "deny" })
    }
}

impl Drop for Entry {
    /// Nobody said how it ended: the caller left, or a handler was cancelled. The place goes back all the same.
    fn drop(&mut self) {
        const CANCELLED: u16 = 1;
        self.end(if self.is_grpc { CANCELLED } else { 0 }, None, None);
    }
}
