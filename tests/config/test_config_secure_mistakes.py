"""Is every mistake about trust found, at its line, with what is allowed, and is no secret shown?

Each case is a piece of a file in which `#!` marks the line where the problem must be reported: a rule of `orders`, a
section of `secure`, or keys of the system. What is good stands beside what isn't, in the tests of the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from meshlib.config import load
from meshlib.errors import ConfigError, Problem

Write = Callable[..., Path]


def _rule(clauses: str, action: str = "allow") -> str:
    rule = f"{{from: [web], {clauses}}}" if not clauses.startswith("from:") else f"{{{clauses}}}"
    return _file(service=f"    secure:\n      {action}:\n        - {rule}  #!\n")


def _secure(section: str) -> str:
    return _file(secure=f"  {section}  #!\n")


def _system(keys: str) -> str:
    return _file(system=f"{keys}  #!\n")


def _service(keys: str) -> str:
    return _file(service=f"    {keys}  #!\n")


def _file(*, secure: str = "", system: str = "", service: str = "") -> str:
    identity = "" if secure.startswith("  identity") else "  identity: {folder: ids}\n"
    return (
        f"mesh: shop\nsecure:\n  mode: enforce\n{identity}{secure}{system}"
        f'services:\n  web: {{}}\n  orders:\n    discover: {{static: ["127.0.0.1:8101"]}}\n{service}'
    )


RULE = "services.orders.secure.allow[0]"
CHECK = "services.orders.secure.peer_check"
JWT = "issuer: https://a/, audiences: [a], jwks: https://a/k"

# name: (text, key, part of the message, part of the hint)
CASES: dict[str, tuple[str, str, str, str]] = {
    # ------------------------------------------------------------------------------------------------ callers
    "caller of every trust domain": (
        _rule("from: ['*/ns/a/sa/x']"),
        f"{RULE}.from[0]",
        "would match every trust domain",
        "trust_domains: [shop.internal]",
    ),
    "nobody of every trust domain": (
        _rule("not_from: ['*/ns/a/sa/x']"),
        f"{RULE}.not_from[0]",
        "would match every trust domain",
        "trust_domains",
    ),
    "trust domains for nobody": (
        _rule("trust_domains: [shop.internal]"),
        f"{RULE}.trust_domains",
        "is only for callers such as */ns/a/sa/x",
        "",
    ),
    "trust domain with a star": (
        _rule("from: ['*/x'], trust_domains: ['*.internal']"),
        f"{RULE}.trust_domains[0]",
        "can't be a trust domain",
        "small letters",
    ),
    "star within a trust domain": (
        _rule("from: ['spiffe://*.internal/x']"),
        f"{RULE}.from[0]",
        "a * may only stand at the end",
        "",
    ),
    "every identity there is": (
        _rule("from: ['spiffe://*']"),
        f"{RULE}.from[0]",
        "would match other trust domains",
        "spiffe://shop.internal/*",
    ),
    "caller that could be nobody": (
        _rule("from: ['spiffe://shop.internal/a//*']"),
        f"{RULE}.from[0]",
        "has no valid path",
        "it would match nobody",
    ),
    "caller of any domain without a path": (
        _rule("from: ['*/../x'], trust_domains: [shop.internal]"),
        f"{RULE}.from[0]",
        "has no valid path",
        "",
    ),
    "nobody is excepted": (_rule("not_from: ['*']"), f"{RULE}.not_from[0]", "'*' is anyone", "name callers"),
    "exception that is no service": (_rule("not_from: [wep]"), f"{RULE}.not_from[0]", "is no service", "did you mean 'web'?"),
    # ------------------------------------------------------------------------------------------------ patterns
    "pattern with an inner star": (
        _rule("namespaces: ['a*b']"),
        f"{RULE}.namespaces[0]",
        "a * may only stand at one end",
        '"x*" (begins so)',
    ),
    "pattern of two stars": (
        _rule("request_principals: ['*a*']"),
        f"{RULE}.request_principals[0]",
        "a * may only stand at one end",
        "",
    ),
    "empty pattern": (_rule("namespaces: ['']"), f"{RULE}.namespaces[0]", "is empty", ""),
    "pattern that is a number": (_rule("namespaces: [1]"), f"{RULE}.namespaces[0]", "must be a word or text", "quotes"),
    "host in capitals": (_rule("hosts: [Shop.test]"), f"{RULE}.hosts[0]", "holds capitals", "shop.test"),
    "host with a port": (_rule("hosts: ['shop.test:80']"), f"{RULE}.hosts[0]", "holds a port", "`ports`"),
    "host with a dot behind": (_rule("not_hosts: ['shop.test.']"), f"{RULE}.not_hosts[0]", "ends with a dot", "leave it out"),
    "host that is a URL": (_rule("hosts: ['https://shop.test']"), f"{RULE}.hosts[0]", "is no host", "api.shop.example"),
    "port out of range": (_rule("ports: [70000]"), f"{RULE}.ports[0]", "70000 is no port", "1 to 65535"),
    "port of a word": (_rule("ports: ['8443']"), f"{RULE}.ports[0]", "must be a whole number", ""),
    # ------------------------------------------------------------------------------------------------ paths
    "path with a star at both ends": (_rule("paths: ['*a*']"), f"{RULE}.paths[0]", "a * may only stand at one end", "*/export"),
    "end of a path with an escape": (_rule("paths: ['*/a%2fb']"), f"{RULE}.paths[0]", "holds an escape", "decoded form"),
    "end of a path that is not canonical": (_rule("paths: ['*//b']"), f"{RULE}.paths[0]", "is not canonical", ""),
    "template that goes on after the rest": (
        _rule("paths: ['/a/{**}/b/{c}']"),
        f"{RULE}.paths[0]",
        "behind {**} there may only stand text",
        "{**} one or more",
    ),
    "template and a star": (_rule("paths: ['/a/{id}/*']"), f"{RULE}.paths[0]", "mixes a template and a *", ""),
    "every path is excepted": (_rule("not_paths: ['/*']"), f"{RULE}.not_paths[0]", "would match nothing", ""),
    "expression that looks around": (
        _rule("path_regexes: ['/a(?=b)']"),
        f"{RULE}.path_regexes[0]",
        "is not supported",
        "no looking around",
    ),
    "expression that refers back": (
        _rule("path_regexes: ['/(a)\\1']"),
        f"{RULE}.path_regexes[0]",
        "references back",
        "several rules",
    ),
    "expression with an open bracket": (
        _rule("path_regexes: ['/a(b']"),
        f"{RULE}.path_regexes[0]",
        "unclosed group",
        "a whole path",
    ),
    "expression that is no path": (
        _rule("not_path_regexes: ['a.*']"),
        f"{RULE}.not_path_regexes[0]",
        "begins with a slash",
        "",
    ),
    "expression that grows": (
        _rule("path_regexes: ['/.{1000}{1000}']"),
        f"{RULE}.path_regexes[0]",
        "exceeds size limit",
        "",
    ),
    "expression that is too long": (
        _rule(f"path_regexes: ['/{'a' * 1024}']"),
        f"{RULE}.path_regexes[0]",
        "can't be an expression",
        "1 to 1024",
    ),
    "case of another word": (_rule("case: ignore"), f"{RULE}.case", "'ignore' is not allowed", "one of sensitive, insensitive"),
    "method on both sides": (
        _rule("methods: [GET, POST], not_methods: [POST]"),
        f"{RULE}.not_methods[0]",
        "POST stands under methods, too",
        "keep one",
    ),
    "every gRPC call is excepted": (
        _file(service="    protocol: grpc\n    secure: {allow: [{from: [web], not_methods: [POST]}]}  #!\n"),
        f"{RULE}.not_methods",
        "every gRPC call is a POST",
        "paths",
    ),
    # ------------------------------------------------------------------------------------------------ how gRPC proves a peer
    "peer check of another word": (
        _file(service="    protocol: grpc\n    secure: {peer_check: uri}  #!\n"),
        CHECK,
        "'uri' is not allowed",
        "one of auto, dns, spiffe",
    ),
    "peer check by name of a foreign identity": (
        _file(service="    protocol: grpc\n    identity: spiffe://partner.test/orders\n    secure: {peer_check: dns}  #!\n"),
        CHECK,
        "spiffe://partner.test/orders tells no DNS name",
        "spiffe or auto",
    ),
    "peer check by name of an endpoint": (
        _file(service="    protocol: grpc\n    secure: {peer_check: dns}  #!\n").replace(
            '"127.0.0.1:8101"', "{address: '127.0.0.1:1', identity: 'spiffe://shop.internal/canary'}"
        ),
        CHECK,
        "spiffe://shop.internal/canary tells no DNS name",
        "spiffe or auto",
    ),
    # ------------------------------------------------------------------------------------------------ addresses
    "block that is no network": (_rule("ip_blocks: [10.0.0]"), f"{RULE}.ip_blocks[0]", "is no address or network", "10.0.0.0/8"),
    "block with an address": (
        _rule("not_ip_blocks: [10.1.2.3/8]"),
        f"{RULE}.not_ip_blocks[0]",
        "is an address within a network",
        "10.0.0.0/8",
    ),
    "block with a mask": (
        _rule("remote_ip_blocks: [10.0.0.0/255.0.0.0]"),
        f"{RULE}.remote_ip_blocks[0]",
        "is no address or network",
        "",
    ),
    "block with a zone": (
        _rule("not_remote_ip_blocks: ['fe80::1%eth0']"),
        f"{RULE}.not_remote_ip_blocks[0]",
        "is no address or network",
        "",
    ),
    "block of IPv4 in IPv6": (
        _rule("ip_blocks: ['::ffff:10.0.0.0/104']"),
        f"{RULE}.ip_blocks[0]",
        "would match nothing",
        "10.0.0.0/8",
    ),
    # ------------------------------------------------------------------------------------------------ when
    "condition mistyped": (
        _rule("when: [{key: request.auth.audience, values: [a]}]"),
        f"{RULE}.when[0].key",
        "is nothing that a rule can ask for",
        "did you mean 'request.auth.audiences'?",
    ),
    "condition of nothing": (
        _rule("when: [{key: connection.sni}]"),
        f"{RULE}.when[0]",
        "neither values nor not_values",
        "values: one of them must match",
    ),
    "condition on baggage": (
        _rule("when: [{key: 'request.headers[baggage]', values: [a]}]"),
        f"{RULE}.when[0].key",
        "baggage is never policy",
        "whoever calls",
    ),
    "condition on a member of baggage": (
        _rule("when: [{key: 'baggage[tenant]', values: [a]}]"),
        f"{RULE}.when[0].key",
        "baggage is never policy",
        "a claim of a token",
    ),
    "condition on a header in capitals": (
        _rule("when: [{key: 'request.headers[X-Role]', values: [a]}]"),
        f"{RULE}.when[0].key",
        "holds capitals",
        "x-role",
    ),
    "condition on a header with an underscore": (
        _rule("when: [{key: 'request.headers[x_role]', values: [a]}]"),
        f"{RULE}.when[0].key",
        "holds an underscore",
        "hyphens",
    ),
    "condition on the host header": (
        _rule("when: [{key: 'request.headers[host]', values: [a]}]"),
        f"{RULE}.when[0].key",
        "is compared as it was sent",
        "hosts",
    ),
    "condition on the header of a certificate": (
        _rule("when: [{key: 'request.headers[x-forwarded-client-cert]', values: [a]}]"),
        f"{RULE}.when[0].key",
        "comes from the connection",
        "from",
    ),
    "condition on the header of an address": (
        _rule("when: [{key: 'request.headers[x-forwarded-for]', values: [a]}]"),
        f"{RULE}.when[0].key",
        "who may say that",
        "remote_ip_blocks",
    ),
    "condition on a namespace of two": (
        _rule("when: [{key: source.namespace, values: [a/b]}]"),
        f"{RULE}.when[0].values[0]",
        "could be no namespace",
        "/ns/",
    ),
    "namespace of two": (_rule("namespaces: [a/b]"), f"{RULE}.namespaces[0]", "could be no namespace", "one segment"),
    "principal without a subject": (
        _rule("request_principals: [auth0]"),
        f"{RULE}.request_principals[0]",
        "could be nobody",
        "issuer and subject",
    ),
    "everything excepted": (
        _rule("methods: [GET], not_methods: [GET, HEAD]"),
        f"{RULE}.not_methods[0]",
        "GET stands under methods, too",
        "",
    ),
    "paths that are all excepted": (
        _rule("paths: [/a/b], not_paths: ['/a/*']"),
        RULE,
        "could never match",
        "leave out one",
    ),
    "hosts that no host begins with": (_rule("hosts: ['.a*']"), f"{RULE}.hosts", "could never match", ""),
    "algorithm that this build can't check": (
        _secure(f"jwt: {{a: {{{JWT}, algorithms: [RS256, ES512]}}}}"),
        "secure.jwt.a",
        "ES512",
        "",
    ),
    "condition on no header": (
        _rule("when: [{key: request.headers, values: [a]}]"),
        f"{RULE}.when[0].key",
        "names no header",
        "request.headers[x-role]",
    ),
    "condition on no claim": (
        _rule("when: [{key: request.auth.claims, values: [a]}]"),
        f"{RULE}.when[0].key",
        "names no claim",
        "request.auth.claims[groups]",
    ),
    "condition on a part of a word": (
        _rule("when: [{key: 'source.ip[0]', values: [10.0.0.1]}]"),
        f"{RULE}.when[0].key",
        "source.ip has no parts",
        "",
    ),
    "condition on an address that is none": (
        _rule("when: [{key: source.ip, values: ['10.*']}]"),
        f"{RULE}.when[0].values[0]",
        "is no address or network",
        "10.0.0.0/8",
    ),
    "condition on a port that is none": (
        _rule("when: [{key: destination.port, not_values: ['http']}]"),
        f"{RULE}.when[0].not_values[0]",
        "is no port",
        '"8443"',
    ),
    "condition on the end of an identity": (
        _rule("when: [{key: source.principal, values: ['*/sa/x']}]"),
        f"{RULE}.when[0].values[0]",
        "would match every trust domain",
        "trust_domains",
    ),
    "condition on an identity that is none": (
        _rule("when: [{key: source.principal, values: [web]}]"),
        f"{RULE}.when[0].values[0]",
        "is not a SPIFFE ID",
        "spiffe://",
    ),
    "condition on the beginning of no identity": (
        _rule("when: [{key: source.principal, values: ['web*']}]"),
        f"{RULE}.when[0].values[0]",
        "is not a SPIFFE ID",
        "",
    ),
    "condition on the beginning of a trust domain": (
        _rule("when: [{key: source.principal, values: ['spiffe://shop*']}]"),
        f"{RULE}.when[0].values[0]",
        "would match other trust domains",
        "spiffe://shop/*",
    ),
    "condition on a line break": (
        _rule('when: [{key: "request.headers[x-a]", values: ["a\\nb"]}]'),
        f"{RULE}.when[0].values[0]",
        "can't be compared",
        "printable",
    ),
    "condition on a name in capitals": (
        _rule("when: [{key: connection.sni, values: [Shop.test]}]"),
        f"{RULE}.when[0].values[0]",
        "holds capitals",
        "shop.test",
    ),
    # ------------------------------------------------------------------------------------------------ custom and system rules
    "custom without an authorizer": (
        _rule("from: ['*']", "custom"),
        "services.orders.secure.custom[0].authorizer",
        "is missing",
        "@mesh.authorizer",
    ),
    "two authorizers": (
        _file(
            secure="  custom: [{from: [web], authorizer: a}]\n",
            service="    secure: {custom: [{from: [web], authorizer: b, dry_run: true}, {from: [web], authorizer: c}]}  #!\n",
        ),
        "services.orders.secure.custom[1].authorizer",
        "another rule asks 'a'",
        "may ask several others",
    ),
    "authorizer of a rule that allows": (
        _rule("authorizer: opa"),
        f"{RULE}.authorizer",
        "unknown key",
        "",
    ),
    "system denies everything": (_secure("deny: [{from: ['*']}]"), "secure.deny[0]", "denies every call of everyone", ""),
    "system knows no such caller": (
        _secure("allow: [{from: [wep]}]"),
        "secure.allow[0].from[0]",
        "is no service of this file",
        "did you mean 'web'?",
    ),
    "rule of a name of the system": (
        _file(
            secure="  deny: [{name: a, from: [web]}]\n",
            service="    secure: {allow: [{name: a, from: [web]}]}  #!\n",
        ),
        f"{RULE}.name",
        "another rule is called 'a'",
        "",
    ),
    "rule of the name that asks for a token": (
        _file(
            secure=f"  jwt: {{a: {{{JWT}}}}}\n",
            service="    secure:\n      jwt: {require: [/a]}\n      allow: [{name: orders/jwt, from: [web]}]  #!\n",
        ),
        f"{RULE}.name",
        "another rule is called 'orders/jwt'",
        "",
    ),
    "principals of another system": (_rule("principals: [web]"), f"{RULE}.principals", "unknown key", "did you mean"),
    # ------------------------------------------------------------------------------------------------ identity
    "two identities": (
        _secure("identity: {folder: ids, ca: 'https://ca.test'}"),
        "secure.identity",
        "folder and ca is given",
        "exactly one of folder, files, ca, agent, plugin",
    ),
    "no identity": (_secure("identity: {}"), "secure.identity", "nothing is given", "exactly one of"),
    "identity mistyped": (
        _secure("identity: {foldr: ids}"),
        "secure.identity.foldr",
        "unknown key",
        "did you mean 'folder'?",
    ),
    "setting of no plugin": (
        _secure("identity: {folder: ids, socket: /run/x}"),
        "secure.identity.socket",
        "unknown key",
        "",
    ),
    "files without a key": (
        _secure("identity: {files: {certificate: a, bundle: b}}"),
        "secure.identity.files.key",
        "is missing",
        "private key",
    ),
    "folder of no name": (_secure("identity: {folder: ''}"), "secure.identity.folder", "is no path of a file", "relative"),
    "file that is the key": (
        _secure("identity: {files: {certificate: a, bundle: b, key: '-----BEGIN PRIVATE KEY-----'}}"),
        "secure.identity.files.key",
        "holds the content, not the path",
        "",
    ),
    "ca in plain text": (
        _secure("identity: {ca: 'http://ca.test:8444'}"),
        "secure.identity.ca",
        "is not an https URL",
        "https://",
    ),
    "token for a folder": (
        _secure("identity: {folder: ids, token: t}"),
        "secure.identity.token",
        "only for a CA that is asked",
        "ca: https://ca.host:8444",
    ),
    "state for files": (
        _secure("identity: {files: {certificate: a, key: b, bundle: c}, state: s}"),
        "secure.identity.state",
        "only for a CA that is asked",
        "",
    ),
    "plugin that is a path": (
        _secure("identity: {plugin: a/b}"),
        "secure.identity.plugin",
        "can't be a plugin",
        "meshlib.identity",
    ),
    # ------------------------------------------------------------------------------------------------ federation
    "federation in plain text": (
        _secure("federation: {a.test: {url: 'http://a.test/b', profile: https_web}}"),
        "secure.federation.a.test.url",
        "is not an https URL",
        "",
    ),
    "federation without a profile": (
        _secure("federation: {a.test: {url: 'https://a.test/b'}}"),
        "secure.federation.a.test.profile",
        "can't be guessed",
        "https_web",
    ),
    "federation with ourselves": (
        _secure("federation: {shop.internal: {file: a}}"),
        "secure.federation.shop.internal",
        "is our own trust domain",
        "leave it out",
    ),
    "federation with development": (
        _secure("federation: {dev.meshlib.invalid: {file: a}}"),
        "secure.federation.dev.meshlib.invalid",
        "belongs to `meshlib dev`",
        "",
    ),
    "federation with a URL": (
        _secure("federation: {'https://a.test/b': {file: a}}"),
        "secure.federation.https://a.test/b",
        "can't be a trust domain",
        "",
    ),
    "federation with nothing": (
        _secure("federation: {a.test: {}}"),
        "secure.federation.a.test",
        "nothing says whence its keys",
        "file: partner.json",
    ),
    "federation with a password": (
        _secure("federation: {a.test: {url: 'https://u:hunter2@a.test/b', profile: https_web}}"),
        "secure.federation.a.test.url",
        "holds a name or password",
        "leave it out",
    ),
    "https_spiffe without an identity": (
        _secure("federation: {a.test: {url: 'https://a.test/b', profile: https_spiffe, file: a}}"),
        "secure.federation.a.test.spiffe_id",
        "nobody knows whom to expect",
        "spiffe://a.test/",
    ),
    "https_spiffe of somebody else": (
        _secure(
            "federation: {a.test: {url: 'https://a.test/b', profile: https_spiffe, file: a, spiffe_id: 'spiffe://b.test/x'}}"
        ),
        "secure.federation.a.test.spiffe_id",
        "of another trust domain",
        "spiffe://a.test/",
    ),
    "https_spiffe without a first bundle": (
        _secure("federation: {a.test: {url: 'https://a.test/b', profile: https_spiffe, spiffe_id: 'spiffe://a.test/x'}}"),
        "secure.federation.a.test.file",
        "without a first bundle",
        "file",
    ),
    "https_web with an identity": (
        _secure("federation: {a.test: {url: 'https://a.test/b', profile: https_web, spiffe_id: 'spiffe://a.test/x'}}"),
        "secure.federation.a.test.spiffe_id",
        "https_web asks for no SPIFFE ID",
        "",
    ),
    "every without a url": (
        _secure("federation: {a.test: {file: a, every: 5m}}"),
        "secure.federation.a.test.every",
        "every is only for a url",
        "",
    ),
    "federation every second": (
        _secure("federation: {a.test: {url: 'https://a.test/b', profile: https_web, every: 1s}}"),
        "secure.federation.a.test.every",
        "1.0 is out of range",
        "10 to 86400 s; default 300",
    ),
    "federation into this machine": (
        _secure("federation: {a.test: {url: 'https://[::1]/b', profile: https_web}}"),
        "secure.federation.a.test.url",
        "its host is this machine",
        "local: true",
    ),
    # ------------------------------------------------------------------------------------------------ tokens
    "provider without audiences": (
        _secure("jwt: {a: {issuer: https://a/, jwks: 'https://a/k'}}"),
        "secure.jwt.a.audiences",
        "is missing",
        "No default",
    ),
    "provider of no audience": (
        _secure("jwt: {a: {issuer: https://a/, jwks: 'https://a/k', audiences: []}}"),
        "secure.jwt.a.audiences",
        "is empty",
        "",
    ),
    "provider of any audience": (
        _secure("jwt: {a: {issuer: https://a/, jwks: 'https://a/k', audiences: ['*']}}"),
        "secure.jwt.a.audiences[0]",
        "holds a *",
        "to the letter",
    ),
    "provider of nobody": (
        _secure("jwt: {a: {audiences: [a], jwks: 'https://a/k'}}"),
        "secure.jwt.a",
        "nothing says whose tokens they are",
        "issuer",
    ),
    "provider of two": (
        _secure("jwt: {a: {issuer: https://a/, trust_domain: shop.internal, audiences: [a], jwks: 'https://a/k'}}"),
        "secure.jwt.a",
        "issuer and trust_domain says whose tokens",
        "",
    ),
    "provider without keys": (
        _secure("jwt: {a: {issuer: https://a/, audiences: [a]}}"),
        "secure.jwt.a.jwks",
        "without keys no token could be checked",
        "{file: keys.json}",
    ),
    "provider of a domain that nobody knows": (
        _file(
            secure="  identity: {ca: 'https://ca.test'}\n  jwt: {a: {trust_domain: b.test, audiences: [a]}}  #!\n",
        ),
        "secure.jwt.a.trust_domain",
        "nobody holds the keys of b.test",
        "federation",
    ),
    "two providers of one issuer": (
        _file(secure=f"  jwt:\n    a: {{{JWT}}}\n    b: {{{JWT}}}  #!\n"),
        "secure.jwt.b.issuer",
        "a is of the same issuer",
        "audiences is a list",
    ),
    "shared secret": (
        _secure(f"jwt: {{a: {{{JWT}, algorithms: [HS256]}}}}"),
        "secure.jwt.a.algorithms[0]",
        "who can check such a token can also make one",
        "one of RS256",
    ),
    "no signature": (
        _secure(f"jwt: {{a: {{{JWT}, algorithms: [nOne]}}}}"),
        "secure.jwt.a.algorithms[0]",
        "a token without signature is anybody's",
        "",
    ),
    "algorithm mistyped": (
        _secure(f"jwt: {{a: {{{JWT}, algorithms: [rs256]}}}}"),
        "secure.jwt.a.algorithms[0]",
        "'rs256' is not supported",
        "did you mean 'RS256'?",
    ),
    "no algorithm": (_secure(f"jwt: {{a: {{{JWT}, algorithms: []}}}}"), "secure.jwt.a.algorithms", "is empty", ""),
    "leeway of an hour": (
        _secure(f"jwt: {{a: {{{JWT}, leeway: 1h}}}}"),
        "secure.jwt.a.leeway",
        "3600.0 is out of range",
        "0 to 300 s; default 30",
    ),
    "keys in plain text": (
        _secure("jwt: {a: {issuer: https://a/, audiences: [a], jwks: 'http://a/k'}}"),
        "secure.jwt.a.jwks",
        "is not an https URL",
        "keys of his own",
    ),
    **{
        f"keys from {name}": (
            _secure(f"jwt: {{a: {{issuer: https://a/, audiences: [a], jwks: '{url}'}}}}"),
            "secure.jwt.a.jwks",
            message,
            hint,
        )
        for name, url, message, hint in [
            ("a URL with a space", "https://a b/k", "is not a URL", "https://host/path"),
            ("a URL with an impossible port", "https://a:99999/k", "is not a URL", ""),
            ("a URL with a fragment", "https://a/k#x", "holds a fragment", "leave it out"),
            ("a URL without a host", "https:///k", "has no valid host", ""),
            ("a URL of a strange host", "https://a!b/k", "has no valid host", ""),
        ]
    },
    "audience of nothing": (
        _secure("jwt: {a: {issuer: https://a/, audiences: [''], jwks: 'https://a/k'}}"),
        "secure.jwt.a.audiences[0]",
        "can't be an audience",
        "aud",
    ),
    "token from a strange parameter": (
        _secure(f"jwt: {{a: {{{JWT}, from: [{{query: 'a b'}}]}}}}"),
        "secure.jwt.a.from[0].query",
        "is not the name of a parameter",
        "access_token",
    ),
    "keys from the metadata of a cloud": (
        _secure("jwt: {a: {issuer: https://a/, audiences: [a], jwks: 'https://169.254.169.254/k'}}"),
        "secure.jwt.a.jwks",
        "is link-local",
        "a host outside",
    ),
    "keys from this machine": (
        _secure("jwt: {a: {issuer: https://a/, audiences: [a], jwks: {url: 'https://127.0.0.1/k'}}}"),
        "secure.jwt.a.jwks.url",
        "is this machine",
        "local: true",
    ),
    "keys from nowhere": (
        _secure("jwt: {a: {issuer: https://a/, audiences: [a], jwks: {}}}"),
        "secure.jwt.a.jwks",
        "nothing is given",
        "exactly one of url, file, keys",
    ),
    "keys from two places": (
        _secure("jwt: {a: {issuer: https://a/, audiences: [a], jwks: {url: 'https://a/k', file: k}}}"),
        "secure.jwt.a.jwks",
        "url and file is given",
        "",
    ),
    "local keys of a file": (
        _secure("jwt: {a: {issuer: https://a/, audiences: [a], jwks: {file: k, local: true}}}"),
        "secure.jwt.a.jwks.local",
        "only for a url",
        "",
    ),
    "key that is a secret": (
        _secure("jwt: {a: {issuer: https://a/, audiences: [a], jwks: {keys: [{kty: oct, k: hunter2}]}}}"),
        "secure.jwt.a.jwks.keys[0]",
        "is a shared secret",
        "public keys",
    ),
    "key that is private": (
        _secure("jwt: {a: {issuer: https://a/, audiences: [a], jwks: {keys: [{kty: EC, x: a, y: b, d: hunter2}]}}}"),
        "secure.jwt.a.jwks.keys[0]",
        "is a private key",
        "a new key",
    ),
    "key that is none": (
        _secure("jwt: {a: {issuer: https://a/, audiences: [a], jwks: {keys: [{x: a}]}}}"),
        "secure.jwt.a.jwks.keys[0]",
        "kty is missing",
        "",
    ),
    "token from a word": (
        _secure(f"jwt: {{a: {{{JWT}, from: [barer]}}}}"),
        "secure.jwt.a.from[0]",
        "'barer' is not allowed",
        "did you mean 'bearer'?",
    ),
    "token from two places at once": (
        _secure(f"jwt: {{a: {{{JWT}, from: [{{header: x-a, cookie: b}}]}}}}"),
        "secure.jwt.a.from[0]",
        "header and cookie is given",
        "exactly one of",
    ),
    "token from the cookies": (
        _secure(f"jwt: {{a: {{{JWT}, from: [{{header: cookie}}]}}}}"),
        "secure.jwt.a.from[0].header",
        "told apart by name",
        "{cookie: session}",
    ),
    "prefix of a cookie": (
        _secure(f"jwt: {{a: {{{JWT}, from: [{{cookie: a, prefix: b}}]}}}}"),
        "secure.jwt.a.from[0].prefix",
        "only in a header",
        "",
    ),
    "issuer with a space": (
        _secure("jwt: {a: {issuer: 'https://a /', audiences: [a], jwks: 'https://a/k'}}"),
        "secure.jwt.a.issuer",
        "can't be an issuer",
        "to the letter",
    ),
    "provider unknown": (
        _file(
            secure=f"  jwt: {{auth0: {{{JWT}}}}}\n",
            service="    secure: {jwt: {providers: [auth]}}  #!\n",
        ),
        "services.orders.secure.jwt.providers[0]",
        "'auth' is no provider",
        "did you mean 'auth0'?",
    ),
    "provider twice": (
        _file(
            secure=f"  jwt: {{auth0: {{{JWT}}}}}\n",
            service="    secure: {jwt: {providers: [auth0, auth0]}}  #!\n",
        ),
        "services.orders.secure.jwt.providers[1]",
        "stands here twice",
        "once",
    ),
    "required path with a query": (
        _service("secure: {jwt: {require: ['/a?b']}}"),
        "services.orders.secure.jwt.require[0]",
        "holds a query",
        "",
    ),
    # ------------------------------------------------------------------------------------------------ proxies and the rest
    "proxies of nobody": (_secure("proxies: {hops: 2}"), "secure.proxies", "names nobody", "identities"),
    "proxies of everyone": (
        _secure("proxies: {identities: ['*']}"),
        "secure.proxies.identities[0]",
        "believes everyone",
        "your proxies",
    ),
    "proxies in every network": (
        _secure("proxies: {cidrs: [0.0.0.0/0]}"),
        "secure.proxies.cidrs[0]",
        "is everyone",
        "as small as",
    ),
    "proxies that are no service": (
        _secure("proxies: {identities: [wep]}"),
        "secure.proxies.identities[0]",
        "is no service",
        "did you mean 'web'?",
    ),
    "proxies without end": (
        _secure("proxies: {identities: [web], hops: 11}"),
        "secure.proxies.hops",
        "11 is out of range",
        "0 to 10 proxies; default 1",
    ),
    "xfcc of Envoy": (
        _secure("xfcc: SANITIZE_SET"),
        "secure.xfcc",
        "'SANITIZE_SET' is not allowed",
        "did you mean 'sanitize_set'?",
    ),
    "paths of another word": (_secure("paths: merge"), "secure.paths", "'merge' is not allowed", "canonical, strict, redirect"),
    "record of a number": (_secure("record: 1"), "secure.record", "must be true, false or a folder", ".meshlib/traffic"),
    # ------------------------------------------------------------------------------------------------ egress
    "egress mistyped": (_system("egress: dney"), "egress", "'dney' is not allowed", "did you mean 'deny'?"),
    "egress to everyone": (
        _system("egress: {policy: deny, hosts: ['*']}"),
        "egress.hosts[0]",
        "'*' is every host",
        "policy: allow",
    ),
    "egress to a URL": (
        _system("egress: {policy: deny, hosts: ['https://a.test']}"),
        "egress.hosts[0]",
        "is a URL, not a host",
        "api.stripe.com",
    ),
    "egress to a port": (
        _system("egress: {policy: deny, hosts: ['a.test:443']}"),
        "egress.hosts[0]",
        "holds a port",
        "leave it out",
    ),
    "egress to an inner star": (
        _system("egress: {policy: deny, hosts: ['a.*.test']}"),
        "egress.hosts[0]",
        "a * may only stand for one whole name",
        '"*.github.com"',
    ),
    "egress to half a name": (
        _system("egress: {policy: deny, hosts: ['*github.com']}"),
        "egress.hosts[0]",
        "a * may only stand for one whole name",
        "",
    ),
    "egress to a strange name": (
        _system("egress: {policy: deny, hosts: ['a b.test']}"),
        "egress.hosts[0]",
        "is no host",
        "api.stripe.com",
    ),
    "egress to a bare name": (_system("egress: {policy: deny, hosts: [web]}"), "egress.hosts[0]", "a bare name is a service", ""),
    "egress to a whole country": (
        _system("egress: {policy: deny, hosts: ['*.com']}"),
        "egress.hosts[0]",
        "a whole top-level domain",
        "",
    ),
    "egress in capitals": (
        _system("egress: {policy: deny, hosts: [API.test]}"),
        "egress.hosts[0]",
        "form in which hosts are compared",
        "api.test",
    ),
    "credential in the file": (
        _system("egress: {credentials: [{host: a.test, env: A, value: hunter2}]}"),
        "egress.credentials[0].value",
        "a secret has no place in this file",
        "env: the name of a variable",
    ),
    "credential in place of its variable": (
        _system("egress: {credentials: [{host: a.test, env: sk-hunter2}]}"),
        "egress.credentials[0].env",
        "is not the name of an environment variable",
        "stays out of this file",
    ),
    "credential of nothing": (
        _system("egress: {credentials: [{host: a.test}]}"),
        "egress.credentials[0]",
        "nothing is given",
        "exactly one of env, file",
    ),
    "credential of two": (
        _system("egress: {credentials: [{host: a.test, env: A, file: b}]}"),
        "egress.credentials[0]",
        "env and file is given",
        "",
    ),
    "credential for many": (
        _system("egress: {credentials: [{host: '*.a.test', env: A}]}"),
        "egress.credentials[0].host",
        "is more than one host",
        "one entry for each host",
    ),
    "credential in two entries": (
        _file(system="egress:\n  credentials:\n    - {host: a.test, env: A}\n    - {host: a.test, env: B}  #!\n"),
        "egress.credentials[1]",
        "from another entry, too",
        "one for each host",
    ),
    "credential as a host": (
        _system("egress: {credentials: [{host: a.test, env: A, header: host}]}"),
        "egress.credentials[0].header",
        "is about the message",
        "authorization",
    ),
    "credential after a line break": (
        _system('egress: {credentials: [{host: a.test, env: A, prefix: "a\\r\\nb"}]}'),
        "egress.credentials[0].prefix",
        "can't stand before a token",
        "",
    ),
    # ------------------------------------------------------------------------------------------------ where nobody should look
    "check of a URL": (
        _service("admit: {check: {path: 'http://169.254.169.254/'}}"),
        "services.orders.admit.check.path",
        "can't be asked for",
        "/healthz",
    ),
    "check of another host": (
        _service("admit: {check: {path: //169.254.169.254/latest}}"),
        "services.orders.admit.check.path",
        "can't be asked for",
        "",
    ),
    "endpoint that is a number in disguise": (
        _file(service="  meta:\n    discover: {static: ['0xa9fea9fe:80']}  #!\n"),
        "services.meta.discover.static[0]",
        "has no valid host",
        "",
    ),
    "endpoint on the own link": (
        _file(service="  meta:\n    discover: {static: ['[fe80::1]:80']}  #!\n"),
        "services.meta.discover.static[0]",
        "is link-local",
        "",
    ),
    "endpoint where a cloud hands out credentials": (
        _file(service="  meta:\n    discover: {static: ['169.254.169.254:80']}  #!\n"),
        "services.meta.discover.static[0]",
        "is link-local",
        "",
    ),
}


def _problems(file: Path) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load(file, service="orders")
    return caught.value.problems


@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "_"))
def test_each_mistake_is_one_problem_at_its_line(case: str, write: Write) -> None:
    """File, line, key, what is wrong, what is allowed; and nothing beside it."""
    text, key, message, hint = CASES[case]
    file = write(text)
    line = next(number for number, content in enumerate(text.splitlines(), 1) if "#!" in content)
    problems = _problems(file)
    assert [(str(file), line, key)] == [(problem.file, problem.line, problem.key) for problem in problems]
    assert message in problems[0].message
    assert hint in problems[0].hint
    assert "hunter2" not in str(problems[0])


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "[::1]", "localhost", "a.localhost", "169.254.169.254", "[fe80::1]", "[::ffff:169.254.169.254]", "0.0.0.0",
        "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "127.1", "[fd00:ec2::254]", "metadata.google.internal", "127.0.0.1.",
    ],
)  # fmt: skip
def test_keys_are_not_fetched_from_this_machine(host: str, write: Write) -> None:
    """Whatever way its address is written; and they are if somebody says so."""
    text = _secure(f"jwt: {{a: {{issuer: https://a/, audiences: [a], jwks: {{url: 'https://{host}:8443/k'}}}}}}")
    assert [problem.key for problem in _problems(write(text))] == ["secure.jwt.a.jwks.url"]
    config = load(write(text.replace("/k'}", "/k', local: true}")), service="orders")
    assert config.jwt["a"].jwks.can_be_local


@pytest.mark.parametrize("host", ["id.shop.test", "10.0.0.7", "192.168.1.1", "[2001:db8::7]", "1a.test", "a-1", "keys.internal."])
def test_keys_are_fetched_from_the_own_network(host: str, write: Write) -> None:
    """Private addresses are what most keys come from."""
    text = _secure(f"jwt: {{a: {{issuer: https://a/, audiences: [a], jwks: 'https://{host}/k'}}}}")
    assert load(write(text), service="orders").jwt["a"].jwks.url == f"https://{host}/k"


@pytest.mark.parametrize(
    "keys",
    [
        "egress: {credentials: [hunter2]}",
        "egress: {credentials: [{host: a.test, env: hunter2-x}]}",
        "egress: {credentials: [{host: a.test, env: [hunter2]}]}",
        "egress: {credentials: [{host: a.test, env: A, prefix: {hunter2: 1}}]}",
        "egress: {credentials: [{host: a.test, env: A, header: 'Bearer hunter2'}]}",
        "egress: {credentials: [{host: a.test, password: hunter2}]}",
        "egress: {credentials: [{host: a.test, file: 'https://x:hunter2@y'}]}",
    ],
)
def test_a_credential_is_in_no_mistake(keys: str, write: Write) -> None:
    """What stands where a secret's name should stand may be the secret."""
    problems = _problems(write(_system(keys)))
    assert problems
    assert "hunter2" not in "".join(map(str, problems))
