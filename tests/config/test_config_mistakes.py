"""Is every mistake found, at its line, with what is allowed, and all of them at once?

Each case is a file in which `#!` marks the line where the problem must be reported.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from meshlib.config import load, read_endpoints
from meshlib.errors import ConfigError, Problem

HEAD = """\
mesh: shop
secure:
  mode: enforce
  identity: {folder: ./identities}
"""

SERVICES = """\
services:
  web:
    listen: 127.0.0.1:8000
  orders:
    discover: {static: ["127.0.0.1:8101"]}
"""

# name: (text, key, part of the message, part of the hint)
CASES: dict[str, tuple[str, str, str, str]] = {
    "mode missing": (
        "mesh: shop\nsecure:  #!\n  identity: {folder: x}\n" + SERVICES,
        "secure.mode",
        "is missing",
        "observe, permissive, enforce",
    ),
    "mode mistyped": (
        "mesh: shop\nsecure:\n  mode: enforced  #!\n  identity: {folder: x}\n" + SERVICES,
        "secure.mode",
        "'enforced' is not allowed",
        "did you mean 'enforce'?",
    ),
    "mesh missing": ("secure: {mode: observe}  #!\n" + SERVICES, "mesh", "is missing", "name of the system"),
    "services missing": (HEAD.replace("shop", "shop  #!"), "services", "is missing", ""),
    "services empty": (HEAD + "services: {}  #!\n", "services", "is empty", "at least one"),
    "key mistyped": (HEAD + "egres: allow  #!\n" + SERVICES, "egres", "unknown key", "did you mean 'egress'?"),
    "key of another system": (
        HEAD + "timeout: 5  #!\n" + SERVICES,
        "timeout",
        "unknown key",
        "did you mean 'deadline'?",
    ),
    "key of a service mistyped": (
        HEAD + SERVICES + "    protcol: http  #!\n",
        "services.orders.protcol",
        "unknown key",
        "did you mean 'protocol'?",
    ),
    "key of a rule mistyped": (
        HEAD + SERVICES + "    secure: {allow: [{from: ['*'], metods: [GET]}]}  #!\n",
        "services.orders.secure.allow[0].metods",
        "unknown key",
        "did you mean 'methods'?",
    ),
    "not a mapping": (HEAD + SERVICES + "    retry: 3  #!\n", "services.orders.retry", "must be a mapping, not 3", ""),
    "not a list": (
        HEAD + SERVICES + "    route: {match: {}}  #!\n",
        "services.orders.route",
        "must be a list, not a mapping",
        "",
    ),
    "no value": (HEAD + SERVICES + "    admit:  #!\n", "services.orders.admit", "has no value", "leave the key out"),
    "identity without a value": (
        "mesh: shop\nsecure:\n  mode: enforce\n  identity:  #!\n" + SERVICES,
        "secure.identity",
        "has no value",
        "",
    ),
    "too many retries": (
        HEAD + SERVICES + "    retry: {attempts: 6}  #!\n",
        "services.orders.retry.attempts",
        "6 is out of range",
        "0 to 5 retries; default 1",
    ),
    "retries below 0": (
        HEAD + "retry: {attempts: -1}  #!\n" + SERVICES,
        "retry.attempts",
        "-1 is out of range",
        "0 to 5",
    ),
    "half a retry": (
        HEAD + "retry: {attempts: 1.5}  #!\n" + SERVICES,
        "retry.attempts",
        "must be a whole number, not 1.5",
        "0 to 5",
    ),
    "number in quotes": (
        HEAD + 'retry: {attempts: "1"}  #!\n' + SERVICES,
        "retry.attempts",
        "must be a whole number, not '1'",
        "0 to 5",
    ),
    "yes is a word": (
        HEAD + "retry: {idempotency_key: yes}  #!\n" + SERVICES,
        "retry.idempotency_key",
        "must be true or false, not 'yes'",
        "default false",
    ),
    "status that is none": (
        HEAD + "retry: {statuses: [503, 200]}  #!\n" + SERVICES,
        "retry.statuses",
        "200 is out of range",
        "500 to 599",
    ),
    "backoff turned round": (
        HEAD + "retry: {backoff: [250ms, 25ms]}  #!\n" + SERVICES,
        "retry.backoff",
        "larger than the second",
        "[least, most]",
    ),
    "backoff of one value": (
        HEAD + "retry: {backoff: [1]}  #!\n" + SERVICES,
        "retry.backoff[1]",
        "is missing",
        "0.001 to 60 s",
    ),
    "backoff of three values": (
        HEAD + "retry: {backoff: [1, 2, 3]}  #!\n" + SERVICES,
        "retry.backoff",
        "must be a list of two values",
        "0.001 to 60 s",
    ),
    "backoff out of range": (
        HEAD + "retry: {backoff: [1, 99]}  #!\n" + SERVICES,
        "retry.backoff",
        "99 is out of range",
        "0.001 to 60 s",
    ),
    "budget for a route": (
        HEAD + SERVICES + "    route: [{retry: {budget: {ratio: 1}}}]  #!\n",
        "services.orders.route[0].retry.budget",
        "unknown key",
        "attempts, backoff",
    ),
    "idempotent for a service": (
        HEAD + SERVICES + "    retry: {idempotent: true}  #!\n",
        "services.orders.retry.idempotent",
        "unknown key",
        "",
    ),
    "no duration": (HEAD + "deadline: 5 minutes  #!\n" + SERVICES, "deadline", "is not a duration", "250ms, 2s, 5m"),
    "duration of nothing": (
        HEAD + "deadline: 0  #!\n" + SERVICES,
        "deadline",
        "0.0 is out of range",
        "0.001 to 3600 s",
    ),
    "duration true": (HEAD + "deadline: true  #!\n" + SERVICES, "deadline", "must be a duration", "250ms"),
    "policy unknown": (
        HEAD + "balance: {policy: peak-ewma}  #!\n" + SERVICES,
        "balance.policy",
        "'peak-ewma' is not allowed",
        "did you mean 'peak_ewma'?",
    ),
    "share above 1": (HEAD + "observe: {sample: 50}  #!\n" + SERVICES, "observe.sample", "out of range", "0 to 1"),
    "address without port": (
        HEAD + "services:\n  web:\n    listen: localhost  #!\n",
        "services.web.listen",
        "has no port",
        "host:port",
    ),
    "address with scheme": (
        HEAD + 'services:\n  web: {discover: {static: ["http://a:80"]}}  #!\n',
        "services.web.discover.static[0]",
        "is a URL, not an address",
        "host:port",
    ),
    "endpoint on port 0": (
        HEAD + 'services:\n  web: {discover: {static: ["127.0.0.1:0"]}}  #!\n',
        "services.web.discover.static[0]",
        "impossible port",
        "1 to 65535",
    ),
    "endpoint anywhere": (
        HEAD + 'services:\n  web: {discover: {static: ["0.0.0.0:80"]}}  #!\n',
        "services.web.discover.static[0]",
        "an address to listen on",
        "",
    ),
    "endpoint twice": (
        HEAD
        + 'services:\n  web:\n    discover:\n      static:\n        - "127.0.0.1:1"\n'
        + '        - {address: "127.0.0.1:1"}  #!\n',
        "services.web.discover.static[1].address",
        "stands here twice",
        "weight",
    ),
    "endpoints of weight 0": (
        HEAD + 'services:\n  web: {discover: {static: [{address: "127.0.0.1:1", weight: 0}]}}  #!\n',
        "services.web.discover.static",
        "weight 0",
        "",
    ),
    "no endpoints": (
        HEAD + "services:\n  web: {discover: {static: []}}  #!\n",
        "services.web.discover.static",
        "is empty",
        "",
    ),
    "two ways to discover": (
        HEAD + 'services:\n  web: {discover: {static: ["127.0.0.1:1"], file: e.yaml}}  #!\n',
        "services.web.discover",
        "static and file is given",
        "exactly one of static, file, dns",
    ),
    "no way to discover": (
        HEAD + "services:\n  web: {discover: {}}  #!\n",
        "services.web.discover",
        "nothing is given",
        "exactly one",
    ),
    "every without dns": (
        HEAD + "services:\n  web: {discover: {file: e.yaml, every: 5}}  #!\n",
        "services.web.discover.every",
        "only dns",
        "tell by themselves",
    ),
    "registry that there is not": (
        HEAD + "registries: {consul: {}}\nservices:\n  web:\n    discover: {registry: consol}  #!\n",
        "services.web.discover.registry",
        "the registry 'consol' is not configured",
        "did you mean 'consul'?",
    ),
    "registry that there is not, in a word": (
        HEAD + "services:\n  web:\n    register: consul  #!\n    listen: 127.0.0.1:1\n",
        "services.web.register",
        "the registry 'consul' is not configured",
        "a section `registries: {consul: {…}}`",
    ),
    "registered, but nowhere": (
        HEAD + "registries: {consul: {}}\nservices:\n  web:\n    register: consul  #!\n",
        "services.web.register",
        "nothing says where",
        "listen: 0.0.0.0:8443",
    ),
    "key of a plugin without a plugin": (
        HEAD + "services:\n  web:\n    discover:\n      static: ['127.0.0.1:1']\n      tags: [blue]  #!\n",
        "services.web.discover.tags",
        "unknown key",
        "allowed: static, file, dns, srv, registry, every",
    ),
    "srv without a protocol": (
        HEAD + "services:\n  web:\n    discover: {srv: orders.example}  #!\n",
        "services.web.discover.srv",
        "is not a name of SRV records",
        "_http._tcp",
    ),
    "delegated to nobody": (
        HEAD + "delegate: agent  #!\n" + SERVICES,
        "delegate",
        "there is no agent in this file",
        "agent: {ca: ca",
    ),
    "identity of nobody": (
        "mesh: shop\nsecure:\n  mode: enforce\n  identity: {agent: true}  #!\n" + SERVICES,
        "secure.identity.agent",
        "there is no agent in this file",
        "agent: {ca: ca",
    ),
    "identity at no socket": (
        "mesh: shop\nsecure:\n  mode: enforce\n  identity: {agent: 'unix:relative'}  #!\n" + SERVICES,
        "secure.identity.agent",
        "is not a plain absolute path",
        "/run/meshlib/agent.sock",
    ),
    "agent without a source": (HEAD + "agent:  #!\n  entries: []\n" + SERVICES, "agent", "nothing is given", "exactly one of ca"),
    "agent with two sources": (
        HEAD + "agent: {ca: ca, enrol: 'https://ca:1'}  #!\n" + SERVICES,
        "agent",
        "ca and enrol is given",
        "exactly one of ca",
    ),
    "agent with one path twice": (
        HEAD + "agent:\n  ca: ca\n  socket: /run/a.sock\n  data: /run/a.sock  #!\n" + SERVICES,
        "agent.data",
        "/run/a.sock is socket, too",
        "a path for each",
    ),
    "agent at an abstract socket": (
        HEAD + "agent:\n  ca: ca\n  data: '@meshlib'  #!\n" + SERVICES,
        "agent.data",
        "is an abstract socket",
        "an absolute path",
    ),
    "entry of no service": (
        HEAD + "agent:\n  ca: ca\n  entries:\n    - {service: ordrs, uid: 1}  #!\n" + SERVICES,
        "agent.entries[0].service",
        "there is no service 'ordrs'",
        "did you mean 'orders'?",
    ),
    "entry of everybody": (
        HEAD + "agent:\n  ca: ca\n  entries:\n    - {service: orders}  #!\n" + SERVICES,
        "agent.entries[0].uid",
        "is missing",
        "",
    ),
    "token that nobody takes": (
        HEAD + "agent:\n  ca: ca\n  entries:\n    - {service: orders, uid: 1, token: t}  #!\n" + SERVICES,
        "agent.entries[0].token",
        "token is only for a CA that is asked",
        "enrol: https",
    ),
    "handed over to no agent": (
        HEAD + "services:\n  web:\n    listen: 127.0.0.1:1\n    inbound:\n      agent: /run/web.sock  #!\n",
        "services.web.inbound.agent",
        "there is no agent in this file",
        "agent: {ca: ca",
    ),
    "label is a number": (
        HEAD + 'services:\n  web: {discover: {static: [{address: "127.0.0.1:1", labels: {version: 1.1}}]}}  #!\n',
        "services.web.discover.static[0].labels.version",
        "must be a word",
        'put it in quotes: "1.1"',
    ),
    "service name": (
        HEAD + "services:\n  Web_1: {}  #!\n",
        "services.Web_1",
        "can't be a name",
        "small letters",
    ),
    "trust domain": (
        "mesh: shop\nsecure:\n  mode: observe\n  trust_domain: Shop.Internal  #!\n" + SERVICES,
        "secure.trust_domain",
        "can't be a trust domain",
        "small letters",
    ),
    "trust domain of development": (
        "mesh: shop\nsecure:\n  mode: observe\n  trust_domain: dev.meshlib.invalid  #!\n" + SERVICES,
        "secure.trust_domain",
        "belongs to `meshlib dev`",
        "your own",
    ),
    "rule for the domain of development": (
        HEAD + SERVICES + "    secure:\n      allow:\n        - from: ['spiffe://dev.meshlib.invalid/*']  #!\n",
        "services.orders.secure.allow[0].from[0]",
        "belongs to `meshlib dev`",
        "",
    ),
    "identity missing": (
        "mesh: shop\nsecure:  #!\n  mode: permissive\n" + SERVICES,
        "secure.identity",
        "is missing",
        "meshlib ca issue",
    ),
    "identity missing for one": (
        "mesh: shop\nsecure:  #!\n  mode: observe\n" + SERVICES + "    secure: {mode: enforce}\n",
        "secure.identity",
        "is missing, and orders can't prove",
        "",
    ),
    "identity that is none": (
        HEAD + SERVICES + "    identity: orders  #!\n",
        "services.orders.identity",
        "is not a SPIFFE ID",
        "spiffe://",
    ),
    "identity without path": (
        HEAD + SERVICES + "    identity: spiffe://shop.internal  #!\n",
        "services.orders.identity",
        "has no valid path",
        "",
    ),
    "identity with a dot segment": (
        HEAD + SERVICES + "    identity: spiffe://shop.internal/a/../b  #!\n",
        "services.orders.identity",
        "has no valid path",
        "",
    ),
    "identity with a port": (
        HEAD + SERVICES + "    identity: spiffe://shop.internal:80/a  #!\n",
        "services.orders.identity",
        "no valid trust domain",
        "",
    ),
    "caller unknown": (
        HEAD + SERVICES + "    secure:\n      allow:\n        - from: [web, weeb]  #!\n",
        "services.orders.secure.allow[0].from[1]",
        "'weeb' is no service",
        "did you mean 'web'?",
    ),
    "caller with an inner star": (
        HEAD + SERVICES + "    secure:\n      allow:\n        - from: ['spiffe://shop.internal/*/web']  #!\n",
        "services.orders.secure.allow[0].from[0]",
        "only stand at the end",
        "",
    ),
    "caller of any trust domain": (
        HEAD + SERVICES + "    secure:\n      allow:\n        - from: ['spiffe://shop.internal*']  #!\n",
        "services.orders.secure.allow[0].from[0]",
        "other trust domains",
        "spiffe://shop.internal/*",
    ),
    "name with a star": (
        HEAD + SERVICES + "    secure:\n      allow:\n        - from: ['web*']  #!\n",
        "services.orders.secure.allow[0].from[0]",
        "is no caller",
        "",
    ),
    "rule without from": (
        HEAD + SERVICES + "    secure:\n      allow:\n        - methods: [GET]  #!\n",
        "services.orders.secure.allow[0].from",
        "is missing",
        "anyone",
    ),
    "rule from nobody": (
        HEAD + SERVICES + "    secure:\n      allow:\n        - from: []  #!\n",
        "services.orders.secure.allow[0].from",
        "is empty",
        "",
    ),
    "rule of an existing name": (
        HEAD + SERVICES + "    secure:\n      allow: [{name: a, from: [web]}]\n      deny: [{name: a, from: [web]}]  #!\n",
        "services.orders.secure.deny[0].name",
        "another rule is called 'a'",
        "",
    ),
    "deny everything": (
        HEAD + SERVICES + "    secure:\n      deny: [{from: ['*']}]  #!\n",
        "services.orders.secure.deny[0]",
        "denies every call of everyone",
        "name callers",
    ),
    "method in small letters": (
        HEAD + SERVICES + "    secure: {allow: [{from: [web], methods: [post]}]}  #!\n",
        "services.orders.secure.allow[0].methods[0]",
        "'post' is not an HTTP method",
        "POST, in capitals",
    ),
    "method mistyped": (
        HEAD + SERVICES + "    secure: {deny: [{from: [web], methods: [DELTE]}]}  #!\n",
        "services.orders.secure.deny[0].methods[0]",
        "'DELTE' is not an HTTP method",
        "did you mean 'DELETE'?",
    ),
    "methods of gRPC": (
        HEAD + SERVICES + "    protocol: grpc\n    secure: {allow: [{from: [web], methods: [GET]}]}  #!\n",
        "services.orders.secure.allow[0].methods",
        "every gRPC call is a POST",
        "leave methods out",
    ),
    "route that no gRPC call takes": (
        HEAD + SERVICES + "    protocol: grpc\n    route: [{match: {methods: [GET]}}]  #!\n",
        "services.orders.route[0].match.methods",
        "every gRPC call is a POST",
        "",
    ),
    "rule path without a slash": (
        HEAD + SERVICES + "    secure: {deny: [{from: [web], paths: [admin]}]}  #!\n",
        "services.orders.secure.deny[0].paths[0]",
        "does not begin with /",
        "absolute",
    ),
    "rule path that is a star": (
        HEAD + SERVICES + "    secure: {allow: [{from: [web], paths: ['*']}]}  #!\n",
        "services.orders.secure.allow[0].paths[0]",
        "is no path",
        "/* is every path",
    ),
    "rule path with an inner star": (
        HEAD + SERVICES + "    secure: {deny: [{from: [web], paths: ['/a/*/b']}]}  #!\n",
        "services.orders.secure.deny[0].paths[0]",
        "only stand at one end",
        "",
    ),
    "rule path with an escape": (
        HEAD + SERVICES + "    secure: {deny: [{from: [web], paths: ['/a%2Fb']}]}  #!\n",
        "services.orders.secure.deny[0].paths[0]",
        "holds an escape",
        "decoded form",
    ),
    "rule path with dots": (
        HEAD + SERVICES + "    secure: {deny: [{from: [web], paths: ['/a/../b']}]}  #!\n",
        "services.orders.secure.deny[0].paths[0]",
        "is not canonical",
        "",
    ),
    "rule path with two slashes": (
        HEAD + SERVICES + "    secure: {deny: [{from: [web], paths: ['//admin*']}]}  #!\n",
        "services.orders.secure.deny[0].paths[0]",
        "is not canonical",
        "",
    ),
    "rule path with a query": (
        HEAD + SERVICES + "    secure: {deny: [{from: [web], paths: ['/a?b']}]}  #!\n",
        "services.orders.secure.deny[0].paths[0]",
        "query",
        "",
    ),
    "template with half a variable": (
        HEAD + SERVICES + "    route: [{match: {path: {template: '/items/x-{id}'}}}]  #!\n",
        "services.orders.route[0].match.path.template",
        "is not a whole variable",
        "/items/{id}",
    ),
    "template with an open brace": (
        HEAD + SERVICES + "    route: [{match: {path: {template: '/items/{id'}}}]  #!\n",
        "services.orders.route[0].match.path.template",
        "is not a whole variable",
        "",
    ),
    "template with a variable twice": (
        HEAD + SERVICES + "    route: [{match: {path: {template: '/{id}/{id}'}}}]  #!\n",
        "services.orders.route[0].match.path.template",
        "stands there twice",
        "",
    ),
    "template under prefix": (
        HEAD + SERVICES + "    route: [{match: {path: {prefix: '/items/{id}'}}}]  #!\n",
        "services.orders.route[0].match.path.prefix",
        "looks like a template",
        "template:",
    ),
    "star under prefix": (
        HEAD + SERVICES + "    route: [{match: {path: {prefix: '/items/*'}}}]  #!\n",
        "services.orders.route[0].match.path.prefix",
        "holds a *",
        "",
    ),
    "two kinds of path": (
        HEAD + SERVICES + "    route: [{match: {path: {exact: /a, prefix: /b}}}]  #!\n",
        "services.orders.route[0].match.path",
        "exact and prefix is given",
        "exactly one of exact, prefix, template",
    ),
    "path is a word": (
        HEAD + SERVICES + "    route: [{match: {path: /a}}]  #!\n",
        "services.orders.route[0].match.path",
        "must be a mapping, not '/a'",
        "",
    ),
    "header without condition": (
        HEAD + SERVICES + "    route: [{match: {headers: [{name: x-beta}]}}]  #!\n",
        "services.orders.route[0].match.headers[0]",
        "no condition is given",
        "exactly one of exact, prefix, present",
    ),
    "header is not there": (
        HEAD + SERVICES + "    route: [{match: {headers: [{name: x-beta, present: false}]}}]  #!\n",
        "services.orders.route[0].match.headers[0].present",
        "false is not allowed",
        "true",
    ),
    "header with capitals": (
        HEAD + SERVICES + "    route: [{match: {headers: [{name: X-Beta, present: true}]}}]  #!\n",
        "services.orders.route[0].match.headers[0].name",
        "holds capitals",
        "x-beta",
    ),
    "header with an underscore": (
        HEAD + SERVICES + "    route: [{match: {headers: [{name: x_beta, present: true}]}}]  #!\n",
        "services.orders.route[0].match.headers[0].name",
        "underscore",
        "hyphens",
    ),
    "header value is a number": (
        HEAD + SERVICES + "    route: [{match: {headers: [{name: x-beta, exact: 1}]}}]  #!\n",
        "services.orders.route[0].match.headers[0].exact",
        "must be a word",
        "put it in quotes",
    ),
    "labels nobody carries": (
        HEAD
        + 'services:\n  orders:\n    discover: {static: [{address: "127.0.0.1:1", labels: {version: v1}}]}\n'
        + "    route:\n      - backends:\n          - {labels: {version: v11}}  #!\n",
        "services.orders.route[0].backends[0].labels",
        "no static endpoint carries version=v11",
        "did you mean 'version=v1'?",
    ),
    "labels for dns": (
        HEAD + 'services:\n  orders:\n    discover: {dns: "orders:80"}\n    route: [{backends: [{labels: {a: b}}]}]  #!\n',
        "services.orders.route[0].backends[0].labels",
        "carry no labels",
        "",
    ),
    "labels twice": (
        HEAD
        + 'services:\n  orders:\n    discover: {static: [{address: "127.0.0.1:1", labels: {v: a}}]}\n'
        + "    route:\n      - backends:\n          - {labels: {v: a}}\n          - {labels: {v: a}}  #!\n",
        "services.orders.route[0].backends[1]",
        "another backend of this route",
        "",
    ),
    "weights all 0": (
        HEAD + SERVICES + "    route:\n      - backends: [{weight: 0}]  #!\n",
        "services.orders.route[0].backends",
        "all weights are 0",
        "at least one",
    ),
    "weight below 0": (
        HEAD + SERVICES + "    route:\n      - backends: [{weight: -1}]  #!\n",
        "services.orders.route[0].backends[0].weight",
        "-1 is out of range",
        "0 to 1e+06",
    ),
    "route of an existing name": (
        HEAD + SERVICES + "    route:\n      - {name: a, match: {methods: [GET]}}\n      - {name: a}  #!\n",
        "services.orders.route[1].name",
        "another route is called 'a'",
        "",
    ),
    "name with a line break": (
        HEAD + SERVICES + '    route: [{name: "a\\nb"}]  #!\n',
        "services.orders.route[0].name",
        "can't be a name",
        "printable",
    ),
    "duration that is a list": (
        HEAD + "deadline: [1]  #!\n" + SERVICES,
        "deadline",
        "must be a duration",
        "250ms",
    ),
    "address of a bad IPv6": (
        HEAD + "services:\n  web: {listen: '[::g]:80'}  #!\n",
        "services.web.listen",
        "is not an IPv6 address",
        "host:port",
    ),
    "address of a bad IPv4": (
        HEAD + "services:\n  web: {listen: '127.0.0.256:80'}  #!\n",
        "services.web.listen",
        "is not an IPv4 address",
        "host:port",
    ),
    "address of a bad host": (
        HEAD + "services:\n  web: {listen: 'a b:80'}  #!\n",
        "services.web.listen",
        "has no valid host",
        "IPv6 in brackets",
    ),
    "address of IPv6 without brackets": (
        HEAD + "services:\n  web: {listen: '::1:80'}  #!\n",
        "services.web.listen",
        "has no valid host",
        "IPv6 in brackets",
    ),
    "identity too long": (
        HEAD + SERVICES + f"    identity: spiffe://shop.internal/{'a' * 2048}  #!\n",
        "services.orders.identity",
        "longer than 2048 bytes",
        "",
    ),
    "namespace": (
        "mesh: shop\nsecure:\n  mode: observe\n  namespace: a/b  #!\n" + SERVICES,
        "secure.namespace",
        "can't be a namespace",
        "small letters",
    ),
    "rule path with a backslash": (
        HEAD + SERVICES + "    secure: {deny: [{from: [web], paths: ['/a\\b']}]}  #!\n",
        "services.orders.secure.deny[0].paths[0]",
        "no canonical path holds",
        "no backslash",
    ),
    "rule path with a control character": (
        HEAD + SERVICES + '    secure: {deny: [{from: [web], paths: ["/a\\tb"]}]}  #!\n',
        "services.orders.secure.deny[0].paths[0]",
        "no canonical path holds",
        "no control",
    ),
    "rule path of a template and a star": (
        HEAD + SERVICES + "    secure: {deny: [{from: [web], paths: ['/{id}/*']}]}  #!\n",
        "services.orders.secure.deny[0].paths[0]",
        "mixes a template and a *",
        "",
    ),
    "header of two words": (
        HEAD + SERVICES + "    route: [{match: {headers: [{name: x beta, present: true}]}}]  #!\n",
        "services.orders.route[0].match.headers[0].name",
        "is not a header name",
        "x-beta",
    ),
    "label without a letter": (
        HEAD + 'services:\n  web: {discover: {static: [{address: "127.0.0.1:1", labels: {version: ""}}]}}  #!\n',
        "services.web.discover.static[0].labels.version",
        "1 to 253 characters",
        "",
    ),
    "policy without a key": (
        HEAD + SERVICES + "    balance: {policy: ring_hash}  #!\n",
        "services.orders.balance.policy",
        "ring_hash without hash_on",
        "hash_on: [{header: x-user}]",
    ),
    "policy without a key after an override": (
        HEAD + SERVICES + "    balance:\n      policy: maglev  #!\n      hash_on: []\n",
        "services.orders.balance.policy",
        "maglev without hash_on",
        "hash_on",
    ),
    "hash on two things": (
        HEAD + SERVICES + "    balance: {policy: maglev, hash_on: [{header: x-user, cookie: a}]}  #!\n",
        "services.orders.balance.hash_on[0]",
        "header and cookie is given",
        "exactly one of header, cookie, path, peer",
    ),
    "hash on nothing": (
        HEAD + SERVICES + "    balance: {policy: maglev, hash_on: [{}]}  #!\n",
        "services.orders.balance.hash_on[0]",
        "no condition is given",
        "exactly one of",
    ),
    "hash on something unknown": (
        HEAD + SERVICES + "    balance: {policy: maglev, hash_on: [{heder: x-user}]}  #!\n",
        "services.orders.balance.hash_on[0].heder",
        "unknown key",
        "did you mean 'header'?",
    ),
    "hash on a header with capitals": (
        HEAD + SERVICES + "    balance: {policy: maglev, hash_on: [{header: X-User}]}  #!\n",
        "services.orders.balance.hash_on[0].header",
        "holds capitals",
        "x-user",
    ),
    "hash on a bad cookie": (
        HEAD + SERVICES + "    balance: {policy: maglev, hash_on: [{cookie: 'a=b'}]}  #!\n",
        "services.orders.balance.hash_on[0].cookie",
        "is not a cookie's name",
        "session",
    ),
    "hash on a variable in braces": (
        HEAD + SERVICES + "    balance: {policy: maglev, hash_on: [{path: '{id}'}]}  #!\n",
        "services.orders.balance.hash_on[0].path",
        "is not a variable's name",
        "/items/{id}",
    ),
    "hash on no peer": (
        HEAD + SERVICES + "    balance: {policy: maglev, hash_on: [{peer: false}]}  #!\n",
        "services.orders.balance.hash_on[0].peer",
        "false is not allowed",
        "true",
    ),
    "hash on a variable of no route": (
        HEAD
        + SERVICES
        + "    balance: {policy: maglev, hash_on: [{path: idd}]}  #!\n    route: [{match: {path: {template: '/items/{id}'}}}]\n",
        "services.orders.balance.hash_on[0].path",
        "no template of a route has {idd}",
        "did you mean 'id'? variables there are: id",
    ),
    "bound just above the mean": (
        HEAD + SERVICES + "    balance: {policy: maglev, hash_on: [{peer: true}], hash_bound: 1.01}  #!\n",
        "services.orders.balance.hash_bound",
        "1.01 is out of range",
        "0 (off), or 1.05 to 10",
    ),
    "ring of nothing": (
        HEAD + SERVICES + "    balance: {policy: ring_hash, hash_on: [{peer: true}], ring_size: 0}  #!\n",
        "services.orders.balance.ring_size",
        "0 is out of range",
        "1 to 8.38861e+06 points; default 1024",
    ),
    "table of no prime": (
        HEAD + SERVICES + "    balance: {policy: maglev, hash_on: [{peer: true}], table_size: 65536}  #!\n",
        "services.orders.balance.table_size",
        "65536 is not a prime",
        "the next one is 65537",
    ),
    "table too large": (
        HEAD + SERVICES + "    balance: {policy: maglev, hash_on: [{peer: true}], table_size: 5000012}  #!\n",
        "services.orders.balance.table_size",
        "5000012 is out of range",
        "default 65537",
    ),
    "sticky by two things": (
        HEAD + SERVICES + "    balance: {sticky: {cookie: a, header: b}}  #!\n",
        "services.orders.balance.sticky",
        "cookie and header is given",
        "exactly one of cookie, header",
    ),
    "sticky by nothing": (
        HEAD + SERVICES + "    balance: {sticky: {}}  #!\n",
        "services.orders.balance.sticky",
        "no condition is given",
        "exactly one of cookie, header",
    ),
    "sticky by a word": (
        HEAD + SERVICES + "    balance: {sticky: session}  #!\n",
        "services.orders.balance.sticky",
        "must be a mapping, not 'session'",
        "",
    ),
    "locality mistyped": (
        HEAD + SERVICES + "    balance: {locality: zoneaware}  #!\n",
        "services.orders.balance.locality",
        "'zoneaware' is not allowed",
        "did you mean 'zone_aware'?",
    ),
    "zone without a name": (
        HEAD + SERVICES + "    balance: {locality: failover, zones: [' ']}  #!\n",
        "services.orders.balance.zones[0]",
        "can't be a zone",
        "eu-west-1a",
    ),
    "zone of a process": (
        HEAD + SERVICES + "    zone: eu-1  #!\n",
        "services.orders.zone",
        "unknown key",
        "MESHLIB_ZONE",
    ),
    "overprovisioning below 1": (
        HEAD + SERVICES + "    balance: {locality: failover, overprovisioning: 0.9}  #!\n",
        "services.orders.balance.overprovisioning",
        "0.9 is out of range",
        "1 to 100; default 1.4",
    ),
    "orca mistyped": (
        HEAD + SERVICES + "    balance: {weights: orca, orca: {black_out: 5s}}  #!\n",
        "services.orders.balance.orca.black_out",
        "unknown key",
        "did you mean 'blackout'?",
    ),
    "slow start from nothing": (
        HEAD + SERVICES + "    balance: {slow_start_least: 0}  #!\n",
        "services.orders.balance.slow_start_least",
        "out of range",
        "0.001 to 1; default 0.1",
    ),
    "throttle of all": (
        HEAD + SERVICES + "    admit: {throttle: 1}  #!\n",
        "services.orders.admit.throttle",
        "1 is out of range",
        "0 (off), or 1.1 to 10",
    ),
    "slow rate of nothing": (
        HEAD + SERVICES + "    admit: {breaker: {slow_rate: 0.2}}  #!\n",
        "services.orders.admit.breaker.slow_rate",
        "slow_rate without slow",
        "slow: 1s",
    ),
    "limits that fall": (
        HEAD + SERVICES + "    admit: {adaptive: gradient, adaptive_limits: {least: 30}}  #!\n",
        "services.orders.admit.adaptive_limits",
        "least 30, initial 20, most 1000 don't rise",
        "least <= initial <= most",
    ),
    "adaptive is no switch": (
        HEAD + SERVICES + "    admit: {adaptive: true}  #!\n",
        "services.orders.admit.adaptive",
        "true is not allowed",
        "one of off, gradient",
    ),
    "check slower than its interval": (
        HEAD + SERVICES + "    admit: {check: {every: 500ms}}  #!\n",
        "services.orders.admit.check.every",
        "timeout 1 s is not below every 0.5 s",
        "timeout below every",
    ),
    "check of another kind": (
        HEAD + SERVICES + "    admit: {check: {kind: https}}  #!\n",
        "services.orders.admit.check.kind",
        "'https' is not allowed",
        "did you mean 'http'?",
    ),
    "check of no path": (
        HEAD + SERVICES + "    admit: {check: {path: healthz}}  #!\n",
        "services.orders.admit.check.path",
        "can't be asked for",
        "/healthz",
    ),
    "check by its usual name": (
        HEAD + SERVICES + "    admit: {health_check: {}}  #!\n",
        "services.orders.admit.health_check",
        "unknown key",
        "did you mean 'check'?",
    ),
    "rate without calls": (
        HEAD + SERVICES + "    admit: {rate: [{per: 1s}]}  #!\n",
        "services.orders.admit.rate[0].calls",
        "is missing",
        "No default",
    ),
    "rate of no calls": (
        HEAD + SERVICES + "    admit: {rate: [{calls: 0}]}  #!\n",
        "services.orders.admit.rate[0].calls",
        "0 is out of range",
        "1 to 1000000000",
    ),
    "rate by something unknown": (
        HEAD + SERVICES + "    admit: {rate: [{calls: 1, by: [rout]}]}  #!\n",
        "services.orders.admit.rate[0].by[0]",
        "'rout' is not allowed",
        "did you mean 'route'?",
    ),
    "rate by nothing": (
        HEAD + SERVICES + "    admit: {rate: [{calls: 1, by: []}]}  #!\n",
        "services.orders.admit.rate[0].by",
        "is empty",
        "at least one",
    ),
    "rate by two things at once": (
        HEAD + SERVICES + "    admit: {rate: [{calls: 1, by: [{header: x-a, peer: true}]}]}  #!\n",
        "services.orders.admit.rate[0].by[0]",
        "peer and header is given",
        "exactly one of",
    ),
    "rate by a header with an underscore": (
        HEAD + SERVICES + "    admit: {rate: [{calls: 1, by: [{header: x_tenant}]}]}  #!\n",
        "services.orders.admit.rate[0].by[0].header",
        "underscore",
        "hyphens",
    ),
    "rate in no store": (
        HEAD + SERVICES + "    admit: {rate: [{calls: 1, store: redis}]}  #!\n",
        "services.orders.admit.rate[0].store",
        "the store 'redis' is not configured",
        "stores: {redis: {url: …}}",
    ),
    "rate in a mistyped store": (
        HEAD + SERVICES + "    admit: {rate: [{calls: 1, store: redsi}]}  #!\nstores: {redis: {url: a}}\n",
        "services.orders.admit.rate[0].store",
        "is not configured",
        "did you mean 'redis'?",
    ),
    "rates of one name": (
        HEAD + SERVICES + "    admit:\n      rate:\n        - {name: a, calls: 1}\n        - {name: a, calls: 2}  #!\n",
        "services.orders.admit.rate[1].name",
        "another rate is called 'a'",
        "by name",
    ),
    "condition mistyped": (
        HEAD + SERVICES + "    retry: {on: [conect]}  #!\n",
        "services.orders.retry.on[0]",
        "'conect' is not allowed",
        "did you mean 'connect'?",
    ),
    "no condition": (
        HEAD + SERVICES + "    route: [{retry: {on: []}}]  #!\n",
        "services.orders.route[0].retry.on",
        "is empty",
        "at least one",
    ),
    "attempt without an end": (
        HEAD + SERVICES + "    retry: {per_try: -1}  #!\n",
        "services.orders.retry.per_try",
        "-1.0 is out of range",
        "0 to 3600 s",
    ),
    "hedge of the median": (
        HEAD + SERVICES + "    route: [{retry: {hedge: true, hedge_quantile: 0.4}}]  #!\n",
        "services.orders.route[0].retry.hedge_quantile",
        "0.4 is out of range",
        "0.5 to 0.999; default 0.95",
    ),
    "guard of everything": (
        HEAD + SERVICES + "guards: {'*': {deadline: 1s}}  #!\n",
        "guards.*",
        "can't be a guard",
        "@mesh.guard",
    ),
    "guard with statuses": (
        HEAD + SERVICES + "guards: {ledger: {retry: {statuses: [503]}}}  #!\n",
        "guards.ledger.retry.statuses",
        "unknown key",
        "attempts, backoff, idempotent",
    ),
    "guard with a connection": (
        HEAD + SERVICES + "guards: {ledger: {admit: {connect: 1s}}}  #!\n",
        "guards.ledger.admit.connect",
        "unknown key",
        "in_flight",
    ),
    "guard counted by a header": (
        HEAD + SERVICES + "guards: {ledger: {admit: {rate: [{calls: 1, by: [{header: x-a}]}]}}}  #!\n",
        "guards.ledger.admit.rate[0].by[0]",
        "a function has no headers",
        "service",
    ),
    "guard counted in a store": (
        HEAD + SERVICES + "stores: {redis: {url: a}}\nguards: {ledger: {admit: {rate: [{calls: 1, store: redis}]}}}  #!\n",
        "guards.ledger.admit.rate[0].store",
        "counted in its own process",
        "leave store out",
    ),
    "guard whose limits fall": (
        HEAD + SERVICES + "guards: {ledger: {admit: {adaptive: gradient, adaptive_limits: {most: 10}}}}  #!\n",
        "guards.ledger.admit.adaptive_limits",
        "don't rise",
        "least <= initial",
    ),
    "store of the name local": (
        HEAD + SERVICES + "stores:\n  local: {url: a}  #!\n",
        "stores.local",
        "local is no store",
        "redis",
    ),
    "store out of time": (
        HEAD + SERVICES + "stores: {redis: {timeout: 1h}}  #!\n",
        "stores.redis.timeout",
        "what stands here is out of range",
        "0.001 to 10 s; default 0.05",
    ),
    "duplicate key": (
        HEAD + SERVICES + "  orders:  #!\n    listen: 127.0.0.1:1\n",
        "services.orders",
        "a second time (first: line 8)",
        "keep one",
    ),
}


def _problems(file: Path, **named: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load(file, **named)
    return caught.value.problems


@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "_"))
def test_each_mistake_is_one_problem_at_its_line(case: str, write: Callable[..., Path]) -> None:
    """File, line, key, what is wrong, what is allowed; and nothing beside it."""
    text, key, message, hint = CASES[case]
    file = write(text)
    line = next(number for number, content in enumerate(text.splitlines(), 1) if "#!" in content)
    problems = _problems(file, service="orders")
    assert [(str(file), line, key)] == [(problem.file, problem.line, problem.key) for problem in problems]
    assert message in problems[0].message
    assert hint in problems[0].hint


def test_five_mistakes_are_five_problems(write: Callable[..., Path]) -> None:
    """A mistyped key, a bad value, a bad address, an unknown caller and labels that nobody carries, all at once."""
    file = write("""\
        mesh: shop
        secure:
          mode: enfroce
          identity: {folder: ./identities}
        deadlin: 5
        services:
          web:
            listen: 127.0.0.1
          orders:
            discover: {static: ["127.0.0.1:8101"]}
            route:
              - backends: [{labels: {version: v1}}]
            secure:
              allow: [{from: [wep]}]
        """)
    problems = _problems(file)
    expected = [
        (3, "secure.mode"),
        (5, "deadlin"),
        (8, "services.web.listen"),
        (12, "services.orders.route[0].backends[0].labels"),
        (14, "services.orders.secure.allow[0].from[0]"),
    ]
    assert expected == [(problem.line, problem.key) for problem in problems]
    assert all(problem.hint for problem in problems)


def test_mistakes_show_only_where_levels_meet(write: Callable[..., Path]) -> None:
    """System and service are read as one; each mistake is told once, where the last word was said."""
    file = write("""\
        mesh: shop
        secure: {mode: observe}
        balance:
          policy: ring_hash
          hash_on: [{path: id}]
        admit:
          breaker: {slow_rate: 0.2}
          adaptive_limits: {least: 10}
          check: {timeout: 5s}
        services:
          a:
            admit:
              adaptive_limits: {initial: 5}
              check: {every: 2s}
          b: {}
          c: {balance: {hash_on: []}}
        """)
    expected = [
        (4, "balance.policy"),
        (5, "balance.hash_on[0].path"),
        (7, "admit.breaker.slow_rate"),
        (13, "services.a.admit.adaptive_limits"),
        (14, "services.a.admit.check.every"),
    ]
    assert expected == [(problem.line, problem.key) for problem in _problems(file, service="a")]


def test_what_a_service_adds_makes_the_system_right(write: Callable[..., Path]) -> None:
    """No mistake where each one that follows has what is needed, or where a check is off."""
    file = write("""\
        mesh: shop
        secure: {mode: observe}
        balance: {policy: maglev, hash_on: [{path: id}]}
        admit: {breaker: {slow_rate: 0.2}, check: {every: 500ms}}
        services:
          a:
            route: [{match: {path: {template: "/{id}"}}}]
            admit: {breaker: {slow: 1s}, check: off}
          b: {balance: {hash_on: [{header: x-user}]}, admit: {check: {timeout: 300ms}}}
          c: {admit: {check: {timeout: 200ms}}}
        """)
    config = load(file, service="a")
    assert [one.check and one.check.timeout for one in config.services.values()] == [None, 0.3, 0.2]


def test_a_mistake_of_the_system_is_told_once(write: Callable[..., Path]) -> None:
    """However many services inherit it."""
    file = write("""\
        mesh: shop
        secure: {mode: observe}
        balance: {policy: ring_hash}
        services: {a: {}, b: {}}
        """)
    assert [(problem.line, problem.key) for problem in _problems(file, service="a")] == [(3, "balance.policy")]


def test_a_password_is_in_no_mistake(write: Callable[..., Path]) -> None:
    """What stands under `stores` is never shown, whatever is wrong with it."""
    for stores in ("redis: 'redis://:hunter2@h'", "redis: ['hunter2']", "redis: {url: [hunter2]}"):
        problems = _problems(write(HEAD + SERVICES + f"stores: {{{stores}}}\n"), service="orders")
        assert len(problems) == 1
        assert "hunter2" not in str(problems[0])


@pytest.mark.parametrize(
    "tail",
    [
        "stores: {redis: {url: 'redis://x', timeout: hunter2}}",
        "stores: {redis: {url: 'redis://x', timeout: 'redis://:hunter2@h'}}",
        "stores: {'redis://:hunter2@h:6379/0': {}}",
        "stores: {'redis://h?password=hunter2': {url: 7}}",
        "stores: {'redis://:hunter2@h': {}, 'redis://:hunter2@h': {}}",
        "stores: {redis: {'redis://:hunter2@h':}}",
        "stores: {rediss: {url: 'redis://x', timeout: 1m}}\nadmit: {rate: [{calls: 1, store: 'redis://:hunter2@h'}]}",
        "admit: {rate: [{calls: 1, store: 'default:hunter2@h:6379'}]}",
        f"admit: {{rate: [{{calls: 1, store: 'redis://{'x' * 30}:hunter2{'x' * 30}@h'}}]}}",
        "admit: {rate: 'redis://:hunter2@h'}",
        "deadline: 'redis://:hunter2@h'",
        "egress: 'redis://:p@hunter2@h'",
        f"retry: 'redis://:{'x' * 30}hunter2{'x' * 30}@h'",
        "'redis://:hunter2@h': 1",
    ],
)
def test_a_password_is_shown_nowhere_that_people_put_a_url(tail: str, write: Callable[..., Path]) -> None:
    """As a key, in place of a store's name, of a time, of a section; the mistake is told all the same."""
    problems = _problems(write(HEAD + SERVICES + tail + "\n"), service="orders")
    assert problems
    assert "hunter2" not in "".join(map(str, problems))


