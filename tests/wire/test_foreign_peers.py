"""Do the TLS stacks of others take our certificates, and we theirs; and is what is wrong refused on both sides?

Envoy, gRPC, haproxy, nginx, OpenSSL and Python's `ssl`, each as a server that we call and as a client that calls us, with chains of
a leaf and an intermediate as our CA issues them. What a foreign peer can't judge it is not asked: only Envoy knows SPIFFE IDs, and
gRPC no lists of revoked certificates. The client `spiffe` (the SPIFFE project's, for Python) reads what we write.
"""

from __future__ import annotations

import base64
import contextlib
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from meshlib import errors
from meshlib._native import core
from tests.support import TRUST_DOMAIN, identities
from tests.wire.foreign import PEERS, Offer, Peer, call, our_server
from tests.wire.peers import CLIENT, SERVER, Authority, Issued, not_after_of, san_uri


@pytest.fixture(params=PEERS)
def peer(request: pytest.FixtureRequest) -> Peer:
    found = PEERS[request.param]
    if not found.is_here():
        pytest.skip(f"{request.param} is not installed")
    return found


@pytest.fixture(scope="module")
def root() -> Authority:
    return Authority("root", extensions=[san_uri("spiffe://td")])


@pytest.fixture(scope="module")
def issuer(root: Authority) -> Authority:
    return Authority("issuer", parent=root, path_length=0, extensions=[san_uri("spiffe://td")])


def lists(root: Authority, issuer: Authority, *revoked: Issued) -> bytes:
    """Of both CAs: OpenSSL wants one of each."""
    return root.crl() + issuer.crl(*(issued.serial for issued in revoked))


def stranger() -> Authority:
    """Another trust domain with the same names."""
    return Authority("issuer", parent=Authority("root"), path_length=0)


# ------------------------------------------------------------------ what is right


def test_certificates_of_our_ca_are_taken_and_given(peer: Peer, tmp_path: Path) -> None:
    """By and to each of them, in both roles: leaf and intermediate, from the files that a service has."""
    identities(tmp_path, "me", "orders")
    read = {name: tmp_path / "identities" / name for name in ("me", "orders")}
    me, orders = (Issued((at / "svid.pem").read_bytes(), (at / "key.pem").read_bytes()) for at in read.values())
    bundle = (read["me"] / "bundle.pem").read_bytes()
    ids = [f"spiffe://{TRUST_DOMAIN}/ns/default/sa/{name}" for name in read]
    assert (len(me.der), bundle.count(b"BEGIN")) == (2, 1)
    theirs = Offer(orders, bundle, name=f"me.default.{TRUST_DOMAIN}", trust_domain=TRUST_DOMAIN)
    with peer.servers(tmp_path, {"good": theirs}) as ports:
        wire = call(core.TlsClient(me.chain, me.key, {TRUST_DOMAIN: bundle}, 1), ports["good"], ids[1], peer.protocol)
        assert isinstance(wire, core.HttpConnection), wire
        assert (wire.peer, wire.protocol) == (ids[1], peer.protocol)
    alpn = [peer.protocol.encode()]
    tls = core.TlsServer(me.chain, me.key, {TRUST_DOMAIN: bundle}, 1, True, alpn)
    with our_server(tls) as we, peer.clients(tmp_path, {"good": theirs}, we.port) as calls:
        assert (calls["good"](), we.peers, we.errors) == (True, [ids[1]], [])


# ------------------------------------------------------------------ what is wrong


def wrong(issuer: Authority) -> dict[str, tuple[Issued, str]]:
    """What we refuse, and why."""
    return {
        "of another trust domain": (stranger().issue(SERVER), "no root in the bundle"),
        "of a trust domain that we don't know": (issuer.issue("spiffe://elsewhere/server"), "no bundle of that trust domain"),
        "two URI names": (issuer.issue(SERVER, "spiffe://td/other"), "more than one URI name"),
        "expired": (issuer.issue(SERVER, begin=-3000, end=-10), "has expired"),
        "revoked": (issuer.issue(SERVER), "revoked by its CA"),
        "another identity": (issuer.issue("spiffe://td/other"), "but spiffe://td/server was expected"),
    }


def test_we_refuse_what_a_foreign_server_should_not_show(peer: Peer, root: Authority, issuer: Authority, tmp_path: Path) -> None:
    """Each for its own reason, and before anything of the request is written; the good one beside them is served."""
    cases, good, mine = wrong(issuer), issuer.issue(SERVER), issuer.issue(CLIENT)
    offers = {"good": Offer(good, root.pem), **{name: Offer(issued, root.pem) for name, (issued, _) in cases.items()}}
    crls = {"td": lists(root, issuer, cases["revoked"][0])}
    tls = core.TlsClient(mine.chain, mine.key, {"td": root.pem}, 1, crls=crls)
    with peer.servers(tmp_path, offers) as ports:
        answer = call(tls, ports["good"], SERVER, peer.protocol)
        assert isinstance(answer, core.HttpConnection), answer
        for name, (_, reason) in cases.items():
            error = call(tls, ports[name], SERVER, peer.protocol)
            assert isinstance(error, errors.PeerIdentityError), (name, error)
            assert (name, reason in str(error), error.is_written) == (name, True, False)


