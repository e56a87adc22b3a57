//! The judge: holds what was promised against what clients know, what the log says, what is shown, and what has come.
//!
//! A pure function of the evidence, so that planted bugs (`planted.rs`) go through the very same. It shares no code with
//! what it judges, and has no tolerance: one violation is one too many.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use crate::evidence::Evidence;
use crate::fold::Fold;
use crate::history::{Answer, Call, Intent, Transfer, Verdict};
use crate::log::{self, Event};
use crate::money::{Money, minor};

/// What was promised; each violation is of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Promise {
    /// What was acknowledged is in the log, with that effect.
    Lost,
    /// One key has one effect.
    Doubled,
    /// Nothing is in the log, and nothing is told, that nobody asked for.
    Phantom,
    /// Every key finds out what became of its command.
    Unsettled,
    /// The same key gets the same answer.
    Unequal,
    /// No answer but those that a client can act upon.
    Unclear,
    /// Money moves; it is never made and never lost.
    Conserved,
    /// Nobody spends what is not there.
    Floor,
    /// Positions, commits and streams have no gaps.
    Gap,
    /// The hashes follow.
    Chain,
    /// Views show what the log says.
    View,
    /// No read is older than what it was told to reflect, and none is wrong about its position.
    Stale,
    /// Every completed transaction reaches the receiver.
    Undelivered,
    /// A webhook's body never changes and is true, and it is signed.
    Altered,
    /// It comes back after every fault, and does not end by itself.
    Recovery,
    /// The system's own audit agrees.
    Audit,
}

impl Promise {
    pub const ALL: [Self; 16] = [
        Self::Lost,
        Self::Doubled,
        Self::Phantom,
        Self::Unsettled,
        Self::Unequal,
        Self::Unclear,
        Self::Conserved,
        Self::Floor,
        Self::Gap,
        Self::Chain,
        Self::View,
        Self::Stale,
        Self::Undelivered,
        Self::Altered,
        Self::Recovery,
        Self::Audit,
    ];

    /// How a report names a violation of it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lost => "lost",
            Self::Doubled => "doubled",
            Self::Phantom => "phantom",
            Self::Unsettled => "unsettled",
            Self::Unequal => "unequal answers",
            Self::Unclear => "unclear answers",
            Self::Conserved => "not conserved",
            Self::Floor => "below the floor",
            Self::Gap => "gaps",
            Self::Chain => "broken chain",
            Self::View => "wrong views",
            Self::Stale => "stale reads",
            Self::Undelivered => "undelivered",
            Self::Altered => "altered webhooks",
            Self::Recovery => "not recovered",
            Self::Audit => "audit",
        }
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct Violation {
    pub promise: Promise,
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.promise.name(), self.what)
    }
}

/// What the receiver must have been told: webhook id, type, and the place of the event.
pub(crate) fn told(log: &log::Log, fold: &Fold, partner: &str, after: i64) -> BTreeMap<String, (&'static str, usize)> {
    let mut told = BTreeMap::new();
    for (place, event) in log.events.iter().enumerate().filter(|(_, event)| after < event.position) {
        let (event_type, owner) = match event.event_type.as_str() {
            "TransactionPosted" | "TransactionSettled" => ("transaction.completed", owner(fold, event)),
            "TransactionFailed" | "TransactionExpired" => ("transaction.failed", owner(fold, event)),
            "WalletOpened" => {
                ("wallet.opened", fold.wallets.get(&event.aggregate_id).and_then(|wallet| wallet.partner.as_deref()))
            }
            _ => continue,
        };
        if owner == Some(partner) {
            told.insert(log::webhook_id(&event.leaf, event_type), (event_type, place));
        }
    }
    told
}

/// Every promise that the evidence shows broken.
pub(crate) fn check(evidence: &Evidence) -> Vec<Violation> {
    let mut fold = Fold::of(&evidence.log);
    let mut found = std::mem::take(&mut fold.violations);
    let mut judge = Judge { evidence, fold: &fold, found: Vec::new() };
    judge.order();
    judge.hashes();
    judge.calls();
    judge.payments();
    judge.views();
    judge.reads();
    judge.webhooks();
    found.append(&mut judge.found);
    found.sort_by_key(|violation| violation.promise);
    found
}

struct Judge<'a> {
    evidence: &'a Evidence,
    fold: &'a Fold,
    found: Vec<Violation>,
}

