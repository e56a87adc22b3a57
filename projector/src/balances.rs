//! What a wallet holds: now, at a position of the log, or as of two times.
//!
//! Now is a row of `views.balances`, written over and over. The past is read from the statement: `asOf` asks what
//! counted in business by then, `knownAt` what the ledger knew by then, and both together what it then believed.

use std::collections::HashMap;

use api_contract::{Client, Freshness, MinPosition, Path, Position, Problem, Query, WaitMs};
use axum::Json;
use axum::extract::State;
use axum::response::IntoResponse;
use ledger_core::{Balance, Currency, Event, PartnerId, Timestamp, WalletEvent, WalletId};
use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::page::Page;
use crate::queries::{self, Found, Queries};

/// What a wallet holds.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Balance)]
pub(crate) struct BalanceBody {
    #[schema(value_type = String, example = "wal_0192f0c1-2d3e-7abc-8def-0123456789ab")]
    wallet_id: WalletId,
    #[schema(value_type = String, example = "EUR")]
    currency: Currency,
    #[schema(value_type = String, example = "70.00")]
    balance: Balance,
    #[schema(value_type = String, example = "0.00")]
    held: Balance,
    /// `balance` less `held`.
    #[schema(value_type = String, example = "70.00")]
    available: Balance,
    /// The position of the log that it reflects.
    ledger_position: i64,
}

#[derive(Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct BalanceQuery {
    /// Only what counted by then: entries with `effectiveAt` up to and including it.
    #[param(value_type = Option<String>, format = DateTime)]
    as_of: Option<Timestamp>,
    /// Only what the ledger knew by then: entries with `recordedAt` up to and including it.
    #[param(value_type = Option<String>, format = DateTime)]
    known_at: Option<Timestamp>,
    /// At this position of the log; not together with the two times.
    #[param(value_type = Option<i64>)]
    at_position: Option<MinPosition>,
    min_position: Option<MinPosition>,
    wait_ms: Option<WaitMs>,
}

pub(crate) async fn write(page: &Page, connection: &mut PgConnection) -> sqlx::Result<()> {
    // The last change of a wallet in the page is all that counts.
    let mut latest: HashMap<Uuid, (i64, Decimal)> = HashMap::new();
    for happened in &page.events {
        if let Event::Wallet(id, event) = &happened.event {
            latest.insert(id.uuid(), (event.wallet_version(), balance_after(event).decimal()));
        } else if let Event::Transaction(_, event) = &happened.event {
            for entry in event.entries().into_iter().flatten() {
                latest.insert(entry.wallet_id.uuid(), (entry.wallet_version, entry.balance_after.decimal()));
            }
        }
    }
    if latest.is_empty() {
        return Ok(());
    }
    let (ids, changes): (Vec<_>, Vec<_>) = latest.into_iter().unzip();
    let (versions, balances): (Vec<_>, Vec<_>) = changes.into_iter().unzip();
    sqlx::query(
        "insert into balances (wallet_id, version, balance) select * from unnest($1::uuid[], $2::bigint[], $3::numeric[])
         on conflict (wallet_id) do update set version = excluded.version, balance = excluded.balance",
    )
    .bind(ids)
    .bind(versions)
    .bind(balances)
    .execute(connection)
    .await?;
    Ok(())
}

fn balance_after(event: &WalletEvent) -> Balance {
    match event {
        WalletEvent::Opened { balance_after, .. }
        | WalletEvent::Frozen { balance_after, .. }
        | WalletEvent::Unfrozen { balance_after, .. }
        | WalletEvent::Closed { balance_after, .. } => *balance_after,
    }
}

/// A wallet's balance
///
/// Now, at a position, or as of a time: `asOf` counts by `effectiveAt`, `knownAt` by `recordedAt`, together by both.
#[utoipa::path(
    get, path = "/v1/wallets/{id}/balance", operation_id = "getBalance", tag = "wallets",
    security(("bearer" = ["wallets:read"])),
    params(("id" = String, Path), BalanceQuery),
    responses((status = 200, description = "What the wallet holds.", body = BalanceBody)),
    extensions(("x-problems" = json!(["wallet-not-found"]))),
)]
pub(crate) async fn show(
    State(queries): State<Queries>,
    client: Client,
    Path(id): Path<WalletId>,
    Query(query): Query<BalanceQuery>,
) -> Result<impl IntoResponse, Problem> {
    let partner = queries::visible_to(&client)?;
    let BalanceQuery { as_of, known_at, at_position, min_position, wait_ms } = query;
    if at_position.is_some() && (as_of.is_some() || known_at.is_some()) {
        return Err(Problem::of("invalid-field").at("/atPosition", "either a position or times"));
    }
    let at = at_position.map(|position| position.0);
    let now = at.is_none() && as_of.is_none() && known_at.is_none();
    let read = || async {
        // With a bound on effective times all entries up to it are added up; without one the latest entry within the
        // bounds says what there was after it.
        let row: Option<(i64, Option<String>, Option<Decimal>)> = sqlx::query_as(
            "select c.position, w.currency, case
                 when $3 then (select balance from balances where wallet_id = w.id)
                 when $4::timestamptz is null
                     then (select balance_after from entries where wallet_id = w.id
                               and ($5::bigint is null or position <= $5) and ($6::timestamptz is null or recorded_at <= $6)
                           order by wallet_version desc limit 1)
                 else (select sum(change) from entries where wallet_id = w.id
                           and effective_at <= $4 and ($6::timestamptz is null or recorded_at <= $6))
                 end
             from checkpoints c
             left join wallets w on w.id = $1 and ($2::uuid is null or w.partner_id = $2)
             where c.view = 'entries'",
        )
        .bind(id.uuid())
        .bind(partner.map(PartnerId::uuid))
        .bind(now)
        .bind(as_of.map(Timestamp::date_time))
        .bind(at)
        .bind(known_at.map(Timestamp::date_time))
        .fetch_optional(queries.pool())
        .await
        .map_err(queries::failed)?;
        let (position, currency, held) = row.ok_or_else(queries::no_checkpoint)?;
        Ok(Found { position, item: currency.map(|currency| (currency, held)) })
    };
    let freshness = Freshness::new(min_position, wait_ms);
    let freshness = Freshness { min_position: freshness.min_position.max(at), ..freshness };
    queries.wait(freshness).await.map_err(|problem| match problem.slug() {
        "position-unknown" if freshness.min_position == at => {
            Problem::of("position-unknown").at("/atPosition", "this position is beyond the head")
        }
        _ => problem,
    })?;
    let Found { position, item: (currency, held) } = queries.find(freshness, "wallet-not-found", read).await?;
    let currency = queries::currency(&currency)?;
    let balance = queries::balance(held.unwrap_or_default(), currency);
    let body = BalanceBody {
        wallet_id: id,
        currency,
        balance,
        held: Balance::zero(currency),
        available: balance,
        ledger_position: at.unwrap_or(position),
    };
    Ok((Position(position), Json(body)))
}
