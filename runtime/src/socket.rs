//! A connection's socket, which knows where in the conversation it is and watches the clock there.
//!
//! hyper has one timer for a request's head, and it also runs while a connection idles between two
//! requests; so it cannot give ten seconds to a head and a minute to silence. And what hyper cannot
//! parse it answers with a bare status. Both are settled here, between hyper and the socket: to hyper
//! a refused client looks like one that stopped sending, and the socket says the last word itself.
//!
//! # How a bare answer of hyper's is known
//! hyper writes only what the service answered, with one exception: its bare answer to what it cannot
//! parse. It parses a head only after the response before is flushed. So a write that comes after
//! such a flush and before the service was called again can be nothing else.
//!
//! # Where a body ends
//! A head that has both a `Content-Length` and a `Transfer-Encoding` can be counted in two ways, and whoever stands before
//! us may count otherwise than we do. hyper counts chunks and then hides the length, so the head's lines are looked at here
//! as they pass, and such a request is refused. Of a request that was sent before the answer to the one before it, the
//! head is not seen: it is left to hyper, which closes the connection after it.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::http::StatusCode;
use memchr::memchr;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until, timeout};

use crate::http::Limits;
use crate::metrics;
use crate::refusal::Refusal;
use crate::request_id::RequestId;

/// A refused client may still be sending; closing at once would make the kernel reset the connection and take our answer with it.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: u64 = 8 * 1024 * 1024;

/// Where a connection is. Shared with the service, which knows when a head was whole and when the answer ended.
pub(crate) struct Conversation {
    state: Mutex<State>,
    idle_time: Duration,
}

struct State {
    phase: Phase,
    flushed: bool, // since the last answer: what hyper writes now is its own
    unread: bool,  // the client may still be sending what nobody will read
    lines: Lines,  // of the head that is arriving
}

/// What the lines of a head say about its body's end.
#[derive(Default)]
struct Lines {
    line: Vec<u8>, // the present one, as much of it as is looked at
    begun: bool,   // blank lines before a request are nothing
    ended: bool,
    length: bool,
    length_beyond_all: bool,
    coding: bool,
}

enum Phase {
    Idle { until: Instant },
    Head { until: Instant, line_ended: bool },
    Handling,
}

/// The stream that hyper reads and writes.
pub(crate) struct Socket {
    stream: TcpStream,
    conversation: Arc<Conversation>,
    limits: Arc<Limits>,
    read_timer: Pin<Box<Sleep>>,
    write_timer: Option<Pin<Box<Sleep>>>, // only while the client does not take what we write
    refused: Option<Refusal>,
}

impl Conversation {
    /// The service has a whole head and begins to answer. False when the head says in two ways where its body ends.
    pub(crate) fn handling(&self) -> bool {
        let mut state = self.lock();
        state.phase = Phase::Handling;
        state.flushed = false;
        state.unread = false;
        let lines = std::mem::take(&mut state.lines);
        !(lines.length && lines.coding)
    }

    /// The answer is complete, if not yet flushed.
    pub(crate) fn answered(&self) {
        self.lock().phase = Phase::Idle { until: Instant::now() + self.idle_time };
    }

    /// The service is done with a request's body before its end.
    pub(crate) fn left_unread(&self) {
        self.lock().unread = true;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner) // no half-made state: each change is one assignment
    }
}

impl Socket {
    pub(crate) fn new(stream: TcpStream, limits: Arc<Limits>) -> Self {
        let until = Instant::now() + limits.header_time; // a client that connects and says nothing
        let state = State { phase: Phase::Idle { until }, flushed: true, unread: false, lines: Lines::default() };
        let conversation = Arc::new(Conversation { state: Mutex::new(state), idle_time: limits.idle_time });
        Self {
            stream,
            conversation,
            limits,
            read_timer: Box::pin(sleep_until(until)),
            write_timer: None,
            refused: None,
        }
    }

    pub(crate) fn conversation(&self) -> Arc<Conversation> {
        self.conversation.clone()
    }

    /// The last word, and a close that lets the client read it.
    pub(crate) async fn finish(mut self) {
        let unread = self.conversation.lock().unread;
        if let Some(refusal) = &self.refused {
            let id = RequestId::mint();
            tracing::info!(status = refusal.status().as_u16(), refusal = ?refusal, request.id = %id, "refused before there was a request");
            if let Ok(Ok(())) = timeout(LINGER, self.stream.write_all(&refusal.bytes(&id))).await {
                metrics::refused(refusal); // else the client is gone
            }
        }
        let _ = self.stream.shutdown().await; // likewise
        if unread || self.refused.is_some() {
            let mut rest = self.stream.take(LINGER_BYTES);
            let _ = timeout(LINGER, tokio::io::copy(&mut rest, &mut tokio::io::sink())).await; // whatever comes, it ends here
        }
    }

    /// hyper could not parse what came. It says so itself, and is heard by [`Self::intercept`], to all but a client that
    /// begins to speak HTTP/2.
    pub(crate) fn not_parsed(&mut self) {
        self.refused.get_or_insert(Refusal::Malformed);
    }

