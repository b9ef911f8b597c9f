"""Does the reader of X509SVIDResponse find what stands there, and nothing else? Protobuf itself is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("h2", reason="the agent's side needs the extra [agent]")
pytest.importorskip("google.protobuf", reason="the agent's side needs the extra [agent]")

from hypothesis import given, settings
from hypothesis import strategies as st

import meshlib
from meshlib.agent import messages
from meshlib.errors import IdentityError
from meshlib.secure import CertificateAuthority
from meshlib.secure.workload import NotOurs, WorkloadSource, parts_of
from meshlib.secure.workload.read import Response, Svid, response_of
from tests.agent.workload_world import PATIENCE, TD, id_of, until
from tests.secure.workload_raw import RawApi, svid_of

FIELDS = ("spiffe_id", "x509_svid", "x509_svid_key", "bundle", "hint")

SVIDS = st.builds(
    dict, spiffe_id=st.text(max_size=20), x509_svid=st.binary(max_size=40), x509_svid_key=st.binary(max_size=40),
    bundle=st.binary(max_size=300), hint=st.text(max_size=5),
)  # fmt: skip


def of_protobuf(message: Any) -> Response:
    svids = tuple(Svid(*(getattr(svid, name) for name in FIELDS)) for svid in message.svids)
    return Response(svids, tuple(message.crl), dict(message.federated_bundles))


@given(
    st.lists(SVIDS, max_size=4),
    st.lists(st.binary(max_size=20), max_size=3),
    st.dictionaries(st.text(min_size=1, max_size=9), st.binary(max_size=9)),
)
def test_whatever_protobuf_writes_is_read(svids: list[Any], crl: list[bytes], federated: dict[str, bytes]) -> None:
    """To the same effect; bundles without a trust domain aside, which are refused."""
    message = messages.X509SVIDResponse(svids=[messages.X509SVID(**svid) for svid in svids], crl=crl, federated_bundles=federated)
    assert response_of(message.SerializeToString()) == of_protobuf(message)


def judged(data: bytes) -> None:
    """Refused, or what protobuf sees in it too."""
    try:
        found = response_of(data)
    except IdentityError:
        return
    assert found == of_protobuf(messages.X509SVIDResponse.FromString(data))


@settings(max_examples=1000)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_read_as_protobuf_does(data: bytes) -> None:
    """Nothing else can happen."""
    judged(data)


GOOD = messages.X509SVIDResponse(
    svids=[messages.X509SVID(spiffe_id="spiffe://td/a", x509_svid=b"x" * 200, x509_svid_key=b"k", bundle=b"b", hint="h")],
    crl=[b"c"],
    federated_bundles={"spiffe://p": b"q"},
).SerializeToString(deterministic=True)


@settings(max_examples=1500)
@given(st.data())
def test_damaged_messages_are_refused_or_read_as_protobuf_does(data: st.DataObject) -> None:
    """Bytes changed, cut out, put in, and doubled."""
    message = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(message)))
        length = data.draw(st.integers(0, 5))
        message[at : at + length] = data.draw(st.binary(max_size=5)) or bytes(message[at : at + length]) * 2
    judged(bytes(message))


def test_any_changed_byte_of_a_bundle_is_refused_or_read_as_protobuf_does() -> None:
    """The key of a map's entry may become a field that nobody knows: then the bundle is nobody's, and not that of a nameless domain."""
    for at in range(GOOD.rindex(b"\x1a"), len(GOOD)):
        for value in range(256):
            judged(GOOD[:at] + bytes([value]) + GOOD[at + 1 :])


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (GOOD[:-1], "cut off"),
        (b"\x0a\x7f", "cut off"),
        (b"\x08\x01", "another type"),
        (b"\x0a\x02\x08\x01", "another type"),
        (b"\x0a\x08\x0a\x01a\x0a\x01b\x12\x00", "comes twice"),
        (b"\x1a\x05\x0a\x01a\x12\x00" * 2, "one trust domain twice"),
        (b"\x1a\x03\x12\x01q", "no trust domain"),
        (b"\x1a\x05\x0a\x00\x12\x01q", "no trust domain"),
        (GOOD.replace(b"\x0a\x0aspiffe://p", b"\x52\x0aspiffe://p"), "a field that can't be there"),
        (b"\x1a\x07\x0a\x01a\x12\x00\x18\x01", "a field that can't be there"),
        (b"\x0a\x03\x0a\x01\xff", "not UTF-8"),
        (b"\x02\x00", "no number"),
        (b"\x0b\x0c", "another type"),
        (b"\x23\x24", "no type"),
        (b"\x20" + b"\xff" * 9 + b"\x7f", "too long"),
        (b"\x20" + b"\xff" * 11, "too long"),
        (b"\x21\x00", "cut off"),
        (b"\x20", "cut off"),
        (b"\x0a" * (4 * 1024 * 1024 + 1), "too long"),
    ],
)
def test_flaw_discards_the_message(data: bytes, why: str) -> None:
    """As a whole, in words of ours."""
    with pytest.raises(IdentityError, match=f"was discarded: .*{why}"):
        response_of(data)


def test_unknown_fields_are_passed_over() -> None:
    """The standard may grow."""
    assert response_of(b"\x20\x05\x2a\x01z\x31" + b"\0" * 8 + b"\x3d" + b"\0" * 4 + GOOD) == response_of(GOOD)


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_certificates_that_are_none_are_refused(chain: bytes, bundle: bytes) -> None:
    """Whatever DER they seem to be, nothing but an IdentityError comes of it."""
    said = Response((Svid(id_of("a"), chain or b"0", b"\x30\x00", bundle or b"0"),))
    with pytest.raises(IdentityError):
        parts_of(said, id_of("a"))


def test_keys_are_in_no_repr() -> None:
    """Nor in the text of an error."""
    svid = Svid("spiffe://td/a", b"chain-bytes", b"key-bytes", b"bundle-bytes")
    assert "bytes" not in repr(Response((svid,), (b"crl-bytes",), {"td": b"bundle-bytes"}))
    with pytest.raises(IdentityError) as raised:
        parts_of(Response((svid,)), "spiffe://td/a")
    assert "bytes" not in str(raised.value)
    with pytest.raises(NotOurs):
        parts_of(Response((svid,)), "spiffe://td/b")


def test_bad_message_is_discarded_and_the_stream_goes_on(tmp_path: Path) -> None:
    """What was good stays in use; the next good message ends the trouble; all of it on one stream."""
    authority = CertificateAuthority.create(None, TD)
    made = authority.issue("orders")
    good = messages.X509SVIDResponse(svids=[svid_of(made.chain, made.key, made.bundle, made.spiffe_id)]).SerializeToString()
    api = RawApi(tmp_path)
    source = WorkloadSource(api.address, made.spiffe_id, timeout=PATIENCE)

    def error() -> str:
        try:
            source.load()
        except meshlib.MeshError as caught:
            return str(caught)
        return ""

    try:
        api.say(good)
        first = source.load()
        for bad, why in (
            (b"\x0a\x7f", "cut off"),
            (b"", "holds no SVID, and was discarded"),
            (GOOD, "can't be read, and was discarded"),
        ):
            api.say(bad if bad != GOOD else GOOD.replace(b"spiffe://td/a", made.spiffe_id.encode()[:13]))
            if bad == GOOD:
                break
            until(lambda why=why: why in error())
            assert source._identity is first
        api.say(good)
        until(error, "")
        assert (source.load(), api.streams) == (first, 1)
    finally:
        source.close()
        api.close()
