//! The laws of money, over random commands: whatever clients ask for, these hold after every decision.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

use std::collections::BTreeMap;
use std::sync::Arc;

use ledger_core::*;
use proptest::prelude::*;
use uuid::Uuid;

const PARTNERS: u8 = 2;
const WALLETS: u8 = 4;
const CURRENCIES: [&str; 2] = ["EUR", "JPY"];

/// What a random client does; numbers pick from the small world of [`World::new`].
#[derive(Clone, Debug)]
enum Deed {
    Transfer { from: u8, to: u8, minor: u64, currency: u8, user: bool },
    Adjust { wallet: u8, minor: u64, currency: u8, credit: bool },
    TopUp { wallet: u8, minor: u64, currency: u8 },
    End { which: u8, how: u8 },
    Life { wallet: u8, what: u8 },
}

fn any_deed() -> impl Strategy<Value = Deed> {
    let wallet = || 0..PARTNERS * WALLETS;
    let minor = || prop_oneof![1u64..200, 1u64..100_000, Just(999_999_999_999_999_999)];
    let currency = || 0..2u8;
    prop_oneof![
        4 => (wallet(), wallet(), minor(), currency(), any::<bool>())
            .prop_map(|(from, to, minor, currency, user)| Deed::Transfer { from, to, minor, currency, user }),
        3 => (wallet(), minor(), currency(), any::<bool>())
            .prop_map(|(wallet, minor, currency, credit)| Deed::Adjust { wallet, minor, currency, credit }),
        1 => (wallet(), minor(), currency()).prop_map(|(wallet, minor, currency)| Deed::TopUp { wallet, minor, currency }),
        1 => (any::<u8>(), 0..3u8).prop_map(|(which, how)| Deed::End { which, how }),
        1 => (wallet(), 0..3u8).prop_map(|(wallet, what)| Deed::Life { wallet, what }),
    ]
}

struct World {
    book: Book,
    history: Vec<Event>,
    pending: Vec<(TransactionId, Money)>,
    minted: u128,
}

impl World {
    fn new() -> Self {
        let mut world = Self { book: Book::default(), history: Vec::new(), pending: Vec::new(), minted: 1_000 };
        for partner in 0..PARTNERS {
            let currencies = CURRENCIES.map(|code| (code.parse().unwrap(), WalletId::from_uuid(world.mint())));
            let action = Action::RegisterPartner {
                partner: partner_id(partner),
                name: "a partner".to_owned(),
                currencies: currencies.to_vec(),
                client: ClientId::from_uuid(world.mint()),
            };
            world.execute(Caller::Admin, action).unwrap();
            for wallet in 0..WALLETS {
                let action = Action::OpenWallet {
                    wallet: wallet_id(partner * WALLETS + wallet),
                    user: user(wallet),
                    currency: CURRENCIES[usize::from(wallet) % 2].parse().unwrap(),
                    metadata: Metadata::new(),
                };
                world.execute(Caller::Partner { partner: partner_id(partner), user: None }, action).unwrap();
            }
        }
        world
    }

    fn mint(&mut self) -> Uuid {
        self.minted += 1;
        Uuid::from_u128(self.minted)
    }

    fn action(&mut self, deed: &Deed) -> (Caller, Action) {
        let transaction = TransactionId::from_uuid(self.mint());
        let partner = |wallet: u8| partner_id(wallet / WALLETS);
        let caller = |wallet: u8| Caller::Partner { partner: partner(wallet), user: None };
        match *deed {
            Deed::Transfer { from, to, minor, currency, user: own } => {
                let user = own.then(|| user(from % WALLETS));
                let instruction = instruction(TransactionKind::Transfer, from, Some(to), None, minor, currency);
                (Caller::Partner { partner: partner(from), user }, Action::Transfer { transaction, instruction })
            }
            Deed::Adjust { wallet, minor, currency, credit } => {
                let direction = if credit { Direction::Credit } else { Direction::Debit };
                let instruction =
                    instruction(TransactionKind::Adjustment, wallet, None, Some(direction), minor, currency);
                (Caller::Admin, Action::Adjust { transaction, instruction })
            }
            Deed::TopUp { wallet, minor, currency } => {
                let instruction = instruction(TransactionKind::TopUp, wallet, None, None, minor, currency);
                let payment = Payment { token: transaction.to_string(), redirect_url: String::new(), return_url: None };
                (caller(wallet), Action::RequestTopUp { transaction, instruction, payment })
            }
            Deed::End { which, how } => {
                let some = (!self.pending.is_empty()).then(|| self.pending[usize::from(which) % self.pending.len()]);
                let (transaction, money) = some.unwrap_or((transaction, money(1, 0)));
                let failure = Failure { code: "declined".to_owned(), detail: "by the bank".to_owned() };
                let action = match how {
                    0 => Action::Settle { transaction, money, provider_reference: "bank-1".to_owned() },
                    1 => Action::Fail { transaction, failure },
                    _ => Action::Expire { transaction },
                };
                (Caller::Workflow, action)
            }
            Deed::Life { wallet, what } => {
                let reason = "because".to_owned();
                let id = wallet_id(wallet);
                let action = match what {
                    0 => Action::FreezeWallet { wallet: id, reason },
                    1 => Action::UnfreezeWallet { wallet: id, reason },
                    _ => Action::CloseWallet { wallet: id, reason },
                };
                (caller(wallet), action)
            }
        }
    }

