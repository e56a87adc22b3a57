//! `DIR/installation.json`: the secrets and names that an installation keeps over restarts.
//!
//! Made at the first start from the system's randomness; there are no default secrets. Whoever may read this file
//! may do anything: it is readable by its owner only.

use std::path::Path;

use anyhow::Context;
use api_contract::{NewClient, Scopes, Seal, Secret};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ledger_core::{ClientId, PartnerId};
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::connection::{Credentials, write_private};

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Installation {
    /// Under which secrets are sealed in the database: 32 bytes in base64.
    sealing_key: String,
    /// Keys from before that one, for what they have sealed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    older_sealing_keys: Vec<String>,
    pub(crate) admin: Account,
    pub(crate) workflow: Account,
    pub(crate) demo_partner: Account,
    pub(crate) demo_partner_id: PartnerId,
    pub(crate) bank_api_key: String,
    pub(crate) bank_callback_secret: String,
    /// Where the bank listened last: payment pages that were handed out point there.
    pub(crate) bank_port: u16,
}

/// A client of our own.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Account {
    id: ClientId,
    secret: String,
}

impl Installation {
    /// The one in the directory, or a new one.
    pub(crate) fn open(data_dir: &Path) -> anyhow::Result<Self> {
        let path = data_dir.join(FILE);
        match std::fs::read(&path) {
            Ok(content) => serde_json::from_slice(&content).with_context(|| format!("{} is damaged", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let installation = Self::new()?;
                installation.save(data_dir)?;
                Ok(installation)
            }
            Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
        }
    }

    pub(crate) fn save(&self, data_dir: &Path) -> anyhow::Result<()> {
        write_private(&data_dir.join(FILE), &serde_json::to_vec_pretty(self)?)
    }

    fn new() -> anyhow::Result<Self> {
        let mut key = [0; 32];
        SystemRandom::new().fill(&mut key).map_err(|_| anyhow::anyhow!("the system has no randomness"))?;
        Ok(Self {
            sealing_key: STANDARD.encode(key),
            older_sealing_keys: Vec::new(),
            admin: Account::mint(),
            workflow: Account::mint(),
            demo_partner: Account::mint(),
            demo_partner_id: PartnerId::from_uuid(Uuid::now_v7()),
            bank_api_key: Secret::mint("dbk_").reveal().to_owned(),
            bank_callback_secret: Secret::mint("dbc_").reveal().to_owned(),
            bank_port: 0,
        })
    }

    pub(crate) fn seal(&self) -> anyhow::Result<Seal> {
        let read = |text: &String| -> anyhow::Result<[u8; 32]> {
            let key = STANDARD.decode(text).ok().and_then(|key| key.try_into().ok());
            key.context("a sealing key of the installation is damaged")
        };
        let older = self.older_sealing_keys.iter().map(read).collect::<anyhow::Result<Vec<_>>>()?;
        Ok(Seal::from_keys(read(&self.sealing_key)?, &older))
    }
}

impl Account {
    fn mint() -> Self {
        Self { id: ClientId::from_uuid(Uuid::now_v7()), secret: Secret::mint_for_client().reveal().to_owned() }
    }

    pub(crate) fn id(&self) -> ClientId {
        self.id
    }

    pub(crate) fn client(&self, partner: Option<PartnerId>, scopes: Scopes) -> NewClient {
        NewClient { id: self.id, partner, secret: Secret::new(self.secret.clone()), scopes }
    }

    pub(crate) fn credentials(&self) -> Credentials {
        Credentials { client_id: self.id.to_string(), client_secret: self.secret.clone() }
    }
}

const FILE: &str = "installation.json";
