//! The top-up: money comes from the bank into a wallet.
//!
//! A row follows each `TransactionRequested` of a top-up. It is taken through its states step by step: the
//! payment is registered at the bank; the bank's word about it arrives as a callback, or is asked for, or the
//! payment is cancelled when its time is over; the word becomes a command, and the ledger's event ends the row.
//!
//! ```text
//! REQUESTED ──register──> UNSURE ──> WAITING ──word──> DECIDED ──settle, fail, expire──> ENDED
//!     ^                     │                             │  ^
//!     └──── not known ──────┘                   refused  ─┴> BLOCKED
//! ```
//!
//! What is BLOCKED is offered to the ledger again after ever longer pauses, and at once when its wallet is unfrozen.
//!
//! A step is written down, and its row held, before anything is called; its outcome is recorded only while the
//! row is still held under that attempt. A process that dies leaves a row that falls due again, in a state
//! from which asking comes first. Until the bank has given a definite word a top-up stays pending: no answer
//! is never taken for a no.

use std::sync::Arc;
use std::time::Duration;

use event_feed::{Commit, Log, RecordedEvent, within};
use ledger_core::{
    Event, Instruction, Money, Payment, TransactionEvent, TransactionId, TransactionKind, TransactionStatus,
    WalletEvent, WalletId,
};
use runtime::shutdown::Shutdown;
use runtime::trace::{self, Span, SpanKind};
use serde_json::json;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, PgPool, Row};
use time::OffsetDateTime;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use crate::bank::{Bank, Standing, Word};
use crate::call::NoAnswer;
use crate::commands::{Commands, Reply};
use crate::metrics::METRICS;
use crate::pause::{self, Pause};
use crate::{Settings, Times};

/// Steps under way at once, of each lane.
const STEPS_MAX: usize = 32;

/// The shortest pause between two questions to the bank, whatever is set: with none it would be asked without end.
const ASK_MIN: Duration = Duration::from_millis(100);

/// The pause after a call without an answer, at first and at most.
const AGAIN_FIRST: Duration = Duration::from_secs(1);
const AGAIN_MAX: Duration = Duration::from_secs(60);

/// After so many attempts without an outcome, some minutes, a person should know.
const FAILURES_MAX: i32 = 8;

/// At least this often it is looked whether something is due, for another process may have changed a row.
const LOOK: Duration = Duration::from_secs(1);

/// So many blocked top-ups fall due at once when their wallets are unfrozen; more than that wait for their pauses to end.
const UNFROZEN_MAX: i64 = 10_000;

/// What Postgres has not answered by then is given up: it, or the way to it, is gone without a word.
const ANSWERING: Duration = Duration::from_secs(15);

/// What is under way when a stop is requested has this long. What is cut off is found again by its attempt.
const DRAIN: Duration = Duration::from_secs(5);

pub(crate) struct TopUps {
    pool: PgPool,
    log: Log,
    bank: Bank,
    commands: Commands,
    times: Times,
    changed: Notify,
}

/// Where a row stands; the migration says what each means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Requested,
    Unsure,
    Waiting,
    Decided,
    Blocked,
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Register,
    Ask,
    Cancel,
    /// The command that the bank's word becomes.
    Command(Word),
}

/// Steps at the bank and commands have lanes of their own: a bank that hangs must not keep paid money waiting.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Lane {
    Bank,
    Ledger,
}

/// A row that is ours until its lease ends, and the step to take.
#[derive(Clone, Debug)]
struct Due {
    attempt: Uuid,
    transaction: TransactionId,
    requested_position: i64,
    token: String,
    money: Money,
    return_url: Option<String>,
    traceparent: Option<String>,
    /// As it was before the attempt.
    state: State,
    step: Step,
    /// The bank was asked to take it, once at least.
    offered: bool,
    failures: i32,
    word: Option<Word>,
    bank_reference: Option<String>,
    command_try: i32,
    alert: Option<String>,
}

/// What an attempt brought.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Brought {
    Standing(Standing),
    /// The ledger has ended it so, under this reference of the bank if it booked money.
    Ended {
        outcome: TransactionStatus,
        reference: Option<String>,
    },
    /// The ledger will not have the word for now. Holds its reason.
    Blocked(String),
    Nothing {
        why: String,
        wait: Duration,
    },
}

/// The row after an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Next {
    state: State,
    pause: Duration,
    failures: i32,
    word: Option<Word>,
    bank_reference: Option<String>,
    command_try: i32,
    outcome: Option<TransactionStatus>,
    alert: Option<String>,
}

impl TopUps {
    pub(crate) fn new(settings: &Settings, pool: PgPool) -> reqwest::Result<Self> {
        Ok(Self {
            log: Log::new(pool.clone()),
            pool,
            bank: Bank::new(settings)?,
            commands: Commands::new(settings)?,
            times: settings.times.clone(),
            changed: Notify::new(),
        })
    }

    pub(crate) fn pool(&self) -> &PgPool {
        &self.pool
    }

    pub(crate) fn log(&self) -> &Log {
        &self.log
    }

    /// Something may have fallen due.
    pub(crate) fn wake(&self) {
        self.changed.notify_waiters();
    }
}

// What the log says.

impl TopUps {
    /// Whether events of a type say anything about top-ups.
    pub(crate) fn concerns(event_type: &str) -> bool {
        matches!(
            event_type,
            "TransactionRequested"
                | "TransactionSettled"
                | "TransactionFailed"
                | "TransactionExpired"
                | "WalletUnfrozen"
        )
    }

