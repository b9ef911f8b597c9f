//! What do the tests of this crate share? A sink that remembers, a clock moved by hand, and an authority that issues anything.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Duration;

use ahash::AHashMap;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CustomExtension, DistinguishedName,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType,
    SerialNumber, SignatureAlgorithm, PKCS_ECDSA_P256_SHA256,
};
use rustls::pki_types::UnixTime;
use rustls::time_provider::TimeProvider;

use crate::sink::Sink;

pub type Fields = Vec<(Vec<u8>, Vec<u8>)>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Opened,
    Head { status: u16, minor: u8, reason: String, fields: Fields },
    Body(Vec<u8>),
    End { is_reusable: bool, trailers: Fields },
    Closed,
}

/// Remembers what arrived. Pieces of one body are joined: where they were cut says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recorder(pub Vec<Event>);

impl Recorder {
    pub fn body(&self) -> Vec<u8> {
        self.0
            .iter()
            .filter_map(|event| if let Event::Body(bytes) = event { Some(bytes.clone()) } else { None })
            .flatten()
            .collect()
    }

    pub fn status(&self) -> Option<u16> {
        self.0.iter().find_map(|event| if let Event::Head { status, .. } = event { Some(*status) } else { None })
    }

    pub fn is_reusable(&self) -> Option<bool> {
        self.0
            .iter()
            .find_map(|event| if let Event::End { is_reusable, .. } = event { Some(*is_reusable) } else { None })
    }
}

fn owned<'a>(fields: impl Iterator<Item = (&'a [u8], &'a [u8])>) -> Fields {
    fields.map(|(name, value)| (name.to_vec(), value.to_vec())).collect()
}

impl Sink for Recorder {
    fn opened(&mut self) {
        self.0.push(Event::Opened);
    }

    fn head<'a>(
        &mut self,
        status: u16,
        minor: u8,
        reason: &'a [u8],
        fields: impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])>,
    ) {
        let reason = String::from_utf8(reason.to_vec()).unwrap();
        self.0.push(Event::Head { status, minor, reason, fields: owned(fields) });
    }

    fn body(&mut self, bytes: &[u8]) {
        assert!(!bytes.is_empty(), "an empty piece of body");
        match self.0.last_mut() {
            Some(Event::Body(body)) => body.extend_from_slice(bytes),
            _ => self.0.push(Event::Body(bytes.to_vec())),
        }
    }

    fn end<'a>(&mut self, is_reusable: bool, trailers: impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])>) {
        self.0.push(Event::End { is_reusable, trailers: owned(trailers) });
    }

    fn closed(&mut self) {
        self.0.push(Event::Closed);
    }
}

/// Unix seconds at which the tests begin (2026-01-01).
pub const START: u64 = 1_767_225_600;
pub const HOUR: u64 = 3600;

#[derive(Debug)]
pub struct Clock(AtomicU64);

impl Clock {
    pub fn new() -> Arc<Clock> {
        Arc::new(Clock(AtomicU64::new(START)))
    }

    pub fn advance(&self, seconds: u64) {
        self.0.fetch_add(seconds, Ordering::SeqCst);
    }

    pub fn set_back(&self, seconds: u64) {
        self.0.fetch_sub(seconds, Ordering::SeqCst);
    }

    pub fn now(&self) -> UnixTime {
        UnixTime::since_unix_epoch(Duration::from_secs(self.0.load(Ordering::SeqCst)))
    }
}

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(self.now())
    }
}

/// What a leaf says; the default is a correct SVID for a day.
pub struct Leaf {
    pub uris: Vec<String>,
    pub dns: Vec<String>,
    pub is_ca: IsCa,
    pub usages: Vec<KeyUsagePurpose>,
    pub purposes: Vec<ExtendedKeyUsagePurpose>,
    pub extensions: Vec<CustomExtension>,
    pub not_before: u64,
    pub not_after: u64,
    pub serial: Option<u64>,
    pub subject: Option<&'static str>,
    pub algorithm: &'static SignatureAlgorithm,
}

pub fn leaf(id: &str) -> Leaf {
    Leaf {
        uris: vec![id.to_owned()],
        dns: vec![],
        is_ca: IsCa::ExplicitNoCa,
        usages: vec![KeyUsagePurpose::DigitalSignature],
        purposes: vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
        extensions: vec![],
        not_before: START - 60,
        not_after: START + 24 * HOUR,
        serial: None,
        subject: None,
        algorithm: &PKCS_ECDSA_P256_SHA256,
    }
}

