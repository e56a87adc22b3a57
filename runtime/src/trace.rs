//! Traces: what one request took, and everything that followed from it, as spans of one OpenTelemetry trace.
//!
//! A trace is joined by `traceparent` (W3C Trace Context) and by nothing else: a request brings one or is given one, what
//! it causes carries the text along, and whoever works on that later asks for a child of it here. No context hangs on
//! tasks or threads, so nothing is lost where work changes hands.
//!
//! # Off unless asked for
//! Without a collector (`otlp.rs`) there is no tracer, and every function here ends at its first line: nothing is
//! allocated and no clock is read. With one, only what is sampled costs anything more than a look at a text.
//!
//! Left out: `tracestate`. It is other vendors' data, half a kilobyte of it, and we have nothing to say in it.

use std::borrow::Cow;
use std::sync::OnceLock;
use std::time::SystemTime;

use axum::http::{Method, StatusCode};
use opentelemetry::trace::{
    Span as _, SpanContext, SpanId, Status, TraceContextExt, TraceFlags, TraceId, TraceState, Tracer,
};
use opentelemetry::{Context, Value};
use opentelemetry_sdk::trace::SdkTracer;

pub use opentelemetry::KeyValue;
pub use opentelemetry::trace::SpanKind;

use crate::health;
use crate::request_id::RequestId;

/// A sampled span under way. One that is dropped before its [`end`](Span::end) was cut off, and says so.
#[derive(Debug)]
pub struct Span {
    inner: opentelemetry_sdk::trace::Span,
    ended: bool,
}

/// One stretch of work that is done for many traces at once: each of them gets a span of it.
#[derive(Debug)]
pub struct Stage {
    name: &'static str,
    kind: SpanKind,
    begun: SystemTime,
    parents: Vec<SpanContext>,
}

/// Whether there is somebody to tell.
pub fn is_on() -> bool {
    TRACER.get().is_some()
}

/// A child of the span that `traceparent` names, if that is sampled.
pub fn child(name: impl Into<Cow<'static, str>>, kind: SpanKind, traceparent: Option<&str>) -> Option<Span> {
    let tracer = TRACER.get()?;
    let parent = sampled(traceparent?)?;
    let context = Context::new().with_remote_span_context(parent);
    Span::recorded(tracer.span_builder(name).with_kind(kind).start_with_context(tracer, &context))
}

impl Span {
    fn recorded(inner: opentelemetry_sdk::trace::Span) -> Option<Self> {
        inner.is_recording().then_some(Self { inner, ended: false })
    }

    /// What whoever is called from here is sent, to be a child of this span.
    pub fn traceparent(&self) -> String {
        text(self.inner.span_context())
    }

    pub fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        self.inner.set_attribute(KeyValue::new(key, value));
    }

    /// It did not come to what was wanted; `kind` is from a bounded set.
    pub fn failed(&mut self, kind: impl Into<Cow<'static, str>>) {
        self.set("error.type", kind.into());
        self.inner.set_status(Status::error(""));
    }

    pub fn end(mut self) {
        self.ended = true;
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if !self.ended {
            self.failed("aborted"); // whoever waited has left or run out of time, or it panicked
        }
    }
}

impl Stage {
    /// Begins now. `None` if it concerns no sampled trace. A trace that is named several times in a row counts once: a
    /// command's events lie together.
    pub fn begin<'t>(
        name: &'static str,
        kind: SpanKind,
        traceparents: impl IntoIterator<Item = Option<&'t str>>,
    ) -> Option<Self> {
        if !is_on() {
            return None;
        }
        let begun = SystemTime::now();
        let mut last = "";
        let mut parents = Vec::new();
        for traceparent in traceparents.into_iter().flatten() {
            if traceparent != last {
                parents.extend(sampled(traceparent));
                last = traceparent;
            }
        }
        (!parents.is_empty()).then_some(Self { name, kind, begun, parents })
    }

    /// It is done. A stage that is dropped instead came to nothing, and will be begun again.
    pub fn end(self, attributes: impl IntoIterator<Item = KeyValue>) {
        let Some(tracer) = TRACER.get() else { return };
        let ended = SystemTime::now();
        let attributes: Vec<_> = attributes.into_iter().collect();
        for parent in self.parents {
            let context = Context::new().with_remote_span_context(parent);
            let span = tracer.span_builder(self.name).with_kind(self.kind.clone()).with_start_time(self.begun);
            let mut span = span.with_attributes(attributes.iter().cloned()).start_with_context(tracer, &context);
            span.end_with_timestamp(ended);
        }
    }
}

