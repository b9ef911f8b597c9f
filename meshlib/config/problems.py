"""How is a mistake told so that it can be mended at once?

pydantic knows where and of what kind a mistake is; this module puts it into words: the key path as people write it,
what stands there, what is allowed, and the near match for a mistyped word. It looks up the allowed keys and the
range at the model's own fields, so that a message can't disagree with the check.
"""

from __future__ import annotations

from typing import Any, Final, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from .defaults import TABLE
from .document import Document
from .section import Section
from .text import Path, Text, masked
from .values import near

# The words of other systems, for those who come from there.
_ELSEWHERE: Final = {
    "timeout": "deadline",
    "timeouts": "deadline",
    "retries": "retry",
    "endpoints": "discover",
    "hosts": "discover",
    "address": "discover",
    "port": "listen",
    "routes": "route",
    "principals": "from",
    "tls": "secure",
    "mtls": "secure",
    "circuit_breaker": "admit",
    "outlier_detection": "admit",
    "load_balancer": "balance",
    "lb": "balance",
    "max_attempts": "attempts",
    "retry_on": "on",
    "per_try_timeout": "per_try",
    "hedging": "hedge",
    "max_pending": "pending",
    "health_check": "check",
    "healthcheck": "check",
    "rate_limit": "rate",
    "rate_limits": "rate",
    "hash_policy": "hash_on",
    "interval": "every",
    "percent": "weight",
    "not_principals": "not_from",
    "notprincipals": "not_from",
    "source": "from",
    "jwks_uri": "jwks",
    "from_headers": "from",
    "from_params": "from",
    "forward_original_token": "forward",
    "provider": "authorizer",
    "max_age": "longest",
    "trusted_proxies": "proxies",
    "xff_num_trusted_hops": "hops",
    "trusted_hops": "hops",
    "cert": "certificate",
    "ca_bundle": "bundle",
    "roots": "bundle",
    "endpoint_url": "url",
    "max_concurrency": "in_flight",
    "max_requests": "in_flight",
    "concurrency": "in_flight",
    "max_queue": "queue",
    "backlog": "queue",
    "priorities": "priority",
    "level": "as",
    "on_cancel": "on_disconnect",
    "readiness": "probe",
    "liveness": "probe",
    "graceful_timeout": "grace",
    "grace_period": "grace",
    "shutdown": "drain",
}

# What people call a secret that has no place in the file.
_SECRETS: Final = frozenset(("value", "secret", "token", "key", "password", "bearer", "api_key", "credential"))

# In place of a value that is not shown.
_HERE: Final = "what stands here"

_TYPES: Final = {
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "string_type": "a word or text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "none_required": "nothing",
}


def note(text: Text, error: ValidationError, root: Any = Document, at: Path = ()) -> None:
    """Add each mistake that pydantic found to the problems of the text."""
    seen = {(problem.line, problem.key, problem.message) for problem in text.problems}
    for detail in error.errors(include_url=False):
        if detail["type"] == "too_short" and detail["input"]:
            continue  # its entries were refused one by one, and that has been told
        path = at + _path(detail, text, at)
        message, hint = _words(detail, root)
        before = len(text.problems)
        text.refuse(path, message, hint)
        problem = text.problems[before]
        if (problem.line, problem.key, problem.message) in seen:
            text.problems.pop()
        seen.add((problem.line, problem.key, problem.message))


def shown(value: object) -> str:
    """A value of the file as an error shows it: short, on one line."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, tuple | list):
        return "a list"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = masked(repr(value))  # before it is cut: of half a URL nobody sees that it is one
    return text if len(text) <= 60 else text[:57] + "…"


def _is_secret(loc: Path) -> bool:
    """Where a password may stand, or a key, though it shouldn't."""
    if loc[:1] in {("stores",), ("registries",)} or (loc[-1:] == ("store",) and loc[-3:-2] == ("rate",)):
        return True
    return loc[:2] == ("egress", "credentials") or loc[:3] == ("secure", "identity", "token") or loc[3:5] == ("jwks", "keys")


