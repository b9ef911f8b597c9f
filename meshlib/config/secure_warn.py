"""Which settings about trust are allowed, but weaker than they look?

The shapes of rules that were holes in other meshes, words that anybody may write, conditions that nothing fulfils. Each
warning names the safer way. A rule of the system is told once, however many services it holds for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from .document import Document
from .policy import ServicePolicy
from .rule_values import pattern_kind
from .secure_policy import RulePolicy
from .text import Path, Text
from .values import DEV_TRUST_DOMAIN, some

# What the application never gets, unless a trusted proxy says it: so whoever calls may write it.
_TAKEN_OUT: Final = (
    "x-forwarded-", "x-envoy-", "x-mesh-", "x-original-", "x-rewrite-", "l5d-", "ssl-client-", "x-ssl-", "x-tls-", "x-client-",
    "x-auth-request-", "x-amzn-", "x-goog-authenticated-", "client-cert", "x-spiffe-id", "remote-user", "x-remote-user",
)  # fmt: skip
_SECRETS: Final = ("authorization", "cookie", "proxy-authorization", "x-api-key")
_OF_TOKENS: Final = "request.auth."


def warn(found: Text, document: Document, services: Mapping[str, ServicePolicy]) -> None:
    """Note what is allowed, but weaker than it looks."""
    once = _Once(found)
    _system(once, document)
    for service in services.values():
        _service(once, ("services", service.name), service)
        for rule in service.rules:
            _shape(once, rule, service)
            _facts(once, rule, document, service)
        for rule in service.inbound.public_allow:
            _spellings(once, rule)
            _facts(once, rule, document, service)


class _Once:
    """Each warning once: rules of the system are seen with every service."""

    def __init__(self, found: Text) -> None:
        self.lines = found.lines
        self._found = found
        self._seen: set[tuple[Path, str]] = set()

    def tell(self, place: Path, message: str, hint: str) -> None:
        if (place, message) not in self._seen:
            self._seen.add((place, message))
            self._found.refuse(place, message, hint)


def _system(once: _Once, document: Document) -> None:
    secure, egress = document.secure, document.egress
    proxies = secure.proxies
    if secure.xfcc == "append_forward" and (proxies is None or not proxies.identities):
        message = "append_forward without proxies.identities: nobody's header is let in"
        once.tell(("secure", "xfcc"), message, "proxies: {identities: [gateway]}; or sanitize_set")
    if proxies is not None and proxies.hops == 0:
        once.tell(
            ("secure", "proxies", "hops"), "0 hops: no address of a proxy is believed", "as many proxies as there are in a row"
        )
    for name, provider in secure.jwt.items():
        for index, place in enumerate(provider.from_):
            if place.query is not None:
                message = "a token in the query stands in every log on its way"
                once.tell(("secure", "jwt", name, "from", index), message, "a header; or a cookie")
    if egress.hosts and egress.policy == "allow":
        once.tell(("egress", "hosts"), "hosts has no effect: all hosts may be called", "policy: deny; or leave hosts out")
    for index, one in enumerate(egress.credentials):
        if egress.policy == "deny" and not any(_covers(host, one.host) for host in egress.hosts):
            message = f"{one.host} can't be called: egress is denied, and it is not under hosts"
            once.tell(("egress", "credentials", index, "host"), message, f"hosts: [{one.host}]")


def _covers(host: str, called: str) -> bool:
    return called.partition(".")[2] == host[2:] if host.startswith("*.") else called == host


def _service(once: _Once, at: Path, service: ServicePolicy) -> None:
    secure: Path = (*at, "secure")
    allows = [rule for rule in service.rules if rule.action == "allow"]
    if service.mode == "enforce" and not allows:
        message = "enforce without a rule that allows anything: every call is denied"
        once.tell((*secure, "allow"), message, "an allow rule")
    elif service.mode == "enforce" and all(rule.is_dry_run for rule in allows):
        once.tell((*secure, "allow"), "enforce, and every allow rule is a dry run: every call is denied", "dry_run: false")
    if service.jwt_required and not service.providers:
        message = "require without a provider: no token is good, and every such call is refused"
        once.tell((*secure, "jwt", "require"), message, "secure: {jwt: {…}} with an issuer; or leave it out")


def _shape(once: _Once, rule: RulePolicy, service: ServicePolicy) -> None:
    """Rules that let in, or keep out, something else than one may think."""
    place = rule.place
    is_allow = rule.action == "allow"
    if is_allow and "*" in rule.callers and service.mode == "enforce" and not _wants_token(rule):
        message = 'enforce, and "*" lets everyone in whose certificate is valid, whoever it is'
        once.tell((*place, "from"), message, "name the callers")
    if is_allow and any(caller.endswith("/*") and caller.count("/") == 3 for caller in rule.callers):
        once.tell((*place, "from"), "a whole trust domain is allowed", "name the callers")
    _spellings(once, rule)


def _spellings(once: _Once, rule: RulePolicy) -> None:
    """Conditions that another spelling, or another name, gets around."""
    place, is_deny, is_allow = rule.place, rule.action == "deny", rule.action == "allow"
    safer = "safer: allow the paths that may be called; what no rule allows is denied"
    if is_deny and (rule.paths or rule.path_regexes):
        message = "DENY by path: a spelling that the application reads differently slips through"
        once.tell((*place, "paths" if rule.paths else "path_regexes"), message, safer)
    if is_allow and (rule.not_paths or rule.not_path_regexes):
        message = "ALLOW of all paths but these: a spelling that the application reads differently slips through"
        once.tell((*place, "not_paths" if rule.not_paths else "not_path_regexes"), message, safer)
    if (is_deny and rule.hosts) or (is_allow and rule.not_hosts):
        message = "hosts are what the caller writes: a name that nobody thought of slips through"
        once.tell((*place, "hosts" if is_deny else "not_hosts"), message, "safer: allow the hosts that may be called")
    has_paths = rule.paths or rule.not_paths or rule.path_regexes or rule.not_path_regexes
    if rule.is_case_insensitive and not has_paths:
        once.tell((*place, "case"), "case has no effect: it is about paths, and there are none", "paths; or leave it out")


def _wants_token(rule: RulePolicy) -> bool:
    return bool(rule.request_principals) or any(one.key.startswith(_OF_TOKENS) and one.values for one in rule.when)


def _facts(once: _Once, rule: RulePolicy, document: Document, service: ServicePolicy) -> None:
    """Conditions on what nobody knows, or anybody may write."""
    place, secure = rule.place, document.secure
    remote = [key for key in ("remote_ip_blocks", "not_remote_ip_blocks") if getattr(rule, key)]
    remote += ["when" for one in rule.when if one.key == "remote.ip"]
    if remote and secure.proxies is None:
        message = "without proxies nobody is believed about addresses: this is the one who connects"
        once.tell((*place, remote[0]), message, "secure: {proxies: …}; or ip_blocks")
    if not service.providers:
        for key in _about_tokens(rule):
            message = f"{service.name} believes no token: nobody has a request principal or claims"
            once.tell((*place, key), message, "secure: {jwt: {…}} with an issuer")
    for index, one in enumerate(rule.when):
        if not one.key.startswith("request.headers["):
            continue
        name = one.key[len("request.headers[") : -1]
        if name.startswith(_TAKEN_OUT):
            message = f"{name} is taken out of what comes in, and anybody may write it: a rule had better not believe it"
            once.tell((*place, "when", index, "key"), message, "from, or a claim of a token")
        exact = [value for value in (*one.values, *one.not_values) if pattern_kind(value)[0] == "exact"]
        if name in _SECRETS and exact:
            message = f"the value of {name} is a secret, and stands in this file"
            once.tell((*place, "when", index, "values"), message, "secure: {jwt: …}, or a custom rule")
    known = {secure.trust_domain or f"{document.mesh}.internal", DEV_TRUST_DOMAIN, *secure.federation}
    strange = sorted({domain for domain in _domains(rule) if domain not in known})
    # Folders and plugins bring bundles of other domains along.
    is_told = secure.identity is not None and (secure.identity.files is not None or secure.identity.ca is not None)
    if strange and is_told:
        message = f"nobody can prove to be of {some(strange)}: its bundle is not known"
        once.tell((*place, "from"), message, f"secure: {{federation: {{{strange[0]}: …}}}}")


def _about_tokens(rule: RulePolicy) -> Iterator[str]:
    for key in ("request_principals", "not_request_principals"):
        if getattr(rule, key):
            yield key
    if any(one.key.startswith(_OF_TOKENS) for one in rule.when):
        yield "when"


def _domains(rule: RulePolicy) -> Iterator[str]:
    for caller in (*rule.callers, *rule.not_callers):
        if caller.startswith("spiffe://"):
            yield caller.removeprefix("spiffe://").split("/", 1)[0]
