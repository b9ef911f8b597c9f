//! Why was it refused, and what would allow it?
//!
//! For the one who runs the service: the rule, the clause, and the line for `mesh.yaml`. Slow, since only people read it. What comes
//! from outside is quoted, escaped and cut; values of headers and claims are not shown, because they may be secrets.
use super::asked::Asked;
use super::clause::{namespace, Clause, Test, View};
use super::pattern::host_of;
use super::rule::Rule;
use super::{Action, Question, Rules};

impl Rules {
    /// The name of the rule that came nearest to allowing it; "" if there is none to allow anything.
    pub fn nearest_name(&self, question: &Question<'_>) -> &str {
        self.nearest(&Asked::new(question)).map_or("", |rule| &rule.name)
    }

    /// The reason for a denial, and what would turn it into a permission.
    pub fn explain(&self, denied_by: Option<usize>, question: &Question<'_>) -> String {
        let question = &Asked::new(question);
        if let Some(rule) = denied_by.and_then(|number| self.rules.get(number)) {
            return rule.explained(question);
        }
        let Some(rule) = self.nearest(question) else {
            return format!(
                "no rule allows anything here, and what no rule allows is denied. This would allow it: {}.",
                question.line()
            );
        };
        let mut failed = rule.written();
        failed.retain(|clause| !clause.holds(question, View::Surely));
        let fault = failed.first().map_or(String::new(), |clause| clause.reason(question, false));
        let remedy = match failed.as_slice() {
            [clause] => clause.remedy(&rule.name, question),
            _ => String::new(),
        };
        // A line that leaves out what the rule asks beside caller, method and path would allow more than it ever meant.
        let would =
            if rule.asks_more() { String::new() } else { format!(" This would allow it: {}.", question.line()) };
        let text = format!(
            "no rule allows it. The nearest: rule {:?} allows {}; {fault}. {remedy}",
            rule.name,
            rule.scope("to"),
        );
        format!("{}{would}", text.trim_end())
    }

    /// The rule of those that allow with the least that failed. A rule for this path is nearer than one for this caller, and that
    /// nearer than one for this method.
    fn nearest(&self, question: &Asked<'_>) -> Option<&Rule> {
        let rules = self.counted.allow.numbers().iter().filter_map(|number| self.rules.get(*number));
        let missing = |rule: &&Rule| {
            let failed = rule.clauses.iter().filter(|clause| !clause.holds(question, View::Surely));
            failed.map(|clause| clause.test.weight()).sum::<u32>()
        };
        rules
            .map(|rule| (missing(&rule), rule))
            .filter(|(missing, _)| *missing > 0)
            .min_by_key(|(missing, _)| *missing)
            .map(|(_, rule)| rule)
    }
}

impl Rule {
    /// Of a rule that denies, or that only asks.
    fn explained(&self, question: &Asked<'_>) -> String {
        let clauses = self.written();
        let reasons: Vec<String> = clauses.iter().map(|clause| clause.reason(question, true)).collect();
        let keys: Vec<String> = clauses.iter().map(|clause| format!("{:?}", clause.key)).collect();
        let verb = if self.action == Action::Custom { "asks its authorizer about" } else { "denies" };
        let because = match reasons.as_slice() {
            [] => "it has no clause, and fires for everything".to_owned(),
            reasons => reasons.join("; "),
        };
        let remedy = match keys.as_slice() {
            _ if self.asks_token && question.claims.is_none() && self.action == Action::Deny => {
                format!("Only a token that fits could allow {}", question.what())
            }
            [] => "Only without that rule, or with a clause in it, could anything be allowed".to_owned(),
            keys => format!("Only a narrower {} of that rule would allow {}", keys.join(" or "), question.what()),
        };
        format!("rule {:?} {verb} {}: {because}. {remedy}.", self.name, self.scope("from"))
    }

    /// Does it ask for anything beside caller, method and path?
    fn asks_more(&self) -> bool {
        let is_plain = |clause: &&Clause| {
            let is_usual = matches!(clause.test, Test::Methods(_) | Test::Paths { .. } | Test::Peers(_));
            is_usual && !clause.is_negative && !clause.is_condition
        };
        !self.written().iter().all(is_plain)
    }

