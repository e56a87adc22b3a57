//! Who gets in, and how far.

use api_contract::Scopes;
use serde_json::{Value, json};

use crate::door::Door;
use crate::money::transfer;

#[tokio::test]
async fn without_a_good_token_nobody_gets_in() {
    let door = Door::open().await;
    let body = json!({ "userId": "u", "currency": "EUR" });
    let none = door.post("/v1/wallets").json(&body).await;
    none.problem(401, "unauthenticated");
    assert_eq!(none.header("www-authenticate"), Some("Bearer"));
    let basic = door.post("/v1/wallets").header("authorization", "Basic dTpw").json(&body).await;
    basic.problem(401, "unauthenticated");
    for garbage in ["x", "a.b.c", "null"] {
        door.post("/v1/wallets").token(garbage).json(&body).await.problem(401, "unauthenticated");
    }
    let (claims, signature) = door.admin.rsplit_once('.').unwrap();
    let other = if signature.starts_with('A') { "B" } else { "A" };
    let forged = door.post("/v1/wallets").token(&format!("{claims}.{other}{}", &signature[1..])).json(&body).await;
    forged.problem(401, "token-invalid");
    assert_eq!(forged.header("www-authenticate"), Some("Bearer error=\"invalid_token\""));
}

#[tokio::test]
async fn a_client_must_know_its_secret() {
    let door = Door::open().await;
    for (id, secret) in [("nobody", "x"), ("cli_0192f0c1-2d3e-7abc-8def-0123456789ab", "x"), ("", "")] {
        let body = json!({ "clientId": id, "clientSecret": secret });
        door.post("/v1/auth/token").json(&body).await.problem(401, "invalid-client");
    }
    door.post("/v1/auth/token").json(&json!({ "clientId": "x" })).await.problem(422, "invalid-field");
}

#[tokio::test]
async fn a_refresh_token_is_good_once_and_a_logout_ends_all_tokens_of_the_login() {
    let door = Door::open().await;
    let partner = json!({ "name": "Acme", "currencies": ["EUR"] });
    let partner = door.post("/v1/partners").token(&door.admin).json(&partner).await.expect(201);
    let credentials = json!({ "clientId": partner["clientId"], "clientSecret": partner["clientSecret"] });
    let login = || async { door.post("/v1/auth/token").json(&credentials).await };
    let refresh = |pair: &Value| {
        let body = json!({ "refreshToken": pair["refreshToken"] });
        let door = &door;
        async move { door.post("/v1/auth/refresh").json(&body).await }
    };
    let open = |pair: &Value| {
        let token = pair["accessToken"].as_str().unwrap().to_owned();
        let door = &door;
        async move { door.post("/v1/wallets").token(&token).json(&json!({ "userId": "u", "currency": "EUR" })).await }
    };

    let answer = login().await;
    assert_eq!(answer.header("cache-control"), Some("no-store"));
    let first = answer.expect(200);
    assert_eq!((&first["tokenType"], &first["expiresIn"]), (&json!("Bearer"), &json!(3600)));
    let second = refresh(&first).await.expect(200);
    open(&second).await.expect(201);
    refresh(&first).await.problem(401, "token-revoked");
    open(&second).await.problem(401, "token-revoked");
    refresh(&second).await.problem(401, "token-revoked");
    refresh(&json!({ "refreshToken": "made up" })).await.problem(401, "token-invalid");

    let third = login().await.expect(200);
    open(&third).await.expect(201);
    let bearer = third["accessToken"].as_str().unwrap();
    assert_eq!(door.post("/v1/auth/logout").token(bearer).empty().await.status, 204);
    open(&third).await.problem(401, "token-revoked");
    refresh(&third).await.problem(401, "token-revoked");
}

#[tokio::test]
async fn an_access_token_survives_a_restart() {
    let door = Door::open().await;
    let partner = door.partner(&["EUR"]).await;
    let door = door.restart().await;
    door.wallet(&partner, "alice", "EUR").await;
}

#[tokio::test]
async fn a_scope_decides_the_route_before_anything_else_is_looked_at() {
    let door = Door::open().await;
    let (partner, alice, bob) = door.alice_and_bob("10.00").await;
    let readers = Scopes::of(&[api_contract::Scope::WalletsRead, api_contract::Scope::TransactionsRead]);
    let reader = door.client(readers, Some(&partner.id)).await;
    let before = door.head().await;
    let cases = [
        (&reader, "/v1/wallets".to_owned()),
        (&reader, format!("/v1/wallets/{alice}/freeze")),
        (&reader, "/v1/transactions/transfer".to_owned()),
        (&reader, "/v1/transactions/top-up".to_owned()),
        (&partner.token, "/v1/partners".to_owned()),
        (&partner.token, "/v1/transactions/adjustment".to_owned()),
        (&partner.token, "/v1/transactions/txn_0192f0c1-2d3e-7abc-8def-0123456789ab/settle".to_owned()),
        (&partner.token, "/v1/transactions/txn_0192f0c1-2d3e-7abc-8def-0123456789ab/fail".to_owned()),
        (&partner.token, "/v1/transactions/txn_0192f0c1-2d3e-7abc-8def-0123456789ab/expire".to_owned()),
        (&door.workflow, "/v1/transactions/transfer".to_owned()),
        (&door.workflow, "/v1/wallets".to_owned()),
    ];
    for (token, path) in cases {
        door.post(&path).token(token).text("not even JSON").await.problem(403, "insufficient-scope");
    }
    let admin_is_no_partner = door.post("/v1/wallets").token(&door.admin);
    admin_is_no_partner.json(&json!({ "userId": "u", "currency": "EUR" })).await.problem(403, "insufficient-scope");
    assert_eq!(door.head().await, before);
    // `admin` has every other scope.
    let call = door.post("/v1/transactions/transfer").token(&door.admin).new_key();
    call.json(&transfer(&alice, &bob, "1.00")).await.expect(201);
}
