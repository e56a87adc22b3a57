//! Who may use which route, asked of the whole product over its socket: every route stands in one table, and keeps to it.

use std::collections::BTreeMap;

use api_contract::{Access, Entrance, NewClient, ROUTES, Scope, Scopes, Seal, Secret};
use ledger_core::ClientId;
use reqwest::{Client, Method, StatusCode};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::process::{DataDirectory, Daybook, eventually, run};

/// Method, path and scopes of every route that the product describes.
async fn described(daybook: &Daybook) -> BTreeMap<(String, String), Entrance> {
    let document: Value =
        reqwest::get(format!("{}/openapi.json", daybook.base_url())).await.unwrap().json().await.unwrap();
    let mut routes = BTreeMap::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let entrance = match operation["security"].as_array().and_then(|needed| needed.first()) {
                None => Entrance::Public,
                Some(needed) => match needed["bearer"].as_array().unwrap().as_slice() {
                    [] => Entrance::AnyClient,
                    [scope] => Entrance::Holders(scope.as_str().unwrap().parse().unwrap()),
                    more => panic!("{method} {path} needs several scopes: {more:?}"),
                },
            };
            routes.insert((method.to_uppercase(), path.clone()), entrance);
        }
    }
    routes
}

/// The token of a client with these scopes alone.
async fn token(daybook: &Daybook, access: &Access, scopes: Scopes) -> String {
    let (id, secret) = (ClientId::from_uuid(Uuid::now_v7()), Secret::mint_for_client());
    access.create_client(NewClient { id, partner: None, secret: secret.clone(), scopes }).await.unwrap();
    let body = json!({ "clientId": id, "clientSecret": secret.reveal() });
    let answer = Client::new().post(format!("{}/v1/auth/token", daybook.base_url())).json(&body).send().await.unwrap();
    let pair: Value = answer.json().await.unwrap();
    pair["accessToken"].as_str().unwrap_or_else(|| panic!("{scopes}: {pair}")).to_owned()
}

async fn call(http: &Client, daybook: &Daybook, method: &str, path: &str, token: Option<&str>) -> (StatusCode, String) {
    let path = path.replace("{slug}", "not-found").replace("{id}", "x"); // no id: nobody who is let in gets further
    let method: Method = method.parse().unwrap();
    let mut request = http.request(method, format!("{}{path}", daybook.base_url()));
    if let Some(token) = token {
        request = request.bearer_auth(token);
    }
    let answer = request.send().await.unwrap();
    let (status, text) = (answer.status(), answer.text().await.unwrap());
    let problem: Value = serde_json::from_str(&text).unwrap_or_default();
    (status, problem["type"].as_str().unwrap_or_default().trim_start_matches("/problems/").to_owned())
}

