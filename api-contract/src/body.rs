//! Wallets and transactions as API.md shows them, folded from their events.
//!
//! Command answers, views and webhooks are made of the same bodies, so they cannot tell different stories.
//! They are stored as JSON by those who keep them, hence read back as well. What follows an impossible event
//! is a panic: that would be corrupt history.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa::openapi::{ObjectBuilder, Schema, Type};

use ledger_core::{
    Amount, Balance, Currency, Direction, Entries, Entry, Failure, Instruction, Metadata, PartnerId, Timestamp,
    TransactionEvent, TransactionId, TransactionKind, TransactionStatus, WalletEvent, WalletId, WalletStatus,
};

/// A wallet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Wallet)]
pub struct WalletBody {
    #[schema(value_type = String, example = "wal_0192f0c1-2d3e-7abc-8def-0123456789ab")]
    pub id: WalletId,
    /// Null on system and partner wallets.
    #[schema(required)]
    pub user_id: Option<String>,
    /// Null on system wallets.
    #[schema(value_type = Option<String>, required)]
    pub partner_id: Option<PartnerId>,
    #[schema(value_type = String, example = "EUR")]
    pub currency: Currency,
    #[schema(value_type = String, example = "70.00")]
    pub balance: Balance,
    #[schema(value_type = String, example = "0.00")]
    pub held: Balance,
    /// `balance` less `held`.
    #[schema(value_type = String, example = "70.00")]
    pub available: Balance,
    #[schema(schema_with = wallet_status)]
    pub status: WalletStatus,
    #[schema(value_type = Object)]
    pub metadata: Metadata,
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// Counts everything that changes the wallet.
    pub version: i64,
}

/// A transaction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Transaction)]
pub struct TransactionBody {
    #[schema(value_type = String, example = "txn_0192f0c1-2d3e-7abc-8def-0123456789ab")]
    pub id: TransactionId,
    #[serde(rename = "type")]
    #[schema(value_type = String, example = "TRANSFER")]
    pub kind: TransactionKind,
    #[schema(schema_with = transaction_status)]
    pub status: TransactionStatus,
    /// The wallet that it is about: the paying one of a transfer.
    #[schema(value_type = String)]
    pub wallet_id: WalletId,
    /// The receiving wallet of a transfer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub to_wallet_id: Option<WalletId>,
    /// The partner's own wallet, where one takes part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub partner_wallet_id: Option<WalletId>,
    /// The end user on whose behalf it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_id: Option<String>,
    #[schema(value_type = String, example = "10.50")]
    pub amount: Amount,
    #[schema(value_type = String, example = "EUR")]
    pub currency: Currency,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    #[schema(value_type = Object)]
    pub metadata: Metadata,
    /// Why it failed: a problem slug or the provider's word, and a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<FailureBody>)]
    pub failure: Option<Failure>,
    /// What moved; none while it is pending or when it failed.
    pub entries: Vec<EntryBody>,
    #[schema(value_type = String, format = DateTime)]
    pub effective_at: Timestamp,
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// When it ended, however it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub completed_at: Option<Timestamp>,
    /// The position of its last event.
    pub ledger_position: i64,
}

/// What one wallet gave or got.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Entry)]
pub struct EntryBody {
    #[schema(value_type = String)]
    pub wallet_id: WalletId,
    #[schema(schema_with = direction)]
    pub direction: Direction,
    #[schema(value_type = String, example = "10.50")]
    pub amount: Amount,
    /// Absent on the system's own wallets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub balance_after: Option<Balance>,
}

/// The shape of [`Failure`] in the OpenAPI document.
#[derive(ToSchema)]
#[schema(as = Failure)]
#[expect(dead_code, reason = "read by the derive only")]
pub(crate) struct FailureBody {
    code: String,
    detail: String,
}

impl WalletBody {
    /// A wallet from its first event.
    ///
    /// # Panics
    /// When that is not `WalletOpened`.
    pub fn new(event: &WalletEvent, id: WalletId, recorded_at: Timestamp) -> Self {
        let WalletEvent::Opened { partner_id, user_id, currency, metadata, wallet_version, balance_after, .. } = event
        else {
            panic!("{id}: the first event of a wallet is {}", event.name());
        };
        Self {
            id,
            user_id: user_id.as_deref().map(str::to_owned),
            partner_id: *partner_id,
            currency: *currency,
            balance: *balance_after,
            held: Balance::zero(*currency),
            available: *balance_after,
            status: WalletStatus::Active,
            metadata: metadata.clone(),
            created_at: recorded_at,
            version: *wallet_version,
        }
    }

