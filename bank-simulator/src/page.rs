//! The page on which a payer approves or declines. Plain HTML and one stylesheet: no script, nothing from elsewhere.

use std::fmt;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::book::{Payment, Status};

pub(crate) const STYLE: &str = "\
body { font: 1.1rem/1.5 system-ui, sans-serif; max-width: 26rem; margin: 4rem auto; padding: 0 1rem; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .25rem 1rem; }
dd { margin: 0; overflow-wrap: anywhere; }
button { font: inherit; padding: .5rem 1.5rem; margin-right: 1rem; }
";

/// `form-action` names nothing but us, so the way back to the merchant is a link and not a redirect, which browsers would stop.
const POLICY: &str =
    "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

pub(crate) fn show(status: StatusCode, payment: &Payment) -> Response {
    let registration = &payment.registration;
    let description = registration
        .description
        .as_deref()
        .map_or(String::new(), |description| format!("<dt>For</dt><dd>{}</dd>", Escaped(description)));
    let back = registration.return_url.as_deref().map_or(String::new(), |url| {
        format!("<p><a href=\"{}\" rel=\"noreferrer\">Back to the merchant</a></p>", Escaped(url))
    });
    let rest = match payment.status {
        Status::Pending => "<form method=\"post\">\
            <button name=\"outcome\" value=\"success\">Approve</button>\
            <button name=\"outcome\" value=\"failure\">Decline</button></form>"
            .to_owned(),
        Status::Success => format!("<p><strong>Approved.</strong> The money is on its way.</p>{back}"),
        Status::Failure => format!("<p><strong>Declined.</strong> No money was moved.</p>{back}"),
        Status::Cancelled => format!("<p><strong>Cancelled</strong> by the merchant. No money was moved.</p>{back}"),
    };
    let html = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>Simulated bank</title>\
         <meta name=\"viewport\" content=\"width=device-width\"><link rel=\"stylesheet\" href=\"../style.css\"></head>\
         <body><h1>Simulated bank</h1><dl><dt>Merchant</dt><dd>{}</dd><dt>Amount</dt><dd>{} {}</dd>{description}</dl>{rest}</body></html>\n",
        Escaped(&merchant(payment)),
        Escaped(&registration.amount),
        registration.currency,
    );
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::CACHE_CONTROL, "no-store"),
        (header::REFERRER_POLICY, "no-referrer"), // the address holds the token
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (status, headers.map(|(name, value)| (name, HeaderValue::from_static(value))), html).into_response()
}

/// The host to which the payer returns, else the one that is told.
fn merchant(payment: &Payment) -> String {
    let url = payment.registration.return_url.as_ref().unwrap_or(&payment.registration.callback_url);
    reqwest::Url::parse(url).ok().and_then(|url| url.host_str().map(str::to_owned)).unwrap_or_default()
}

/// Text that is text in HTML, in elements and in quoted attributes.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|character| match character {
            '&' => f.write_str("&amp;"),
            '<' => f.write_str("&lt;"),
            '>' => f.write_str("&gt;"),
            '"' => f.write_str("&quot;"),
            '\'' => f.write_str("&#39;"),
            other => write!(f, "{other}"),
        })
    }
}
