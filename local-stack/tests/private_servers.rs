//! What a private Postgres and nats-server promise: they are found or fetched, keep their data, and never outlive us.
//!
//! Each test has servers of its own, because most of them end theirs. Claims about a killed owner need a process to
//! kill: it is this test program again, running one of the owners at the end of this file.

use std::{
    fs,
    io::{BufRead, BufReader},
    net::TcpStream,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use local_stack::{Options, Stack, StackError, testing};
use sqlx::{Connection, PgConnection};

/// Speed; what is tested here about durability is that of a server's end, not of the machine's.
fn quick() -> Options {
    Options { durable: false, ..Options::default() }
}

/// Readable by the servers' user, as a project's directory is.
fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("it is ours");
    directory
}

async fn start(data: &Path, options: Options) -> Stack {
    Stack::start(data, options).await.expect("the servers start")
}

async fn refusal(data: &Path, options: Options) -> StackError {
    Stack::start(data, options).await.expect_err("this start has to be refused")
}

async fn connection(stack: &Stack) -> PgConnection {
    PgConnection::connect(stack.database_url()).await.expect("Postgres answers")
}

async fn remember(stack: &Stack, word: &str) {
    let mut connection = connection(stack).await;
    sqlx::query("create table if not exists words (word text)")
        .execute(&mut connection)
        .await
        .expect("a table can be made");
    sqlx::query("insert into words values ($1)")
        .bind(word)
        .execute(&mut connection)
        .await
        .expect("a row can be written");
}

async fn remembered(stack: &Stack) -> Vec<String> {
    sqlx::query_scalar("select word from words")
        .fetch_all(&mut connection(stack).await)
        .await
        .expect("the table is there")
}

/// Does both servers' work once.
async fn check_both_work(stack: &Stack) {
    let one: i32 =
        sqlx::query_scalar("select 1").fetch_one(&mut connection(stack).await).await.expect("Postgres answers");
    assert_eq!(one, 1);
    let address = url::Url::parse(stack.nats_url()).expect("the address is a URL");
    let password = address.password().expect("the private server has a password").to_owned();
    let client = async_nats::ConnectOptions::with_user_and_password(address.username().to_owned(), password)
        .connect(stack.nats_url())
        .await
        .expect("nats-server answers");
    let context = async_nats::jetstream::new(client);
    let config = async_nats::jetstream::stream::Config { name: "words".to_owned(), ..Default::default() };
    context.get_or_create_stream(config).await.expect("a stream can be made");
    context
        .publish("words", "kept".into())
        .await
        .expect("a message can be sent")
        .await
        .expect("the stream acknowledges it");
}

/// The processes that Postgres and nats-server say they are.
fn server_processes(data: &Path) -> [i32; 2] {
    [postgres_file(data), data.join("servers/nats/nats.pid")].map(|file| {
        let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        text.lines().next().and_then(|line| line.trim().parse().ok()).expect("its first line is a process number")
    })
}

/// Written by Postgres itself, so it also shows whose rights Postgres has.
fn postgres_file(data: &Path) -> PathBuf {
    data.join("servers/postgres/postmaster.pid")
}

fn is_alive(process: i32) -> bool {
    let process = rustix::process::Pid::from_raw(process).expect("a server's number is positive");
    rustix::process::test_kill_process(process).is_ok()
}

