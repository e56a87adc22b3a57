//! NATS: whether JetStream is there with room for our stream, and whether the stream is this ledger's, as the relay made
//! it, and where the log is.
//!
//! Nothing here is ever `wrong` for the money: the bus only makes followers quicker. It is wrong when the relay cannot
//! work with it.

use event_feed::{FeedSettings, Inspection, Log, Stream, inspect};
use event_store::{Reader, hash};

use super::{Finding, Findings, is_local, without_password};

/// Older servers lack what the relay's fence needs.
const VERSION_MIN: (u32, u32) = (2, 9);

/// A relay at work is less behind than so many commits.
const BEHIND: i64 = 1_000;

pub(super) async fn look(nats_url: String, database_url: Option<String>) -> anyhow::Result<Findings> {
    // Without the log nobody knows which stream is its.
    let log = match &database_url {
        Some(url) => event_store::connect(url, "daybook_reader", 1).await.ok().map(Log::new),
        None => None,
    };
    let settings = match &log {
        Some(log) => FeedSettings::of(log, Some(nats_url.clone())).await.ok(),
        None => None,
    };
    let known = settings.is_some();
    let settings = settings.unwrap_or_else(|| FeedSettings {
        nats_url: Some(nats_url.clone()),
        stream: "daybook-unknown".to_owned(),
        beside: None,
    });
    let shown = without_password(&nats_url);
    let bus = match inspect(&settings).await {
        Ok(bus) => bus,
        Err(error) => {
            return Ok(vec![Finding::wrong(
                "reachable",
                format!("{shown} cannot be used: {error}"),
                "Start nats-server, or correct its address and password; meanwhile followers read Postgres, and nothing is lost.",
            )]);
        }
    };
    let mut findings = server(&bus, &nats_url, &shown);
    match (&log, &bus.stream) {
        (Some(log), Ok(Some(stream))) if known => findings.extend(judge(log, &settings.stream, stream).await?),
        (Some(_), Ok(None)) if known => findings.push(Finding::warning(
            "stream",
            format!("there is no {}", settings.stream),
            "Start the relay: it makes the stream, and followers read Postgres until then.",
        )),
        (_, Err(error)) if known => findings.push(Finding::unknown(
            "stream",
            error.as_str(),
            "See what nats-server logs; nats.conf says which users may look at the stream.",
        )),
        _ => findings.push(Finding::not_looked_at("stream", "without its database nobody knows the ledger's id")),
    }
    findings.push(match &bus.others {
        Ok(others) if others.is_empty() || !known => Finding::ok("other-ledgers", "none on this server"),
        Ok(others) => Finding::warning(
            "other-ledgers",
            format!("streams of other ledgers lie here: {}", others.join(", ")),
            "Delete what belongs to ledgers that are gone: each keeps up to 32 MiB of the account's storage.",
        ),
        Err(error) => Finding::not_looked_at("other-ledgers", error),
    });
    Ok(findings)
}

fn server(bus: &Inspection, nats_url: &str, shown: &str) -> Findings {
    let mut findings = vec![Finding::ok("reachable", shown)];
    let mut numbers = bus.server_version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    findings.push(if version < VERSION_MIN {
        Finding::wrong("version", format!("nats-server {}", bus.server_version), "Use nats-server 2.9 or later.")
    } else if version == VERSION_MIN {
        Finding::ok(
            "version",
            format!(
                "nats-server {}: enough; it has no sync_interval, and loses the last seconds in a power cut",
                bus.server_version
            ),
        )
    } else {
        Finding::ok("version", format!("nats-server {}", bus.server_version))
    });
    if !is_local(nats_url) && !nats_url.starts_with("tls:") {
        findings.push(Finding::warning(
            "tls",
            "the password and every event pass the network in clear",
            "Give the server a `tls` block, and write the address with tls://.",
        ));
    }
    if bus.payload_max < bus.payload_wanted {
        findings.push(Finding::warning(
            "max_payload",
            format!("{} bytes, of {} that the relay would use", bus.payload_max, bus.payload_wanted),
            "Raise max_payload: longer commits travel without their events, and followers read those in Postgres.",
        ));
    }
    findings.push(match &bus.jetstream {
        Err(error) if error.contains("no responders") || error.contains("not enabled") => Finding::wrong(
            "jetstream",
            format!("it is not enabled for this user's account: {error}"),
            "Add a `jetstream` block to the server's configuration, and `jetstream: enabled` to the account.",
        ),
        // No user of nats.conf may ask: none of them needs to know, and nothing is wrong for that.
        Err(error) => Finding::not_looked_at("jetstream", error),
        Ok(jetstream) => {
            const STREAM: i64 = 32 * 1024 * 1024;
            let limit = match jetstream.bytes_max {
                ..0 => "no limit".to_owned(),
                bytes => format!("{bytes} bytes"),
            };
            let found = format!("{} streams with {} bytes of {limit}", jetstream.streams, jetstream.bytes);
            let full =
                0 <= jetstream.bytes_max && jetstream.bytes_max - jetstream.bytes < STREAM && jetstream.streams == 0
                    || (0..STREAM).contains(&jetstream.bytes_max)
                    || (0 <= jetstream.bytes_max && jetstream.bytes_max <= jetstream.bytes);
            if full {
                Finding::warning("jetstream", found, "Raise max_file_store: the ledger's stream wants 32 MiB.")
            } else {
                Finding::ok("jetstream", found)
            }
        }
    });
    findings
}

async fn judge(log: &Log, name: &str, stream: &Stream) -> anyhow::Result<Findings> {
    const CHECK: &str = "stream";
    const ANEW: &str = "Restart the relay, which makes such a stream anew from the log's head; followers miss nothing.";
    if let Some(field) = stream.difference {
        return Ok(vec![Finding::wrong(CHECK, format!("the {field} of {name} is not what the relay asks for"), ANEW)]);
    }
    let Some(relayed) = stream.relayed else {
        return Ok(vec![Finding::wrong(CHECK, format!("{name} does not say which commits it holds"), ANEW)]);
    };
    // The head after the stream: it is never behind what was relayed.
    let head = log.head().await?;
    if head.commit < relayed {
        return Ok(vec![Finding::wrong(
            CHECK,
            format!("{name} is at commit {relayed}, the log at {}: it is of another history", head.commit),
            ANEW,
        )]);
    }
    if let Some((number, chain)) = stream.last {
        let in_log = Reader::beside(log).chain_of(number).await?;
        if in_log != Some(chain) {
            return Ok(vec![Finding::wrong(
                CHECK,
                format!("{name} holds another commit {number} than the log, with chain {}…", &hash::hex(&chain)[..16]),
                ANEW,
            )]);
        }
    }
    let found = format!(
        "{name} is {} commits behind the log; it holds {} messages of {} bytes for {} followers",
        head.commit - relayed,
        stream.messages,
        stream.bytes,
        stream.consumers
    );
    Ok(vec![if BEHIND < head.commit - relayed {
        Finding::warning(CHECK, found, "See that the relay runs; followers read Postgres meanwhile.")
    } else {
        Finding::ok(CHECK, found)
    }])
}