    /// Writes what a page of the log says about top-ups. True when a step may have fallen due.
    pub(crate) async fn take_page(&self, tx: &mut PgConnection, page: &[Arc<Commit>]) -> anyhow::Result<bool> {
        let mut requested = Vec::new();
        let mut ended = Vec::new();
        let mut unfrozen = Vec::new();
        for event in page.iter().flat_map(|commit| &commit.events) {
            if !Self::concerns(&event.event_type) {
                continue;
            }
            let (id, what) = match event.read()? {
                Event::Transaction(id, what) => (id, what),
                Event::Wallet(wallet, WalletEvent::Unfrozen { .. }) => {
                    unfrozen.push(wallet);
                    continue;
                }
                _ => continue,
            };
            match what {
                TransactionEvent::Requested { instruction, payment } if instruction.kind == TransactionKind::TopUp => {
                    requested.push((id, instruction, payment, event));
                }
                TransactionEvent::Settled { provider_reference, .. } => {
                    let (outcome, reference) = (TransactionStatus::Success, Some(provider_reference));
                    ended.push(End { id, outcome, reference, position: event.position });
                }
                TransactionEvent::Failed { .. } => {
                    ended.push(End {
                        id,
                        outcome: TransactionStatus::Failed,
                        reference: None,
                        position: event.position,
                    });
                }
                TransactionEvent::Expired { .. } => {
                    ended.push(End {
                        id,
                        outcome: TransactionStatus::Expired,
                        reference: None,
                        position: event.position,
                    });
                }
                _ => {}
            }
        }
        // A request precedes its end, so within one page too the rows are there when they end.
        self.insert(tx, &requested).await?;
        end(tx, &ended).await?;
        let offered_again = unblock(tx, &unfrozen).await?;
        Ok(!requested.is_empty() || offered_again)
    }

    async fn insert(
        &self,
        tx: &mut PgConnection,
        requested: &[(TransactionId, Arc<Instruction>, Payment, &RecordedEvent)],
    ) -> sqlx::Result<()> {
        if requested.is_empty() {
            return Ok(());
        }
        let expire_at =
            |event: &RecordedEvent| event.recorded_at.date_time().saturating_add(whole(self.times.expire_after));
        // A checkpoint that was set back brings the same rows again: they stay as they are.
        sqlx::query(
            "insert into workflows.top_ups
                 (transaction_id, wallet_id, requested_position, token, amount, currency, return_url, traceparent, state,
                  due_at, expire_at)
             select r.id, r.wallet, r.position, r.token, r.amount::numeric, r.currency, r.return_url, r.traceparent, 'REQUESTED',
                    now(), r.expire_at
             from unnest($1::uuid[], $2::bigint[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::timestamptz[],
                         $9::uuid[])
                  as r (id, position, token, amount, currency, return_url, traceparent, expire_at, wallet)
             on conflict (transaction_id) do nothing",
        )
        .bind(requested.iter().map(|(id, ..)| id.uuid()).collect::<Vec<_>>())
        .bind(requested.iter().map(|(_, _, _, event)| event.position).collect::<Vec<_>>())
        .bind(requested.iter().map(|(_, _, payment, _)| payment.token.clone()).collect::<Vec<_>>())
        .bind(requested.iter().map(|(_, instruction, ..)| instruction.amount.to_string()).collect::<Vec<_>>())
        .bind(requested.iter().map(|(_, instruction, ..)| instruction.currency.code()).collect::<Vec<_>>())
        .bind(requested.iter().map(|(_, _, payment, _)| payment.return_url.clone()).collect::<Vec<_>>())
        .bind(requested.iter().map(|(_, _, _, event)| event.traceparent()).collect::<Vec<_>>())
        .bind(requested.iter().map(|(_, _, _, event)| expire_at(event)).collect::<Vec<OffsetDateTime>>())
        .bind(requested.iter().map(|(_, instruction, ..)| instruction.wallet_id.uuid()).collect::<Vec<_>>())
        .execute(tx)
        .await?;
        Ok(())
    }
}

/// The ledger has ended a transaction so.
struct End {
    id: TransactionId,
    outcome: TransactionStatus,
    reference: Option<String>,
    position: i64,
}

/// Ends rows, whoever issued the commands: the ledger's word is the last. What is no top-up of ours has no row.
async fn end(tx: &mut PgConnection, ended: &[End]) -> sqlx::Result<()> {
    if ended.is_empty() {
        return Ok(());
    }
    let rows = sqlx::query(
        "update workflows.top_ups t
         set state = 'ENDED', outcome = e.outcome, ended_position = e.position, due_at = null, attempt_id = null,
             bank_reference = coalesce(t.bank_reference, e.reference), alert = null
         from unnest($1::uuid[], $2::text[], $3::text[], $4::bigint[]) with ordinality
              as e (transaction_id, outcome, reference, position, place)
         where t.transaction_id = e.transaction_id
         returning e.place, t.word, t.bank_reference",
    )
    .bind(ended.iter().map(|end| end.id.uuid()).collect::<Vec<_>>())
    .bind(ended.iter().map(|end| end.outcome.name()).collect::<Vec<_>>())
    .bind(ended.iter().map(|end| end.reference.clone()).collect::<Vec<_>>())
    .bind(ended.iter().map(|end| end.position).collect::<Vec<_>>())
    .fetch_all(&mut *tx)
    .await?;
    for row in rows {
        let place: i64 = row.try_get("place")?;
        let End { id, outcome, reference, .. } = &ended[usize::try_from(place - 1).map_err(|_| unreadable("place"))?];
        let (word, known): (_, Option<String>) = (word(&row)?, row.try_get("bank_reference")?);
        tracing::info!(transaction.id = %id, %outcome, "top-up ended");
        let Some(conflict) = conflict(word, known.as_deref(), *outcome, reference.as_deref()) else { continue };
        tracing::error!(alert = conflict, transaction.id = %id, "bank and ledger disagree about a top-up");
        sqlx::query("update workflows.top_ups set alert = $2 where transaction_id = $1")
            .bind(id.uuid())
            .bind(conflict)
            .execute(&mut *tx)
            .await?;
    }
    Ok(())
}

/// What was blocked for a wallet that is free again falls due at once. What is under way may bring a refusal from before,
/// now or when its key is repeated: it is marked, and then does not wait after that refusal. True when something fell due.
async fn unblock(tx: &mut PgConnection, unfrozen: &[WalletId]) -> sqlx::Result<bool> {
    if unfrozen.is_empty() {
        return Ok(false);
    }
    let changed = sqlx::query(
        "update workflows.top_ups
         set unfrozen = true, due_at = case when state = 'BLOCKED' and attempt_id is null then now() else due_at end
         where transaction_id in (
             select transaction_id from workflows.top_ups
             where wallet_id = any($1) and state in ('DECIDED', 'BLOCKED')
             order by requested_position limit $2
             for update)",
    )
    .bind(unfrozen.iter().map(|wallet| wallet.uuid()).collect::<Vec<_>>())
    .bind(UNFROZEN_MAX)
    .execute(tx)
    .await?;
    Ok(0 < changed.rows_affected())
}

/// Why a person must look at it, when the bank's word and the ledger's outcome cannot both be true.
fn conflict(
    word: Option<Word>,
    known: Option<&str>,
    outcome: TransactionStatus,
    booked: Option<&str>,
) -> Option<String> {
    let word = word?;
    if outcome_of(word) != outcome {
        return Some(format!("the bank said {}, the ledger has ended it as {outcome}", word.name()));
    }
    match (known, booked) {
        (Some(known), Some(booked)) if known != booked => {
            Some(format!("the bank was paid as {known}, the ledger has booked {booked}"))
        }
        _ => None,
    }
}

const fn outcome_of(word: Word) -> TransactionStatus {
    match word {
        Word::Success => TransactionStatus::Success,
        Word::Failure => TransactionStatus::Failed,
        Word::Cancelled => TransactionStatus::Expired,
    }
}

// What the bank says.

/// A callback whose signature was right.
#[derive(Clone, Debug)]
pub(crate) struct Callback {
    pub(crate) token: String,
    pub(crate) word: Word,
    pub(crate) money: Money,
    pub(crate) bank_reference: String,
    pub(crate) signed_at: OffsetDateTime,
    pub(crate) body: Vec<u8>,
}

/// What became of a callback; the migration says what each means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Quarantined,
    /// With the transaction that now has a word.
    Accepted(TransactionId),
    /// Accepted before, or what was known already.
    Known,
    Mismatch,
    Contrary,
    Second,
    Conflict,
}

