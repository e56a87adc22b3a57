//! Endpoints: where partners want to be told. Registered, listed, changed and deleted here.
//!
//! An endpoint begins at the head of the log at its registration, and again when it is enabled. While it is
//! disabled no deliveries are made for it; those that waited are held, and each can be sent by redelivering it.

use api_contract::{Client, Freshness, Json, Limit, MinPosition, Page, Path, Position, Problem, Query, Seal, WaitMs};
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::IntoResponse;
use ledger_core::{PartnerId, Timestamp, WebhookId};
use serde::{Deserialize, Serialize};
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};
use time::OffsetDateTime;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::Dispatcher;
use crate::notice::{EVERYTHING, EventType};
use crate::signature::SigningSecret;
use crate::target::Target;

const PER_PARTNER_MAX: i64 = 50;

/// A webhook endpoint.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Webhook)]
pub(crate) struct WebhookBody {
    #[schema(value_type = String, example = "whk_0192f0c1-2d3e-7abc-8def-0123456789ab")]
    pub(crate) id: WebhookId,
    #[schema(example = "https://hooks.example.com/daybook")]
    url: String,
    /// `transaction.created`, `transaction.completed`, `transaction.failed`, `wallet.opened`, `wallet.frozen`,
    /// `wallet.closed`, or `*` for all.
    events: Vec<String>,
    #[schema(pattern = "^(ACTIVE|DISABLED)$")]
    status: String,
    /// Why it is disabled: `requested`, or `gone` if it answered 410.
    #[serde(skip_serializing_if = "Option::is_none")]
    disabled_reason: Option<String>,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    /// Signs deliveries. Shown once, when the endpoint is registered.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD")]
    secret: Option<String>,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct NewWebhook {
    /// https, at most 2 KiB, a public host.
    url: String,
    events: Vec<String>,
}

/// What is absent stays as it is.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct WebhookChange {
    url: Option<String>,
    events: Option<Vec<String>>,
    #[schema(value_type = Option<String>, pattern = "^(ACTIVE|DISABLED)$")]
    status: Option<String>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListQuery {
    limit: Option<Limit>,
    cursor: Option<String>,
    min_position: Option<MinPosition>,
    wait_ms: Option<WaitMs>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ReadQuery {
    min_position: Option<MinPosition>,
    wait_ms: Option<WaitMs>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum DisabledReason {
    Requested,
    Gone,
}

impl DisabledReason {
    const fn word(self) -> &'static str {
        match self {
            Self::Requested => "requested",
            Self::Gone => "gone",
        }
    }
}

impl ReadQuery {
    pub(crate) fn freshness(&self) -> Freshness {
        Freshness::new(self.min_position, self.wait_ms)
    }
}

/// Register a webhook endpoint
///
/// It is told about events from the head of the log on, whose position is answered.
#[utoipa::path(
    post,
    path = "/v1/webhooks",
    operation_id = "registerWebhook",
    tag = "webhooks",
    security(("bearer" = ["webhooks:write"])),
    request_body = NewWebhook,
    responses((status = 201, description = "The endpoint, and its secret.", body = WebhookBody)),
    extensions(("x-problems" = json!(["webhook-url-forbidden", "too-many-items", "storage-unavailable"]))),
)]
pub(crate) async fn register(
    State(dispatcher): State<Dispatcher>,
    client: Client,
    Json(request, _): Json<NewWebhook>,
) -> Result<impl IntoResponse, Problem> {
    let partner = client.partner()?;
    check_url(&dispatcher, &request.url)?;
    let events = check_events(request.events)?;
    let id = WebhookId::from_uuid(Uuid::now_v7());
    let secret = SigningSecret::mint();
    let sealed = dispatcher.seal.seal(&sealed_for(id.uuid()), secret.reveal().as_bytes());

    let mut tx = dispatcher.pool().begin().await?;
    wait_for_fan_out(&mut tx).await?; // also one registration after another, so that counting them is exact
    let registered: i64 =
        sqlx::query_scalar("select count(*) from webhooks.endpoints where partner_id = $1 and deleted_at is null")
            .bind(partner.uuid())
            .fetch_one(&mut *tx)
            .await?;
    if PER_PARTNER_MAX <= registered {
        return Err(Problem::of("too-many-items").detail(format!("a partner has at most {PER_PARTNER_MAX} webhooks")));
    }
    let row = sqlx::query(
        "insert into webhooks.endpoints (id, partner_id, url, events, sealed_secret, after_commit)
         select $1, $2, $3, $4, $5, head.number
         from (select number from ledger.commits order by number desc limit 1) head
         returning *, (select last_position from ledger.commits where number = after_commit) as position",
    )
    .bind(id.uuid())
    .bind(partner.uuid())
    .bind(&request.url)
    .bind(&events)
    .bind(sealed)
    .fetch_one(&mut *tx)
    .await?;
    tx.commit().await?;
    let body = WebhookBody { secret: Some(secret.reveal().to_owned()), ..read(&row)? };
    let location = [(header::LOCATION, format!("/v1/webhooks/{id}"))];
    Ok((StatusCode::CREATED, Position(row.try_get("position")?), location, NO_STORE, axum::Json(body)))
}

