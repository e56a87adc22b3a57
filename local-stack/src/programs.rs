//! Where the servers' programs are: on the machine, in our cache, or, on Debian and Ubuntu, downloaded into it.
//!
//! A program that the servers' user may not execute, or of a version that cannot be used, is passed over.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use crate::{Options, StackError, data_directory::User, download, guardian::library_path, postgres::MAJOR_VERSIONS};

/// `postgres`, `initdb` and the clients beside them.
#[derive(Clone, Debug)]
pub(crate) struct PostgresPrograms {
    pub(crate) directory: PathBuf,
    /// Where downloaded programs find their libraries; empty for the machine's own.
    pub(crate) libraries: Vec<PathBuf>,
    pub(crate) major: u32,
    /// As the program says it, e.g. `15.13`.
    pub(crate) version: String,
}

#[derive(Clone, Debug)]
pub(crate) struct NatsProgram {
    pub(crate) path: PathBuf,
    pub(crate) version: String,
}

/// `wanted` is the version of a cluster that exists already.
pub(crate) async fn postgres(
    wanted: Option<u32>,
    user: Option<User>,
    options: &Options,
) -> Result<PostgresPrograms, StackError> {
    let fits = |found: &PostgresPrograms| wanted.is_none_or(|wanted| wanted == found.major);
    if options.use_machine_programs {
        let mut candidates = search_path();
        candidates.extend(MAJOR_VERSIONS.rev().flat_map(|major| {
            [
                format!("/usr/lib/postgresql/{major}/bin"),          // Debian, Ubuntu
                format!("/usr/pgsql-{major}/bin"),                   // Fedora and its kin, from postgresql.org
                format!("/opt/homebrew/opt/postgresql@{major}/bin"), // Homebrew on Apple silicon
                format!("/usr/local/opt/postgresql@{major}/bin"),    // Homebrew on Intel
                format!("/home/linuxbrew/.linuxbrew/opt/postgresql@{major}/bin"),
            ]
            .map(PathBuf::from)
        }));
        if let Some(found) =
            candidates.iter().filter_map(|directory| postgres_in(directory, Vec::new(), user)).find(fits)
        {
            return Ok(found);
        }
    }
    if cfg!(target_os = "linux") && !Path::new("/usr/share/zoneinfo/UTC").exists() {
        // The one thing outside its own tree that Debian's Postgres cannot do without: clients ask for UTC.
        return Err(StackError::Missing(format!(
            "No usable Postgres was found, and a downloaded one needs /usr/share/zoneinfo (`sudo apt-get install tzdata`). {}",
            instruction(wanted)
        )));
    }
    let majors: Vec<u32> = wanted.map_or_else(|| MAJOR_VERSIONS.rev().collect(), |wanted| vec![wanted]);
    let package = |major: &u32| format!("postgresql-{major}");
    let names: Vec<String> = majors.iter().map(package).collect();
    match download::package(&names, user, options).await {
        Ok(unpacked) => majors
            .iter()
            .find_map(|major| {
                postgres_in(
                    &unpacked.root.join(format!("usr/lib/postgresql/{major}/bin")),
                    unpacked.libraries.clone(),
                    user,
                )
            })
            .ok_or_else(|| {
                StackError::Missing(format!(
                    "the Postgres unpacked in {} does not run here. {}",
                    unpacked.root.display(),
                    instruction(wanted)
                ))
            }),
        Err(reason) => {
            Err(StackError::Missing(format!("No usable Postgres was found, and {reason}. {}", instruction(wanted))))
        }
    }
}

pub(crate) async fn nats(user: Option<User>, options: &Options) -> Result<NatsProgram, StackError> {
    if options.use_machine_programs {
        let mut candidates = search_path();
        candidates.extend(
            ["/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/opt/homebrew/bin", "/home/linuxbrew/.linuxbrew/bin"]
                .map(PathBuf::from),
        );
        if let Some(found) = candidates.iter().find_map(|directory| nats_at(&directory.join("nats-server"), user)) {
            return Ok(found);
        }
    }
    match download::package(&["nats-server".to_owned()], user, options).await {
        Ok(unpacked) => ["usr/sbin/nats-server", "usr/bin/nats-server"]
            .iter()
            .find_map(|path| nats_at(&unpacked.root.join(path), user))
            .ok_or_else(|| {
                StackError::Missing(format!(
                    "the nats-server unpacked in {} does not run here. {}",
                    unpacked.root.display(),
                    instruction(None)
                ))
            }),
        Err(reason) => {
            Err(StackError::Missing(format!("No nats-server was found, and {reason}. {}", instruction(None))))
        }
    }
}

/// What the user can do, in one sentence.
fn instruction(wanted: Option<u32>) -> String {
    let (lowest, highest) = wanted.map_or((*MAJOR_VERSIONS.start(), *MAJOR_VERSIONS.end()), |wanted| (wanted, wanted));
    let install = if cfg!(target_os = "macos") {
        format!("Install both with `brew install postgresql@{highest} nats-server`")
    } else if Path::new("/usr/bin/apt-get").exists() {
        format!(
            "Install both with `sudo apt-get install postgresql nats-server` (Postgres {lowest} to {highest}; an older release gets it from https://apt.postgresql.org, nats-server from https://github.com/nats-io/nats-server/releases)"
        )
    } else {
        format!(
            "Install Postgres {lowest} to {highest} (`postgres` and `initdb`) and nats-server with your package manager, so that they are on the PATH"
        )
    };
    format!("{install}, or name running servers in DAYBOOK_DATABASE_URL and DAYBOOK_NATS_URL.")
}

/// The directories of PATH.
fn search_path() -> Vec<PathBuf> {
    std::env::var_os("PATH").map_or_else(Vec::new, |path| {
        std::env::split_paths(&path).filter(|directory| directory.is_absolute()).collect()
    })
}

/// Postgres finds its own files relative to where it lies, so a link in PATH is followed to its target.
fn postgres_in(directory: &Path, libraries: Vec<PathBuf>, user: Option<User>) -> Option<PostgresPrograms> {
    let directory = directory.join("postgres").canonicalize().ok()?.parent()?.to_owned();
    if !directory.join("initdb").exists() || user.is_some_and(|user| !user.can_enter(&directory)) {
        return None;
    }
    let said = answer(&directory.join("postgres"), &libraries)?; // postgres (PostgreSQL) 15.13 (Debian 15.13-0+deb12u1)
    let version = said.split_whitespace().nth(2)?.to_owned();
    let major = version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
    MAJOR_VERSIONS.contains(&major).then_some(PostgresPrograms { directory, libraries, major, version })
}

fn nats_at(path: &Path, user: Option<User>) -> Option<NatsProgram> {
    let path = path.canonicalize().ok()?;
    if user.is_some_and(|user| path.parent().is_some_and(|directory| !user.can_enter(directory))) {
        return None;
    }
    let said = answer(&path, &[])?; // nats-server: v2.9.10
    let version = said.split_whitespace().last()?.trim_start_matches('v').to_owned();
    Some(NatsProgram { path, version })
}

/// What a program says to `--version`; `None` if it cannot run.
fn answer(program: &Path, libraries: &[PathBuf]) -> Option<String> {
    let mut command = Command::new(program);
    if !libraries.is_empty() {
        command.env("LD_LIBRARY_PATH", library_path(libraries));
    }
    let output = command.arg("--version").output().ok().filter(|output| output.status.success())?;
    String::from_utf8(output.stdout).ok()
}
