//! Structured logs on stderr, and the beginning and end of traces (`otlp.rs`).
//!
//! People get lines to read, machines get JSON with the service's name in each line. A full pipe
//! must not stop a service: a reader of our stderr that stalls would otherwise stall every task that
//! logs. So one thread writes, a bounded queue feeds it, and what does not fit is counted and dropped.

use std::io::{self, IsTerminal, Write};
use std::panic;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::thread;
use std::time::Duration;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::{otlp, request_id};

/// Sets logs up for this process; later calls change nothing. `RUST_LOG` says what is logged (default `info`),
/// `DAYBOOK_LOG_FORMAT=json` asks for JSON on a terminal too. Panics are logged like any other error. Traces are on if
/// the environment asks for them: see [`otlp::wanted`].
pub fn init(service: &str) {
    if QUEUE.get().is_some() {
        return;
    }
    let json = !io::stderr().is_terminal() || std::env::var("DAYBOOK_LOG_FORMAT").is_ok_and(|format| format == "json");
    let (queue, lines) = mpsc::sync_channel(LINES_MAX);
    if QUEUE.set(queue).is_err() {
        return; // another thread was first
    }
    thread::Builder::new()
        .name("telemetry".into())
        .spawn(move || write_all(&lines))
        .expect("a process may start a thread");

    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter);
    let installed = if json {
        let service = serde_json::Value::from(service).to_string();
        log.json()
            .flatten_event(true)
            .with_span_list(false)
            .with_writer(Lines { opening: Some(format!("{{\"service\":{service},")) })
            .try_init()
    } else {
        log.with_writer(Lines { opening: None }).try_init()
    };
    if installed.is_ok() {
        panic::set_hook(Box::new(log_panic));
    }
    otlp::start(service);
}

/// Waits until spans are sent and what was logged is written, at most for a second each. The last thing a `main` does.
pub fn flush() {
    otlp::stop();
    let Some(queue) = QUEUE.get() else { return };
    let (written, wait) = mpsc::sync_channel(1);
    if queue.try_send(Entry::Flush(written)).is_ok() {
        let _ = wait.recv_timeout(Duration::from_secs(1)); // a reader that stalls cannot keep us
    }
}

const LINES_MAX: usize = 8192;

enum Entry {
    Line(Vec<u8>),
    Flush(SyncSender<()>),
}

static QUEUE: OnceLock<SyncSender<Entry>> = OnceLock::new();
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Makes a writer for each line. A line that is written while a request is answered says which.
struct Lines {
    /// Replaces the brace that a JSON line opens with; lines for people have none.
    opening: Option<String>,
}

struct Line {
    opening: String,
    json: bool,
    text: Vec<u8>,
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        let request = request_id::current();
        let mut opening = self.opening.clone().unwrap_or_default();
        match (&request, self.opening.is_some()) {
            (None, _) => {}
            (Some(id), true) => {
                opening.push_str("\"request.id\":");
                opening.push_str(&serde_json::Value::from(id.as_str()).to_string());
                opening.push(',');
            }
            (Some(id), false) => {
                opening.push_str(id.as_str());
                opening.push(' ');
            }
        }
        Line { opening, json: self.opening.is_some(), text: Vec::new() }
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let opened = !self.text.is_empty();
        let rest = match bytes {
            _ if opened => bytes,
            [b'{', rest @ ..] if self.json => rest,
            _ => bytes,
        };
        if !opened {
            self.text.append(&mut std::mem::take(&mut self.opening).into_bytes());
        }
        self.text.extend_from_slice(rest);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let line = Entry::Line(std::mem::take(&mut self.text));
        if QUEUE.get().is_none_or(|queue| queue.try_send(line).is_err()) {
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The writer sleeps so long after each write, for waking it costs whoever logs more than the line does.
const GATHER: Duration = Duration::from_millis(5);
const WRITE_MAX: usize = 256 * 1024;

fn write_all(lines: &Receiver<Entry>) {
    let mut stderr = io::stderr(); // not locked for good: others may have a last word on it
    let mut text = Vec::new();
    loop {
        let mut next = match lines.recv_timeout(Duration::from_secs(1)) {
            Ok(entry) => Some(entry),
            Err(RecvTimeoutError::Timeout) => {
                let dropped = DROPPED.swap(0, Ordering::Relaxed);
                if 0 < dropped {
                    tracing::warn!(lines.dropped = dropped, "stderr was not read fast enough");
                }
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => return,
        };
        let mut flushed = None;
        while let Some(entry) = next {
            match entry {
                Entry::Line(line) => text.extend_from_slice(&line),
                Entry::Flush(written) => flushed = Some(written),
            }
            let enough = flushed.is_some() || WRITE_MAX <= text.len();
            next = if enough { None } else { lines.try_recv().ok() };
        }
        let _ = stderr.write_all(&text); // when stderr is gone there is nobody to tell
        text.clear();
        match flushed {
            Some(written) => drop(written.try_send(())), // whoever asked may have stopped waiting
            None => thread::sleep(GATHER),
        }
    }
}

fn log_panic(panicked: &panic::PanicHookInfo<'_>) {
    let location = panicked.location().map(ToString::to_string).unwrap_or_default();
    let message = panicked.payload_as_str().unwrap_or("no message");
    let thread = thread::current();
    let backtrace = std::backtrace::Backtrace::capture().to_string(); // only with RUST_BACKTRACE, else it says that it is off
    tracing::error!(panic.message = message, panic.location = location, thread = thread.name(), backtrace, "panicked");
    if thread.name() == Some("main") {
        flush(); // the process ends now
    }
}
