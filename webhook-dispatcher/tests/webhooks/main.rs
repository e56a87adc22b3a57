//! What partners see of webhooks, over real sockets: receivers that behave and receivers that do not, on a real
//! ledger, Postgres and NATS.

mod outage;
mod receiver;
mod registering;
mod sending;
mod system;
