//! The load: requests prepared as bytes, written to keep-alive connections by one thread.
//!
//! It shares the machine with what it measures, so it must be cheap: no client library, no task for each connection,
//! one system call for a request and one for its answer. How much of the machine it takes all the same is reported.
//!
//! *Closed*: each connection sends when its answer has come, as callers in a row do. *Open*: requests are due at a
//! fixed rate whatever the answers do, as callers do who know nothing of each other. A latency then counts from the
//! moment at which the request was due. One that is due when every connection is busy waits for one, or is given up
//! and counted: under too much load its caller's pool is empty, and to let it wait here would only tell how long the
//! load went on.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream as StdStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};

pub(crate) struct Load {
    pub(crate) address: SocketAddr,
    pub(crate) connections: usize,
    pub(crate) pace: Pace,
    pub(crate) extent: Extent,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Pace {
    Closed,
    /// `waits`: what is due when every connection is busy is sent when one is free, and its latency counts from when it
    /// was due. Otherwise it is given up.
    Open {
        per_second: u64,
        waits: bool,
    },
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Extent {
    Time(Duration),
    Count(u64),
}

/// An answer, or the end of waiting for one.
#[derive(Debug)]
pub(crate) struct Answer<'a> {
    /// Which request it answers: they are counted from zero.
    pub(crate) number: u64,
    /// `None`: the connection ended first, or nothing came in time. What became of the request is unknown.
    pub(crate) status: Option<u16>,
    pub(crate) retry_after: bool,
    pub(crate) body: &'a [u8],
    /// From the moment at which the request was due.
    pub(crate) took: Duration,
    /// Since the load began.
    pub(crate) at: Duration,
}

/// What was asked of the server, and how well it was asked.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sent {
    pub(crate) requests: u64,
    /// Due while every connection was busy.
    pub(crate) unsent: u64,
    /// Connections that were made anew because the server had closed them.
    pub(crate) reconnects: u64,
    pub(crate) took: Duration,
}

/// After the last request, for the answers that are still to come.
const PATIENCE: Duration = Duration::from_secs(20);

/// Requests that are written before answers are looked at again.
const BURST_MAX: usize = 128;

const TICK: Duration = Duration::from_millis(1);

/// Ctrl-C. A load has a thread to itself, so nobody could end it by dropping it.
pub(crate) static INTERRUPTED: AtomicBool = AtomicBool::new(false);

impl Load {
    /// Runs to its end on this thread. `write` makes the bytes of a request, `take` gets every answer; each request gets one.
    pub(crate) fn run(
        &self,
        mut write: impl FnMut(u64, &mut Vec<u8>),
        mut take: impl FnMut(Answer<'_>),
    ) -> anyhow::Result<Sent> {
        let mut poll = Poll::new()?;
        let mut events = Events::with_capacity(1024);
        let mut connections = Vec::with_capacity(self.connections);
        for token in 0..self.connections {
            connections.push(Connection::open(self.address, Token(token), &poll)?);
        }
        let mut free: Vec<usize> = (0..self.connections).collect();
        let mut scratch = vec![0; 256 * 1024];
        let mut sent = Sent::default();
        let mut next = 0; // the number of the request that is due next
        let mut last_answer = Instant::now();
        let begun = Instant::now();
        loop {
            if INTERRUPTED.load(Ordering::Relaxed) {
                bail!("interrupted");
            }
            let elapsed = begun.elapsed();
            let over = self.is_over(elapsed, next);
            let due = if over { 0 } else { self.due(elapsed) };
            let mut burst = 0;
            while next < due && burst < BURST_MAX {
                let Some(index) = free.pop() else { break };
                let due_at = match self.pace {
                    Pace::Closed => Instant::now(),
                    Pace::Open { per_second, .. } => begun + at(next, per_second),
                };
                connections[index].send(next, due_at, &mut write);
                next += 1;
                sent.requests += 1;
                burst += 1;
            }
            if let (Pace::Open { waits: false, .. }, true) = (self.pace, free.is_empty() && next < due) {
                sent.unsent += due - next;
                next = due;
            }
            if over && free.len() == self.connections {
                break;
            }
            if over && PATIENCE < last_answer.elapsed() {
                for connection in connections.iter_mut().filter(|connection| connection.asked.is_some()) {
                    connection.give_up(begun, &mut take);
                }
                break;
            }
            let more = next < due && !free.is_empty();
            match poll.poll(&mut events, Some(if more { Duration::ZERO } else { TICK })) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                polled => polled?,
            }
            for event in &events {
                let index = event.token().0;
                let connection = &mut connections[index];
                let asked = connection.asked.is_some();
                let alive = connection.receive(begun, &mut scratch, &mut take)?;
                if asked && connection.asked.is_none() {
                    last_answer = Instant::now();
                    free.push(index);
                }
                if !alive {
                    if connection.asked.is_some() {
                        connection.give_up(begun, &mut take);
                        free.push(index);
                    }
                    *connection = Connection::open(self.address, Token(index), &poll)?;
                    sent.reconnects += 1;
                }
            }
        }
        sent.took = begun.elapsed();
        Ok(sent)
    }

