//! What the service says about itself.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::door::Door;

#[tokio::test]
async fn every_described_route_is_there_and_says_what_it_needs() {
    let door = Door::open().await;
    let document = door.get("/openapi.json").empty().await.expect(200);
    assert_eq!(document["openapi"], "3.1.0");
    let paths = document["paths"].as_object().unwrap();
    let (commands, doors): (Vec<_>, Vec<_>) = paths.iter().partition(|(path, _)| path.starts_with("/v1/"));
    assert_eq!((commands.len(), doors.len()), (18, 7));
    for (path, item) in doors {
        let answer = door.get(&path.replace("{slug}", "insufficient-funds")).empty().await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.text);
        let content = item["get"]["responses"]["200"]["content"].as_object().unwrap().keys().next().unwrap();
        assert!(answer.header("content-type").unwrap().starts_with(content), "{path}");
    }
    for (path, item) in commands {
        let operation = &item["post"];
        let responses = operation["responses"].as_object().unwrap();
        let path = path.replace("{id}", "wal_0192f0c1-2d3e-7abc-8def-0123456789ab");
        let answer = door.post(&path).json(&json!({})).await;
        let described = responses.contains_key(answer.status.as_str());
        assert!(described && answer.status != 404 && answer.status != 405, "{path}: {}", answer.text);
        assert!(operation["summary"].as_str().is_some_and(|summary| !summary.is_empty()), "{path}");
        assert_eq!(operation.get("x-problems"), None);
        let commands = operation["parameters"].as_array().into_iter().flatten();
        if commands.into_iter().any(|parameter| parameter["name"] == "Idempotency-Key") {
            let success = responses.iter().find(|(status, _)| status.starts_with('2')).unwrap().1;
            let created = if responses.contains_key("200") { "X-Request-ID" } else { "Location" };
            for header in ["Ledger-Position", "Idempotent-Replayed", "X-Request-ID", created] {
                assert!(success["headers"].get(header).is_some(), "{path}: {header}");
            }
        }
    }
    for reference in references(&document) {
        let found = document.pointer(reference.trim_start_matches('#'));
        assert!(found.is_some(), "{reference} leads nowhere");
    }
}

#[tokio::test]
async fn every_described_problem_has_its_page_and_its_status() {
    let door = Door::open().await;
    let document = door.get("/openapi.json").empty().await.expect(200);
    let mut slugs = BTreeSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        let operation = if path.starts_with("/v1/") { &item["post"] } else { &item["get"] };
        for (status, response) in operation["responses"].as_object().unwrap() {
            let Some(examples) = response["content"]["application/problem+json"]["examples"].as_object() else {
                continue;
            };
            for (slug, example) in examples {
                assert_eq!(example["value"]["status"].to_string(), *status, "{path}: {slug}");
                assert_ne!(slug, "refused", "{path} names a problem that is not in the table");
                slugs.insert(slug.clone());
            }
        }
    }
    assert!(40 < slugs.len(), "{slugs:?}");
    for slug in slugs {
        let page = door.get(&format!("/problems/{slug}")).empty().await;
        assert_eq!(page.status, 200, "{slug}");
    }
}

#[tokio::test]
async fn the_documentation_page_needs_no_script_and_nothing_from_elsewhere() {
    let door = Door::open().await;
    let page = door.get("/docs").empty().await;
    assert_eq!(page.status, 200);
    assert!(page.header("content-security-policy").unwrap().starts_with("default-src 'none'; style-src 'self';"));
    for absent in ["<script", "http://", "src=", "style=", "onclick"] {
        assert!(!page.text.contains(absent), "{absent}");
    }
    for present in [
        "/v1/transactions/transfer",
        "href=\"/problems/insufficient-funds\"",
        "id=\"schema-Transaction\"",
        "Idempotency-Key",
    ] {
        assert!(page.text.contains(present), "{present}");
    }
    let anchors: BTreeSet<&str> = page.text.split("id=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    for link in page.text.split("href=\"#").skip(1).filter_map(|rest| rest.split('"').next()) {
        assert!(anchors.contains(link), "#{link} leads nowhere");
    }
    let style = door.get("/docs/style.css").empty().await;
    assert_eq!(style.header("content-type"), Some("text/css; charset=utf-8"));
}

#[tokio::test]
async fn the_service_is_ready_without_a_bus() {
    let door = Door::open().await;
    assert_eq!(door.get("/healthz").empty().await.expect(200)["status"], "alive");
    let ready = door.get("/readyz").empty().await.expect(200);
    let checks: Vec<&Value> = ready["checks"].as_array().unwrap().iter().map(|check| &check["name"]).collect();
    assert_eq!(checks, ["ledger-engine", "database"]);
}

fn references(value: &Value) -> Vec<&str> {
    match value {
        Value::Object(fields) => fields
            .iter()
            .flat_map(|(name, value)| match (name.as_str(), value) {
                ("$ref", Value::String(reference)) => vec![reference.as_str()],
                _ => references(value),
            })
            .collect(),
        Value::Array(items) => items.iter().flat_map(references).collect(),
        _ => Vec::new(),
    }
}
