//! Is this caller allowed to do that?
//!
//! The order is Istio's: custom rules name whom to ask, then denials, then permissions, and what nobody allowed is denied. A rule is
//! its clauses (who, from where, how, where to, and when), and all must hold; within a clause one entry is enough. Where something is
//! not known or has two readings, denials and custom rules fire and permissions don't. Rules are compiled, so that an allowed request
//! costs comparisons and no memory; the words of a refusal are made only for those who ask. A dry-run rule is judged in a second,
//! shadow verdict and decides nothing.
//!
//! It does not know modes: what follows from a verdict is said in `server`. It asks no authorizer, it says which one has to be asked.
use core::net::IpAddr;

use super::jwt::Claims;
use super::path::Path;

mod asked;
mod clause;
mod condition;
mod explain;
mod index;
mod pattern;
mod plan;
mod rule;

use asked::Asked;
use clause::{Test, View};
use index::Index;
pub use pattern::PeerPattern;
pub use plan::{Action, ConditionPlan, PathPlan, PeerPlan, RulePlan, TextPlan};
use rule::Rule;
pub use rule::{is_grpc_method, is_method};

/// What is known of a call.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// None: no proven identity.
    pub peer: Option<&'a str>,
    pub method: &'a str,
    /// In its canonical form.
    pub path: &'a Path,
    /// As it was sent. None: not known.
    pub host: Option<&'a str>,
    /// Our own. 0: not known.
    pub port: u16,
    /// The other end of the connection. None: not known.
    pub source: Option<IpAddr>,
    /// The client behind the proxies, `address::client_of`. None: not known.
    pub remote: Option<IpAddr>,
    /// "": not known.
    pub sni: &'a str,
    /// Those of `Rules::wanted_headers` at least, with lower-case names, in order, each field by itself.
    pub headers: &'a [(Box<str>, Vec<u8>)],
    /// Of a verified token. None: there was none.
    pub claims: Option<&'a Claims>,
}

/// The answer. Rules are numbers here; `Rules::rule_name` and `Rules::explain` put them into words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// What denials and permissions say. Where a custom rule matches, its authorizer has to agree.
    pub is_allowed: bool,
    /// The rule that decided; None: no rule allowed it.
    pub rule: Option<usize>,
    /// The answer if the dry-run rules counted, and the rule that gave it. A custom one gives no answer: it stands here where the
    /// call would be allowed if its authorizer agreed.
    pub shadow: (bool, Option<usize>),
    /// The first custom rule that matches. All of them name the same authorizer, which has to be asked.
    pub custom: Option<usize>,
    /// It was refused for want of a token: with a suitable one it would be allowed.
    pub needs_token: bool,
}

#[derive(Debug)]
pub struct Rules {
    rules: Vec<Rule>,
    counted: Lists,
    /// The dry-run rules, if there are any.
    dry: Option<Lists>,
    /// Of the permissions that count, those that look at a token.
    by_token: Index,
}

#[derive(Debug)]
struct Lists {
    custom: Index,
    deny: Index,
    allow: Index,
}

impl Rules {
    /// All mistakes at once; a rule that could never match is one, because a denial that never fires is an open door.
    pub fn compile(plans: &[RulePlan]) -> Result<Self, Vec<String>> {
        let (mut rules, mut mistakes) = (Vec::with_capacity(plans.len()), Vec::new());
        for plan in plans {
            match Rule::compile(plan) {
                Ok(rule) => rules.push(rule),
                Err(found) => mistakes.extend(found.into_iter().map(|text| format!("rule {:?}: {text}", plan.name))),
            }
        }
        mistakes.extend(two_authorizers(plans));
        if !mistakes.is_empty() {
            return Err(mistakes);
        }
        let list = |action: Action, is_dry_run: bool| {
            let is_in = |(_, plan): &(usize, &RulePlan)| plan.action == action && plan.dry_run == is_dry_run;
            Index::new(action, plans.iter().enumerate().filter(is_in).map(|(number, _)| number).collect(), &rules)
        };
        let lists = |is_dry_run| Lists {
            custom: list(Action::Custom, is_dry_run),
            deny: list(Action::Deny, is_dry_run),
            allow: list(Action::Allow, is_dry_run),
        };
        let (counted, dry) = (lists(false), plans.iter().any(|plan| plan.dry_run).then(|| lists(true)));
        let asks = |number: &usize| rules.get(*number).is_some_and(|rule| rule.asks_token);
        let by_token =
            Index::new(Action::Allow, counted.allow.numbers().iter().copied().filter(asks).collect(), &rules);
        Ok(Self { rules, counted, dry, by_token })
    }

