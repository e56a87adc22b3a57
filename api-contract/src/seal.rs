//! Sealing: what must be kept secret at rest (signing keys, webhook secrets), and keys derived from the one key.
//!
//! The keys are given at start and are in no database: a copy of the database alone opens nothing. There may be
//! several: the first one seals, all of them open. So a new key is put before the old ones, and these go once
//! nothing is sealed with them any more.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf;

use crate::secret::random;

/// The first byte of what is sealed; a change of form takes the next one.
const VERSION: u8 = 1;

const KEY_ID_LEN: usize = 8;
const HEADER_LEN: usize = 1 + KEY_ID_LEN + NONCE_LEN;

/// AES-256-GCM with an id for the key, so that each text finds its key and a wrong one is told from broken data. Cheap to
/// clone.
#[derive(Clone)]
pub struct Seal(Arc<Keys>);

struct Keys {
    /// Seals, and from it other keys are derived.
    newest: Key,
    older: Vec<Key>,
}

struct Key {
    id: [u8; KEY_ID_LEN],
    cipher: LessSafeKey,
    root: hkdf::Prk,
}

/// Why something sealed stays closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    #[error("sealed with another key than those given")]
    OtherKey,
    #[error("what was sealed is broken, or belongs elsewhere")]
    Broken,
}

/// Why a file is not a key.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    #[error("reading the key file {}: {source}", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{} does not hold exactly 32 bytes, or so many for each of several keys", path.display())]
    WrongSize { path: PathBuf },
}

impl Seal {
    pub fn from_key(key: [u8; 32]) -> Self {
        Self::from_keys(key, &[])
    }

    /// With older keys beside the one that seals, for what they have sealed.
    pub fn from_keys(newest: [u8; 32], older: &[[u8; 32]]) -> Self {
        Self(Arc::new(Keys { newest: Key::new(newest), older: older.iter().copied().map(Key::new).collect() }))
    }

    /// From a file of 32 random bytes, as every service is given it; older keys may follow, 32 bytes each.
    pub fn from_key_file(path: &Path) -> Result<Self, KeyFileError> {
        let bytes = std::fs::read(path).map_err(|source| KeyFileError::Unreadable { path: path.to_owned(), source })?;
        match bytes.as_chunks::<32>() {
            ([newest, older @ ..], []) => Ok(Self::from_keys(*newest, older)),
            _ => Err(KeyFileError::WrongSize { path: path.to_owned() }),
        }
    }

    /// A key for another purpose, named by the label. A new newest key makes it another one.
    pub fn derive(&self, label: &str) -> [u8; 32] {
        expand(&self.0.newest.root, &format!("derived {label}"))
    }

    /// Seals a text for one place: `aad` names it (a table and a row), and only there it opens again.
    pub fn seal(&self, aad: &str, plain: &[u8]) -> Vec<u8> {
        let nonce = random::<NONCE_LEN>();
        let mut sealed = Vec::with_capacity(HEADER_LEN + plain.len() + AES_256_GCM.tag_len());
        sealed.push(VERSION);
        sealed.extend_from_slice(&self.0.newest.id);
        sealed.extend_from_slice(&nonce);
        let mut text = plain.to_vec();
        self.0
            .newest
            .cipher
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(aad), &mut text)
            .expect("no text of ours is too long to seal");
        sealed.extend_from_slice(&text);
        sealed
    }

    pub fn open(&self, aad: &str, sealed: &[u8]) -> Result<Vec<u8>, SealError> {
        let (header, text) = sealed.split_at_checked(HEADER_LEN).ok_or(SealError::Broken)?;
        if header[0] != VERSION {
            return Err(SealError::Broken);
        }
        let mut keys = std::iter::once(&self.0.newest).chain(&self.0.older);
        let key = keys.find(|key| header[1..=KEY_ID_LEN] == key.id).ok_or(SealError::OtherKey)?;
        let nonce = Nonce::try_assume_unique_for_key(&header[1 + KEY_ID_LEN..]).map_err(|_| SealError::Broken)?;
        let mut text = text.to_vec();
        let plain = key.cipher.open_in_place(nonce, Aad::from(aad), &mut text).map_err(|_| SealError::Broken)?;
        Ok(plain.to_vec())
    }
}

