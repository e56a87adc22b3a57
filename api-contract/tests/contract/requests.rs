//! Claims about what is refused before any rule is asked, over a real socket and with the real layers.
//!
//! The rows are those of bad-input that concern reading a request; each is sent as bytes, as a careless or
//! hostile client would. Callers and their tokens are in `access.rs`.

use api_contract::{
    AmountText, CurrencyText, FreeText, Freshness, Json, JsonMax, Limit, Metadata, MinPosition, Path, Position,
    Problem, Query, RequiredKey, Text, WaitMs, effective_at, money,
};
use axum::Router;
use axum::routing::{get, post};
use ledger_core::{Direction, Timestamp, WalletId};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::http::{PATIENCE, Server};

const WALLET: &str = "wal_0192f0c1-2d3e-7abc-8def-0123456789ab";

/// A request with a field of every kind that is shared.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Payment {
    wallet_id: WalletId,
    amount: AmountText,
    currency: CurrencyText,
    #[serde(default)]
    reference: Option<Text<1, 64>>,
    #[serde(default)]
    description: Option<FreeText<0, 512>>,
    #[serde(default)]
    metadata: Metadata,
    #[serde(default)]
    effective_at: Option<Timestamp>,
    #[serde(default)]
    direction: Option<Direction>,
}

async fn pay(Json(payment, _): Json<Payment>) -> Result<axum::Json<Value>, Problem> {
    let now = "2026-01-01T00:00:00Z".parse().unwrap();
    let money = money(&payment.amount, &payment.currency)?;
    Ok(axum::Json(json!({
        "walletId": payment.wallet_id,
        "amount": money.amount(),
        "currency": money.currency(),
        "reference": payment.reference,
        "description": payment.description,
        "metadata": payment.metadata.into_inner(),
        "effectiveAt": effective_at(payment.effective_at, now)?,
        "direction": payment.direction,
    })))
}

async fn pay_keyed(_: RequiredKey, payment: Json<Payment>) -> Result<axum::Json<Value>, Problem> {
    pay(payment).await
}

async fn pay_many(JsonMax(payments, _): JsonMax<Vec<Payment>, 1_048_576>) -> axum::Json<usize> {
    axum::Json(payments.len())
}

