"""Which tokens are believed? Area jwt: real keys, real signatures, and everything else as wrong as the case wants it.

A token is signed over exactly the bytes that the case asks for, so that nothing but the thing that is wrong can be the reason for its
refusal. It comes in as `Authorization: Bearer` on a path where one is needed. Times are relative to now; `str:` and `float:` give the type;
what stands for no JSON number (NaN) is written as it is.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import time
from functools import lru_cache
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from meshlib.errors import ConfigError
from tests.secure.cases import ground
from tests.secure.cases.case import Answer, Case, not_understood
from tests.secure.cases.ground import ANYONE, Request

PLAIN: dict[str, Any] = {"issuer": "https://iss", "audiences": ["svc-a"], "algs": ["RS256", "ES256"], "leeway": 30}
CLAIMS: dict[str, Any] = {"iss": "https://iss", "aud": "svc-a", "sub": "u", "exp": "+60"}
_STRANGERS = ("attacker", "evil", "other", "unknown", "foreign", "wrong", "stranger", "mallory")
_HASHES: dict[str, Any] = {"256": hashes.SHA256, "384": hashes.SHA384, "512": hashes.SHA512}
_CURVES: dict[str, tuple[str, Any, int]] = {
    "256": ("P-256", ec.SECP256R1, 32), "384": ("P-384", ec.SECP384R1, 48), "512": ("P-521", ec.SECP521R1, 66),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ area jwt


def jwt(case: Case) -> Answer:
    """One token, under one provider."""
    given = case.given
    if "raw" in given:
        token = _shaped(case, str(given["raw"]))
        signer = "rsa:k1"
    elif "header" in given or "claims" in given:
        signer = str(given.get("signed_with", "rsa:k1"))
        token = issued(given.get("header", {"alg": "RS256", "kid": "k1"}), given.get("claims", CLAIMS), signer)
        if "tamper" in signer:
            head, _, signature = token.split(".")
            token = ".".join([head, encoded(written({**CLAIMS, "sub": "admin"})), signature])
    elif "token" in given:
        token, signer = str(given["token"]), "rsa:k1"
    else:
        raise not_understood(case)
    try:
        mesh = ground.mesh_of(with_provider(provider_of(case.policy, signer)))
    except ConfigError:
        return {"config_error", "reject"}
    copies = 2 if case.says("two authorization") else 1
    headers = [("authorization", f"Bearer {token}")] * copies
    seen = ground.ask(mesh, Request(headers=headers))
    return ground.verdict(seen) | (set() if seen.reached else {"reject"})


def with_provider(provider: dict[str, Any]) -> dict[str, Any]:
    """A configuration in which every path needs a token of one provider."""
    return ground.document({"jwt": {"iss": provider}}, {"allow": [ANYONE], "jwt": {"require": ["/*"]}})


def provider_of(policy: dict[str, Any], signer: str = "rsa:k1") -> dict[str, Any]:
    """A policy of the cases as a provider of mesh.yaml, with the keys that it trusts."""
    provider: dict[str, Any] = {"issuer": policy.get("issuer", "https://iss"), "audiences": policy.get("audiences", [])}
    provider["algorithms"] = policy.get("algs", policy.get("algorithms", ["RS256", "ES256"]))
    if "leeway" in policy:
        provider["leeway"] = policy["leeway"]
    for name in ("longest", "max_lifetime"):
        if name in policy:
            provider["longest"] = policy[name]
    provider["jwks"] = {"keys": keys_for(signer)}
    return provider


def keys_for(signer: str) -> list[dict[str, Any]]:
    """The keys of the issuer: always the RSA key k1, and the one with which a case signs, if it is the issuer's."""
    trusted = {"k1": jwk("rsa", "k1")}
    kind, _, name = signer.partition(":")
    if kind in ("rsa", "ec", "ed25519", "okp") and name and not any(word in name for word in _STRANGERS):
        name = name.split()[0]
        trusted[name] = jwk(kind, name)
    return list(trusted.values())


def valid(**claims: Any) -> str:
    """A good token."""
    return issued({"alg": "RS256", "kid": "k1"}, {**CLAIMS, **claims}, "rsa:k1")


# ------------------------------------------------------------------------------------------------ making one


def issued(header: Any, claims: Any, signer: str) -> str:
    """A token with this header and these claims, signed with the named key."""
    return sealed(
        _as_header(header), written(claims), signer, header.get("alg", "RS256") if isinstance(header, dict) else "RS256"
    )


def sealed(header: bytes, payload: bytes, signer: str, alg: Any = "RS256") -> str:
    """Header and payload as they are, with a signature over them."""
    signed = f"{encoded(header)}.{encoded(payload)}"
    return f"{signed}.{encoded(signature(signed.encode(), signer, str(alg)))}"