impl Verdict {
    /// For the metrics.
    const fn label(self) -> &'static str {
        match self {
            Self::Quarantined => "quarantined",
            Self::Accepted(_) => "accepted",
            Self::Known => "known",
            Self::Mismatch => "mismatch",
            Self::Contrary => "contrary",
            Self::Second => "second",
            Self::Conflict => "conflict",
        }
    }
}

impl TopUps {
    pub(crate) async fn knows(&self, token: &str) -> sqlx::Result<bool> {
        sqlx::query_scalar("select exists (select from workflows.top_ups where token = $1)")
            .bind(token)
            .fetch_one(&self.pool)
            .await
    }

    /// Stores a callback for good and gives it its effect, once: afterwards it can be repeated but not lost.
    pub(crate) async fn take_callback(&self, callback: &Callback) -> sqlx::Result<Verdict> {
        let mut tx = self.pool.begin().await?;
        one_at_a_time(&mut tx, &callback.bank_reference).await?;
        let (id, is_new, verdict) = keep(&mut tx, callback).await?;
        let verdict = match verdict.as_str() {
            "CONFLICT" => judge(&mut tx, id, callback, is_new).await?,
            "QUARANTINED" => judge(&mut tx, id, callback, true).await?,
            "ACCEPTED" => Verdict::Known,
            "MISMATCH" => Verdict::Mismatch,
            "CONTRARY" => Verdict::Contrary,
            "SECOND" => Verdict::Second,
            _ => return Err(unreadable("verdict")),
        };
        tx.commit().await?;
        METRICS.callback(verdict.label());
        Ok(verdict)
    }

    /// Callbacks that came before their payment was known, and whose payment is known now.
    async fn release_quarantined(&self) -> sqlx::Result<()> {
        let known: Vec<(Uuid, String)> = sqlx::query_as(
            "select c.id, c.bank_reference from workflows.callbacks c join workflows.top_ups t on t.token = c.token
             where c.verdict = 'QUARANTINED' limit 100",
        )
        .fetch_all(&self.pool)
        .await?;
        for (id, reference) in &known {
            let mut tx = self.pool.begin().await?;
            one_at_a_time(&mut tx, reference).await?;
            // The callback before the payment, in the order of those that come in; and it may have been judged meanwhile.
            let row = sqlx::query(
                "select token, status, amount::text as amount, currency, bank_reference, signed_at
                 from workflows.callbacks where id = $1 and verdict = 'QUARANTINED' for update",
            )
            .bind(id)
            .fetch_optional(&mut *tx)
            .await?;
            let verdict = match row {
                Some(row) => Some(judge(&mut tx, *id, &callback(&row)?, true).await?),
                None => None,
            };
            tx.commit().await?;
            if let Some(verdict) = verdict.filter(|verdict| !matches!(verdict, Verdict::Quarantined)) {
                METRICS.callback(verdict.label());
            }
        }
        if !known.is_empty() {
            self.wake();
        }
        Ok(())
    }

    /// Looks again at what is quarantined, for as long as there is no stop.
    pub(crate) async fn look_at_quarantine(&self, shutdown: &Shutdown) {
        let mut pause = Pause::new(LOOK, LOOK * 8);
        while !shutdown.is_requested() {
            let released = tokio::select! {
                () = shutdown.requested() => return, // one cut short is rolled back
                released = within(ANSWERING, self.release_quarantined()) => released,
            };
            match released {
                Ok(()) => pause.reset(),
                Err(error) => tracing::warn!(%error, "quarantined callbacks could not be looked at; trying again"),
            }
            pause.wait(shutdown).await;
        }
    }
}

/// Two callbacks under one reference are judged one after the other, until the transaction ends.
async fn one_at_a_time(tx: &mut PgConnection, bank_reference: &str) -> sqlx::Result<()> {
    let lock = sqlx::query("select pg_advisory_xact_lock(hashtextextended('workflows.callbacks ' || $1, 0))");
    lock.bind(bank_reference).execute(tx).await?;
    Ok(())
}

