//! What holds for every bad input, whatever it is, and the one test that sends them all.
//!
//! The answer is the expected one and comes soon. A refusal is a problem document that repeats little of the input and
//! nothing of our insides. Afterwards no money has moved, nothing has panicked, nothing was logged as a failure of ours,
//! and the process answers.

use std::time::Duration;

use crate::process::eventually;
use crate::system::System;
use crate::wire::{Answer, Request, exchange};
use crate::{batch, callbacks, http, json, keys, money, queries, tokens, webhooks};

/// An input and what must come of it.
pub(crate) struct Case {
    name: String,
    /// Sent one after another, each on a connection of its own.
    steps: Vec<(Vec<u8>, Expected)>,
}

/// What an answer must be.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    status: u16,
    slug: Option<&'static str>,
    /// Headers and what they contain; nothing: the header is absent.
    headers: Vec<(&'static str, Option<String>)>,
    pointer: Option<String>,
    contains: Vec<String>,
    moves: i64,
    heads: bool,
    continued: bool,
    alerts: bool,
}

pub(crate) fn case(name: impl Into<String>, request: impl Into<Vec<u8>>, expected: Expected) -> Case {
    Case { name: name.into(), steps: vec![(request.into(), expected)] }
}

/// A problem with this status and slug.
pub(crate) fn refused(status: u16, slug: &'static str) -> Expected {
    Expected { slug: Some(slug), ..taken(status) }
}

/// What looks odd, and is fine all the same.
pub(crate) fn taken(status: u16) -> Expected {
    Expected {
        status,
        slug: None,
        headers: Vec::new(),
        pointer: None,
        contains: Vec::new(),
        moves: 0,
        heads: false,
        continued: false,
        alerts: false,
    }
}

impl Case {
    /// And then another request.
    pub(crate) fn then(mut self, request: impl Into<Vec<u8>>, expected: Expected) -> Self {
        self.steps.push((request.into(), expected));
        self
    }
}

impl Expected {
    pub(crate) fn header(mut self, name: &'static str, contains: impl Into<String>) -> Self {
        self.headers.push((name, Some(contains.into())));
        self
    }

    pub(crate) fn no_header(mut self, name: &'static str) -> Self {
        self.headers.push((name, None));
        self
    }

    /// The problem points here.
    pub(crate) fn at(mut self, pointer: impl Into<String>) -> Self {
        self.pointer = Some(pointer.into());
        self
    }

    pub(crate) fn contains(mut self, text: impl Into<String>) -> Self {
        self.contains.push(text.into());
        self
    }

    /// One event moves money: the input was strange, not bad.
    pub(crate) fn moving_money(mut self) -> Self {
        self.moves = 1;
        self
    }

    /// The answer to HEAD has no body.
    pub(crate) fn without_body(mut self) -> Self {
        self.heads = true;
        self
    }

    /// Somebody of ours is to look at it: an alert is logged.
    pub(crate) fn alerting(mut self) -> Self {
        self.alerts = true;
        self
    }

    /// `100 Continue` comes first.
    pub(crate) fn continued(mut self) -> Self {
        self.continued = true;
        self
    }
}

/// Cases of the contract's table that are no row here, and why.
const NOT_HERE: &[(&str, &str)] = &[
    ("25, captures", "holds do not exist yet; withdrawing above what is available is a row"),
    (
        "27",
        "a caller cannot write postings: no route takes legs, and unbalanced entries cannot be built in ledger-core",
    ),
    ("40", "needs the first call held in flight: command-api/tests/api/held.rs"),
    ("41, crashes", "daybook/tests/system/lifecycle.rs; a plain repetition is a row"),
    ("45, a statement that takes too long", "needs a database that is held up: projector/tests/queries/outage.rs"),
    ("46, a view that lags", "needs a projector that stands still: projector/tests/queries/fresh.rs"),
    ("57", "needs tokens that we have signed wrongly: api-contract/src/token.rs and its fuzz target"),
    ("62", "needs an engine that is full: command-api/tests/api/held.rs; too many connections are in sockets.rs"),
    ("64", "what is dialled is webhook-dispatcher's: its tests/webhooks/sending.rs"),
];

