//! The service as a process of its own.

use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::time::timeout;

/// More than a start or a stop needs.
const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::test]
async fn the_process_serves_until_it_is_told_to_stop_and_ends_well() {
    let database = local_stack::testing::database(|url| async move { migrations::run(&url).await }).await;
    let key = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(key.path(), [7; 32]).unwrap();
    let mut process = Command::new(env!("CARGO_BIN_EXE_command-api"))
        .args(["--listen", "127.0.0.1:0", "--bank-url", "https://bank.example"])
        .arg("--secrets-key-file")
        .arg(key.path())
        .env("DAYBOOK_DATABASE_URL", database.url())
        .env("RUST_LOG", "info")
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
    let address = timeout(PATIENCE, async {
        loop {
            let line = lines.next_line().await.unwrap().expect("it ended before it served");
            let line: serde_json::Value = serde_json::from_str(&line).unwrap();
            if let Some(address) = line["address"].as_str() {
                return address.to_owned();
            }
        }
    });
    let address = address.await.expect("it says where it serves");
    let mut client = tokio::net::TcpStream::connect(&address).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut client, b"GET /readyz HTTP/1.0\r\nhost: x\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    timeout(PATIENCE, tokio::io::AsyncReadExt::read_to_string(&mut client, &mut answer)).await.unwrap().unwrap();
    assert!(answer.contains(" 200 "), "{answer}");

    let id = rustix::process::Pid::from_raw(process.id().unwrap().cast_signed()).unwrap();
    rustix::process::kill_process(id, rustix::process::Signal::TERM).unwrap();
    let status = timeout(PATIENCE, process.wait()).await.expect("it stops").unwrap();
    assert!(status.success(), "{status}");
}

#[tokio::test]
async fn without_a_good_key_file_the_process_does_not_start() {
    let short = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(short.path(), "secret").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_command-api"))
        .args(["--database-url", "postgres://localhost:1/x", "--bank-url", "https://bank.example"])
        .arg("--secrets-key-file")
        .arg(short.path())
        .output();
    let output = timeout(PATIENCE, output).await.unwrap().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("does not hold exactly 32 bytes"));
}
