//! Invariant: no certificate panics the reader, and what it accepts names a workload.
use mesh_wire::spiffe;
use mesh_wire::tls::verify::read_leaf;

pub fn check(der: &[u8]) {
    if let Ok(peer) = read_leaf(der) {
        assert!(spiffe::parse(&peer.id).is_ok_and(|id| !id.path.is_empty()));
    }
}
