//! Claims about what stands behind a token: keys that are replaced, clients that follow the log, secrets that are
//! guessed at, limits, and what is written down of all that. On a real Postgres, over real sockets.

use std::net::IpAddr;

use api_contract::{Access, Desk, NewClient, Origin, PartnerChange, RateLimit, Scopes, Seal, Secret, TokenPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ledger_core::{ClientId, PartnerEvent, PartnerId};
use local_stack::testing::TestDatabase;
use ring::signature::{ED25519, UnparsedPublicKey};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use crate::access::{
    EVERYWHERE_WITHIN, Service, database, eventually, log_in, new_client, partners_client, seal, slug,
};
use crate::http::Answer;

fn kid_of(pair: &TokenPair) -> String {
    let header = URL_SAFE_NO_PAD.decode(pair.access_token.reveal().split('.').next().unwrap()).unwrap();
    serde_json::from_slice::<Value>(&header).unwrap()["kid"].as_str().unwrap().to_owned()
}

fn published(access: &Access) -> Vec<Value> {
    let keys = serde_json::to_value(access.published_keys()).unwrap();
    keys["keys"].as_array().unwrap().clone()
}

async fn again(access: &Access, client: &NewClient) -> TokenPair {
    access.issue(&client.id.to_string(), &client.secret).await.unwrap()
}

async fn owner(database: &TestDatabase) -> PgConnection {
    PgConnection::connect(database.url()).await.unwrap()
}

async fn desk(database: &TestDatabase) -> Desk {
    Desk::connect(database.url()).await.unwrap()
}

async fn acts(database: &TestDatabase, act: &str) -> Vec<Value> {
    desk(database)
        .await
        .acts(Some(act), 100)
        .await
        .unwrap()
        .iter()
        .map(|act| serde_json::to_value(act).unwrap())
        .collect()
}

/// All that is known of keys becomes so much older.
async fn let_pass(connection: &mut PgConnection, seconds: u32) {
    sqlx::query(
        "update access.signing_keys set signs_from = signs_from - make_interval(secs => $1),
             replace_at = replace_at - make_interval(secs => $1)",
    )
    .bind(f64::from(seconds))
    .execute(connection)
    .await
    .unwrap();
}

#[tokio::test]
async fn a_published_key_verifies_what_was_signed() {
    let access = Access::connect(database().await.url(), seal()).await.unwrap();
    let pair = log_in(&access, &partners_client()).await;
    let keys = published(&access);
    let [key] = &keys[..] else { panic!("one key: {keys:?}") };
    assert_eq!(key["kid"], kid_of(&pair));
    for (name, value) in [("kty", "OKP"), ("crv", "Ed25519"), ("alg", "EdDSA"), ("use", "sig")] {
        assert_eq!(key[name], value);
    }
    let x = URL_SAFE_NO_PAD.decode(key["x"].as_str().unwrap()).unwrap();
    let (signed, signature) = pair.access_token.reveal().rsplit_once('.').unwrap();
    let signature = URL_SAFE_NO_PAD.decode(signature).unwrap();
    UnparsedPublicKey::new(&ED25519, x).verify(signed.as_bytes(), &signature).unwrap();
}

#[tokio::test]
async fn a_key_is_published_before_it_signs_and_goes_when_its_last_token_has_expired() {
    let database = database().await;
    let (one, two) = (Service::start(&database).await, Service::start(&database).await);
    let mut owner = owner(&database).await;
    let client = partners_client();
    let first = log_in(&one.access, &client).await;

    desk(&database).await.replace_signing_key(false).await.unwrap();
    assert_eq!(kid_of(&again(&one.access, &client).await), kid_of(&first), "the login that makes the next key");
    assert_eq!(kid_of(&again(&one.access, &client).await), kid_of(&first), "not before everybody knows it");
    let known = || async { (published(&two.access).len() == 2).then_some(()) };
    let begun = std::time::Instant::now();
    while known().await.is_none() {
        assert!(begun.elapsed() < EVERYWHERE_WITHIN, "the next key is not known elsewhere");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }

    let_pass(&mut owner, 61).await;
    let second = again(&one.access, &client).await;
    assert_ne!(kid_of(&second), kid_of(&first));
    assert_eq!((two.me(&first).await.status, two.me(&second).await.status), (200, 200), "both verify");
    let keys: i64 = sqlx::query_scalar("select count(*) from access.signing_keys").fetch_one(&mut owner).await.unwrap();
    assert_eq!(keys, 2, "logins do not make one key after the other");

    let_pass(&mut owner, 3_661).await; // whatever the first key has signed has expired
    for service in [&one, &two] {
        eventually(EVERYWHERE_WITHIN, || service.me(&first), 401).await.is_problem(401, "token-revoked");
        assert_eq!(service.me(&second).await.status, 200);
        assert_eq!(published(&service.access).len(), 1);
    }
    Service::start(&database).await.me(&first).await.is_problem(401, "token-revoked");
    assert_eq!(acts(&database, "key-made").await.len(), 2);
    assert_eq!(acts(&database, "key-replacement").await.len(), 1);
}

#[tokio::test]
async fn keys_are_replaced_by_schedule_too() {
    let database = database().await;
    let access = Access::connect(database.url(), seal()).await.unwrap();
    let client = partners_client();
    let first = log_in(&access, &client).await;
    let mut owner = owner(&database).await;
    let_pass(&mut owner, 31 * 24 * 60 * 60).await;
    again(&access, &client).await;
    let_pass(&mut owner, 61).await;
    assert_ne!(kid_of(&again(&access, &client).await), kid_of(&first));
}

#[tokio::test]
async fn keys_that_are_not_trusted_any_more_go_at_once_and_logins_go_on() {
    let database = database().await;
    let (one, two) = (Service::start(&database).await, Service::start(&database).await);
    let client = partners_client();
    let first = log_in(&one.access, &client).await;
    assert_eq!(two.me(&first).await.status, 200);
    desk(&database).await.replace_signing_key(true).await.unwrap();
    let refreshed = one.access.refresh(&first.refresh_token, &Origin::default()).await;
    assert_eq!(slug(refreshed), "token-revoked", "everybody logs in again");
    let second = again(&one.access, &client).await;
    for service in [&one, &two] {
        assert_eq!(service.me(&second).await.status, 200, "an unknown key is looked for");
        eventually(EVERYWHERE_WITHIN, || service.me(&first), 401).await.is_problem(401, "token-revoked");
    }
    assert!(one.access.refresh(&second.refresh_token, &Origin::default()).await.is_ok());
    let private: i64 = sqlx::query_scalar("select count(sealed_private_key) from access.signing_keys")
        .fetch_one(&mut owner(&database).await)
        .await
        .unwrap();
    assert_eq!(private, 1, "the private half of the old key is gone");
}

#[tokio::test]
async fn a_new_sealing_key_goes_before_the_old_one() {
    let database = database().await;
    let client = partners_client();
    let first = log_in(&Access::connect(database.url(), Seal::from_key([3; 32])).await.unwrap(), &client).await;
    let both = Access::connect(database.url(), Seal::from_keys([4; 32], &[[3; 32]])).await.unwrap();
    assert_eq!(kid_of(&again(&both, &client).await), kid_of(&first), "sealed under the old key");
    desk(&database).await.replace_signing_key(false).await.unwrap();
    again(&both, &client).await;
    let_pass(&mut owner(&database).await, 61).await;
    let alone = Access::connect(database.url(), Seal::from_key([4; 32])).await.unwrap();
    assert_ne!(kid_of(&again(&alone, &client).await), kid_of(&first), "sealed under the new key");
}

/// A partner and the events that happen to it.
struct Partner {
    id: PartnerId,
    client: ClientId,
}

impl Partner {
    fn new() -> Self {
        Self { id: PartnerId::from_uuid(Uuid::now_v7()), client: ClientId::from_uuid(Uuid::now_v7()) }
    }

    fn change(&self, position: i64, event: PartnerEvent) -> PartnerChange {
        PartnerChange { position, partner: self.id, event }
    }

    fn registered(&self, position: i64) -> PartnerChange {
        let event = PartnerEvent::Registered { name: "p".to_owned(), currencies: Vec::new(), client_id: self.client };
        self.change(position, event)
    }

    fn rotated(&self, position: i64) -> PartnerChange {
        self.change(position, PartnerEvent::SecretRotated { client_id: self.client })
    }

    async fn log_in(&self, access: &Access, secret: &Secret) -> Result<TokenPair, api_contract::Problem> {
        access.issue(&self.client.to_string(), secret).await
    }
}

#[tokio::test]
async fn a_partners_client_follows_the_log_and_each_event_counts_once() {
    let database = database().await;
    let (one, two) = (Service::start(&database).await, Service::start(&database).await);
    let partner = Partner::new();
    let (first, second) = (Secret::mint_for_client(), Secret::mint_for_client());
    let suspended = || partner.change(7, PartnerEvent::Suspended { reason: None });

    one.access.follow(&[partner.registered(3)]).await.unwrap();
    assert_eq!(slug(partner.log_in(&one.access, &first).await), "invalid-client", "nobody has its secret yet");
    assert_eq!(slug(partner.log_in(&one.access, &Secret::new("")).await), "invalid-client");
    assert!(one.access.set_secret(partner.client, 3, &first).await.unwrap());
    assert!(!one.access.set_secret(partner.client, 3, &second).await.unwrap(), "it has one");
    let pair = partner.log_in(&one.access, &first).await.unwrap();
    assert_eq!(two.me(&pair).await.status, 200);

    one.access.follow(&[partner.rotated(5)]).await.unwrap();
    assert_eq!(slug(partner.log_in(&two.access, &first).await), "invalid-client", "the old one, at once");
    one.me(&pair).await.is_problem(401, "token-revoked");
    eventually(EVERYWHERE_WITHIN, || two.me(&pair), 401).await.is_problem(401, "token-revoked");
    assert_eq!(slug(two.access.refresh(&pair.refresh_token, &Origin::default()).await), "token-revoked");
    assert!(!one.access.set_secret(partner.client, 3, &first).await.unwrap(), "a later event took it away");
    assert!(two.access.set_secret(partner.client, 5, &second).await.unwrap());
    let pair = partner.log_in(&one.access, &second).await.unwrap();
    assert_eq!((one.me(&pair).await.status, two.me(&pair).await.status), (200, 200), "a token since then is good");

    two.access.follow(&[partner.rotated(5), suspended()]).await.unwrap();
    assert_eq!(
        slug(partner.log_in(&one.access, &second).await),
        "partner-suspended",
        "whoever knows the secret is told"
    );
    assert_eq!(slug(partner.log_in(&one.access, &first).await), "invalid-client", "and nobody else");
    eventually(EVERYWHERE_WITHIN, || one.me(&pair), 401).await.is_problem(401, "token-revoked");
    two.me(&pair).await.is_problem(401, "token-revoked");
    Service::start(&database).await.me(&pair).await.is_problem(401, "token-revoked");

    one.access.follow(&[partner.change(9, PartnerEvent::Resumed {})]).await.unwrap();
    two.access.follow(&[partner.registered(3), partner.rotated(5), suspended()]).await.unwrap(); // one that lags behind
    assert_eq!(one.access.followed().await.unwrap(), 9);
    let after = partner.log_in(&two.access, &second).await.unwrap();
    assert_eq!((one.me(&after).await.status, two.me(&after).await.status), (200, 200));
    one.me(&pair).await.is_problem(401, "token-revoked");
}

#[tokio::test]
async fn a_client_that_was_there_before_its_partner_keeps_its_secret_until_that_is_rotated() {
    let access = Access::connect(database().await.url(), seal()).await.unwrap();
    let partner = Partner::new();
    let given = NewClient {
        id: partner.client,
        partner: Some(partner.id),
        secret: Secret::mint_for_client(),
        scopes: Scopes::PARTNER,
    };
    access.ensure_client(given.clone()).await.unwrap();
    access.follow(&[partner.registered(2)]).await.unwrap();
    partner.log_in(&access, &given.secret).await.unwrap();
    access.follow(&[partner.rotated(4)]).await.unwrap();
    let rotated = Secret::mint_for_client();
    assert!(access.set_secret(partner.client, 4, &rotated).await.unwrap());
    access.ensure_client(given.clone()).await.unwrap(); // the next start of the installation
    assert_eq!(slug(partner.log_in(&access, &given.secret).await), "invalid-client");
    partner.log_in(&access, &rotated).await.unwrap();
}

fn from(peer: &str) -> Origin {
    Origin { peer: Some(peer.parse::<IpAddr>().unwrap()), request_id: "req_1".to_owned() }
}

#[tokio::test]
async fn who_tries_secrets_is_told_to_wait_and_the_client_gets_in_from_elsewhere() {
    let database = database().await;
    let access = Access::connect(database.url(), seal()).await.unwrap();
    let (client, other) = (partners_client(), partners_client());
    for client in [&client, &other] {
        access.create_client((*client).clone()).await.unwrap();
    }
    let (attacker, honest) = (from("203.0.113.9"), from("198.51.100.4"));
    let id = client.id.to_string();
    let mut wrong = 0;
    let refused = loop {
        let refused = access.log_in(&id, &Secret::mint_for_client(), &attacker).await.expect_err("a refusal");
        if refused.slug() == "rate-limited" {
            break refused;
        }
        assert_eq!(refused.slug(), "invalid-client");
        wrong += 1;
        assert!(wrong < 100, "nobody is told to wait");
    };
    assert_eq!(wrong, 10);
    assert_eq!(refused.status(), 429);
    assert_eq!(slug(access.log_in(&id, &client.secret, &attacker).await), "rate-limited", "nothing is looked up");
    access.log_in(&id, &client.secret, &honest).await.expect("the attacker knows its id and no more");
    access.log_in(&other.id.to_string(), &other.secret, &attacker).await.expect("another client from there");
    access.issue(&id, &client.secret).await.unwrap();

    let told = acts(&database, "logins-failing").await;
    assert_eq!(told.len(), 1, "once, not at each: {told:?}");
    assert_eq!((&told[0]["clientId"], &told[0]["peer"]), (&json!(client.id), &json!("203.0.113.9")));
    assert_eq!(acts(&database, "login").await.len(), 2);
}

#[tokio::test]
async fn behind_one_proxy_nobodys_wrong_secrets_keep_others_out() {
    let database = database().await;
    let access = Access::connect(database.url(), seal()).await.unwrap();
    let honest = partners_client();
    let pair = log_in(&access, &honest).await;
    let proxy = from("192.0.2.1");
    let mut told = "";
    for _ in 0..301 {
        let nobody = ClientId::from_uuid(Uuid::now_v7()).to_string();
        told = slug(access.log_in(&nobody, &Secret::mint_for_client(), &proxy).await);
    }
    assert_eq!(told, "rate-limited");
    assert_eq!(slug(access.refresh(&Secret::mint("dbr_"), &proxy).await), "rate-limited");
    access.log_in(&honest.id.to_string(), &honest.secret, &proxy).await.expect("it knows its secret");
    access.refresh(&pair.refresh_token, &proxy).await.expect("it has its token");

    let told = acts(&database, "logins-failing").await;
    assert_eq!(
        (told.len(), &told[0]["clientId"]),
        (1, &Value::Null),
        "no client is named for what many names have done"
    );
}

async fn limited(service: &Service, pair: &TokenPair, status: u16) -> Answer {
    eventually(EVERYWHERE_WITHIN, || service.me(pair), status).await
}

#[tokio::test]
async fn a_partner_over_its_limit_waits_everywhere_and_nobody_else_does() {
    let database = database().await;
    let (one, two) = (Service::start(&database).await, Service::start(&database).await);
    let (partner, other) = (partners_client(), partners_client());
    let (mine, theirs) = (log_in(&one.access, &partner).await, log_in(&one.access, &other).await);
    let free = one.me(&mine).await;
    assert_eq!((free.status, free.header("ratelimit")), (200, None), "no limit, no headers");

    let limit: RateLimit = "2/h".parse().unwrap();
    desk(&database).await.limit_rate(partner.partner, Some(limit)).await.unwrap();
    for service in [&one, &two] {
        let refused = limited(service, &mine, 429).await;
        refused.is_problem(429, "rate-limited");
        assert_eq!(refused.header("ratelimit-policy"), Some("\"partner\";q=2;w=3600"));
        let state = refused.header("ratelimit").unwrap();
        assert!(state.starts_with("\"partner\";r=0;t="), "{state}");
        let wait: u32 = refused.header("retry-after").unwrap().parse().unwrap();
        assert!((1..=1_800).contains(&wait), "{wait}");
        let answer = service.me(&theirs).await;
        assert_eq!((answer.status, answer.header("ratelimit")), (200, None));
    }
    let copied = again(&one.access, &partner).await;
    one.me(&copied).await.is_problem(429, "rate-limited");
    assert_eq!(one.log_out(&copied).await.status, 204, "nobody can be kept from leaving");
    let admin = log_in(&one.access, &new_client(None, Scopes::ADMIN)).await;

    desk(&database).await.limit_rate(None, Some("1000/s".parse().unwrap())).await.unwrap();
    let begun = std::time::Instant::now();
    let general = loop {
        let answer = one.me(&theirs).await;
        if answer.header("ratelimit").is_some() {
            break answer;
        }
        assert!(begun.elapsed() < EVERYWHERE_WITHIN, "the general limit is not in force");
    };
    assert_eq!((general.status, general.header("ratelimit-policy")), (200, Some("\"partner\";q=1000;w=1")));
    assert!(general.header("ratelimit").unwrap().starts_with("\"partner\";r=9"), "{:?}", general.header("ratelimit"));
    one.me(&mine).await.is_problem(429, "rate-limited");
    assert_eq!(one.me(&admin).await.header("ratelimit"), None, "the operator has no limit");

    desk(&database).await.limit_rate(partner.partner, None).await.unwrap();
    let free = limited(&one, &mine, 200).await;
    assert_eq!(free.header("ratelimit"), None, "an own `none` goes before the general limit");
    assert_eq!(acts(&database, "rate-limit").await.len(), 3);
}

#[tokio::test]
async fn a_copied_refresh_token_is_written_down_once_however_often_it_comes() {
    let database = database().await;
    let access = Access::connect(database.url(), seal()).await.unwrap();
    let pair = log_in(&access, &partners_client()).await;
    access.refresh(&pair.refresh_token, &from("192.0.2.1")).await.unwrap();
    for _ in 0..5 {
        assert_eq!(slug(access.refresh(&pair.refresh_token, &from("192.0.2.1")).await), "token-revoked");
    }
    assert_eq!(acts(&database, "refresh-token-copied").await.len(), 1);
}

#[tokio::test]
async fn what_was_written_down_stays_so() {
    let database = database().await;
    let access = Access::connect(database.url(), seal()).await.unwrap();
    let client = partners_client();
    access.create_client(client.clone()).await.unwrap();
    access.log_in(&client.id.to_string(), &client.secret, &from("192.0.2.1")).await.unwrap();
    let mut connection = owner(&database).await;
    sqlx::query("set role daybook_access").execute(&mut connection).await.unwrap();
    for statement in ["update access.audit set act = 'nothing'", "delete from access.audit", "truncate access.audit"] {
        let refused = sqlx::query(statement).execute(&mut connection).await.expect_err("no right to it");
        let code = refused.as_database_error().and_then(|error| error.code().map(|code| code.into_owned()));
        assert_eq!(code.as_deref(), Some("42501"), "{statement}");
    }
    let acts = acts(&database, "login").await;
    assert_eq!(acts.len(), 1);
    assert_eq!((&acts[0]["peer"], &acts[0]["requestId"]), (&json!("192.0.2.1"), &json!("req_1")));
}
