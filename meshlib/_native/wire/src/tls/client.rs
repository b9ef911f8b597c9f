//! How does our side of a connection begin as a client, and whom does it find there?
//!
//! rustls resumes a session only with the very same verifier object, so there is one configuration for each expected identity,
//! made once; a connection gets a copy whose tickets are those of its own address.
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use ahash::AHashMap;
use parking_lot::Mutex;
use rustls::client::{ClientConfig, ResolvesClientCert, Resumption, UnbufferedClientConnection};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{DnsName, IpAddr, Ipv4Addr, ServerName};
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;
use rustls::{CommonState, SignatureScheme};

use crate::error::{Error, ErrorKind, Result};
use crate::tls::session::Session;
use crate::tls::tickets::{TargetTickets, WonTickets};
use crate::tls::verify::{ExpectServer, Peer, Roots, Verifier};
use crate::tls::{explain, is_resumed, provider, Failure, Handshakes, Svid};

/// Expected identities with a configuration of their own; above that they are made anew.
const MAX_CONFIGURATIONS: usize = 4096;
const ALPN: &[u8] = b"http/1.1";

/// One generation of identity as a client.
pub struct TlsClient {
    provider: Arc<CryptoProvider>,
    time: Arc<dyn TimeProvider>,
    verifier: Arc<Verifier>,
    own: Arc<OwnSvid>,
    configurations: Mutex<AHashMap<String, Arc<ClientConfig>>>,
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
        let own = match svid {
            Some((chain, key)) => {
                let svid = Svid::from_pem(chain, key, &provider)?;
                svid.check_trust_domain(&bundles)?;
                Some(svid.key)
            }
            None => None,
        };
        Ok(TlsClient {
            verifier: Arc::new(Verifier::new(bundles, &provider)),
            provider,
            time,
            own: Arc::new(OwnSvid(own)),
            configurations: Mutex::default(),
            tickets: Arc::default(),
            handshakes: Handshakes::default(),
        })
    }

    fn configuration(&self, expected: &str) -> std::result::Result<Arc<ClientConfig>, rustls::Error> {
        if let Some(found) = self.configurations.lock().get(expected) {
            return Ok(found.clone());
        }
        let verifier = ExpectServer { verifier: self.verifier.clone(), expected: expected.to_owned() };
        let mut made = ClientConfig::builder_with_details(self.provider.clone(), self.time.clone())
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(self.own.clone());
        made.alpn_protocols = vec![ALPN.to_vec()];
        made.require_ems = true;
        made.enable_early_data = false;
        let mut configurations = self.configurations.lock();
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
    tickets_not_after: Arc<AtomicU64>,
    peer: Option<Arc<Peer>>,
}

impl ClientSession {
    pub fn new(tls: Arc<TlsClient>, expected: &str, address: &str) -> Result<ClientSession> {
        let failed = |error| explain(Failure::Rustls(error), false);
        let mut configuration = (*tls.configuration(expected).map_err(failed)?).clone();
        let tickets_not_after = Arc::new(AtomicU64::new(0));
        configuration.resumption = Resumption::store(Arc::new(TargetTickets {
            tickets: tls.tickets.clone(),
            target: Arc::from(format!("{address}\n{expected}")),
            time: tls.time.clone(),
            not_after: tickets_not_after.clone(),
        }));
        let connection =
            UnbufferedClientConnection::new(Arc::new(configuration), server_name(address)).map_err(failed)?;
        Ok(ClientSession {
            session: Session::new(connection),
            tls,
            expected: expected.to_owned(),
            tickets_not_after,
            peer: None,
        })
    }

    pub fn absorb(&mut self, data: &[u8]) {
        self.session.absorb(data);
    }

    /// Works off what was absorbed. After an error `out` holds the farewell and the session is of no use.
    pub fn pump(&mut self, out: &mut Vec<u8>, plain: &mut Vec<u8>) -> Result<()> {
        let (tls, peer) = (&self.tls, &mut self.peer);
        let (expected, tickets_not_after) = (&self.expected, &self.tickets_not_after);
        let result = self.session.pump(out, plain, |state: &CommonState| -> std::result::Result<(), Failure> {
            let now = tls.time.current_time().ok_or(rustls::Error::FailedToGetCurrentTime)?;
            let chain = state.peer_certificates().ok_or(rustls::Error::NoCertificatesPresented)?;
            let proved = tls.verifier.verify_again(chain, expected, now)?;
            tickets_not_after.store(proved.not_after, Ordering::Release);
            *peer = Some(proved);
            tls.handshakes.succeeded(is_resumed(state));
            Ok(())
        });
        result.map_err(|failure| {
            let is_open = self.peer.is_some();
            if !is_open {
                self.tls.handshakes.failed();
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

    /// The socket ended in the middle of the handshake.
    pub fn interrupted(&self) -> Error {
        self.tls.handshakes.failed();
        Error::new(
            ErrorKind::Tls,
            "The peer closed the connection during the TLS handshake.",
            "Likely cause: it was shutting down, or it refuses our certificate without saying so. Look at the peer's log.",
        )
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
