//! Traces as an operator's collector gets them: one transaction, from its request to the webhook, is one trace. And what
//! a collector cannot do: learn secrets, slow a command, or keep the process from ending.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::http::HeaderMap;
use axum::routing::post;
use futures::future::join_all;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use prost::Message;
use reqwest::{RequestBuilder, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::process::{DataDirectory, Daybook, answer, eventually};

const CLIENTS_SPAN: &str = "00f067aa0ba902b7";
const TRANSFER: &str = "/v1/transactions/transfer";

/// A `traceparent` as a client sends it, in the trace of this number.
fn traceparent(number: u8, flags: &str) -> String {
    format!("00-{}-{CLIENTS_SPAN}-{flags}", trace(number))
}

fn trace(number: u8) -> String {
    format!("4bf92f3577b34da6a3ce929d0e0e47{number:02x}")
}

/// A collector that takes everything, over OTLP.
#[derive(Clone, Default)]
struct Collector {
    url: String,
    requests: Arc<Mutex<Vec<(HeaderMap, ExportTraceServiceRequest)>>>,
}

impl Collector {
    async fn start() -> Self {
        let requests = Arc::new(Mutex::new(Vec::new()));
        let keep = requests.clone();
        let take = move |headers: HeaderMap, body: Bytes| {
            let keep = keep.clone();
            async move {
                assert_eq!(headers["content-type"], "application/x-protobuf");
                keep.lock().unwrap().push((headers, ExportTraceServiceRequest::decode(body).unwrap()));
            }
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, Router::new().route("/v1/traces", post(take))).await });
        Self { url, requests }
    }

    /// All spans of a trace, in the order of their beginnings.
    fn spans(&self, trace: &str) -> Vec<Seen> {
        let requests = self.requests.lock().unwrap();
        let resources = requests.iter().flat_map(|(_, request)| &request.resource_spans);
        let spans = resources.flat_map(|resource| &resource.scope_spans).flat_map(|scope| &scope.spans);
        let mut spans: Vec<_> = spans.map(Seen::of).filter(|span| span.trace == trace).collect();
        spans.sort_by_key(|span| span.begun);
        spans
    }

    /// Waits until the trace has so many spans of each of these names.
    async fn expect(&self, trace: &str, names: &[(&str, usize)]) -> Vec<Seen> {
        let all = |spans: &Vec<Seen>| {
            names.iter().all(|(name, count)| spans.iter().filter(|span| span.name == *name).count() == *count)
        };
        eventually("the trace has all its spans", || async { self.spans(trace) }, all).await
    }
}

#[derive(Clone, Debug)]
struct Seen {
    trace: String,
    id: String,
    parent: String,
    name: String,
    kind: SpanKind,
    begun: u64,
    ended: u64,
    attributes: BTreeMap<String, Value>,
    links: Vec<String>,
    failed: bool,
}

impl Seen {
    fn of(span: &Span) -> Self {
        let value = |value: Option<Any>| match value {
            Some(Any::StringValue(text)) => json!(text),
            Some(Any::IntValue(int)) => json!(int),
            other => panic!("an attribute of another kind: {other:?}"),
        };
        let attributes = span
            .attributes
            .iter()
            .map(|attribute| (attribute.key.clone(), value(attribute.value.clone().and_then(|value| value.value))));
        Self {
            trace: hex(&span.trace_id),
            id: hex(&span.span_id),
            parent: hex(&span.parent_span_id),
            name: span.name.clone(),
            kind: span.kind(),
            begun: span.start_time_unix_nano,
            ended: span.end_time_unix_nano,
            attributes: attributes.collect(),
            links: span.links.iter().map(|link| hex(&link.span_id)).collect(),
            failed: span.status.as_ref().is_some_and(|status| status.code == 2),
        }
    }

    fn traceparent(&self) -> String {
        format!("00-{}-{}-01", self.trace, self.id)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn one<'s>(spans: &'s [Seen], name: &str) -> &'s Seen {
    let mut found = spans.iter().filter(|span| span.name == name);
    let first = found.next().unwrap_or_else(|| panic!("no span {name}: {spans:#?}"));
    assert!(found.next().is_none(), "two spans {name}: {spans:#?}");
    first
}

