//! From what the ledger says to what HTTP says.
//!
//! An answer is made of the command's events and of nothing else: not of the request, not of a clock. That is
//! why a replay has the same bytes, refusals included.

use api_contract::{LEDGER_POSITION, Problem, TransactionBody, WalletBody};
use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use ledger_core::{Balance, Command, CommandEvent, Event, Failure, TransactionEvent, WalletEvent};
use ledger_engine::{CommandError, Happened, Receipt};
use serde::{Deserialize, Serialize};

use crate::Commands;

pub(crate) const IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// A command that was executed, now or when its key was used first.
pub(crate) struct Done {
    pub(crate) recorded: Recorded,
    /// What happened to the thing that the command is about, up to and including what the command did to it.
    stream: Vec<Happened>,
    receipt: Receipt,
}

/// Where the log has it, and whether it had it before this call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recorded {
    position: i64,
    replayed: bool,
}

/// What was asked for, with the headers that every command's answer has.
pub(crate) struct Answer<T> {
    status: StatusCode,
    body: T,
    location: Option<String>,
    recorded: Recorded,
}

/// What was not done, and whether the log keeps the refusal.
#[derive(Debug)]
pub(crate) struct Refused {
    problem: Problem,
    recorded: Option<Recorded>,
}

impl Commands {
    /// Asks the ledger. A refusal that the log keeps is an error here like any other.
    pub(crate) async fn execute(&self, command: Command) -> Result<Done, Refused> {
        let done = self.record(command).await?;
        match done.stream.iter().find_map(declined) {
            Some(problem) => Err(done.refused(problem)),
            None => Ok(done),
        }
    }

    /// As [`Commands::execute`], for a command of several parts: that one of them was declined is no refusal of the whole.
    pub(crate) async fn execute_each(&self, command: Command) -> Result<Done, Refused> {
        let done = self.record(command).await?;
        let of_the_whole = |happened: &&Happened| matches!(happened.event, Event::Command(..));
        match done.stream.iter().filter(of_the_whole).find_map(declined) {
            Some(problem) => Err(done.refused(problem)),
            None => Ok(done),
        }
    }

    async fn record(&self, command: Command) -> Result<Done, Refused> {
        let receipt = self.0.ledger.execute(command).await?;
        let recorded = Recorded { position: receipt.position(), replayed: receipt.replayed };
        let stream = receipt.happened_in_stream().map_err(|error| Problem::internal(&error))?;
        Ok(Done { recorded, stream, receipt })
    }
}

impl Done {
    /// The transaction as the command left it.
    pub(crate) fn transaction(&self) -> Result<TransactionBody, Problem> {
        let mut body: Option<TransactionBody> = None;
        for Happened { event, position, recorded_at } in &self.stream {
            let Event::Transaction(id, event) = event else { return Err(other_stream()) };
            match &mut body {
                None => body = Some(TransactionBody::new(event, *id, *position, *recorded_at)),
                Some(body) => body.apply(event, *position, *recorded_at),
            }
        }
        body.ok_or_else(other_stream)
    }

    /// The wallet as the command left it.
    pub(crate) fn wallet(&self) -> Result<WalletBody, Problem> {
        wallet(self.stream.iter())
    }

    /// The first answer again, with the request that it was given to.
    fn refused(&self, problem: Problem) -> Refused {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Metadata {
            request_id: Option<String>,
        }
        let metadata = self.receipt.events().first().map(|event| serde_json::from_str::<Metadata>(&event.metadata));
        let problem = match metadata {
            Some(Ok(Metadata { request_id: Some(id) })) => problem.request_id(&id),
            _ => problem,
        };
        Refused { problem, recorded: Some(self.recorded) }
    }

    /// What happened in the stream of the command's first event.
    pub(crate) fn stream(&self) -> &[Happened] {
        &self.stream
    }

    /// All events of the command, of whatever stream.
    pub(crate) fn events(&self) -> Result<Vec<Happened>, Problem> {
        self.receipt.happened().map_err(|error| Problem::internal(&error))
    }
}

/// A wallet from events of its own stream, the first one first.
///
/// Each of these says which change of the wallet it is and what the wallet then held, so the entries of transactions
/// between them need not be read.
pub(crate) fn wallet<'e>(events: impl Iterator<Item = &'e Happened>) -> Result<WalletBody, Problem> {
    let mut body: Option<WalletBody> = None;
    for Happened { event, recorded_at, .. } in events {
        let Event::Wallet(id, event) = event else { return Err(other_stream()) };
        match &mut body {
            None => body = Some(WalletBody::new(event, *id, *recorded_at)),
            Some(body) => {
                body.version = event.wallet_version() - 1;
                body.apply(event);
                (body.balance, body.available) = (balance_after(event), balance_after(event));
            }
        }
    }
    body.ok_or_else(other_stream)
}

