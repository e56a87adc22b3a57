//! Servers for a Debian or Ubuntu that has none: packages of the machine's own archive, unpacked into a cache.
//!
//! Nothing is installed and no rights are needed: `apt-get` works on a state and a cache of its own, checks
//! signatures as always, and `dpkg -x` only unpacks. Root does the same, because installing the packages would also
//! create and start a cluster and a service on the user's machine.
//!
//! ```text
//! <cache>/<release>-<architecture>/lock          one download at a time
//! <cache>/<release>-<architecture>/apt/          package lists
//! <cache>/<release>-<architecture>/<package>/    the package and what it needs, unpacked; complete if it exists
//! ```

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, TryLockError},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use tokio::process::Command;

use crate::{Options, data_directory::User};

/// A package and everything it needs that the machine does not have.
#[derive(Debug)]
pub(crate) struct Unpacked {
    pub(crate) root: PathBuf,
    pub(crate) libraries: Vec<PathBuf>,
}

/// Bounds one step; 70 MB over a slow line are part of it.
const STEP_BOUND: Duration = Duration::from_secs(600);

/// The first of `names` that the cache or the archive has. An error reads as the end of a sentence.
pub(crate) async fn package(names: &[String], user: Option<User>, options: &Options) -> Result<Unpacked, String> {
    let (Some(_), Some(_)) = (on_path("apt-get"), on_path("dpkg")) else {
        return Err("this machine has no apt-get to download it with".to_owned());
    };
    let cache = cache_directory(user, options)?;
    let failed = |error: io::Error| format!("{} cannot be used: {error}", cache.display());
    DirBuilder::new().recursive(true).mode(0o755).create(&cache).map_err(failed)?;
    let cache = cache.canonicalize().map_err(failed)?;
    if cache.to_string_lossy().contains(':') {
        return Err(format!("{} has a colon, which a library path cannot hold", cache.display()));
    }
    if user.is_some_and(|user| !user.can_enter(&cache)) {
        return Err(format!("the servers, which do not run as root, cannot enter {}", cache.display()));
    }
    let _lock = lock(&cache).await.map_err(failed)?;
    if let Some(unpacked) = names.iter().map(|name| cache.join(name)).find(|root| root.exists()) {
        return unpacked_in(unpacked).map_err(failed);
    }
    let apt = Apt::new(&cache).map_err(failed)?;
    (options.announce)(&format!("Reading the package lists of this machine's archive into {}", cache.display()));
    // One unreachable source among several makes `update` complain; what counts is whether the package is there now.
    let update = apt.run("apt-get", &["update"]).await;
    let mut found = None;
    for name in names {
        if apt.run("apt-cache", &["show", name]).await.is_ok() {
            found = Some(name);
            break;
        }
    }
    let Some(name) = found else {
        let wanted = names.join(" or ");
        return Err(match update {
            Ok(_) => format!("this machine's package archive has no {wanted}"),
            Err(error) => format!("the package lists could not be read ({error})"),
        });
    };
    (options.announce)(&format!("Downloading {name} and what it needs"));
    let mut arguments =
        vec!["install", "--download-only", "--reinstall", "--no-install-recommends", "--assume-yes", name];
    // A package that is installed already, though not to be used, is fetched again; so must its own parts be.
    let client = name.replace("postgresql-", "postgresql-client-");
    if client != *name {
        arguments.extend([client.as_str(), "libpq5"]);
    }
    apt.run("apt-get", &arguments).await.map_err(|error| format!("{name} could not be downloaded ({error})"))?;
    let archives = apt.archives().map_err(failed)?;
    (options.announce)(&format!("Unpacking {} packages", archives.len()));
    let unfinished = cache.join(format!("{name}.unfinished"));
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).map_err(failed)?;
    }
    for archive in &archives {
        let unpack = [Path::new("-x"), archive, &unfinished];
        run(Command::new("dpkg").args(unpack))
            .await
            .map_err(|error| format!("{} could not be unpacked ({error})", archive.display()))?;
    }
    let root = cache.join(name);
    fs::rename(&unfinished, &root).map_err(failed)?;
    for archive in &archives {
        fs::remove_file(archive).map_err(failed)?;
    }
    unpacked_in(root).map_err(failed)
}

