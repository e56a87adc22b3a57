//! `daybook tail`: the log as it grows, one line for each event, in words.
//!
//! For whoever may read the database, as `daybook audit`. It follows the log as every consumer of ours does, without a
//! bus: each commit once, in order, checked to follow from the one before. While the database is away it waits and
//! says so; then it goes on where it was.
//!
//! Left out: checking what it shows (`daybook audit`), and what has become of it (the views).

use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use event_feed::{Commit, FeedSettings, Follow, Log, RecordedEvent, StoreError};
use ledger_core::{
    CommandEvent, CommandId, Direction, Entries, Event, Instruction, PartnerEvent, PartnerId, TransactionEvent,
    TransactionId, TransactionKind, WalletEvent, WalletId, WalletKind,
};
use tokio::time::{sleep, timeout};

use crate::connection;
use crate::terminal::{Colour, Lines, quoted, reader_has_left, shown, shown_json, unless_reader_left};

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The database that holds the log; without it, that of the `daybook up` which runs on --data-dir.
    #[arg(long, env = "DAYBOOK_DATABASE_URL", hide_env_values = true)]
    database_url: Option<String>,
    /// Where a running `daybook up` has its connection.json.
    #[arg(long, env = "DAYBOOK_DATA_DIR", default_value = "data")]
    data_dir: PathBuf,
    /// Begin with so many of the latest events. With filters, those that match among the latest 100,000.
    #[arg(long, value_name = "N", default_value_t = 10, conflicts_with = "from", value_parser = clap::value_parser!(u32).range(0..=100_000))]
    last: u32,
    /// Begin at this position.
    #[arg(long, value_name = "POSITION", value_parser = clap::value_parser!(i64).range(1..))]
    from: Option<i64>,
    /// End at the position that is the log's last one now.
    #[arg(long)]
    no_follow: bool,
    /// Only what touches this wallet.
    #[arg(long, value_name = "wal_…")]
    wallet: Option<WalletId>,
    /// Only this transaction.
    #[arg(long, value_name = "txn_…")]
    transaction: Option<TransactionId>,
    /// Only what this partner, its wallets and its transactions are about.
    #[arg(long, value_name = "par_…")]
    partner: Option<PartnerId>,
    /// Only events of this type, such as TransactionPosted; may be repeated.
    #[arg(long = "type", value_name = "TYPE", value_parser = clap::builder::PossibleValuesParser::new(EVENT_TYPES))]
    types: Vec<String>,
    /// One JSON object per line: the event as in /v1/events.
    #[arg(long)]
    json: bool,
}

/// Every event there is; a test compares them with the history that ledger-core keeps.
const EVENT_TYPES: [&str; 16] = [
    "BatchDeclined",
    "CommandDeclined",
    "PartnerRegistered",
    "PartnerResumed",
    "PartnerSecretRotated",
    "PartnerSuspended",
    "TransactionDeclined",
    "TransactionExpired",
    "TransactionFailed",
    "TransactionPosted",
    "TransactionRequested",
    "TransactionSettled",
    "WalletClosed",
    "WalletFrozen",
    "WalletOpened",
    "WalletUnfrozen",
];

/// How far filters look back from the head.
const LOOK_BACK: i64 = 100_000;

/// How often it is looked whether anybody still reads, while nothing happens.
const LOOK_AT_READER: Duration = Duration::from_millis(500);

/// How long the first look at the log may take.
const PATIENCE: Duration = Duration::from_secs(15);

pub(crate) async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let shutdown = runtime::shutdown::signal();
    let tailing = async {
        match tail(&options).await {
            Err(error) => match error.downcast::<io::Error>() {
                Ok(error) => Ok(unless_reader_left(Err(error))?),
                Err(error) => Err(error),
            },
            done => done,
        }
    };
    tokio::select! {
        done = tailing => done?,
        () = shutdown.requested() => {} // lines are written whole: nothing is half said
    }
    Ok(ExitCode::SUCCESS)
}

