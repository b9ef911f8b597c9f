//! How much may a peer ask of the agent, and how long may it take? Every bound of the data path, with its reason.
//!
//! Whoever can connect can try any of them. What is a choice of the operator's is configuration, and isn't here.
use std::time::Duration;

/// From the first moment of a connection to the end of its TLS handshake. As in the servers of the library.
pub const HANDSHAKE: Duration = Duration::from_secs(10);
/// From the first byte of a request's head to its last: a slow loris holds no slot longer.
pub const HEAD: Duration = Duration::from_secs(10);
/// Between two pieces of a request's body that is waited for.
pub const BODY: Duration = Duration::from_secs(10);
/// So much of a body must come in that time: one byte a second is no progress, and chunks of one byte weigh six.
pub const BODY_AT_LEAST: u64 = 64;
/// A connection with nothing under way; also a stream (gRPC, WebSocket) on which nothing moves either way.
pub const IDLE: Duration = Duration::from_secs(60);
/// One answer's or piece's bytes that the peer doesn't take: data dribble (CVE-2019-9511).
pub const STALL: Duration = Duration::from_secs(60);
/// How often the three above are looked after. A slot is free at most this much too late.
pub const SWEEP: Duration = Duration::from_millis(500);

/// Bytes of a head (decoded, where it was compressed), fields of it, and bytes of its target: Envoy's caps, as in the library.
pub const HEAD_BYTES: usize = 60 * 1024;
pub const FIELDS: usize = 100;
pub const TARGET: usize = 8 * 1024;
/// What is read at the data socket, so that it is us who say that a head is too large: hyper can't say it so that the library knows who
/// said it. The guard of HTTP/1.1 objects to 128 KiB, and what passes it must fit.
pub const DATA_HEAD_BYTES: usize = 192 * 1024;
pub const DATA_FIELDS: usize = 512;

/// Streams at once on one HTTP/2 connection, from peers and (where they allow it) to them. What most servers allow. A caller with
/// grpcio and no agent has one connection for a channel: its 129th stream waits, as it does at those servers, and cancelling more than
/// a hundred at once may end the connection (rapid reset). An agent as the caller opens another connection instead of waiting.
pub const STREAMS: u32 = 128;
/// Windows of HTTP/2: a stream's is what one slow reader can make us keep; a connection's is that of all its streams together, since
/// callers who know nothing of one another share it, and whoever reads slowly must not hold up the others. 25 MB/s over 5 ms.
pub const STREAM_WINDOW: u32 = 128 * 1024;
pub const CONNECTION_WINDOW: u32 = STREAMS * STREAM_WINDOW;
/// The same at the data socket, where one connection has all calls of a process to all its services, some of which stay open for
/// ever. The process was attested, and each caller has so many connections only: what grpcio would allow itself, and no count of
/// cancelled ones. Windows count bytes that we hold because an endpoint is slow. A stream's may be small, a UNIX socket being so near;
/// a connection's is that of 512 streams that stand still (32 MiB), not of all, which nobody would let us keep.
pub const DATA_STREAMS: u32 = 4096;
pub const DATA_STREAM_WINDOW: u32 = 64 * 1024;
pub const DATA_CONNECTION_WINDOW: u32 = 512 * DATA_STREAM_WINDOW;
/// Unsent bytes of one HTTP/2 stream.
pub const SEND_BUFFER: usize = 256 * 1024;
/// What HTTP/1.1 may keep of one connection: a head that is just allowed must fit.
pub const HTTP1_BUFFER: usize = 64 * 1024;

/// Open connections of one listener, and of the data socket: with 32 KiB each a flood costs no more than 320 MB.
pub const CONNECTIONS: usize = 10_000;
/// Of these, one user's at the data socket (root may have all), and connections to endpoints for one identity: whoever is refused more
/// goes on by himself, and nobody else runs out of descriptors, of which the unit allows 65,536.
pub const DATA_OF_ONE: usize = CONNECTIONS / 4;
pub const UPSTREAM_OF_ONE: usize = 8192;

/// Idle connections to an endpoint: longer than the pauses between calls, shorter than servers keep them (60 s and more).
pub const UPSTREAM_IDLE: Duration = Duration::from_secs(30);
/// A peer that vanished (R29) would hold every later request: after so much silence its kernel is asked whether it is there, and again,
/// and after three answers that don't come the connection has ended. Not by PINGs of HTTP/2: the servers of gRPC take two of them in
/// five minutes, and end a connection with streams on it at the next (GOAWAY, too_many_pings).
pub const ALIVE_AFTER: Duration = Duration::from_secs(5);
pub const ALIVE_EVERY: Duration = Duration::from_secs(1);
pub const ALIVE_TIMES: u32 = 3;
/// The kernel asks nobody while bytes of ours are on their way. So many milliseconds may they be, where many share the connection; a
/// peer of HTTP/1.1 may have no room for a large body for longer than that, and holds up nobody else.
pub const TAKEN_WITHIN: u32 = 8000;
/// Idle connections to the application: shorter than gunicorn keeps them (2 s), uvicorn (5 s) and the rest. A new one costs little.
pub const APPLICATION_IDLE: Duration = Duration::from_millis(1500);
/// Names that the system looks up at once for one identity (five seconds for each, where its server is silent), and threads for all.
pub const LOOKUPS: usize = 4;
pub const LOOKUP_THREADS: usize = 32;
/// Kept idle for one endpoint and worker.
pub const IDLE_AT_MOST: usize = 256;
/// A UNIX socket answers at once or its backlog is full: then it is asked again so soon, and so long in all.
pub const APPLICATION_AGAIN: Duration = Duration::from_millis(2);
pub const APPLICATION_CONNECT: Duration = Duration::from_secs(1);

/// Who is in the queue of a listener when we drain is still taken; a reset would leave the caller in doubt.
pub const DRAIN_ACCEPT: Duration = Duration::from_millis(100);

/// Connections of peers that prove nothing that ends are renewed all the same, so that an identity that was withdrawn is noticed.
pub const AGE: Duration = Duration::from_secs(12 * 3600);
/// An idle HTTP/1.1 connection that is to end waits so long for a request that may be on its way, whose answer then is its last.
pub const LAST: Duration = Duration::from_secs(1);
/// From "this connection ends" (GOAWAY, connection: close) to its end.
pub const GRACE: Duration = Duration::from_secs(30);
/// What a peer that was refused may still send before the socket closes, so that it can read why.
pub const LINGER: Duration = Duration::from_secs(1);
pub const LINGER_BYTES: usize = 4 * 1024 * 1024;
