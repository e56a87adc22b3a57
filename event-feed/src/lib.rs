//! The road from the log to everyone who follows it.
//!
//! Between event-store and the consumers (projector, webhook-dispatcher, workflows). [`relay`] carries commits from
//! the log to JetStream; [`Follow`] gives a consumer every commit once, in order, from the bus while it is there and
//! from Postgres whenever it is not. The bus only makes it faster and cheaper: nothing is lost with it. [`inspect`] looks
//! at it from outside, for whoever wants to know what is wrong with it.
//!
//! Left out: what an event means, and the consumer's checkpoint, which is kept with the effects it belongs to.

mod beside;
mod bus;
mod follow;
mod inspect;
mod metrics;
mod obstacle;
pub mod relay;

pub use beside::Beside;
pub use bus::FeedSettings;
pub use event_store::{Commit, EventFilter, Head, Log, RecordedEvent, StoreError, pool_options, within};
pub use follow::{FeedError, Follow};
pub use inspect::{Inspection, JetStream, Stream, inspect};
pub use metrics::{show_lag, show_relay_lag};
pub use obstacle::Obstacle;
