//! The data directory: its lock, the user the servers run as, and the place where that user can reach their files.
//!
//! ```text
//! <data>/lock                  held by us and by every server; names our process
//! <data>/private-servers.json  passwords and ports, ours alone (0600)
//! <data>/servers/              the servers' own; a link when they cannot reach <data>, see `place_servers`
//! ```
//! What lies inside `servers/` is told by `postgres.rs` and `nats.rs`.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError},
    io::{self, Read, Seek, Write},
    net::{Ipv4Addr, TcpListener},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};

use crate::{Announce, StackError};

/// The user whose rights the servers get when we are root, since Postgres refuses root.
#[derive(Clone, Copy, Debug)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// A locked data directory.
#[derive(Debug)]
pub(crate) struct DataDirectory {
    pub(crate) path: PathBuf,
    pub(crate) lock: File,
}

/// What a second start must find again.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Access {
    pub(crate) postgres_password: String,
    pub(crate) postgres_port: Option<u16>,
    pub(crate) nats_password: String,
    pub(crate) nats_port: Option<u16>,
}

/// How long the servers of a killed owner may take to vanish; their guardians need at most ten seconds.
const INHERITANCE_BOUND: Duration = Duration::from_secs(20);
/// How long a living owner is given. One that has just let go may be forking on another thread, and until that child
/// becomes another program it holds every descriptor, the lock's too.
const RELEASE_BOUND: Duration = Duration::from_secs(1);

impl DataDirectory {
    /// Creates the directory if need be, and locks it. A lock that servers still hold although their owner is dead
    /// is waited for; one that belongs to a living owner is an error.
    pub(crate) async fn open(path: &Path) -> Result<Self, StackError> {
        let failed = |source| StackError::io(format!("opening the data directory {}", path.display()), source);
        if !path.exists() {
            // 0711: another user may pass through to `servers/`, and list nothing.
            DirBuilder::new().recursive(true).mode(0o711).create(path).map_err(failed)?;
        }
        let path = path.canonicalize().map_err(failed)?;
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path.join("lock"))
            .map_err(failed)?;
        let began = Instant::now();
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::Error(source)) => return Err(failed(source)),
                Err(TryLockError::WouldBlock) => {
                    let owner = owner_named_in(&mut lock).map_err(failed)?;
                    let bound = if owner.is_some_and(is_alive) { RELEASE_BOUND } else { INHERITANCE_BOUND };
                    if bound <= began.elapsed() {
                        return Err(StackError::Locked { directory: path, pid: owner });
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
        lock.set_len(0).and_then(|()| lock.rewind()).map_err(failed)?;
        lock.write_all(std::process::id().to_string().as_bytes()).map_err(failed)?;
        Ok(Self { path, lock })
    }

    /// The passwords and last ports; passwords are made, and kept, on first use.
    pub(crate) fn access(&self) -> Result<Access, StackError> {
        let file = self.access_file();
        let failed = |source| StackError::io(format!("reading {}", file.display()), source);
        match fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| failed(error.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let access = Access {
                    postgres_password: random_hex()?,
                    postgres_port: None,
                    nats_password: random_hex()?,
                    nats_port: None,
                };
                self.keep(&access)?;
                Ok(access)
            }
            Err(error) => Err(failed(error)),
        }
    }

    pub(crate) fn keep(&self, access: &Access) -> Result<(), StackError> {
        let bytes = serde_json::to_vec_pretty(access).expect("strings and numbers always serialise");
        write_private(&self.access_file(), &bytes, None)
    }

    fn access_file(&self) -> PathBuf {
        self.path.join("private-servers.json")
    }

    /// Makes `servers/` and says whose rights the servers take.
    ///
    /// Root's servers run as another user, who cannot enter a directory below, say, a 0700 `/root`. Opening up
    /// somebody's home is not ours to do: then the files live in `/var/lib/daybook`, and `servers` is a link to them.
    pub(crate) fn place_servers(&self, announce: Announce) -> Result<(PathBuf, Option<User>), StackError> {
        let link = self.path.join("servers");
        let failed = |source| StackError::io(format!("preparing {}", link.display()), source);
        let us = rustix::process::geteuid();
        if let Ok(servers) = link.canonicalize() {
            let owner = servers.metadata().map_err(failed)?;
            if us.is_root() && owner.uid() != 0 {
                return Ok((servers, Some(User { uid: owner.uid(), gid: owner.gid() })));
            }
            if !us.is_root() && owner.uid() == us.as_raw() {
                return Ok((servers, None));
            }
            let owner = owner.uid();
            return Err(StackError::Data(format!(
                "{} belongs to user {owner}, so user {us} cannot run its servers: start as the user who made it, or use another data directory",
                servers.display()
            )));
        }
        if fs::symlink_metadata(&link).is_ok() {
            return Err(StackError::Data(format!(
                "{} leads nowhere: bring its target back, or remove the data directory to begin anew",
                link.display()
            )));
        }
        if !us.is_root() {
            DirBuilder::new().mode(0o700).create(&link).map_err(failed)?;
            return Ok((link, None));
        }
        let user = unprivileged_user()?;
        let servers = if user.can_enter(&self.path) {
            link.clone()
        } else {
            let elsewhere = Path::new("/var/lib/daybook");
            DirBuilder::new().recursive(true).mode(0o711).create(elsewhere).map_err(failed)?;
            if !user.can_enter(elsewhere) {
                return Err(StackError::Data(format!(
                    "user {} must be able to enter {} or {}: choose a data directory outside private directories",
                    user.uid,
                    self.path.display(),
                    elsewhere.display()
                )));
            }
            let servers = elsewhere.join(random_hex()?);
            std::os::unix::fs::symlink(&servers, &link).map_err(failed)?;
            announce(&format!(
                "Keeping the servers' files in {}, since they do not run as root and {} is private",
                servers.display(),
                self.path.display()
            ));
            servers
        };
        DirBuilder::new().mode(0o700).create(&servers).map_err(failed)?;
        std::os::unix::fs::chown(&servers, Some(user.uid), Some(user.gid)).map_err(failed)?;
        Ok((servers, Some(user)))
    }
}

