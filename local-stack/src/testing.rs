//! For tests: the servers of a test process, and a database of a test's own.
//!
//! Both servers start with the first test that asks and vanish, files included, with the process, however it ends.
//! Nothing here lives on a test's runtime: the servers are processes, and connections are short.
//! A test that kills a server starts a [`Stack`] of its own, or it would kill its neighbours'.

use std::{
    future::Future,
    os::{fd::OwnedFd, unix::process::CommandExt},
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::Context;
use sqlx::Connection;
use tokio::sync::OnceCell;

use crate::{
    Options, Stack,
    data_directory::User,
    nats,
    postgres::{connect, with_database},
    programs,
};

/// A database of one test. It is not removed before the server is.
#[derive(Clone, Debug)]
pub struct TestDatabase {
    name: String,
    url: String,
}

impl TestDatabase {
    /// The superuser's address of this database.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Unique within the process; fit for a stream's name as well.
    pub fn name(&self) -> &str {
        &self.name
    }
}

static STACK: OnceCell<Stack> = OnceCell::const_new();
static TEMPLATE: OnceCell<()> = OnceCell::const_new();
static DATABASES: AtomicU32 = AtomicU32::new(0);

const TEMPLATE_NAME: &str = "test_template";

/// The servers of this test process.
///
/// Always private: a test may do anything to its servers, and nobody's own may be named by accident in an environment.
pub async fn stack() -> &'static Stack {
    STACK
        .get_or_init(|| async {
            start_temporary().await.expect("a test needs its servers; this is why they are not there")
        })
        .await
}

/// A client of this test process' bus, with the administrator's rights, on the caller's runtime.
pub async fn nats() -> async_nats::Client {
    nats::connect(stack().await.nats_url()).await.expect("the private nats-server answers its own process")
}

/// The nats-server that tests run, for a test that starts one with a configuration of its own.
pub async fn nats_program() -> std::path::PathBuf {
    let found = programs::nats(None, &Options::default()).await;
    found.expect("a test needs a nats-server; this is why there is none").path
}

/// A database of the test's own, cloned from a template.
///
/// `migrate` gets the template's address and prepares it. It is called once per process, so all calls in one process
/// must mean the same. Roles belong to the whole server: make them there, once, never per test.
pub async fn database<F, Fut>(migrate: F) -> TestDatabase
where
    F: FnOnce(String) -> Fut,
    Fut: Future<Output = anyhow::Result<()>>,
{
    let url = stack().await.database_url();
    TEMPLATE
        .get_or_init(|| async {
            make_template(url, migrate).await.expect("the template of the test databases was not made")
        })
        .await;
    let name = format!("test_{}", DATABASES.fetch_add(1, Ordering::Relaxed));
    clone_template(url, &name).await.expect("the template could not be cloned");
    TestDatabase { url: with_database(url, &name), name }
}

async fn start_temporary() -> anyhow::Result<Stack> {
    let directory = tempfile::Builder::new().prefix("daybook-test-").tempdir()?.keep();
    let directory = directory.as_path();
    if User::for_new_servers()?.is_some() {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o711))?; // the servers' user passes through
    }
    let options = Options { durable: false, ..Options::default() }; // nobody misses this data, and commits are ten times faster
    Ok(Stack::start_held(directory, options, Some(spawn_remover(directory)?)).await?)
}

/// A process that waits for the end of us and of every server, then removes the directory.
fn spawn_remover(directory: &Path) -> anyhow::Result<OwnedFd> {
    // `servers` may be a link; what it leads to goes too.
    const SCRIPT: &str =
        r#"cat; cd "$1" || exit; [ -L servers ] && rm -rf -- "$(readlink servers)"; cd / && rm -rf -- "$1""#;
    let mut remover = Command::new("/bin/sh")
        .args(["-c", SCRIPT, "daybook-remover"])
        .arg(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .context("starting the remover of the tests' data")?;
    Ok(remover.stdin.take().expect("standard input was asked to be a pipe").into())
}

async fn make_template<F, Fut>(url: &str, migrate: F) -> anyhow::Result<()>
where
    F: FnOnce(String) -> Fut,
    Fut: Future<Output = anyhow::Result<()>>,
{
    let mut connection = connect(url).await?;
    // A first test that failed half-way leaves a template that the next test's attempt starts over.
    sqlx::query(&format!("drop database if exists {TEMPLATE_NAME} with (force)")).execute(&mut connection).await?;
    sqlx::query(&format!("create database {TEMPLATE_NAME}")).execute(&mut connection).await?;
    migrate(with_database(url, TEMPLATE_NAME)).await?;
    // Nobody may be connected to what is cloned; `migrate` may have left connections that are still closing.
    sqlx::query(&format!("alter database {TEMPLATE_NAME} allow_connections false")).execute(&mut connection).await?;
    sqlx::query("select pg_terminate_backend(pid) from pg_stat_activity where datname = $1")
        .bind(TEMPLATE_NAME)
        .execute(&mut connection)
        .await?;
    connection.close().await?;
    Ok(())
}

async fn clone_template(url: &str, name: &str) -> anyhow::Result<()> {
    let mut connection = connect(url).await?;
    sqlx::query(&format!("create database {name} template {TEMPLATE_NAME}")).execute(&mut connection).await?;
    connection.close().await?;
    Ok(())
}
