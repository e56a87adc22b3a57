//! The book: every wallet, partner and open transaction at one position, in memory.
//!
//! `ledger-engine` folds the log into it and lets it decide. It is folded in exactly one way, at start, after
//! a decision and when another engine's events are read, so those can never differ. What a batch of decisions
//! changed can be taken back until the batch is committed.

use std::collections::HashMap;
use std::hash::Hash;

use cqrs_es::Aggregate;

use crate::{
    Balance, Direction, Entries, Entry, Event, Money, Partner, PartnerId, Refusal, Transaction, TransactionEvent,
    TransactionId, Wallet, WalletId,
};

/// What decisions are made against.
#[derive(Debug, Default)]
pub struct Book {
    wallets: Shelf<WalletId, Wallet>,
    partners: Shelf<PartnerId, Partner>,
    /// Pending ones, and until the next [`Book::keep`] those that have ended: a later decision of the batch must know.
    transactions: Shelf<TransactionId, Transaction>,
    /// What the log says about others that decisions are about. Never folded into: an event that another engine wrote
    /// may be in here already and still come by in the log.
    looked_at: HashMap<TransactionId, Transaction>,
}

/// A map that remembers what was changed since the last [`Shelf::keep`].
#[derive(Debug)]
struct Shelf<K, V> {
    current: HashMap<K, V>,
    before: HashMap<K, Option<V>>,
}

impl Book {
    pub fn wallet(&self, id: WalletId) -> Option<&Wallet> {
        self.wallets.current.get(&id)
    }

    pub fn wallets(&self) -> impl Iterator<Item = (&WalletId, &Wallet)> {
        self.wallets.current.iter()
    }

    pub fn partner(&self, id: PartnerId) -> Option<&Partner> {
        self.partners.current.get(&id)
    }

    pub fn transaction(&self, id: TransactionId) -> Option<&Transaction> {
        self.transactions.current.get(&id).or_else(|| self.looked_at.get(&id))
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

    /// Folds one event in. A change of a wallet that is already in changes nothing; a gap is corrupt history.
    pub fn apply(&mut self, event: &Event) {
        match event {
            Event::Wallet(id, event) => {
                let wallet = self.wallets.change(*id);
                if wallet.version < event.wallet_version() {
                    assert_eq!(
                        Some(event.wallet_version()),
                        wallet.version.checked_add(1),
                        "{id}: a change is missing"
                    );
                    wallet.apply(event.clone());
                }
            }
            Event::Partner(id, event) => self.partners.change(*id).apply(event.clone()),
            Event::Transaction(id, event) => self.apply_transaction(*id, event),
            Event::Command(..) => {}
        }
    }

    fn apply_transaction(&mut self, id: TransactionId, event: &TransactionEvent) {
        if let Some(entries) = event.entries() {
            for entry in entries {
                self.wallets.change(entry.wallet_id).enter(entry);
            }
        }
        match event {
            TransactionEvent::Posted { .. } | TransactionEvent::Declined { .. } => {} // ended as it began: nothing to remember
            TransactionEvent::Requested { instruction, .. } => {
                self.transactions.change(id).apply(event.clone());
                let wallet = self.wallets.change(instruction.wallet_id);
                wallet.expected = wallet.expected.saturating_add(1);
            }
            TransactionEvent::Settled { wallet_id, .. }
            | TransactionEvent::Failed { wallet_id, .. }
            | TransactionEvent::Expired { wallet_id } => {
                self.transactions.change(id).apply(event.clone());
                let wallet = self.wallets.change(*wallet_id);
                wallet.expected = wallet.expected.saturating_sub(1);
            }
        }
    }

    /// Lays a transaction, folded from its own stream, beside the pending ones, to be looked at by decisions.
    pub fn look_at(&mut self, id: TransactionId, transaction: Transaction) {
        self.looked_at.insert(id, transaction);
    }

    /// Forgets what [`Book::look_at`] laid in.
    pub fn look_away(&mut self) {
        self.looked_at.clear();
    }

    /// The batch is committed: what it changed stays, but for transactions that have ended.
    pub fn keep(&mut self) {
        self.wallets.keep();
        self.partners.keep();
        for id in self.transactions.before.keys() {
            if self.transactions.current.get(id).is_some_and(|transaction| transaction.pending().is_none()) {
                self.transactions.current.remove(id);
            }
        }
        self.transactions.keep();
    }

    /// The batch is not in the log: the book is again what it was at the last [`Book::keep`].
    pub fn take_back(&mut self) {
        self.wallets.take_back();
        self.partners.take_back();
        self.transactions.take_back();
    }
}

impl<K: Copy + Eq + Hash, V: Clone + Default> Shelf<K, V> {
    fn change(&mut self, key: K) -> &mut V {
        let value = self.current.get(&key);
        self.before.entry(key).or_insert_with(|| value.cloned());
        self.current.entry(key).or_default()
    }

    fn keep(&mut self) {
        self.before.clear();
    }

    fn take_back(&mut self) {
        for (key, value) in self.before.drain() {
            match value {
                Some(value) => self.current.insert(key, value),
                None => self.current.remove(&key),
            };
        }
    }
}

impl<K, V> Default for Shelf<K, V> {
    fn default() -> Self {
        Self { current: HashMap::new(), before: HashMap::new() }
    }
}
