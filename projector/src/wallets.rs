//! Wallets: what each is, whom it is for, and whether it may be used.
//!
//! `views.wallets` holds a wallet's life; a wallet that is shown gets its money from the last event that changed it.

use std::collections::HashMap;

use api_contract::{
    Client, Freshness, Limit, MinPosition, Page as List, Path, Position, Problem, Query, WaitMs, WalletBody,
};
use axum::Json;
use axum::extract::State;
use axum::response::IntoResponse;
use ledger_core::{Balance, Currency, Event, PartnerId, WalletEvent, WalletId, WalletStatus};
use serde::Deserialize;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use time::OffsetDateTime;
use utoipa::IntoParams;
use uuid::Uuid;

use crate::balances;
use crate::page::{EVENT, Happened, Page};
use crate::queries::{self, Found, Queries};

#[derive(Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct WalletsQuery {
    limit: Option<Limit>,
    cursor: Option<String>,
    user_id: Option<String>,
    #[param(value_type = Option<String>, example = "EUR")]
    currency: Option<Currency>,
    /// ACTIVE, FROZEN or CLOSED.
    #[param(value_type = Option<String>, pattern = "^(ACTIVE|FROZEN|CLOSED)$")]
    status: Option<WalletStatus>,
    min_position: Option<MinPosition>,
    wait_ms: Option<WaitMs>,
}

#[derive(Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct FreshnessQuery {
    pub(crate) min_position: Option<MinPosition>,
    pub(crate) wait_ms: Option<WaitMs>,
}

/// Columns of a wallet `w`, for [`read`]; with those of [`EVENT`] from [`LAST_CHANGE`].
pub(crate) const COLUMNS: &str = "w.id, w.position, w.partner_id, w.user_id, w.currency, w.status, \
    w.metadata::text as metadata, w.created_at";

/// The last event that changed the wallet `w`.
pub(crate) const LAST_CHANGE: &str = "left join lateral (
        select position from postings where term = w.id order by position desc limit 1
    ) last on true
    left join ledger.events e on e.position = last.position";

