//! A command: who wants what, under which key; and how the book decides it.
//!
//! A decision runs through the aggregates' `handle`, the same door that cqrs-es knows. It answers the events
//! to append, or a refusal, which a keyed command leaves in the log as an event too: final, but moving nothing.

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use cqrs_es::Aggregate;
use cqrs_es::event_sink::EventSink;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    Book, ClientId, CommandId, Currency, Event, Failure, Instruction, Metadata, Money, NewEvent, Partner,
    PartnerCommand, PartnerId, Payment, Refusal, Transaction, TransactionCommand, TransactionEvent, TransactionId,
    Wallet, WalletCommand, WalletId, WalletKind,
};

#[derive(Clone, Debug, PartialEq)]
pub struct Command {
    pub id: CommandId,
    /// Idempotency; `None` where the client gave none and none is required.
    pub key: Option<Key>,
    pub caller: Caller,
    pub action: Action,
    /// What each event says about the call that caused it: a flat JSON object of strings, as text.
    pub metadata: Arc<str>,
}

/// A client's idempotency key and what it was used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// SHA-256(client id ‖ 0 ‖ key), cut to 16 bytes.
    pub hash: [u8; 16],
    /// SHA-256 of the canonical request.
    pub request: [u8; 32],
}

/// On whose behalf a command is made: decides which wallets exist for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// A partner's client, perhaps for one of the partner's end users.
    Partner {
        partner: PartnerId,
        user: Option<Arc<str>>,
    },
    Admin,
    /// Our own process that ends what is pending.
    Workflow,
}

/// Everything that can be asked of the ledger. New ids arrive here, minted at the edge.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    RegisterPartner { partner: PartnerId, name: String, currencies: Vec<(Currency, WalletId)>, client: ClientId },
    OpenWallet { wallet: WalletId, user: Arc<str>, currency: Currency, metadata: Metadata },
    FreezeWallet { wallet: WalletId, reason: String },
    UnfreezeWallet { wallet: WalletId, reason: String },
    CloseWallet { wallet: WalletId, reason: String },
    Transfer { transaction: TransactionId, instruction: Arc<Instruction> },
    Adjust { transaction: TransactionId, instruction: Arc<Instruction> },
    RequestTopUp { transaction: TransactionId, instruction: Arc<Instruction>, payment: Payment },
    Settle { transaction: TransactionId, money: Money, provider_reference: String },
    Fail { transaction: TransactionId, failure: Failure },
    Expire { transaction: TransactionId },
}

/// What has happened to a command that became nothing else. This is history: add variants, never edit or reuse one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all_fields = "camelCase")]
pub enum CommandEvent {
    /// A keyed command about something else than a new transaction was refused.
    #[serde(rename = "CommandDeclined")]
    Declined {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        partner_id: Option<PartnerId>,
        failure: Failure,
    },
}

impl Command {
    /// The transaction whose past this command needs, if it is about one that exists already.
    pub fn ends(&self) -> Option<TransactionId> {
        match self.action {
            Action::Settle { transaction, .. } | Action::Fail { transaction, .. } | Action::Expire { transaction } => {
                Some(transaction)
            }
            _ => None,
        }
    }

