#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::server::{NoClientAuth, ProducesTickets, ServerConfig, UnbufferedServerConnection};
use rustls::SupportedProtocolVersion;

use super::bundles;
use super::client::{ClientSession, TlsClient};
use super::server::{TlsConnection, TlsServer};
use crate::connection::{HttpConnection, Protocols};
use crate::error::{Error, ErrorKind};
use crate::http1::request::Request;
use crate::testing::{self, leaf, Authority, Clock, Event, Issued, Leaf, Recorder, HOUR, START};

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
fn an_end_during_the_handshake_is_an_error_of_tls() {
    let pair = Pair::new();
    let mut client = HttpConnection::tls(pair.client.clone(), SERVER, "a:1");
    client.open().unwrap();
    assert_eq!(ErrorKind::Tls, client.receive_eof(&mut Recorder::default()).unwrap_err().kind);
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

// ------------------------------------------------------------------ sessions

#[test]
fn a_second_connection_resumes_and_is_known_all_the_same() {
    let pair = Pair::new();
    assert!(!pair.is_resumed(SERVER, "a:1"));
    assert!(pair.is_resumed(SERVER, "a:1"));
    assert!(pair.is_resumed(SERVER, "a:1"));
    assert_eq!([("full", 1), ("resumed", 2), ("failed", 0)], pair.client.handshakes.counts());
    assert_eq!([("full", 1), ("resumed", 2), ("failed", 0)], pair.server.handshakes.counts());
}

#[test]
fn a_ticket_serves_its_own_address_and_expected_identity_only() {
    let pair = Pair::new();
    assert!(!pair.is_resumed(SERVER, "a:1"));
    assert!(!pair.is_resumed(SERVER, "a:2"));
    assert!(!pair.is_resumed(SERVER, "b:1"));
    assert!(!pair.is_resumed("", "a:1"));
    assert!(pair.is_resumed("", "a:1"));
    assert!(pair.connect("spiffe://td/other", "a:1").is_err());
}

#[test]
fn a_new_generation_on_either_side_begins_without_tickets() {
    let mut pair = Pair::new();
    assert!(!pair.is_resumed(SERVER, "a:1"));
    pair.client = make_client(&pair.root, Some(&pair.root.svid(CLIENT)), &pair.clock);
    assert!(!pair.is_resumed(SERVER, "a:1"));
    assert!(pair.is_resumed(SERVER, "a:1"));
    pair.server = make_server(&pair.root, &pair.root.svid(SERVER), true, &pair.clock);
    assert!(!pair.is_resumed(SERVER, "a:1"));
}

#[test]
fn a_ticket_lives_for_an_hour() {
    let pair = Pair::new();
    assert!(!pair.is_resumed(SERVER, "a:1"));
    pair.clock.advance(HOUR - 1);
    assert!(pair.is_resumed(SERVER, "a:1"));
    pair.clock.advance(HOUR + 1);
    assert!(!pair.is_resumed(SERVER, "a:1"));
}

#[test]
fn a_ticket_dies_with_the_first_certificate_that_it_was_won_with() {
    for (client_life, server_life) in [(600, 24 * HOUR), (24 * HOUR, 600)] {
        let root = Authority::new("root");
        let short = |id: &str, life: u64| root.issue(Leaf { not_after: START + life, ..leaf(id) });
        let (client, server) = (short(CLIENT, client_life), short(SERVER, server_life));
        let pair = Pair::of(root, Some(&client), &server, true);
        assert!(!pair.is_resumed(SERVER, "a:1"));
        pair.clock.advance(300);
        assert!(pair.is_resumed(SERVER, "a:1"));
        pair.clock.advance(301);
        // Past the certificate's end no handshake at all can succeed, resumed or full.
        assert_eq!(ErrorKind::PeerIdentity, pair.connect(SERVER, "a:1").err().unwrap().kind);
        assert_eq!([("full", 1), ("resumed", 1)], pair.server.handshakes.counts()[..2]);
    }
}

/// A ticket's own end would hide a missing check; a clock set back to before the certificate's beginning doesn't.
#[test]
fn a_resumed_peer_is_judged_again_on_either_side() {
    for is_client_set_back in [true, false] {
        let root = Authority::new("root");
        let (client_clock, server_clock) = (Clock::new(), Clock::new());
        let client = make_client(&root, Some(&root.svid(CLIENT)), &client_clock);
        let server = make_server(&root, &root.svid(SERVER), true, &server_clock);
        connect(&client, &server, SERVER, "a:1").unwrap();
        if is_client_set_back { &client_clock } else { &server_clock }.set_back(120);

        let mut asking = HttpConnection::tls(client.clone(), SERVER, "a:1");
        let mut answering = TlsConnection::new(server.clone()).unwrap();
        asking.open().unwrap();
        ask(&mut asking);
        let mut events = Recorder::default();
        let error = exchange(&mut asking, &mut answering, &mut events).unwrap_err();
        assert_eq!(ErrorKind::PeerIdentity, error.kind);
        assert!(error.message.ends_with("its certificate is not valid yet."), "{error}");
        assert!(super::is_resumed(answering.state()));
        assert!(answering.plain().is_empty());
        let refusing = if is_client_set_back { &client.handshakes } else { &server.handshakes };
        assert_eq!([("full", 1), ("resumed", 0), ("failed", 1)], refusing.counts());
        if is_client_set_back {
            assert_eq!((false, true), (asking.has_written(), events.0.is_empty()));
        }
    }
}

#[test]
fn a_forged_ticket_leads_to_a_full_handshake() {
    let key = super::tickets::TicketKey::random().unwrap();
    let sealed = key.seal_for_test(START + 1, b"session");
    assert_eq!(Some((START + 1, b"session".to_vec())), key.open_for_test(&sealed));
    for at in 0..sealed.len() {
        let mut forged = sealed.clone();
        forged[at] ^= 1;
        assert_eq!(None, key.open_for_test(&forged));
        assert_eq!(None, key.open_for_test(&sealed[..at]));
    }
    assert_eq!(None, super::tickets::TicketKey::random().unwrap().open_for_test(&sealed));
}

#[test]
fn tickets_of_many_targets_stay_bounded() {
    let pair = Pair::new();
    assert!(!pair.is_resumed(SERVER, "first:1"));
    assert!(!pair.is_resumed(SERVER, "in use:1"));
    for port in 0..1023 {
        let _ = pair.connect(SERVER, &format!("a:{port}")).unwrap();
        if port == 512 {
            assert!(pair.is_resumed(SERVER, "in use:1"));
        }
    }
    assert!(!pair.is_resumed(SERVER, "first:1"));
    assert!(pair.is_resumed(SERVER, "a:1022"));
    assert!(pair.is_resumed(SERVER, "in use:1"), "what is used stays");
    assert!(count(&pair.client, "tickets_held") <= 2048);
}

/// A server by rustls itself, without our rules: it asks for no certificate, and gives as many tickets as it likes.
struct Foreign {
    configuration: Arc<ServerConfig>,
}

#[derive(Debug)]
struct Shown(Arc<rustls::sign::CertifiedKey>);

impl rustls::server::ResolvesServerCert for Shown {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<rustls::sign::CertifiedKey>> {
        Some(self.0.clone())
    }
}

/// Tickets in which the session lies open. They never end.
#[derive(Debug)]
struct Careless;

impl ProducesTickets for Careless {
    fn enabled(&self) -> bool {
        true
    }
    fn lifetime(&self) -> u32 {
        7 * 24 * 3600
    }
    fn encrypt(&self, session: &[u8]) -> Option<Vec<u8>> {
        Some(session.to_vec())
    }
    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        Some(ticket.to_vec())
    }
}

