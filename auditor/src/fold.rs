//! The naive fold: what every wallet holds and may do, from what events say, one after another.
//!
//! Nothing is believed: what an event claims (`balanceAfter`, `walletVersion`) is compared with what the events
//! before it come to. After a difference the fold goes on, so that one bad event is one finding where possible.

use std::collections::{BTreeMap, HashMap, HashSet};

use rust_decimal::Decimal;
use uuid::Uuid;

use crate::money::Currency;
use crate::payload::{Direction, Entry, Instruction, InstructionKind, Kind, Payload, WalletChanged, WalletOpened};
use crate::record::{self, StoredEvent};
use crate::report::{CurrencyTotal, Findings};
use crate::views::{Postings, Tally};

/// The fold, and what only it needs to go on.
#[derive(Default)]
pub(crate) struct Fold {
    pub(crate) state: State,
    pending: HashMap<Uuid, Instruction<'static>>,
    system: HashSet<(Kind, Currency)>,
}

/// A partner as its stream leaves it.
#[derive(Clone, Copy, Default)]
pub(crate) struct Partner {
    /// The events in its stream.
    events: i64,
    pub(crate) suspended: bool,
}

/// Everything that the events so far come to.
#[derive(Clone, Default)]
pub(crate) struct State {
    pub(crate) wallets: HashMap<Uuid, Wallet>,
    pub(crate) partners: HashMap<Uuid, Partner>,
    /// How many transactions have come to what.
    pub(crate) statuses: BTreeMap<&'static str, i64>,
    /// Which events answer which question.
    pub(crate) postings: Postings,
}

#[derive(Clone)]
pub(crate) struct Wallet {
    pub(crate) kind: Kind,
    pub(crate) partner: Option<Uuid>,
    pub(crate) currency: Currency,
    pub(crate) balance: Decimal,
    pub(crate) status: Status,
    pub(crate) version: i64,
    /// The events that changed it.
    pub(crate) changes: Tally,
    /// Where it changed last.
    pub(crate) position: i64,
    /// Events in its own stream.
    sequence: i64,
    /// Pending transactions about it.
    pending: i64,
    /// How far the log's claims are from our fold; each difference is reported once.
    drift: Decimal,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Active,
    Frozen,
    Closed,
}

/// Where a finding belongs.
struct Here<'a> {
    findings: &'a mut Findings,
    event: &'a StoredEvent,
}

impl Here<'_> {
    fn wrong(&mut self, check: &'static str, detail: impl Into<String>) {
        self.findings.add(self.event.position, Some(self.event.commit), check, detail);
    }

    /// What the sequence of this event ought to be.
    fn sequence(&mut self, expected: i64) {
        let (id, found) = (&self.event.aggregate_id, self.event.sequence);
        if found != expected {
            let detail = format!("{id}: sequence {found} where {expected} belongs");
            self.wrong("sequence", detail);
        }
    }

    fn id(&mut self, prefix: &str, text: &str) -> Option<Uuid> {
        let id = record::id(prefix, text);
        if id.is_none() {
            self.wrong("id", format!("{text:?} is not {prefix} and a UUID"));
        }
        id
    }
}

impl Fold {
    /// One more event of a partner's life. Answers what the partner was before it.
    fn live(&mut self, here: &mut Here<'_>, id: Uuid) -> Partner {
        let partner = self.state.partners.entry(id).or_default();
        let before = *partner;
        here.sequence(before.events.saturating_add(1));
        partner.events = here.event.sequence;
        before
    }

    fn suspend(&mut self, mut here: Here<'_>, id: Uuid, suspended: bool) {
        let before = self.live(&mut here, id);
        let name = &here.event.aggregate_id;
        if before.events == 0 {
            here.wrong("partner-life", format!("{name} was never registered"));
        } else if before.suspended == suspended {
            let already = if suspended { "suspended" } else { "active" };
            here.wrong("partner-life", format!("{name} was {already} already"));
        }
        self.state.partners.entry(id).or_default().suspended = suspended;
    }