pub(crate) async fn write(page: &Page, connection: &mut PgConnection) -> sqlx::Result<()> {
    let mut opened = Vec::new();
    let mut statuses: HashMap<Uuid, &str> = HashMap::new();
    for happened in &page.events {
        let Event::Wallet(id, event) = &happened.event else { continue };
        match event {
            WalletEvent::Opened { .. } => opened.push((id.uuid(), happened, event)),
            WalletEvent::Frozen { .. } => _ = statuses.insert(id.uuid(), name(WalletStatus::Frozen)),
            WalletEvent::Unfrozen { .. } => _ = statuses.insert(id.uuid(), name(WalletStatus::Active)),
            WalletEvent::Closed { .. } => _ = statuses.insert(id.uuid(), name(WalletStatus::Closed)),
        }
    }
    if !opened.is_empty() {
        let mut rows = Opened::default();
        for (id, happened, event) in opened {
            let WalletEvent::Opened { kind, partner_id, user_id, currency, metadata, .. } = event else { continue };
            rows.ids.push(id);
            rows.positions.push(happened.position);
            rows.partners.push(partner_id.map(PartnerId::uuid));
            rows.users.push(user_id.as_deref());
            rows.kinds.push(kind.name());
            rows.currencies.push(currency.code());
            rows.statuses.push(name(WalletStatus::Active));
            rows.metadata.push(serde_json::to_string(metadata).expect("metadata came from JSON"));
            rows.created_at.push(happened.recorded_at.date_time());
        }
        sqlx::query(
            "insert into wallets (id, position, partner_id, user_id, kind, currency, status, metadata, created_at)
             select id, position, partner_id, user_id, kind, currency, status, metadata::json, created_at
             from unnest($1::uuid[], $2::bigint[], $3::uuid[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[],
                         $9::timestamptz[])
                  as w (id, position, partner_id, user_id, kind, currency, status, metadata, created_at)",
        )
        .bind(rows.ids)
        .bind(rows.positions)
        .bind(rows.partners)
        .bind(rows.users)
        .bind(rows.kinds)
        .bind(rows.currencies)
        .bind(rows.statuses)
        .bind(rows.metadata)
        .bind(rows.created_at)
        .execute(&mut *connection)
        .await?;
    }
    if !statuses.is_empty() {
        let (ids, statuses): (Vec<_>, Vec<_>) = statuses.into_iter().unzip();
        sqlx::query(
            "update wallets w set status = s.status from unnest($1::uuid[], $2::text[]) as s (id, status) where w.id = s.id",
        )
        .bind(ids)
        .bind(statuses)
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}

/// List wallets
///
/// The latest first.
#[utoipa::path(
    get, path = "/v1/wallets", operation_id = "listWallets", tag = "wallets",
    security(("bearer" = ["wallets:read"])),
    params(WalletsQuery),
    responses((status = 200, description = "A page of wallets.", body = List<WalletBody>)),
)]
pub(crate) async fn list(
    State(queries): State<Queries>,
    client: Client,
    Query(query): Query<WalletsQuery>,
) -> Result<impl IntoResponse, Problem> {
    const ROUTE: &str = "/v1/wallets";
    let partner = queries::visible_to(&client)?;
    let status = query.status.map(name);
    let filters = format!("{:?}", (&query.user_id, query.currency, status));
    let before = queries.after(ROUTE, partner, &filters, query.cursor.as_deref())?;
    let freshness = Freshness::new(query.min_position, query.wait_ms);
    queries.wait(freshness).await?;
    let limit = query.limit.unwrap_or_default().get();
    let rows = sqlx::query(&format!(
        "select c.position as reflected, {COLUMNS}, {EVENT} from checkpoints c
         left join lateral (
             select * from wallets w
             where ($1::uuid is null or w.partner_id = $1) and ($2::text is null or w.user_id = $2)
                 and ($3::text is null or w.currency = $3) and ($4::text is null or w.status = $4)
                 and ($5::bigint is null or w.position < $5)
             order by w.position desc limit $6
         ) w on true {LAST_CHANGE}
         where c.view = 'wallets' order by w.position desc"
    ))
    .bind(partner.map(PartnerId::uuid))
    .bind(&query.user_id)
    .bind(query.currency.map(Currency::code))
    .bind(status)
    .bind(before)
    .bind(queries::one_more(limit))
    .fetch_all(queries.pool())
    .await
    .map_err(queries::failed)?;
    let position = reflected(&rows)?;
    queries::reflects(freshness, position)?;
    let wallets = rows.iter().filter_map(|row| read(row).transpose()).collect::<Result<Vec<_>, _>>()?;
    Ok((Position(position), Json(queries.page(ROUTE, partner, &filters, limit, wallets))))
}

/// A wallet
#[utoipa::path(
    get, path = "/v1/wallets/{id}", operation_id = "getWallet", tag = "wallets",
    security(("bearer" = ["wallets:read"])),
    params(("id" = String, Path), FreshnessQuery),
    responses((status = 200, description = "The wallet.", body = WalletBody)),
    extensions(("x-problems" = json!(["wallet-not-found"]))),
)]
pub(crate) async fn show(
    State(queries): State<Queries>,
    client: Client,
    Path(id): Path<WalletId>,
    Query(query): Query<FreshnessQuery>,
) -> Result<impl IntoResponse, Problem> {
    let partner = queries::visible_to(&client)?;
    let find = || async {
        let rows = sqlx::query(&format!(
            "select c.position as reflected, {COLUMNS}, {EVENT} from checkpoints c
             left join wallets w on w.id = $1 and ($2::uuid is null or w.partner_id = $2)
             {LAST_CHANGE}
             where c.view = 'wallets'"
        ))
        .bind(id.uuid())
        .bind(partner.map(PartnerId::uuid))
        .fetch_all(queries.pool())
        .await
        .map_err(queries::failed)?;
        let wallet = rows.first().map(read).transpose()?.flatten();
        Ok(Found { position: reflected(&rows)?, item: wallet.map(|(_, wallet)| wallet) })
    };
    let freshness = Freshness::new(query.min_position, query.wait_ms);
    queries.wait(freshness).await?;
    let found = queries.find(freshness, "wallet-not-found", find).await?;
    Ok((Position(found.position), Json(found.item)))
}