def test_we_refuse_what_a_foreign_client_should_not_show(peer: Peer, root: Authority, issuer: Authority, tmp_path: Path) -> None:
    """Each for its own reason; none gets an answer, and the good one beside them does."""
    cases, good, mine = wrong(issuer), issuer.issue(CLIENT), issuer.issue(SERVER)
    # Whom a caller may be is the policy's question, not TLS's.
    del cases["another identity"]
    offers = {name: Offer(issued, root.pem) for name, (issued, _) in cases.items()}
    crls = {"td": lists(root, issuer, cases["revoked"][0])}
    tls = core.TlsServer(mine.chain, mine.key, {"td": root.pem}, 1, True, [peer.protocol.encode()], crls=crls)
    with our_server(tls) as we, peer.clients(tmp_path, {"good": Offer(good, root.pem), **offers}, we.port) as calls:
        assert (calls["good"](), we.peers, we.errors) == (True, [CLIENT], [])
        for name, (_, reason) in cases.items():
            we.errors.clear()
            assert (name, calls[name](), we.peers) == (name, False, [CLIENT])
            assert reason in we.errors[0]


def refusals(peer: Peer, root: Authority, issuer: Authority) -> dict[str, tuple[Issued, Offer]]:
    """What we show, and what a foreign peer that refuses it believes in."""
    good, revoked = issuer.issue(SERVER), issuer.issue(SERVER)
    plain = Offer(good, root.pem)
    cases = {
        "of another trust domain": (stranger().issue(SERVER), plain),
        "expired": (issuer.issue(SERVER, begin=-3000, end=-10), plain),
    }
    if peer.has_crls:
        cases["revoked"] = revoked, replace(plain, crls=lists(root, issuer, revoked))
    if peer is PEERS["envoy"]:
        cases["of a trust domain that it does not know"] = issuer.issue("spiffe://elsewhere/server"), plain
    return cases


# What we can't prove at all we can't even load: so our own bundles know what is shown.
OWN = {"td": Authority("root").pem, "elsewhere": Authority("elsewhere").pem}


def test_what_is_no_svid_we_can_not_even_show(root: Authority, issuer: Authority) -> None:
    """Two URI names are refused on our side before a foreign peer can: the file is not loaded."""
    both = issuer.issue(SERVER, "spiffe://td/other")
    with pytest.raises(errors.IdentityError, match="more than one URI name"):
        core.TlsClient(both.chain, both.key, {"td": root.pem}, 1)
    with pytest.raises(errors.IdentityError, match="more than one URI name"):
        core.TlsServer(both.chain, both.key, {"td": root.pem}, 1, True)


def test_foreign_servers_refuse_what_we_should_not_show(peer: Peer, root: Authority, issuer: Authority, tmp_path: Path) -> None:
    """As far as they can judge it. With the right certificate each of them serves us."""
    cases = refusals(peer, root, issuer)
    with peer.servers(tmp_path, {name: offer for name, (_, offer) in cases.items()}) as ports:
        for name, (shown, _) in cases.items():
            tls = core.TlsClient(shown.chain, shown.key, {**OWN, "td": root.pem}, 1)
            assert isinstance(call(tls, ports[name], "", peer.protocol), errors.MeshError), name
            good = issuer.issue(CLIENT)
            answer = call(core.TlsClient(good.chain, good.key, {"td": root.pem}, 1), ports[name], "", peer.protocol)
            assert isinstance(answer, core.HttpConnection), (name, answer)


def test_foreign_clients_refuse_what_we_should_not_show(peer: Peer, root: Authority, issuer: Authority, tmp_path: Path) -> None:
    """As far as they can judge it. Nothing of their request comes to us."""
    for name, (shown, offer) in refusals(peer, root, issuer).items():
        tls = core.TlsServer(shown.chain, shown.key, {**OWN, "td": root.pem}, 1, True, [peer.protocol.encode()])
        with our_server(tls) as we, peer.clients(tmp_path, {name: offer}, we.port) as calls:
            assert (name, calls[name](), we.peers) == (name, False, [])


# ------------------------------------------------------------------ sessions

# Seconds in which all of them are started and have called twice. It is waited for once, for all.
LIFE = 12.0


