//! `POST /v1/partners…`: a partner, its wallets and its credentials; and whether it may act.
//!
//! Each of these is in the log first and in force here before it is answered (`credentials.rs`). Secrets are in neither:
//! one is minted for the answer, shown in it, and kept as a hash.

use api_contract::{CanonicalBody, CurrencyText, FreeText, Json, Path, Problem, Secret, Text, WalletBody};
use axum::extract::State;
use ledger_core::{
    Action, ClientId, Command, Currency, Event, PartnerEvent, PartnerId, Timestamp, WalletEvent, WalletId, WalletKind,
};
use ledger_engine::Happened;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::Commands;
use crate::answer::{self, Answer, Done, Refused};
use crate::call::{Call, Registering};
use crate::credentials::{self, FollowError};

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
    let (partner, client) = (PartnerId::from_uuid(Uuid::now_v7()), ClientId::from_uuid(Uuid::now_v7()));
    let open = |currency| (currency, WalletId::from_uuid(Uuid::now_v7()));
    let currencies = request.currencies.into_iter().map(open).collect();
    let action = Action::RegisterPartner { partner, name: request.name.into(), currencies, client };
    let done = commands.execute(call.command(action, &body)).await?;
    let secret = commands.credentials(&done).await?;
    let registered = RegisteredPartner::of(&done, secret.as_ref())?;
    Ok(Answer::created(done.recorded, format!("/v1/partners/{}", registered.id), registered))
}

/// Why, for those who look into it later.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(example = json!({ "reason": "its secret has leaked" }))]
pub(crate) struct Suspend {
    reason: Option<FreeText<1, 512>>,
}

/// An empty object, or no body at all.
#[derive(Deserialize, ToSchema)]
pub(crate) struct Nothing {}

/// A partner as an act left it.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = PartnerState)]
pub(crate) struct PartnerState {
    #[schema(value_type = String, example = "par_0192f0c1-2d3e-7abc-8def-0123456789ab")]
    id: PartnerId,
    name: String,
    #[schema(value_type = Vec<String>, example = json!(["EUR", "USD"]))]
    currencies: Vec<Currency>,
    #[schema(value_type = String, example = "cli_0192f0c1-2d3e-7abc-8def-0123456789ab")]
    client_id: ClientId,
    /// Shown this once, where it was rotated: a replay of the call does not have it.
    #[serde(skip_serializing_if = "Option::is_none")]
    client_secret: Option<String>,
    /// `ACTIVE` or `SUSPENDED`.
    #[schema(value_type = String, example = "ACTIVE")]
    status: &'static str,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
}

/// Give a partner's client a new secret
///
/// The old secret is refused at once, and all tokens that it has got are revoked, everywhere within five seconds: there
/// is no overlap, since who rotates because of a leak wants none, and who rotates on schedule hands the new secret over
/// before it logs in again. The new secret is shown in this answer and never again, not even to a repetition with the
/// same key; when the answer was lost, rotate it again. A suspended partner's secret can be rotated too.
#[utoipa::path(
    post,
    path = "/v1/partners/{id}/rotate-secret",
    operation_id = "rotatePartnerSecret",
    tag = "partners",
    security(("bearer" = ["admin"])),
    params(("id" = String, Path, description = "The partner."), Call<Registering>),
    responses((status = 200, description = "The partner, and its client's new secret.", body = PartnerState)),
    extensions(("x-problems" = json!(["partner-not-found"]))),
)]
pub(crate) async fn rotate_secret(
    State(commands): State<Commands>,
    call: Call<Registering>,
    Path(partner): Path<PartnerId>,
    body: Option<Json<Nothing>>,
) -> Result<Answer<PartnerState>, Refused> {
    let command = call.command(Action::RotateSecret { partner }, &canonical(body.as_ref()));
    commands.act(command).await
}

