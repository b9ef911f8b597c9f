"""Which mistakes about trust show only when several values are seen together?

A rule that could never match, a token that nobody's keys can check, a source of identity named twice, a URL that leads
back into this machine. As in `vet.py`, which calls this, the raw values are read and what has the wrong shape is
stepped over. What is allowed, but weaker than it looks, is `secure_warn.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from .judged import expression_fault
from .rule_values import (
    ADDRESSES,
    fault,
    host_pattern,
    namespace_pattern,
    network,
    port_text,
    principal_pattern,
    regex,
    token_principal,
)
from .secure_document import IdentityWay
from .secure_values import inward
from .text import Path, Text
from .values import DEV_TRUST_DOMAIN, is_name, near, some

_ACTIONS: Final = ("allow", "deny", "custom")
# What narrows a rule down, so that it doesn't speak of every call of everyone.
_CLAUSES: Final = (
    "not_from", "namespaces", "not_namespaces", "request_principals", "not_request_principals", "ip_blocks", "not_ip_blocks",
    "remote_ip_blocks", "not_remote_ip_blocks", "methods", "not_methods", "paths", "not_paths", "path_regexes",
    "not_path_regexes", "hosts", "not_hosts", "ports", "not_ports", "when", "dry_run",
)  # fmt: skip
_WAYS: Final = ("folder", "files", "ca", "agent", "plugin")
# Members of a JWK that only its owner may know (RFC 7518, 6.2.2, 6.3.2 and 6.4).
_PRIVATE: Final = frozenset(("d", "p", "q", "dp", "dq", "qi", "oth", "k"))


def check(text: Text, raw: Mapping[str, Any], services: Mapping[str, Any]) -> None:
    """Note every such mistake."""
    secure = _mapping(raw, "secure")
    own = secure.get("trust_domain")
    mesh = raw.get("mesh")
    domain = own if isinstance(own, str) else f"{mesh}.internal" if isinstance(mesh, str) else ""
    _identity(text, secure)
    _federation(text, secure, domain)
    _jwt(text, secure, domain)
    _proxies(text, secure, services)
    _egress(text, raw)
    names: dict[str, Path] = {}
    _rules(text, (), raw, services, names)
    first = _one_authorizer(text, (), raw, "")
    for name, service in services.items():
        at: Path = ("services", name)
        if isinstance(service, dict):
            _rules(text, at, service, services, dict(names))
            _one_authorizer(text, at, service, first)
            _required(text, at, service, _mapping(secure, "jwt"))
            _peer_check(text, at, service, domain)


# ---------------------------------------------------------------- whose keys


def _identity(text: Text, secure: Mapping[str, Any]) -> None:
    place: Path = ("secure", "identity")
    given = _mapping(secure, "identity")
    if not isinstance(secure.get("identity"), dict):
        return
    ways = [way for way in _WAYS if way in given]
    known = list(IdentityWay.model_fields)
    unknown = [key for key in given if key not in known]
    if "plugin" not in given:
        for key in unknown:
            text.refuse((*place, key), "unknown key", f"{near(key, known)}allowed: {', '.join(known)}")
    if len(ways) != 1 and (ways or not unknown):
        text.refuse(place, f"{' and '.join(ways) or 'nothing'} is given", f"exactly one of {', '.join(_WAYS)}")
    for key in ("token", "state"):
        if key in given and "ca" not in given and "plugin" not in given:
            text.refuse((*place, key), f"{key} is only for a CA that is asked", "ca: https://ca.host:8444; or leave it out")


def _federation(text: Text, secure: Mapping[str, Any], domain: str) -> None:
    for name, trusted in _mapping(secure, "federation").items():
        place: Path = ("secure", "federation", name)
        if name == domain:
            text.refuse(place, f"{name} is our own trust domain", "its bundle comes with the identity; leave it out")
        if name == DEV_TRUST_DOMAIN:
            text.refuse(place, f"{name} belongs to `meshlib dev` and is trusted nowhere else", "leave it out")
        if not isinstance(trusted, dict):
            continue
        url, profile = trusted.get("url"), trusted.get("profile")
        if "url" not in trusted and "file" not in trusted:
            text.refuse(place, "nothing says whence its keys", "file: partner.json; or url and profile")
        if "url" in trusted and "profile" not in trusted:
            hint = "https_web (any certificate authority), or https_spiffe (its own SPIFFE ID)"
            text.refuse((*place, "profile"), "is missing: how the endpoint proves who it is can't be guessed", hint)
        for key in ("profile", "every", "spiffe_id", "local"):
            if key in trusted and "url" not in trusted:
                text.refuse((*place, key), f"{key} is only for a url", "url: https://…; or leave it out")
        spiffe_id = trusted.get("spiffe_id")
        if profile == "https_spiffe":
            if "spiffe_id" not in trusted:
                text.refuse((*place, "spiffe_id"), "is missing: without it nobody knows whom to expect", f"spiffe://{name}/…")
            if "file" not in trusted:
                hint = "file: its bundle, brought over by another way"
                text.refuse((*place, "file"), "is missing: without a first bundle the endpoint can't be checked", hint)
        elif profile == "https_web" and "spiffe_id" in trusted:
            text.refuse((*place, "spiffe_id"), "https_web asks for no SPIFFE ID", "profile: https_spiffe; or leave it out")
        if isinstance(spiffe_id, str) and spiffe_id.startswith("spiffe://") and not spiffe_id.startswith(f"spiffe://{name}/"):
            text.refuse((*place, "spiffe_id"), f"{spiffe_id!r} is of another trust domain than {name}", f"spiffe://{name}/…")
        _outward(text, place, url, trusted)


def _outward(text: Text, place: Path, url: Any, owner: Mapping[str, Any]) -> None:
    """Keys come from outside this machine, unless somebody says that they don't."""
    wrong = inward(url) if isinstance(url, str) else ""
    if wrong and owner.get("local") is not True:
        hint = "a host outside; or {url: …, local: true} if that is what you want"
        text.refuse((*place, "url"), f"{url!r}: its host {wrong}", hint)


