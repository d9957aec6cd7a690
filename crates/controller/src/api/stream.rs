//! Answers that go on: one JSON value per line.

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt};
use tokio::sync::OwnedSemaphorePermit;

use super::problem::Refusal;
use crate::context::{Context, STREAMS_MAX};

/// A place for one more answer that goes on.
pub(crate) fn place(context: &Context) -> Result<OwnedSemaphorePermit, Refusal> {
    Arc::clone(&context.streams).try_acquire_owned().map_err(|_full| {
        let message = format!("{STREAMS_MAX} clients watch or follow already");
        Refusal::new(StatusCode::TOO_MANY_REQUESTS, "TooManyRequests", message)
    })
}

/// A stream of lines as an answer, in its place until it ends.
pub(crate) fn respond(
    place: OwnedSemaphorePermit,
    lines: impl Stream<Item = Bytes> + Send + 'static,
) -> Response {
    respond_as("application/x-ndjson", place, lines)
}

/// The same under another media type.
pub(crate) fn respond_as(
    media_type: &'static str,
    place: OwnedSemaphorePermit,
    lines: impl Stream<Item = Bytes> + Send + 'static,
) -> Response {
    let lines = lines.map(move |line| {
        // Moved in here so that it is given back when the stream is dropped.
        let _held = &place;
        Ok::<_, Infallible>(line)
    });
    let body = Body::from_stream(lines);
    ([(header::CONTENT_TYPE, media_type)], body).into_response()
}
