"""What of a call must never be read in a log?

Who may read a log may not be whoever its passwords let in. So headers are shown through `redacted`, which keeps names and hides the
values of those that prove something; texts that others wrote pass `scrubbed`, which takes out private keys, tokens and passwords
wherever they stand; and `Scrub`, a filter on all loggers of meshlib (`guard` puts it there), does that to every record and to the
traceback that hangs on it, since an exception may quote what it choked on. What is taken out is replaced by "(redacted)", so that one
sees that something was there. Control characters are escaped: a line of a log is the work of one author.

By names and shapes, with regular expressions that read a text once. A secret that looks like a word isn't recognised, so this is a
net and not the plan: the plan is that secrets are kept out of texts where they are written. It rewrites nothing that isn't logged by
meshlib, and no log of another library.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable
from typing import Any, AnyStr, Final

REDACTED: Final = "(redacted)"

# The loggers of meshlib. A filter of a logger is not inherited, so each has its own; tests/observe/test_redact.py finds new ones.
LOGGERS: Final = tuple(
    f"meshlib.{name}"
    for name in (
        *("admit", "agent", "ca", "client", "config", "consul", "discover", "egress", "etcd", "keeper", "mesh", "observe"),
        *("retry", "route", "secure", "server", "spiffe"),
    )
)

# Whole names of headers (with hyphens), and what makes a name secret wherever it stands in it.
_NAMES: Final = frozenset(
    {
        *(
            "cookie",
            "set-cookie",
            "cookie2",
            "set-cookie2",
            "client-cert",
            "client-cert-chain",
            "x-ssl-client-cert",
            "ssl-client-cert",
        ),
        *("x-forwarded-client-cert", "dpop", "signature", "baggage", "x-amzn-oidc-data", "x-amzn-oidc-identity"),
    }
)
_PARTS: Final = re.compile(
    r"authorization|authentication|token|secret|passw|credential|api-?key|private-?key|-key\Z|session|jwt|assertion|\Ax-auth-|-auth\Z"
)
# Names that end with "-key" and open nothing.
_HARMLESS: Final = frozenset({"idempotency-key", "sec-websocket-key", "x-idempotency-key"})

_KEY: Final = re.compile(
    r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY-----|\Z)", re.DOTALL
)
# header.payload.signature, each base64url; the first is a JSON object.
_JWT: Final = re.compile(r"\beyJ[A-Za-z0-9_-]{4,}\.[A-Za-z0-9_-]*\.?[A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]*){0,2}")
# A token for the enrolment with our own CA.
_ENROLMENT: Final = re.compile(r"\bmesh1\.[A-Za-z0-9_-]{8,}")
# What follows the word Bearer, but for what follows it in prose; and what follows the others if it looks coded.
_BEARER: Final = re.compile(
    r"\b(bearer[ \t]{1,8})(?!(?:tokens?|auth\w*|credentials?|schemes?|realm|errors?|and|or|is|of|for)\b)[^\s,;'\"]{4,}",
    re.IGNORECASE,
)
_CODED: Final = re.compile(
    r"\b((?i:basic|digest|negotiate|dpop|apikey|token)[ \t]{1,8})(?=[a-z._~-]{0,64}[0-9A-Z=+/])[A-Za-z0-9+/=._~-]{6,}"
)
# `authorization: …`, `cookie=…`, and the pair as Python writes it.
_FIELD: Final = re.compile(
    r"\b((?:proxy-)?authorization|(?:set-)?cookie|x-api-key|x-amz-security-token|x-auth-token|x-forwarded-client-cert)"
    r"([ \t]{0,8}[:=][ \t]{0,8}|['\"][ \t]{0,8}[:,=][ \t]{0,8}(?=b?['\"]))(b?'[^'\n]*'|b?\"[^\"\n]*\"|[^\n]+)",
    re.IGNORECASE,
)
# `access_token=…` as in a query, and `"password": "…"` as in JSON.
_PARAMETER: Final = re.compile(
    r"\b([A-Za-z0-9_.-]{0,40}(?:token|secret|password|passwd|api_?key|signature|credential)[A-Za-z0-9_.-]{0,40}"
    r"(?:=|['\"][ \t]{0,8}[:,][ \t]{0,8}b?['\"]))[^\s&;,'\"]+",
    re.IGNORECASE,
)
_USERINFO: Final = re.compile(r"(://)[^/\s@'\"]{1,512}@")
# A cheap look before the expensive ones: without any of these nothing can be found.
_MAYBE: Final = re.compile(
    r"PRIVATE KEY|eyJ|mesh1|bearer|basic|digest|negotiate|dpop|authorization|cookie|key|token|secret|passw|signature|credential|://",
    re.IGNORECASE,
)

_CONTROLS: Final = {byte: f"\\x{byte:02x}" for byte in (*range(32), *range(127, 160))} | {0x2028: "\\u2028", 0x2029: "\\u2029"}
_BUT_LINES: Final = {code: text for code, text in _CONTROLS.items() if chr(code) not in "\n\t"}


def redacted(headers: Iterable[tuple[AnyStr, AnyStr]], also: Collection[str] = ()) -> list[tuple[AnyStr, AnyStr]]:
    """The same fields, bytes or text, fit for a log: secret values are replaced, control characters escaped.

    `also`: names, in lower case, that are secret here beside those that are secret everywhere.
    """
    return [_field(name, value, also) for name, value in headers]


def _field(name: AnyStr, value: AnyStr, also: Collection[str]) -> tuple[AnyStr, AnyStr]:
    if isinstance(name, bytes):
        shown, told = _field(name.decode("latin-1"), value.decode("latin-1"), also)
        return shown.encode("latin-1", "backslashreplace"), told.encode("latin-1", "backslashreplace")
    is_hidden = is_secret(name) or name.lower() in also
    return one_line(name), REDACTED if is_hidden else one_line(scrubbed(value))


def is_secret(name: str) -> bool:
    """Does the value of a header of this name prove something, or tell what isn't for everybody? By its name; case is no difference."""
    plain = name.strip().lower().replace("_", "-").removeprefix(":")
    return plain in _NAMES or (plain not in _HARMLESS and _PARTS.search(plain) is not None)


