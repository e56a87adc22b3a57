//! What the engine counts about itself, in the process' own registry of metrics; `docs/metrics.md` says what each means.
//!
//! Whoever serves `/metrics` gathers the registry, so the engine knows of no server and needs nobody to hand figures on.
//! Handles are looked up once or once for each commit; what happens for each command is an atomic addition. What a batch
//! decided is tallied with the batch and counted when the log has it: a batch that is decided again counts once.
//!
//! Left out: ids, wallets, partners and amounts. Labels come from lists in the code. Two engines in one process share
//! these figures.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ledger_core::{
    Action, Command, CommandEvent, Currency, Direction, Entries, Event, TransactionEvent, TransactionKind,
};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{
    CounterVec, Gauge, GaugeVec, Histogram, IntCounter, IntCounterVec, IntGauge, register_gauge_vec,
    register_histogram, register_int_counter, register_int_counter_vec, register_int_gauge,
};

use crate::ledger::{CommandError, Receipt};

/// All of them. Touched at the engine's start, so that they are there before anything has happened.
pub(crate) static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::register);

pub(crate) struct Metrics {
    commands: [[IntCounter; OUTCOMES.len()]; KINDS.len()],
    pub(crate) command_seconds: Histogram,
    pub(crate) queue: IntGauge,
    pub(crate) running: IntGauge,
    pub(crate) append_seconds: Histogram,
    appends: IntCounterVec,
    retries: IntCounterVec,
    batch_decisions: Histogram,
    batch_events: Histogram,
    commits: IntCounter,
    events: IntCounterVec,
    transactions: IntCounterVec,
    declined: IntCounterVec,
    entries: IntCounterVec,
    head_position: IntGauge,
    head_commit: IntGauge,
    pub(crate) book_items: IntGauge,
    pub(crate) book_changed_items: IntGauge,
    pub(crate) keys: IntGauge,
    snapshot_position: IntGauge,
    snapshot_at: Gauge,
    snapshot_seconds: Histogram,
    snapshots: IntCounterVec,
    start: GaugeVec,
    watched: Watched,
}

/// What the engine's task spends its time with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doing {
    /// There is no engine, or no longer.
    Nothing,
    /// It computes: decides, answers, folds in.
    Deciding,
    /// It waits for an append, and for nothing else that it could do meanwhile.
    Appending,
    /// It waits for what commands lack.
    Reading,
    /// It waits for commands.
    Idle,
}

/// What became of an append.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Append {
    Committed,
    Lost,
    KeyTaken,
    Failed,
}

/// What a batch will have done once the log has it.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    events: Vec<(&'static str, u64)>,
    transactions: Vec<((&'static str, &'static str), u64)>,
    declined: Vec<((&'static str, &'static str), u64)>,
    entries: Vec<((&'static str, Currency), u64)>,
}

const KINDS: [&str; 7] = ["transfer", "adjustment", "batch", "top_up", "ending", "wallet", "partner"];

const OUTCOMES: [&str; 8] =
    ["answered", "replayed", "refused", "key_reused", "key_in_flight", "overloaded", "unknown", "unavailable"];

/// The slugs of all refusals, as `Refusal::code` has them.
const REASONS: [&str; 15] = [
    "balance-limit-exceeded",
    "callback-mismatch",
    "currency-mismatch",
    "currency-not-enabled",
    "insufficient-funds",
    "invalid-transition",
    "partner-not-found",
    "partner-suspended",
    "same-wallet",
    "transaction-not-found",
    "wallet-closed",
    "wallet-frozen",
    "wallet-not-empty",
    "wallet-not-found",
    "wallet-not-owned",
];

const SECONDS: [f64; 14] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0];

const SIZES: [f64; 12] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0];

/// A handle's call, counted when it ends; one that is dropped on the way counts for nothing, its command runs on.
pub(crate) struct Call {
    kind: usize,
    begun: Instant,
}

impl Call {
    pub(crate) fn of(command: &Command) -> Self {
        let kind = match command.action {
            Action::Transfer { .. } => 0,
            Action::Adjust { .. } => 1,
            Action::Batch { .. } => 2,
            Action::RequestTopUp { .. } => 3,
            Action::Settle { .. } | Action::Fail { .. } | Action::Expire { .. } => 4,
            Action::OpenWallet { .. }
            | Action::FreezeWallet { .. }
            | Action::UnfreezeWallet { .. }
            | Action::CloseWallet { .. } => 5,
            Action::RegisterPartner { .. }
            | Action::SuspendPartner { .. }
            | Action::ResumePartner { .. }
            | Action::RotateSecret { .. } => 6,
        };
        Self { kind, begun: Instant::now() }
    }

