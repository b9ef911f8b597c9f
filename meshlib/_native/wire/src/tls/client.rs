//! How does our side of a connection begin as a client, and whom does it find there?
//!
//! rustls resumes a session only with the very same verifier object, so there is one configuration for each expected identity,
//! made once; a connection gets a copy whose tickets are those of its own address.
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use ahash::AHashMap;
use parking_lot::Mutex;
use rustls::client::{ClientConfig, ResolvesClientCert, Resumption, UnbufferedClientConnection};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{DnsName, IpAddr, Ipv4Addr, ServerName};
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;
use rustls::{CommonState, SignatureScheme};

use crate::connection::Protocols;
use crate::error::{Error, ErrorKind, Result};
use crate::tls::counts::{Count, Failed, Handshakes};
use crate::tls::path::{Roots, Side};
use crate::tls::session::Session;
use crate::tls::tickets::{target_of, TargetTickets, WonTickets, Worth};
use crate::tls::verify::{ExpectServer, Peer, Verifier};
use crate::tls::{explain, is_resumed, kind_of, provider, Failure, Svid};

/// Expected identities with a configuration of their own; above that they are made anew.
const MAX_CONFIGURATIONS: usize = 4096;
const HTTP1: &[u8] = b"http/1.1";
pub const HTTP2: &[u8] = b"h2";

/// One generation of identity as a client.
pub struct TlsClient {
    provider: Arc<CryptoProvider>,
    time: Arc<dyn TimeProvider>,
    verifier: Arc<Verifier>,
    own: Arc<OwnSvid>,
    own_not_after: u64,
    /// By what is spoken: another offer needs another configuration.
    configurations: [Mutex<AHashMap<String, Arc<ClientConfig>>>; 3],
    tickets: Arc<WonTickets>,
    pub handshakes: Handshakes,
}

impl TlsClient {
    /// Without an SVID we stay anonymous, and verify the server all the same.
    pub fn new(
        svid: Option<(&[u8], &[u8])>,
        bundles: AHashMap<String, Roots>,
        time: Arc<dyn TimeProvider>,
    ) -> Result<TlsClient> {
        let provider = provider();
        let (own, own_not_after) = match svid {
            Some((chain, key)) => {
                let svid = Svid::from_pem(chain, key, &provider)?;
                svid.check_trust_domain(&bundles)?;
                let not_after = svid.not_after(time.current_time().map_or(0, |now| now.as_secs()));
                (Some(svid.key), not_after)
            }
            None => (None, u64::MAX),
        };
        Ok(TlsClient {
            verifier: Arc::new(Verifier::new(Side::Servers, bundles, &provider)),
            provider,
            time,
            own: Arc::new(OwnSvid(own)),
            own_not_after,
            configurations: Default::default(),
            tickets: Arc::default(),
            handshakes: Handshakes::default(),
        })
    }

    /// Goes on with the counters of an earlier generation, and with nothing else of it.
    pub fn counting_on(mut self, before: &TlsClient) -> TlsClient {
        self.handshakes = before.handshakes.clone();
        self.tickets = Arc::new(WonTickets::counting_on(&before.tickets));
        self
    }

    /// The end of our own proof in Unix seconds; None where we are anonymous.
    pub fn not_after(&self) -> Option<u64> {
        (self.own_not_after != u64::MAX).then_some(self.own_not_after)
    }

    /// When the first list of revoked certificates should have been replaced, in Unix seconds; None without one.
    pub fn lists_until(&self) -> Option<u64> {
        self.verifier.lists_until()
    }

    pub fn stats(&self) -> Vec<Count> {
        let handshakes = self.handshakes.counts().into_iter().chain(self.handshakes.failures());
        handshakes.chain(self.tickets.counts()).collect()
    }

    fn configuration(
        &self,
        expected: &str,
        protocols: Protocols,
    ) -> std::result::Result<Arc<ClientConfig>, rustls::Error> {
        let [http1, http2, either] = &self.configurations;
        let (known, offer) = match protocols {
            Protocols::Http1 => (http1, vec![HTTP1.to_vec()]),
            Protocols::Http2 => (http2, vec![HTTP2.to_vec()]),
            Protocols::Either => (either, vec![HTTP2.to_vec(), HTTP1.to_vec()]),
        };
        if let Some(found) = known.lock().get(expected) {
            return Ok(found.clone());
        }
        let verifier = ExpectServer { verifier: self.verifier.clone(), expected: expected.to_owned() };
        let mut made = ClientConfig::builder_with_details(self.provider.clone(), self.time.clone())
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(self.own.clone());
        made.alpn_protocols = offer;
        made.require_ems = true;
        made.enable_early_data = false;
        let mut configurations = known.lock();
        if configurations.len() >= MAX_CONFIGURATIONS {
            configurations.clear();
        }
        // Another thread may have been quicker: its configuration is the one whose tickets resume.
        Ok(configurations.entry(expected.to_owned()).or_insert_with(|| Arc::new(made)).clone())
    }
}

#[derive(Debug)]
struct OwnSvid(Option<Arc<CertifiedKey>>);

