//! Transactions: what was asked for and what became of it, refusals included.
//!
//! A row holds the body as API.md shows it, and beside it what lists are filtered by.

use std::time::Duration;

use api_contract::{
    Client, Freshness, Limit, MinPosition, Page as List, Path, Position, Problem, Query, TransactionBody, WaitMs,
    key_hash,
};
use axum::extract::State;
use axum::response::IntoResponse;
use axum::Json;
use ledger_core::{PartnerId, Timestamp, TransactionId, TransactionStatus, WalletId};
use runtime::shutdown::Shutdown;
use serde::Deserialize;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use time::OffsetDateTime;
use tokio::time::{Instant, sleep};
use utoipa::IntoParams;

use crate::page::{Page, Step};
use crate::queries::{self, Found, KindName, Queries, StatusName};
use crate::wallets::{FreshnessQuery, reflected};

/// Pauses between two looks at a pending transaction while someone waits for its end. Many may wait while the views
/// move on and on, so each looks more and more seldom.
const LOOK_MIN: Duration = Duration::from_millis(20);
const LOOK_MAX: Duration = Duration::from_millis(250);

#[derive(Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct TransactionsQuery {
    limit: Option<Limit>,
    cursor: Option<String>,
    /// The wallet that it is about, or the receiving one.
    #[param(value_type = Option<String>)]
    wallet_id: Option<WalletId>,
    /// The end user on whose behalf it was asked for.
    user_id: Option<String>,
    #[serde(rename = "type")]
    #[param(value_type = Option<String>, example = "TRANSFER")]
    kind: Option<KindName>,
    /// PENDING, SUCCESS, FAILED, REVERSED or EXPIRED.
    #[param(value_type = Option<String>, example = "SUCCESS")]
    status: Option<StatusName>,
    /// `createdAt` from this time on.
    #[param(value_type = Option<String>, format = DateTime)]
    from: Option<Timestamp>,
    /// `createdAt` up to and including this time.
    #[param(value_type = Option<String>, format = DateTime)]
    to: Option<Timestamp>,
    reference: Option<String>,
    /// The key with which this client asked for it.
    idempotency_key: Option<String>,
    min_position: Option<MinPosition>,
    wait_ms: Option<WaitMs>,
}

pub(crate) async fn write(page: &Page, connection: &mut PgConnection) -> sqlx::Result<()> {
    // One statement must not meet the same row twice: a transaction that begins and ends in this page counts once,
    // with its last step.
    let mut steps: Vec<Step<'_>> = page.steps().collect();
    steps.sort_by_key(|step| (step.id, step.happened.position));
    let mut last: Vec<Step<'_>> = Vec::with_capacity(steps.len());
    for step in steps {
        match last.last_mut() {
            Some(earlier) if earlier.id == step.id => *earlier = step,
            _ => last.push(step),
        }
    }
    if last.is_empty() {
        return Ok(());
    }
    last.sort_by_key(|step| step.happened.position); // so that the indexes by position grow at their end

    let bodies: Vec<_> = last.iter().map(Step::body).collect();
    let first: Vec<_> = last.iter().map(Step::first).collect();
    let texts = |of: fn(&TransactionBody) -> Option<&str>| bodies.iter().map(of).collect::<Vec<_>>();
    let json = |body| serde_json::to_string(body).expect("bodies have string keys and no fallible serializers");
    sqlx::query(
        "insert into transactions (id, position, partner_id, wallet_id, to_wallet_id, user_id, kind, status, reference,
                                   key_hash, created_at, body)
         select id, position, partner_id, wallet_id, to_wallet_id, user_id, kind, status, reference, key_hash, created_at,
                body::json
         from unnest($1::uuid[], $2::bigint[], $3::uuid[], $4::uuid[], $5::uuid[], $6::text[], $7::text[], $8::text[],
                     $9::text[], $10::bytea[], $11::timestamptz[], $12::text[])
              as t (id, position, partner_id, wallet_id, to_wallet_id, user_id, kind, status, reference, key_hash, created_at,
                    body)
         on conflict (id) do update set status = excluded.status, body = excluded.body",
    )
    .bind(last.iter().map(|step| step.id.uuid()).collect::<Vec<_>>())
    .bind(first.iter().map(|(position, ..)| *position).collect::<Vec<_>>())
    .bind(last.iter().map(|step| step.instruction.partner_id.map(PartnerId::uuid)).collect::<Vec<_>>())
    .bind(bodies.iter().map(|body| body.wallet_id.uuid()).collect::<Vec<_>>())
    .bind(bodies.iter().map(|body| body.to_wallet_id.map(WalletId::uuid)).collect::<Vec<_>>())
    .bind(texts(|body| body.user_id.as_deref()))
    .bind(bodies.iter().map(|body| body.kind.name()).collect::<Vec<_>>())
    .bind(bodies.iter().map(|body| body.status.name()).collect::<Vec<_>>())
    .bind(texts(|body| body.reference.as_deref()))
    .bind(first.iter().map(|(.., key)| key.as_ref().map(|key| key.as_slice())).collect::<Vec<_>>())
    .bind(bodies.iter().map(|body| body.created_at.date_time()).collect::<Vec<OffsetDateTime>>())
    .bind(bodies.iter().map(json).collect::<Vec<_>>())
    .execute(connection)
    .await?;
    Ok(())
}

