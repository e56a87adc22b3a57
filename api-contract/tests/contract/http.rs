//! A server under test and a client that sends exactly the bytes it is given.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use runtime::http::Limits;
use runtime::shutdown::Shutdown;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

/// More than any of these tests needs; a server that hangs fails here.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A service with the shared layers, on a port of its own.
pub(crate) struct Server {
    address: SocketAddr,
    shutdown: Shutdown,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown.trigger();
    }
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Server {
    pub(crate) async fn start(router: Router) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = Shutdown::new();
        tokio::spawn(runtime::http::serve(listener, api_contract::layer(router), Limits::default(), shutdown.clone()));
        Self { address, shutdown }
    }

    /// Sends bytes and reads until the server has said all.
    pub(crate) async fn exchange(&self, request: impl AsRef<[u8]>) -> Answer {
        let talk = async {
            let mut stream = TcpStream::connect(self.address).await.unwrap();
            let _ = stream.write_all(request.as_ref()).await; // a server that refuses early may stop reading
            let mut bytes = Vec::new();
            let _ = stream.read_to_end(&mut bytes).await;
            String::from_utf8(bytes).unwrap()
        };
        let text = timeout(PATIENCE, talk).await.expect("an answer");
        let (head, body) = text.split_once("\r\n\r\n").expect("an HTTP answer");
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Answer { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
    }

    pub(crate) async fn post_to(&self, path: &str, headers: &str, body: impl AsRef<[u8]>) -> Answer {
        let body = body.as_ref();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n",
            body.len()
        );
        self.exchange([head.as_bytes(), body].concat()).await
    }

    pub(crate) async fn post(&self, body: impl AsRef<[u8]>) -> Answer {
        self.post_to("/payments", "content-type: application/json\r\n", body).await
    }

    pub(crate) async fn get(&self, target: &str) -> Answer {
        self.get_with(target, "").await
    }

    pub(crate) async fn get_with(&self, target: &str, headers: &str) -> Answer {
        self.exchange(format!("GET {target} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{headers}\r\n")).await
    }
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("{}\n{}", self.head, self.body))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    /// The problem with this slug, as every problem must be.
    #[track_caller]
    pub(crate) fn is_problem(&self, status: u16, slug: &str) -> Value {
        let problem = self.json();
        assert_eq!((self.status, problem["type"].as_str()), (status, Some(&*format!("/problems/{slug}"))), "{problem}");
        assert_eq!(self.header("content-type"), Some("application/problem+json"));
        assert_eq!(problem["status"], status);
        for member in ["title", "detail", "instance"] {
            assert!(problem[member].is_string(), "{member} of {problem}");
        }
        assert_eq!(problem["requestId"].as_str(), self.header("x-request-id"));
        problem
    }
}
