//! Reading what decisions need and the book does not hold: wallets and partners from the snapshot, transactions from
//! their own streams, keys from the log.
//!
//! One query of each kind for a whole group of commands, off the road of those that need nothing.

use std::collections::HashMap;

use cqrs_es::Aggregate;
use event_store::{Log, Snapshots};
use ledger_core::{Book, Event, Missing, Pages, Transaction, TransactionId, WalletId, WalletKind};

use crate::ledger::{EngineError, Job};

/// What was read for a group of commands.
#[derive(Debug, Default)]
pub(crate) struct Found {
    missing: Missing,
    pages: Pages,
    /// Each with the position of its last event.
    transactions: Vec<(TransactionId, Transaction, i64)>,
    /// The keys that were asked about, each with the request that the log has it for.
    keys: HashMap<[u8; 16], Option<[u8; 32]>>,
}

/// Reads what is missing, from a snapshot that stands at `had` or further, and whether the log knows the keys.
pub(crate) async fn load(
    log: &Log,
    snapshots: &Snapshots,
    had: i64,
    mut missing: Missing,
    keys: Vec<[u8; 16]>,
) -> Result<Found, EngineError> {
    let transactions = read_transactions(log, &missing).await?;
    for asked in transactions.iter().filter_map(|(_, transaction, _)| transaction.pending()) {
        missing.wallets.insert(asked.wallet_id);
        missing.wallets.insert(WalletId::system(WalletKind::Bank, asked.currency));
    }
    let pages = snapshots.read(&missing, had).await?;
    let known = if keys.is_empty() { Vec::new() } else { log.known_keys(&keys).await? };
    let mut keys: HashMap<_, _> = keys.into_iter().map(|hash| (hash, None)).collect();
    keys.extend(known.into_iter().map(|key| (key.hash, Some(key.request))));
    Ok(Found { missing, pages, transactions, keys })
}

async fn read_transactions(
    log: &Log,
    missing: &Missing,
) -> Result<Vec<(TransactionId, Transaction, i64)>, EngineError> {
    if missing.transactions.is_empty() {
        return Ok(Vec::new());
    }
    let mut transactions: HashMap<_, _> =
        missing.transactions.iter().map(|id| (*id, (Transaction::default(), 0))).collect();
    let ids: Vec<_> = missing.transactions.iter().map(TransactionId::to_string).collect();
    for recorded in log.streams(Transaction::TYPE, &ids).await? {
        let read = recorded.read();
        match read.map_err(|error| EngineError::Corrupt { position: recorded.position, error })? {
            Event::Transaction(id, event) => {
                let (transaction, at) = transactions.entry(id).or_default();
                transaction.apply(event);
                *at = recorded.position;
            }
            _ => unreachable!("a transaction's stream holds its events"),
        }
    }
    Ok(transactions.into_iter().map(|(id, (transaction, at))| (id, transaction, at)).collect())
}

impl Found {
    /// Puts everything where decisions look. Only right while the book's generation is what it was before the reading.
    pub(crate) fn lay_in(self, book: &mut Book) {
        for (id, transaction, at) in self.transactions {
            book.lay_in_transaction(id, transaction, at);
        }
        book.lay_in(&self.missing, self.pages);
    }

    /// Tells the command what the log knows of its key, if that was asked; whether it knows it.
    pub(crate) fn tell(&self, job: &mut Job) -> bool {
        let Some(answer) = job.command.key.and_then(|key| self.keys.get(&key.hash)) else { return false };
        job.key_in_log = Some(*answer);
        answer.is_some()
    }
}
