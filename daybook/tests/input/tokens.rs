//! Who asks: no token, no token of ours, one that is over, one that does not go so far.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, Mac};
use serde_json::{Value, json};
use sha2::Sha256;

use crate::system::{System, fresh_key};
use crate::table::{Case, Expected, case, refused, taken};
use crate::wire::Request;

pub(crate) async fn table(system: &mut System) -> Vec<Case> {
    let mut cases = unknown(system);
    cases.extend(forged(system).await);
    cases.extend(over(system).await);
    cases.extend(beyond(system));
    cases.extend(logins(system));
    cases
}

fn unknown(system: &System) -> Vec<Case> {
    let who = || refused(401, "unauthenticated").header("www-authenticate", "Bearer");
    let token = &system.partner;
    let asking = |name: &str, authorization: &str| {
        case(format!("55 {name}"), Request::get("/v1/wallets").header("Authorization", authorization), who())
    };
    let mut cases = vec![
        case("55 no token", Request::get("/v1/wallets"), who()),
        case("55 no token, and money", system.transfer().without("Authorization"), who()),
        case("55 no token, and no JSON either", system.transfer_request().without("Authorization").body("{"), who()),
        case("55 a token in the query", Request::get(format!("/v1/wallets?access_token={token}")), who()),
        case("55 a token in a cookie", Request::get("/v1/wallets").header("Cookie", format!("token={token}")), who()),
        case("55 a token twice", system.get("/v1/wallets").header("Authorization", format!("Bearer {token}")), who()),
        asking("nothing", ""),
        asking("Bearer and nothing", "Bearer"),
        asking("Bearer and a blank", "Bearer  "),
        asking("Basic", "Basic YWRtaW46YWRtaW4="),
        asking("the token alone", token),
        asking("another scheme", &format!("Token {token}")),
        asking("a list", &format!("Basic YTpi, Bearer {token}")),
        asking("garbage", "Bearer garbage"),
        asking("three parts of garbage", "Bearer a.b.c"),
        asking("garbage that is not ASCII", "Bearer ä.ö.ü"),
        asking("garbage of 10 KB", &format!("Bearer {}", "a".repeat(10_000))),
        asking("SQL", "Bearer ' or '1'='1"),
        asking("a token that is only begun", &format!("Bearer {}", token.split('.').next().unwrap())),
    ];
    cases.push(case(
        "a scheme in small letters",
        Request::get("/v1/wallets").header("Authorization", format!("bearer {token}")),
        taken(200),
    ));
    cases
}

