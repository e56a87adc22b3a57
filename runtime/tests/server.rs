//! Claims about the server, over raw sockets: what it refuses, how it says so, and how it ends.
//!
//! Limits in time are made short here, so that each claim takes well under a second.

#![expect(clippy::unwrap_used, reason = "clippy.toml excepts tests, but not their helpers")]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::{Json, Router, middleware, routing};
use runtime::health::Health;
use runtime::http::Limits;
use runtime::request_id::{RequestId, Traceparent};
use runtime::shutdown::Shutdown;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// More than any of these tests needs; a server that hangs fails here.
const PATIENCE: Duration = Duration::from_secs(10);

struct Server {
    address: SocketAddr,
    shutdown: Shutdown,
    serving: JoinHandle<std::io::Result<()>>,
}

impl Server {
    async fn start(limits: Limits) -> Self {
        Self::start_with(router(), limits).await
    }

    async fn start_with(router: Router, limits: Limits) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = Shutdown::new();
        let serving = tokio::spawn(runtime::http::serve(listener, router, limits, shutdown.clone()));
        Self { address, shutdown, serving }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Sends all of it and reads until the server closes.
    async fn exchange(&self, request: impl AsRef<[u8]>) -> Answer {
        let mut stream = self.connect().await;
        let _ = stream.write_all(request.as_ref()).await; // a server that refuses early may stop reading
        Answer::read(&mut stream).await
    }

    /// Returns once a new client is served. Until then it is turned away, with an answer or a reset.
    async fn gives_a_place_away(&self) {
        let begun = Instant::now();
        loop {
            let (mut stream, mut bytes) = (self.connect().await, Vec::new());
            let _ = stream.write_all(get_and_close("/").as_bytes()).await;
            let _ = timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("turned away or served");
            if bytes.starts_with(b"HTTP/1.1 200") {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "no place in time: {}", String::from_utf8_lossy(&bytes));
            sleep(short(10)).await;
        }
    }
}

