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
    // Laid out in one piece first: hashing many little pieces costs half as much again. Most events fit, and a longer piece
    // goes past this.
    let mut hash = Sha256::new();
    let (mut piece, mut length) = ([0; PIECE], 1);
    let mut put = |bytes: &[u8]| {
        if PIECE - length < bytes.len() {
            hash.update(&piece[..length]);
            length = 0;
        }
        match piece[length..].split_at_mut_checked(bytes.len()) {
            Some((room, _)) => {
                room.copy_from_slice(bytes);
                length += bytes.len();
            }
            None => hash.update(bytes),
        }
    };
    let mut field = |bytes: &[u8]| {
        put(&u32::try_from(bytes.len()).expect("a field of an event is far below 4 GiB").to_be_bytes());
        put(bytes);
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
    hash.update(&piece[..length]);
    hash.finalize().into()
}

/// The RFC 6962 tree hash: a node is SHA-256(0x01 ‖ left ‖ right), split at the largest power of two below the size.
pub fn root(leaves: &[Hash]) -> Hash {
    let mut tree = Tree::default();
    leaves.iter().for_each(|leaf| tree.push(*leaf));
    tree.root()
}

/// A tree that grows to the right, so that nobody need hold all leaves: splitting at powers of two gives the same nodes.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    /// Whole subtrees from left to right, each with its height; these fall.
    whole: Vec<(u32, Hash)>,
}

impl Tree {
    pub(crate) fn push(&mut self, leaf: Hash) {
        let (mut height, mut grown) = (0, leaf);
        while let Some((_, left)) = self.whole.pop_if(|(known, _)| *known == height) {
            grown = node(&left, &grown);
            height += 1;
        }
        self.whole.push((height, grown));
    }

    pub(crate) fn root(&self) -> Hash {
        let subtrees = self.whole.iter().rev().map(|(_, hash)| *hash);
        subtrees.reduce(|right, left| node(&left, &right)).unwrap_or_else(|| Sha256::digest([]).into())
    }
}

fn node(left: &Hash, right: &Hash) -> Hash {
    let mut both = [1; 65];
    both[1..33].copy_from_slice(left);
    both[33..].copy_from_slice(right);
    Sha256::digest(both).into()
}

/// A leaf is hashed in pieces of so many bytes.
const PIECE: usize = 1_024;

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
    let digit = |half: u8| char::from(b"0123456789abcdef"[usize::from(half)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leaf_is_the_hash_of_its_fields_whatever_their_length() {
        let text = "0123456789abcdef".repeat(300);
        for payload in (0..2 * PIECE).step_by(13).chain([PIECE - 1, PIECE, PIECE + 1, text.len()]) {
            for metadata in [0, 1, 110, PIECE - 4, PIECE, PIECE + 1] {
                let (payload, metadata) = (&text[..payload], &text[..metadata]);
                let of = Leaf {
                    aggregate_type: "wallet",
                    aggregate_id: "wal_1",
                    sequence: 3,
                    event_type: "WalletOpened",
                    event_version: "1.0.0",
                    recorded_at: Timestamp::EPOCH,
                    command_id: CommandId::from_uuid(uuid::Uuid::from_u128(5)),
                    key_hash: None,
                    request_hash: Some(&[7; 32]),
                    payload,
                    metadata,
                };
                let (three, at) = (3_i64.to_be_bytes(), 0_i64.to_be_bytes());
                let command = 5_u128.to_be_bytes();
                let fields: [&[u8]; 11] = [
                    b"wallet",
                    b"wal_1",
                    &three,
                    b"WalletOpened",
                    b"1.0.0",
                    &at,
                    &command,
                    &[],
                    &[7; 32],
                    payload.as_bytes(),
                    metadata.as_bytes(),
                ];
                let mut all = vec![0];
                for field in fields {
                    all.extend(u32::try_from(field.len()).unwrap().to_be_bytes());
                    all.extend(field);
                }
                assert_eq!(leaf(&of), <[u8; 32]>::from(Sha256::digest(&all)), "{} {}", payload.len(), metadata.len());
            }
        }
    }
}
