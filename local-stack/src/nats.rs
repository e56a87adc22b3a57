//! The private nats-server: one account with JetStream and one user, on 127.0.0.1 with a password.
//!
//! ```text
//! servers/nats/nats.conf  written anew at each start
//! servers/nats/jetstream  streams; bounded in memory and on disk
//! servers/nats.log        what this run said; `.previous` is the run before
//! ```
//! Only settings that Debian's 2.9.10 knows are used. The accounts and permissions of a deployment are in the
//! repository's `nats.conf`, not here.

use std::{
    path::{Path, PathBuf},
    process::ExitStatus,
    time::{Duration, Instant},
};

use percent_encoding::percent_decode_str;
use tokio::sync::Mutex;

use crate::{
    Options, StackError,
    data_directory::{DataDirectory, User, free_port, make_private, write_private},
    guardian::{Guardian, Held, Launch, log_tail, take_dead},
    programs::{self, NatsProgram},
    without_password,
};

const USER: &str = "daybook";
const START_BOUND: Duration = Duration::from_secs(30);
const CONNECT_BOUND: Duration = Duration::from_secs(5);
/// The bus can be lost and made anew from the log, so it may not eat the machine.
const MEMORY_STORE: &str = "256MB";
const FILE_STORE: &str = "4GB";

#[derive(Debug)]
pub(crate) struct PrivateNats {
    url: String,
    /// Where the server lives, whose it is, and what it is told.
    directory: PathBuf,
    user: Option<User>,
    config: String,
    launch: Launch,
    held: Held,
    guardian: Mutex<Option<Guardian>>,
}

