//! Bodies with a clock: the request's has limits in time and size, the response's says when it has ended.
//!
//! A handler that reads a body to its end sees an error when a limit is passed, whatever it makes of
//! it. The fault is noted beside it, so that the server gives the answer that fits.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use axum::body::{Body, HttpBody};
use bytes::Bytes;
use hyper::body::{Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep};

use crate::door::Guest;
use crate::http::Limits;
use crate::refusal::Refusal;
use crate::socket::Conversation;

/// Why a request's body was not read to its end; empty while all is well.
pub(crate) type Fault = Arc<OnceLock<Refusal>>;

/// A request's body that must arrive whole before a moment and within a size.
pub(crate) struct RequestBody {
    incoming: Incoming,
    bytes_max: usize,
    bytes_left: usize,
    until: Instant,
    timer: Option<Pin<Box<Sleep>>>, // only for a body that makes us wait
    fault: Fault,
    conversation: Arc<Conversation>,
    guest: Option<Guest>, // enters with the last byte
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    #[error("the body passed a limit of the server")]
    Refused,
    #[error("the body broke off")]
    Broken(#[source] hyper::Error),
}

impl RequestBody {
    pub(crate) fn new(
        incoming: Incoming,
        limits: &Limits,
        fault: Fault,
        conversation: Arc<Conversation>,
        guest: Option<Guest>,
    ) -> Self {
        let (bytes_max, until) = (limits.body_bytes, Instant::now() + limits.body_time);
        let body = Self { incoming, bytes_max, bytes_left: bytes_max, until, timer: None, fault, conversation, guest };
        body.enter_if_whole();
        body
    }

    fn enter_if_whole(&self) {
        if let Some(guest) = self.guest.as_ref().filter(|_| self.incoming.is_end_stream()) {
            guest.enter();
        }
    }

    fn refuse(&self, refusal: Refusal) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let _ = self.fault.set(refusal); // the first fault is the one that counts
        Poll::Ready(Some(Err(BodyError::Refused)))
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        if !self.incoming.is_end_stream() {
            self.conversation.left_unread();
        }
    }
}

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.fault.get().is_some() {
            return Poll::Ready(Some(Err(BodyError::Refused)));
        }
        match Pin::new(&mut self.incoming).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                let length = frame.data_ref().map_or(0, Bytes::len);
                match self.bytes_left.checked_sub(length) {
                    Some(left) => self.bytes_left = left,
                    None => return self.refuse(Refusal::PayloadTooLarge { bytes_max: self.bytes_max }),
                }
                // Bytes that trickle in never make us wait long, so the clock is read here too.
                if self.until <= Instant::now() && !self.incoming.is_end_stream() {
                    return self.refuse(Refusal::SlowBody);
                }
                self.enter_if_whole();
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(BodyError::Broken(error)))),
            Poll::Ready(None) => {
                self.guest.iter().for_each(Guest::enter); // a body in chunks is whole when its end was read
                Poll::Ready(None)
            }
            Poll::Pending => {
                let until = self.until;
                let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
                match timer.as_mut().poll(cx) {
                    Poll::Ready(()) => self.refuse(Refusal::SlowBody),
                    Poll::Pending => Poll::Pending,
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

/// A response's body. When hyper lets go of it, the response is complete and the connection idle.
pub(crate) struct ResponseBody {
    body: Body,
    conversation: Arc<Conversation>,
}

impl ResponseBody {
    pub(crate) fn new(body: Body, conversation: Arc<Conversation>) -> Self {
        Self { body, conversation }
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        self.conversation.answered();
    }
}

impl HttpBody for ResponseBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
