#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
use std::sync::Arc;

use super::bundles;
use super::client::{ClientSession, TlsClient};
use super::server::{TlsConnection, TlsServer};
use crate::connection::{HttpConnection, Protocols};
use crate::error::{Error, ErrorKind};
use crate::http1::request::Request;
use crate::testing::{self, leaf, Authority, Clock, Event, Issued, Leaf, Recorder, HOUR, START};

mod counts;
mod tickets;

const CLIENT: &str = "spiffe://td/client";
const SERVER: &str = "spiffe://td/server";

// ------------------------------------------------------------------ what can't be loaded

#[test]
fn an_identity_that_does_not_fit_together_is_refused_when_loaded() {
    let root = Authority::new("root");
    let (a, b) = (root.svid("spiffe://td/a"), root.svid("spiffe://td/b"));
    let load = |chain: &str, key: &str, trust_domain: &str| {
        let bundles = testing::bundles(&[(trust_domain, &root.root)]);
        TlsClient::new(Some((chain.as_bytes(), key.as_bytes())), bundles, Clock::new())
            .map(|_| ())
            .map_err(|error| error.kind)
    };
    assert_eq!(Ok(()), load(&a.chain, &a.key, "td"));
    assert_eq!(Err(ErrorKind::Identity), load(&a.chain, &b.key, "td"));
    assert_eq!(Err(ErrorKind::Identity), load(&a.chain, "no key", "td"));
    assert_eq!(Err(ErrorKind::Identity), load("no chain", &a.key, "td"));
    assert_eq!(Err(ErrorKind::Identity), load(&root.root, &a.key, "td"));
    assert_eq!(Err(ErrorKind::TrustDomain), load(&a.chain, &a.key, "td2"));
}

#[test]
fn an_error_about_a_key_never_shows_it() {
    let root = Authority::new("root");
    let a = root.svid("spiffe://td/a");
    let secret = a.key.replace("PRIVATE", "SECRET");
    let error = TlsClient::new(
        Some((a.chain.as_bytes(), secret.as_bytes())),
        testing::bundles(&[("td", &root.root)]),
        Clock::new(),
    );
    let text = format!("{:?}", error.err().unwrap());
    assert!(a.key.lines().skip(1).all(|line| !text.contains(line.trim_matches('-'))), "{text}");
}

#[test]
fn a_bundle_holds_cas_and_nothing_else() {
    let root = Authority::new("root");
    let svid = root.svid("spiffe://td/a").chain;
    for (name, pem) in
        [("td", ""), ("td", "no pem"), ("td", svid.as_str()), ("Td", root.root.as_str()), ("", root.root.as_str())]
    {
        let error = bundles([(name, pem.as_bytes())], []).err().map(|error| error.kind);
        assert_eq!(Some(ErrorKind::Identity), error, "{name:?}");
    }
}

// ------------------------------------------------------------------ two sides that talk

struct Pair {
    root: Authority,
    clock: Arc<Clock>,
    client: Arc<TlsClient>,
    server: Arc<TlsServer>,
}

impl Pair {
    fn new() -> Pair {
        let root = Authority::new("root");
        let (client, server) = (root.svid(CLIENT), root.svid(SERVER));
        Pair::of(root, Some(&client), &server, true)
    }

    fn of(root: Authority, client: Option<&Issued>, server: &Issued, is_client_required: bool) -> Pair {
        let clock = Clock::new();
        let client = make_client(&root, client, &clock);
        let server = make_server(&root, server, is_client_required, &clock);
        Pair { root, clock, client, server }
    }

    fn connect(&self, expected: &str, address: &str) -> Result<(HttpConnection, TlsConnection), Error> {
        connect(&self.client, &self.server, expected, address)
    }

    fn is_resumed(&self, expected: &str, address: &str) -> bool {
        let (client, server) = self.connect(expected, address).unwrap();
        let resumed = super::is_resumed(client.session().unwrap().state());
        assert_eq!(resumed, super::is_resumed(server.state()));
        assert_eq!(Some(SERVER), client.session().unwrap().peer().map(|peer| peer.id.as_str()));
        assert_eq!(Some(CLIENT), server.peer().map(|peer| peer.id.as_str()));
        resumed
    }
}

