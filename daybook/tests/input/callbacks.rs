//! The bank's door, which has no token: whoever knocks must have signed, now, exactly these bytes.

use std::time::{SystemTime, UNIX_EPOCH};

use hmac::{Hmac, Mac};
use serde_json::{Value, json};
use sha2::Sha256;

use crate::system::{System, fresh_key};
use crate::table::{Case, case, refused, taken};
use crate::wire::Request;

pub(crate) async fn table(system: &System) -> Vec<Case> {
    let (one, two, three) = (begun(system).await, begun(system).await, begun(system).await);
    let word = |token: &str, status: &str, amount: &str, reference: &str| json!({"token": token, "status": status, "amount": amount, "currency": "EUR", "bankReference": reference});
    let good = word(&one, "success", "5.00", "B-1").to_string();
    let now = now();
    let secret = &system.bank_secret;
    let invalid = || refused(401, "signature-invalid");
    let late = || refused(401, "timestamp-out-of-tolerance");
    let signature = sign(secret, now, good.as_bytes());
    let knock = || Request::post("/v1/callbacks/bank").body(&good).header("X-Bank-Timestamp", now.to_string());
    let signed_at = |at: u64| signed(secret, at, good.as_bytes());
    let said = |body: &Value| signed(secret, now, body.to_string().as_bytes());
    let mut cases = vec![
        case("65 no signature", knock(), invalid()),
        case("65 an empty signature", knock().header("X-Bank-Signature", ""), invalid()),
        case("65 no timestamp", knock().header("X-Bank-Signature", &signature).without("X-Bank-Timestamp"), invalid()),
        case("65 a signature that is no hex", knock().header("X-Bank-Signature", "sha256=zz"), invalid()),
        case("65 half a signature", knock().header("X-Bank-Signature", &signature[..39]), invalid()),
        case("65 a signature and more", knock().header("X-Bank-Signature", format!("{signature}00")), invalid()),
        case(
            "65 a signature of another kind",
            knock().header("X-Bank-Signature", signature.replace("sha256", "sha1")),
            invalid(),
        ),
        case("65 a signature without its kind", knock().header("X-Bank-Signature", &signature[7..]), invalid()),
        case(
            "65 two signatures",
            knock().header("X-Bank-Signature", &signature).header("X-Bank-Signature", &signature),
            invalid(),
        ),
        case("65 a signature that is not ASCII", knock().header("X-Bank-Signature", "sha256=ä"), invalid()),
        case(
            "65 a signature of 10 KB",
            knock().header("X-Bank-Signature", format!("sha256={}", "0".repeat(10_000))),
            invalid(),
        ),
        case("65 another secret", signed("secret", now, good.as_bytes()), invalid()),
        case("65 another body", signed(secret, now, good.as_bytes()).body(good.replace("5.00", "6.00")), invalid()),
        case("65 a blank more", signed(secret, now, good.as_bytes()).body(format!("{good} ")), invalid()),
        case(
            "65 another time than was signed",
            signed(secret, now, good.as_bytes()).with("X-Bank-Timestamp", (now - 1).to_string()),
            invalid(),
        ),
        case("65 a timestamp in milliseconds", signed_at(now * 1_000), late()),
        case("65 a timestamp of 1970", signed_at(0), late()),
        case("65 301 seconds ago", signed_at(now - 330), late()),
        case("65 in 301 seconds", signed_at(now + 330), late()),
        case("65 the last of all seconds", signed_at(u64::MAX), late()),
        case("65 a timestamp beyond that", signed_at(now).with("X-Bank-Timestamp", "99999999999999999999"), invalid()),
        case("65 a negative timestamp", signed_at(now).with("X-Bank-Timestamp", "-1"), invalid()),
        case("65 a timestamp with a sign", signed_at(now).with("X-Bank-Timestamp", format!("+{now}")), invalid()),
        case("65 a timestamp that is none", signed_at(now).with("X-Bank-Timestamp", "now"), invalid()),
        case("65 two timestamps", signed_at(now).header("X-Bank-Timestamp", now.to_string()), invalid()),
        case("65 a token instead of a signature", knock().bearer(&system.admin), invalid()),
        case("65 not JSON, and not signed", knock().body("{").header("X-Bank-Signature", &signature), invalid()),
        case("signed, and no JSON", signed(secret, now, b"{"), refused(400, "malformed-json")),
        case("signed, and no UTF-8", signed(secret, now, b"{\"token\":\"\xff\"}"), refused(400, "malformed-json")),
        case(
            "signed, and of another type",
            signed(secret, now, good.as_bytes()).with("Content-Type", "text/plain"),
            refused(415, "unsupported-media-type"),
        ),
        case("signed, and too large", signed(secret, now, &vec![b' '; 65_537]), refused(413, "payload-too-large")),
        case(
            "signed, and a word that is none",
            said(&word(&one, "maybe", "5.00", "B")),
            refused(422, "invalid-field").at("/status"),
        ),
        case(
            "signed, and a field too many",
            said(
                &json!({"token": one, "status": "success", "amount": "5.00", "currency": "EUR", "bankReference": "B", "admin": true}),
            ),
            refused(422, "unknown-field").at("/admin"),
        ),
        case(
            "signed, and an amount as a number",
            said(&json!({"token": one, "status": "success", "amount": 5, "currency": "EUR", "bankReference": "B"})),
            refused(422, "amount-format"),
        ),
        case(
            "signed, and a NUL",
            said(&word(&one, "success", "5.00", "\u{0}")),
            refused(422, "invalid-character").at("/bankReference"),
        ),
        case(
            "signed, and no token",
            said(&word("", "success", "5.00", "B")),
            refused(422, "invalid-field").at("/token"),
        ),
        case(
            "66 an unknown payment",
            said(&word("pay_unknown", "success", "5.00", "B-0")),
            taken(202).contains("quarantined"),
        ),
        case(
            "66 another amount",
            said(&word(&one, "success", "5.01", "B-2")),
            refused(422, "callback-mismatch").alerting(),
        ),
        case(
            "66 another currency",
            said(
                &json!({"token": one, "status": "success", "amount": "5.00", "currency": "USD", "bankReference": "B-3"}),
            ),
            refused(422, "callback-mismatch").alerting(),
        ),
    ];
    // Money moves with the first good word, and with none after it.
    cases.push(
        case("66 the bank's word, and again", said(&word(&two, "success", "5.00", "B-4")), taken(200).moving_money())
            .then(said(&word(&two, "success", "5.00", "B-4")), taken(200))
            .then(said(&word(&two, "failure", "5.00", "B-4")), refused(409, "callback-conflict").alerting())
            .then(said(&word(&two, "success", "5.00", "B-5")), refused(409, "callback-conflict").alerting())
            .then(said(&word(&two, "failure", "5.00", "B-6")), refused(409, "invalid-transition").alerting())
            .then(said(&word(&two, "success", "6.00", "B-4")), refused(409, "callback-conflict").alerting()),
    );
    cases.push(
        case("66 the bank says no, then yes", said(&word(&three, "failure", "5.00", "B-7")), taken(200))
            .then(said(&word(&three, "success", "5.00", "B-8")), refused(409, "invalid-transition").alerting()),
    );
    cases
}

/// The payment's token of a top-up that has begun.
async fn begun(system: &System) -> String {
    let body = json!({"walletId": system.alice, "amount": "5.00", "currency": "EUR"});
    let request = Request::post("/v1/transactions/top-up").bearer(&system.partner).key(fresh_key()).json(&body);
    system.done(request, 202).await["token"].as_str().unwrap().to_owned()
}

fn signed(secret: &str, at: u64, body: &[u8]) -> Request {
    let request = Request::post("/v1/callbacks/bank").body(body).header("X-Bank-Timestamp", at.to_string());
    request.header("X-Bank-Signature", sign(secret, at, body))
}

fn sign(secret: &str, at: u64, body: &[u8]) -> String {
    let mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
    let mac = mac.chain_update(format!("{at}.")).chain_update(body).finalize().into_bytes();
    let hex: String = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256={hex}")
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}
