//! Claims about callers: what a login gives, what ends it, and who is not let in. On a real Postgres.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api_contract::{Access, AccessError, Client, NewClient, Origin, Problem, Scope, Scopes, Seal, Secret, TokenPair};
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ledger_core::{Caller, ClientId, PartnerId};
use local_stack::testing::TestDatabase;
use ring::signature::{Ed25519KeyPair, KeyPair};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::http::{Answer, PATIENCE, Server};

/// What API.md promises of a logout.
pub(crate) const EVERYWHERE_WITHIN: Duration = Duration::from_secs(5);

pub(crate) fn seal() -> Seal {
    Seal::from_key([3; 32])
}

pub(crate) async fn database() -> TestDatabase {
    local_stack::testing::database(|url| async move { migrations::run(&url).await }).await
}

/// One service: its own knowledge of tokens, and a door that says who came in.
pub(crate) struct Service {
    pub(crate) access: Access,
    pub(crate) server: Server,
}

impl Service {
    pub(crate) async fn start(database: &TestDatabase) -> Self {
        let access = Access::connect(database.url(), seal()).await.unwrap();
        // Routes of the product, whose scopes stand in its table; what they do here is say who came in.
        let router = Router::new()
            .route("/v1/head", get(me))
            .route("/v1/events", get(me))
            .route("/v1/wallets", get(partner))
            .route("/v1/auth/logout", post(log_out))
            .route("/v1/nowhere", get(me));
        let server = Server::start(router.with_state(access.clone())).await;
        Self { access, server }
    }

    pub(crate) async fn me(&self, pair: &TokenPair) -> Answer {
        self.get("/v1/head", pair, "").await
    }

    pub(crate) async fn log_out(&self, pair: &TokenPair) -> Answer {
        let headers = format!("authorization: Bearer {}\r\n", pair.access_token.reveal());
        self.server.post_to("/v1/auth/logout", &headers, "").await
    }

    pub(crate) async fn get(&self, path: &str, pair: &TokenPair, headers: &str) -> Answer {
        let headers = format!("authorization: Bearer {}\r\n{headers}", pair.access_token.reveal());
        self.server.get_with(path, &headers).await
    }
}

async fn me(client: Client) -> Json<Value> {
    let metadata: Value = serde_json::from_str(&client.metadata()).unwrap();
    Json(json!({ "id": client.id, "partner": client.partner, "scopes": client.scopes.to_string(), "metadata": metadata,
            "caller": format!("{:?}", client.caller()) }))
}

async fn log_out(State(access): State<Access>, client: Client) -> Result<StatusCode, Problem> {
    access.logout(&client).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn partner(client: Client) -> Result<Json<PartnerId>, Problem> {
    Ok(Json(client.partner()?))
}

pub(crate) fn new_client(partner: Option<PartnerId>, scopes: Scopes) -> NewClient {
    NewClient { id: ClientId::from_uuid(Uuid::now_v7()), partner, secret: Secret::mint_for_client(), scopes }
}

pub(crate) fn partners_client() -> NewClient {
    new_client(Some(PartnerId::from_uuid(Uuid::now_v7())), Scopes::PARTNER)
}

pub(crate) async fn log_in(access: &Access, client: &NewClient) -> TokenPair {
    access.create_client(client.clone()).await.unwrap();
    access.issue(&client.id.to_string(), &client.secret).await.unwrap()
}

pub(crate) fn slug(result: Result<TokenPair, Problem>) -> &'static str {
    result.expect_err("a refusal").slug()
}