def _jwt(text: Text, secure: Mapping[str, Any], domain: str) -> None:
    issuers: dict[str, str] = {}
    federated = _mapping(secure, "federation")
    # Folders and plugins bring bundles of other domains along.
    is_told = bool(_mapping(secure, "identity").keys() & {"files", "ca"})
    for name, provider in _mapping(secure, "jwt").items():
        place: Path = ("secure", "jwt", name)
        if not isinstance(provider, dict):
            continue
        issuer, trusted = provider.get("issuer"), provider.get("trust_domain")
        ways = [key for key in ("issuer", "trust_domain") if key in provider]
        if len(ways) != 1:
            hint = "issuer: what the tokens have under iss; or trust_domain, for JWT-SVIDs"
            text.refuse(place, f"{' and '.join(ways) or 'nothing'} says whose tokens they are", hint)
        who = issuer if isinstance(issuer, str) else f"spiffe://{trusted}" if isinstance(trusted, str) else None
        if who is not None and issuers.setdefault(who, name) != name:
            key = "issuer" if issuer is not None else "trust_domain"
            text.refuse((*place, key), f"{issuers[who]} is of the same issuer", "one provider for each; audiences is a list")
        if "jwks" not in provider and "issuer" in provider:
            hint = "an https URL, {file: keys.json} or {keys: […]}"
            text.refuse((*place, "jwks"), "is missing: without keys no token could be checked", hint)
        is_known = trusted == domain or trusted in federated or not is_told
        if "jwks" not in provider and isinstance(trusted, str) and not is_known:
            hint = f"secure.federation: {{{trusted}: …}}; or jwks"
            text.refuse((*place, "trust_domain"), f"nobody holds the keys of {trusted}", hint)
        _jwks(text, (*place, "jwks"), provider.get("jwks"))
        for index, item in enumerate(_items(provider.get("from"))):
            if isinstance(item, dict):
                _token_from(text, (*place, "from", index), item)


