"""What may a user write about who is trusted, and with whose word?

The types of `secure`, of a service's `secure`, and of `egress`; the rest of the file is in `document.py`, where it is said
how these classes are meant. One rule has all conditions of Istio's AuthorizationPolicy. No secret
stands in this file: keys, tokens and credentials are named by a file or an environment variable, and whoever writes
one in place of its name is told so without being shown it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from .agent_values import workload_socket
from .defaults import setting
from .rule_values import (
    Caller,
    HostPattern,
    NamespacePattern,
    Network,
    PathRegex,
    Pattern,
    Port,
    ProxyNetwork,
    RulePath,
    TokenPrincipal,
    WhenKey,
)
from .section import Closed, Section
from .secure_values import (
    Algorithm,
    Audience,
    CredentialHeader,
    CredentialHost,
    EgressHost,
    Environment,
    FilePath,
    HttpsUrl,
    Issuer,
    Parameter,
    PluginName,
    Record,
    TokenPrefix,
)
from .values import (
    CookieName,
    HeaderName,
    Method,
    Name,
    Namespace,
    Seconds,
    SpiffeId,
    Title,
    TrustDomain,
    refuse,
    word_of,
)

Mode = Literal["observe", "permissive", "enforce"]


# ---------------------------------------------------------------- identity: ours, and whom we believe


class Files(Section):
    """Files that somebody else keeps up to date: Kubernetes, cert-manager, Docker."""

    certificate: FilePath = Field(description="The certificate and its intermediates, PEM.")
    key: FilePath = Field(description="Its private key, PEM; no other user may read it.")
    bundle: FilePath = Field(description="The roots of the own trust domain, PEM or SPIFFE bundle.")
    crl: FilePath | None = Field(default=None, description="Which certificates were revoked, PEM.")


def _agent(value: Any) -> Any:
    if isinstance(value, str):
        return workload_socket(value)
    if value is not True:
        refuse(f"{value!r} is no socket", "true for the socket of `agent`, or unix:///run/meshlib/agent.sock")
    return value


AgentWay = Annotated[Literal[True] | str, BeforeValidator(_agent, json_schema_input_type=Literal[True] | str)]


class IdentityWay(Closed):
    """Where certificate, key and trust bundle come from: exactly one of `folder`, `files`, `ca`, `agent`, `plugin`."""

    model_config = ConfigDict(extra="allow")

    folder: FilePath | None = Field(
        default=None, description="A folder: <folder>/<service>/{svid.pem,key.pem,bundle.pem}; relative to this file."
    )
    files: Files | None = Field(default=None, description="Single files, relative to this file.")
    ca: HttpsUrl | None = Field(default=None, description="Where `meshlib ca serve` runs: https://ca.host:8444")
    token: FilePath | None = Field(default=None, description="With `ca`: the file of the one-use token; removed when used.")
    state: FilePath | None = setting("secure.identity.state")
    agent: AgentWay | None = Field(default=None, description="true: the node agent's socket; or another: unix:///path")
    plugin: PluginName | None = Field(default=None, description="A source of identities; it gets all keys beside it.")


class Trusted(Section):
    """Another trust domain: whence its keys."""

    file: FilePath | None = Field(default=None, description="Its bundle, SPIFFE (JSON) or PEM; with `url`, the first one.")
    url: HttpsUrl | None = Field(default=None, description="Its bundle endpoint.")
    profile: Literal["https_web", "https_spiffe"] | None = Field(
        default=None, description="How its endpoint proves who it is: https_web or https_spiffe. With `url`; no default."
    )
    spiffe_id: SpiffeId | None = Field(default=None, description="With https_spiffe: the ID of the endpoint.")
    every: Seconds = setting("secure.federation.every")
    local: bool = setting("secure.federation.local")


# ---------------------------------------------------------------- tokens


class Jwks(Closed):
    """The keys of an issuer: exactly one of `url`, `file`, `keys`."""

    url: HttpsUrl | None = Field(default=None, description="Fetched, and again when a key is unknown.")
    file: FilePath | None = Field(default=None, description="A JWKS document, relative to this file.")
    keys: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)] | None = Field(
        default=None, description="The public keys themselves, as in a JWKS document."
    )
    local: bool = setting("secure.jwt.local")


def _from_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class TokenFrom(Section):
    """Where a token is looked for: exactly one of `header`, `cookie`, `query`."""

    header: HeaderName | None = Field(default=None, description="A request header.")
    prefix: TokenPrefix | None = Field(default=None, description='What stands before it. Default: "Bearer " in authorization.')
    cookie: CookieName | None = Field(default=None, description="A cookie.")
    query: Parameter | None = Field(default=None, description="A parameter of the query. It stands in logs: rather not.")


def _bearer(value: Any) -> Any:
    return word_of(value, ("bearer",), {"bearer": {"header": "authorization"}}, "bearer, {header: …}, {cookie: …} or {query: …}")


class Provider(Section):
    """Whose tokens are believed, and how far."""

    issuer: Issuer | None = Field(default=None, description="What the tokens have under iss, to the letter.")
    trust_domain: TrustDomain | None = Field(
        default=None, description="In place of issuer: tokens are JWT-SVIDs of this trust domain, signed by its bundle's keys."
    )
    audiences: tuple[Audience, ...] = Field(
        min_length=1, description="Words for us; a token must have one under aud. No default."
    )
    jwks: Annotated[Jwks, BeforeValidator(_from_url, json_schema_input_type=Jwks | str)] | None = Field(
        default=None, description="The issuer's keys: an https URL, {file: keys.json} or {keys: […]}."
    )
    algorithms: Annotated[tuple[Algorithm, ...], Field(min_length=1)] = setting("secure.jwt.algorithms")
    leeway: Seconds = setting("secure.jwt.leeway")
    longest: Seconds = setting("secure.jwt.longest")
    from_: Annotated[
        tuple[Annotated[TokenFrom, BeforeValidator(_bearer, json_schema_input_type=TokenFrom | Literal["bearer"])], ...],
        Field(min_length=1),
    ] = setting("secure.jwt.from", alias="from")
    forward: bool = setting("secure.jwt.forward")


# ---------------------------------------------------------------- rules


def _none() -> Any:
    return Field(default=(), description="None of these may match.")


class When(Section):
    """One more condition: what is asked for, and which values it must, or must not, have."""

    key: WhenKey = Field(description="request.headers[name], request.auth.claims[name], source.ip, …")
    values: tuple[Pattern, ...] = Field(default=(), description="One of them must match.")
    not_values: tuple[Pattern, ...] = Field(default=(), description="None of them may match.")


class Rule(Section):
    """Which calls a rule speaks of: all conditions hold at once, one entry of each list is enough; of `not_` lists none matches."""

    name: Title | None = Field(default=None, description='In logs and refusals. Default: "<service>/allow/<index>".')
    from_: tuple[Caller, ...] = Field(
        alias="from", min_length=1, description='Services, SPIFFE IDs (a * at the end = any rest) or "*" (anyone).'
    )
    not_from: tuple[Caller, ...] = Field(default=(), description="As from: none of these.")
    trust_domains: tuple[TrustDomain, ...] = Field(default=(), description="For callers such as */ns/a/sa/x: in these domains.")
    namespaces: tuple[NamespacePattern, ...] = Field(default=(), description="What stands in the caller's SPIFFE ID after /ns/.")
    not_namespaces: tuple[NamespacePattern, ...] = _none()
    request_principals: tuple[TokenPrincipal, ...] = Field(
        default=(), description="<iss>/<sub> of the token; * = any valid token."
    )
    not_request_principals: tuple[TokenPrincipal, ...] = _none()
    ip_blocks: tuple[Network, ...] = Field(default=(), description="Networks of the one who connects to us.")
    not_ip_blocks: tuple[Network, ...] = _none()
    remote_ip_blocks: tuple[Network, ...] = Field(default=(), description="Networks of the client, as trusted proxies tell.")
    not_remote_ip_blocks: tuple[Network, ...] = _none()
    methods: tuple[Method, ...] = Field(default=(), description="HTTP methods; none means all.")
    not_methods: tuple[Method, ...] = _none()
    paths: tuple[RulePath, ...] = Field(default=(), description="Exact, with a * at one end, or templates; none means all.")
    not_paths: tuple[RulePath, ...] = _none()
    path_regexes: tuple[PathRegex, ...] = Field(default=(), description="Expressions for the whole path, beside paths.")
    not_path_regexes: tuple[PathRegex, ...] = _none()
    case: Literal["sensitive", "insensitive"] = setting("secure.case")
    hosts: tuple[HostPattern, ...] = Field(default=(), description="What the caller wrote as host; without port.")
    not_hosts: tuple[HostPattern, ...] = _none()
    ports: tuple[Port, ...] = Field(default=(), description="Our own, on which the call came in.")
    not_ports: tuple[Port, ...] = _none()
    when: tuple[When, ...] = Field(default=(), description="Further conditions; all of them hold.")
    dry_run: bool = setting("secure.dry_run")


class CustomRule(Rule):
    """Calls that a function of the application is asked about."""

    authorizer: Title = Field(description='The name in the code: @mesh.authorizer("<name>").')


class Required(Section):
    """Which tokens count for a service, and where one must be there."""

    providers: tuple[Name, ...] | None = Field(default=None, description="Of secure.jwt. Default: all of them.")
    require: tuple[RulePath, ...] = Field(default=(), description="On these paths a call without a valid token is refused.")


class ServiceSecure(Section):
    """What is different for this service's own listener, and who may call it."""

    mode: Mode | None = Field(default=None, description="Instead of the system's mode, for calls to this service.")
    allow: tuple[Rule, ...] = Field(default=(), description="In mode enforce, what no rule allows is denied.")
    deny: tuple[Rule, ...] = Field(default=(), description="Wins over allow.")
    custom: tuple[CustomRule, ...] = Field(default=(), description="Asked first; who is refused there is refused.")
    jwt: Required = Field(default_factory=Required, description="Tokens, beside certificates.")
    peer_check: Literal["auto", "dns", "spiffe"] = setting("secure.peer_check")