/// Asks again until the answer is as expected, and says what was last seen if it never is.
pub(crate) async fn eventually<F: Future<Output = Answer>>(
    within: Duration,
    ask: impl Fn() -> F,
    status: u16,
) -> Answer {
    let begun = Instant::now();
    loop {
        let answer = ask().await;
        if answer.status == status {
            return answer;
        }
        assert!(begun.elapsed() < within, "still {} after {within:?}, not {status}: {}", answer.status, answer.body);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_client_that_knows_its_secret_is_let_in_as_itself() {
    let service = Service::start(&database().await).await;
    let client = partners_client();
    let pair = log_in(&service.access, &client).await;
    let shown = serde_json::to_value(&pair).unwrap();
    assert_eq!((&shown["tokenType"], &shown["expiresIn"]), (&json!("Bearer"), &json!(3600)));
    assert!(shown["refreshToken"].as_str().unwrap().starts_with("dbr_"));

    let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let headers = format!("x-request-id: r-1\r\nx-user-id: zoë\r\ntraceparent: {traceparent}\r\n");
    let expected = json!({
        "id": client.id,
        "partner": client.partner,
        "scopes": "wallets:read wallets:write transactions:read transactions:write webhooks:read webhooks:write",
        "metadata": { "clientId": client.id, "requestId": "r-1", "traceparent": traceparent, "userId": "zoë" },
        "caller": format!("{:?}", Caller::Partner { partner: client.partner.unwrap(), user: Some("zoë".into()) }),
    });
    assert_eq!(service.get("/v1/head", &pair, &headers).await.json(), expected);
    assert_eq!(service.get("/v1/head", &pair, &headers).await.json(), expected, "the second time from memory");
}

#[tokio::test]
async fn an_unknown_client_and_a_wrong_secret_are_answered_alike() {
    let access = Access::connect(database().await.url(), seal()).await.unwrap();
    let client = partners_client();
    log_in(&access, &client).await;
    let mut answers = Vec::new();
    for (id, secret) in [
        (client.id.to_string(), Secret::mint_for_client()),
        (client.id.to_string(), Secret::new("")),
        (ClientId::from_uuid(Uuid::now_v7()).to_string(), client.secret.clone()),
        ("cli_00000000-0000-0000-0000-000000000000".to_owned(), client.secret.clone()),
        ("' or 1=1 --".to_owned(), client.secret.clone()),
    ] {
        answers.push(access.issue(&id, &secret).await.expect_err("a refusal").document().to_string());
    }
    assert!(answers[0].contains("/problems/invalid-client"));
    answers.dedup();
    assert_eq!(answers.len(), 1);
}

#[tokio::test]
async fn without_a_bearer_token_nobody_is_let_in_and_is_told_how() {
    let service = Service::start(&database().await).await;
    let pair = log_in(&service.access, &partners_client()).await;
    let token = pair.access_token.reveal();
    for headers in [
        String::new(),
        "authorization: Basic YTpi\r\n".to_owned(),
        "authorization: Bearer\r\n".to_owned(),
        "authorization: Bearer \r\n".to_owned(),
        "authorization: Bearer garbage\r\n".to_owned(),
        format!("authorization: {token}\r\n"),
        format!("authorization: Token {token}\r\n"),
        format!("authorization: Bearer {token}\r\nauthorization: Bearer {token}\r\n"),
        format!("authorization: Bearer {}\r\n", "a".repeat(8_000)),
        format!("authorization: Bearer {}\r\n", pair.refresh_token.reveal()),
    ] {
        let answer = service.server.get_with("/v1/head", &headers).await;
        answer.is_problem(401, "unauthenticated");
        assert_eq!(answer.header("www-authenticate"), Some("bearer"));
    }
}

#[tokio::test]
async fn a_changed_token_is_refused_at_the_door() {
    let service = Service::start(&database().await).await;
    let pair = log_in(&service.access, &partners_client()).await;
    let parts: Vec<&str> = pair.access_token.reveal().split('.').collect();
    let [header, claims, signature] = parts[..] else { panic!("three parts") };
    let changed = |part: &str, from: &str, to: &str| {
        let text = String::from_utf8(URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap();
        assert!(text.contains(from), "{text}");
        URL_SAFE_NO_PAD.encode(text.replace(from, to))
    };
    let kid = serde_json::from_slice::<Value>(&URL_SAFE_NO_PAD.decode(header).unwrap()).unwrap()["kid"]
        .as_str()
        .unwrap()
        .to_owned();
    for forged in [
        format!("{header}.{}.{signature}", changed(claims, "wallets:read", "admin wallets:read")),
        format!("{}.{claims}.", changed(header, "EdDSA", "none")),
        format!("{}.{claims}.{signature}", changed(header, "EdDSA", "nOnE")),
        format!("{}.{claims}.{signature}", changed(header, &kid, "../../x")),
        format!("{}.{claims}.{signature}", changed(header, &kid, "' or true --")),
        format!("{}.{claims}.{signature}", changed(header, &kid, &kid.to_uppercase())),
        format!("{}.{claims}.{signature}", changed(header, &kid, &Uuid::now_v7().to_string())),
        format!("{header}.{claims}.{}", URL_SAFE_NO_PAD.encode([0; 64])),
        format!("{header}.{claims}.{signature}="),
    ] {
        let answer = service.server.get_with("/v1/head", &format!("authorization: Bearer {forged}\r\n")).await;
        answer.is_problem(401, "token-invalid");
        assert_eq!(answer.header("www-authenticate"), Some("bearer error=\"invalid_token\""));
    }
    assert_eq!(service.me(&pair).await.status, 200, "the real one still is");
}

#[tokio::test]
async fn scopes_decide_the_route_and_admin_has_every_one() {
    let service = Service::start(&database().await).await;
    let partners = log_in(&service.access, &partners_client()).await;
    service.get("/v1/events", &partners, "").await.is_problem(403, "insufficient-scope");
    assert_eq!(service.get("/v1/wallets", &partners, "").await.status, 200);

    let nowhere = service.get("/v1/nowhere", &partners, "").await;
    nowhere.is_problem(403, "insufficient-scope");

    let admins = log_in(&service.access, &new_client(None, Scopes::ADMIN)).await;
    service.get("/v1/nowhere", &admins, "").await.is_problem(403, "insufficient-scope");
    assert_eq!(service.get("/v1/events", &admins, "").await.status, 200);
    service.get("/v1/wallets", &admins, "").await.is_problem(403, "insufficient-scope");
}

#[tokio::test]
async fn a_users_name_is_a_text_like_any_other() {
    let service = Service::start(&database().await).await;
    let pair = log_in(&service.access, &partners_client()).await;
    for (name, slug) in [
        ("".to_owned(), "invalid-field"),
        ("u".repeat(129), "invalid-field"),
        ("a\u{202e}b".to_owned(), "invalid-character"),
        ("a\u{85}b".to_owned(), "invalid-character"),
        ("a\tb".to_owned(), "invalid-character"),
    ] {
        service.get("/v1/head", &pair, &format!("x-user-id: {name}\r\n")).await.is_problem(422, slug);
    }
    service.get("/v1/head", &pair, "x-user-id: a\r\nx-user-id: a\r\n").await.is_problem(422, "invalid-field");
}

#[tokio::test]
async fn services_that_start_at_once_share_one_key_and_tokens_outlive_them() {
    let database = database().await;
    let (one, two, three) =
        tokio::join!(Service::start(&database), Service::start(&database), Service::start(&database));
    let pair = log_in(&one.access, &partners_client()).await;
    assert_eq!((two.me(&pair).await.status, three.me(&pair).await.status), (200, 200));
    drop((one, two, three));
    assert_eq!(Service::start(&database).await.me(&pair).await.status, 200, "after a restart of everything");

    let mut connection = PgConnection::connect(database.url()).await.unwrap();
    let keys: i64 =
        sqlx::query_scalar("select count(*) from access.signing_keys").fetch_one(&mut connection).await.unwrap();
    assert_eq!(keys, 1);
}

#[tokio::test]
async fn a_key_that_is_new_to_a_running_service_is_found() {
    let database = database().await;
    let old = Service::start(&database).await;
    let kid = Uuid::now_v7();
    let pkcs8 = Ed25519KeyPair::generate_pkcs8(&ring::rand::SystemRandom::new()).unwrap();
    let key = Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).unwrap();
    sqlx::query(
        "insert into access.signing_keys (kid, public_key, sealed_private_key, signs_from, replace_at)
         values ($1, $2, $3, now(), now() + interval '1 day')",
    )
    .bind(kid)
    .bind(key.public_key().as_ref())
    .bind(seal().seal(&format!("access.signing_keys/{kid}"), pkcs8.as_ref()))
    .execute(&mut PgConnection::connect(database.url()).await.unwrap())
    .await
    .unwrap();

    let new = Service::start(&database).await;
    let pair = log_in(&new.access, &partners_client()).await;
    let header = URL_SAFE_NO_PAD.decode(pair.access_token.reveal().split('.').next().unwrap()).unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&header).unwrap()["kid"], kid.to_string(), "the newest key signs");
    assert_eq!(old.me(&pair).await.status, 200);
}

