//! Which bytes of a connection to a server may somebody else's protocol see, and did the server prove who it is? The client's record
//! layer.
//!
//! The mirror of the server's `TlsConnection`, for a driver whose HTTP is not ours: gRPC's core speaks it, and this is its TLS. The
//! session, its checks and its tickets are those of every other connection of the same `TlsClient`. Plain text is handed out only
//! after the handshake, its check of the peer, and the agreement on the protocol that was asked for.
use std::sync::Arc;

use crate::connection::{recycle, Protocols};
use crate::error::{Error, ErrorKind, Result};
use crate::tls::client::{ClientSession, TlsClient, HTTP2};
use crate::tls::verify::Peer;
use crate::tls::CommonState;

/// The client's side of one TLS connection over which HTTP/2 is spoken by somebody else.
#[derive(Debug)]
pub struct TlsTunnel {
    session: ClientSession,
    is_agreed: bool,
    is_over: bool,
    output: Vec<u8>,
    plain: Vec<u8>,
}

impl TlsTunnel {
    /// The peer must prove to be `expected`, a SPIFFE ID, or (if that is empty) anyone whom the bundles know.
    pub fn new(tls: Arc<TlsClient>, expected: &str, address: &str) -> Result<TlsTunnel> {
        let session = ClientSession::offering(tls, expected, address, Protocols::Http2)?;
        Ok(TlsTunnel { session, is_agreed: false, is_over: false, output: Vec::new(), plain: Vec::new() })
    }

    /// Adds what the socket gave.
    pub fn absorb(&mut self, data: &[u8]) {
        if !self.is_over {
            self.session.absorb(data);
        }
    }

    /// Works off what was absorbed; the first call, with nothing, begins the handshake. After an error the output ends in the alert,
    /// and the connection is of no use.
    pub fn decrypt(&mut self) -> Result<()> {
        if self.is_over {
            return Err(over());
        }
        if let Err(error) = self.session.pump(&mut self.output, &mut self.plain) {
            self.is_over = true;
            return Err(error);
        }
        if !self.is_agreed && self.session.is_established() {
            return self.agree();
        }
        Ok(())
    }

    /// Whoever speaks HTTP/2 above would not notice that the peer doesn't.
    fn agree(&mut self) -> Result<()> {
        if self.session.state().alpn_protocol() == Some(HTTP2) {
            self.is_agreed = true;
            return Ok(());
        }
        self.is_over = true;
        self.plain.clear();
        self.session.close(&mut self.output);
        Err(Error::new(
            ErrorKind::Tls,
            "The peer does not speak HTTP/2: it picked no application protocol (ALPN).",
            "Likely cause: no gRPC server listens there, or a proxy before it offers HTTP/1.1 only. Offer h2 by ALPN there.",
        ))
    }

    /// Encrypts what goes to the peer. Only after the handshake.
    pub fn send(&mut self, data: &[u8]) -> Result<()> {
        if self.is_over {
            return Err(over());
        }
        if !self.is_agreed {
            return Err(Error::misuse(
                "Bytes were sent before the handshake was done.",
                "Wait until it is: is_handshaking.",
            ));
        }
        let result = self.session.write(data, &mut self.output);
        self.is_over = result.is_err();
        result
    }

    /// Says close_notify, after which nothing more is sent or received.
    pub fn close(&mut self) {
        if self.is_agreed && !self.is_over {
            self.session.close(&mut self.output);
        }
        self.is_over = true;
    }

    /// What must go to the socket.
    pub fn output(&self) -> &[u8] {
        &self.output
    }

    /// The output was handed over.
    pub fn clear_output(&mut self) {
        recycle(&mut self.output);
    }

    /// What the peer sent.
    pub fn plain(&self) -> &[u8] {
        &self.plain
    }

    /// The plain text was handed over.
    pub fn clear_plain(&mut self) {
        recycle(&mut self.plain);
    }

    pub fn is_handshaking(&self) -> bool {
        !self.is_agreed
    }

    /// The peer said that it will send no more (close_notify).
    pub fn is_eof(&self) -> bool {
        self.session.is_peer_closed()
    }

    pub fn peer(&self) -> Option<&Peer> {
        self.session.peer()
    }

    pub fn state(&self) -> &CommonState {
        self.session.state()
    }
}

