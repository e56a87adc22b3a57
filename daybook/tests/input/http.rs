//! The envelope: what is not HTTP, or HTTP of a kind that nobody should send.

use crate::system::System;
use crate::table::{Case, Expected, case, refused, taken};
use crate::wire::{Request, all_said};

pub(crate) fn table(system: &System) -> Vec<Case> {
    let mut cases = sizes(system);
    cases.extend(framing(system));
    cases.extend(malformed());
    cases.extend(targets(system));
    cases.extend(methods(system));
    cases.extend(headers(system));
    cases.extend(types(system));
    cases
}

fn sizes(system: &System) -> Vec<Case> {
    let too_large = || refused(413, "payload-too-large").header("connection", "close");
    let blank_until = |length: usize| {
        let body = system.transfer_body().to_string();
        let padding = " ".repeat(length - body.len());
        format!("{body}{padding}")
    };
    let chunks = |length: usize| {
        let chunk = format!("1000\r\n{}\r\n", " ".repeat(0x1000));
        format!("{}0\r\n\r\n", chunk.repeat(length / 0x1000))
    };
    let chunked = |body: String| {
        let request = system.transfer_request().header("Content-Type", "application/json");
        request.header("Transfer-Encoding", "chunked").unannounced(body)
    };
    let announced = |length: &str| {
        let request = system.transfer_request().header("Content-Type", "application/json");
        request.header("Content-Length", length)
    };
    vec![
        case("8 a body of 64 KiB", system.transfer_request().body(blank_until(65_536)), taken(201).moving_money()),
        case("8 a body of 64 KiB and a byte", system.transfer_request().body(blank_until(65_537)), too_large()),
        case("8 a body of 1 MiB and a byte", system.transfer_request().body(vec![b' '; 1_048_577]), too_large()),
        case("8 a terabyte is announced and nothing is sent", announced("1000000000000"), too_large()),
        case("8 16 EiB are announced", announced("18446744073709551615"), too_large()),
        case("8 128 KiB in chunks", chunked(chunks(131_072)), too_large()),
        case(
            "8 a body for a route that takes none",
            Request::post("/v1/auth/logout").body(vec![b' '; 65_537]),
            refused(401, "unauthenticated"),
        ),
        case("31 a path of 10 KB", system.get(format!("/v1/{}", "a".repeat(10_000))), refused(414, "uri-too-long")),
        case(
            "31 a query of 10 KB",
            system.get(format!("/v1/wallets?userId={}", "a".repeat(10_000))),
            refused(414, "uri-too-long"),
        ),
        case("31 a path of 100 KB", system.get(format!("/{}", "a".repeat(100_000))), refused(414, "uri-too-long")),
        case("50 65 headers", many_headers(system, 62), refused(431, "headers-too-large")),
        case("50 101 headers", many_headers(system, 101), refused(431, "headers-too-large")),
        case("50 10,000 headers", many_headers(system, 10_000), refused(431, "headers-too-large")),
        case(
            "50 a header of 17 KB",
            system.get("/v1/head").header("X-Big", "a".repeat(17_000)),
            refused(431, "headers-too-large"),
        ),
        case(
            "50 a header of 500 KB",
            system.get("/v1/head").header("X-Big", "a".repeat(500_000)),
            refused(431, "headers-too-large"),
        ),
        case(
            "50 a header's name of 100 KB",
            system.get("/v1/head").header(&"x".repeat(100_000), "a"),
            refused(431, "headers-too-large"),
        ),
        case(
            "a bomb: 1 KB that unpacks to 1 MB",
            system.transfer().with("Content-Encoding", "gzip"),
            refused(415, "unsupported-encoding"),
        ),
        case(
            "a body coded twice",
            system.transfer().with("Content-Encoding", "gzip, gzip"),
            refused(415, "unsupported-encoding"),
        ),
        case(
            "a coding that is none",
            system.transfer().with("Content-Encoding", "identity"),
            taken(201).moving_money(),
        ),
        case(
            "a deflated transfer",
            chunked(chunks(0)).with("Transfer-Encoding", "gzip, chunked"),
            refused(415, "unsupported-encoding"),
        ),
    ]
}

fn many_headers(system: &System, count: usize) -> Request {
    (0..count).fold(system.get("/v1/head"), |request, number| request.header(&format!("X-{number}"), "a"))
}

