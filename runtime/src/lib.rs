//! What every service stands on: starting, serving HTTP within limits, and stopping.
//!
//! A service's `main` reads its options, calls [`telemetry::init`], binds a listener, builds its
//! router and hands all of it to [`http::serve`] together with [`shutdown::signal`]. This crate
//! knows nothing of ledgers: no word of the business appears in it, so nothing here changes when
//! the business does.

pub mod health;
pub mod http;
pub mod metrics;
pub mod otlp;
pub mod request_id;
pub mod shutdown;
pub mod telemetry;
pub mod trace;

mod body;
mod door;
mod refusal;
mod socket;