/// List transactions
///
/// The latest first, refused ones included.
#[utoipa::path(
    get, path = "/v1/transactions", operation_id = "listTransactions", tag = "transactions",
    security(("bearer" = ["transactions:read"])),
    params(TransactionsQuery),
    responses((status = 200, description = "A page of transactions.", body = List<TransactionBody>)),
    extensions(("x-problems" = json!(["time-range-invalid"]))),
)]
pub(crate) async fn list(
    State(queries): State<Queries>,
    client: Client,
    Query(query): Query<TransactionsQuery>,
) -> Result<impl IntoResponse, Problem> {
    const ROUTE: &str = "/v1/transactions";
    let partner = queries::visible_to(&client)?;
    let (kind, status) = (query.kind.map(|kind| kind.0), query.status.map(|status| status.0));
    let key = query.idempotency_key.as_deref().map(|key| key_hash(client.id, key));
    let (from, to) = queries::range(query.from, query.to)?;
    let texts = (&query.user_id, &query.reference, key);
    let filters = format!("{:?}", (query.wallet_id, texts, &kind, &status, query.from, query.to));
    let before = queries.after(ROUTE, partner, &filters, query.cursor.as_deref())?;
    let freshness = Freshness::new(query.min_position, query.wait_ms);
    queries.wait(freshness).await?;
    let limit = query.limit.unwrap_or_default().get();
    let rows = sqlx::query(
        "select c.position as reflected, t.position as place, t.body from checkpoints c
         left join lateral (
             select position, body::text as body from transactions
             where ($1::uuid is null or partner_id = $1) and ($2::uuid is null or wallet_id = $2 or to_wallet_id = $2)
                 and ($3::text is null or user_id = $3) and ($4::text is null or kind = $4)
                 and ($5::text is null or status = $5) and ($6::timestamptz is null or $6 <= created_at)
                 and ($7::timestamptz is null or created_at <= $7) and ($8::text is null or reference = $8)
                 and ($9::bytea is null or key_hash = $9) and ($10::bigint is null or position < $10)
             order by position desc limit $11
         ) t on true where c.view = 'transactions' order by t.position desc",
    )
    .bind(partner.map(PartnerId::uuid))
    .bind(query.wallet_id.map(WalletId::uuid))
    .bind(&query.user_id)
    .bind(&kind)
    .bind(&status)
    .bind(from)
    .bind(to)
    .bind(&query.reference)
    .bind(key.as_ref().map(|key| key.as_slice()))
    .bind(before)
    .bind(queries::one_more(limit))
    .fetch_all(queries.pool())
    .await
    .map_err(queries::failed)?;
    let position = reflected(&rows)?;
    queries::reflects(freshness, position)?;
    let found = rows.iter().filter_map(|row| read(row, partner).transpose()).collect::<Result<Vec<_>, _>>()?;
    Ok((Position(position), Json(queries.page(ROUTE, partner, &filters, limit, found))))
}

/// A transaction
///
/// With `waitMs` a pending one is waited for: the answer comes when it has ended, or when the time is over.
#[utoipa::path(
    get, path = "/v1/transactions/{id}", operation_id = "getTransaction", tag = "transactions",
    security(("bearer" = ["transactions:read"])),
    params(("id" = String, Path), FreshnessQuery),
    responses((status = 200, description = "The transaction.", body = TransactionBody)),
    extensions(("x-problems" = json!(["transaction-not-found"]))),
)]
pub(crate) async fn show(
    State(queries): State<Queries>,
    client: Client,
    Path(id): Path<TransactionId>,
    Query(query): Query<FreshnessQuery>,
    stop: Shutdown,
) -> Result<impl IntoResponse, Problem> {
    let partner = queries::visible_to(&client)?;
    let find = || async {
        let rows = sqlx::query(
            "select c.position as reflected, t.position as place, t.body::text as body from checkpoints c
             left join transactions t on t.id = $1 and ($2::uuid is null or t.partner_id = $2)
             where c.view = 'transactions'",
        )
        .bind(id.uuid())
        .bind(partner.map(PartnerId::uuid))
        .fetch_all(queries.pool())
        .await
        .map_err(queries::failed)?;
        let found = rows.first().map(|row| read(row, partner)).transpose()?.flatten();
        Ok(Found { position: reflected(&rows)?, item: found.map(|(_, body)| body) })
    };
    let freshness = Freshness::new(query.min_position, query.wait_ms);
    let deadline = query.wait_ms.map(|wait| Instant::now() + wait.duration());
    queries.wait(freshness).await?;
    let mut found = queries.find(freshness, "transaction-not-found", find).await?;
    let mut look = LOOK_MIN;
    while found.item.status == TransactionStatus::Pending
        && let Some(deadline) = deadline
        && Instant::now() < deadline
        && !stop.is_requested()
    {
        tokio::select! {
            moved = queries.moved(found.position, deadline) => moved?,
            () = stop.requested() => {} // what is known now is a better answer than a connection that breaks
        }
        found = queries.find(freshness, "transaction-not-found", find).await?;
        if found.item.status != TransactionStatus::Pending {
            break;
        }
        sleep(look.min(deadline.saturating_duration_since(Instant::now()))).await;
        look = LOOK_MAX.min(look * 2);
    }
    Ok((Position(found.position), Json(found.item)))
}

/// A transaction and its place in lists; `None` from a row that has none.
fn read(row: &PgRow, partner: Option<PartnerId>) -> Result<Option<(i64, TransactionBody)>, Problem> {
    let place: Option<i64> = row.try_get("place").map_err(queries::failed)?;
    let body: Option<String> = row.try_get("body").map_err(queries::failed)?;
    let Some((place, body)) = place.zip(body) else { return Ok(None) };
    let body: TransactionBody = serde_json::from_str(&body).map_err(queries::unfit)?;
    let shown = if partner.is_some() { body.for_partner() } else { body };
    Ok(Some((place, shown)))
}
