//! Where webhooks must not go, and what is no subscription.

use serde_json::{Value, json};

use crate::system::System;
use crate::table::{Case, case, refused};
use crate::wire::Request;

/// Case 63 and its kin: every one of them would make this server speak to what is not the partner's.
const FORBIDDEN: &[&str] = &[
    "http://example.com/",
    "file:///etc/passwd",
    "gopher://example.com/",
    "ftp://example.com/",
    "javascript:alert(1)",
    "data:,a",
    "ws://example.com/",
    "https://user@example.com/",
    "https://user:secret@example.com/",
    "https://@example.com/",
    "https://example.com:22/",
    "https://example.com:5432/",
    "https://example.com:25/",
    "https://example.com:80/",
    "https://example.com:0/",
    "https://example.com:65536/",
    "https://127.0.0.1/",
    "https://127.1/",
    "https://0/",
    "https://0.0.0.0/",
    "https://169.254.169.254/latest/meta-data/",
    "https://10.0.0.5/",
    "https://172.16.0.1/",
    "https://192.168.1.1/",
    "https://100.64.0.1/",
    "https://198.18.0.1/",
    "https://224.0.0.1/",
    "https://255.255.255.255/",
    "https://[::1]/",
    "https://[::]/",
    "https://[::ffff:7f00:1]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[64:ff9b::7f00:1]/",
    "https://[2002:7f00:1::1]/",
    "https://[::7f00:1]/",
    "https://[fe80::1]/",
    "https://[fc00::1]/",
    "https://[ff02::1]/",
    "https://[fe80::1%25eth0]/",
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0x7f.1/",
    "https://0177.1/",
    "https://0177.0.0.1/",
    "https://localhost/",
    "https://localhost./",
    "https://LOCALHOST/",
    "https://a.localhost/",
    "https://metadata.google.internal/",
    "https://printer.local/",
    "https://intranet/",
    "https://１２７.０.０.１/",
    "https://127。0。0。1/",
    "https://ⓛocalhost/",
    "https://example.com\\@127.0.0.1/",
    "https:127.0.0.1",
    "https:///127.0.0.1",
    "https://",
    "//example.com/",
    "example.com",
    "",
    "https://exa mple.com/",
    "https://example.com/ a",
    " https://example.com/",
    "https://[::1",
    "https://%31%32%37.0.0.1/",
    "https://.example.com/",
    "https://1.0.0.127.in-addr.arpa/",
];

pub(crate) fn table(system: &System) -> Vec<Case> {
    let register = |body: &Value| Request::post("/v1/webhooks").bearer(&system.partner).json(body);
    let forbidden = || refused(422, "webhook-url-forbidden");
    let mut cases: Vec<Case> = FORBIDDEN
        .iter()
        .map(|url| case(format!("63 {url:?}"), register(&json!({"url": url, "events": ["*"]})), forbidden()))
        .collect();
    let long = format!("https://example.com/{}", "a".repeat(2_048));
    let invalid = |pointer: &str| refused(422, "invalid-field").at(pointer);
    let events = |events: Value| register(&json!({"url": "https://example.com/", "events": events}));
    let many: Vec<&str> = vec!["wallet.opened"; 1_000];
    cases.extend([
        case("63 a URL of more than 2 KB", register(&json!({"url": long, "events": ["*"]})), forbidden()),
        case(
            "63 a URL with a line break",
            register(&json!({"url": "https://example.com/\r\nX: y", "events": ["*"]})),
            refused(422, "invalid-character").at("/url"),
        ),
        case(
            "63 a URL with a NUL",
            register(&json!({"url": "https://example.com/\u{0}", "events": ["*"]})),
            refused(422, "invalid-character").at("/url"),
        ),
        case("63 a URL that is a number", register(&json!({"url": 1, "events": ["*"]})), invalid("/url")),
        case("no URL", register(&json!({"events": ["*"]})), invalid("/url")),
        case("no events", register(&json!({"url": "https://example.com/"})), invalid("/events")),
        case("an empty list of events", events(json!([])), invalid("/events")),
        case("an event that there is not", events(json!(["wallet.exploded"])), invalid("/events/0")),
        case("an event twice", events(json!(["wallet.opened", "wallet.opened"])), invalid("/events/1")),
        case("a thousand events", events(json!(many)), invalid("/events/1")),
        case("events as a text", events(json!("*")), invalid("/events")),
        case(
            "a secret of one's own",
            register(&json!({"url": "https://example.com/", "events": ["*"], "secret": "whsec_AAAA"})),
            refused(422, "unknown-field").at("/secret"),
        ),
        case(
            "a webhook of the operator's",
            Request::post("/v1/webhooks")
                .bearer(&system.admin)
                .json(&json!({"url": "https://example.com/", "events": ["*"]})),
            refused(403, "insufficient-scope"),
        ),
        case(
            "a status of deliveries that there is not",
            system.get("/v1/webhooks/whk_0192f0c1-2d3e-7abc-8def-0123456789ab/deliveries?status=LOST"),
            invalid("/status"),
        ),
        case(
            "a status of webhooks that there is not",
            Request::new("PATCH", "/v1/webhooks/whk_0192f0c1-2d3e-7abc-8def-0123456789ab")
                .bearer(&system.partner)
                .json(&json!({"status": "PAUSED"})),
            invalid("/status"),
        ),
        case(
            "a change of nothing known",
            Request::new("PATCH", "/v1/webhooks/whk_0192f0c1-2d3e-7abc-8def-0123456789ab")
                .bearer(&system.partner)
                .json(&json!({"partnerId": "par_1"})),
            refused(422, "unknown-field").at("/partnerId"),
        ),
        case(
            "a change to a private address",
            Request::new("PATCH", "/v1/webhooks/whk_0192f0c1-2d3e-7abc-8def-0123456789ab")
                .bearer(&system.partner)
                .json(&json!({"url": "https://10.0.0.1/"})),
            forbidden(),
        ),
    ]);
    cases
}