/// Where one request ends and the next begins. Whoever stands before us may count otherwise; so what can be counted in
/// two ways is refused.
fn framing(system: &System) -> Vec<Case> {
    let malformed = || refused(400, "malformed-request");
    let body = system.transfer_body().to_string();
    let chunk = format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    let post = || system.transfer_request().header("Content-Type", "application/json");
    let chunked = |body: &str| post().header("Transfer-Encoding", "chunked").unannounced(body);
    let length = |value: &str| post().header("Content-Length", value).unannounced(&body);
    let size = body.len().to_string();
    vec![
        case(
            "both ways of counting, the length first",
            length(&size).header("Transfer-Encoding", "chunked").unannounced(&chunk),
            malformed(),
        ),
        case("both ways of counting, the chunks first", chunked(&chunk).header("Content-Length", &size), malformed()),
        case(
            "both ways of counting, split by spaces",
            chunked(&chunk).header("content-length", format!(" {size}")),
            malformed(),
        ),
        case("two lengths", length(&size).header("Content-Length", "3"), malformed()),
        case("a list of lengths", length("3, 3"), malformed()),
        case("a negative length", length("-1"), malformed()),
        case("a signed length", length("+5"), malformed()),
        case("a length in hex", length("0x10"), malformed()),
        case("a length of blanks", length(""), malformed()),
        case("a length of 40 digits", length(&"9".repeat(40)), malformed()),
        case("chunks twice", chunked(&chunk).header("Transfer-Encoding", "chunked"), malformed()),
        case(
            "chunks, and something after them",
            post().header("Transfer-Encoding", "chunked, identity").unannounced(&chunk),
            malformed(),
        ),
        case(
            "chunks under another name",
            post().header("Transfer-Encoding", "xchunked").unannounced(&chunk),
            malformed(),
        ),
        case("a chunk's size that is no number", chunked("zz\r\n{}\r\n0\r\n\r\n"), refused(400, "malformed-json")),
        case("a chunk's size beyond 64 bits", chunked("fffffffffffffffff\r\n{}\r\n"), refused(400, "malformed-json")),
        case("a negative chunk", chunked("-2\r\n{}\r\n0\r\n\r\n"), refused(400, "malformed-json")),
        case("a chunk longer than its size", chunked("2\r\n{}x\r\n0\r\n\r\n"), refused(400, "malformed-json")),
        case(
            "a chunk's extension of 64 KB",
            chunked(&format!("2;{}\r\n{{}}\r\n0\r\n\r\n", "x".repeat(65_000))),
            refused(400, "malformed-json"),
        ),
        case(
            "chunks with a line of their own after them",
            chunked(&chunk.replace("0\r\n\r\n", "0\r\nX-Late: yes\r\n\r\n")),
            taken(201).moving_money(),
        ),
        case("chunks", chunked(&chunk), taken(201).moving_money()),
        case("a length and no body, the client waits", length("0"), refused(400, "malformed-json")),
        case("a GET with a body", system.get("/v1/head").body("{}"), taken(200)),
        case("100-continue", system.transfer().header("Expect", "100-continue"), taken(201).moving_money().continued()),
        case(
            "100-continue for a body that is too large",
            post().header("Content-Length", "70000").header("Expect", "100-continue"),
            refused(413, "payload-too-large"),
        ),
        case(
            "100-continue without a token",
            system.transfer().without("Authorization").header("Expect", "100-continue"),
            refused(401, "unauthenticated"),
        ),
    ]
}