def _jwks(text: Text, place: Path, jwks: Any) -> None:
    if isinstance(jwks, str):
        wrong = inward(jwks)
        if wrong:
            hint = "a host outside; or {url: …, local: true} if that is what you want"
            text.refuse(place, f"{jwks!r}: its host {wrong}", hint)
    if not isinstance(jwks, dict):
        return
    _one_of(text, place, jwks, ("url", "file", "keys"), known=("url", "file", "keys", "local"))
    if "local" in jwks and "url" not in jwks:
        text.refuse((*place, "local"), "local is only for a url", "leave it out")
    _outward(text, place, jwks.get("url"), jwks)
    for index, key in enumerate(_items(jwks.get("keys"))):
        at: Path = (*place, "keys", index)
        if not isinstance(key, dict):
            continue
        if key.get("kty") == "oct":
            text.refuse(at, "is a shared secret: who can check such a token can also make one", "the issuer's public keys")
        elif _PRIVATE & key.keys():
            text.refuse(
                at, "is a private key", "the public part alone; and a new key, for this one has been in a file of settings"
            )
        elif not isinstance(key.get("kty"), str):
            text.refuse(at, "is no key: kty is missing", "as in the issuer's JWKS document")


def _token_from(text: Text, place: Path, item: Mapping[str, Any]) -> None:
    _one_of(text, place, item, ("header", "cookie", "query"), known=("header", "cookie", "query", "prefix"))
    if "prefix" in item and "header" not in item:
        text.refuse((*place, "prefix"), "only in a header something stands before the token", "leave it out")
    if item.get("header") == "cookie":
        text.refuse((*place, "header"), "cookies are told apart by name", "{cookie: session}")


def _required(text: Text, at: Path, service: Mapping[str, Any], providers: Mapping[str, Any]) -> None:
    place = (*at, "secure", "jwt")
    listed = _items(_mapping(_mapping(service, "secure"), "jwt").get("providers"))
    for index, name in enumerate(listed):
        if isinstance(name, str) and is_name(name) and name not in providers:
            hint = f"{near(name, providers)}{some(providers) or 'a section `secure: {jwt: …}`'}"
            text.refuse((*place, "providers", index), f"{name!r} is no provider of this file", hint)
        elif isinstance(name, str) and name in listed[:index]:
            text.refuse((*place, "providers", index), f"{name!r} stands here twice", "once is enough")


def _peer_check(text: Text, at: Path, service: Mapping[str, Any], domain: str) -> None:
    """By DNS name only those can be checked into whose certificates one is written."""
    if _mapping(service, "secure").get("peer_check") != "dns":
        return
    own = service.get("identity")
    endpoints = [item.get("identity") for item in _items(_mapping(service, "discover").get("static")) if isinstance(item, dict)]
    for identity in (own, *endpoints):
        if not isinstance(identity, str) or not identity.startswith("spiffe://") or is_fit_for_dns(identity):
            continue
        if identity == own and identity.startswith(f"spiffe://{domain}/"):
            continue  # our CA writes the service's name beside it
        message = f"{identity} tells no DNS name, so a certificate of it can't be checked by one"
        text.refuse(
            (*at, "secure", "peer_check"), message, "spiffe or auto; or spiffe://<trust domain>/ns/<namespace>/sa/<service>"
        )


def is_fit_for_dns(identity: str) -> bool:
    """Whether a SPIFFE ID has the form to which our CA writes a DNS name: spiffe://<trust domain>/ns/<namespace>/sa/<service>."""
    parts = identity.removeprefix("spiffe://").split("/")
    return len(parts) == 5 and parts[1] == "ns" and parts[3] == "sa" and all(parts)


# ---------------------------------------------------------------- rules


