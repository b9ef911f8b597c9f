//! Which bytes of this connection may the application see, and who is the caller? The server's record layer.
//!
//! It knows no HTTP: the application's server reads the plain text. Each accepted connection has a small record of its own
//! (`Accepting`), because what a ticket may be worth depends on the certificate of this very client.
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use ahash::AHashMap;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateDer;
use rustls::server::{
    ClientHello, NoServerSessionStorage, ResolvesServerCert, ServerConfig, UnbufferedServerConnection,
};
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;
use rustls::CommonState;

use crate::error::{Error, ErrorKind, Result};
use crate::tls::counts::{Count, Failed, Handshakes};
use crate::tls::path::{Roots, Side};
use crate::tls::session::Session;
use crate::tls::tickets::{GivenTickets, TicketKey};
use crate::tls::verify::{AnyClient, Peer, Verifier};
use crate::tls::{explain, is_resumed, kind_of, provider, Failure, Svid};

/// One generation of identity as a server.
pub struct TlsServer {
    provider: Arc<CryptoProvider>,
    time: Arc<dyn TimeProvider>,
    verifier: Arc<Verifier>,
    key: Arc<CertifiedKey>,
    own_not_after: u64,
    ticket_key: Option<Arc<TicketKey>>,
    is_client_required: bool,
    alpn: Vec<Vec<u8>>,
    pub handshakes: Handshakes,
}

impl TlsServer {
    pub fn new(
        chain: &[u8],
        key: &[u8],
        bundles: AHashMap<String, Roots>,
        is_client_required: bool,
        alpn: Vec<Vec<u8>>,
        time: Arc<dyn TimeProvider>,
    ) -> Result<TlsServer> {
        let provider = provider();
        let svid = Svid::from_pem(chain, key, &provider)?;
        svid.check_trust_domain(&bundles)?;
        Ok(TlsServer {
            verifier: Arc::new(Verifier::new(Side::Clients, bundles, &provider)),
            provider,
            own_not_after: svid.not_after(time.current_time().map_or(0, |now| now.as_secs())),
            time,
            key: svid.key,
            ticket_key: TicketKey::random().map(Arc::new),
            is_client_required,
            alpn,
            handshakes: Handshakes::default(),
        })
    }

    /// Goes on with the counters of an earlier generation, and with nothing else of it.
    pub fn counting_on(mut self, before: &TlsServer) -> TlsServer {
        self.handshakes = before.handshakes.clone();
        self
    }

    /// When the first list of revoked certificates should have been replaced, in Unix seconds; None without one.
    pub fn lists_until(&self) -> Option<u64> {
        self.verifier.lists_until()
    }

    pub fn stats(&self) -> Vec<Count> {
        self.handshakes.counts().into_iter().chain(self.handshakes.failures()).collect()
    }

    /// Would the client of this chain (the leaf first) be taken now? A client without one: only where none is required.
    pub fn accepts(&self, chain: &[CertificateDer<'_>]) -> bool {
        if chain.is_empty() {
            return !self.is_client_required;
        }
        self.time.current_time().is_some_and(|now| self.verifier.verify_again(chain, "", now).is_ok())
    }

    fn configuration(&self, accepting: &Arc<Accepting>) -> std::result::Result<ServerConfig, rustls::Error> {
        let verifier = AnyClient {
            verifier: self.verifier.clone(),
            accepting: accepting.clone(),
            is_required: self.is_client_required,
        };
        let own = OwnSvid { key: self.key.clone(), accepting: accepting.clone() };
        let mut made = ServerConfig::builder_with_details(self.provider.clone(), self.time.clone())
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(Arc::new(own));
        made.alpn_protocols.clone_from(&self.alpn);
        made.require_ems = true;
        made.max_early_data_size = 0;
        made.session_storage = Arc::new(NoServerSessionStorage {});
        match &self.ticket_key {
            Some(key) => {
                made.ticketer = Arc::new(GivenTickets {
                    key: key.clone(),
                    time: self.time.clone(),
                    own_not_after: self.own_not_after,
                    accepting: accepting.clone(),
                });
            }
            None => made.send_tls13_tickets = 0,
        }
        Ok(made)
    }
}

/// What a handshake finds out for its own tickets and for the application.
#[derive(Debug)]
pub struct Accepting {
    proof_ends: AtomicU64,
    server_name: OnceLock<String>,
}

impl Default for Accepting {
    fn default() -> Accepting {
        Accepting { proof_ends: AtomicU64::new(u64::MAX), server_name: OnceLock::new() }
    }
}

impl Accepting {
    pub fn note_proof(&self, ends: u64) {
        self.proof_ends.store(ends, Ordering::Release);
    }