impl<'a> Judge<'a> {
    fn violated(&mut self, promise: Promise, what: impl Into<String>) {
        self.found.push(Violation { promise, what: what.into() });
    }

    fn order(&mut self) {
        let log = &self.evidence.log;
        for (event, expected) in log.events.iter().zip(1..) {
            if event.position != expected {
                return self.violated(Promise::Gap, format!("position {expected} is missing"));
            }
        }
        let mut streams: BTreeMap<(&str, &str), i64> = BTreeMap::new();
        for event in &log.events {
            let sequence = streams.entry((&event.aggregate_type, &event.aggregate_id)).or_default();
            *sequence += 1;
            if event.sequence != *sequence {
                let what = format!("position {}: {} of its stream, not {sequence}", event.position, event.sequence);
                self.violated(Promise::Gap, what);
            }
        }
        let (mut ended, mut current) = (BTreeSet::new(), None);
        for event in &log.events {
            if current != Some(event.command) {
                ended.extend(current.replace(event.command));
            }
            if ended.contains(&event.command) {
                self.violated(Promise::Gap, format!("position {}: its command's events are apart", event.position));
            }
        }
        for pair in log.events.windows(2) {
            if pair[1].recorded_at < pair[0].recorded_at {
                self.violated(Promise::Gap, format!("position {}: the clock went back", pair[1].position));
            }
        }
    }

    fn hashes(&mut self) {
        let log = &self.evidence.log;
        for event in &log.events {
            if event.leaf != event.leaf_of_content() {
                self.violated(Promise::Chain, format!("position {}: its leaf is not its content's", event.position));
            }
        }
        let (mut last, mut chain) = (0, log::genesis(log.ledger));
        for (commit, number) in log.commits.iter().zip(0..) {
            if commit.number != number {
                return self.violated(Promise::Gap, format!("commit {number} is missing"));
            }
            if number != 0 {
                let events = log.events.iter().skip(place(commit.first - 1));
                let events = events.take(place(commit.last + 1 - commit.first));
                let leaves: Vec<_> =
                    events.filter(|event| event.commit == number).map(|event| event.leaf.clone()).collect();
                let whole = commit.first == last + 1 && leaves.len() == place(commit.last + 1 - commit.first);
                if !whole {
                    return self.violated(Promise::Gap, format!("commit {number} has not its events"));
                }
                if log::root(&leaves) != commit.root {
                    self.violated(Promise::Chain, format!("commit {number}: its root is not its events'"));
                }
                chain = log::chain(&chain, &commit.root, commit.first, commit.last);
                last = commit.last;
            }
            if chain != commit.chain {
                self.violated(Promise::Chain, format!("commit {number} does not follow the one before it"));
                chain.clone_from(&commit.chain);
            }
        }
        if last != log.head() {
            self.violated(Promise::Gap, format!("the commits end at {last}, the events at {}", log.head()));
        }
    }

    /// Every call against every command: what is acknowledged is there, once, and nothing else is.
    fn calls(&mut self) {
        let Evidence { log, known, .. } = self.evidence;
        let mut by_key = BTreeMap::new();
        let mut by_marker = BTreeMap::new();
        for call in &known.calls {
            let client = if call.as_admin { &self.evidence.admin_client } else { &self.evidence.partner_client };
            by_key.insert(log::key_hash(client, &call.marker), call.number);
            by_marker.insert(call.marker.as_str(), call.number);
        }
        let mut commands: BTreeMap<Uuid, Vec<&Event>> = BTreeMap::new();
        for event in &log.events {
            commands.entry(event.command).or_default().push(event);
        }
        let mut of_call: BTreeMap<u64, Vec<&Vec<&Event>>> = BTreeMap::new();
        for events in commands.values() {
            let keyed = events[0].key.as_ref().and_then(|key| by_key.get(key)).copied();
            let marked: BTreeSet<u64> =
                events.iter().filter_map(|event| by_marker.get(of_whole(&marker(event)?)).copied()).collect();
            let calls: BTreeSet<u64> = keyed.iter().copied().chain(marked).collect();
            match calls.len() {
                0 => self.unasked(events),
                1 => {}
                _ => self.violated(Promise::Phantom, format!("{} is of two calls", name(events[0]))),
            }
            for call in calls {
                of_call.entry(call).or_default().push(events);
            }
        }
        for call in &known.calls {
            self.answers(call);
            let commands = of_call.get(&call.number).map(Vec::as_slice).unwrap_or_default();
            let effects = commands.iter().flat_map(|events| events.iter()).filter(|event| is_effect(event));
            let mut once = BTreeSet::new();
            // The items of a batch are told apart by their numbers.
            let repeated = effects.filter(|event| !once.insert(marker(event))).count();
            if 1 < commands.len() || 0 < repeated {
                let what = format!("{}: {} commands, {repeated} effects repeated", call.marker, commands.len());
                self.violated(Promise::Doubled, what);
            }
            self.effect(call, commands.first().map(|events| events.as_slice()));
        }
        for what in &known.missing {
            self.violated(Promise::Stale, format!("was answered 201 and then 404: {what}"));
        }
        for what in &known.mixed_up {
            self.violated(Promise::Unequal, format!("another request under a used key was not refused: {what}"));
        }
    }

