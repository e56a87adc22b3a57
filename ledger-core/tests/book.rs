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
    book.keep(book.mark());
    book
}

fn decide(book: &mut Book, caller: Caller, action: Action) -> Result<Vec<NewEvent>, Refusal> {
    let id = CommandId::from_uuid(Uuid::from_u128(99));
    execute(book, Command { id, key: None, caller, action, metadata: "{}".into() })
}

/// Positions are counted in thousands: no command here has more events.
fn execute(book: &mut Book, command: Command) -> Result<Vec<NewEvent>, Refusal> {
    static NEXT: std::sync::atomic::AtomicI64 = std::sync::atomic::AtomicI64::new(1);
    book.execute(&command, NEXT.fetch_add(1_000, std::sync::atomic::Ordering::Relaxed))
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
    let before = book.mark();
    decide(&mut book, Caller::Workflow, settle()).unwrap();
    let ended = Err(Refusal::TransactionEnded { status: TransactionStatus::Success });
    let late = Action::Expire { transaction: top_up() };
    assert_eq!(decide(&mut book, Caller::Workflow, late.clone()), ended, "it exists, and has ended");
    assert_eq!(decide(&mut book, Caller::Workflow, settle()), ended);

    book.take_back(before);
    assert!(book.transaction(top_up()).unwrap().pending().is_some(), "the batch came to nothing");
    decide(&mut book, Caller::Workflow, late).unwrap();
    book.keep(book.mark());
    book.written(i64::MAX);
    book.make_room(0);
    assert_eq!(book.transaction(top_up()), None, "what can be read again need not stay in memory");
}

#[test]
fn what_was_read_ahead_of_the_book_is_not_folded_in_twice() {
    let mut book = book();
    let later = TransactionId::from_uuid(Uuid::from_u128(5));
    let payment = Payment { token: "t".to_owned(), redirect_url: "u".to_owned(), return_url: None };
    let requested =
        TransactionEvent::Requested { instruction: instruction(TransactionKind::TopUp, WALLET, None), payment };
    let ahead = i64::MAX - 1;
    let mut transaction = Transaction::default();
    cqrs_es::Aggregate::apply(&mut transaction, requested.clone());
    book.lay_in_transaction(later, transaction, ahead);
    book.apply(ahead, &Event::Transaction(later, requested)); // now it comes by in the log
    assert_eq!(book.transaction(later).unwrap().sequence, 1);
}

#[test]
fn a_wallet_read_ahead_of_the_book_counts_what_it_expects_once() {
    let book = book();
    let wallet = book.wallet(id(WALLET)).unwrap().clone();
    assert_eq!(wallet.expected, 1);
    let mut other = Book::default();
    let found = Pages { wallets: vec![(id(WALLET), wallet, 7_001)], partners: Vec::new() };
    other.lay_in(&Missing::default(), found);
    let payment = Payment { token: "t".to_owned(), redirect_url: "u".to_owned(), return_url: None };
    let requested =
        TransactionEvent::Requested { instruction: instruction(TransactionKind::TopUp, WALLET, None), payment };
    other.apply(7_001, &Event::Transaction(top_up(), requested.clone()));
    assert_eq!(other.wallet(id(WALLET)).unwrap().expected, 1, "the wallet was read after this event");
    other.apply(7_002, &Event::Transaction(TransactionId::from_uuid(Uuid::from_u128(5)), requested));
    assert_eq!(other.wallet(id(WALLET)).unwrap().expected, 2);
}

#[test]
fn what_is_folded_comes_to_what_was_decided_and_is_not_taken_back_with_what_is_decided_upon_it() {
    let (mut deciding, mut folding) = (book(), book());
    let settled = decide(&mut deciding, Caller::Workflow, settle()).unwrap();
    let frozen = Action::FreezeWallet { wallet: id(OTHER), reason: "r".to_owned() };
    let frozen = decide(&mut deciding, Caller::Admin, frozen).unwrap();
    let states = |book: &Book| {
        let wallets = [WALLET, OTHER].map(|wallet| book.wallet(id(wallet)).cloned());
        (wallets, book.transaction(top_up()).cloned(), book.sizes())
    };
    let before = folding.mark();
    for (position, event) in (i64::MAX - 9..).zip([&settled[0], &frozen[0]]) {
        folding.fold(position, &event.event);
        folding.fold(position, &event.event); // what is in already changes nothing
    }
    assert_eq!(states(&folding), states(&deciding));
    let upon = folding.mark();
    decide(&mut folding, Caller::Admin, Action::UnfreezeWallet { wallet: id(OTHER), reason: "r".to_owned() }).unwrap();
    folding.take_back(upon);
    assert_eq!(states(&folding), states(&deciding), "what was decided upon it is gone");
    folding.take_back(before);
    assert_eq!(states(&folding), states(&deciding), "it is in the log: nothing takes it back");
}