def scrubbed(text: str) -> str:
    """A text without the private keys, tokens and passwords in it."""
    if _MAYBE.search(text) is None:
        return text
    text = _KEY.sub(f"{REDACTED} (a private key)", text)
    text = _FIELD.sub(rf"\1\2{REDACTED}", text)
    text = _BEARER.sub(rf"\1{REDACTED}", text)
    text = _CODED.sub(rf"\1{REDACTED}", text)
    text = _JWT.sub(REDACTED, text)
    text = _ENROLMENT.sub(REDACTED, text)
    text = _PARAMETER.sub(rf"\1{REDACTED}", text)
    return _USERINFO.sub(rf"\1{REDACTED}@", text)


def one_line(text: str) -> str:
    """A text whose control characters are escaped: it begins no line of its own and moves no cursor."""
    return text.translate(_CONTROLS)


class Scrub(logging.Filter):
    """Lets every record pass, without secrets in its message and its traceback. Lines stay lines: whose they are isn't known here."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            self._clean(record)
        except Exception as error:
            # A message that can't be formatted is never shown as it is.
            record.msg, record.args = f"a message that can't be shown ({type(error).__name__})", ()
        return True

    @staticmethod
    def _clean(record: logging.LogRecord) -> None:
        message = record.getMessage()
        clean = scrubbed(message).translate(_BUT_LINES)
        if clean != message:
            record.msg, record.args = clean, ()
        if record.exc_info and record.exc_info[0] is not None and not record.exc_text:
            told = _FORMATTER.formatException(record.exc_info)
            clean = scrubbed(told).translate(_BUT_LINES)
            if clean != told:
                # Formatters that write tracebacks themselves find none; all others write this text.
                record.exc_info, record.exc_text = None, clean
        elif record.exc_text:
            record.exc_text = scrubbed(record.exc_text)


_FORMATTER: Final = logging.Formatter()
_SCRUB: Final = Scrub()


def guard(*more: str) -> None:
    """Put the filter on all loggers of meshlib, and on those that are named beside them. Harmless to call again."""
    for name in (*LOGGERS, *more):
        logging.getLogger(name).addFilter(_SCRUB)


def shown(value: Any) -> str:
    """Any value as text for a log: one line, without secrets."""
    return one_line(scrubbed(str(value)))
