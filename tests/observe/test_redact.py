"""Can a secret get into a log? Not by a header, not by a text that others wrote, not by an exception; and no stranger writes lines there."""

from __future__ import annotations

import ast
import io
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import meshlib
from meshlib.observe import redact
from meshlib.observe.redact import REDACTED, Scrub, guard, is_secret, one_line, redacted, scrubbed

KEY = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIabc\n-----END EC PRIVATE KEY-----"
TOKEN = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    "name",
    [
        *("authorization", "Authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key", "X-API-Key", "api-key"),
        *("x-amz-security-token", "x-forwarded-client-cert", "x-csrf-token", "x-auth-request-user", "x-vault-token", "dpop"),
        *(
            "x_api_key",
            "private-token",
            "x-client-secret",
            "x-session-id",
            "ocp-apim-subscription-key",
            "baggage",
            "x-jwt-payload",
        ),
    ],
)
def test_values_of_secret_headers_are_hidden_and_names_are_not(name: str) -> None:
    """In bytes and in text, in any case; one sees that something was there."""
    assert redacted([(name, "s3cret")]) == [(name, REDACTED)]
    assert redacted([(name.encode(), b"s3cret")]) == [(name.encode(), REDACTED.encode())]


@pytest.mark.parametrize(
    "name",
    ["accept", "content-type", "host", "idempotency-key", "user-agent", "x-request-id", "traceparent", "keep-alive", "monkey"],
)
def test_ordinary_headers_are_shown(name: str) -> None:
    """A log without values is of no use."""
    assert not is_secret(name)
    assert redacted([(name, "value")]) == [(name, "value")]


def test_headers_that_are_secret_here_are_hidden_too() -> None:
    """Such as those of configured credentials."""
    assert redacted([(b"X-Partner", b"p4ss"), (b"x-other", b"o")], {"x-partner"}) == [
        (b"X-Partner", REDACTED.encode()),
        (b"x-other", b"o"),
    ]


def test_control_characters_of_headers_are_escaped() -> None:
    """A header writes no line of its own."""
    assert redacted([("x-a\r\n", "1\r\nINFO all is well\x1b[2J\x00\x85")]) == [
        ("x-a\\x0d\\x0a", "1\\x0d\\x0aINFO all is well\\x1b[2J\\x00\\x85")
    ]
    assert redacted([(b"x-a", b"\r\n\xff")]) == [(b"x-a", b"\\x0d\\x0a\xff")]
    assert one_line("a\u2028b\u2029\x9bc") == "a\\u2028b\\u2029\\x9bc"


@pytest.mark.parametrize(
    "text",
    [
        KEY,
        repr(KEY.encode()),
        KEY.replace("EC PRIVATE", "PRIVATE"),
        KEY.split("-----END", maxsplit=1)[0],
        f"the token {TOKEN} is not good",
        "mesh1.s3cret_s3cret-s3cret was spent",
        "join it with (mesh1.s3cret0123456789)",
        "Authorization: Bearer s3cret-word",
        "authorization: AWS4-HMAC-SHA256 Credential=AKIA/2026, Signature=s3cret",
        "sent (b'authorization', b'Basic dXNlcjpzM2NyZXQ=') away",
        "{'Cookie': 'sid=s3cret', 'a': 1}",
        "Basic dXNlcjpzM2NyZXQ= was refused",
        "GET /callback?code=1&access_token=s3cret",
        '{"password": "s3cret"}',
        "redis://user:s3cret@10.0.0.1/0 is away",
        "x-api-key=s3cret",
        "the bearer s3cretvalue was refused",
    ],
)
def test_secrets_are_taken_out_of_texts(text: str) -> None:
    """Keys whole or cut off, tokens, passwords; in the forms in which libraries quote them."""
    clean = scrubbed(f"before {text}")
    assert clean.startswith("before ") and REDACTED in clean
    for secret in ("MHcCAQEE", "s3cret", "dXNlcjpzM2NyZXQ", "eyJzdWIi", "c2lnbmF0dXJl", "AKIA"):
        assert secret not in clean


@pytest.mark.parametrize(
    "text",
    [
        "a bearer token is needed",
        "the text begins with mesh1. and goes on",
        "the token has expired, get a new one",
        "basic authentication is not offered, digest neither",
        "identity, authorization, and what else there is",
        'spiffe://shop.internal/ns/default/sa/orders is not in "from"',
        "http://127.0.0.1:9464/metrics",
        "certificate and key don't belong together",
        "rule 'tokens' denies GET on '/tokens'",
        "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
    ],
)
def test_prose_stays_as_it_is(text: str) -> None:
    """A log that hides too much is switched off."""
    assert scrubbed(text) == text


