//! Who sees what: a partner its own and nothing of others, the operator everything.

use ledger_core::{Action, WalletId, WalletKind};
use serde_json::Value;

use crate::system::{System, eur, ids, transaction_of, wallet_id};

#[tokio::test]
async fn another_partners_things_answer_exactly_as_absent_ones() {
    let system = System::start().await;
    let (partner, other) = (system.partner().await, system.partner().await);
    let wallet = system.wallet(&partner, "alice").await;
    let transaction = transaction_of(&system.fund(&partner, wallet, "5.00").await);
    system.caught_up().await;
    // What an answer says of itself differs from call to call, and nothing else may.
    let seen = |path: String| {
        let other = other.clone();
        async move {
            let answer = other.call(&path).await;
            let mut body = answer.json();
            for own in ["requestId", "instance"] {
                body.as_object_mut().unwrap().insert(own.to_owned(), Value::Null);
            }
            let mut headers: Vec<_> = answer.headers.keys().map(|name| name.as_str().to_owned()).collect();
            headers.sort();
            (answer.status.as_u16(), body, headers)
        }
    };
    let nobody = wallet_id();
    for rest in ["", "/balance", "/entries", "/balance?atPosition=1"] {
        let theirs = seen(format!("/v1/wallets/{wallet}{rest}")).await;
        assert_eq!(theirs.0, 404);
        assert_eq!(theirs, seen(format!("/v1/wallets/{nobody}{rest}")).await, "{rest}");
    }
    let theirs = seen(format!("/v1/transactions/{transaction}")).await;
    assert_eq!(theirs, seen("/v1/transactions/txn_0192f0c1-2d3e-7abc-8def-0123456789ab".to_owned()).await);
    assert_eq!(theirs.0, 404);
    assert_eq!(ids(&other.all("/v1/wallets", 100).await), [other.settlement.to_string()]);
    assert!(other.all("/v1/transactions", 100).await.is_empty());
    assert!(other.all(&format!("/v1/transactions?walletId={wallet}"), 100).await.is_empty());
}

#[tokio::test]
async fn the_operator_sees_everything_and_a_partner_nothing_of_the_systems_wallets() {
    let system = System::start().await;
    let (partner, admin) = (system.partner().await, system.admin().await);
    let wallet = system.wallet(&partner, "alice").await;
    let transaction = transaction_of(&system.fund(&partner, wallet, "5.00").await);
    system.caught_up().await;
    let adjustments = WalletId::system(WalletKind::Adjustments, eur());
    assert_eq!(partner.problem(&format!("/v1/wallets/{adjustments}")).await, "404 wallet-not-found");
    assert_eq!(admin.get(&format!("/v1/wallets/{adjustments}")).await["balance"], "-5.00");
    assert_eq!(admin.get(&format!("/v1/wallets/{wallet}")).await["balance"], "5.00");
    let after = |body: &Value| -> Vec<Option<String>> {
        let entries = body["entries"].as_array().unwrap().iter();
        entries.map(|entry| entry["balanceAfter"].as_str().map(str::to_owned)).collect()
    };
    let path = format!("/v1/transactions/{transaction}");
    assert_eq!(after(&partner.get(&path).await), [None, Some("5.00".to_owned())]);
    assert_eq!(after(&partner.get("/v1/transactions").await["data"][0]), [None, Some("5.00".to_owned())]);
    assert_eq!(after(&admin.get(&path).await), [Some("-5.00".to_owned()), Some("5.00".to_owned())]);
}

#[tokio::test]
async fn partners_are_the_operators_to_list() {
    let system = System::start().await;
    let (first, second, admin) = (system.partner().await, system.partner().await, system.admin().await);
    system.caught_up().await;
    let partners = admin.all("/v1/partners", 1).await;
    assert_eq!(ids(&partners), [second.partner.to_string(), first.partner.to_string()]);
    let shown = admin.get(&format!("/v1/partners/{}", first.partner)).await;
    assert_eq!(shown, partners[1]);
    assert_eq!((&shown["name"], &shown["currencies"][0]), (&"Acme".into(), &"EUR".into()));
    assert_eq!(ids(shown["wallets"].as_array().unwrap()), [first.settlement.to_string()]);
    assert_eq!(admin.problem(&format!("/v1/partners/{}", admin.partner)).await, "400 invalid-id"); // the nil id
    let nobody = "/v1/partners/par_0192f0c1-2d3e-7abc-8def-0123456789ab";
    assert_eq!(admin.problem(nobody).await, "404 partner-not-found");
    for path in ["/v1/partners".to_owned(), format!("/v1/partners/{}", first.partner), "/v1/events".to_owned()] {
        assert_eq!(first.problem(&path).await, "403 insufficient-scope", "{path}");
    }
}

#[tokio::test]
async fn a_partner_shows_whether_it_may_act() {
    let system = System::start().await;
    let (partner, other, admin) = (system.partner().await, system.partner().await, system.admin().await);
    let id = partner.partner;
    for (action, status) in [
        (Action::SuspendPartner { partner: id, reason: None }, "SUSPENDED"),
        (Action::RotateSecret { partner: id }, "SUSPENDED"),
        (Action::ResumePartner { partner: id }, "ACTIVE"),
    ] {
        system.execute(ledger_core::Caller::Admin, action).await;
        system.caught_up().await;
        assert_eq!(admin.get(&format!("/v1/partners/{id}")).await["status"], status);
        assert_eq!(admin.get(&format!("/v1/partners/{}", other.partner)).await["status"], "ACTIVE");
    }
}
