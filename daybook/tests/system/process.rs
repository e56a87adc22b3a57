//! A `daybook` process of a test's own, on a data directory of its own.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use reqwest::{Client, RequestBuilder, Response, StatusCode};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_daybook");

/// What a start and a stop may take on a busy machine.
const START_TIME: Duration = Duration::from_secs(120);
const STOP_TIME: Duration = Duration::from_secs(20);

/// The directory outlives the processes that run on it.
pub(crate) struct DataDirectory(TempDir);

impl DataDirectory {
    pub(crate) fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("daybook-system-").tempdir().unwrap();
        use std::os::unix::fs::PermissionsExt;
        // When tests run as root, the servers' unprivileged user passes through.
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
        Self(directory)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn connection_file(&self) -> PathBuf {
        self.path().join("connection.json")
    }

    /// What the processes on this directory have logged.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.log_file()).unwrap()
    }

    fn open_log(&self) -> File {
        File::options().create(true).append(true).open(self.log_file()).unwrap()
    }

    fn log_file(&self) -> PathBuf {
        self.path().join("daybook.log")
    }
}

/// A running system. Dropping it kills it, and with it its servers.
pub(crate) struct Daybook {
    child: Child,
    pub(crate) connection: Value,
    client: Client,
}

impl Daybook {
    /// Starts and waits until it says that it is ready.
    pub(crate) async fn start(directory: &DataDirectory, options: &[&str]) -> Self {
        Self::begin(directory, options, directory.open_log().into()).ready(directory).await
    }

    /// As [`Self::start`], with these variables in its environment.
    pub(crate) async fn start_within(
        environment: &[(&str, &str)],
        directory: &DataDirectory,
        options: &[&str],
    ) -> Self {
        Self::begin_within(environment, directory, options, directory.open_log().into()).ready(directory).await
    }

    /// Starts; whether it is ready nobody knows yet.
    pub(crate) fn begin(directory: &DataDirectory, options: &[&str], stdout: Stdio) -> Self {
        Self::begin_within(&[], directory, options, stdout)
    }

    fn begin_within(environment: &[(&str, &str)], directory: &DataDirectory, options: &[&str], stdout: Stdio) -> Self {
        rustls::crypto::ring::default_provider().install_default().ok(); // another test was first
        let child = Command::new(PROGRAM)
            .args(["up", "--listen", "127.0.0.1:0", "--data-dir"])
            .arg(directory.path())
            .args(options)
            .env_remove("DAYBOOK_DATABASE_URL")
            .env_remove("DAYBOOK_NATS_URL")
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(directory.open_log())
            .spawn()
            .unwrap();
        Self { child, connection: Value::Null, client: Client::builder().no_proxy().build().unwrap() }
    }

    pub(crate) async fn ready(self, directory: &DataDirectory) -> Self {
        let mut daybook = self;
        let begin = Instant::now();
        loop {
            let connection = std::fs::read_to_string(directory.connection_file()).ok();
            let connection: Option<Value> = connection.and_then(|text| serde_json::from_str(&text).ok());
            if let Some(connection) = connection.filter(|connection| connection["pid"] == daybook.child.id()) {
                daybook.connection = connection;
                return daybook;
            }
            let ended = daybook.child.try_wait().unwrap();
            if ended.is_some() || START_TIME < begin.elapsed() {
                panic!("not ready after {:?}, ended {ended:?}:\n{}", begin.elapsed(), directory.log());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn base_url(&self) -> &str {
        self.connection["baseUrl"].as_str().unwrap()
    }

    pub(crate) fn database_url(&self) -> &str {
        self.connection["databaseUrl"].as_str().unwrap()
    }

    /// An access token of `admin` or `demoPartner`.
    pub(crate) async fn login(&self, who: &str) -> String {
        let answer = self.client.post(format!("{}/v1/auth/token", self.base_url())).json(&self.connection[who]).send();
        let body: Value = answer.await.unwrap().json().await.unwrap();
        body["accessToken"].as_str().unwrap_or_else(|| panic!("{who} cannot log in: {body}")).to_owned()
    }

    pub(crate) fn get(&self, token: &str, route: &str) -> RequestBuilder {
        self.client.get(format!("{}{route}", self.base_url())).bearer_auth(token)
    }

    pub(crate) fn post(&self, token: &str, route: &str, body: Value) -> RequestBuilder {
        self.client.post(format!("{}{route}", self.base_url())).bearer_auth(token).json(&body)
    }

    pub(crate) fn post_with_key(&self, token: &str, route: &str, key: &str, body: Value) -> RequestBuilder {
        self.post(token, route, body).header("Idempotency-Key", key)
    }

    /// At the bank.
    pub(crate) async fn simulate(&self, body: Value) -> Response {
        let url = format!("{}/bank/simulate", self.connection["bankUrl"].as_str().unwrap());
        self.client.post(url).json(&body).send().await.unwrap()
    }

    /// A new wallet of the demo partner with so much in it.
    pub(crate) async fn wallet(&self, user: &str, funds: &str) -> String {
        let (admin, partner) = (self.login("admin").await, self.login("demoPartner").await);
        let open = self.post(&partner, "/v1/wallets", serde_json::json!({"userId": user, "currency": "EUR"}));
        let wallet = answer(open, StatusCode::CREATED).await["id"].as_str().unwrap().to_owned();
        if funds != "0" {
            let body = serde_json::json!({
                "walletId": wallet, "direction": "CREDIT", "amount": funds, "currency": "EUR", "reason": "a start"
            });
            let fund = self.post_with_key(&admin, "/v1/transactions/adjustment", &format!("fund-{wallet}"), body);
            answer(fund, StatusCode::CREATED).await;
        }
        wallet
    }

    /// Asks for a stop, as `kill` and service managers do, and waits for it.
    pub(crate) async fn terminate(mut self) -> ExitStatus {
        kill_process(self.pid(), Signal::TERM).unwrap();
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begin.elapsed() < STOP_TIME, "still running {STOP_TIME:?} after SIGTERM");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// As the machine's out-of-memory killer would.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Daybook {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The body of an answer that must have this status.
pub(crate) async fn answer(request: RequestBuilder, status: StatusCode) -> Value {
    let response = request.send().await.unwrap();
    let (found, body) = (response.status(), response.text().await.unwrap());
    assert_eq!(found, status, "{body}");
    serde_json::from_str(&body).unwrap()
}

/// Asks until the answer is as expected, for at most 20 s, and says what was last seen.
pub(crate) async fn eventually<T: std::fmt::Debug, F: Future<Output = T>>(
    claim: &str,
    mut ask: impl FnMut() -> F,
    mut holds: impl FnMut(&T) -> bool,
) -> T {
    let begin = Instant::now();
    loop {
        let seen = ask().await;
        if holds(&seen) {
            return seen;
        }
        assert!(begin.elapsed() < Duration::from_secs(20), "{claim}; last seen: {seen:?}");
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}

/// What a command of the program prints, and whether it succeeded.
pub(crate) fn run(arguments: &[&str]) -> (bool, String) {
    let output = Command::new(PROGRAM).args(arguments).output().unwrap();
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    (output.status.success(), text)
}
