//! What a wallet holds: now, at a position of the log, or as of two times.
//!
//! Every event that changes a wallet says what there is after it, so the last one up to a position is the answer, and one
//! up to a time likewise: `knownAt` asks what the ledger knew by then. `asOf` asks what counted in business by then: that
//! and what was recorded later and counts from earlier.

use api_contract::{Client, Freshness, MinPosition, Path, Position, Problem, Query, WaitMs};
use axum::Json;
use axum::extract::State;
use axum::response::IntoResponse;
use ledger_core::{Balance, Currency, Event, Timestamp, WalletEvent, WalletId};
use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::entries;
use crate::postings::{self, Term, Walk};
use crate::queries::{self, Found, Queries};
use crate::wallets;

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

/// Backdated entries that are read at first.
const BACKDATED: i64 = 100;

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

/// A wallet's version and what it holds after an event that changed it.
pub(crate) fn left(event: &Event, wallet: WalletId) -> Option<(i64, Balance)> {
    match event {
        Event::Wallet(id, event) if *id == wallet => Some((event.wallet_version(), balance_after(event))),
        Event::Transaction(_, event) => {
            let entry = event.entries()?.iter().rfind(|entry| entry.wallet_id == wallet)?;
            Some((entry.wallet_version, entry.balance_after))
        }
        Event::Wallet(..) | Event::Partner(..) | Event::Command(..) => None,
    }
}

fn balance_after(event: &WalletEvent) -> Balance {
    match event {
        WalletEvent::Opened { balance_after, .. }
        | WalletEvent::Frozen { balance_after, .. }
        | WalletEvent::Unfrozen { balance_after, .. }
        | WalletEvent::Closed { balance_after, .. } => *balance_after,
    }
}

/// Which of a wallet's changes count.
#[derive(Clone, Copy)]
struct Bounds {
    /// Up to this position; `None` is the end of the log.
    known: Option<i64>,
    /// And of those recorded behind the position only what counts from a time up to this one.
    effective: Option<(i64, Timestamp)>,
    /// The log had not come to this time yet. When it has, the bounds are other ones.
    open_until: Option<Timestamp>,
}

impl Bounds {
    async fn of(queries: &Queries, query: &BalanceQuery) -> Result<Self, Problem> {
        let mut known = query.at_position.map(|position| position.0);
        let mut open_until = None;
        if let Some(time) = query.known_at {
            known = postings::position_at(queries, time).await?;
            open_until = known.is_none().then_some(time);
        }
        let mut effective = None;
        if let Some(time) = query.as_of {
            let recorded = postings::position_at(queries, time).await?;
            if recorded.is_none() && known.is_none() {
                open_until = open_until.min(Some(time)).or(Some(time));
            }
            effective = recorded.filter(|recorded| known.is_none_or(|known| *recorded < known)).zip(Some(time));
        }
        Ok(Self { known, effective, open_until })
    }

    /// What the wallet holds within them, and the position that this reflects; `None` when the bounds have changed.
    async fn balance(self, queries: &Queries, wallet: WalletId) -> Result<Option<(i64, Decimal)>, Problem> {
        let behind = |position: i64| position.saturating_add(1);
        let recorded = self.effective.map_or(self.known, |(recorded, _)| Some(recorded));
        let mut walk = Walk::new(queries, &[Term::changes(wallet)], 0, recorded.map(behind), 1);
        let mut balance = match walk.next().await?.first() {
            Some(last) if self.open_until.is_some_and(|time| time < last.recorded_at) => return Ok(None),
            Some(last) => left(&last.event, wallet).ok_or_else(|| queries::misposted(last.position))?.1.decimal(),
            None => Decimal::ZERO,
        };
        let reflected = walk.reflected();
        let Some((recorded, time)) = self.effective else { return Ok(Some((reflected, balance))) };
        // Nothing counts from later than it is recorded: so far all counts. Of what came later, some may.
        let known = self.known.unwrap_or(reflected).min(reflected);
        let mut walk = Walk::new(queries, &[Term::backdated(wallet)], recorded, Some(behind(known)), BACKDATED);
        loop {
            let events = walk.next().await?;
            if events.is_empty() {
                return Ok(Some((reflected, balance)));
            }
            for movement in entries::movements(queries, events, wallet).await? {
                if movement.effective_at <= time {
                    balance += movement.change();
                }
            }
        }
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
    if query.at_position.is_some() && (query.as_of.is_some() || query.known_at.is_some()) {
        return Err(Problem::of("invalid-field").at("/atPosition", "either a position or times"));
    }
    let at = query.at_position.map(|position| position.0);
    let (query, queries) = (&query, &queries);
    let read = || async move {
        let Found { position, item } = wallets::currency(queries, id, partner).await?;
        let Some(currency) = item else { return Ok(Found { position, item: None }) };
        loop {
            let found = Bounds::of(queries, query).await?.balance(queries, id).await?;
            let Some((position, balance)) = found else { continue };
            return Ok(Found { position, item: Some((currency, balance)) });
        }
    };
    let freshness = Freshness::new(query.min_position, query.wait_ms);
    let freshness = Freshness { min_position: freshness.min_position.max(at), ..freshness };
    queries.wait(freshness).await.map_err(|problem| match problem.slug() {
        "position-unknown" if freshness.min_position == at => {
            Problem::of("position-unknown").at("/atPosition", "this position is beyond the head")
        }
        _ => problem,
    })?;
    let Found { position, item: (currency, balance) } = queries.find(freshness, "wallet-not-found", read).await?;
    let balance = queries::balance(balance, currency);
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