/// Waits, 20 s at most.
fn eventually(claim: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "still not so: {claim}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Guardians, servers and every connection's process hold the lock, so a free lock says that all of them are gone.
fn lock_is_free(data: &Path) -> bool {
    fs::File::open(data.join("lock")).is_ok_and(|lock| lock.try_lock().is_ok())
}

#[tokio::test]
async fn a_second_start_continues() {
    let directory = directory();
    let data = directory.path().join("data");
    let stack = start(&data, quick()).await;
    check_both_work(&stack).await;
    remember(&stack, "first").await;
    let addresses = (stack.database_url().to_owned(), stack.nats_url().to_owned());
    stack.stop().await.expect("the servers stop");
    eventually("a stopped stack leaves nobody behind", || lock_is_free(&data));

    let stack = start(&data, quick()).await;
    assert_eq!(remembered(&stack).await, ["first"]);
    assert_eq!((stack.database_url(), stack.nats_url()), (addresses.0.as_str(), addresses.1.as_str()));
    stack.stop().await.expect("the servers stop");
}

#[tokio::test]
async fn the_cluster_is_made_for_a_ledger() {
    let directory = directory();
    let stack = start(&directory.path().join("data"), Options::default()).await;
    let mut connection = connection(&stack).await;
    for (setting, expected) in [
        ("fsync", "on"),
        ("synchronous_commit", "on"),
        ("full_page_writes", "on"),
        ("data_checksums", "on"),
        ("server_encoding", "UTF8"),
        ("lc_messages", "C"),
        ("password_encryption", "scram-sha-256"),
        ("listen_addresses", "127.0.0.1"),
        ("unix_socket_directories", ""),
    ] {
        let found: String = sqlx::query_scalar("select current_setting($1)")
            .bind(setting)
            .fetch_one(&mut connection)
            .await
            .expect("it is a setting");
        assert_eq!(found, expected, "{setting}");
    }
    let passwordless = stack
        .database_url()
        .replace(url::Url::parse(stack.database_url()).expect("a URL").password().expect("a password"), "wrong");
    PgConnection::connect(&passwordless).await.expect_err("another password is refused");
    stack.stop().await.expect("the servers stop");
}

/// Here only where there is something to find; elsewhere every other test of this file downloads.
#[tokio::test]
async fn servers_that_this_machine_has_are_used_and_nothing_is_downloaded() {
    let has = |program: &str, hidden: &[&str]| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).chain(hidden.iter().map(PathBuf::from)).any(|place| place.join(program).exists())
    };
    let debian: Vec<String> = (15..=18).map(|major| format!("/usr/lib/postgresql/{major}/bin")).collect();
    let debian: Vec<&str> = debian.iter().map(String::as_str).collect();
    let all_are_here = has("postgres", &debian) && has("nats-server", &["/usr/sbin"]);
    let directory = directory();
    let cache = directory.path().join("cache");
    let options = if all_are_here { Options { cache: Some(cache.clone()), ..quick() } } else { quick() };
    let stack = start(&directory.path().join("data"), options).await;
    check_both_work(&stack).await;
    let program = PathBuf::from(stack.postgres_command("initdb").expect("it is beside the server").get_program());
    assert_eq!(all_are_here, !program.ancestors().any(|place| place.ends_with("daybook")), "{}", program.display());
    assert!(!cache.exists());
    stack.stop().await.expect("the servers stop");
}

/// Also when they would be found.
#[tokio::test]
async fn servers_are_downloaded_where_apt_is_and_otherwise_the_error_says_what_to_do() {
    let directory = directory();
    let options = Options { use_machine_programs: false, cache: Some(directory.path().join("cache")), ..quick() };
    let data = directory.path().join("data");
    if !Path::new("/usr/bin/apt-get").exists() {
        let StackError::Missing(instruction) = refusal(&data, options).await else {
            panic!("a missing server is the reason")
        };
        assert!(instruction.contains("nstall") && instruction.contains("DAYBOOK_DATABASE_URL"), "{instruction}");
        return;
    }
    let stack = start(&data, options.clone()).await;
    check_both_work(&stack).await;
    let psql = stack
        .postgres_command("psql")
        .expect("psql is beside the server")
        .arg(stack.database_url())
        .args(["-Atc", "select 6 * 7"])
        .output();
    assert_eq!(String::from_utf8_lossy(&psql.expect("psql runs").stdout).trim(), "42");
    remember(&stack, "first").await;
    stack.stop().await.expect("the servers stop");

    let stack = start(&data, options).await; // from the cache, with nothing left to download
    assert_eq!(remembered(&stack).await, ["first"]);
    stack.stop().await.expect("the servers stop");
}

