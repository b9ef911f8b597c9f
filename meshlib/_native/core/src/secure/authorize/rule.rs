//! Does this one rule match this one question?
//!
//! A rule is its clauses, and all of them have to hold. It is compiled once: what could never match is refused here, with a sentence
//! about what to write instead, because a denial that never fires is an open door.
use super::asked::Asked;
use super::clause::{Clause, Test, View};
use super::condition::{self, sorted_out};
use super::pattern::{PathPattern, PeerPattern, TextPattern};
use super::plan::{Action, RulePlan, TextPlan};
use crate::secure::address::Cidr;

#[derive(Debug)]
pub(super) struct Rule {
    pub name: Box<str>,
    pub action: Action,
    pub authorizer: Box<str>,
    /// Those that are cheap stand first.
    pub clauses: Vec<Clause>,
    pub asks_token: bool,
}

impl Rule {
    pub fn compile(plan: &RulePlan) -> Result<Self, Vec<String>> {
        let mut made = Maker { action: plan.action, clauses: Vec::new(), mistakes: Vec::new() };
        made.authorizer(&plan.authorizer);
        made.pair("from", &plan.from, &plan.not_from, |plans| {
            Ok(Test::Peers(sorted_out(plans.iter().map(PeerPattern::compile))?))
        });
        made.pair("namespaces", &plan.namespaces, &plan.not_namespaces, |plans| {
            Ok(Test::Namespaces(sorted_out(plans.iter().map(condition::namespace))?))
        });
        made.pair("request_principals", &plan.request_principals, &plan.not_request_principals, |plans| {
            Ok(Test::TokenPrincipals(sorted_out(plans.iter().map(condition::token_principal))?))
        });
        let networks = |plans: &[String]| sorted_out(plans.iter().map(|plan| Cidr::parse(plan)));
        made.pair("ip_blocks", &plan.ip_blocks, &plan.not_ip_blocks, |plans| Ok(Test::Sources(networks(plans)?)));
        made.pair("remote_ip_blocks", &plan.remote_ip_blocks, &plan.not_remote_ip_blocks, |plans| {
            Ok(Test::Remotes(networks(plans)?))
        });
        made.pair("methods", &plan.methods, &plan.not_methods, |plans| {
            Ok(Test::Methods(sorted_out(plans.iter().map(|plan| method(plan)))?))
        });
        let is_folded = plan.is_case_insensitive;
        made.pair("paths", &plan.paths, &plan.not_paths, |plans| {
            let patterns = sorted_out(plans.iter().map(|plan| PathPattern::compile(plan, is_folded)))?;
            Ok(Test::Paths { patterns, is_folded })
        });
        made.pair("hosts", &plan.hosts, &plan.not_hosts, |plans| {
            Ok(Test::Hosts(sorted_out(plans.iter().map(TextPattern::compile_host))?))
        });
        made.pair("ports", &plan.ports, &plan.not_ports, |plans| {
            Ok(Test::Ports(sorted_out(plans.iter().map(|port| match port {
                0 => Err("0 is no port; write a number from 1 to 65535".to_owned()),
                port => Ok(*port),
            }))?))
        });
        for condition in &plan.when {
            made.condition(&condition.key, &condition.values, &condition.not_values);
        }
        let Maker { mut clauses, mistakes, .. } = made;
        if !mistakes.is_empty() {
            return Err(mistakes);
        }
        clauses.sort_by_key(|clause| clause.test.cost());
        let asks_token = clauses.iter().any(Clause::asks_token);
        let (name, authorizer) = (plan.name.as_str().into(), plan.authorizer.as_str().into());
        Ok(Self { name, action: plan.action, authorizer, clauses, asks_token })
    }

    pub fn view(&self) -> View {
        if self.action == Action::Allow {
            View::Surely
        } else {
            View::Possibly
        }
    }

    pub fn matches(&self, question: &Asked<'_>) -> bool {
        let view = self.view();
        self.clauses.iter().all(|clause| clause.holds(question, view))
    }

    /// The clauses as they were written.
    pub fn written(&self) -> Vec<&Clause> {
        let mut clauses: Vec<&Clause> = self.clauses.iter().collect();
        clauses.sort_by_key(|clause| clause.place);
        clauses
    }

