//! Transactions: what was asked for and what became of it, refusals included.
//!
//! Each is folded from its stream in the log, up to the position that the views have reached. Postings say which there
//! are; what they do not answer is looked at on the way.

use std::collections::HashMap;
use std::time::Duration;

use api_contract::{
    Client, Freshness, Limit, MinPosition, Page as List, Path, Position, Problem, Query, TransactionBody, WaitMs,
    key_hash,
};
use axum::Json;
use axum::extract::State;
use axum::response::IntoResponse;
use ledger_core::{
    Event, PartnerId, Timestamp, TransactionEvent, TransactionId, TransactionKind, TransactionStatus, WalletId,
};
use runtime::shutdown::Shutdown;
use serde::Deserialize;
use tokio::time::{Instant, sleep};
use utoipa::IntoParams;

use crate::page::{EVENT, Happened};
use crate::postings::{self, Term, Walk};
use crate::queries::{self, Found, KindName, Queries, StatusName};
use crate::wallets::{FreshnessQuery, reflected};

/// Events that are read at first where filters may let few of them pass.
const FILTERED: i64 = 200;

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

/// Which transactions are listed.
struct Wanted {
    partner: Option<PartnerId>,
    query: TransactionsQuery,
}

impl Wanted {
    /// The questions with the fewest answers among which all of these transactions are.
    fn terms(&self) -> Vec<Term> {
        let query = &self.query;
        if let Some(reference) = &query.reference {
            return vec![Term::reference(reference)];
        }
        if let Some(user) = &query.user_id {
            return vec![Term::user(user)];
        }
        match query.wallet_id {
            Some(wallet) if wallet.is_system() => vec![Term::about(wallet)],
            Some(wallet) => vec![Term::about(wallet), Term::changes(wallet)],
            None if self.is_usual() => vec![Term::transactions(self.partner)],
            None => vec![Term::unusual(self.partner)],
        }
    }

    /// Whether a transfer that was done could be among them.
    fn is_usual(&self) -> bool {
        self.query.status.as_ref().is_none_or(|status| status.0 == TransactionStatus::Success.name())
            && self.query.kind.as_ref().is_none_or(|kind| kind.0 == TransactionKind::Transfer.name())
    }

    /// Whether terms do not say all that is asked.
    fn is_filtered(&self) -> bool {
        let TransactionsQuery { wallet_id, user_id, kind, status, from, to, reference, .. } = &self.query;
        wallet_id.is_some()
            || user_id.is_some()
            || reference.is_some()
            || kind.is_some()
            || status.is_some()
            || from.is_some()
            || to.is_some()
    }

    fn has(&self, partner: Option<PartnerId>, body: &TransactionBody) -> bool {
        let query = &self.query;
        (self.partner.is_none() || self.partner == partner)
            && query.wallet_id.is_none_or(|wallet| body.wallet_id == wallet || body.to_wallet_id == Some(wallet))
            && (query.user_id.is_none() || query.user_id == body.user_id)
            && (query.reference.is_none() || query.reference == body.reference)
            && query.kind.as_ref().is_none_or(|kind| kind.0 == body.kind.name())
            && query.status.as_ref().is_none_or(|status| status.0 == body.status.name())
            && query.from.is_none_or(|from| from <= body.created_at)
            && query.to.is_none_or(|to| body.created_at <= to)
    }

    /// Those of the transactions that begin with one of these events, each with its place in lists.
    async fn among(
        &self,
        queries: &Queries,
        events: &[Happened],
        reflected: i64,
    ) -> Result<Vec<(i64, TransactionBody)>, Problem> {
        let bodies = bodies(queries, events, reflected).await?;
        let wanted = bodies.into_iter().filter(|(_, partner, body)| self.has(*partner, body));
        Ok(wanted.map(|(place, _, body)| (place, shown(self.partner, body))).collect())
    }
}

/// The transactions that begin with one of these events, as they stand at a position: each with its place in lists and the
/// partner who sees it.
async fn bodies(
    queries: &Queries,
    events: &[Happened],
    reflected: i64,
) -> Result<Vec<(i64, Option<PartnerId>, TransactionBody)>, Problem> {
    let mut bodies = Vec::with_capacity(events.len());
    let mut pending = HashMap::new();
    for Happened { position, recorded_at, event } in events {
        let Event::Transaction(id, event) = event else { continue };
        let Some(instruction) = postings::instruction(event) else { continue };
        if matches!(event, TransactionEvent::Requested { .. }) {
            pending.insert(*id, bodies.len());
        }
        bodies.push((*position, instruction.partner_id, TransactionBody::new(event, *id, *position, *recorded_at)));
    }
    let ids: Vec<_> = pending.keys().copied().collect();
    for Happened { position, recorded_at, event } in stream(queries, &ids, 2, i64::MAX, reflected).await? {
        let Event::Transaction(id, event) = event else { continue };
        if let Some(place) = pending.get(&id) {
            bodies[*place].2.apply(&event, position, recorded_at);
        }
    }
    Ok(bodies)
}

/// The first events of transactions.
pub(crate) async fn begun(
    queries: &Queries,
    ids: &[TransactionId],
) -> Result<HashMap<TransactionId, Happened>, Problem> {
    let first = stream(queries, ids, 1, 1, i64::MAX).await?;
    let id = |happened: &Happened| match happened.event {
        Event::Transaction(id, _) => Some(id),
        _ => None,
    };
    Ok(first.into_iter().filter_map(|happened| Some((id(&happened)?, happened))).collect())
}

