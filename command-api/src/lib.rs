//! The way in: HTTP becomes commands, and what the ledger says becomes answers.
//!
//! Fifth room on the road. A handler takes a request apart, asks `ledger-engine` and answers from the receipt
//! alone, so a repetition is answered byte for byte like the first call. What is wrong in form is refused here,
//! before anything is written; what only the book can know is the ledger's to refuse.
//!
//! Left out: views (projector), the bus (event-feed): a command can neither depend on something that lags nor
//! half succeed because a broker is away. Reading tokens, keys and bodies strictly is api-contract's.

mod answer;
mod auth;
mod batch;
mod call;
mod credentials;
mod docs;
mod openapi;
mod partners;
mod transactions;
mod wallets;

use std::sync::Arc;
use std::time::Duration;

use api_contract::Access;
use axum::Router;
use axum::extract::FromRef;
use ledger_engine::Ledger;
use runtime::health::Health;
use runtime::http::Limits;
use runtime::shutdown::Shutdown;
use tokio::net::TcpListener;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub use docs::docs;
pub use openapi::{complete, openapi};

/// What the commands must be told and cannot find out.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where the bank's payment pages are, without a slash at the end: `https://bank.example`.
    pub bank_url: String,
}

/// What every handler works with. Cloning it is cheap: it happens several times for each request.
#[derive(Clone)]
pub struct Commands(Arc<Shared>);

struct Shared {
    ledger: Ledger,
    access: Access,
    settings: Arc<Settings>,
}

impl Commands {
    /// Also keeps the clients in step with the log, for as long as there is a clone of it.
    pub fn new(ledger: Ledger, access: Access, settings: Settings) -> Self {
        let settings = Arc::new(settings);
        let following = credentials::keep_following(ledger.log().clone(), access.clone(), Arc::downgrade(&settings));
        tokio::spawn(following);
        Self(Arc::new(Shared { ledger, access, settings }))
    }

    /// Adds what must hold for commands to be executed: a running engine and a reachable database. Not NATS.
    #[must_use]
    pub fn health(&self, health: Health) -> Health {
        let (ledger, access) = (self.0.ledger.clone(), self.0.access.clone());
        health
            .check("ledger-engine", CHECK_TIME, move || {
                let running = ledger.is_running();
                async move { if running { Ok(()) } else { Err("the engine has stopped") } }
            })
            .check("database", CHECK_TIME, move || {
                let access = access.clone();
                async move { access.ping().await }
            })
    }
}

/// The routes of this service, without [`api_contract::layer`], which goes around all routes of a process.
pub fn routes(state: Commands) -> Router {
    described().split_for_parts().0.with_state(state)
}

/// Serves until the shutdown, then lets the engine finish what it has taken on.
pub async fn run(listener: TcpListener, state: Commands, shutdown: Shutdown) -> anyhow::Result<()> {
    let router = routes(state.clone())
        .merge(docs(openapi()))
        .merge(api_contract::problem_pages())
        .merge(state.health(Health::new()).router());
    let limits = Limits { always: ALWAYS, ..Limits::default() };
    let served = runtime::http::serve(listener, api_contract::layer(router), limits, shutdown).await;
    state.0.ledger.stop(STOP_TIME).await;
    Ok(served?)
}

/// Paths that get through while everything is busy moving money: who logs in or out is not asking for that, and an
/// operator must be able to stop a partner who keeps it busy.
pub const ALWAYS: &[&str] = &["/v1/auth/", "/v1/partners"];

const CHECK_TIME: Duration = Duration::from_secs(2);

/// For what the engine still has when the last connection is gone.
const STOP_TIME: Duration = Duration::from_secs(5);

/// The routes together with their descriptions: neither can be added without the other.
fn described() -> OpenApiRouter<Commands> {
    OpenApiRouter::with_openapi(openapi::opening())
        .routes(routes!(auth::token))
        .routes(routes!(auth::refresh))
        .routes(routes!(auth::logout))
        .routes(routes!(auth::keys))
        .routes(routes!(partners::register))
        .routes(routes!(partners::rotate_secret))
        .routes(routes!(partners::suspend))
        .routes(routes!(partners::resume))
        .routes(routes!(wallets::open))
        .routes(routes!(wallets::freeze))
        .routes(routes!(wallets::unfreeze))
        .routes(routes!(wallets::close))
        .routes(routes!(transactions::transfer))
        .routes(routes!(batch::batch))
        .routes(routes!(transactions::adjustment))
        .routes(routes!(transactions::top_up))
        .routes(routes!(transactions::settle))
        .routes(routes!(transactions::fail))
        .routes(routes!(transactions::expire))
}

impl FromRef<Commands> for Access {
    fn from_ref(state: &Commands) -> Self {
        state.0.access.clone()
    }
}
