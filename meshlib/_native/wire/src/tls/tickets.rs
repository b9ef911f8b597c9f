//! Which earlier session may a new connection go on with? Tickets won as a client, tickets given as a server.
//!
//! A resumed session skips the peer's certificate, so a ticket must not outlive what was proved when it was won. Won tickets are
//! kept by address, expected identity and protocols; one of TLS 1.3 is used once. Given tickets carry their end inside, sealed with
//! a key of this generation. Both end after an hour at most, with our own certificate and with the peer's; and since a session that
//! was resumed brings new tickets, theirs end with the ticket that it began with: each hour the certificates are shown again. Both
//! stores are fields of one generation's object; dropping it is how they are forgotten.
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use ahash::AHashMap;
use parking_lot::Mutex;
use rustls::client::{ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue};
use rustls::pki_types::ServerName;
use rustls::server::ProducesTickets;
use rustls::time_provider::TimeProvider;
use rustls::NamedGroup;

use crate::tls::counts::{Count, WonCounts};
use crate::tls::crypto::aead::{Aad, LessSafeKey, Nonce, UnboundKey, AES_256_GCM, NONCE_LEN};
use crate::tls::crypto::rand::{SecureRandom, SystemRandom};
use crate::tls::server::Accepting;

/// Targets with tickets, tickets of one target and of all; each ticket holds the peer's chain, so that all are some MB at most.
const MAX_TARGETS: usize = 1024;
const MAX_TICKETS: usize = 8;
const MAX_ALL: usize = 2048;
/// Seconds from a handshake in full to the end of all tickets that come of it. A server may say less, and is heard.
const MAX_LIFETIME: u64 = 3600;
const AAD: &[u8] = b"meshlib ticket 2";

// ------------------------------------------------------------------ won as a client

/// Until when (in Unix seconds) one connection's tickets may be used. What was proved is known only once the handshake that won
/// them is done: until then they are worth nothing.
#[derive(Default)]
pub struct Worth {
    end: AtomicU64,
    /// The end of the ticket that this connection offered.
    offered: AtomicU64,
}

impl Worth {
    /// The handshake is done. `proofs_end`: when the first of the two sides' certificates ends.
    pub fn prove(&self, now: u64, proofs_end: u64, is_resumed: bool) {
        let earlier = if is_resumed { self.offered.load(Ordering::Acquire) } else { u64::MAX };
        let end = now.saturating_add(MAX_LIFETIME).min(proofs_end).min(earlier);
        self.end.store(end, Ordering::Release);
    }

    fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }
}

#[derive(Default)]
struct Won {
    tls13: VecDeque<(Tls13ClientSessionValue, Arc<Worth>)>,
    tls12: Option<(Tls12ClientSessionValue, Arc<Worth>)>,
    group: Option<NamedGroup>,
    used: u64,
}

impl Won {
    fn len(&self) -> usize {
        self.tls13.len() + usize::from(self.tls12.is_some())
    }
}

#[derive(Default)]
struct Table {
    targets: AHashMap<Arc<str>, Won>,
    /// The targets by their last use, which is a running number.
    order: BTreeMap<u64, Arc<str>>,
    uses: u64,
    held: usize,
}

impl Table {
    /// The target's tickets, which from now on are the youngest.
    fn entry(&mut self, target: &Arc<str>) -> &mut Won {
        self.uses += 1;
        let won = self.targets.entry(target.clone()).or_default();
        self.order.remove(&won.used);
        self.order.insert(self.uses, target.clone());
        won.used = self.uses;
        won
    }

    /// Makes room: the targets that were not used for the longest time go. The youngest stays. Answers how many tickets went.
    fn trim(&mut self) -> usize {
        let mut evicted = 0;
        while self.order.len() > 1 && (self.order.len() > MAX_TARGETS || self.held > MAX_ALL) {
            let oldest = self.order.pop_first().and_then(|(_, target)| self.targets.remove(&target));
            let count = oldest.map_or(0, |won| won.len());
            self.held -= count;
            evicted += count;
        }
        evicted
    }
}

/// All tickets won in one generation.
#[derive(Default)]
pub struct WonTickets {
    table: Mutex<Table>,
    counts: WonCounts,
}

impl WonTickets {
    /// An empty store that goes on with the counters of an earlier one.
    pub fn counting_on(before: &WonTickets) -> WonTickets {
        WonTickets { table: Mutex::default(), counts: before.counts.clone() }
    }

    pub fn counts(&self) -> Vec<Count> {
        let held = self.table.lock().held as u64;
        self.counts.counts().into_iter().chain([("tickets_held", held)]).collect()
    }
}

/// What tickets are kept by. Neither identities nor protocols hold a line's end; the address, which could, comes last.
pub fn target_of(address: &str, expected: &str, protocols: &[Vec<u8>]) -> Arc<str> {
    let protocols: Vec<_> = protocols.iter().map(|name| String::from_utf8_lossy(name)).collect();
    Arc::from(format!("{expected}\n{}\n{address}", protocols.join(" ")))
}

