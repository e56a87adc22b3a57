//! `DIR/connection.json`: how to reach the running system, for people, scripts and outside checks.
//!
//! Written when everything is ready, removed at a clean stop, readable by its owner only: it holds credentials. A system
//! that was killed leaves it behind, so whoever reads it has to see for itself whether anything answers.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

#[derive(Deserialize, Serialize)]
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

#[derive(Clone, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Credentials {
    pub(crate) client_id: String,
    pub(crate) client_secret: String,
}

impl Connection {
    /// What the file in the directory says, if there is one.
    pub(crate) fn read(data_dir: &Path) -> anyhow::Result<Option<Self>> {
        let path = data_dir.join(FILE);
        match std::fs::read(&path) {
            Ok(content) => {
                let connection = serde_json::from_slice(&content);
                connection.map(Some).with_context(|| format!("{} is damaged", path.display()))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
        }
    }
}

/// The database that was named or, without a name, that of the system which runs on the directory.
pub(crate) fn database_url(named: Option<&str>, data_dir: &Path) -> anyhow::Result<String> {
    if let Some(url) = named.filter(|url| !url.is_empty()) {
        return Ok(url.to_owned());
    }
    let running = Connection::read(data_dir)?.with_context(|| {
        format!(
            "no daybook runs on {}; name another --data-dir, or a database with --database-url or DAYBOOK_DATABASE_URL",
            data_dir.display()
        )
    })?;
    Ok(running.database_url)
}

/// The file, as long as the system runs.
pub(crate) struct ConnectionFile(PathBuf);

impl ConnectionFile {
    /// Removes what a system that was killed has left: whoever waits for the file must not take the old one for ours.
    /// Only for the owner of the directory's lock.
    pub(crate) fn remove_stale(data_dir: &Path) -> anyhow::Result<()> {
        let path = data_dir.join(FILE);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// One member a line, so that a shell can take a line and hand its object on.
    pub(crate) fn write(data_dir: &Path, connection: &Connection) -> anyhow::Result<Self> {
        let members = serde_json::to_value(connection)?;
        let members = members.as_object().expect("a struct is an object");
        let order = ["pid", "baseUrl", "bankUrl", "databaseUrl", "natsUrl", "admin", "demoPartner"];
        let lines: Vec<_> = order.iter().map(|name| format!("  \"{name}\": {}", members[*name])).collect();
        let path = data_dir.join(FILE);
        write_private(&path, format!("{{\n{}\n}}\n", lines.join(",\n")).as_bytes())?;
        Ok(Self(path))
    }
}

/// However the system comes to its end, as long as it comes there by itself.
impl Drop for ConnectionFile {
    fn drop(&mut self) {
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
        std::fs::rename(&new, path)?;
        // The name must be on the disk too before anything is sealed with a key that only this file has.
        let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty());
        std::fs::File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
    };
    write().with_context(|| format!("writing {}", path.display()))
}

const FILE: &str = "connection.json";