/// Keeps its sessions itself, as a server that accepts early data does.
#[derive(Debug)]
struct Nothing;

impl ProducesTickets for Nothing {
    fn enabled(&self) -> bool {
        false
    }
    fn lifetime(&self) -> u32 {
        0
    }
    fn encrypt(&self, _: &[u8]) -> Option<Vec<u8>> {
        None
    }
    fn decrypt(&self, _: &[u8]) -> Option<Vec<u8>> {
        None
    }
}

impl Foreign {
    fn new(svid: &Issued, version: &'static SupportedProtocolVersion, tickets: usize, clock: &Arc<Clock>) -> Foreign {
        let provider: Arc<CryptoProvider> = super::provider();
        let own = super::Svid::from_pem(svid.chain.as_bytes(), svid.key.as_bytes(), &provider).unwrap();
        let mut made = ServerConfig::builder_with_details(provider, clock.clone())
            .with_protocol_versions(&[version])
            .unwrap()
            .with_client_cert_verifier(Arc::new(NoClientAuth))
            .with_cert_resolver(Arc::new(Shown(own.key)));
        made.ticketer = Arc::new(Careless);
        made.send_tls13_tickets = tickets;
        Foreign { configuration: Arc::new(made) }
    }

    fn open(&self) -> super::session::Session<UnbufferedServerConnection> {
        super::session::Session::new(UnbufferedServerConnection::new(self.configuration.clone()).unwrap())
    }

