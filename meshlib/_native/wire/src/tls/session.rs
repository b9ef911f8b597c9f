//! How do TLS records become plain text, and back, without a socket? One pump for both sides of a connection.
//!
//! It drives rustls' unbuffered connection: the records that came lie in `incoming`, what must go out is appended to a buffer of
//! the caller's. Once the handshake has ended a hook is called, and if it objects no plain text is handed out: that is where a
//! resumed session's peer is judged again.
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, EncryptError, UnbufferedStatus, WriteTraffic};
use rustls::CommonState;

/// What a record adds to its plain text, at most (header, explicit nonce, content type, tag), and the size of a record.
const OVERHEAD: usize = 32;
const RECORD: usize = 16 * 1024;

/// The two kinds of rustls connection, which share no type.
pub trait Records {
    type Data;
    fn step<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn state(&self) -> &CommonState;
}

impl Records for UnbufferedClientConnection {
    type Data = ClientConnectionData;
    fn step<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
    fn state(&self) -> &CommonState {
        self
    }
}

impl Records for UnbufferedServerConnection {
    type Data = ServerConnectionData;
    fn step<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
    fn state(&self) -> &CommonState {
        self
    }
}

pub struct Session<C> {
    connection: C,
    incoming: Vec<u8>,
    is_established: bool,
    is_peer_closed: bool,
}

impl<C: Records> Session<C> {
    pub fn new(connection: C) -> Session<C> {
        Session { connection, incoming: Vec::new(), is_established: false, is_peer_closed: false }
    }

    pub fn state(&self) -> &CommonState {
        self.connection.state()
    }

    /// The peer said that it will send no more (close_notify).
    pub fn is_peer_closed(&self) -> bool {
        self.is_peer_closed
    }

    /// Adds what the socket gave.
    pub fn absorb(&mut self, data: &[u8]) {
        self.incoming.extend_from_slice(data);
    }

    /// Works off what was absorbed: handshake messages and alerts go to `out`, plain text to `plain`. After an error `out` ends in
    /// the alert that tells the peer, and `plain` is empty.
    pub fn pump<E: From<rustls::Error>>(
        &mut self,
        out: &mut Vec<u8>,
        plain: &mut Vec<u8>,
        mut on_established: impl FnMut(&CommonState) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut used = 0;
        let result = loop {
            let Some(unread) = self.incoming.get_mut(used..) else { break Ok(()) };
            let UnbufferedStatus { mut discard, state } = self.connection.step(unread);
            let is_blocked = match state {
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    let mut failure = None;
                    while let Some(record) = traffic.next_record() {
                        match record {
                            Ok(record) => {
                                discard += record.discard;
                                plain.extend_from_slice(record.payload);
                            }
                            Err(error) => failure = Some(error),
                        }
                    }
                    if let Some(error) = failure {
                        break Err(error.into());
                    }
                    false
                }
                Ok(ConnectionState::EncodeTlsData(mut data)) => {
                    encode(&mut data, out);
                    false
                }
                Ok(ConnectionState::TransmitTlsData(transmit)) => {
                    transmit.done();
                    false
                }
                Ok(ConnectionState::PeerClosed) => {
                    self.is_peer_closed = true;
                    false
                }
                // Early data is never offered nor accepted.
                Ok(ConnectionState::ReadEarlyData(_)) => {
                    break Err(rustls::Error::General("early data".into()).into());
                }
                Ok(_) => true,
                Err(error) => {
                    self.flush_alert(used + discard, out);
                    break Err(error.into());
                }
            };
            used += discard;
            // One step may end the handshake and go on to plain text: it is handed out only if this loop ends well.
            if !self.is_established && !self.connection.state().is_handshaking() {
                self.is_established = true;
                if let Err(error) = on_established(self.connection.state()) {
                    break Err(error);
                }
            }
            if is_blocked {
                break Ok(());
            }
        };
        if result.is_err() {
            plain.clear();
        }
        self.incoming.drain(..used.min(self.incoming.len()));
        if self.incoming.is_empty() {
            crate::connection::recycle(&mut self.incoming);
        }
        result
    }

    /// Encrypts `data` behind what `out` holds. Only after the handshake.
    pub fn write(&mut self, data: &[u8], out: &mut Vec<u8>) -> Result<(), rustls::Error> {
        let room = data.len() + (data.len() / RECORD + 1) * OVERHEAD;
        self.with_traffic(out, room, |traffic, free| traffic.encrypt(data, free))
    }

    /// Says close_notify, if the handshake has come far enough to say it.
    pub fn close(&mut self, out: &mut Vec<u8>) {
        // An error means that the keys aren't there yet, or no more: then there is nobody to say it to.
        let _ = self.with_traffic(out, OVERHEAD, |traffic, free| traffic.queue_close_notify(free));
    }

    /// Lets `seal` write into `room` free bytes behind `out`, or into as many as it says that it needs.
    fn with_traffic(
        &mut self,
        out: &mut Vec<u8>,
        mut room: usize,
        mut seal: impl FnMut(&mut WriteTraffic<'_, C::Data>, &mut [u8]) -> Result<usize, EncryptError>,
    ) -> Result<(), rustls::Error> {
        let mut used = 0;
        let result = loop {
            let Some(unread) = self.incoming.get_mut(used..) else { break Err(rustls::Error::EncryptError) };
            let UnbufferedStatus { discard, state } = self.connection.step(unread);
            used += discard;
            match state {
                Ok(ConnectionState::WriteTraffic(mut traffic)) => {
                    let start = out.len();
                    out.resize(start + room, 0);
                    let sealed = seal(&mut traffic, out.get_mut(start..).unwrap_or_default());
                    out.truncate(start + *sealed.as_ref().unwrap_or(&0));
                    match sealed {
                        Ok(_) => break Ok(()),
                        Err(EncryptError::InsufficientSize(size)) if size.required_size > room => {
                            room = size.required_size
                        }
                        Err(_) => break Err(rustls::Error::EncryptError),
                    }
                }
                Ok(ConnectionState::EncodeTlsData(mut data)) => encode(&mut data, out),
                Ok(ConnectionState::TransmitTlsData(transmit)) => transmit.done(),
                Ok(ConnectionState::PeerClosed) => self.is_peer_closed = true,
                Ok(_) => break Err(rustls::Error::HandshakeNotComplete),
                Err(error) => break Err(error),
            }
        };
        self.incoming.drain(..used.min(self.incoming.len()));
        result
    }

    /// Brings to `out` what rustls wanted to say before it failed. It must not look at a single further record after that: so
    /// only as long as it has something to say, because it says that first.
    fn flush_alert(&mut self, used: usize, out: &mut Vec<u8>) {
        while self.connection.state().wants_write() {
            let unread = self.incoming.get_mut(used..).unwrap_or_default();
            match self.connection.step(unread).state {
                Ok(ConnectionState::EncodeTlsData(mut data)) => encode(&mut data, out),
                _ => return,
            }
        }
    }
}

fn encode<D>(data: &mut EncodeTlsData<'_, D>, out: &mut Vec<u8>) {
    let start = out.len();
    if let Err(EncodeError::InsufficientSize(size)) = data.encode(&mut []) {
        out.resize(start + size.required_size, 0);
        let written = data.encode(out.get_mut(start..).unwrap_or_default()).unwrap_or_default();
        out.truncate(start + written);
    }
}
