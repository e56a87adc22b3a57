//! A partner's receiver: a real socket that behaves as it is told, and misbehaves as it is told.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};

pub(crate) struct Receiver {
    pub(crate) address: SocketAddr,
    connections: Arc<AtomicUsize>,
    seen: watch::Receiver<Vec<Seen>>,
    task: tokio::task::JoinHandle<()>,
}

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) request_line: String,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: String,
    pub(crate) at: Instant,
}

/// What a request is answered with.
#[derive(Clone, Debug)]
pub(crate) enum Reply {
    Status(u16),
    /// These bytes, as they are.
    Raw(Vec<u8>),
    /// 200 and a body without end.
    Endless,
    /// The header, one byte per second.
    Trickle,
    /// Nothing, for as long as the sender waits.
    Hang,
    /// The connection is closed instead.
    Close,
    /// After the notification.
    StatusAfter(Arc<Notify>, u16),
}

impl Receiver {
    /// Answers request number `n` (from 0) with `reply(n)`.
    pub(crate) async fn start(reply: impl Fn(usize) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let (seen_by, seen) = watch::channel(Vec::new());
        let connections = Arc::new(AtomicUsize::new(0));
        let (counted, reply) = (connections.clone(), Arc::new(reply));
        let task = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.expect("a listener accepts");
                counted.fetch_add(1, Ordering::SeqCst);
                let (seen_by, reply) = (seen_by.clone(), reply.clone());
                tokio::spawn(async move {
                    // What goes wrong here is the sender's leaving, which some tests want.
                    converse(stream, &seen_by, &*reply).await.ok();
                });
            }
        });
        Self { address, connections, seen, task }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/hook", self.address)
    }

    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.borrow().clone()
    }

    /// Waits until there have been `count` requests, and shows all there have been.
    pub(crate) async fn wait_for(&self, count: usize) -> Vec<Seen> {
        let mut seen = self.seen.clone();
        let waited = timeout(Duration::from_secs(30), seen.wait_for(|seen| count <= seen.len())).await;
        if waited.is_err() {
            panic!("{count} requests were awaited, and these came: {:#?}", self.seen());
        }
        self.seen()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_else(|| panic!("no header {name} in {self:#?}"))
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).expect("a delivery is JSON")
    }
}

async fn converse(
    mut stream: TcpStream,
    seen_by: &watch::Sender<Vec<Seen>>,
    reply: &(dyn Fn(usize) -> Reply + Send + Sync),
) -> io::Result<()> {
    let seen = read(&mut stream).await?;
    let mut number = 0;
    seen_by.send_modify(|all| {
        number = all.len();
        all.push(seen);
    });
    match reply(number) {
        Reply::Status(status) => answer(&mut stream, status).await,
        Reply::Raw(bytes) => {
            stream.write_all(&bytes).await?;
            stream.shutdown().await
        }
        Reply::Endless => {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n").await?;
            loop {
                stream.write_all(&[b'x'; 4096]).await?;
            }
        }
        Reply::Trickle => {
            for byte in b"HTTP/1.1 200 OK\r\nx-slow: ".iter().chain(std::iter::repeat(&b'y')) {
                stream.write_all(&[*byte]).await?;
                sleep(Duration::from_secs(1)).await;
            }
            Ok(())
        }
        Reply::Hang => {
            stream.read_u8().await?; // fails when the sender gives up
            Ok(())
        }
        Reply::Close => Ok(()),
        Reply::StatusAfter(notified, status) => {
            notified.notified().await;
            answer(&mut stream, status).await
        }
    }
}

async fn answer(stream: &mut TcpStream, status: u16) -> io::Result<()> {
    let body = format!("answer {status}");
    let head = format!("HTTP/1.1 {status} As Told\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
    stream.write_all(format!("{head}{body}").as_bytes()).await
}

async fn read(stream: &mut TcpStream) -> io::Result<Seen> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end;
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    };
    let head = String::from_utf8(bytes[..end].to_vec()).map_err(io::Error::other)?;
    let mut lines = head.split("\r\n");
    let request_line = lines.next().unwrap_or_default().to_owned();
    let headers: HashMap<_, _> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let length: usize = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = bytes.split_off(end + 4);
    while body.len() < length {
        if stream.read_buf(&mut body).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    let body = String::from_utf8(body).map_err(io::Error::other)?;
    Ok(Seen { request_line, headers, body, at: Instant::now() })
}