def _words(detail: ErrorDetails, root: Any) -> tuple[str, str]:
    kind, context, given = detail["type"], detail.get("ctx", {}), detail["input"]
    loc = tuple(part for part in detail["loc"] if part != "[key]")
    if kind == "mesh":
        message = str(context["message"])
        return message.replace(repr(given), _HERE) if _is_secret(loc) else message, str(context["hint"])
    if kind == "missing":
        field = _field(root, loc)
        return "is missing", _allowed(field)
    if kind == "extra_forbidden":
        word, keys = str(loc[-1]), _keys(root, loc[:-1])
        if word == "zone":
            # The file is shared by processes in all zones.
            return "unknown key", "each process is told its own: MESHLIB_ZONE; an endpoint's stands beside its address"
        if loc[:2] == ("egress", "credentials") and word in _SECRETS:
            return "a secret has no place in this file", "env: the name of a variable that holds it, or file: a path"
        guess = near(word, keys) or (f"did you mean {_ELSEWHERE[word]!r}? " if _ELSEWHERE.get(word) in keys else "")
        return "unknown key", f"{guess}allowed: {', '.join(keys)}"
    if kind == "literal_error":
        field = _field(root, loc)
        words = _literals(field.annotation) if field is not None else ()
        guess = near(given, words) if isinstance(given, str) else ""
        return f"{shown(given)} is not allowed", guess + "one of " + ", ".join(words)
    if kind in ("greater_than_equal", "less_than_equal", "greater_than", "less_than"):
        return f"{_HERE if _is_secret(loc) else given} is out of range", _allowed(_field(root, loc))
    if kind == "too_short":
        return "is empty", "at least one entry, or leave the key out"
    if kind in ("string_too_short", "string_too_long"):
        return (
            "is empty" if kind == "string_too_short" else f"is longer than {context.get('max_length')} characters",
            "",
        )
    if kind == "missing_argument" or (kind == "too_long" and context.get("field_type") == "Tuple"):
        return "must be a list of two values", _allowed(_field(root, loc))
    if kind == "finite_number":
        return "must be a finite number", ""
    if kind in _TYPES:
        hint = _allowed(_field(root, loc))
        if given is None:
            return "has no value", f"write {_TYPES[kind]} behind it, or leave the key out"
        if kind == "string_type" and isinstance(given, bool | int | float):
            hint = "put it in quotes"
        what = _HERE if _is_secret(loc) else shown(given)
        return f"must be {_TYPES[kind]}, not {what}", hint
    return detail["msg"], ""


def _path(detail: ErrorDetails, text: Text, at: Path) -> Path:
    """The key path of a mistake, cut where the file holds a short form (an address) in place of a mapping."""
    loc = tuple(part for part in detail["loc"] if part != "[key]")
    value = text.value
    for part in at:
        value = value[part]
    for index, part in enumerate(loc):
        if isinstance(value, str):
            return loc[:index]
        if isinstance(value, dict) and part in value:
            value = value[str(part)]
        elif isinstance(value, tuple) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            break
    return loc


# ---------------------------------------------------------------- what the models allow at a place


def _keys(root: Any, loc: Path) -> list[str]:
    section = _type_at(root, loc)
    if section is None:
        return []
    return [field.alias or name for name, field in section.model_fields.items()]


def _allowed(field: FieldInfo | None) -> str:
    """Range and default of a field that has a row in the defaults, else what its description says."""
    if field is None:
        return ""
    extra = field.json_schema_extra
    row = TABLE.get(str(extra.get("x-default-of"))) if isinstance(extra, dict) else None
    words = _literals(field.annotation)
    if words:
        return "one of " + ", ".join(words)
    if row is None:
        return field.description or ""
    value = list(row.value) if isinstance(row.value, tuple) else row.value
    default = f"default {str(value).lower() if isinstance(value, bool) else value}"
    return f"{row.span}; {default}" if row.span else default


def _field(root: Any, loc: Path) -> FieldInfo | None:
    """The field that a key path names; for an item of a list, the list's field."""
    parts = list(loc)
    while parts and isinstance(parts[-1], int):
        parts.pop()
    if not parts:
        return None
    section = _type_at(root, tuple(parts[:-1]))
    if section is None:
        return None
    for name, field in section.model_fields.items():
        if parts[-1] in (name, field.alias):
            return field
    return None


def _type_at(root: Any, loc: Path) -> type[Section] | None:
    """The section that a key path leads to, None if it leads elsewhere."""
    here = root
    for part in loc:
        here = _bare(here)
        if isinstance(here, type) and issubclass(here, Section):
            found = [field for name, field in here.model_fields.items() if part in (name, field.alias)]
            if not found:
                return None
            here = found[0].annotation
        elif get_origin(here) in (tuple, dict):
            here = [item for item in get_args(here) if item is not Ellipsis][-1]
        else:
            return None
    here = _bare(here)
    return here if isinstance(here, type) and issubclass(here, Section) else None


def _bare(annotation: Any) -> Any:
    """A type without Annotated and without `| None`."""
    while True:
        if hasattr(annotation, "__metadata__"):
            annotation = annotation.__origin__
            continue
        args = [item for item in get_args(annotation) if item is not type(None)]
        if len(args) == 1 and len(get_args(annotation)) == 2 and get_origin(annotation) not in (tuple, dict, Literal):
            annotation = args[0]
            continue
        return annotation


def _literals(annotation: Any) -> tuple[str, ...]:
    bare = _bare(annotation)
    if get_origin(bare) is tuple:
        return _literals(get_args(bare)[0])
    if get_origin(bare) is not Literal:
        return ()
    return tuple(str(item).lower() if isinstance(item, bool) else str(item) for item in get_args(bare))
