//! `PATCH`: what is there, changed and written back, unless somebody else was quicker; then once more.

use std::convert::Infallible;

use axum::Extension;
use axum::Json;
use axum::body::Bytes;
use axum::extract::{FromRequest, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bulkhead_model::Kind;
use serde_json::Value;

use super::form::Form;
use super::json_patch::{self, Operation};
use super::place::{Place, is_builtin};
use super::server_side_apply;
use crate::access::{Caller, Permissions};
use crate::api::Shared;
use crate::api::input::{self, Body, OF_WRITES, Parameters};
use crate::api::objects::{fits, found, write};
use crate::api::problem::Refusal;
use crate::repository::{Accounts, Verb};

/// How often a patch is applied anew because somebody else has changed the object meanwhile.
pub(super) const ATTEMPTS_MAX: usize = 5;

/// Media type of a server-side apply.
const APPLY: &str = "application/apply-patch+yaml";

/// A body, and what it is.
pub(crate) struct Sent {
    media_type: String,
    body: Body,
}

impl<S: Send + Sync> FromRequest<S> for Sent {
    type Rejection = Infallible;

    async fn from_request(request: Request, state: &S) -> Result<Self, Infallible> {
        let media_type = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media_type = media_type.unwrap_or_default().split(';').next().unwrap_or_default();
        let media_type = media_type.trim().to_owned();
        Ok(Self { media_type, body: Bytes::from_request(request, state).await })
    }
}

/// A patch, by its media type.
enum Patch {
    Operations(Vec<Operation>),
    Merge(Value),
    Strategic(Value),
}

impl Patch {
    fn read(kind: Kind, media_type: &str, body: Body) -> Result<Self, Refusal> {
        match media_type {
            "application/json-patch+json" => Ok(Self::Operations(input::json(body)?)),
            "application/merge-patch+json" => Ok(Self::Merge(input::json(body)?)),
            // Clients merge like this where they know a kind's lists by heart.
            "application/strategic-merge-patch+json" if is_builtin(kind) => {
                Ok(Self::Strategic(input::json(body)?))
            }
            _ => {
                let message = format!(
                    "a patch of {kind} may be application/json-patch+json, application/merge-patch+json or \
                     application/apply-patch+yaml, not {media_type:?}: try kubectl patch --type merge"
                );
                Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "UnsupportedMediaType", message))
            }
        }
    }

    fn apply(&self, kind: Kind, object: &mut Value) -> Result<(), Refusal> {
        let wrong = |error| Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", error);
        match self {
            Self::Operations(operations) => json_patch::patch(object, operations).map_err(wrong),
            Self::Merge(patch) => {
                json_patch::merge(object, patch);
                Ok(())
            }
            Self::Strategic(patch) => json_patch::strategic(kind, object, patch).map_err(wrong),
        }
    }
}

/// `PATCH …/{plural}/{name}`.
pub(crate) async fn patch(
    State(context): Shared,
    Extension(caller): Extension<Caller>,
    Extension(permissions): Extension<Permissions>,
    place: Place,
    form: Form,
    parameters: Parameters,
    Sent { media_type, body }: Sent,
) -> Result<Response, Refusal> {
    parameters.only(&OF_WRITES)?;
    let terms = input::terms(&context, &parameters, (&caller, &permissions), "patch")?;
    if media_type == APPLY {
        return server_side_apply::apply(&context, &place, form, &parameters, terms, body).await;
    }
    let patch = Patch::read(place.kind, &media_type, body)?;
    let mut attempts = 0;
    loop {
        attempts += 1;
        let before = found(&context, &place)?;
        let mut object = before.clone();
        patch.apply(place.kind, &mut object)?;
        let version = |object: &Value| object["metadata"]["resourceVersion"].clone();
        let may_try_again = version(&before) == version(&object) && attempts < ATTEMPTS_MAX;
        let document = input::changed(&place, &object)?;
        fits(&document, &place)?;
        let mut terms = terms.clone();
        // Who moves from one kind of apply to the other says by himself who owns what.
        let fields = |object: &Value| object["metadata"]["managedFields"].clone();
        if fields(&object) != fields(&before) {
            let entries = serde_json::from_value(fields(&object));
            let wrong = |error| Refusal::bad_request(format!("metadata.managedFields: {error}"));
            terms.accounts = Accounts::Exactly(entries.map_err(wrong)?);
        }
        match write(&context, &place, document, Verb::Replace, terms).await {
            Err(refusal) if refusal.reason == "Conflict" && may_try_again => {}
            Err(refusal) => return Err(refusal),
            Ok(object) => return Ok(Json(form.object(&place, object)).into_response()),
        }
    }
}
