//! Deliveries as partners see them: what was sent, what came of each attempt, and sending again.

use std::collections::HashMap;

use api_contract::{Client, Freshness, Limit, MinPosition, Page, Path, Position, Problem, Query, WaitMs};
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use ledger_core::{DeliveryId, EventId, PartnerId, Timestamp, WebhookId};
use serde::{Deserialize, Serialize};
use sqlx::Row;
use sqlx::postgres::PgRow;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::Dispatcher;
use crate::dispatch::{LEASE, interval};
use crate::endpoints::{self, ReadQuery, timestamp, visible_to};
use crate::send::{IN_FLIGHT, UNKNOWN};

/// Attempts shown of one delivery, the latest ones. Redelivering has no end.
const ATTEMPTS_MAX: i64 = 100;

/// One event for one webhook endpoint.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Delivery)]
pub(crate) struct DeliveryBody {
    #[schema(value_type = String, example = "dlv_0192f0c1-2d3e-7abc-8def-0123456789ab")]
    id: DeliveryId,
    /// The `webhook-id` header and the body's `eventId`: the same on each attempt.
    #[schema(value_type = String)]
    event_id: EventId,
    #[schema(value_type = String)]
    webhook_id: WebhookId,
    event_type: String,
    /// Gap-free per webhook endpoint.
    sequence: i64,
    ledger_position: i64,
    /// PENDING: not tried yet, or again. RETRYING: failed so far. DEAD: given up. HELD: its endpoint was disabled.
    #[schema(pattern = "^(PENDING|RETRYING|DELIVERED|DEAD|HELD)$")]
    status: String,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    /// While it is pending or retrying.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    next_attempt_at: Option<Timestamp>,
    /// The latest 100.
    attempts: Vec<AttemptBody>,
}

/// One time that a delivery was sent.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Attempt)]
pub(crate) struct AttemptBody {
    /// The `X-Daybook-Attempt` header.
    number: i32,
    #[schema(value_type = String, format = DateTime)]
    started_at: Timestamp,
    /// `delivered`: answered 2xx. `status`: answered something else. `redirect`: answered 3xx, which is not followed.
    /// `timeout`: no answer within 15 s. `connect`: no connection. `tls`: certificate or handshake refused.
    /// `blocked-address`: the target is not a public address. `no-answer`: the connection ended without an answer.
    /// `not-signed`: our fault, nothing was sent. `in-flight`: under way. `unknown`: the dispatcher ended before it knew.
    outcome: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    status_code: Option<i16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    latency_ms: Option<i32>,
    /// The first 16 KiB of the answer, as text; not in lists.
    #[serde(skip_serializing_if = "Option::is_none")]
    response_body: Option<String>,
    /// Whether the answer was longer than what was kept of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    truncated: Option<bool>,
    /// What went wrong, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct DeliveriesQuery {
    limit: Option<Limit>,
    cursor: Option<String>,
    /// PENDING, RETRYING, DELIVERED, DEAD or HELD.
    status: Option<String>,
    min_position: Option<MinPosition>,
    wait_ms: Option<WaitMs>,
}