/// Made of a good token, each with one thing changed.
async fn forged(system: &mut System) -> Vec<Case> {
    let token = system.partner.clone();
    let [header, claims, signature] = token.split('.').collect::<Vec<_>>()[..] else { panic!("not a JWT: {token}") };
    let (header_is, claims_are) = (decoded(header), decoded(claims));
    let key = public_key(system, header_is["kid"].as_str().unwrap()).await;
    let with = |document: &Value, name: &str, value: Value| {
        let mut document = document.clone();
        document[name] = value;
        encoded(&document)
    };
    let mut tokens: Vec<(String, String)> = Vec::new();
    for alg in ["none", "nOnE", "HS256", "RS256", "ES256", "EdDSA ", ""] {
        let header = with(&header_is, "alg", json!(alg));
        tokens.push((format!("alg {alg:?}, its old signature"), format!("{header}.{claims}.{signature}")));
        tokens.push((format!("alg {alg:?}, no signature"), format!("{header}.{claims}.")));
    }
    let hmac_header = with(&header_is, "alg", json!("HS256"));
    let signed = format!("{hmac_header}.{claims}");
    let mac = Hmac::<Sha256>::new_from_slice(&key).unwrap().chain_update(&signed).finalize().into_bytes();
    tokens.push(("HS256 with our public key for a secret".into(), format!("{signed}.{}", URL_SAFE_NO_PAD.encode(mac))));
    for kid in
        ["../../x", "' or 1=1--", "", "00000000-0000-0000-0000-000000000000", "http://evil.example/key", "\u{0}", "1"]
    {
        tokens.push((format!("kid {kid:?}"), format!("{}.{claims}.{signature}", with(&header_is, "kid", json!(kid)))));
    }
    for field in ["jku", "jwk", "x5u", "x5c", "crit", "b64"] {
        tokens.push((
            format!("a header with {field}"),
            format!("{}.{claims}.{signature}", with(&header_is, field, json!("https://evil.example/"))),
        ));
    }
    for (claim, value) in [
        ("scope", json!("admin")),
        ("sub", json!("cli_0192f0c1-2d3e-7abc-8def-0123456789ab")),
        ("partner", Value::Null),
        ("exp", json!(9_999_999_999_i64)),
        ("nbf", json!(0)),
        ("aud", json!("elsewhere")),
        ("iss", json!("elsewhere")),
    ] {
        tokens
            .push((format!("57 another {claim}"), format!("{header}.{}.{signature}", with(&claims_are, claim, value))));
    }
    tokens.push(("an empty signature".into(), format!("{header}.{claims}.")));
    tokens.push(("a signature of zeros".into(), format!("{header}.{claims}.{}", URL_SAFE_NO_PAD.encode([0; 64]))));
    tokens.push(("a signature that is cut short".into(), format!("{header}.{claims}.{}", &signature[..40])));
    tokens.push(("a signature and more".into(), format!("{token}AA")));
    tokens.push(("a signature with its last letter changed".into(), changed_last(&token)));
    tokens.push(("padding".into(), format!("{token}==")));
    let refuse = |(name, token): (String, String)| {
        let expected = refused(401, "token-invalid").header("www-authenticate", "invalid_token");
        case(format!("56 {name}"), system.transfer().bearer(&token), expected)
    };
    tokens.into_iter().map(refuse).collect()
}

async fn over(system: &System) -> Vec<Case> {
    let pair = |who: &str| {
        let credentials = &system.daybook.connection[who];
        Request::post("/v1/auth/token").json(credentials)
    };
    let revoked = || refused(401, "token-revoked").header("www-authenticate", "invalid_token");
    let first = system.done(pair("demoPartner"), 200).await;
    let (access, refresh) = (text(&first["accessToken"]), text(&first["refreshToken"]));
    let again = |refresh: &str| Request::post("/v1/auth/refresh").json(&json!({"refreshToken": refresh}));
    let second = system.done(pair("demoPartner"), 200).await;
    let (access_2, refresh_2) = (text(&second["accessToken"]), text(&second["refreshToken"]));
    vec![
        case("58 after a logout", Request::post("/v1/auth/logout").bearer(&access), taken(204))
            .then(system.transfer().bearer(&access), revoked())
            .then(Request::get("/v1/wallets").bearer(&access), revoked())
            .then(again(&refresh), refused(401, "token-revoked"))
            .then(Request::post("/v1/auth/logout").bearer(&access), revoked()),
        case("58 a refresh token twice", again(&refresh_2), taken(200))
            .then(again(&refresh_2), refused(401, "token-revoked"))
            .then(system.transfer().bearer(&access_2), revoked()),
        case(
            "a refresh token as an access token",
            system.transfer().bearer(&refresh_2),
            refused(401, "unauthenticated"),
        ),
        case("an access token as a refresh token", again(&access_2), refused(401, "token-invalid")),
        case("a refresh token that is none", again("junk"), refused(401, "token-invalid")),
        case("a refresh token of 10 KB", again(&"a".repeat(10_000)), refused(422, "invalid-field").at("/refreshToken")),
        case("an empty refresh token", again(""), refused(401, "token-invalid")),
    ]
}