def _as_header(header: Any) -> bytes:
    return json.dumps({name: _filled(value) for name, value in header.items()} if isinstance(header, dict) else header).encode()


def _filled(value: Any) -> Any:
    """A key that a header brings along, whole."""
    if isinstance(value, dict) and value.get("n") == "..":
        return {**value, **{part: item for part, item in jwk("rsa", "attacker").items() if part in ("n", "e")}}
    return value


def written(claims: Any) -> bytes:
    """Claims as JSON, with times as the case names them."""
    if not isinstance(claims, dict):
        return json.dumps(claims).encode()
    members = [
        f"{json.dumps(name)}:{_moment(value) if name in ('exp', 'nbf', 'iat') else json.dumps(value)}"
        for name, value in claims.items()
    ]
    return ("{" + ",".join(members) + "}").encode()


def _moment(value: Any) -> str:
    """The JSON text of a time."""
    if not isinstance(value, str):
        return json.dumps(value)
    kind, colon, rest = value.partition(":")
    if colon and kind in ("str", "float", "int"):
        number = _number(rest)
        return json.dumps(number) if kind == "str" else json.dumps(float(number)) if kind == "float" else str(int(float(number)))
    if value in ("null", "true", "false", "NaN", "Infinity", "-Infinity") or re.fullmatch(r"\[.*\]|\{.*\}", value):
        return value
    if re.fullmatch(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?", value):
        return _number(value)
    return json.dumps(value)


def _number(text: str) -> str:
    """`+60` and `-31` count from now; other numbers are what they are."""
    if re.fullmatch(r"[+-]\d+(\.\d+)?", text):
        return str(int(time.time()) + (float(text) if "." in text else int(text)))
    return text.removeprefix("+")


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signature(signed: bytes, signer: str, alg: str) -> bytes:
    """By the named key, in the manner that the header's algorithm asks for, as far as the key can."""
    if signer.startswith("hmac"):
        secret = _secret(re.sub(r"^hmac\(?|\)$", "", signer))
        return hmac.new(secret, signed, getattr(hashlib, f"sha{_bits(alg)}")).digest()
    kind, _, name = signer.partition(":")
    if kind in ("nothing", "none", ""):
        return b""
    private = key(kind, name.split()[0] if name else "k1", alg)
    if isinstance(private, rsa.RSAPrivateKey):
        digest = _HASHES[_bits(alg)]()
        form = padding.PSS(padding.MGF1(digest), digest.digest_size) if alg.upper().startswith("PS") else padding.PKCS1v15()
        return private.sign(signed, form, digest)
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return private.sign(signed)
    size = (private.key_size + 7) // 8
    first, second = decode_dss_signature(private.sign(signed, ec.ECDSA(_HASHES[_bits(alg)]())))
    return first.to_bytes(size, "big") + second.to_bytes(size, "big")


def _bits(alg: str) -> str:
    return alg[-3:] if alg[-3:] in _HASHES else "256"


def _secret(what: str) -> bytes:
    """What a key is mistaken for when an asymmetric key is taken for a secret."""
    form, _, name = what.partition(":")
    name = name or "k1"
    public = key("rsa", name).public_key()
    if "jwk" in form:
        return json.dumps(jwk("rsa", name)).encode()
    if "der" in form:
        return public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if "pem" in form or "public" in form:
        return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    if form in ("n", "modulus"):
        return jwk("rsa", name)["n"].encode()
    return what.encode()


@lru_cache(maxsize=64)
def _key(kind: str, name: str, bits: str) -> Any:
    if kind == "rsa":
        # Weak keys are asked for by their size, as rsa:weak-1024.
        size = re.search(r"(512|768|1024|2048|3072|4096)", name)
        return rsa.generate_private_key(65537, max(1024, int(size[1])) if size else 2048)
    if kind in ("ed25519", "okp"):
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key(_CURVES[bits][1]())


def key(kind: str, name: str, alg: str = "ES256") -> Any:
    """The private key of a name; the same each time it is asked for."""
    kind = {"es256": "ec", "ecdsa": "ec", "p256": "ec", "eddsa": "ed25519"}.get(kind, kind)
    return _key(kind, name, _bits(alg) if kind == "ec" and alg.upper().startswith("ES") else "256")


def jwk(kind: str, name: str, alg: str = "ES256") -> dict[str, Any]:
    """The public half, as it stands in a JWKS."""
    public = key(kind, name, alg).public_key()
    if isinstance(public, rsa.RSAPublicKey):
        numbers = public.public_numbers()
        parts = {"kty": "RSA", "n": _integer(numbers.n), "e": _integer(numbers.e), "alg": "RS256"}
    elif isinstance(public, ed25519.Ed25519PublicKey):
        raw = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        parts = {"kty": "OKP", "crv": "Ed25519", "x": encoded(raw), "alg": "EdDSA"}
    else:
        bits = _bits(alg)
        curve, _, size = _CURVES[bits]
        point = public.public_numbers()
        parts = {
            "kty": "EC",
            "crv": curve,
            "x": encoded(point.x.to_bytes(size, "big")),
            "y": encoded(point.y.to_bytes(size, "big")),
        }
        parts["alg"] = f"ES{bits}"
    return {**parts, "kid": name, "use": "sig"}


def _integer(number: int) -> str:
    return encoded(number.to_bytes((number.bit_length() + 7) // 8, "big"))


# ------------------------------------------------------------------------------------------------ shapes that are no token

_HEADER = b'{"alg":"RS256","kid":"k1"}'


def _shaped(case: Case, shape: str) -> str:
    """A token by its shape: h, p and s are the parts of a good one, a remark in brackets changes one of them before it is signed."""
    template, _, remark = shape.partition(" (")
    remark = remark.rstrip(")").lower()
    grown = re.fullmatch(r"(.+?)\.\.\.\[(\d+) bytes.*\]", template)
    if grown:
        return (grown[1] * (int(grown[2]) // len(grown[1]) + 1))[: int(grown[2])]
    if "json" in template:
        head, body, sign = valid().split(".")
        flat = {"payload": body, "protected": head, "signature": sign}
        return json.dumps({"payload": body, "signatures": [flat]} if "general" in shape else flat)
    token = _remarked(case, remark) if remark else valid()
    parts = token.split(".")
    if remark and len(parts) != 3:
        return token
    template = template.replace("\\n", "\n").replace("\\t", "\t").replace("\\r", "\r").replace("\\x00", "\0").replace("\\0", "\0")
    letters = dict(zip("hps", parts, strict=True))
    return re.sub(r"(?<![A-Za-z0-9])[hps](?![A-Za-z0-9])", lambda found: letters[found[0]], template)


def _remarked(case: Case, remark: str) -> str:
    good = written(CLAIMS)
    has = lambda *words: any(word in remark for word in words)
    if has("jwe", "5 parts", "five"):
        return f"{encoded(json.dumps({'alg': 'RSA-OAEP', 'enc': 'A256GCM', 'kid': 'k1'}).encode())}.{'.'.join(['AAAA'] * 4)}"
    if has("detached"):
        head, _, sign = valid().split(".")
        return f"{head}..{sign}"
    header, payload = _HEADER, good
    if has("list", "array"):
        payload = b"[" + good + b"]"
    elif has("string"):
        payload = json.dumps(good.decode()).encode()
    elif has("null"):
        payload = b"null"
    elif has("number"):
        payload = b"7"
    elif has("duplicate"):
        if has("header", "alg"):
            header = b'{"alg":"none","alg":"RS256","kid":"k1"}'
        else:
            payload = b'{"sub":"admin",' + good[1:]
    elif has("not json", "no json", "invalid json", "garbage"):
        payload = b"{" + good
    elif has("depth", "nest", "deep"):
        payload = good[:-1] + b',"x":' + b"[" * 200 + b"]" * 200 + b"}"
    elif has("utf"):
        payload = good[:-1] + b',"x":"\xff\xfe"}'
    elif has("bom"):
        payload = b"\xef\xbb\xbf" + good
    elif has("empty payload"):
        payload = b""
    elif has("empty object"):
        payload = b"{}"
    elif has("header"):
        header = b"[" + _HEADER + b"]"
    elif has("padding", "padded", "="):
        return valid() + "=="
    elif has("base64", "alphabet", "+"):
        # The last characters of this payload need the letters in which the two alphabets differ.
        payload = good[:-1] + b',"x":"??>>~~??>>"}'
        signed = f"{encoded(header)}.{base64.b64encode(payload).rstrip(b'=').decode()}"
        return f"{signed}.{encoded(signature(signed.encode(), 'rsa:k1', 'RS256'))}"
    elif has("bits", "non-canonical", "malleab"):
        token = valid()
        last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        # 256 bytes leave two bytes' worth of spare bits in the last letter: another letter, the same bytes.
        return token[:-1] + last[last.index(token[-1]) ^ 1]
    elif has("trunc"):
        return valid()[:-10]
    else:
        raise not_understood(case)
    return sealed(header, payload, "rsa:k1")