#[tokio::test]
async fn with_another_seal_tokens_are_verified_but_none_is_issued() {
    let database = database().await;
    let client = partners_client();
    let pair = log_in(&Access::connect(database.url(), seal()).await.unwrap(), &client).await;
    let other = Access::connect(database.url(), Seal::from_key([4; 32])).await.unwrap();
    assert_eq!(slug(other.issue(&client.id.to_string(), &client.secret).await), "internal-error");
    assert_eq!(slug(other.refresh(&pair.refresh_token, &Origin::default()).await), "internal-error");
    let right = Access::connect(database.url(), seal()).await.unwrap();
    right.refresh(&pair.refresh_token, &Origin::default()).await.expect("what failed has not used the token up");
}

#[tokio::test]
async fn a_refresh_token_is_good_once_and_its_copy_ends_the_whole_family_everywhere() {
    let database = database().await;
    let (one, two) = (Service::start(&database).await, Service::start(&database).await);
    let first = log_in(&one.access, &partners_client()).await;
    let second = one.access.refresh(&first.refresh_token, &Origin::default()).await.unwrap();
    assert_ne!(first.refresh_token, second.refresh_token);
    for pair in [&first, &second] {
        assert_eq!((one.me(pair).await.status, two.me(pair).await.status), (200, 200));
    }

    assert_eq!(slug(two.access.refresh(&first.refresh_token, &Origin::default()).await), "token-revoked", "a copy");
    assert_eq!(
        slug(one.access.refresh(&second.refresh_token, &Origin::default()).await),
        "token-revoked",
        "the next of the family"
    );
    for pair in [&first, &second] {
        two.me(pair).await.is_problem(401, "token-revoked");
        eventually(EVERYWHERE_WITHIN, || one.me(pair), 401).await.is_problem(401, "token-revoked");
    }
    assert_eq!(slug(one.access.refresh(&Secret::mint("dbr_"), &Origin::default()).await), "token-invalid");
}

