//! Who may use which route: the one table of all services, and what [`crate::Client`] goes by.
//!
//! A route whose handler asks for its caller and that does not stand here is closed to everybody. A test compares the
//! table with the routes that the product describes in its OpenAPI document.

use axum::http::Method;

use crate::Scope;

/// What a route asks of its callers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entrance {
    /// No token is needed.
    Public,
    /// A token of any scope.
    AnyClient,
    Holders(Scope),
}

/// A route of one of the services, its path as axum and OpenAPI write it.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    pub method: &'static str,
    pub path: &'static str,
    pub entrance: Entrance,
}

use Entrance::{AnyClient, Holders, Public};
use Scope::{
    Admin, AuditRead, TransactionsRead, TransactionsWrite, WalletsRead, WalletsWrite, WebhooksRead, WebhooksWrite,
    Workflow,
};

#[rustfmt::skip] // a table is read by its columns
pub const ROUTES: &[Route] = &[
    // Every service.
    route("GET", "/healthz", Public),
    route("GET", "/readyz", Public),
    route("GET", "/metrics", Public),
    route("GET", "/openapi.json", Public),
    route("GET", "/docs", Public),
    route("GET", "/problems/{slug}", Public),
    // command-api
    route("GET", "/.well-known/jwks.json", Public),
    route("POST", "/v1/auth/token", Public),
    route("POST", "/v1/auth/refresh", Public),
    route("POST", "/v1/auth/logout", AnyClient),
    route("POST", "/v1/partners", Holders(Admin)),
    route("POST", "/v1/partners/{id}/rotate-secret", Holders(Admin)),
    route("POST", "/v1/partners/{id}/suspend", Holders(Admin)),
    route("POST", "/v1/partners/{id}/resume", Holders(Admin)),
    route("POST", "/v1/wallets", Holders(WalletsWrite)),
    route("POST", "/v1/wallets/{id}/freeze", Holders(WalletsWrite)),
    route("POST", "/v1/wallets/{id}/unfreeze", Holders(WalletsWrite)),
    route("POST", "/v1/wallets/{id}/close", Holders(WalletsWrite)),
    route("POST", "/v1/transactions/transfer", Holders(TransactionsWrite)),
    route("POST", "/v1/transactions/batch", Holders(TransactionsWrite)),
    route("POST", "/v1/transactions/adjustment", Holders(Admin)),
    route("POST", "/v1/transactions/top-up", Holders(TransactionsWrite)),
    route("POST", "/v1/transactions/{id}/settle", Holders(Workflow)),
    route("POST", "/v1/transactions/{id}/fail", Holders(Workflow)),
    route("POST", "/v1/transactions/{id}/expire", Holders(Workflow)),
    // projector
    route("GET", "/v1/partners", Holders(Admin)),
    route("GET", "/v1/partners/{id}", Holders(Admin)),
    route("GET", "/v1/wallets", Holders(WalletsRead)),
    route("GET", "/v1/wallets/{id}", Holders(WalletsRead)),
    route("GET", "/v1/wallets/{id}/balance", Holders(WalletsRead)),
    route("GET", "/v1/wallets/{id}/entries", Holders(WalletsRead)),
    route("GET", "/v1/transactions", Holders(TransactionsRead)),
    route("GET", "/v1/transactions/{id}", Holders(TransactionsRead)),
    route("GET", "/v1/head", AnyClient),
    route("GET", "/v1/events", Holders(AuditRead)),
    // webhook-dispatcher
    route("GET", "/v1/webhooks", Holders(WebhooksRead)),
    route("POST", "/v1/webhooks", Holders(WebhooksWrite)),
    route("GET", "/v1/webhooks/{id}", Holders(WebhooksRead)),
    route("PATCH", "/v1/webhooks/{id}", Holders(WebhooksWrite)),
    route("DELETE", "/v1/webhooks/{id}", Holders(WebhooksWrite)),
    route("GET", "/v1/webhooks/{id}/deliveries", Holders(WebhooksRead)),
    route("GET", "/v1/deliveries/{id}", Holders(WebhooksRead)),
    route("POST", "/v1/deliveries/{id}/redeliver", Holders(WebhooksWrite)),
    // workflows: the bank's own signature is looked at there
    route("POST", "/v1/callbacks/bank", Public),
];

const fn route(method: &'static str, path: &'static str, entrance: Entrance) -> Route {
    Route { method, path, entrance }
}

/// What the route with this path asks. A HEAD is a GET without its body.
pub(crate) fn entrance(method: &Method, path: &str) -> Option<Entrance> {
    let method = if method == Method::HEAD { "GET" } else { method.as_str() };
    ROUTES.iter().find(|route| route.method == method && route.path == path).map(|route| route.entrance)
}