fn make_client(root: &Authority, svid: Option<&Issued>, clock: &Arc<Clock>) -> Arc<TlsClient> {
    let svid = svid.map(|svid| (svid.chain.as_bytes(), svid.key.as_bytes()));
    Arc::new(TlsClient::new(svid, testing::bundles(&[("td", &root.root)]), clock.clone()).unwrap())
}

fn make_server(root: &Authority, svid: &Issued, is_client_required: bool, clock: &Arc<Clock>) -> Arc<TlsServer> {
    let (chain, key) = (svid.chain.as_bytes(), svid.key.as_bytes());
    let bundles = testing::bundles(&[("td", &root.root)]);
    Arc::new(
        TlsServer::new(chain, key, bundles, is_client_required, vec![b"http/1.1".to_vec()], clock.clone()).unwrap(),
    )
}

/// Shakes hands, until both sides have nothing more to say, and asks one thing, so that late refusals are seen too.
fn connect(
    tls: &Arc<TlsClient>,
    accept: &Arc<TlsServer>,
    expected: &str,
    address: &str,
) -> Result<(HttpConnection, TlsConnection), Error> {
    let mut client = HttpConnection::tls(tls.clone(), expected, address);
    let mut server = TlsConnection::new(accept.clone()).unwrap();
    let mut events = Recorder::default();
    client.open()?;
    exchange(&mut client, &mut server, &mut events)?;
    assert_eq!(vec![Event::Opened], events.0);
    Ok((client, server))
}

fn exchange(client: &mut HttpConnection, server: &mut TlsConnection, events: &mut Recorder) -> Result<(), Error> {
    while !client.output().is_empty() || !server.output().is_empty() {
        let bytes = client.output().to_vec();
        client.clear_output();
        server.absorb(&bytes);
        let refused = server.decrypt();
        let bytes = server.output().to_vec();
        server.clear_output();
        let heard = client.receive(&bytes, events);
        // If the server refuses, the client hears why at the same moment: the server's word is the cause.
        refused?;
        heard?;
    }
    Ok(())
}

fn ask(client: &mut HttpConnection) {
    let fields: &[(&[u8], &[u8])] = &[(b"host", b"orders")];
    client.send(&Request { method: "GET", target: "/", fields, body: b"", is_streaming: false }).unwrap();
    client.seal(b"").unwrap();
}

fn count(client: &TlsClient, name: &str) -> u64 {
    client.stats().into_iter().find(|(known, _)| *known == name).unwrap().1
}

#[test]
fn both_sides_know_one_another_before_the_first_byte() {
    let pair = Pair::new();
    let (mut client, mut server) = pair.connect(SERVER, "localhost:1").unwrap();
    ask(&mut client);
    let mut events = Recorder::default();
    exchange(&mut client, &mut server, &mut events).unwrap();
    assert_eq!(b"GET / HTTP/1.1\r\nhost: orders\r\n\r\n", server.plain());
    assert_eq!(Some("localhost"), server.server_name());
    server.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").unwrap();
    exchange(&mut client, &mut server, &mut events).unwrap();
    assert_eq!((b"ok".to_vec(), true, true), (events.body(), client.is_idle(), client.has_written()));
    assert_eq!([("full", 1), ("resumed", 0), ("failed", 0)], pair.client.handshakes.counts());
    assert_eq!([("full", 1), ("resumed", 0), ("failed", 0)], pair.server.handshakes.counts());
}

#[test]
fn a_request_sent_during_the_handshake_waits_for_its_end() {
    let pair = Pair::new();
    let mut client = HttpConnection::tls(pair.client.clone(), SERVER, "localhost:1");
    let mut server = TlsConnection::new(pair.server.clone()).unwrap();
    client.open().unwrap();
    ask(&mut client);
    client.clear_output_into(&mut server);
    assert!(!client.has_written());
    exchange(&mut client, &mut server, &mut Recorder::default()).unwrap();
    assert!(client.has_written());
    assert_eq!(b"GET / HTTP/1.1\r\nhost: orders\r\n\r\n", server.plain());
}

impl HttpConnection {
    fn clear_output_into(&mut self, server: &mut TlsConnection) {
        server.absorb(self.output());
        self.clear_output();
        server.decrypt().unwrap();
    }
}