#[tokio::test]
async fn two_refreshes_at_once_give_one_pair_at_most() {
    let access = Access::connect(database().await.url(), seal()).await.unwrap();
    let pair = log_in(&access, &partners_client()).await;
    let origin = Origin::default();
    let refresh = || access.refresh(&pair.refresh_token, &origin);
    let (one, two) = tokio::join!(refresh(), refresh());
    assert_eq!([one.is_ok(), two.is_ok()].iter().filter(|good| **good).count(), 1);
}

#[tokio::test]
async fn a_logout_is_in_force_here_at_once_and_everywhere_within_five_seconds() {
    let database = database().await;
    let (one, two) = (Service::start(&database).await, Service::start(&database).await);
    let client = partners_client();
    let pair = log_in(&one.access, &client).await;
    let elsewhere = one.access.issue(&client.id.to_string(), &client.secret).await.unwrap();
    assert_eq!(two.me(&pair).await.status, 200);

    assert_eq!(one.log_out(&pair).await.status, 204);
    one.log_out(&pair).await.is_problem(401, "token-revoked");
    one.me(&pair).await.is_problem(401, "token-revoked");
    eventually(EVERYWHERE_WITHIN, || two.me(&pair), 401).await.is_problem(401, "token-revoked");
    assert_eq!(slug(two.access.refresh(&pair.refresh_token, &Origin::default()).await), "token-revoked");
    Service::start(&database).await.me(&pair).await.is_problem(401, "token-revoked");
    assert_eq!(two.me(&elsewhere).await.status, 200, "another login of the client goes on");
}

#[tokio::test]
async fn when_revocations_cannot_be_read_nobody_is_let_in_until_they_can() {
    let database = database().await;
    let service = Service::start(&database).await;
    let pair = log_in(&service.access, &partners_client()).await;
    assert_eq!(service.me(&pair).await.status, 200);

    let name = database.name();
    let mut admin = PgConnection::connect(local_stack::testing::stack().await.database_url()).await.unwrap();
    let away = format!("alter database {name} allow_connections false");
    sqlx::query(&away).execute(&mut admin).await.unwrap();
    let ended = "select pg_terminate_backend(pid) from pg_stat_activity where datname = $1";
    sqlx::query(ended).bind(name).execute(&mut admin).await.unwrap();
    let answer = eventually(PATIENCE, || service.me(&pair), 503).await;
    answer.is_problem(503, "storage-unavailable");
    assert_eq!(answer.header("retry-after"), Some("1"));

    let back = format!("alter database {name} allow_connections true");
    sqlx::query(&back).execute(&mut admin).await.unwrap();
    eventually(PATIENCE, || service.me(&pair), 200).await;
}

#[tokio::test]
async fn in_an_outage_callers_are_answered_soon_and_do_not_queue_for_each_other() {
    let database = database().await;
    let service = Arc::new(Service::start(&database).await);
    let pair = log_in(&service.access, &partners_client()).await;
    let mut owner = PgConnection::connect(database.url()).await.unwrap();
    sqlx::raw_sql("begin; lock table access.revocations").execute(&mut owner).await.unwrap();
    eventually(PATIENCE, || service.me(&pair), 503).await;

    let begun = Instant::now();
    let mut callers = JoinSet::new();
    for _ in 0..8 {
        let (service, pair) = (service.clone(), pair.clone());
        callers.spawn(async move { service.me(&pair).await });
    }
    for answer in callers.join_all().await {
        answer.is_problem(503, "storage-unavailable");
    }
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(8), "{took:?}, where one alone takes 2 s");

    sqlx::query("rollback").execute(&mut owner).await.unwrap();
    eventually(PATIENCE, || service.me(&pair), 200).await;
}