/// Its row, whether that is new, and its verdict. A new one stands for nothing until it is judged.
async fn keep(tx: &mut PgConnection, callback: &Callback) -> sqlx::Result<(Uuid, bool, String)> {
    sqlx::query_as(
        "insert into workflows.callbacks (id, bank_reference, token, status, amount, currency, body, signed_at, verdict)
         values ($1, $2, $3, $4, $5::numeric, $6, $7, $8, 'CONFLICT')
         on conflict (bank_reference, token, status, amount, currency)
         do update set received_times = callbacks.received_times + 1, received_last_at = now()
         returning id, received_times = 1, verdict",
    )
    .bind(Uuid::now_v7())
    .bind(&callback.bank_reference)
    .bind(&callback.token)
    .bind(callback.word.name())
    .bind(callback.money.amount().to_string())
    .bind(callback.money.currency().code())
    .bind(&callback.body)
    .bind(callback.signed_at)
    .fetch_one(tx)
    .await
}

/// Whether the reference stands for another callback, or another payment was decided under it, as the bank may have said
/// when it was asked. A callback that was refused for its money leaves its reference to a corrected one.
async fn is_taken(tx: &mut PgConnection, id: Uuid, callback: &Callback) -> sqlx::Result<bool> {
    sqlx::query_scalar(
        "select exists (select from workflows.callbacks
                        where bank_reference = $1 and verdict not in ('MISMATCH', 'CONFLICT') and id <> $2)
             or exists (select from workflows.top_ups where bank_reference = $1 and token <> $3)",
    )
    .bind(&callback.bank_reference)
    .bind(id)
    .bind(&callback.token)
    .fetch_one(tx)
    .await
}

/// What a stored callback means for its payment, and the verdict that its row gets. Gives the payment its word if it has
/// none. `is_news` when nobody has been told yet that it is in conflict.
async fn judge(tx: &mut PgConnection, id: Uuid, callback: &Callback, is_news: bool) -> sqlx::Result<Verdict> {
    let (verdict, name) = if is_taken(tx, id, callback).await? {
        if is_news {
            alert(callback, "conflict", "a bank reference came again with other content");
        }
        (Verdict::Conflict, "CONFLICT")
    } else {
        compare(tx, callback).await?
    };
    sqlx::query("update workflows.callbacks set verdict = $2 where id = $1")
        .bind(id)
        .bind(name)
        .execute(&mut *tx)
        .await?;
    if let Verdict::Accepted(transaction) = verdict {
        // Taking the attempt away makes what a call under way brings too late to be recorded.
        sqlx::query(
            "update workflows.top_ups
             set state = 'DECIDED', word = $2, bank_reference = $3, due_at = now(), attempt_id = null, failures = 0, alert = null
             where transaction_id = $1",
        )
        .bind(transaction.uuid())
        .bind(callback.word.name())
        .bind(&callback.bank_reference)
        .execute(tx)
        .await?;
    }
    Ok(verdict)
}

/// A callback beside what is known of its payment, which stays locked.
async fn compare(tx: &mut PgConnection, callback: &Callback) -> sqlx::Result<(Verdict, &'static str)> {
    let row = sqlx::query(
        "select transaction_id, amount::text as amount, currency, word, outcome, bank_reference
         from workflows.top_ups where token = $1 for update",
    )
    .bind(&callback.token)
    .fetch_optional(tx)
    .await?;
    let Some(row) = row else {
        let reference = &callback.bank_reference;
        tracing::warn!(bank.reference = reference, "a callback for a payment that is not known is quarantined");
        return Ok((Verdict::Quarantined, "QUARANTINED"));
    };
    if money(&row)? != callback.money {
        alert(callback, "mismatch", "a callback speaks of other money than was asked for");
        return Ok((Verdict::Mismatch, "MISMATCH"));
    }
    let known = match outcome(&row)? {
        Some(TransactionStatus::Success) => Some(Word::Success),
        Some(TransactionStatus::Failed) => Some(Word::Failure),
        Some(_) => Some(Word::Cancelled),
        None => word(&row)?,
    };
    let reference: Option<String> = row.try_get("bank_reference")?;
    Ok(match known {
        None => {
            let transaction = TransactionId::from_uuid(row.try_get("transaction_id")?);
            (Verdict::Accepted(transaction), "ACCEPTED")
        }
        Some(known) if known != callback.word => {
            alert(callback, "contrary", &format!("a callback contradicts what is known: {}", known.name()));
            (Verdict::Contrary, "CONTRARY")
        }
        Some(_) if reference.is_some_and(|reference| reference != callback.bank_reference) => {
            alert(callback, "second", "a payment was decided again, under another reference");
            (Verdict::Second, "SECOND")
        }
        Some(_) => (Verdict::Known, "ACCEPTED"),
    })
}

/// Somebody must look: money may be where it should not be. Once for each different callback.
fn alert(callback: &Callback, kind: &str, what: &str) {
    let Callback { word, money, bank_reference, .. } = callback;
    let (amount, currency) = (money.amount(), money.currency());
    tracing::error!(alert = kind, bank.reference = bank_reference, status = word.name(), %amount, %currency, "{what}");
}

// What is to be done.

impl TopUps {
    /// Takes the steps of a lane as they fall due, until a stop is requested.
    pub(crate) async fn take_steps(self: &Arc<Self>, lane: Lane, shutdown: &Shutdown) {
        let mut under_way = JoinSet::new();
        let mut pause = Pause::new(Duration::from_millis(100), Duration::from_secs(5));
        while !shutdown.is_requested() {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable(); // from here on no change is missed
            let claimed = tokio::select! {
                () = shutdown.requested() => break, // a claim cut short is rolled back, or falls due again
                claimed = within(ANSWERING, self.claim(lane, None, STEPS_MAX - under_way.len())) => claimed,
            };
            match claimed {
                Ok(claimed) => {
                    pause.reset();
                    for due in claimed {
                        let top_ups = Arc::clone(self);
                        under_way.spawn(async move { top_ups.take_step(due).await });
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, ?lane, "what is due could not be claimed; trying again");
                    pause.wait(shutdown).await;
                    continue;
                }
            }
            let look = tokio::select! {
                () = shutdown.requested() => break,
                look = within(ANSWERING, self.next_due(lane)) => look.unwrap_or(LOOK),
            };
            tokio::select! {
                () = shutdown.requested() => {}
                Some(_) = under_way.join_next() => {} // a panic was logged where it happened; its row falls due again
                () = changed, if under_way.len() < STEPS_MAX => {}
                () = tokio::time::sleep(look), if under_way.len() < STEPS_MAX => {}
            }
        }
        if timeout(DRAIN, async { while under_way.join_next().await.is_some() {} }).await.is_err() {
            tracing::info!(?lane, steps = under_way.len(), "cut off; they will be taken up again");
        }
    }