/// The only answer on a connection that the server has closed.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    async fn read(stream: &mut TcpStream) -> Self {
        Self::parse(&read_to_end(stream).await)
    }

    fn parse(text: &str) -> Self {
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer in {text:?}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Self { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    #[track_caller]
    fn is_problem(&self, status: u16, kind: &str) {
        assert_eq!(self.status, status, "{self:?}");
        assert_eq!(self.header("content-type"), Some("application/problem+json"), "{self:?}");
        assert_eq!(self.header("content-length"), Some(self.body.len().to_string().as_str()), "{self:?}");
        let problem = self.json();
        assert_eq!(problem["type"], kind);
        assert_eq!(problem["status"], status);
        assert!(!problem["title"].as_str().unwrap().is_empty() && !problem["detail"].as_str().unwrap().is_empty());
        assert_eq!(problem["requestId"].as_str(), self.header("x-request-id"), "{self:?}");
        assert!(problem["requestId"].is_string());
    }
}

async fn read_to_end(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let read = timeout(PATIENCE, stream.read_to_end(&mut bytes)).await;
    let seen = String::from_utf8_lossy(&bytes).into_owned();
    read.unwrap_or_else(|_| panic!("still open; so far {seen:?}"))
        .unwrap_or_else(|error| panic!("{error} after {seen:?}"));
    seen
}

/// Reads one answer with `Content-Length` from a connection that stays open.
async fn read_one(stream: &mut TcpStream) -> Answer {
    let mut bytes = Vec::new();
    let reading = async {
        loop {
            bytes.push(stream.read_u8().await.expect("an answer"));
            if bytes.ends_with(b"\r\n\r\n") {
                let mut answer = Answer::parse(std::str::from_utf8(&bytes).unwrap());
                let mut body = vec![0; answer.header("content-length").map_or(0, |length| length.parse().unwrap())];
                stream.read_exact(&mut body).await.unwrap();
                answer.body = String::from_utf8(body).unwrap();
                return answer;
            }
        }
    };
    timeout(PATIENCE, reading).await.expect("an answer in time")
}

fn router() -> Router {
    async fn panics() {
        panic!("on purpose");
    }
    async fn endless() -> Body {
        Body::from_stream(futures::stream::repeat_with(|| Ok::<_, Infallible>(Bytes::from_static(&[b'x'; 65536]))))
    }
    async fn names(id: RequestId, traceparent: Traceparent) -> Json<Value> {
        Json(json!({ "id": id.as_str(), "traceparent": traceparent.0 }))
    }
    Router::new()
        .route("/", routing::get(async || "hello"))
        .route("/echo", routing::post(async |body: Bytes| body))
        .route("/panics", routing::get(panics))
        .route("/endless", routing::get(endless))
        .route("/names", routing::get(names))
        .layer(middleware::from_fn(runtime::request_id::track))
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")
}

fn post(path: &str, body: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

fn get_and_close(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
}

fn short(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

#[tokio::test]
async fn a_header_that_never_ends_is_answered_408_and_closed() {
    let server = Server::start(Limits { header_time: short(200), ..Limits::default() }).await;
    server.exchange("GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ").await.is_problem(408, "/problems/request-timeout");
}

#[tokio::test]
async fn a_header_that_trickles_in_is_answered_408_when_its_time_is_over() {
    let server = Server::start(Limits { header_time: short(300), ..Limits::default() }).await;
    let begun = Instant::now();
    let (mut reading, mut writing) = server.connect().await.into_split();
    let trickle = tokio::spawn(async move {
        writing.write_all(b"GET / HTTP/1.1\r\nX-Slow: ").await.unwrap();
        while writing.write_all(b"a").await.is_ok() {
            sleep(short(10)).await;
        }
    });
    let mut text = String::new();
    timeout(PATIENCE, reading.read_to_string(&mut text)).await.unwrap().unwrap();
    Answer::parse(&text).is_problem(408, "/problems/request-timeout");
    assert!(short(250) < begun.elapsed(), "cut too early");
    trickle.abort();
}

#[tokio::test]
async fn the_header_of_a_later_request_has_the_header_time_and_not_the_idle_time() {
    let limits = Limits { header_time: short(200), idle_time: Duration::from_secs(60), ..Limits::default() };
    let server = Server::start(limits).await;
    let mut stream = server.connect().await;
    stream.write_all(get("/").as_bytes()).await.unwrap();
    assert_eq!(read_one(&mut stream).await.status, 200);
    sleep(short(400)).await; // idle longer than a header may take: still open
    stream.write_all(b"GET / HT").await.unwrap();
    Answer::read(&mut stream).await.is_problem(408, "/problems/request-timeout");
}

#[tokio::test]
async fn a_body_that_never_ends_is_answered_408_and_closed() {
    let server = Server::start(Limits { body_time: short(200), ..Limits::default() }).await;
    let answer = server.exchange("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf").await;
    answer.is_problem(408, "/problems/request-timeout");
    assert_eq!(answer.header("connection"), Some("close"));
    assert_eq!(answer.json()["instance"], "/echo");
}

#[tokio::test]
async fn a_body_that_trickles_in_is_answered_408_when_its_time_is_over() {
    let server = Server::start(Limits { body_time: short(300), ..Limits::default() }).await;
    let (mut reading, mut writing) = server.connect().await.into_split();
    let trickle = tokio::spawn(async move {
        writing.write_all(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n").await.unwrap();
        while writing.write_all(b"a").await.is_ok() {
            sleep(short(10)).await;
        }
    });
    let mut text = String::new();
    timeout(PATIENCE, reading.read_to_string(&mut text)).await.unwrap().unwrap();
    Answer::parse(&text).is_problem(408, "/problems/request-timeout");
    trickle.abort();
}

#[tokio::test]
async fn a_connection_that_says_nothing_is_closed() {
    let server = Server::start(Limits { header_time: short(200), ..Limits::default() }).await;
    assert_eq!(read_to_end(&mut server.connect().await).await, "");
}

#[tokio::test]
async fn a_connection_that_idles_after_its_answer_is_closed() {
    let limits = Limits { idle_time: short(200), header_time: Duration::from_secs(60), ..Limits::default() };
    let server = Server::start(limits).await;
    let mut stream = server.connect().await;
    stream.write_all(get("/").as_bytes()).await.unwrap();
    assert_eq!(read_one(&mut stream).await.body, "hello");
    assert_eq!(read_to_end(&mut stream).await, "");
}

#[tokio::test]
async fn too_many_headers_are_refused_by_name_however_many_they_are() {
    let server = Server::start(Limits::default()).await;
    for count in [64, 99, 200, 5000] {
        let lines: String = (0..count).map(|n| format!("X-{n}: v\r\n")).collect();
        let request = format!("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{lines}\r\n");
        let answer = server.exchange(request).await;
        answer.is_problem(431, "/problems/headers-too-large");
    }
    let lines: String = (0..62).map(|n| format!("X-{n}: v\r\n")).collect(); // 64 with Host and Connection
    let request = format!("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{lines}\r\n");
    assert_eq!(server.exchange(request).await.status, 200);
}

#[tokio::test]
async fn headers_too_large_are_refused_by_name_however_large_they_are() {
    let server = Server::start(Limits::default()).await;
    for size in [17 * 1024, 60 * 1024, 500 * 1024, 5 * 1024 * 1024] {
        let request =
            format!("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Large: {}\r\n\r\n", "a".repeat(size));
        server.exchange(request).await.is_problem(431, "/problems/headers-too-large");
    }
}

#[tokio::test]
async fn a_uri_too_long_is_refused_by_name_however_long_it_is() {
    let server = Server::start(Limits::default()).await;
    for size in [8 * 1024, 60 * 1024, 70 * 1024, 1024 * 1024] {
        server
            .exchange(get_and_close(&format!("/{}", "a".repeat(size))))
            .await
            .is_problem(414, "/problems/uri-too-long");
        server
            .exchange(get_and_close(&format!("/?{}", "a".repeat(size))))
            .await
            .is_problem(414, "/problems/uri-too-long");
    }
    let answer = server.exchange(get_and_close(&format!("/{}", "a".repeat(8000)))).await;
    answer.is_problem(404, "/problems/not-found");
    assert_eq!(answer.json()["instance"].as_str().unwrap().len(), 64);
}

#[tokio::test]
async fn a_declared_body_beyond_the_cap_is_refused_before_any_of_it_is_sent() {
    let server = Server::start(Limits::default()).await;
    for length in ["1048577", "1000000000000", "9223372036854775807", "18446744073709551615"] {
        let request = format!("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n");
        let answer = server.exchange(request).await;
        answer.is_problem(413, "/problems/payload-too-large");
        assert_eq!(answer.header("connection"), Some("close"));
    }
}

#[tokio::test]
async fn a_body_beyond_the_cap_is_refused_while_the_client_still_sends() {
    let server = Server::start(Limits { body_bytes: 1000, ..Limits::default() }).await;
    let head = format!("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", 4_000_000);
    let answer = server.exchange([head.as_bytes(), &vec![b'a'; 4_000_000]].concat()).await;
    answer.is_problem(413, "/problems/payload-too-large");
}

#[tokio::test]
async fn a_chunked_body_beyond_the_cap_is_refused() {
    let server = Server::start(Limits { body_bytes: 1000, ..Limits::default() }).await;
    let head = "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
    let chunk = format!("400\r\n{}\r\n", "a".repeat(0x400));
    server.exchange(format!("{head}{chunk}{chunk}0\r\n\r\n")).await.is_problem(413, "/problems/payload-too-large");

    let small = "3\r\nabc\r\n0\r\n\r\n";
    let answer = server.exchange(format!("{}{small}", head.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n"))).await;
    assert_eq!((answer.status, answer.body.as_str()), (200, "abc"));
}

#[tokio::test]
async fn a_coded_body_is_refused_by_name() {
    let server = Server::start(Limits::default()).await;
    for coding in
        ["Content-Encoding: gzip", "Content-Encoding: br", "Content-Encoding: x\r\nTransfer-Encoding: chunked"]
    {
        let request = format!("POST /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{coding}\r\n\r\n0\r\n\r\n");
        server.exchange(request).await.is_problem(415, "/problems/unsupported-encoding");
    }
    let request = "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n";
    server.exchange(request).await.is_problem(415, "/problems/unsupported-encoding");
    let identity = "POST /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Encoding: identity\r\nContent-Length: 2\r\n\r\nok";
    assert_eq!(server.exchange(identity).await.body, "ok");
}

#[tokio::test]
async fn what_is_not_http_is_refused_as_malformed() {
    let server = Server::start(Limits::default()).await;
    for nonsense in [
        "nonsense\r\n\r\n",
        "GET / HTTP/1.1\r\nno colon\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "GET /\x01 HTTP/1.1\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        "GET / HTTP/1.1\r\nConnection: close\r\n\r\n", // without a host
        "GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\nConnection: close\r\n\r\n",
        "\x16\x03\x01\x02\x00\x01\x00\x01\u{fc}\x03\x03 TLS\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        // Whoever stands before us may count such a body otherwise than we do.
        "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ] {
        server.exchange(nonsense).await.is_problem(400, "/problems/malformed-request");
    }
    assert_eq!(server.exchange(get_and_close("/")).await.status, 200);
    assert_eq!(server.exchange("GET / HTTP/1.0\r\n\r\n").await.status, 200, "HTTP/1.0 has no hosts");
}

#[tokio::test]
async fn answers_before_a_malformed_request_on_the_same_connection_are_whole() {
    let server = Server::start(Limits::default()).await;
    let mut stream = server.connect().await;
    stream.write_all(format!("{}{}nonsense\r\n\r\n", get("/"), get("/")).as_bytes()).await.unwrap();
    assert_eq!(read_one(&mut stream).await.body, "hello");
    assert_eq!(read_one(&mut stream).await.body, "hello");
    Answer::read(&mut stream).await.is_problem(400, "/problems/malformed-request");
}

#[tokio::test]
async fn a_connection_beyond_the_cap_is_turned_away_and_the_others_go_on() {
    let server = Server::start(Limits { connections: 2, ..Limits::default() }).await;
    let (mut first, mut second) = (server.connect().await, server.connect().await);
    for stream in [&mut first, &mut second] {
        stream.write_all(get("/").as_bytes()).await.unwrap();
        assert_eq!(read_one(stream).await.status, 200);
    }
    let answer = Answer::read(&mut server.connect().await).await;
    answer.is_problem(503, "/problems/overloaded");
    assert_eq!(answer.header("retry-after"), Some("1"));

    first.write_all(get("/").as_bytes()).await.unwrap();
    assert_eq!(read_one(&mut first).await.status, 200);

    drop(second);
    server.gives_a_place_away().await;
}

#[tokio::test]
async fn a_request_beyond_the_places_is_refused_before_any_handler_and_its_connection_goes_on() {
    let (entered, release, calls) = (Arc::new(Notify::new()), Arc::new(Notify::new()), Arc::new(AtomicUsize::new(0)));
    let (enters, released, counted) = (entered.clone(), release.clone(), calls.clone());
    let handler = async move |_: Bytes| {
        counted.fetch_add(1, Ordering::Relaxed);
        enters.notify_one();
        released.notified().await;
        "done"
    };
    let router = Router::new()
        .route("/", routing::get(async || "read"))
        .route("/work", routing::post(handler))
        .route("/urgent/stop", routing::post(async || "stopped"));
    let limits = Limits { requests: 1, always: &["/urgent/"], ..Limits::default() };
    let server = Server::start_with(router, limits).await;
    let (mut first, mut second) = (server.connect().await, server.connect().await);
    first.write_all(post("/work", "12345").as_bytes()).await.unwrap();
    entered.notified().await;

    for _ in 0..3 {
        second.write_all(post("/work", "12345").as_bytes()).await.unwrap();
        let refused = read_one(&mut second).await;
        refused.is_problem(503, "/problems/overloaded");
        assert_eq!(refused.header("retry-after"), Some("1"));
        assert_eq!(refused.header("connection"), None, "a new connection would cost more");
    }
    second.write_all(get("/").as_bytes()).await.unwrap();
    assert_eq!(read_one(&mut second).await.body, "read", "whoever reads passes freely");
    second.write_all(post("/urgent/stop", "").as_bytes()).await.unwrap();
    assert_eq!(read_one(&mut second).await.body, "stopped", "and what must always get through");
    // A body that nobody would like to read to its end ends the connection.
    let huge = server.exchange("POST /work HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n12345").await;
    huge.is_problem(503, "/problems/overloaded");
    assert_eq!(huge.header("connection"), Some("close"));
    assert_eq!(calls.load(Ordering::Relaxed), 1);

    release.notify_one();
    assert_eq!(read_one(&mut first).await.body, "done");
    release.notify_one();
    second.write_all(post("/work", "12345").as_bytes()).await.unwrap();
    assert_eq!(read_one(&mut second).await.body, "done");
    assert_eq!(calls.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn a_body_that_is_slow_to_arrive_takes_no_place_from_others() {
    let server = Server::start(Limits { requests: 1, ..Limits::default() }).await;
    let mut slow = server.connect().await;
    slow.write_all(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nsl").await.unwrap();
    let mut quick = server.connect().await;
    for _ in 0..3 {
        quick.write_all(post("/echo", "quick").as_bytes()).await.unwrap();
        assert_eq!(read_one(&mut quick).await.body, "quick");
    }
    slow.write_all(b"ow").await.unwrap();
    assert_eq!(read_one(&mut slow).await.body, "slow");
}

#[tokio::test]
async fn a_client_that_sends_before_it_reads_still_learns_that_it_was_turned_away() {
    let server = Server::start(Limits { connections: 1, ..Limits::default() }).await;
    let mut first = server.connect().await;
    first.write_all(get("/").as_bytes()).await.unwrap();
    assert_eq!(read_one(&mut first).await.status, 200);
    for _ in 0..20 {
        server.exchange(post("/echo", &"x".repeat(10_000))).await.is_problem(503, "/problems/overloaded");
    }
}

#[tokio::test]
async fn whoever_asks_for_health_is_let_in_when_nobody_else_is() {
    let router = router().merge(Health::new().router());
    let server = Server::start_with(router, Limits { connections: 1, ..Limits::default() }).await;
    let mut first = server.connect().await;
    first.write_all(get("/").as_bytes()).await.unwrap();
    assert_eq!(read_one(&mut first).await.status, 200);
    for path in ["/healthz", "/readyz", "/metrics"] {
        assert_eq!(server.exchange(get_and_close(path)).await.status, 200, "{path}");
    }
    server.exchange(get_and_close("/")).await.is_problem(503, "/problems/overloaded");
}

#[tokio::test]
async fn a_client_that_does_not_read_its_answer_loses_its_place() {
    let server = Server::start(Limits { connections: 1, write_time: short(200), ..Limits::default() }).await;
    let mut stream = server.connect().await;
    stream.write_all(get("/endless").as_bytes()).await.unwrap();
    assert_eq!(stream.read(&mut [0; 16]).await.unwrap(), 16); // it has begun, and from here on nobody reads
    server.gives_a_place_away().await;
}

#[tokio::test]
async fn a_stop_lets_a_request_in_flight_finish_and_takes_no_new_connection() {
    let (entered, release) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (enters, released) = (entered.clone(), release.clone());
    let handler = async move || {
        enters.notify_one();
        released.notified().await;
        "finished"
    };
    let server = Server::start_with(Router::new().route("/", routing::get(handler)), Limits::default()).await;
    let mut idle = server.connect().await; // nobody waits for a connection that has nothing to do
    let mut stream = server.connect().await;
    stream.write_all(get("/").as_bytes()).await.unwrap();
    entered.notified().await;

    server.shutdown.trigger();
    assert_eq!(read_to_end(&mut idle).await, "");
    let begun = Instant::now();
    while TcpStream::connect(server.address).await.is_ok() {
        assert!(begun.elapsed() < PATIENCE, "the listener stayed open");
        sleep(short(10)).await;
    }
    assert!(!server.serving.is_finished());
    release.notify_one();
    let answer = Answer::read(&mut stream).await;
    assert_eq!((answer.status, answer.body.as_str()), (200, "finished"));
    assert_eq!(answer.header("connection"), Some("close"));
    timeout(PATIENCE, server.serving).await.expect("it ends").unwrap().unwrap();
}

#[tokio::test]
async fn a_stop_does_not_wait_for_ever() {
    let router = Router::new().route("/", routing::get(std::future::pending::<()>));
    let server = Server::start_with(router, Limits { drain_time: short(200), ..Limits::default() }).await;
    let mut stream = server.connect().await;
    stream.write_all(get("/").as_bytes()).await.unwrap();
    server.shutdown.trigger();
    timeout(PATIENCE, server.serving).await.expect("it ends").unwrap().unwrap();
}

#[tokio::test]
async fn a_panicking_handler_is_answered_500_and_the_connection_lives() {
    let server = Server::start(Limits::default()).await;
    let mut stream = server.connect().await;
    stream.write_all(get("/panics").as_bytes()).await.unwrap();
    let answer = read_one(&mut stream).await;
    answer.is_problem(500, "about:blank");
    assert!(!answer.body.contains("on purpose"));
    stream.write_all(get("/").as_bytes()).await.unwrap();
    assert_eq!(read_one(&mut stream).await.status, 200);
}

#[tokio::test]
async fn the_routers_own_refusals_are_problems_too() {
    let server = Server::start(Limits::default()).await;
    server.exchange(get_and_close("/nowhere")).await.is_problem(404, "/problems/not-found");
    let answer = server.exchange(get_and_close("/echo")).await;
    answer.is_problem(405, "/problems/method-not-allowed");
    assert_eq!(answer.header("allow"), Some("post"));
}

#[tokio::test]
async fn a_client_that_has_closed_its_sending_side_still_gets_its_answer() {
    let server = Server::start(Limits::default()).await;
    let mut stream = server.connect().await;
    stream.write_all(get("/").as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(Answer::read(&mut stream).await.body, "hello");
}

#[tokio::test]
async fn a_body_that_breaks_off_is_refused() {
    let server = Server::start(Limits::default()).await;
    let mut stream = server.connect().await;
    stream.write_all(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf").await.unwrap();
    stream.shutdown().await.unwrap();
    Answer::read(&mut stream).await.is_problem(400, "/problems/malformed-request");
}

#[tokio::test]
async fn a_request_keeps_its_name_or_gets_one() {
    let server = Server::start(Limits::default()).await;
    let named = async |headers: &str| {
        let answer =
            server.exchange(format!("GET /names HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n")).await;
        let shown = answer.header("x-request-id").unwrap().to_owned();
        assert_eq!(answer.json()["id"].as_str().unwrap().to_ascii_lowercase(), shown);
        shown
    };
    assert_eq!(named("X-Request-ID: mine-1\r\n").await, "mine-1");
    assert_eq!(named(&format!("X-Request-ID: {}\r\n", "a".repeat(128))).await.len(), 128);
    for unfit in [
        "",
        "X-Request-ID: \r\n",
        "X-Request-ID: a b\r\n",
        "X-Request-ID: ä\r\n",
        "X-Request-ID: a\r\nX-Request-ID: a\r\n",
    ] {
        let minted = named(unfit).await;
        assert!(minted.starts_with("req_") && minted.len() == 40, "{minted}");
    }
    assert_eq!(named(&format!("X-Request-ID: {}\r\n", "a".repeat(129))).await.len(), 40);

    let refused =
        server.exchange("POST / HTTP/1.1\r\nHost: x\r\nX-Request-ID: mine-2\r\nContent-Length: 9999999\r\n\r\n").await;
    refused.is_problem(413, "/problems/payload-too-large");
    assert_eq!(refused.json()["requestId"], "mine-2");
}

#[tokio::test]
async fn only_a_well_formed_traceparent_reaches_the_handler() {
    let server = Server::start(Limits::default()).await;
    let seen = async |value: &str| {
        let answer = server
            .exchange(format!("GET /names HTTP/1.1\r\nHost: x\r\nConnection: close\r\ntraceparent: {value}\r\n\r\n"))
            .await;
        assert_eq!(answer.header("traceparent"), answer.json()["traceparent"].as_str());
        answer.json()["traceparent"].clone()
    };
    let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    assert_eq!(seen(good).await, good);
    assert_eq!(seen("00-00000000000000000000000000000000-00f067aa0ba902b7-01").await, Value::Null);
    assert_eq!(seen("00-4bf92f3577b34da6a3ce929d0e0e4736-01").await, Value::Null);
    assert_eq!(seen("<script>").await, Value::Null);
}

#[tokio::test]
async fn a_service_is_ready_when_every_check_passes_in_time() {
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = runs.clone();
    let health = Health::new()
        .check("store", Duration::from_secs(5), move || {
            counted.fetch_add(1, Ordering::Relaxed);
            async { Ok::<_, String>(()) }
        })
        .check("bus", Duration::from_secs(5), async || Ok::<_, String>(()));
    let server = Server::start_with(health.router(), Limits::default()).await;
    let answer = server.exchange(get_and_close("/readyz")).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.json()["checks"][0]["name"], "store");
    assert_eq!(answer.json()["checks"][1]["status"], "ok");
    for _ in 0..100 {
        server.exchange(get_and_close("/readyz")).await;
    }
    assert!(runs.load(Ordering::Relaxed) < 100, "asking became a load");
    assert_eq!(server.exchange(get_and_close("/healthz")).await.status, 200);
}

#[tokio::test]
async fn a_service_with_a_failing_or_hanging_check_is_alive_and_not_ready() {
    let health = Health::new()
        .check("fine", Duration::from_secs(5), async || Ok::<_, String>(()))
        .check("broken", Duration::from_secs(5), async || Err("password=hunter2"))
        .check("hangs", short(100), std::future::pending::<Result<(), String>>);
    let server = Server::start_with(health.router(), Limits::default()).await;
    let answer = server.exchange(get_and_close("/readyz")).await;
    assert_eq!(answer.status, 503, "{answer:?}");
    let statuses: Vec<Value> =
        answer.json()["checks"].as_array().unwrap().iter().map(|check| check["status"].clone()).collect();
    assert_eq!(statuses, ["ok", "failed", "timed-out"]);
    assert!(!answer.body.contains("hunter2"), "what a check found is not for everyone");
    assert_eq!(server.exchange(get_and_close("/healthz")).await.status, 200);
}

#[tokio::test]
async fn metrics_count_answers_by_route_and_never_by_what_clients_put_into_paths() {
    let counted = Router::new()
        .route("/counted/{id}", routing::get(async || "hello"))
        .merge(Health::new().router())
        .layer(middleware::from_fn(runtime::request_id::track));
    let server = Server::start_with(counted, Limits::default()).await;
    for path in ["/counted/one", "/counted/two", "/nowhere/three"] {
        server.exchange(get_and_close(path)).await;
    }
    server.exchange("four /counted/one HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
    let answer = server.exchange(get_and_close("/metrics")).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(answer.header("content-type").unwrap().starts_with("text/plain; version=0.0.4"));
    for line in [
        r#"daybook_http_requests_total{method="GET",route="/counted/{id}",status="200"} 2"#,
        r#"daybook_http_requests_total{method="other",route="/counted/{id}",status="405"} 1"#,
        r#"daybook_http_request_seconds_bucket{method="GET",route="/counted/{id}",status_class="2xx",le="+Inf"} 2"#,
        r#"daybook_http_request_seconds_count{method="GET",route="/counted/{id}",status_class="2xx"} 2"#,
    ] {
        assert!(answer.body.lines().any(|seen| seen == line), "{line} is not in\n{}", answer.body);
    }
    for sent in ["one", "three", "four"] {
        assert!(!answer.body.contains(sent), "{sent} became a label");
    }
}

#[tokio::test]
async fn every_answer_counts_once_with_the_status_that_the_client_sees() {
    let counted = Router::new()
        .route("/counted-echo", routing::post(async |body: Bytes| body))
        .route("/counted-panic", routing::get(async || -> &'static str { panic!("on purpose") }))
        .merge(Health::new().router())
        .layer(middleware::from_fn(runtime::request_id::track));
    let limits = Limits { connections: 1, body_bytes: 10, header_time: short(100), ..Limits::default() };
    let server = Server::start_with(counted, limits).await;
    let chunked =
        "POST /counted-echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nb\r\nhello world\r\n0\r\n\r\n";
    server.exchange(chunked).await.is_problem(413, "/problems/payload-too-large");
    assert_eq!(server.exchange(get_and_close("/counted-panic")).await.status, 500);
    server.exchange("nonsense\r\n\r\n").await.is_problem(400, "/problems/malformed-request");
    server.exchange("GET / HT").await.is_problem(408, "/problems/request-timeout");
    let mut first = server.connect().await;
    first.write_all(get("/healthz").as_bytes()).await.unwrap();
    assert_eq!(read_one(&mut first).await.status, 200);
    server.exchange(get_and_close("/counted-echo")).await.is_problem(503, "/problems/overloaded");
    drop(first);

    let answer = server.exchange(get_and_close("/metrics")).await;
    let of = |labels: &str| {
        answer
            .body
            .lines()
            .filter(|line| line.starts_with("daybook_http_requests_total") && line.contains(labels))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        of(r#"route="/counted-echo""#),
        [r#"daybook_http_requests_total{method="POST",route="/counted-echo",status="413"} 1"#]
    );
    assert_eq!(
        of(r#"route="/counted-panic""#),
        [r#"daybook_http_requests_total{method="GET",route="/counted-panic",status="500"} 1"#]
    );
    for status in [400, 408, 503] {
        // Those of other tests of this process are among them.
        let refused = of(&format!(r#"method="other",route="refused",status="{status}""#));
        assert_eq!(refused.len(), 1, "{status} was not counted:\n{}", answer.body);
    }
}

#[tokio::test]
async fn figures_that_must_be_asked_for_are_asked_once_at_a_time_and_never_hold_up_the_metrics_for_long() {
    let (asked, answer) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let (count, answered) = (asked.clone(), answer.clone());
    let health = Health::new()
        .sample("silent", Duration::from_secs(60), move || {
            count.fetch_add(1, Ordering::SeqCst);
            let answered = answered.clone();
            async move {
                answered.notified().await;
                Ok::<_, String>(())
            }
        })
        .sample("failing", Duration::from_secs(60), async || Err("password=hunter2"))
        .check("sampled", Duration::from_secs(1), async || Err("no"));
    let server = Server::start_with(health.router(), Limits::default()).await;
    let age = |text: &str, sample: &str| -> f64 {
        let name = format!(r#"daybook_sample_age_seconds{{sample="{sample}"}} "#);
        text.lines().find_map(|line| line.strip_prefix(&name)).expect(&name).parse().unwrap()
    };
    let first = server.exchange(get_and_close("/metrics")).await;
    assert_eq!(first.status, 200, "it waits no longer for what does not answer");
    tokio::time::sleep(Duration::from_millis(1_100)).await; // now it would be time for the next
    let second = server.exchange(get_and_close("/metrics")).await;
    assert_eq!(asked.load(Ordering::SeqCst), 1, "the one under way is waited for");
    for sample in ["silent", "failing"] {
        assert!(age(&first.body, sample) < age(&second.body, sample), "{sample}: it says how old its figures are");
        assert!(1.0 < age(&second.body, sample));
    }
    assert!(second.body.contains(r#"daybook_ready_check{check="sampled"} 0"#), "{}", second.body);
    assert!(!second.body.contains("hunter2"));
    answer.notify_one();
    let level = async {
        loop {
            let body = server.exchange(get_and_close("/metrics")).await.body;
            answer.notify_one();
            if asked.load(Ordering::SeqCst) >= 2 && age(&body, "silent") < age(&body, "failing") {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), level).await.expect("an answer makes it young again");
}
