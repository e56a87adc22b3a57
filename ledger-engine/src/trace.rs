//! What a command's way through the engine took, told as spans of the trace that its metadata names.
//!
//! There are three: `queue`, from its arrival to its turn; `decide`; and `append`, which many commands share. The first
//! of them gets the span of the whole append, with links to the others' parents; each other one gets a span of the same
//! time with a link to that. While deciding only times are noted. The spans are made afterwards, on a task of their own.

use std::time::{Instant, SystemTime};

use event_store::traceparent;
use ledger_core::Command;
use opentelemetry::global::BoxedTracer;
use opentelemetry::trace::{Link, Span, SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState, Tracer};
use opentelemetry::{Context, KeyValue, global};

/// Of a command in a sampled trace.
#[derive(Debug)]
pub(crate) struct Trace {
    parent: SpanContext,
    submitted: Instant,
    /// The last time, if it had to be decided again.
    decided: Option<(Instant, Instant)>,
    /// It became events of the commit.
    pub(crate) appended: bool,
}

/// The append that a command was part of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Appended {
    pub(crate) commit: i64,
    pub(crate) commands: usize,
    pub(crate) events: usize,
    pub(crate) begun: Instant,
}

impl Trace {
    pub(crate) fn of(command: &Command, submitted: Instant) -> Option<Box<Self>> {
        let parent = parent(traceparent(&command.metadata)?).filter(SpanContext::is_sampled)?;
        Some(Box::new(Self { parent, submitted, decided: None, appended: false }))
    }

    pub(crate) fn decided(&mut self, begun: Instant) {
        self.decided = Some((begun, Instant::now()));
    }
}

/// Their callers have been answered.
#[expect(clippy::vec_box, reason = "as they come from the jobs, in which a box keeps them small")]
pub(crate) fn tell(traces: Vec<Box<Trace>>, appended: Option<Appended>) {
    if !traces.is_empty() {
        let ended = Instant::now();
        tokio::spawn(async move { Telling::new().tell(&traces, appended, ended) });
    }
}

struct Telling {
    tracer: BoxedTracer,
    now: (Instant, SystemTime),
}

impl Telling {
    fn new() -> Self {
        Self { tracer: global::tracer("ledger-engine"), now: (Instant::now(), SystemTime::now()) }
    }

    fn tell(&self, traces: &[Box<Trace>], appended: Option<Appended>, ended: Instant) {
        for trace in traces {
            let Some((begun, decided)) = trace.decided else { continue };
            self.span("queue", trace, (trace.submitted, begun), Vec::new(), []);
            self.span("decide", trace, (begun, decided), Vec::new(), []);
        }
        let Some(append) = appended else { return };
        let mut others = traces.iter().filter(|trace| trace.appended);
        let mut whole = None;
        while let Some(trace) = others.next() {
            let attributes = [
                KeyValue::new("daybook.commit", append.commit),
                KeyValue::new("daybook.commit.commands", int(append.commands)),
                KeyValue::new("daybook.commit.events", int(append.events)),
            ];
            let links = match &whole {
                None => others.clone().map(|other| link(&other.parent)).collect(),
                Some(whole) => vec![link(whole)],
            };
            let span = self.span("append", trace, (append.begun, ended), links, attributes);
            whole.get_or_insert(span);
        }
    }

    fn span(
        &self,
        name: &'static str,
        trace: &Trace,
        (begun, ended): (Instant, Instant),
        links: Vec<Link>,
        attributes: impl IntoIterator<Item = KeyValue>,
    ) -> SpanContext {
        let context = Context::new().with_remote_span_context(trace.parent.clone());
        let span = self.tracer.span_builder(name).with_start_time(self.at(begun)).with_links(links);
        let mut span = span.with_attributes(attributes).start_with_context(&self.tracer, &context);
        span.end_with_timestamp(self.at(ended));
        span.span_context().clone()
    }

    fn at(&self, instant: Instant) -> SystemTime {
        self.now.1.checked_sub(self.now.0.duration_since(instant)).unwrap_or(self.now.1)
    }
}

fn link(context: &SpanContext) -> Link {
    Link::with_context(context.clone())
}

fn int(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// The edge has checked it: version, trace, span, flags.
fn parent(traceparent: &str) -> Option<SpanContext> {
    let mut parts = traceparent.split('-').skip(1);
    let (trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?);
    let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?);
    Some(SpanContext::new(trace, span, flags, true, TraceState::NONE)).filter(SpanContext::is_valid)
}
