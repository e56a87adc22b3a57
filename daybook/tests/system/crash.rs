//! The promises under crashes, in a short form: a few faults of each sort, drawn by a seed of the run's own, so that over
//! time all of them come. `daybook torture --seed N --minutes M` is the long form, and repeats a seed.

use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use torture::{Length, Options};

use crate::process::PROGRAM;

#[tokio::test(flavor = "multi_thread")]
async fn kills_cuts_and_stalls_under_load_break_no_promise_and_the_judge_has_eyes() {
    let seed = match std::env::var("DAYBOOK_TORTURE_SEED") {
        Ok(given) => given.parse().unwrap(),
        Err(_) => u64::from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos()),
    };
    build_what_runs_beside();
    let options = Options { program: PROGRAM.into(), seed, length: Length::Short };
    let report = torture::run(options, |line| println!("{line}")).await.unwrap();
    assert!(report.is_sound(), "{report}");
    assert!(5 <= report.kills, "{report}");
    assert!(0 < report.counts.acknowledged && 0 < report.counts.webhooks && 0 < report.counts.reads, "{report}");
}

/// `cargo test --workspace` has built the second services beside our program; a test of this package alone has not.
fn build_what_runs_beside() {
    let beside = |name| Path::new(PROGRAM).with_file_name(name);
    if ["command-api", "relay", "projector", "webhook-dispatcher"].iter().all(|name| beside(name).exists()) {
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let built = Command::new(env!("CARGO")).args(["build", "--workspace", "--bins"]).current_dir(root).status();
    assert!(built.unwrap().success(), "the workspace's binaries could not be built");
}