async fn tail(options: &Options) -> anyhow::Result<()> {
    let database_url = connection::database_url(options.database_url.as_deref(), &options.data_dir)?;
    let connecting = event_store::connect(&database_url, "daybook_reader", 1);
    let log = Log::new(within(connecting).await?.context("connecting to the log")?);
    let head = within(log.head()).await??;
    let filter = Filter::of(options);
    let first = match options.from {
        Some(position) => position,
        None if filter.is_any() => head.position - LOOK_BACK + 1,
        None => head.position - i64::from(options.last) + 1,
    };
    let first = first.max(1);
    // An empty log has no such commit, nor has a position that is yet to come.
    let before = within(log.commit_of(first)).await??.map_or(head.commit, |commit| commit - 1);
    let settings = within(FeedSettings::of(&log, None)).await??;
    let follow = Follow::start(log.clone(), settings, before).await;
    let mut tail =
        Tail { follow, log, lines: Lines::new(), filter, json: options.json, partners: HashMap::new(), away: false };

    let keep = if options.from.is_some() { None } else { usize::try_from(options.last).ok() };
    let mut latest = VecDeque::new(); // what was there when we came, until all of it is known
    let mut at = before;
    while at < head.commit {
        let Some(page) = tail.next().await? else { return Ok(()) };
        for commit in page {
            at = commit.number;
            if head.commit < at {
                tail.show_all(latest.drain(..))?;
                if options.no_follow {
                    return Ok(());
                }
            }
            for event in commit.events.iter().filter(|event| first <= event.position) {
                if !tail.wants(event).await? {
                    continue;
                }
                match keep {
                    Some(0) if at <= head.commit => {}
                    Some(keep) if at <= head.commit => {
                        if latest.len() == keep {
                            latest.pop_front();
                        }
                        latest.push_back(event.clone());
                    }
                    _ => tail.show(event)?,
                }
            }
        }
        tail.lines.flush()?;
    }
    let found = latest.len();
    tail.show_all(latest.drain(..))?;
    if keep.is_some_and(|keep| found < keep) && 1 < first {
        eprintln!("daybook: {found} of the latest {LOOK_BACK} events match; --from looks further back");
    }
    if options.no_follow {
        return Ok(());
    }
    while let Some(page) = tail.next().await? {
        for commit in page {
            for event in commit.events.iter().filter(|event| first <= event.position) {
                if tail.wants(event).await? {
                    tail.show(event)?;
                }
            }
        }
        tail.lines.flush()?;
    }
    Ok(())
}

async fn within<T>(work: impl Future<Output = T>) -> anyhow::Result<T> {
    timeout(PATIENCE, work).await.context("the database is silent")
}

struct Tail {
    follow: Follow,
    log: Log,
    lines: Lines,
    filter: Filter,
    json: bool,
    /// Whose streams are that do not say it in every event. Bounded: emptied when it is full.
    partners: HashMap<String, Option<PartnerId>>,
    /// The database is, and that was said.
    away: bool,
}

const PARTNERS_MAX: usize = 10_000;

const BACK: &str = "daybook: the log can be read again";

impl Tail {
    /// The next commits, however long the database is away; `None` when nobody reads any more.
    async fn next(&mut self) -> anyhow::Result<Option<Vec<Arc<Commit>>>> {
        loop {
            let page = {
                let Self { follow, log, away, .. } = &mut *self;
                let mut page = pin!(follow.next());
                loop {
                    tokio::select! {
                        page = &mut page => break page,
                        () = sleep(LOOK_AT_READER) => {
                            if reader_has_left() {
                                return Ok(None);
                            }
                            // A log that can be read again has perhaps nothing new to say, and nobody would know.
                            if *away && timeout(LOOK_AT_READER, log.head()).await.is_ok_and(|head| head.is_ok()) {
                                *away = false;
                                eprintln!("{BACK}");
                            }
                        }
                    }
                }
            };
            match page {
                Ok(page) => {
                    self.is_back();
                    return Ok(Some(page));
                }
                Err(error) if error.is_final() => return Err(error.into()),
                Err(error) => self.is_away(&error),
            }
        }
    }

