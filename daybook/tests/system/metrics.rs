//! `/metrics` of a running system, beside what is said about it: the page of documentation, the dashboard and the alerts.
//!
//! All three are read as their users read them: the table's rows, Grafana's JSON, Prometheus' rules; and every expression
//! in PromQL is parsed and compared with what the system exports.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use futures::stream::{self, StreamExt};
use reqwest::{Method, StatusCode};
use rusty_promql_parser::{Aggregation, BinaryOp, Expr, LabelMatchOp, LabelMatcher};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use tokio::net::TcpListener;
use yaml_rust2::{Yaml, YamlLoader};

use crate::process::{DataDirectory, Daybook, answer, eventually};
use crate::road::receiver;

const TRANSFERS: u64 = 7;
const DECLINED: u64 = 3;

/// What a client may ask for without end.
const DISTINCT: usize = 1_000;

#[tokio::test]
async fn what_is_exported_follows_from_the_traffic_and_is_what_documentation_dashboard_and_alerts_speak_of() {
    let directory = DataDirectory::new();
    let daybook = Daybook::start(&directory, &["--allow-local-webhooks", "--top-up-ask-after", "300ms"]).await;
    let (alice, bob) = (daybook.wallet("alice", "100.00").await, daybook.wallet("bob", "0").await);
    let before = Metrics::of(&daybook).await;

    let sent = traffic(&daybook, &alice, &bob).await;
    let told =
        |seen: &Metrics| seen.sum("daybook_webhook_attempts_total", &[("outcome", "delivered")]) == sent.delivered;
    let after = eventually("every delivery has arrived", || Metrics::of(&daybook), told).await;
    let since = |name: &str, labels: &[(&str, &str)]| after.sum(name, labels) - before.sum(name, labels);

    let transfer = "/v1/transactions/transfer";
    for (name, labels, times) in [
        (
            "daybook_http_requests_total",
            &[("route", transfer), ("method", "POST"), ("status", "201")][..],
            TRANSFERS + 1,
        ),
        ("daybook_http_requests_total", &[("route", transfer), ("status", "422")], DECLINED),
        ("daybook_http_request_seconds_count", &[("route", transfer), ("status_class", "2xx")], TRANSFERS + 1),
        ("daybook_http_request_seconds_bucket", &[("route", transfer), ("le", "+Inf")], TRANSFERS + 1 + DECLINED),
        ("daybook_ledger_commands_total", &[("kind", "transfer"), ("outcome", "answered")], TRANSFERS + DECLINED),
        ("daybook_ledger_commands_total", &[("kind", "transfer"), ("outcome", "replayed")], 1),
        ("daybook_ledger_commands_total", &[("kind", "batch"), ("outcome", "answered")], 2),
        ("daybook_ledger_commands_total", &[("kind", "wallet"), ("outcome", "refused")], 1),
        ("daybook_transactions_total", &[("type", "TRANSFER"), ("outcome", "success")], TRANSFERS + 2),
        ("daybook_transactions_total", &[("type", "TRANSFER"), ("outcome", "declined")], DECLINED + 1),
        ("daybook_transactions_total", &[("type", "TOP_UP"), ("outcome", "requested")], 2),
        ("daybook_transactions_total", &[("type", "TOP_UP"), ("outcome", "success")], 1),
        ("daybook_transactions_total", &[("type", "TOP_UP"), ("outcome", "failed")], 1),
        ("daybook_declined_total", &[("type", "TRANSFER"), ("reason", "insufficient-funds")], DECLINED + 1),
        ("daybook_declined_total", &[("type", "BATCH"), ("reason", "insufficient-funds")], 1),
        ("daybook_wallet_entries_total", &[("direction", "debit"), ("currency", "EUR")], TRANSFERS + 3),
        ("daybook_wallet_entries_total", &[("direction", "credit")], TRANSFERS + 3),
        ("daybook_workflow_steps_total", &[("action", "settle"), ("outcome", "ended")], 1),
        ("daybook_bank_callbacks_total", &[("verdict", "accepted")], 2),
        ("daybook_webhook_deliveries_made_total", &[], sent.delivered),
    ] {
        assert_eq!(since(name, labels), times, "{name} {labels:?}");
    }
    let (commits, events) = (since("daybook_ledger_commits_total", &[]), since("daybook_ledger_events_total", &[]));
    assert_eq!(since("daybook_ledger_head_commit", &[]), commits);
    assert_eq!(since("daybook_ledger_head_position", &[]), events);
    assert_eq!(since("daybook_ledger_append_seconds_count", &[]), commits);
    assert_eq!(since("daybook_ledger_batch_events_count", &[]), commits);
    assert_eq!(
        after.sum("daybook_ledger_batch_events_sum", &[]) - before.sum("daybook_ledger_batch_events_sum", &[]),
        events
    );
    assert_eq!(after.sum("daybook_ledger_running", &[]), 1);

    let level = |seen: &Metrics| {
        [
            "daybook_feed_lag_events",
            "daybook_view_lag_events",
            "daybook_relay_lag_commits",
            "daybook_ledger_queue_decisions",
        ]
        .iter()
        .all(|lag| seen.sum(lag, &[]) == 0)
            && seen.sum("daybook_top_ups_open", &[]) == 0
            && seen.sum("daybook_webhook_backlog_deliveries", &[]) == 0
    };
    let last = eventually("everything is level, and nothing waits", || Metrics::of(&daybook), level).await;
    for follower in ["projector", "webhooks", "workflows"] {
        let followed = last.sum("daybook_feed_commits_total", &[("follower", follower)]);
        assert!(commits <= followed, "{follower} has seen {followed} of {commits} commits");
        let handed = last.sum("daybook_feed_commits_total", &[("follower", follower), ("source", "relay")]);
        assert!(0 < handed, "{follower} was handed nothing by the relay beside it");
    }
    assert_eq!(last.sum("daybook_relay_published_commit", &[]), last.sum("daybook_ledger_head_commit", &[]));
    assert!(0 < last.sum("process_resident_memory_bytes", &[]) && 0 < last.sum("process_open_fds", &[]));

    last.assert_well_formed();
    last.assert_tells_nothing_private(&daybook, &[&alice, &bob, &sent.url]);
    let documented = documented();
    assert_documented(&last, &documented);
    let asked = Questions { metrics: &last, documented: &documented };
    assert_eq!(
        asked.dashboard(),
        ["Traffic", "Ledger", "Feed", "Read side", "Webhooks", "Top-ups and the bank", "Start-up and process"]
    );
    asked.alerts();
}