    /// As far as the caller couldn't change it by showing another token.
    pub fn matches_with_any_token(&self, question: &Asked<'_>) -> bool {
        let view = self.view();
        match self.action {
            Action::Allow => {
                self.clauses.iter().filter(|clause| !clause.asks_token()).all(|clause| clause.holds(question, view))
            }
            Action::Deny | Action::Custom => !self.asks_token && self.matches(question),
        }
    }
}

impl Test {
    /// Cheap ones, and those that tell rules apart, are asked first.
    fn cost(&self) -> u8 {
        match self {
            Self::Methods(_) | Self::Ports(_) => 0,
            Self::Peers(_) => 1,
            Self::Sources(_) | Self::Remotes(_) => 2,
            Self::Namespaces(_) => 3,
            Self::Paths { patterns, .. } => {
                if patterns.iter().any(|pattern| matches!(pattern, PathPattern::Regex { .. })) {
                    8
                } else {
                    4
                }
            }
            Self::Hosts(_) | Self::Snis(_) => 5,
            Self::Header { .. } | Self::TokenPrincipals(_) | Self::Audiences(_) | Self::Presenters(_) => 6,
            Self::Claim { .. } => 7,
        }
    }

    /// Is each entry of this list in the other too?
    fn is_covered_by(&self, other: &Self) -> bool {
        fn all<T>(ours: &[T], others: &[T], covers: impl Fn(&T, &T) -> bool) -> bool {
            ours.iter().all(|one| others.iter().any(|other| covers(other, one)))
        }
        match (self, other) {
            (Self::Peers(ours), Self::Peers(others)) => all(ours, others, PeerPattern::covers),
            (Self::Sources(ours), Self::Sources(others)) | (Self::Remotes(ours), Self::Remotes(others)) => {
                all(ours, others, Cidr::covers)
            }
            (Self::Methods(ours), Self::Methods(others)) => all(ours, others, |a, b| a == b),
            (Self::Ports(ours), Self::Ports(others)) => all(ours, others, |a, b| a == b),
            (Self::Paths { patterns: ours, .. }, Self::Paths { patterns: others, .. }) => {
                all(ours, others, PathPattern::covers)
            }
            (Self::Namespaces(ours), Self::Namespaces(others))
            | (Self::TokenPrincipals(ours), Self::TokenPrincipals(others))
            | (Self::Presenters(ours), Self::Presenters(others))
            | (Self::Hosts(ours), Self::Hosts(others))
            | (Self::Snis(ours), Self::Snis(others)) => all(ours, others, TextPattern::covers),
            // Of several values one may be the one and another the other.
            _ => false,
        }
    }

    /// It holds for everything that is there at all.
    fn is_everything(&self) -> bool {
        let any = |patterns: &[TextPattern]| patterns.contains(&TextPattern::Any);
        match self {
            Self::Peers(patterns) => patterns.iter().any(PeerPattern::is_everybody),
            Self::Namespaces(patterns)
            | Self::TokenPrincipals(patterns)
            | Self::Audiences(patterns)
            | Self::Presenters(patterns)
            | Self::Claim { patterns, .. }
            | Self::Hosts(patterns)
            | Self::Header { patterns, .. }
            | Self::Snis(patterns) => any(patterns),
            Self::Paths { patterns, .. } => {
                patterns.iter().any(|pattern| matches!(pattern, PathPattern::Prefix(value) if value.is_empty()))
            }
            Self::Sources(_) | Self::Remotes(_) | Self::Methods(_) | Self::Ports(_) => false,
        }
    }

    /// Can it be that a denial meets none of it, so that "not this" is a clause?
    fn can_be_absent(&self) -> bool {
        match self {
            Self::Peers(patterns) => !patterns.contains(&PeerPattern::Any),
            Self::Paths { .. } => false,
            _ => true,
        }
    }
}

struct Maker {
    action: Action,
    clauses: Vec<Clause>,
    mistakes: Vec<String>,
}