@pytest.mark.slow
def test_sessions_end_with_the_certificates_that_they_were_won_with(root: Authority, issuer: Authority, tmp_path: Path) -> None:
    """On either side, for each of them. Where their certificate has ended we refuse; where ours has, we don't offer the session, so
    that they see the certificate; and a ticket of ours is worth no more than what was shown for it."""
    here = {name: peer for name, peer in PEERS.items() if peer.is_here()}
    lasting = {"server": issuer.issue(SERVER), "client": issuer.issue(CLIENT)}
    short = {"server": issuer.issue(SERVER, end=LIFE), "client": issuer.issue(CLIENT, end=LIFE)}
    bundles = {"td": root.pem}
    ours: dict[str, core.TlsClient] = {}
    theirs: dict[str, core.TlsClient] = {}
    with contextlib.ExitStack() as stack:
        ports, servers, calls = {}, {}, {}
        for name, peer in here.items():
            offers = {"lasting": Offer(lasting["server"], root.pem), "short": Offer(short["server"], root.pem)}
            where = tmp_path / name
            for folder in (where / "server", where / "client"):
                folder.mkdir(parents=True)
            ports[name] = stack.enter_context(peer.servers(where / "server", offers))
            own = lasting["server"]
            tls = core.TlsServer(own.chain, own.key, bundles, 1, True, [peer.protocol.encode()])
            servers[name] = stack.enter_context(our_server(tls))
            offer = Offer(short["client"], root.pem)
            calls[name] = stack.enter_context(peer.clients(where / "client", {"short": offer}, servers[name].port))["short"]
            ours[name] = core.TlsClient(short["client"].chain, short["client"].key, bundles, 1)
            theirs[name] = core.TlsClient(lasting["client"].chain, lasting["client"].key, bundles, 1)

        def call_all(name: str) -> list[object]:
            """Our short certificate to their lasting one, ours that lasts to their short one, and they to us with their short one."""
            protocol = here[name].protocol
            first = call(ours[name], ports[name]["lasting"], SERVER, protocol)
            second = call(theirs[name], ports[name]["short"], SERVER, protocol)
            return [first, second, calls[name]()]

        for name in here:
            for _ in range(2):
                answers = call_all(name)
                assert [isinstance(each, core.HttpConnection) for each in answers[:2]] + [answers[2]] == [True] * 3, (
                    name,
                    answers,
                )
        # Each second call was a resumed one; else what follows would say nothing.
        assert {name: [tls.stats()["resumed"] for tls in (ours[name], theirs[name])] for name in here} == {
            name: [1, 1] for name in here
        }
        assert {name: servers[name].resumed for name in here} == {name: [False, True] for name in here}

        time.sleep(max(0.0, not_after_of(short["client"]) + 1.1 - time.time()))
        for name in here:
            answers = call_all(name)
            assert [isinstance(each, errors.MeshError) for each in answers[:2]] + [answers[2]] == [True, True, False], (
                name,
                answers,
            )
            assert isinstance(answers[1], errors.PeerIdentityError), (name, answers)
            assert (servers[name].peers, "has expired" in servers[name].errors[0]) == ([CLIENT, CLIENT], True), name
        assert {name: [tls.stats()["resumed"] for tls in (ours[name], theirs[name])] for name in here} == {
            name: [1, 1] for name in here
        }


# ------------------------------------------------------------------ the client of the SPIFFE project


def test_the_client_of_the_spiffe_project_reads_what_we_write(tmp_path: Path) -> None:
    """SVIDs with their keys, PEM bundles, and SPIFFE bundles (JSON)."""
    spiffe = pytest.importorskip("spiffe")
    from cryptography.hazmat.primitives.serialization import Encoding

    from meshlib.secure import bundle

    authority = identities(tmp_path, "orders")
    at = tmp_path / "identities" / "orders"
    svid = spiffe.X509Svid.parse((at / "svid.pem").read_bytes(), (at / "key.pem").read_bytes())
    assert (str(svid.spiffe_id), len(svid.cert_chain)) == (f"spiffe://{TRUST_DOMAIN}/ns/default/sa/orders", 2)
    trust_domain = spiffe.TrustDomain(TRUST_DOMAIN)
    roots = spiffe.X509Bundle.parse(trust_domain, (at / "bundle.pem").read_bytes()).x509_authorities
    assert [root.public_bytes(Encoding.DER) for root in roots] == list(bundle.parse(authority.bundle).x509)
    # Its reader of keys for tokens wants an identifier of every key, which the standard forbids for those for certificates: it gets
    # what the Workload API would hand out, the keys for tokens alone.
    token_key = {
        "kty": "EC",
        "crv": "P-256",
        "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
        "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
    }
    document = json.loads(bundle.format(bundle.parse(authority.bundle)))
    document["keys"].append({**token_key, "use": "jwt-svid", "kid": "k1"})
    written = bundle.format(bundle.parse(json.dumps(document).encode()))
    assert sorted(key["use"] for key in json.loads(written)["keys"]) == ["jwt-svid", "x509-svid"]
    assert list(spiffe.JwtBundle.parse(trust_domain, bundle.parse(written).jwt).jwt_authorities) == ["k1"]
    (x5c,) = (key["x5c"] for key in json.loads(written)["keys"] if key["use"] == "x509-svid")
    der = base64.b64decode(x5c[0])
    assert spiffe.X509Bundle.parse_raw(trust_domain, der).x509_authorities == roots
