//! A TCP proxy that counts what it carries and can stop carrying it without a word.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Stands before a server on this machine. What it carries ends with it.
pub(crate) struct Proxy {
    port: u16,
    server: u16,
    /// Of the connections that are there now.
    freeze: Arc<Mutex<CancellationToken>>,
    carried: Arc<AtomicU64>,
    _accepting: AbortOnDropHandle<()>,
}

impl Proxy {
    /// Before the server that `url` names.
    pub(crate) async fn before(url: &str) -> Self {
        let server = port(url);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (freeze, carried) = (Arc::default(), Arc::default());
        let accepting = tokio::spawn(accept(listener, server, Arc::clone(&freeze), Arc::clone(&carried)));
        Self { port, server, freeze, carried, _accepting: AbortOnDropHandle::new(accepting) }
    }

    /// The same address, through here.
    pub(crate) fn url(&self, url: &str) -> String {
        url.replace(&format!("127.0.0.1:{}", self.server), &format!("127.0.0.1:{}", self.port))
    }

    /// From now on nothing comes through the connections that are there, and neither end learns of it. New ones work.
    pub(crate) fn freeze(&self) {
        std::mem::take(&mut *self.freeze.lock().unwrap()).cancel();
    }

    /// Bytes that have come from the server.
    pub(crate) fn carried(&self) -> u64 {
        self.carried.load(Ordering::Relaxed)
    }
}

fn port(url: &str) -> u16 {
    let (_, rest) = url.rsplit_once("127.0.0.1:").unwrap();
    rest.split('/').next().unwrap().parse().unwrap()
}

async fn accept(listener: TcpListener, server: u16, freeze: Arc<Mutex<CancellationToken>>, carried: Arc<AtomicU64>) {
    loop {
        let (mut client, _) = listener.accept().await.unwrap();
        let (freeze, carried) = (freeze.lock().unwrap().clone(), carried.clone());
        tokio::spawn(async move {
            let Ok(mut server) = TcpStream::connect(("127.0.0.1", server)).await else { return };
            let (mut from_client, mut to_client) = client.split();
            let (mut from_server, mut to_server) = server.split();
            let answers = async {
                let mut buffer = [0; 16 * 1024];
                while let Ok(length @ 1..) = from_server.read(&mut buffer).await {
                    carried.fetch_add(length as u64, Ordering::Relaxed);
                    if to_client.write_all(&buffer[..length]).await.is_err() {
                        break;
                    }
                }
            };
            tokio::select! {
                _ = copy(&mut from_client, &mut to_server) => {}
                () = answers => {}
                () = freeze.cancelled() => std::future::pending().await, // both ends stay open
            }
        });
    }
}
