//! The OpenAPI document: what the code says about itself, completed with what holds for every route.
//!
//! A route's own description stands above its handler, and names its own problems in `x-problems`. What follows
//! from the rest of the description is added here: whoever wants a token can be refused for want of one, whoever
//! takes a body can be sent a broken one. [`complete`] does that for the documents of all services alike. It also
//! adds the doors that every service has and that are served by rooms which know nothing of OpenAPI.

use std::collections::{BTreeMap, BTreeSet};

use api_contract::{Limit, MinPosition, Problem, WaitMs};
use serde_json::{Value, json};
use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::path::{Operation, ParameterIn, PathItem, Paths};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::tag::TagBuilder;
use utoipa::openapi::{
    ComponentsBuilder, ContentBuilder, InfoBuilder, LicenseBuilder, ObjectBuilder, OpenApi, OpenApiBuilder, Ref, RefOr,
    Response, ResponseBuilder, Schema, Type,
};
use utoipa::{PartialSchema, ToSchema};

use crate::described;

/// Where a route's description lists the slugs of its own problems. It is gone from the completed document.
const PROBLEMS: &str = "x-problems";

const PROBLEM_JSON: &str = "application/problem+json";

/// The document of this service's routes.
pub fn openapi() -> OpenApi {
    complete(described().into_openapi())
}

/// Adds what every service's routes have in common: the problems that follow from a route's description, the
/// headers of its answers, the schema of a problem, and the doors of every service. Doing it twice changes nothing.
pub fn complete(mut document: OpenApi) -> OpenApi {
    document.paths.merge(doors());
    for item in document.paths.paths.values_mut() {
        for operation in operations(item) {
            complete_operation(operation);
        }
    }
    let components = document.components.get_or_insert_with(Default::default);
    let mut schemas = vec![(ProblemDocument::name().into_owned(), ProblemDocument::schema())];
    ProblemDocument::schemas(&mut schemas); // those that it is made of
    // The shared parameters refer to their schemas by name, and a parameter brings no schema along.
    schemas.extend([schema::<Limit>(), schema::<MinPosition>(), schema::<WaitMs>()]);
    components.schemas.extend(schemas);
    components.add_security_scheme("bearer", bearer());
    document
}

fn schema<T: ToSchema>() -> (String, RefOr<Schema>) {
    (T::name().into_owned(), T::schema())
}

/// What `runtime` and `api-contract` serve for every service.
fn doors() -> Paths {
    let door = |id: &str, summary: &str, described: &str, content: &str| {
        let answer = json!({ "description": described, "content": { content: {} } });
        json!({ "get": {
            "operationId": id, "tags": ["operations"], "summary": summary, "security": [], "responses": { "200": answer },
        } })
    };
    let json = "application/json";
    let mut ready = door("getReadiness", "Can it do its work?", "Every check has passed.", json);
    ready["get"]["responses"]["503"] =
        json!({ "description": "A check failed, or took too long.", "content": { json: {} } });
    let mut problem = door("getProblemPage", "A problem, explained", "What it means, and what to do.", "text/html");
    problem["get"]["parameters"] =
        json!([{ "name": "slug", "in": "path", "required": true, "schema": { "type": "string" } }]);
    problem["get"]["responses"]["404"] = json!({ "description": "not-found" });
    let doors = json!({
        "/healthz": door("getHealth", "Is the process alive?", "It is.", json),
        "/readyz": ready,
        "/metrics": door("getMetrics", "Numbers about the process", "The text format of Prometheus.", "text/plain"),
        "/openapi.json": door("getOpenApi", "This document", "OpenAPI 3.1.", json),
        "/docs": door("getDocs", "This document, to be read", "A page.", "text/html"),
        "/problems/{slug}": problem,
    });
    serde_json::from_value(doors).expect("these are paths as OpenAPI writes them")
}

/// The document before any route is added.
pub(crate) fn opening() -> OpenApi {
    let info = InfoBuilder::new()
        .title("Daybook")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(INTRODUCTION))
        .license(Some(LicenseBuilder::new().name("Apache-2.0").identifier(Some("Apache-2.0")).build()))
        .build();
    let tags = TAGS.map(|(name, description)| TagBuilder::new().name(name).description(Some(description)).build());
    OpenApiBuilder::new()
        .info(info)
        .tags(Some(tags))
        .components(Some(ComponentsBuilder::new().security_scheme("bearer", bearer()).build()))
        .build()
}

const INTRODUCTION: &str = "Wallets and movements of money, from one ordered log.\n\n\
    Bodies are JSON in UTF-8 with camelCase names; unknown fields are refused. Amounts are decimal strings in major units, \
    with an ISO 4217 currency. Times are RFC 3339 in UTC. Answers may gain fields and lose none.\n\n\
    Every refusal is a problem document (RFC 9457). Its `type` is a page of this server that says what to do.\n\n\
    Send an `Idempotency-Key` with everything that you would not want to happen twice; where money can move it is \
    required. Repeating a request with its key repeats its answer, also years later. A key that is, or ends in, a UUID of \
    version 7 made for the request is the cheapest to keep.\n\n\
    Every command answers `Ledger-Position`. A read with `minPosition` waits until it reflects that position.";