impl ResolvesClientCert for OwnSvid {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.0.clone()
    }

    fn has_certs(&self) -> bool {
        self.0.is_some()
    }
}

/// The client's side of one TLS connection.
pub struct ClientSession {
    session: Session<UnbufferedClientConnection>,
    tls: Arc<TlsClient>,
    expected: String,
    worth: Arc<Worth>,
    peer: Option<Arc<Peer>>,
    is_counted: AtomicBool,
}

impl ClientSession {
    pub fn new(tls: Arc<TlsClient>, expected: &str, address: &str) -> Result<ClientSession> {
        ClientSession::offering(tls, expected, address, Protocols::Http1)
    }

    pub fn offering(tls: Arc<TlsClient>, expected: &str, address: &str, protocols: Protocols) -> Result<ClientSession> {
        let failed = |error| explain(Failure::Rustls(error), false);
        let mut configuration = (*tls.configuration(expected, protocols).map_err(failed)?).clone();
        let worth = Arc::new(Worth::default());
        configuration.resumption = Resumption::store(Arc::new(TargetTickets {
            tickets: tls.tickets.clone(),
            target: target_of(address, expected, &configuration.alpn_protocols),
            time: tls.time.clone(),
            worth: worth.clone(),
        }));
        let connection =
            UnbufferedClientConnection::new(Arc::new(configuration), server_name(address)).map_err(failed)?;
        Ok(ClientSession {
            session: Session::new(connection),
            tls,
            expected: expected.to_owned(),
            worth,
            peer: None,
            is_counted: AtomicBool::new(false),
        })
    }

    pub fn absorb(&mut self, data: &[u8]) {
        self.session.absorb(data);
    }

    /// Works off what was absorbed. After an error `out` holds the farewell and the session is of no use.
    pub fn pump(&mut self, out: &mut Vec<u8>, plain: &mut Vec<u8>) -> Result<()> {
        let (tls, peer) = (&self.tls, &mut self.peer);
        let (expected, worth, is_counted) = (&self.expected, &self.worth, &self.is_counted);
        let result = self.session.pump(out, plain, |state: &CommonState| -> std::result::Result<(), Failure> {
            let now = tls.time.current_time().ok_or(rustls::Error::FailedToGetCurrentTime)?;
            let chain = state.peer_certificates().ok_or(rustls::Error::NoCertificatesPresented)?;
            let proved = tls.verifier.verify_again(chain, expected, now)?;
            worth.prove(now.as_secs(), tls.own_not_after.min(proved.not_after), is_resumed(state));
            *peer = Some(proved);
            is_counted.store(true, Ordering::Relaxed);
            tls.handshakes.succeeded(is_resumed(state));
            Ok(())
        });
        result.map_err(|failure| {
            let is_open = self.peer.is_some();
            let why = kind_of(&failure);
            // In TLS 1.3 the server judges our certificate when the handshake has ended for us.
            if !is_open || why == Failed::Refused {
                self.count(why);
            }
            if matches!(failure, Failure::Refused(_)) {
                self.session.close(out);
            }
            explain(failure, is_open)
        })
    }

    pub fn write(&mut self, data: &[u8], out: &mut Vec<u8>) -> Result<()> {
        self.session.write(data, out).map_err(|error| explain(Failure::Rustls(error), true))
    }

    pub fn close(&mut self, out: &mut Vec<u8>) {
        self.session.close(out);
    }

    /// The socket ended in the middle of the handshake: the peer proved nothing wrong, it is not there.
    pub fn interrupted(&self) -> Error {
        self.count(Failed::Lost);
        Error::new(
            ErrorKind::Lost,
            "The peer closed the connection during the TLS handshake.",
            "It may not speak mutual TLS there, it refuses our certificate without saying so, or it is stopping.",
        )
    }

    fn count(&self, why: Failed) {
        self.is_counted.store(true, Ordering::Relaxed);
        self.tls.handshakes.failed(why);
    }

    pub fn is_established(&self) -> bool {
        self.peer.is_some()
    }

    pub fn is_peer_closed(&self) -> bool {
        self.session.is_peer_closed()
    }

    pub fn peer(&self) -> Option<&Peer> {
        self.peer.as_deref()
    }

    pub fn state(&self) -> &CommonState {
        self.session.state()
    }
}

impl Drop for ClientSession {
    /// Given up in the middle: nobody else would count it.
    fn drop(&mut self) {
        if !self.is_counted.load(Ordering::Relaxed) {
            self.tls.handshakes.failed(Failed::Lost);
        }
    }
}

impl std::fmt::Debug for ClientSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientSession")
            .field("expected", &self.expected)
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

/// The name for SNI, where the address has one. It proves nothing here: the peer is judged by its SPIFFE ID.
fn server_name(address: &str) -> ServerName<'static> {
    let nameless = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::from([0, 0, 0, 0])));
    let host = match address.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => address,
    };
    match DnsName::try_from(host.to_ascii_lowercase()) {
        // An address made of digits and dots is no name, even where it parses as one.
        Ok(name) if !host.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') => ServerName::DnsName(name),
        _ => nameless,
    }
}
