//! The wire: a proxy between Daybook and one of its servers, where faults happen at named moments.
//!
//! It reads along just enough (`postgres.rs`, `nats.rs`) to know what a message is about, so the product needs no
//! fail points of its own: before a statement is forwarded, and after its answer has arrived and before that is
//! forwarded, are moments that real networks and real crashes have. A trap set for a moment catches one message; what
//! happens to it is the adversary's choice (`faults.rs`). Beside that all connections can be cut, and everything in
//! one direction can be held back.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

use crate::{nats, postgres};

/// Whose statements are told apart on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Engine,
    Projector,
    Webhooks,
    Workflows,
    Relay,
    /// Anybody else: credentials, queries, migrations.
    Other,
}

/// What a message asks for, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// `select ledger.append(…)`: one commit of the log.
    Append,
    /// The end of an explicit transaction.
    Commit,
    /// The outcome of a webhook's attempt is written down.
    Record,
    /// A commit goes onto the bus.
    Publish,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// It has come from Daybook, and the server has not seen it.
    BeforeForwarding,
    /// The server has done it and said so, and Daybook has not heard it.
    BeforeAnswering,
    /// The server has got it; nobody waits to see what becomes of it.
    Forwarded,
}

/// A place on the wire at which something can be caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment {
    pub(crate) part: Part,
    pub(crate) request: Request,
    pub(crate) when: When,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    ToServer,
    FromServer,
}

/// What becomes of bytes that were held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// They go on, however late, even if their sender is gone by now.
    Forward,
    /// They are lost, and the connection with them.
    Cut,
}

/// A message that waits for its fate. Forgotten, it is cut.
#[derive(Debug)]
pub(crate) struct Held(oneshot::Sender<Fate>);

impl Held {
    pub(crate) fn release(self, fate: Fate) {
        self.0.send(fate).ok(); // its connection may be gone
    }
}

/// A proxy in front of one server. It listens as long as it lives, whether or not the server does.
#[derive(Debug)]
pub(crate) struct Wire {
    pub(crate) port: u16,
    shared: Arc<Shared>,
    accepting: tokio::task::JoinHandle<()>,
}

/// What all connections of a wire look at.
#[derive(Debug)]
pub(crate) struct Shared {
    trap: Mutex<Option<Trap>>,
    /// Counts the times at which everything was cut.
    cuts: watch::Sender<u64>,
    hole: watch::Sender<Hole>,
}

#[derive(Debug)]
struct Trap {
    moment: Moment,
    caught: oneshot::Sender<Held>,
}

/// A direction in which nothing gets through, and what becomes of what waits when it ends.
#[derive(Clone, Copy, Debug, Default)]
struct Hole {
    closed: Option<Direction>,
    cut_at_end: bool,
}

/// What the proxies speak.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Protocol {
    Postgres,
    Nats,
}

impl Wire {
    pub(crate) async fn to(server: SocketAddr, protocol: Protocol) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("listening as a proxy")?;
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared {
            trap: Mutex::new(None),
            cuts: watch::Sender::new(0),
            hole: watch::Sender::new(Hole::default()),
        });
        let accepting = tokio::spawn(accept(listener, server, protocol, shared.clone()));
        Ok(Self { port, shared, accepting })
    }

    /// Catches the next message at a moment. `None`: none came by in this time.
    pub(crate) async fn catch(&self, moment: Moment, patience: Duration) -> Option<Held> {
        let (caught, held) = oneshot::channel();
        *self.shared.trap() = Some(Trap { moment, caught });
        let held = timeout(patience, held).await;
        self.shared.trap().take();
        held.ok()?.ok()
    }

    /// Breaks every connection there is.
    pub(crate) fn cut_all(&self) {
        self.shared.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// From now on nothing gets through in one direction, on old connections and on new ones.
    pub(crate) fn close(&self, direction: Direction) {
        self.shared.hole.send_replace(Hole { closed: Some(direction), cut_at_end: false });
    }

    /// What was held back meanwhile gets through late, or is lost with its connection.
    pub(crate) fn open(&self, fate: Fate) {
        self.shared.hole.send_replace(Hole { closed: None, cut_at_end: fate == Fate::Cut });
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.accepting.abort();
        self.cut_all();
    }
}

async fn accept(listener: TcpListener, server: SocketAddr, protocol: Protocol, shared: Arc<Shared>) {
    loop {
        let Ok((client, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(20)).await; // out of descriptors, for a moment
            continue;
        };
        let shared = shared.clone();
        tokio::spawn(async move {
            let mut cuts = shared.cuts.subscribe();
            let connection = async {
                let Ok(server) = TcpStream::connect(server).await else { return }; // it is down: so are we
                client.set_nodelay(true).ok();
                server.set_nodelay(true).ok();
                // Whichever way a connection ends, both its ends are closed.
                let _ = match protocol {
                    Protocol::Postgres => postgres::carry(client, server, &shared).await,
                    Protocol::Nats => nats::carry(client, server, &shared).await,
                };
            };
            tokio::select! {
                () = connection => {}
                _ = cuts.changed() => {}
            }
        });
    }
}

impl Shared {
    /// Whether somebody waits for this moment.
    pub(crate) fn wants(&self, moment: Moment) -> bool {
        self.trap().as_ref().is_some_and(|trap| trap.moment == moment)
    }

    /// Holds the caller if somebody waits for this moment, until it is decided what becomes of it.
    pub(crate) async fn pass(&self, moment: Moment) -> Fate {
        let trap = {
            let mut trap = self.trap();
            match &*trap {
                Some(set) if set.moment == moment => trap.take(),
                _ => None,
            }
        };
        let Some(trap) = trap else { return Fate::Forward };
        let (release, fate) = oneshot::channel();
        match trap.caught.send(Held(release)) {
            Ok(()) => fate.await.unwrap_or(Fate::Cut),
            Err(_) => Fate::Forward, // whoever waited has given up
        }
    }

    /// Waits while nothing gets through in this direction.
    pub(crate) async fn through(&self, direction: Direction) -> Fate {
        let mut hole = self.hole.subscribe();
        if hole.borrow_and_update().closed != Some(direction) {
            return Fate::Forward;
        }
        let opened = hole.wait_for(|hole| hole.closed != Some(direction)).await;
        match opened {
            Ok(hole) if !hole.cut_at_end => Fate::Forward,
            _ => Fate::Cut,
        }
    }

    fn trap(&self) -> MutexGuard<'_, Option<Trap>> {
        self.trap.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
