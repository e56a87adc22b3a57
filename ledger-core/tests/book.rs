//! The book between a decision and its commit: what one decision of a batch leaves, the next one must see.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

use std::sync::Arc;

use ledger_core::*;
use uuid::Uuid;

const PARTNER: u128 = 1;
const WALLET: u128 = 2;
const OTHER: u128 = 3;
const TOP_UP: u128 = 4;

/// A partner with a wallet of `user-1` and one of `user-2`, and a top-up of the first one that is pending.
fn book() -> Book {
    let mut book = Book::default();
    let partner = PartnerId::from_uuid(Uuid::from_u128(PARTNER));
    let settlement = (eur(), WalletId::from_uuid(Uuid::from_u128(10)));
    let client = ClientId::from_uuid(Uuid::from_u128(11));
    let register = Action::RegisterPartner { partner, name: "p".to_owned(), currencies: vec![settlement], client };
    decide(&mut book, Caller::Admin, register).unwrap();
    for (wallet, user) in [(WALLET, "user-1"), (OTHER, "user-2")] {
        let open =
            Action::OpenWallet { wallet: id(wallet), user: user.into(), currency: eur(), metadata: Metadata::new() };
        decide(&mut book, Caller::Partner { partner, user: None }, open).unwrap();
    }
    let payment = Payment { token: "t".to_owned(), redirect_url: "u".to_owned(), return_url: None };
    let instruction = instruction(TransactionKind::TopUp, WALLET, None);
    let request = Action::RequestTopUp { transaction: top_up(), instruction, payment };
    decide(&mut book, Caller::Partner { partner, user: None }, request).unwrap();
    book.keep();
    book
}

fn decide(book: &mut Book, caller: Caller, action: Action) -> Result<Vec<NewEvent>, Refusal> {
    let id = CommandId::from_uuid(Uuid::from_u128(99));
    let events = book.decide(&Command { id, key: None, caller, action, metadata: "{}".into() })?;
    events.iter().for_each(|new| book.apply(&new.event));
    Ok(events)
}

fn eur() -> Currency {
    "EUR".parse().unwrap()
}

fn id(wallet: u128) -> WalletId {
    WalletId::from_uuid(Uuid::from_u128(wallet))
}

fn top_up() -> TransactionId {
    TransactionId::from_uuid(Uuid::from_u128(TOP_UP))
}

fn instruction(kind: TransactionKind, wallet: u128, to: Option<u128>) -> Arc<Instruction> {
    Arc::new(Instruction {
        kind,
        partner_id: Some(PartnerId::from_uuid(Uuid::from_u128(PARTNER))),
        user_id: None,
        wallet_id: id(wallet),
        to_wallet_id: to.map(id),
        direction: None,
        amount: "5.00".parse().unwrap(),
        currency: eur(),
        reference: None,
        description: None,
        metadata: Metadata::new(),
        effective_at: None,
    })
}

fn settle() -> Action {
    let money = Money::parse("5.00", eur()).unwrap();
    Action::Settle { transaction: top_up(), money, provider_reference: "bank-1".to_owned() }
}

#[test]
fn who_comes_second_in_a_batch_is_told_how_the_transaction_has_ended() {
    let mut book = book();
    decide(&mut book, Caller::Workflow, settle()).unwrap();
    let ended = Err(Refusal::TransactionEnded { status: TransactionStatus::Success });
    let late = Action::Expire { transaction: top_up() };
    assert_eq!(decide(&mut book, Caller::Workflow, late.clone()), ended, "it exists, and has ended");
    assert_eq!(decide(&mut book, Caller::Workflow, settle()), ended);

    book.take_back();
    assert!(book.transaction(top_up()).unwrap().pending().is_some(), "the batch came to nothing");
    decide(&mut book, Caller::Workflow, late).unwrap();
    book.keep();
    assert_eq!(book.transaction(top_up()), None, "what has ended is not kept in memory");
}

#[test]
fn what_was_looked_at_ahead_of_the_book_is_not_folded_in_twice() {
    let mut book = book();
    let later = TransactionId::from_uuid(Uuid::from_u128(5));
    let payment = Payment { token: "t".to_owned(), redirect_url: "u".to_owned(), return_url: None };
    let requested =
        TransactionEvent::Requested { instruction: instruction(TransactionKind::TopUp, WALLET, None), payment };
    let mut transaction = Transaction::default();
    cqrs_es::Aggregate::apply(&mut transaction, requested.clone());
    book.look_at(later, transaction);
    assert!(book.transaction(later).is_some());
    book.look_away();
    assert_eq!(book.transaction(later), None);

    book.apply(&Event::Transaction(later, requested)); // now it comes by in the log
    assert_eq!(book.transaction(later).unwrap().sequence, 1);
}

#[test]
fn who_names_a_user_spends_from_that_users_wallets_only() {
    let mut book = book();
    decide(&mut book, Caller::Workflow, settle()).unwrap();
    let partner = PartnerId::from_uuid(Uuid::from_u128(PARTNER));
    let transfer = |user: &str| {
        let instruction = Instruction {
            user_id: Some(user.into()),
            ..Arc::unwrap_or_clone(instruction(TransactionKind::Transfer, WALLET, Some(OTHER)))
        };
        let transaction = TransactionId::from_uuid(Uuid::from_u128(6));
        Action::Transfer { transaction, instruction: Arc::new(instruction) }
    };
    let theirs = |user: &str| Caller::Partner { partner, user: Some(user.into()) };
    for caller in [theirs("user-2"), Caller::Admin] {
        assert_eq!(decide(&mut book, caller, transfer("user-2")), Err(Refusal::WalletNotOwned));
    }
    assert!(decide(&mut book, theirs("user-1"), transfer("user-1")).is_ok());
}
