"""Which keys speak for a trust domain, and where may they come from? Area bundle.

Documents are parsed by the parser that federation uses, and what they make trusted is tried in a handshake. A key that a case only sketches is
filled in, so that nothing is wrong with it but what the case says.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from typing import Any

from meshlib.errors import ConfigError, IdentityError, MeshError
from tests.secure.cases import ground, pki, tokens
from tests.secure.cases.case import Answer, Case, not_understood
from tests.secure.cases.identities import shown_by_a_client


def bundle(case: Case) -> Answer:
    """The keys of a trust domain: what counts in them, and where they may come from."""
    given = case.given
    for name, adapter in _BUNDLES.items():
        if name in given:
            return adapter(case, given)
    if case.says("used for"):
        return _used_for(case)
    if case.says("merge", "pool"):
        return _never_merged()
    if case.says("poll", "fetch"):
        return asyncio.run(_polled())
    raise not_understood(case)


def _parsed(document: Any) -> Any:
    from meshlib.secure import bundle as bundles

    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    try:
        return bundles.parse(text, "td")
    except IdentityError:
        return None


def _of_keys(case: Case, given: dict[str, Any]) -> Answer:
    """A whole JWK set: what is trusted by it."""
    document = given.get("jwks", given.get("bundle"))
    if isinstance(document, str):
        document = {"no keys": {}, "keys missing": {}, "without keys": {}, "empty": {"keys": []}}.get(
            document.lower(), document.encode()
        )
    found = _parsed(document)
    if found is None:
        return {"reject", "refuse", "reject_bundle", "keep_last_good", "error"}
    if not found.x509 and found.jwt == b'{"keys":[]}':
        return {"untrust_all", "reject_all", "revoke_all", "distrust_all"} if _trusts_nobody(found) else {"trusts"}
    return {"accept", "use"}


def _trusts_nobody(found: Any) -> bool:
    """A handshake with the certificate of the root that was in force before, under this bundle."""
    shown = pki.leaf({"uri": ["spiffe://td/a"]}, pki.authority("rootA"))
    try:
        words = shown_by_a_client(shown, {"td": found.pem}, {})
    except MeshError:
        # Nothing at all can be verified with it.
        return True
    return words == {"reject"}


def _of_a_key(case: Case, given: dict[str, Any]) -> Answer:
    """One key among good ones: is it taken?"""
    key = _whole(dict(given["jwk"])) if isinstance(given["jwk"], dict) else given["jwk"]
    good = _root_key("rootB")
    alone = _parsed({"keys": [key]})
    beside = _parsed({"keys": [key, good]})
    if beside is None or alone is None:
        return {"reject", "refuse", "reject_bundle"}
    has_good = len(beside.x509) - len(alone.x509) == 1 or bool(key == good)
    if not has_good:
        return "takes_others_along"
    taken = len(alone.x509) + len(json.loads(alone.jwt)["keys"])
    if not taken:
        return {"ignore_key", "ignore_entry", "ignore"}
    many = isinstance(key, dict) and len(key.get("x5c", [])) > 1
    if many and len(alone.x509) == 1:
        return (
            {"use_first_only", "use_first", "accept"}
            if base64.b64encode(alone.x509[0]).decode() == key["x5c"][0]
            else {"use_other"}
        )
    return {"accept", "use", "use_key"}


def _root_key(name: str) -> dict[str, Any]:
    from meshlib.secure import bundle as bundles

    der = pki.authority(name).certificate.public_bytes(pki.serialization.Encoding.DER)
    found: dict[str, Any] = json.loads(bundles.format(bundles.Bundle((der,))))["keys"][0]
    return found


def _whole(key: dict[str, Any]) -> dict[str, Any]:
    """A key as the case sketches it, with what it leaves out filled in: nothing but the sketched thing may be wrong with it."""
    use = key.get("use")
    if "x5c" in key:
        key["x5c"] = [_certificate(str(name), place) for place, name in enumerate(key["x5c"] or [])]
        model = _root_key("rootA")
        key = {**{part: model[part] for part in ("kty", "crv", "x", "y") if part in model}, **key}
    elif use == "x509-svid":
        model = {name: value for name, value in _root_key("rootA").items() if name != "x5c"}
        key = {**model, **key}
    else:
        made = tokens.jwk("rsa" if key.get("kty") == "RSA" else "ec", str(key.get("kid", "b1")))
        unset = {"kid", "use", "alg"} - key.keys() | {name for name, value in key.items() if value is None}
        key = {name: value for name, value in {**made, **key}.items() if name not in unset}
    return {name: value for name, value in key.items() if value is not None}


def _certificate(name: str, place: int) -> str:
    if "not a ca" in name.lower() or "leaf" in name.lower():
        return base64.b64encode(pki.leaf({"uri": ["spiffe://td/a"]}, pki.authority("rootA")).chain[0]).decode()
    if any(word in name.lower() for word in ("garbage", "not base64", "invalid", "malformed")):
        return "!!!!"
    root = pki.authority(("rootA", "rootC", "rootD")[min(place, 2)])
    return base64.b64encode(root.certificate.public_bytes(pki.serialization.Encoding.DER)).decode()


def _of_a_map(case: Case, given: dict[str, Any]) -> Answer:
    from meshlib.secure import bundle as bundles

    good = json.dumps({"keys": [_root_key("rootA")]})
    word = str(given["map"]).lower()
    if isinstance(given["map"], dict):
        document = json.dumps(given["map"])
    elif "duplicate" in word:
        document = f'{{"trust_domains": {{"td": {good}, "td": {good}}}}}'
    elif any(part in word for part in ("no trust_domains", "missing", "without", "unset")):
        document = "{}"
    elif any(part in word for part in ("hint", "refresh")):
        document = f'{{"trust_domains": {{"td": {{"spiffe_refresh_hint": 1, {good[1:]}}}}}'
        found = bundles.parse_map(document.encode())
        return {"ignore", "ignored", "map_refresh_unchanged"} if not hasattr(found, "refresh_hint") else {"used"}
    elif any(part in word for part in ("invalid", "bad", "upper", "name")):
        document = f'{{"trust_domains": {{"Not A Domain": {good}}}}}'
    elif "null" in word or "empty" in word:
        document = '{"trust_domains": null}' if "null" in word else '{"trust_domains": {}}'
    else:
        raise not_understood(case)
    try:
        bundles.parse_map(document.encode())
    except IdentityError:
        return {"reject_map", "reject", "refuse"}
    return {"accept"}


def _of_an_endpoint(case: Case, given: dict[str, Any]) -> Answer:
    """A federation endpoint in mesh.yaml: what can't be right doesn't load."""
    url = str(given.get("endpoint", given.get("url", given.get("endpoint_url"))))
    profile = str(given.get("profile", "https_web"))
    domain = str(given.get("trust_domain", "other.example"))
    settings: dict[str, Any] = {"url": url, "profile": profile}
    if given.get("profile", "") is None or any(word in profile for word in ("inferred", "unset", "missing", "(")):
        del settings["profile"]
    if "spiffe_id" in given:
        settings["spiffe_id"] = given["spiffe_id"]
    # A trust domain that nobody wrote down: a file in which no name stands before the endpoint.
    federation: Any = [settings] if "(" in domain or not domain else {domain: settings}
    try:
        ground.mesh_of(ground.document({"federation": federation}))
    except ConfigError:
        return {"config_error", "reject"}
    return {"accept", "loaded"}


def _of_a_sequence(case: Case, given: dict[str, Any]) -> Answer:
    """A bundle with an older number than the one in force."""
    found = [_parsed({"spiffe_sequence": number, "keys": [_root_key("rootA")]}) for number in _numbers(given["sequence"])]
    if any(one is None for one in found):
        return {"reject", "refuse", "keep_last_good"}
    before, after = found[0], found[-1]
    return {"accept"} if after.supersedes(before) else {"keep_last_good", "reject", "ignore"}


def _numbers(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    digits = [int(number) for number in re.findall(r"-?\d+", str(value))]
    if len(digits) >= 2:
        return digits
    if len(digits) == 1 and not re.search(r"back|lower|decreas|older|roll", str(value)):
        return [0, digits[0]]
    return [2, 1]


def _of_a_hint(case: Case, given: dict[str, Any]) -> Answer:
    hint = given.get("refresh_hint", given.get("spiffe_refresh_hint"))
    found = _parsed({"spiffe_refresh_hint": hint, "keys": [_root_key("rootA")]})
    if found is None:
        return {"reject", "refuse"}
    return (
        {"ignore", "ignored", "default", "default_hint"}
        if found.refresh_hint is None
        else {"accept", f"refresh_in:{found.refresh_hint:g}"}
    )


def _never_merged() -> Answer:
    """Two trust domains are trusted, and the root of one signs for the other."""
    roots = {"td": pki.authority("rootA").pem, "td2": pki.authority("rootB").pem}
    words = [
        shown_by_a_client(pki.leaf({"uri": [uri]}, pki.authority(root)), roots, {})
        for uri, root in (("spiffe://td/a", "rootB"), ("spiffe://td2/a", "rootA"))
    ]
    return {"reject", "refuse", "not_merged", "never_merged"} if all(found == {"reject"} for found in words) else {"merged"}


async def _polled() -> Answer:
    """An endpoint that can't be had: what is known stays, and it is asked again when it is time, and not before."""
    from types import SimpleNamespace

    from meshlib.keeper import shared
    from meshlib.secure.federation import Federation

    now, asked, good = [0.0], [0], json.dumps({"keys": [_root_key("rootA")]}).encode()

    def ask(*place: Any, **more: Any) -> bytes:
        asked[0] += 1
        if asked[0] > 1:
            raise IdentityError("gone.", hint="Wait.")
        return good

    relation = SimpleNamespace(
        trust_domain="other.example", file=None, url="https://other.example/b", profile="https_web", spiffe_id=None, every=300.0
    )
    config = SimpleNamespace(trust_domain="td", federation=[relation])
    federation = Federation(config, shared(), clock=lambda: now[0], ask=ask)
    for _ in range(40):
        await federation.look()
        await federation.settled()
        now[0] += 30.0
    # Twenty minutes: one good answer, and then one failure for each five of them, give or take.
    is_patient = asked[0] <= 6
    return (
        {"next_interval", "keep_last_good", "not_aggressive", "retry_next_interval"}
        if is_patient and federation.bundles
        else {f"asked {asked[0]} times"}
    )


def _used_for(case: Case) -> Answer:
    """Keys of one kind in place of the other."""
    name = next(iter(case.given))
    if "x509" in name.lower():
        # A token signed with the key of a root, under a bundle that holds the root and nothing else.
        found = _parsed({"keys": [_root_key("rootA")]})
        return {"refuse", "reject"} if json.loads(found.jwt)["keys"] == [] else {"accept"}
    found = _parsed({"keys": [{**tokens.jwk("ec", "j1"), "use": "jwt-svid"}]})
    return {"refuse", "reject"} if found.x509 == () and _trusts_nobody(found) else {"accept"}


_BUNDLES = {
    "jwks": _of_keys,
    "bundle": _of_keys,
    "jwk": _of_a_key,
    "map": _of_a_map,
    "endpoint": _of_an_endpoint,
    "endpoint_url": _of_an_endpoint,
    "url": _of_an_endpoint,
    "sequence": _of_a_sequence,
    "spiffe_sequence": lambda case, given: _of_a_sequence(case, {"sequence": given["spiffe_sequence"]}),
    "refresh_hint": _of_a_hint,
    "spiffe_refresh_hint": _of_a_hint,
}
