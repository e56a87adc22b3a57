//! Postings: which events of the log answer which question.
//!
//! An index of the log, written page by page, and all that a movement of money writes: one row for each of its wallets,
//! and a share of a few rows for everybody's lists. What a query finds here it reads in the log, so a balance, a
//! statement or a transaction cannot say anything but what the log says.
//!
//! Left out: what the events mean to whoever asks, which is `balances.rs`, `entries.rs`, `transactions.rs`.

use std::time::Duration;

use api_contract::Problem;
use ledger_core::{Event, Instruction, PartnerId, Timestamp, TransactionEvent, TransactionKind, WalletId};
use sha2::{Digest, Sha256};
use sqlx::{PgConnection, Row};
use tokio::time::Instant;
use uuid::Uuid;

use crate::page::{EVENT, Happened, Page};
use crate::queries::{self, Queries};

/// A question that events answer. The auditor has these too, in its own words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Term(Uuid);

impl Term {
    /// All that changed a wallet: entries, and its own life. The last of these says what it holds.
    pub(crate) const fn changes(wallet: WalletId) -> Self {
        Self(wallet.uuid())
    }

    /// The entries of a wallet that may count at another time than when they were recorded.
    pub(crate) fn backdated(wallet: WalletId) -> Self {
        Self::hashed("backdated", wallet.uuid().as_bytes())
    }

    /// How transactions about a wallet began, as far as its changes do not show it: nothing moved, or the wallet is the
    /// system's, which moves with transactions that are about others.
    pub(crate) fn about(wallet: WalletId) -> Self {
        Self::hashed("about", wallet.uuid().as_bytes())
    }

    /// How a partner's transactions began, or everybody's.
    pub(crate) fn transactions(partner: Option<PartnerId>) -> Self {
        Self(partner.map_or(Uuid::nil(), PartnerId::uuid))
    }

    /// Those among them that are not just transfers that were done: whoever looks for one need not walk past all others.
    pub(crate) fn unusual(partner: Option<PartnerId>) -> Self {
        Self::hashed("unusual", Self::transactions(partner).0.as_bytes())
    }

    pub(crate) fn user(id: &str) -> Self {
        Self::hashed("user", id.as_bytes())
    }

    pub(crate) fn reference(text: &str) -> Self {
        Self::hashed("reference", text.as_bytes())
    }

    fn hashed(word: &str, what: &[u8]) -> Self {
        let hash = Sha256::new().chain_update(word).chain_update([0]).chain_update(what).finalize();
        Self(Uuid::from_slice(&hash[..16]).expect("16 bytes"))
    }
}

/// Positions in one row. A page of the log has many for a busy partner and one or two for most wallets; a row must
/// stay well below the 2 kB above which Postgres would store it elsewhere.
const ROW_MAX: usize = 100;

/// Rows in whose order two versions of this view can be compared: pages are not the same for both.
pub(crate) const COMPARED: &str = "select term, unnest(earlier || position) as position";

pub(crate) async fn write(page: &Page, connection: &mut PgConnection) -> sqlx::Result<()> {
    let mut postings: Vec<(Term, i64)> = Vec::with_capacity(4 * page.events.len());
    for happened in &page.events {
        post(&happened.event, |term| postings.push((term, happened.position)));
    }
    if postings.is_empty() {
        return Ok(());
    }
    // Sorted, what belongs together lies together, and the index is walked once from its beginning to its end.
    postings.sort_unstable();
    postings.dedup();
    let (mut terms, mut positions, mut earlier) = (Vec::new(), Vec::new(), Vec::new());
    for of_term in postings.chunk_by(|(one, _), (other, _)| one == other) {
        for row in of_term.chunks(ROW_MAX) {
            let (&(Term(term), position), before) = row.split_last().expect("chunks are not empty");
            terms.push(term);
            positions.push(position);
            earlier.push((!before.is_empty()).then(|| array(before)));
        }
    }
    sqlx::query(
        "insert into postings (term, position, earlier)
         select term, position, earlier::bigint[] from unnest($1::uuid[], $2::bigint[], $3::text[])
             as p (term, position, earlier)",
    )
    .bind(terms)
    .bind(positions)
    .bind(earlier)
    .execute(connection)
    .await?;
    Ok(())
}

/// An array of positions as Postgres reads it.
fn array(postings: &[(Term, i64)]) -> String {
    use std::fmt::Write;
    let mut text = String::with_capacity(10 * postings.len());
    let mut mark = '{';
    for (_, position) in postings {
        write!(text, "{mark}{position}").expect("writing to a String cannot fail");
        mark = ',';
    }
    text.push('}');
    text
}

/// The questions that an event answers.
fn post(event: &Event, mut to: impl FnMut(Term)) {
    let event = match event {
        Event::Wallet(wallet, _) => return to(Term::changes(*wallet)),
        Event::Transaction(_, event) => event,
        Event::Partner(..) | Event::Command(..) => return,
    };
    let instruction = instruction(event);
    for entry in event.entries().into_iter().flatten() {
        to(Term::changes(entry.wallet_id));
        // One that was pending counts when it was asked to, which stands in its first event.
        if instruction.is_none_or(|instruction| instruction.effective_at.is_some()) {
            to(Term::backdated(entry.wallet_id));
        }
    }
    let Some(instruction) = instruction else { return };
    let is_posted = matches!(event, TransactionEvent::Posted { .. });
    for partner in [None, instruction.partner_id].into_iter().take(1 + usize::from(instruction.partner_id.is_some())) {
        to(Term::transactions(partner));
        if !is_posted || instruction.kind != TransactionKind::Transfer {
            to(Term::unusual(partner));
        }
    }
    for wallet in [Some(instruction.wallet_id), instruction.to_wallet_id].into_iter().flatten() {
        if !is_posted || wallet.is_system() {
            to(Term::about(wallet));
        }
    }
    if let Some(user) = &instruction.user_id {
        to(Term::user(user));
    }
    if let Some(reference) = &instruction.reference {
        to(Term::reference(reference));
    }
}

