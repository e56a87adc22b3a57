//! The HTTP/1.1 server under every service: limits first, then the router, and a bounded end.
//!
//! `axum::serve` sets no limit in time and refuses in plain text, so this goes through hyper itself.
//! A client can be slow, huge, malformed or one of very many; each gets a problem document and costs
//! a bounded amount of time and memory. The limits here are the outermost; routes set smaller ones.
//!
//! # What is not promised
//! A handler runs inside its connection: when that breaks, or the drain after a stop ends, the handler
//! is dropped wherever it waits. What must run to its end is spawned by its handler. Whatever waits or
//! streams for long should listen to the [`Shutdown`] that it can take as an extractor, for the drain
//! waits for it.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::HttpBody;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Request, Uri, Version, header};
use axum::response::Response;
use futures::FutureExt;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tower::Service;

use crate::body::{Fault, RequestBody, ResponseBody};
use crate::door::Door;
use crate::health;
use crate::metrics;
use crate::refusal::Refusal;
pub use crate::refusal::problem;
use crate::request_id::{self, RequestId};
use crate::shutdown::Shutdown;
use crate::socket::{Conversation, Socket};

/// What one client may take, and all of them together.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Open connections; one more is answered 503 and closed, unless it asks for health.
    pub connections: usize,
    /// Requests at work, reads not counted; one more is answered 503. Less than there are connections, or it is never felt.
    pub requests: usize,
    /// Beginnings of paths that are never refused so: what must get through while all places are taken.
    pub always: &'static [&'static str],
    /// Such refusals that are told at once; more of them wait for their turn, so that clients who come again at once cannot
    /// have the server do nothing but refuse.
    pub refusals_per_second: u32,
    /// The longest such wait.
    pub refusal_wait: Duration,
    /// From a request's first byte to the end of its header; also from connecting to the first byte.
    pub header_time: Duration,
    /// From the end of the header to the end of the body.
    pub body_time: Duration,
    /// Silence between two requests.
    pub idle_time: Duration,
    /// How long a client may refuse to take any of its response.
    pub write_time: Duration,
    /// Header lines. hyper's own bound of 100 stands above it.
    pub header_count: usize,
    /// Names and values of all header lines together.
    pub header_bytes: usize,
    /// Path and query.
    pub uri_bytes: usize,
    /// The largest body of any route.
    pub body_bytes: usize,
    /// How long requests may go on after a stop was requested.
    pub drain_time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 1024,
            requests: 256,
            always: &[],
            refusals_per_second: 2_000,
            refusal_wait: Duration::from_millis(100),
            header_time: Duration::from_secs(10),
            body_time: Duration::from_secs(15),
            idle_time: Duration::from_secs(60),
            write_time: Duration::from_secs(30),
            header_count: 64,
            header_bytes: 16 * 1024,
            uri_bytes: 8 * 1024,
            body_bytes: 1024 * 1024,
            drain_time: Duration::from_secs(10),
        }
    }
}

/// Serves until a stop is requested, then lets what is in flight finish, within `limits.drain_time`.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, shutdown: Shutdown) -> io::Result<()> {
    raise_file_limit();
    let limits = Arc::new(limits);
    let places = Arc::new(Semaphore::new(limits.connections));
    let gate = Arc::new(Semaphore::new(GATE_PLACES));
    let door = Arc::new(Door::new(&limits));
    let mut connections = JoinSet::new();
    let mut stop = pin!(shutdown.requested());
    loop {
        let accepted = tokio::select! {
            () = &mut stop => break,
            Some(_) = connections.join_next() => continue, // its place is free again; a panic was logged where it happened
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // One connection that ended before we took it, or no file descriptor left: both pass.
                tracing::warn!(%error, "a connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            let Ok(place) = gate.clone().try_acquire_owned() else {
                drop(turn_away(stream));
                continue;
            };
            let limits = Arc::new(Limits { idle_time: GATE_TIME, ..limits.as_ref().clone() });
            let (router, door, shutdown) = (router.clone(), door.clone(), shutdown.clone());
            connections.spawn(async move {
                if asks_for_health(&stream).await {
                    converse(stream, peer, router, limits, door, shutdown).await;
                } else if let Some(stream) = turn_away(stream) {
                    linger(stream).await;
                }
                drop(place);
            });
            continue;
        };
        let connection = converse(stream, peer, router.clone(), limits.clone(), door.clone(), shutdown.clone());
        connections.spawn(async move {
            connection.await;
            drop(place);
        });
    }
    drop(listener); // nobody waits in the backlog of a server that stops
    if timeout(limits.drain_time, async { while connections.join_next().await.is_some() {} }).await.is_err() {
        tracing::warn!(connections = connections.len(), "cut off: still busy at the end of the drain");
        connections.shutdown().await;
    }
    Ok(())
}