    /// How many requests should have been sent by now.
    fn due(&self, elapsed: Duration) -> u64 {
        match (self.pace, self.extent) {
            (_, Extent::Count(count)) => count,
            (Pace::Closed, Extent::Time(time)) => {
                if elapsed < time {
                    u64::MAX
                } else {
                    0
                }
            }
            (Pace::Open { per_second, .. }, Extent::Time(time)) => {
                let micros = u64::try_from(elapsed.min(time).as_micros()).unwrap_or(u64::MAX);
                micros.saturating_mul(per_second) / 1_000_000
            }
        }
    }

    fn is_over(&self, elapsed: Duration, requests: u64) -> bool {
        match self.extent {
            Extent::Time(time) => time <= elapsed,
            Extent::Count(count) => count <= requests,
        }
    }
}

/// When the request of this number is due.
fn at(number: u64, per_second: u64) -> Duration {
    Duration::from_micros(number.saturating_mul(1_000_000) / per_second.max(1))
}

struct Connection {
    stream: TcpStream,
    request: Vec<u8>,
    written: usize,
    /// Of an answer that did not come in one piece.
    part: Vec<u8>,
    /// The request under way, and when it was due.
    asked: Option<(u64, Instant)>,
}

impl Connection {
    fn open(address: SocketAddr, token: Token, poll: &Poll) -> anyhow::Result<Self> {
        let stream = StdStream::connect_timeout(&address, PATIENCE).context("connecting to the server under test")?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        let mut stream = TcpStream::from_std(stream);
        poll.registry().register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self { stream, request: Vec::with_capacity(1024), written: 0, part: Vec::new(), asked: None })
    }

    fn send(&mut self, number: u64, due: Instant, write: &mut impl FnMut(u64, &mut Vec<u8>)) {
        self.request.clear();
        self.written = 0;
        write(number, &mut self.request);
        self.asked = Some((number, due));
        self.flush();
    }

    /// Writes what is left of the request. A connection that has broken shows when it is read.
    fn flush(&mut self) {
        while self.written < self.request.len() {
            match self.stream.write(&self.request[self.written..]) {
                Ok(written) => self.written += written,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    /// Reads what has come; false when the connection has ended.
    fn receive(
        &mut self,
        begun: Instant,
        scratch: &mut [u8],
        take: &mut impl FnMut(Answer<'_>),
    ) -> anyhow::Result<bool> {
        if self.written < self.request.len() {
            self.flush();
        }
        loop {
            let read = match self.stream.read(scratch) {
                Ok(0) => return Ok(false),
                Ok(read) => read,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return Ok(false),
            };
            let whole = if self.part.is_empty() {
                let closed = self.answered(&scratch[..read], begun, take)?;
                if closed.is_none() {
                    self.part.extend_from_slice(&scratch[..read]);
                }
                closed
            } else {
                self.part.extend_from_slice(&scratch[..read]);
                let part = std::mem::take(&mut self.part);
                let closed = self.answered(&part, begun, take)?;
                self.part = part;
                if closed.is_some() {
                    self.part.clear();
                }
                closed
            };
            if whole == Some(true) {
                return Ok(false);
            }
            if read < scratch.len() {
                return Ok(true); // nothing was left behind, and what comes later is told again
            }
        }
    }

    /// Hands a whole answer on, and says whether it closes the connection; `None` while it is not whole.
    fn answered(
        &mut self,
        bytes: &[u8],
        begun: Instant,
        take: &mut impl FnMut(Answer<'_>),
    ) -> anyhow::Result<Option<bool>> {
        let mut headers = [httparse::EMPTY_HEADER; 32];
        let mut response = httparse::Response::new(&mut headers);
        let httparse::Status::Complete(head) = response.parse(bytes).context("an answer that is no HTTP")? else {
            return Ok(None);
        };
        let (mut length, mut retry_after, mut closes) = (0, false, false);
        for header in response.headers.iter() {
            if header.name.eq_ignore_ascii_case("content-length") {
                length = std::str::from_utf8(header.value)?.parse::<usize>()?;
            } else if header.name.eq_ignore_ascii_case("retry-after") {
                retry_after = true;
            } else if header.name.eq_ignore_ascii_case("connection") {
                closes = header.value.eq_ignore_ascii_case(b"close");
            } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
                bail!("an answer in chunks, which this client does not read");
            }
        }
        let Some(body) = bytes.get(head..head + length) else { return Ok(None) };
        if let Some((number, due)) = self.asked.take() {
            let now = Instant::now();
            take(Answer { number, status: response.code, retry_after, body, took: now - due, at: now - begun });
        }
        Ok(Some(closes))
    }

    fn give_up(&mut self, begun: Instant, take: &mut impl FnMut(Answer<'_>)) {
        if let Some((number, due)) = self.asked.take() {
            let now = Instant::now();
            take(Answer { number, status: None, retry_after: false, body: &[], took: now - due, at: now - begun });
        }
    }
}