    async fn wants(&mut self, event: &RecordedEvent) -> anyhow::Result<bool> {
        let Some(wanted) = self.filter.partner else { return Ok(self.filter.passes(event)) };
        if !self.filter.passes(event) {
            return Ok(false);
        }
        Ok(self.partner_of(event).await? == Some(wanted))
    }

    /// Whose an event is. Later events of a stream do not say it, its first one does.
    async fn partner_of(&mut self, event: &RecordedEvent) -> anyhow::Result<Option<PartnerId>> {
        if event.sequence == 1 || event.aggregate_type == "partner" {
            return Ok(partner_in(event));
        }
        if let Some(known) = self.partners.get(&event.aggregate_id) {
            return Ok(*known);
        }
        loop {
            // The whole of a stream of ours is a few events, but for a wallet that is frozen again and again.
            match timeout(PATIENCE, self.log.stream(&event.aggregate_type, &event.aggregate_id, event.position)).await {
                Ok(Ok(stream)) => {
                    self.is_back();
                    let partner = stream.first().and_then(partner_in);
                    if PARTNERS_MAX <= self.partners.len() {
                        self.partners.clear();
                    }
                    self.partners.insert(event.aggregate_id.clone(), partner);
                    return Ok(partner);
                }
                Ok(Err(error @ StoreError::Corrupt(_))) => return Err(error.into()),
                Ok(Err(error)) => self.is_away(&error),
                Err(_) => self.is_away(&StoreError::Late(PATIENCE)),
            }
            sleep(Duration::from_secs(1)).await;
        }
    }

    fn show_all(&mut self, events: impl Iterator<Item = RecordedEvent>) -> io::Result<()> {
        for event in events {
            self.show(&event)?;
        }
        self.lines.flush()
    }

    fn show(&mut self, event: &RecordedEvent) -> io::Result<()> {
        let line = if self.json {
            let json = serde_json::to_string(event).map_err(io::Error::from)?;
            // A machine gets the stored bytes, which the hashes are of.
            if self.lines.terminal { shown_json(&json) } else { json }
        } else {
            let (colour, words) = in_words(event);
            let at = event.recorded_at.to_string();
            let place = format!("{:>8}  {at}", event.position);
            format!("{}  {}", self.lines.paint(Colour::Faint, &place), self.lines.paint(colour, &words))
        };
        self.lines.line(&line)
    }

    fn is_away(&mut self, error: &(dyn std::error::Error + Send + Sync)) {
        if !std::mem::replace(&mut self.away, true) {
            let reason = shown(&error.to_string());
            eprintln!("daybook: the log cannot be read: {reason}; this goes on where it was when it can");
        }
    }

    fn is_back(&mut self) {
        if std::mem::take(&mut self.away) {
            eprintln!("{BACK}");
        }
    }
}

/// What is wanted; nothing set means all.
struct Filter {
    wallet: Option<WalletId>,
    transaction: Option<TransactionId>,
    partner: Option<PartnerId>,
    types: Vec<String>,
}

impl Filter {
    fn of(options: &Options) -> Self {
        let Options { wallet, transaction, partner, types, .. } = options;
        Self { wallet: *wallet, transaction: *transaction, partner: *partner, types: types.clone() }
    }

    fn is_any(&self) -> bool {
        self.wallet.is_some() || self.transaction.is_some() || self.partner.is_some() || !self.types.is_empty()
    }

    /// All but the partner, which the event may not name.
    fn passes(&self, event: &RecordedEvent) -> bool {
        let of_type = self.types.is_empty() || self.types.iter().any(|wanted| *wanted == event.event_type);
        let of_transaction = self.transaction.is_none_or(|wanted| event.aggregate_id == wanted.to_string());
        of_type && of_transaction && self.wallet.is_none_or(|wanted| touches(event, wanted))
    }
}

