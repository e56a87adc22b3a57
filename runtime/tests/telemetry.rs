//! Claims about the logs of a process, seen from outside it: this test starts itself as that process.
//!
//! It has no test harness, since a harness would take the child's stderr for itself.

#![expect(clippy::unwrap_used, reason = "clippy.toml excepts tests, but not their helpers")]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn main() {
    if std::env::var_os("TELEMETRY_CHILD").is_some() {
        return child();
    }
    every_line_is_json_and_names_its_service();
    what_the_environment_says_wrongly_of_traces_is_warned_about_and_never_exports_more();
    a_stderr_that_nobody_reads_does_not_stop_the_service();
}

/// Logs some lines, many lines, and a panic, and says on stdout that it got through.
#[expect(clippy::print_stdout, reason = "the parent listens there")]
fn child() {
    runtime::telemetry::init("probe");
    runtime::telemetry::init("again");
    tracing::info!(answer = 42, "first");
    tracing::debug!("not at this level");
    let lines = std::env::var("TELEMETRY_CHILD").unwrap().parse().unwrap();
    for n in 0..lines {
        tracing::info!(n, "one of many");
    }
    std::thread::spawn(|| panic!("on purpose")).join().unwrap_err();
    println!("through");
    runtime::telemetry::flush();
}

fn start(lines: u32, environment: &[(&str, &str)]) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .env("TELEMETRY_CHILD", lines.to_string())
        .env_remove("RUST_LOG")
        .envs(environment.iter().copied())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn every_line_is_json_and_names_its_service() {
    let (text, lines) = logged(start(10, &[]));
    assert!(lines.iter().all(|line| line["service"] == "probe"), "{text}");
    assert_eq!(lines.len(), 12, "{text}");
    assert_eq!((&lines[0]["message"], &lines[0]["answer"]), (&"first".into(), &42.into()));
    assert_eq!((&lines[11]["message"], &lines[11]["panic.message"]), (&"panicked".into(), &"on purpose".into()));
    assert_eq!(lines[11]["level"], "ERROR");
}

fn what_the_environment_says_wrongly_of_traces_is_warned_about_and_never_exports_more() {
    let wrong = [
        ("OTEL_TRACES_SAMPLER_ARG", "10"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "many"),
        ("OTEL_BSP_SCHEDULE_DELAY", "5s"),
    ];
    let named = [("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1"), ("OTEL_TRACES_SAMPLER", "traceidratio")];
    let (text, lines) = logged(start(0, &[&named[..], &wrong[..]].concat()));
    let warnings = lines.iter().filter(|line| line["level"] == "WARN");
    let names: BTreeSet<_> = warnings.filter_map(|line| line["name"].as_str()).collect();
    assert!(wrong.iter().all(|(name, _)| names.contains(name)), "{text}");
    let exported = lines.iter().find(|line| line["message"] == "traces are exported").expect(&text);
    assert_eq!(exported["sampler"], "TraceIdRatioBased(0.01)");

    let (text, lines) = logged(start(0, &[named[0], ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")]));
    let warned = |line: &serde_json::Value| {
        line["level"] == "WARN" && line["message"].as_str().is_some_and(|message| message.starts_with("no traces: "))
    };
    assert!(lines.iter().any(warned), "{text}");
}

/// What the process logged until its end.
fn logged(child: std::process::Child) -> (String, Vec<serde_json::Value>) {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    (text, lines)
}

fn a_stderr_that_nobody_reads_does_not_stop_the_service() {
    let mut child = start(50_000, &[]); // far more than a pipe and the queue hold
    let begun = Instant::now();
    let mut said = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut said).unwrap();
    assert_eq!(said, "through\n");
    child.wait().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(60));
}
