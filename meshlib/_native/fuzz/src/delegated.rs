//! Invariant: an endpoint that is read means one place, and says so again in the same words; what is written for an application has
//! exactly its nine parts, whatever a caller put into its names.
//!
//! The input is cut at each 0xff into endpoint, expectation, protocol, patience, and a name.
use mesh_wire::delegated::{handed, is_hop_field, read, Endpoint, Handed};

pub fn check(input: &[u8]) {
    let parts: Vec<Option<&str>> =
        input.split(|byte| *byte == 0xff).map(|part| std::str::from_utf8(part).ok()).collect();
    let part = |at: usize| parts.get(at).copied().flatten();
    if let Ok(ask) = read(part(0).unwrap_or(""), part(1), part(2), part(3)) {
        let again = match &ask.endpoint {
            Endpoint::Ip(address, port) => std::net::SocketAddr::new(*address, *port).to_string(),
            Endpoint::Name(host, port) => {
                assert!(host.parse::<std::net::IpAddr>().is_err());
                format!("{host}:{port}")
            }
            Endpoint::Unix(path) => format!("unix:{path}"),
        };
        let read_again = read(&again, part(1), part(2), part(3)).expect("its own words");
        assert_eq!(ask.endpoint, read_again.endpoint);
        assert!(ask.connect.as_millis() >= 1);
        if let Some(expect) = ask.expect {
            assert!(mesh_wire::spiffe::parse(expect).is_ok());
        }
    }
    if let Some(name) = part(4) {
        let text = handed(&Handed { secret: "ab", id: name, sni: name, address: name, ..Handed::default() });
        assert_eq!(text.split(';').count(), 9);
        assert!(text.bytes().all(|byte| (0x21..=0x7e).contains(&byte)));
        assert!(text.starts_with("secret=ab;tls=;id="));
        assert_eq!(is_hop_field(name), is_hop_field(&name.to_ascii_uppercase()));
    }
}