    /// A later event of its own stream. One that is already in changes nothing.
    pub fn apply(&mut self, event: &WalletEvent) {
        if !self.advance(event.wallet_version()) {
            return;
        }
        self.status = match event {
            WalletEvent::Opened { .. } => panic!("{}: opened twice", self.id),
            WalletEvent::Frozen { .. } => WalletStatus::Frozen,
            WalletEvent::Unfrozen { .. } => WalletStatus::Active,
            WalletEvent::Closed { .. } => WalletStatus::Closed,
        };
    }

    /// An entry of a transaction that moved its money. One that is already in changes nothing.
    pub fn enter(&mut self, entry: &Entry) {
        assert_eq!(self.id, entry.wallet_id, "an entry of another wallet");
        if self.advance(entry.wallet_version) {
            self.balance = entry.balance_after;
            self.available = self.balance.less(self.held).expect("what is held is within what is there");
        }
    }

    /// Whether the change with this version is the next one. A gap is corrupt history.
    fn advance(&mut self, version: i64) -> bool {
        if version <= self.version {
            return false;
        }
        assert_eq!(self.version + 1, version, "{}: a change is missing", self.id);
        self.version = version;
        true
    }
}

impl TransactionBody {
    /// A transaction from its first event.
    ///
    /// # Panics
    /// When that event cannot be the first.
    pub fn new(event: &TransactionEvent, id: TransactionId, position: i64, recorded_at: Timestamp) -> Self {
        let (status, instruction, entries, failure) = match event {
            TransactionEvent::Posted { instruction, entries } => {
                (TransactionStatus::Success, instruction, bodies(entries), None)
            }
            TransactionEvent::Requested { instruction, .. } => {
                (TransactionStatus::Pending, instruction, Vec::new(), None)
            }
            TransactionEvent::Declined { instruction, failure } => {
                (TransactionStatus::Failed, instruction, Vec::new(), Some(failure.clone()))
            }
            TransactionEvent::Settled { .. } | TransactionEvent::Failed { .. } | TransactionEvent::Expired { .. } => {
                panic!("{id}: the first event of a transaction is {}", event.name())
            }
        };
        let Instruction { kind, wallet_id, to_wallet_id, amount, currency, effective_at, .. } = **instruction;
        Self {
            id,
            kind,
            status,
            wallet_id,
            to_wallet_id,
            partner_wallet_id: None,
            user_id: instruction.user_id.as_deref().map(str::to_owned),
            amount,
            currency,
            reference: instruction.reference.clone(),
            description: instruction.description.clone(),
            metadata: instruction.metadata.clone(),
            failure,
            entries,
            effective_at: effective_at.unwrap_or(recorded_at),
            created_at: recorded_at,
            completed_at: (status != TransactionStatus::Pending).then_some(recorded_at),
            ledger_position: position,
        }
    }

    /// A later event of its stream. One that is already in changes nothing.
    pub fn apply(&mut self, event: &TransactionEvent, position: i64, recorded_at: Timestamp) {
        if position <= self.ledger_position {
            return;
        }
        assert_eq!(self.status, TransactionStatus::Pending, "{}: {} after its end", self.id, event.name());
        match event {
            TransactionEvent::Settled { entries, .. } => {
                self.status = TransactionStatus::Success;
                self.entries = bodies(entries);
            }
            TransactionEvent::Failed { failure, .. } => {
                self.status = TransactionStatus::Failed;
                self.failure = Some(failure.clone());
            }
            TransactionEvent::Expired { .. } => self.status = TransactionStatus::Expired,
            TransactionEvent::Posted { .. }
            | TransactionEvent::Requested { .. }
            | TransactionEvent::Declined { .. } => {
                panic!("{}: begun twice", self.id)
            }
        }
        self.completed_at = Some(recorded_at);
        self.ledger_position = position;
    }

    /// As a partner may see it: what the system's own wallets hold is none of its business.
    pub fn for_partner(mut self) -> Self {
        for entry in &mut self.entries {
            if entry.wallet_id.is_system() {
                entry.balance_after = None;
            }
        }
        self
    }
}