impl Key {
    fn new(key: [u8; 32]) -> Self {
        // Nothing is used for two purposes: cipher, key id and each derived key come from the root by their own label.
        let root = hkdf::Salt::new(hkdf::HKDF_SHA256, b"daybook").extract(&key);
        let mut id = [0; KEY_ID_LEN];
        id.copy_from_slice(&expand(&root, "key id")[..KEY_ID_LEN]);
        let key = UnboundKey::new(&AES_256_GCM, &expand(&root, "seal")).expect("32 bytes are a key of AES-256");
        Self { id, cipher: LessSafeKey::new(key), root }
    }
}

fn expand(root: &hkdf::Prk, label: &str) -> [u8; 32] {
    let mut key = [0; 32];
    root.expand(&[label.as_bytes()], hkdf::HKDF_SHA256)
        .and_then(|okm| okm.fill(&mut key))
        .expect("HKDF-SHA-256 gives 32 bytes");
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sealed_opens_with_the_same_key_in_the_same_place_only() {
        let seal = Seal::from_key([1; 32]);
        let sealed = seal.seal("keys/a", b"secret");
        assert_eq!(Seal::from_key([1; 32]).open("keys/a", &sealed), Ok(b"secret".to_vec()));
        assert_eq!(seal.open("keys/b", &sealed), Err(SealError::Broken));
        assert_eq!(Seal::from_key([2; 32]).open("keys/a", &sealed), Err(SealError::OtherKey));
        assert_ne!(seal.seal("keys/a", b"secret"), sealed, "each sealing has its own nonce");
    }

    #[test]
    fn a_new_key_seals_and_the_old_ones_beside_it_still_open() {
        let (old, both) = (Seal::from_key([1; 32]), Seal::from_keys([2; 32], &[[1; 32]]));
        assert_eq!(both.open("keys/a", &old.seal("keys/a", b"secret")), Ok(b"secret".to_vec()));
        let sealed = both.seal("keys/a", b"secret");
        assert_eq!(Seal::from_key([2; 32]).open("keys/a", &sealed), Ok(b"secret".to_vec()));
        assert_eq!(old.open("keys/a", &sealed), Err(SealError::OtherKey));
        assert_eq!(both.open("keys/b", &old.seal("keys/a", b"secret")), Err(SealError::Broken), "another place");
        assert_eq!(both.open("keys/a", &Seal::from_key([3; 32]).seal("keys/a", b"")), Err(SealError::OtherKey));
    }

    #[test]
    fn a_key_file_holds_one_key_or_several_and_nothing_else() {
        let path = std::env::temp_dir().join(format!("daybook-keys-{}", uuid::Uuid::now_v7()));
        let sealed = Seal::from_key([1; 32]).seal("keys/a", b"secret");
        for (bytes, opens) in [([1; 32].to_vec(), true), ([[2; 32], [1; 32]].concat(), true), ([2; 32].to_vec(), false)]
        {
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(Seal::from_key_file(&path).unwrap().open("keys/a", &sealed).is_ok(), opens);
        }
        for size in [0, 31, 33, 65] {
            std::fs::write(&path, vec![1; size]).unwrap();
            assert!(matches!(Seal::from_key_file(&path), Err(KeyFileError::WrongSize { .. })), "{size} bytes");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(Seal::from_key_file(&path), Err(KeyFileError::Unreadable { .. })));
    }

    #[test]
    fn a_changed_or_shortened_text_does_not_open() {
        let seal = Seal::from_key([1; 32]);
        let sealed = seal.seal("keys/a", b"secret");
        for place in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[place] ^= 1;
            assert!(seal.open("keys/a", &changed).is_err(), "byte {place}");
            assert!(seal.open("keys/a", &sealed[..place]).is_err(), "cut at {place}");
        }
    }

    #[test]
    fn derived_keys_differ_by_label_and_root_and_stay_the_same() {
        let seal = Seal::from_key([1; 32]);
        assert_eq!(seal.derive("cursor"), Seal::from_key([1; 32]).derive("cursor"));
        assert_ne!(seal.derive("cursor"), seal.derive("callback"));
        assert_ne!(seal.derive("cursor"), Seal::from_key([2; 32]).derive("cursor"));
    }
}
