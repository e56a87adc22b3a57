//! Registering endpoints: who may, which URLs, and what others see of it.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::receiver::{Receiver, Reply};
use crate::system::{Partner, System, text};

async fn refused(partner: &Partner, method: Method, path: &str, body: Value) -> (u16, String) {
    let body = (!body.is_null()).then_some(body);
    let answer = partner.call(method, path, body).await;
    let slug = text(&answer.body["type"]).strip_prefix("/problems/").expect("a problem's type").to_owned();
    (answer.status.as_u16(), slug)
}

#[tokio::test]
async fn an_endpoint_is_registered_read_changed_and_deleted_and_its_secret_is_shown_once() {
    let system = System::start_without_dispatching("1s").await;
    let partner = system.partner().await;
    let new =
        json!({ "url": "https://hooks.example.com/daybook", "events": ["transaction.completed", "wallet.frozen"] });
    let registered = partner.call(Method::POST, "/v1/webhooks", Some(new)).await;
    assert_eq!(registered.status, StatusCode::CREATED);
    assert_eq!(registered.headers["cache-control"], "no-store");
    assert_ne!(
        registered.headers["ledger-position"], "0",
        "it begins at the head, which the partner's registration moved"
    );
    let path = registered.headers["location"].to_str().unwrap().to_owned();
    let mut body = registered.body;
    let secret = body.as_object_mut().unwrap().remove("secret").unwrap();
    assert!(text(&secret).starts_with("whsec_"), "{secret}");
    assert_eq!(body["url"], "https://hooks.example.com/daybook");
    assert_eq!(body["events"], json!(["transaction.completed", "wallet.frozen"]));
    assert_eq!(body["status"], "ACTIVE");

    assert_eq!(partner.get(&path).await, body);
    assert_eq!(partner.get("/v1/webhooks").await["data"], json!([body]));

    let change = json!({ "url": "https://other.example.com/", "events": ["*"], "status": "DISABLED" });
    let changed = partner.call(Method::PATCH, &path, Some(change)).await;
    assert_eq!(changed.status, StatusCode::OK, "{}", changed.body);
    assert_eq!(changed.body["status"], "DISABLED");
    assert_eq!(changed.body["disabledReason"], "requested");
    assert_eq!(changed.body["url"], "https://other.example.com/");
    assert_eq!(changed.body["events"], json!(["*"]));
    let enabled = partner.call(Method::PATCH, &path, Some(json!({ "status": "ACTIVE" }))).await;
    assert_eq!(enabled.body["status"], "ACTIVE");
    assert_eq!(enabled.body["url"], "https://other.example.com/", "what is absent stays");

    let deleted = partner.call(Method::DELETE, &path, None).await;
    assert_eq!((deleted.status, deleted.body), (StatusCode::NO_CONTENT, Value::Null));
    assert_eq!(refused(&partner, Method::GET, &path, Value::Null).await, (404, "webhook-not-found".to_owned()));
    assert_eq!(refused(&partner, Method::DELETE, &path, Value::Null).await, (404, "webhook-not-found".to_owned()));
    assert_eq!(partner.get("/v1/webhooks").await["data"], json!([]));
}

#[tokio::test]
async fn whatever_leads_inside_is_refused_at_registration_and_at_change() {
    let system = System::start_without_dispatching("1s").await;
    let partner = system.partner().await;
    let partner = partner.at(system.serve(system.another_dispatcher(false)).await);
    let long = format!("https://example.com/{}", "a".repeat(2048));
    let webhook = partner.register_url("https://example.com/hook").await;
    let path = format!("/v1/webhooks/{}", text(&webhook["id"]));
    for url in [
        "http://example.com/",
        "file:///etc/passwd",
        "gopher://example.com/",
        "https://user:secret@example.com/",
        "https://example.com:22/",
        "https://example.com:5432/",
        &long,
        "https://127.0.0.1/",
        "https://0.0.0.0/",
        "https://169.254.169.254/",
        "https://10.0.0.5/",
        "https://100.64.0.1/",
        "https://[::1]/",
        "https://[::ffff:7f00:1]/",
        "https://[64:ff9b::7f00:1]/",
        "https://[2002:7f00:1::1]/",
        "https://[::7f00:1]/",
        "https://2130706433/",
        "https://0177.1/",
        "https://0x7f.1/",
        "https://localhost./",
        "https://a.localhost/",
        "http://[::ffff:127.0.0.1]/",
        "",
    ] {
        let expected = (422, "webhook-url-forbidden".to_owned());
        let new = json!({ "url": url, "events": ["*"] });
        assert_eq!(refused(&partner, Method::POST, "/v1/webhooks", new).await, expected, "{url}");
        assert_eq!(refused(&partner, Method::PATCH, &path, json!({ "url": url })).await, expected, "{url}");
    }
}