fn balance_after(event: &WalletEvent) -> Balance {
    match event {
        WalletEvent::Opened { balance_after, .. }
        | WalletEvent::Frozen { balance_after, .. }
        | WalletEvent::Unfrozen { balance_after, .. }
        | WalletEvent::Closed { balance_after, .. } => *balance_after,
    }
}

impl<T> Answer<T> {
    pub(crate) fn ok(recorded: Recorded, body: T) -> Self {
        Self { status: StatusCode::OK, body, location: None, recorded }
    }

    pub(crate) fn created(recorded: Recorded, location: String, body: T) -> Self {
        Self { status: StatusCode::CREATED, body, location: Some(location), recorded }
    }

    /// Several things were made, each with a place of its own.
    pub(crate) fn created_several(recorded: Recorded, body: T) -> Self {
        Self { status: StatusCode::CREATED, body, location: None, recorded }
    }

    /// It has begun, and ends later.
    pub(crate) fn accepted(recorded: Recorded, location: String, body: T) -> Self {
        Self { status: StatusCode::ACCEPTED, body, location: Some(location), recorded }
    }
}

impl Recorded {
    pub(crate) fn replayed(self) -> bool {
        self.replayed
    }

    fn tell(self, headers: &mut HeaderMap) {
        headers.insert(LEDGER_POSITION, HeaderValue::from(self.position));
        if self.replayed {
            headers.insert(IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
        }
    }
}

/// More than most answers have: a transfer's has some 700 bytes.
const BODY_BYTES: usize = 1024;

impl<T: Serialize> IntoResponse for Answer<T> {
    fn into_response(self) -> Response {
        let mut body = Vec::with_capacity(BODY_BYTES); // grown from nothing, it would be copied several times
        if let Err(error) = serde_json::to_writer(&mut body, &self.body) {
            return Problem::internal(&error).into_response();
        }
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self.recorded.tell(headers);
        if let Some(location) = self.location.and_then(|location| HeaderValue::try_from(location).ok()) {
            headers.insert(header::LOCATION, location);
        }
        response
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let mut response = self.problem.into_response();
        if let Some(recorded) = self.recorded {
            recorded.tell(response.headers_mut());
        }
        response
    }
}

/// What was refused before the ledger was asked, or could not be said after it had answered.
impl From<Problem> for Refused {
    fn from(problem: Problem) -> Self {
        Self { problem, recorded: None }
    }
}

impl From<CommandError> for Refused {
    fn from(error: CommandError) -> Self {
        let problem = match &error {
            CommandError::Refused(refusal) => Problem::from(refusal),
            CommandError::KeyReused => Problem::of("idempotency-key-reused"),
            CommandError::KeyInFlight => Problem::of("idempotency-in-flight").retry_after(1),
            CommandError::Overloaded => Problem::of("overloaded").retry_after(1),
            CommandError::OutcomeUnknown => Problem::of("outcome-unknown").retry_after(2),
            CommandError::Unavailable => Problem::of("storage-unavailable").retry_after(2),
        };
        if problem.status().is_server_error() && !matches!(error, CommandError::Overloaded) {
            // A line for each command too many would be work when there is too much of it; the metrics count them.
            tracing::warn!(%error, slug = problem.slug(), "a command was not answered by the ledger");
        }
        Self { problem, recorded: None }
    }
}

/// Why the ledger refused the command, if that is what happened; and which transaction this would have become.
fn declined(happened: &Happened) -> Option<Problem> {
    match &happened.event {
        Event::Transaction(id, TransactionEvent::Declined { failure, .. }) => {
            Some(problem(failure).member("transactionId", *id))
        }
        Event::Command(_, CommandEvent::Declined { failure, .. }) => Some(problem(failure)),
        // Always 422: what the item's own type says of a path, it does not say of the batch's.
        Event::Command(_, CommandEvent::BatchDeclined { item, failure, .. }) => {
            let item = format!("/transactions/{item}");
            Some(problem(failure).with_status(StatusCode::UNPROCESSABLE_ENTITY).below(&item))
        }
        _ => None,
    }
}

/// A refusal of history, with its reason and its numbers.
pub(crate) fn problem(failure: &Failure) -> Problem {
    Problem::from_code(&failure.code).detail(&failure.detail)
}

/// A receipt that is about something else than its command.
pub(crate) fn other_stream() -> Problem {
    Problem::internal(&std::io::Error::other("the receipt of a command is not about what the command is about"))
}