    /// About how many bytes of memory the command holds on to: what a bound on waiting commands counts.
    pub fn bytes(&self) -> usize {
        let texts = |texts: &[&str]| texts.iter().map(|text| text.len()).sum::<usize>();
        let instructed = |instruction: &Instruction| {
            let Instruction { user_id, reference, description, metadata, .. } = instruction;
            let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
            let user = user_id.as_ref().map_or(0, |user| user.len());
            [size_of::<Instruction>(), user, text(reference), text(description), bytes_of(metadata)].iter().sum()
        };
        let held = match &self.action {
            Action::RegisterPartner { name, currencies, .. } => {
                [name.len(), size_of_val(currencies.as_slice())].iter().sum()
            }
            Action::OpenWallet { user, metadata, .. } => [user.len(), bytes_of(metadata)].iter().sum(),
            Action::FreezeWallet { reason, .. }
            | Action::UnfreezeWallet { reason, .. }
            | Action::CloseWallet { reason, .. } => reason.len(),
            Action::Transfer { instruction, .. } | Action::Adjust { instruction, .. } => instructed(instruction),
            Action::RequestTopUp { instruction, payment, .. } => {
                let Payment { token, redirect_url, return_url } = payment;
                let payment = texts(&[token, redirect_url, return_url.as_deref().unwrap_or_default()]);
                [instructed(instruction), payment].iter().sum()
            }
            Action::Settle { provider_reference, .. } => provider_reference.len(),
            Action::Fail { failure, .. } => texts(&[&failure.code, &failure.detail]),
            Action::Expire { .. } => 0,
        };
        [size_of::<Self>(), self.metadata.len(), held].iter().sum()
    }

    /// The event that keeps a refusal: the command's only one.
    pub fn declined(&self, refusal: &Refusal) -> NewEvent {
        let failure = Failure::from(refusal);
        match &self.action {
            Action::Transfer { transaction, instruction }
            | Action::Adjust { transaction, instruction }
            | Action::RequestTopUp { transaction, instruction, .. } => {
                let event = TransactionEvent::Declined { instruction: instruction.clone(), failure };
                NewEvent { sequence: 1, event: Event::Transaction(*transaction, event) }
            }
            _ => {
                let partner_id = match self.caller {
                    Caller::Partner { partner, .. } => Some(partner),
                    Caller::Admin | Caller::Workflow => None,
                };
                NewEvent { sequence: 1, event: Event::Command(self.id, CommandEvent::Declined { partner_id, failure }) }
            }
        }
    }
}

impl Book {
    /// What follows from the command, here and now. Repeating it on an equal book gives the same.
    pub fn decide(&self, command: &Command) -> Result<Vec<NewEvent>, Refusal> {
        let caller = || command.caller.clone();
        match command.action.clone() {
            Action::RegisterPartner { partner, name, currencies, client } => {
                self.register(partner, name, currencies, client)
            }
            Action::OpenWallet { wallet, user, currency, metadata } => {
                let Caller::Partner { partner, .. } = command.caller else { return Err(Refusal::PartnerNotFound) };
                let (kind, partner, user) = (WalletKind::Customer, Some(partner), Some(user));
                self.on_wallet(wallet, WalletCommand::Open { kind, partner, user, currency, metadata })
            }
            Action::FreezeWallet { wallet, reason } => {
                self.on_wallet(wallet, WalletCommand::Freeze { caller: caller(), reason })
            }
            Action::UnfreezeWallet { wallet, reason } => {
                self.on_wallet(wallet, WalletCommand::Unfreeze { caller: caller(), reason })
            }
            Action::CloseWallet { wallet, reason } => {
                self.on_wallet(wallet, WalletCommand::Close { caller: caller(), reason })
            }
            Action::Transfer { transaction, instruction } => {
                self.on_transaction(transaction, TransactionCommand::Transfer { caller: caller(), instruction })
            }
            Action::Adjust { transaction, instruction } => {
                self.on_transaction(transaction, TransactionCommand::Adjust { caller: caller(), instruction })
            }
            Action::RequestTopUp { transaction, instruction, payment } => {
                self.on_transaction(transaction, TransactionCommand::Request { caller: caller(), instruction, payment })
            }
            Action::Settle { transaction, money, provider_reference } => {
                self.on_transaction(transaction, TransactionCommand::Settle { money, provider_reference })
            }
            Action::Fail { transaction, failure } => {
                self.on_transaction(transaction, TransactionCommand::Fail { failure })
            }
            Action::Expire { transaction } => self.on_transaction(transaction, TransactionCommand::Expire),
        }
    }