    /// Whether the handshake was a resumed one.
    fn connect(&self, tls: &Arc<TlsClient>, expected: &str, address: &str) -> Result<bool, Error> {
        self.answer(ClientSession::new(tls.clone(), expected, address)?).map(|client| super::is_resumed(client.state()))
    }

    fn answer(&self, mut client: ClientSession) -> Result<ClientSession, Error> {
        let mut server = self.open();
        let (mut out, mut plain) = (Vec::new(), Vec::new());
        client.pump(&mut out, &mut plain)?;
        while !out.is_empty() {
            server.absorb(&out);
            out.clear();
            server.pump::<rustls::Error>(&mut out, &mut plain, |_| Ok(())).unwrap();
            client.absorb(&out);
            out.clear();
            client.pump(&mut out, &mut plain)?;
        }
        assert!(client.is_established());
        Ok(client)
    }
}

const VERSIONS: [&SupportedProtocolVersion; 2] = [&rustls::version::TLS12, &rustls::version::TLS13];

fn count(client: &TlsClient, name: &str) -> u64 {
    client.stats().into_iter().find(|(known, _)| *known == name).unwrap().1
}

/// The numbers of all extensions of the client's first message.
fn extensions_offered(hello: &[u8]) -> Vec<u16> {
    let number = |at: usize| usize::from(hello[at]) << 8 | usize::from(hello[at + 1]);
    let mut at = 5 + 4 + 2 + 32; // record, message, version, random
    at += 1 + usize::from(hello[at]);
    at += 2 + number(at);
    at += 1 + usize::from(hello[at]);
    let end = at + 2 + number(at);
    at += 2;
    let mut found = Vec::new();
    while at < end {
        found.push(u16::try_from(number(at)).unwrap());
        at += 4 + number(at + 2);
    }
    found
}

const EARLY_DATA: u16 = 42;
const PRE_SHARED_KEY: u16 = 41;

#[test]
fn the_suites_that_processors_are_quick_at_come_first_and_none_is_lost() {
    let (client, server) = Pair::new().connect(SERVER, "a:1").unwrap();
    let both = [client.session().unwrap().state(), server.state()].map(super::cipher);
    assert_eq!([(); 2].map(|()| Some("TLS_AES_128_GCM_SHA256".to_owned())), both);
    let names = |provider: &CryptoProvider| {
        let mut names: Vec<_> = provider.cipher_suites.iter().map(|suite| format!("{:?}", suite.suite())).collect();
        names.sort();
        names
    };
    assert_eq!(names(&super::crypto::provider()), names(&super::provider()));
}

#[test]
fn early_data_is_never_offered_even_where_a_ticket_invites_to_it() {
    let pair = Pair::new();
    let mut inviting = Foreign::new(&pair.root.svid(SERVER), &rustls::version::TLS13, 2, &pair.clock);
    let mut stateful = (*inviting.configuration).clone();
    stateful.ticketer = Arc::new(Nothing);
    stateful.session_storage = rustls::server::ServerSessionMemoryCache::new(32);
    stateful.max_early_data_size = 16 * 1024;
    inviting.configuration = Arc::new(stateful);
    assert_eq!(Ok(false), inviting.connect(&pair.client, SERVER, "a:1"));
    let mut asking = HttpConnection::tls(pair.client.clone(), SERVER, "a:1");
    asking.open().unwrap();
    ask(&mut asking);
    let offered = extensions_offered(asking.output());
    assert_eq!((true, false), (offered.contains(&PRE_SHARED_KEY), offered.contains(&EARLY_DATA)), "{offered:?}");
    let hello = asking.output().to_vec();
    assert_eq!(usize::from(hello[3]) << 8 | usize::from(hello[4]), hello.len() - 5, "the request waits");
    assert_eq!(Ok(true), inviting.connect(&pair.client, SERVER, "a:1"));
}