/// The span of a request that was taken in, if it is sampled: the client's word on that counts where there is one.
pub(crate) fn serve(method: &Method, route: Option<&str>, parent: Option<&str>, id: &RequestId) -> Option<Span> {
    let tracer = TRACER.get()?;
    if route.is_some_and(|route| health::PATHS.contains(&route)) {
        return None; // asked every few seconds by machines, about nothing that happened
    }
    let parent = parent.and_then(parse);
    let context = parent.map_or_else(Context::new, |parent| Context::new().with_remote_span_context(parent));
    let span = tracer.span_builder("HTTP").with_kind(SpanKind::Server).start_with_context(tracer, &context);
    let mut span = Span::recorded(span)?;
    let method = method_name(method);
    match route {
        Some(route) => {
            span.inner.update_name(format!("{method} {route}"));
            span.set("http.route", route.to_owned());
        }
        None => span.inner.update_name(method),
    }
    span.set("http.request.method", method);
    span.set("request.id", id.to_string());
    Some(span)
}

impl Span {
    pub(crate) fn answered(mut self, status: StatusCode) {
        self.set("http.response.status_code", i64::from(status.as_u16()));
        if status.is_server_error() {
            self.failed(status.as_str().to_owned());
        }
        self.end();
    }
}

/// Reads a `traceparent` as <https://www.w3.org/TR/trace-context/> wants it read: version 00 exactly, a later one as far as
/// 00 goes. `None`: it is to be ignored.
pub(crate) fn parse(value: &str) -> Option<SpanContext> {
    let (known, rest) = value.split_at_checked(TRACEPARENT_BYTES)?;
    let mut parts = known.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let well_formed = [(version, 2), (trace, 32), (span, 16), (flags, 2)].into_iter().all(|(part, length)| {
        part.len() == length && part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    });
    let complete = rest.is_empty() || version != "00" && rest.starts_with('-');
    if !well_formed || !complete || version == "ff" || parts.next().is_some() {
        return None;
    }
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?);
    let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
    Some(SpanContext::new(trace, span, flags, true, TraceState::NONE)).filter(SpanContext::is_valid)
}

/// In the version that we speak.
pub(crate) fn text(context: &SpanContext) -> String {
    format!("00-{:032x}-{:016x}-{:02x}", context.trace_id(), context.span_id(), context.trace_flags())
}

/// From here on requests are sampled and spans are kept. Later calls change nothing.
pub(crate) fn turn_on(tracer: SdkTracer) {
    TRACER.set(tracer).ok();
}

static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// `00-<32 hex>-<16 hex>-<2 hex>`
const TRACEPARENT_BYTES: usize = 55;

fn sampled(traceparent: &str) -> Option<SpanContext> {
    parse(traceparent).filter(SpanContext::is_sampled)
}

/// A client can invent methods without end; what is not HTTP's is `_OTHER`.
fn method_name(method: &Method) -> &'static str {
    const KNOWN: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"];
    KNOWN.into_iter().find(|known| method == *known).unwrap_or("_OTHER")
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn read(value: &str) -> Option<String> {
        parse(value).as_ref().map(text)
    }

    #[test]
    fn a_traceparent_is_read_as_w3c_says_and_written_in_version_00() {
        assert_eq!(read(GOOD).as_deref(), Some(GOOD));
        let unsampled = GOOD.replace("-01", "-00");
        assert_eq!(read(&unsampled), Some(unsampled.clone()));
        assert!(sampled(&unsampled).is_none() && sampled(GOOD).is_some());
        let random = GOOD.replace("-01", "-03"); // level 2: the id is random; the flag is kept
        assert_eq!(read(&random), Some(random.clone()));
        for later in [GOOD.replacen("00", "01", 1), format!("{}-and-more", GOOD.replacen("00", "cc", 1))] {
            assert_eq!(read(&later).as_deref(), Some(GOOD), "{later}");
        }
    }

    #[test]
    fn what_is_no_traceparent_is_ignored() {
        let short = &GOOD[..54];
        let cases = [
            "".to_owned(),
            short.to_owned(),
            format!("{GOOD}-"),
            format!("{GOOD}-more"),
            format!("{GOOD} "),
            GOOD.to_uppercase(),
            GOOD.replacen("00", "ff", 1),
            GOOD.replacen("00", "0x", 1),
            format!("{}.more", GOOD.replacen("00", "01", 1)),
            GOOD.replace("4bf92f3577b34da6a3ce929d0e0e4736", "00000000000000000000000000000000"),
            GOOD.replace("00f067aa0ba902b7", "0000000000000000"),
            GOOD.replace("00f067aa0ba902b7", "00f067aa0ba902-7"),
            GOOD.replace('-', "_"),
            GOOD.replace("4bf9", "+bf9"),
            "00-4bf92f3577b34da6a3ce929d0e0e47é6-00f067aa0ba902b7-01".to_owned(),
            "é".repeat(40),
        ];
        for case in cases {
            assert_eq!(read(&case), None, "{case}");
        }
    }

    #[test]
    fn without_a_collector_nothing_becomes_a_span() {
        assert!(!is_on());
        assert!(child("a child", SpanKind::Client, Some(GOOD)).is_none());
        assert!(Stage::begin("a stage", SpanKind::Internal, [Some(GOOD)]).is_none());
        assert!(serve(&Method::GET, None, Some(GOOD), &RequestId::mint()).is_none());
    }
}