/// The tickets of one connection's target, as rustls wants to see them. The server name that it passes is not the key: it lacks the
/// port and the identity.
pub struct TargetTickets {
    pub tickets: Arc<WonTickets>,
    pub target: Arc<str>,
    pub time: Arc<dyn TimeProvider>,
    pub worth: Arc<Worth>,
}

impl TargetTickets {
    fn now(&self) -> u64 {
        self.time.current_time().map_or(u64::MAX, |now| now.as_secs())
    }

    /// Whether the ticket may be offered; if so, its end is that of all that will come of it.
    fn may_offer(&self, worth: &Worth) -> bool {
        let end = worth.end();
        let is_usable = self.now() < end;
        if is_usable {
            self.worth.offered.store(end, Ordering::Release);
            self.tickets.counts.used();
        } else {
            self.tickets.counts.expired();
        }
        is_usable
    }
}

impl fmt::Debug for TargetTickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TargetTickets").field("target", &self.target).finish_non_exhaustive()
    }
}

impl ClientSessionStore for TargetTickets {
    fn set_kx_hint(&self, _: ServerName<'static>, group: NamedGroup) {
        let mut table = self.tickets.table.lock();
        table.entry(&self.target).group = Some(group);
        self.tickets.counts.evicted(table.trim());
    }

    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        self.tickets.table.lock().targets.get(&self.target)?.group
    }

    fn set_tls12_session(&self, _: ServerName<'static>, value: Tls12ClientSessionValue) {
        let mut table = self.tickets.table.lock();
        if table.entry(&self.target).tls12.replace((value, self.worth.clone())).is_none() {
            table.held += 1;
        }
        self.tickets.counts.stored();
        self.tickets.counts.evicted(table.trim());
    }

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        let mut table = self.tickets.table.lock();
        let won = table.targets.get_mut(&self.target)?;
        let (value, worth) = won.tls12.take()?;
        if !self.may_offer(&worth) {
            table.held -= 1;
            return None;
        }
        // Many connections may begin with the same session of TLS 1.2.
        won.tls12 = Some((value.clone(), worth));
        table.entry(&self.target);
        Some(value)
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {
        let mut table = self.tickets.table.lock();
        if table.targets.get_mut(&self.target).and_then(|won| won.tls12.take()).is_some() {
            table.held -= 1;
        }
    }

    fn insert_tls13_ticket(&self, _: ServerName<'static>, value: Tls13ClientSessionValue) {
        let mut table = self.tickets.table.lock();
        let won = table.entry(&self.target);
        won.tls13.push_back((value, self.worth.clone()));
        if won.tls13.len() > MAX_TICKETS {
            won.tls13.pop_front();
            self.tickets.counts.evicted(1);
        } else {
            table.held += 1;
        }
        self.tickets.counts.stored();
        self.tickets.counts.evicted(table.trim());
    }

    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        let mut table = self.tickets.table.lock();
        let mut taken = 0;
        let mut found = None;
        let won = table.targets.get_mut(&self.target)?;
        while let Some((value, worth)) = won.tls13.pop_back() {
            taken += 1;
            if self.may_offer(&worth) {
                found = Some(value);
                break;
            }
        }
        table.held -= taken;
        if found.is_some() {
            table.entry(&self.target);
        }
        found
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

    fn seal(&self, end: u64, session: &[u8]) -> Option<Vec<u8>> {
        let mut nonce = [0u8; NONCE_LEN];
        SystemRandom::new().fill(&mut nonce).ok()?;
        let mut body = Vec::with_capacity(8 + session.len() + 16);
        body.extend_from_slice(&end.to_be_bytes());
        body.extend_from_slice(session);
        self.0.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(AAD), &mut body).ok()?;
        let mut ticket = Vec::with_capacity(NONCE_LEN + body.len());
        ticket.extend_from_slice(&nonce);
        ticket.extend_from_slice(&body);
        Some(ticket)
    }

    fn open(&self, ticket: &[u8]) -> Option<(u64, Vec<u8>)> {
        let (nonce, body) = ticket.split_at_checked(NONCE_LEN)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let mut body = body.to_vec();
        let plain = self.0.open_in_place(nonce, Aad::from(AAD), &mut body).ok()?;
        let (end, session) = plain.split_first_chunk::<8>()?;
        Some((u64::from_be_bytes(*end), session.to_vec()))
    }
}

#[cfg(test)]
impl TicketKey {
    pub fn seal_for_test(&self, end: u64, session: &[u8]) -> Vec<u8> {
        self.seal(end, session).unwrap_or_default()
    }

    pub fn open_for_test(&self, ticket: &[u8]) -> Option<(u64, Vec<u8>)> {
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
        let end = self.own_not_after.min(self.accepting.proof_ends());
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
        self.key.seal(end, session)
    }

    /// None makes rustls do a full handshake: the gentle answer to a ticket past its end.
    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        let (end, session) = self.key.open(ticket)?;
        if self.now()? >= end {
            return None;
        }
        self.accepting.note_proof(end);
        Some(session)
    }
}
