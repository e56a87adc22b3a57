//! The read side: what the log says, in the shapes that are asked for.
//!
//! It follows the log (event-feed), folds it into the schema `views`, and answers every GET of wallets, transactions,
//! partners and of the log itself. Each view is one file that says how it is written and how it is read; all of them
//! are functions of the log alone, so all can be lost and rebuilt (`rebuild.rs`). How far they have come is exact:
//! a position that is read in the same statement as the rows.
//!
//! Left out: deciding anything. What is answered here was true at its position and may have changed since.

mod balances;
mod entries;
mod events;
mod metrics;
mod page;
mod partners;
mod postings;
mod project;
mod queries;
mod rebuild;
mod transactions;
mod wallets;

use std::str::FromStr;

use futures::future::BoxFuture;
use sqlx::PgConnection;
use sqlx::postgres::PgConnectOptions;

pub use project::{Progress, Settings, follow};
pub use queries::{Queries, health, openapi, routes};
pub use rebuild::{RebuildReport, rebuild};

use page::Page;

/// A table of the schema `views`, and how a page of the log is written into it.
pub struct View {
    pub name: &'static str,
    /// Names no schema: it writes wherever the connection's `search_path` leads, into the live view or a new one.
    pub(crate) write: for<'p> fn(&'p Page, &'p mut PgConnection) -> BoxFuture<'p, sqlx::Result<()>>,
    /// What is selected where two versions of the view are compared, row by row.
    pub(crate) compared: &'static str,
}

/// Every view. A new one is a line here, a file, and a migration that makes its table and its checkpoint.
pub const VIEWS: &[View] = &[
    View {
        name: "partners",
        write: |page, connection| Box::pin(partners::write(page, connection)),
        compared: "select *",
    },
    View {
        name: "wallets",
        write: |page, connection| Box::pin(wallets::write(page, connection)),
        compared: "select *",
    },
    View {
        name: "postings",
        write: |page, connection| Box::pin(postings::write(page, connection)),
        compared: postings::COMPARED,
    },
];

/// The role that this service acts as in Postgres.
const ROLE: &str = "daybook_projector";

fn options(database_url: &str) -> Result<PgConnectOptions, sqlx::Error> {
    let options = PgConnectOptions::from_str(database_url)?.application_name(ROLE);
    Ok(options.options([("role", ROLE), ("search_path", "views"), ("jit", "off")]))
}
