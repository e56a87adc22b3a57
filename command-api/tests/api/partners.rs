//! Registering partners.

use serde_json::json;
use sqlx::PgPool;

use crate::door::Door;

#[tokio::test]
async fn a_registered_partner_has_wallets_and_a_client_that_may_act_for_it() {
    let door = Door::open().await;
    let body = json!({ "name": "Acme & Söhne", "currencies": ["EUR", "JPY"] });
    let answer = door.post("/v1/partners").token(&door.admin).json(&body).await;
    let partner = answer.expect(201);
    assert_eq!(partner["name"], "Acme & Söhne");
    assert_eq!(partner["currencies"], json!(["EUR", "JPY"]));
    let id = partner["id"].as_str().unwrap();
    assert_eq!(answer.header("location"), Some(format!("/v1/partners/{id}").as_str()));
    let wallets = partner["wallets"].as_array().unwrap();
    assert_eq!(wallets.len(), 2);
    for (wallet, (currency, nothing)) in wallets.iter().zip([("EUR", "0.00"), ("JPY", "0")]) {
        assert_eq!(wallet["partnerId"], id);
        assert_eq!(wallet["userId"], json!(null));
        assert_eq!((&wallet["currency"], &wallet["balance"]), (&json!(currency), &json!(nothing)));
    }
    let secret = partner["clientSecret"].as_str().unwrap();
    assert!(
        !door
            .events_after(0)
            .await
            .iter()
            .any(|event| event.payload.contains(secret) || event.metadata.contains(secret))
    );

    let token = door.login(partner["clientId"].as_str().unwrap(), secret).await;
    let opened =
        door.post("/v1/wallets").token(&token).json(&json!({ "userId": "u", "currency": "JPY" })).await.expect(201);
    assert_eq!(opened["partnerId"], id);
    door.post("/v1/partners").token(&token).json(&body).await.problem(403, "insufficient-scope");
}

#[tokio::test]
async fn a_repeated_registration_answers_the_same_without_the_secret() {
    let door = Door::open().await;
    let body = json!({ "name": "Acme", "currencies": ["EUR"] });
    let call = || door.post("/v1/partners").token(&door.admin).key("acme");
    let first = call().json(&body).await;
    let mut partner = first.expect(201);
    let clients = clients(&door).await;

    let again = call().json(&body).await;
    assert!(again.replayed());
    let secret = partner.as_object_mut().unwrap().remove("clientSecret").expect("the secret is shown once");
    assert_eq!(again.expect(201), partner);
    assert_eq!(again.position(), first.position());
    let other = json!({ "name": "Other", "currencies": ["EUR"] });
    call().json(&other).await.problem(422, "idempotency-key-reused");

    let many: Vec<String> = (0..51).map(|_| "EUR".to_owned()).collect();
    let refused = json!({ "name": "Other", "currencies": many });
    door.post("/v1/partners").token(&door.admin).key("other").json(&refused).await.problem(422, "too-many-items");
    assert_eq!(self::clients(&door).await, clients, "no credentials were made for who was not registered");
    door.login(partner["clientId"].as_str().unwrap(), secret.as_str().unwrap()).await;
}

async fn clients(door: &Door) -> Vec<uuid::Uuid> {
    let pool = PgPool::connect(door.database_url()).await.unwrap();
    let clients = sqlx::query_scalar("select id from access.clients order by id").fetch_all(&pool).await.unwrap();
    pool.close().await;
    clients
}
