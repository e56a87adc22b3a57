//! What the log comes to: a fold of our own over all events, written from what they mean.
//!
//! It notes what does not add up on its way, and goes on with what is written. Left out: who asked for it (`check.rs`).

use std::collections::BTreeMap;

use serde_json::Value;

use crate::check::{Promise, Violation};
use crate::log::{Event, Log};
use crate::money::minor;

#[derive(Debug, Default)]
pub(crate) struct Fold {
    pub(crate) wallets: BTreeMap<String, Wallet>,
    pub(crate) transactions: BTreeMap<String, Transaction>,
    pub(crate) violations: Vec<Violation>,
}

#[derive(Debug)]
pub(crate) struct Wallet {
    pub(crate) currency: String,
    /// Whoever has no partner is the system itself.
    pub(crate) partner: Option<String>,
    pub(crate) status: &'static str,
    pub(crate) version: i64,
    pub(crate) balance: i128,
    /// Every entry: its position and what the wallet held then.
    pub(crate) entries: Vec<(i64, i128)>,
}

#[derive(Debug)]
pub(crate) struct Transaction {
    pub(crate) kind: String,
    pub(crate) status: &'static str,
    pub(crate) amount: String,
    pub(crate) currency: String,
    pub(crate) partner: Option<String>,
    /// Wallet, and what it got.
    pub(crate) moves: Vec<(String, i128)>,
    pub(crate) last_position: i64,
}

impl Fold {
    pub(crate) fn of(log: &Log) -> Self {
        let mut fold = Self::default();
        for event in &log.events {
            match event.content() {
                Some(content) => fold.apply(event, &content),
                None => fold.note(Promise::Chain, event, "its payload does not hold what its type says"),
            }
        }
        let mut totals: BTreeMap<&str, i128> = BTreeMap::new();
        for wallet in fold.wallets.values() {
            *totals.entry(&wallet.currency).or_default() += wallet.balance;
        }
        let sums: Vec<_> = totals.iter().filter(|(_, total)| **total != 0).collect();
        let sums = sums.iter().map(|(currency, total)| format!("all wallets in {currency} together hold {total}"));
        let sums: Vec<_> = sums.map(|what| Violation { promise: Promise::Conserved, what }).collect();
        fold.violations.extend(sums);
        fold
    }

    /// What the wallet held when the log had come to this position.
    pub(crate) fn balance_at(&self, wallet: &str, position: i64) -> Option<i128> {
        let entries = &self.wallets.get(wallet)?.entries;
        let after = entries.partition_point(|(at, _)| *at <= position);
        Some(after.checked_sub(1).map_or(0, |last| entries[last].1))
    }

    fn apply(&mut self, event: &Event, content: &Value) {
        let id = &event.aggregate_id;
        match event.event_type.as_str() {
            "WalletOpened" => {
                let wallet = Wallet {
                    currency: string(&content["currency"]),
                    partner: content["partnerId"].as_str().map(str::to_owned),
                    status: "ACTIVE",
                    version: 0,
                    balance: 0,
                    entries: Vec::new(),
                };
                if self.wallets.insert(id.clone(), wallet).is_some() {
                    self.note(Promise::Doubled, event, "the wallet is opened a second time");
                }
                self.life(event, content, "ACTIVE");
            }
            "WalletFrozen" => self.life(event, content, "FROZEN"),
            "WalletUnfrozen" => self.life(event, content, "ACTIVE"),
            "WalletClosed" => self.life(event, content, "CLOSED"),
            "TransactionPosted" | "TransactionRequested" | "TransactionDeclined" => {
                let instruction = &content["instruction"];
                let status = match event.event_type.as_str() {
                    "TransactionPosted" => "SUCCESS",
                    "TransactionRequested" => "PENDING",
                    _ => "FAILED",
                };
                let transaction = Transaction {
                    kind: string(&instruction["type"]),
                    status,
                    amount: string(&instruction["amount"]),
                    currency: string(&instruction["currency"]),
                    partner: instruction["partnerId"].as_str().map(str::to_owned),
                    moves: Vec::new(),
                    last_position: event.position,
                };
                if self.transactions.insert(id.clone(), transaction).is_some() {
                    self.note(Promise::Doubled, event, "the transaction begins a second time");
                }
            }
            "TransactionSettled" => self.end(event, "SUCCESS"),
            "TransactionFailed" => self.end(event, "FAILED"),
            "TransactionExpired" => self.end(event, "EXPIRED"),
            _ => {} // partners, and commands that became nothing: no money
        }
        if let Some(entries) = content["entries"].as_array() {
            self.book(event, entries);
        }
    }