#[test]
fn a_ticket_ends_an_hour_after_the_certificates_were_shown_however_often_it_was_renewed() {
    for version in VERSIONS {
        let pair = Pair::new();
        let foreign = Foreign::new(&pair.root.svid(SERVER), version, 2, &pair.clock);
        assert_eq!(Ok(false), foreign.connect(&pair.client, SERVER, "a:1"));
        for _ in 0..3 {
            pair.clock.advance(HOUR / 4);
            assert_eq!(Ok(true), foreign.connect(&pair.client, SERVER, "a:1"));
        }
        pair.clock.advance(HOUR / 4);
        assert_eq!(Ok(false), foreign.connect(&pair.client, SERVER, "a:1"), "{version:?}");
        assert_eq!(Ok(true), foreign.connect(&pair.client, SERVER, "a:1"));
        assert!(count(&pair.client, "tickets_expired") > 0);
    }
}

#[test]
fn a_ticket_of_ours_keeps_its_end_when_it_is_renewed() {
    let pair = Pair::new();
    let given = |accepting: &Arc<super::server::Accepting>, key: &Arc<super::tickets::TicketKey>| {
        super::tickets::GivenTickets {
            key: key.clone(),
            time: pair.clock.clone(),
            own_not_after: START + 24 * HOUR,
            accepting: accepting.clone(),
        }
    };
    let key = Arc::new(super::tickets::TicketKey::random().unwrap());
    let first = given(&Arc::new(super::server::Accepting::default()), &key);
    let ticket = first.encrypt(b"session").unwrap();
    assert_eq!(START + HOUR, key.open_for_test(&ticket).unwrap().0);
    pair.clock.advance(HOUR / 2);
    let second = given(&Arc::new(super::server::Accepting::default()), &key);
    assert_eq!(Some(b"session".to_vec()), second.decrypt(&ticket));
    let renewed = second.encrypt(b"session").unwrap();
    assert_eq!(START + HOUR, key.open_for_test(&renewed).unwrap().0);
    assert_eq!(u32::try_from(HOUR / 2).unwrap(), second.lifetime());
    pair.clock.advance(HOUR / 2);
    assert_eq!((None, false), (second.decrypt(&renewed), second.enabled()));
}

#[test]
fn a_ticket_is_not_offered_past_the_end_of_either_certificate() {
    for version in VERSIONS {
        for (client_life, server_life) in [(600, 24 * HOUR), (24 * HOUR, 600)] {
            let root = Authority::new("root");
            let short = |id: &str, life: u64| root.issue(Leaf { not_after: START + life, ..leaf(id) });
            let (own, peer) = (short(CLIENT, client_life), short(SERVER, server_life));
            let clock = Clock::new();
            let client = make_client(&root, Some(&own), &clock);
            let foreign = Foreign::new(&peer, version, 2, &clock);
            assert_eq!(Some(START + client_life), client.not_after());
            assert_eq!(Ok(false), foreign.connect(&client, SERVER, "a:1"));
            clock.advance(599);
            assert_eq!(Ok(true), foreign.connect(&client, SERVER, "a:1"));
            clock.advance(1);
            // At its very last second a certificate still counts; it is shown in full.
            assert_eq!(Ok(false), foreign.connect(&client, SERVER, "a:1"), "{version:?} {client_life}");
        }
    }
}

#[test]
fn a_resumed_session_carries_the_identity_that_was_proved_and_its_end() {
    for version in VERSIONS {
        let pair = Pair::new();
        let svid = pair.root.issue(Leaf { not_after: START + 5000, ..leaf(SERVER) });
        let foreign = Foreign::new(&svid, version, 1, &pair.clock);
        for is_resumed in [false, true] {
            let client = foreign.answer(ClientSession::new(pair.client.clone(), SERVER, "a:1").unwrap()).unwrap();
            assert_eq!(is_resumed, super::is_resumed(client.state()));
            let peer = client.peer().unwrap();
            assert_eq!((SERVER, START + 5000), (peer.id.as_str(), peer.not_after));
        }
        // Its certificate is judged again, although it isn't shown: here by a clock that was set back.
        pair.clock.set_back(120);
        let error = foreign.connect(&pair.client, SERVER, "a:1").unwrap_err();
        assert_eq!(ErrorKind::PeerIdentity, error.kind, "{version:?}");
        assert_eq!([("full", 1), ("resumed", 1), ("failed", 1)], pair.client.handshakes.counts());
    }
}

