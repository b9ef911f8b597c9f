//! Is this caller allowed to do that?
//!
//! Denials first, then permissions, and what nobody allowed is denied. A rule has three clauses (who, how, where), and all must
//! match; within a clause one match is enough. Rules are compiled, so that an allowed request costs comparisons and no memory; the
//! words of a refusal are made only for those who ask. A dry-run rule is judged in a second, shadow verdict and decides nothing.
//!
//! It does not know modes: what follows from a verdict is said in `server`. Headers, claims and addresses are no clauses yet, and
//! a plan that names them is refused by the parser of the plan.
use serde::Deserialize;

use super::path::Path;

mod index;
mod rule;

use index::Index;
use rule::Rule;
pub use rule::{is_grpc_method, is_method};

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RulePlan {
    pub name: String,
    pub action: Action,
    pub dry_run: bool,
    pub from: Vec<PeerPlan>,
    pub methods: Vec<String>,
    pub paths: Vec<PathPlan>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    Allow,
    Deny,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum PeerPlan {
    /// Anyone, also without an identity.
    Any,
    Exact {
        value: String,
    },
    Prefix {
        value: String,
    },
}

/// Unlike a route's, a rule's prefix is one of text: `/orders*` covers `/orders-old`, and says so by its star.
#[derive(Debug, Clone, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum PathPlan {
    Exact { value: String },
    Prefix { value: String },
    Template { value: String },
}

/// What is asked: a caller (None: no proven identity), a method, a canonical path.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    pub peer: Option<&'a str>,
    pub method: &'a str,
    pub path: &'a Path,
}

/// The answer. Rules are numbers here; `Rules::rule_name` and `Rules::explain` put them into words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    pub is_allowed: bool,
    /// The rule that decided; None: no rule allowed it.
    pub rule: Option<usize>,
    /// The answer if the dry-run rules counted, and the rule that gave it.
    pub shadow: (bool, Option<usize>),
}

#[derive(Debug)]
pub struct Rules {
    rules: Vec<Rule>,
    counted: Lists,
    /// The same with the dry-run rules, if there are any.
    shadow: Option<Lists>,
}

#[derive(Debug)]
struct Lists {
    deny: Index,
    allow: Index,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Clause {
    From,
    Methods,
    Paths,
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
        if !mistakes.is_empty() {
            return Err(mistakes);
        }
        let list = |action: Action, with_dry_run: bool| {
            let is_in = |(_, plan): &(usize, &RulePlan)| plan.action == action && (with_dry_run || !plan.dry_run);
            Index::new(action, plans.iter().enumerate().filter(is_in).map(|(number, _)| number).collect(), &rules)
        };
        let lists =
            |with_dry_run| Lists { deny: list(Action::Deny, with_dry_run), allow: list(Action::Allow, with_dry_run) };
        let (counted, shadow) = (lists(false), plans.iter().any(|plan| plan.dry_run).then(|| lists(true)));
        Ok(Self { rules, counted, shadow })
    }

    pub fn judge(&self, question: &Question<'_>) -> Verdict {
        let (is_allowed, rule) = self.decide(&self.counted, question);
        let shadow = self.shadow.as_ref().map_or((is_allowed, rule), |lists| self.decide(lists, question));
        Verdict { is_allowed, rule, shadow }
    }

    fn decide(&self, lists: &Lists, question: &Question<'_>) -> (bool, Option<usize>) {
        match lists.deny.first(&self.rules, question) {
            Some(rule) => (false, Some(rule)),
            None => lists.allow.first(&self.rules, question).map_or((false, None), |rule| (true, Some(rule))),
        }
    }

    /// The name of a rule of a verdict; "" for none.
    pub fn rule_name(&self, rule: Option<usize>) -> &str {
        rule.and_then(|number| self.rules.get(number)).map_or("", |rule| &rule.name)
    }

    /// The name of the rule that came nearest to allowing it; "" if there is none to allow anything.
    pub fn nearest_name(&self, question: &Question<'_>) -> &str {
        self.nearest(question).map_or("", |(rule, _)| &rule.name)
    }

    /// The reason for a denial, and what would turn it into a permission. Slow, for people.
    pub fn explain(&self, denied_by: Option<usize>, question: &Question<'_>) -> String {
        if let Some(rule) = denied_by.and_then(|number| self.rules.get(number)) {
            return format!(
                "rule {:?} denies {}. Only a narrower `from`, `methods` or `paths` of that rule would allow {}.",
                rule.name,
                rule.scope("from"),
                question.what()
            );
        }
        let Some((rule, clause)) = self.nearest(question) else {
            return format!(
                "no rule allows anything here, and what no rule allows is denied. This would allow it: \
                 allow: [{{name: …, from: [{}], methods: [{}], paths: [{}]}}].",
                question.peer.map_or("\"*\"".to_owned(), shown),
                question.method,
                shown(question.path.text()),
            );
        };
        let name = &rule.name;
        let (fault, remedy) = match (clause, question.peer) {
            (Clause::From, Some(peer)) => {
                let peer = shown(peer);
                (format!("the caller {peer} is not in \"from\""), format!("Add it to \"from\" of rule {name:?}"))
            }
            (Clause::From, None) => (
                "the caller proved no identity".to_owned(),
                format!("Let the caller come over mutual TLS with an identity in \"from\" of rule {name:?}"),
            ),
            (Clause::Methods, _) => (
                format!("the method {} is not in \"methods\"", question.method),
                format!("Add it to \"methods\" of rule {name:?}"),
            ),
            (Clause::Paths, _) => {
                let path = shown(question.path.text());
                (format!("the path {path} is not in \"paths\""), format!("Add it to \"paths\" of rule {name:?}"))
            }
        };
        format!(
            "no rule allows it. The nearest: rule {name:?} allows {}; {fault}. {remedy} to allow it.",
            rule.scope("to")
        )
    }

    /// The rule of those that allow with the most matching clauses, and its first clause that failed. A rule for this path is
    /// nearer than one for this caller, and that nearer than one for this method.
    fn nearest(&self, question: &Question<'_>) -> Option<(&Rule, Clause)> {
        let mut best: Option<(u8, &Rule, Clause)> = None;
        for rule in self.counted.allow.numbers().iter().filter_map(|number| self.rules.get(*number)) {
            let clauses = [
                (rule.is_from(question), Clause::From, 10),
                (rule.has_method(question), Clause::Methods, 9),
                (rule.has_path(question), Clause::Paths, 12),
            ];
            let Some((_, clause, _)) = clauses.iter().find(|(matches, ..)| !matches) else { continue };
            let score = clauses.iter().map(|(matches, _, weight)| if *matches { *weight } else { 0 }).sum();
            if best.as_ref().is_none_or(|(highest, ..)| score > *highest) {
                best = Some((score, rule, *clause));
            }
        }
        best.map(|(_, rule, clause)| (rule, clause))
    }
}

impl Question<'_> {
    fn what(&self) -> String {
        let peer = self.peer.map_or("a caller without identity".to_owned(), shown);
        format!("{} on {} to {peer}", self.method, shown(self.path.text()))
    }
}

/// Text from outside, safe to print: quoted, escaped, and cut.
fn shown(text: &str) -> String {
    match text.char_indices().nth(200) {
        Some((end, _)) => format!("{:?}…", text.get(..end).unwrap_or("")),
        None => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests;