def _rules(text: Text, at: Path, owner: Mapping[str, Any], services: Mapping[str, Any], names: dict[str, Path]) -> None:
    secure = _mapping(owner, "secure")
    label = str(at[1]) if at else "*"
    is_grpc = owner.get("protocol") == "grpc"
    if _items(_mapping(secure, "jwt").get("require")):
        names.setdefault(f"{label}/jwt", (*at, "secure", "jwt", "require"))  # what refuses for want of a token
    for place, action, rule in _each_rule(at, owner):
        name = rule.get("name", f"{label}/{action}/{place[-1]}")
        if isinstance(name, str) and names.setdefault(name, place) != place:
            hint = "logs and refusals tell rules apart by name"
            text.refuse((*place, "name"), f"another rule is called {name!r}, too", hint)
        _callers(text, place, rule, services)
        for number, one in enumerate(_items(rule.get("when"))):
            if isinstance(one, dict):
                _when(text, (*place, "when", number), one)
        for key in ("path_regexes", "not_path_regexes"):
            for number, expression in enumerate(_items(rule.get(key))):
                wrong = expression_fault(expression) if isinstance(expression, str) and fault(regex, expression) is None else ""
                if wrong:
                    hint = "a whole path, in the syntax of Rust's regex: /v[0-9]+/items/.*"
                    text.refuse((*place, key, number), wrong.partition("; ")[0], hint)
        methods, without = _items(rule.get("methods")), _items(rule.get("not_methods"))
        if is_grpc and ((methods and "POST" not in methods) or "POST" in without):
            key = "not_methods" if "POST" in without else "methods"
            hint = "leave methods out; paths: [/package.Service/Method]"
            text.refuse((*place, key), "every gRPC call is a POST: the rule would match nothing", hint)
        for number, method in enumerate(without):
            if isinstance(method, str) and method in methods:
                text.refuse((*place, "not_methods", number), f"{method} stands under methods, too", "keep one of them")
        for number, path in enumerate(_items(rule.get("not_paths"))):
            if path == "/*":
                text.refuse((*place, "not_paths", number), "'/*' is every path: the rule would match nothing", "leave it out")
        if action == "deny" and "*" in _items(rule.get("from")) and not any(rule.get(key) for key in _CLAUSES):
            hint = "name callers, methods or paths; in mode enforce, what no rule allows is denied anyway"
            text.refuse(place, "denies every call of everyone", hint)


def _one_authorizer(text: Text, at: Path, owner: Mapping[str, Any], first: str) -> str:
    """A call has one answer that is asked for; of two, the one that was forgotten would be an open door."""
    for place, action, rule in _each_rule(at, owner):
        name = rule.get("authorizer")
        if action == "custom" and rule.get("dry_run") is not True and isinstance(name, str):
            first = first or name
            if name != first:
                message = f"another rule asks {first!r}, and a service can have only one authorizer"
                text.refuse((*place, "authorizer"), message, "one function, which may ask several others")
    return first


def _each_rule(at: Path, owner: Any) -> Iterator[tuple[Path, str, Mapping[str, Any]]]:
    """The raw rules of a service, or of the system, each with its place and action; those of its public listener are `public`."""
    secure, public = _mapping(owner, "secure"), _mapping(_mapping(owner, "inbound"), "public")
    places: list[tuple[Path, str, Any]] = [((*at, "secure", action), action, secure.get(action)) for action in _ACTIONS]
    places.append(((*at, "inbound", "public", "allow"), "public", public.get("allow")))
    for place, action, listed in places:
        for index, rule in enumerate(_items(listed)):
            if isinstance(rule, dict):
                yield (*place, index), action, rule