# ---------------------------------------------------------------- what stands in front, and what goes out


class Proxies(Section):
    """Who is believed about where a call comes from."""

    identities: tuple[Caller, ...] = Field(default=(), description="Services or SPIFFE IDs of proxies.")
    cidrs: tuple[ProxyNetwork, ...] = Field(default=(), description="Networks of proxies without identity.")
    hops: int = setting("secure.proxies.hops")


class Secure(Section):
    """Who is trusted, and how much of it is enforced."""

    mode: Mode = Field(description="observe reports, permissive uses mTLS where the peer can, enforce demands it. No default.")
    trust_domain: TrustDomain | None = Field(
        default=None, description='The domain of all SPIFFE IDs. Default: "<mesh>.internal".'
    )
    namespace: Namespace = setting("secure.namespace")
    identity: IdentityWay | None = Field(default=None, description="Needed unless the mode is observe everywhere.")
    federation: dict[TrustDomain, Trusted] = Field(default_factory=dict, description="Other trust domains, by their name.")
    paths: Literal["canonical", "strict", "redirect"] = setting("secure.paths")
    jwt: dict[Name, Provider] = Field(default_factory=dict, description="Whose tokens are believed, by a name of your own.")
    proxies: Proxies | None = Field(default=None, description="Nobody is believed by default.")
    xfcc: Literal["sanitize", "sanitize_set", "append_forward"] = setting("secure.xfcc")
    record: Record = setting("secure.record")
    allow: tuple[Rule, ...] = Field(default=(), description="For all services, beside their own.")
    deny: tuple[Rule, ...] = Field(default=(), description="For all services; wins over every allow.")
    custom: tuple[CustomRule, ...] = Field(default=(), description="For all services.")


class Credential(Closed):
    """What an outside API wants to see, kept out of the application's hands: exactly one of `env` and `file`."""

    host: CredentialHost = Field(description="To this host only, and only over https.")
    header: CredentialHeader = setting("egress.credentials.header")
    prefix: TokenPrefix | None = Field(default=None, description='What stands before it. Default: "Bearer " in authorization.')
    env: Environment | None = Field(default=None, description="The environment variable that holds it.")
    file: FilePath | None = Field(default=None, description="The file that holds it, relative to this file.")


class Egress(Section):
    """Calls to hosts that are no service."""

    policy: Literal["allow", "deny"] = setting("egress")
    hosts: tuple[EgressHost, ...] = Field(
        default=(), description='With deny: these may be called. "*.x.com" is one name before x.com.'
    )
    credentials: tuple[Credential, ...] = Field(default=(), description="Added on the way out, and shown nowhere.")


def _from_policy(value: Any) -> Any:
    return {"policy": value} if isinstance(value, str) else value


EgressOrWord = Annotated[Egress, BeforeValidator(_from_policy, json_schema_input_type=Egress | Literal["allow", "deny"])]