    pub(crate) fn ended(self, result: &Result<Receipt, CommandError>) {
        let outcome = match result {
            Ok(Receipt { replayed: false, .. }) => 0,
            Ok(Receipt { replayed: true, .. }) => 1,
            Err(CommandError::Refused(_)) => 2,
            Err(CommandError::KeyReused) => 3,
            Err(CommandError::KeyInFlight) => 4,
            Err(CommandError::Overloaded) => 5,
            Err(CommandError::OutcomeUnknown) => 6,
            Err(CommandError::Unavailable) => 7,
        };
        METRICS.commands[self.kind][outcome].inc();
        METRICS.command_seconds.observe(self.begun.elapsed().as_secs_f64());
    }
}

impl Tally {
    /// One event of the batch.
    pub(crate) fn add(&mut self, event: &Event) {
        use TransactionEvent::{Declined, Expired, Failed, Posted, Requested, Settled};
        count(&mut self.events, event.event_type());
        // Only top-ups are pending, today, and end later.
        let top_up = TransactionKind::TopUp.name();
        match event {
            Event::Transaction(_, Posted { instruction, entries }) => {
                count(&mut self.transactions, (instruction.kind.name(), "success"));
                self.moved(entries, instruction.currency);
            }
            Event::Transaction(_, Requested { instruction, .. }) => {
                count(&mut self.transactions, (instruction.kind.name(), "requested"));
            }
            Event::Transaction(_, Settled { currency, entries, .. }) => {
                count(&mut self.transactions, (top_up, "success"));
                self.moved(entries, *currency);
            }
            Event::Transaction(_, Failed { .. }) => count(&mut self.transactions, (top_up, "failed")),
            Event::Transaction(_, Expired { .. }) => count(&mut self.transactions, (top_up, "expired")),
            Event::Transaction(_, Declined { instruction, failure }) => {
                count(&mut self.transactions, (instruction.kind.name(), "declined"));
                count(&mut self.declined, (instruction.kind.name(), reason(&failure.code)));
            }
            Event::Command(_, CommandEvent::BatchDeclined { failure, .. }) => {
                count(&mut self.declined, ("BATCH", reason(&failure.code)));
            }
            Event::Command(_, CommandEvent::Declined { failure, .. }) => {
                count(&mut self.declined, ("OTHER", reason(&failure.code)));
            }
            Event::Wallet(..) | Event::Partner(..) => {}
        }
    }

    fn moved(&mut self, entries: &Entries, currency: Currency) {
        for entry in entries {
            let direction = match entry.direction {
                Direction::Credit => "credit",
                Direction::Debit => "debit",
            };
            count(&mut self.entries, (direction, currency));
        }
    }

    /// The log has it.
    pub(crate) fn publish(self) {
        for (event, times) in self.events {
            METRICS.events.with_label_values(&[event]).inc_by(times);
        }
        for ((kind, outcome), times) in self.transactions {
            METRICS.transactions.with_label_values(&[kind, outcome]).inc_by(times);
        }
        for ((kind, reason), times) in self.declined {
            METRICS.declined.with_label_values(&[kind, reason]).inc_by(times);
        }
        for ((direction, currency), times) in self.entries {
            METRICS.entries.with_label_values(&[direction, currency.code()]).inc_by(times);
        }
    }
}

/// A batch has few different things in it, so looking through them is quicker than a map.
fn count<K: PartialEq>(counts: &mut Vec<(K, u64)>, what: K) {
    match counts.iter_mut().find(|(known, _)| *known == what) {
        Some((_, times)) => *times += 1,
        None => counts.push((what, 1)),
    }
}

fn reason(code: &str) -> &'static str {
    REASONS.into_iter().find(|known| *known == code).unwrap_or("other")
}

impl Metrics {
    /// An append has ended, however long it took to find out how.
    pub(crate) fn appended(&self, took: Duration, outcome: Append) {
        self.append_seconds.observe(took.as_secs_f64());
        let outcome = match outcome {
            Append::Committed => "committed",
            Append::Lost => "lost",
            Append::KeyTaken => "key_taken",
            Append::Failed => "failed",
        };
        self.appends.with_label_values(&[outcome]).inc();
    }