/// List webhook endpoints
///
/// In the order of their registration.
#[utoipa::path(
    get,
    path = "/v1/webhooks",
    operation_id = "listWebhooks",
    tag = "webhooks",
    security(("bearer" = ["webhooks:read"])),
    params(ListQuery),
    responses((status = 200, description = "A page of endpoints.", body = Page<WebhookBody>)),
    extensions(("x-problems" = json!(["cursor-invalid", "limit-out-of-range", "storage-unavailable", "projection-behind", "position-unknown"]))),
)]
pub(crate) async fn list(
    State(dispatcher): State<Dispatcher>,
    client: Client,
    Query(query): Query<ListQuery>,
) -> Result<impl IntoResponse, Problem> {
    const ROUTE: &str = "/v1/webhooks";
    let partner = visible_to(&client)?;
    dispatcher.wait(Freshness::new(query.min_position, query.wait_ms)).await?;
    let limit = query.limit.unwrap_or_default().get();
    let after = query.cursor.map(|cursor| dispatcher.cursors.open(ROUTE, partner, "", &cursor)).transpose()?;
    let after: Option<WebhookId> = after.map(|id| id.parse()).transpose().map_err(|_| Problem::of("cursor-invalid"))?;
    let rows = sqlx::query(
        "select c.position, w.* from webhooks.checkpoint c left join lateral (
             select * from webhooks.endpoints
             where deleted_at is null and ($1::uuid is null or partner_id = $1) and ($2::uuid is null or $2 < id)
             order by id limit $3
         ) w on true order by w.id",
    )
    .bind(partner.map(PartnerId::uuid))
    .bind(after.map(WebhookId::uuid))
    .bind(i64::try_from(limit + 1).expect("a page is short"))
    .fetch_all(dispatcher.pool())
    .await?;
    let (position, webhooks) = page(&rows, read)?;
    let page = Page::new(webhooks, limit, |last| dispatcher.cursors.seal(ROUTE, partner, "", &last.id.to_string()));
    Ok((position, axum::Json(page)))
}

/// Get a webhook endpoint
#[utoipa::path(
    get,
    path = "/v1/webhooks/{id}",
    operation_id = "getWebhook",
    tag = "webhooks",
    security(("bearer" = ["webhooks:read"])),
    params(("id" = String, Path, example = "whk_0192f0c1-2d3e-7abc-8def-0123456789ab"), ReadQuery),
    responses((status = 200, description = "The endpoint.", body = WebhookBody)),
    extensions(("x-problems" = json!(["webhook-not-found", "storage-unavailable", "projection-behind", "position-unknown"]))),
)]
pub(crate) async fn show(
    State(dispatcher): State<Dispatcher>,
    client: Client,
    Path(id): Path<WebhookId>,
    Query(query): Query<ReadQuery>,
) -> Result<impl IntoResponse, Problem> {
    let partner = visible_to(&client)?;
    dispatcher.wait(query.freshness()).await?;
    let row = sqlx::query(
        "select c.position, w.* from webhooks.endpoints w, webhooks.checkpoint c
         where w.id = $1 and w.deleted_at is null and ($2::uuid is null or w.partner_id = $2)",
    )
    .bind(id.uuid())
    .bind(partner.map(PartnerId::uuid))
    .fetch_optional(dispatcher.pool())
    .await?
    .ok_or_else(not_found)?;
    Ok((Position(row.try_get("position")?), axum::Json(read(&row)?)))
}

