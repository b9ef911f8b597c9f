//! Where does a call come from, and in which networks is that?
//!
//! The address of the connection is proved by the connection. What `x-forwarded-for` says is believed only where the connection
//! comes from a proxy that the policy names, by its network or by its identity, and then only the one entry which the outermost of
//! our own proxies wrote: the N-th from the right. What stands left of it was written by whoever wanted to. An IPv4 client on an
//! IPv6 socket (`::ffff:10.0.0.1`) is an IPv4 client, in rules and in calls, so that a rule about 10.0.0.0/8 covers both spellings.
//!
//! It resolves no names, and it knows no `Forwarded` (RFC 7239): of two headers that say the same, one would be the wrong one.
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::fmt;

use serde::Deserialize;

use super::authorize::{PeerPattern, PeerPlan};

/// A network. Host bits are cut off, as Istio and Envoy do: `10.1.2.3/8` is `10.0.0.0/8`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cidr {
    base: IpAddr,
    length: u8,
}

impl Cidr {
    /// `10.0.0.0/8`, `2001:db8::/32`, or one address.
    pub fn parse(text: &str) -> Result<Self, String> {
        let fault = || {
            format!("{text:?} is no network; write an address, or one with the length of its prefix, as 10.0.0.0/8 or 2001:db8::/32")
        };
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| fault())?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let length: u8 = match length {
            None => longest,
            Some(digits)
                if !digits.is_empty() && digits.len() <= 3 && digits.bytes().all(|byte| byte.is_ascii_digit()) =>
            {
                digits.parse().ok().filter(|length| *length <= longest).ok_or_else(fault)?
            }
            Some(_) => return Err(fault()),
        };
        // A network of mapped addresses is one of IPv4; its first 96 bits say only that.
        Ok(match (address.to_canonical(), length.checked_sub(96)) {
            (canonical @ IpAddr::V4(_), Some(rest)) if address.is_ipv6() => Self::new(canonical, rest),
            _ => Self::new(address, length),
        })
    }

    fn new(address: IpAddr, length: u8) -> Self {
        Self { base: masked(address, length), length }
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        masked(address.to_canonical(), self.length) == self.base
    }

    pub fn base(&self) -> IpAddr {
        self.base
    }

    pub fn length(&self) -> u8 {
        self.length
    }

    /// Is all of the other in this one?
    pub fn covers(&self, other: &Self) -> bool {
        self.length <= other.length && self.contains(other.base)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.length)
    }
}

/// The address with only its first `length` bits.
pub fn masked(address: IpAddr, length: u8) -> IpAddr {
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32_u32.saturating_sub(u32::from(length))).unwrap_or(0);
            IpAddr::V4(Ipv4Addr::from(u32::from(address) & mask))
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128_u32.saturating_sub(u32::from(length))).unwrap_or(0);
            IpAddr::V6(Ipv6Addr::from(u128::from(address) & mask))
        }
    }
}

/// An address as proxies write it: perhaps with a port, in brackets, or with a zone; an IPv4-mapped one is the IPv4 one.
pub fn parse(text: &str) -> Option<IpAddr> {
    let is_port = |text: &str| !text.is_empty() && text.len() <= 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    let text = text.trim_matches([' ', '\t']);
    let plain = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((inner, "")) if inner.contains(':') => inner,
        Some((inner, port)) if inner.contains(':') && port.strip_prefix(':').is_some_and(is_port) => inner,
        Some(_) => return None,
        None => match text.split_once(':') {
            Some((address, port)) if is_port(port) && address.contains('.') => address,
            _ => text,
        },
    };
    let plain = match plain.split_once('%') {
        Some((address, zone)) if address.contains(':') && !zone.is_empty() => address,
        Some(_) => return None,
        None => plain,
    };
    plain.parse::<IpAddr>().ok().map(|address| address.to_canonical())
}

/// The client's own address. `forwarded` are the values of `x-forwarded-for`, in order; `hops` is how many proxies of ours wrote
/// into it. Where it is too short, or the entry can't be read, the proxies are not what they were said to be: then the address of
/// the connection counts.
pub fn client_of(source: Option<IpAddr>, is_trusted_source: bool, forwarded: &[&[u8]], hops: usize) -> Option<IpAddr> {
    let source = source.map(|address| address.to_canonical());
    let Some(place) = hops.checked_sub(1).filter(|_| is_trusted_source) else { return source };
    let entry = forwarded.iter().rev().flat_map(|value| value.rsplit(|byte| *byte == b',')).nth(place);
    entry.and_then(|entry| std::str::from_utf8(entry).ok()).and_then(parse).or(source)
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProxiesPlan {
    pub identities: Vec<PeerPlan>,
    pub cidrs: Vec<String>,
    pub hops: usize,
}

/// Who is believed about where a call comes from.
#[derive(Debug, Default)]
pub struct Proxies {
    identities: Vec<PeerPattern>,
    cidrs: Vec<Cidr>,
    hops: usize,
}

/// More proxies than this stand in no row; a header is not searched for longer.
const MOST_HOPS: usize = 32;

impl Proxies {
    pub fn compile(plan: &ProxiesPlan) -> Result<Self, Vec<String>> {
        let mut mistakes = Vec::new();
        let mut made = Self { hops: plan.hops, ..Self::default() };
        for text in &plan.cidrs {
            match Cidr::parse(text) {
                Ok(cidr) if cidr.length() == 0 => mistakes.push(format!(
                    "{text:?} is everybody, and whoever is believed may pretend any address; name the networks of the proxies"
                )),
                Ok(cidr) => made.cidrs.push(cidr),
                Err(fault) => mistakes.push(fault),
            }
        }
        for peer in &plan.identities {
            match PeerPattern::compile(peer) {
                Ok(pattern) if pattern.is_everybody() => mistakes.push(
                    "\"*\" is everybody, and whoever is believed may pretend any address; name the proxies".to_owned(),
                ),
                Ok(pattern) => made.identities.push(pattern),
                Err(fault) => mistakes.push(fault),
            }
        }
        if plan.hops > MOST_HOPS {
            mistakes.push(format!("{} hops are too many; at most {MOST_HOPS} proxies stand in a row", plan.hops));
        }
        if mistakes.is_empty() {
            Ok(made)
        } else {
            Err(mistakes.into_iter().map(|mistake| format!("proxies: {mistake}")).collect())
        }
    }

    /// Nobody is believed.
    pub fn is_empty(&self) -> bool {
        self.identities.is_empty() && self.cidrs.is_empty()
    }

    /// Is what this connection says about its client believed? `peer` is its proven identity.
    pub fn is_trusted(&self, source: Option<IpAddr>, peer: Option<&str>) -> bool {
        source.is_some_and(|address| self.cidrs.iter().any(|cidr| cidr.contains(address)))
            || self.identities.iter().any(|pattern| pattern.matches(peer))
    }

    pub fn hops(&self) -> usize {
        self.hops
    }
}

#[cfg(test)]
mod tests;
