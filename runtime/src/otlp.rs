//! The way of spans to a collector: OTLP over HTTP, in batches, from a thread of its own.
//!
//! Asked for by the environment variables that OpenTelemetry has for it, so that one set of them serves all programs of
//! an installation; `docs/tracing.md` lists those that count here.
//!
//! # What it must not do
//! Slow anything down. A span that ends goes into a bounded queue or is dropped and counted; the thread that empties the
//! queue shares nothing with the service but that. A collector that is slow, absent or wrong costs spans, one warning a
//! minute, and at the end of the process a second.

use std::env;
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use axum::http::{Request, Response, Uri};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use opentelemetry::trace::TracerProvider;
use opentelemetry::{Key, KeyValue};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracerProvider, Span, SpanData, SpanProcessor,
};
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

use crate::trace;

/// Of the traces that begin here, unless `OTEL_TRACES_SAMPLER` or its argument says otherwise.
const RATIO: f64 = 0.01;

/// At the end of the process, for what is still queued.
const STOPPING: Duration = Duration::from_secs(1);

/// Between two warnings that spans do not arrive.
const WARNING: Duration = Duration::from_secs(60);

/// Spans that wait; one more is dropped.
const QUEUE: usize = 2_048;

/// Spans of one call, unless the environment says otherwise; and between two calls, if they are not so many.
const BATCH: usize = 512;
const DELAY: Duration = Duration::from_secs(5);

/// For one call, unless the environment says otherwise.
const CALL: Duration = Duration::from_secs(10);

/// No collector has that much to say.
const ANSWER_MAX: usize = 64 * 1024;

static PROVIDER: OnceLock<SdkTracerProvider> = OnceLock::new();

/// What an environment asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// No traces. Holds the reason.
    Off(String),
    /// Traces in a way that is not spoken here, so there are none. Holds what is wrong.
    Wrong(String),
    /// Traces, sent to the collector at this address, which may have secrets in it.
    At(String),
}

/// What the environment of this process asks for. A service that is started in it does that.
pub fn wanted() -> Wanted {
    wanted_by(set)
}