    /// Folds one event in. Answers the id of a transaction or command that begins here and must not begin again.
    pub(crate) fn event(&mut self, event: &StoredEvent, findings: &mut Findings) -> Option<Uuid> {
        let mut here = Here { findings, event };
        if event.event_version != "1.0.0" {
            here.wrong("event-type", format!("version {:?} is not known here", event.event_version));
        }
        let payload: Payload<'_> = match serde_json::from_str(&event.payload) {
            Ok(payload) => payload,
            Err(error) => {
                here.wrong("payload", format!("cannot be read: {error}"));
                return None;
            }
        };
        if payload.event_type() != event.event_type {
            here.wrong("event-type", format!("{:?} holds a {}", event.event_type, payload.event_type()));
        }
        let (stream, prefix) = match payload {
            Payload::PartnerRegistered {}
            | Payload::PartnerSuspended {}
            | Payload::PartnerResumed {}
            | Payload::PartnerSecretRotated {} => ("partner", "par_"),
            Payload::WalletOpened(_)
            | Payload::WalletFrozen(_)
            | Payload::WalletUnfrozen(_)
            | Payload::WalletClosed(_) => ("wallet", "wal_"),
            Payload::CommandDeclined {} | Payload::BatchDeclined {} => ("command", "cmd_"),
            _ => ("transaction", "txn_"),
        };
        if event.aggregate_type != stream {
            here.wrong("event-type", format!("a {} in a stream of a {}", payload.event_type(), event.aggregate_type));
        }
        let id = here.id(prefix, &event.aggregate_id)?;
        match payload {
            Payload::PartnerRegistered {} => {
                if self.live(&mut here, id).events != 0 {
                    here.wrong("partner-life", format!("{} is registered again", event.aggregate_id));
                }
            }
            Payload::PartnerSuspended {} => self.suspend(here, id, true),
            Payload::PartnerResumed {} => self.suspend(here, id, false),
            Payload::PartnerSecretRotated {} => {
                if self.live(&mut here, id).events == 0 {
                    here.wrong("partner-life", format!("{} was never registered", event.aggregate_id));
                }
            }
            Payload::WalletOpened(opened) => self.open(here, id, &opened),
            Payload::WalletFrozen(changed) => self.change(here, id, &changed, Status::Frozen),
            Payload::WalletUnfrozen(changed) => self.change(here, id, &changed, Status::Active),
            Payload::WalletClosed(changed) => self.change(here, id, &changed, Status::Closed),
            Payload::CommandDeclined {} | Payload::BatchDeclined {} => {
                here.sequence(1);
                if id != event.command_id {
                    here.wrong("command", "declined under another command's id");
                }
                return Some(id);
            }
            Payload::TransactionPosted(posted) => {
                here.sequence(1);
                let backdated = posted.instruction.effective_at.is_some();
                self.enter(&mut here, &posted.instruction.currency, &posted.entries, backdated);
                as_instructed(&mut here, &posted.instruction, &posted.entries);
                self.state.stands("SUCCESS");
                self.state.begins(&posted.instruction, event.position, true);
                return Some(id);
            }
            Payload::TransactionDeclined(declined) => {
                here.sequence(1);
                self.state.stands("FAILED");
                self.state.begins(&declined.instruction, event.position, false);
                return Some(id);
            }
            Payload::TransactionRequested(requested) => {
                here.sequence(1);
                self.request(here, id, requested.instruction);
                return Some(id);
            }
            Payload::TransactionSettled(settled) => {
                if let Some(instruction) = self.end(&mut here, id, &settled.wallet_id, "SUCCESS") {
                    if instruction.currency != settled.currency {
                        here.wrong("instruction", "settled in another currency than was asked for");
                    }
                    as_instructed(&mut here, &instruction, &settled.entries);
                }
                self.enter(&mut here, &settled.currency, &settled.entries, true);
            }
            Payload::TransactionFailed(failed) => {
                self.end(&mut here, id, &failed.wallet_id, "FAILED");
            }
            Payload::TransactionExpired(expired) => {
                self.end(&mut here, id, &expired.wallet_id, "EXPIRED");
            }
        }
        None
    }

    /// What must hold when all events are in.
    pub(crate) fn end_of_log(&self, head: i64, findings: &mut Findings) -> BTreeMap<String, CurrencyTotal> {
        let mut totals: BTreeMap<String, CurrencyTotal> = BTreeMap::new();
        for (id, wallet) in &self.state.wallets {
            let code = wallet.currency.code();
            let total = totals.entry(code.to_owned()).or_insert_with(|| {
                let zero = wallet.currency.zero();
                CurrencyTotal { wallets: 0, customers: zero, partners: zero, system: zero }
            });
            total.wallets = total.wallets.saturating_add(1);
            let sum = match wallet.kind {
                Kind::Customer => &mut total.customers,
                Kind::Settlement => &mut total.partners,
                Kind::Adjustments | Kind::Bank => &mut total.system,
            };
            match sum.checked_add(wallet.balance) {
                Some(more) => *sum = more,
                None => findings.add(head, None, "conservation", format!("the sum of {code} cannot be written")),
            }
            if wallet.status == Status::Closed && !wallet.balance.is_zero() {
                let detail = format!("wal_{id} is closed and holds {} {code}", wallet.balance);
                findings.add(wallet.position, None, "closed-wallet", detail);
            }
        }
        for (code, CurrencyTotal { customers, partners, system, .. }) in &totals {
            let all = customers.checked_add(*partners).and_then(|sum| sum.checked_add(*system));
            if all != Some(Decimal::ZERO) {
                let detail = format!(
                    "{code}: customers {customers}, partners {partners}, system {system} are not zero together"
                );
                findings.add(head, None, "conservation", detail);
            }
        }
        totals
    }

    fn open(&mut self, mut here: Here<'_>, id: Uuid, opened: &WalletOpened<'_>) {
        let name = here.event.aggregate_id.clone();
        if self.state.wallets.contains_key(&id) {
            here.wrong("wallet-life", format!("{name} is opened again"));
            return;
        }
        here.sequence(1);
        let Some(currency) = Currency::read(&opened.currency) else {
            here.wrong("currency", format!("{:?} is not a currency", opened.currency));
            return;
        };
        if opened.wallet_version != 1 {
            here.wrong("wallet-version", format!("{name} begins with version {}", opened.wallet_version));
        }
        if currency.balance(&opened.balance_after) != Some(Decimal::ZERO) {
            here.wrong("balance-after", format!("{name} begins with {:?}", opened.balance_after));
        }
        let of_the_system = !opened.kind.has_floor();
        let partner = opened.partner_id.as_deref().and_then(|partner| here.id("par_", partner));
        match partner {
            None if !of_the_system => here.wrong("wallet-life", format!("{name} belongs to no partner")),
            Some(_) if of_the_system => here.wrong("wallet-life", format!("{name} is the system's and a partner's")),
            Some(partner) if !self.state.partners.contains_key(&partner) => {
                here.wrong("wallet-life", format!("{name} belongs to par_{partner}, who is not registered"));
            }
            _ => {}
        }
        // A wallet without a floor can pay out what it never had: there is one for each job and currency.
        if of_the_system && !self.system.insert((opened.kind, currency)) {
            here.wrong("wallet-life", format!("{name}: a second system wallet of its kind in {}", currency.code()));
        }
        let wallet = Wallet {
            kind: opened.kind,
            partner,
            currency,
            balance: currency.zero(),
            status: Status::Active,
            version: opened.wallet_version,
            changes: Tally::default(),
            position: here.event.position,
            sequence: here.event.sequence,
            pending: 0,
            drift: Decimal::ZERO,
        };
        self.state.wallets.insert(id, wallet);
        self.state.changed(id, here.event.position);
    }

    fn change(&mut self, mut here: Here<'_>, id: Uuid, changed: &WalletChanged<'_>, to: Status) {
        let name = here.event.aggregate_id.clone();
        let Some(wallet) = self.state.wallets.get_mut(&id) else {
            here.wrong("wallet-life", format!("{name} was never opened"));
            return;
        };
        here.sequence(wallet.sequence.saturating_add(1));
        wallet.sequence = here.event.sequence;
        let may = match to {
            Status::Frozen => wallet.status == Status::Active,
            Status::Active => wallet.status == Status::Frozen,
            Status::Closed => wallet.status != Status::Closed,
        };
        if !may {
            here.wrong("wallet-life", format!("{name} goes from {:?} to {to:?}", wallet.status));
        }
        if to == Status::Closed && !wallet.balance.is_zero() {
            here.wrong("closed-wallet", format!("{name} is closed with {}", wallet.balance));
        }
        if to == Status::Closed && wallet.pending != 0 {
            here.wrong("closed-wallet", format!("{name} is closed while {} transactions are pending", wallet.pending));
        }
        wallet.status = to;
        wallet.claims(&mut here, &name, changed.wallet_version, &changed.balance_after);
        self.state.changed(id, here.event.position);
    }

    /// Takes the entries of one event in: balanced, in one currency, between wallets that may be used.
    fn enter(&mut self, here: &mut Here<'_>, code: &str, entries: &[Entry<'_>], may_be_backdated: bool) {
        let Some(currency) = Currency::read(code) else {
            here.wrong("currency", format!("{code:?} is not a currency"));
            return;
        };
        if entries.is_empty() {
            here.wrong("balanced", "money moves without entries");
        }
        let mut sum = Some(Decimal::ZERO);
        for entry in entries {
            let Some(amount) = currency.amount(&entry.amount) else {
                here.wrong("amount", format!("{:?} is not an amount of {code}", entry.amount));
                sum = None;
                continue;
            };
            let mut change = amount;
            change.set_sign_negative(entry.direction == Direction::Debit);
            sum = sum.and_then(|sum| sum.checked_add(change));
            let Some(id) = here.id("wal_", &entry.wallet_id) else { continue };
            let Some(wallet) = self.state.wallets.get_mut(&id) else {
                here.wrong("wallet-life", format!("{} was never opened", entry.wallet_id));
                continue;
            };
            if wallet.currency != currency {
                let detail = format!("{code} enters {}, which holds {}", entry.wallet_id, wallet.currency.code());
                here.wrong("currency", detail);
                continue;
            }
            if wallet.status != Status::Active {
                here.wrong(
                    "wallet-status",
                    format!("money moves in {}, which is {:?}", entry.wallet_id, wallet.status),
                );
            }
            match wallet.balance.checked_add(change) {
                Some(balance) => wallet.balance = balance,
                None => here.wrong("amount", format!("the balance of {} cannot be written", entry.wallet_id)),
            }
            if wallet.kind.has_floor() && wallet.balance < Decimal::ZERO {
                here.wrong("floor", format!("{} falls to {}", entry.wallet_id, wallet.balance));
            }
            wallet.claims(here, &entry.wallet_id, entry.wallet_version, &entry.balance_after);
            self.state.changed(id, here.event.position);
            if may_be_backdated {
                self.state.postings.add_of("backdated", id.as_bytes(), here.event.position);
            }
        }
        if let Some(sum) = sum
            && !sum.is_zero()
        {
            here.wrong("balanced", format!("credits exceed debits by {sum} {code}"));
        }
    }

    fn request(&mut self, mut here: Here<'_>, id: Uuid, instruction: Instruction<'_>) {
        if Currency::read(&instruction.currency).and_then(|it| it.amount(&instruction.amount)).is_none() {
            let Instruction { amount, currency, .. } = &instruction;
            here.wrong("amount", format!("{amount:?} is not an amount of {currency:?}"));
        }
        match here.id("wal_", &instruction.wallet_id).and_then(|id| self.state.wallets.get_mut(&id)) {
            Some(wallet) => {
                wallet.pending = wallet.pending.saturating_add(1);
                if wallet.currency.code() != instruction.currency {
                    here.wrong("currency", "asked for in another currency than the wallet's");
                }
                if wallet.status != Status::Active {
                    here.wrong("wallet-status", format!("asked for a wallet that is {:?}", wallet.status));
                }
            }
            None => here.wrong("wallet-life", format!("{} was never opened", instruction.wallet_id)),
        }
        self.state.stands("PENDING");
        self.state.begins(&instruction, here.event.position, false);
        self.pending.insert(id, instruction.into_owned());
    }

    /// Ends what is pending; what never began, or has ended, cannot end.
    fn end(
        &mut self,
        here: &mut Here<'_>,
        id: Uuid,
        wallet_id: &str,
        status: &'static str,
    ) -> Option<Instruction<'static>> {
        let Some(instruction) = self.pending.remove(&id) else {
            here.wrong("transaction-life", format!("{} ends and was not pending", here.event.aggregate_id));
            return None;
        };
        here.sequence(2);
        self.state.stood("PENDING");
        self.state.stands(status);
        if instruction.wallet_id != wallet_id {
            here.wrong("instruction", format!("ends for {wallet_id}, was asked for {}", instruction.wallet_id));
        }
        if let Some(wallet) = record::id("wal_", &instruction.wallet_id).and_then(|id| self.state.wallets.get_mut(&id))
        {
            wallet.pending = wallet.pending.saturating_sub(1);
        }
        Some(instruction)
    }
}