    /// Issues at once the command that an accepted callback has made due, if no lane was faster.
    pub(crate) async fn take_step_of(&self, transaction: TransactionId) {
        match within(ANSWERING, self.claim(Lane::Ledger, Some(transaction), 1)).await {
            Ok(claimed) => {
                for due in claimed {
                    self.take_step(due).await;
                }
            }
            Err(error) => tracing::warn!(%error, transaction.id = %transaction, "not claimed at once; it stays due"),
        }
    }

    /// Rows that are due, ours from here on until the lease ends, each with its attempt written down.
    async fn claim(&self, lane: Lane, only: Option<TransactionId>, limit: usize) -> sqlx::Result<Vec<Due>> {
        if limit == 0 {
            return Ok(Vec::new());
        }
        let mut tx = self.pool.begin().await?;
        // Oldest first, and past rows that another claim holds at this moment.
        let rows = sqlx::query(
            "select transaction_id, requested_position, token, amount::text as amount, currency, return_url, traceparent,
                    state, expire_at <= now() as expired, offered_at is not null as offered,
                    failures, word, bank_reference, command_try, alert
             from workflows.top_ups
             where due_at <= now() and state = any($1) and ($2::uuid is null or transaction_id = $2)
             order by due_at limit $3
             for update skip locked",
        )
        .bind(lane.states())
        .bind(only.map(TransactionId::uuid))
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(&mut *tx)
        .await?;
        let claimed: Vec<Due> = rows.iter().map(due).collect::<sqlx::Result<_>>()?;
        if claimed.is_empty() {
            return Ok(claimed);
        }
        // Whoever is about to register is unsure from here on: the call may be heard though its answer never comes.
        sqlx::query(
            "with claimed as (
                 update workflows.top_ups t
                 set attempt_id = a.id, due_at = now() + $4 * interval '1 millisecond',
                     state = case a.step when 'register' then 'UNSURE' else t.state end,
                     offered_at = case a.step when 'register' then now() else t.offered_at end
                 from unnest($1::uuid[], $2::uuid[], $3::text[]) as a (id, transaction_id, step)
                 where t.transaction_id = a.transaction_id
                 returning a.id, a.transaction_id, a.step)
             insert into workflows.attempts (id, transaction_id, step, started_at)
             select id, transaction_id, step, now() from claimed",
        )
        .bind(claimed.iter().map(|due| due.attempt).collect::<Vec<_>>())
        .bind(claimed.iter().map(|due| due.transaction.uuid()).collect::<Vec<_>>())
        .bind(claimed.iter().map(|due| due.step.name()).collect::<Vec<_>>())
        .bind(millis(self.times.lease()))
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(claimed)
    }

    /// How long until something of this lane falls due; bounded.
    async fn next_due(&self, lane: Lane) -> sqlx::Result<Duration> {
        let millis: Option<i64> = sqlx::query_scalar(
            "select (extract(epoch from min(due_at) - now()) * 1000)::bigint from workflows.top_ups
             where due_at is not null and due_at <= now() + interval '2 seconds' and state = any($1)",
        )
        .bind(lane.states())
        .fetch_one(&self.pool)
        .await?;
        // A row that is due and was not claimed is held by another process for a moment: no reason to spin.
        let wait = millis.map_or(LOOK, |millis| Duration::from_millis(u64::try_from(millis).unwrap_or(0)));
        Ok(wait.clamp(Duration::from_millis(20), LOOK))
    }

    async fn take_step(&self, due: Due) {
        let begun = Instant::now();
        let brought = match timeout(self.times.attempt(), self.attempt(&due)).await {
            Ok(brought) => brought,
            Err(_) => Brought::Nothing { why: "the attempt took too long".to_owned(), wait: Duration::ZERO },
        };
        METRICS.step(due.step.name(), brought.label(), begun.elapsed());
        let next = due.next(&brought, &self.times);
        match within(ANSWERING, self.record(&due, &brought, &next)).await {
            Ok(true) => {
                if next.alert.is_some() && (next.alert != due.alert || next.state == State::Blocked) {
                    let alert = next.alert.as_deref();
                    tracing::error!(alert, transaction.id = %due.transaction, step = due.step.name(), "a top-up needs a person");
                } else if let Brought::Nothing { why, .. } = &brought {
                    tracing::warn!(why, transaction.id = %due.transaction, step = due.step.name(), "no outcome; trying again");
                } else {
                    tracing::info!(transaction.id = %due.transaction, step = due.step.name(), state = next.state.name(), "top-up");
                }
                self.wake();
            }
            Ok(false) => tracing::debug!(transaction.id = %due.transaction, step = due.step.name(), "overtaken"),
            Err(error) => {
                // The row falls due when the lease ends, and the step says the same again then.
                tracing::warn!(%error, transaction.id = %due.transaction, step = due.step.name(), "an outcome could not be recorded");
            }
        }
    }

    /// Takes the step, as a span of the trace in which the top-up was asked for.
    async fn attempt(&self, due: &Due) -> Brought {
        let span = trace::child(due.step.name(), SpanKind::Client, due.traceparent.as_deref());
        let traceparent = span.as_ref().map(Span::traceparent).or_else(|| due.traceparent.clone());
        let brought = self.call(due, traceparent.as_deref()).await;
        if let Some(mut span) = span {
            span.set("daybook.transaction.id", due.transaction.to_string());
            span.set("http.request.resend_count", i64::from(due.failures));
            if let Brought::Nothing { .. } = brought {
                span.failed("unknown");
            }
            span.end();
        }
        brought
    }

    async fn call(&self, due: &Due, traceparent: Option<&str>) -> Brought {
        let (token, money) = (due.token.as_str(), due.money);
        let standing = match due.step {
            Step::Register => self.bank.register(token, money, due.return_url.as_deref(), traceparent).await,
            Step::Ask => self.bank.ask(token, money, traceparent).await,
            Step::Cancel => self.cancel(due, traceparent).await,
            Step::Command(word) => return self.command(due, word, traceparent).await,
        };
        match standing {
            Ok(standing) => Brought::Standing(standing),
            Err(NoAnswer(why)) => Brought::Nothing { why, wait: Duration::ZERO },
        }
    }

    /// Cancels the payment for good. `NotKnown` means that the bank does not have it and never will.
    async fn cancel(&self, due: &Due, traceparent: Option<&str>) -> Result<Standing, NoAnswer> {
        let standing = self.bank.cancel(&due.token, due.money, traceparent).await?;
        if standing != Standing::NotKnown || !due.offered || due.state == State::Waiting {
            return Ok(standing);
        }
        // An offer of ours may still be on its way. Once the bank knows the payment as cancelled, it comes too late.
        match self.bank.register(&due.token, due.money, due.return_url.as_deref(), traceparent).await? {
            Standing::Pending => self.bank.cancel(&due.token, due.money, traceparent).await,
            Standing::Refused(_) => Ok(Standing::NotKnown), // as it would refuse the same offer when that arrives
            other => Ok(other),
        }
    }

    /// Tells the ledger. The same row gives the same key and body until the ledger has refused it.
    async fn command(&self, due: &Due, word: Word, traceparent: Option<&str>) -> Brought {
        let step = due.step.name();
        let path = format!("/v1/transactions/{}/{step}", due.transaction);
        let key = format!("topup:{}:{step}:{}:{}", due.requested_position, due.command_try, due.transaction);
        let body = match word {
            Word::Success => json!({
                "amount": due.money.amount(),
                "currency": due.money.currency(),
                "bankReference": due.bank_reference,
            }),
            Word::Failure => json!({ "code": "payment-declined", "detail": "the bank says that the payment failed" }),
            Word::Cancelled => json!({}),
        };
        match self.commands.issue(&path, &key, traceparent, &body).await {
            Reply::Done => Brought::Ended { outcome: outcome_of(word), reference: due.bank_reference.clone() },
            Reply::Refused { code, .. } if code == "invalid-transition" => self.ended_by_others(due).await,
            Reply::Refused { detail, .. } => Brought::Blocked(detail),
            Reply::Unknown { why, wait } => Brought::Nothing { why, wait },
        }
    }

    /// The ledger says that the transaction has ended: its stream says how.
    async fn ended_by_others(&self, due: &Due) -> Brought {
        let nothing = |why: String| Brought::Nothing { why, wait: Duration::ZERO };
        let stream = match self.log.stream("transaction", &due.transaction.to_string(), i64::MAX).await {
            Ok(stream) => stream,
            Err(error) => return nothing(format!("reading the log: {error}")),
        };
        match stream.last().map(RecordedEvent::read) {
            Some(Ok(Event::Transaction(_, TransactionEvent::Settled { provider_reference, .. }))) => {
                Brought::Ended { outcome: TransactionStatus::Success, reference: Some(provider_reference) }
            }
            Some(Ok(Event::Transaction(_, TransactionEvent::Failed { .. }))) => {
                Brought::Ended { outcome: TransactionStatus::Failed, reference: None }
            }
            Some(Ok(Event::Transaction(_, TransactionEvent::Expired { .. }))) => {
                Brought::Ended { outcome: TransactionStatus::Expired, reference: None }
            }
            _ => nothing("the ledger says that it has ended, its stream does not".to_owned()),
        }
    }

    /// Writes an attempt's outcome. False when the row is no longer held under it: a callback or the log was faster.
    async fn record(&self, due: &Due, brought: &Brought, next: &Next) -> sqlx::Result<bool> {
        // What waits for the payer's decision is looked at when its time is over, however long the pause.
        let changed = sqlx::query(
            "with ended as (update workflows.attempts set ended_at = now(), outcome = $3 where id = $1)
             update workflows.top_ups
             set state = $4, failures = $6, word = $7, bank_reference = $8, command_try = $9, outcome = $10, alert = $11,
                 attempt_id = null,
                 unfrozen = unfrozen and command_try = $9, -- a refusal, which counts the try up, has used it
                 due_at = case
                     when $4 = 'ENDED' then null
                     when unfrozen and command_try < $9 then now()
                     when $4 in ('REQUESTED', 'UNSURE', 'WAITING') and now() < expire_at
                         then least(now() + $5 * interval '1 millisecond', expire_at)
                     else now() + $5 * interval '1 millisecond'
                 end
             where transaction_id = $2 and attempt_id = $1",
        )
        .bind(due.attempt)
        .bind(due.transaction.uuid())
        .bind(brought.describe())
        .bind(next.state.name())
        .bind(millis(next.pause))
        .bind(next.failures)
        .bind(next.word.map(Word::name))
        .bind(next.bank_reference.as_deref())
        .bind(next.command_try)
        .bind(next.outcome.map(TransactionStatus::name))
        .bind(next.alert.as_deref())
        .execute(&self.pool)
        .await?;
        Ok(changed.rows_affected() == 1)
    }
}

