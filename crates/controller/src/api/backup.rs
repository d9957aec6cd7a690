//! The repository as `bulkhead store` copies it, while it is in use.

use axum::extract::State;
use axum::response::Response;
use bulkhead_store::Backup;

use super::problem::Refusal;
use super::{Shared, stream};

/// Everything as of one revision, in lines whose last one says whether the others have arrived.
pub(super) async fn backup(State(context): Shared) -> Result<Response, Refusal> {
    let place = stream::place(&context)?;
    let copy = Backup::take(&**context.repository.store()).await?;
    Ok(stream::respond(place, futures::stream::iter(copy.into_lines())))
}