/// The usual soft limit of 1,024 open files is below the connections we take, beside those to servers: take what the
/// hard limit gives.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// After a failed accept, so that a lack of file descriptors does not become a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// hyper's buffer for a head must hold more than we accept, so that it is we who refuse. This is also its size for bodies.
const BUFFER_MIN: usize = 64 * 1024;

/// The largest body that is read to its end although its request is refused.
const PASSED_OVER_MAX: u64 = 64 * 1024;

/// Of those for whom there is no place, so many at a time are listened to for a moment: whoever asks for health is
/// answered, or a server with much to do would be taken for a dead one; the others are given time to read why.
const GATE_PLACES: usize = 128;
const GATE_TIME: Duration = Duration::from_secs(1);
const LINGER_BYTES: u64 = 64 * 1024;

/// Whether that is how its first request begins.
async fn asks_for_health(stream: &TcpStream) -> bool {
    let mut first = [0; 16];
    match timeout(GATE_TIME, stream.peek(&mut first)).await {
        Ok(Ok(read)) => health::PATHS.iter().any(|path| {
            let line = [b"GET ", path.as_bytes()].concat();
            first[..read].starts_with(&line)
        }),
        _ => false,
    }
}

/// The whole answer, for nobody asked yet. `None` if the client has gone.
fn turn_away(stream: TcpStream) -> Option<TcpStream> {
    tracing::debug!("turned a connection away: all places are taken");
    // An empty send buffer takes the answer whole, without waiting. The runtime may not know yet that it is empty.
    let mut stream = stream.into_std().ok()?;
    stream.write_all(&Refusal::Overloaded.bytes(&RequestId::mint())).ok()?;
    metrics::refused(&Refusal::Overloaded);
    stream.shutdown(std::net::Shutdown::Write).ok()?;
    TcpStream::from_std(stream).ok()
}

/// Closing before a request that is under way has come makes the kernel reset the connection, and takes our answer with it.
async fn linger(stream: TcpStream) {
    let mut rest = stream.take(LINGER_BYTES);
    let _ = timeout(GATE_TIME, tokio::io::copy(&mut rest, &mut tokio::io::sink())).await; // whatever comes, it ends here
}

/// One connection from its first byte to its last.
async fn converse(
    stream: TcpStream,
    peer: SocketAddr,
    router: Router,
    limits: Arc<Limits>,
    door: Arc<Door>,
    shutdown: Shutdown,
) {
    if let Err(error) = stream.set_nodelay(true) {
        return tracing::debug!(%error, "the connection ended before it began");
    }
    let socket = Socket::new(stream, limits.clone());
    let buffer = BUFFER_MIN.max(2 * limits.header_bytes.saturating_add(limits.uri_bytes));
    let conversation = socket.conversation();
    let surroundings = Arc::new(Surroundings { peer, router, limits, door, conversation, shutdown: shutdown.clone() });
    let service = service_fn(move |request| {
        let countable = surroundings.conversation.handling();
        Box::pin(answer(request, surroundings.clone(), countable))
    });
    let mut connection = http1::Builder::new()
        .header_read_timeout(None) // the socket has better clocks
        .half_close(true) // a client that has said all it wants to say still gets its answer
        .max_buf_size(buffer)
        .serve_connection(TokioIo::new(socket), service);

    // The future of the stop is asked once, which makes it wake this task, and again when there is something to hear:
    // all connections would take its lock with everything that they do.
    let mut stop = pin!(shutdown.requested());
    let (mut listening, mut stopping) = (false, false);
    let served = poll_fn(|cx| {
        if !stopping && (!listening || shutdown.is_requested()) {
            listening = true;
            if stop.as_mut().poll(cx).is_ready() {
                stopping = true;
                Pin::new(&mut connection).graceful_shutdown();
            }
        }
        connection.poll_without_shutdown(cx)
    });
    let served = served.await;
    let mut socket = connection.into_parts().io.into_inner();
    if let Err(error) = served {
        tracing::debug!(%error, "a connection broke"); // the client's affair, and nothing we can do about
        if error.is_parse() {
            socket.not_parsed();
        }
    }
    socket.finish().await;
}