impl Maker {
    fn authorizer(&mut self, authorizer: &str) {
        match (self.action == Action::Custom, authorizer.is_empty()) {
            (true, true) => self.mistakes.push("a custom rule has to say whom it asks; write authorizer: <name>".to_owned()),
            (false, false) => self.mistakes.push(format!(
                "only a custom rule asks an authorizer; put the rule under \"custom\", or leave out authorizer: {authorizer}"
            )),
            _ => {}
        }
    }

    /// A clause and its negation, each if it is there.
    fn pair<T>(
        &mut self,
        key: &str,
        plans: &[T],
        not_plans: &[T],
        compile: impl Fn(&[T]) -> Result<Test, Vec<String>>,
    ) {
        let tests = [(false, plans), (true, not_plans)].map(|(is_negative, plans)| {
            if plans.is_empty() {
                return None;
            }
            let key = if is_negative { format!("not_{key}") } else { key.to_owned() };
            self.kept(&key, compile(plans)).map(|test| (key, is_negative, test))
        });
        if let [Some((key, _, test)), Some((not_key, _, not_test))] = &tests {
            if test.is_covered_by(not_test) {
                self.mistakes.push(format!(
                    "all of {key:?} is in {not_key:?} too, so that the rule could never match; leave out one of them"
                ));
            }
        }
        for (key, is_negative, test) in tests.into_iter().flatten() {
            self.add(&key, is_negative, false, test);
        }
    }

    fn condition(&mut self, key: &str, values: &[TextPlan], not_values: &[TextPlan]) {
        if values.is_empty() && not_values.is_empty() {
            self.mistakes.push(format!("the condition {key:?} has neither values nor not_values; write one of them"));
        }
        let tests = [(false, values), (true, not_values)].map(|(is_negative, plans)| {
            let is_there = !plans.is_empty();
            is_there
                .then(|| condition::compile(key, plans))
                .and_then(|result| self.kept(&format!("when {key}"), result).map(|test| (is_negative, test)))
        });
        if let [Some((_, test)), Some((_, not_test))] = &tests {
            if test.is_covered_by(not_test) {
                self.mistakes.push(format!(
                    "all values of the condition {key:?} are in its not_values too, so that the rule could never match"
                ));
            }
        }
        for (is_negative, test) in tests.into_iter().flatten() {
            self.add(key, is_negative, true, test);
        }
    }

    fn kept(&mut self, key: &str, result: Result<Test, Vec<String>>) -> Option<Test> {
        result.map_err(|found| self.mistakes.extend(found.into_iter().map(|text| format!("{key}: {text}")))).ok()
    }

    fn add(&mut self, key: &str, is_negative: bool, is_condition: bool, test: Test) {
        // Who may be anyone is no clause.
        if !is_negative && matches!(&test, Test::Peers(patterns) if patterns.contains(&PeerPattern::Any)) {
            return;
        }
        if is_negative && test.is_everything() && (self.action == Action::Allow || !test.can_be_absent()) {
            let part = if is_condition { format!("the not_values of {key:?}") } else { format!("{key:?}") };
            self.mistakes.push(format!(
                "{part} leaves nobody, so that the rule could never match; name who or what is left out"
            ));
            return;
        }
        let place = self.clauses.len();
        self.clauses.push(Clause { key: key.into(), place, is_negative, is_condition, test });
    }
}

fn method(text: &str) -> Result<Box<str>, String> {
    if is_method(text) {
        return Ok(text.into());
    }
    Err(format!("the method {text:?} is not one; methods are written in upper case, as GET; for every method leave the clause out"))
}

/// Upper-case letters, digits, `-` and `_`, beginning with a letter: every method in use. Lower-case ones are different methods
/// that some servers turn into the upper-case ones.
pub fn is_method(text: &str) -> bool {
    let is_tail = |byte: u8| matches!(byte, b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_');
    text.len() <= 32 && matches!(text.as_bytes().first(), Some(b'A'..=b'Z')) && text.bytes().all(is_tail)
}

/// `/package.Service/Method`, letter for letter; never normalised.
pub fn is_grpc_method(text: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let Some((service, method)) = text.strip_prefix('/').and_then(|rest| rest.split_once('/')) else { return false };
    !service.is_empty()
        && !method.is_empty()
        && service.bytes().all(|byte| is_word(byte) || byte == b'.')
        && method.bytes().all(is_word)
}
