//! The log itself: its head, and its events in order, as a page or as a stream.
//!
//! Read from the truth and not from a view, so it is never behind.

use api_contract::{Client, Freshness, MinPosition, Position, Problem, Query, WaitMs, refuse};
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use event_feed::{EventFilter, Log, RecordedEvent, StoreError};
use event_store::hash::hex;
use futures::stream;
use ledger_core::{CommandId, PartnerId, TransactionId, WalletId};
use serde::de::Deserializer;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::queries::{self, Queries};
use crate::wallets::FreshnessQuery;

const NDJSON: &str = "application/x-ndjson";

/// Events that a stream reads, and holds, at a time.
const STREAM_EVENTS: usize = 500;

/// Where the log ends.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Head)]
pub(crate) struct HeadBody {
    position: i64,
    commit: i64,
    /// Hex.
    chain: String,
}

/// Events in the order of the log.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = Events)]
pub(crate) struct EventsBody {
    #[schema(value_type = Vec<EventDocument>)]
    data: Vec<RecordedEvent>,
    has_more: bool,
    /// The last position of this page, for `after`; null when there is nothing more.
    #[schema(required)]
    next_cursor: Option<String>,
}

#[derive(Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct EventsQuery {
    /// Events behind this position; 0, the default, is before the first.
    #[param(value_type = Option<i64>, minimum = 0)]
    after: Option<MinPosition>,
    /// 1 to 1000, by default 100. A stream has no end but the head unless this gives it one.
    #[param(value_type = Option<i64>, minimum = 1, maximum = 1000)]
    limit: Option<EventsLimit>,
    /// One stream: the id of a wallet, transaction, partner or command.
    aggregate: Option<String>,
    /// One type, such as `TransactionPosted`.
    #[serde(rename = "type")]
    kind: Option<String>,
    min_position: Option<MinPosition>,
    /// The log is never behind, so nothing is waited for.
    #[expect(dead_code, reason = "every read takes it")]
    wait_ms: Option<WaitMs>,
}

/// `?limit=` of events: a page may be ten times as long as those of other lists.
#[derive(Clone, Copy)]
pub(crate) struct EventsLimit(usize);

/// The shape of an event in the OpenAPI document.
#[derive(ToSchema)]
#[schema(as = Event, rename_all = "camelCase")]
#[expect(dead_code, reason = "read by the derive only")]
struct EventDocument {
    position: i64,
    commit: i64,
    #[schema(example = "evt_0192f0c1-2d3e-8abc-8def-0123456789ab")]
    event_id: String,
    command_id: String,
    #[schema(example = "transaction")]
    aggregate_type: String,
    aggregate_id: String,
    /// Its place in its stream.
    sequence: i64,
    #[schema(example = "TransactionPosted")]
    event_type: String,
    event_version: String,
    /// Byte for byte as it was hashed.
    #[schema(value_type = Object)]
    payload: String,
    /// Byte for byte as it was hashed.
    #[schema(value_type = Object)]
    metadata: String,
    #[schema(format = DateTime)]
    recorded_at: String,
    /// Hex.
    key_hash: Option<String>,
    /// Hex.
    request_hash: Option<String>,
    /// Hex.
    leaf_hash: String,
}

/// Which events are wanted, up to which position.
#[derive(Clone)]
struct Wanted {
    log: Log,
    /// Type and id.
    aggregate: Option<(&'static str, String)>,
    kind: Option<String>,
    up_to: i64,
}

/// The head of the log
#[utoipa::path(
    get, path = "/v1/head", operation_id = "getHead", tag = "log",
    security(("bearer" = [])),
    params(FreshnessQuery),
    responses((status = 200, description = "Where the log ends.", body = HeadBody)),
)]
pub(crate) async fn head(
    State(queries): State<Queries>,
    _client: Client,
    Query(query): Query<FreshnessQuery>,
) -> Result<impl IntoResponse, Problem> {
    let head = queries.head().await?;
    known(Freshness::new(query.min_position, query.wait_ms), head.position)?;
    let body = HeadBody { position: head.position, commit: head.commit, chain: hex(&head.chain) };
    Ok((Position(head.position), Json(body)))
}