#[test]
fn a_ticket_is_never_offered_under_another_expected_identity() {
    for version in VERSIONS {
        let pair = Pair::new();
        let foreign = Foreign::new(&pair.root.svid(SERVER), version, 4, &pair.clock);
        assert_eq!(Ok(false), foreign.connect(&pair.client, SERVER, "a:1"));
        let error = foreign.connect(&pair.client, "spiffe://td/other", "a:1").unwrap_err();
        assert_eq!(ErrorKind::PeerIdentity, error.kind);
        assert_eq!(0, count(&pair.client, "tickets_used"), "{version:?}");
        assert_eq!(Ok(true), foreign.connect(&pair.client, SERVER, "a:1"));
    }
}

#[test]
fn a_ticket_is_kept_by_what_was_offered_to_be_spoken() {
    let pair = Pair::new();
    let foreign = Foreign::new(&pair.root.svid(SERVER), &rustls::version::TLS13, 2, &pair.clock);
    let is_resumed = |protocols| {
        let client = ClientSession::offering(pair.client.clone(), SERVER, "a:1", protocols).unwrap();
        super::is_resumed(foreign.answer(client).unwrap().state())
    };
    let offers = [Protocols::Http1, Protocols::Http2, Protocols::Either];
    assert_eq!([false; 3], offers.map(is_resumed));
    assert_eq!([true; 3], offers.map(is_resumed));
    // No address can be made up that is another target's.
    let target = |address, expected| super::tickets::target_of(address, expected, &[b"h2".to_vec()]);
    assert_ne!(target("a:1", "spiffe://td/a"), target("spiffe://td/a\nh2\na:1", ""));
    assert_ne!(target("a:1", ""), target("a:1", "spiffe://td/a"));
}

#[test]
fn a_ticket_of_tls_1_3_is_used_once() {
    let pair = Pair::new();
    let foreign = Foreign::new(&pair.root.svid(SERVER), &rustls::version::TLS13, 1, &pair.clock);
    assert_eq!(Ok(false), foreign.connect(&pair.client, SERVER, "a:1"));
    let [first, second] = [(); 2].map(|()| ClientSession::new(pair.client.clone(), SERVER, "a:1").unwrap());
    let resumed = [first, second].map(|client| super::is_resumed(foreign.answer(client).unwrap().state()));
    assert_eq!([true, false], resumed);
}

#[test]
fn the_tickets_of_one_target_and_of_all_stay_bounded() {
    let pair = Pair::new();
    let generous = Foreign::new(&pair.root.svid(SERVER), &rustls::version::TLS13, 12, &pair.clock);
    assert_eq!(Ok(false), generous.connect(&pair.client, SERVER, "a:0"));
    let of = |name| count(&pair.client, name);
    assert_eq!((12, 8, 4), (of("tickets_stored"), of("tickets_held"), of("tickets_evicted")));
    for port in 1..=256 {
        generous.connect(&pair.client, SERVER, &format!("a:{port}")).unwrap();
    }
    assert_eq!(2048, of("tickets_held"));
    assert_eq!(of("tickets_stored"), of("tickets_held") + of("tickets_evicted"));
    assert_eq!(Ok(false), generous.connect(&pair.client, SERVER, "a:0"));
    assert_eq!(Ok(true), generous.connect(&pair.client, SERVER, "a:256"));
}

#[test]
fn a_key_of_tickets_that_a_server_threw_away_costs_a_full_handshake_only() {
    let pair = Pair::new();
    let mut foreign = Foreign::new(&pair.root.svid(SERVER), &rustls::version::TLS13, 1, &pair.clock);
    assert_eq!(Ok(false), foreign.connect(&pair.client, SERVER, "a:1"));
    let mut changed = (*foreign.configuration).clone();
    changed.ticketer = super::crypto::ticketer();
    foreign.configuration = Arc::new(changed);
    assert_eq!(Ok(false), foreign.connect(&pair.client, SERVER, "a:1"));
    assert_eq!(Ok(true), foreign.connect(&pair.client, SERVER, "a:1"));
}

// ------------------------------------------------------------------ what is counted

