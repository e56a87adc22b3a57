//! Postgres' protocol, as far as the wire must understand it: where a message ends, whose connection it is, which
//! statement is executed, and when the server has finished with it.
//!
//! Left out: everything else. What is not understood is carried on unseen.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Mutex, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use crate::wire::{Direction, Fate, Moment, Part, Request, Shared, When};

/// Longer messages are none that a client of ours sends.
const MESSAGE_MAX: usize = 256 * 1024 * 1024;

const SSL_REQUEST: u32 = 80_877_103;
const GSS_REQUEST: u32 = 80_877_104;
const CANCEL_REQUEST: u32 = 80_877_102;

/// Carries a connection until one of its ends closes it, or a fault does.
pub(crate) async fn carry(client: TcpStream, server: TcpStream, shared: &Shared) -> io::Result<()> {
    let (client_read, mut client_write) = client.into_split();
    let (server_read, mut server_write) = server.into_split();
    let (mut client_read, server_read) = (BufReader::new(client_read), BufReader::new(server_read));
    let startup = loop {
        let message = untyped(&mut client_read).await?;
        match code(&message) {
            // The proxy has no certificate, and neither has the private server behind it.
            SSL_REQUEST | GSS_REQUEST => client_write.write_all(b"N").await?,
            _ => break message,
        }
    };
    if shared.through(Direction::ToServer).await == Fate::Cut {
        return Ok(());
    }
    server_write.write_all(&startup).await?;
    if code(&startup) == CANCEL_REQUEST {
        return Ok(());
    }
    let connection = Connection { part: part_of(&startup), units: Mutex::default() };
    tokio::select! {
        ended = connection.up(client_read, server_write, shared) => ended,
        ended = connection.down(server_read, client_write, shared) => ended,
    }
}

struct Connection {
    part: Part,
    /// What each unit of work that the server has not finished asks for. A unit ends with Sync or is a simple query; the
    /// server answers each with one ReadyForQuery.
    units: Mutex<VecDeque<Option<Request>>>,
}

impl Connection {
    async fn up(
        &self,
        mut client: BufReader<OwnedReadHalf>,
        mut server: OwnedWriteHalf,
        shared: &Shared,
    ) -> io::Result<()> {
        let mut statements: HashMap<Vec<u8>, Option<Request>> = HashMap::new();
        let mut portals: HashMap<Vec<u8>, Option<Request>> = HashMap::new();
        let mut unit = None;
        loop {
            let message = typed(&mut client).await?;
            let body = &message[5..];
            let mut executed = None;
            match message[0] {
                b'P' => {
                    let (name, rest) = text(body);
                    statements.insert(name.to_vec(), request_of(text(rest).0));
                }
                b'B' => {
                    let (portal, rest) = text(body);
                    let asked = statements.get(text(rest).0).copied().flatten();
                    portals.insert(portal.to_vec(), asked);
                }
                b'E' => executed = portals.get(text(body).0).copied().flatten(),
                b'Q' => executed = request_of(text(body).0),
                _ => {}
            }
            if let Some(request) = executed {
                unit = Some(request);
                if shared.pass(self.at(request, When::BeforeForwarding)).await == Fate::Cut {
                    return Ok(());
                }
            }
            let ends_unit = matches!(message[0], b'S' | b'Q');
            if ends_unit {
                self.units().push_back(unit);
            }
            if shared.through(Direction::ToServer).await == Fate::Cut {
                return Ok(());
            }
            server.write_all(&message).await?;
            if ends_unit
                && let Some(request) = unit.take()
                && shared.pass(self.at(request, When::Forwarded)).await == Fate::Cut
            {
                return Ok(());
            }
        }
    }