def test_scrubbing_takes_no_more_than_the_length_of_the_text() -> None:
    """Whoever can make us log a text can't make it take seconds."""
    begun = time.process_time()
    for evil in (
        "-----BEGIN " * 9000,
        "://" * 30000,
        "bearer" + " " * 99000,
        "eyJ" + "a" * 99000,
        "authorization'" * 7000,
        "token" * 20000,
    ):
        scrubbed(evil)
    assert time.process_time() - begun < 5


@pytest.fixture
def written() -> Iterator[tuple[logging.Logger, io.StringIO]]:
    """A logger of meshlib's with the filter, and what a stock handler writes of it."""
    guard()
    logger = logging.getLogger("meshlib.secure")
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger.addHandler(handler)
    yield logger, out
    logger.removeHandler(handler)


def test_messages_and_their_arguments_are_scrubbed(written: tuple[logging.Logger, io.StringIO]) -> None:
    """Whichever of the two the secret is in."""
    logger, out = written
    logger.warning("can't load %s", KEY)
    logger.warning("got " + f"Authorization: Bearer {TOKEN}")  # noqa: G003
    logger.warning("plain %d", 7)
    assert out.getvalue() == (
        f"WARNING can't load {REDACTED} (a private key)\nWARNING got Authorization: {REDACTED}\nWARNING plain 7\n"
    )


def test_tracebacks_are_scrubbed(written: tuple[logging.Logger, io.StringIO]) -> None:
    """An exception quotes what it choked on, and so may its cause."""
    logger, out = written
    try:
        try:
            raise ValueError(f"bad PEM: {KEY}")
        except ValueError as error:
            raise RuntimeError(f"with Bearer {TOKEN}") from error
    except RuntimeError:
        logger.exception("failed")
    text = out.getvalue()
    assert "MHcCAQEE" not in text and "eyJ" not in text
    assert "Traceback" in text and "RuntimeError: with Bearer (redacted)" in text


def test_formatters_that_write_tracebacks_themselves_get_none(written: tuple[logging.Logger, io.StringIO]) -> None:
    """One for JSON looks at `exc_info`; with a secret in it there is none, and without one it stays."""
    logger, _ = written
    seen: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = seen.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        for text in (KEY, "nothing"):
            try:
                raise ValueError(text)
            except ValueError:
                logger.exception("failed")
    finally:
        logger.removeHandler(handler)
    assert [record.exc_info is None for record in seen] == [True, False]
    assert "MHc" not in (seen[0].exc_text or "")


def test_a_stranger_moves_no_cursor_and_writes_no_line_of_its_own(written: tuple[logging.Logger, io.StringIO]) -> None:
    """Control characters are escaped by the filter; lines only where the text of a stranger is put in (`one_line`)."""
    logger, out = written
    logger.warning("two\nlines of ours\x1b[2J\r")
    logger.warning("path %s", one_line("/a\nINFO fake line"))
    assert out.getvalue() == "WARNING two\nlines of ours\\x1b[2J\\x0d\nWARNING path /a\\x0aINFO fake line\n"


def test_a_message_that_cant_be_formatted_is_not_shown(written: tuple[logging.Logger, io.StringIO]) -> None:
    """What can't be looked at isn't let through."""
    logger, out = written
    logger.warning("%d", KEY)
    assert "MHc" not in out.getvalue()
    assert "a message that can't be shown" in out.getvalue()


def test_guarding_twice_filters_once() -> None:
    """Each mesh of a process puts it there."""
    guard()
    guard("meshlib_extra")
    for name in (*redact.LOGGERS, "meshlib_extra"):
        assert sum(isinstance(one, Scrub) for one in logging.getLogger(name).filters) == 1


def test_every_logger_of_the_package_is_on_the_list() -> None:
    """Filters of loggers are not inherited: a new name without the filter would leak."""
    names: set[str] = set()
    package = Path(meshlib.__file__).parent
    for path in (*package.rglob("*.py"), *package.parent.glob("integrations/*/meshlib_*/*.py")):
        if "target" in path.parts:
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        given = [node.args[0] for node in calls if ast.unparse(node.func).endswith("getLogger") and node.args]
        names.update(str(value.value) for value in given if isinstance(value, ast.Constant))
    # `meshlib` itself only sets levels: its filters would see nothing of what its children log.
    names = {name for name in names if name.startswith("meshlib.")}
    assert names - set(redact.LOGGERS) == set()
    assert {"meshlib.server", "meshlib.secure", "meshlib.consul"} <= names
