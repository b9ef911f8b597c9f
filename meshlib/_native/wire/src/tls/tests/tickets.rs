//! Does a session come back to those alone who won it, and for no longer than what it was won with?
use rustls::crypto::CryptoProvider;
use rustls::server::{NoClientAuth, ProducesTickets, ServerConfig, UnbufferedServerConnection};
use rustls::SupportedProtocolVersion;

use super::*;

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
        assert!(crate::tls::is_resumed(answering.state()));
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
    let key = crate::tls::tickets::TicketKey::random().unwrap();
    let sealed = key.seal_for_test(START + 1, b"session");
    assert_eq!(Some((START + 1, b"session".to_vec())), key.open_for_test(&sealed));
    for at in 0..sealed.len() {
        let mut forged = sealed.clone();
        forged[at] ^= 1;
        assert_eq!(None, key.open_for_test(&forged));
        assert_eq!(None, key.open_for_test(&sealed[..at]));
    }
    assert_eq!(None, crate::tls::tickets::TicketKey::random().unwrap().open_for_test(&sealed));
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
        let provider: Arc<CryptoProvider> = crate::tls::provider();
        let own = crate::tls::Svid::from_pem(svid.chain.as_bytes(), svid.key.as_bytes(), &provider).unwrap();
        let mut made = ServerConfig::builder_with_details(provider, clock.clone())
            .with_protocol_versions(&[version])
            .unwrap()
            .with_client_cert_verifier(Arc::new(NoClientAuth))
            .with_cert_resolver(Arc::new(Shown(own.key)));
        made.ticketer = Arc::new(Careless);
        made.send_tls13_tickets = tickets;
        Foreign { configuration: Arc::new(made) }
    }

    fn open(&self) -> crate::tls::session::Session<UnbufferedServerConnection> {
        crate::tls::session::Session::new(UnbufferedServerConnection::new(self.configuration.clone()).unwrap())
    }

    /// Whether the handshake was a resumed one.
    fn connect(&self, tls: &Arc<TlsClient>, expected: &str, address: &str) -> Result<bool, Error> {
        self.answer(ClientSession::new(tls.clone(), expected, address)?)
            .map(|client| crate::tls::is_resumed(client.state()))
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
    let both = [client.session().unwrap().state(), server.state()].map(crate::tls::cipher);
    assert_eq!([(); 2].map(|()| Some("TLS_AES_128_GCM_SHA256".to_owned())), both);
    let names = |provider: &CryptoProvider| {
        let mut names: Vec<_> = provider.cipher_suites.iter().map(|suite| format!("{:?}", suite.suite())).collect();
        names.sort();
        names
    };
    assert_eq!(names(&crate::tls::crypto::provider()), names(&crate::tls::provider()));
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
    let given = |accepting: &Arc<crate::tls::server::Accepting>, key: &Arc<crate::tls::tickets::TicketKey>| {
        crate::tls::tickets::GivenTickets {
            key: key.clone(),
            time: pair.clock.clone(),
            own_not_after: START + 24 * HOUR,
            accepting: accepting.clone(),
        }
    };
    let key = Arc::new(crate::tls::tickets::TicketKey::random().unwrap());
    let first = given(&Arc::new(crate::tls::server::Accepting::default()), &key);
    let ticket = first.encrypt(b"session").unwrap();
    assert_eq!(START + HOUR, key.open_for_test(&ticket).unwrap().0);
    pair.clock.advance(HOUR / 2);
    let second = given(&Arc::new(crate::tls::server::Accepting::default()), &key);
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
            assert_eq!(is_resumed, crate::tls::is_resumed(client.state()));
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
        crate::tls::is_resumed(foreign.answer(client).unwrap().state())
    };
    let offers = [Protocols::Http1, Protocols::Http2, Protocols::Either];
    assert_eq!([false; 3], offers.map(is_resumed));
    assert_eq!([true; 3], offers.map(is_resumed));
    // No address can be made up that is another target's.
    let target = |address, expected| crate::tls::tickets::target_of(address, expected, &[b"h2".to_vec()]);
    assert_ne!(target("a:1", "spiffe://td/a"), target("spiffe://td/a\nh2\na:1", ""));
    assert_ne!(target("a:1", ""), target("a:1", "spiffe://td/a"));
}

#[test]
fn a_ticket_of_tls_1_3_is_used_once() {
    let pair = Pair::new();
    let foreign = Foreign::new(&pair.root.svid(SERVER), &rustls::version::TLS13, 1, &pair.clock);
    assert_eq!(Ok(false), foreign.connect(&pair.client, SERVER, "a:1"));
    let [first, second] = [(); 2].map(|()| ClientSession::new(pair.client.clone(), SERVER, "a:1").unwrap());
    let resumed = [first, second].map(|client| crate::tls::is_resumed(foreign.answer(client).unwrap().state()));
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
    changed.ticketer = crate::tls::crypto::ticketer();
    foreign.configuration = Arc::new(changed);
    assert_eq!(Ok(false), foreign.connect(&pair.client, SERVER, "a:1"));
    assert_eq!(Ok(true), foreign.connect(&pair.client, SERVER, "a:1"));
}
