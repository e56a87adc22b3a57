//! A partner: a fintech whose clients call us, the currencies it may use, and whether it may call at all.
//!
//! That a secret was replaced is history too, for it is a privileged act; the secrets themselves are no event's business
//! and live in the schema `access`, which follows these events.

use cqrs_es::event_sink::EventSink;
use cqrs_es::{Aggregate, DomainEvent};
use serde::{Deserialize, Serialize};

use crate::{Book, ClientId, Currency, Refusal};

/// A partner at one position of the log. `Default` is a partner that has not been registered.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Partner {
    /// How many events its stream has.
    pub sequence: i64,
    pub currencies: Vec<Currency>,
    /// The client that speaks for it; none before it is registered.
    pub client: Option<ClientId>,
    /// Nothing that it asks for is done. What was pending still ends.
    pub suspended: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum PartnerCommand {
    Register { name: String, currencies: Vec<Currency>, client: ClientId },
    Suspend { reason: Option<String> },
    Resume,
    RotateSecret,
}

/// What has happened to a partner. This is history: add variants, never edit or reuse one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all_fields = "camelCase")]
pub enum PartnerEvent {
    #[serde(rename = "PartnerRegistered")]
    Registered { name: String, currencies: Vec<Currency>, client_id: ClientId },
    #[serde(rename = "PartnerSuspended")]
    Suspended {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    #[serde(rename = "PartnerResumed")]
    Resumed {},
    /// The client's secret became another one, and what it had logged in with is worth nothing any more.
    #[serde(rename = "PartnerSecretRotated")]
    SecretRotated { client_id: ClientId },
}

impl Partner {
    pub fn decide(&self, command: PartnerCommand) -> Result<PartnerEvent, Refusal> {
        match command {
            PartnerCommand::Register { name, currencies, client } => {
                assert_eq!(self.sequence, 0, "partner ids are minted once");
                Ok(PartnerEvent::Registered { name, currencies, client_id: client })
            }
            PartnerCommand::Suspend { reason } => {
                self.registered()?;
                if self.suspended { Err(Refusal::PartnerIsSuspended) } else { Ok(PartnerEvent::Suspended { reason }) }
            }
            PartnerCommand::Resume => {
                self.registered()?;
                if self.suspended { Ok(PartnerEvent::Resumed {}) } else { Err(Refusal::PartnerNotSuspended) }
            }
            // A suspended partner's too: a secret that has leaked is often why it was suspended.
            PartnerCommand::RotateSecret => Ok(PartnerEvent::SecretRotated { client_id: self.registered()? }),
        }
    }

    /// The client of a partner that there is.
    fn registered(&self) -> Result<ClientId, Refusal> {
        self.client.ok_or(Refusal::PartnerNotFound)
    }

    /// Whether what the partner asks for may be done.
    pub fn active(&self) -> Result<(), Refusal> {
        if self.suspended { Err(Refusal::PartnerSuspended) } else { Ok(()) }
    }
}

impl Aggregate for Partner {
    const TYPE: &'static str = "partner";
    type Command = PartnerCommand;
    type Event = PartnerEvent;
    type Error = Refusal;
    type Services = Book;

    async fn handle(&mut self, command: PartnerCommand, _: &Book, sink: &EventSink<Self>) -> Result<(), Refusal> {
        let event = self.decide(command)?;
        sink.write(event, self).await;
        Ok(())
    }

    fn apply(&mut self, event: PartnerEvent) {
        self.sequence = self.sequence.saturating_add(1);
        match event {
            PartnerEvent::Registered { currencies, client_id, .. } => {
                self.currencies = currencies;
                self.client = Some(client_id);
            }
            PartnerEvent::Suspended { .. } => self.suspended = true,
            PartnerEvent::Resumed {} => self.suspended = false,
            PartnerEvent::SecretRotated { .. } => {}
        }
    }
}

impl PartnerEvent {
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Registered { .. } => "PartnerRegistered",
            Self::Suspended { .. } => "PartnerSuspended",
            Self::Resumed {} => "PartnerResumed",
            Self::SecretRotated { .. } => "PartnerSecretRotated",
        }
    }
}

impl DomainEvent for PartnerEvent {
    fn event_type(&self) -> String {
        self.name().to_owned()
    }

    fn event_version(&self) -> String {
        crate::event::VERSION.to_owned()
    }
}