impl State {
    /// A transaction has come to this.
    fn stands(&mut self, status: &'static str) {
        let count = self.statuses.entry(status).or_default();
        *count = count.saturating_add(1);
    }

    /// It has gone on from there.
    fn stood(&mut self, status: &'static str) {
        let count = self.statuses.entry(status).or_default();
        *count = count.saturating_sub(1);
    }

    /// A wallet is not what it was before.
    fn changed(&mut self, wallet: Uuid, position: i64) {
        self.postings.add(wallet, position);
        if let Some(found) = self.wallets.get_mut(&wallet) {
            found.changes.add(wallet, position);
        }
    }

    /// A transaction begins, done or not: everybody who may look for it finds it here.
    fn begins(&mut self, instruction: &Instruction<'_>, position: i64, is_done: bool) {
        let partner = instruction.partner_id.as_deref().and_then(|partner| record::id("par_", partner));
        for owner in [Some(Uuid::nil()), partner].into_iter().flatten() {
            self.postings.add(owner, position);
            if !is_done || instruction.kind != InstructionKind::Transfer {
                self.postings.add_of("unusual", owner.as_bytes(), position);
            }
        }
        for wallet in [Some(&instruction.wallet_id), instruction.to_wallet_id.as_ref()].into_iter().flatten() {
            let Some(id) = record::id("wal_", wallet) else { continue };
            // Version 8 is what the system's own wallets have.
            if !is_done || id.get_version_num() == 8 {
                self.postings.add_of("about", id.as_bytes(), position);
            }
        }
        if let Some(user) = &instruction.user_id {
            self.postings.add_of("user", user.as_bytes(), position);
        }
        if let Some(reference) = &instruction.reference {
            self.postings.add_of("reference", reference.as_bytes(), position);
        }
    }
}