fn touches(event: &RecordedEvent, wanted: WalletId) -> bool {
    let entries = |entries: &Entries| entries.iter().any(|entry| entry.wallet_id == wanted);
    let asked = |of: &Instruction| of.wallet_id == wanted || of.to_wallet_id == Some(wanted);
    match event.read() {
        Ok(Event::Wallet(wallet, _)) => wallet == wanted,
        Ok(Event::Transaction(_, of)) => match &of {
            TransactionEvent::Posted { instruction, entries: moved } => asked(instruction) || entries(moved),
            TransactionEvent::Requested { instruction, .. } | TransactionEvent::Declined { instruction, .. } => {
                asked(instruction)
            }
            TransactionEvent::Settled { entries: moved, .. } => entries(moved),
            TransactionEvent::Failed { wallet_id, .. } | TransactionEvent::Expired { wallet_id } => {
                *wallet_id == wanted
            }
        },
        Ok(Event::Partner(..) | Event::Command(..)) => false,
        // What cannot be read is shown rather than missed.
        Err(_) => event.aggregate_id == wanted.to_string() || event.payload.contains(&wanted.to_string()),
    }
}

/// The partner that an event names.
fn partner_in(event: &RecordedEvent) -> Option<PartnerId> {
    match event.read().ok()? {
        Event::Partner(partner, _) => Some(partner),
        Event::Wallet(_, WalletEvent::Opened { partner_id, .. })
        | Event::Command(
            _,
            CommandEvent::Declined { partner_id, .. } | CommandEvent::BatchDeclined { partner_id, .. },
        ) => partner_id,
        Event::Transaction(
            _,
            TransactionEvent::Posted { instruction, .. }
            | TransactionEvent::Requested { instruction, .. }
            | TransactionEvent::Declined { instruction, .. },
        ) => instruction.partner_id,
        Event::Wallet(..) | Event::Transaction(..) => None,
    }
}

/// What happened. An event that is no event of ours is shown as it stands.
pub(crate) fn in_words(event: &RecordedEvent) -> (Colour, String) {
    match event.read() {
        Ok(Event::Transaction(id, of)) => transaction_in_words(id, &of),
        Ok(Event::Wallet(id, of)) => (Colour::Plain, wallet_in_words(id, &of)),
        Ok(Event::Partner(id, of)) => (Colour::Plain, partner_in_words(id, &of)),
        Ok(Event::Command(id, of)) => (Colour::Red, command_in_words(id, &of)),
        Err(error) => {
            let (id, of) = (shown(&event.aggregate_id), shown(&event.event_type));
            let error = shown(&error.to_string());
            (Colour::Red, format!("{of} of {id} cannot be read ({error}): {}", quoted(&event.payload)))
        }
    }
}

fn transaction_in_words(id: TransactionId, event: &TransactionEvent) -> (Colour, String) {
    let said = |of: &Instruction| {
        let texts = [("reference", &of.reference), ("description", &of.description)];
        let texts = texts.iter().filter_map(|(name, text)| Some(format!("  {name} {}", quoted(text.as_ref()?))));
        texts.collect::<String>()
    };
    match event {
        TransactionEvent::Posted { instruction: of, .. } => (Colour::Green, format!("{}  {id}{}", asked(of), said(of))),
        TransactionEvent::Requested { instruction: of, .. } => {
            (Colour::Yellow, format!("{} requested  {id}{}", asked(of), said(of)))
        }
        TransactionEvent::Declined { instruction: of, failure } => {
            let why = format!("{}: {}", shown(&failure.code), quoted(&failure.detail));
            (Colour::Red, format!("{} declined, {why}  {id}{}", asked(of), said(of)))
        }
        TransactionEvent::Settled { wallet_id, currency, entries, provider_reference } => {
            let credit = entries.iter().find(|entry| entry.wallet_id == *wallet_id);
            let amount = credit.map_or_else(String::new, |entry| entry.amount.decimal().to_string());
            let reference = quoted(provider_reference);
            (Colour::Green, format!("settled {amount} {currency} into {wallet_id}  {id}  bank's reference {reference}"))
        }
        TransactionEvent::Failed { wallet_id, failure } => {
            let why = format!("{}: {}", shown(&failure.code), quoted(&failure.detail));
            (Colour::Red, format!("failed for {wallet_id}, {why}  {id}"))
        }
        TransactionEvent::Expired { wallet_id } => (Colour::Yellow, format!("expired for {wallet_id}  {id}")),
    }
}