fn malformed() -> Vec<Case> {
    let malformed = || refused(400, "malformed-request");
    let rows: &[(&str, &[u8], Expected)] = &[
        ("text", b"hello\r\n\r\n", malformed()),
        ("a TLS handshake", b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03\r\n\r\n", malformed()),
        (
            "HTTP/2 with prior knowledge",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
            malformed(),
        ),
        ("HTTP/9.9", b"GET /v1/head HTTP/9.9\r\nHost: a\r\n\r\n", malformed()),
        ("HTTP/0.9", b"GET /v1/head\r\n\r\n", malformed()),
        ("HTTP/1.0", b"GET /healthz HTTP/1.0\r\n\r\n", taken(200)),
        ("no method", b" /v1/head HTTP/1.1\r\nHost: a\r\n\r\n", malformed()),
        ("no target", b"GET HTTP/1.1\r\nHost: a\r\n\r\n", malformed()),
        ("two targets", b"GET /a /b HTTP/1.1\r\nHost: a\r\n\r\n", malformed()),
        ("a NUL in the target", b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n", malformed()),
        ("a NUL in a header", b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-A: b\x00c\r\n\r\n", malformed()),
        (
            "a bare carriage return in a header",
            b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-A: b\rSet-Cookie: c\r\n\r\n",
            malformed(),
        ),
        ("a folded header", b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-A: b\r\n c\r\n\r\n", malformed()),
        ("a blank before the colon", b"GET /healthz HTTP/1.1\r\nHost : a\r\n\r\n", malformed()),
        ("a header without a name", b"GET /healthz HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n", malformed()),
        ("a header without a colon", b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-A\r\n\r\n", malformed()),
        (
            "a header's name that is not ASCII",
            "GET /healthz HTTP/1.1\r\nHost: a\r\nX-Ä: b\r\n\r\n".as_bytes(),
            malformed(),
        ),
        ("no Host", b"GET /healthz HTTP/1.1\r\n\r\n", malformed()),
        ("two Hosts", b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", malformed()),
        ("lines that end in a bare line feed", b"GET /healthz HTTP/1.1\nHost: a\n\n", taken(200)),
        ("blank lines before the request", b"\r\n\r\nGET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", taken(200)),
    ];
    rows.iter().map(|(name, bytes, expected)| case(*name, *bytes, expected.clone())).collect()
}

fn targets(system: &System) -> Vec<Case> {
    let wallet = &system.alice;
    let not_found = || refused(404, "not-found");
    let invalid_id = || refused(400, "invalid-id");
    let rows: Vec<(&str, Vec<u8>, Expected)> = vec![
        ("32 an unknown path", b"/v2/wallets".to_vec(), not_found()),
        ("32 a path with a slash at its end", b"/v1/wallets/".to_vec(), not_found()),
        ("32 a path in capitals", b"/V1/WALLETS".to_vec(), not_found()),
        ("a path that leads out", b"/v1/../../../../etc/passwd".to_vec(), not_found()),
        ("a path that leads out, encoded", b"/v1/%2e%2e/%2e%2e/etc/passwd".to_vec(), not_found()),
        ("a path that leads out of /docs", b"/docs/..%2f..%2fCargo.toml".to_vec(), not_found()),
        ("two slashes", b"//v1/head".to_vec(), not_found()),
        ("a backslash", b"/v1\\head".to_vec(), not_found()),
        ("an encoded slash between the route's words", b"/v1%2fhead".to_vec(), not_found()),
        ("an encoded slash in an id", format!("/v1/wallets/{wallet}%2fbalance").into(), invalid_id()),
        ("an encoded NUL in an id", format!("/v1/wallets/{wallet}%00").into(), invalid_id()),
        ("an encoded line break in an id", format!("/v1/wallets/{wallet}%0d%0aSet-Cookie:a").into(), invalid_id()),
        ("a percent sign without digits in an id", b"/v1/wallets/%".to_vec(), invalid_id()),
        ("an id in Latin-1", b"/v1/wallets/%e4".to_vec(), invalid_id()),
        ("bytes in the path that are no UTF-8", b"/v1/wallets/\xff\xfe".to_vec(), refused(400, "malformed-request")),
        ("bytes in the path that are UTF-8", "/v1/wallets/ä".into(), invalid_id()),
        (
            "bytes in the query that are no UTF-8",
            b"/v1/wallets?userId=\xff".to_vec(),
            refused(400, "malformed-request"),
        ),
        ("a path's parameters", format!("/v1/wallets/{wallet};admin=true").into(), invalid_id()),
        ("an unknown problem", b"/problems/%3Cscript%3E".to_vec(), not_found()),
        ("a target with its own host", b"http://elsewhere.example/v1/head".to_vec(), taken(200)),
        ("a fragment", b"/v1/head#frag".to_vec(), taken(200)),
    ];
    rows.into_iter().map(|(name, target, expected)| case(name, system.get(target), expected)).collect()
}

fn methods(system: &System) -> Vec<Case> {
    let not_allowed = |allow: &str| refused(405, "method-not-allowed").header("allow", allow);
    let send = |method: &str, target: &str| Request::new(method, target).bearer(&system.partner);
    let wallet = format!("/v1/wallets/{}", system.alice);
    vec![
        case("32 GET of what is posted", send("GET", "/v1/transactions/transfer"), not_allowed("POST")),
        case("32 POST of what is read", send("POST", "/v1/head").json(&serde_json::json!({})), not_allowed("GET")),
        case("32 DELETE of a wallet", send("DELETE", &wallet), not_allowed("GET")),
        case("32 PUT of a wallet", send("PUT", &wallet).body("{}"), not_allowed("GET")),
        case("32 PATCH of a transfer", send("PATCH", "/v1/transactions/transfer").body("{}"), not_allowed("POST")),
        case("an unknown method", send("FROBNICATE", "/v1/wallets"), not_allowed("POST")),
        case("a method in small letters", send("get", "/v1/wallets"), not_allowed("GET")),
        case("a method of 5,000 letters", send(&"A".repeat(5_000), "/v1/wallets"), not_allowed("GET")),
        case("OPTIONS", send("OPTIONS", "/v1/wallets"), not_allowed("GET")),
        case("OPTIONS of everything", send("OPTIONS", "*"), refused(404, "not-found")),
        case("TRACE", send("TRACE", "/v1/wallets").header("X-Secret", "s"), not_allowed("GET")),
        case("CONNECT", send("CONNECT", "127.0.0.1:5432"), refused(404, "not-found")),
        case("CONNECT to a path", send("CONNECT", "/v1/wallets"), refused(405, "method-not-allowed")),
        case("HEAD of what is read", send("HEAD", "/v1/head"), taken(200).without_body()),
        case(
            "HEAD of what is posted",
            send("HEAD", "/v1/transactions/transfer"),
            taken(405).without_body().header("allow", "POST"),
        ),
        case("HEAD of nothing", send("HEAD", "/v2"), taken(404).without_body()),
    ]
}

fn headers(system: &System) -> Vec<Case> {
    let head = || system.get("/v1/head");
    let minted = || taken(200).header("x-request-id", "req_");
    vec![
        case("a request id with a blank", head().header("X-Request-ID", "a b"), minted()),
        case("a request id of 129 characters", head().header("X-Request-ID", "a".repeat(129)), minted()),
        case("a request id that is not ASCII", head().header("X-Request-ID", "ä"), minted()),
        case("two request ids", head().header("X-Request-ID", "a").header("X-Request-ID", "b"), minted()),
        case(
            "an encoded line break in a request id",
            head().header("X-Request-ID", "a%0d%0aSet-Cookie:b"),
            taken(200).header("x-request-id", "a%0d%0aSet-Cookie:b").no_header("set-cookie"),
        ),
        case(
            "a traceparent that is none",
            head().header("traceparent", "00-zz-zz-01"),
            taken(200).no_header("traceparent"),
        ),
        case("two traceparents", two_traces(head()), taken(200).no_header("traceparent")),
        case(
            "a range of an answer",
            head().header("Range", "bytes=0-3"),
            taken(200).contains("chain").no_header("content-range"),
        ),
        case(
            "a thousand ranges",
            head().header("Range", format!("bytes={}", "0-,".repeat(1_000))),
            taken(200).contains("chain"),
        ),
        case(
            "an upgrade to a WebSocket",
            head()
                .with("Connection", "Upgrade, close")
                .header("Upgrade", "websocket")
                .header("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
            taken(200),
        ),
        case(
            "an upgrade to HTTP/2",
            head()
                .with("Connection", "Upgrade, HTTP2-Settings, close")
                .header("Upgrade", "h2c")
                .header("HTTP2-Settings", "AAMAAABkAAQCAAAAAAIAAAAA"),
            taken(200),
        ),
        case("a condition that is not met", head().header("If-Match", "\"x\""), taken(200)),
        case(
            "another method by a header",
            system.get("/v1/wallets").header("X-HTTP-Method-Override", "DELETE"),
            taken(200),
        ),
        case(
            "another path by a header",
            head().header("X-Original-URL", "/v1/events").header("X-Rewrite-URL", "/v1/events"),
            taken(200).contains("chain"),
        ),
        case("a host that is not ours", head().with("Host", "evil.example"), taken(200)),
        case(
            "a user sent twice",
            system.transfer().header("X-User-ID", "alice").header("X-User-ID", "bob"),
            refused(422, "invalid-field"),
        ),
        case(
            "11 a user with a control character",
            system.transfer().header("X-User-ID", "a\tb"),
            refused(422, "invalid-character"),
        ),
        case(
            "11 a user in Latin-1",
            system.transfer().header("X-User-ID", b"J\xf6rg"),
            refused(422, "invalid-character"),
        ),
        case(
            "11 a user written from right to left",
            system.transfer().header("X-User-ID", "a\u{202e}b"),
            refused(422, "invalid-character"),
        ),
        case(
            "a user of 129 characters",
            system.transfer().header("X-User-ID", "u".repeat(129)),
            refused(422, "invalid-field"),
        ),
        case("a user without a name", system.transfer().header("X-User-ID", ""), refused(422, "invalid-field")),
        case("another user's wallet", system.transfer().header("X-User-ID", "bob"), refused(403, "wallet-not-owned")),
        case(
            "a user by another name for the same letters",
            system.transfer().header("X-User-ID", "alic\u{435}"),
            refused(403, "wallet-not-owned"),
        ),
    ]
}

fn two_traces(request: Request) -> Request {
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    request.header("traceparent", trace).header("traceparent", trace)
}

fn types(system: &System) -> Vec<Case> {
    let typed = |name: &str, kind: &str, expected: Expected| {
        case(format!("47 Content-Type {name}"), system.transfer().with("Content-Type", kind), expected)
    };
    let unsupported = || refused(415, "unsupported-media-type");
    let accepting = |accept: &str, expected: Expected| {
        case(format!("Accept: {accept}"), system.transfer().header("Accept", accept), expected)
    };
    let mut cases = vec![
        case("47 no Content-Type", system.transfer().without("Content-Type"), unsupported()),
        case("47 Content-Type twice", system.transfer().header("Content-Type", "application/json"), unsupported()),
        typed("of a text", "text/plain", unsupported()),
        typed("of a form", "application/x-www-form-urlencoded", unsupported()),
        typed("of several parts", "multipart/form-data; boundary=a", unsupported()),
        typed("in UTF-16", "application/json; charset=utf-16", unsupported()),
        typed("in UTF-7", "application/json; charset=utf-7", unsupported()),
        typed("of another JSON", "application/vnd.evil+json", unsupported()),
        typed("with a parameter of its own", "application/json; profile=x", unsupported()),
        typed("of nothing", "", unsupported()),
        typed("of a list", "application/json, text/plain", unsupported()),
        typed("of 10 KB", &format!("application/json; {}", "a".repeat(10_000)), unsupported()),
        typed("in capitals, in UTF-8", "APPLICATION/JSON; CHARSET=\"UTF-8\"", taken(201).moving_money()),
        accepting("text/html", refused(406, "not-acceptable")),
        accepting("application/json;q=0", refused(406, "not-acceptable")),
        accepting("text/html, */*;q=0.1", taken(201).moving_money()),
        accepting("nonsense", taken(201).moving_money()),
    ];
    let page = system.get("/v1/head").header("Accept", "image/png");
    cases.push(case("a picture of the head", page, refused(406, "not-acceptable")));
    cases
}

#[tokio::test]
async fn what_follows_a_request_that_can_be_counted_in_two_ways_is_never_taken_for_another_one() {
    let system = System::start(&[]).await;
    let smuggled = "POST /v1/auth/logout HTTP/1.1\r\nHost: daybook\r\n\r\n";
    for framing in [
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
        "Content-Length: 5\r\nContent-Length: 6\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    ] {
        let first = format!("POST /v1/auth/logout HTTP/1.1\r\nHost: daybook\r\n{framing}");
        let said = all_said(system.address, format!("{first}{smuggled}").as_bytes()).await;
        let answers = said.lines().filter(|line| line.starts_with("HTTP/1.1 ")).count();
        assert_eq!(answers, 1, "{framing:?} was answered:\n{said}");
        assert!(said.starts_with("HTTP/1.1 4"), "{said}");
        assert!(said.to_lowercase().contains("connection: close"), "{said}");
    }
}