    /// An attempt to append did not say what came of it, or came to nothing, and another one follows.
    pub(crate) fn append_again(&self, unknown: bool) {
        self.retries.with_label_values(&[if unknown { "unknown" } else { "not_done" }]).inc();
    }

    /// The log has one commit more.
    pub(crate) fn committed(&self, commit: i64, position: i64, decisions: usize, events: usize) {
        self.commits.inc();
        self.batch_decisions.observe(float(decisions));
        self.batch_events.observe(float(events));
        self.head(commit, position);
    }

    pub(crate) fn head(&self, commit: i64, position: i64) {
        self.head_commit.set(commit);
        self.head_position.set(position);
    }

    /// The snapshot stands at this position, as far as this engine knows.
    pub(crate) fn snapshot_at(&self, position: i64) {
        self.snapshot_position.set(position);
    }

    pub(crate) fn snapshot_ended(&self, written: bool, took: Option<Duration>) {
        self.snapshots.with_label_values(&[if written { "written" } else { "failed" }]).inc();
        if written {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            self.snapshot_at.set(now.as_secs_f64());
        }
        if let Some(took) = took {
            self.snapshot_seconds.observe(took.as_secs_f64());
        }
    }

    pub(crate) fn started(&self, phase: &'static str, took: Duration) {
        self.start.with_label_values(&[phase]).set(took.as_secs_f64());
    }

    /// From now on the engine's task does this.
    pub(crate) fn now(&self, doing: Doing) {
        self.watched.clock.enter(doing);
    }

    /// Since when the oldest command that has no answer yet waits for one.
    pub(crate) fn oldest(&self, since: Option<Instant>) {
        let since = since.map_or(0, |since| micros_since_begin(since).max(1));
        self.watched.oldest.store(since, Ordering::Relaxed);
    }

    fn register() -> Self {
        let known = "each name is registered once, here";
        let counters = |name, help, labels: &[&str]| register_int_counter_vec!(name, help, labels).expect(known);
        let gauge = |name, help| register_int_gauge!(name, help).expect(known);
        let histogram = |name, help, bounds: &[f64]| register_histogram!(name, help, bounds.to_vec()).expect(known);
        let commands = counters(
            "daybook_ledger_commands_total",
            "Commands that the ledger was asked to execute, by kind and by what their caller was told.",
            &["kind", "outcome"],
        );
        let metrics = Self {
            commands: KINDS.map(|kind| OUTCOMES.map(|outcome| commands.with_label_values(&[kind, outcome]))),
            command_seconds: histogram(
                "daybook_ledger_command_seconds",
                "From handing a command to the ledger to its answer, in seconds.",
                &SECONDS,
            ),
            queue: gauge("daybook_ledger_queue_decisions", "Decisions of commands that have no answer yet."),
            running: gauge("daybook_ledger_running", "1 while the engine takes commands, else 0."),
            append_seconds: histogram(
                "daybook_ledger_append_seconds",
                "From sending a commit to the database to knowing what became of it, in seconds.",
                &SECONDS,
            ),
            appends: counters("daybook_ledger_appends_total", "Appends that have ended, by outcome.", &["outcome"]),
            retries: counters(
                "daybook_ledger_append_retries_total",
                "Attempts to append that are followed by another one, by what the database had said.",
                &["reason"],
            ),
            batch_decisions: histogram(
                "daybook_ledger_batch_decisions",
                "Decisions that went into one commit; each transfer of a batch is one.",
                &SIZES,
            ),
            batch_events: histogram("daybook_ledger_batch_events", "Events in one commit.", &SIZES),
            commits: register_int_counter!("daybook_ledger_commits_total", "Commits that this engine has appended.")
                .expect(known),
            events: counters(
                "daybook_ledger_events_total",
                "Events that this engine has appended, by type.",
                &["event_type"],
            ),
            transactions: counters(
                "daybook_transactions_total",
                "Transactions that this engine has written, by type and by what became of them.",
                &["type", "outcome"],
            ),
            declined: counters(
                "daybook_declined_total",
                "Keyed commands that the ledger has declined and kept, by what they were about and by refusal.",
                &["type", "reason"],
            ),
            entries: counters(
                "daybook_wallet_entries_total",
                "Changes of wallets' balances, by direction and currency.",
                &["direction", "currency"],
            ),
            head_position: gauge("daybook_ledger_head_position", "The log's last position that the engine knows."),
            head_commit: gauge("daybook_ledger_head_commit", "The log's last commit that the engine knows."),
            book_items: gauge("daybook_ledger_book_items", "Wallets, partners and transactions in memory."),
            book_changed_items: gauge(
                "daybook_ledger_book_changed_items",
                "Those of them that have changed since the last snapshot, which must stay in memory.",
            ),
            keys: gauge("daybook_ledger_keys_items", "Idempotency keys in memory."),
            snapshot_position: gauge(
                "daybook_ledger_snapshot_position",
                "The position up to which the book's snapshot has everything.",
            ),
            snapshot_at: prometheus::register_gauge!(
                "daybook_ledger_snapshot_timestamp_seconds",
                "When this engine last wrote the book's snapshot, in seconds since 1970; 0 if it has not."
            )
            .expect(known),
            snapshot_seconds: histogram(
                "daybook_ledger_snapshot_seconds",
                "What writing the book's snapshot took, in seconds.",
                &[0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0],
            ),
            snapshots: counters(
                "daybook_ledger_snapshots_total",
                "Attempts to write the book's snapshot, by outcome.",
                &["outcome"],
            ),
            start: register_gauge_vec!(
                "daybook_ledger_start_seconds",
                "What reading the book took when the engine started, by phase, in seconds.",
                &["phase"]
            )
            .expect(known),
            watched: Watched::register(),
        };
        for (kind, outcomes) in [
            (TransactionKind::Transfer, &["success", "declined"][..]),
            (TransactionKind::Adjustment, &["success", "declined"]),
            (TransactionKind::TopUp, &["requested", "success", "failed", "expired", "declined"]),
        ] {
            for outcome in outcomes {
                metrics.transactions.with_label_values(&[kind.name(), outcome]);
            }
        }
        for outcome in ["committed", "lost", "key_taken", "failed"] {
            metrics.appends.with_label_values(&[outcome]);
        }
        for reason in ["unknown", "not_done"] {
            metrics.retries.with_label_values(&[reason]);
        }
        for outcome in ["written", "failed"] {
            metrics.snapshots.with_label_values(&[outcome]);
        }
        metrics
    }
}