#[tokio::test]
async fn malformed_registrations_are_refused_with_their_reason() {
    let system = System::start_without_dispatching("1s").await;
    let partner = system.partner().await;
    let url = "https://example.com/";
    for (body, status, slug) in [
        (json!({ "url": url, "events": [] }), 422, "invalid-field"),
        (json!({ "url": url, "events": ["transaction.imagined"] }), 422, "invalid-field"),
        (json!({ "url": url, "events": ["*", "*"] }), 422, "invalid-field"),
        (json!({ "url": url, "events": "*" }), 422, "invalid-field"),
        (json!({ "url": url }), 422, "invalid-field"),
        (json!({ "url": 7, "events": ["*"] }), 422, "invalid-field"),
        (json!({ "url": url, "events": ["*"], "secret": "mine" }), 422, "unknown-field"),
        (json!({ "url": "https://example.com/\u{0}", "events": ["*"] }), 422, "invalid-character"),
    ] {
        let new = body.clone();
        assert_eq!(refused(&partner, Method::POST, "/v1/webhooks", new).await, (status, slug.to_owned()), "{body}");
    }
    let webhook = partner.register_url(url).await;
    let path = format!("/v1/webhooks/{}", text(&webhook["id"]));
    for body in [json!({ "status": "PAUSED" }), json!({ "events": [] })] {
        let refusal = refused(&partner, Method::PATCH, &path, body.clone()).await;
        assert_eq!(refusal, (422, "invalid-field".to_owned()), "{body}");
    }
    for (path, status, slug) in [
        ("/v1/webhooks/wal_0192f0c1-2d3e-7abc-8def-0123456789ab", 400, "invalid-id"),
        ("/v1/deliveries/1", 400, "invalid-id"),
        ("/v1/webhooks?limit=0", 422, "limit-out-of-range"),
        ("/v1/webhooks?cursor=AAAA", 400, "cursor-invalid"),
        ("/v1/webhooks?colour=red", 422, "unknown-field"),
        ("/v1/webhooks?minPosition=999999", 422, "position-unknown"),
        ("/v1/deliveries/dlv_0192f0c1-2d3e-7abc-8def-0123456789ab", 404, "delivery-not-found"),
    ] {
        assert_eq!(refused(&partner, Method::GET, path, Value::Null).await, (status, slug.to_owned()), "{path}");
    }
}

#[tokio::test]
async fn another_partners_endpoints_and_deliveries_are_as_absent_and_an_admin_sees_all() {
    let system = System::start("1s").await;
    let (owner, other, admin) = (system.partner().await, system.partner().await, system.admin().await);
    let receiver = Receiver::start(|_| Reply::Status(200)).await;
    let webhook = owner.register(&receiver).await;
    let others = other.register(&receiver).await;
    system.wallet(&owner).await;
    let delivery = owner.only_delivery(&webhook, "DELIVERED").await;
    let path = format!("/v1/webhooks/{}", text(&webhook["id"]));
    let delivery_path = format!("/v1/deliveries/{}", text(&delivery["id"]));

    let no_webhook = (404, "webhook-not-found".to_owned());
    let no_delivery = (404, "delivery-not-found".to_owned());
    assert_eq!(refused(&other, Method::GET, &path, Value::Null).await, no_webhook);
    assert_eq!(refused(&other, Method::PATCH, &path, json!({ "status": "DISABLED" })).await, no_webhook);
    assert_eq!(refused(&other, Method::DELETE, &path, Value::Null).await, no_webhook);
    assert_eq!(refused(&other, Method::GET, &format!("{path}/deliveries"), Value::Null).await, no_webhook);
    assert_eq!(refused(&other, Method::GET, &delivery_path, Value::Null).await, no_delivery);
    assert_eq!(refused(&other, Method::POST, &format!("{delivery_path}/redeliver"), Value::Null).await, no_delivery);
    assert!(other.deliveries(&others).await.is_empty(), "the wallet is not theirs");

    let all = admin.get("/v1/webhooks").await;
    let ids: Vec<_> = all["data"].as_array().unwrap().iter().map(|webhook| webhook["id"].clone()).collect();
    assert_eq!(ids, [webhook["id"].clone(), others["id"].clone()]);
    assert_eq!(admin.get(&delivery_path).await["id"], delivery["id"]);
    let new = json!({ "url": receiver.url(), "events": ["*"] });
    assert_eq!(refused(&admin, Method::POST, "/v1/webhooks", new).await, (403, "insufficient-scope".to_owned()));
}

