//! Sealing: what must be kept secret at rest (signing keys, webhook secrets), and keys derived from the one key.
//!
//! The one key is given at start and is in no database: a copy of the database alone opens nothing.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf;

use crate::secret::random;

/// The first byte of what is sealed; a change of form takes the next one.
const VERSION: u8 = 1;

const KEY_ID_LEN: usize = 8;
const HEADER_LEN: usize = 1 + KEY_ID_LEN + NONCE_LEN;

/// AES-256-GCM with an id for the key, so that a wrong key is told from broken data. Cheap to clone.
#[derive(Clone)]
pub struct Seal(Arc<Keys>);

struct Keys {
    id: [u8; KEY_ID_LEN],
    cipher: LessSafeKey,
    root: hkdf::Prk,
}

/// Why something sealed stays closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    #[error("sealed with another key than the one given")]
    OtherKey,
    #[error("what was sealed is broken, or belongs elsewhere")]
    Broken,
}

/// Why a file is not a key.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    #[error("reading the key file {}: {source}", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{} does not hold exactly 32 bytes", path.display())]
    WrongSize { path: PathBuf },
}

impl Seal {
    pub fn from_key(key: [u8; 32]) -> Self {
        // Nothing is used for two purposes: cipher, key id and each derived key come from the root by their own label.
        let root = hkdf::Salt::new(hkdf::HKDF_SHA256, b"daybook").extract(&key);
        let mut id = [0; KEY_ID_LEN];
        id.copy_from_slice(&expand(&root, "key id")[..KEY_ID_LEN]);
        let key = UnboundKey::new(&AES_256_GCM, &expand(&root, "seal")).expect("32 bytes are a key of AES-256");
        Self(Arc::new(Keys { id, cipher: LessSafeKey::new(key), root }))
    }

    /// From a file of exactly 32 random bytes, as every service is given it.
    pub fn from_key_file(path: &Path) -> Result<Self, KeyFileError> {
        let bytes = std::fs::read(path).map_err(|source| KeyFileError::Unreadable { path: path.to_owned(), source })?;
        let key = bytes.try_into().map_err(|_| KeyFileError::WrongSize { path: path.to_owned() })?;
        Ok(Self::from_key(key))
    }

    /// A key for another purpose, named by the label.
    pub fn derive(&self, label: &str) -> [u8; 32] {
        expand(&self.0.root, &format!("derived {label}"))
    }

    /// Seals a text for one place: `aad` names it (a table and a row), and only there it opens again.
    pub fn seal(&self, aad: &str, plain: &[u8]) -> Vec<u8> {
        let nonce = random::<NONCE_LEN>();
        let mut sealed = Vec::with_capacity(HEADER_LEN + plain.len() + AES_256_GCM.tag_len());
        sealed.push(VERSION);
        sealed.extend_from_slice(&self.0.id);
        sealed.extend_from_slice(&nonce);
        let mut text = plain.to_vec();
        self.0
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
        if header[1..=KEY_ID_LEN] != self.0.id {
            return Err(SealError::OtherKey);
        }
        let nonce = Nonce::try_assume_unique_for_key(&header[1 + KEY_ID_LEN..]).map_err(|_| SealError::Broken)?;
        let mut text = text.to_vec();
        let plain = self.0.cipher.open_in_place(nonce, Aad::from(aad), &mut text).map_err(|_| SealError::Broken)?;
        Ok(plain.to_vec())
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
