//! `GET /openapi.json` and `GET /docs`: the OpenAPI document, for programs and for people.
//!
//! The page is rendered here once, when the service starts: no script, nothing from elsewhere, so it works offline
//! and its policy lets nothing run. It says what the document says, for whichever services the document describes.

use std::fmt::Write;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;
use serde_json::{Map, Value};
use utoipa::openapi::OpenApi;

/// Serves the document, and the page that it makes.
pub fn docs(document: OpenApi) -> Router {
    let document = serde_json::to_value(&document).expect("a document has string keys");
    let served = Arc::new(Served { page: page(&document), json: document.to_string() });
    Router::new()
        .route("/openapi.json", get(json))
        .route("/docs", get(html))
        .route("/docs/style.css", get(style))
        .with_state(served)
}

struct Served {
    page: String,
    json: String,
}

const POLICY: &str =
    "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

async fn json(State(served): State<Arc<Served>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], served.json.clone())
}

async fn html(State(served): State<Arc<Served>>) -> impl IntoResponse {
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ];
    (headers, served.page.clone())
}

async fn style() -> impl IntoResponse {
    let headers = [(header::CONTENT_TYPE, "text/css; charset=utf-8"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")];
    (headers, include_str!("docs.css"))
}

/// One route: what is said of a method of a path.
struct Route<'d> {
    method: String,
    path: &'d str,
    operation: &'d Value,
}

/// The whole page. Everything that comes from the document goes through [`escape`] or [`prose`].
fn page(document: &Value) -> String {
    let routes = routes(document);
    let mut tags: Vec<(&str, &str)> =
        items(&document["tags"]).map(|tag| (text(tag, "name"), text(tag, "description"))).collect();
    for route in &routes {
        if !tags.iter().any(|(name, _)| *name == route.tag()) {
            tags.push((route.tag(), ""));
        }
    }
    let title = escape(text(&document["info"], "title"));
    let version = escape(text(&document["info"], "version"));
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>{title} API</title>\
         <link rel=\"stylesheet\" href=\"/docs/style.css\"></head>\n<body>\n"
    );
    add(&mut page, format_args!("<nav><h2>{title} <small>{version}</small></h2>\n"));
    for (name, _) in &tags {
        let own: Vec<&Route<'_>> = routes.iter().filter(|route| route.tag() == *name).collect();
        if !own.is_empty() {
            add(&mut page, format_args!("<h3><a href=\"#{0}\">{0}</a></h3><ul>\n", escape(name)));
            for route in own {
                add(&mut page, format_args!("<li><a href=\"#{}\">{}</a></li>\n", route.anchor(), route.summary()));
            }
            page.push_str("</ul>\n");
        }
    }
    page.push_str("<h3><a href=\"#schemas\">schemas</a></h3></nav>\n<main>\n");
    add(&mut page, format_args!("<h1>{title}</h1>\n{}", paragraphs(text(&document["info"], "description"))));
    page.push_str("<p>For programs: <a href=\"/openapi.json\"><code>/openapi.json</code></a></p>\n");
    for (name, description) in &tags {
        let own: Vec<&Route<'_>> = routes.iter().filter(|route| route.tag() == *name).collect();
        if !own.is_empty() {
            add(&mut page, format_args!("<h2 id=\"{0}\">{0}</h2>\n{1}", escape(name), paragraphs(description)));
            own.iter().for_each(|route| route.render(&mut page));
        }
    }
    page.push_str("<h2 id=\"schemas\">schemas</h2>\n");
    for (name, schema) in fields(&document["components"]["schemas"]) {
        add(&mut page, format_args!("<section id=\"schema-{0}\"><h3><code>{0}</code></h3>\n", escape(name)));
        page.push_str(&paragraphs(text(schema, "description")));
        render_schema(&mut page, schema);
        page.push_str("</section>\n");
    }
    page.push_str("</main></body></html>\n");
    page
}

fn routes(document: &Value) -> Vec<Route<'_>> {
    const METHODS: [&str; 5] = ["get", "post", "put", "patch", "delete"];
    let mut routes = Vec::new();
    for (path, item) in fields(&document["paths"]) {
        for method in METHODS {
            if let Some(operation) = item.get(method) {
                routes.push(Route { method: method.to_uppercase(), path, operation });
            }
        }
    }
    routes
}