    /// The end of what the client proved: of its certificate, or of the ticket that it came with. Without a proof nothing of it can
    /// end.
    pub fn proof_ends(&self) -> u64 {
        self.proof_ends.load(Ordering::Acquire)
    }
}

#[derive(Debug)]
struct OwnSvid {
    key: Arc<CertifiedKey>,
    accepting: Arc<Accepting>,
}

impl ResolvesServerCert for OwnSvid {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        if let Some(name) = hello.server_name() {
            let _ = self.accepting.server_name.set(name.to_ascii_lowercase());
        }
        Some(self.key.clone())
    }
}

/// The server's side of one TLS connection: records in, plain text out, and back.
pub struct TlsConnection {
    session: Session<UnbufferedServerConnection>,
    tls: Arc<TlsServer>,
    accepting: Arc<Accepting>,
    has_begun: bool,
    is_open: bool,
    is_broken: bool,
    is_closed: bool,
    peer: Option<Arc<Peer>>,
    output: Vec<u8>,
    plain: Vec<u8>,
}

impl TlsConnection {
    pub fn new(tls: Arc<TlsServer>) -> Result<TlsConnection> {
        let failed = |error| explain(Failure::Rustls(error), false);
        let accepting = Arc::new(Accepting::default());
        let configuration = tls.configuration(&accepting).map_err(failed)?;
        let connection = UnbufferedServerConnection::new(Arc::new(configuration)).map_err(failed)?;
        Ok(TlsConnection {
            session: Session::new(connection),
            tls,
            accepting,
            has_begun: false,
            is_open: false,
            is_broken: false,
            is_closed: false,
            peer: None,
            output: Vec::new(),
            plain: Vec::new(),
        })
    }

    /// Adds what the socket gave.
    pub fn absorb(&mut self, data: &[u8]) {
        if !self.is_broken {
            self.has_begun |= !data.is_empty();
            self.session.absorb(data);
        }
    }

    /// Works off what was absorbed. After an error the output ends in the alert, and the connection is of no use.
    pub fn decrypt(&mut self) -> Result<()> {
        if self.is_broken {
            return Err(over());
        }
        let (tls, peer, is_open) = (&self.tls, &mut self.peer, &mut self.is_open);
        let result =
            self.session.pump(&mut self.output, &mut self.plain, |state| -> std::result::Result<(), Failure> {
                match state.peer_certificates() {
                    Some(chain) => {
                        let now = tls.time.current_time().ok_or(rustls::Error::FailedToGetCurrentTime)?;
                        *peer = Some(tls.verifier.verify_again(chain, "", now)?);
                    }
                    None if tls.is_client_required => return Err(rustls::Error::NoCertificatesPresented.into()),
                    None => {}
                }
                *is_open = true;
                tls.handshakes.succeeded(is_resumed(state));
                Ok(())
            });
        result.map_err(|failure| {
            self.is_broken = true;
            if !self.is_open {
                self.tls.handshakes.failed(kind_of(&failure));
            }
            if matches!(failure, Failure::Refused(_)) {
                self.session.close(&mut self.output);
            }
            explain(failure, self.is_open)
        })
    }

    pub fn send(&mut self, data: &[u8]) -> Result<()> {
        if self.is_broken || self.is_closed {
            return Err(over());
        }
        self.session.write(data, &mut self.output).map_err(|error| explain(Failure::Rustls(error), self.is_open))
    }

    /// Says close_notify, after which we send no more; the client may still.
    pub fn close(&mut self) {
        if !self.is_broken && !self.is_closed {
            self.is_closed = true;
            self.session.close(&mut self.output);
        }
    }

    /// What must go to the socket.
    pub fn output(&self) -> &[u8] {
        &self.output
    }

    /// The output was handed over.
    pub fn clear_output(&mut self) {
        crate::connection::recycle(&mut self.output);
    }

    /// What the client sent.
    pub fn plain(&self) -> &[u8] {
        &self.plain
    }

    /// The plain text was handed over.
    pub fn clear_plain(&mut self) {
        crate::connection::recycle(&mut self.plain);
    }

    pub fn is_handshaking(&self) -> bool {
        !self.is_open
    }

    pub fn is_eof(&self) -> bool {
        self.session.is_peer_closed()
    }

    pub fn peer(&self) -> Option<&Peer> {
        self.peer.as_deref()
    }

    pub fn server_name(&self) -> Option<&str> {
        self.accepting.server_name.get().map(String::as_str)
    }

    pub fn state(&self) -> &CommonState {
        self.session.state()
    }
}

impl Drop for TlsConnection {
    /// Broken off in the middle. Who never said a word (a probe of the port) had begun nothing.
    fn drop(&mut self) {
        if self.has_begun && !self.is_open && !self.is_broken {
            self.tls.handshakes.failed(Failed::Lost);
        }
    }
}

impl fmt::Debug for TlsConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsConnection")
            .field("is_open", &self.is_open)
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

fn over() -> Error {
    Error::new(
        ErrorKind::Tls,
        "The TLS connection is over.",
        "It failed or was closed before; the socket is to be closed.",
    )
}