/// The contract says 100 ms; a machine that also builds and tests cannot be held to that, so it is printed.
const PROMISED: Duration = Duration::from_millis(100);
const BOUND: Duration = Duration::from_secs(2);

/// No more of the input than this is repeated.
const ECHO_MAX: usize = 64;

#[tokio::test]
async fn every_bad_input_gets_its_clear_answer_and_moves_nothing() {
    let mut system = System::start(&[]).await;
    let tables: [(&str, Vec<Case>); 9] = [
        ("http", http::table(&system)),
        ("json", json::table(&system)),
        ("money", money::table(&system)),
        ("batch", batch::table(&system)),
        ("keys", keys::table(&system)),
        ("queries", queries::table(&system)),
        ("tokens", tokens::table(&mut system).await),
        ("webhooks", webhooks::table(&system)),
        ("callbacks", callbacks::table(&system).await),
    ];
    let (mut wrong, mut times, mut alerts) = (Vec::new(), Vec::new(), 0);
    for (table, cases) in tables {
        assert!(!cases.is_empty(), "{table} has no rows");
        for Case { name, steps } in cases {
            let name = format!("{table}: {name}");
            for (place, (request, expected)) in steps.iter().enumerate() {
                alerts += usize::from(expected.alerts);
                let named = if place == 0 { name.clone() } else { format!("{name}, request {}", place + 1) };
                match check(&mut system, request, expected).await {
                    Ok(took) => times.push((took, named)),
                    Err(why) => wrong.push(format!("{named}: {why}")),
                }
            }
        }
    }
    times.sort_by_key(|(took, _)| std::cmp::Reverse(*took));
    let slow = times.iter().take_while(|(took, _)| PROMISED < *took).count();
    println!("{} inputs; {slow} were answered after more than {PROMISED:?}; the slowest:", times.len() + wrong.len());
    for (took, name) in times.iter().take(slow.clamp(3, 20)) {
        println!("{:>6} ms  {name}", took.as_millis());
    }
    for (case, why) in NOT_HERE {
        println!("case {case} is no row here: {why}");
    }
    eventually("every alert is logged", || std::future::ready(system.alerts()), |logged| *logged == alerts).await;
    assert!(wrong.is_empty(), "{} inputs were answered wrongly:\n{}", wrong.len(), wrong.join("\n"));
}

/// Sends one input and looks at everything that must hold. The error says what does not.
async fn check(system: &mut System, request: &[u8], expected: &Expected) -> Result<Duration, String> {
    let (_, moved_before) = system.log_position().await;
    let answer = exchange(system.address, request, expected.heads).await?;
    let mut wrong = Vec::new();
    let shown: String = answer.text().chars().take(600).collect();
    if answer.status != expected.status {
        wrong.push(format!("expected {}, got {}", expected.status, answer.status));
    }
    let refused = 400 <= answer.status;
    if refused && !expected.heads {
        wrong.extend(not_a_problem(&answer, expected));
        wrong.extend(echo(request, &answer).map(|echo| format!("it repeats of the input: {echo}")));
        wrong.extend(insides(&answer).map(|word| format!("it speaks of its insides: {word}")));
    }
    wrong.extend(headers_missing(&answer, expected));
    for text in &expected.contains {
        if !answer.text().contains(text.as_str()) {
            wrong.push(format!("{text} is not in the answer"));
        }
    }
    if answer.continued != expected.continued {
        wrong.push(format!("100 Continue: {}", answer.continued));
    }
    if BOUND < answer.took {
        wrong.push(format!("it took {:?}", answer.took));
    }
    let (_, moved) = system.log_position().await;
    if moved - moved_before != expected.moves {
        wrong.push(format!("{} events moved money", moved - moved_before));
    }
    let alive = exchange(system.address, &Request::get("/healthz").bytes(), false).await;
    match alive {
        Ok(alive) if alive.status == 200 => {}
        Ok(other) => wrong.push(format!("afterwards /healthz answers {}", other.status)),
        Err(error) => wrong.push(format!("afterwards the process does not answer: {error}")),
    }
    wrong.extend(system.complaints().into_iter().map(|line| format!("it logged: {line}")));
    if wrong.is_empty() { Ok(answer.took) } else { Err(format!("{}\n    {shown}", wrong.join("; "))) }
}

