//! What do both sides count, and what of that outlives a rotation?
use super::*;

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