/// `daybook_ledger_running`, as long as it lives: also a panic is an end.
pub(crate) struct Running;

impl Running {
    pub(crate) fn begin() -> Self {
        METRICS.running.set(1);
        Self
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        METRICS.running.set(0);
        METRICS.oldest(None);
        METRICS.now(Doing::Nothing);
    }
}

/// What goes on by itself while nothing happens: it is worked out when somebody looks.
#[derive(Clone)]
struct Watched {
    seconds: CounterVec,
    oldest_seconds: Gauge,
    clock: &'static Clock,
    /// Microseconds since the beginning; 0: nobody waits.
    oldest: &'static AtomicU64,
}

/// How long the engine's task has done what.
#[derive(Debug)]
struct Clock {
    /// Since when it does what it does, in microseconds since the beginning, and what in the last three bits.
    now: AtomicU64,
    spent: [AtomicU64; STATES.len()],
    /// What was shown of it, which never goes back.
    shown: [AtomicU64; STATES.len()],
}

const STATES: [&str; 4] = ["deciding", "appending", "reading", "idle"];

/// How often the clock is read again, if what is done changes while it is read.
const LOOKS_MAX: u32 = 16;

static CLOCK: Clock = Clock {
    now: AtomicU64::new(0),
    spent: [const { AtomicU64::new(0) }; STATES.len()],
    shown: [const { AtomicU64::new(0) }; STATES.len()],
};

static OLDEST: AtomicU64 = AtomicU64::new(0);

static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);

fn micros_since_begin(at: Instant) -> u64 {
    u64::try_from(at.saturating_duration_since(*BEGIN).as_micros()).unwrap_or(u64::MAX)
}

impl Clock {
    fn enter(&self, doing: Doing) {
        let state = match doing {
            Doing::Nothing => 0,
            Doing::Deciding => 1,
            Doing::Appending => 2,
            Doing::Reading => 3,
            Doing::Idle => 4,
        };
        let now = micros_since_begin(Instant::now());
        let before = self.now.swap(now << 3 | state, Ordering::AcqRel);
        if let Some(spent) = self.spent_in(before) {
            spent.fetch_add(now.saturating_sub(before >> 3), Ordering::Release);
        }
    }