#[tokio::test]
async fn what_stands_still_or_waits_is_seen_and_how_far_it_is_behind() {
    let directory = DataDirectory::new();
    let daybook = Daybook::start(&directory, &["--allow-local-webhooks"]).await;
    let partner = daybook.login("demoPartner").await;
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap(); // closed again at once
    let webhook = json!({"url": format!("http://{nobody}/"), "events": ["wallet.opened"]});
    answer(daybook.post(&partner, "/v1/webhooks", webhook), StatusCode::CREATED).await;
    let wallet = daybook.wallet("alice", "0").await;
    let top_up = json!({"walletId": wallet, "amount": "10.00", "currency": "EUR"});
    answer(daybook.post_with_key(&partner, "/v1/transactions/top-up", "unpaid", top_up), StatusCode::ACCEPTED).await;

    let waits = |seen: &Metrics| {
        seen.sum("daybook_webhook_backlog_deliveries", &[("status", "retrying")]) == 1
            && seen.sum("daybook_webhook_attempts_total", &[("outcome", "connect")]) == 1
            && seen.sum("daybook_webhook_endpoints", &[("status", "active")]) == 1
            && seen.sum("daybook_top_ups_open", &[("state", "waiting")]) == 1
    };
    eventually("a delivery is tried again, and the payer has not decided", || Metrics::of(&daybook), waits).await;

    // The projector's checkpoints are held, as by a session that is stuck.
    let mut stuck = PgConnection::connect(daybook.database_url()).await.unwrap();
    let mut held = stuck.begin().await.unwrap();
    sqlx::query("select from views.checkpoints for update").execute(&mut *held).await.unwrap();
    daybook
        .post(&partner, &format!("/v1/wallets/{wallet}/freeze"), json!({"reason": "it is late"}))
        .send()
        .await
        .unwrap();
    let behind = |seen: &Metrics| {
        seen.sum("daybook_feed_lag_events", &[("follower", "projector")]) == 1
            && seen.sum("daybook_view_lag_events", &[]) == projector::VIEWS.len() as u64
            && seen.all().any(|series| {
                let of_projector = series.labels.get("follower").is_some_and(|follower| follower == "projector");
                series.name == "daybook_feed_lag_seconds" && of_projector && 0.5 < series.value.parse::<f64>().unwrap()
            })
            && seen.sum("daybook_feed_lag_events", &[("follower", "workflows")]) == 0
    };
    eventually("the views are one event behind, and the others are not", || Metrics::of(&daybook), behind).await;
    held.rollback().await.unwrap();
    let level = |seen: &Metrics| seen.sum("daybook_view_lag_events", &[]) == 0;
    eventually("the views are level again", || Metrics::of(&daybook), level).await;
}

