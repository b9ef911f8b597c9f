//! What is known of a call beyond its caller, method and path?
//!
//! The addresses, the host, the header fields and the token that the policy in force asks about. Most policies ask about none of
//! them, so that they are gathered only under a policy that does, and live in a box of their own. They are kept with the entry:
//! what was asked once is asked again when somebody wants the reasons.
use core::net::IpAddr;
use std::sync::Arc;

use super::headers::Kept;
use crate::secure::jwt::{Claims, TokenFault};

/// Where a call comes from and when, as the driver sees it. "", 0 and false are "it is not known".
#[derive(Debug, Clone, Copy, Default)]
pub struct Origin<'a> {
    /// The address at the other end of the connection.
    pub source: &'a str,
    /// Our own port.
    pub port: u16,
    pub sni: &'a str,
    /// Seconds since 1970, by which tokens are judged.
    pub wall: f64,
    pub listener: Listener,
}

/// Which of our doors a call came in by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Listener {
    /// For those who prove who they are.
    #[default]
    Mesh,
    /// For everybody, under rules of its own.
    Public,
}

#[derive(Debug, Default)]
pub(super) struct Facts {
    pub host: Option<String>,
    pub port: u16,
    pub source: Option<IpAddr>,
    /// The client's own address: behind proxies that are trusted, what they say it is.
    pub remote: Option<IpAddr>,
    pub sni: Box<str>,
    pub headers: Vec<Kept>,
    /// Of a proxy that is believed about where a call comes from: by its address or by its identity.
    pub is_believed: bool,
    /// Of a proxy that is believed about who somebody is: by its identity.
    pub is_from_proxy: bool,
    pub claims: Option<Arc<Claims>>,
    pub fault: Option<TokenFault>,
    /// The header that a token came in, if it is for us alone.
    pub token_header: Option<Box<str>>,
}