/// What was asked for, of the events that say it: each is its transaction's first.
pub(crate) fn instruction(event: &TransactionEvent) -> Option<&Instruction> {
    match event {
        TransactionEvent::Posted { instruction, .. }
        | TransactionEvent::Requested { instruction, .. }
        | TransactionEvent::Declined { instruction, .. } => Some(instruction),
        TransactionEvent::Settled { .. } | TransactionEvent::Failed { .. } | TransactionEvent::Expired { .. } => None,
    }
}

/// Events that a walk reads at a time when filters let few of them pass.
const CHUNK_MAX: i64 = 1_000;

/// How long a walk may take: a filter that lets nearly nothing pass could lead through the whole log.
const WALK_TIME: Duration = Duration::from_secs(2);

/// A walk from event to event that answer one of some questions, the latest first.
///
/// Chunks are read one after the other: behind a position that a view has reached, nothing comes to it any more.
pub(crate) struct Walk<'q> {
    queries: &'q Queries,
    terms: Vec<Uuid>,
    after: i64,
    before: i64,
    chunk: i64,
    reflected: Option<i64>,
    has_ended: bool,
    until: Instant,
}

impl<'q> Walk<'q> {
    /// Goes from before a position, `None` being the end of the log, down to the one behind `after`; reads so many events
    /// first and more later.
    pub(crate) fn new(queries: &'q Queries, terms: &[Term], after: i64, before: Option<i64>, chunk: i64) -> Self {
        let terms = terms.iter().map(|Term(term)| *term).collect();
        let before = before.unwrap_or(i64::MAX);
        let until = Instant::now() + WALK_TIME;
        Self { queries, terms, after, before, chunk, reflected: None, has_ended: false, until }
    }

    /// The next events; empty when there are no more.
    pub(crate) async fn next(&mut self) -> Result<Vec<Happened>, Problem> {
        if self.has_ended {
            return Ok(Vec::new());
        }
        if self.reflected.is_some() && self.until < Instant::now() {
            return Err(Problem::of("query-timeout"));
        }
        // A row's positions lie within one page of the log, so of the rows that end at or behind `before` only the first can
        // have one before it.
        let rows = sqlx::query(&format!(
            "select c.position as reflected, {EVENT} from checkpoints c
             left join lateral (
                 select distinct found.position from unnest($1::uuid[]) asked (term)
                 cross join lateral (
                     select unnest(earlier || position) as position from (
                         select earlier, position from postings
                         where term = asked.term and $4 < position and position <= coalesce(
                             (select min(position) from postings where term = asked.term and $2 <= position), $2)
                         order by position desc limit $3 + 1
                     ) rows
                 ) found
                 where $4 < found.position and found.position < $2 order by found.position desc limit $3
             ) p on true
             left join ledger.events e on e.position = p.position
             where c.view = 'postings' order by p.position desc"
        ))
        .bind(&self.terms)
        .bind(self.before)
        .bind(self.chunk)
        .bind(self.after)
        .fetch_all(self.queries.pool())
        .await
        .map_err(queries::failed)?;
        let first = rows.first().ok_or_else(queries::no_checkpoint)?;
        let reflected = first.try_get("reflected").map_err(queries::failed)?;
        self.reflected.get_or_insert(reflected);
        let events = rows.iter().filter_map(|row| Happened::from_row(row).transpose());
        let events = events.collect::<Result<Vec<_>, _>>().map_err(queries::unfit)?;
        self.has_ended = i64::try_from(events.len()).is_ok_and(|count| count < self.chunk);
        self.before = events.last().map_or(0, |last| last.position);
        self.chunk = CHUNK_MAX.min(4 * self.chunk);
        Ok(events)
    }

    /// The position that the first events reflect.
    pub(crate) fn reflected(&self) -> i64 {
        self.reflected.expect("asked after the first events")
    }
}

/// The position of the last event that was recorded up to and including a time; `None`: the log has not come so far, and
/// events of that very time may still be appended.
pub(crate) async fn position_at(queries: &Queries, time: Timestamp) -> Result<Option<i64>, Problem> {
    // Commits are numbered without a gap and their times never go back, so halving the log finds it.
    sqlx::query_scalar(
        "with recursive search (low, high) as (
             (select 0::bigint, number from ledger.commits where 0 < number order by number desc limit 1)
             union all
             select case when c.recorded_at <= $1 then c.number else low end,
                    case when c.recorded_at <= $1 then high else c.number end
             from search join ledger.commits c on c.number = (low + high) / 2
             where 1 < high - low
         )
         select low.last_position from search
         join ledger.commits low on low.number = search.low
         join ledger.commits high on high.number = search.high and $1 < high.recorded_at
         where search.high - search.low = 1",
    )
    .bind(time.date_time())
    .fetch_optional(queries.pool())
    .await
    .map_err(queries::failed)
}
