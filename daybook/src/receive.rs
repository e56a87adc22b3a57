//! `daybook receive`: a webhook receiver to try things with. It checks both signatures and prints what came.
//!
//! It knows only what a partner knows: the secret that was shown once, and API.md.

use std::io::Write;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::Args;
use hmac::{Hmac, Mac};
use runtime::http::Limits;
use sha2::Sha256;
use tokio::net::TcpListener;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Where to listen; every path is a receiver.
    #[arg(long, default_value = "127.0.0.1:9090")]
    listen: SocketAddr,
    /// The endpoint's secret, `whsec_…`. Without it signatures are printed as unchecked.
    #[arg(long, env = "DAYBOOK_WEBHOOK_SECRET", hide_env_values = true)]
    secret: Option<String>,
}

pub(crate) async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let listener = TcpListener::bind(options.listen).await.context("listening for webhooks")?;
    println!("receiving webhooks at http://{}", listener.local_addr()?);
    let router = Router::new().fallback(post(receive)).with_state(Arc::new(options.secret));
    runtime::http::serve(listener, router, Limits::default(), runtime::shutdown::signal()).await?;
    Ok(ExitCode::SUCCESS)
}

async fn receive(State(secret): State<Arc<Option<String>>>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let verdict = match secret.as_deref() {
        None => "signatures unchecked",
        Some(secret) if genuine(secret, &headers, &body) == Some(true) => "signatures valid",
        Some(_) => "SIGNATURES INVALID",
    };
    let header = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("-");
    println!(
        "{} attempt {} of {}: {verdict}\n{}\n",
        header("x-daybook-event"),
        header("x-daybook-attempt"),
        header("x-daybook-delivery"),
        String::from_utf8_lossy(&body)
    );
    std::io::stdout().flush().ok(); // whoever reads along sees each delivery when it comes
    if verdict == "SIGNATURES INVALID" { StatusCode::UNAUTHORIZED } else { StatusCode::NO_CONTENT }
}

/// Whether both signatures hold; `None` where one is missing or unreadable.
fn genuine(secret: &str, headers: &HeaderMap, body: &[u8]) -> Option<bool> {
    let header = |name| headers.get(name)?.to_str().ok();
    let mac = |key: &[u8]| Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");

    let simple = unhex(header("x-daybook-signature")?.strip_prefix("sha256=")?)?;
    let simple = mac(secret.as_bytes()).chain_update(body).verify_slice(&simple).is_ok();

    // Standard Webhooks: the key is what the secret decodes to, and one of several signatures must hold.
    let key = STANDARD.decode(secret.strip_prefix("whsec_")?).ok()?;
    let (id, timestamp) = (header("webhook-id")?, header("webhook-timestamp")?);
    let signed = |signature: &[u8]| {
        let mac = mac(&key).chain_update(format!("{id}.{timestamp}.")).chain_update(body);
        mac.verify_slice(signature).is_ok()
    };
    let standard = header("webhook-signature")?
        .split(' ')
        .filter_map(|signature| STANDARD.decode(signature.strip_prefix("v1,")?).ok())
        .any(|signature| signed(&signature));
    Some(simple && standard)
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<_> = text.chars().map(|digit| digit.to_digit(16)).collect::<Option<_>>()?;
    (digits.len() % 2 == 0)
        .then(|| digits.chunks(2).filter_map(|pair| u8::try_from(pair[0] * 16 + pair[1]).ok()).collect())
}