/// A partner's endpoint, with a secret in its path; what came, and under which `traceparent`.
async fn receiver() -> (String, Arc<Mutex<Vec<(Value, Option<String>)>>>) {
    let received = Arc::new(Mutex::new(Vec::new()));
    let keep = received.clone();
    let receive = move |headers: HeaderMap, body: Bytes| {
        let traceparent = headers.get("traceparent").map(|value| value.to_str().unwrap().to_owned());
        keep.lock().unwrap().push((serde_json::from_slice(&body).unwrap(), traceparent));
        std::future::ready(())
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hooks/path-secret?token=query-secret", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, Router::new().route("/hooks/path-secret", post(receive))).await });
    (url, received)
}

/// With two wallets of the demo partner, the first with a million in it.
struct World {
    directory: DataDirectory,
    daybook: Daybook,
    partner: String,
    from: String,
    to: String,
}

impl World {
    async fn start(environment: &[(&str, &str)], options: &[&str]) -> Self {
        let directory = DataDirectory::new();
        let daybook = Daybook::start_within(environment, &directory, options).await;
        let partner = daybook.login("demoPartner").await;
        let (from, to) = (daybook.wallet("alice", "1000000.00").await, daybook.wallet("bob", "0").await);
        Self { directory, daybook, partner, from, to }
    }

    fn transfer(&self, key: &str, traceparent: Option<&str>) -> RequestBuilder {
        let body = json!({
            "fromWalletId": self.from, "toWalletId": self.to, "amount": "7.31", "currency": "EUR",
            "reference": "reference-of-a-client"
        });
        let transfer = self.daybook.post_with_key(&self.partner, TRANSFER, key, body);
        match traceparent {
            Some(traceparent) => transfer.header("traceparent", traceparent),
            None => transfer,
        }
    }

    /// Done; the `traceparent` of the answer, and the event with its metadata.
    async fn transferred(&self, key: &str, traceparent: Option<&str>) -> (Option<String>, Value) {
        let answer = self.transfer(key, traceparent).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::CREATED, "{traceparent:?}");
        let header = |name: &str| answer.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        let position: i64 = header("ledger-position").unwrap().parse().unwrap();
        (header("traceparent"), self.event(position).await)
    }

    async fn transferred_only(&self, key: &str, traceparent: &str) {
        let answer = self.transfer(key, Some(traceparent)).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::CREATED);
    }

    async fn event(&self, position: i64) -> Value {
        let admin = self.daybook.login("admin").await;
        let events = self.daybook.get(&admin, "/v1/events").query(&[("after", position - 1), ("limit", 1)]);
        answer(events, StatusCode::OK).await["data"][0].clone()
    }

    async fn webhook(&self, url: &str, events: &[&str]) -> String {
        let webhook = self.daybook.post(&self.partner, "/v1/webhooks", json!({"url": url, "events": events}));
        answer(webhook, StatusCode::CREATED).await["secret"].as_str().unwrap().to_owned()
    }
}

/// What the client says decides alone: nothing else is sampled.
const CLIENTS_CHOICE: (&str, &str) = ("OTEL_TRACES_SAMPLER_ARG", "0");
const SOON: (&str, &str) = ("OTEL_BSP_SCHEDULE_DELAY", "100");