/// What all requests of a connection stand on. Each has a share of it, counted where no other connection counts.
struct Surroundings {
    peer: SocketAddr,
    router: Router,
    limits: Arc<Limits>,
    door: Arc<Door>,
    conversation: Arc<Conversation>,
    shutdown: Shutdown,
}

/// What the server knows of a request and its handler may ask for: one thing among the extensions, for each costs.
#[derive(Clone)]
pub(crate) struct Arrival {
    pub(crate) id: RequestId,
    pub(crate) fault: Fault,
    surroundings: Arc<Surroundings>,
}

/// Where a request came from, as far as its socket can tell; `None` for one that came through no socket. An extractor.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub Option<SocketAddr>);

impl<S: Sync> FromRequestParts<S> for Peer {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Infallible> {
        Ok(Self(parts.extensions.get::<Arrival>().map(|arrival| arrival.surroundings.peer)))
    }
}

/// The stop of the server that took the request. One that came through no server is never told to stop.
impl<S: Sync> FromRequestParts<S> for Shutdown {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Infallible> {
        Ok(parts.extensions.get::<Arrival>().map(|arrival| arrival.surroundings.shutdown.clone()).unwrap_or_default())
    }
}

/// One request: refused here, or answered by the router and made presentable. `countable`: there is one way to tell where
/// its body ends.
async fn answer(
    request: Request<Incoming>,
    surroundings: Arc<Surroundings>,
    countable: bool,
) -> Result<Response<ResponseBody>, Infallible> {
    let Surroundings { limits, door, conversation, .. } = &*surroundings;
    let begun = Instant::now();
    let (mut parts, incoming) = request.into_parts();
    let guest = if countable { door.admit(&parts.method, parts.uri.path()) } else { Some(None) };
    let Some(guest) = guest else {
        let body = RequestBody::new(incoming, limits, Fault::default(), conversation.clone(), None);
        return Ok(overloaded(&parts, body, door.pause(), begun)
            .await
            .map(|body| ResponseBody::new(body, conversation.clone())));
    };
    let id = RequestId::of(&parts.headers);
    let (method, uri) = (parts.method.clone(), parts.uri.clone());
    let body_sent = !incoming.is_end_stream();
    let fault = Fault::default();
    let body = RequestBody::new(incoming, limits, fault.clone(), conversation.clone(), guest.clone());

    let mut refusal = if countable { refuse(&parts, limits) } else { Some(Refusal::Malformed) };
    let mut response = None;
    if let Some(refusal) = &refusal {
        request_id::log(method.as_str(), "refused", refusal.status(), begun, &id); // what gets further counts by its route
    } else {
        let arrival = Arrival { id: id.clone(), fault: fault.clone(), surroundings: surroundings.clone() };
        parts.extensions.insert(arrival);
        let mut router = surroundings.router.clone();
        match AssertUnwindSafe(router.call(Request::from_parts(parts, body))).catch_unwind().await {
            Ok(Ok(answered)) if answered.status().is_client_error() || answered.status().is_server_error() => {
                refusal = fault.get().cloned(); // the handler saw a broken body; we know why
                response = Some(answered);
            }
            Ok(Ok(answered)) => response = Some(answered),
            Err(_) => {
                refusal = Some(Refusal::Panicked); // the panic hook has logged it; here it only gets its name
                tracing::error!(%method, request.id = %id, "a handler panicked");
            }
        }
    }

    let mut response = match (&refusal, response) {
        (None, Some(answered)) if is_bare(&answered) => wrap(answered, uri.path(), &id),
        (None, Some(answered)) => answered,
        (Some(refusal), _) => refusal.response(uri.path(), &id),
        (None, None) => unreachable!("what was not refused was answered"),
    };
    let headers = response.headers_mut();
    if !headers.contains_key(request_id::HEADER) {
        headers.insert(request_id::HEADER, id.header());
    }
    if refusal.is_some() && body_sent {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    Ok(response.map(|body| ResponseBody::new(body, conversation.clone())))
}

/// One request too many. Its connection can be used again, for a new one would cost more: a small body is read and let go.
async fn overloaded(head: &Parts, mut body: RequestBody, pause: Duration, begun: Instant) -> Response {
    let id = RequestId::of(&head.headers);
    let small = body.size_hint().upper().is_some_and(|bytes| bytes <= PASSED_OVER_MAX);
    let mut passed_over = body.is_end_stream() || small && !head.headers.contains_key(header::EXPECT);
    while passed_over && !body.is_end_stream() {
        match poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
            Some(Ok(_)) => {}
            Some(Err(_)) => passed_over = false, // too slow, or broken
            None => break,
        }
    }
    if !pause.is_zero() {
        sleep(pause).await;
    }
    metrics::record(head.method.as_str(), "refused", Refusal::Overloaded.status(), begun.elapsed());
    let mut response = Refusal::Overloaded.response(head.uri.path(), &id);
    if !passed_over {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// What can be refused from the head alone.
fn refuse(head: &Parts, limits: &Limits) -> Option<Refusal> {
    if limits.uri_bytes < uri_length(&head.uri) {
        return Some(Refusal::UriTooLong { bytes_max: limits.uri_bytes });
    }
    if limits.header_count < head.headers.len() || limits.header_bytes < header_length(&head.headers) {
        return Some(Refusal::HeadersTooLarge { count_max: limits.header_count, bytes_max: limits.header_bytes });
    }
    // RFC 9112, 3.2. Whoever stands before us and looks at one host must not hand on a request that also names another.
    let hosts = head.headers.get_all(header::HOST).iter().count();
    if 1 < hosts || hosts == 0 && head.version == Version::HTTP_11 {
        return Some(Refusal::Malformed);
    }
    if 1 < head.headers.get_all(header::TRANSFER_ENCODING).iter().count() {
        return Some(Refusal::Malformed); // RFC 9112, 6.1: chunked once, if at all
    }
    let all = |name, allowed: &str| {
        head.headers.get_all(name).iter().all(|value| value.as_bytes().eq_ignore_ascii_case(allowed.as_bytes()))
    };
    if !all(header::CONTENT_ENCODING, "identity") || !all(header::TRANSFER_ENCODING, "chunked") {
        return Some(Refusal::UnsupportedEncoding);
    }
    // hyper has checked that it is a number that fits, so one we cannot read is too large.
    let length = head
        .headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok())
        .map(|value| value.trim().parse::<usize>());
    match length {
        Some(Ok(length)) if length <= limits.body_bytes => None,
        None => None,
        Some(_) => Some(Refusal::PayloadTooLarge { bytes_max: limits.body_bytes }),
    }
}

fn uri_length(uri: &Uri) -> usize {
    uri.path_and_query().map_or(0, |path| path.as_str().len())
        + uri.authority().map_or(0, |authority| authority.as_str().len())
}

fn header_length(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + ": \r\n".len()).sum()
}

/// An error that carries no document: the framework's own, in plain text or without any body.
fn is_bare(response: &Response) -> bool {
    let error = response.status().is_client_error() || response.status().is_server_error();
    let content_type = response.headers().get(header::CONTENT_TYPE);
    error && content_type.is_none_or(|value| value.as_bytes().starts_with(b"text/plain"))
}

/// The same refusal as a problem document. Headers such as `Allow` and `Retry-After` stay.
fn wrap(bare: Response, path: &str, id: &RequestId) -> Response {
    let mut wrapped = Refusal::Bare(bare.status()).response(path, id);
    for (name, value) in bare.headers() {
        if name != header::CONTENT_TYPE && name != header::CONTENT_LENGTH {
            wrapped.headers_mut().insert(name, value.clone());
        }
    }
    wrapped
}
