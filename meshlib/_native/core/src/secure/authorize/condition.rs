//! Which clause does a condition (`when`) stand for?
//!
//! Its key names a fact, in Istio's words; the values are compared as the clauses of their own do it. A key that is not known is a
//! mistake, and so is baggage: whoever is on the way can write it, so that it is never a reason to let anybody in, or to keep them
//! out.
use super::clause::{Test, DEEPEST};
use super::pattern::{PeerPattern, TextPattern};
use super::plan::{PeerPlan, TextPlan};
use crate::secure::address::Cidr;

const KEYS: &str = "request.headers[name], request.auth.principal, request.auth.audiences, request.auth.presenter, \
                    request.auth.claims[name], source.principal, source.namespace, source.ip, remote.ip, destination.port, \
                    connection.sni";

/// The test of these values; the mistakes of all of them.
pub(super) fn compile(key: &str, plans: &[TextPlan]) -> Result<Test, Vec<String>> {
    let texts = || sorted_out(plans.iter().map(TextPattern::compile));
    let addresses =
        || sorted_out(plans.iter().map(|plan| Cidr::parse(&exact(plan, "networks are written as 10.0.0.0/8")?)));
    if let Some(name) = key.strip_prefix("request.headers[").and_then(|rest| rest.strip_suffix(']')) {
        let name = header(name).map_err(|mistake| vec![mistake])?;
        let patterns = sorted_out(plans.iter().map(|plan| field(&name, plan)))?;
        return Ok(Test::Header { name, patterns });
    }
    if let Some(names) = key.strip_prefix("request.auth.claims[").and_then(|rest| rest.strip_suffix(']')) {
        let names: Vec<Box<str>> = names.split("][").map(Box::from).collect();
        if names.len() > DEEPEST || names.iter().any(|name| name.is_empty() || name.contains(['[', ']'])) {
            return Err(vec![format!(
                "the key {key:?} names no claim; write request.auth.claims[name], or [name][inner] for a claim within one"
            )]);
        }
        return Ok(Test::Claim { names, patterns: texts()? });
    }
    Ok(match key {
        "request.auth.principal" => Test::TokenPrincipals(sorted_out(plans.iter().map(token_principal))?),
        "request.auth.audiences" => Test::Audiences(texts()?),
        "request.auth.presenter" => Test::Presenters(texts()?),
        "source.principal" => Test::Peers(sorted_out(plans.iter().map(peer))?),
        "source.namespace" => Test::Namespaces(sorted_out(plans.iter().map(namespace))?),
        "source.ip" => Test::Sources(addresses()?),
        "remote.ip" => Test::Remotes(addresses()?),
        "destination.port" => Test::Ports(sorted_out(plans.iter().map(port))?),
        "connection.sni" => Test::Snis(sorted_out(plans.iter().map(TextPattern::compile_host))?),
        _ if key.starts_with("baggage") => {
            return Err(vec![format!(
                "the key {key:?}: baggage is written by anybody on the way, and is no reason for a decision"
            )])
        }
        _ => return Err(vec![format!("the key {key:?} of a condition is not known; there are {KEYS}")]),
    })
}

pub(super) fn sorted_out<T>(results: impl Iterator<Item = Result<T, String>>) -> Result<Vec<T>, Vec<String>> {
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(one) => good.push(one),
            Err(mistake) => bad.push(mistake),
        }
    }
    if bad.is_empty() {
        Ok(good)
    } else {
        Err(bad)
    }
}

/// `issuer/subject`.
pub(super) fn token_principal(plan: &TextPlan) -> Result<TextPattern, String> {
    match plan {
        TextPlan::Exact { value } if !value.trim_end_matches('/').contains('/') => {
            Err(format!("the principal {value:?} of a token could never match; write its issuer and its subject, as https://issuer/subject"))
        }
        plan => TextPattern::compile(plan),
    }
}

pub(super) fn namespace(plan: &TextPlan) -> Result<TextPattern, String> {
    let pattern = TextPattern::compile(plan)?;
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    if pattern.text().bytes().all(is_word) {
        Ok(pattern)
    } else {
        Err(format!(
            "the namespace {:?} could never match; write the one segment behind /ns/ of the callers' SPIFFE IDs",
            pattern.text()
        ))
    }
}

fn header(name: &str) -> Result<Box<str>, String> {
    let name = name.to_ascii_lowercase();
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^`|~".contains(&byte);
    let is_baggage =
        ["baggage", "ot-baggage-", "uberctx-", "jaeger-baggage"].iter().any(|start| name.starts_with(start));
    match name.as_str() {
        _ if is_baggage => Err("baggage is written by anybody on the way, and is no reason for a decision".to_owned()),
        "x-forwarded-client-cert" => {
            Err("an identity comes from the connection and from no header; write it in \"from\"".to_owned())
        }
        "x-forwarded-for" | "x-real-ip" => {
            Err(format!("the header {name:?} is read by \"remote_ip_blocks\", which knows whom to believe"))
        }
        "host" | ":authority" => {
            Err(format!("the header {name:?} is compared by \"hosts\", which knows ports and upper case"))
        }
        ":method" => Err("the method is compared by \"methods\"".to_owned()),
        ":path" => Err("the path is compared by \"paths\", in its canonical form".to_owned()),
        _ if name.contains('_') => Err(format!(
            "the header {name:?} could never match: names with an underscore don't get in; write it with dashes"
        )),
        _ if name.is_empty() || !name.bytes().all(is_token) => Err(format!("{name:?} is no name of a header")),
        _ => Ok(name.into()),
    }
}

/// Values are compared without the spaces around them.
fn field(name: &str, plan: &TextPlan) -> Result<TextPattern, String> {
    let pattern = TextPattern::compile(plan)?;
    let text = pattern.text();
    let (is_begun, is_ended) = match pattern {
        TextPattern::Any => (false, false),
        TextPattern::Exact(_) => (true, true),
        TextPattern::Prefix(_) => (true, false),
        TextPattern::Suffix(_) => (false, true),
    };
    if (is_begun && text.starts_with(' ')) || (is_ended && text.ends_with(' ')) {
        return Err(format!(
            "the value {text:?} of the header {name:?} could never match: spaces around a value are no part of it; leave them out"
        ));
    }
    Ok(pattern)
}

fn peer(plan: &TextPlan) -> Result<PeerPattern, String> {
    match plan {
        TextPlan::Any => PeerPattern::compile(&PeerPlan::Prefix { value: "spiffe://".to_owned() }),
        TextPlan::Exact { value } => PeerPattern::compile(&PeerPlan::Exact { value: value.clone() }),
        TextPlan::Prefix { value } => PeerPattern::compile(&PeerPlan::Prefix { value: value.clone() }),
        TextPlan::Suffix { value } => Err(format!(
            "the callers *{value:?} would be of any trust domain; name it, as spiffe://shop.internal/ns/default/sa/orders"
        )),
    }
}

fn port(plan: &TextPlan) -> Result<u16, String> {
    let text = exact(plan, "ports are numbers")?;
    let port =
        Some(&text).filter(|text| text.bytes().all(|byte| byte.is_ascii_digit())).and_then(|text| text.parse().ok());
    port.filter(|port| *port != 0).ok_or_else(|| format!("{text:?} is no port; write a number from 1 to 65535"))
}

fn exact(plan: &TextPlan, reason: &str) -> Result<String, String> {
    match plan {
        TextPlan::Exact { value } => Ok(value.clone()),
        _ => Err(format!("a \"*\" can't stand here: {reason}")),
    }
}