#[tokio::test]
async fn lists_go_on_where_their_cursor_says_and_fifty_endpoints_are_the_most() {
    let system = System::start_without_dispatching("1s").await;
    let (partner, other) = (system.partner().await, system.partner().await);
    let mut registered = Vec::new();
    for number in 0..50 {
        registered.push(partner.register_url(&format!("https://example.com/{number}")).await["id"].clone());
    }
    let new = json!({ "url": "https://example.com/50", "events": ["*"] });
    assert_eq!(refused(&partner, Method::POST, "/v1/webhooks", new).await, (422, "too-many-items".to_owned()));

    let mut listed = Vec::new();
    let mut path = "/v1/webhooks?limit=20".to_owned();
    loop {
        let page = partner.get(&path).await;
        listed.extend(page["data"].as_array().unwrap().iter().map(|webhook| webhook["id"].clone()));
        assert_eq!(page["hasMore"], !page["nextCursor"].is_null());
        if page["nextCursor"].is_null() {
            break;
        }
        path = format!("/v1/webhooks?limit=20&cursor={}", text(&page["nextCursor"]));
        assert_eq!(refused(&other, Method::GET, &path, Value::Null).await, (400, "cursor-invalid".to_owned()));
    }
    assert_eq!(listed, registered);
}

#[tokio::test]
async fn every_described_route_is_served_and_for_those_with_a_token_alone() {
    let system = System::start_without_dispatching("1s").await;
    let stranger = system.partner().await.without_token();
    let document = serde_json::to_value(webhook_dispatcher::openapi()).unwrap();
    let mut routes = 0;
    for (path, operations) in document["paths"].as_object().unwrap() {
        let path = path.replace("{id}", "whk_0192f0c1-2d3e-7abc-8def-0123456789ab");
        for method in operations.as_object().unwrap().keys() {
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            let refusal = refused(&stranger, method.clone(), &path, Value::Null).await;
            assert_eq!(refusal, (401, "unauthenticated".to_owned()), "{method} {path}");
            routes += 1;
        }
    }
    assert_eq!(routes, 8);
}

#[tokio::test]
async fn a_secret_that_was_moved_to_another_endpoints_row_signs_nothing() {
    let mut system = System::start_without_dispatching("1s").await;
    let partner = system.partner().await;
    let (first, second) =
        (Receiver::start(|_| Reply::Status(200)).await, Receiver::start(|_| Reply::Status(200)).await);
    let (one, other) = (partner.register(&first).await, partner.register(&second).await);
    let id = |webhook: &Value| text(&webhook["id"]).trim_start_matches("whk_").to_owned();
    let (moved, kept) = (id(&one), id(&other));
    let secret_of = |id: &str| format!("(select sealed_secret from webhooks.endpoints where id = '{id}')");
    system
        .sql(&format!("update webhooks.endpoints set sealed_secret = {} where id = '{moved}'", secret_of(&kept)))
        .await;
    system.dispatch();
    system.wallet(&partner).await;
    let delivered = partner.only_delivery(&other, "DELIVERED").await;
    assert_eq!(delivered["attempts"][0]["outcome"], "delivered");
    let unsent = partner.only_delivery(&one, "DEAD").await;
    assert_eq!(unsent["attempts"][0]["outcome"], "not-signed");
    assert_eq!(first.seen().len(), 0, "nothing is sent that another endpoint's secret has signed");
}