#[tokio::test]
async fn every_route_stands_in_the_table_of_scopes_and_keeps_to_it() {
    let directory = DataDirectory::new();
    let daybook = Daybook::start(&directory, &["--no-demo"]).await;
    let http = Client::new();
    let described = described(&daybook).await;
    let table: BTreeMap<_, _> =
        ROUTES.iter().map(|route| ((route.method.to_owned(), route.path.to_owned()), route.entrance)).collect();
    assert_eq!(table.len(), ROUTES.len(), "a route stands in the table twice");
    assert_eq!(described, table, "what the services describe, and the table of scopes");

    // Another sealing key than the installation's: here clients are made, and no token.
    let access = Access::connect(daybook.database_url(), Seal::from_key([0; 32])).await.unwrap();
    let mut tokens = Vec::new();
    for scope in Scope::ALL {
        let others: Vec<_> = Scope::ALL.into_iter().filter(|other| *other != scope && *other != Scope::Admin).collect();
        let (with, without) = (Scopes::of(&[scope]), Scopes::of(&others));
        tokens.push((scope, token(&daybook, &access, with).await, token(&daybook, &access, without).await));
    }
    for ((method, path), entrance) in &table {
        if *path == "/v1/auth/logout" {
            continue; // last: it ends the token that it is tried with
        }
        let ask = |token: Option<String>| {
            let (http, daybook) = (&http, &daybook);
            async move { call(http, daybook, method, path, token.as_deref()).await }
        };
        let unknown = ask(None).await;
        if *entrance == Entrance::Public {
            assert_ne!(unknown.1, "unauthenticated", "{method} {path}");
            continue;
        }
        assert_eq!(
            unknown,
            (StatusCode::UNAUTHORIZED, "unauthenticated".to_owned()),
            "{method} {path} without a token"
        );
        for (scope, with, without) in &tokens {
            let needed = *entrance == Entrance::Holders(*scope);
            let refused = ask(Some(without.clone())).await;
            let let_in = ask(Some(with.clone())).await;
            if needed {
                let told = (StatusCode::FORBIDDEN, "insufficient-scope".to_owned());
                assert_eq!(refused, told, "{method} {path} with everything but {scope:?}");
            }
            // A client of no partner is refused by some routes all the same, in their own words; but never for what it holds.
            let may = needed || *entrance == Entrance::AnyClient || *scope == Scope::Admin;
            if !may {
                assert_eq!(let_in.0, StatusCode::FORBIDDEN, "{method} {path} with {scope:?} alone: {let_in:?}");
            } else if path.contains("{id}") {
                assert_eq!(let_in.0, StatusCode::BAD_REQUEST, "{method} {path} with {scope:?}: {let_in:?}");
            } else {
                assert_ne!(let_in.0, StatusCode::UNAUTHORIZED, "{method} {path} with {scope:?}: {let_in:?}");
            }
        }
    }
    let (_, last, _) = &tokens[0];
    assert_eq!(call(&http, &daybook, "POST", "/v1/auth/logout", None).await.1, "unauthenticated");
    assert_eq!(call(&http, &daybook, "POST", "/v1/auth/logout", Some(last)).await.0, StatusCode::NO_CONTENT);
    assert_eq!(call(&http, &daybook, "GET", "/v1/head", Some(last)).await.1, "token-revoked");
}

#[tokio::test]
async fn an_operator_limits_replaces_keys_and_reads_what_was_done() {
    let directory = DataDirectory::new();
    let daybook = Daybook::start(&directory, &[]).await;
    let http = Client::new();
    let token = daybook.login("demoPartner").await;
    let operate = |arguments: &[&str]| {
        let (good, text) = run(&[&["access"], arguments, &["--database-url", daybook.database_url()]].concat());
        assert!(good, "{arguments:?}: {text}");
        text
    };
    operate(&["limit", "1/h"]);
    let ask = || async { call(&http, &daybook, "GET", "/v1/wallets", Some(&token)).await };
    let refused = eventually("the limit is in force", ask, |answer| answer.0 != StatusCode::OK).await;
    assert_eq!(refused, (StatusCode::TOO_MANY_REQUESTS, "rate-limited".to_owned()));
    operate(&["limit", "none"]);
    eventually("the limit is lifted", ask, |answer| answer.0 == StatusCode::OK).await;

    operate(&["rotate-key", "--revoke"]);
    let revoked = eventually("the old key is not trusted", ask, |answer| answer.0 != StatusCode::OK).await;
    assert_eq!(revoked, (StatusCode::UNAUTHORIZED, "token-revoked".to_owned()));
    let fresh = daybook.login("demoPartner").await;
    assert_eq!(call(&http, &daybook, "GET", "/v1/wallets", Some(&fresh)).await.0, StatusCode::OK);

    let acts = operate(&["audit", "--json"]);
    let acts: Vec<Value> = acts.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |kind: &str| acts.iter().filter(|act| act["act"] == kind).count();
    assert_eq!((of("rate-limit"), of("key-replacement"), of("key-made")), (2, 1, 2));
    let client = &daybook.connection["demoPartner"]["clientId"];
    assert!(acts.iter().any(|act| act["act"] == "login" && &act["clientId"] == client && act["peer"] == "127.0.0.1"));
    let (good, text) = run(&["access", "limit", "fast", "--database-url", daybook.database_url()]);
    assert!(!good && text.contains("100/s"), "{text}");
}
