//! Statements: what a wallet gave and got, entry by entry.
//!
//! One row per entry makes this the dearest view to write, so a row is lean, and there is no index beside its key.
//! The statement of one wallet is read along that key; filters are looked at on the way.

use api_contract::{Client, Freshness, Limit, MinPosition, Page as List, Path, Position, Problem, Query, WaitMs};
use axum::Json;
use axum::extract::State;
use axum::response::IntoResponse;
use ledger_core::{Balance, Currency, Direction, PartnerId, Timestamp, TransactionId, WalletId};
use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::page::Page;
use crate::queries::{self, Found, KindName, Queries};
use crate::wallets::reflected;

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
    kind: String,
    #[schema(value_type = String, pattern = "^(DEBIT|CREDIT)$")]
    direction: Direction,
    #[schema(value_type = String, example = "10.50")]
    amount: Balance,
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

pub(crate) async fn write(page: &Page, connection: &mut PgConnection) -> sqlx::Result<()> {
    let mut wallets = Vec::new();
    let mut versions = Vec::new();
    let mut positions = Vec::new();
    let mut transactions = Vec::new();
    let mut kinds = Vec::new();
    let mut changes = Vec::new();
    let mut balances = Vec::new();
    let mut effective = Vec::new();
    let mut recorded = Vec::new();
    let mut descriptions = Vec::new();
    for step in page.steps() {
        for entry in step.entries() {
            let amount = entry.amount.decimal();
            wallets.push(entry.wallet_id.uuid());
            versions.push(entry.wallet_version);
            positions.push(step.happened.position);
            transactions.push(step.id.uuid());
            kinds.push(step.instruction.kind.name());
            changes.push(match entry.direction {
                Direction::Credit => amount,
                Direction::Debit => -amount,
            });
            balances.push(entry.balance_after.decimal());
            effective.push(step.instruction.effective_at.unwrap_or(step.happened.recorded_at).date_time());
            recorded.push(step.happened.recorded_at.date_time());
            descriptions.push(step.instruction.description.as_deref());
        }
    }
    if wallets.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "insert into entries (wallet_id, wallet_version, position, transaction_id, kind, change, balance_after,
                              effective_at, recorded_at, description)
         select * from unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::uuid[], $5::text[], $6::numeric[], $7::numeric[],
                              $8::timestamptz[], $9::timestamptz[], $10::text[])",
    )
    .bind(wallets)
    .bind(versions)
    .bind(positions)
    .bind(transactions)
    .bind(kinds)
    .bind(changes)
    .bind(balances)
    .bind(effective)
    .bind(recorded)
    .bind(descriptions)
    .execute(connection)
    .await?;
    Ok(())
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
    let (from, to) = queries::range(query.from, query.to)?;
    let filters = format!("{:?}", (id, query.from, query.to, &kind));
    let before = queries.after(ROUTE, partner, &filters, query.cursor.as_deref())?;
    let limit = query.limit.unwrap_or_default().get();
    let find = || async {
        let rows = sqlx::query(
            "select c.position as reflected, w.currency, e.* from checkpoints c
             left join wallets w on w.id = $1 and ($2::uuid is null or w.partner_id = $2)
             left join lateral (
                 select * from entries
                 where wallet_id = w.id and ($3::bigint is null or wallet_version < $3)
                     and ($4::timestamptz is null or $4 <= effective_at) and ($5::timestamptz is null or effective_at <= $5)
                     and ($6::text is null or kind = $6)
                 order by wallet_version desc limit $7
             ) e on true
             where c.view = 'entries' order by e.wallet_version desc",
        )
        .bind(id.uuid())
        .bind(partner.map(PartnerId::uuid))
        .bind(before)
        .bind(from)
        .bind(to)
        .bind(&kind)
        .bind(queries::one_more(limit))
        .fetch_all(queries.pool())
        .await
        .map_err(queries::failed)?;
        let position = reflected(&rows)?;
        let currency: Option<String> = rows[0].try_get("currency").map_err(queries::failed)?;
        let Some(currency) = currency else { return Ok(Found { position, item: None }) };
        let currency = queries::currency(&currency)?;
        let entries = rows.iter().filter_map(|row| read(row, currency).transpose()).collect::<Result<Vec<_>, _>>()?;
        Ok(Found { position, item: Some(entries) })
    };
    let freshness = Freshness::new(query.min_position, query.wait_ms);
    queries.wait(freshness).await?;
    let Found { position, item: entries } = queries.find(freshness, "wallet-not-found", find).await?;
    Ok((Position(position), Json(queries.page(ROUTE, partner, &filters, limit, entries))))
}

/// An entry and its place in the statement; `None` from a row that has none.
fn read(row: &PgRow, currency: Currency) -> Result<Option<(i64, StatementEntry)>, Problem> {
    let columns = || -> sqlx::Result<_> {
        let Some(version) = row.try_get::<Option<i64>, _>("wallet_version")? else { return Ok(None) };
        let (position, transaction): (i64, Uuid) = (row.try_get("position")?, row.try_get("transaction_id")?);
        let (kind, description): (String, Option<String>) = (row.try_get("kind")?, row.try_get("description")?);
        let (change, balance_after): (Decimal, Decimal) = (row.try_get("change")?, row.try_get("balance_after")?);
        let effective_at: OffsetDateTime = row.try_get("effective_at")?;
        let recorded_at: OffsetDateTime = row.try_get("recorded_at")?;
        let times = (effective_at, recorded_at);
        Ok(Some((version, position, transaction, kind, description, change, balance_after, times)))
    };
    let Some((version, position, transaction, kind, description, change, balance_after, (effective_at, recorded_at))) =
        columns().map_err(queries::failed)?
    else {
        return Ok(None);
    };
    let entry = StatementEntry {
        transaction_id: TransactionId::from_uuid(transaction),
        position,
        kind,
        direction: if change < Decimal::ZERO { Direction::Debit } else { Direction::Credit },
        amount: queries::balance(change.abs(), currency),
        currency,
        balance_after: queries::balance(balance_after, currency),
        description,
        effective_at: queries::timestamp(effective_at)?,
        recorded_at: queries::timestamp(recorded_at)?,
    };
    Ok(Some((version, entry)))
}