#[tokio::test]
async fn whatever_a_client_puts_into_paths_ids_methods_and_currencies_makes_no_series() {
    let directory = DataDirectory::new();
    let daybook = Daybook::start(&directory, &[]).await;
    let partner = daybook.login("demoPartner").await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let ask = async |number: usize| {
        let path = |path: String| format!("{}{path}", daybook.base_url());
        let nonsense = format!("nonsense{number}");
        let transfer =
            json!({"fromWalletId": nonsense, "toWalletId": nonsense, "amount": "1.00", "currency": nonsense});
        let requests = [
            client.get(path(format!("/{nonsense}/{nonsense}"))),
            client.get(path(format!("/v1/wallets/{nonsense}"))).bearer_auth(&partner),
            client.request(Method::from_bytes(nonsense.as_bytes()).unwrap(), path("/v1/wallets".to_owned())),
            client
                .post(path("/v1/transactions/transfer".to_owned()))
                .bearer_auth(&partner)
                .header("Idempotency-Key", &nonsense)
                .json(&transfer),
            client
                .post(path("/v1/wallets".to_owned()))
                .bearer_auth(&partner)
                .json(&json!({"userId": nonsense, "currency": &nonsense.to_uppercase()[8..]})),
        ];
        for request in requests {
            let status = request.send().await.unwrap().status();
            assert!(status.is_client_error(), "{status}");
        }
    };
    ask(0).await;
    Metrics::of(&daybook).await; // it counts itself, the next time
    let before = Metrics::of(&daybook).await;
    stream::iter(1..DISTINCT).for_each_concurrent(16, ask).await;
    let after = Metrics::of(&daybook).await;
    let new: BTreeSet<_> = after.series().difference(&before.series()).cloned().collect();
    assert!(new.is_empty(), "{new:?}");
    assert!(!after.text.to_lowercase().contains("nonsense"), "{}", after.text);
    let unmatched = [("route", "unmatched"), ("method", "GET"), ("status", "404")];
    assert_eq!(after.sum("daybook_http_requests_total", &unmatched), DISTINCT as u64, "they are counted all the same");
}

struct Sent {
    /// Deliveries that follow from it.
    delivered: u64,
    url: String,
}

