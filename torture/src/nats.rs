//! NATS' protocol, as far as the wire must understand it: where a message ends, what is published for the stream to
//! keep, and which message acknowledges that.
//!
//! Left out: everything else. What is not understood is carried on unseen.

use std::io;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use crate::wire::{Direction, Fate, Moment, Part, Request, Shared, When};

/// Longer lines and payloads are none that anybody here sends.
const MESSAGE_MAX: usize = 64 * 1024 * 1024;

/// What every publish of the relay carries, and nothing else does.
const FENCE: &[u8] = b"Nats-Expected-Last-Sequence";

/// Carries a connection until one of its ends closes it, or a fault does.
pub(crate) async fn carry(client: TcpStream, server: TcpStream, shared: &Shared) -> io::Result<()> {
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    tokio::select! {
        ended = up(BufReader::new(client_read), server_write, shared) => ended,
        ended = down(BufReader::new(server_read), client_write, shared) => ended,
    }
}

async fn up(mut client: BufReader<OwnedReadHalf>, mut server: OwnedWriteHalf, shared: &Shared) -> io::Result<()> {
    loop {
        let message = next(&mut client).await?;
        let publishes = is(&message.line, b"HPUB") && contains(&message.payload, FENCE);
        if publishes && shared.pass(at(When::BeforeForwarding)).await == Fate::Cut {
            return Ok(());
        }
        if shared.through(Direction::ToServer).await == Fate::Cut {
            return Ok(());
        }
        server.write_all(&message.line).await?;
        server.write_all(&message.payload).await?;
        if publishes && shared.pass(at(When::Forwarded)).await == Fate::Cut {
            return Ok(());
        }
    }
}

async fn down(mut server: BufReader<OwnedReadHalf>, mut client: OwnedWriteHalf, shared: &Shared) -> io::Result<()> {
    loop {
        let message = next(&mut server).await?;
        if acknowledges(&message) && shared.pass(at(When::BeforeAnswering)).await == Fate::Cut {
            return Ok(());
        }
        if shared.through(Direction::FromServer).await == Fate::Cut {
            return Ok(());
        }
        client.write_all(&message.line).await?;
        client.write_all(&message.payload).await?;
    }
}

struct Message {
    /// With its end.
    line: Vec<u8>,
    /// Headers, content and their end; empty for what is one line only.
    payload: Vec<u8>,
}

async fn next(from: &mut BufReader<OwnedReadHalf>) -> io::Result<Message> {
    let mut line = Vec::new();
    (&mut *from).take(MESSAGE_MAX as u64).read_until(b'\n', &mut line).await?;
    if line.last() != Some(&b'\n') {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut payload = Vec::new();
    if [&b"PUB"[..], b"HPUB", b"MSG", b"HMSG"].iter().any(|verb| is(&line, verb)) {
        let size = String::from_utf8_lossy(&line).split_whitespace().next_back().and_then(|size| size.parse().ok());
        let size: usize = size.filter(|size| *size < MESSAGE_MAX).ok_or(io::ErrorKind::InvalidData)?;
        payload.resize(size + 2, 0);
        from.read_exact(&mut payload).await?;
    }
    Ok(Message { line, payload })
}

fn at(when: When) -> Moment {
    Moment { part: Part::Relay, request: Request::Publish, when }
}

fn is(line: &[u8], verb: &[u8]) -> bool {
    line.get(..verb.len()).is_some_and(|start| start.eq_ignore_ascii_case(verb)) && line.get(verb.len()) == Some(&b' ')
}

/// The answer to a publish is the one that names a stream and a sequence and no type.
fn acknowledges(message: &Message) -> bool {
    is(&message.line, b"MSG") && message.payload.starts_with(b"{\"stream\":") && contains(&message.payload, b"\"seq\":")
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}
