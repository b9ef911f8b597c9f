//! The door for everybody, and its own rules.
use super::*;

fn enter(gate: &Gate, target: &str, peer: Option<&str>, listener: Listener) -> Entry {
    let (headers, method) = (gate.headers(target.as_bytes()), "GET");
    let origin = Origin { listener, source: "192.0.2.1", ..Origin::default() };
    let (target, is_tls) = (target.as_bytes(), peer.is_some());
    gate.begin(Arrival { method, target, headers, peer, is_tls, now: NOW, deadline: None, origin })
}

/// In by the mesh's door comes the shop; by the public one everybody may see the items, and nobody /items/secret.
fn public(mode: &str) -> Gate {
    let rule = |name: &str, action: &str, kind: &str, path: &str| -> Value {
        let text = OPEN_RULE.replace("CLAUSES", CLAUSES).replace("\"open\"", &format!("{name:?}"));
        let mut rule: Value = serde_json::from_str(&text).unwrap();
        rule["action"] = json!(action);
        rule["paths"] = json!([{"kind": kind, "value": path}]);
        rule
    };
    let mut plan: Value = serde_json::from_str(&plan(mode, SHOP_RULE)).unwrap();
    plan["admission"]["in_flight"] = json!(100);
    plan["public_rules"] =
        json!([rule("hidden", "deny", "exact", "/items/secret"), rule("items", "allow", "prefix", "/items/")]);
    let gate = Gate::default();
    gate.publish(Snapshot::compile(plan.to_string().as_bytes()).unwrap());
    gate
}

#[test]
fn each_listener_has_its_own_rules() {
    let gate = public("enforce");
    for (target, peer, mesh, public) in [
        ("/items/7", Some(SHOP), (0, "shop"), (0, "items")),
        ("/items/7", Some(BROWSER), (403, ""), (0, "items")),
        // Nobody has to prove anything at the public door, and what its rules don't allow is forbidden, not asked for again.
        ("/items/7", None, (401, ""), (0, "items")),
        ("/items/secret", None, (401, ""), (403, "hidden")),
        ("/items/secret", Some(SHOP), (0, "shop"), (403, "hidden")),
        ("/admin", None, (401, ""), (403, "")),
        ("/admin", Some(SHOP), (0, "shop"), (403, "")),
    ] {
        let say = |entry: Entry| (entry.status(), entry.rule().to_owned());
        assert_eq!(say(enter(&gate, target, peer, Listener::Mesh)), (mesh.0, mesh.1.to_owned()), "{target} {peer:?}");
        let entry = enter(&gate, target, peer, Listener::Public);
        assert!(entry.is_public());
        assert_eq!(say(entry), (public.0, public.1.to_owned()), "{target} {peer:?}");
    }
}

#[test]
fn a_refusal_at_the_public_door_names_the_public_rules() {
    let gate = public("enforce");
    let entry = enter(&gate, "/admin", None, Listener::Public);
    assert_eq!((entry.reason(), entry.nearest_rule()), ("secure.denied", "items"));
    assert!(entry.detail().contains("items"), "{}", entry.detail());
}

#[test]
fn without_public_rules_nobody_gets_in_there() {
    let gate = gate("enforce", OPEN_RULE);
    assert_eq!(enter(&gate, "/", Some(SHOP), Listener::Public).status(), 403);
}

#[test]
fn in_the_other_modes_the_public_rules_are_reported_too() {
    for mode in ["observe", "permissive"] {
        let gate = public(mode);
        let entry = enter(&gate, "/admin", None, Listener::Public);
        assert_eq!((entry.status(), entry.would_deny()), (0, true));
        assert!(!enter(&gate, "/items/7", None, Listener::Public).would_deny());
    }
}

#[test]
fn strangers_at_the_public_door_are_not_those_that_still_come_in_plain() {
    let gate = public("enforce");
    enter(&gate, "/items/7", None, Listener::Public);
    assert_eq!(gate.plain_callers(), []);
    enter(&gate, "/items/7", None, Listener::Mesh);
    assert_eq!(gate.plain_callers(), [("192.0.2.1".parse().ok(), 1)]);
}

#[test]
fn strangers_are_not_told_of_the_load() {
    let gate = public("enforce");
    for (peer, listener, expected) in
        [(None, Listener::Public, ""), (Some(SHOP), Listener::Public, "text"), (Some(SHOP), Listener::Mesh, "text")]
    {
        let mut headers = gate.headers(b"/items/7");
        headers.field(b"endpoint-load-metrics-format", b"text");
        let (origin, is_tls) = (Origin { listener, ..Origin::default() }, peer.is_some());
        let arrival =
            Arrival { method: "GET", target: b"/items/7", headers, peer, is_tls, now: NOW, deadline: None, origin };
        assert_eq!(gate.begin(arrival).load_format(), expected, "{peer:?} {listener:?}");
    }
}

#[test]
fn a_token_that_is_demanded_is_demanded_at_both_doors() {
    let mut plan: Value = serde_json::from_str(&plan("enforce", OPEN_RULE)).unwrap();
    plan["public_rules"] = plan["rules"].clone();
    plan["jwt_required"] = json!([{"kind": "prefix", "value": "/account"}]);
    let gate = Gate::default();
    gate.publish(Snapshot::compile(plan.to_string().as_bytes()).unwrap());
    let account = enter(&gate, "/account", None, Listener::Public);
    assert_eq!((account.status(), account.refusal()), (401, Some(Refusal::NoToken)));
    assert_eq!(enter(&gate, "/account", Some(SHOP), Listener::Mesh).refusal(), Some(Refusal::NoToken));
    assert_eq!(enter(&gate, "/items", None, Listener::Public).status(), 0);
}

#[test]
fn what_only_public_rules_ask_about_is_gathered() {
    let mut plan: Value = serde_json::from_str(&plan("enforce", SHOP_RULE)).unwrap();
    let mut rule = plan["rules"][0].clone();
    rule["from"] = json!([]);
    rule["when"] =
        json!([{"key": "request.headers[x-tenant]", "values": [{"kind": "exact", "value": "blue"}], "not_values": []}]);
    plan["public_rules"] = json!([rule]);
    let gate = Gate::default();
    gate.publish(Snapshot::compile(plan.to_string().as_bytes()).unwrap());
    for (tenant, expected) in [("blue", 0), ("green", 403)] {
        let mut headers = gate.headers(b"/");
        headers.field(b"x-tenant", tenant.as_bytes());
        let origin = Origin { listener: Listener::Public, ..Origin::default() };
        let arrival = Arrival {
            method: "GET",
            target: b"/",
            headers,
            peer: None,
            is_tls: false,
            now: NOW,
            deadline: None,
            origin,
        };
        assert_eq!(gate.begin(arrival).status(), expected, "{tenant}");
    }
}

#[test]
fn a_mistake_that_both_lists_have_is_told_once() {
    let mut plan: Value = serde_json::from_str(&plan("enforce", OPEN_RULE)).unwrap();
    plan["rules"][0]["from"] = json!([{"kind": "exact", "value": "nobody"}]);
    plan["public_rules"] = plan["rules"].clone();
    let wrong = Snapshot::compile(plan.to_string().as_bytes()).unwrap_err();
    assert_eq!(wrong.matches("no SPIFFE ID").count(), 1, "{wrong}");
}