/// A little of everything that leaves a trace in the metrics.
async fn traffic(daybook: &Daybook, alice: &str, bob: &str) -> Sent {
    let partner = daybook.login("demoPartner").await;
    let (url, _received) = receiver().await;
    let events = ["transaction.completed", "transaction.failed"];
    let webhook = daybook.post(&partner, "/v1/webhooks", json!({"url": url, "events": events}));
    answer(webhook, StatusCode::CREATED).await;
    let transfer =
        |amount: &str| json!({"fromWalletId": alice, "toWalletId": bob, "amount": amount, "currency": "EUR"});
    let path = "/v1/transactions/transfer";
    for number in 0..TRANSFERS {
        let sent = daybook.post_with_key(&partner, path, &format!("sent-{number}"), transfer("1.00"));
        answer(sent, StatusCode::CREATED).await;
    }
    answer(daybook.post_with_key(&partner, path, "sent-0", transfer("1.00")), StatusCode::CREATED).await;
    for number in 0..DECLINED {
        let declined = daybook.post_with_key(&partner, path, &format!("declined-{number}"), transfer("1000.00"));
        answer(declined, StatusCode::UNPROCESSABLE_ENTITY).await;
    }
    let batch = |atomic: bool| json!({"atomic": atomic, "transactions": [transfer("1.00"), transfer("1000.00"), transfer("1.00")]});
    let path = "/v1/transactions/batch";
    answer(daybook.post_with_key(&partner, path, "each", batch(false)), StatusCode::CREATED).await;
    answer(daybook.post_with_key(&partner, path, "all", batch(true)), StatusCode::UNPROCESSABLE_ENTITY).await;
    for outcome in ["success", "failure"] {
        let body = json!({"walletId": bob, "amount": "10.00", "currency": "EUR"});
        let asked = daybook.post_with_key(&partner, "/v1/transactions/top-up", outcome, body);
        let asked = answer(asked, StatusCode::ACCEPTED).await;
        daybook.simulate(json!({"token": asked["token"], "outcome": outcome})).await;
        let path = format!("/v1/transactions/{}", asked["id"].as_str().unwrap());
        let ended = answer(daybook.get(&partner, &path).query(&[("waitMs", 20_000)]), StatusCode::OK).await;
        assert_ne!(ended["status"], "PENDING");
    }
    // Without a key a refusal leaves nothing in the log.
    let freeze =
        daybook.post(&partner, &format!("/v1/wallets/{alice}/unfreeze"), json!({"reason": "it is not frozen"}));
    answer(freeze, StatusCode::CONFLICT).await;
    let path = format!("/v1/wallets/{alice}/balance");
    answer(daybook.get(&partner, &path), StatusCode::OK).await;
    // The transfers, those of the batch, the two ends of the top-ups.
    Sent { delivered: TRANSFERS + 2 + 2, url }
}

// What is exported.

struct Metrics {
    text: String,
    families: BTreeMap<String, Family>,
}

#[derive(Default)]
struct Family {
    kind: String,
    help: String,
    series: Vec<Series>,
}

