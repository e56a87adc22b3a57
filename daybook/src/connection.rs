//! `DIR/connection.json`: how to reach the running system, for people, scripts and outside checks.
//!
//! Written when everything is ready, removed at a clean stop, readable by its owner only: it holds credentials.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Connection {
    pub(crate) pid: u32,
    pub(crate) base_url: String,
    pub(crate) bank_url: String,
    pub(crate) database_url: String,
    pub(crate) nats_url: String,
    pub(crate) admin: Credentials,
    pub(crate) demo_partner: Option<Credentials>,
}

#[derive(Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Credentials {
    pub(crate) client_id: String,
    pub(crate) client_secret: String,
}

/// The file, as long as the system runs.
pub(crate) struct ConnectionFile(PathBuf);

impl ConnectionFile {
    /// One member a line, so that a shell can take a line and hand its object on.
    pub(crate) fn write(data_dir: &Path, connection: &Connection) -> anyhow::Result<Self> {
        let members = serde_json::to_value(connection)?;
        let members = members.as_object().expect("a struct is an object");
        let order = ["pid", "baseUrl", "bankUrl", "databaseUrl", "natsUrl", "admin", "demoPartner"];
        let lines: Vec<_> = order.iter().map(|name| format!("  \"{name}\": {}", members[*name])).collect();
        let path = data_dir.join("connection.json");
        write_private(&path, format!("{{\n{}\n}}\n", lines.join(",\n")).as_bytes())?;
        Ok(Self(path))
    }

    pub(crate) fn remove(self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::warn!(%error, path = %self.0.display(), "the connection file stays behind");
        }
    }
}

/// Writes a file that only its owner may read, whole or not at all.
pub(crate) fn write_private(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    let new = path.with_extension("new");
    let write = || {
        let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&new, path)
    };
    write().with_context(|| format!("writing {}", path.display()))
}