#[test]
fn records_may_come_byte_by_byte() {
    let pair = Pair::new();
    let mut client = HttpConnection::tls(pair.client.clone(), SERVER, "localhost:1");
    let mut server = TlsConnection::new(pair.server.clone()).unwrap();
    let mut events = Recorder::default();
    client.open().unwrap();
    ask(&mut client);
    for _ in 0..4 {
        for byte in std::mem::take(&mut client.output().to_vec()) {
            server.absorb(&[byte]);
            server.decrypt().unwrap();
        }
        client.clear_output();
        for byte in server.output().to_vec() {
            client.receive(&[byte], &mut events).unwrap();
        }
        server.clear_output();
    }
    assert_eq!(b"GET / HTTP/1.1\r\nhost: orders\r\n\r\n", server.plain());
    assert_eq!(vec![Event::Opened], events.0);
}

#[test]
fn large_bodies_pass_both_ways() {
    let (mut client, mut server) = Pair::new().connect(SERVER, "localhost:1").unwrap();
    let body = vec![7u8; 1_000_003];
    let fields: &[(&[u8], &[u8])] = &[(b"host", b"orders")];
    let rest = client.send(&Request { method: "POST", target: "/", fields, body: &body, is_streaming: false }).unwrap();
    client.seal(rest).unwrap();
    let mut events = Recorder::default();
    exchange(&mut client, &mut server, &mut events).unwrap();
    assert!(server.plain().ends_with(&body));
    server.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000003\r\n\r\n").unwrap();
    server.send(&body).unwrap();
    let bytes = server.output().to_vec();
    for piece in bytes.chunks(65_521) {
        client.receive(piece, &mut events).unwrap();
    }
    assert_eq!((true, true), (events.body() == body, client.is_idle()));
}

#[test]
fn a_server_of_another_identity_gets_no_byte_of_the_request() {
    let pair = Pair::new();
    let mut client = HttpConnection::tls(pair.client.clone(), "spiffe://td/other", "localhost:1");
    let mut server = TlsConnection::new(pair.server.clone()).unwrap();
    client.open().unwrap();
    ask(&mut client);
    client.clear_output_into(&mut server);
    let error = client.receive(server.output(), &mut Recorder::default()).unwrap_err();
    assert_eq!((ErrorKind::PeerIdentity, false, false), (error.kind, client.has_written(), client.is_open()));
    assert!(error.message.contains(SERVER) && error.message.contains("spiffe://td/other"), "{error}");
    assert!(!client.output().is_empty(), "the alert");
    server.absorb(client.output());
    assert_eq!(ErrorKind::Tls, server.decrypt().unwrap_err().kind);
    assert!(server.plain().is_empty());
    assert_eq!(1, pair.client.handshakes.counts()[2].1);
    assert_eq!(1, pair.server.handshakes.counts()[2].1);
}

#[test]
fn a_client_without_certificate_is_refused_unless_that_is_allowed() {
    let required = Pair::of(Authority::new("root"), None, &Authority::new("x").svid(SERVER), true);
    let server = make_server(&required.root, &required.root.svid(SERVER), true, &required.clock);
    let error = connect(&required.client, &server, SERVER, "a:1").err().unwrap();
    assert_eq!((ErrorKind::PeerIdentity, "The peer showed no certificate."), (error.kind, error.message.as_ref()));

    let optional = make_server(&required.root, &required.root.svid(SERVER), false, &required.clock);
    let (_, server) = connect(&required.client, &optional, SERVER, "a:1").unwrap();
    assert_eq!(None, server.peer());
    let (client, server) = connect(&required.client, &optional, SERVER, "a:1").unwrap();
    assert_eq!((true, None), (super::is_resumed(client.session().unwrap().state()), server.peer()));
}

#[test]
fn a_client_of_another_mesh_is_refused_even_where_none_is_required() {
    let pair = Pair::new();
    let stranger = Authority::new("stranger");
    let foreign = stranger.svid(CLIENT);
    let bundles = testing::bundles(&[("td", &pair.root.root)]);
    let svid = Some((foreign.chain.as_bytes(), foreign.key.as_bytes()));
    let client = Arc::new(TlsClient::new(svid, bundles, pair.clock.clone()).unwrap());
    for is_required in [true, false] {
        let server = make_server(&pair.root, &pair.root.svid(SERVER), is_required, &pair.clock);
        let error = connect(&client, &server, SERVER, "a:1").err().unwrap();
        assert_eq!(ErrorKind::PeerIdentity, error.kind);
    }
}