pub struct Issued {
    pub chain: String,
    pub key: String,
}

pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    params: CertificateParams,
    pub key: String,
    /// What stands between a leaf and the root, nearest to the leaf first.
    pub intermediates: String,
    pub root: String,
}

impl Authority {
    pub fn new(name: &str) -> Authority {
        let key = KeyPair::generate().unwrap();
        Authority::of(key, |params| params.distinguished_name.push(rcgen::DnType::CommonName, name))
    }

    /// A root as one likes it.
    pub fn of(key: KeyPair, change: impl FnOnce(&mut CertificateParams)) -> Authority {
        let mut params = authority_params(BasicConstraints::Unconstrained);
        change(&mut params);
        let root = params.self_signed(&key).unwrap().pem();
        let own = key.serialize_pem();
        Authority { issuer: Issuer::new(params.clone(), key), params, key: own, intermediates: String::new(), root }
    }

    /// The root's certificate once more, of the same key and with another end.
    pub fn root_until(&self, not_after: u64) -> String {
        let mut params = self.params.clone();
        params.not_after = moment(not_after).into();
        params.self_signed(&KeyPair::from_pem(&self.key).unwrap()).unwrap().pem()
    }

    pub fn intermediate(&self, name: &str, constraints: BasicConstraints) -> Authority {
        self.below(KeyPair::generate().unwrap(), |params| {
            params.is_ca = IsCa::Ca(constraints);
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
        })
    }

    /// An intermediate as one likes it.
    pub fn below(&self, key: KeyPair, change: impl FnOnce(&mut CertificateParams)) -> Authority {
        let mut params = authority_params(BasicConstraints::Unconstrained);
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        let own = key.serialize_pem();
        Authority {
            issuer: Issuer::new(params.clone(), key),
            params,
            key: own,
            intermediates: format!("{certificate}{}", self.intermediates),
            root: self.root.clone(),
        }
    }

    /// Its list of revoked certificates, by their serial numbers.
    pub fn list(&self, revoked: &[u64], change: impl FnOnce(&mut CertificateRevocationListParams)) -> String {
        let mut params = CertificateRevocationListParams {
            this_update: moment(START).into(),
            next_update: moment(START + 24 * HOUR).into(),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(|serial| revoked_at(*serial, START)).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        change(&mut params);
        params.signed_by(&self.issuer).unwrap().pem().unwrap()
    }

    pub fn issue(&self, leaf: Leaf) -> Issued {
        let key = KeyPair::generate_for(leaf.algorithm).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let uris = leaf.uris.iter().map(|uri| SanType::URI(uri.as_str().try_into().unwrap()));
        let names = leaf.dns.iter().map(|name| SanType::DnsName(name.as_str().try_into().unwrap()));
        params.subject_alt_names = uris.chain(names).collect();
        params.is_ca = leaf.is_ca;
        params.key_usages = leaf.usages;
        params.extended_key_usages = leaf.purposes;
        params.custom_extensions = leaf.extensions;
        params.not_before = moment(leaf.not_before).into();
        params.not_after = moment(leaf.not_after).into();
        params.serial_number = leaf.serial.map(SerialNumber::from);
        if let Some(subject) = leaf.subject {
            params.distinguished_name.push(rcgen::DnType::CommonName, subject);
        }
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Issued { chain: format!("{}{}", certificate.pem(), self.intermediates), key: key.serialize_pem() }
    }

    pub fn svid(&self, id: &str) -> Issued {
        self.issue(leaf(id))
    }
}

fn authority_params(constraints: BasicConstraints) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.is_ca = IsCa::Ca(constraints);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

pub fn moment(seconds: u64) -> std::time::SystemTime {
    std::time::SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).unwrap()
}

pub fn revoked_at(serial: u64, moment_of: u64) -> RevokedCertParams {
    RevokedCertParams {
        serial_number: SerialNumber::from(serial),
        revocation_time: moment(moment_of).into(),
        reason_code: None,
        invalidity_date: None,
    }
}

pub fn bundles(roots: &[(&str, &str)]) -> AHashMap<String, crate::tls::path::Roots> {
    crate::tls::bundles(roots.iter().map(|(name, pem)| (*name, pem.as_bytes())), []).unwrap()
}