/// The currency of a wallet, if the caller may see it.
pub(crate) async fn currency(
    queries: &Queries,
    id: WalletId,
    partner: Option<PartnerId>,
) -> Result<Found<Option<Currency>>, Problem> {
    let row: Option<(i64, Option<String>)> = sqlx::query_as(
        "select c.position, w.currency from checkpoints c
         left join wallets w on w.id = $1 and ($2::uuid is null or w.partner_id = $2)
         where c.view = 'wallets'",
    )
    .bind(id.uuid())
    .bind(partner.map(PartnerId::uuid))
    .fetch_optional(queries.pool())
    .await
    .map_err(queries::failed)?;
    let (position, currency) = row.ok_or_else(queries::no_checkpoint)?;
    Ok(Found { position, item: currency.map(|code| queries::currency(&code)).transpose()? })
}

/// The position that rows of one statement reflect.
pub(crate) fn reflected(rows: &[PgRow]) -> Result<i64, Problem> {
    let row = rows.first().ok_or_else(queries::no_checkpoint)?;
    row.try_get("reflected").map_err(queries::failed)
}

/// A wallet and its place in lists; `None` from a row that has none, or has not been told yet what it holds.
pub(crate) fn read(row: &PgRow) -> Result<Option<(i64, WalletBody)>, Problem> {
    let columns = || -> sqlx::Result<_> {
        let Some(id) = row.try_get::<Option<Uuid>, _>("id")? else { return Ok(None) };
        let place: i64 = row.try_get("position")?;
        let of: (Option<Uuid>, Option<String>) = (row.try_get("partner_id")?, row.try_get("user_id")?);
        let (currency, status): (String, String) = (row.try_get("currency")?, row.try_get("status")?);
        let metadata: String = row.try_get("metadata")?;
        let created_at: OffsetDateTime = row.try_get("created_at")?;
        Ok(Some((id, place, of, currency, status, metadata, created_at)))
    };
    let Some((id, place, (partner, user_id), currency, status, metadata, created_at)) =
        columns().map_err(queries::failed)?
    else {
        return Ok(None);
    };
    let id = WalletId::from_uuid(id);
    let Some(last) = Happened::from_row(row).map_err(queries::unfit)? else { return Ok(None) };
    let (version, balance) = balances::left(&last.event, id).ok_or_else(|| queries::misposted(last.position))?;
    let currency = queries::currency(&currency)?;
    let wallet = WalletBody {
        id,
        user_id,
        partner_id: partner.map(PartnerId::from_uuid),
        currency,
        balance,
        held: Balance::zero(currency),
        available: balance,
        status: serde_json::from_value(status.into()).map_err(queries::unfit)?,
        metadata: serde_json::from_str(&metadata).map_err(queries::unfit)?,
        created_at: queries::timestamp(created_at)?,
        version,
    };
    Ok(Some((place, wallet)))
}

/// Wallets to be inserted, column by column.
#[derive(Default)]
struct Opened<'p> {
    ids: Vec<Uuid>,
    positions: Vec<i64>,
    partners: Vec<Option<Uuid>>,
    users: Vec<Option<&'p str>>,
    kinds: Vec<&'static str>,
    currencies: Vec<&'p str>,
    statuses: Vec<&'static str>,
    metadata: Vec<String>,
    created_at: Vec<OffsetDateTime>,
}

/// As it is stored and shown.
const fn name(status: WalletStatus) -> &'static str {
    match status {
        WalletStatus::Active => "ACTIVE",
        WalletStatus::Frozen => "FROZEN",
        WalletStatus::Closed => "CLOSED",
    }
}
