//! Which earlier session may a new connection go on with? Tickets won as a client, tickets given as a server.
//!
//! A resumed session skips the peer's certificate, so a ticket must not outlive what was proved when it was won. Won tickets are
//! kept by address and expected identity, used once, and only while the peer's certificate of then is valid. Given tickets carry
//! their end inside, sealed with a key of this generation: at most an hour, never past our own certificate or the client's. Both
//! stores are fields of one generation's object; dropping it is how they are forgotten.
use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use ahash::AHashMap;
use parking_lot::Mutex;
use ring::aead::{Aad, LessSafeKey, Nonce, UnboundKey, AES_256_GCM, NONCE_LEN};
use ring::rand::{SecureRandom, SystemRandom};
use rustls::client::{ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue};
use rustls::pki_types::ServerName;
use rustls::server::ProducesTickets;
use rustls::time_provider::TimeProvider;
use rustls::NamedGroup;

use crate::tls::server::Accepting;

/// Targets (address and identity) with tickets, and tickets of one target: together some MB at most.
const MAX_TARGETS: usize = 1024;
const MAX_TICKETS: usize = 8;
/// Seconds for which a ticket of ours may be used.
const MAX_LIFETIME: u64 = 3600;
const AAD: &[u8] = b"meshlib ticket 1";

// ------------------------------------------------------------------ won as a client

/// A ticket's use ends with the peer's certificate, which is known only once the handshake that won it is done: until then 0.
type NotAfter = Arc<AtomicU64>;

#[derive(Default)]
struct Won {
    tls13: VecDeque<(Tls13ClientSessionValue, NotAfter)>,
    tls12: Option<(Tls12ClientSessionValue, NotAfter)>,
    group: Option<NamedGroup>,
}

#[derive(Default)]
struct Table {
    targets: AHashMap<Arc<str>, Won>,
    order: VecDeque<Arc<str>>,
}

impl Table {
    fn entry(&mut self, target: &Arc<str>) -> &mut Won {
        if !self.targets.contains_key(target) {
            if self.order.len() >= MAX_TARGETS {
                if let Some(oldest) = self.order.pop_front() {
                    self.targets.remove(&oldest);
                }
            }
            self.order.push_back(target.clone());
        }
        self.targets.entry(target.clone()).or_default()
    }
}

/// All tickets won in one generation.
#[derive(Default)]
pub struct WonTickets(Mutex<Table>);

/// The tickets of one connection's target, as rustls wants to see them. The server name that it passes is not the key: it lacks the
/// port and the identity.
pub struct TargetTickets {
    pub tickets: Arc<WonTickets>,
    pub target: Arc<str>,
    pub time: Arc<dyn TimeProvider>,
    pub not_after: NotAfter,
}

impl TargetTickets {
    fn is_usable(&self, not_after: &NotAfter) -> bool {
        let now = self.time.current_time().map_or(u64::MAX, |now| now.as_secs());
        now < not_after.load(Ordering::Acquire)
    }
}

impl fmt::Debug for TargetTickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TargetTickets").field("target", &self.target).finish_non_exhaustive()
    }
}

impl ClientSessionStore for TargetTickets {
    fn set_kx_hint(&self, _: ServerName<'static>, group: NamedGroup) {
        self.tickets.0.lock().entry(&self.target).group = Some(group);
    }

    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        self.tickets.0.lock().targets.get(&self.target)?.group
    }

    fn set_tls12_session(&self, _: ServerName<'static>, value: Tls12ClientSessionValue) {
        self.tickets.0.lock().entry(&self.target).tls12 = Some((value, self.not_after.clone()));
    }

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        let table = self.tickets.0.lock();
        let (value, not_after) = table.targets.get(&self.target)?.tls12.as_ref()?;
        self.is_usable(not_after).then(|| value.clone())
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {
        if let Some(won) = self.tickets.0.lock().targets.get_mut(&self.target) {
            won.tls12 = None;
        }
    }

    fn insert_tls13_ticket(&self, _: ServerName<'static>, value: Tls13ClientSessionValue) {
        let mut table = self.tickets.0.lock();
        let won = table.entry(&self.target);
        if won.tls13.len() >= MAX_TICKETS {
            won.tls13.pop_front();
        }
        won.tls13.push_back((value, self.not_after.clone()));
    }

    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        let mut table = self.tickets.0.lock();
        let won = table.targets.get_mut(&self.target)?;
        while let Some((value, not_after)) = won.tls13.pop_back() {
            if self.is_usable(&not_after) {
                return Some(value);
            }
        }
        None
    }
}

