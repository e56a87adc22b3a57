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
    RegisterPartner {
        partner: PartnerId,
        name: String,
        currencies: Vec<(Currency, WalletId)>,
        client: ClientId,
    },
    SuspendPartner {
        partner: PartnerId,
        reason: Option<String>,
    },
    ResumePartner {
        partner: PartnerId,
    },
    /// Replaces the secret of the partner's client. The ledger knows that, and neither secret.
    RotateSecret {
        partner: PartnerId,
    },
    OpenWallet {
        wallet: WalletId,
        user: Arc<str>,
        currency: Currency,
        metadata: Metadata,
    },
    FreezeWallet {
        wallet: WalletId,
        reason: String,
    },
    UnfreezeWallet {
        wallet: WalletId,
        reason: String,
    },
    CloseWallet {
        wallet: WalletId,
        reason: String,
    },
    Transfer {
        transaction: TransactionId,
        instruction: Arc<Instruction>,
    },
    Adjust {
        transaction: TransactionId,
        instruction: Arc<Instruction>,
    },
    /// Transfers, decided one after another. Atomic: all of them or none; otherwise each for itself.
    Batch {
        atomic: bool,
        transfers: Vec<(TransactionId, Arc<Instruction>)>,
    },
    RequestTopUp {
        transaction: TransactionId,
        instruction: Arc<Instruction>,
        payment: Payment,
    },
    Settle {
        transaction: TransactionId,
        money: Money,
        provider_reference: String,
    },
    Fail {
        transaction: TransactionId,
        failure: Failure,
    },
    Expire {
        transaction: TransactionId,
    },
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
    /// None of an atomic batch's transfers was made, since this one was refused.
    #[serde(rename = "BatchDeclined")]
    BatchDeclined {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        partner_id: Option<PartnerId>,
        /// The refused transfer's place in the batch, from 0.
        item: u32,
        failure: Failure,
    },
}

/// Why a command was refused and, in an atomic batch, at which transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Refused {
    refusal: Refusal,
    item: Option<u32>,
}

impl Command {
    /// How many decisions it is: what a bound on the size of an append counts.
    pub fn decisions(&self) -> usize {
        match &self.action {
            Action::Batch { transfers, .. } => transfers.len().max(1),
            _ => 1,
        }
    }

    /// Whether the book holds more things afterwards than the command looks at.
    pub fn adds_to_book(&self) -> bool {
        matches!(self.action, Action::RegisterPartner { .. } | Action::OpenWallet { .. } | Action::RequestTopUp { .. })
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
            Action::SuspendPartner { reason, .. } => reason.as_ref().map_or(0, String::len),
            Action::ResumePartner { .. } | Action::RotateSecret { .. } => 0,
            Action::OpenWallet { user, metadata, .. } => [user.len(), bytes_of(metadata)].iter().sum(),
            Action::FreezeWallet { reason, .. }
            | Action::UnfreezeWallet { reason, .. }
            | Action::CloseWallet { reason, .. } => reason.len(),
            Action::Transfer { instruction, .. } | Action::Adjust { instruction, .. } => instructed(instruction),
            Action::Batch { transfers, .. } => {
                let transfer = |(_, instruction): &(_, Arc<Instruction>)| instructed(instruction);
                transfers.iter().map(transfer).fold(size_of_val(transfers.as_slice()), usize::saturating_add)
            }
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
    fn declined(&self, Refused { refusal, item }: &Refused) -> NewEvent {
        let failure = Failure::from(refusal);
        let partner_id = match self.caller {
            Caller::Partner { partner, .. } => Some(partner),
            Caller::Admin | Caller::Workflow => None,
        };
        match (&self.action, item) {
            (
                Action::Transfer { transaction, instruction }
                | Action::Adjust { transaction, instruction }
                | Action::RequestTopUp { transaction, instruction, .. },
                _,
            ) => declined(*transaction, instruction, failure),
            (_, Some(item)) => {
                let event = CommandEvent::BatchDeclined { partner_id, item: *item, failure };
                NewEvent { sequence: 1, event: Event::Command(self.id, event) }
            }
            (_, None) => {
                NewEvent { sequence: 1, event: Event::Command(self.id, CommandEvent::Declined { partner_id, failure }) }
            }
        }
    }
}

fn declined(transaction: TransactionId, instruction: &Arc<Instruction>, failure: Failure) -> NewEvent {
    let event = TransactionEvent::Declined { instruction: instruction.clone(), failure };
    NewEvent { sequence: 1, event: Event::Transaction(transaction, event) }
}

impl Book {
    /// Decides the command and folds in what follows, the first event at `position`. Repeating it on an equal book gives
    /// the same. The refusal of a keyed command is an event too, which keeps it; an unkeyed one leaves no trace.
    ///
    /// All that [`Book::missing`] names must have been laid in.
    pub fn execute(&mut self, command: &Command, position: i64) -> Result<Vec<NewEvent>, Refusal> {
        let before = self.mark();
        match self.decide(command, position) {
            Ok(events) => Ok(events),
            Err(refused) => {
                self.take_back(before);
                if command.key.is_some() { Ok(vec![command.declined(&refused)]) } else { Err(refused.refusal) }
            }
        }
    }