    /// A command that no client has sent: the workflow's on a top-up, or of the run's preparations.
    fn unasked(&mut self, events: &[&Event]) {
        let prepared = events[0].key.as_ref() == Some(&self.evidence.registration_key);
        for event in events {
            let workflow = matches!(
                event.event_type.as_str(),
                "TransactionSettled" | "TransactionFailed" | "TransactionExpired" | "CommandDeclined"
            );
            let of_system = event.event_type == "WalletOpened"
                && self.fold.wallets.get(&event.aggregate_id).is_some_and(|wallet| wallet.partner.is_none());
            // What the workflow may do is judged with the payments; a declined command has no effect.
            if !workflow && !prepared && !of_system {
                self.violated(Promise::Phantom, format!("{} was asked for by nobody", name(event)));
            }
        }
    }

    /// What a call's answers say of each other.
    fn answers(&mut self, call: &Call) {
        let settled: Vec<_> =
            call.answers().filter(|answer| matches!(answer.verdict(), Verdict::Done | Verdict::Refused)).collect();
        for answer in call.answers().filter(|answer| answer.verdict() == Verdict::Unclear) {
            self.violated(Promise::Unclear, format!("{}: {} {}", call.marker, answer.status, answer.body));
        }
        let Some(first) = settled.first() else {
            if !call.abandoned {
                self.violated(
                    Promise::Unsettled,
                    format!("{}, {:?}: {:?}", call.marker, call.intent, call.attempts.last()),
                );
            }
            return;
        };
        for other in &settled[1..] {
            if (first.status, comparable(first)) != (other.status, comparable(other)) {
                let (first, other) = ((first.status, &first.body), (other.status, &other.body));
                self.violated(Promise::Unequal, format!("{}: {first:?} and then {other:?}", call.marker));
            }
        }
        let as_new = settled.iter().filter(|answer| !answer.replayed && is_kept(answer)).count();
        if 1 < as_new {
            self.violated(Promise::Unequal, format!("{}: answered {as_new} times as if it were new", call.marker));
        }
        if first.slug.as_deref() == Some("idempotency-key-reused") {
            self.violated(Promise::Unequal, format!("{}: its own key was refused", call.marker));
        }
    }

    /// What the log says of a call, against its answer.
    fn effect(&mut self, call: &Call, events: Option<&[&Event]>) {
        // Every item of a batch may be refused, and the batch is done all the same.
        let is_batch = matches!(call.intent, Intent::Batch { atomic: false, .. });
        let counts = |event: &&&Event| is_effect(event) || (is_batch && event.event_type == "TransactionDeclined");
        let effect = events.and_then(|events| events.iter().find(counts).copied());
        let Some(answer) = call.settled() else {
            if let (true, Some(event)) = (call.abandoned, events.and_then(|events| events.first())) {
                let what = format!("{}: {} though it was said that it was not executed", call.marker, name(event));
                self.violated(Promise::Phantom, what);
            }
            return;
        };
        match (answer.verdict(), effect) {
            (Verdict::Done, None) => {
                self.violated(Promise::Lost, format!("{}: answered {} {}", call.marker, answer.status, answer.body));
            }
            (Verdict::Done, Some(event)) => {
                if let Some(difference) = difference(call, answer, event, events.unwrap_or_default()) {
                    self.violated(Promise::Lost, format!("{}: {}: {difference}", call.marker, name(event)));
                }
            }
            (_, Some(event)) => {
                let what = format!("{}: {} though {} was answered", call.marker, name(event), answer.status);
                self.violated(Promise::Phantom, what);
            }
            (_, None) => {
                if events.is_none() && is_kept(answer) {
                    self.violated(
                        Promise::Lost,
                        format!("{}: the log does not know its refusal {}", call.marker, answer.body),
                    );
                }
            }
        }
    }