impl Due {
    /// Where a row goes from an attempt. Pure: every rule about time-outs, pauses and alerts is here.
    fn next(&self, brought: &Brought, times: &Times) -> Next {
        let held = if self.step == Step::Register { State::Unsure } else { self.state };
        let stay = Next {
            state: held,
            pause: Duration::ZERO,
            failures: self.failures.saturating_add(1),
            word: self.word,
            bank_reference: self.bank_reference.clone(),
            command_try: self.command_try,
            outcome: None,
            alert: self.alert.clone(),
        };
        let ask_after = times.ask_after.max(ASK_MIN);
        let ask_later = pause::after(self.failures, ask_after, ask_after.saturating_mul(16));
        let much_later =
            |so_often: i32| pause::after(so_often, times.blocked_after, times.blocked_after.saturating_mul(60));
        match (brought, self.step) {
            (Brought::Nothing { why, wait }, _) => {
                let pause = pause::after(self.failures, AGAIN_FIRST, AGAIN_MAX);
                let long = FAILURES_MAX <= self.failures;
                let alert = long.then(|| format!("for long no outcome of {}: {why}", self.step.name()));
                Next { pause: pause.max((*wait).min(AGAIN_MAX)), alert: alert.or(stay.alert), ..stay }
            }
            (Brought::Standing(Standing::Pending), Step::Cancel) => Next { pause: ask_later, ..stay },
            (Brought::Standing(Standing::Pending), Step::Register) => {
                Next { state: State::Waiting, pause: ask_after, failures: 0, alert: None, ..stay }
            }
            (Brought::Standing(Standing::Pending), _) => {
                Next { state: State::Waiting, pause: ask_later, alert: None, ..stay }
            }
            (Brought::Standing(Standing::Decided { word, reference }), _) => Next {
                state: State::Decided,
                failures: 0,
                word: Some(*word),
                bank_reference: reference.clone(),
                alert: None,
                ..stay
            },
            (Brought::Standing(Standing::NotKnown), _) if held == State::Waiting => Next {
                pause: much_later(self.failures),
                alert: Some("the bank does not know a payment that it has taken".to_owned()),
                ..stay
            },
            (Brought::Standing(Standing::NotKnown), Step::Cancel) => {
                Next { state: State::Decided, failures: 0, word: Some(Word::Cancelled), alert: None, ..stay }
            }
            (Brought::Standing(Standing::NotKnown), _) => {
                Next { state: State::Requested, failures: self.failures, ..stay }
            }
            (Brought::Standing(Standing::Refused(why)), step) => Next {
                state: if step == Step::Register { State::Requested } else { held },
                pause: much_later(self.failures),
                alert: Some(format!("the bank refuses to {}: {why}", step.name())),
                ..stay
            },
            (Brought::Standing(Standing::OtherMoney(said)), _) => Next {
                pause: much_later(self.failures),
                alert: Some(format!("the bank has the payment as {said}")),
                ..stay
            },
            (Brought::Ended { outcome, reference }, _) => Next {
                state: State::Ended,
                failures: 0,
                outcome: Some(*outcome),
                alert: conflict(self.word, self.bank_reference.as_deref(), *outcome, reference.as_deref()),
                ..stay
            },
            (Brought::Blocked(why), _) => Next {
                state: State::Blocked,
                pause: much_later(self.command_try),
                failures: 0,
                command_try: self.command_try.saturating_add(1),
                alert: Some(format!("the ledger refuses to {}: {why}", self.step.name())),
                ..stay
            },
        }
    }
}

