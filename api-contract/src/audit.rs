//! Privileged acts and incidents that are no events of the log: logins, keys, limits, wrong secrets in numbers.
//!
//! What changes the ledger is an event, and its metadata says who, from where and by which request. The rest goes to
//! `access.audit`, to which our role can add and from which it can take nothing.

use std::fmt;
use std::net::IpAddr;

use ledger_core::{ClientId, Timestamp};
use serde::Serialize;
use serde_json::{Map, Value};
use sqlx::postgres::PgExecutor;
use time::OffsetDateTime;

use crate::client::Origin;

/// One act, to be written down.
#[derive(Debug)]
#[must_use = "it is nowhere until it is recorded"]
pub struct Act {
    act: &'static str,
    client: Option<ClientId>,
    peer: Option<IpAddr>,
    request_id: Option<String>,
    detail: Map<String, Value>,
}

/// One act, as it was written down.
#[derive(Debug, Serialize, sqlx::FromRow)]
#[serde(rename_all = "camelCase")]
pub struct RecordedAct {
    pub number: i64,
    #[sqlx(try_from = "OffsetDateTime")]
    pub at: Timestamp,
    pub act: String,
    #[sqlx(rename = "client")]
    pub client_id: Option<String>,
    pub peer: Option<String>,
    pub request_id: Option<String>,
    pub detail: Value,
}

impl Act {
    pub fn new(act: &'static str) -> Self {
        Self { act, client: None, peer: None, request_id: None, detail: Map::new() }
    }

    pub fn by(mut self, client: ClientId) -> Self {
        self.client = Some(client);
        self
    }

    pub fn origin(mut self, origin: &Origin) -> Self {
        self.peer = origin.peer;
        self.request_id = Some(origin.request_id.clone());
        self
    }

    pub fn with(mut self, name: &str, value: impl fmt::Display) -> Self {
        self.detail.insert(name.to_owned(), value.to_string().into());
        self
    }

    pub(crate) async fn record(self, executor: impl PgExecutor<'_>) -> Result<(), sqlx::Error> {
        sqlx::query(
            "insert into access.audit (act, client_id, peer, request_id, detail) values ($1, $2, $3, $4, $5::json)",
        )
        .bind(self.act)
        .bind(self.client.map(ClientId::uuid))
        .bind(self.peer.map(|peer| peer.to_string()))
        .bind(self.request_id)
        .bind(Value::Object(self.detail).to_string())
        .execute(executor)
        .await?;
        Ok(())
    }
}

/// The latest acts, the latest first, of the given kind if one is given.
pub(crate) async fn latest(
    executor: impl PgExecutor<'_>,
    act: Option<&str>,
    limit: i64,
) -> Result<Vec<RecordedAct>, sqlx::Error> {
    sqlx::query_as(
        "select number, at, act, 'cli_' || client_id::text as client, peer, request_id, detail from access.audit
         where $1::text is null or act = $1 order by number desc limit $2",
    )
    .bind(act)
    .bind(limit)
    .fetch_all(executor)
    .await
}