/// Suspend a partner
///
/// From the moment of this answer the ledger refuses whatever the partner's clients ask for; they get no tokens, and
/// those they have are revoked, everywhere within five seconds, for reading too. What is pending still settles, fails or
/// expires, so that no money is stuck. The operator can act on its wallets as before.
#[utoipa::path(
    post,
    path = "/v1/partners/{id}/suspend",
    operation_id = "suspendPartner",
    tag = "partners",
    security(("bearer" = ["admin"])),
    params(("id" = String, Path, description = "The partner."), Call<Registering>),
    request_body = Option<Suspend>,
    responses((status = 200, description = "The partner, suspended.", body = PartnerState)),
    extensions(("x-problems" = json!(["partner-not-found", "invalid-transition"]))),
)]
pub(crate) async fn suspend(
    State(commands): State<Commands>,
    call: Call<Registering>,
    Path(partner): Path<PartnerId>,
    body: Option<Json<Suspend>>,
) -> Result<Answer<PartnerState>, Refused> {
    let canonical = canonical(body.as_ref());
    let reason = body.and_then(|Json(Suspend { reason }, _)| reason).map(Into::into);
    commands.act(call.command(Action::SuspendPartner { partner, reason }, &canonical)).await
}

/// Let a suspended partner act again
///
/// Its client can log in again; tokens from before the suspension stay revoked.
#[utoipa::path(
    post,
    path = "/v1/partners/{id}/resume",
    operation_id = "resumePartner",
    tag = "partners",
    security(("bearer" = ["admin"])),
    params(("id" = String, Path, description = "The partner."), Call<Registering>),
    responses((status = 200, description = "The partner, active again.", body = PartnerState)),
    extensions(("x-problems" = json!(["partner-not-found", "invalid-transition"]))),
)]
pub(crate) async fn resume(
    State(commands): State<Commands>,
    call: Call<Registering>,
    Path(partner): Path<PartnerId>,
    body: Option<Json<Nothing>>,
) -> Result<Answer<PartnerState>, Refused> {
    let command = call.command(Action::ResumePartner { partner }, &canonical(body.as_ref()));
    commands.act(command).await
}

fn canonical<T>(body: Option<&Json<T>>) -> CanonicalBody {
    body.map_or(CanonicalBody::EMPTY, |Json(_, canonical)| canonical.clone())
}

impl Commands {
    /// Something that is done to a partner.
    async fn act(&self, command: Command) -> Result<Answer<PartnerState>, Refused> {
        let done = self.execute(command).await?;
        let secret = self.credentials(&done).await?;
        let partner = PartnerState::of(&done, secret.as_ref())?;
        Ok(Answer::ok(done.recorded, partner))
    }

    /// Puts in force what the command has done to a partner. Answers the new secret if there is one: a replay has none, for
    /// the first answer has shown it, or it is lost and nobody's.
    async fn credentials(&self, done: &Done) -> Result<Option<Secret>, Problem> {
        credentials::follow(self.0.ledger.log(), &self.0.access).await?;
        if done.recorded.replayed() {
            return Ok(None);
        }
        for Happened { event, position, .. } in done.events()? {
            if let Event::Partner(
                _,
                PartnerEvent::Registered { client_id, .. } | PartnerEvent::SecretRotated { client_id },
            ) = event
            {
                let secret = Secret::mint_for_client();
                let set = self.0.access.set_secret(client_id, position, &secret).await;
                return Ok(set.map_err(FollowError::from)?.then_some(secret));
            }
        }
        Ok(None)
    }
}

impl PartnerState {
    /// The partner as its stream leaves it, which ends with the command's own event.
    fn of(done: &Done, secret: Option<&Secret>) -> Result<Self, Problem> {
        let mut partner: Option<Self> = None;
        for Happened { event, recorded_at, .. } in done.stream() {
            let Event::Partner(id, event) = event else { return Err(answer::other_stream()) };
            match (event, &mut partner) {
                (PartnerEvent::Registered { name, currencies, client_id }, partner) => {
                    *partner = Some(Self {
                        id: *id,
                        name: name.clone(),
                        currencies: currencies.clone(),
                        client_id: *client_id,
                        client_secret: secret.map(|secret| secret.reveal().to_owned()),
                        status: "ACTIVE",
                        created_at: *recorded_at,
                    });
                }
                (PartnerEvent::Suspended { .. }, Some(partner)) => partner.status = "SUSPENDED",
                (PartnerEvent::Resumed {}, Some(partner)) => partner.status = "ACTIVE",
                (PartnerEvent::SecretRotated { client_id }, Some(partner)) => partner.client_id = *client_id,
                (_, None) => return Err(answer::other_stream()),
            }
        }
        partner.ok_or_else(answer::other_stream)
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