struct Series {
    /// With `_bucket`, `_sum` and `_count`.
    name: String,
    labels: BTreeMap<String, String>,
    value: String,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl Metrics {
    async fn of(daybook: &Daybook) -> Self {
        let response = daybook.get("", "/metrics").send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        Self::read(response.text().await.unwrap())
    }

    /// Prometheus' text format. Whatever is not of it is a failure.
    fn read(text: String) -> Self {
        let mut families: BTreeMap<String, Family> = BTreeMap::new();
        for line in text.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, help) = help.split_once(' ').unwrap();
                families.entry(name.to_owned()).or_default().help = help.to_owned();
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').unwrap();
                families.entry(name.to_owned()).or_default().kind = kind.to_owned();
            } else {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
                let labels = labels.strip_suffix('}').unwrap();
                let labels =
                    labels.split_terminator("\",").map(|label| label.trim_end_matches('"').split_once("=\"").unwrap());
                let labels = labels.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
                let family = ["_bucket", "_sum", "_count", ""].iter().find_map(|part| {
                    let family = name.strip_suffix(part)?;
                    families.contains_key(family).then(|| family.to_owned())
                });
                let family = family.unwrap_or_else(|| panic!("{name} has neither HELP nor TYPE before it"));
                let family = families.get_mut(&family).unwrap();
                family.series.push(Series { name: name.to_owned(), labels, value: value.to_owned() });
            }
        }
        Self { text, families }
    }

    /// Of all series of this name with these labels among theirs. Only of what counts whole things.
    fn sum(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        let has = |series: &&Series| {
            series.name == name
                && labels.iter().all(|(label, value)| series.labels.get(*label).is_some_and(|found| found == value))
        };
        self.all().filter(has).map(|series| series.value.parse::<u64>().unwrap()).sum()
    }

    fn all(&self) -> impl Iterator<Item = &Series> {
        self.families.values().flat_map(|family| &family.series)
    }

    fn series(&self) -> BTreeSet<String> {
        self.all().map(|series| format!("{} {:?}", series.name, series.labels)).collect()
    }

    fn assert_well_formed(&self) {
        for (name, Family { kind, help, series }) in &self.families {
            assert!(name.starts_with("daybook_") || name.starts_with("process_"), "{name}");
            assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{name}");
            assert!(help.len() > 5 && !series.is_empty(), "{name}");
            assert!(["counter", "gauge", "histogram"].contains(&kind.as_str()), "{name} is a {kind}");
            assert_eq!(name.ends_with("_total"), kind == "counter", "{name}");
            for unit in ["seconds", "bytes"] {
                let has_unit = name.trim_end_matches("_total").ends_with(unit);
                assert!(!has_unit || help.contains(unit) || help.contains("since 1970"), "{name}: {help}");
            }
            for series in series {
                assert!(
                    series.value.parse::<f64>().unwrap() >= 0.0,
                    "{} {:?} is {}",
                    series.name,
                    series.labels,
                    series.value
                );
            }
        }
    }

    fn assert_tells_nothing_private(&self, daybook: &Daybook, more: &[&str]) {
        let connection = &daybook.connection;
        let secrets = ["admin", "demoPartner"].map(|client| &connection[client]);
        let secrets = secrets.iter().flat_map(|client| [&client["clientId"], &client["clientSecret"]]);
        let secrets = secrets.chain([&connection["databaseUrl"], &connection["natsUrl"]]);
        for secret in
            secrets.map(|secret| secret.as_str().unwrap()).chain(more.iter().copied()).chain(["Demo", "alice"])
        {
            assert!(!self.text.contains(secret), "{secret} is told");
        }
    }
}

// What the page says.

/// One row of its tables.
struct Documented {
    kind: String,
    labels: BTreeMap<String, Values>,
}

enum Values {
    These(BTreeSet<String>),
    /// They are too many to be listed; the page says where they come from.
    Open,
}

fn root(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn documented() -> BTreeMap<String, Documented> {
    let page = root("docs/metrics.md");
    let rows = page.lines().filter(|line| line.starts_with("| `"));
    let rows = rows.map(|row| {
        let cells: Vec<_> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [name, kind, labels, unit, meaning, _] = cells[..] else { panic!("{row}") };
        assert!(!unit.is_empty() && !meaning.is_empty(), "{row}");
        let labels = labels.split("; ").filter(|label| !label.is_empty()).map(|label| {
            let (label, values) = label.split_once(": ").unwrap_or_else(|| panic!("{row}"));
            let values = match values.strip_prefix('_') {
                Some(_) => Values::Open,
                None => Values::These(values.split(", ").map(str::to_owned).collect()),
            };
            (label.trim_matches('`').to_owned(), values)
        });
        let documented = Documented { kind: kind.to_owned(), labels: labels.collect() };
        (name.trim_matches('`').to_owned(), documented)
    });
    rows.collect()
}

fn assert_documented(metrics: &Metrics, documented: &BTreeMap<String, Documented>) {
    let names: BTreeSet<_> = documented.keys().collect();
    let exported: BTreeSet<_> = metrics.families.keys().collect();
    assert_eq!(names, exported, "left: docs/metrics.md, right: /metrics");
    for (name, Family { kind, series, .. }) in &metrics.families {
        let row = &documented[name];
        assert_eq!(&row.kind, kind, "{name}");
        for series in series {
            let mut found: BTreeSet<_> = series.labels.keys().cloned().collect();
            if series.name.ends_with("_bucket") {
                found.remove("le");
            }
            assert_eq!(row.labels.keys().cloned().collect::<BTreeSet<_>>(), found, "{name}");
            for (label, values) in &row.labels {
                if let Values::These(values) = values {
                    let value = &series.labels[label];
                    assert!(values.contains(value), "{name}: {label} is {value}");
                }
            }
        }
    }
}

// What dashboard and alerts ask.

/// The labels that Prometheus adds to everything.
const OF_PROMETHEUS: [&str; 2] = ["instance", "job"];

struct Questions<'a> {
    metrics: &'a Metrics,
    documented: &'a BTreeMap<String, Documented>,
}

