//! Who asks, and under which key: everything of a command's request but its path and its body.
//!
//! A route names its [`Door`]; the extractor then refuses in this order: no good token, no right (api-contract's table of
//! routes says which), no good key. So a client without the right learns nothing of what the route would have wanted.

use std::marker::PhantomData;

use api_contract::{CanonicalBody, Client, OptionalKey, Problem, RequiredKey};
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use ledger_core::{Action, Command, CommandId};
use utoipa::openapi::path::{Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::{ObjectBuilder, Required, Type};
use uuid::Uuid;

use crate::Commands;

/// What a route asks of its callers.
pub(crate) trait Door {
    /// Whether money can move, so that a repetition without a key could move it twice.
    const KEY_REQUIRED: bool;
}

macro_rules! doors {
    ($($(#[$doc:meta])* $name:ident, key required: $required:literal;)*) => {$(
        $(#[$doc])*
        pub(crate) struct $name;

        impl Door for $name {
            const KEY_REQUIRED: bool = $required;
        }
    )*};
}

doors! {
    /// Partners, and what is done to them.
    Registering, key required: false;
    KeepingWallets, key required: false;
    MovingMoney, key required: true;
    Adjusting, key required: true;
    /// What is pending, by our own workflows.
    Ending, key required: true;
}

/// A call that came through a door.
pub(crate) struct Call<D> {
    pub(crate) client: Client,
    key: CallKey,
    door: PhantomData<D>,
}

enum CallKey {
    Required(RequiredKey),
    Optional(OptionalKey),
}

impl<D> Call<D> {
    /// The command that this call makes with its body.
    pub(crate) fn command(&self, action: Action, body: &CanonicalBody) -> Command {
        let key = match &self.key {
            CallKey::Required(key) => Some(key.of(&self.client, body)),
            CallKey::Optional(key) => key.of(&self.client, body),
        };
        Command {
            id: CommandId::from_uuid(Uuid::now_v7()),
            key,
            caller: self.client.caller(),
            action,
            metadata: self.client.metadata(),
        }
    }
}

impl<D: Door> FromRequestParts<Commands> for Call<D> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &Commands) -> Result<Self, Problem> {
        let client = Client::from_request_parts(parts, state).await?;
        let key = if D::KEY_REQUIRED {
            CallKey::Required(RequiredKey::from_request_parts(parts, state).await?)
        } else {
            CallKey::Optional(OptionalKey::from_request_parts(parts, state).await?)
        };
        Ok(Self { client, key, door: PhantomData })
    }
}

impl<D: Door> utoipa::IntoParams for Call<D> {
    fn into_params(_: impl Fn() -> Option<ParameterIn>) -> Vec<Parameter> {
        let header = |name: &str, required: bool, length_max: usize, description: &str| {
            let text = ObjectBuilder::new().schema_type(Type::String).min_length(Some(1)).max_length(Some(length_max));
            ParameterBuilder::new()
                .name(name)
                .parameter_in(ParameterIn::Header)
                .required(if required { Required::True } else { Required::False })
                .description(Some(description))
                .schema(Some(text))
                .build()
        };
        vec![
            header(
                "Idempotency-Key",
                D::KEY_REQUIRED,
                255,
                "Visible ASCII, yours, kept for ever. The same key with the same request repeats the first answer and \
                 does nothing again; with another request it is refused.",
            ),
            header(
                "X-User-ID",
                false,
                128,
                "Your end user on whose behalf the call is made. With it, spending from another user's wallet is refused.",
            ),
        ]
    }
}