/// Change a webhook endpoint
///
/// Disabling holds what has not been delivered yet. Enabling begins anew at the head of the log.
#[utoipa::path(
    patch,
    path = "/v1/webhooks/{id}",
    operation_id = "changeWebhook",
    tag = "webhooks",
    security(("bearer" = ["webhooks:write"])),
    params(("id" = String, Path, example = "whk_0192f0c1-2d3e-7abc-8def-0123456789ab")),
    request_body = WebhookChange,
    responses((status = 200, description = "The endpoint as it is now.", body = WebhookBody)),
    extensions(("x-problems" = json!(["webhook-not-found", "webhook-url-forbidden", "storage-unavailable"]))),
)]
pub(crate) async fn change(
    State(dispatcher): State<Dispatcher>,
    client: Client,
    Path(id): Path<WebhookId>,
    Json(request, _): Json<WebhookChange>,
) -> Result<impl IntoResponse, Problem> {
    let partner = visible_to(&client)?;
    if let Some(url) = &request.url {
        check_url(&dispatcher, url)?;
    }
    let events = request.events.map(check_events).transpose()?;
    let status = request.status.as_deref();
    if status.is_some_and(|status| !matches!(status, "ACTIVE" | "DISABLED")) {
        return Err(Problem::of("invalid-field").at("/status", "expected ACTIVE or DISABLED"));
    }
    let mut tx = dispatcher.pool().begin().await?;
    if status == Some("ACTIVE") {
        wait_for_fan_out(&mut tx).await?; // holding back a long backlog must not hold up everyone's fan-out
    }
    let id = lock_visible(&mut tx, id, partner).await?;
    match status {
        Some("DISABLED") => {
            disable(&mut tx, id, DisabledReason::Requested).await?;
        }
        Some(_) => enable(&mut tx, id).await?,
        None => {}
    }
    let row = sqlx::query(
        "update webhooks.endpoints set url = coalesce($2, url), events = coalesce($3, events) where id = $1
         returning *, (select position from webhooks.checkpoint) as position",
    )
    .bind(id)
    .bind(request.url)
    .bind(events)
    .fetch_one(&mut *tx)
    .await?;
    dispatcher.privileged("webhook-changed", &client, &WebhookId::from_uuid(id)).await?;
    tx.commit().await?;
    Ok((Position(row.try_get("position")?), axum::Json(read(&row)?)))
}