impl Questions<'_> {
    /// Answers the titles of its rows.
    fn dashboard(&self) -> Vec<String> {
        let dashboard: Value = serde_json::from_str(&root("observability/grafana-dashboard.json")).unwrap();
        assert_eq!(dashboard["schemaVersion"], 41);
        assert_eq!(dashboard["templating"]["list"][0]["type"], "datasource");
        let (rows, panels): (Vec<_>, Vec<_>) =
            dashboard["panels"].as_array().unwrap().iter().partition(|panel| panel["type"] == "row");
        let mut asked = BTreeSet::new();
        for panel in panels {
            let title = panel["title"].as_str().unwrap();
            assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
            assert!(!panel["description"].as_str().unwrap().is_empty(), "{title}");
            for target in panel["targets"].as_array().unwrap() {
                let text = target["expr"].as_str().unwrap().replace("$__rate_interval", "1m");
                let (expression, labels) = self.check(&text);
                let unit = unit(panel, target["legendFormat"].as_str().unwrap());
                assert!(unit == "s" || !self.is_time(&expression), "{title}: {text} is in seconds, not in {unit}");
                for label in placeholders(target["legendFormat"].as_str().unwrap()) {
                    assert!(labels.contains(&label), "{title}: the legend's {label} is not in {text}");
                }
                names(&expression, &mut asked);
            }
        }
        for name in self.documented.keys() {
            assert!(asked.contains(name.as_str()), "the dashboard does not show {name}");
        }
        rows.iter().map(|row| row["title"].as_str().unwrap().to_owned()).collect()
    }

    fn alerts(&self) {
        let rules = YamlLoader::load_from_str(&root("observability/alerts.yml")).unwrap();
        let scrape = YamlLoader::load_from_str(&root("observability/prometheus.yml")).unwrap();
        assert_eq!(scrape[0]["rule_files"][0].as_str(), Some("alerts.yml"));
        let job = scrape[0]["scrape_configs"][0]["job_name"].as_str().unwrap();
        let page = root("docs/metrics.md");
        let headings: BTreeSet<_> = page.lines().filter_map(|line| line.strip_prefix("### Daybook")).collect();
        let mut named = BTreeSet::new();
        let text = |of: &Yaml| of.as_str().unwrap().to_owned();
        for rule in rules[0]["groups"].as_vec().unwrap().iter().flat_map(|group| group["rules"].as_vec().unwrap()) {
            let name = text(&rule["alert"]);
            let expression = text(&rule["expr"]);
            let (_, labels) = self.check(&expression);
            assert!(!expression.contains("job=") || expression.contains(&format!("job=\"{job}\"")), "{name}");
            humantime::parse_duration(&text(&rule["for"])).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(["critical", "warning"].contains(&text(&rule["labels"]["severity"]).as_str()), "{name}");
            let summary = text(&rule["annotations"]["summary"]);
            for label in placeholders(&summary).iter().filter_map(|part| part.strip_prefix("$labels.")) {
                assert!(labels.contains(label), "{name}: {label} is not in what the expression leaves");
            }
            assert_eq!(text(&rule["annotations"]["runbook"]), format!("docs/metrics.md#{}", name.to_lowercase()));
            let heading = name.strip_prefix("Daybook").unwrap().to_owned();
            assert!(named.insert(heading), "{name} stands there twice");
        }
        let named: BTreeSet<_> = named.iter().map(String::as_str).collect();
        assert_eq!(named, headings, "left: alerts, right: what the page says to do");
    }

    /// Whether the result is a time: a quantile of times, or how long something is.
    fn is_time(&self, expression: &Expr) -> bool {
        match expression {
            Expr::Paren(inner) => self.is_time(inner),
            Expr::Aggregation(aggregation) => self.is_time(&aggregation.expr),
            Expr::Call(call) if call.name == "histogram_quantile" => {
                let mut asked = BTreeSet::new();
                names(expression, &mut asked);
                asked.iter().all(|name| name.ends_with("_seconds"))
            }
            Expr::VectorSelector(selector) => selector
                .name
                .as_deref()
                .is_some_and(|name| name.ends_with("_seconds") && !name.ends_with("timestamp_seconds")),
            _ => false,
        }
    }

    /// Parses an expression and compares it with what there is; answers the labels of its result, too.
    fn check(&self, text: &str) -> (Expr, BTreeSet<String>) {
        let (rest, expression) = rusty_promql_parser::expr(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert!(rest.trim().is_empty(), "{text}: cannot be read from {rest:?} on");
        let labels = self.labels(&expression, text);
        (expression, labels)
    }

    /// Whether every part of it can be answered, and with which labels.
    fn labels(&self, expression: &Expr, text: &str) -> BTreeSet<String> {
        match expression {
            Expr::Number(_) | Expr::String(_) => BTreeSet::new(),
            Expr::VectorSelector(selector) => self.selected(selector.name.as_deref(), &selector.matchers, text),
            Expr::MatrixSelector(selector) => {
                self.selected(selector.selector.name.as_deref(), &selector.selector.matchers, text)
            }
            Expr::Paren(inner) => self.labels(inner, text),
            Expr::Unary(unary) => self.labels(&unary.expr, text),
            Expr::Binary(binary) => {
                let (left, right) = (self.labels(&binary.lhs, text), self.labels(&binary.rhs, text));
                // Two vectors meet only where all their labels are the same; `or` takes them as they are.
                if binary.op == BinaryOp::Or {
                    return &left | &right;
                }
                assert!(left.is_empty() || right.is_empty() || left == right, "{text}: the two sides never meet");
                if left.is_empty() { right } else { left }
            }
            Expr::Call(call) => {
                let kinds: BTreeSet<_> = call.args.iter().flat_map(|argument| self.kinds(argument)).collect();
                match call.name.as_str() {
                    "rate" | "increase" => {
                        assert!(matches!(call.args[..], [Expr::MatrixSelector(_)]), "{text}");
                        assert!(!kinds.contains("gauge"), "{text}: a gauge has no rate");
                    }
                    "delta" => assert_eq!(kinds, BTreeSet::from(["gauge".to_owned()]), "{text}"),
                    "histogram_quantile" => assert_eq!(kinds, BTreeSet::from(["histogram".to_owned()]), "{text}"),
                    "time" => assert!(call.args.is_empty(), "{text}"),
                    "vector" => assert!(matches!(call.args[..], [Expr::Number(_)]), "{text}"),
                    other => panic!("{text}: {other} is not a function that is used here"),
                }
                let mut labels: BTreeSet<_> =
                    call.args.iter().flat_map(|argument| self.labels(argument, text)).collect();
                let had_buckets = labels.remove("le");
                assert!(call.name != "histogram_quantile" || had_buckets, "{text}: no buckets");
                if had_buckets && call.name != "histogram_quantile" {
                    labels.insert("le".to_owned());
                }
                labels
            }
            Expr::Aggregation(aggregation) => self.aggregated(aggregation, text),
            Expr::Subquery(_) => panic!("{text}: no subqueries are used here"),
        }
    }

    fn aggregated(&self, aggregation: &Aggregation, text: &str) -> BTreeSet<String> {
        let inner = self.labels(&aggregation.expr, text);
        if aggregation.op == "topk" {
            return inner;
        }
        assert!(["sum", "min", "max", "count"].contains(&aggregation.op.as_str()), "{text}: {}", aggregation.op);
        let by: BTreeSet<String> =
            aggregation.grouping.iter().flat_map(|grouping| grouping.labels.iter().cloned()).collect();
        assert!(by.is_subset(&inner), "{text}: by {by:?} of {inner:?}");
        by
    }

    fn selected(&self, name: Option<&str>, matchers: &[LabelMatcher], text: &str) -> BTreeSet<String> {
        let name = name.unwrap_or_else(|| panic!("{text}: a selector without a name"));
        let mut labels: BTreeSet<_> = OF_PROMETHEUS.map(str::to_owned).into();
        if name == "up" {
            return labels; // Prometheus' own
        }
        let (family, row) = self.family(name).unwrap_or_else(|| panic!("{text}: {name} is not documented"));
        let of_job = matchers.iter().any(|matcher| matcher.name == "job");
        assert!(of_job || !name.starts_with("process_"), "{text}: whose {name}? Others export it, too");
        let series = self.metrics.families[family].series.iter().find(|series| series.name == name);
        labels.extend(series.unwrap_or_else(|| panic!("{text}: {name} is not exported")).labels.keys().cloned());
        for LabelMatcher { name: label, op, value } in matchers {
            assert!(labels.contains(label), "{text}: {name} has no label {label}");
            let values: Vec<_> = match op {
                LabelMatchOp::Equal | LabelMatchOp::NotEqual => vec![value.as_str()],
                LabelMatchOp::RegexMatch | LabelMatchOp::RegexNotMatch => value.split('|').collect(),
            };
            if let Some(Values::These(known)) = row.labels.get(label) {
                for value in values {
                    assert!(known.contains(value), "{text}: {label} is never {value}");
                }
            }
        }
        labels
    }

    fn family(&self, name: &str) -> Option<(&str, &Documented)> {
        ["_bucket", "_sum", "_count", ""].iter().find_map(|part| {
            let (family, row) = self.documented.get_key_value(name.strip_suffix(part)?)?;
            (part.is_empty() != (row.kind == "histogram")).then_some((family.as_str(), row))
        })
    }

    /// The types of the metrics in it.
    fn kinds(&self, expression: &Expr) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        selectors(expression, &mut |name| {
            found.extend(self.family(name).map(|(_, row)| row.kind.clone()));
        });
        found
    }
}