#[tokio::test]
async fn given_servers_are_used_and_neither_started_nor_stopped() {
    let directory = directory();
    let owner = start(&directory.path().join("owner"), quick()).await;
    let given = Options {
        database_url: Some(owner.database_url().to_owned()),
        nats_url: Some(owner.nats_url().to_owned()),
        ..quick()
    };
    let data = directory.path().join("user");
    let user = start(&data, given).await;
    assert_eq!((user.database_url(), user.nats_url()), (owner.database_url(), owner.nats_url()));
    user.kill_postgres().await.expect_err("a given Postgres is not ours to end");
    user.kill_nats().await.expect_err("a given nats-server is not ours to end");
    user.stop().await.expect("there is nothing to stop");
    assert!(!data.join("servers").exists());
    check_both_work(&owner).await;

    let half = start(&data, Options { database_url: Some(owner.database_url().to_owned()), ..quick() }).await;
    assert_ne!(half.nats_url(), owner.nats_url());
    check_both_work(&half).await;
    half.stop().await.expect("the private half stops");
    check_both_work(&owner).await;
    owner.stop().await.expect("the servers stop");
}

#[tokio::test]
async fn a_given_server_that_cannot_be_used_is_named_without_its_password() {
    let directory = directory();
    let nobody =
        std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port is free");
    for options in [
        Options { database_url: Some(format!("postgres://daybook:secret@{nobody}/daybook")), ..quick() },
        Options { database_url: Some("mysql://daybook:secret@localhost/daybook".to_owned()), ..quick() },
        Options { nats_url: Some(format!("nats://daybook:secret@{nobody}")), ..quick() },
    ] {
        let given = options.database_url.clone().or(options.nats_url.clone()).expect("one is given");
        let host = url::Url::parse(&given).expect("it is a URL").host_str().expect("it has a host").to_owned();
        let refusal = refusal(&directory.path().join("data"), options).await;
        assert!(matches!(refusal, StackError::Given(_)), "{given}: {refusal}");
        let said = refusal.to_string();
        assert!(said.contains(&host) && !said.contains("secret"), "{said}");
    }
}

#[tokio::test]
async fn a_data_directory_in_use_is_refused_and_its_owner_named() {
    let directory = directory();
    let data = directory.path().join("data");
    let stack = start(&data, quick()).await;
    let refusal = refusal(&data, quick()).await.to_string();
    assert!(refusal.contains(&format!("process {}", std::process::id())), "{refusal}");
    check_both_work(&stack).await;
    stack.stop().await.expect("the servers stop");
}

#[tokio::test]
async fn killed_servers_come_back_on_their_ports_with_what_was_committed() {
    let directory = directory();
    let stack = start(&directory.path().join("data"), Options::default()).await;
    check_both_work(&stack).await;
    remember(&stack, "committed").await;
    stack.kill_postgres().await.expect("Postgres can be killed");
    stack.kill_nats().await.expect("nats-server can be killed");
    for address in [stack.database_url(), stack.nats_url()] {
        let address = url::Url::parse(address).expect("a URL");
        let port = address.port().expect("it has a port");
        TcpStream::connect(("127.0.0.1", port)).expect_err("nobody listens any more");
    }
    stack.start_postgres().await.expect("Postgres recovers");
    stack.start_nats().await.expect("nats-server recovers");
    assert_eq!(remembered(&stack).await, ["committed"]);
    check_both_work(&stack).await;
    stack.stop().await.expect("the servers stop");
}

/// Ends a server from outside, as the machine's out-of-memory killer would.
fn kill_from_outside(process: i32) {
    let process = rustix::process::Pid::from_raw(process).expect("a server's number is positive");
    rustix::process::kill_process(process, rustix::process::Signal::KILL).expect("it runs");
}