/// Delete a webhook endpoint
///
/// What has not been delivered yet never will be.
#[utoipa::path(
    delete,
    path = "/v1/webhooks/{id}",
    operation_id = "deleteWebhook",
    tag = "webhooks",
    security(("bearer" = ["webhooks:write"])),
    params(("id" = String, Path, example = "whk_0192f0c1-2d3e-7abc-8def-0123456789ab")),
    responses((status = 204, description = "It is deleted.")),
    extensions(("x-problems" = json!(["webhook-not-found", "storage-unavailable"]))),
)]
pub(crate) async fn delete(
    State(dispatcher): State<Dispatcher>,
    client: Client,
    Path(id): Path<WebhookId>,
) -> Result<impl IntoResponse, Problem> {
    let partner = visible_to(&client)?;
    let mut tx = dispatcher.pool().begin().await?;
    let id = lock_visible(&mut tx, id, partner).await?;
    sqlx::query("update webhooks.endpoints set deleted_at = now() where id = $1").bind(id).execute(&mut *tx).await?;
    hold(&mut tx, id).await?;
    dispatcher.privileged("webhook-deleted", &client, &WebhookId::from_uuid(id)).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Disables an endpoint and holds what waits for it; `false` if it was disabled already.
pub(crate) async fn disable(tx: &mut PgConnection, id: Uuid, reason: DisabledReason) -> Result<bool, sqlx::Error> {
    let disabled = sqlx::query(
        "update webhooks.endpoints set status = 'DISABLED', disabled_reason = $2 where id = $1 and status = 'ACTIVE'",
    )
    .bind(id)
    .bind(reason.word())
    .execute(&mut *tx)
    .await?;
    hold(tx, id).await?;
    Ok(disabled.rows_affected() == 1)
}

/// The secret that signs an endpoint's deliveries, if our key opens it.
pub(crate) fn open_secret(seal: &Seal, id: Uuid, sealed: &[u8]) -> Option<SigningSecret> {
    let opened = seal.open(&sealed_for(id), sealed).map_err(|error| error.to_string());
    let secret = opened.and_then(|bytes| {
        let text = String::from_utf8(bytes).map_err(|error| error.to_string())?;
        SigningSecret::parse(&text).map_err(|error| error.to_string())
    });
    secret.inspect_err(|error| tracing::error!(webhook.id = %id, error, "an endpoint's secret does not open")).ok()
}

/// The partner whose endpoints a client may see; `None` for an admin, who sees all.
pub(crate) fn visible_to(client: &Client) -> Result<Option<PartnerId>, Problem> {
    if client.is_admin() { Ok(None) } else { client.partner().map(Some) }
}

/// Takes apart rows that each begin with the checkpoint's position, of which there is one even without an item.
pub(crate) fn page<T>(
    rows: &[PgRow],
    read: impl Fn(&PgRow) -> Result<T, Problem>,
) -> Result<(Position, Vec<T>), Problem> {
    let position = rows.first().map_or(Ok(0), |row| row.try_get("position"))?;
    let found = rows.iter().filter(|row| row.try_get::<Uuid, _>("id").is_ok());
    Ok((Position(position), found.map(read).collect::<Result<_, _>>()?))
}

pub(crate) fn not_found() -> Problem {
    Problem::of("webhook-not-found")
}

pub(crate) fn timestamp(at: OffsetDateTime) -> Result<Timestamp, Problem> {
    Timestamp::try_from(at).map_err(|error| Problem::internal(&error))
}

/// An answer that shows a secret is for its asker alone.
const NO_STORE: [(HeaderName, &str); 1] = [(header::CACHE_CONTROL, "no-store")];

/// What a secret is sealed for: only there it opens again.
fn sealed_for(id: Uuid) -> String {
    WebhookId::from_uuid(id).to_string()
}

fn check_url(dispatcher: &Dispatcher, url: &str) -> Result<(), Problem> {
    match Target::parse(url, dispatcher.reach) {
        Ok(_) => Ok(()),
        Err(forbidden) => Err(Problem::of("webhook-url-forbidden").at("/url", forbidden.to_string())),
    }
}

/// At least one known type, each once.
fn check_events(events: Vec<String>) -> Result<Vec<String>, Problem> {
    if events.is_empty() {
        return Err(Problem::of("invalid-field").at("/events", "expected at least one event type, or *"));
    }
    for (place, event) in events.iter().enumerate() {
        let known = event == EVERYTHING || EventType::ALL.iter().any(|known| known.name() == event);
        if !known || events[..place].contains(event) {
            let detail = if known { "this event type stands here twice" } else { "no such event type" };
            return Err(Problem::of("invalid-field").at(format!("/events/{place}"), detail));
        }
    }
    Ok(events)
}

/// Locks the checkpoint: what fan-out turns at this moment is done with, and what it turns next sees our change.
async fn wait_for_fan_out(tx: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query("select from webhooks.checkpoint for update").execute(tx).await?;
    Ok(())
}

async fn lock_visible(tx: &mut PgConnection, id: WebhookId, partner: Option<PartnerId>) -> Result<Uuid, Problem> {
    sqlx::query_scalar(
        "select id from webhooks.endpoints
         where id = $1 and deleted_at is null and ($2::uuid is null or partner_id = $2) for no key update",
    )
    .bind(id.uuid())
    .bind(partner.map(PartnerId::uuid))
    .fetch_optional(tx)
    .await?
    .ok_or_else(not_found)
}

async fn enable(tx: &mut PgConnection, id: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update webhooks.endpoints
         set status = 'ACTIVE', disabled_reason = null, paused_until = null,
             after_commit = (select number from ledger.commits order by number desc limit 1)
         where id = $1 and status = 'DISABLED'",
    )
    .bind(id)
    .execute(tx)
    .await?;
    Ok(())
}

/// Holds an endpoint's open deliveries. An attempt under way goes on, and is recorded.
async fn hold(tx: &mut PgConnection, endpoint: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update webhooks.deliveries set status = 'HELD', next_due = null, ended_at = now()
         where endpoint_id = $1 and next_due is not null",
    )
    .bind(endpoint)
    .execute(tx)
    .await?;
    Ok(())
}

fn read(row: &PgRow) -> Result<WebhookBody, Problem> {
    Ok(WebhookBody {
        id: WebhookId::from_uuid(row.try_get("id")?),
        url: row.try_get("url")?,
        events: row.try_get("events")?,
        status: row.try_get("status")?,
        disabled_reason: row.try_get("disabled_reason")?,
        created_at: timestamp(row.try_get("created_at")?)?,
        secret: None,
    })
}