def _callers(text: Text, place: Path, rule: Mapping[str, Any], services: Mapping[str, Any]) -> None:
    """Who is meant by `from` and `not_from`."""
    has_domains = bool(_items(rule.get("trust_domains")))
    is_spread = False
    for key in ("from", "not_from"):
        for number, caller in enumerate(_items(rule.get(key))):
            if not isinstance(caller, str):
                continue
            if caller.startswith("*/"):
                is_spread = True
                if not has_domains:
                    hint = "trust_domains: [shop.internal] beside it: nothing matches a domain that nobody wrote down"
                    text.refuse((*place, key, number), f"{caller!r} would match every trust domain", hint)
            elif caller == "*" and key == "not_from":
                text.refuse((*place, key, number), "'*' is anyone: the rule would match nothing", "name callers")
            else:
                known_caller(text, (*place, key, number), caller, services)
    if has_domains and not is_spread:
        text.refuse((*place, "trust_domains"), "is only for callers such as */ns/a/sa/x", "leave it out, or write such a caller")


def known_caller(text: Text, place: Path, caller: str, services: Mapping[str, Any]) -> None:
    """A name of a caller is a service's."""
    if is_name(caller) and caller not in services:
        hint = f'{near(caller, services)}a service ({some(services)}), "*", or a SPIFFE ID'
        text.refuse(place, f"{caller!r} is no service of this file", hint)


def _when(text: Text, place: Path, one: Mapping[str, Any]) -> None:
    key = one.get("key")
    if "values" not in one and "not_values" not in one:
        text.refuse(place, "neither values nor not_values is given", "values: one of them must match; not_values: none may")
    if not isinstance(key, str):
        return
    check = _VALUES.get(key)
    for side in ("values", "not_values"):
        for number, value in enumerate(_items(one.get(side))):
            wrong = fault(check, value) if check is not None and isinstance(value, str) and value else None
            if wrong is not None:
                text.refuse((*place, side, number), *wrong)


_VALUES: Final = {
    "source.namespace": namespace_pattern,
    "request.auth.principal": token_principal,
    **dict.fromkeys(ADDRESSES, network),
    "destination.port": port_text,
    "source.principal": principal_pattern,
    "connection.sni": host_pattern,
}


# ---------------------------------------------------------------- what stands in front, and what goes out


def _proxies(text: Text, secure: Mapping[str, Any], services: Mapping[str, Any]) -> None:
    place: Path = ("secure", "proxies")
    given = _mapping(secure, "proxies")
    if isinstance(secure.get("proxies"), dict) and not given.get("identities") and not given.get("cidrs"):
        text.refuse(place, "names nobody", "identities: [gateway], or cidrs: [10.0.0.0/8]")
    for number, caller in enumerate(_items(given.get("identities"))):
        if not isinstance(caller, str):
            continue
        if caller == "*" or caller.startswith("*/"):
            text.refuse(
                (*place, "identities", number), f"{caller!r} believes everyone", "the services or SPIFFE IDs of your proxies"
            )
        else:
            known_caller(text, (*place, "identities", number), caller, services)


def _egress(text: Text, raw: Mapping[str, Any]) -> None:
    seen: set[tuple[Any, Any]] = set()
    for index, one in enumerate(_items(_mapping(raw, "egress").get("credentials"))):
        if not isinstance(one, dict):
            continue
        place: Path = ("egress", "credentials", index)
        _one_of(text, place, one, ("env", "file"), known=("host", "header", "prefix", "env", "file"))
        host, header = one.get("host"), one.get("header", "authorization")
        if isinstance(host, str) and isinstance(header, str):
            if (host, header) in seen:
                text.refuse(place, f"{host} gets {header} from another entry, too", "one for each host and header")
            seen.add((host, header))


def _one_of(text: Text, at: Path, given: Mapping[str, Any], ways: tuple[str, ...], *, known: tuple[str, ...]) -> None:
    found = [way for way in ways if way in given]
    # A mistyped key is told as what it is, not a second time as a missing one.
    if len(found) > 1 or (not found and not set(given) - set(known)):
        text.refuse(at, f"{' and '.join(found) or 'nothing'} is given", f"exactly one of {', '.join(ways)}")


def _mapping(value: Any, key: str) -> dict[str, Any]:
    inner = value.get(key) if isinstance(value, dict) else None
    return inner if isinstance(inner, dict) else {}


def _items(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else ()