    fn life(&mut self, event: &Event, content: &Value, status: &'static str) {
        let Some(wallet) = self.wallets.get_mut(&event.aggregate_id) else {
            return self.note(Promise::Gap, event, "the wallet has not been opened");
        };
        wallet.status = status;
        wallet.version += 1;
        let as_written = (content["walletVersion"].as_i64(), amount(&content["balanceAfter"], &wallet.currency));
        if as_written != (Some(wallet.version), Some(wallet.balance)) {
            let what = format!("says {as_written:?}, and the fold version {} and {}", wallet.version, wallet.balance);
            self.note(Promise::Conserved, event, &what);
        }
    }

    fn end(&mut self, event: &Event, status: &'static str) {
        match self.transactions.get_mut(&event.aggregate_id) {
            Some(transaction) if transaction.status == "PENDING" => {
                transaction.status = status;
                transaction.last_position = event.position;
            }
            Some(_) => self.note(Promise::Doubled, event, "the transaction ends a second time"),
            None => self.note(Promise::Gap, event, "the transaction has not begun"),
        }
    }

    fn book(&mut self, event: &Event, entries: &[Value]) {
        let mut sums: BTreeMap<String, i128> = BTreeMap::new();
        for entry in entries {
            let id = string(&entry["walletId"]);
            let Some(wallet) = self.wallets.get_mut(&id) else {
                self.note(Promise::Phantom, event, &format!("moves money of {id}, which was never opened"));
                continue;
            };
            let change = amount(&entry["amount"], &wallet.currency).map(|amount| match entry["direction"].as_str() {
                Some("CREDIT") => amount,
                _ => -amount,
            });
            let Some(change) = change else {
                self.note(Promise::Conserved, event, &format!("the amount {} cannot be read", entry["amount"]));
                continue;
            };
            wallet.balance += change;
            wallet.version += 1;
            wallet.entries.push((event.position, wallet.balance));
            *sums.entry(wallet.currency.clone()).or_default() += change;
            let (balance, version) = (wallet.balance, wallet.version);
            let as_written = (entry["walletVersion"].as_i64(), amount(&entry["balanceAfter"], &wallet.currency));
            let has_floor = wallet.partner.is_some();
            if let Some(transaction) = self.transactions.get_mut(&event.aggregate_id) {
                transaction.moves.push((id.clone(), change));
            }
            if as_written != (Some(version), Some(balance)) {
                let what = format!("says {as_written:?} of {id}, and the fold version {version} and {balance}");
                self.note(Promise::Conserved, event, &what);
            }
            if has_floor && balance < 0 {
                self.note(Promise::Floor, event, &format!("{id} holds {balance}"));
            }
        }
        for (currency, sum) in sums.into_iter().filter(|(_, sum)| *sum != 0) {
            self.note(Promise::Conserved, event, &format!("its entries in {currency} sum to {sum}"));
        }
    }

    fn note(&mut self, promise: Promise, event: &Event, what: &str) {
        let what = format!("position {}, {} of {}: {what}", event.position, event.event_type, event.aggregate_id);
        self.violations.push(Violation { promise, what });
    }
}

fn amount(value: &Value, currency: &str) -> Option<i128> {
    minor(value.as_str()?, currency)
}

fn string(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