/// List the deliveries of a webhook endpoint
///
/// The latest first.
#[utoipa::path(
    get,
    path = "/v1/webhooks/{id}/deliveries",
    operation_id = "listDeliveries",
    tag = "webhooks",
    security(("bearer" = ["webhooks:read"])),
    params(("id" = String, Path, example = "whk_0192f0c1-2d3e-7abc-8def-0123456789ab"), DeliveriesQuery),
    responses((status = 200, description = "A page of deliveries.", body = Page<DeliveryBody>)),
    extensions(("x-problems" = json!(["webhook-not-found", "cursor-invalid", "limit-out-of-range", "storage-unavailable", "projection-behind", "position-unknown"]))),
)]
pub(crate) async fn list(
    State(dispatcher): State<Dispatcher>,
    client: Client,
    Path(webhook): Path<WebhookId>,
    Query(query): Query<DeliveriesQuery>,
) -> Result<impl IntoResponse, Problem> {
    const ROUTE: &str = "/v1/webhooks/{id}/deliveries";
    let partner = visible_to(&client)?;
    let status = query.status.as_deref();
    if status.is_some_and(|status| !matches!(status, "PENDING" | "RETRYING" | "DELIVERED" | "DEAD" | "HELD")) {
        return Err(Problem::of("invalid-field").at("/status", "expected a status of deliveries"));
    }
    dispatcher.wait(Freshness::new(query.min_position, query.wait_ms)).await?;
    let limit = query.limit.unwrap_or_default().get();
    let filters = format!("{webhook} {}", status.unwrap_or_default());
    let before = query.cursor.map(|cursor| dispatcher.cursors.open(ROUTE, partner, &filters, &cursor)).transpose()?;
    let before: Option<i64> =
        before.map(|sequence| sequence.parse()).transpose().map_err(|_| Problem::of("cursor-invalid"))?;
    // Two statements, each along an index of its own: a rare status is found without reading all that have another.
    let with_status = if status.is_some() { "status = $3" } else { "$3::text is null" };
    let mut moment = one_moment(&dispatcher).await?;
    let rows = sqlx::query(&format!(
        "select c.position, d.* from webhooks.checkpoint c
         join webhooks.endpoints e on e.id = $1 and e.deleted_at is null and ($2::uuid is null or e.partner_id = $2)
         left join lateral (
             select * from webhooks.deliveries
             where endpoint_id = e.id and {with_status} and sequence < coalesce($4, 9223372036854775807)
             order by sequence desc limit $5
         ) d on true order by d.sequence desc",
    ))
    .bind(webhook.uuid())
    .bind(partner.map(PartnerId::uuid))
    .bind(status)
    .bind(before)
    .bind(i64::try_from(limit + 1).expect("a page is short"))
    .fetch_all(&mut *moment)
    .await?;
    if rows.is_empty() {
        return Err(endpoints::not_found());
    }
    let (position, mut deliveries) = endpoints::page(&rows, read)?;
    attach_attempts(&mut moment, &mut deliveries, false).await?;
    let page = Page::new(deliveries, limit, |last| {
        dispatcher.cursors.seal(ROUTE, partner, &filters, &last.sequence.to_string())
    });
    Ok((position, axum::Json(page)))
}

/// Get a delivery
///
/// With its attempts.
#[utoipa::path(
    get,
    path = "/v1/deliveries/{id}",
    operation_id = "getDelivery",
    tag = "webhooks",
    security(("bearer" = ["webhooks:read"])),
    params(("id" = String, Path, example = "dlv_0192f0c1-2d3e-7abc-8def-0123456789ab"), ReadQuery),
    responses((status = 200, description = "The delivery.", body = DeliveryBody)),
    extensions(("x-problems" = json!(["delivery-not-found", "storage-unavailable", "projection-behind", "position-unknown"]))),
)]
pub(crate) async fn show(
    State(dispatcher): State<Dispatcher>,
    client: Client,
    Path(id): Path<DeliveryId>,
    Query(query): Query<ReadQuery>,
) -> Result<impl IntoResponse, Problem> {
    let partner = visible_to(&client)?;
    dispatcher.wait(query.freshness()).await?;
    let (position, body) = find(&dispatcher, id, partner).await?;
    Ok((position, axum::Json(body)))
}

/// Send a delivery again
///
/// One that is delivered, dead or held is due at once, with a fresh schedule; one that is due anyway stays as it is.
/// While its endpoint is disabled nothing is sent.
#[utoipa::path(
    post,
    path = "/v1/deliveries/{id}/redeliver",
    operation_id = "redeliver",
    tag = "webhooks",
    security(("bearer" = ["webhooks:write"])),
    params(("id" = String, Path, example = "dlv_0192f0c1-2d3e-7abc-8def-0123456789ab")),
    responses((status = 202, description = "It is due.", body = DeliveryBody)),
    extensions(("x-problems" = json!(["delivery-not-found", "invalid-transition", "storage-unavailable"]))),
)]
pub(crate) async fn redeliver(
    State(dispatcher): State<Dispatcher>,
    client: Client,
    Path(id): Path<DeliveryId>,
) -> Result<impl IntoResponse, Problem> {
    let partner = visible_to(&client)?;
    let mut tx = dispatcher.pool().begin().await?;
    // Endpoints are locked before deliveries, here as everywhere.
    let endpoint: String = sqlx::query_scalar(
        "select e.status from webhooks.deliveries d join webhooks.endpoints e on e.id = d.endpoint_id
         where d.id = $1 and e.deleted_at is null and ($2::uuid is null or e.partner_id = $2) for share of e",
    )
    .bind(id.uuid())
    .bind(partner.map(PartnerId::uuid))
    .fetch_optional(&mut *tx)
    .await?
    .ok_or_else(not_found)?;
    if endpoint == "DISABLED" {
        return Err(Problem::of("invalid-transition").detail("the webhook is disabled; enable it first"));
    }
    // An attempt that is under way (its endpoint was disabled meanwhile) keeps its lease.
    sqlx::query(
        "update webhooks.deliveries
         set status = 'PENDING', schedule_from = attempts, ended_at = null,
             possible_duplicate = possible_duplicate or status = 'DELIVERED',
             next_due = case when in_flight then now() + $2 else now() end
         where id = $1 and next_due is null",
    )
    .bind(id.uuid())
    .bind(interval(LEASE))
    .execute(&mut *tx)
    .await?;
    dispatcher.privileged("redeliver", &client, &id).await?;
    tx.commit().await?;
    dispatcher.wake.notify_one();
    let (position, body) = find(&dispatcher, id, partner).await?;
    Ok((StatusCode::ACCEPTED, position, axum::Json(body)))
}