impl<'d> Route<'d> {
    fn tag(&self) -> &'d str {
        items(&self.operation["tags"]).next().and_then(Value::as_str).unwrap_or("other")
    }

    fn anchor(&self) -> String {
        match text(self.operation, "operationId") {
            "" => escape(&format!("{}{}", self.method, self.path)),
            id => escape(id),
        }
    }

    fn summary(&self) -> String {
        match text(self.operation, "summary") {
            "" => escape(self.path),
            summary => prose(summary),
        }
    }

    fn render(&self, page: &mut String) {
        add(page, format_args!("<section id=\"{}\"><h3>{}</h3>\n", self.anchor(), self.summary()));
        let (method, path) = (&self.method, escape(self.path));
        add(page, format_args!("<p class=\"route\"><b>{method}</b> <code>{path}</code></p>\n"));
        page.push_str(&paragraphs(text(self.operation, "description")));
        self.render_right(page);
        self.render_parameters(page);
        for (kind, content) in fields(&self.operation["requestBody"]["content"]) {
            let schema = type_of(&content["schema"]);
            add(page, format_args!("<h4>Body</h4>\n<p><code>{}</code>: {schema}</p>\n", escape(kind)));
        }
        page.push_str("<h4>Answers</h4>\n<dl>\n");
        for (status, response) in fields(&self.operation["responses"]) {
            render_response(page, status, response);
        }
        page.push_str("</dl></section>\n");
    }

    fn render_right(&self, page: &mut String) {
        let Some(scopes) = self.operation["security"][0].get("bearer") else {
            return page.push_str("<p>No token is needed.</p>\n");
        };
        let scopes: Vec<String> =
            items(scopes).filter_map(Value::as_str).map(|scope| format!("<code>{}</code>", escape(scope))).collect();
        if scopes.is_empty() {
            page.push_str("<p>Needs a token.</p>\n");
        } else {
            add(page, format_args!("<p>Needs a token with the scope {}.</p>\n", scopes.join(" and ")));
        }
    }

    fn render_parameters(&self, page: &mut String) {
        if items(&self.operation["parameters"]).next().is_none() {
            return;
        }
        page.push_str("<h4>Parameters</h4>\n<table>\n");
        for parameter in items(&self.operation["parameters"]) {
            let required = if parameter["required"] == true { ", required" } else { "" };
            add(
                page,
                format_args!(
                    "<tr><td><code>{}</code></td><td>{}{required}</td><td>{}</td><td>{}</td></tr>\n",
                    escape(text(parameter, "name")),
                    escape(text(parameter, "in")),
                    type_of(&parameter["schema"]),
                    prose(text(parameter, "description")),
                ),
            );
        }
        page.push_str("</table>\n");
    }
}

fn render_response(page: &mut String, status: &str, response: &Value) {
    add(page, format_args!("<dt>{}</dt><dd>", escape(status)));
    for (kind, content) in fields(&response["content"]) {
        if kind == "application/problem+json" {
            let slugs = fields(&content["examples"]).map(|(slug, _)| {
                let slug = escape(slug);
                format!("<a href=\"/problems/{slug}\"><code>{slug}</code></a>")
            });
            page.push_str(&slugs.collect::<Vec<_>>().join(", "));
        } else {
            let (description, schema) = (prose(text(response, "description")), type_of(&content["schema"]));
            add(page, format_args!("{description} <code>{}</code>: {schema}", escape(kind)));
        }
    }
    if fields(&response["content"]).next().is_none() {
        page.push_str(&prose(text(response, "description")));
    }
    let headers: Vec<String> =
        fields(&response["headers"]).map(|(name, _)| format!("<code>{}</code>", escape(name))).collect();
    if !headers.is_empty() {
        add(page, format_args!("<br><small>with {}</small>", headers.join(", ")));
    }
    page.push_str("</dd>\n");
}