const TAGS: [(&str, &str); 6] = [
    ("auth", "Tokens for clients."),
    ("partners", "Who may use the ledger."),
    ("wallets", "Where money is."),
    ("transactions", "How money moves."),
    ("workflows", "How our own processes end what is pending. No partner's client has the scope."),
    ("operations", "How the service is, and what explains it. For everyone."),
];

/// A problem document.
#[derive(ToSchema)]
#[schema(as = Problem, rename_all = "camelCase", example = json!({
    "type": "/problems/insufficient-funds",
    "title": "Insufficient funds",
    "status": 422,
    "detail": "available 50.00 does not cover 80.00",
    "instance": "/v1/transactions/transfer",
    "requestId": "req_0192f0c1-2d3e-7abc-8def-0123456789ab",
    "transactionId": "txn_0192f0c1-2d3e-7abc-8def-0123456789ab",
}))]
#[expect(dead_code, reason = "read by the derive only")]
pub(crate) struct ProblemDocument {
    /// `/problems/<slug>`: a page of this server.
    r#type: String,
    title: String,
    status: u16,
    detail: String,
    /// The path of the request.
    instance: Option<String>,
    /// The request that was refused; in a replay the first one.
    request_id: Option<String>,
    /// Of a transaction that the ledger refused and keeps as `FAILED`.
    transaction_id: Option<String>,
    /// What is wrong where.
    errors: Option<Vec<ProblemPlace>>,
}

/// What is wrong in one place.
#[derive(ToSchema)]
#[expect(dead_code, reason = "read by the derive only")]
struct ProblemPlace {
    /// A JSON pointer into the body, or `/name` of a query parameter.
    pointer: String,
    detail: String,
}

/// Which routes have which problems, beside their own.
fn problems(operation: &Operation) -> BTreeSet<&'static str> {
    let has_key = |required: bool| {
        let keys = parameters(operation, |place| *place == ParameterIn::Header);
        keys.filter(|(name, is_required)| *name == "Idempotency-Key" && (!required || *is_required)).count() != 0
    };
    let mut problems = BTreeSet::from(["not-acceptable", "headers-too-large", "uri-too-long"]);
    if operation.security.as_ref().is_some_and(|security| !security.is_empty()) {
        problems.extend(["unauthenticated", "token-invalid", "token-expired", "token-revoked", "insufficient-scope"]);
    }
    if operation.request_body.is_some() {
        problems.extend(["malformed-json", "duplicate-field", "unknown-field", "invalid-field", "invalid-character"]);
        problems.extend(["payload-too-large", "request-timeout", "unsupported-media-type", "unsupported-encoding"]);
    }
    if parameters(operation, |place| *place == ParameterIn::Path).any(|(name, _)| name == "id") {
        problems.insert("invalid-id");
    }
    if parameters(operation, |place| *place == ParameterIn::Query).next().is_some() {
        problems.extend(["unknown-field", "invalid-field"]);
    }
    if waits(operation) {
        problems.extend(["position-unknown", "projection-behind", "storage-unavailable"]);
    }
    if has_key(false) {
        problems.extend(["idempotency-key-invalid", "idempotency-key-reused", "idempotency-in-flight"]);
        problems.extend(["overloaded", "outcome-unknown", "storage-unavailable"]);
    }
    if has_key(true) {
        problems.insert("idempotency-key-missing");
    }
    problems
}

/// Whether this is a read that waits until it reflects a position.
fn waits(operation: &Operation) -> bool {
    parameters(operation, |place| *place == ParameterIn::Query).any(|(name, _)| name == "minPosition")
}

fn complete_operation(operation: &mut Operation) {
    let general = problems(operation);
    let position = if general.contains("idempotency-key-invalid") {
        Some("The position of the command's last event in the log.")
    } else if waits(operation) {
        Some("The position that the answer reflects.")
    } else {
        None
    };
    let is_command = position.is_some() && !waits(operation);
    let mut slugs: BTreeSet<String> = general.into_iter().map(str::to_owned).collect();
    if let Some(extensions) = &mut operation.extensions {
        let own = extensions.remove(PROBLEMS);
        slugs.extend(own.iter().filter_map(Value::as_array).flatten().filter_map(Value::as_str).map(str::to_owned));
    }
    if operation.extensions.as_ref().is_some_and(|extensions| extensions.is_empty()) {
        operation.extensions = None;
    }
    let responses = &mut operation.responses.responses;
    // A refusal may also be described by its slugs alone: then they are what it is about.
    responses.retain(|_, response| {
        let named = named_problems(response);
        let keep = named.is_empty();
        slugs.extend(named);
        keep
    });
    for (status, response) in responses.iter_mut() {
        if let (RefOr::T(response), true) = (response, status.starts_with('2')) {
            complete_answer(response, status, position, is_command);
        }
    }
    let mut by_status: BTreeMap<u16, Vec<Problem>> = BTreeMap::new();
    for problem in slugs.iter().map(|slug| Problem::from_code(slug)) {
        by_status.entry(problem.status().as_u16()).or_default().push(problem);
    }
    for (status, problems) in by_status {
        responses.entry(status.to_string()).or_insert_with(|| RefOr::T(refusal(&problems)));
    }
}