async fn is_back(stack: &Stack) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let database = PgConnection::connect(stack.database_url()).await.is_ok();
        let address = url::Url::parse(stack.nats_url()).expect("a URL");
        let bus = TcpStream::connect(("127.0.0.1", address.port().expect("it has a port"))).is_ok();
        if database && bus {
            return;
        }
        assert!(Instant::now() < deadline, "after 30 s: Postgres {database}, nats-server {bus}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn servers_that_die_are_started_again_on_their_ports_until_they_are_stopped() {
    let directory = directory();
    let data = directory.path().join("data");
    let stack = start(&data, Options::default()).await;
    check_both_work(&stack).await;
    remember(&stack, "committed").await;
    {
        let mut supervision = std::pin::pin!(stack.supervise());
        let work = async {
            for _ in 0..3 {
                let [postgres, nats] = server_processes(&data);
                kill_from_outside(postgres);
                kill_from_outside(nats);
                eventually_gone([postgres, nats]).await;
                is_back(&stack).await;
                assert_eq!(remembered(&stack).await, ["committed"]);
            }
            let [_, nats] = server_processes(&data);
            kill_from_outside(nats);
            fs::remove_dir_all(data.join("servers/nats")).expect("a bus may lose everything");
            eventually_gone([nats, nats]).await;
            is_back(&stack).await;
            check_both_work(&stack).await;
            // What is stopped on purpose stays stopped.
            stack.kill_nats().await.expect("nats-server can be killed");
            tokio::time::sleep(Duration::from_millis(500)).await;
            let port = url::Url::parse(stack.nats_url()).expect("a URL").port().expect("it has a port");
            TcpStream::connect(("127.0.0.1", port)).expect_err("nobody listens");
            stack.start_nats().await.expect("nats-server starts");
            let [postgres, _] = server_processes(&data);
            kill_from_outside(postgres); // and supervision ends in the middle of this
            eventually_gone([postgres, postgres]).await;
        };
        tokio::select! {
            _ = &mut supervision => unreachable!("it never ends"),
            () = work => {}
        }
    }
    stack.stop().await.expect("the servers stop");
    eventually("a stopped stack leaves nobody behind", || lock_is_free(&data));
}