#[test]
fn each_handshake_ends_in_one_counter() {
    let pair = Pair::new();
    let stats = |client: &TlsClient| client.handshakes.failures().map(|(_, count)| count);
    assert!(pair.connect("spiffe://td/other", "a:1").is_err());
    assert_eq!([1, 0, 0, 0], stats(&pair.client));

    let mut plain = HttpConnection::tls(pair.client.clone(), SERVER, "a:1");
    plain.open().unwrap();
    plain.receive(b"HTTP/1.1 400 Bad Request\r\n\r\n", &mut Recorder::default()).unwrap_err();
    drop(plain);
    assert_eq!([1, 0, 1, 0], stats(&pair.client));

    let mut ended = HttpConnection::tls(pair.client.clone(), SERVER, "a:1");
    ended.open().unwrap();
    ended.receive_eof(&mut Recorder::default()).unwrap_err();
    drop(ended);
    let mut given_up = HttpConnection::tls(pair.client.clone(), SERVER, "a:1");
    given_up.open().unwrap();
    drop(given_up);
    assert_eq!([1, 0, 1, 2], stats(&pair.client));
    let (mut open, _server) = pair.connect(SERVER, "a:1").unwrap();
    open.receive(b"\x17\x03\x03\x00\x05later", &mut Recorder::default()).unwrap_err();
    drop(open);
    assert_eq!([("full", 1), ("resumed", 0), ("failed", 4)], pair.client.handshakes.counts());
}

#[test]
fn a_server_counts_who_came_and_why_it_failed() {
    let pair = Pair::new();
    drop(TlsConnection::new(pair.server.clone()).unwrap());
    assert_eq!(
        [0; 4],
        pair.server.handshakes.failures().map(|(_, count)| count),
        "a probe of the port is no handshake"
    );
    let mut begun = TlsConnection::new(pair.server.clone()).unwrap();
    begun.absorb(b"\x16");
    begun.decrypt().unwrap();
    drop(begun);
    let stranger = Authority::new("stranger").svid(CLIENT);
    let svid = Some((stranger.chain.as_bytes(), stranger.key.as_bytes()));
    let bundles = testing::bundles(&[("td", &pair.root.root)]);
    let client = Arc::new(TlsClient::new(svid, bundles, pair.clock.clone()).unwrap());
    assert!(connect(&client, &pair.server, SERVER, "a:1").is_err());
    assert!(pair.connect("spiffe://td/other", "a:1").is_err());
    let mut told = TlsConnection::new(pair.server.clone()).unwrap();
    told.absorb(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n");
    told.decrypt().unwrap_err();
    let names = ["failed_identity", "failed_refused", "failed_protocol", "failed_lost"];
    let expected = names.into_iter().zip([1, 0, 1, 2]).collect::<Vec<_>>();
    assert_eq!(expected, pair.server.handshakes.failures().to_vec());
}

#[test]
fn counters_go_on_over_a_rotation_and_tickets_do_not() {
    let mut pair = Pair::new();
    assert!(!pair.is_resumed(SERVER, "a:1"));
    let mut late = HttpConnection::tls(pair.client.clone(), SERVER, "a:1");
    late.open().unwrap();
    let before = pair.client.clone();
    let bundles = || testing::bundles(&[("td", &pair.root.root)]);
    let renewed = pair.root.svid(CLIENT);
    let svid = Some((renewed.chain.as_bytes(), renewed.key.as_bytes()));
    let client = TlsClient::new(svid, bundles(), pair.clock.clone()).unwrap().counting_on(&before);
    assert_eq!((1, 0), (client.handshakes.counts()[0].1, count(&client, "tickets_held")));
    pair.client = Arc::new(client);
    assert!(!pair.is_resumed(SERVER, "a:1"));
    drop(late);
    assert_eq!([("full", 2), ("resumed", 0), ("failed", 1)], pair.client.handshakes.counts());
    assert_eq!([("full", 2), ("resumed", 0), ("failed", 1)], before.handshakes.counts());
}

#[test]
fn our_own_end_is_that_of_the_first_certificate_of_our_chain() {
    let root = Authority::new("root");
    let clock = Clock::new();
    let svid = root.issue(Leaf { not_after: START + 5000, ..leaf(CLIENT) });
    assert_eq!(Some(START + 5000), make_client(&root, Some(&svid), &clock).not_after());
    for (end, expected) in [(START + 1000, START + 1000), (START - 1, START + 5000), (START + 9000, START + 5000)] {
        let below = root.issue(Leaf { not_after: end, not_before: START - 60, ..leaf("spiffe://td/below") });
        let longer = Issued { chain: format!("{}{}", svid.chain, below.chain), key: svid.key.clone() };
        assert_eq!(Some(expected), make_client(&root, Some(&longer), &clock).not_after());
    }
    assert_eq!(None, make_client(&root, None, &clock).not_after());
}
