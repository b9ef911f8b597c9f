#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
use super::*;
use crate::secure::path::canonical;

const SHOP: &str = "spiffe://shop/ns/default/sa/storefront";

fn rules(json: &str) -> Rules {
    Rules::compile(&serde_json::from_str::<Vec<RulePlan>>(json).unwrap()).unwrap()
}

fn mistakes(json: &str) -> Vec<String> {
    Rules::compile(&serde_json::from_str::<Vec<RulePlan>>(json).unwrap()).unwrap_err()
}

fn rule(action: &str, from: &str, methods: &str, paths: &str) -> String {
    format!(
        r#"{{"name":"r","action":"{action}","dry_run":false,"from":[{from}],"methods":[{methods}],"paths":[{paths}]}}"#
    )
}

fn judge(rules: &Rules, peer: Option<&str>, method: &str, target: &str) -> Verdict {
    let path = canonical(target.as_bytes(), method, None, false).unwrap();
    rules.judge(&Question { peer, method, path: &path })
}

fn explain(rules: &Rules, peer: Option<&str>, method: &str, target: &str) -> String {
    let path = canonical(target.as_bytes(), method, None, false).unwrap();
    let question = Question { peer, method, path: &path };
    rules.explain(rules.judge(&question).rule, &question)
}

const ANY: &str = r#"{"kind":"any"}"#;
const STOREFRONT: &str = r#"{"kind":"exact","value":"spiffe://shop/ns/default/sa/storefront"}"#;
const ORDERS: &str = r#"{"kind":"prefix","value":"/orders/"}"#;

#[test]
fn what_no_rule_allows_is_denied() {
    assert_eq!(
        judge(&rules("[]"), Some(SHOP), "GET", "/x"),
        Verdict { is_allowed: false, rule: None, shadow: (false, None) }
    );
}

