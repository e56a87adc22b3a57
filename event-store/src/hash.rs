//! The hashes that make the log evident: leaf, root and chain, as API.md defines them.
//!
//! The tree hash is RFC 6962, section 2.1, over leaves that are hashed already. The auditor has its own
//! implementation and must not use this one.

use ledger_core::{CommandId, LedgerId, Timestamp};
use sha2::{Digest, Sha256};

pub type Hash = [u8; 32];

/// What a leaf is taken over, in the order of the definition.
#[derive(Clone, Copy, Debug)]
pub struct Leaf<'a> {
    pub aggregate_type: &'a str,
    pub aggregate_id: &'a str,
    pub sequence: i64,
    pub event_type: &'a str,
    pub event_version: &'a str,
    pub recorded_at: Timestamp,
    pub command_id: CommandId,
    pub key_hash: Option<&'a [u8; 16]>,
    pub request_hash: Option<&'a [u8; 32]>,
    pub payload: &'a str,
    pub metadata: &'a str,
}

/// SHA-256(0x00 ‖ for each field: its length as u32 big-endian ‖ its bytes).
pub fn leaf(of: &Leaf<'_>) -> Hash {
    let mut hash = Sha256::new();
    hash.update([0x00]);
    let mut field = |bytes: &[u8]| {
        let length = u32::try_from(bytes.len()).expect("a field of an event is far below 4 GiB");
        hash.update(length.to_be_bytes());
        hash.update(bytes);
    };
    field(of.aggregate_type.as_bytes());
    field(of.aggregate_id.as_bytes());
    field(&of.sequence.to_be_bytes());
    field(of.event_type.as_bytes());
    field(of.event_version.as_bytes());
    field(&of.recorded_at.micros().to_be_bytes());
    field(of.command_id.uuid().as_bytes());
    field(of.key_hash.map_or(&[], |hash| hash.as_slice()));
    field(of.request_hash.map_or(&[], |hash| hash.as_slice()));
    field(of.payload.as_bytes());
    field(of.metadata.as_bytes());
    hash.finalize().into()
}

/// The RFC 6962 tree hash: a node is SHA-256(0x01 ‖ left ‖ right), split at the largest power of two below the size.
pub fn root(leaves: &[Hash]) -> Hash {
    match leaves {
        [] => Sha256::digest([]).into(),
        [only] => *only,
        _ => {
            let split = 1 << (leaves.len() - 1).ilog2();
            let (left, right) = leaves.split_at(split);
            Sha256::new().chain_update([0x01]).chain_update(root(left)).chain_update(root(right)).finalize().into()
        }
    }
}

/// SHA-256(previous chain ‖ root ‖ first position ‖ last position).
pub fn chain(previous: &Hash, root: &Hash, first: i64, last: i64) -> Hash {
    Sha256::new()
        .chain_update(previous)
        .chain_update(root)
        .chain_update(first.to_be_bytes())
        .chain_update(last.to_be_bytes())
        .finalize()
        .into()
}

/// The chain of commit 0, which binds the ledger's id.
pub fn genesis(ledger: LedgerId) -> Hash {
    Sha256::new().chain_update("daybook").chain_update(ledger.uuid().as_bytes()).finalize().into()
}

/// Lower-case hex, as hashes appear in JSON.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a String cannot fail");
        text
    })
}

/// Reads lower-case hex of exactly `N` bytes.
pub fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let text = text.as_bytes();
    if text.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}
