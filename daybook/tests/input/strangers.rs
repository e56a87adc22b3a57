//! Another partner's things are answered exactly as absent ones: on every route, in every place where an id can stand.
//!
//! The routes are read from the served OpenAPI document, so a route that nobody thought of here fails the test: each
//! operation with an id in its path, its query or its body must have a row, and each place of an id in it as well.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::system::{System, fresh_key};
use crate::wire::Request;

/// How an operation is asked about a thing.
struct Row {
    method: &'static str,
    path: &'static str,
    /// Where the id stands: `path`, or the name of a field or of a parameter.
    place: &'static str,
    /// What stands there.
    kind: Kind,
    asked: Asked,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Wallet,
    Transaction,
    /// Begun and not ended.
    Pending,
    Webhook,
    Delivery,
    Partner,
}

#[derive(Clone, Copy)]
enum Asked {
    /// By a partner's client, with this body (`{mine}`: a wallet of its own).
    With(&'static str),
    /// By a partner's client, which must not be there at all: refused before any id is looked at.
    Forbidden(&'static str),
    /// In the only item of a batch that is made as a whole or not at all.
    Within(&'static str),
    /// A filter of a list: nothing is found.
    Filter,
}

use Asked::{Filter, Forbidden, With, Within};

const TRANSFER: &str = r#"{"fromWalletId":"{mine}","toWalletId":"{mine2}","amount":"0.01","currency":"EUR"}"#;
const ATOMIC: &str = r#"{"atomic":true,"transactions":[{"fromWalletId":"{mine}","toWalletId":"{mine2}","amount":"0.01","currency":"EUR"}]}"#;
const TOP_UP: &str = r#"{"walletId":"{mine}","amount":"0.01","currency":"EUR"}"#;
const REASON: &str = r#"{"reason":"r"}"#;
const SETTLEMENT: &str = r#"{"amount":"0.01","currency":"EUR","bankReference":"b"}"#;
const ADJUSTMENT: &str = r#"{"walletId":"{mine}","direction":"CREDIT","amount":"0.01","currency":"EUR","reason":"r"}"#;

#[rustfmt::skip]
const ROWS: &[Row] = &[
    // First, for what is declined below is the stranger's own transaction, and names what it asked for.
    Row { method: "get", path: "/v1/transactions", place: "walletId", kind: Kind::Wallet, asked: Filter },
    Row { method: "get", path: "/v1/wallets/{id}", place: "path", kind: Kind::Wallet, asked: With("") },
    Row { method: "get", path: "/v1/wallets/{id}/balance", place: "path", kind: Kind::Wallet, asked: With("") },
    Row { method: "get", path: "/v1/wallets/{id}/entries", place: "path", kind: Kind::Wallet, asked: With("") },
    Row { method: "post", path: "/v1/wallets/{id}/freeze", place: "path", kind: Kind::Wallet, asked: With(REASON) },
    Row { method: "post", path: "/v1/wallets/{id}/unfreeze", place: "path", kind: Kind::Wallet, asked: With(REASON) },
    Row { method: "post", path: "/v1/wallets/{id}/close", place: "path", kind: Kind::Wallet, asked: With(REASON) },
    Row { method: "post", path: "/v1/transactions/transfer", place: "fromWalletId", kind: Kind::Wallet, asked: With(TRANSFER) },
    Row { method: "post", path: "/v1/transactions/transfer", place: "toWalletId", kind: Kind::Wallet, asked: With(TRANSFER) },
    Row { method: "post", path: "/v1/transactions/batch", place: "fromWalletId", kind: Kind::Wallet, asked: Within(ATOMIC) },
    Row { method: "post", path: "/v1/transactions/batch", place: "toWalletId", kind: Kind::Wallet, asked: Within(ATOMIC) },
    Row { method: "post", path: "/v1/transactions/top-up", place: "walletId", kind: Kind::Wallet, asked: With(TOP_UP) },
    Row { method: "post", path: "/v1/transactions/adjustment", place: "walletId", kind: Kind::Wallet, asked: Forbidden(ADJUSTMENT) },
    Row { method: "get", path: "/v1/transactions/{id}", place: "path", kind: Kind::Transaction, asked: With("") },
    Row { method: "post", path: "/v1/transactions/{id}/settle", place: "path", kind: Kind::Pending, asked: Forbidden(SETTLEMENT) },
    Row { method: "post", path: "/v1/transactions/{id}/fail", place: "path", kind: Kind::Pending, asked: Forbidden(r#"{"code":"c","detail":"d"}"#) },
    Row { method: "post", path: "/v1/transactions/{id}/expire", place: "path", kind: Kind::Pending, asked: Forbidden("{}") },
    Row { method: "get", path: "/v1/webhooks/{id}", place: "path", kind: Kind::Webhook, asked: With("") },
    Row { method: "patch", path: "/v1/webhooks/{id}", place: "path", kind: Kind::Webhook, asked: With(r#"{"status":"DISABLED"}"#) },
    Row { method: "delete", path: "/v1/webhooks/{id}", place: "path", kind: Kind::Webhook, asked: With("") },
    Row { method: "get", path: "/v1/webhooks/{id}/deliveries", place: "path", kind: Kind::Webhook, asked: With("") },
    Row { method: "get", path: "/v1/deliveries/{id}", place: "path", kind: Kind::Delivery, asked: With("") },
    Row { method: "post", path: "/v1/deliveries/{id}/redeliver", place: "path", kind: Kind::Delivery, asked: With("{}") },
    Row { method: "get", path: "/v1/partners/{id}", place: "path", kind: Kind::Partner, asked: Forbidden("") },
    Row { method: "post", path: "/v1/partners/{id}/rotate-secret", place: "path", kind: Kind::Partner, asked: Forbidden("{}") },
    Row { method: "post", path: "/v1/partners/{id}/suspend", place: "path", kind: Kind::Partner, asked: Forbidden("{}") },
    Row { method: "post", path: "/v1/partners/{id}/resume", place: "path", kind: Kind::Partner, asked: Forbidden("{}") },
    Row { method: "get", path: "/v1/events", place: "aggregate", kind: Kind::Transaction, asked: Forbidden("") },
];

/// Places that look like an id's and are none of ours.
const NO_IDS: [(&str, &str); 2] = [
    ("/v1/auth/token", "clientId"), // a login; an unknown client is refused like a wrong secret
    ("/v1/wallets", "userId"),      // the partner's own name for its own user
];

/// The filter by a user's name is the partner's own, too.
const NAMES: [&str; 1] = ["userId"];

#[tokio::test]
async fn another_partners_things_are_answered_exactly_as_absent_ones_on_every_route() {
    let mut system = System::start(&["--allow-local-webhooks"]).await;
    let document = system.done(Request::get("/openapi.json"), 200).await;
    let described: BTreeSet<(String, String, String)> = places(&document);
    let listed: BTreeSet<(String, String, String)> =
        ROWS.iter().map(|row| (row.method.to_owned(), row.path.to_owned(), row.place.to_owned())).collect();
    let forgotten: Vec<_> = described.difference(&listed).collect();
    assert!(forgotten.is_empty(), "routes with an id that no row of this file asks about: {forgotten:?}");
    let gone: Vec<_> = listed.difference(&described).collect();
    assert!(gone.is_empty(), "rows of this file that no route has: {gone:?}");

    let (stranger, own) = second_partner(&system).await;
    let theirs = things(&system).await;
    let (_, moved) = system.log_position().await;
    let mut wrong = Vec::new();
    for row in ROWS {
        let id = &theirs[&row.kind];
        let absent = absent(id);
        let of_theirs = system.ask(&request(row, id, &own, &stranger)).await;
        let of_nothing = system.ask(&request(row, &absent, &own, &stranger)).await;
        let named = format!("{} {} with {:?} in {}", row.method, row.path, row.kind, row.place);
        let expected = match row.asked {
            With(_) => 404,
            Forbidden(_) => 403,
            Within(_) => 422,
            Filter => 200,
        };
        if of_theirs.status != expected {
            wrong.push(format!("{named}: {} {}", of_theirs.status, of_theirs.text()));
        }
        let (seen, expected) = (alike(&of_theirs.text(), id), alike(&of_nothing.text(), &absent));
        if of_theirs.status != of_nothing.status || seen != expected {
            wrong.push(format!("{named} can be told from an absent one:\n  {seen}\n  {expected}"));
        }
        let headers =
            |headers: &[(String, String)]| headers.iter().map(|(name, _)| name.clone()).collect::<BTreeSet<_>>();
        if headers(&of_theirs.headers) != headers(&of_nothing.headers) {
            wrong.push(format!("{named} has other headers than an absent one"));
        }
        // The owner does find it: otherwise nothing above would mean anything.
        if let (With(""), "get") = (row.asked, row.method) {
            let owned = system.ask(&request(row, id, &own, &system.partner)).await;
            assert_eq!(owned.status, 200, "{named}, by its owner: {}", owned.text());
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(system.log_position().await.1, moved, "no money moved");
    for (kind, id) in &theirs {
        let path = match kind {
            Kind::Wallet => format!("/v1/wallets/{id}"),
            Kind::Webhook => format!("/v1/webhooks/{id}"),
            _ => continue,
        };
        let now = system.done(system.get(path), 200).await;
        assert_eq!(now["status"], "ACTIVE", "a stranger changed {kind:?}");
    }
    assert!(system.complaints().is_empty());
}

#[tokio::test]
async fn lists_cursors_users_and_keys_are_a_partners_own() {
    let mut system = System::start(&["--allow-local-webhooks"]).await;
    let (stranger, own) = second_partner(&system).await;
    let theirs = things(&system).await;

    // Lists of the stranger's hold nothing of the partner's.
    for list in [
        "/v1/wallets",
        "/v1/transactions",
        "/v1/webhooks",
        "/v1/wallets?userId=alice",
        "/v1/transactions?userId=alice",
        "/v1/transactions?reference=theirs",
    ] {
        let page = system.done(Request::get(list).bearer(&stranger), 200).await.to_string();
        for (kind, id) in &theirs {
            assert!(!page.contains(id), "{list} shows a stranger's {kind:?}: {page}");
        }
        assert!(!page.contains(&system.alice) && !page.contains("alice"), "{list}: {page}");
    }

    // A cursor continues its own list: not another partner's, not another filter's, not with a byte changed.
    for list in [
        "/v1/wallets".to_owned(),
        "/v1/transactions".to_owned(),
        "/v1/webhooks".to_owned(),
        format!("/v1/wallets/{}/entries", system.alice),
        format!("/v1/webhooks/{}/deliveries", theirs[&Kind::Webhook]),
    ] {
        let page = system.done(system.get(format!("{list}?limit=1")), 200).await;
        let cursor = page["nextCursor"].as_str().unwrap_or_else(|| panic!("{list} has one page: {page}")).to_owned();
        system.done(system.get(format!("{list}?limit=1&cursor={cursor}")), 200).await;
        let invalid = async |request: Request, what: &str| {
            let answer = system.ask(&request).await;
            assert!(
                answer.status == 400 && answer.text().contains("/problems/cursor-invalid"),
                "{what} at {list}: {}",
                answer.text()
            );
        };
        for (place, letter) in cursor.char_indices() {
            let other = if letter == 'A' { 'B' } else { 'A' };
            let changed = format!("{}{other}{}", &cursor[..place], &cursor[place + 1..]);
            invalid(system.get(format!("{list}?limit=1&cursor={changed}")), "a changed cursor").await;
        }
        let list_of_strangers = list.replace(&system.alice, &own.0);
        if !list.contains("deliveries") {
            invalid(
                Request::get(format!("{list_of_strangers}?cursor={cursor}")).bearer(&stranger),
                "a stranger's cursor",
            )
            .await;
            invalid(
                Request::get(format!("{list}?cursor={cursor}")).bearer(&system.admin),
                "the cursor of a partner in the operator's hands",
            )
            .await;
        }
        let filter = match list.as_str() {
            "/v1/wallets" => "currency=EUR",
            "/v1/transactions" => "type=TRANSFER",
            "/v1/webhooks" => continue, // has no filter
            list if list.contains("entries") => "type=TRANSFER",
            _ => "status=DELIVERED",
        };
        invalid(system.get(format!("{list}?{filter}&cursor={cursor}")), "another filter's cursor").await;
    }
    let (wallets, transactions) = (cursor(&system, "/v1/wallets").await, cursor(&system, "/v1/transactions").await);
    for (list, cursor) in [("/v1/transactions", wallets), ("/v1/wallets", transactions)] {
        let answer = system.ask(&system.get(format!("{list}?cursor={cursor}"))).await;
        assert_eq!(answer.status, 400, "another list's cursor at {list}: {}", answer.text());
    }

    // The same key is everybody's own.
    let key = fresh_key();
    let body = json!({"fromWalletId": own.0, "toWalletId": own.1, "amount": "0.01", "currency": "EUR"});
    let first = system.done(system.transfer().key(&key), 201).await;
    let second =
        system.done(Request::post("/v1/transactions/transfer").bearer(&stranger).key(&key).json(&body), 201).await;
    assert_ne!(first["id"], second["id"], "39 the same key by another partner is another key");
    let by_key = async |token: &str| {
        let target = format!("/v1/transactions?idempotencyKey={key}&minPosition={}", second["ledgerPosition"]);
        let list = Request::get(target).bearer(token);
        system.done(list, 200).await["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(|found| found["id"].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(by_key(&system.partner).await, [first["id"].clone()]);
    assert_eq!(by_key(&stranger).await, [second["id"].clone()]);

    // A user's name opens nothing of another partner's, and refuses nothing in other words.
    let body = json!({"fromWalletId": system.alice, "toWalletId": own.1, "amount": "0.01", "currency": "EUR"});
    for user in [None, Some("alice"), Some("mallory")] {
        let request = Request::post("/v1/transactions/transfer").bearer(&stranger).key(fresh_key()).json(&body);
        let request = user.into_iter().fold(request, |request, user| request.header("X-User-ID", user));
        let answer = system.ask(&request).await;
        assert!(answer.status == 404 && answer.text().contains("wallet-not-found"), "as {user:?}: {}", answer.text());
    }
    assert!(system.complaints().is_empty());
}

async fn cursor(system: &System, list: &str) -> String {
    let page = system.done(system.get(format!("{list}?limit=1")), 200).await;
    page["nextCursor"].as_str().unwrap().to_owned()
}

/// Another partner's token, and two wallets of its own with money in the first.
async fn second_partner(system: &System) -> (String, (String, String)) {
    let register = Request::post("/v1/partners").bearer(&system.admin).key(fresh_key());
    let partner = system.done(register.json(&json!({"name": "stranger", "currencies": ["EUR"]})), 201).await;
    let login = json!({"clientId": partner["clientId"], "clientSecret": partner["clientSecret"]});
    let token = system.done(Request::post("/v1/auth/token").json(&login), 200).await;
    let token = token["accessToken"].as_str().unwrap().to_owned();
    let mine =
        (system.wallet(&token, "mallory", "EUR", "10.00").await, system.wallet(&token, "mallory", "EUR", "0").await);
    (token, mine)
}

/// Something of each kind, all of the demo partner's; of what is listed, two.
async fn things(system: &System) -> BTreeMap<Kind, String> {
    let receiver = receiver().await;
    let id = |body: &Value| body["id"].as_str().unwrap().to_owned();
    let webhook =
        || Request::post("/v1/webhooks").bearer(&system.partner).json(&json!({"url": receiver, "events": ["*"]}));
    let first = system.done(webhook(), 201).await;
    system.done(webhook(), 201).await;
    system.done(system.transfer_with("reference", "theirs"), 201).await;
    let transaction = system.done(system.transfer_with("reference", "theirs"), 201).await;
    let top_up = json!({"walletId": system.alice, "amount": "1.00", "currency": "EUR"});
    let pending = system
        .done(Request::post("/v1/transactions/top-up").bearer(&system.partner).key(fresh_key()).json(&top_up), 202)
        .await;
    let deliveries = format!("/v1/webhooks/{}/deliveries?minPosition={}", id(&first), pending["ledgerPosition"]);
    let deliveries = system.done(system.get(deliveries), 200).await;
    let partners = system.done(Request::get("/v1/partners").bearer(&system.admin), 200).await;
    let wallet = system.done(system.get(format!("/v1/wallets/{}", system.alice)), 200).await;
    assert!(partners.to_string().contains(wallet["partnerId"].as_str().unwrap()));
    BTreeMap::from([
        (Kind::Wallet, system.alice.clone()),
        (Kind::Transaction, id(&transaction)),
        (Kind::Pending, id(&pending)),
        (Kind::Webhook, id(&first)),
        (Kind::Delivery, id(&deliveries["data"][0])),
        (Kind::Partner, wallet["partnerId"].as_str().unwrap().to_owned()),
    ])
}

/// Takes webhooks and says nothing about them.
async fn receiver() -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let router = axum::Router::new().fallback(|| async { axum::http::StatusCode::NO_CONTENT });
    tokio::spawn(async move { axum::serve(listener, router).await });
    url
}

fn request(row: &Row, id: &str, (mine, mine2): &(String, String), token: &str) -> Request {
    let (With(body) | Within(body) | Forbidden(body)) = row.asked else {
        return Request::get(format!("{}?{}={id}", row.path, row.place)).bearer(token);
    };
    let mut path = row.path.replace("{id}", id);
    let mut body = body.replace("{mine}", mine).replace("{mine2}", mine2);
    if row.place != "path" && row.method == "get" {
        path = format!("{path}?{}={id}", row.place);
    } else if row.place != "path" {
        let mut fields: Value = serde_json::from_str(&body).unwrap();
        let item = if let Within(_) = row.asked { &mut fields["transactions"][0] } else { &mut fields };
        item[row.place] = json!(id);
        body = fields.to_string();
    }
    let request = Request::new(&row.method.to_uppercase(), path).bearer(token);
    match row.method {
        "get" | "delete" => request,
        _ => request.key(fresh_key()).body(body),
    }
}

/// An id of the same kind that there is not.
fn absent(id: &str) -> String {
    let (prefix, _) = id.split_once('_').unwrap();
    format!("{prefix}_0192f0c1-2d3e-7abc-8def-0123456789ab")
}

/// The answer without what names the call: its ids, and its place in the log.
fn alike(text: &str, id: &str) -> String {
    let Ok(mut document) = serde_json::from_str::<Value>(text) else { return text.to_owned() };
    if let Some(fields) = document.as_object_mut() {
        for own in ["requestId", "transactionId"] {
            if fields.contains_key(own) {
                fields.insert(own.to_owned(), json!("…"));
            }
        }
    }
    document.to_string().replace(id, "{id}")
}

/// Every place of the document's operations where an id can stand: parameters and fields of bodies.
fn places(document: &Value) -> BTreeSet<(String, String, String)> {
    let mut found = BTreeSet::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            let mut names = Vec::new();
            for parameter in operation["parameters"].as_array().into_iter().flatten() {
                let parameter = resolved(document, parameter);
                let name = parameter["name"].as_str().unwrap();
                match parameter["in"].as_str() {
                    Some("path") if !path.starts_with("/problems/") => names.push("path".to_owned()),
                    Some("query") if is_id(name) => names.push(name.to_owned()),
                    _ => {}
                }
            }
            let body = &operation["requestBody"]["content"]["application/json"]["schema"];
            fields(document, body, &mut names, 0);
            for name in names {
                let known = NO_IDS.contains(&(path, &name)) || NAMES.contains(&name.as_str());
                if !known {
                    found.insert((method.clone(), path.clone(), name));
                }
            }
        }
    }
    assert!(
        found.iter().any(|(_, _, place)| place == "path") && found.iter().any(|(_, _, place)| place == "fromWalletId")
    );
    found
}

/// Names of fields that hold an id, at any depth. An item's field has its list's name in front.
fn fields(document: &Value, schema: &Value, names: &mut Vec<String>, depth: usize) {
    let schema = resolved(document, schema);
    if depth == 6 {
        return; // no body of ours is that deep, and a schema may contain itself
    }
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        if is_id(name) {
            names.push(name.clone());
        }
        fields(document, property, names, depth + 1);
    }
    fields_of_parts(document, schema, names, depth);
}

fn fields_of_parts(document: &Value, schema: &Value, names: &mut Vec<String>, depth: usize) {
    for combined in ["allOf", "anyOf", "oneOf"] {
        for part in schema[combined].as_array().into_iter().flatten() {
            fields(document, part, names, depth + 1);
        }
    }
    if schema["items"].is_object() {
        fields(document, &schema["items"], names, depth + 1);
    }
}

fn is_id(name: &str) -> bool {
    name == "id" || name == "aggregate" || name.ends_with("Id") || name.ends_with("Ids")
}

fn resolved<'d>(document: &'d Value, part: &'d Value) -> &'d Value {
    match part["$ref"].as_str().and_then(|reference| reference.strip_prefix('#')) {
        Some(pointer) => document.pointer(pointer).unwrap(),
        None => part,
    }
}