fn not_found() -> Problem {
    Problem::of("delivery-not-found")
}

async fn find(
    dispatcher: &Dispatcher,
    id: DeliveryId,
    partner: Option<PartnerId>,
) -> Result<(Position, DeliveryBody), Problem> {
    let mut moment = one_moment(dispatcher).await?;
    let row = sqlx::query(
        "select c.position, d.* from webhooks.deliveries d join webhooks.endpoints e on e.id = d.endpoint_id,
             webhooks.checkpoint c
         where d.id = $1 and e.deleted_at is null and ($2::uuid is null or e.partner_id = $2)",
    )
    .bind(id.uuid())
    .bind(partner.map(PartnerId::uuid))
    .fetch_optional(&mut *moment)
    .await?
    .ok_or_else(not_found)?;
    let mut body = read(&row)?;
    attach_attempts(&mut moment, std::slice::from_mut(&mut body), true).await?;
    Ok((Position(row.try_get("position")?), body))
}

fn read(row: &PgRow) -> Result<DeliveryBody, Problem> {
    Ok(DeliveryBody {
        id: DeliveryId::from_uuid(row.try_get("id")?),
        event_id: EventId::from_uuid(row.try_get("event_id")?),
        webhook_id: WebhookId::from_uuid(row.try_get("endpoint_id")?),
        event_type: row.try_get("event_type")?,
        sequence: row.try_get("sequence")?,
        ledger_position: row.try_get("ledger_position")?,
        status: row.try_get("status")?,
        created_at: timestamp(row.try_get("created_at")?)?,
        next_attempt_at: match (row.try_get("in_flight")?, row.try_get("next_due")?) {
            (false, Some(due)) => Some(timestamp(due)?),
            _ => None, // while an attempt is under way, what is due is the end of its lease
        },
        attempts: Vec::new(),
    })
}

/// Deliveries and their attempts as they were at one moment: an outcome and the status that followed from it are seen together.
async fn one_moment(dispatcher: &Dispatcher) -> Result<sqlx::Transaction<'static, sqlx::Postgres>, Problem> {
    Ok(dispatcher.pool().begin_with("begin isolation level repeatable read, read only").await?)
}

/// Reads the attempts of some deliveries in one statement.
async fn attach_attempts(
    connection: &mut sqlx::PgConnection,
    deliveries: &mut [DeliveryBody],
    with_answers: bool,
) -> Result<(), Problem> {
    let ids: Vec<Uuid> = deliveries.iter().map(|delivery| delivery.id.uuid()).collect();
    let rows = sqlx::query(
        "select a.delivery_id, a.number, a.started_at, a.status_code, a.latency_ms, a.response_truncated, a.detail,
                case when $2 then a.response_body end as response_body,
                coalesce(a.outcome, case when a.started_at + $3 < now() then $4 else $5 end) as outcome
         from unnest($1::uuid[]) as wanted (id)
         cross join lateral (
             select * from webhooks.attempts where delivery_id = wanted.id order by number desc limit $6
         ) a order by a.delivery_id, a.number",
    )
    .bind(ids)
    .bind(with_answers)
    .bind(interval(LEASE))
    .bind(UNKNOWN)
    .bind(IN_FLIGHT)
    .bind(ATTEMPTS_MAX)
    .fetch_all(connection)
    .await?;
    let mut attempts: HashMap<Uuid, Vec<AttemptBody>> = HashMap::new();
    for row in &rows {
        let answer: Option<Vec<u8>> = row.try_get("response_body")?;
        attempts.entry(row.try_get("delivery_id")?).or_default().push(AttemptBody {
            number: row.try_get("number")?,
            started_at: timestamp(row.try_get("started_at")?)?,
            outcome: row.try_get("outcome")?,
            status_code: row.try_get("status_code")?,
            latency_ms: row.try_get("latency_ms")?,
            response_body: answer.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
            truncated: row.try_get("response_truncated")?,
            detail: row.try_get("detail")?,
        });
    }
    for delivery in deliveries {
        delivery.attempts = attempts.remove(&delivery.id.uuid()).unwrap_or_default();
    }
    Ok(())
}