    pub fn judge(&self, question: &Question<'_>) -> Verdict {
        let question = &Asked::new(question);
        let Lists { custom, deny, allow } = &self.counted;
        let denied = self.first(deny, question);
        let allowed = if denied.is_some() { None } else { self.first(allow, question) };
        let is_allowed = allowed.is_some();
        let rule = denied.or(allowed);
        Verdict {
            is_allowed,
            rule,
            shadow: self.dry.as_ref().map_or((is_allowed, rule), |dry| self.shadow(dry, question, denied, allowed)),
            custom: self.first(custom, question),
            needs_token: !is_allowed && question.claims.is_none() && self.would_token_help(question, denied),
        }
    }

    fn first(&self, index: &Index, question: &Asked<'_>) -> Option<usize> {
        index.first(question, |number| self.rules.get(number).is_some_and(|rule| rule.matches(question)))
    }

    /// The verdict with the dry-run rules, which stand between the others in the order in which they were written.
    fn shadow(
        &self,
        dry: &Lists,
        question: &Asked<'_>,
        denied: Option<usize>,
        allowed: Option<usize>,
    ) -> (bool, Option<usize>) {
        let earlier = |one: Option<usize>, other: Option<usize>| one.into_iter().chain(other).min();
        if let Some(rule) = earlier(denied, self.first(&dry.deny, question)) {
            return (false, Some(rule));
        }
        match earlier(allowed, self.first(&dry.allow, question)) {
            Some(rule) => (true, self.first(&dry.custom, question).or(Some(rule))),
            None => (false, None),
        }
    }

    /// With a token that fits, would a refused call be allowed? Clauses about tokens are no hindrance to a permission then, and
    /// denials that have one need not fire.
    fn would_token_help(&self, question: &Asked<'_>, denied: Option<usize>) -> bool {
        let first = |index: &Index| {
            index.first(question, |number| {
                self.rules.get(number).is_some_and(|rule| rule.matches_with_any_token(question))
            })
        };
        match denied.and_then(|number| self.rules.get(number)) {
            // No other permission matches, or it would be allowed.
            None => first(&self.by_token).is_some(),
            Some(rule) if !rule.asks_token => false,
            Some(_) => first(&self.counted.deny).is_none() && first(&self.counted.allow).is_some(),
        }
    }

    /// The headers that conditions name, in lower case, each once.
    pub fn wanted_headers(&self) -> Vec<Box<str>> {
        let tests = self.rules.iter().flat_map(|rule| &rule.clauses).map(|clause| &clause.test);
        let mut names: Vec<Box<str>> = tests
            .filter_map(|test| match test {
                Test::Header { name, .. } => Some(name.clone()),
                _ => None,
            })
            .collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Do any rules look at addresses?
    pub fn wants_source(&self) -> bool {
        let mut tests = self.rules.iter().flat_map(|rule| &rule.clauses).map(|clause| &clause.test);
        tests.any(|test| matches!(test, Test::Sources(_) | Test::Remotes(_)))
    }

    /// Whom a custom rule asks.
    pub fn authorizer(&self, rule: usize) -> &str {
        self.rules.get(rule).map_or("", |rule| &rule.authorizer)
    }

    /// The name of a rule of a verdict; "" for none.
    pub fn rule_name(&self, rule: Option<usize>) -> &str {
        rule.and_then(|number| self.rules.get(number)).map_or("", |rule| &rule.name)
    }
}

/// A call has one custom answer, as in Istio: of two authorizers the one that was forgotten would be an open door.
fn two_authorizers(plans: &[RulePlan]) -> Option<String> {
    let mut custom = plans.iter().filter(|plan| plan.action == Action::Custom && !plan.dry_run);
    let first = custom.next()?;
    let other = custom.find(|plan| plan.authorizer != first.authorizer)?;
    Some(format!(
        "rule {:?}: it asks the authorizer {:?}, and rule {:?} asks {:?}; there can be only one, which may ask both",
        other.name, other.authorizer, first.name, first.authorizer
    ))
}

#[cfg(test)]
mod tests;