    /// Takes hyper's bare answer instead of writing it. `None` when the bytes are the service's.
    fn intercept(&mut self, first: &[u8]) -> Option<()> {
        let state = self.conversation.lock();
        if !state.flushed && self.refused.is_none() {
            return None;
        }
        let line_ended = !matches!(state.phase, Phase::Head { line_ended: false, .. });
        let length_beyond_all = state.lines.length_beyond_all;
        drop(state);
        let status = first.get(9..12).and_then(|digits| StatusCode::from_bytes(digits).ok()); // after "HTTP/1.1 "
        let limits = &self.limits;
        self.refused.get_or_insert(match status {
            Some(StatusCode::URI_TOO_LONG) => Refusal::UriTooLong { bytes_max: limits.uri_bytes },
            Some(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE) if !line_ended => {
                Refusal::UriTooLong { bytes_max: limits.uri_bytes }
            }
            // hyper's answer to a length that it cannot count to.
            Some(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE) if length_beyond_all => {
                Refusal::PayloadTooLarge { bytes_max: limits.body_bytes }
            }
            Some(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE) => {
                Refusal::HeadersTooLarge { count_max: limits.header_count, bytes_max: limits.header_bytes }
            }
            _ => Refusal::Malformed,
        });
        Some(())
    }

    /// A client that takes nothing of what we write for too long is gone.
    fn poll_stalled<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.write_timer = None;
            return written;
        }
        let until = Instant::now() + self.limits.write_time;
        ready!(self.write_timer.get_or_insert_with(|| Box::pin(sleep_until(until))).as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl Lines {
    /// Longer than the names that are looked for with a value of twenty digits.
    const LOOKED_AT: usize = 64;

    fn take(&mut self, mut bytes: &[u8]) {
        while !self.ended && !bytes.is_empty() {
            let end = memchr(b'\n', bytes); // tokens make long lines
            let part = &bytes[..end.unwrap_or(bytes.len())];
            let room = Self::LOOKED_AT.saturating_sub(self.line.len());
            self.line.extend_from_slice(&part[..part.len().min(room)]);
            let Some(end) = end else { return };
            self.end_of_line();
            self.line.clear();
            bytes = &bytes[end + 1..]; // once the head has ended, this is the body
        }
    }

    fn end_of_line(&mut self) {
        let line = self.line.trim_ascii();
        self.ended = self.begun && line.is_empty();
        self.begun |= !line.is_empty();
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { return };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if name.eq_ignore_ascii_case(b"content-length") {
            self.length = true;
            self.length_beyond_all |= 19 <= value.len() && value.iter().all(u8::is_ascii_digit);
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            self.coding = true;
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.refused.is_some() {
            return Poll::Ready(Ok(())); // to hyper: the client stopped sending
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(cx, buffer);
        let fresh = buffer.filled().get(before..).unwrap_or_default();

        let mut state = this.conversation.lock();
        if let (Phase::Idle { .. }, false) = (&state.phase, fresh.is_empty()) {
            state.phase = Phase::Head { until: Instant::now() + this.limits.header_time, line_ended: false };
            state.lines = Lines::default();
        }
        if let Phase::Head { .. } = state.phase {
            state.lines.take(fresh);
        }
        let until = match &mut state.phase {
            Phase::Handling => return read, // the body has a clock of its own
            Phase::Idle { until } => *until,
            Phase::Head { until, line_ended } => {
                *line_ended = *line_ended || fresh.contains(&b'\n');
                *until
            }
        };
        let head_begun = matches!(state.phase, Phase::Head { .. });
        drop(state);

        if read.is_pending() {
            // A timer that ends too early is only asked again; to set it anew for each request would cost more than that.
            if until < this.read_timer.deadline() {
                this.read_timer.as_mut().reset(until);
            }
            ready!(this.read_timer.as_mut().poll(cx));
            if this.read_timer.deadline() < until {
                this.read_timer.as_mut().reset(until);
                ready!(this.read_timer.as_mut().poll(cx));
            }
        } else if Instant::now() < until {
            return read; // bytes that trickle in never make us wait long, so the clock is read here too
        }
        if head_begun {
            this.refused = Some(Refusal::SlowHead);
        }
        buffer.set_filled(before);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.intercept(bytes).is_some() {
            return Poll::Ready(Ok(bytes.len()));
        }
        let written = Pin::new(&mut this.stream).poll_write(cx, bytes);
        this.poll_stalled(cx, written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.intercept(slices.first().map_or(&[], |first| first)).is_some() {
            return Poll::Ready(Ok(slices.iter().map(|slice| slice.len()).sum()));
        }
        let written = Pin::new(&mut this.stream).poll_write_vectored(cx, slices);
        this.poll_stalled(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(Pin::new(&mut this.stream).poll_flush(cx))?;
        let mut state = this.conversation.lock();
        state.flushed = !matches!(state.phase, Phase::Handling);
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
