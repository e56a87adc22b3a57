//! The aggregates through cqrs-es' own door: given this past, when this is asked, then that follows.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

use std::sync::Arc;

use cqrs_es::test::TestFramework;
use ledger_core::*;

const WALLET: &str = "wal_0192f0c1-2d3e-7abc-8def-0123456789ab";
const PARTNER: &str = "par_0192f0c1-2d3e-7abc-8def-0123456789ad";

fn caller() -> Caller {
    Caller::Partner { partner: PARTNER.parse().unwrap(), user: None }
}

fn opened() -> WalletEvent {
    let currency: Currency = "EUR".parse().unwrap();
    WalletEvent::Opened {
        kind: WalletKind::Customer,
        partner_id: Some(PARTNER.parse().unwrap()),
        user_id: Some("user-1".into()),
        currency,
        metadata: Metadata::new(),
        wallet_version: 1,
        balance_after: Balance::zero(currency),
    }
}

fn frozen(version: i64, balance: &str) -> WalletEvent {
    WalletEvent::Frozen {
        reason: "stolen".to_owned(),
        wallet_version: version,
        balance_after: balance.parse().unwrap(),
    }
}

fn check_wallet(given: Vec<WalletEvent>, when: WalletCommand, then: Result<Vec<WalletEvent>, Refusal>) {
    let answer = TestFramework::<Wallet>::with(Book::default()).given(given).when(when);
    assert_eq!(answer.inspect_result(), then);
}

#[test]
fn a_wallet_is_frozen_unfrozen_and_closed_in_that_order_only() {
    let reason = || "stolen".to_owned();
    let freeze = || WalletCommand::Freeze { caller: caller(), reason: reason() };
    let unfreeze = || WalletCommand::Unfreeze { caller: caller(), reason: reason() };
    let close = || WalletCommand::Close { caller: caller(), reason: reason() };
    let zero: Balance = "0.00".parse().unwrap();
    let unfrozen = |wallet_version| WalletEvent::Unfrozen { reason: reason(), wallet_version, balance_after: zero };
    let closed = |wallet_version| WalletEvent::Closed { reason: reason(), wallet_version, balance_after: zero };

    check_wallet(vec![opened()], freeze(), Ok(vec![frozen(2, "0.00")]));
    check_wallet(vec![opened()], unfreeze(), Err(Refusal::WalletNotFrozen));
    check_wallet(vec![opened(), frozen(2, "0.00")], freeze(), Err(Refusal::WalletFrozen));
    check_wallet(vec![opened(), frozen(2, "0.00")], unfreeze(), Ok(vec![unfrozen(3)]));
    check_wallet(vec![opened(), frozen(2, "0.00")], close(), Ok(vec![closed(3)]));
    check_wallet(vec![opened(), closed(2)], unfreeze(), Err(Refusal::WalletClosed));
    check_wallet(vec![opened(), closed(2)], close(), Err(Refusal::WalletClosed));
    check_wallet(vec![], close(), Err(Refusal::WalletNotFound));
}

#[test]
fn another_partners_wallet_does_not_exist() {
    let other = Caller::Partner { partner: "par_0192f0c1-2d3e-7abc-8def-000000000001".parse().unwrap(), user: None };
    let close = |caller| WalletCommand::Close { caller, reason: "mine now".to_owned() };
    check_wallet(vec![opened()], close(other), Err(Refusal::WalletNotFound));
    assert!(Wallet::default().seen_by(&Caller::Admin).is_err());
}

#[test]
fn a_pending_transaction_ends_once() {
    let currency: Currency = "EUR".parse().unwrap();
    let instruction = Arc::new(Instruction {
        kind: TransactionKind::TopUp,
        partner_id: Some(PARTNER.parse().unwrap()),
        user_id: None,
        wallet_id: WALLET.parse().unwrap(),
        to_wallet_id: None,
        direction: None,
        amount: Money::parse("10.50", currency).unwrap().amount(),
        currency,
        reference: None,
        description: None,
        metadata: Metadata::new(),
        effective_at: None,
    });
    let payment = Payment { token: "t".to_owned(), redirect_url: "u".to_owned(), return_url: None };
    let requested = TransactionEvent::Requested { instruction, payment };
    let expired = TransactionEvent::Expired { wallet_id: WALLET.parse().unwrap() };
    let check = |given: Vec<TransactionEvent>, when, then| {
        let answer = TestFramework::<Transaction>::with(Book::default()).given(given).when(when);
        assert_eq!(answer.inspect_result(), then);
    };
    let settle = |amount| TransactionCommand::Settle {
        money: Money::parse(amount, currency).unwrap(),
        provider_reference: "bank-1".to_owned(),
    };
    check(vec![requested.clone()], TransactionCommand::Expire, Ok(vec![expired.clone()]));
    check(vec![], TransactionCommand::Expire, Err(Refusal::TransactionNotFound));
    let ended = Refusal::TransactionEnded { status: TransactionStatus::Expired };
    check(vec![requested.clone(), expired.clone()], TransactionCommand::Expire, Err(ended.clone()));
    check(vec![requested.clone(), expired], settle("10.50"), Err(ended));
    let mismatch = Refusal::SettlementMismatch {
        expected: "10.50".parse().unwrap(),
        currency,
        reported: "10.51".parse().unwrap(),
        reported_currency: currency,
    };
    check(vec![requested], settle("10.51"), Err(mismatch));
}

#[test]
fn a_partner_is_suspended_and_resumed_in_turns_and_its_secret_is_rotated_at_any_time() {
    let client: ClientId = "cli_0192f0c1-2d3e-7abc-8def-0123456789b0".parse().unwrap();
    let registered = || PartnerEvent::Registered { name: "Acme".to_owned(), currencies: Vec::new(), client_id: client };
    let suspended = || PartnerEvent::Suspended { reason: Some("leaked".to_owned()) };
    let suspend = || PartnerCommand::Suspend { reason: Some("leaked".to_owned()) };
    let rotated = || PartnerEvent::SecretRotated { client_id: client };
    let check = |given: Vec<PartnerEvent>, when, then| {
        let answer = TestFramework::<Partner>::with(Book::default()).given(given).when(when);
        assert_eq!(answer.inspect_result(), then);
    };
    check(vec![registered()], suspend(), Ok(vec![suspended()]));
    check(vec![registered()], PartnerCommand::Resume, Err(Refusal::PartnerNotSuspended));
    check(vec![registered()], PartnerCommand::RotateSecret, Ok(vec![rotated()]));
    check(vec![registered(), suspended()], suspend(), Err(Refusal::PartnerIsSuspended));
    check(vec![registered(), suspended()], PartnerCommand::RotateSecret, Ok(vec![rotated()]));
    check(vec![registered(), suspended()], PartnerCommand::Resume, Ok(vec![PartnerEvent::Resumed {}]));
    check(vec![registered(), suspended(), PartnerEvent::Resumed {}], suspend(), Ok(vec![suspended()]));
    for command in [suspend(), PartnerCommand::Resume, PartnerCommand::RotateSecret] {
        check(vec![], command, Err(Refusal::PartnerNotFound));
    }
}