    /// What was spent up to this moment.
    fn totals(&self) -> [u64; STATES.len()] {
        let spent = || self.spent.each_ref().map(|spent| spent.load(Ordering::Acquire));
        for _ in 0..LOOKS_MAX {
            let at = self.now.load(Ordering::Acquire);
            let lasting = micros_since_begin(Instant::now()).saturating_sub(at >> 3);
            let mut totals = spent();
            // Otherwise what lasts until now may be in what was spent already, and would count twice.
            if self.now.load(Ordering::Acquire) == at {
                if let Some(current) = Self::place(at).and_then(|place| totals.get_mut(place)) {
                    *current += lasting;
                }
                return totals;
            }
        }
        spent() // it changes so fast that what lasts is next to nothing
    }

    fn place(now: u64) -> Option<usize> {
        usize::try_from(now & 0b111).ok()?.checked_sub(1)
    }

    /// Where the time of this moment's state goes.
    fn spent_in(&self, now: u64) -> Option<&AtomicU64> {
        Self::place(now).and_then(|place| self.spent.get(place))
    }

    /// Brings what is shown up to now.
    fn show(&self, seconds: &CounterVec) {
        for ((state, total), shown) in STATES.into_iter().zip(self.totals()).zip(&self.shown) {
            let before = shown.fetch_max(total, Ordering::Relaxed);
            let more = Duration::from_micros(total.saturating_sub(before));
            seconds.with_label_values(&[state]).inc_by(more.as_secs_f64());
        }
    }
}

impl Watched {
    fn register() -> Self {
        let seconds = prometheus::opts!(
            "daybook_ledger_engine_seconds_total",
            "What the engine's one task has spent its time with, in seconds."
        );
        let oldest = prometheus::opts!(
            "daybook_ledger_queue_oldest_seconds",
            "How long the oldest command without an answer has waited, in seconds; 0 if none waits."
        );
        let watched = Self {
            seconds: CounterVec::new(seconds, &["state"]).expect("a good name"),
            oldest_seconds: Gauge::with_opts(oldest).expect("a good name"),
            clock: &CLOCK,
            oldest: &OLDEST,
        };
        prometheus::register(Box::new(watched.clone())).expect("each name is registered once, here");
        watched
    }
}

impl Collector for Watched {
    fn desc(&self) -> Vec<&Desc> {
        [self.seconds.desc(), self.oldest_seconds.desc()].concat()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.clock.show(&self.seconds);
        let age = match self.oldest.load(Ordering::Relaxed) {
            0 => 0,
            since => micros_since_begin(Instant::now()).saturating_sub(since),
        };
        self.oldest_seconds.set(Duration::from_micros(age).as_secs_f64());
        [self.seconds.collect(), self.oldest_seconds.collect()].concat()
    }
}

/// Counts of a batch are small.
fn float(count: usize) -> f64 {
    u32::try_from(count).unwrap_or(u32::MAX).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_that_the_rules_know_is_a_label_and_nothing_else_is() {
        let rules = include_str!("../../ledger-core/src/refusal.rs");
        let codes = rules.split("fn code").nth(1).unwrap().split("impl From").next().unwrap();
        let mut codes: Vec<_> = codes.split('"').skip(1).step_by(2).collect();
        codes.sort_unstable();
        assert_eq!(codes, REASONS);
        assert_eq!(reason("wallet-frozen"), "wallet-frozen");
        assert_eq!(reason("made-up-by-a-client"), "other");
    }

    #[test]
    fn time_counts_for_what_was_done_in_it_and_what_was_shown_never_goes_back() {
        let seconds = CounterVec::new(prometheus::opts!("test_seconds_total", "Test."), &["state"]).unwrap();
        let state = || [const { AtomicU64::new(0) }; STATES.len()];
        let clock = Clock { now: AtomicU64::new(0), spent: state(), shown: state() };
        let shown = |state: &str| {
            clock.show(&seconds);
            seconds.with_label_values(&[state]).get()
        };
        assert!(shown("idle") == 0.0, "there is no engine yet");
        clock.enter(Doing::Idle);
        std::thread::sleep(Duration::from_millis(5));
        let idle = shown("idle");
        assert!(0.005 <= idle, "while it lasts, too: {idle}");
        clock.enter(Doing::Deciding);
        clock.enter(Doing::Nothing);
        let after = shown("idle");
        assert!(idle <= after);
        std::thread::sleep(Duration::from_millis(2));
        assert!(shown("idle") == after, "a stopped engine is not idle");
    }
}