    /// Top-ups against what was decided at the bank.
    fn payments(&mut self) {
        let by_transaction: BTreeMap<&str, _> =
            self.evidence.known.payments.values().map(|payment| (payment.transaction.as_str(), payment)).collect();
        for (id, transaction) in self.fold.transactions.iter().filter(|(_, found)| found.kind == "TOP_UP") {
            let payment = by_transaction.get(id.as_str());
            match (transaction.status, payment) {
                ("SUCCESS", Some(payment)) if payment.pays => {}
                ("SUCCESS", _) => self.violated(Promise::Phantom, format!("{id} has succeeded, and nobody has paid")),
                (status, Some(payment)) if payment.taken && payment.pays => {
                    self.violated(Promise::Lost, format!("{id} was paid, and is {status}"));
                }
                ("PENDING", Some(payment)) if payment.taken => {
                    self.violated(Promise::Unsettled, format!("{id}: the bank has decided, and it is still pending"));
                }
                ("EXPIRED", _) => self.violated(Promise::Phantom, format!("{id} has expired before its time")),
                _ => {} // declined, or not paid
            }
            let moved: i128 = transaction.moves.iter().map(|(_, change)| *change).filter(|change| 0 < *change).sum();
            let asked = minor(&transaction.amount, &transaction.currency).unwrap_or_default();
            if transaction.status == "SUCCESS" && moved != asked {
                self.violated(Promise::Conserved, format!("{id}: {asked} was asked for, {moved} has come"));
            }
        }
    }

    fn views(&mut self) {
        let Evidence { shown, .. } = self.evidence;
        let mut wallets: BTreeMap<&str, &Value> = BTreeMap::new();
        for wallet in &shown.wallets {
            if wallets.insert(wallet["id"].as_str().unwrap_or_default(), wallet).is_some() {
                self.violated(Promise::View, format!("{} is shown twice", wallet["id"]));
            }
        }
        for (id, wallet) in self.fold.wallets.iter().filter(|(_, wallet)| wallet.partner.is_some()) {
            let Some(seen) = wallets.remove(id.as_str()) else {
                self.violated(Promise::View, format!("the wallet {id} is not shown"));
                continue;
            };
            let balance = seen["balance"].as_str().and_then(|text| minor(text, &wallet.currency));
            let seen = (balance, seen["status"].as_str(), seen["version"].as_i64());
            let is = (Some(wallet.balance), Some(wallet.status), Some(wallet.version));
            if seen != is {
                self.violated(Promise::View, format!("the wallet {id} is {is:?} and shown as {seen:?}"));
            }
            let statement = shown.entries.get(id).map(Vec::as_slice).unwrap_or_default();
            let statement: Vec<_> = statement
                .iter()
                .map(|entry| {
                    let after = entry["balanceAfter"].as_str().and_then(|text| minor(text, &wallet.currency));
                    (entry["position"].as_i64().unwrap_or_default(), after.unwrap_or(i128::MIN))
                })
                .collect();
            if let Some(what) = first_difference(&wallet.entries, &statement) {
                self.violated(Promise::View, format!("the statement of {id}: {what}"));
            }
        }
        for id in wallets.into_keys().filter(|id| !self.fold.wallets.contains_key(*id)).collect::<Vec<_>>() {
            self.violated(Promise::View, format!("the wallet {id} is shown and not in the log"));
        }
        let mut transactions: BTreeMap<&str, &Value> = BTreeMap::new();
        for transaction in &shown.transactions {
            if transactions.insert(transaction["id"].as_str().unwrap_or_default(), transaction).is_some() {
                self.violated(Promise::View, format!("{} is shown twice", transaction["id"]));
            }
        }
        for (id, transaction) in &self.fold.transactions {
            let Some(seen) = transactions.remove(id.as_str()) else {
                self.violated(Promise::View, format!("the transaction {id} is not shown"));
                continue;
            };
            let is = (Some(transaction.status), Some(transaction.amount.as_str()), Some(transaction.last_position));
            let shown = (seen["status"].as_str(), seen["amount"].as_str(), seen["ledgerPosition"].as_i64());
            if is != shown {
                self.violated(Promise::View, format!("the transaction {id} is {is:?} and shown as {shown:?}"));
            }
        }
        for id in transactions.into_keys().collect::<Vec<_>>() {
            self.violated(Promise::View, format!("the transaction {id} is shown and not in the log"));
        }
    }