    fn decide(&mut self, command: &Command, position: i64) -> Result<Vec<NewEvent>, Refused> {
        // Its own commands alone: what is pending for it is ended by workflows, and no money stays stuck.
        if let Caller::Partner { partner, .. } = command.caller
            && let Some(Err(refusal)) = self.partner(partner).map(Partner::active)
        {
            return Err(Refused { refusal, item: None });
        }
        if let Action::Batch { atomic, transfers } = &command.action {
            return self.decide_batch(&command.caller, *atomic, transfers, position);
        }
        let events = self.decide_one(command).map_err(|refusal| Refused { refusal, item: None })?;
        self.apply_all(&events, position);
        Ok(events)
    }

    fn decide_batch(
        &mut self,
        caller: &Caller,
        atomic: bool,
        transfers: &[(TransactionId, Arc<Instruction>)],
        position: i64,
    ) -> Result<Vec<NewEvent>, Refused> {
        let mut events = Vec::with_capacity(transfers.len());
        for (item, (transaction, instruction)) in (0..).zip(transfers) {
            let transfer = TransactionCommand::Transfer { caller: caller.clone(), instruction: instruction.clone() };
            match self.on_transaction(*transaction, transfer) {
                Ok(moved) => {
                    let position = position.saturating_add_unsigned(events.len() as u64);
                    self.apply_all(&moved, position);
                    events.extend(moved);
                }
                Err(refusal) if atomic => return Err(Refused { refusal, item: Some(item) }),
                Err(refusal) => events.push(declined(*transaction, instruction, Failure::from(&refusal))),
            }
        }
        Ok(events)
    }

    fn apply_all(&mut self, events: &[NewEvent], first: i64) {
        for (position, NewEvent { event, .. }) in (first..).zip(events) {
            self.apply(position, event);
        }
    }

    fn decide_one(&self, command: &Command) -> Result<Vec<NewEvent>, Refusal> {
        let caller = || command.caller.clone();
        match command.action.clone() {
            Action::RegisterPartner { partner, name, currencies, client } => {
                self.register(partner, name, currencies, client)
            }
            Action::SuspendPartner { partner, reason } => self.on_partner(partner, PartnerCommand::Suspend { reason }),
            Action::ResumePartner { partner } => self.on_partner(partner, PartnerCommand::Resume),
            Action::RotateSecret { partner } => self.on_partner(partner, PartnerCommand::RotateSecret),
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
            Action::Batch { .. } => unreachable!("its transfers are decided one by one"),
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
        let mut events = self.on_partner(partner, register)?;
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

    fn on_partner(&self, id: PartnerId, command: PartnerCommand) -> Result<Vec<NewEvent>, Refusal> {
        let unregistered = Partner::default();
        let partner = self.partner(id).unwrap_or(&unregistered);
        handle(partner, command, self, |partner| partner.sequence, |event| Event::Partner(id, event))
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