    /// A partner, its settlement wallets, and the system's wallets in currencies that nobody used before.
    fn register(
        &self,
        partner: PartnerId,
        name: String,
        currencies: Vec<(Currency, WalletId)>,
        client: ClientId,
    ) -> Result<Vec<NewEvent>, Refusal> {
        let codes: Vec<_> = currencies.iter().map(|(currency, _)| *currency).collect();
        let register = PartnerCommand::Register { name, currencies: codes.clone(), client };
        let mut events = handle(
            &Partner::default(),
            register,
            self,
            |partner| partner.sequence,
            |event| Event::Partner(partner, event),
        )?;
        let open = |kind, partner, currency| WalletCommand::Open {
            kind,
            partner,
            user: None,
            currency,
            metadata: Metadata::new(),
        };
        for currency in codes.into_iter().collect::<BTreeSet<_>>() {
            for kind in WalletKind::SYSTEM {
                let wallet = WalletId::system(kind, currency);
                if self.wallet(wallet).is_none() {
                    events.extend(self.on_wallet(wallet, open(kind, None, currency))?);
                }
            }
        }
        for (currency, wallet) in currencies {
            events.extend(self.on_wallet(wallet, open(WalletKind::Settlement, Some(partner), currency))?);
        }
        Ok(events)
    }

    fn on_wallet(&self, id: WalletId, command: WalletCommand) -> Result<Vec<NewEvent>, Refusal> {
        let unopened = Wallet::default();
        let wallet = self.wallet(id).unwrap_or(&unopened);
        handle(wallet, command, self, |wallet| wallet.sequence, |event| Event::Wallet(id, event))
    }

    fn on_transaction(&self, id: TransactionId, command: TransactionCommand) -> Result<Vec<NewEvent>, Refusal> {
        let new = Transaction::default();
        let transaction = self.transaction(id).unwrap_or(&new);
        handle(transaction, command, self, |transaction| transaction.sequence, |event| Event::Transaction(id, event))
    }
}

/// A client's JSON is larger in memory than as text: an array of zeros sixteen times.
fn bytes_of(metadata: &Metadata) -> usize {
    fn value(of: &Value) -> usize {
        let held = match of {
            Value::String(text) => text.len(),
            Value::Array(values) => values.iter().map(value).sum(),
            Value::Object(fields) => bytes_of(fields),
            Value::Null | Value::Bool(_) | Value::Number(_) => 0,
        };
        size_of::<Value>().saturating_add(held)
    }
    let field = |(name, of): (&String, &Value)| [size_of::<String>(), name.len(), value(of)].iter().sum::<usize>();
    metadata.iter().map(field).sum()
}

/// Runs a command through the aggregate's own `handle` and numbers what came of it.
fn handle<A>(
    aggregate: &A,
    command: A::Command,
    book: &Book,
    sequence: impl Fn(&A) -> i64,
    event: impl Fn(A::Event) -> Event,
) -> Result<Vec<NewEvent>, Refusal>
where
    A: Aggregate<Services = Book, Error = Refusal> + Clone,
{
    // A clone: what `handle` has applied survives its `Err`.
    let mut changed = aggregate.clone();
    let sink = EventSink::default();
    at_once(changed.handle(command, book, &sink))?;
    let first = sequence(aggregate).saturating_add(1);
    Ok(at_once(sink.collect())
        .into_iter()
        .zip(first..)
        .map(|(e, sequence)| NewEvent { sequence, event: event(e) })
        .collect())
}

/// The answer of a future that waits for nothing. `handle` is async in name only: its one await is an uncontended lock.
fn at_once<T>(future: impl Future<Output = T>) -> T {
    // Unconstrained: tokio's cooperative budget would otherwise make that lock wait after enough decisions in a row.
    let future = pin!(tokio::task::unconstrained(future));
    match future.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(answer) => answer,
        Poll::Pending => unreachable!("a decision awaits nothing"),
    }
}