impl Wallet {
    /// Compares what an event says about the wallet with what the events up to it come to.
    fn claims(&mut self, here: &mut Here<'_>, name: &str, version: i64, balance_after: &str) {
        let expected = self.version.saturating_add(1);
        if version != expected {
            here.wrong("wallet-version", format!("{name}: version {version} where {expected} belongs"));
        }
        self.version = version;
        self.position = here.event.position;
        let Some(claimed) = self.currency.balance(balance_after) else {
            here.wrong("balance-after", format!("{name}: {balance_after:?} is not a balance"));
            return;
        };
        let drift = claimed.checked_sub(self.balance).unwrap_or(Decimal::MAX);
        if drift != self.drift && !drift.is_zero() {
            here.wrong("balance-after", format!("{name}: {claimed} is written where {} belongs", self.balance));
        }
        self.drift = drift;
    }
}

impl Status {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Active => "ACTIVE",
            Self::Frozen => "FROZEN",
            Self::Closed => "CLOSED",
        }
    }
}

impl Kind {
    pub(crate) const fn has_floor(self) -> bool {
        matches!(self, Self::Customer | Self::Settlement)
    }
}

/// Whether the entries do what was asked for: this amount, at this wallet, in this direction.
fn as_instructed(here: &mut Here<'_>, instruction: &Instruction<'_>, entries: &[Entry<'_>]) {
    let of_wallet = match instruction.kind {
        InstructionKind::Transfer => Some(Direction::Debit),
        InstructionKind::Adjustment => instruction.direction,
        InstructionKind::TopUp => Some(Direction::Credit),
    };
    let has = |wallet: &str, direction: Option<Direction>| {
        entries.iter().any(|entry| {
            entry.wallet_id == wallet && Some(entry.direction) == direction && entry.amount == instruction.amount
        })
    };
    let payee = match (instruction.kind, &instruction.to_wallet_id) {
        (InstructionKind::Transfer, Some(payee)) => has(payee, Some(Direction::Credit)),
        (InstructionKind::Transfer, None) => false,
        (InstructionKind::Adjustment | InstructionKind::TopUp, _) => true,
    };
    if !has(&instruction.wallet_id, of_wallet) || !payee || entries.len() != 2 {
        here.wrong("instruction", "the entries are not what was asked for");
    }
}