fn asked(of: &Instruction) -> String {
    let (amount, currency, wallet) = (of.amount.decimal(), of.currency, of.wallet_id);
    let kind = match of.kind {
        TransactionKind::Transfer => "transfer",
        TransactionKind::Adjustment => "adjustment",
        TransactionKind::TopUp => "top-up",
    };
    match (of.to_wallet_id, of.direction) {
        (Some(to), _) => format!("{kind} {amount} {currency}  {wallet} → {to}"),
        (None, Some(Direction::Debit)) => format!("{kind} -{amount} {currency}  {wallet}"),
        (None, Some(Direction::Credit) | None) => format!("{kind} +{amount} {currency}  {wallet}"),
    }
}

fn wallet_in_words(id: WalletId, event: &WalletEvent) -> String {
    match event {
        WalletEvent::Opened { kind, partner_id, user_id, currency, .. } => {
            let whose = match (user_id, partner_id) {
                (Some(user), Some(partner)) => format!("for {} of {partner}", quoted(user)),
                (Some(user), None) => format!("for {}", quoted(user)),
                (None, Some(partner)) => format!("of {partner}"),
                (None, None) => "of the system".to_owned(),
            };
            let kind = match kind {
                WalletKind::Customer => "wallet",
                WalletKind::Settlement => "settlement wallet",
                WalletKind::Adjustments => "adjustments wallet",
                WalletKind::Bank => "bank wallet",
            };
            format!("{kind} opened, {currency}  {id} {whose}")
        }
        WalletEvent::Frozen { reason, .. } => format!("wallet frozen  {id}  {}", quoted(reason)),
        WalletEvent::Unfrozen { reason, .. } => format!("wallet unfrozen  {id}  {}", quoted(reason)),
        WalletEvent::Closed { reason, .. } => format!("wallet closed  {id}  {}", quoted(reason)),
    }
}

fn partner_in_words(id: PartnerId, event: &PartnerEvent) -> String {
    match event {
        PartnerEvent::Registered { name, currencies, client_id } => {
            let currencies: Vec<_> = currencies.iter().map(|currency| currency.code()).collect();
            format!("partner {} registered, {}  {id}  {client_id}", quoted(name), currencies.join(" "))
        }
        PartnerEvent::Suspended { reason } => {
            let reason = reason.as_deref().map_or_else(String::new, |reason| format!("  {}", quoted(reason)));
            format!("partner suspended  {id}{reason}")
        }
        PartnerEvent::Resumed {} => format!("partner resumed  {id}"),
        PartnerEvent::SecretRotated { client_id } => format!("partner's secret rotated  {id}  {client_id}"),
    }
}

fn command_in_words(id: CommandId, event: &CommandEvent) -> String {
    match event {
        CommandEvent::Declined { failure, .. } => {
            format!("command declined, {}: {}  {id}", shown(&failure.code), quoted(&failure.detail))
        }
        CommandEvent::BatchDeclined { item, failure, .. } => {
            let why = format!("{}: {}", shown(&failure.code), quoted(&failure.detail));
            format!("batch declined at its transfer {item}, {why}  {id}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_event_of_the_history_can_be_asked_for() {
        let history = concat!(env!("CARGO_MANIFEST_DIR"), "/../ledger-core/tests/history");
        let files = std::fs::read_dir(history).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
        let mut known: Vec<_> = files.map(|name| name.split('-').next().unwrap().to_owned()).collect();
        known.sort();
        known.dedup();
        assert_eq!(known, EVENT_TYPES);
    }
}