fn wallet_status() -> Schema {
    one_of(["ACTIVE", "FROZEN", "CLOSED"])
}

fn transaction_status() -> Schema {
    one_of(["PENDING", "SUCCESS", "FAILED", "REVERSED", "EXPIRED"])
}

fn direction() -> Schema {
    one_of(["DEBIT", "CREDIT"])
}

/// The OpenAPI schema of one of a few words.
fn one_of<const N: usize>(words: [&'static str; N]) -> Schema {
    ObjectBuilder::new().schema_type(Type::String).enum_values(Some(words)).into()
}

fn bodies(entries: &Entries) -> Vec<EntryBody> {
    entries
        .iter()
        .map(|entry| EntryBody {
            wallet_id: entry.wallet_id,
            direction: entry.direction,
            amount: entry.amount,
            balance_after: Some(entry.balance_after),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::{Value, json};
    use uuid::Uuid;

    use ledger_core::{Payment, WalletKind};

    use super::*;

    fn wallet(number: u128) -> WalletId {
        WalletId::from_uuid(Uuid::from_u128(0x0192_f0c1_0000_7000_8000_0000_0000_0000 + number))
    }

    fn transaction() -> TransactionId {
        TransactionId::from_uuid(Uuid::from_u128(0x0192_f0c1_0000_7000_8000_0000_0000_0009))
    }

    fn eur() -> Currency {
        "EUR".parse().unwrap()
    }

    fn at(micros: i64) -> Timestamp {
        Timestamp::from_micros(micros).unwrap()
    }

    fn instruction(kind: TransactionKind) -> Arc<Instruction> {
        Arc::new(Instruction {
            kind,
            partner_id: None,
            user_id: None,
            wallet_id: wallet(1),
            to_wallet_id: None,
            direction: None,
            amount: "10.50".parse().unwrap(),
            currency: eur(),
            reference: None,
            description: None,
            metadata: Metadata::new(),
            effective_at: None,
        })
    }

    /// From the system's wallet to the first one.
    fn entries() -> Entries {
        let system = WalletId::system(WalletKind::Bank, eur());
        let entry = |wallet_id, direction, balance: &str| Entry {
            wallet_id,
            direction,
            amount: "10.50".parse().unwrap(),
            balance_after: balance.parse().unwrap(),
            wallet_version: 2,
        };
        let entries = vec![entry(system, Direction::Debit, "-10.50"), entry(wallet(1), Direction::Credit, "10.50")];
        Entries::balanced(entries).unwrap()
    }

    fn requested() -> TransactionBody {
        let payment =
            Payment { token: "t".to_owned(), redirect_url: "https://bank/pay/t".to_owned(), return_url: None };
        let event = TransactionEvent::Requested { instruction: instruction(TransactionKind::TopUp), payment };
        TransactionBody::new(&event, transaction(), 7, at(0))
    }

    fn opened() -> WalletBody {
        let event = WalletEvent::Opened {
            kind: WalletKind::Customer,
            partner_id: None,
            user_id: Some("alice".into()),
            currency: eur(),
            metadata: Metadata::new(),
            wallet_version: 1,
            balance_after: Balance::zero(eur()),
        };
        WalletBody::new(&event, wallet(1), at(0))
    }

    #[test]
    fn the_described_fields_are_the_fields_that_are_written() {
        fn check<T: ToSchema>(name: &str, written: Value, absent_at_times: &[&str]) {
            assert_eq!(T::name(), name);
            let schema = serde_json::to_value(T::schema()).unwrap();
            let mut described: Vec<_> = schema["properties"].as_object().unwrap().keys().cloned().collect();
            let mut expected: Vec<_> = written.as_object().unwrap().keys().cloned().collect();
            let mut required: Vec<String> = serde_json::from_value(schema["required"].clone()).unwrap();
            required.sort();
            expected.sort();
            assert_eq!(required, expected, "what is always written is required");
            expected.extend(absent_at_times.iter().map(|name| (*name).to_owned()));
            expected.sort();
            described.sort();
            assert_eq!(described, expected);
        }
        check::<WalletBody>("Wallet", serde_json::to_value(opened()).unwrap(), &[]);
        let at_times =
            ["toWalletId", "partnerWalletId", "userId", "reference", "description", "failure", "completedAt"];
        check::<TransactionBody>("Transaction", serde_json::to_value(requested()).unwrap(), &at_times);
    }

    #[test]
    fn a_pending_transaction_has_no_end_and_no_entries_and_absent_fields_are_absent() {
        let expected = json!({
            "id": transaction(), "type": "TOP_UP", "status": "PENDING", "walletId": wallet(1),
            "amount": "10.50", "currency": "EUR", "metadata": {}, "entries": [],
            "effectiveAt": "1970-01-01T00:00:00.000000Z", "createdAt": "1970-01-01T00:00:00.000000Z", "ledgerPosition": 7,
        });
        assert_eq!(serde_json::to_value(requested()).unwrap(), expected);
    }

    #[test]
    fn a_settled_transaction_has_succeeded_at_the_moment_and_position_of_its_last_event() {
        let mut body = requested();
        let settled = TransactionEvent::Settled {
            wallet_id: wallet(1),
            currency: eur(),
            entries: entries(),
            provider_reference: "bank-1".to_owned(),
        };
        body.apply(&settled, 9, at(1));
        body.apply(&settled, 9, at(1)); // a page that comes twice
        assert_eq!(body.status, TransactionStatus::Success);
        assert_eq!((body.created_at, body.completed_at, body.ledger_position), (at(0), Some(at(1)), 9));
        assert_eq!(body.entries.len(), 2);
        let stored: TransactionBody = serde_json::from_value(serde_json::to_value(&body).unwrap()).unwrap();
        assert_eq!(stored, body);
    }

    #[test]
    fn a_partner_does_not_see_what_the_systems_wallets_hold() {
        let event =
            TransactionEvent::Posted { instruction: instruction(TransactionKind::Adjustment), entries: entries() };
        let shown = serde_json::to_value(TransactionBody::new(&event, transaction(), 7, at(0)).for_partner()).unwrap();
        assert_eq!(shown["entries"][0].get("balanceAfter"), None);
        assert_eq!(shown["entries"][1]["balanceAfter"], "10.50");
        assert!(!shown.to_string().contains("-10.50"));
    }

    #[test]
    fn a_declined_transaction_has_failed_and_an_expired_one_has_expired() {
        let failure = Failure { code: "insufficient-funds".to_owned(), detail: "no".to_owned() };
        let declined = TransactionEvent::Declined {
            instruction: instruction(TransactionKind::Transfer),
            failure: failure.clone(),
        };
        let body = TransactionBody::new(&declined, transaction(), 7, at(0));
        assert_eq!(
            (body.status, body.failure, body.completed_at),
            (TransactionStatus::Failed, Some(failure), Some(at(0)))
        );

        let mut body = requested();
        body.apply(&TransactionEvent::Expired { wallet_id: wallet(1) }, 8, at(1));
        assert_eq!((body.status, body.failure, body.completed_at), (TransactionStatus::Expired, None, Some(at(1))));
    }

    #[test]
    fn a_wallet_is_shown_with_all_minor_digits_and_null_where_nobody_is() {
        let mut expected = json!({
            "id": wallet(1), "userId": "alice", "partnerId": null, "currency": "EUR", "balance": "0.00", "held": "0.00",
            "available": "0.00", "status": "ACTIVE", "metadata": {}, "createdAt": "1970-01-01T00:00:00.000000Z", "version": 1,
        });
        let mut body = opened();
        assert_eq!(serde_json::to_value(&body).unwrap(), expected);

        let entry = entries().iter().find(|entry| entry.wallet_id == wallet(1)).unwrap().clone();
        body.enter(&entry);
        body.enter(&entry); // a page that comes twice
        body.apply(&WalletEvent::Frozen {
            reason: "r".to_owned(),
            wallet_version: 3,
            balance_after: "10.50".parse().unwrap(),
        });
        for (name, value) in [("balance", "10.50"), ("available", "10.50"), ("status", "FROZEN")] {
            expected[name] = value.into();
        }
        expected["version"] = Value::from(3);
        assert_eq!(serde_json::to_value(&body).unwrap(), expected);
        assert_eq!(serde_json::from_value::<WalletBody>(expected).unwrap(), body);
    }

    #[test]
    #[should_panic(expected = "a change is missing")]
    fn a_gap_in_a_wallets_versions_is_corrupt_history() {
        let frozen =
            WalletEvent::Frozen { reason: "r".to_owned(), wallet_version: 3, balance_after: Balance::zero(eur()) };
        opened().apply(&frozen);
    }
}