impl State {
    const ALL: [Self; 6] = [Self::Requested, Self::Unsure, Self::Waiting, Self::Decided, Self::Blocked, Self::Ended];

    const fn name(self) -> &'static str {
        match self {
            Self::Requested => "REQUESTED",
            Self::Unsure => "UNSURE",
            Self::Waiting => "WAITING",
            Self::Decided => "DECIDED",
            Self::Blocked => "BLOCKED",
            Self::Ended => "ENDED",
        }
    }

    /// What is to be done in this state, once it is due.
    fn step(self, expired: bool, word: Option<Word>) -> Option<Step> {
        match self {
            Self::Decided | Self::Blocked => word.map(Step::Command),
            Self::Requested | Self::Unsure | Self::Waiting if expired => Some(Step::Cancel),
            Self::Requested => Some(Step::Register),
            Self::Unsure | Self::Waiting => Some(Step::Ask),
            Self::Ended => None,
        }
    }
}

impl Step {
    const fn name(self) -> &'static str {
        match self {
            Self::Register => "register",
            Self::Ask => "ask",
            Self::Cancel => "cancel",
            Self::Command(Word::Success) => "settle",
            Self::Command(Word::Failure) => "fail",
            Self::Command(Word::Cancelled) => "expire",
        }
    }
}

impl Lane {
    fn states(self) -> &'static [&'static str] {
        match self {
            Self::Bank => &["REQUESTED", "UNSURE", "WAITING"],
            Self::Ledger => &["DECIDED", "BLOCKED"],
        }
    }
}

impl Brought {
    /// For the metrics, without what others wrote.
    const fn label(&self) -> &'static str {
        match self {
            Self::Standing(Standing::Pending) => "pending",
            Self::Standing(Standing::Decided { .. }) => "decided",
            Self::Standing(Standing::NotKnown) => "not_known",
            Self::Standing(Standing::Refused(_)) => "refused",
            Self::Standing(Standing::OtherMoney(_)) => "other_money",
            Self::Ended { .. } => "ended",
            Self::Blocked(_) => "blocked",
            Self::Nothing { .. } => "unknown",
        }
    }

    /// For the attempt's row.
    fn describe(&self) -> String {
        match self {
            Self::Standing(Standing::Pending) => "pending".to_owned(),
            Self::Standing(Standing::Decided { word, .. }) => word.name().to_owned(),
            Self::Standing(Standing::NotKnown) => "not known".to_owned(),
            Self::Standing(Standing::Refused(why)) => format!("refused: {why}"),
            Self::Standing(Standing::OtherMoney(said)) => format!("other money: {said}"),
            Self::Ended { outcome, .. } => outcome.name().to_owned(),
            Self::Blocked(why) => format!("blocked: {why}"),
            Self::Nothing { why, .. } => format!("unknown: {why}"),
        }
    }
}