#[test]
fn what_the_peer_thinks_of_our_certificate_is_said_plainly() {
    let pair = Pair::new();
    let foreign = Authority::new("stranger").svid(CLIENT);
    let svid = Some((foreign.chain.as_bytes(), foreign.key.as_bytes()));
    let tls = Arc::new(TlsClient::new(svid, testing::bundles(&[("td", &pair.root.root)]), pair.clock.clone()).unwrap());
    let mut client = HttpConnection::tls(tls, SERVER, "a:1");
    let mut server = TlsConnection::new(pair.server.clone()).unwrap();
    client.open().unwrap();
    let mut error = None;
    while error.is_none() {
        server.absorb(client.output());
        client.clear_output();
        let _ = server.decrypt();
        error = client.receive(server.output(), &mut Recorder::default()).err();
        server.clear_output();
    }
    let error = error.unwrap();
    assert_eq!(ErrorKind::Tls, error.kind);
    assert_eq!("The peer refused our certificate (alert UnknownCA).", error.message);
}

#[test]
fn plain_http_on_either_side_is_recognised() {
    let pair = Pair::new();
    let mut client = HttpConnection::tls(pair.client.clone(), SERVER, "a:1");
    client.open().unwrap();
    let error = client.receive(b"HTTP/1.1 400 Bad Request\r\n\r\n", &mut Recorder::default()).unwrap_err();
    assert_eq!((ErrorKind::Tls, "The peer does not speak TLS."), (error.kind, error.message.as_ref()));
    let mut server = TlsConnection::new(pair.server.clone()).unwrap();
    server.absorb(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n");
    assert_eq!("The peer does not speak TLS.", server.decrypt().unwrap_err().message);
    assert!(server.decrypt().is_err());
    assert!(server.send(b"x").is_err());
}

#[test]
fn an_end_during_the_handshake_is_a_lost_connection() {
    let pair = Pair::new();
    let mut client = HttpConnection::tls(pair.client.clone(), SERVER, "a:1");
    client.open().unwrap();
    assert_eq!(ErrorKind::Lost, client.receive_eof(&mut Recorder::default()).unwrap_err().kind);
    assert_eq!(1, pair.client.handshakes.counts()[2].1);
}

// ------------------------------------------------------------------ what a CA has taken back

/// The client's and the server's TLS of a generation that has this list.
fn with_list(pair: &Pair, client: &Issued, server: &Issued, list: &str) -> (Arc<TlsClient>, Arc<TlsServer>) {
    let load = || super::bundles([("td", pair.root.root.as_bytes())], [("td", list.as_bytes())]).unwrap();
    let svid = Some((client.chain.as_bytes(), client.key.as_bytes()));
    let asking = TlsClient::new(svid, load(), pair.clock.clone()).unwrap().counting_on(&pair.client);
    let (chain, key) = (server.chain.as_bytes(), server.key.as_bytes());
    let alpn = vec![b"http/1.1".to_vec()];
    let answering = TlsServer::new(chain, key, load(), true, alpn, pair.clock.clone()).unwrap();
    (Arc::new(asking), Arc::new(answering.counting_on(&pair.server)))
}

#[test]
fn a_new_list_of_revoked_certificates_is_not_got_around() {
    for is_client_revoked in [true, false] {
        let root = Authority::new("root");
        let client = root.issue(Leaf { serial: Some(1), ..leaf(CLIENT) });
        let server = root.issue(Leaf { serial: Some(2), ..leaf(SERVER) });
        let pair = Pair::of(root, Some(&client), &server, true);
        assert!(!pair.is_resumed(SERVER, "a:1"));
        assert!(pair.is_resumed(SERVER, "a:1"));
        let shown: Vec<_> = {
            let (_, open) = pair.connect(SERVER, "a:1").unwrap();
            open.state().peer_certificates().unwrap().to_vec()
        };
        assert!(pair.server.accepts(&shown));

        let list = pair.root.list(&[if is_client_revoked { 1 } else { 2 }], |_| ());
        let (new_client, new_server) = with_list(&pair, &client, &server, &list);
        assert_eq!(Some(START + 24 * HOUR), new_client.lists_until());
        // Tickets, memory and open connections: none of them knows better than the list.
        assert_eq!(!is_client_revoked, new_server.accepts(&shown));
        let error = if is_client_revoked {
            connect(&pair.client, &new_server, SERVER, "a:1").err().unwrap()
        } else {
            connect(&new_client, &pair.server, SERVER, "a:1").err().unwrap()
        };
        assert_eq!(ErrorKind::PeerIdentity, error.kind);
        assert_eq!("The peer did not prove its identity: its certificate was revoked by its CA.", error.message);
        assert_eq!(0, count(&new_client, "tickets_held"));
        // Whom it does not name goes on.
        let other = pair.root.list(&[3], |_| ());
        let (new_client, new_server) = with_list(&pair, &client, &server, &other);
        assert!(connect(&new_client, &new_server, SERVER, "a:1").is_ok());
        assert!(new_server.accepts(&shown));
    }
}

#[test]
fn who_is_revoked_is_told_so() {
    let root = Authority::new("root");
    let client = root.issue(Leaf { serial: Some(1), ..leaf(CLIENT) });
    let server = root.svid(SERVER);
    let pair = Pair::of(root, Some(&client), &server, true);
    let (_, answering) = with_list(&pair, &client, &server, &pair.root.list(&[1], |_| ()));
    let mut asking = HttpConnection::tls(pair.client.clone(), SERVER, "a:1");
    let mut accepted = TlsConnection::new(answering).unwrap();
    asking.open().unwrap();
    let mut heard = None;
    for _ in 0..4 {
        accepted.absorb(asking.output());
        asking.clear_output();
        let _ = accepted.decrypt();
        heard = heard.or(asking.receive(accepted.output(), &mut Recorder::default()).err());
        accepted.clear_output();
    }
    assert_eq!("The peer refused our certificate (alert CertificateRevoked).", heard.unwrap().message);
}

// ------------------------------------------------------------------ how it ends

#[test]
fn a_body_without_length_needs_a_farewell_to_be_complete() {
    let ended = |says_farewell: bool| {
        let (mut client, mut server) = Pair::new().connect(SERVER, "a:1").unwrap();
        let mut events = Recorder::default();
        ask(&mut client);
        exchange(&mut client, &mut server, &mut events).unwrap();
        server.send(b"HTTP/1.1 200 OK\r\n\r\nbody").unwrap();
        if says_farewell {
            server.close();
        }
        exchange(&mut client, &mut server, &mut events).unwrap();
        client.receive_eof(&mut events).map_err(|error| error.kind)?;
        Ok(events.is_reusable())
    };
    assert_eq!(Ok(Some(false)), ended(true));
    assert_eq!(Err(ErrorKind::Protocol), ended(false));
}

#[test]
fn each_side_says_farewell_and_hears_it() {
    let (mut client, mut server) = Pair::new().connect(SERVER, "a:1").unwrap();
    let mut events = Recorder::default();
    client.close();
    exchange(&mut client, &mut server, &mut events).unwrap();
    assert_eq!((true, false), (server.is_eof(), client.is_open()));

    let (mut client, mut server) = Pair::new().connect(SERVER, "a:1").unwrap();
    server.close();
    exchange(&mut client, &mut server, &mut events).unwrap();
    assert_eq!((vec![Event::Closed], false), (events.0, client.is_open()));
    client.close();
    assert!(!client.output().is_empty(), "our own farewell");
}

#[test]
fn damaged_records_end_the_connection_with_an_alert() {
    let (mut client, mut server) = Pair::new().connect(SERVER, "a:1").unwrap();
    ask(&mut client);
    let mut bytes = client.output().to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    server.absorb(&bytes);
    assert_eq!(ErrorKind::Tls, server.decrypt().unwrap_err().kind);
    assert!(server.plain().is_empty() && !server.output().is_empty());
    let error = client.receive(server.output(), &mut Recorder::default()).unwrap_err();
    assert_eq!("The peer ended the TLS connection with the alert BadRecordMac.", error.message);
}

#[test]
fn no_prefix_and_no_damage_of_a_handshake_panics() {
    let pair = Pair::new();
    let mut client = HttpConnection::tls(pair.client.clone(), SERVER, "a:1");
    client.open().unwrap();
    let hello = client.output().to_vec();
    for at in 0..hello.len() {
        let mut damaged = hello.clone();
        damaged[at] ^= 0x41;
        for bytes in [&damaged[..], &hello[..at], &[&hello[..at], &damaged[..]].concat()] {
            let mut server = TlsConnection::new(pair.server.clone()).unwrap();
            server.absorb(bytes);
            let _ = server.decrypt();
            server.absorb(bytes);
            let _ = server.decrypt();
            server.close();
        }
    }
}