async fn eventually_gone(processes: [i32; 2]) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while processes.iter().any(|process| is_alive(*process)) {
        assert!(Instant::now() < deadline, "still there: {processes:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Root's servers cannot enter a private directory, and an ordinary user's run as that user.
#[tokio::test]
async fn servers_never_run_as_root_and_a_private_home_above_the_data_does_no_harm() {
    let home = directory();
    fs::set_permissions(home.path(), fs::Permissions::from_mode(0o700)).expect("it is ours");
    let data = home.path().join("daybook/data");
    fs::create_dir_all(&data).expect("it is ours");
    let stack = start(&data, quick()).await;
    check_both_work(&stack).await;
    assert_ne!(postgres_file(&data).metadata().expect("Postgres runs").uid(), 0);
    assert_ne!(data.join("servers/nats/nats.pid").metadata().expect("nats-server runs").uid(), 0);
    assert_eq!(home.path().metadata().expect("it is there").mode() & 0o777, 0o700, "nobody's home was opened");
    remember(&stack, "first").await;
    stack.stop().await.expect("the servers stop");
    let stack = start(&data, quick()).await;
    assert_eq!(remembered(&stack).await, ["first"]);
    stack.stop().await.expect("the servers stop");
    // Outside the temporary directory if we are root.
    fs::remove_dir_all(data.join("servers").canonicalize().expect("it is there"))
        .expect("stopped servers keep no files open");
}

#[tokio::test]
async fn no_process_survives_its_owner_and_the_next_start_continues() {
    for signal in ["KILL", "TERM", "INT"] {
        let directory = directory();
        let data = directory.path().join("data");
        let (mut owner, _) = run_owner("owner_of_a_data_directory", &data);
        let servers = server_processes(&data);
        assert!(servers.iter().all(|server| is_alive(*server)));
        end(&mut owner, signal);
        eventually("both servers are gone", || !servers.iter().any(|server| is_alive(*server)));
        let stack = start(&data, quick()).await; // it waits for what is left of the last one
        assert_eq!(remembered(&stack).await, ["written before the end"], "after SIG{signal}");
        stack.stop().await.expect("the servers stop");
        eventually("a stopped stack leaves nobody behind", || lock_is_free(&data));
    }
}

/// No start waits for a terminal's process group: Ctrl-C must leave the stopping to us.
#[tokio::test]
async fn servers_are_outside_our_process_group() {
    let directory = directory();
    let data = directory.path().join("data");
    let stack = start(&data, quick()).await;
    let group = |process| rustix::process::getpgid(rustix::process::Pid::from_raw(process)).expect("it runs");
    let ours = rustix::process::getpgrp();
    assert!(server_processes(&data).into_iter().all(|server| group(server) != ours));
    stack.stop().await.expect("the servers stop");
}

#[tokio::test]
async fn servers_and_files_of_a_killed_test_vanish() {
    let directory = directory();
    let (mut owner, said) = run_owner("owner_of_test_servers", directory.path());
    let data = Path::new(&said);
    let servers = server_processes(data);
    end(&mut owner, "KILL");
    eventually("both servers are gone", || !servers.iter().any(|server| is_alive(*server)));
    eventually("the files are gone", || !data.exists());
}

const OWNED: &str = "LOCAL_STACK_TEST_DATA";
const READY: &str = "owner ready: ";

/// Runs an owner in a process of its own; returns when its servers run, with what it says then.
fn run_owner(test: &str, data: &Path) -> (Child, String) {
    let mut owner = Command::new(std::env::current_exe().expect("this program has a path"))
        .args(["--exact", test, "--ignored", "--nocapture"])
        .env(OWNED, data)
        .stdout(Stdio::piped())
        .spawn()
        .expect("this program can run again");
    let output = BufReader::new(owner.stdout.take().expect("standard output was asked to be a pipe"));
    // The test harness prints the test's name before it on the same line.
    let said =
        output.lines().map_while(Result::ok).find_map(|line| line.split_once(READY).map(|(_, said)| said.to_owned()));
    (owner, said.expect("the owner's servers start"))
}

fn end(owner: &mut Child, signal: &str) {
    let process = owner.id().to_string();
    let sent = Command::new("/bin/sh")
        .args(["-c", "kill -s \"$0\" \"$1\"", signal, &process])
        .status()
        .expect("a shell is there");
    assert!(sent.success());
    owner.wait().expect("the owner is our child");
}

/// Longer than any test waits, shorter than for ever.
fn wait_to_be_killed() {
    std::thread::sleep(Duration::from_secs(120));
}

#[tokio::test]
#[ignore = "not a test: a process for others to kill"]
async fn owner_of_a_data_directory() {
    let Some(data) = std::env::var_os(OWNED) else { return };
    let stack = start(Path::new(&data), Options::default()).await;
    remember(&stack, "written before the end").await;
    println!("{READY}");
    wait_to_be_killed();
}

#[tokio::test]
#[ignore = "not a test: a process for others to kill"]
async fn owner_of_test_servers() {
    if std::env::var_os(OWNED).is_none() {
        return;
    }
    let mut connection = PgConnection::connect(testing::stack().await.database_url()).await.expect("Postgres answers");
    let cluster: String =
        sqlx::query_scalar("show data_directory").fetch_one(&mut connection).await.expect("it is a setting");
    let data = Path::new(&cluster).ancestors().nth(2).expect("the cluster lies two directories down");
    println!("{READY}{}", data.display());
    wait_to_be_killed();
}