    async fn down(
        &self,
        mut server: BufReader<OwnedReadHalf>,
        mut client: OwnedWriteHalf,
        shared: &Shared,
    ) -> io::Result<()> {
        // The answer to a unit that somebody wants to catch is kept until it is complete.
        let mut kept = Vec::new();
        let mut failed = false;
        loop {
            let message = typed(&mut server).await?;
            let asked = self.units().front().copied().flatten();
            let moment = asked.map(|request| self.at(request, When::BeforeAnswering));
            failed |= message[0] == b'E';
            let is_end = message[0] == b'Z';
            if is_end {
                self.units().pop_front();
            }
            kept.extend_from_slice(&message);
            if let Some(moment) = moment.filter(|moment| shared.wants(*moment))
                && !failed
            {
                if !is_end {
                    continue;
                }
                if shared.pass(moment).await == Fate::Cut {
                    return Ok(());
                }
            }
            failed &= !is_end;
            if shared.through(Direction::FromServer).await == Fate::Cut {
                return Ok(());
            }
            client.write_all(&kept).await?;
            kept.clear();
        }
    }

    fn at(&self, request: Request, when: When) -> Moment {
        Moment { part: self.part, request, when }
    }

    fn units(&self) -> std::sync::MutexGuard<'_, VecDeque<Option<Request>>> {
        self.units.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A message of the startup phase: length and content.
async fn untyped(from: &mut BufReader<OwnedReadHalf>) -> io::Result<Vec<u8>> {
    let length = from.read_u32().await?;
    let mut message = length.to_be_bytes().to_vec();
    read_rest(from, &mut message, length).await?;
    Ok(message)
}

/// Type, length and content.
async fn typed(from: &mut BufReader<OwnedReadHalf>) -> io::Result<Vec<u8>> {
    let kind = from.read_u8().await?;
    let length = from.read_u32().await?;
    let mut message = vec![kind];
    message.extend_from_slice(&length.to_be_bytes());
    read_rest(from, &mut message, length).await?;
    Ok(message)
}

/// The length counts itself.
async fn read_rest(from: &mut BufReader<OwnedReadHalf>, message: &mut Vec<u8>, length: u32) -> io::Result<()> {
    let rest = usize::try_from(length).ok().and_then(|length| length.checked_sub(4));
    let rest = rest.filter(|rest| *rest < MESSAGE_MAX).ok_or(io::ErrorKind::InvalidData)?;
    let begin = message.len();
    message.resize(begin + rest, 0);
    from.read_exact(&mut message[begin..]).await?;
    Ok(())
}

fn code(startup: &[u8]) -> u32 {
    startup.get(4..8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_be_bytes)
}

/// Up to the next zero byte, and what is behind that.
fn text(bytes: &[u8]) -> (&[u8], &[u8]) {
    match bytes.iter().position(|byte| *byte == 0) {
        Some(end) => (&bytes[..end], &bytes[end + 1..]),
        None => (bytes, &[]),
    }
}

/// Every part of Daybook says who it is when it connects.
fn part_of(startup: &[u8]) -> Part {
    let mut rest = startup.get(8..).unwrap_or_default();
    while !rest.is_empty() {
        let (name, behind) = text(rest);
        let (value, behind) = text(behind);
        if name == b"application_name" {
            return match value {
                b"daybook_ledger" => Part::Engine,
                b"daybook_projector" => Part::Projector,
                b"daybook_webhooks" => Part::Webhooks,
                b"daybook_workflows" => Part::Workflows,
                _ => Part::Other,
            };
        }
        rest = behind;
    }
    Part::Other
}

fn request_of(sql: &[u8]) -> Option<Request> {
    let sql = String::from_utf8_lossy(sql).trim().to_lowercase();
    if sql.contains("ledger.append") {
        return Some(Request::Append);
    }
    if sql == "commit" {
        return Some(Request::Commit);
    }
    sql.starts_with("update webhooks.attempts").then_some(Request::Record)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_known_by_the_name_it_connects_with() {
        let startup = b"\0\0\0\0\0\x03\0\0user\0daybook\0application_name\0daybook_projector\0\0";
        assert_eq!(part_of(startup), Part::Projector);
        assert_eq!(part_of(b"\0\0\0\0\0\x03\0\0user\0daybook\0\0"), Part::Other);
    }

    #[test]
    fn statements_are_known_by_what_they_do() {
        assert_eq!(request_of(b"select ledger.append($1, $2)"), Some(Request::Append));
        assert_eq!(request_of(b"COMMIT"), Some(Request::Commit));
        assert_eq!(request_of(b"update webhooks.attempts\n set outcome = $3"), Some(Request::Record));
        assert_eq!(request_of(b"select 1"), None);
    }
}