fn render_schema(page: &mut String, schema: &Value) {
    let parts: Vec<&Value> = match &schema["allOf"] {
        Value::Array(parts) => parts.iter().collect(),
        _ => vec![schema],
    };
    for part in parts {
        if fields(&part["properties"]).next().is_none() {
            add(page, format_args!("<p>{}</p>\n", type_of(part)));
            continue;
        }
        page.push_str("<table>\n");
        for (name, field) in fields(&part["properties"]) {
            let required = items(&part["required"]).any(|required| required == name);
            add(
                page,
                format_args!(
                    "<tr><td><code>{}</code></td><td>{}</td><td>{}</td><td>{}</td></tr>\n",
                    escape(name),
                    if required { "required" } else { "" },
                    type_of(field),
                    prose(text(field, "description")),
                ),
            );
        }
        page.push_str("</table>\n");
    }
    if let Some(example) = schema.get("example") {
        let example = serde_json::to_string_pretty(example).expect("it was JSON before");
        add(page, format_args!("<pre>{}</pre>\n", escape(&example)));
    }
}

/// A schema in a few words, as HTML.
fn type_of(schema: &Value) -> String {
    if let Some(name) = schema["$ref"].as_str().and_then(|path| path.rsplit('/').next()) {
        return format!("<a href=\"#schema-{0}\">{0}</a>", escape(name));
    }
    for (combined, word) in [("oneOf", " or "), ("anyOf", " or "), ("allOf", " and ")] {
        if let Value::Array(parts) = &schema[combined] {
            return parts.iter().map(type_of).collect::<Vec<_>>().join(word);
        }
    }
    let kind = match &schema["type"] {
        Value::String(kind) if kind == "array" => return format!("array of {}", type_of(&schema["items"])),
        Value::String(kind) => escape(kind),
        Value::Array(kinds) => escape(&kinds.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" or ")),
        _ => "anything".to_owned(),
    };
    let limits = ["format", "pattern", "minLength", "maxLength", "minimum", "maximum"].into_iter().filter_map(|name| {
        let limit = schema.get(name)?;
        let limit = limit.as_str().map_or_else(|| limit.to_string(), str::to_owned);
        Some(format!(", {name} <code>{}</code>", escape(&limit)))
    });
    kind + &limits.collect::<String>()
}

fn paragraphs(markdown: &str) -> String {
    let paragraphs = markdown.split("\n\n").filter(|paragraph| !paragraph.trim().is_empty());
    paragraphs.map(|paragraph| format!("<p>{}</p>\n", prose(paragraph))).collect()
}

/// Text with `code` in backticks, as HTML. The rest of Markdown is left as it was written.
fn prose(markdown: &str) -> String {
    let parts: Vec<&str> = markdown.split('`').collect();
    let paired = parts.len() % 2 == 1; // a backtick without its twin is a backtick
    if !paired {
        return escape(markdown);
    }
    let part = |(place, part): (usize, &&str)| match place % 2 {
        0 => escape(part),
        _ => format!("<code>{}</code>", escape(part)),
    };
    parts.iter().enumerate().map(part).collect()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;").replace('\'', "&#39;")
}

fn add(page: &mut String, html: std::fmt::Arguments<'_>) {
    page.write_fmt(html).expect("a string takes everything");
}

fn text<'d>(value: &'d Value, name: &str) -> &'d str {
    value.get(name).and_then(Value::as_str).unwrap_or_default()
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn fields(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().map(Map::iter).into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_document_says_cannot_become_markup() {
        let evil = "<script>alert(1)</script>`<img src=x>`\"'&";
        let document = serde_json::json!({
            "info": { "title": evil, "version": evil, "description": evil },
            "tags": [{ "name": evil, "description": evil }],
            "paths": { (evil): { "post": {
                "tags": [evil],
                "operationId": evil,
                "summary": evil,
                "description": evil,
                "parameters": [{ "name": evil, "in": evil, "description": evil, "schema": { "type": evil } }],
                "requestBody": { "content": { (evil): { "schema": { "$ref": evil } } } },
                "security": [{ "bearer": [evil] }],
                "responses": { (evil): { "description": evil, "headers": { (evil): {} }, "content": {
                    (evil): { "schema": { "oneOf": [{ "type": [evil], "pattern": evil }] } },
                    "application/problem+json": { "examples": { (evil): {} } },
                } } },
            } } },
            "components": { "schemas": { (evil): { "example": evil, "properties": { (evil): { "description": evil } } } } },
        });
        let page = page(&document);
        assert!(page.contains("&lt;script&gt;"));
        for markup in ["<script", "<img", "\"'&"] {
            assert!(!page.contains(markup), "{markup}");
        }
    }
}