fn wanted_by(set: impl Fn(&str) -> Option<String>) -> Wanted {
    let first = |names: [&'static str; 2]| names.into_iter().find_map(|name| Some((name, set(name)?)));
    if set("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
        return Wanted::Off("OTEL_SDK_DISABLED is true".to_owned());
    }
    if let Some(exporter) = set("OTEL_TRACES_EXPORTER").filter(|exporter| exporter != "otlp") {
        return Wanted::Off(format!("OTEL_TRACES_EXPORTER is {exporter}"));
    }
    let endpoint = first(["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"]);
    let Some((name, endpoint)) = endpoint else {
        return Wanted::Off("OTEL_EXPORTER_OTLP_ENDPOINT is not set".to_owned());
    };
    let url = endpoint.parse::<Uri>().ok();
    if !matches!(url.as_ref().and_then(Uri::scheme_str), Some("http" | "https")) {
        return Wanted::Wrong(format!("{name} is not an http or https URL")); // which it is may be a secret
    }
    let protocol = first(["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"]);
    if let Some((name, protocol)) = protocol.filter(|(_, protocol)| protocol != "http/protobuf") {
        return Wanted::Wrong(format!("{name} is {protocol}, and the one protocol spoken here is http/protobuf"));
    }
    Wanted::At(endpoint)
}

/// Turns traces on if the environment asks for them. What it says wrongly is warned about and never a reason not to
/// start.
pub(crate) fn start(service: &str) {
    if PROVIDER.get().is_some() {
        return;
    }
    match wanted() {
        Wanted::Off(_) => return,
        Wanted::Wrong(why) => {
            tracing::warn!("no traces: {why}");
            return;
        }
        Wanted::At(_) => {} // the exporter reads for itself where that is
    }
    let exporter = SpanExporter::builder().with_http().with_protocol(Protocol::HttpBinary);
    let exporter = match exporter.with_http_client(Collector::new()).build() {
        Ok(exporter) => exporter,
        Err(error) => {
            tracing::warn!(%error, "no traces: the collector's settings cannot be used");
            return;
        }
    };
    let tally = Arc::new(Tally::new());
    // It would read these itself, say nothing of what it cannot read, and take a zero.
    let config = BatchConfigBuilder::default()
        .with_max_queue_size(tally.queue_max)
        .with_max_export_batch_size(number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE").unwrap_or(BATCH))
        .with_scheduled_delay(number("OTEL_BSP_SCHEDULE_DELAY").map_or(DELAY, Duration::from_millis))
        .build();
    let exporter = Counted { inner: exporter, tally: tally.clone() };
    let inner = BatchSpanProcessor::builder(exporter).with_batch_config(config).build();
    let sampler = sampler(set("OTEL_TRACES_SAMPLER").as_deref(), set(ARGUMENT).as_deref());
    tracing::info!(sampler = ?sampler, "traces are exported");
    let provider = SdkTracerProvider::builder()
        .with_sampler(sampler)
        .with_resource(resource(service))
        .with_span_processor(Gate { inner, tally })
        .build();
    let tracer = provider.tracer(service.to_owned());
    opentelemetry::global::set_tracer_provider(provider.clone()); // for rooms that must not know this one
    PROVIDER.set(provider).ok();
    trace::turn_on(tracer);
}

/// Sends what is queued, within [`STOPPING`]. Spans that end after it are lost.
pub(crate) fn stop() {
    if let Some(provider) = PROVIDER.get()
        && let Err(error) = provider.shutdown_with_timeout(STOPPING)
    {
        tracing::debug!(%error, "the last spans did not arrive");
    }
}

/// A variable's value; an empty one counts as none, as OpenTelemetry has it.
fn set(name: &str) -> Option<String> {
    env::var(name).ok().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
}

/// A variable's number. None of them may be zero: no span would have room, no call would have time, and a thread that
/// does not pause would take a core.
fn number<T: FromStr + Default + PartialOrd>(name: &str) -> Option<T> {
    usable(name, &set(name)?, |number| T::default() < *number)
}

/// The number that a variable should hold. Another value is warned about.
fn usable<T: FromStr>(name: &str, value: &str, fits: impl Fn(&T) -> bool) -> Option<T> {
    let number = value.parse::<T>().ok().filter(fits);
    if number.is_none() {
        tracing::warn!(name, value, "this is not the number that it should be; the default is used");
    }
    number
}

/// Of the sampler.
const ARGUMENT: &str = "OTEL_TRACES_SAMPLER_ARG";

fn sampler(name: Option<&str>, argument: Option<&str>) -> Sampler {
    // An argument that is no ratio never means all: who writes 10 wants ten in a hundred.
    let ratio = |argument| usable(ARGUMENT, argument, |ratio: &f64| (0.0..=1.0).contains(ratio)).unwrap_or(RATIO);
    let by_ratio = |without: f64| Sampler::TraceIdRatioBased(argument.map_or(without, ratio));
    let below_parent = |sampler| Sampler::ParentBased(Box::new(sampler));
    match name {
        None => below_parent(by_ratio(RATIO)),
        Some("always_on") => Sampler::AlwaysOn,
        Some("always_off") => Sampler::AlwaysOff,
        Some("traceidratio") => by_ratio(1.0), // as OpenTelemetry has it
        Some("parentbased_always_on") => below_parent(Sampler::AlwaysOn),
        Some("parentbased_always_off") => below_parent(Sampler::AlwaysOff),
        Some("parentbased_traceidratio") => below_parent(by_ratio(1.0)),
        Some(other) => {
            tracing::warn!(sampler = other, ratio = RATIO, "this sampler is not known here; the default is used");
            below_parent(Sampler::TraceIdRatioBased(RATIO))
        }
    }
}

/// Who we are: by `OTEL_SERVICE_NAME` or `OTEL_RESOURCE_ATTRIBUTES`, else by our own name.
fn resource(service: &str) -> Resource {
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let found = Resource::builder().build();
    let name = found.get(&Key::from_static_str("service.name")).map(|name| name.to_string());
    let named = name.is_some_and(|name| !name.starts_with("unknown_service"));
    let resource = Resource::builder().with_attribute(version);
    if named { resource.build() } else { resource.with_service_name(service.to_owned()).build() }
}

/// What became of spans, for the warning.
#[derive(Debug)]
struct Tally {
    queue_max: usize,
    queued: AtomicUsize,
    /// Since the last warning: for want of room in the queue, and because they were not taken.
    dropped: AtomicU64,
    failed: AtomicU64,
    warned: Mutex<Option<Instant>>,
}

impl Tally {
    fn new() -> Self {
        Self {
            queue_max: number("OTEL_BSP_MAX_QUEUE_SIZE").unwrap_or(QUEUE),
            queued: AtomicUsize::new(0),
            dropped: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            warned: Mutex::new(None),
        }
    }

    fn enter(&self) -> bool {
        let room = |queued: usize| (queued < self.queue_max).then_some(queued + 1);
        let entered = self.queued.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room).is_ok();
        if !entered {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        entered
    }

    fn left(&self, spans: usize, exported: &OTelSdkResult) {
        self.queued.fetch_sub(spans, Ordering::Relaxed);
        if exported.is_err() {
            self.failed.fetch_add(u64::try_from(spans).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
        let (dropped, failed) = (self.dropped.load(Ordering::Relaxed), self.failed.load(Ordering::Relaxed));
        if dropped == 0 && failed == 0 {
            return;
        }
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.is_some_and(|at| at.elapsed() < WARNING) {
            return;
        }
        *warned = Some(Instant::now());
        self.dropped.fetch_sub(dropped, Ordering::Relaxed);
        self.failed.fetch_sub(failed, Ordering::Relaxed);
        let error = exported.as_ref().err().map(ToString::to_string);
        tracing::warn!(spans.dropped = dropped, spans.failed = failed, error, "spans do not reach the collector");
    }
}

/// Lets spans into the queue of the batches, as long as there is room. The queue behind it has the same size and is
/// never full; it would not say how much it drops.
#[derive(Debug)]
struct Gate {
    inner: BatchSpanProcessor,
    tally: Arc<Tally>,
}

impl SpanProcessor for Gate {
    fn on_start(&self, _: &mut Span, _: &opentelemetry::Context) {}

    fn on_end(&self, span: SpanData) {
        if span.span_context.is_sampled() && self.tally.enter() {
            self.inner.on_end(span);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

/// Exports, and says what came of it.
#[derive(Debug)]
struct Counted {
    inner: SpanExporter,
    tally: Arc<Tally>,
}

impl opentelemetry_sdk::trace::SpanExporter for Counted {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let exported = self.inner.export(batch).await;
        self.tally.left(spans, &exported);
        exported
    }

    fn shutdown(&self) -> OTelSdkResult {
        self.inner.shutdown()
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

/// The collector as the exporting thread calls it: that thread waits, and nobody waits for it. A connection for each
/// call, since they are seconds apart.
struct Collector {
    call: Duration,
    /// Made on the exporting thread, once, and there for good: the end of a runtime waits for names that are looked up, and
    /// the end of the process would wait for that.
    caller: OnceLock<Option<&'static Caller>>,
}

struct Caller {
    runtime: Runtime,
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

impl Collector {
    fn new() -> Self {
        let millis = number("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT").or_else(|| number("OTEL_EXPORTER_OTLP_TIMEOUT"));
        Self { call: millis.map_or(CALL, Duration::from_millis), caller: OnceLock::new() }
    }
}

impl Caller {
    fn new() -> Option<&'static Self> {
        let runtime = Builder::new_current_thread().enable_all().build().ok()?;
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        let provider = rustls::crypto::ring::default_provider();
        let connector = match HttpsConnectorBuilder::new().with_provider_and_native_roots(provider.clone()) {
            Ok(connector) => connector,
            Err(error) => {
                tracing::warn!(%error, "this machine has no certificates of authorities: no https collector can be reached");
                let config = rustls::ClientConfig::builder_with_provider(Arc::new(provider));
                let config = config.with_safe_default_protocol_versions().ok()?;
                let config = config.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
                HttpsConnectorBuilder::new().with_tls_config(config)
            }
        };
        let connector = connector.https_or_http().enable_http1().wrap_connector(http);
        let client = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector);
        Some(Box::leak(Box::new(Self { runtime, client })))
    }
}

impl fmt::Debug for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Collector").finish_non_exhaustive()
    }
}

#[async_trait::async_trait]
impl HttpClient for Collector {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let Caller { runtime, client } = self.caller.get_or_init(Caller::new).ok_or("no client")?;
        runtime.block_on(async {
            let call = async {
                let (head, body) = client.request(request.map(Full::new)).await?.into_parts();
                let body = Limited::new(body, ANSWER_MAX).collect().await?.to_bytes();
                Ok(Response::from_parts(head, body))
            };
            timeout(self.call, call).await.unwrap_or_else(|elapsed| Err(elapsed.into()))
        })
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry_sdk::error::OTelSdkError;

    use super::*;

    #[test]
    fn one_in_a_hundred_is_sampled_unless_the_client_or_the_environment_says_otherwise() {
        let said = |name, argument| format!("{:?}", sampler(name, argument));
        assert_eq!(said(None, None), "ParentBased(TraceIdRatioBased(0.01))");
        assert_eq!(said(None, Some("0.5")), "ParentBased(TraceIdRatioBased(0.5))");
        assert_eq!(said(Some("always_on"), None), "AlwaysOn");
        assert_eq!(said(Some("always_off"), None), "AlwaysOff");
        assert_eq!(said(Some("traceidratio"), Some("0.25")), "TraceIdRatioBased(0.25)");
        assert_eq!(said(Some("traceidratio"), None), "TraceIdRatioBased(1.0)");
        assert_eq!(said(Some("parentbased_always_on"), None), "ParentBased(AlwaysOn)");
        assert_eq!(said(Some("parentbased_always_off"), None), "ParentBased(AlwaysOff)");
        assert_eq!(said(Some("parentbased_traceidratio"), None), "ParentBased(TraceIdRatioBased(1.0))");
        assert_eq!(said(Some("xray"), Some("1")), "ParentBased(TraceIdRatioBased(0.01))", "not known here");
    }

    #[test]
    fn an_argument_that_is_no_ratio_never_samples_all() {
        for argument in ["10", "-0.1", "1.01", "10%", "NaN", "inf", "half"] {
            for (name, expected) in [
                (None, "ParentBased(TraceIdRatioBased(0.01))"),
                (Some("traceidratio"), "TraceIdRatioBased(0.01)"),
                (Some("parentbased_traceidratio"), "ParentBased(TraceIdRatioBased(0.01))"),
            ] {
                assert_eq!(format!("{:?}", sampler(name, Some(argument))), expected, "{name:?} {argument}");
            }
        }
    }

    #[test]
    fn a_number_is_above_zero_or_the_default_is_used() {
        let millis = |value| usable::<u64>("a variable", value, |millis| 0 < *millis);
        assert_eq!(millis("100"), Some(100));
        for value in ["0", "-1", "1.5", "5s", "1e3", "99999999999999999999"] {
            assert_eq!(millis(value), None, "{value}");
        }
    }

    #[test]
    fn a_collector_is_sent_to_only_as_it_is_asked_for_and_as_is_spoken_here() {
        let wanted = |variables: &[(&str, &str)]| {
            let value = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| *value);
            wanted_by(|name| value(name).map(str::to_owned))
        };
        let (all, traces) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT");
        let (protocol, of_traces) = ("OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL");
        let (url, other) = ("http://127.0.0.1:4318", "https://collector.example/v1/traces");
        assert_eq!(wanted(&[(all, url)]), Wanted::At(url.to_owned()));
        assert_eq!(wanted(&[(traces, other)]), Wanted::At(other.to_owned()));
        assert_eq!(wanted(&[(all, url), (traces, other)]), Wanted::At(other.to_owned()));
        let alike = [(all, url), (protocol, "grpc"), (of_traces, "http/protobuf"), ("OTEL_TRACES_EXPORTER", "otlp")];
        assert_eq!(wanted(&alike), Wanted::At(url.to_owned()));
        for variables in
            [&[][..], &[(all, url), ("OTEL_SDK_DISABLED", "True")], &[(all, url), ("OTEL_TRACES_EXPORTER", "none")]]
        {
            assert!(matches!(wanted(variables), Wanted::Off(_)), "{variables:?}");
        }
        for (name, variables) in [
            (all, &[(all, "127.0.0.1:4318")][..]),
            (traces, &[(all, url), (traces, "grpc://secret@127.0.0.1:4317")]),
            (protocol, &[(all, url), (protocol, "grpc")]),
            (of_traces, &[(all, url), (protocol, "http/protobuf"), (of_traces, "http/json")]),
        ] {
            let Wanted::Wrong(why) = wanted(variables) else { panic!("{variables:?}") };
            assert!(why.starts_with(name) && !why.contains("secret"), "{why}");
        }
    }

    #[test]
    fn the_queue_is_bounded_and_what_it_drops_is_counted() {
        let tally = Tally { queue_max: 2, ..Tally::new() };
        assert_eq!([tally.enter(), tally.enter(), tally.enter()], [true, true, false]);
        tally.left(1, &Ok(())); // warns, and counts anew
        assert_eq!([tally.enter(), tally.enter()], [true, false]);
        tally.left(2, &Err(OTelSdkError::AlreadyShutdown)); // within a minute of that warning
        let counts = (tally.queued.into_inner(), tally.dropped.into_inner(), tally.failed.into_inner());
        assert_eq!(counts, (0, 1, 2));
    }
}