#[tokio::test]
async fn one_transaction_is_one_trace_from_its_request_to_the_webhook() {
    let collector = Collector::start().await;
    let environment = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url.as_str()),
        ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20for-the-collector"),
        CLIENTS_CHOICE,
        SOON,
    ];
    let world = World::start(&environment, &["--allow-local-webhooks"]).await;
    let (url, received) = receiver().await;
    let secret = world.webhook(&url, &["transaction.completed"]).await;

    let sent = traceparent(1, "01");
    let (answered, event) = world.transferred("k1", Some(&sent)).await;
    let stages = ["queue", "decide", "append", "publish", "project", "fan-out", "deliver"];
    let served = format!("POST {TRANSFER}");
    let names: Vec<_> = stages.into_iter().chain([served.as_str()]).map(|name| (name, 1)).collect();
    let spans = collector.expect(&trace(1), &names).await;
    assert_eq!(spans.len(), names.len(), "{spans:#?}");

    let request = one(&spans, &served);
    assert_eq!((request.parent.as_str(), request.kind), (CLIENTS_SPAN, SpanKind::Server));
    assert_eq!(request.attributes["http.request.method"], "POST");
    assert_eq!(request.attributes["http.route"], TRANSFER);
    assert_eq!(request.attributes["http.response.status_code"], 201);
    assert_eq!(request.attributes["request.id"], event["metadata"]["requestId"]);
    assert!(!request.failed);
    assert_eq!(answered.as_deref(), Some(request.traceparent().as_str()), "the answer says where it belongs");
    assert_eq!(event["metadata"]["traceparent"], request.traceparent(), "and so does the log");

    let kinds = stages.map(|name| one(&spans, name).kind);
    let (inside, out) = (SpanKind::Internal, SpanKind::Client);
    let (publishes, takes) = (SpanKind::Producer, SpanKind::Consumer);
    assert_eq!(kinds, [inside, inside, inside, publishes, takes, takes, out]);
    for stage in stages.map(|name| one(&spans, name)) {
        assert_eq!(stage.parent, request.id, "{stage:#?}");
        assert!(request.begun <= stage.begun && stage.begun <= stage.ended && !stage.failed, "{stage:#?}");
    }
    let [queue, decide, append, publish, ..] = stages.map(|name| one(&spans, name));
    assert!(queue.ended <= decide.begun && decide.ended <= append.begun && append.ended <= request.ended);
    assert!(append.begun <= publish.begun);
    assert_eq!(append.attributes["daybook.commit"], event["commit"]);
    assert_eq!(append.attributes["daybook.commit.events"], 1);
    assert_eq!(publish.attributes["messaging.system"], "nats");
    assert_eq!(one(&spans, "fan-out").attributes["daybook.page.deliveries"], 1);

    let deliver = one(&spans, "deliver");
    assert_eq!(deliver.attributes["http.response.status_code"], 200);
    assert_eq!(deliver.attributes["server.address"], "127.0.0.1");
    assert_eq!(deliver.attributes["http.request.resend_count"], 0);
    assert_eq!(deliver.attributes["daybook.event.type"], "transaction.completed");
    let came = received.lock().unwrap().clone();
    assert_eq!(came[0].1.as_deref(), Some(deliver.traceparent().as_str()), "the receiver can go on with the trace");

    // Nothing but this was sampled, and nothing in it is anybody's secret.
    let requests = collector.requests.lock().unwrap().clone();
    assert!(requests.iter().all(|(headers, _)| headers["authorization"] == "Bearer for-the-collector"));
    let text = requests.iter().map(|(_, request)| format!("{request:?}")).collect::<String>();
    assert!(text.contains("\"service.name\"") && text.contains("\"daybook\""), "{text}");
    assert_eq!(text.matches("trace_id: ").count(), spans.len(), "{text}");
    let credentials = [&world.daybook.connection["demoPartner"], &world.daybook.connection["admin"]];
    let secrets = credentials.map(|who| who["clientSecret"].as_str().unwrap());
    let private = ["7.31", "1000000.00", "999992.69", "reference-of-a-client", "path-secret", "query-secret", "alice"];
    for kept in secrets.iter().chain(&[secret.as_str(), &world.partner, &world.from]).chain(&private) {
        assert!(!text.contains(kept), "{kept} is in the trace");
    }
    assert!(!world.directory.log().contains("for-the-collector"));
}

