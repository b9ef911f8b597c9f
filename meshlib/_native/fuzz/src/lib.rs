//! What must hold for every input, however odd? A function per target; the fuzzer looks for an input for which it doesn't.
//!
//! The targets in `fuzz_targets/` only hand their input over. The tests below run the same functions without a fuzzer: inputs are put
//! together from a target's own words, cut, repeated and spoilt, from a fixed seed, so that every run of the tests tries the same
//! tens of thousands. It finds what is near a correct message; what is far from it is the fuzzer's part.
pub mod authority;
pub mod connection;
pub mod delegated;
pub mod http1_chunked;
pub mod http1_guard;
pub mod http1_request;
pub mod http1_response;
pub mod http2_client;
pub mod http2_floods;
pub mod jwks;
pub mod jws;
pub mod rules;
pub mod spiffe_id;
pub mod x509_leaf;

#[cfg(test)]
mod tests {
    use super::*;

    const ROUNDS: u32 = 20_000;

    const HTTP: &[&[u8]] = &[
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 204 No Content\r\n",
        b"HTTP/1.0 200\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 304 x\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n",
        b"content-length: 5\r\n",
        b"content-length: 0\r\n",
        b"transfer-encoding: chunked\r\n",
        b"connection: close\r\n",
        b"connection: keep-alive\r\n",
        b"x: y\r\n",
        b"\r\n",
        b"hello",
        b"5\r\nhello\r\n",
        b"3;a=b\r\nabc\r\n",
        b"0\r\n\r\n",
        b"0\r\nx: y\r\n\r\n",
        b"ffffffffffffffff\r\n",
        b"\r",
        b"\n",
        b" ",
        b"\t",
        b"\0",
        b":",
        b";",
        b"\x7f",
        b"\x80",
        b"+",
        b"-",
    ];
    const REQUEST: &[&[u8]] = &[
        b"\xff",
        b"\xff",
        b"\xff",
        b"GET",
        b"POST",
        b"HEAD",
        b"/",
        b"/items/7?x=1",
        b"host",
        b"orders",
        b"content-length",
        b"5",
        b"0",
        b"transfer-encoding",
        b"chunked",
        b"connection",
        b"close",
        b"upgrade",
        b"x-a",
        b"hello",
        b"\r\n",
        b"\r",
        b"\n",
        b" ",
        b"\t",
        b"\0",
        b":",
        b"\x7f",
        b"\xc3\xa9",
        b"GET\xff/\xff",
        b"POST\xff/\xffcontent-length\xff5\xffhello",
    ];
    const AUTHORITY: &[&[u8]] = &[
        b"orders",
        b"Orders.Shop",
        b".",
        b"..",
        b":",
        b":80",
        b"[::1]",
        b"[",
        b"]",
        b"@",
        b"/",
        b"//",
        b"/.",
        b"/items/7",
        b"?",
        b"?a=b&c=d",
        b"%2f",
        b"#",
        b"\\",
        b"\xc3\xa9",
        b" ",
        b"~",
        b"+",
        b",",
        b";",
        b"=",
        b"'",
        b"\0",
    ];
    const RULES: &[&[u8]] = &[
        b"\xff",
        b"/",
        b"/admin",
        b"/{a}",
        b"/{**}",
        b"*",
        b"[a-z]+",
        b".*",
        b"|",
        b"(",
        b")",
        b"\\d",
        b"{2}",
        b"%2f",
        b"%5C",
        b"%2e%2E",
        b"%61",
        b"/..",
        b"//",
        b"\\",
        b";a",
        b"?b",
        b"#",
        b"http://",
        b"orders",
        b".shop",
        b":80",
        b"10.0.0.1",
        b"::ffff:10.0.0.1",
        b"/8",
        b",",
        b"spiffe://shop.internal/",
        b"request.headers[",
        b"]",
        b"admin",
        b"\xc3\xa9",
        b"\xc4\xb0",
        b"A",
    ];
    const SPIFFE: &[&[u8]] = &[
        b"spiffe://",
        b"shop.internal",
        b"/",
        b"/ns/default",
        b"/sa/orders",
        b".",
        b"..",
        b"%",
        b"A",
        b"_",
        b"-",
        b":80",
        b"?",
        b"#",
        b"\xc3\xa9",
    ];