/// apt with a state and a cache of its own; the machine's sources, keys and list of installed packages.
struct Apt {
    options: Vec<String>,
    archives: PathBuf,
}

impl Apt {
    fn new(cache: &Path) -> io::Result<Self> {
        let (state, own_cache) = (cache.join("apt/state"), cache.join("apt/cache"));
        let archives = own_cache.join("archives");
        for directory in [state.join("lists/partial"), archives.join("partial")] {
            DirBuilder::new().recursive(true).create(directory)?;
        }
        let mut options = Vec::new();
        for setting in [
            format!("Dir::State={}", state.display()),
            "Dir::State::status=/var/lib/dpkg/status".to_owned(),
            format!("Dir::Cache={}", own_cache.display()),
            "Debug::NoLocking=true".to_owned(), // those locks are the installer's; this directory has its own
            "APT::Sandbox::User=root".to_owned(), // the download user could not enter a private cache
            "APT::Get::List-Cleanup=false".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=2".to_owned(),
            "Acquire::http::Timeout=30".to_owned(),
            "Acquire::https::Timeout=30".to_owned(),
            "Binary::apt::APT::Keep-Downloaded-Packages=true".to_owned(),
        ] {
            options.extend(["-o".to_owned(), setting]);
        }
        Ok(Self { options, archives })
    }

    async fn run(&self, program: &str, arguments: &[&str]) -> Result<String, String> {
        run(Command::new(program).args(&self.options).args(arguments).env("DEBIAN_FRONTEND", "noninteractive")).await
    }

    /// What was downloaded, except the C library: every Debian has it, and two of them in one process would not do.
    fn archives(&self) -> io::Result<Vec<PathBuf>> {
        let mut archives: Vec<PathBuf> =
            fs::read_dir(&self.archives)?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
        archives.retain(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.ends_with(".deb") && !name.starts_with("libc6_") && !name.starts_with("libc-bin_")
        });
        archives.sort();
        Ok(archives)
    }
}

/// Libraries lie in `lib/<triplet>` and in `usr/lib/<triplet>`.
fn unpacked_in(root: PathBuf) -> io::Result<Unpacked> {
    let mut libraries = Vec::new();
    for parent in [root.join("usr/lib"), root.join("lib")] {
        if !parent.exists() {
            continue;
        }
        for entry in fs::read_dir(parent)? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().contains("-linux-gnu")) {
                libraries.push(path);
            }
        }
    }
    Ok(Unpacked { root, libraries })
}

/// One directory per release and architecture: after an upgrade of the machine, other libraries fit.
fn cache_directory(user: Option<User>, options: &Options) -> Result<PathBuf, String> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = match (&options.cache, user) {
        (Some(cache), _) => cache.clone(),
        (None, Some(_)) => PathBuf::from("/var/cache/daybook"), // root's own cache is closed to the servers' user
        (None, None) => variable("XDG_CACHE_HOME")
            .or_else(|| variable("HOME").map(|home| home.join(".cache")))
            .ok_or("neither HOME nor XDG_CACHE_HOME says where to keep it")?
            .join("daybook"),
    };
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let fields: BTreeMap<&str, &str> = release
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name, value.trim_matches('"')))
        .collect();
    let field = |name| fields.get(name).copied().unwrap_or("unknown");
    Ok(cache.join(format!("{}-{}-{}", field("ID"), field("VERSION_CODENAME"), std::env::consts::ARCH)))
}

async fn lock(cache: &Path) -> io::Result<File> {
    let file = File::options().create(true).truncate(false).write(true).open(cache.join("lock"))?;
    let deadline = Instant::now() + STEP_BOUND;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(100)).await
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn on_path(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|directory| directory.join(program))
        .find(|path| path.exists())
}

/// Runs a command within the bound; an error holds the last line it said.
async fn run(command: &mut Command) -> Result<String, String> {
    command.env("LC_ALL", "C").stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(STEP_BOUND, command.output())
        .await
        .map_err(|_| format!("no end within {} s", STEP_BOUND.as_secs()))?
        .map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it said nothing").trim().to_owned())
}