#[tokio::test]
async fn a_client_is_created_once_and_ensured_as_often_as_one_likes() {
    let database = database().await;
    let access = Access::connect(database.url(), seal()).await.unwrap();
    let client = new_client(None, Scopes::WORKFLOW);
    access.ensure_client(client.clone()).await.unwrap();
    let pair = access.issue(&client.id.to_string(), &client.secret).await.unwrap();
    access.ensure_client(client.clone()).await.unwrap();
    let pair = access.refresh(&pair.refresh_token, &Origin::default()).await.expect("nothing has changed");
    assert!(matches!(access.create_client(client.clone()).await, Err(AccessError::ClientExists)));

    let changed = NewClient { secret: Secret::mint_for_client(), ..client.clone() };
    access.ensure_client(changed.clone()).await.unwrap();
    assert_eq!(slug(access.issue(&client.id.to_string(), &client.secret).await), "invalid-client");
    access.issue(&client.id.to_string(), &changed.secret).await.unwrap();
    let old = access.refresh(&pair.refresh_token, &Origin::default()).await;
    assert_eq!(slug(old), "token-revoked", "whoever logged in with the old secret may be its thief");
    let written: i64 = sqlx::query_scalar("select count(*) from access.audit where act = 'client-set'")
        .fetch_one(&mut PgConnection::connect(database.url()).await.unwrap())
        .await
        .unwrap();
    assert_eq!(written, 2);
}

#[tokio::test]
async fn the_ledger_is_asked_on_behalf_of_the_one_who_calls() {
    let service = Service::start(&database().await).await;
    let partner = PartnerId::from_uuid(Uuid::now_v7());
    for (partner, scopes, expected) in [
        (None, Scopes::ADMIN, Caller::Admin),
        (None, Scopes::WORKFLOW, Caller::Workflow),
        (Some(partner), Scopes::PARTNER, Caller::Partner { partner, user: None }),
        (
            None,
            Scopes::of(&[Scope::AuditRead]),
            Caller::Partner { partner: PartnerId::from_uuid(Uuid::nil()), user: None },
        ),
    ] {
        let pair = log_in(&service.access, &new_client(partner, scopes)).await;
        assert_eq!(service.me(&pair).await.json()["caller"], format!("{expected:?}"));
    }
}

#[tokio::test]
async fn no_secret_stands_in_the_database_or_prints_itself() {
    let database = database().await;
    let access = Access::connect(database.url(), seal()).await.unwrap();
    let client = partners_client();
    let pair = log_in(&access, &client).await;
    let printed = format!("{client:?} {pair:?} {}", client.secret);
    let mut connection = PgConnection::connect(database.url()).await.unwrap();
    let stored: Vec<String> = sqlx::query_scalar(
        "select c::text from access.clients c union all select r::text from access.refresh_tokens r
         union all select k::text from access.signing_keys k",
    )
    .fetch_all(&mut connection)
    .await
    .unwrap();
    assert_eq!(stored.len(), 3);
    let everything = format!("{printed} {}", stored.join(" "));
    for secret in [&client.secret, &pair.access_token, &pair.refresh_token] {
        assert!(!everything.contains(secret.reveal()));
        let hex: String = secret.reveal().bytes().map(|byte| format!("{byte:02x}")).collect();
        assert!(!everything.contains(&hex));
    }
}

#[tokio::test]
async fn no_other_role_reads_the_schema() {
    let database = database().await;
    for role in ["daybook_reader", "daybook_ledger", "daybook_projector", "daybook_webhooks", "daybook_workflows"] {
        let mut connection = PgConnection::connect(database.url()).await.unwrap();
        sqlx::query(&format!("set role {role}")).execute(&mut connection).await.unwrap();
        let refused = sqlx::query("select from access.clients").execute(&mut connection).await.unwrap_err();
        let code = refused.as_database_error().and_then(|error| error.code().map(|code| code.into_owned()));
        assert_eq!(code.as_deref(), Some("42501"), "{role} has no right to it");
    }
}