    fn reads(&mut self) {
        for read in &self.evidence.known.reads {
            if read.position < read.min_position {
                self.violated(Promise::Stale, format!("{read:?}"));
            }
            let currency = self.fold.wallets.get(&read.wallet).map(|wallet| wallet.currency.as_str());
            let balance = currency.and_then(|currency| minor(&read.balance, currency));
            let was = self.fold.balance_at(&read.wallet, read.position);
            if balance.is_none() || balance != was {
                self.violated(Promise::Stale, format!("{read:?}, and the log says {was:?} at that position"));
            }
        }
    }

    fn webhooks(&mut self) {
        let Evidence { log, received, partner, endpoint_after, .. } = self.evidence;
        let told = told(log, self.fold, partner, *endpoint_after);
        let mut sequences = BTreeSet::new();
        for (id, (event_type, place)) in &told {
            let event = &log.events[*place];
            let Some(came) = received.get(id).filter(|came| 0 < came.taken) else {
                self.violated(Promise::Undelivered, format!("{event_type} of {}", name(event)));
                continue;
            };
            if 1 < came.bodies.len() {
                self.violated(Promise::Altered, format!("{id} came with {} different bodies", came.bodies.len()));
            }
            if 0 < came.unsigned {
                self.violated(Promise::Altered, format!("{id} came {} times without a true signature", came.unsigned));
            }
            let body: Value = came.bodies.first().and_then(|body| serde_json::from_str(body).ok()).unwrap_or_default();
            sequences.extend(body["sequence"].as_i64());
            let mut true_so_far = body["eventId"] == **id
                && body["eventType"] == *event_type
                && body["ledgerPosition"] == event.position
                && body["data"]["id"] == *event.aggregate_id;
            if let Some(transaction) = self.fold.transactions.get(&event.aggregate_id) {
                true_so_far &=
                    body["data"]["status"] == transaction.status && body["data"]["amount"] == *transaction.amount;
            }
            if !true_so_far {
                self.violated(
                    Promise::Altered,
                    format!("{id} does not say what position {} says: {body}", event.position),
                );
            }
        }
        for id in received.keys().filter(|id| !told.contains_key(*id)) {
            self.violated(Promise::Phantom, format!("the webhook {id} tells what is not in the log"));
        }
        if !sequences.iter().copied().eq((1..).take(sequences.len())) {
            self.violated(Promise::Undelivered, "the numbers of the webhooks have a gap".to_owned());
        }
    }
}

/// Why the command is not what the call asked for and was told; `None` if it is.
fn difference(call: &Call, answer: &Answer, event: &Event, events: &[&Event]) -> Option<String> {
    let body: Value = serde_json::from_str(&answer.body).unwrap_or_default();
    let last = events.last().map(|event| event.position);
    if answer.position != last {
        return Some(format!("the answer named position {:?}, the command ends at {last:?}", answer.position));
    }
    if let Intent::Batch { atomic, transfers } = &call.intent {
        return difference_of_batch(call, *atomic, transfers, &body, events);
    }
    if body["id"] != *event.aggregate_id {
        return Some(format!("the answer named {}", body["id"]));
    }
    let as_asked = match &call.intent {
        Intent::OpenWallet { user, currency } => {
            let content = event.content().unwrap_or_default();
            event.event_type == "WalletOpened" && content["userId"] == **user && content["currency"] == **currency
        }
        Intent::Transfer { from, to, money } => moves(event, Some(from), Some(to), money, "TRANSFER", from),
        Intent::Adjust { wallet, credit: true, money } => moves(event, None, Some(wallet), money, "ADJUSTMENT", wallet),
        Intent::Adjust { wallet, credit: false, money } => {
            moves(event, Some(wallet), None, money, "ADJUSTMENT", wallet)
        }
        Intent::TopUp { wallet, money } => moves(event, None, None, money, "TOP_UP", wallet),
        Intent::Freeze { wallet } => event.event_type == "WalletFrozen" && event.aggregate_id == *wallet,
        Intent::Unfreeze { wallet } => event.event_type == "WalletUnfrozen" && event.aggregate_id == *wallet,
        Intent::Batch { .. } => unreachable!("answered above"),
    };
    (!as_asked).then(|| format!("{:?} was asked for, {} was done", call.intent, event.payload))
}

