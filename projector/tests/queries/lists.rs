//! Lists: newest first, page by page, by filters; and cursors that continue the list they came from and no other.

use ledger_core::Action;

use crate::system::{System, ids, transaction_of};

#[tokio::test]
async fn pages_follow_each_other_without_repeating_or_skipping_while_the_list_grows() {
    let system = System::start().await;
    let partner = system.partner().await;
    let mut wallets = vec![partner.settlement.to_string()];
    for _ in 0..7 {
        wallets.push(system.wallet(&partner, "alice").await.to_string());
    }
    wallets.reverse();
    system.caught_up().await;
    for limit in [1, 3, 8, 100] {
        assert_eq!(ids(&partner.all("/v1/wallets", limit).await), wallets);
    }
    let first = partner.get("/v1/wallets?limit=5").await;
    let newer = system.wallet(&partner, "bob").await;
    system.caught_up().await;
    let cursor = first["nextCursor"].as_str().unwrap();
    let second = partner.get(&format!("/v1/wallets?limit=5&cursor={cursor}")).await;
    assert_eq!(ids(second["data"].as_array().unwrap()), wallets[5..]);
    assert_eq!(partner.get("/v1/wallets?limit=1").await["data"][0]["id"], newer.to_string());
}

#[tokio::test]
async fn a_cursor_of_another_list_filter_or_partner_is_refused() {
    let system = System::start().await;
    let partner = system.partner().await;
    let (from, to) = (system.wallet(&partner, "alice").await, system.wallet(&partner, "alice").await);
    system.fund(&partner, from, "9.00").await;
    for _ in 0..3 {
        system.transfer(&partner, from, to, "1.00").await;
    }
    system.caught_up().await;
    let cursor = partner.get("/v1/wallets?limit=1&userId=alice").await["nextCursor"].as_str().unwrap().to_owned();
    let fine = format!("/v1/wallets?limit=1&userId=alice&cursor={cursor}");
    assert_eq!(ids(partner.get(&fine).await["data"].as_array().unwrap()), [from.to_string()]);
    let other = system.partner().await;
    system.caught_up().await;
    assert_eq!(other.problem(&fine).await, "400 cursor-invalid");
    let entries = partner.get(&format!("/v1/wallets/{from}/entries?limit=1")).await["nextCursor"].clone();
    let entries = entries.as_str().unwrap();
    let (most, last) = cursor.split_at(cursor.len() - 1);
    let forged = format!("{most}{}", if last == "A" { 'B' } else { 'A' });
    for path in [
        format!("/v1/wallets?limit=1&cursor={cursor}"),
        format!("/v1/wallets?userId=bob&cursor={cursor}"),
        format!("/v1/transactions?userId=alice&cursor={cursor}"),
        format!("/v1/wallets/{to}/entries?cursor={entries}"),
        "/v1/wallets?cursor=junk".to_owned(),
        format!("/v1/wallets?userId=alice&cursor={forged}"),
    ] {
        assert_eq!(partner.problem(&path).await, "400 cursor-invalid", "{path}");
    }
    for limit in ["0", "-1", "101", "1000000000", "abc", "1.5", ""] {
        let problem = partner.problem(&format!("/v1/wallets?limit={limit}")).await;
        assert_eq!(problem, "422 limit-out-of-range", "{limit}");
    }
}

#[tokio::test]
async fn wallets_are_found_by_user_currency_and_status() {
    let system = System::start().await;
    let partner = system.partner().await;
    let (alice, bob) = (system.wallet(&partner, "alice").await, system.wallet(&partner, "bob").await);
    let freeze = Action::FreezeWallet { wallet: bob, reason: "lost".to_owned() };
    let position = system.execute(partner.caller(), freeze).await.position();
    let found = |query: &str| {
        let path = format!("/v1/wallets?minPosition={position}&{query}");
        let partner = partner.clone();
        async move { ids(partner.get(&path).await["data"].as_array().unwrap()).join(" ") }
    };
    assert_eq!(found("userId=alice").await, alice.to_string());
    assert_eq!(found("status=FROZEN").await, bob.to_string());
    assert_eq!(found("status=ACTIVE&userId=bob").await, "");
    assert_eq!(found("currency=EUR&userId=bob").await, bob.to_string());
    assert_eq!(found("currency=USD").await, "");
    assert_eq!(partner.problem("/v1/wallets?currency=ZZZ").await, "422 currency-unknown");
    assert_eq!(partner.problem("/v1/wallets?status=frozen").await, "422 invalid-field");
    assert_eq!(partner.problem("/v1/wallets?colour=red").await, "422 unknown-field");
    assert_eq!(partner.problem("/v1/wallets/wal_1").await, "400 invalid-id");
    assert_eq!(partner.problem(&format!("/v1/wallets/{}", partner.partner)).await, "400 invalid-id");
    let wallet = partner.get(&format!("/v1/wallets/{bob}")).await;
    assert_eq!((wallet["status"].as_str(), wallet["version"].as_i64()), (Some("FROZEN"), Some(2)));
}