fn over() -> Error {
    Error::new(
        ErrorKind::Tls,
        "The TLS connection is over.",
        "It failed or was closed before; the socket is to be closed.",
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::testing::{self, Authority, Clock, Event, Recorder};
    use crate::tls::server::{TlsConnection, TlsServer};
    use crate::{HttpConnection, TlsClient};

    const CLIENT: &str = "spiffe://td/client";
    const SERVER: &str = "spiffe://td/server";

    struct Pair {
        client: Arc<TlsClient>,
        server: Arc<TlsServer>,
    }

    impl Pair {
        fn new(alpn: &[u8]) -> Pair {
            let (root, clock) = (Authority::new("root"), Clock::new());
            let (own, other) = (root.svid(CLIENT), root.svid(SERVER));
            let bundles = || testing::bundles(&[("td", &root.root)]);
            let svid = Some((own.chain.as_bytes(), own.key.as_bytes()));
            let (chain, key) = (other.chain.as_bytes(), other.key.as_bytes());
            Pair {
                client: Arc::new(TlsClient::new(svid, bundles(), clock.clone()).unwrap()),
                server: Arc::new(
                    TlsServer::new(chain, key, bundles(), true, vec![alpn.to_vec()], clock.clone()).unwrap(),
                ),
            }
        }

        fn connect(&self, expected: &str) -> Result<(TlsTunnel, TlsConnection)> {
            let mut client = TlsTunnel::new(self.client.clone(), expected, "a:1")?;
            let mut server = TlsConnection::new(self.server.clone())?;
            client.decrypt()?;
            exchange(&mut client, &mut server)?;
            Ok((client, server))
        }
    }

    fn exchange(client: &mut TlsTunnel, server: &mut TlsConnection) -> Result<()> {
        while !client.output().is_empty() || !server.output().is_empty() {
            let bytes = client.output().to_vec();
            client.clear_output();
            server.absorb(&bytes);
            let refused = server.decrypt();
            let bytes = server.output().to_vec();
            server.clear_output();
            client.absorb(&bytes);
            client.decrypt()?;
            refused?;
        }
        Ok(())
    }

    #[test]
    fn bytes_go_both_ways_after_the_proof() {
        let (mut client, mut server) = Pair::new(HTTP2).connect(SERVER).unwrap();
        assert_eq!((Some(SERVER), false), (client.peer().map(|peer| peer.id.as_str()), client.is_handshaking()));
        client.send(b"ping").unwrap();
        server.send(&[7; 100_000]).unwrap();
        exchange(&mut client, &mut server).unwrap();
        assert_eq!((b"ping".as_slice(), 100_000), (server.plain(), client.plain().len()));
        client.close();
        exchange(&mut client, &mut server).unwrap_err();
        assert!(server.is_eof());
        assert!(client.send(b"more").is_err());
    }

    #[test]
    fn nothing_is_sent_before_the_proof_or_to_anybody_else() {
        let pair = Pair::new(HTTP2);
        let mut early = TlsTunnel::new(pair.client.clone(), SERVER, "a:1").unwrap();
        early.decrypt().unwrap();
        assert_eq!(ErrorKind::Misuse, early.send(b"x").unwrap_err().kind);
        assert_eq!(ErrorKind::PeerIdentity, pair.connect("spiffe://td/other").err().unwrap().kind);
    }

    #[test]
    fn a_peer_that_speaks_another_protocol_is_refused() {
        assert_eq!(ErrorKind::Tls, Pair::new(b"http/1.1").connect(SERVER).err().unwrap().kind);
    }

    #[test]
    fn sessions_are_shared_with_http2_of_the_same_generation_and_expectation() {
        let pair = Pair::new(HTTP2);
        let is_resumed = |expected| pair.connect(expected).map(|(client, _)| crate::tls::is_resumed(client.state()));
        assert!(!is_resumed(SERVER).unwrap());
        assert!(is_resumed(SERVER).unwrap());
        assert!(!is_resumed("").unwrap());
        let mut http = HttpConnection::tls(pair.client.clone(), SERVER, "a:1").speaking(Protocols::Http2);
        let (mut server, mut events) = (TlsConnection::new(pair.server.clone()).unwrap(), Recorder::default());
        http.open().unwrap();
        while events.0.is_empty() {
            server.absorb(http.output());
            http.clear_output();
            server.decrypt().unwrap();
            let bytes = server.output().to_vec();
            server.clear_output();
            http.receive(&bytes, &mut events).unwrap();
        }
        assert_eq!(Some(&Event::Opened), events.0.first());
        assert!(crate::tls::is_resumed(http.session().unwrap().state()));
    }
}
