//! With which identity are connections opened and accepted? One generation at a time for each SPIFFE ID.
//!
//! A rotation puts a new generation in the place of the old one. What was opened under the old one goes on until it is idle; what is
//! withdrawn ends at once. All workers read the same table.
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;

use ahash::AHashMap;
use mesh_wire::tls::counts::Count;
use mesh_wire::tls::path::Roots;
use mesh_wire::{Result, SystemTime, TlsClient, TlsServer};
use parking_lot::RwLock;

/// One generation of one identity.
pub struct Identity {
    pub id: Arc<str>,
    pub generation: u64,
    pub client: Arc<TlsClient>,
    /// For listeners in mode enforce.
    pub strict: Arc<TlsServer>,
    /// For listeners that take callers without a certificate too.
    pub lenient: Arc<TlsServer>,
    /// By which the application knows that a request was handed over by us.
    pub secret: Arc<str>,
    is_current: AtomicBool,
}

impl Identity {
    pub fn is_current(&self) -> bool {
        self.is_current.load(Ordering::Acquire)
    }

    pub fn server(&self, is_strict: bool) -> &Arc<TlsServer> {
        if is_strict {
            &self.strict
        } else {
            &self.lenient
        }
    }

    pub fn stats(&self) -> [(&'static str, Vec<Count>); 3] {
        [("client", self.client.stats()), ("server", self.strict.stats()), ("server_lenient", self.lenient.stats())]
    }
}

#[derive(Default)]
pub struct Identities {
    table: RwLock<AHashMap<String, Arc<Identity>>>,
    generations: AtomicU64,
}

/// What an identity is made of: PEM, and the bundles read.
pub struct Material<'a> {
    pub chain: &'a [u8],
    pub key: &'a [u8],
    pub bundles: &'a [(String, Vec<u8>)],
    pub crls: &'a [(String, Vec<u8>)],
    pub secret: &'a str,
}

impl Material<'_> {
    fn roots(&self) -> Result<AHashMap<String, Roots>> {
        mesh_wire::tls::bundles(
            self.bundles.iter().map(|(name, pem)| (name.as_str(), pem.as_slice())),
            self.crls.iter().map(|(name, pem)| (name.as_str(), pem.as_slice())),
        )
    }
}

impl Identities {
    pub fn current(&self, id: &str) -> Option<Arc<Identity>> {
        self.table.read().get(id).cloned()
    }

    pub fn all(&self) -> Vec<Arc<Identity>> {
        self.table.read().values().cloned().collect()
    }

    /// Puts a generation in force. Nothing changes where the material can't be used.
    pub fn put(&self, id: &str, material: &Material<'_>) -> Result<Arc<Identity>> {
        let alpn = || vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let time = || Arc::new(SystemTime);
        let (chain, key) = (material.chain, material.key);
        let mut client = TlsClient::new(Some((chain, key)), material.roots()?, time())?;
        let mut strict = TlsServer::new(chain, key, material.roots()?, true, alpn(), time())?;
        let mut lenient = TlsServer::new(chain, key, material.roots()?, false, alpn(), time())?;
        let mut table = self.table.write();
        if let Some(before) = table.get(id) {
            client = client.counting_on(&before.client);
            strict = strict.counting_on(&before.strict);
            lenient = lenient.counting_on(&before.lenient);
            before.is_current.store(false, Ordering::Release);
        }
        let made = Arc::new(Identity {
            id: id.into(),
            generation: self.generations.fetch_add(1, Ordering::Relaxed) + 1,
            client: Arc::new(client),
            strict: Arc::new(strict),
            lenient: Arc::new(lenient),
            secret: material.secret.into(),
            is_current: AtomicBool::new(true),
        });
        table.insert(id.to_owned(), made.clone());
        Ok(made)
    }

    pub fn remove(&self, id: &str) -> bool {
        let removed = self.table.write().remove(id);
        if let Some(identity) = &removed {
            identity.is_current.store(false, Ordering::Release);
        }
        removed.is_some()
    }
}