    /// Kind, flags, stream, length, payload: as `http2_client` reads them.
    const HTTP2: &[&[u8]] = &[
        b"\x01\x04\x01\x00\x01\x88",
        b"\x01\x04\x03\x00\x01\x88",
        b"\x01\x05\x05\x00\x01\x88",
        b"\x00\x00\x01\x00\x02ab",
        b"\x00\x01\x01\x00\x02cd",
        b"\x00\x01\x03\x00\x00",
        b"\x00\x09\x01\x00\x03\x01x\x00",
        b"\x01\x05\x01\x00\x05\x00\x01x\x01y",
        b"\x01\x04\x01\x00\x05\x48\x03103",
        b"\x01\x04\x01\x00\x04\x88\x5c\x014",
        b"\x01\x00\x01\x00\x01\x88",
        b"\x09\x04\x01\x00\x05\x00\x01z\x01y",
        b"\x09\x00\x01\x00\x00",
        b"\x03\x00\x01\x00\x04\x00\x00\x00\x07",
        b"\x03\x00\x03\x00\x04\x00\x00\x00\x00",
        b"\x04\x00\x00\x00\x00",
        b"\x04\x01\x00\x00\x00",
        b"\x04\x00\x00\x00\x06\x00\x04\x00\x01\xff\xff",
        b"\x04\x00\x00\x00\x06\x00\x03\x00\x00\x00\x01",
        b"\x06\x00\x00\x00\x0812345678",
        b"\x07\x00\x00\x00\x08\x00\x00\x00\x03\x00\x00\x00\x00",
        b"\x08\x00\x00\x00\x04\x00\x01\x00\x00",
        b"\x08\x00\x03\x00\x04\x00\x01\x00\x00",
        b"\x08\x00\x03\x00\x04\x00\x00\x00\x00",
        b"\x02\x00\x01\x00\x05\x00\x00\x00\x01\x00",
        b"\x05\x04\x01\x00\x05\x00\x00\x00\x02\x88",
        b"\x0b\x00\x00\x00\x03raw",
    ];

    const CLAIMS: &[&[u8]] = &[
        b"\"iss\":\"https://issuer\",\"aud\":\"orders\",\"exp\":1800000060",
        b"\"iss\":\"https://issuer\",\"aud\":[\"orders\"],\"exp\":1800000060.5",
        b"\"iss\":\"shop.internal\"",
        b",\"sub\":\"ada\"",
        b",\"sub\":\"spiffe://shop.internal/a\"",
        b",\"\\u0073ub\":\"eve\"",
        b",\"aud\":\"other\"",
        b",\"nbf\":1800000000",
        b",\"iat\":1799999990",
        b",\"iat\":1800000031",
        b",\"exp\":1799999971",
        b",\"exp\":1e300",
        b",\"exp\":\"1\"",
        b",\"a\":[[[{}]]]",
        b",\"a\":null",
        b"{",
        b"}",
        b"}",
        b" ",
        b"\xff",
    ];
    const HEADS: &[&[u8]] = &[
        b"{\"alg\":\"EdDSA\"}",
        b"{\"alg\":\"EdDSA\",\"kid\":\"k1\",\"typ\":\"JWT\"}",
        b"{\"alg\":\"EdDSA\",\"kid\":\"k1\",\"crit\":[]}",
        b"{\"alg\":\"EdDSA\",\"kid\":\"k2\"}",
        b"{\"alg\":\"ES256\",\"kid\":\"k1\"}",
        b"{\"alg\":\"none\"}",
    ];
    const JWS: &[&[u8]] = &[
        b"eyJhbGciOiJFZERTQSIsImtpZCI6ImsxIn0",
        b"eyJhbGciOiJub25lIn0",
        b"eyJpc3MiOiJodHRwczovL2lzc3VlciJ9",
        b".",
        b"..",
        b"e30",
        b"AAAA",
        b"A",
        b"=",
        b"\n",
    ];
    const JWKS: &[&[u8]] = &[
        b"{\"keys\":[",
        b"{\"keys\":[",
        b"]}",
        b"]}",
        b",",
        b"{\"kty\":\"OKP\",\"crv\":\"Ed25519\",\"x\":\"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo\",\"kid\":\"k1\"}",
        b"{\"kty\":\"OKP\",\"crv\":\"Ed25519\",\"x\":\"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo\"}",
        b"{\"kty\":\"OKP\",\"crv\":\"Ed25519\",\"x\":\"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo\",\"kid\":\"k2\",\"use\":\"sig\"}",
        b"{\"kty\":\"OKP\",\"crv\":\"Ed25519\",\"x\":\"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo\",\"use\":\"enc\"}",
        b"{\"kty\":\"OKP\",\"crv\":\"Ed25519\",\"x\":\"AA\",\"kid\":\"k1\",\"d\":\"AA\"}",
        b"{\"kty\":\"EC\",\"crv\":\"P-256\",\"x\":\"AA\",\"y\":\"AA\"}",
        b"{\"kty\":\"RSA\",\"n\":\"AQAB\",\"e\":\"AQAB\"}",
        b"{\"kty\":\"oct\",\"k\":\"AAAA\"}",
        b"{}",
        b"[]",
    ];