#[tokio::test]
async fn what_is_not_sampled_is_carried_along_and_what_is_no_traceparent_is_ignored() {
    let collector = Collector::start().await;
    let environment = [("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url.as_str()), CLIENTS_CHOICE, SOON];
    let world = World::start(&environment, &["--allow-local-webhooks"]).await;
    let (url, received) = receiver().await;
    world.webhook(&url, &["transaction.completed"]).await;

    let (answered, event) = world.transferred("without", None).await;
    assert_eq!((answered, &event["metadata"]["traceparent"]), (None, &Value::Null));
    let unsampled = traceparent(2, "00");
    let (answered, event) = world.transferred("unsampled", Some(&unsampled)).await;
    assert_eq!((answered.as_deref(), &event["metadata"]["traceparent"]), (Some(unsampled.as_str()), &json!(unsampled)));
    let good = traceparent(3, "01");
    let bad = [
        "".to_owned(),
        "00".to_owned(),
        "<script>".to_owned(),
        good[..54].to_owned(),
        format!("{good}-more"),
        good.to_uppercase(),
        good.replacen("00", "ff", 1),
        good.replace(&trace(3), &"0".repeat(32)),
        good.replace(CLIENTS_SPAN, &"0".repeat(16)),
        format!("{good},{good}"),
    ];
    for (number, bad) in bad.iter().enumerate() {
        let (answered, event) = world.transferred(&format!("bad-{number}"), Some(bad)).await;
        assert_eq!((answered, &event["metadata"]["traceparent"]), (None, &Value::Null), "{bad}");
    }
    let twice = world.transfer("twice", Some(&good)).header("traceparent", &good).send().await.unwrap();
    assert_eq!((twice.status(), twice.headers().get("traceparent")), (StatusCode::CREATED, None));
    // A later version is read as far as it is known, and answered in ours.
    let (answered, _) =
        world.transferred("later", Some(&format!("{}-more", traceparent(4, "01").replacen("00", "01", 1)))).await;
    assert!(answered.unwrap().starts_with(&format!("00-{}-", trace(4))));

    collector.expect(&trace(4), &[("deliver", 1)]).await;
    let all = 4 + bad.len(); // by then the deliveries before it have come too
    let came =
        eventually("all are told", || async { received.lock().unwrap().clone() }, |came| came.len() == all).await;
    let traces: Vec<_> = came.iter().filter_map(|(_, traceparent)| traceparent.as_deref()).collect();
    assert_eq!(traces.len(), 2, "{traces:?}");
    assert!(traces.contains(&unsampled.as_str()), "{traces:?}");
    assert_eq!((collector.spans(&trace(2)).len(), collector.spans(&trace(3)).len()), (0, 0));
}

#[tokio::test]
async fn a_top_up_is_one_trace_through_the_bank_and_back_into_the_ledger() {
    let collector = Collector::start().await;
    let environment = [("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url.as_str()), CLIENTS_CHOICE, SOON];
    let world = World::start(&environment, &[]).await;
    let body = json!({"walletId": world.to, "amount": "10.00", "currency": "EUR"});
    let asked = world.daybook.post_with_key(&world.partner, "/v1/transactions/top-up", "k", body);
    let asked = answer(asked.header("traceparent", traceparent(1, "01")), StatusCode::ACCEPTED).await;
    world.daybook.simulate(json!({"token": asked["token"], "outcome": "success"})).await;

    let (ask, settle) = ("POST /v1/transactions/top-up", "POST /v1/transactions/{id}/settle");
    let at_bank = "POST /bank/payments";
    let expected = [(ask, 1), ("register", 1), (at_bank, 1), ("settle", 1), (settle, 1), ("append", 2), ("project", 2)];
    let spans = collector.expect(&trace(1), &expected).await;
    let parent = |name: &str| one(&spans, name).parent.clone();
    let id = |name: &str| one(&spans, name).id.clone();
    assert_eq!(parent(ask), CLIENTS_SPAN);
    assert_eq!([parent("register"), parent("settle")], [id(ask), id(ask)]);
    assert_eq!((parent(at_bank), parent(settle)), (id("register"), id("settle")));
    for stage in ["append", "project"] {
        let parents: BTreeSet<_> =
            spans.iter().filter(|span| span.name == stage).map(|span| span.parent.clone()).collect();
        assert_eq!(parents, BTreeSet::from([id(ask), id(settle)]), "{stage}: {spans:#?}");
    }
    assert_eq!(one(&spans, "settle").attributes["daybook.transaction.id"], asked["id"]);
}

#[tokio::test]
async fn commands_that_share_an_append_are_linked_and_a_batch_is_one_command() {
    let collector = Collector::start().await;
    let environment = [("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url.as_str()), CLIENTS_CHOICE, SOON];
    let world = World::start(&environment, &[]).await;
    let transfer = json!({"fromWalletId": world.from, "toWalletId": world.to, "amount": "0.01", "currency": "EUR"});
    let body = json!({"atomic": true, "transactions": [transfer, transfer, transfer]});
    let batch = world.daybook.post_with_key(&world.partner, "/v1/transactions/batch", "batch", body);
    answer(batch.header("traceparent", traceparent(0, "01")), StatusCode::CREATED).await;
    let spans = collector.expect(&trace(0), &[("append", 1), ("publish", 1), ("project", 1)]).await;
    assert_eq!(one(&spans, "append").attributes["daybook.commit.events"], 3);

    let sent: Vec<_> = (1..=40).map(|number| (number, traceparent(number, "01"))).collect();
    join_all(sent.iter().map(async |(number, sent)| world.transferred_only(&format!("k{number}"), sent).await)).await;
    let mut commits = BTreeMap::<i64, Vec<Seen>>::new();
    for number in 1..=40 {
        let spans = collector.expect(&trace(number), &[("append", 1), ("publish", 1), ("project", 1)]).await;
        let append = one(&spans, "append");
        commits.entry(append.attributes["daybook.commit"].as_i64().unwrap()).or_default().push(append.clone());
    }
    eprintln!("40 transfers in {} commits", commits.len());
    assert!(commits.len() < 40, "no two came together: the claim was not put to the test");
    for appends in commits.values() {
        // One span has all the others' parents; each other one has that one.
        let whole: Vec<_> = appends.iter().filter(|append| append.links.len() + 1 == appends.len()).collect();
        let told = |whole: &&&Seen| {
            appends
                .iter()
                .filter(|append| append.id != whole.id)
                .all(|other| whole.links.contains(&other.parent) && other.links == [whole.id.as_str()])
        };
        assert!(whole.iter().any(|whole| told(&whole)), "{appends:#?}");
    }
}

#[tokio::test]
async fn when_traces_are_off_nothing_is_exported_or_added_and_what_came_is_carried_along() {
    let collector = Collector::start().await;
    let off = [("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url.as_str()), ("OTEL_SDK_DISABLED", "true"), SOON];
    let world = World::start(&off, &["--allow-local-webhooks"]).await;
    let (url, received) = receiver().await;
    world.webhook(&url, &["transaction.completed"]).await;
    let sent = traceparent(1, "01");
    let (answered, event) = world.transferred("with", Some(&sent)).await;
    assert_eq!((answered.as_deref(), &event["metadata"]["traceparent"]), (Some(sent.as_str()), &json!(sent)));
    let (answered, event) = world.transferred("without", None).await;
    let metadata: Vec<_> = event["metadata"].as_object().unwrap().keys().cloned().collect();
    assert_eq!((answered, metadata), (None, vec!["clientId".to_owned(), "requestId".to_owned()]));
    let came = || async { received.lock().unwrap().iter().map(|(_, trace)| trace.clone()).collect::<Vec<_>>() };
    let both = |traces: &Vec<_>| traces.len() == 2 && traces.contains(&Some(sent.clone())) && traces.contains(&None);
    eventually("both are told, the first in the trace that its client named", came, both).await;
    assert!(world.daybook.terminate().await.success());
    assert_eq!(collector.requests.lock().unwrap().len(), 0);
}

#[tokio::test]
async fn a_collector_that_hangs_or_refuses_slows_nothing_and_is_told_of_once() {
    let hanging = std::net::TcpListener::bind("127.0.0.1:0").unwrap(); // the kernel connects, nobody reads
    let hanging = (hanging.local_addr().unwrap(), Some(hanging));
    let refusing = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap(); // and is closed again
    for (address, _kept) in [hanging, (refusing, None)] {
        let endpoint = format!("http://{address}");
        let environment = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
            ("OTEL_TRACES_SAMPLER", "always_on"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "16"),
            ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "2000"),
            SOON,
        ];
        let world = World::start(&environment, &[]).await;
        let warnings = || world.directory.log().matches("spans do not reach the collector").count();
        let begun = Instant::now();
        let mut slowest = Duration::ZERO;
        let mut transfers = 0;
        // Far beyond what the queue holds, and for longer than three exports take to fail.
        while transfers < 30 || warnings() == 0 || begun.elapsed() < Duration::from_secs(7) {
            let asked = Instant::now();
            world.transferred_only(&format!("k{transfers}"), &traceparent(1, "01")).await;
            slowest = slowest.max(asked.elapsed());
            transfers += 1;
            assert!(begun.elapsed() < Duration::from_secs(60), "{}", world.directory.log());
        }
        eprintln!("{endpoint}: {transfers} transfers, the slowest took {slowest:?}");
        assert!(slowest < Duration::from_secs(2), "a command waited for the collector: {slowest:?}");
        assert_eq!(warnings(), 1, "{}", world.directory.log());
        let asked = Instant::now();
        let World { directory, daybook, .. } = world;
        let status = daybook.terminate().await; // which allows it 20 s
        assert!(status.success(), "{status}\n{}", directory.log());
        eprintln!("{endpoint}: the end took {:?}", asked.elapsed());
    }
}
