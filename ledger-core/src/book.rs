//! The book: the wallets, partners and open transactions that decisions are made against, in memory.
//!
//! `ledger-engine` folds the log into it and lets it decide. It is folded in exactly one way, at start, after
//! a decision and when another engine's events are read, so those can never differ. Its memory is bounded: it
//! holds what was changed since the last snapshot and what is being looked at, and says what else a command
//! needs ([`Book::missing`]). What decisions changed can be taken back until they are committed.
//!
//! Left out: reading and writing what is not in memory (event-store, ledger-engine).

use std::collections::BTreeSet;

use cqrs_es::Aggregate;

use crate::shelf::Shelf;
use crate::{
    Action, Balance, Caller, Command, Direction, Entries, Entry, Event, Instruction, Money, Partner, PartnerId,
    Refusal, Transaction, TransactionEvent, TransactionId, TransactionKind, Wallet, WalletId, WalletKind,
};

/// What decisions are made against.
#[derive(Debug, Default)]
pub struct Book {
    wallets: Shelf<WalletId, Wallet>,
    partners: Shelf<PartnerId, Partner>,
    transactions: Shelf<TransactionId, Transaction>,
    generation: u64,
}

/// A moment between two changes of the book.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    wallets: u64,
    partners: u64,
    transactions: u64,
}

/// What a decision wants to look at and the book does not hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    pub wallets: BTreeSet<WalletId>,
    pub partners: BTreeSet<PartnerId>,
    pub transactions: BTreeSet<TransactionId>,
}

/// Wallets and partners, each with the position of the last event that is in it: a snapshot, or a part of one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pages {
    pub wallets: Vec<(WalletId, Wallet, i64)>,
    pub partners: Vec<(PartnerId, Partner, i64)>,
}

impl Book {
    pub fn wallet(&self, id: WalletId) -> Option<&Wallet> {
        self.wallets.get(id).filter(|wallet| wallet.opened.is_some())
    }

    /// Those that are in memory.
    pub fn wallets(&self) -> impl Iterator<Item = (&WalletId, &Wallet)> {
        self.wallets.iter().filter(|(_, wallet)| wallet.opened.is_some())
    }

    pub fn partner(&self, id: PartnerId) -> Option<&Partner> {
        self.partners.get(id).filter(|partner| partner.sequence != 0)
    }

    pub fn transaction(&self, id: TransactionId) -> Option<&Transaction> {
        self.transactions.get(id).filter(|transaction| transaction.sequence != 0)
    }

    /// The two entries of moving `money`, if every rule of the wallets allows it.
    ///
    /// Where several rules refuse, the order is: existence, currency, status, funds, limit.
    pub fn entries(&self, from: WalletId, to: WalletId, money: Money) -> Result<Entries, Refusal> {
        let payer = self.wallet(from).ok_or(Refusal::WalletNotFound)?;
        let payee = self.wallet(to).ok_or(Refusal::WalletNotFound)?;
        let opened = |wallet: &Wallet| wallet.opened.clone().ok_or(Refusal::WalletNotFound);
        let (debited, credited) = (opened(payer)?, opened(payee)?);
        for side in [&debited, &credited] {
            if side.currency != money.currency() {
                return Err(Refusal::CurrencyMismatch { wallet: side.currency, requested: money.currency() });
            }
        }
        payer.usable()?;
        payee.usable()?;
        let amount = money.amount();
        if debited.kind.has_floor() && !debited.balance.covers(amount) {
            return Err(Refusal::InsufficientFunds { available: debited.balance, requested: amount });
        }
        let entry = |wallet_id, wallet: &Wallet, direction, balance_after: Option<Balance>| {
            let balance_after = balance_after.ok_or(Refusal::BalanceLimitExceeded)?;
            let wallet_version = wallet.version.saturating_add(1);
            Ok(Entry { wallet_id, direction, amount, balance_after, wallet_version })
        };
        let entries = vec![
            entry(from, payer, Direction::Debit, debited.balance.minus(amount))?,
            entry(to, payee, Direction::Credit, credited.balance.plus(amount))?,
        ];
        Ok(Entries::balanced(entries).expect("the same amount is taken and given"))
    }

