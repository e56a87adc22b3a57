//! Statements: what a wallet gave and got, entry by entry.
//!
//! Read along the postings of what changed the wallet; each line is an entry of an event in the log. Filters are looked
//! at on the way.

use api_contract::{Client, Freshness, Limit, MinPosition, Page as List, Path, Position, Problem, Query, WaitMs};
use axum::Json;
use axum::extract::State;
use axum::response::IntoResponse;
use ledger_core::{
    Amount, Balance, Currency, Direction, Entry, Event, Timestamp, TransactionEvent, TransactionId, TransactionKind,
    WalletId,
};
use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::page::Happened;
use crate::postings::{self, Term, Walk};
use crate::queries::{self, Found, KindName, Queries};
use crate::{transactions, wallets};

/// A line of a statement.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = StatementEntry)]
pub(crate) struct StatementEntry {
    #[schema(value_type = String, example = "txn_0192f0c1-2d3e-7abc-8def-0123456789ab")]
    transaction_id: TransactionId,
    /// Of the event that moved the money.
    position: i64,
    /// Of the transaction.
    #[serde(rename = "type")]
    #[schema(example = "TRANSFER")]
    kind: &'static str,
    #[schema(value_type = String, pattern = "^(DEBIT|CREDIT)$")]
    direction: Direction,
    #[schema(value_type = String, example = "10.50")]
    amount: Amount,
    #[schema(value_type = String, example = "EUR")]
    currency: Currency,
    #[schema(value_type = String, example = "70.00")]
    balance_after: Balance,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<String>,
    /// When it counts in business.
    #[schema(value_type = String, format = DateTime)]
    effective_at: Timestamp,
    /// When the log took it.
    #[schema(value_type = String, format = DateTime)]
    recorded_at: Timestamp,
}

/// Events that are read at first where filters may let few of them pass.
const FILTERED: i64 = 200;

#[derive(Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct EntriesQuery {
    limit: Option<Limit>,
    cursor: Option<String>,
    /// `effectiveAt` from this time on.
    #[param(value_type = Option<String>, format = DateTime)]
    from: Option<Timestamp>,
    /// `effectiveAt` up to and including this time.
    #[param(value_type = Option<String>, format = DateTime)]
    to: Option<Timestamp>,
    /// The transaction's type.
    #[serde(rename = "type")]
    #[param(value_type = Option<String>, example = "TRANSFER")]
    kind: Option<KindName>,
    min_position: Option<MinPosition>,
    wait_ms: Option<WaitMs>,
}

/// An entry of a wallet, with what its transaction says about it.
pub(crate) struct Movement {
    pub(crate) effective_at: Timestamp,
    position: i64,
    recorded_at: Timestamp,
    transaction_id: TransactionId,
    kind: TransactionKind,
    description: Option<String>,
    entry: Entry,
}

impl Movement {
    /// Above zero a credit, below a debit.
    pub(crate) fn change(&self) -> Decimal {
        match self.entry.direction {
            Direction::Credit => self.entry.amount.decimal(),
            Direction::Debit => -self.entry.amount.decimal(),
        }
    }
}

/// The wallet's entries in these events, in their order. What was asked for stands in the event itself, or in the first one
/// of its transaction.
pub(crate) async fn movements(
    queries: &Queries,
    events: Vec<Happened>,
    wallet: WalletId,
) -> Result<Vec<Movement>, Problem> {
    let moved = |happened: &Happened| match &happened.event {
        Event::Transaction(id, event) => event.entries().map(|entries| (*id, entries.clone())),
        Event::Wallet(..) | Event::Partner(..) | Event::Command(..) => None,
    };
    let elsewhere = events.iter().filter_map(|happened| match &happened.event {
        Event::Transaction(id, TransactionEvent::Settled { .. }) => Some(*id),
        _ => None,
    });
    let begun = transactions::begun(queries, &elsewhere.collect::<Vec<_>>()).await?;
    let mut movements = Vec::with_capacity(events.len());
    for happened in &events {
        let Some((transaction_id, entries)) = moved(happened) else { continue };
        let first = begun.get(&transaction_id).unwrap_or(happened);
        let instruction = match &first.event {
            Event::Transaction(_, event) => postings::instruction(event),
            _ => None,
        };
        let instruction = instruction.ok_or_else(|| queries::misposted(happened.position))?;
        for entry in entries.iter().filter(|entry| entry.wallet_id == wallet) {
            movements.push(Movement {
                effective_at: instruction.effective_at.unwrap_or(happened.recorded_at),
                position: happened.position,
                recorded_at: happened.recorded_at,
                transaction_id,
                kind: instruction.kind,
                description: instruction.description.clone(),
                entry: entry.clone(),
            });
        }
    }
    Ok(movements)
}

