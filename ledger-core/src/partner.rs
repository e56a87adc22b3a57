//! A partner: a fintech whose clients call us, and the currencies it may use.
//!
//! Its credentials are not here: they are no event's business and live in the schema `access`.

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
}

#[derive(Clone, Debug, PartialEq)]
pub enum PartnerCommand {
    Register { name: String, currencies: Vec<Currency>, client: ClientId },
}

/// What has happened to a partner. This is history: add variants, never edit or reuse one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all_fields = "camelCase")]
pub enum PartnerEvent {
    #[serde(rename = "PartnerRegistered")]
    Registered { name: String, currencies: Vec<Currency>, client_id: ClientId },
}

impl Partner {
    pub fn decide(&self, command: PartnerCommand) -> Result<PartnerEvent, Refusal> {
        match command {
            PartnerCommand::Register { name, currencies, client } => {
                assert_eq!(self.sequence, 0, "partner ids are minted once");
                Ok(PartnerEvent::Registered { name, currencies, client_id: client })
            }
        }
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
            PartnerEvent::Registered { currencies, .. } => self.currencies = currencies,
        }
    }
}

impl PartnerEvent {
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Registered { .. } => "PartnerRegistered",
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