    /// `GET, POST on /orders/* to spiffe://…`: a few of each, so that it stays a sentence.
    fn scope(&self, preposition: &str) -> String {
        let (mut methods, mut paths, mut from) =
            ("every method".to_owned(), "every path".to_owned(), "anyone".to_owned());
        let mut others = Vec::new();
        for clause in self.written() {
            match &clause.test {
                _ if clause.is_negative || clause.is_condition => others.push(format!("{:?}", clause.key)),
                Test::Methods(listed) => methods = few(listed.iter().map(|method| method.to_string())),
                Test::Paths { patterns, .. } => paths = few(patterns.iter().map(|pattern| pattern.words())),
                Test::Peers(patterns) => from = few(patterns.iter().map(|pattern| pattern.words())),
                _ => others.push(format!("{:?}", clause.key)),
            }
        }
        let others = if others.is_empty() { String::new() } else { format!(", with {}", few(others.into_iter())) };
        format!("{methods} on {paths} {preposition} {from}{others}")
    }
}

fn few(words: impl Iterator<Item = String>) -> String {
    let words: Vec<String> = words.collect();
    match words.len() {
        0..=4 => words.join(", "),
        more => format!("{} and {} more", words.get(..3).unwrap_or_default().join(", "), more - 3),
    }
}

/// What a clause looks at: it is known and can be named, or there is a sentence about why not.
enum Subject {
    Known(String),
    Missing(String),
}

impl Clause {
    /// Why it holds, or why it doesn't.
    fn reason(&self, question: &Asked<'_>, holds: bool) -> String {
        let list = if self.is_condition {
            format!("{} of {:?}", if self.is_negative { "the not_values" } else { "the values" }, self.key)
        } else {
            format!("{:?}", self.key)
        };
        match self.test.subject(question) {
            Subject::Known(text) => {
                let is_in = if holds == self.is_negative { "is not in" } else { "is in" };
                format!("{text} {is_in} {list}")
            }
            Subject::Missing(text) => format!("{text} ({list})"),
        }
    }

    fn remedy(&self, rule: &str, question: &Asked<'_>) -> String {
        let place = if self.is_condition {
            format!("the {} of {:?} in rule {rule:?}", if self.is_negative { "not_values" } else { "values" }, self.key)
        } else {
            format!("{:?} of rule {rule:?}", self.key)
        };
        match (self.test.subject(question), self.is_negative) {
            (Subject::Known(_), true) => format!("Take it out of {place} to allow it. "),
            (Subject::Known(_), false) => match self.test.addition(question) {
                Some(line) => format!("Add it to {place} to allow it: {line}. "),
                None => format!("Add it to {place} to allow it. "),
            },
            (Subject::Missing(_), is_negative) => match &self.test {
                Test::Peers(_) | Test::Namespaces(_) => {
                    let end = if is_negative { "outside" } else { "in" };
                    format!("Let the caller come over mutual TLS with an identity {end} {place}. ")
                }
                _ if self.asks_token() => format!("Let the caller show a token that fits {place}. "),
                Test::Header { .. } => format!("Let the caller send one header that fits {place}. "),
                _ => String::new(),
            },
        }
    }
}

impl Test {
    /// What it costs a rule not to match here.
    fn weight(&self) -> u32 {
        match self {
            Self::Paths { .. } => 12,
            Self::Peers(_) | Self::Namespaces(_) => 10,
            Self::Methods(_) => 9,
            Self::TokenPrincipals(_) | Self::Audiences(_) | Self::Presenters(_) | Self::Claim { .. } => 6,
            Self::Hosts(_) | Self::Header { .. } => 5,
            Self::Sources(_) | Self::Remotes(_) => 4,
            Self::Ports(_) | Self::Snis(_) => 3,
        }
    }