    fn execute(&mut self, caller: Caller, action: Action) -> Result<(), Refusal> {
        let command =
            Command { id: CommandId::from_uuid(self.mint()), key: None, caller, action, metadata: "{}".into() };
        let position = self.history.len() as i64 + 1;
        let before = self.book.mark();
        let once = self.book.execute(&command, position);
        self.book.take_back(before);
        let events = self.book.execute(&command, position);
        assert_eq!(once, events, "a decision repeats");
        for NewEvent { event, .. } in events? {
            if let Event::Transaction(id, TransactionEvent::Requested { instruction, .. }) = &event {
                self.pending.push((*id, instruction.money()));
            }
            self.history.push(event);
        }
        self.book.keep(self.book.mark());
        Ok(())
    }

    fn state(&self) -> BTreeMap<WalletId, Wallet> {
        self.book.wallets().map(|(id, wallet)| (*id, wallet.clone())).collect()
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let mut totals = BTreeMap::new();
        for (id, wallet) in self.book.wallets() {
            let opened = wallet.opened.as_ref().unwrap();
            prop_assert!(!opened.kind.has_floor() || !opened.balance.is_negative(), "{id} is at {}", opened.balance);
            prop_assert_eq!(opened.balance.decimal().scale(), opened.currency.minor_digits());
            prop_assert!(
                wallet.status != WalletStatus::Closed || opened.balance.is_zero(),
                "{id} is closed with money in"
            );
            let total = totals.entry(opened.currency).or_insert(opened.balance.decimal() - opened.balance.decimal());
            *total += opened.balance.decimal();
        }
        prop_assert!(totals.values().all(|total| total.is_zero()), "money was made or lost: {totals:?}");
        Ok(())
    }
}

fn partner_id(partner: u8) -> PartnerId {
    PartnerId::from_uuid(Uuid::from_u128(1 + u128::from(partner)))
}

fn wallet_id(wallet: u8) -> WalletId {
    WalletId::from_uuid(Uuid::from_u128(100 + u128::from(wallet)))
}

fn user(wallet: u8) -> Arc<str> {
    format!("user-{}", wallet % 2).into()
}

fn money(minor: u64, currency: u8) -> Money {
    let currency: Currency = CURRENCIES[usize::from(currency)].parse().unwrap();
    let text = match currency.minor_digits() {
        0 => minor.to_string(),
        _ => format!("{}.{:02}", minor / 100, minor % 100),
    };
    Money::parse(&text, currency).unwrap()
}

fn instruction(
    kind: TransactionKind,
    wallet: u8,
    to: Option<u8>,
    direction: Option<Direction>,
    minor: u64,
    currency: u8,
) -> Arc<Instruction> {
    let money = money(minor, currency);
    Arc::new(Instruction {
        kind,
        partner_id: Some(partner_id(wallet / WALLETS)),
        user_id: None,
        wallet_id: wallet_id(wallet),
        to_wallet_id: to.map(wallet_id),
        direction,
        amount: money.amount(),
        currency: money.currency(),
        reference: None,
        description: None,
        metadata: Metadata::new(),
        effective_at: None,
    })
}