impl User {
    /// Whether this user may pass through `path` and every directory above it.
    pub(crate) fn can_enter(&self, path: &Path) -> bool {
        path.ancestors().all(|directory| {
            directory.metadata().is_ok_and(|found| {
                let search = match (found.uid() == self.uid, found.gid() == self.gid) {
                    (true, _) => 0o100,
                    (false, true) => 0o010,
                    (false, false) => 0o001,
                };
                found.mode() & search != 0
            })
        })
    }

    /// The user that servers will have in a new data directory: none when we are not root.
    pub(crate) fn for_new_servers() -> Result<Option<Self>, StackError> {
        if rustix::process::geteuid().is_root() { unprivileged_user().map(Some) } else { Ok(None) }
    }
}

/// Writes a file that only its owner, `user` or us, can read; whole or not at all, and through no link left there.
pub(crate) fn write_private(path: &Path, bytes: &[u8], user: Option<User>) -> Result<(), StackError> {
    let write = || {
        let directory = path.parent().expect("every file of ours lies in a directory");
        let mut file = tempfile::NamedTempFile::new_in(directory)?; // created with 0600
        file.write_all(bytes)?;
        if let Some(User { uid, gid }) = user {
            std::os::unix::fs::fchown(file.as_file(), Some(uid), Some(gid))?;
        }
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        File::open(directory)?.sync_all() // the name too: a cluster whose password is lost opens for nobody
    };
    write().map_err(|source| StackError::io(format!("writing {}", path.display()), source))
}

/// A directory of the servers' user inside `servers/`.
pub(crate) fn make_private(path: &Path, user: Option<User>) -> Result<(), StackError> {
    let make = || {
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        fs::set_permissions(path, Permissions::from_mode(0o700))?;
        match user {
            Some(User { uid, gid }) => std::os::unix::fs::chown(path, Some(uid), Some(gid)),
            None => Ok(()),
        }
    };
    make().map_err(|source| StackError::io(format!("making {}", path.display()), source))
}

/// `preferred` if nobody has it, otherwise any free port.
///
/// Never one the kernel gives to outgoing connections: a client that keeps calling a stopped server there would in
/// the end be connected to itself, and hold the port against the server's return.
pub(crate) fn free_port(preferred: Option<u16>) -> Result<u16, StackError> {
    const BELOW_EPHEMERAL: std::ops::Range<u16> = 15_000..32_000;
    let is_free = |port: u16| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
    if let Some(port) = preferred.filter(|port| is_free(*port)) {
        return Ok(port);
    }
    for _ in 0..100 {
        let port =
            BELOW_EPHEMERAL.start + u16::from_be_bytes(random()?) % (BELOW_EPHEMERAL.end - BELOW_EPHEMERAL.start);
        if is_free(port) {
            return Ok(port);
        }
    }
    Err(StackError::Data("no free port was found on 127.0.0.1 in a hundred tries".to_owned()))
}

/// 128 random bits.
pub(crate) fn random_hex() -> Result<String, StackError> {
    Ok(random::<16>()?.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn random<const N: usize>() -> Result<[u8; N], StackError> {
    let mut bytes = [0; N];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| StackError::Data("the operating system gave no random bytes".to_owned()))?;
    Ok(bytes)
}

fn owner_named_in(lock: &mut File) -> io::Result<Option<i32>> {
    let mut text = String::new();
    lock.rewind()?;
    lock.take(20).read_to_string(&mut text)?;
    Ok(text.trim().parse().ok()) // empty while its owner is just writing it
}

fn is_alive(pid: i32) -> bool {
    let Some(pid) = rustix::process::Pid::from_raw(pid) else { return false };
    rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH)
}

/// `postgres` where its packages made one, otherwise `nobody`: Postgres needs a user with a line in the user list.
fn unprivileged_user() -> Result<User, StackError> {
    let list = fs::read_to_string("/etc/passwd").map_err(|source| StackError::io("reading /etc/passwd", source))?;
    ["postgres", "nobody"].iter().find_map(|name| user_in(&list, name)).ok_or_else(|| {
        StackError::Data("Postgres cannot run as root, and there is neither a user `postgres` nor `nobody`: start as an ordinary user".to_owned())
    })
}

fn user_in(list: &str, name: &str) -> Option<User> {
    let line = list.lines().find(|line| line.split(':').next() == Some(name))?;
    let id = |field: &str| field.parse::<i64>().ok().map(|id| id as u32); // macOS writes nobody as -2
    let fields: Vec<&str> = line.split(':').collect();
    Some(User { uid: id(fields.get(2)?)?, gid: id(fields.get(3)?)? })
}