#[test]
fn a_denial_wins_over_a_permission() {
    let rules = rules(&format!(
        "[{},{}]",
        rule("allow", ANY, "", ""),
        rule("deny", "", "", r#"{"kind":"exact","value":"/admin"}"#)
    ));
    assert_eq!(judge(&rules, None, "GET", "/admin/").rule, Some(1));
    assert!(judge(&rules, None, "GET", "/public").is_allowed);
}

#[test]
fn each_clause_has_to_match() {
    let rules = rules(&format!("[{}]", rule("allow", STOREFRONT, "\"GET\"", ORDERS)));
    assert!(judge(&rules, Some(SHOP), "GET", "/orders/7").is_allowed);
    assert!(!judge(&rules, Some("spiffe://shop/ns/default/sa/storefront2"), "GET", "/orders/7").is_allowed);
    assert!(!judge(&rules, None, "GET", "/orders/7").is_allowed);
    assert!(!judge(&rules, Some(SHOP), "POST", "/orders/7").is_allowed);
    assert!(!judge(&rules, Some(SHOP), "HEAD", "/orders/7").is_allowed);
    assert!(!judge(&rules, Some(SHOP), "GET", "/orders").is_allowed);
}

#[test]
fn a_denial_of_get_covers_head() {
    let rules = rules(&format!("[{},{}]", rule("deny", "", "\"GET\"", ""), rule("allow", "", "", "")));
    assert!(!judge(&rules, None, "HEAD", "/x").is_allowed);
    assert!(judge(&rules, None, "POST", "/x").is_allowed);
}

#[test]
fn templates_match_segment_for_segment() {
    let rules = rules(&format!("[{}]", rule("allow", "", "", r#"{"kind":"template","value":"/items/{id}/parts"}"#)));
    assert!(judge(&rules, None, "GET", "/items/7/parts").is_allowed);
    for target in ["/items/7", "/items//parts", "/items/7/parts/", "/items/7/8/parts"] {
        assert!(!judge(&rules, None, "GET", target).is_allowed, "{target}");
    }
}

#[test]
fn a_name_in_a_template_is_never_empty() {
    let rules = rules(&format!("[{}]", rule("allow", "", "", r#"{"kind":"template","value":"/items/{id}"}"#)));
    assert!(judge(&rules, None, "GET", "/items/7").is_allowed && !judge(&rules, None, "GET", "/items/").is_allowed);
}

#[test]
fn a_prefix_of_identities_covers_whole_trust_domains_only() {
    let rules = rules(&format!("[{}]", rule("allow", r#"{"kind":"prefix","value":"spiffe://td/ns/a/"}"#, "", "")));
    assert!(judge(&rules, Some("spiffe://td/ns/a/sa/x"), "GET", "/").is_allowed);
    for peer in ["spiffe://td/ns/ab/sa/x", "spiffe://td/ns/a", "spiffe://td.evil/ns/a/sa/x"] {
        assert!(!judge(&rules, Some(peer), "GET", "/").is_allowed, "{peer}");
    }
    for prefix in ["spiffe://td", "spiffe:///", "*/ns/a", "https://td/", ""] {
        let plan = rule("allow", &format!(r#"{{"kind":"prefix","value":"{prefix}"}}"#), "", "");
        assert_eq!(mistakes(&format!("[{plan}]")).len(), 1, "{prefix}");
    }
}

#[test]
fn any_proven_identity_is_a_prefix_too() {
    let rules = rules(&format!("[{}]", rule("allow", r#"{"kind":"prefix","value":"spiffe://"}"#, "", "")));
    assert!(judge(&rules, Some("spiffe://td/x"), "GET", "/").is_allowed);
    assert!(!judge(&rules, None, "GET", "/").is_allowed);
}

#[test]
fn dry_run_rules_decide_nothing_and_are_reported() {
    let dry = rule("deny", "", "", r#"{"kind":"prefix","value":"/old"}"#).replace("false", "true");
    let rules = rules(&format!("[{},{dry}]", rule("allow", "", "", "")));
    let verdict = judge(&rules, None, "GET", "/old/x");
    assert_eq!(verdict, Verdict { is_allowed: true, rule: Some(0), shadow: (false, Some(1)) });
    assert_eq!(judge(&rules, None, "GET", "/new").shadow, (true, Some(0)));
}

#[test]
fn every_mistake_is_named_at_once() {
    let bad = rule(
        "deny",
        r#"{"kind":"exact","value":"admin"}"#,
        "\"get\"",
        r#"{"kind":"exact","value":"//admin"},{"kind":"exact","value":"/a%2fb"},{"kind":"template","value":"/a{b"}"#,
    );
    assert_eq!(mistakes(&format!("[{bad}]")).len(), 5);
}

#[test]
fn a_plan_with_an_unknown_clause_is_refused() {
    let plan = rule("allow", "", "", "").replace("\"paths\"", "\"when\":[],\"paths\"");
    assert!(serde_json::from_str::<RulePlan>(&plan).is_err());
}

#[test]
fn a_refusal_names_the_nearest_rule_and_what_would_allow_it() {
    let far = rule("allow", "", "\"GET\"", r#"{"kind":"exact","value":"/health"}"#).replace("\"r\"", "\"health\"");
    let near = rule("allow", STOREFRONT, "\"GET\",\"POST\"", ORDERS).replace("\"r\"", "\"shop\"");
    let rules = rules(&format!("[{far},{near}]"));
    assert_eq!(
        explain(&rules, Some("spiffe://shop/ns/default/sa/browser"), "GET", "/orders/7"),
        "no rule allows it. The nearest: rule \"shop\" allows GET, POST on /orders/* to spiffe://shop/ns/default/sa/storefront; \
         the caller \"spiffe://shop/ns/default/sa/browser\" is not in \"from\". Add it to \"from\" of rule \"shop\" to allow it."
    );
    assert!(explain(&rules, Some(SHOP), "PUT", "/orders/7").contains("the method PUT is not in \"methods\""));
    assert!(explain(&rules, Some(SHOP), "POST", "/other").contains("the path \"/other\" is not in \"paths\""));
    assert!(explain(&rules, None, "POST", "/orders/7").contains("the caller proved no identity"));
}

#[test]
fn text_from_outside_is_escaped_and_cut() {
    let long = format!("/%1b{}", "x".repeat(300)).replace("%1b", "%E2%80%AE");
    let text = explain(&rules("[]"), None, "GET", &long);
    assert!(!text.contains('\u{202e}') && text.len() < 500, "{text}");
}

#[test]
fn methods_are_upper_case_words() {
    for good in ["GET", "PROPFIND", "M-SEARCH"] {
        assert!(is_method(good), "{good}");
    }
    for bad in ["", "get", "Get", "G@T", "GET ", "1GET", "GET\n", &"X".repeat(33)] {
        assert!(!is_method(bad), "{bad}");
    }
}

#[test]
fn grpc_methods_are_exact() {
    assert!(is_grpc_method("/admin.Svc/Delete"));
    for bad in [
        "",
        "/",
        "//admin.Svc/Delete",
        "/admin.Svc/Delete/",
        "/admin.Svc/Delete#x",
        "/x/../admin.Svc/Delete",
        "/admin.Svc",
        "/a.S/D%00",
        "a.S/D",
        "/a.S/D.x",
    ] {
        assert!(!is_grpc_method(bad), "{bad}");
    }
}

/// A thousand rules of every kind, drawn from few names, so that they overlap.
fn many(random: &crate::random::Random) -> Vec<String> {
    let draw = |words: &[&str]| words[random.below(words.len())].to_owned();
    let list = |words: &[&str]| {
        let mut chosen: Vec<_> = (0..random.below(3)).map(|_| draw(words)).collect();
        chosen.dedup();
        chosen.join(",")
    };
    let peers = [
        r#"{"kind":"exact","value":"spiffe://td/a"}"#,
        r#"{"kind":"exact","value":"spiffe://td/b"}"#,
        r#"{"kind":"prefix","value":"spiffe://td/"}"#,
        ANY,
    ];
    let paths: Vec<String> = ["/a", "/a/b", "/b/", "/", "*", "/a/b/c/d/e/f"]
        .iter()
        .map(|v| format!(r#"{{"kind":"exact","value":"{v}"}}"#))
        .chain(
            ["/a/", "/a", "/b/c", "", "/a/b/c/d/e/", "/a/b/c/d/e/f/"]
                .iter()
                .map(|v| format!(r#"{{"kind":"prefix","value":"{v}"}}"#)),
        )
        .chain(
            ["/a/{x}", "/{x}", "/{x}/b", "/b/{x}/{y}", "/a/b/c/d/e/{x}", "/", "/a/b/"]
                .iter()
                .map(|v| format!(r#"{{"kind":"template","value":"{v}"}}"#)),
        )
        .collect();
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    (0..40)
        .map(|n| {
            let action = draw(&["allow", "allow", "deny"]);
            let plan = rule(&action, &list(&peers), &list(&["\"GET\"", "\"POST\"", "\"PUT\""]), &list(&paths));
            plan.replace("\"r\"", &format!("\"r{n}\"")).replace("false", &draw(&["true", "false", "false"]))
        })
        .collect()
}

#[test]
fn the_index_answers_as_walking_all_rules_does() {
    let random = crate::random::Random::new(11);
    let mut seen = [0; 2];
    for _ in 0..100 {
        let plans = many(&random);
        let indexed = rules(&format!("[{}]", plans.join(",")));
        let plans: Vec<RulePlan> = plans.iter().map(|plan| serde_json::from_str(plan).unwrap()).collect();
        for target in [
            "/",
            "/a",
            "/a/",
            "/a/b",
            "/a/b;x",
            "/a;x/b",
            "/b/c/d",
            "/b/..;/a",
            "/c",
            "/ab",
            "*",
            "/a/b/c/d/e/f",
            "/a/b/c/d/e/f/g",
            "/a;/b/c/d/e/",
        ] {
            for method in ["OPTIONS", "GET", "HEAD", "POST"] {
                for peer in [
                    None,
                    Some("spiffe://td/a"),
                    Some("spiffe://td/b"),
                    Some("spiffe://td/c"),
                    Some("spiffe://other/a"),
                ] {
                    let Ok(path) = canonical(target.as_bytes(), method, None, false) else { continue };
                    let question = Question { peer, method, path: &path };
                    let first = |action: Action, with_dry_run: bool| {
                        (0..plans.len()).find(|n| {
                            let plan = &plans[*n];
                            plan.action == action
                                && (with_dry_run || !plan.dry_run)
                                && indexed.rules[*n].matches(&question)
                        })
                    };
                    let walked = |with_dry_run| match first(Action::Deny, with_dry_run) {
                        Some(n) => (false, Some(n)),
                        None => first(Action::Allow, with_dry_run).map_or((false, None), |n| (true, Some(n))),
                    };
                    let verdict = indexed.judge(&question);
                    assert_eq!(
                        ((verdict.is_allowed, verdict.rule), verdict.shadow),
                        (walked(false), walked(true)),
                        "{target} {method} {peer:?}"
                    );
                    seen[usize::from(verdict.is_allowed)] += 1;
                }
            }
        }
    }
    assert!(seen.iter().all(|n| *n > 1000), "{seen:?}");
}