/// The same for a batch: an event for each item, in their order, and each as its result says.
fn difference_of_batch(
    call: &Call,
    atomic: bool,
    transfers: &[Transfer],
    body: &Value,
    events: &[&Event],
) -> Option<String> {
    let results = body["results"].as_array().map(Vec::as_slice).unwrap_or_default();
    if (results.len(), events.len()) != (transfers.len(), transfers.len()) {
        let (items, results, events) = (transfers.len(), results.len(), events.len());
        return Some(format!("{items} items were asked for, {results} answered, {events} are in the log"));
    }
    for (number, ((transfer, result), event)) in transfers.iter().zip(results).zip(events).enumerate() {
        let Transfer { from, to, money } = transfer;
        let done = match event.event_type.as_str() {
            "TransactionPosted" => {
                result["status"] == "SUCCESS" && moves(event, Some(from), Some(to), money, "TRANSFER", from)
            }
            "TransactionDeclined" => result["status"] == "FAILED" && !atomic,
            _ => false,
        };
        let its_own = marker(event).is_some_and(|marker| marker == format!("{}/{number}", call.marker))
            && result["transactionId"] == *event.aggregate_id;
        if !done || !its_own {
            return Some(format!("item {number} was {transfer:?}, answered {result}, done {}", event.payload));
        }
    }
    None
}

/// Whether the event moves this money so, or asks for it if it is a top-up.
fn moves(event: &Event, from: Option<&str>, to: Option<&str>, money: &Money, kind: &str, about: &str) -> bool {
    let content = event.content().unwrap_or_default();
    let instruction = &content["instruction"];
    let entries = content["entries"].as_array().map(Vec::as_slice).unwrap_or_default();
    let is = |entry: &Value, direction: &str, wallet: Option<&str>| {
        entry["direction"] == direction
            && entry["amount"] == *money.text()
            && wallet.is_none_or(|wallet| entry["walletId"] == *wallet)
    };
    let moved = match kind {
        "TOP_UP" => entries.is_empty(),
        _ => {
            entries.len() == 2
                && entries.iter().any(|entry| is(entry, "DEBIT", from))
                && entries.iter().any(|entry| is(entry, "CREDIT", to))
        }
    };
    moved
        && instruction["type"] == kind
        && instruction["walletId"] == *about
        && instruction["amount"] == *money.text()
        && instruction["currency"] == *money.currency
}

/// An answer without what belongs to the one request and not to the matter.
fn comparable(answer: &Answer) -> String {
    match serde_json::from_str::<Value>(&answer.body) {
        Ok(Value::Object(mut problem)) if 400 <= answer.status => {
            problem.remove("requestId");
            Value::Object(problem).to_string()
        }
        _ => answer.body.clone(),
    }
}

/// Whether the ledger keeps such an answer under its key. What the door alone can see is refused there, every time anew.
fn is_kept(answer: &Answer) -> bool {
    !(400..=499).contains(&answer.status)
        || !matches!(answer.slug.as_deref(), Some("same-wallet" | "idempotency-key-reused"))
}

/// Whose partner the transaction is.
fn owner<'f>(fold: &'f Fold, event: &Event) -> Option<&'f str> {
    fold.transactions.get(&event.aggregate_id)?.partner.as_deref()
}

/// Whether something has changed by it, beside that a refusal is kept.
fn is_effect(event: &Event) -> bool {
    !event.event_type.ends_with("Declined")
}

/// The marker of the call that an event says it is of.
fn marker(event: &Event) -> Option<String> {
    let content = event.content()?;
    let instruction = &content["instruction"];
    let places =
        [&instruction["reference"], &instruction["description"], &content["metadata"]["call"], &content["reason"]];
    places.into_iter().find_map(|place| place.as_str().map(str::to_owned))
}

/// The call's marker in that of an item.
fn of_whole(marker: &str) -> &str {
    marker.split_once('/').map_or(marker, |(whole, _)| whole)
}

fn name(event: &Event) -> String {
    format!("position {}, {} of {}", event.position, event.event_type, event.aggregate_id)
}

fn first_difference<T: PartialEq + fmt::Debug>(is: &[T], shown: &[T]) -> Option<String> {
    let length = is.len().max(shown.len());
    let different = (0..length).find(|at| is.get(*at) != shown.get(*at))?;
    Some(format!("line {different} is {:?} and shown as {:?}", is.get(different), shown.get(different)))
}

fn place(position: i64) -> usize {
    usize::try_from(position).unwrap_or_default()
}