    /// What must be laid in before the command can be decided. It may take two rounds: a transaction says which wallets
    /// it is about.
    pub fn missing(&mut self, command: &Command) -> Missing {
        let mut missing = Missing::default();
        if let Caller::Partner { partner, .. } = command.caller {
            self.look_for_partner(partner, &mut missing);
        }
        match &command.action {
            Action::RegisterPartner { currencies, .. } => {
                for (currency, _) in currencies {
                    for kind in WalletKind::SYSTEM {
                        self.look_for_wallet(WalletId::system(kind, *currency), &mut missing);
                    }
                }
            }
            Action::SuspendPartner { partner, .. }
            | Action::ResumePartner { partner }
            | Action::RotateSecret { partner } => self.look_for_partner(*partner, &mut missing),
            Action::OpenWallet { .. } => {} // the id is new: nobody has it yet
            Action::FreezeWallet { wallet, .. }
            | Action::UnfreezeWallet { wallet, .. }
            | Action::CloseWallet { wallet, .. } => self.look_for_wallet(*wallet, &mut missing),
            Action::Transfer { instruction, .. }
            | Action::Adjust { instruction, .. }
            | Action::RequestTopUp { instruction, .. } => self.look_for_wallets(instruction, &mut missing),
            Action::Batch { transfers, .. } => {
                for (_, instruction) in transfers {
                    self.look_for_wallets(instruction, &mut missing);
                }
            }
            Action::Settle { transaction, .. } | Action::Fail { transaction, .. } | Action::Expire { transaction } => {
                if !self.transactions.holds(*transaction) {
                    missing.transactions.insert(*transaction);
                }
                let pending = self.transaction(*transaction).and_then(Transaction::pending);
                if let Some((wallet, currency)) = pending.map(|asked| (asked.wallet_id, asked.currency)) {
                    self.look_for_wallet(wallet, &mut missing);
                    self.look_for_wallet(WalletId::system(WalletKind::Bank, currency), &mut missing);
                }
            }
        }
        missing
    }

    /// What must be laid in before the event can be folded in.
    pub fn missing_of(&mut self, event: &Event, missing: &mut Missing) {
        match event {
            Event::Wallet(id, _) => self.look_for_wallet(*id, missing),
            Event::Partner(id, _) => self.look_for_partner(*id, missing),
            Event::Transaction(id, event) => {
                for entry in event.entries().into_iter().flatten() {
                    self.look_for_wallet(entry.wallet_id, missing);
                }
                if let Some(wallet) = event.expecting() {
                    self.look_for_wallet(wallet, missing);
                }
                // What is being read of it elsewhere may be from before this end: that must find it here.
                if event.ends() && !self.transactions.holds(*id) {
                    missing.transactions.insert(*id);
                }
            }
            Event::Command(..) => {}
        }
    }

    /// Lays in what was missing: all of it, and what was not found as well, so that it is known not to exist.
    ///
    /// Only right while [`Book::generation`] is what it was when the looking began.
    pub fn lay_in(&mut self, missing: &Missing, found: Pages) {
        for (id, wallet, at) in found.wallets {
            self.wallets.lay_in(id, wallet, at);
        }
        for (id, partner, at) in found.partners {
            self.partners.lay_in(id, partner, at);
        }
        for id in &missing.wallets {
            self.wallets.lay_in(*id, Wallet::default(), 0);
        }
        for id in &missing.partners {
            self.partners.lay_in(*id, Partner::default(), 0);
        }
    }

    /// Lays in a transaction as its own stream tells it, up to the position of its last event; a default one if there is
    /// no such stream. The same condition holds as for [`Book::lay_in`].
    pub fn lay_in_transaction(&mut self, id: TransactionId, transaction: Transaction, at: i64) {
        self.transactions.lay_in(id, transaction, at);
    }

    /// Folds in what happened at a position. A change that is in already changes nothing; a gap is corrupt history.
    ///
    /// All that [`Book::missing_of`] names must have been laid in.
    pub fn apply(&mut self, position: i64, event: &Event) {
        self.take_in(position, event, true);
    }

    /// As [`Book::apply`], of what is in the log: it is there for good, so nothing is remembered that could undo it.
    pub fn fold(&mut self, position: i64, event: &Event) {
        self.take_in(position, event, false);
    }

    fn take_in(&mut self, position: i64, event: &Event, revocable: bool) {
        match event {
            Event::Wallet(id, event) => {
                if self.wallets.get(*id).is_none_or(|wallet| wallet.version < event.wallet_version()) {
                    self.wallets.change(*id, position, revocable, |wallet| {
                        assert_eq!(
                            Some(event.wallet_version()),
                            wallet.version.checked_add(1),
                            "{id}: a change is missing"
                        );
                        wallet.apply(event.clone());
                    });
                }
            }
            Event::Partner(id, event) => {
                if self.partners.at(*id) < position {
                    self.partners.change(*id, position, revocable, |partner| partner.apply(event.clone()));
                }
            }
            Event::Transaction(id, event) => self.take_in_transaction(position, *id, event, revocable),
            Event::Command(..) => {}
        }
    }

