//! `POST /v1/partners`: a partner, its wallets and its first credentials.

use api_contract::{CurrencyText, Json, NewClient, Problem, Scopes, Secret, Text, WalletBody};
use axum::extract::State;
use ledger_core::{Action, ClientId, Currency, Event, PartnerEvent, PartnerId, WalletEvent, WalletId, WalletKind};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::Commands;
use crate::answer::{self, Answer, Done, Happened, Refused};
use crate::call::{Call, Registering};

/// A partner to be registered.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({ "name": "Acme Pay", "currencies": ["EUR", "USD"] }))]
pub(crate) struct RegisterPartner {
    name: Text<1, 128>,
    /// Each at most once.
    #[schema(value_type = Vec<CurrencyText>, min_items = 1, max_items = 50)]
    currencies: Vec<Currency>,
}

/// A registered partner.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = RegisteredPartner)]
pub(crate) struct RegisteredPartner {
    #[schema(value_type = String, example = "par_0192f0c1-2d3e-7abc-8def-0123456789ab")]
    id: PartnerId,
    name: String,
    #[schema(value_type = Vec<String>, example = json!(["EUR", "USD"]))]
    currencies: Vec<Currency>,
    #[schema(value_type = String, example = "cli_0192f0c1-2d3e-7abc-8def-0123456789ab")]
    client_id: ClientId,
    /// Shown this once: a replay of the call does not have it.
    #[serde(skip_serializing_if = "Option::is_none")]
    client_secret: Option<String>,
    /// Its settlement wallets, one in each currency.
    wallets: Vec<WalletBody>,
}

const CURRENCIES_MAX: usize = 50;

/// Register a partner
///
/// Opens a settlement wallet in each currency and makes the partner's first client. Its secret is shown in this answer
/// and never again, not even to a repetition with the same key.
#[utoipa::path(
    post,
    path = "/v1/partners",
    operation_id = "registerPartner",
    tag = "partners",
    security(("bearer" = ["admin"])),
    params(Call<Registering>),
    request_body = RegisterPartner,
    responses((status = 201, description = "The partner, and the secret of its client.", body = RegisteredPartner)),
    extensions(("x-problems" = json!(["currency-unknown", "too-many-items"]))),
)]
pub(crate) async fn register(
    State(commands): State<Commands>,
    call: Call<Registering>,
    Json(request, body): Json<RegisterPartner>,
) -> Result<Answer<RegisteredPartner>, Refused> {
    check(&request.currencies)?;
    let (partner, client, secret) = (PartnerId::from_uuid(Uuid::now_v7()), mint_client(), Secret::mint_for_client());
    // Credentials first: those of a partner that does not come to be harm nobody, a partner without any would be stuck.
    let credentials = NewClient { id: client, partner: Some(partner), secret: secret.clone(), scopes: Scopes::PARTNER };
    commands.access.create_client(credentials).await.map_err(|error| Problem::storage(&error))?;
    let open = |currency| (currency, WalletId::from_uuid(Uuid::now_v7()));
    let currencies = request.currencies.into_iter().map(open).collect();
    let action = Action::RegisterPartner { partner, name: request.name.into(), currencies, client };
    match commands.execute(call.command(action, &body)).await {
        Ok(done) => {
            let first = !done.recorded.replayed();
            if !first {
                commands.forget(client);
            }
            let registered = RegisteredPartner::of(&done, first.then_some(&secret))?;
            Ok(Answer::created(done.recorded, format!("/v1/partners/{}", registered.id), registered))
        }
        Err(refused) => {
            if refused.without_trace {
                commands.forget(client);
            }
            Err(refused)
        }
    }
}

impl Commands {
    /// Removes credentials that belong to nobody. Nobody waits for it.
    fn forget(&self, client: ClientId) {
        let access = self.access.clone();
        tokio::spawn(async move {
            if let Err(error) = access.remove_client(client).await {
                tracing::warn!(client.id = %client, %error, "credentials that belong to nobody were not removed");
            }
        });
    }
}

impl RegisteredPartner {
    fn of(done: &Done, secret: Option<&Secret>) -> Result<Self, Problem> {
        let events = done.events()?;
        let registered = events.iter().find_map(|happened| match &happened.event {
            Event::Partner(id, PartnerEvent::Registered { name, currencies, client_id }) => {
                Some((*id, name.clone(), currencies.clone(), *client_id))
            }
            _ => None,
        });
        let (id, name, currencies, client_id) = registered.expect("the command registers a partner or is refused");
        let wallets = events.iter().filter(|happened| is_settlement(happened));
        let wallets = wallets.map(|opened| answer::wallet(std::iter::once(opened))).collect::<Result<_, _>>()?;
        let client_secret = secret.map(|secret| secret.reveal().to_owned());
        Ok(Self { id, name, currencies, client_id, client_secret, wallets })
    }
}

/// The partner's own; the system's wallets, opened along with the first partner of a currency, are not its business.
fn is_settlement(happened: &Happened) -> bool {
    matches!(happened.event, Event::Wallet(_, WalletEvent::Opened { kind: WalletKind::Settlement, .. }))
}

fn check(currencies: &[Currency]) -> Result<(), Problem> {
    if currencies.is_empty() {
        return Err(Problem::of("invalid-field").at("/currencies", "expected at least one currency"));
    }
    if CURRENCIES_MAX < currencies.len() {
        return Err(Problem::of("too-many-items").at("/currencies", "expected at most 50 currencies"));
    }
    for (place, currency) in currencies.iter().enumerate() {
        if currencies.iter().take(place).any(|earlier| earlier == currency) {
            return Err(
                Problem::of("invalid-field").at(format!("/currencies/{place}"), "this currency stands here twice")
            );
        }
    }
    Ok(())
}

fn mint_client() -> ClientId {
    ClientId::from_uuid(Uuid::now_v7())
}