    const SERVED: &[&[u8]] = &[
        b"GET / HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\n",
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.0\r\n",
        b"content-length: 5\r\n",
        b"Content-Length: 0\r\n",
        b"transfer-encoding: chunked\r\n",
        b"transfer-encoding: Chunked \r\n",
        b"host: other\r\n",
        b"connection: upgrade\r\nupgrade: websocket\r\n",
        b"x: y\r\n",
        b"\r\n",
        b"hello",
        b"5\r\nhello\r\n",
        b"3;a=b\r\nabc\r\n",
        b"0\r\n\r\n",
        b"0\r\nx: y\r\n\r\n",
        b"\r",
        b"\n",
        b" ",
        b"\t",
        b"\x0b",
        b"\0",
        b":",
        b"+",
    ];
    const FLOODS: &[&[u8]] = &[
        b"\0\0\x01\x01\x05\0\0\0\x01x",
        b"\0\0\x01\x01\0\0\0\0\x03x",
        b"\0\0\x04\x03\0\0\0\0\x01\0\0\0\x08",
        b"\0\0\0\x09\0\0\0\0\x03",
        b"\0\0\0\x09\x04\0\0\0\x03",
        b"\0\0\0\0\0\0\0\0\x01",
        b"\0\0\x03\0\x01\0\0\0\x01abc",
        b"\0\0\x08\x06\0\0\0\0\0pingpong",
        b"\0\0\0\x04\0\0\0\0\0",
        b"\0\0\x04\x08\0\0\0\0\0\0\0\0\x01",
        b"\xff\xff\xff",
    ];
    const DELEGATED: &[&[u8]] = &[
        b"\xff",
        b"\xff",
        b"10.0.0.7:8443\xffspiffe://td/orders\xffhttp2\xff1000\xff",
        b"[::1]:80\xff-\xffhttp1",
        b"unix:/run/a.sock\xff-",
        b"orders",
        b".internal",
        b":1",
        b":65536",
        b"[",
        b"]",
        b"::",
        b"-",
        b"0",
        b"spiffe://td",
        b"x-mesh-handed",
        b"x_mesh_handed",
        b";id=",
        b",",
        b"\r\n",
    ];

    /// SplitMix64.
    struct Chance(u64);

    impl Chance {
        fn below(&mut self, end: usize) -> usize {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = self.0;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((mixed ^ (mixed >> 31)) % end.max(1) as u64) as usize
        }

        fn byte(&mut self) -> u8 {
            self.below(256) as u8
        }

        fn message(&mut self, words: &[&[u8]]) -> Vec<u8> {
            let mut made: Vec<u8> = (0..=self.below(9)).flat_map(|_| words[self.below(words.len())].to_vec()).collect();
            for _ in 0..self.below(3) {
                let at = self.below(made.len());
                match self.below(4) {
                    0 if !made.is_empty() => made[at] = self.byte(),
                    1 => made.truncate(at),
                    2 if !made.is_empty() => drop(made.remove(at)),
                    _ => made.insert(at, self.byte()),
                }
            }
            made
        }

