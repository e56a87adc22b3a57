//! The past: what a wallet held at a position, as of a time, and as the ledger knew it.

use ledger_core::Timestamp;

use crate::system::System;

fn at(receipt: &ledger_engine::Receipt) -> Timestamp {
    receipt.events().last().unwrap().recorded_at
}

#[tokio::test]
async fn backdated_money_counts_from_when_it_is_effective_and_is_known_from_when_it_was_recorded() {
    let system = System::start().await;
    let partner = system.partner().await;
    let wallet = system.wallet(&partner, "alice").await;
    let opened = at(&system.fund(&partner, partner.settlement, "1.00").await); // any event: a time before all that follows
    let first = system.fund(&partner, wallet, "1.00").await;
    let between = at(&system.fund(&partner, partner.settlement, "1.00").await);
    let third = system.transfer(&partner, wallet, partner.settlement, "0.30").await;
    let backdated = system.fund_at(&partner, wallet, "0.50", Some(between)).await;
    assert!(opened < at(&first) && at(&first) < between && between < at(&third) && at(&third) < at(&backdated));

    let position = backdated.position();
    let balance = |query: String| {
        let path = format!("/v1/wallets/{wallet}/balance?minPosition={position}{query}");
        let partner = partner.clone();
        async move { partner.get(&path).await["balance"].as_str().unwrap().to_owned() }
    };
    let (t1, t3, now) = (at(&first), at(&third), at(&backdated));
    for (query, expected) in [
        (String::new(), "1.20"),
        (format!("&asOf={between}"), "1.50"),
        (format!("&asOf={between}&knownAt={t3}"), "1.00"),
        (format!("&asOf={t1}"), "1.00"),
        (format!("&asOf={opened}"), "0.00"),
        (format!("&asOf={now}"), "1.20"),
        (format!("&knownAt={t3}"), "0.70"),
        (format!("&knownAt={t1}"), "1.00"),
        (format!("&knownAt={opened}"), "0.00"),
        (format!("&knownAt={now}"), "1.20"),
        (format!("&atPosition={}", first.position()), "1.00"),
        (format!("&atPosition={}", third.position() - 1), "1.00"),
        (format!("&atPosition={}", third.position()), "0.70"),
        (format!("&atPosition={}", first.position() - 1), "0.00"),
        (format!("&atPosition={position}"), "1.20"),
    ] {
        assert_eq!(balance(query.clone()).await, expected, "{query}");
    }
    let path = format!("/v1/wallets/{wallet}/balance?atPosition={}", third.position());
    assert_eq!(partner.get(&path).await["ledgerPosition"], third.position());
    for (query, problem) in [
        ("asOf=yesterday", "422 time-format"),
        ("knownAt=2026-13-01T00:00:00Z", "422 time-format"),
        ("atPosition=1&asOf=2026-01-01T00:00:00Z", "422 invalid-field"),
        ("atPosition=-1", "422 position-unknown"),
        ("asof=2026-01-01T00:00:00Z", "422 unknown-field"),
    ] {
        assert_eq!(partner.problem(&format!("/v1/wallets/{wallet}/balance?{query}")).await, problem, "{query}");
    }
}

#[tokio::test]
async fn a_statement_shows_each_entry_with_what_there_was_after_it() {
    let system = System::start().await;
    let partner = system.partner().await;
    let wallet = system.wallet(&partner, "alice").await;
    system.fund(&partner, wallet, "100.00").await;
    let transfer = system
        .transfer_with(&partner, wallet, partner.settlement, "30.00", |instruction| {
            instruction.description = Some("<script>".to_owned());
            instruction.effective_at = Some("2026-01-02T03:04:05Z".parse().unwrap());
        })
        .await;
    let top_up = system.request_top_up(&partner, wallet, "5.00").await;
    let settled = system.settle(top_up, "5.00").await;
    let path = format!("/v1/wallets/{wallet}/entries");
    let page = partner.get(&format!("{path}?minPosition={}", settled.position())).await;
    let entries = page["data"].as_array().unwrap();
    let shown: Vec<_> = entries
        .iter()
        .map(|entry| {
            let text = |name: &str| entry[name].as_str().unwrap_or("-").to_owned();
            ["type", "direction", "amount", "balanceAfter", "description"].map(text).join(" ")
        })
        .collect();
    assert_eq!(
        shown,
        ["TOP_UP CREDIT 5.00 75.00 -", "TRANSFER DEBIT 30.00 70.00 <script>", "ADJUSTMENT CREDIT 100.00 100.00 -"]
    );
    assert_eq!(entries[1]["effectiveAt"], "2026-01-02T03:04:05.000000Z");
    assert_eq!(entries[1]["recordedAt"], at(&transfer).to_string());
    assert_eq!(entries[1]["position"], transfer.position());
    assert_eq!(entries[0]["effectiveAt"], at(&settled).to_string());
    assert!(entries[0].get("description").is_none());

    let count = |query: &str| {
        let path = format!("{path}?{query}");
        let partner = partner.clone();
        async move { partner.get(&path).await["data"].as_array().unwrap().len() }
    };
    assert_eq!(count("type=TRANSFER").await, 1);
    assert_eq!(count("from=2026-01-02T03:04:05Z&to=2026-01-02T03:04:05Z").await, 1);
    assert_eq!(count(&format!("from={}", at(&transfer))).await, 1);
    assert_eq!(count("from=1970-01-01T00:00:00Z&to=2100-01-01T00:00:00Z").await, 3);
    assert_eq!(partner.problem(&format!("{path}?type=transfer")).await, "422 invalid-field");
    let backwards = format!("{path}?from=2026-01-02T00:00:00Z&to=2026-01-01T00:00:00Z");
    assert_eq!(partner.problem(&backwards).await, "422 time-range-invalid");
}