fn due(row: &PgRow) -> sqlx::Result<Due> {
    let name: String = row.try_get("state")?;
    let word = word(row)?;
    let state = State::ALL.into_iter().find(|state| state.name() == name).ok_or_else(|| unreadable("state"))?;
    Ok(Due {
        attempt: Uuid::now_v7(),
        transaction: TransactionId::from_uuid(row.try_get("transaction_id")?),
        requested_position: row.try_get("requested_position")?,
        token: row.try_get("token")?,
        money: money(row)?,
        return_url: row.try_get("return_url")?,
        traceparent: row.try_get("traceparent")?,
        state,
        step: state.step(row.try_get("expired")?, word).ok_or_else(|| unreadable("word"))?,
        offered: row.try_get("offered")?,
        failures: row.try_get("failures")?,
        word,
        bank_reference: row.try_get("bank_reference")?,
        command_try: row.try_get("command_try")?,
        alert: row.try_get("alert")?,
    })
}

fn callback(row: &PgRow) -> sqlx::Result<Callback> {
    let status: String = row.try_get("status")?;
    Ok(Callback {
        token: row.try_get("token")?,
        word: Word::from_name(&status).ok_or_else(|| unreadable("status"))?,
        money: money(row)?,
        bank_reference: row.try_get("bank_reference")?,
        signed_at: row.try_get("signed_at")?,
        body: Vec::new(), // stored already
    })
}

fn money(row: &PgRow) -> sqlx::Result<Money> {
    let (amount, currency): (String, String) = (row.try_get("amount")?, row.try_get("currency")?);
    let currency = currency.parse().map_err(|_| unreadable("currency"))?;
    Money::parse(&amount, currency).map_err(|_| unreadable("amount"))
}

fn word(row: &PgRow) -> sqlx::Result<Option<Word>> {
    let name: Option<String> = row.try_get("word")?;
    name.map(|name| Word::from_name(&name).ok_or_else(|| unreadable("word"))).transpose()
}

fn outcome(row: &PgRow) -> sqlx::Result<Option<TransactionStatus>> {
    let name: Option<String> = row.try_get("outcome")?;
    let all = [TransactionStatus::Success, TransactionStatus::Failed, TransactionStatus::Expired];
    let read =
        |name: String| all.into_iter().find(|outcome| outcome.name() == name).ok_or_else(|| unreadable("outcome"));
    name.map(read).transpose()
}

fn unreadable(column: &str) -> sqlx::Error {
    sqlx::Error::Protocol(format!("{column} holds what was never written"))
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

fn whole(duration: Duration) -> time::Duration {
    time::Duration::try_from(duration).unwrap_or(time::Duration::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn due(state: State, step: Step) -> Due {
        let word = if let Step::Command(word) = step { Some(word) } else { None };
        Due {
            attempt: Uuid::now_v7(),
            transaction: TransactionId::from_uuid(Uuid::now_v7()),
            requested_position: 7,
            token: "token".to_owned(),
            money: Money::parse("10.50", "EUR".parse().unwrap()).unwrap(),
            return_url: None,
            traceparent: None,
            state,
            step,
            offered: true,
            failures: 0,
            word,
            bank_reference: word.map(|_| "BNK1".to_owned()),
            command_try: 0,
            alert: None,
        }
    }

    fn nothing() -> Brought {
        Brought::Nothing { why: "no answer in time".to_owned(), wait: Duration::ZERO }
    }

    fn after(due: &Due, brought: &Brought) -> (State, Option<Word>, i32, bool) {
        let next = due.next(brought, &Times::default());
        (next.state, next.word, next.command_try, next.alert.is_some())
    }

    #[test]
    fn no_answer_decides_nothing_and_after_a_registration_it_is_asked_for() {
        let register = due(State::Requested, Step::Register);
        assert_eq!(after(&register, &nothing()), (State::Unsure, None, 0, false));
        assert_eq!(State::Unsure.step(false, None), Some(Step::Ask));
        for step in [Step::Ask, Step::Cancel] {
            assert_eq!(after(&due(State::Waiting, step), &nothing()), (State::Waiting, None, 0, false));
        }
        for word in [Word::Success, Word::Failure, Word::Cancelled] {
            let command = due(State::Decided, Step::Command(word));
            assert_eq!(after(&command, &nothing()), (State::Decided, Some(word), 0, false), "the same key again");
        }
    }

    #[test]
    fn a_payment_that_the_bank_does_not_know_expires_only_if_it_never_had_it() {
        let unknown = Brought::Standing(Standing::NotKnown);
        assert_eq!(after(&due(State::Unsure, Step::Ask), &unknown), (State::Requested, None, 0, false));
        let never_taken = due(State::Unsure, Step::Cancel);
        assert_eq!(after(&never_taken, &unknown), (State::Decided, Some(Word::Cancelled), 0, false));
        assert_eq!(after(&due(State::Waiting, Step::Cancel), &unknown), (State::Waiting, None, 0, true));
    }

    #[test]
    fn money_that_cannot_be_booked_is_kept_and_offered_again_under_a_new_key_after_ever_longer_pauses() {
        let blocked = Brought::Blocked("wallet-frozen".to_owned());
        let mut due = due(State::Decided, Step::Command(Word::Success));
        let mut pauses = Vec::new();
        for tried in 0..8 {
            let next = due.next(&blocked, &Times::default());
            assert_eq!((next.state, next.word, next.command_try), (State::Blocked, Some(Word::Success), tried + 1));
            pauses.push(next.pause.as_secs() / 60);
            due = Due {
                state: next.state,
                command_try: next.command_try,
                failures: next.failures,
                alert: next.alert,
                ..due
            };
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
    }

    #[test]
    fn a_ledger_that_ended_it_otherwise_needs_a_person() {
        let settle = due(State::Decided, Step::Command(Word::Success));
        let ended = |outcome, reference: &str| Brought::Ended { outcome, reference: Some(reference.to_owned()) };
        let alert = |brought| after(&settle, &brought).3;
        assert!(!alert(ended(TransactionStatus::Success, "BNK1")));
        assert!(alert(ended(TransactionStatus::Success, "BNK2")), "booked under another reference");
        assert!(alert(Brought::Ended { outcome: TransactionStatus::Expired, reference: None }));
    }
}