fn beyond(system: &System) -> Vec<Case> {
    let no = || refused(403, "insufficient-scope");
    let post =
        |target: &str, token: &str, body: &Value| Request::post(target).bearer(token).key(fresh_key()).json(body);
    let adjust =
        json!({"walletId": system.alice, "direction": "CREDIT", "amount": "1.00", "currency": "EUR", "reason": "r"});
    let transaction = "/v1/transactions/txn_0192f0c1-2d3e-7abc-8def-0123456789ab";
    let partner = &system.partner;
    vec![
        case(
            "59 a partner registers partners",
            post("/v1/partners", partner, &json!({"name": "a", "currencies": ["EUR"]})),
            no(),
        ),
        case("59 a partner reads partners", system.get("/v1/partners"), no()),
        case("59 a partner makes money", post("/v1/transactions/adjustment", partner, &adjust), no()),
        case("59 a partner makes money, badly written", post("/v1/transactions/adjustment", partner, &json!([])), no()),
        case(
            "59 a partner settles",
            post(
                &format!("{transaction}/settle"),
                partner,
                &json!({"amount": "1.00", "currency": "EUR", "bankReference": "b"}),
            ),
            no(),
        ),
        case(
            "59 a partner fails",
            post(&format!("{transaction}/fail"), partner, &json!({"code": "c", "detail": "d"})),
            no(),
        ),
        case("59 a partner expires", post(&format!("{transaction}/expire"), partner, &json!({})), no()),
        case("59 a partner reads the log", system.get("/v1/events"), no()),
        case("59 a partner streams the log", system.get("/v1/events").header("Accept", "application/x-ndjson"), no()),
    ]
}

fn logins(system: &System) -> Vec<Case> {
    let login = |body: &Value| Request::post("/v1/auth/token").json(body);
    let client = system.daybook.connection["demoPartner"]["clientId"].clone();
    let secret = system.daybook.connection["demoPartner"]["clientSecret"].clone();
    let no = || refused(401, "invalid-client");
    let tries: [(&str, Value, Value, Expected); 9] = [
        ("a wrong secret", client.clone(), json!("dbs_wrong"), no()),
        ("an empty secret", client.clone(), json!(""), no()),
        (
            "a secret of 10 KB",
            client.clone(),
            json!("s".repeat(10_000)),
            refused(422, "invalid-field").at("/clientSecret"),
        ),
        ("an unknown client", json!("cli_0192f0c1-2d3e-7abc-8def-0123456789ab"), secret.clone(), no()),
        ("a client that is no id", json!("admin"), secret.clone(), no()),
        ("a client that would be SQL", json!("' or 1=1--"), secret.clone(), no()),
        ("a secret that is a number", client.clone(), json!(1), refused(422, "invalid-field").at("/clientSecret")),
        ("a client with a NUL", json!("cli\u{0}"), secret.clone(), refused(422, "invalid-character").at("/clientId")),
        (
            "a query for a secret",
            client.clone(),
            json!({"$ne": null}),
            refused(422, "invalid-field").at("/clientSecret"),
        ),
    ];
    let mut cases: Vec<Case> = tries
        .into_iter()
        .map(|(name, id, secret, expected)| {
            case(format!("a login with {name}"), login(&json!({"clientId": id, "clientSecret": secret})), expected)
        })
        .collect();
    cases.push(case(
        "a login as a form",
        Request::post("/v1/auth/token")
            .body("grant_type=client_credentials")
            .with("Content-Type", "application/x-www-form-urlencoded"),
        refused(415, "unsupported-media-type"),
    ));
    cases
}

/// Our public key, which everybody may know.
async fn public_key(system: &mut System, id: &str) -> Vec<u8> {
    let query = "select public_key from access.signing_keys where kid::text = $1";
    sqlx::query_scalar(query).bind(id).fetch_one(system.database()).await.unwrap()
}

fn decoded(part: &str) -> Value {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap()
}

fn encoded(part: &Value) -> String {
    URL_SAFE_NO_PAD.encode(part.to_string())
}

fn changed_last(token: &str) -> String {
    let last = token.chars().last().unwrap();
    let other = if last == 'A' { 'Q' } else { 'A' };
    format!("{}{other}", &token[..token.len() - 1])
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}
