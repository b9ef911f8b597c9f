"""What may a single value look like where it is said with whose keys, and where a secret is?

URLs from which keys are fetched, tokens, hosts outside, files, environment variables: as in `values.py`, each is a type
that refuses what it can't mean. What might be a secret in the place of its name is refused without being shown.
Nothing here asks a network or reads a file.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator

from .rule_values import is_ip
from .values import DISGUISED, HOST, header_name, near, refuse

# What a JWT-SVID may be signed with (JWT-SVID 2.1), as far as every build of the core can check it.
SVID_ALGORITHMS: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384")
ALGORITHMS: Final = (*SVID_ALGORITHMS, "ES512", "EdDSA")

_ENVIRONMENT: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_PARAMETER: Final = re.compile(r"[A-Za-z0-9._~-]{1,100}\Z")
_PLUGIN: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?\Z")
# Where clouds hand out credentials to whoever asks from this machine; not all of it is link-local.
_METADATA: Final = frozenset({"fd00:ec2::254", "100.100.100.200", "metadata.google.internal", "metadata"})
# What tells how a message is framed or forwarded is no place for a credential.
_FRAMING: Final = frozenset(
    ("host", "content-length", "transfer-encoding", "connection", "keep-alive", "te", "trailer", "upgrade", "proxy-connection")
)


# ---------------------------------------------------------------- networks and URLs


def https_url(value: str) -> str:
    """An https URL without credentials."""
    hint = "https://host/path, such as https://id.shop.example/keys.json"
    if not value.isascii() or not value.isprintable() or " " in value or "\\" in value:
        refuse("is not a URL", hint)
    try:
        parts = urlsplit(value)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        refuse(f"{value!r} is not a URL", hint)
    if parts.scheme != "https":
        refuse(f"{value!r} is not an https URL", "whoever sits on the way could put keys of his own into anything else; " + hint)
    if "@" in parts.netloc:
        refuse("the URL holds a name or password", "leave it out: nothing is sent with such a request")
    if "#" in value:
        refuse(f"{value!r} holds a fragment", "it is never sent; leave it out")
    if not host or port == 0 or not (HOST.match(host.removesuffix(".")) or is_ip(host)):
        refuse(f"{value!r} has no valid host", hint)
    return value


def inward(url: str) -> str:
    """What is wrong with the host of a URL from which keys are fetched: "" if it lies outside this machine, as far as one sees.

    Numbers that resolvers read as addresses (2852039166, 0x7f.1) are told as what they are.
    """
    try:
        host = (urlsplit(url).hostname or "").removesuffix(".")
    except ValueError:
        return ""
    if host in _METADATA:
        return "is where a cloud hands out credentials"
    if host == "localhost" or host.endswith(".localhost"):
        return "is this machine"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "is an address in disguise" if DISGUISED.match(host) else ""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_loopback or address.is_unspecified:
        return "is this machine"
    if address.is_link_local:
        return "is link-local, where clouds hand out credentials"
    return "is many machines" if address.is_multicast else ""


def egress_host(value: str) -> str:
    """A host outside the mesh: exact, or with a `*.` that stands for one name, as in a certificate."""
    hint = 'api.stripe.com, or "*.github.com" for one name below it'
    name = value.removeprefix("*.")
    if value == "*":
        refuse("'*' is every host", "policy: allow")
    if "*" in name:
        refuse(f"{value!r}: a * may only stand for one whole name at the beginning", hint)
    if "://" in value or "/" in value:
        refuse(f"{value!r} is a URL, not a host", hint)
    if is_ip(name.removeprefix("[").removesuffix("]")) and name == value:
        return str(ipaddress.ip_address(name.removeprefix("[").removesuffix("]")))
    if re.search(r":[0-9]*\Z", name):
        refuse(f"{value!r} holds a port", "hosts are compared without their port; leave it out")
    if name != name.lower() or name.endswith("."):
        refuse(f"{value!r} is not in the form in which hosts are compared", f"{value.lower().removesuffix('.')}")
    if not HOST.match(name):
        refuse(f"{value!r} is no host", hint)
    if "." not in name and value != "localhost":
        if name != value:
            refuse(f"{value!r} is a whole top-level domain", hint)
        refuse(f"{value!r} has no dot: a bare name is a service, never a host outside", hint)
    return value


def exact_egress_host(value: str) -> str:
    """One host: a credential for several goes to whoever holds one of them."""
    if "*" in value:
        refuse(f"{value!r} is more than one host", "one entry for each host that may see the credential")
    return egress_host(value)


# ---------------------------------------------------------------- tokens


def algorithm(value: str) -> str:
    """An asymmetric algorithm of JWS."""
    if value.upper() in ("HS256", "HS384", "HS512"):
        refuse(f"{value!r} is not allowed: who can check such a token can also make one", f"one of {', '.join(ALGORITHMS)}")
    if value.lower() == "none":
        refuse(f"{value!r} is not allowed: a token without signature is anybody's", f"one of {', '.join(ALGORITHMS)}")
    if value not in ALGORITHMS:
        refuse(f"{value!r} is not supported", f"{near(value, ALGORITHMS)}one of {', '.join(ALGORITHMS)}")
    return value


def issuer(value: str) -> str:
    """What `iss` says, to the letter."""
    if not 1 <= len(value) <= 2048 or not value.isprintable() or any(char.isspace() for char in value):
        refuse("can't be an issuer", "what stands in the tokens under iss, to the letter, such as https://id.shop.example/")
    return value


def _audience(value: str) -> str:
    if not 1 <= len(value) <= 2048 or not value.isprintable():
        refuse("can't be an audience", "the word for this service that stands in the tokens under aud")
    if "*" in value:
        refuse(f"{value!r} holds a *", "audiences are compared to the letter")
    return value


def _parameter(value: str) -> str:
    if not _PARAMETER.match(value):
        refuse(f"{value!r} is not the name of a parameter", "letters, digits and hyphens, such as access_token")
    return value


def _prefix(value: str) -> str:
    if len(value) > 100 or not value.isascii() or not value.isprintable():
        refuse("can't stand before a token", 'printable characters, such as "Bearer "; mind the space')
    return value


def _environment(value: str) -> str:
    if not _ENVIRONMENT.match(value):
        # What stands here may be the secret itself, so it is not shown.
        refuse(
            "is not the name of an environment variable", "its name, such as STRIPE_KEY; the secret itself stays out of this file"
        )
    return value


def _credential_header(value: str) -> str:
    if any(not char.isascii() or not char.isprintable() or char in ' :="' for char in value):
        refuse("is not the name of a header", "authorization, or as the API wants it: x-api-key")  # perhaps the secret itself
    header_name(value)
    if value in _FRAMING:
        refuse(f"{value!r} is about the message, not about who sends it", "authorization, or as the API wants it: x-api-key")
    return value


def _plugin(value: str) -> str:
    if not _PLUGIN.match(value):
        refuse(f"{value!r} can't be a plugin", "the name of an entry point of the group meshlib.identity, such as spiffe")
    return value


def _file(value: str) -> str:
    if not value or "\0" in value:
        refuse("is no path of a file", "a path, relative to this file")
    if "://" in value:
        refuse(f"{value!r} is a URL, not a file", "a path, relative to this file")
    if value.startswith("-----BEGIN"):
        refuse("holds the content, not the path", "a path, relative to this file")
    return value


def _record(value: Any) -> Any:
    if not isinstance(value, bool | str) or value == "":
        refuse("must be true, false or a folder", "true keeps it in .meshlib/traffic beside this file; default false")
    return value


HttpsUrl = Annotated[str, AfterValidator(https_url)]
EgressHost = Annotated[str, AfterValidator(egress_host)]
CredentialHost = Annotated[str, AfterValidator(exact_egress_host)]
CredentialHeader = Annotated[str, AfterValidator(_credential_header)]
Environment = Annotated[str, AfterValidator(_environment)]
Algorithm = Annotated[str, AfterValidator(algorithm)]
Issuer = Annotated[str, AfterValidator(issuer)]
Audience = Annotated[str, AfterValidator(_audience)]
Parameter = Annotated[str, AfterValidator(_parameter)]
TokenPrefix = Annotated[str, AfterValidator(_prefix)]
PluginName = Annotated[str, AfterValidator(_plugin)]
FilePath = Annotated[str, AfterValidator(_file)]
Record = Annotated[bool | str, BeforeValidator(_record, json_schema_input_type=bool | str)]