/// The names of metrics, without the parts of histograms.
fn names(expression: &Expr, into: &mut BTreeSet<String>) {
    selectors(expression, &mut |name| {
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|part| name.strip_suffix(part));
        into.insert(family.unwrap_or(name).to_owned());
    });
}

fn selectors(expression: &Expr, with: &mut impl FnMut(&str)) {
    match expression {
        Expr::Number(_) | Expr::String(_) => {}
        Expr::VectorSelector(selector) => selector.name.iter().for_each(|name| with(name)),
        Expr::MatrixSelector(selector) => selector.selector.name.iter().for_each(|name| with(name)),
        Expr::Paren(inner) => selectors(inner, with),
        Expr::Unary(unary) => selectors(&unary.expr, with),
        Expr::Binary(binary) => {
            selectors(&binary.lhs, with);
            selectors(&binary.rhs, with);
        }
        Expr::Call(call) => call.args.iter().for_each(|argument| selectors(argument, with)),
        Expr::Aggregation(aggregation) => selectors(&aggregation.expr, with),
        Expr::Subquery(subquery) => selectors(&subquery.expr, with),
    }
}

/// In which a panel shows what has this legend.
fn unit<'p>(panel: &'p Value, legend: &str) -> &'p str {
    let fields = &panel["fieldConfig"];
    let own = fields["overrides"].as_array().into_iter().flatten().find(|own| own["matcher"]["options"] == legend);
    let own = own.and_then(|own| own["properties"].as_array()?.iter().find(|property| property["id"] == "unit"));
    own.map_or(&fields["defaults"]["unit"], |unit| &unit["value"]).as_str().unwrap()
}

/// What stands between `{{` and `}}`, up to a function that it goes through.
fn placeholders(text: &str) -> Vec<String> {
    let parts = text.split("{{").skip(1).map(|part| part.split("}}").next().unwrap());
    parts.map(|part| part.split('|').next().unwrap().trim().to_owned()).collect()
}