/// The slugs that make up a response's description, when nothing else does.
fn named_problems(response: &RefOr<Response>) -> Vec<String> {
    let RefOr::T(Response { description, content, .. }) = response else { return Vec::new() };
    let words: Vec<&str> = description.split([',', ' ']).filter(|word| !word.is_empty()).collect();
    let known = words.iter().all(|word| Problem::from_code(word).slug() == *word);
    if known && content.is_empty() { words.into_iter().map(str::to_owned).collect() } else { Vec::new() }
}

/// All problems of one status: what each means, and a document of each.
fn refusal(problems: &[Problem]) -> Response {
    let described = problems.iter().map(|problem| {
        let document = problem.document();
        let text = |name: &str| document.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        format!("- [`{}`](/problems/{}): {}", problem.slug(), problem.slug(), text("detail"))
    });
    let described = described.collect::<Vec<_>>().join("\n");
    let examples = problems.iter().map(|problem| {
        (problem.slug(), utoipa::openapi::example::ExampleBuilder::new().value(Some(problem.document())).build())
    });
    let content = ContentBuilder::new()
        .schema(Some(Ref::from_schema_name(ProblemDocument::name())))
        .examples_from_iter(examples)
        .build();
    let response = ResponseBuilder::new().description(described).content(PROBLEM_JSON, content);
    let waits = problems.iter().any(|problem| matches!(problem.status().as_u16(), 429 | 503))
        || problems.iter().any(|problem| problem.slug() == "idempotency-in-flight");
    let mut response = response.build();
    if waits {
        add_header(&mut response, "Retry-After", Type::Integer, "Seconds to wait before repeating the request.");
    }
    add_header(&mut response, "X-Request-ID", Type::String, REQUEST_ID);
    response
}

const REQUEST_ID: &str = "The request's name: the one that was sent (1–128 visible ASCII characters), or a new one.";

fn complete_answer(response: &mut Response, status: &str, position: Option<&str>, is_command: bool) {
    add_header(response, "X-Request-ID", Type::String, REQUEST_ID);
    if let Some(position) = position {
        add_header(response, "Ledger-Position", Type::Integer, position);
    }
    if status == "201" || is_command && status == "202" {
        add_header(response, "Location", Type::String, "Where it can be read; absent when it is several things.");
    }
    if is_command {
        let replayed = "`true` when the key was used before: this is what was answered then.";
        add_header(response, "Idempotent-Replayed", Type::String, replayed);
    }
}

fn add_header(response: &mut Response, name: &str, kind: Type, description: &str) {
    let header = HeaderBuilder::new()
        .schema(Some(ObjectBuilder::new().schema_type(kind)))
        .description(Some(description))
        .build();
    response.headers.insert(name.to_owned(), RefOr::T(header));
}

fn bearer() -> SecurityScheme {
    let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("JWT");
    SecurityScheme::Http(scheme.description(Some("The `accessToken` of `POST /v1/auth/token`.")).build())
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    let PathItem { get, put, post, delete, patch, .. } = item;
    [get, put, post, delete, patch].into_iter().flatten()
}

/// Name and necessity of the parameters in the places that `wanted` picks.
fn parameters(operation: &Operation, wanted: impl Fn(&ParameterIn) -> bool) -> impl Iterator<Item = (&str, bool)> {
    let parameters = operation.parameters.iter().flatten().filter_map(|parameter| match parameter {
        RefOr::T(parameter) => Some(parameter),
        RefOr::Ref(_) => None,
    });
    parameters
        .filter(move |parameter| wanted(&parameter.parameter_in))
        .map(|parameter| (parameter.name.as_str(), parameter.required == utoipa::openapi::Required::True))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn completing_a_document_twice_changes_nothing() {
        let once = openapi();
        assert!(complete(once.clone()) == once);
    }

    #[test]
    fn a_refusal_described_by_its_slugs_becomes_these_problems() {
        let document = json!({
            "openapi": "3.1.0",
            "info": { "title": "x", "version": "1" },
            "paths": { "/x": { "get": { "responses": {
                "200": { "description": "not-found is what it is not" },
                "404": { "description": "webhook-not-found, delivery-not-found" },
            } } } },
        });
        let completed = serde_json::to_value(complete(serde_json::from_value(document).unwrap())).unwrap();
        let responses = &completed["paths"]["/x"]["get"]["responses"];
        assert_eq!(responses["200"]["description"], "not-found is what it is not");
        let examples = responses["404"]["content"][PROBLEM_JSON]["examples"].as_object().unwrap();
        assert_eq!(examples.keys().collect::<Vec<_>>(), ["delivery-not-found", "webhook-not-found"]);
    }
}