    fn take_in_transaction(&mut self, position: i64, id: TransactionId, event: &TransactionEvent, revocable: bool) {
        // Before the entries: these bring the wallet to this position, and the count has no version of its own.
        if let Some(wallet) = event.expecting()
            && self.wallets.at(wallet) < position
        {
            self.wallets.change(wallet, position, revocable, |wallet| {
                wallet.expected = match event {
                    TransactionEvent::Requested { .. } => wallet.expected.saturating_add(1),
                    _ => wallet.expected.saturating_sub(1),
                };
            });
        }
        for entry in event.entries().into_iter().flatten() {
            if self.wallets.get(entry.wallet_id).is_none_or(|wallet| wallet.version < entry.wallet_version) {
                self.wallets.change(entry.wallet_id, position, revocable, |wallet| wallet.enter(entry));
            }
        }
        let known = self.transactions.get(id).is_some();
        let begins = matches!(event, TransactionEvent::Requested { .. });
        // One that was done or declined at once is never asked about again.
        if (begins || known) && self.transactions.at(id) < position {
            self.transactions.change(id, position, revocable, |transaction| transaction.apply(event.clone()));
        }
    }

    pub fn mark(&self) -> Mark {
        Mark { wallets: self.wallets.mark(), partners: self.partners.mark(), transactions: self.transactions.mark() }
    }

    /// What was changed before the mark is committed.
    pub fn keep(&mut self, mark: Mark) {
        self.wallets.keep(mark.wallets);
        self.partners.keep(mark.partners);
        self.transactions.keep(mark.transactions);
    }

    /// What was changed since the mark is not in the log: it has not happened.
    pub fn take_back(&mut self, mark: Mark) {
        self.wallets.take_back(mark.wallets);
        self.partners.take_back(mark.partners);
        self.transactions.take_back(mark.transactions);
    }

    /// How many things are in memory, and how many of them only there and in the log.
    pub fn sizes(&self) -> (usize, usize) {
        let sum = |sizes: [usize; 3]| sizes.into_iter().fold(0, usize::saturating_add);
        (
            sum([self.wallets.len(), self.partners.len(), self.transactions.len()]),
            sum([self.wallets.changed(), self.partners.changed(), self.transactions.changed()]),
        )
    }

    /// How many things of one kind are in memory, at most.
    pub fn fullest(&self) -> usize {
        self.wallets.len().max(self.partners.len()).max(self.transactions.len())
    }

    /// What was committed since the last snapshot, for the next one.
    pub fn changes(&self) -> Pages {
        Pages { wallets: self.wallets.changes(), partners: self.partners.changes() }
    }

    /// A snapshot has all that happened up to a position: what has not changed since may leave memory.
    pub fn written(&mut self, position: i64) {
        self.wallets.written(position);
        self.partners.written(position);
        self.transactions.written(position); // these can always be read from their own streams
    }

    /// Counts the moments at which things left memory. What was read before such a moment may have changed and gone in
    /// between: read it again.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Lets things go that can be read again, if there are more than `max` of a kind.
    pub fn make_room(&mut self, max: usize) {
        let left = [self.wallets.make_room(max), self.partners.make_room(max), self.transactions.make_room(max)];
        if left.contains(&true) {
            self.generation = self.generation.saturating_add(1);
        }
    }

    fn look_for_wallets(&mut self, instruction: &Instruction, missing: &mut Missing) {
        self.look_for_wallet(instruction.wallet_id, missing);
        if let Some(to) = instruction.to_wallet_id {
            self.look_for_wallet(to, missing);
        }
        if instruction.kind == TransactionKind::Adjustment {
            self.look_for_wallet(WalletId::system(WalletKind::Adjustments, instruction.currency), missing);
        }
    }

    fn look_for_wallet(&mut self, id: WalletId, missing: &mut Missing) {
        if !self.wallets.holds(id) {
            missing.wallets.insert(id);
        }
    }

    fn look_for_partner(&mut self, id: PartnerId, missing: &mut Missing) {
        if !self.partners.holds(id) {
            missing.partners.insert(id);
        }
    }
}

impl Missing {
    pub fn is_empty(&self) -> bool {
        self.wallets.is_empty() && self.partners.is_empty() && self.transactions.is_empty()
    }

    /// Adds what another decision misses.
    pub fn add(&mut self, other: &Missing) {
        self.wallets.extend(&other.wallets);
        self.partners.extend(&other.partners);
        self.transactions.extend(&other.transactions);
    }
}