impl PrivateNats {
    pub(crate) async fn start(directory: &DataDirectory, held: &Held, options: &Options) -> Result<Self, StackError> {
        let (servers, user) = directory.place_servers(options.announce)?;
        let program = programs::nats(user, options).await?;
        let mut access = directory.access()?;
        // Another process can take the port between our look and the server's own; then the next port is tried.
        for attempts_left in [2, 1, 0] {
            let port = free_port(access.nats_port)?;
            access.nats_port = Some(port);
            directory.keep(&access)?;
            (options.announce)(&format!("Starting nats-server {} on 127.0.0.1:{port}", program.version));
            let nats = Self {
                url: format!("nats://{USER}:{}@127.0.0.1:{port}", access.nats_password),
                directory: servers.join("nats"),
                user,
                config: config(port, &access.nats_password),
                launch: server_launch(&servers, &program, user),
                held: held.try_clone().map_err(|source| StackError::io("sharing the lock", source))?,
                guardian: Mutex::new(None),
            };
            match nats.start_again().await {
                Ok(()) => return Ok(nats),
                Err(_) if attempts_left != 0 && free_port(Some(port))? != port => {}
                Err(error) => return Err(error),
            }
        }
        unreachable!("the last attempt returns")
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Starts the server, if it does not run, and waits until JetStream answers. Whatever its directory lacks is made: the
    /// bus may lose everything.
    pub(crate) async fn start_again(&self) -> Result<(), StackError> {
        let mut running = self.guardian.lock().await;
        if running.is_some() {
            return Ok(());
        }
        make_private(&self.directory, self.user)?;
        write_private(&self.directory.join("nats.conf"), self.config.as_bytes(), self.user)?;
        // Kept from the first moment: whoever gives up waiting here can still stop it.
        let guardian = running.insert(
            Guardian::spawn(&self.launch, &self.held)
                .map_err(|source| StackError::io("starting nats-server", source))?,
        );
        let ready = until_ready(guardian, &self.url, &self.launch.log).await;
        if ready.is_err() {
            *running = None;
        }
        ready
    }

    /// How the server ended, if it has ended by itself. Then it can be started again.
    pub(crate) async fn death(&self) -> Option<ExitStatus> {
        take_dead(&mut *self.guardian.lock().await)
    }

    pub(crate) async fn stop(&self) -> Result<(), StackError> {
        self.end(&[("TERM", Duration::from_secs(5)), ("KILL", Duration::from_secs(2))]).await
    }

    pub(crate) async fn kill(&self) -> Result<(), StackError> {
        self.end(&[("KILL", Duration::from_secs(5))]).await
    }

    async fn end(&self, escalation: &[(&str, Duration)]) -> Result<(), StackError> {
        match self.guardian.lock().await.take() {
            Some(guardian) => {
                guardian.end(escalation).await.map_err(|source| StackError::io("stopping nats-server", source))
            }
            None => Ok(()),
        }
    }
}

async fn until_ready(guardian: &mut Guardian, url: &str, log: &Path) -> Result<(), StackError> {
    let deadline = Instant::now() + START_BOUND;
    let did_not_start = |reason| StackError::DidNotStart { server: "nats-server", reason, log: log_tail(log) };
    loop {
        if let Some(status) = guardian.ended().map_err(|source| StackError::io("watching nats-server", source))? {
            return Err(did_not_start(format!("it ended with {status}")));
        }
        match ask_jetstream(url).await {
            Ok(()) => return Ok(()),
            Err(reason) if deadline <= Instant::now() => return Err(did_not_start(reason)),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

/// Says what is wrong with a NATS server that was given by its address.
pub(crate) async fn check_given(url: &str) -> Result<(), StackError> {
    let shown = without_password(url);
    ask_jetstream(url)
        .await
        .map_err(|reason| StackError::Given(format!("the given NATS server, {shown}, cannot be used: {reason}")))
}

/// Connects with the address' credentials and asks for the account's JetStream, in the protocol's own words:
/// async-nats expects fields in the answer that servers before 2.10 do not send.
async fn ask_jetstream(url: &str) -> Result<(), String> {
    let ask = async {
        let client = connect(url).await?;
        let answer = client.request("$JS.API.INFO", "".into()).await.map_err(|error| error.to_string());
        client.drain().await.ok(); // it is not used again, whether or not the server heard so
        let silent = |reason| format!("JetStream does not answer this user: {reason}");
        let answer: serde_json::Value =
            serde_json::from_slice(&answer.map_err(silent)?.payload).map_err(|error| silent(error.to_string()))?;
        match answer.get("error") {
            Some(error) => Err(format!("JetStream refuses this user: {error}")),
            None => Ok(()),
        }
    };
    tokio::time::timeout(CONNECT_BOUND, ask)
        .await
        .unwrap_or_else(|_| Err(format!("no answer within {} s", CONNECT_BOUND.as_secs())))
}

/// async-nats does not read the credentials of an address, so they are handed over beside it.
pub(crate) async fn connect(url: &str) -> Result<async_nats::Client, String> {
    let address: async_nats::ServerAddr = url.parse().map_err(|error: std::io::Error| error.to_string())?;
    let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    let mut options = async_nats::ConnectOptions::new();
    if let (Some(user), Some(password)) = (address.username(), address.password()) {
        options = options.user_and_password(decoded(user), decoded(password));
    }
    options.connect(address).await.map_err(|error| error.to_string())
}

/// `store_dir` is relative to the working directory, so no path has to be quoted here.
fn config(port: u16, password: &str) -> String {
    format!(
        r#"# Written by Daybook at each start.
listen: "127.0.0.1:{port}"
pid_file: "nats.pid"
jetstream {{
  store_dir: "."
  max_memory_store: {MEMORY_STORE}
  max_file_store: {FILE_STORE}
}}
accounts {{
  DAYBOOK {{
    jetstream: enabled
    users: [ {{ user: "{USER}", password: "{password}" }} ]
  }}
}}
"#
    )
}

fn server_launch(servers: &Path, program: &NatsProgram, user: Option<User>) -> Launch {
    Launch {
        program: program.path.clone(),
        arguments: vec!["-c".into(), servers.join("nats/nats.conf").into_os_string()],
        libraries: Vec::new(), // a Go program carries its libraries
        working_directory: servers.join("nats"),
        log: servers.join("nats.log"),
        last_signal: "TERM",
        user,
    }
}