/// The aggregate type of transactions in the log.
const TRANSACTION: &str = "transaction";

/// A part of the streams of some transactions, each in its order, up to a position.
async fn stream(
    queries: &Queries,
    ids: &[TransactionId],
    from: i64,
    to: i64,
    up_to: i64,
) -> Result<Vec<Happened>, Problem> {
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let rows = sqlx::query(&format!(
        "select {EVENT} from ledger.events e
         where aggregate_type = '{TRANSACTION}' and aggregate_id = any($1) and sequence between $2 and $3 and position <= $4
         order by sequence"
    ))
    .bind(ids.iter().map(ToString::to_string).collect::<Vec<_>>())
    .bind(from)
    .bind(to)
    .bind(up_to)
    .fetch_all(queries.pool())
    .await
    .map_err(queries::failed)?;
    rows.iter().filter_map(|row| Happened::from_row(row).transpose()).collect::<Result<_, _>>().map_err(queries::unfit)
}

fn shown(partner: Option<PartnerId>, body: TransactionBody) -> TransactionBody {
    if partner.is_some() { body.for_partner() } else { body }
}

/// How the transactions of the command began that a key was used for, as far as the views have come.
async fn of_key(queries: &Queries, key: [u8; 16]) -> Result<(i64, Vec<Happened>), Problem> {
    let position = sqlx::query_scalar("select position from checkpoints where view = 'postings'");
    let reflected: i64 =
        position.fetch_optional(queries.pool()).await.map_err(queries::failed)?.ok_or_else(queries::no_checkpoint)?;
    let command = queries.log().commands_of_keys(&[key]).await.map_err(queries::unreadable)?;
    let shown = command.iter().filter(|event| event.position <= reflected).rev();
    let events = shown.map(Happened::of).collect::<Result<Vec<_>, _>>().map_err(queries::unfit)?;
    Ok((reflected, events))
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
    let (kind, status) = (query.kind.as_ref().map(|kind| &kind.0), query.status.as_ref().map(|status| &status.0));
    let key = query.idempotency_key.as_deref().map(|key| key_hash(client.id, key));
    queries::range(query.from, query.to)?;
    let texts = (&query.user_id, &query.reference, key);
    let filters = format!("{:?}", (query.wallet_id, texts, &kind, &status, query.from, query.to));
    let before = queries.after(ROUTE, partner, &filters, query.cursor.as_deref())?;
    let freshness = Freshness::new(query.min_position, query.wait_ms);
    queries.wait(freshness).await?;
    let limit = query.limit.unwrap_or_default().get();
    let wanted = Wanted { partner, query };
    let mut found = Vec::new();
    let position;
    if let Some(key) = key {
        let (reflected, events) = of_key(&queries, key).await?;
        found = wanted.among(&queries, &events, reflected).await?;
        found.retain(|(place, _)| before.is_none_or(|before| *place < before));
        found.truncate(limit + 1);
        position = reflected;
    } else {
        let until = match wanted.query.to {
            Some(to) => postings::position_at(&queries, to).await?,
            None => None,
        };
        let before = until.map(|until| before.unwrap_or(i64::MAX).min(until + 1)).or(before);
        let first = if wanted.is_filtered() { FILTERED } else { queries::one_more(limit) };
        let mut walk = Walk::new(&queries, &wanted.terms(), 0, before, first);
        while found.len() <= limit {
            let events = walk.next().await?;
            let Some(last) = events.last() else { break };
            found.extend(wanted.among(&queries, &events, walk.reflected()).await?);
            if wanted.query.from.is_some_and(|from| last.recorded_at < from) {
                break;
            }
        }
        position = walk.reflected();
    }
    queries::reflects(freshness, position)?;
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
        let rows = sqlx::query(&format!(
            "select c.position as reflected, {EVENT} from checkpoints c
             left join ledger.events e
                 on e.aggregate_type = '{TRANSACTION}' and e.aggregate_id = $1 and e.position <= c.position
             where c.view = 'postings' order by e.sequence"
        ))
        .bind(id.to_string())
        .fetch_all(queries.pool())
        .await
        .map_err(queries::failed)?;
        let events = rows.iter().filter_map(|row| Happened::from_row(row).transpose());
        let events = events.collect::<Result<Vec<_>, _>>().map_err(queries::unfit)?;
        let item = folded(&events).filter(|(seen_by, _)| partner.is_none() || partner == *seen_by);
        Ok(Found { position: reflected(&rows)?, item: item.map(|(_, body)| shown(partner, body)) })
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

/// A transaction from its whole stream, and the partner who sees it.
fn folded(events: &[Happened]) -> Option<(Option<PartnerId>, TransactionBody)> {
    let mut steps = events.iter().filter_map(|happened| match &happened.event {
        Event::Transaction(id, event) => Some((*id, event, happened.position, happened.recorded_at)),
        _ => None,
    });
    let (id, first, position, recorded_at) = steps.next()?;
    let partner = postings::instruction(first)?.partner_id;
    let mut body = TransactionBody::new(first, id, position, recorded_at);
    for (_, event, position, recorded_at) in steps {
        body.apply(event, position, recorded_at);
    }
    Some((partner, body))
}