fn not_a_problem(answer: &Answer, expected: &Expected) -> Vec<String> {
    let mut wrong = Vec::new();
    if answer.header("content-type") != Some("application/problem+json") {
        wrong.push(format!("its type is {:?}", answer.header("content-type")));
        return wrong;
    }
    let document = answer.json();
    let kind = document["type"].as_str().unwrap_or_default();
    if let Some(slug) = expected.slug
        && kind != format!("/problems/{slug}")
    {
        wrong.push(format!("expected {slug}, got {kind}"));
    }
    if document["status"] != answer.status {
        wrong.push(format!("its document says {}", document["status"]));
    }
    for member in ["title", "detail", "requestId"] {
        if document[member].as_str().is_none_or(str::is_empty) {
            wrong.push(format!("it has no {member}"));
        }
    }
    if let Some(pointer) = &expected.pointer
        && document["errors"][0]["pointer"] != pointer.as_str()
    {
        wrong.push(format!("it points to {} and not to {pointer}", document["errors"][0]["pointer"]));
    }
    wrong
}

/// What each status owes its client, and what the case says.
fn headers_missing(answer: &Answer, expected: &Expected) -> Vec<String> {
    let owed: &[&str] = match answer.status {
        401 => &["www-authenticate"],
        405 => &["allow"],
        429 | 503 => &["retry-after"],
        _ => &[],
    };
    let mut wrong = Vec::new();
    for name in owed.iter().chain(&["x-request-id"]) {
        if answer.header(name).is_none_or(str::is_empty) {
            wrong.push(format!("it has no {name}"));
        }
    }
    if answer.status == 413 && answer.header("connection") != Some("close") {
        wrong.push("the connection stays open for a body that is not read".to_owned());
    }
    for (name, wanted) in &expected.headers {
        let found = answer.header(name);
        let holds = match wanted {
            Some(wanted) => found.is_some_and(|found| found.contains(wanted.as_str())),
            None => found.is_none(),
        };
        if !holds {
            wrong.push(format!("expected {name} with {wanted:?}, got {found:?}"));
        }
    }
    wrong
}

/// More of the input in the answer than may be repeated.
fn echo(request: &[u8], answer: &Answer) -> Option<String> {
    const LOOKED_AT: usize = 4096; // of each part of the input: what is repeated is its beginning
    let end = request.windows(4).position(|window| window == b"\r\n\r\n").unwrap_or(request.len());
    let (head, body) = request.split_at(end);
    let mut lines = head.split(|byte| *byte == b'\n');
    let target = lines.next().unwrap_or_default();
    let mut parts: Vec<&[u8]> = target.split(|byte| b"/?&= ".contains(byte)).collect();
    // These two are given back by the contract.
    let named =
        |line: &&[u8]| !line.to_ascii_lowercase().starts_with(b"x-request-id") && !line.starts_with(b"traceparent");
    parts.extend(lines.filter(named));
    parts.push(body);
    let headers: String = answer.headers.iter().map(|(_, value)| format!("{value}\n")).collect();
    let said = [headers.as_bytes(), &answer.body].concat();
    parts
        .into_iter()
        .map(|part| &part[..part.len().min(LOOKED_AT)])
        .flat_map(|part| part.windows(ECHO_MAX + 1))
        .find(|window| said.windows(window.len()).any(|found| found == *window))
        .map(|window| String::from_utf8_lossy(window).into_owned())
}

/// A word that only our insides could have said.
fn insides(answer: &Answer) -> Option<&'static str> {
    const WORDS: [&str; 16] = [
        "sqlx",
        "postgres",
        "select ",
        "insert into",
        "pg_",
        "relation ",
        "panicked",
        "unwrap",
        ".rs:",
        "/src/",
        "backtrace",
        "rustc",
        "serde",
        "hyper",
        "axum",
        "nats",
    ];
    let said = answer.text().to_lowercase();
    WORDS.into_iter().find(|word| said.contains(word))
}