async fn wallet(Path(id): Path<WalletId>) -> axum::Json<WalletId> {
    axum::Json(id)
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Wanted {
    limit: Option<Limit>,
    min_position: Option<MinPosition>,
    wait_ms: Option<WaitMs>,
    reference: Option<Text<1, 64>>,
    #[serde(default)]
    closed: bool,
}

/// A view that stands at position 5 of a log whose head is 8.
async fn list(Query(wanted): Query<Wanted>) -> Result<(Position, axum::Json<Value>), Problem> {
    let (_view, mut seen) = watch::channel(5);
    let freshness = Freshness::new(wanted.min_position, wanted.wait_ms);
    freshness.wait(&mut seen, || async { Ok(8) }).await?;
    let limit = wanted.limit.unwrap_or_default().get();
    Ok((Position(5), axum::Json(json!({ "limit": limit, "reference": wanted.reference, "closed": wanted.closed }))))
}

async fn start() -> Server {
    let router = Router::new()
        .route("/payments", post(pay))
        .route("/payments/keyed", post(pay_keyed))
        .route("/payments/batch", post(pay_many))
        .route("/wallets", get(list))
        .route("/wallets/{id}", get(wallet))
        .merge(api_contract::problem_pages());
    Server::start(router).await
}

fn payment() -> Value {
    json!({ "walletId": WALLET, "amount": "10.50", "currency": "EUR" })
}

fn payment_with(name: &str, value: impl Into<Value>) -> String {
    let mut payment = payment();
    payment[name] = value.into();
    payment.to_string()
}

#[tokio::test]
async fn a_good_request_is_read_and_answered() {
    let server = start().await;
    let mut request = payment();
    request["reference"] = json!("order 1");
    request["description"] = json!("two\nlines, \t<script>, '; DROP TABLE events;--, {{7*7}}, =cmd()");
    request["metadata"] = json!({ "note": "two\nlines", "n": 1.5, "deep": { "list": [true, null] } });
    request["effectiveAt"] = json!("2025-12-31T23:59:59.000000Z");
    request["direction"] = json!("CREDIT");
    let answer = server.post(request.to_string()).await;
    assert_eq!((answer.status, answer.json()), (200, request));
    assert!(answer.header("x-request-id").unwrap().starts_with("req_"));
}

#[tokio::test]
async fn what_is_not_json_is_malformed() {
    let server = start().await;
    let deep = |depth: usize| format!(r#"{{"metadata":{}{}}}"#, "[".repeat(depth), "]".repeat(depth));
    let cases: [Vec<u8>; 19] = [
        "".into(),
        "  \n".into(),
        "{".into(),
        r#"{"amount":"#.into(),
        format!("{}x", payment()).into(),
        format!("{}{}", payment(), payment()).into(),
        b"{\"reference\":\"\xff\"}".into(),
        "\u{feff}{}".into(),
        "{}".encode_utf16().flat_map(u16::to_le_bytes).collect(),
        r#"{"reference":"\ud800"}"#.into(),
        r#"{"reference":"\udc00\ud800"}"#.into(),
        r#"{"amount":NaN}"#.into(),
        r#"{"amount":Infinity}"#.into(),
        r#"{"amount":-Infinity}"#.into(),
        r#"{"amount":010}"#.into(),
        "{'amount':'1'}".into(),
        "{\"reference\":\"a\u{1}\"}".into(), // a raw control character is not JSON, before it is anything else
        deep(128).into(),
        "[".repeat(65_000).into(),
    ];
    for case in cases {
        let problem = server.post(&case).await.is_problem(400, "malformed-json");
        assert_eq!(problem["instance"], "/payments");
    }
}

#[tokio::test]
async fn a_key_that_stands_twice_is_refused_at_any_depth() {
    let server = start().await;
    for (body, pointer) in [
        (r#"{"amount":"1.00","amount":"2.00"}"#, "/amount"),
        (r#"{"amount":"1.00","\u0061mount":"1.00"}"#, "/amount"),
        (r#"{"metadata":{"a":[{"b":1,"c":2,"b":1}]}}"#, "/metadata/a/0/b"),
    ] {
        let problem = server.post(body).await.is_problem(400, "duplicate-field");
        assert_eq!(problem["errors"][0]["pointer"], pointer);
    }
}

#[tokio::test]
async fn fields_are_known_required_and_of_their_type_and_problems_point_to_them() {
    let server = start().await;
    let without = |name: &str| {
        let mut payment = payment();
        payment.as_object_mut().unwrap().remove(name);
        payment.to_string()
    };
    for (body, slug, pointer) in [
        (payment_with("amout", "1"), "unknown-field", "/amout"),
        (payment_with("Amount", "1"), "unknown-field", "/Amount"),
        (payment_with("wallet_id", "1"), "unknown-field", "/wallet_id"),
        (without("amount"), "invalid-field", "/amount"),
        (without("walletId"), "invalid-field", "/walletId"),
        ("[]".to_owned(), "invalid-field", ""),
        // What serde takes for the same request, field after field.
        (json!([WALLET, "10.50", "EUR", null, null, {}, null, null]).to_string(), "invalid-field", ""),
        // JSON has no largest number.
        (payment().to_string().replace("\"10.50\"", "1E400"), "invalid-field", "/amount"),
        (payment_with("metadata", json!({"n": "?"})).replace("\"?\"", "-1e400"), "invalid-field", "/metadata/n"),
        ("1e400".to_owned(), "invalid-field", ""),
        ("null".to_owned(), "invalid-field", ""),
        ("\"text\"".to_owned(), "invalid-field", ""),
        (payment_with("amount", Value::Null), "invalid-field", "/amount"),
        (payment_with("amount", json!(["1.00"])), "invalid-field", "/amount"),
        (payment_with("walletId", 1), "invalid-field", "/walletId"),
        (payment_with("walletId", json!({})), "invalid-field", "/walletId"),
        (payment_with("reference", 1), "invalid-field", "/reference"),
        (payment_with("reference", ""), "invalid-field", "/reference"),
        (payment_with("reference", "x".repeat(65)), "invalid-field", "/reference"),
        (payment_with("description", false), "invalid-field", "/description"),
        (payment_with("metadata", json!([])), "invalid-field", "/metadata"),
        (payment_with("metadata", "{}"), "invalid-field", "/metadata"),
        (payment_with("direction", "credit"), "invalid-field", "/direction"),
        (payment_with("direction", 1), "invalid-field", "/direction"),
        (payment_with("effectiveAt", "yesterday"), "time-format", "/effectiveAt"),
        (payment_with("effectiveAt", "2025-12-31"), "time-format", "/effectiveAt"),
        (payment_with("effectiveAt", 1_700_000_000), "invalid-field", "/effectiveAt"),
        (payment_with("effectiveAt", "2026-01-01T00:00:00.000001Z"), "time-range-invalid", "/effectiveAt"),
    ] {
        let problem = server.post(&body).await.is_problem(422, slug);
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{body}");
    }
    let four_bytes_each = server.post(payment_with("reference", "😀".repeat(64))).await;
    assert_eq!(four_bytes_each.status, 200, "lengths are counted in characters");
    let null = server.post(payment_with("reference", Value::Null)).await;
    assert_eq!(null.status, 200, "null is absent where a field may be absent");
}

#[tokio::test]
async fn ids_in_paths_and_bodies_have_one_spelling() {
    let server = start().await;
    for id in [
        "",
        "1",
        "0192f0c1-2d3e-7abc-8def-0123456789ab",
        "wal_00000000-0000-0000-0000-000000000000",
        "wal_{0192f0c1-2d3e-7abc-8def-0123456789ab}",
        "wal_urn:uuid:0192f0c1-2d3e-7abc-8def-0123456789ab",
        "wal_0192F0C1-2D3E-7ABC-8DEF-0123456789AB",
        "txn_0192f0c1-2d3e-7abc-8def-0123456789ab",
        "'; DROP TABLE events;--",
    ] {
        let problem = server.post(payment_with("walletId", id)).await.is_problem(400, "invalid-id");
        assert_eq!(problem["errors"][0]["pointer"], "/walletId");
    }
    for id in [
        "1",
        "wal_%7B0192f0c1-2d3e-7abc-8def-0123456789ab%7D",
        "wal_%00",
        "%ff",
        "..%2F..%2Fetc%2Fpasswd",
        &"a".repeat(1_000),
    ] {
        server.get(&format!("/wallets/{id}")).await.is_problem(400, "invalid-id");
    }
    assert_eq!(server.get(&format!("/wallets/{WALLET}")).await.json(), WALLET);
}

#[tokio::test]
async fn characters_that_cannot_be_seen_or_stored_are_refused_in_every_string() {
    let server = start().await;
    for character in [
        "\\u0000",
        "\\u0001",
        "\\u001b",
        "\\u007f",
        "\\u0085",
        "\\u009f",
        "\\u202a",
        "\\u202e",
        "\\u2066",
        "\\u2069",
        "\\ufdd0",
        "\\uffff",
        "\\ufffe",
        "\\ud83f\\udfff",
        "\\udbff\\udfff",
        "\u{202e}",
        "\u{85}",
    ] {
        for (body, pointer) in [
            (format!(r#"{{"reference":"a{character}b"}}"#), "/reference"),
            (format!(r#"{{"description":"a{character}b"}}"#), "/description"),
            (format!(r#"{{"currency":"{character}"}}"#), "/currency"),
            (format!(r#"{{"walletId":"{character}"}}"#), "/walletId"),
            (format!(r#"{{"metadata":{{"a":["{character}"]}}}}"#), "/metadata/a/0"),
            (format!(r#"{{"metadata":{{"{character}":1}}}}"#), "/metadata"),
        ] {
            let problem = server.post(&body).await.is_problem(422, "invalid-character");
            assert_eq!(problem["errors"][0]["pointer"], pointer, "{body}");
        }
    }
    for breaks in ["\\n", "\\t", "\\r"] {
        for field in ["reference", "walletId", "currency", "amount"] {
            let mut body = payment();
            body[field] = json!("?");
            let body = body.to_string().replace("\"?\"", &format!("\"{breaks}\""));
            let problem = server.post(&body).await.is_problem(422, "invalid-character");
            assert_eq!(problem["errors"][0]["pointer"], format!("/{field}"));
        }
        server.post(format!(r#"{{"metadata":{{"{breaks}":1}}}}"#)).await.is_problem(422, "invalid-character");
    }
    // In a name what cannot be seen makes two of what looks like one; in a text it is how a language is written.
    for unseen in ["\u{200f}", "\u{61c}", "\u{200b}", "\u{2028}", "\u{feff}", "\u{ad}", "\u{e0041}"] {
        let problem =
            server.post(payment_with("reference", format!("a{unseen}b"))).await.is_problem(422, "invalid-character");
        assert_eq!(problem["errors"][0]["pointer"], "/reference", "{unseen:?}");
        assert_eq!(server.post(payment_with("description", format!("a{unseen}b"))).await.status, 200, "{unseen:?}");
    }
    for text in ["Ünï 漢字 🎉 עברית", "می\u{200c}خواهم", "👩\u{200d}👩\u{200d}👧"] {
        assert_eq!(server.post(payment_with("reference", text)).await.status, 200, "{text}");
    }
}

#[tokio::test]
async fn amounts_are_refused_for_their_own_reason_and_never_rounded() {
    let server = start().await;
    let raw = |amount: &str| payment_with("amount", "?").replace("\"?\"", amount);
    for (body, slug) in [
        (payment_with("amount", "-1.00"), "amount-not-positive"),
        (payment_with("amount", "0"), "amount-not-positive"),
        (payment_with("amount", "0.00"), "amount-not-positive"),
        (payment_with("amount", "-0"), "amount-not-positive"),
        (payment_with("amount", "NaN"), "amount-format"),
        (payment_with("amount", "Infinity"), "amount-format"),
        (raw("1e3"), "amount-format"),
        (raw("10.10"), "amount-format"),
        (raw("10"), "amount-format"),
        (raw("-1"), "amount-format"),
        (payment_with("amount", "1e3"), "amount-format"),
        (payment_with("amount", "0x10"), "amount-format"),
        (payment_with("amount", " 10"), "amount-format"),
        (payment_with("amount", "+10"), "amount-format"),
        (payment_with("amount", "1,000.00"), "amount-format"),
        (payment_with("amount", "010"), "amount-format"),
        (payment_with("amount", ".5"), "amount-format"),
        (payment_with("amount", "5."), "amount-format"),
        (payment_with("amount", "１０"), "amount-format"),
        (payment_with("amount", ""), "amount-format"),
        (payment_with("amount", "1234567890123456789"), "amount-out-of-range"),
        (payment_with("amount", "9".repeat(60_000)), "amount-out-of-range"),
        (payment_with("amount", "10.001"), "amount-precision"),
    ] {
        let problem = server.post(&body).await.is_problem(422, slug);
        assert_eq!(problem["errors"][0]["pointer"], "/amount", "{body}");
    }
    for (currency, amount) in [("JPY", "1.5"), ("KWD", "1.2345")] {
        let body = json!({ "walletId": WALLET, "amount": amount, "currency": currency }).to_string();
        server.post(body).await.is_problem(422, "amount-precision");
    }
    for currency in ["ZZZ", "eur", "€", "XXX", "EURO", "EU", ""] {
        let problem = server.post(payment_with("currency", currency)).await.is_problem(422, "currency-unknown");
        assert_eq!(problem["errors"][0]["pointer"], "/currency");
    }
}

#[tokio::test]
async fn metadata_has_its_limits() {
    let server = start().await;
    let nested = |depth: usize| (1..depth).fold(json!({}), |inner, _| json!({ "a": inner }));
    let keys = |count: usize| -> Value {
        (0..count).map(|n| (format!("k{n}"), json!(n))).collect::<serde_json::Map<_, _>>().into()
    };
    for (metadata, fits) in [
        (nested(5), true),
        (nested(6), false),
        (json!({ "a": [[[[]]]] }), true),
        (json!({ "a": [[[[[]]]]] }), false),
        (keys(50), true),
        (keys(51), false),
        (keys(4_000), false),
        (json!({ "a": keys(30), "b": keys(30) }), false),
        (json!({ "a": vec![0; 60] }), false),
        (json!({ "k".repeat(64): 1 }), true),
        (json!({ "k".repeat(65): 1 }), false),
        (json!({ "é".repeat(33): 1 }), false),
        (json!({ "a": "v".repeat(512) }), true),
        (json!({ "a": "v".repeat(513) }), false),
        (json!({ "a": ["é".repeat(257)] }), false),
    ] {
        let answer = server.post(payment_with("metadata", metadata.clone())).await;
        if fits {
            assert_eq!(answer.json()["metadata"], metadata);
        } else {
            let problem = answer.is_problem(422, "metadata-too-large");
            assert_eq!(problem["errors"][0]["pointer"], "/metadata");
        }
    }
}

#[tokio::test]
async fn a_number_in_metadata_is_kept_exactly_or_refused() {
    let server = start().await;
    let payment = |number: &str| {
        let body = payment_with("metadata", json!({ "n": "here" })).to_string();
        body.replace("\"here\"", number)
    };
    for number in ["0", "-7", "18446744073709551615", "-9223372036854775808", "0.25", "1e3", "9007199254740991.0"] {
        let kept = server.post(payment(number)).await.json()["metadata"]["n"].clone();
        assert_eq!(kept, serde_json::from_str::<Value>(number).unwrap());
    }
    for number in ["18446744073709551616", "-9223372036854775809", "12345678901234567890123", "1e16", "1e300"] {
        let problem = server.post(payment(number)).await.is_problem(422, "invalid-field");
        assert_eq!(problem["errors"][0]["pointer"], "/metadata", "{number}");
    }
}

#[tokio::test]
async fn a_body_that_is_too_large_is_refused_before_it_is_read() {
    let server = start().await;
    let head = |path: &str, length: &str| {
        format!(
            "POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
        )
    };
    // Nothing follows these heads: whoever waited for the body would wait in vain. None asks for a close, either.
    for (path, length) in [
        ("/payments", "65537"),
        ("/payments", "1048577"),
        ("/payments", "1000000000000"),
        ("/payments/batch", "1048577"),
    ] {
        let answer = server.exchange(head(path, length)).await;
        answer.is_problem(413, "payload-too-large");
        assert_eq!(answer.header("connection"), Some("close"));
    }

    let chunk = format!("{:x}\r\n{}\r\n", 40_000, " ".repeat(40_000));
    let chunked =
        "POST /payments HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    server.exchange(format!("{chunked}{chunk}{chunk}0\r\n\r\n")).await.is_problem(413, "payload-too-large");

    let mut exact = payment().to_string();
    exact.push_str(&" ".repeat(65_536 - exact.len()));
    assert_eq!(server.post(&exact).await.status, 200);
    let many = format!("[{}]", vec![payment().to_string(); 1_000].join(","));
    let json = "content-type: application/json\r\n";
    assert_eq!(server.post_to("/payments/batch", json, &many).await.json(), 1_000);
    let broken = many.replacen("10.50", "", 700).replacen("\"\"", "7", 700);
    let problem = server.post_to("/payments/batch", json, &broken).await.is_problem(422, "amount-format");
    assert_eq!(problem["errors"][0]["pointer"], "/0/amount");
}

#[tokio::test]
async fn a_body_is_json_by_its_content_type_or_is_not_read() {
    let server = start().await;
    for headers in [
        "",
        "content-type: text/plain\r\n",
        "content-type: application/json; charset=utf-16\r\n",
        "content-type: application/json; charset=latin1\r\n",
        "content-type: application/json; boundary=x\r\n",
        "content-type: multipart/form-data; boundary=x\r\n",
        "content-type: application/x-www-form-urlencoded\r\n",
        "content-type: application/problem+json\r\n",
        "content-type: application/jsonx\r\n",
        "content-type: application/json\r\ncontent-type: application/json\r\n",
    ] {
        server.post_to("/payments", headers, payment().to_string()).await.is_problem(415, "unsupported-media-type");
    }
    for headers in [
        "content-type: application/json\r\n",
        "content-type: Application/JSON;charset=UTF-8\r\n",
        "content-type: application/json; charset=\"utf-8\"\r\n",
    ] {
        assert_eq!(server.post_to("/payments", headers, payment().to_string()).await.status, 200, "{headers}");
    }
}

#[tokio::test]
async fn an_idempotency_key_is_one_header_of_visible_ascii() {
    let server = start().await;
    let with = |headers: &str| format!("content-type: application/json\r\n{headers}");
    let post = |headers: String| {
        let server = &server;
        async move { server.post_to("/payments/keyed", &headers, payment().to_string()).await }
    };
    post(with("")).await.is_problem(400, "idempotency-key-missing");
    for headers in [
        "idempotency-key:\r\n".to_owned(),
        "idempotency-key: \r\n".to_owned(),
        format!("idempotency-key: {}\r\n", "k".repeat(256)),
        "idempotency-key: schlüssel\r\n".to_owned(),
        "idempotency-key: two words\r\n".to_owned(),
        "idempotency-key: a\tb\r\n".to_owned(),
        "idempotency-key: a\r\nidempotency-key: b\r\n".to_owned(),
        "idempotency-key: a\r\nidempotency-key: a\r\n".to_owned(),
    ] {
        post(with(&headers)).await.is_problem(400, "idempotency-key-invalid");
    }
    for key in ["k".to_owned(), "k".repeat(255), "!~\"'{}".to_owned()] {
        assert_eq!(post(with(&format!("idempotency-key: {key}\r\n"))).await.status, 200, "{key}");
    }
}

#[tokio::test]
async fn query_parameters_are_known_single_and_in_range() {
    let server = start().await;
    for (query, slug, pointer) in [
        ("limit=0", "limit-out-of-range", "/limit"),
        ("limit=-1", "limit-out-of-range", "/limit"),
        ("limit=101", "limit-out-of-range", "/limit"),
        ("limit=1000000000", "limit-out-of-range", "/limit"),
        ("limit=99999999999999999999999999", "limit-out-of-range", "/limit"),
        ("limit=abc", "limit-out-of-range", "/limit"),
        ("limit=1.5", "limit-out-of-range", "/limit"),
        ("limit=%2B5", "limit-out-of-range", "/limit"),
        ("limit=", "limit-out-of-range", "/limit"),
        ("limit", "limit-out-of-range", "/limit"),
        ("limit=5&limit=5", "invalid-field", "/limit"),
        ("minPosition=-1", "position-unknown", "/minPosition"),
        ("minPosition=x", "position-unknown", "/minPosition"),
        ("minPosition=9223372036854775808", "position-unknown", "/minPosition"),
        ("minPosition=9", "position-unknown", "/minPosition"), // beyond the head
        ("waitMs=-1", "invalid-field", "/waitMs"),
        ("waitMs=30001", "invalid-field", "/waitMs"),
        ("waitMs=soon", "invalid-field", "/waitMs"),
        ("closed=maybe", "invalid-field", "/closed"),
        ("Limit=5", "unknown-field", "/Limit"),
        ("offset=5", "unknown-field", "/offset"),
        ("reference=a%00b", "invalid-character", "/reference"),
        ("reference=a%0Ab", "invalid-character", "/reference"),
        ("reference=", "invalid-field", "/reference"),
    ] {
        let problem = server.get(&format!("/wallets?{query}")).await.is_problem(422, slug);
        assert_eq!(problem["errors"][0]["pointer"], pointer, "{query}");
    }
    for query in ["reference=%ff", "reference=%", "reference=%4", "reference=%zz", "%ff=1"] {
        server.get(&format!("/wallets?{query}")).await.is_problem(422, "invalid-field");
    }
    let answer = server.get("/wallets?limit=100&reference=a%20b%2Bc+%C3%A9&closed=true&minPosition=5&&").await;
    assert_eq!(answer.json(), json!({ "limit": 100, "reference": "a b+c é", "closed": true }));
    assert_eq!(answer.header("ledger-position"), Some("5"));
    assert_eq!(server.get("/wallets").await.json()["limit"], 20);
}

#[tokio::test]
async fn a_view_that_stays_behind_says_so_and_when_to_ask_again() {
    let server = start().await;
    let answer = server.get("/wallets?minPosition=8&waitMs=20").await;
    answer.is_problem(503, "projection-behind");
    assert_eq!(answer.header("retry-after"), Some("1"));
}

#[tokio::test]
async fn a_view_that_comes_far_enough_in_time_ends_the_wait() {
    let (view, mut seen) = watch::channel(5);
    let freshness = Freshness { min_position: Some(8), wait_ms: 10_000 };
    let waiting = tokio::spawn(async move { freshness.wait(&mut seen, || async { Ok(8) }).await });
    for position in 6..=8 {
        assert!(!waiting.is_finished());
        view.send(position).unwrap();
    }
    timeout(PATIENCE, waiting).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn unknown_paths_and_methods_and_unacceptable_answers_are_problems() {
    let server = start().await;
    let problem = server.get("/nowhere?q=1").await.is_problem(404, "not-found");
    assert_eq!(problem["instance"], "/nowhere");
    let long = "a".repeat(2_000);
    let problem = server.get(&format!("/{long}")).await.is_problem(404, "not-found");
    assert!(!problem.to_string().contains(&"a".repeat(65)));

    let answer = server.exchange("DELETE /payments HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").await;
    answer.is_problem(405, "method-not-allowed");
    assert_eq!(answer.header("allow"), Some("post"));

    let accept = |range: &str| format!("accept: {range}\r\ncontent-type: application/json\r\n");
    for range in ["text/html", "image/*", "application/json;q=0, text/plain", "*/*;q=0", "application/xml"] {
        server.post_to("/payments", &accept(range), payment().to_string()).await.is_problem(406, "not-acceptable");
        let head = format!("GET /wallets HTTP/1.1\r\nhost: test\r\nconnection: close\r\naccept: {range}\r\n\r\n");
        server.exchange(head).await.is_problem(406, "not-acceptable");
    }
    for range in [
        "application/json",
        "*/*",
        "application/*;q=0.1",
        "text/html, application/json;q=0.5",
        "*/*;q=0.1, text/html;q=0",
    ] {
        assert_eq!(server.post_to("/payments", &accept(range), payment().to_string()).await.status, 200, "{range}");
    }
}

#[tokio::test]
async fn every_problem_type_has_a_page_for_people() {
    let server = start().await;
    let answer = server.get("/problems/insufficient-funds").await;
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("text/html; charset=utf-8")));
    assert!(answer.header("content-security-policy").unwrap().starts_with("default-src 'none'; style-src 'sha256-"));
    assert!(answer.body.contains("<html lang=\"en\">") && answer.body.contains("<h1>Insufficient funds</h1>"));
    for slug in ["nothing", "%3Cscript%3E", "..%2F"] {
        let answer = server.get(&format!("/problems/{slug}")).await;
        answer.is_problem(404, "not-found");
        assert!(!answer.body.contains("<script>"));
    }
}

#[tokio::test]
async fn a_clients_request_id_is_kept_in_the_answer_and_in_its_problem() {
    let server = start().await;
    let answer = server.post_to("/payments", "x-request-id: mine-1\r\n", "").await;
    assert_eq!(answer.is_problem(415, "unsupported-media-type")["requestId"], "mine-1");
    assert_eq!(answer.header("x-request-id"), Some("mine-1"));
}