def test_what_grpc_does_not_count_is_no_limit(write: Callable[..., Path]) -> None:
    """A limit that would hold nobody is a mistake, also one of the system; one of its own takes that one's place."""
    file = write("""\
        mesh: shop
        secure: {mode: observe}
        stores: {redis: {url: "redis://host"}}
        admit: {rate: [{calls: 9}, {calls: 1, store: redis}]}
        services:
          web: {}
          a:
            protocol: grpc
          b: {protocol: grpc, admit: {rate: [{calls: 1}]}}
          c: {protocol: grpc, admit: {rate: []}}
          d:
            protocol: grpc
            admit: {rate: [{calls: 1, by: [peer], store: redis}]}
        """)
    problems = _problems(file, service="web")
    assert [(problem.line, problem.key) for problem in problems] == [
        (8, "services.a.protocol"),
        (13, "services.d.admit.rate[0].store"),
    ]
    assert all("not counted in redis yet" in problem.message and "local" in problem.hint for problem in problems)
    assert "admit.rate[1]" in problems[0].message


def test_a_zone_of_the_process_is_checked(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no key of the file, and its mistakes are told like those of one."""
    file = write("mesh: m\nsecure: {mode: observe}\nservices: {a: {}}\n")
    monkeypatch.setenv("MESHLIB_ZONE", "a\tb")
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert [(problem.key, bool(problem.hint)) for problem in caught.value.problems] == [("MESHLIB_ZONE", True)]
    with pytest.raises(ConfigError, match="can't be a zone"):
        load(file, zone=" ")


def test_the_error_text_has_a_line_for_each_problem(write: Callable[..., Path]) -> None:
    """`file:line: key: message (hint)`, so that editors find the place."""
    file = write("mesh: shop\nsecure: {mode: observe}\nservices: {a: {listen: x}, b: {listen: y}}\n")
    with pytest.raises(ConfigError) as caught:
        load(file)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{file}:3: services.a.listen: 'x' has no port (host:port")


def test_a_long_value_is_cut_in_messages(write: Callable[..., Path]) -> None:
    """An error message is a line to read, not a dump; what was pasted by mistake doesn't end up in a log as a whole."""
    file = write(f"mesh: shop\nsecure: {{mode: {'x' * 500}}}\nservices: {{a: {{}}}}\n")
    assert len(_problems(file)[0].message) < 100


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "the file is empty"),
        ("# nothing\n", 1, "the file is empty"),
        ("- a\n- b\n", 1, "must be a mapping, not a list"),
        ("mesh\n", 1, "must be a mapping, not 'mesh'"),
        ("mesh: shop\nsecure: {mode: observe\nservices: {}\n", 3, "not valid YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_one_problem(text: str, line: int, message: str, write: Callable[..., Path]) -> None:
    """Empty, a list, a word, broken: one clear problem with a line."""
    problems = _problems(write(text))
    assert [line] == [problem.line for problem in problems]
    assert message in problems[0].message


def test_a_missing_file_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a name, ./mesh.yaml is looked for; the hint names `meshlib init`."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load()
    assert "mesh.yaml:1: (file): is not there (`meshlib init` writes one" in str(caught.value)


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    """What the operating system says is passed on in one line."""
    assert "can't be read: is a directory" in _problems(tmp_path)[0].message


def test_text_in_another_encoding_is_refused_with_its_line(tmp_path: Path) -> None:
    """UTF-8 only; the line of the first bad byte."""
    file = tmp_path / "mesh.yaml"
    file.write_bytes(b"mesh: shop\nsecure: {mode: observe} # caf\xe9\n")
    assert [(problem.line, problem.message) for problem in _problems(file)] == [(2, "is not UTF-8 text")]


def test_an_unknown_service_is_told_with_its_near_match(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether an argument or MESHLIB_SERVICE named it."""
    file = write(HEAD + SERVICES)
    problem = _problems(file, service="order")[0]
    assert (problem.line, problem.key, problem.message) == (5, "service", "'order' is no service of this file")
    assert problem.hint == "did you mean 'orders'? one of web, orders"
    monkeypatch.setenv("MESHLIB_SERVICE", "wob")
    assert _problems(file)[0].key == "MESHLIB_SERVICE"


def test_with_several_services_one_must_be_named(write: Callable[..., Path]) -> None:
    """Who this process is, is never guessed."""
    problem = _problems(write(HEAD + SERVICES))[0]
    assert "unknown which service this process is" in problem.message
    assert problem.hint == "one of web, orders"


def test_endpoint_files_are_checked_like_static_endpoints(write: Callable[..., Path]) -> None:
    """A list of addresses or mappings, with the same strictness and lines."""
    good = write('- "127.0.0.1:1"\n- {address: "127.0.0.1:2", labels: {version: v2}, weight: 2}\n', "good.yaml")
    assert [(endpoint.address, endpoint.weight, endpoint.labels) for endpoint in read_endpoints(good)] == [
        ("127.0.0.1:1", 1.0, {}),
        ("127.0.0.1:2", 2.0, {"version": "v2"}),
    ]
    assert read_endpoints(write("", "empty.yaml")) == ()
    bad = write('- "127.0.0.1"\n- {adress: "127.0.0.1:2"}\n- "127.0.0.1:3"\n- "127.0.0.1:3"\n', "bad.yaml")
    with pytest.raises(ConfigError) as caught:
        read_endpoints(bad)
    assert sorted((problem.line, problem.key) for problem in caught.value.problems) == [
        (1, "[0]"),
        (2, "[1].address"),
        (2, "[1].adress"),
    ]
    twice = write('- "127.0.0.1:3"\n- "127.0.0.1:3"\n', "twice.yaml")
    with pytest.raises(ConfigError, match="stands here twice"):
        read_endpoints(twice)
