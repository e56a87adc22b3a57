//! The README's walk-through, run block by block as a newcomer would, each answer compared with what stands there.

use std::path::Path;
use std::process::Command;

use tokio::net::TcpListener;

use crate::process::{DataDirectory, Daybook, PROGRAM};

/// Between the outputs of two blocks.
const MARK: &str = "---- end of a block ----";

#[tokio::test]
async fn the_walk_through_does_what_it_says() {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let readme = std::fs::read_to_string(readme).unwrap();
    let walk = section(&readme, "## Walk-through");
    let (blocks, expected) = (fenced(walk, "sh"), fenced(walk, "json"));
    assert_eq!(blocks.len(), expected.len(), "every block has its answer");

    let directory = DataDirectory::new();
    let daybook = Daybook::start(&directory, &["--allow-local-webhooks"]).await;
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port(); // free again at once
    let script: String = blocks.iter().map(|block| format!("{block}\necho '{MARK}'\n")).collect();
    let script = script
        .replace("http://127.0.0.1:8080", daybook.base_url())
        .replace("127.0.0.1:9090", &format!("127.0.0.1:{port}"))
        .replace("cargo run --release --quiet --", PROGRAM)
        .replace("data/connection.json", directory.connection_file().to_str().unwrap());
    let output =
        Command::new("timeout").args(["240", "bash", "-c", &script]).current_dir(directory.path()).output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout).replace(&format!("127.0.0.1:{port}"), "127.0.0.1:9090");
    let complaints = String::from_utf8_lossy(&output.stderr);
    let answers: Vec<_> = printed.split(MARK).collect();
    for ((block, expected), printed) in blocks.iter().zip(&expected).zip(&answers) {
        let pattern = expected.trim();
        assert!(matches(pattern, printed.trim()), "{block}\nprinted\n{}\nnot\n{pattern}\n{complaints}", printed.trim());
    }
    assert!(output.status.success(), "{complaints}");
}

/// From a heading to the next of its level.
fn section<'a>(text: &'a str, heading: &str) -> &'a str {
    let start = text.find(heading).unwrap() + heading.len();
    let end = text[start..].find("\n## ").map_or(text.len(), |end| start + end);
    &text[start..end]
}

/// The contents of the fenced blocks in a language.
fn fenced(text: &str, language: &str) -> Vec<String> {
    let fence = format!("\n```{language}\n");
    text.split(&fence).skip(1).map(|rest| rest.split("\n```").next().unwrap().to_owned()).collect()
}

/// Whether the text is the pattern with anything in place of each `…`.
fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('…');
    let Some(rest) = text.strip_prefix(parts.next().unwrap()) else { return false };
    let parts: Vec<_> = parts.collect();
    let Some((last, middle)) = parts.split_last() else { return rest.is_empty() };
    let mut rest = rest;
    for part in middle {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

#[test]
fn a_pattern_matches_what_it_says_and_nothing_else() {
    assert!(matches("a…c…e", "abcde") && matches("abc", "abc") && matches("…", "anything"));
    assert!(!matches("a…c", "abd") && !matches("abc", "abcd") && !matches("b…", "abc") && !matches("a…a", "a"));
}