/// Settled first, the wallet holds 5.00: enough for two transfers of 2.00 and not for a third.
fn batch(atomic: bool, key: bool) -> (Book, Command) {
    let mut book = book();
    decide(&mut book, Caller::Workflow, settle()).unwrap();
    book.keep(book.mark());
    let transfer = |number: u128| {
        let instruction = Arc::unwrap_or_clone(instruction(TransactionKind::Transfer, WALLET, Some(OTHER)));
        let instruction = Instruction { amount: "2.00".parse().unwrap(), ..instruction };
        (TransactionId::from_uuid(Uuid::from_u128(number)), Arc::new(instruction))
    };
    let command = Command {
        id: CommandId::from_uuid(Uuid::from_u128(99)),
        key: key.then_some(Key { hash: [1; 16], request: [1; 32] }),
        caller: Caller::Partner { partner: PartnerId::from_uuid(Uuid::from_u128(PARTNER)), user: None },
        action: Action::Batch { atomic, transfers: (50..53).map(transfer).collect() },
        metadata: "{}".into(),
    };
    (book, command)
}

fn balance(book: &Book, wallet: u128) -> String {
    book.wallet(id(wallet)).unwrap().opened.as_ref().unwrap().balance.to_string()
}

#[test]
fn of_a_batch_each_transfer_sees_what_the_ones_before_it_did_and_is_answered_for_itself() {
    let (mut book, command) = batch(false, true);
    let events = execute(&mut book, command).unwrap();
    let types: Vec<_> = events.iter().map(|new| new.event.event_type()).collect();
    assert_eq!(types, ["TransactionPosted", "TransactionPosted", "TransactionDeclined"]);
    assert_eq!([balance(&book, WALLET), balance(&book, OTHER)], ["1.00", "4.00"]);
}

#[test]
fn of_an_atomic_batch_all_transfers_are_made_or_none_and_the_first_refused_one_is_named() {
    for key in [true, false] {
        let (mut book, command) = batch(true, key);
        let answer = execute(&mut book, command);
        assert_eq!([balance(&book, WALLET), balance(&book, OTHER)], ["5.00", "0.00"]);
        match answer {
            Ok(events) => {
                let [NewEvent { sequence: 1, event: Event::Command(_, declined) }] = &events[..] else {
                    panic!("{events:?}")
                };
                let CommandEvent::BatchDeclined { item: 2, failure, .. } = declined else { panic!("{declined:?}") };
                assert_eq!(failure.code, "insufficient-funds");
                assert!(key, "only a key keeps a refusal");
            }
            Err(refusal) => assert!(!key && matches!(refusal, Refusal::InsufficientFunds { .. })),
        }
    }
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

#[test]
fn of_a_suspended_partner_nothing_is_done_but_what_was_pending_ends() {
    let mut book = book();
    let partner = PartnerId::from_uuid(Uuid::from_u128(PARTNER));
    let suspend = Action::SuspendPartner { partner, reason: None };
    decide(&mut book, Caller::Admin, suspend).unwrap();
    let theirs = || Caller::Partner { partner, user: None };
    let transaction = TransactionId::from_uuid(Uuid::from_u128(7));
    let moving = instruction(TransactionKind::Transfer, WALLET, Some(OTHER));
    let payment = Payment { token: "t".to_owned(), redirect_url: "u".to_owned(), return_url: None };
    let reason = || "r".to_owned();
    for action in [
        Action::OpenWallet { wallet: id(8), user: "user-3".into(), currency: eur(), metadata: Metadata::new() },
        Action::FreezeWallet { wallet: id(WALLET), reason: reason() },
        Action::UnfreezeWallet { wallet: id(WALLET), reason: reason() },
        Action::CloseWallet { wallet: id(OTHER), reason: reason() },
        Action::Transfer { transaction, instruction: moving.clone() },
        Action::Batch { atomic: true, transfers: vec![(transaction, moving.clone())] },
        Action::Batch { atomic: false, transfers: vec![(transaction, moving)] },
        Action::RequestTopUp { transaction, instruction: instruction(TransactionKind::TopUp, WALLET, None), payment },
    ] {
        assert_eq!(decide(&mut book, theirs(), action.clone()), Err(Refusal::PartnerSuspended), "{action:?}");
    }
    decide(&mut book, Caller::Workflow, settle()).unwrap();
    let freeze = Action::FreezeWallet { wallet: id(WALLET), reason: reason() };
    decide(&mut book, Caller::Admin, freeze).unwrap();
    decide(&mut book, Caller::Admin, Action::ResumePartner { partner }).unwrap();
    let unfreeze = Action::UnfreezeWallet { wallet: id(WALLET), reason: reason() };
    decide(&mut book, theirs(), unfreeze).unwrap();
}