#[tokio::test]
async fn transactions_are_found_by_every_filter_and_refused_ones_are_among_them() {
    let system = System::start().await;
    let partner = system.partner().await;
    let (from, to) = (system.wallet(&partner, "alice").await, system.wallet(&partner, "bob").await);
    let funded = transaction_of(&system.fund(&partner, from, "10.00").await);
    let moved = system
        .transfer_with(&partner, from, to, "1.00", |instruction| {
            instruction.reference = Some("order 7".to_owned());
            instruction.user_id = Some("alice".into());
        })
        .await;
    let refused = system.transfer(&partner, to, from, "99.00").await;
    let top_up = system.request_top_up(&partner, to, "3.00").await;
    let position = system.head().await;
    let [moved_id, refused_id] = [&moved, &refused].map(transaction_of);
    let moved_at = moved.events()[0].recorded_at;
    let found = |query: String| {
        let path = format!("/v1/transactions?minPosition={position}&{query}");
        let partner = partner.clone();
        async move { ids(partner.get(&path).await["data"].as_array().unwrap()).join(" ") }
    };
    let all = format!("{top_up} {refused_id} {moved_id} {funded}");
    for (query, expected) in [
        (String::new(), all.clone()),
        (format!("walletId={from}"), format!("{refused_id} {moved_id} {funded}")),
        (format!("walletId={to}&type=TRANSFER"), format!("{refused_id} {moved_id}")),
        ("userId=alice".to_owned(), moved_id.to_string()),
        ("type=TOP_UP".to_owned(), top_up.to_string()),
        ("status=FAILED".to_owned(), refused_id.to_string()),
        ("status=PENDING".to_owned(), top_up.to_string()),
        ("status=REVERSED".to_owned(), String::new()), // named by the contract, and none yet
        ("type=PAYOUT".to_owned(), String::new()),
        ("reference=order%207".to_owned(), moved_id.to_string()),
        ("idempotencyKey=order%207".to_owned(), moved_id.to_string()),
        ("idempotencyKey=order%208".to_owned(), String::new()),
        (format!("from={moved_at}&to={moved_at}"), moved_id.to_string()),
        (format!("to={moved_at}"), format!("{moved_id} {funded}")),
        ("from=1976-01-01T00:00:00Z&to=2026-01-01T00:00:00Z".to_owned(), String::new()),
    ] {
        assert_eq!(found(query.clone()).await, expected, "{query}");
    }
    assert_eq!(ids(&partner.all("/v1/transactions", 1).await).join(" "), all);
    assert_eq!(partner.problem("/v1/transactions?status=DONE").await, "422 invalid-field");
    assert_eq!(partner.problem("/v1/transactions?type=transfer").await, "422 invalid-field");

    let body = partner.get(&format!("/v1/transactions/{refused_id}")).await;
    assert_eq!((&body["status"], &body["failure"]["code"]), (&"FAILED".into(), &"insufficient-funds".into()));
    let body = partner.get(&format!("/v1/transactions/{moved_id}")).await;
    assert_eq!(body["ledgerPosition"], moved.position());
    assert_eq!(body["entries"][1]["balanceAfter"], "1.00");
}

#[tokio::test]
async fn lists_statements_and_balances_of_the_past_end_and_begin_anywhere_within_what_was_folded_at_once() {
    let mut system = System::start().await;
    let partner = system.partner().await;
    let (from, to) = (system.wallet(&partner, "alice").await, system.wallet(&partner, "bob").await);
    let mut begun = vec![transaction_of(&system.fund(&partner, from, "300.00").await).to_string()];
    system.caught_up().await;
    system.stop_projecting().await; // so that the next page has them all
    let mut positions = Vec::new();
    for _ in 0..230 {
        let moved = system.transfer(&partner, from, to, "1.00").await;
        begun.push(transaction_of(&moved).to_string());
        positions.push(moved.position());
    }
    system.project();
    system.caught_up().await;
    begun.reverse();
    for limit in [9, 100] {
        assert_eq!(ids(&partner.all("/v1/transactions", limit).await), begun, "{limit}");
        assert_eq!(ids(&partner.all(&format!("/v1/transactions?walletId={from}"), limit).await), begun, "{limit}");
        let entries = partner.all(&format!("/v1/wallets/{to}/entries"), limit).await;
        let shown: Vec<_> = entries.iter().map(|entry| entry["position"].as_i64().unwrap()).collect();
        assert!(shown.iter().eq(positions.iter().rev()), "{limit}: {shown:?}");
    }
    for (moved, position) in (1..).zip(&positions).step_by(11) {
        let balance = partner.get(&format!("/v1/wallets/{to}/balance?atPosition={position}")).await;
        assert_eq!(balance["balance"], format!("{moved}.00"));
    }
}