    fn subject(&self, question: &Asked<'_>) -> Subject {
        let known = |text: Option<String>, missing: &str| match text {
            Some(text) => Subject::Known(text),
            None => Subject::Missing(missing.to_owned()),
        };
        let no_token = "no token was shown";
        match self {
            Self::Peers(_) => {
                known(question.peer.map(|peer| format!("the caller {}", shown(peer))), "the caller proved no identity")
            }
            Self::Namespaces(_) => known(
                question
                    .peer
                    .and_then(namespace)
                    .map(|namespace| format!("the caller's namespace {}", shown(namespace))),
                "the caller proved no identity with a namespace",
            ),
            _ if question.claims.is_none() && self.is_of_token() => Subject::Missing(no_token.to_owned()),
            Self::TokenPrincipals(_) => known(
                question.claims.map(|claims| format!("the token's principal {}", shown(claims.principal()))),
                no_token,
            ),
            Self::Audiences(_) | Self::Presenters(_) | Self::Claim { .. } => {
                let name = match self {
                    Self::Audiences(_) => "the audience",
                    Self::Presenters(_) => "the presenter",
                    _ => "the claim",
                };
                known(self.is_present(question).then(|| format!("{name} of the token")), "the token has no such claim")
            }
            Self::Sources(_) => known(
                question.source.map(|address| format!("the address {address} of the connection")),
                "the address of the connection is not known",
            ),
            Self::Remotes(_) => known(
                question.remote.map(|address| format!("the client's address {address}")),
                "the client's address is not known",
            ),
            Self::Methods(_) => Subject::Known(format!("the method {}", question.method)),
            Self::Paths { .. } => Subject::Known(format!("the path {}", shown(question.path.text()))),
            Self::Hosts(_) => match question.host {
                None => Subject::Missing("the host is not known".to_owned()),
                Some(host) => known(
                    host_of(host).map(|host| format!("the host {}", shown(host))),
                    &format!("the host {} can be read in two ways", shown(host)),
                ),
            },
            Self::Ports(_) => {
                known((question.port != 0).then(|| format!("the port {}", question.port)), "our port is not known")
            }
            Self::Header { name, .. } => match question.header(name).map(|header| header.lone) {
                None => Subject::Missing(format!("there is no header {name:?}")),
                Some(Some(b"")) => Subject::Missing(format!("the header {name:?} is empty")),
                Some(Some(_)) => Subject::Known(format!("the header {name:?}")),
                Some(None) => Subject::Missing(format!("the header {name:?} stands {} times", question.count(name))),
            },
            Self::Snis(_) => known(
                (!question.sni.is_empty()).then(|| format!("the server's name {}", shown(question.sni))),
                "the server's name (SNI) is not known",
            ),
        }
    }

    fn is_of_token(&self) -> bool {
        matches!(self, Self::TokenPrincipals(_) | Self::Audiences(_) | Self::Presenters(_) | Self::Claim { .. })
    }

    /// The entry that it lacks, as a user would write it.
    fn addition(&self, question: &Asked<'_>) -> Option<String> {
        Some(match self {
            Self::Peers(_) => format!("from: [{}]", written(question.peer?)),
            Self::Namespaces(_) => format!("namespaces: [{}]", question.peer.and_then(namespace)?),
            Self::TokenPrincipals(_) => {
                format!("request_principals: [{}]", written(question.claims.map(|claims| claims.principal())?))
            }
            Self::Sources(_) => format!("ip_blocks: [\"{}\"]", question.source?),
            Self::Remotes(_) => format!("remote_ip_blocks: [\"{}\"]", question.remote?),
            Self::Methods(_) => format!("methods: [{}]", question.method),
            Self::Paths { .. } => question.path_line(),
            Self::Hosts(_) => format!("hosts: [{}]", written(&question.host.and_then(host_of)?.to_ascii_lowercase())),
            Self::Ports(_) => format!("ports: [{}]", question.port),
            _ => return None,
        })
    }
}

impl Question<'_> {
    fn what(&self) -> String {
        let peer = self.peer.map_or("a caller without identity".to_owned(), shown);
        format!("{} on {} to {peer}", self.method, shown(self.path.text()))
    }

    /// A rule that allows this, and no more than it can.
    fn line(&self) -> String {
        let from = self.peer.map_or("\"*\"".to_owned(), written);
        format!("allow: [{{name: …, from: [{from}], methods: [{}], {}}}]", self.method, self.path_line())
    }

    /// A path with a star or a brace in it is no path in the configuration, and one that has two readings needs both.
    fn path_line(&self) -> String {
        let text = self.path.text();
        let readings: Vec<&str> = self.path.readings().collect();
        if readings.len() == 1 && !text.contains(['*', '{', '}']) {
            return format!("paths: [{}]", written(text));
        }
        let readings: Vec<String> = readings.into_iter().map(regex::escape).collect();
        format!("path_regexes: [{}]", written(&readings.join("|")))
    }
}

/// Text from outside, safe to print: quoted, escaped, and cut.
fn shown(text: &str) -> String {
    match text.char_indices().nth(200) {
        Some((end, _)) => format!("{:?}…", text.get(..end).unwrap_or("")),
        None => format!("{text:?}"),
    }
}

/// The same as YAML reads it.
fn written(text: &str) -> String {
    let mut made = String::from("\"");
    for (place, c) in text.chars().enumerate() {
        match c {
            _ if place == 200 => {
                made.push('…');
                break;
            }
            '"' | '\\' => made.extend(['\\', c]),
            ' '..='~' => made.push(c),
            _ if c.is_alphanumeric() => made.push(c),
            _ => made.push_str(&format!("\\U{:08x}", u32::from(c))),
        }
    }
    made.push('"');
    made
}
