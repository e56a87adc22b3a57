//! `daybook bench`: whoever has waited for its figures gets them, also when the rest is not waited for.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::demo::end;
use crate::lifecycle::processes;
use crate::process::{DataDirectory, PROGRAM, eventually};

/// For one workload, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(180);

#[tokio::test]
async fn what_was_measured_before_an_interruption_is_reported() {
    let directory = DataDirectory::new();
    let mut bench = Command::new(PROGRAM)
        .args(["bench", "declined", "new-wallets", "--parts", "nothing", "--seconds", "1", "--wallets", "2", "--json"])
        .env("TMPDIR", directory.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Each workload has a directory of its own: with the second one the first workload is over.
    let (began, mut places) = (Instant::now(), BTreeSet::new());
    while places.len() < 2 {
        let entries = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name());
        places.extend(entries.filter(|name| name.to_string_lossy().starts_with("daybook-bench-")));
        if PATIENCE < began.elapsed() || bench.try_wait().unwrap().is_some() {
            bench.kill().unwrap();
            panic!("no second workload: {places:?}, {:?}", bench.wait_with_output().unwrap());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    kill_process(Pid::from_child(&bench), Signal::INT).unwrap();
    let output = end(bench).await;
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["interrupted"], "NewWallets, engine alone", "{report:#}");
    assert_eq!(report["failures"], json!([]), "{report:#}");
    let measured: Vec<_> = report["figures"].as_array().unwrap().iter().map(|figure| &figure["workload"]).collect();
    assert_eq!(measured, ["declined"], "{report:#}");
    assert!(0.0 < report["figures"][0]["perSecond"].as_f64().unwrap(), "{report:#}");
    eventually("no process is left", || async { processes(directory.path()) }, Vec::is_empty).await;
}
