//! Partners, for the operator.

use api_contract::{
    Client, Freshness, Limit, MinPosition, Page as List, Path, Position, Problem, Query, WaitMs, WalletBody,
};
use axum::Json;
use axum::extract::State;
use axum::response::IntoResponse;
use ledger_core::{ClientId, Event, PartnerEvent, PartnerId, Timestamp};
use serde::{Deserialize, Serialize};
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::page::{EVENT, Page};
use crate::queries::{self, Found, Queries};
use crate::wallets::{self, FreshnessQuery};

/// A partner.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Partner)]
pub(crate) struct PartnerBody {
    #[schema(value_type = String, example = "par_0192f0c1-2d3e-7abc-8def-0123456789ab")]
    id: PartnerId,
    name: String,
    #[schema(example = json!(["EUR", "USD"]))]
    currencies: Vec<String>,
    /// `ACTIVE` or `SUSPENDED`: then nothing that it asks for is done.
    #[schema(example = "ACTIVE")]
    status: String,
    /// The client that it was registered with.
    #[schema(value_type = String, example = "cli_0192f0c1-2d3e-7abc-8def-0123456789ab")]
    client_id: ClientId,
    /// Its settlement wallets, one in each currency.
    wallets: Vec<WalletBody>,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
}

#[derive(Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct PartnersQuery {
    limit: Option<Limit>,
    cursor: Option<String>,
    min_position: Option<MinPosition>,
    wait_ms: Option<WaitMs>,
}

pub(crate) async fn write(page: &Page, connection: &mut PgConnection) -> sqlx::Result<()> {
    // Partners are few: a statement for each is nothing.
    for happened in &page.events {
        let Event::Partner(id, event) = &happened.event else { continue };
        let status = match event {
            PartnerEvent::Registered { name, currencies, client_id } => {
                sqlx::query(
                    "insert into partners (id, position, name, currencies, client_id, created_at)
                     values ($1, $2, $3, $4, $5, $6)",
                )
                .bind(id.uuid())
                .bind(happened.position)
                .bind(name)
                .bind(currencies.iter().map(|currency| currency.code()).collect::<Vec<_>>())
                .bind(client_id.uuid())
                .bind(happened.recorded_at.date_time())
                .execute(&mut *connection)
                .await?;
                continue;
            }
            PartnerEvent::Suspended { .. } => "SUSPENDED",
            PartnerEvent::Resumed {} => "ACTIVE",
            PartnerEvent::SecretRotated { .. } => continue, // its client stays the same
        };
        let changed = sqlx::query("update partners set status = $2 where id = $1").bind(id.uuid()).bind(status);
        changed.execute(&mut *connection).await?;
    }
    Ok(())
}

/// List partners
///
/// The latest first.
#[utoipa::path(
    get, path = "/v1/partners", operation_id = "listPartners", tag = "partners",
    security(("bearer" = ["admin"])),
    params(PartnersQuery),
    responses((status = 200, description = "A page of partners.", body = List<PartnerBody>)),
)]
pub(crate) async fn list(
    State(queries): State<Queries>,
    _client: Client,
    Query(query): Query<PartnersQuery>,
) -> Result<impl IntoResponse, Problem> {
    const ROUTE: &str = "/v1/partners";
    let before = queries.after(ROUTE, None, "", query.cursor.as_deref())?;
    let freshness = Freshness::new(query.min_position, query.wait_ms);
    queries.wait(freshness).await?;
    let limit = query.limit.unwrap_or_default().get();
    let Found { position, item: partners } = read(&queries, None, before, queries::one_more(limit)).await?;
    queries::reflects(freshness, position)?;
    Ok((Position(position), Json(queries.page(ROUTE, None, "", limit, partners))))
}

/// A partner
#[utoipa::path(
    get, path = "/v1/partners/{id}", operation_id = "getPartner", tag = "partners",
    security(("bearer" = ["admin"])),
    params(("id" = String, Path), FreshnessQuery),
    responses((status = 200, description = "The partner.", body = PartnerBody)),
    extensions(("x-problems" = json!(["partner-not-found"]))),
)]
pub(crate) async fn show(
    State(queries): State<Queries>,
    _client: Client,
    Path(id): Path<PartnerId>,
    Query(query): Query<FreshnessQuery>,
) -> Result<impl IntoResponse, Problem> {
    let find = || async {
        let Found { position, item: partners } = read(&queries, Some(id), None, 1).await?;
        Ok(Found { position, item: partners.into_iter().next().map(|(_, partner)| partner) })
    };
    let freshness = Freshness::new(query.min_position, query.wait_ms);
    queries.wait(freshness).await?;
    let found = queries.find(freshness, "partner-not-found", find).await?;
    Ok((Position(found.position), Json(found.item)))
}

/// Partners with their wallets, each with its place in lists.
async fn read(
    queries: &Queries,
    id: Option<PartnerId>,
    before: Option<i64>,
    limit: i64,
) -> Result<Found<Vec<(i64, PartnerBody)>>, Problem> {
    let rows = sqlx::query(&format!(
        "select c.position as reflected, p.id as partner, p.position as place, p.name, p.currencies, p.client_id,
             p.status as standing, p.created_at as registered_at, {}, {EVENT}
         from checkpoints c
         left join lateral (
             select * from partners where ($1::uuid is null or id = $1) and ($2::bigint is null or position < $2)
             order by position desc limit $3
         ) p on true
         left join wallets w on w.partner_id = p.id and w.kind = 'SETTLEMENT'
         {}
         where c.view = 'partners' order by p.position desc, w.position",
        wallets::COLUMNS,
        wallets::LAST_CHANGE,
    ))
    .bind(id.map(PartnerId::uuid))
    .bind(before)
    .bind(limit)
    .fetch_all(queries.pool())
    .await
    .map_err(queries::failed)?;
    let mut partners: Vec<(i64, PartnerBody)> = Vec::new();
    for row in &rows {
        let Some((place, partner)) = partner(row)? else { continue };
        if partners.last().is_none_or(|(last, _)| *last != place) {
            partners.push((place, partner));
        }
        if let (Some((_, wallet)), Some((_, partner))) = (wallets::read(row)?, partners.last_mut()) {
            partner.wallets.push(wallet);
        }
    }
    Ok(Found { position: wallets::reflected(&rows)?, item: partners })
}

fn partner(row: &PgRow) -> Result<Option<(i64, PartnerBody)>, Problem> {
    let columns = || -> sqlx::Result<_> {
        let Some(id) = row.try_get::<Option<Uuid>, _>("partner")? else { return Ok(None) };
        let (place, name): (i64, String) = (row.try_get("place")?, row.try_get("name")?);
        let currencies: Vec<String> = row.try_get("currencies")?;
        let (client, standing): (Uuid, String) = (row.try_get("client_id")?, row.try_get("standing")?);
        let registered_at: OffsetDateTime = row.try_get("registered_at")?;
        Ok(Some((id, place, name, currencies, client, standing, registered_at)))
    };
    let Some((id, place, name, currencies, client, status, registered_at)) = columns().map_err(queries::failed)? else {
        return Ok(None);
    };
    let partner = PartnerBody {
        id: PartnerId::from_uuid(id),
        name,
        currencies,
        status,
        client_id: ClientId::from_uuid(client),
        wallets: Vec::new(),
        created_at: queries::timestamp(registered_at)?,
    };
    Ok(Some((place, partner)))
}