        /// None to three of the words, whole.
        fn few(&mut self, words: &[&[u8]], between: &[u8]) -> Vec<u8> {
            (0..self.below(4)).map(|_| words[self.below(words.len())]).collect::<Vec<_>>().join(between)
        }
    }

    fn tried(seed: u64, mut check: impl FnMut(&mut Chance)) {
        let mut chance = Chance(seed);
        (0..ROUNDS).for_each(|_| check(&mut chance));
    }

    fn behind(chance: &mut Chance, bytes: usize, words: &[&[u8]]) -> Vec<u8> {
        let mut made: Vec<u8> = (0..bytes).map(|_| chance.byte()).collect();
        made.extend(chance.message(words));
        made
    }

    #[test]
    fn answers() {
        tried(1, |chance| http1_response::check(&behind(chance, 2, HTTP)));
    }

    #[test]
    fn chunks() {
        tried(2, |chance| http1_chunked::check(&behind(chance, 1, &HTTP[12..])));
    }

    #[test]
    fn requests() {
        tried(3, |chance| http1_request::check(&behind(chance, 1, REQUEST)));
    }

    #[test]
    fn authorities_and_targets() {
        tried(4, |chance| authority::check(&chance.message(AUTHORITY)));
    }

    #[test]
    fn frames() {
        tried(8, |chance| http2_client::check(&behind(chance, 1, HTTP2)));
    }

    #[test]
    fn requests_that_come() {
        tried(13, |chance| http1_guard::check(&behind(chance, 1, SERVED)));
    }

    #[test]
    fn frames_that_come() {
        tried(14, |chance| {
            let again = chance.below(300);
            http2_floods::check(&[vec![chance.byte()], chance.message(FLOODS).repeat(again)].concat());
        });
    }

    #[test]
    fn words_between_library_and_agent() {
        tried(15, |chance| delegated::check(&chance.message(DELEGATED)));
    }

    #[test]
    fn steps_of_a_connection() {
        tried(5, |chance| {
            let steps: Vec<u8> = (0..chance.below(12))
                .flat_map(|_| {
                    let piece = chance.message(HTTP);
                    let size = piece.len().min(255);
                    [vec![chance.byte(), size as u8], piece[..size].to_vec()].concat()
                })
                .collect();
            connection::check(&steps);
        });
    }

    #[test]
    fn spiffe_ids() {
        tried(6, |chance| {
            if let Ok(text) = std::str::from_utf8(&chance.message(SPIFFE)) {
                spiffe_id::check(text);
            }
        });
    }

    #[test]
    fn rules_and_paths() {
        let mut chance = Chance(12);
        // Each compiles dozens of rules.
        (0..ROUNDS / 10).for_each(|_| {
            let parts: Vec<Vec<u8>> = (0..5).map(|_| chance.message(&RULES[1..])).collect();
            rules::check(&parts.join(&0xff));
            rules::check(&chance.message(RULES));
        });
    }

    #[test]
    fn certificates() {
        // Nearly all of them fail at the first byte: DER is the fuzzer's part.
        tried(7, |chance| {
            x509_leaf::check(&chance.message(&[
                b"\x30\x82\x01\x00",
                b"\x30\x0a",
                b"\x02\x01\x05",
                b"\x06\x03\x55\x1d\x11",
                b"\xa3\x02",
            ]))
        });
    }

    #[test]
    fn tokens() {
        tried(9, |chance| jws::check(&[vec![0], chance.message(JWS)].concat()));
    }

    #[test]
    fn claims() {
        tried(10, |chance| {
            let (head, first) = (HEADS[chance.below(HEADS.len() + 6) % HEADS.len()], CLAIMS[chance.below(2)]);
            let more = if chance.below(2) == 0 { chance.message(CLAIMS) } else { chance.few(&CLAIMS[3..], b"") };
            jws::check(&[b"\x01", head, b"\xff{", first, &more, b"}"].concat());
        });
    }

    #[test]
    fn key_sets() {
        tried(11, |chance| {
            let entries = if chance.below(2) == 0 { chance.message(JWKS) } else { chance.few(&JWKS[5..], b",") };
            jwks::check(&[b"{\"keys\":[", entries.as_slice(), b"]}"].concat());
        });
    }
}
