//! A look at the bus from outside: for whoever wants to know what is wrong with it. Nothing is changed, nothing repaired.
//!
//! The relay sees the same and acts on it (`relay.rs`); this only tells. Each part has its own answer, since a user of the
//! bus may see one and not the other.
//!
//! Left out: judging. Whether a stream stands where the log does is for whoever can read both.

use async_nats::Client;
use event_store::hash::Hash;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::FeedSettings;
use crate::bus;

/// What the bus says of itself.
#[derive(Debug)]
pub struct Inspection {
    pub server_version: String,
    /// The longest message it takes, in bytes.
    pub payload_max: usize,
    /// The longest body that the relay would like to send.
    pub payload_wanted: usize,
    pub jetstream: Result<JetStream, String>,
    /// The ledger's stream, if there is one.
    pub stream: Result<Option<Stream>, String>,
    /// Streams of other ledgers, by name.
    pub others: Result<Vec<String>, String>,
}

/// JetStream of our account. A limit below zero is none.
#[derive(Debug)]
pub struct JetStream {
    pub bytes: i64,
    pub bytes_max: i64,
    pub streams: i64,
    pub streams_max: i64,
}

/// The stream as it is.
#[derive(Debug)]
pub struct Stream {
    /// What the relay would not have made so; it makes such a stream anew.
    pub difference: Option<&'static str>,
    /// The last commit that is, or was, in it; none if the stream does not say.
    pub relayed: Option<i64>,
    pub messages: u64,
    pub bytes: u64,
    pub bytes_max: i64,
    pub consumers: usize,
    /// The last message's commit, by its own number and chain; none if there is none, or it cannot be read.
    pub last: Option<(i64, Hash)>,
}

/// Looks at the bus that the settings name. `Err`: it cannot be reached.
pub async fn inspect(settings: &FeedSettings) -> Result<Inspection, String> {
    let url = settings.nats_url.as_deref().ok_or("no bus is named")?;
    let connecting = timeout(bus::PATIENCE * 2, bus::connect(url, "daybook doctor")).await;
    let bus = connecting.map_err(|_| "no answer in time".to_owned())?.map_err(|error| chain(error.as_ref()))?;
    let client = bus.jetstream.client();
    let server = client.server_info();
    let (jetstream, stream, others) =
        tokio::join!(account(&client), stream(&bus, &settings.stream), others(&client, &settings.stream));
    Ok(Inspection {
        server_version: server.version,
        payload_max: server.max_payload,
        payload_wanted: bus::MESSAGE_BYTES_MAX + bus::HEADERS_BYTES_MAX,
        jetstream,
        stream,
        others,
    })
}

async fn account(client: &Client) -> Result<JetStream, String> {
    let info = ask(client, "$JS.API.INFO", &Value::Null).await?;
    let number = |path: &str| info.pointer(path).and_then(Value::as_i64);
    Ok(JetStream {
        bytes: number("/storage").unwrap_or(0),
        bytes_max: number("/limits/max_storage").unwrap_or(-1),
        streams: number("/streams").unwrap_or(0),
        streams_max: number("/limits/max_streams").unwrap_or(-1),
    })
}

async fn stream(bus: &bus::Connection, name: &str) -> Result<Option<Stream>, String> {
    let found = match timeout(bus::PATIENCE, bus.jetstream.get_stream(name)).await {
        Err(_) => return Err("no answer in time".to_owned()),
        Ok(Err(error)) if crate::relay::is_absent(&error.kind()) => return Ok(None),
        Ok(Err(error)) => return Err(chain(&error)),
        Ok(Ok(found)) => found,
    };
    let info = found.cached_info();
    let base = bus::base(&info.config);
    let last_sequence = info.state.last_sequence;
    let last = match timeout(bus::PATIENCE, found.get_raw_message(last_sequence)).await {
        Ok(Ok(message)) if 0 < info.state.messages => bus::read(&message.payload).ok(),
        _ => None,
    };
    Ok(Some(Stream {
        difference: bus::difference(&bus::config(name, base.unwrap_or(0)), &info.config),
        relayed: base.map(|base| base.saturating_add(i64::try_from(last_sequence).unwrap_or(i64::MAX))),
        messages: info.state.messages,
        bytes: info.state.bytes,
        bytes_max: info.config.max_bytes,
        consumers: info.state.consumer_count,
        last: last.map(|commit| (commit.number, commit.chain)),
    }))
}

/// The first page is enough to tell that there are some.
async fn others(client: &Client, ours: &str) -> Result<Vec<String>, String> {
    let names = ask(client, "$JS.API.STREAM.NAMES", &json!({"offset": 0})).await?;
    let names = names["streams"].as_array().into_iter().flatten().filter_map(Value::as_str);
    Ok(names.filter(|name| name.starts_with("daybook-") && *name != ours).map(str::to_owned).collect())
}

/// In the protocol's own words: async-nats expects fields that servers before 2.10 do not send.
async fn ask(client: &Client, subject: &'static str, question: &Value) -> Result<Value, String> {
    let question = if question.is_null() { String::new() } else { question.to_string() };
    let answer = timeout(bus::PATIENCE, client.request(subject, question.into())).await;
    let answer = answer.map_err(|_| "no answer in time".to_owned())?.map_err(|error| chain(&error))?;
    let answer: Value = serde_json::from_slice(&answer.payload).map_err(|error| error.to_string())?;
    match answer.get("error") {
        Some(error) => Err(format!("{subject} is refused: {error}")),
        None => Ok(answer),
    }
}

/// An error with its causes.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