// ------------------------------------------------------------------ given as a server

/// The key that seals the tickets of one generation. Drawn at random, never stored, gone with the generation.
pub struct TicketKey(LessSafeKey);

impl TicketKey {
    /// None if the system gives no randomness: then there are no tickets.
    pub fn random() -> Option<TicketKey> {
        let mut secret = [0u8; 32];
        SystemRandom::new().fill(&mut secret).ok()?;
        UnboundKey::new(&AES_256_GCM, &secret).ok().map(|key| TicketKey(LessSafeKey::new(key)))
    }

    fn seal(&self, end: u64, peer_not_after: u64, session: &[u8]) -> Option<Vec<u8>> {
        let mut nonce = [0u8; NONCE_LEN];
        SystemRandom::new().fill(&mut nonce).ok()?;
        let mut body = Vec::with_capacity(16 + session.len() + 16);
        body.extend_from_slice(&end.to_be_bytes());
        body.extend_from_slice(&peer_not_after.to_be_bytes());
        body.extend_from_slice(session);
        self.0.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(AAD), &mut body).ok()?;
        let mut ticket = Vec::with_capacity(NONCE_LEN + body.len());
        ticket.extend_from_slice(&nonce);
        ticket.extend_from_slice(&body);
        Some(ticket)
    }

    fn open(&self, ticket: &[u8]) -> Option<(u64, u64, Vec<u8>)> {
        let (nonce, body) = ticket.split_at_checked(NONCE_LEN)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let mut body = body.to_vec();
        let plain = self.0.open_in_place(nonce, Aad::from(AAD), &mut body).ok()?;
        let (end, rest) = plain.split_first_chunk::<8>()?;
        let (peer_not_after, session) = rest.split_first_chunk::<8>()?;
        Some((u64::from_be_bytes(*end), u64::from_be_bytes(*peer_not_after), session.to_vec()))
    }
}

#[cfg(test)]
impl TicketKey {
    pub fn seal_for_test(&self, end: u64, peer_not_after: u64, session: &[u8]) -> Vec<u8> {
        self.seal(end, peer_not_after, session).unwrap_or_default()
    }

    pub fn open_for_test(&self, ticket: &[u8]) -> Option<(u64, u64, Vec<u8>)> {
        self.open(ticket)
    }
}

/// The tickets of one accepted connection.
pub struct GivenTickets {
    pub key: Arc<TicketKey>,
    pub time: Arc<dyn TimeProvider>,
    pub own_not_after: u64,
    pub accepting: Arc<Accepting>,
}

impl GivenTickets {
    fn now(&self) -> Option<u64> {
        self.time.current_time().map(|now| now.as_secs())
    }

    fn remaining(&self) -> u64 {
        let end = self.own_not_after.min(self.accepting.peer_not_after());
        self.now().map_or(0, |now| end.saturating_sub(now)).min(MAX_LIFETIME)
    }
}

impl fmt::Debug for GivenTickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GivenTickets").finish_non_exhaustive()
    }
}

impl ProducesTickets for GivenTickets {
    fn enabled(&self) -> bool {
        self.remaining() > 0
    }

    fn lifetime(&self) -> u32 {
        u32::try_from(self.remaining()).unwrap_or_default()
    }

    fn encrypt(&self, session: &[u8]) -> Option<Vec<u8>> {
        let end = self.now()?.saturating_add(self.remaining());
        self.key.seal(end, self.accepting.peer_not_after(), session)
    }

    /// None makes rustls do a full handshake: the gentle answer to a ticket past its end.
    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        let (end, peer_not_after, session) = self.key.open(ticket)?;
        if self.now()? >= end {
            return None;
        }
        self.accepting.note_peer(peer_not_after);
        Some(session)
    }
}