proptest! {
    /// Money moves; it is never made and never lost, and no wallet passes its floor. A refusal changes nothing.
    #[test]
    fn money_is_conserved_floors_hold_and_refusals_move_nothing(deeds in prop::collection::vec(any_deed(), 0..120)) {
        let mut world = World::new();
        for deed in &deeds {
            let (caller, action) = world.action(deed);
            let before = world.state();
            match world.execute(caller, action) {
                Ok(()) => world.check()?,
                Err(_) => prop_assert_eq!(&world.state(), &before),
            }
        }
    }

    /// A book folded from the written events equals the one that decided them, however often a tail is folded in again.
    #[test]
    fn the_fold_of_the_written_log_is_the_book(deeds in prop::collection::vec(any_deed(), 0..80), again in 0..40usize) {
        let mut world = World::new();
        for deed in &deeds {
            let (caller, action) = world.action(deed);
            world.execute(caller, action).ok();
        }
        let mut folded = Book::default();
        for (position, event) in (1..).zip(&world.history) {
            let read = Event::read(
                event.aggregate_type(), &event.aggregate_id(), event.event_type(), event.event_version(), &event.payload(),
            ).unwrap();
            prop_assert_eq!(&read, event);
            folded.apply(position, &read);
        }
        let history = (1..).zip(&world.history).collect::<Vec<_>>();
        for (position, event) in &history[history.len().saturating_sub(again)..] {
            folded.apply(*position, event); // already in: changes nothing
        }
        let folded: BTreeMap<_, _> = folded.wallets().map(|(id, wallet)| (*id, wallet.clone())).collect();
        prop_assert_eq!(folded, world.state());
    }

    /// What a batch changed can be taken back as if it had never been decided.
    #[test]
    fn a_batch_taken_back_leaves_no_trace(kept in prop::collection::vec(any_deed(), 0..40), lost in prop::collection::vec(any_deed(), 0..40)) {
        let mut world = World::new();
        for deed in &kept {
            let (caller, action) = world.action(deed);
            world.execute(caller, action).ok();
        }
        let (before, mark) = (world.state(), world.book.mark());
        for deed in &lost {
            let (caller, action) = world.action(deed);
            let command = Command { id: CommandId::from_uuid(world.mint()), key: None, caller, action, metadata: "{}".into() };
            world.book.execute(&command, 1_000_000).ok();
        }
        world.book.take_back(mark);
        prop_assert_eq!(world.state(), before);
    }

    /// A book that may hold little, and reads what it lacks from the last snapshot, decides what a book decides that
    /// holds everything.
    #[test]
    fn a_book_with_little_room_decides_the_same(
        deeds in prop::collection::vec(any_deed(), 0..120), every in 1..20usize, max in 0..6usize,
    ) {
        let mut world = World::new();
        let mut small = Book::default();
        let mut wallets = BTreeMap::new();
        let mut partners = BTreeMap::new();
        for (position, event) in (1..).zip(&world.history) {
            small.apply(position, event);
        }
        small.keep(small.mark());
        for (number, deed) in deeds.iter().enumerate() {
            if number % every == 0 {
                let position = world.history.len() as i64;
                let changes = small.changes();
                wallets.extend(changes.wallets.into_iter().map(|(id, wallet, at)| (id, (wallet, at))));
                partners.extend(changes.partners.into_iter().map(|(id, partner, at)| (id, (partner, at))));
                small.written(position);
                prop_assert_eq!(small.sizes().1, 0);
            }
            small.make_room(max);
            let (caller, action) = world.action(deed);
            let command = Command { id: CommandId::from_uuid(world.mint()), key: None, caller: caller.clone(), action: action.clone(), metadata: "{}".into() };
            for _ in 0..2 {
                let missing = small.missing(&command);
                for id in &missing.transactions {
                    let of_stream = |(_, event): &(i64, &Event)| matches!(event, Event::Transaction(of, _) if of == id);
                    let (mut transaction, mut at) = (Transaction::default(), 0);
                    for (position, event) in (1..).zip(&world.history).filter(of_stream) {
                        let Event::Transaction(_, event) = event else { unreachable!() };
                        cqrs_es::Aggregate::apply(&mut transaction, event.clone());
                        at = position;
                    }
                    small.lay_in_transaction(*id, transaction, at);
                }
                let read = missing.wallets.iter().filter_map(|id| wallets.get(id).map(|(wallet, at): &(Wallet, i64)| (*id, wallet.clone(), *at)));
                let read_partners = missing.partners.iter().filter_map(|id| partners.get(id).map(|(partner, at): &(Partner, i64)| (*id, partner.clone(), *at)));
                let found = Pages { wallets: read.collect(), partners: read_partners.collect() };
                small.lay_in(&missing, found);
            }
            prop_assert!(small.missing(&command).is_empty());
            let before = world.history.len();
            let position = before as i64 + 1;
            let answer = small.execute(&command, position);
            small.keep(small.mark());
            let told = world.execute(caller, action);
            match answer {
                Ok(events) => {
                    prop_assert_eq!(told, Ok(()));
                    let events: Vec<_> = events.into_iter().map(|new| new.event).collect();
                    prop_assert_eq!(&world.history[before..], &events[..]);
                }
                Err(refusal) => prop_assert_eq!(told, Err(refusal)),
            }
        }
    }
}
