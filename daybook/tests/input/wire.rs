//! HTTP/1.1 by hand: requests as bytes that no HTTP library would send, and answers as they came.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// An answer that has not come by then is none.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A request to be written down. Each part of it can be left out or made wrong.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    method: String,
    target: Vec<u8>,
    headers: Vec<(String, Vec<u8>)>,
    body: Vec<u8>,
}

/// What a server said to one request, and whether it then closed the connection.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// An interim `100 Continue` came first.
    pub(crate) continued: bool,
    pub(crate) took: Duration,
}

impl Request {
    pub(crate) fn new(method: &str, target: impl AsRef<[u8]>) -> Self {
        let target = target.as_ref().to_vec();
        let request = Self { method: method.to_owned(), target, headers: Vec::new(), body: Vec::new() };
        request.header("Host", "daybook").header("Connection", "close")
    }

    pub(crate) fn get(target: impl AsRef<[u8]>) -> Self {
        Self::new("GET", target)
    }

    pub(crate) fn post(target: impl AsRef<[u8]>) -> Self {
        Self::new("POST", target)
    }

    /// One header line more; a name that is there already stands there twice.
    pub(crate) fn header(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.headers.push((name.to_owned(), value.as_ref().to_vec()));
        self
    }

    pub(crate) fn without(mut self, name: &str) -> Self {
        self.headers.retain(|(found, _)| !found.eq_ignore_ascii_case(name));
        self
    }

    pub(crate) fn with(self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.without(name).header(name, value)
    }

    pub(crate) fn bearer(self, token: &str) -> Self {
        self.with("Authorization", format!("Bearer {token}"))
    }

    pub(crate) fn key(self, key: impl AsRef<[u8]>) -> Self {
        self.with("Idempotency-Key", key)
    }

    /// With its length and its type.
    pub(crate) fn body(mut self, body: impl AsRef<[u8]>) -> Self {
        self.body = body.as_ref().to_vec();
        let length = self.body.len().to_string();
        self.with("Content-Type", "application/json").with("Content-Length", length)
    }

    pub(crate) fn json(self, body: &Value) -> Self {
        self.body(body.to_string())
    }

    /// A body whose length no header announces.
    pub(crate) fn unannounced(mut self, body: impl AsRef<[u8]>) -> Self {
        self.body = body.as_ref().to_vec();
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = [self.method.as_bytes(), b" ", &self.target, b" HTTP/1.1\r\n"].concat();
        for (name, value) in &self.headers {
            bytes.extend_from_slice(&[name.as_bytes(), b": ", value, b"\r\n"].concat());
        }
        bytes.extend_from_slice(b"\r\n");
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

impl From<Request> for Vec<u8> {
    fn from(request: Request) -> Self {
        request.bytes()
    }
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }
}

/// Sends bytes on a connection of their own and reads the answer, until it is whole or the server closes.
/// `heads`: the answer will have no body, whatever its headers say.
pub(crate) async fn exchange(address: SocketAddr, request: &[u8], heads: bool) -> Result<Answer, String> {
    let begun = Instant::now();
    let stream = TcpStream::connect(address).await.map_err(|error| format!("no connection: {error}"))?;
    let (mut reading, mut writing) = stream.into_split();
    let write = async {
        writing.write_all(request).await.ok(); // who is refused early may be cut off while it still sends
        std::future::pending::<()>().await;
    };
    let read = async {
        let (mut bytes, mut part) = (Vec::new(), vec![0; 16 * 1024]);
        let mut answer = loop {
            if let Some(answer) = parse(&bytes, heads, false)? {
                break answer;
            }
            match reading.read(&mut part).await {
                Ok(0) | Err(_) => {
                    break parse(&bytes, heads, true)?.ok_or_else(|| format!("closed after {} bytes", bytes.len()))?;
                }
                Ok(count) => bytes.extend_from_slice(&part[..count]),
            }
        };
        answer.took = begun.elapsed();
        Ok(answer)
    };
    let exchanged = async {
        tokio::select! {
            answer = read => answer,
            () = write => Err("the writer never ends".to_owned()),
        }
    };
    timeout(PATIENCE, exchanged).await.map_err(|_| format!("no whole answer within {PATIENCE:?}"))?
}

/// Everything that a server says on one connection until it closes it.
pub(crate) async fn all_said(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request).await.unwrap();
    let mut said = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut said)).await.expect("the server closes").ok();
    String::from_utf8_lossy(&said).into_owned()
}

/// The answer that these bytes begin with; `None` if it is not whole yet.
fn parse(bytes: &[u8], heads: bool, ended: bool) -> Result<Option<Answer>, String> {
    let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(None) };
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let mut lines = head.split("\r\n");
    let opening = lines.next().unwrap_or_default();
    let status = opening.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)).and_then(|code| code.parse().ok());
    let status: u16 = status.ok_or_else(|| format!("this is no answer: {opening}"))?;
    if status == 100 {
        let answer = parse(&bytes[end + 4..], heads, ended)?;
        return Ok(answer.map(|answer| Answer { continued: true, ..answer }));
    }
    let headers: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let header = |name: &str| headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.clone());
    let rest = &bytes[end + 4..];
    let body = if heads || status == 204 || status == 304 {
        Vec::new()
    } else if let Some(length) = header("content-length") {
        let length: usize = length.parse().map_err(|_| format!("content-length: {length}"))?;
        match rest.get(..length) {
            Some(body) => body.to_vec(),
            None => return Ok(None),
        }
    } else if header("transfer-encoding").is_some() {
        match unchunk(rest) {
            Some(body) => body,
            None => return Ok(None),
        }
    } else if ended {
        rest.to_vec()
    } else {
        return Ok(None);
    };
    Ok(Some(Answer { status, headers, body, continued: false, took: Duration::ZERO }))
}

fn unchunk(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = rest.windows(2).position(|window| window == b"\r\n")?;
        let length = usize::from_str_radix(std::str::from_utf8(&rest[..line]).ok()?, 16).ok()?;
        let chunk = rest.get(line + 2..line + 2 + length)?;
        if length == 0 {
            return Some(body);
        }
        body.extend_from_slice(chunk);
        rest = rest.get(line + 4 + length..)?;
    }
}