/// The log
///
/// All events of all partners, in order. With `Accept: application/x-ndjson` they come as a stream, one on each line, up
/// to the head as it is when the stream begins.
#[utoipa::path(
    get, path = "/v1/events", operation_id = "listEvents", tag = "log",
    security(("bearer" = ["audit:read"])),
    params(EventsQuery),
    responses((status = 200, description = "Events in order.", content(
        (EventsBody = "application/json"), (EventDocument = "application/x-ndjson"),
    ))),
    extensions(("x-problems" = json!(["invalid-id"]))),
)]
pub(crate) async fn list(
    State(queries): State<Queries>,
    _client: Client,
    headers: HeaderMap,
    Query(query): Query<EventsQuery>,
) -> Result<Response, Problem> {
    let aggregate = query.aggregate.map(aggregate).transpose()?;
    let head = queries.head().await?.position;
    known(Freshness::new(query.min_position, None), head)?;
    let wanted = Wanted { log: queries.log().clone(), aggregate, kind: query.kind, up_to: head };
    let after = query.after.map_or(0, |position| position.0);
    if wants_lines(&headers) {
        let lines = Body::from_stream(lines(wanted, after, query.limit));
        return Ok((Position(head), [(header::CONTENT_TYPE, NDJSON)], lines).into_response());
    }
    let EventsLimit(limit) = query.limit.unwrap_or(EventsLimit(100));
    let mut data = wanted.after(after, limit + 1).await.map_err(queries::unreadable)?;
    let has_more = limit < data.len();
    data.truncate(limit);
    let next_cursor = data.last().filter(|_| has_more).map(|last| last.position.to_string());
    Ok((Position(head), Json(EventsBody { data, has_more, next_cursor })).into_response())
}

impl Wanted {
    async fn after(&self, position: i64, limit: usize) -> Result<Vec<RecordedEvent>, StoreError> {
        if let Some((kind, id)) = &self.aggregate {
            // A stream is short, and its key finds it; along the positions it would be a walk through the whole log.
            let mut events = self.log.stream(kind, id, self.up_to).await?;
            events.retain(|event| {
                position < event.position && self.kind.as_ref().is_none_or(|kind| *kind == event.event_type)
            });
            events.truncate(limit);
            return Ok(events);
        }
        let filter = EventFilter { aggregate_id: None, event_type: self.kind.clone() };
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let (_, mut events) = self.log.events_after(position, limit, &filter).await?;
        events.retain(|event| event.position <= self.up_to);
        Ok(events)
    }
}

/// Pages of lines, each read only when the one before has been taken: a slow client costs one page of memory.
fn lines(
    wanted: Wanted,
    after: i64,
    limit: Option<EventsLimit>,
) -> impl futures::Stream<Item = Result<Bytes, anyhow::Error>> + Send {
    let begin = (wanted, after, limit.map_or(usize::MAX, |limit| limit.0));
    stream::try_unfold(begin, |(wanted, after, left)| async move {
        let events = wanted.after(after, left.min(STREAM_EVENTS)).await.inspect_err(|error| {
            // The client sees a stream that breaks off, which it cannot take for a whole one.
            tracing::warn!(%error, after, "a stream of events broke off");
        })?;
        let Some(last) = events.last().map(|event| event.position) else { return Ok(None) };
        let mut page = Vec::new();
        for event in &events {
            serde_json::to_writer(&mut page, event)?;
            page.push(b'\n');
        }
        Ok(Some((Bytes::from(page), (wanted, last, left - events.len()))))
    })
}

fn wants_lines(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    accepted.flat_map(|value| value.split(',')).any(|range| {
        let kind = range.split(';').next().unwrap_or_default();
        kind.trim().eq_ignore_ascii_case(NDJSON)
    })
}

/// The log has everything up to its head; beyond it there is nothing to wait for.
fn known(freshness: Freshness, head: i64) -> Result<(), Problem> {
    match freshness.min_position {
        Some(wanted) if head < wanted => {
            Err(Problem::of("position-unknown").at("/minPosition", "this position is beyond the head"))
        }
        _ => Ok(()),
    }
}

/// An aggregate's type, which its id tells.
fn aggregate(id: String) -> Result<(&'static str, String), Problem> {
    let kind = if id.parse::<TransactionId>().is_ok() {
        "transaction"
    } else if id.parse::<WalletId>().is_ok() {
        "wallet"
    } else if id.parse::<PartnerId>().is_ok() {
        "partner"
    } else if id.parse::<CommandId>().is_ok() {
        "command"
    } else {
        return Err(
            Problem::of("invalid-id").at("/aggregate", "expected the id of a wallet, transaction, partner or command")
        );
    };
    Ok((kind, id))
}

impl<'de> Deserialize<'de> for EventsLimit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        let limit = text.parse().ok().filter(|limit| digits && (1..=1000).contains(limit));
        limit
            .map(Self)
            .ok_or_else(|| refuse::<D::Error>("limit-out-of-range", "expected a whole number from 1 to 1000"))
    }
}