/// A wallet's statement
///
/// What it gave and got, the latest first.
#[utoipa::path(
    get, path = "/v1/wallets/{id}/entries", operation_id = "listEntries", tag = "wallets",
    security(("bearer" = ["wallets:read"])),
    params(("id" = String, Path), EntriesQuery),
    responses((status = 200, description = "A page of the statement.", body = List<StatementEntry>)),
    extensions(("x-problems" = json!(["wallet-not-found", "time-range-invalid"]))),
)]
pub(crate) async fn list(
    State(queries): State<Queries>,
    client: Client,
    Path(id): Path<WalletId>,
    Query(query): Query<EntriesQuery>,
) -> Result<impl IntoResponse, Problem> {
    const ROUTE: &str = "/v1/wallets/{id}/entries";
    let partner = queries::visible_to(&client)?;
    let kind = query.kind.map(|kind| kind.0);
    queries::range(query.from, query.to)?;
    let filters = format!("{:?}", (id, query.from, query.to, &kind));
    let before = queries.after(ROUTE, partner, &filters, query.cursor.as_deref())?;
    let limit = query.limit.unwrap_or_default().get();
    let filtered = query.from.is_some() || query.to.is_some() || kind.is_some();
    let (queries, kind) = (&queries, kind.as_deref());
    let find = || async move {
        let Found { position, item } = wallets::currency(queries, id, partner).await?;
        let Some(currency) = item else { return Ok(Found { position, item: None }) };
        let first = if filtered { FILTERED } else { queries::one_more(limit) };
        // Nothing counts from later than it is recorded: of what was recorded behind `to` only what is backdated is wanted.
        let until = match query.to {
            Some(to) => postings::position_at(queries, to).await?,
            None => None,
        };
        let (backdated, changes) = (&[Term::backdated(id)], &[Term::changes(id)]);
        let timely = until.map(|until| before.unwrap_or(i64::MAX).min(until + 1)).or(before);
        let mut walks = Vec::new();
        walks.extend(until.map(|until| Walk::new(queries, backdated, until, before, first)));
        walks.push(Walk::new(queries, changes, 0, timely, first));
        let mut entries = Vec::new();
        let mut reflected = None;
        for mut walk in walks {
            while entries.len() <= limit {
                let events = walk.next().await?;
                reflected.get_or_insert(walk.reflected());
                // Likewise, what was recorded before `from` does not count from then on.
                let has_ended = events.last().is_none_or(|last| query.from.is_some_and(|from| last.recorded_at < from));
                for movement in movements(queries, events, id).await? {
                    let wanted = query.from.is_none_or(|from| from <= movement.effective_at)
                        && query.to.is_none_or(|to| movement.effective_at <= to)
                        && kind.is_none_or(|kind| kind == movement.kind.name());
                    if wanted {
                        entries.push((movement.position, line(movement, currency)));
                    }
                }
                if has_ended {
                    break;
                }
            }
        }
        let position = reflected.expect("there is a walk, and an empty page is shorter than any limit");
        Ok(Found { position, item: Some(entries) })
    };
    let freshness = Freshness::new(query.min_position, query.wait_ms);
    queries.wait(freshness).await?;
    let Found { position, item: entries } = queries.find(freshness, "wallet-not-found", find).await?;
    Ok((Position(position), Json(queries.page(ROUTE, partner, &filters, limit, entries))))
}

fn line(movement: Movement, currency: Currency) -> StatementEntry {
    let Movement { effective_at, position, recorded_at, transaction_id, kind, description, entry } = movement;
    StatementEntry {
        transaction_id,
        position,
        kind: kind.name(),
        direction: entry.direction,
        amount: entry.amount,
        currency,
        balance_after: entry.balance_after,
        description,
        effective_at,
        recorded_at,
    }
}
