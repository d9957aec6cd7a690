//! Errors as Kubernetes `Status` objects.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use bulkhead_model::{Kind, ObjectKey, Problem};
use bulkhead_store::StoreError;
use serde_json::{Value, json};

use crate::audit::AuditError;
use crate::flows::FlowError;
use crate::guard::{NAMED_MAX, Warning};
use crate::repository::WriteError;

/// An answer that is an error.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) code: StatusCode,
    pub(crate) reason: &'static str,
    pub(crate) message: String,
    // Boxed, since an error is passed through many hands and this is its largest part.
    about: Option<Box<ObjectKey>>,
    problems: Vec<Problem>,
    warnings: Vec<Warning>,
    causes: Box<[Value]>,
}

impl Refusal {
    pub(crate) fn new(code: StatusCode, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason,
            message: message.into(),
            about: None,
            problems: Vec::new(),
            warnings: Vec::new(),
            causes: Box::default(),
        }
    }

    /// The request itself makes no sense.
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequest", message)
    }

    /// What was asked for does not exist.
    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "NotFound", message)
    }

    /// It is not known any more, or not yet.
    pub(crate) fn expired(message: impl Into<String>) -> Self {
        Self::new(StatusCode::GONE, "Expired", message)
    }

    /// What was sent is wrong, at these places.
    pub(crate) fn invalid(problems: Vec<Problem>) -> Self {
        let message = problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        Self { problems, ..Self::new(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", message) }
    }

    pub(crate) fn no_such_kind(plural: &str) -> Self {
        let known = Kind::ALL.iter().map(|kind| kind.plural()).collect::<Vec<_>>();
        let suggestion = bulkhead_model::suggest::nearest(plural, known.iter().copied())
            .map_or_else(String::new, |word| format!("; did you mean {word}?"));
        Self::not_found(format!("there is no kind {plural:?}, there are {}{suggestion}", known.join(", ")))
    }

    /// With causes of its own kind.
    pub(crate) fn because(self, causes: Vec<Value>) -> Self {
        Self { causes: causes.into(), ..self }
    }

    fn about(mut self, key: ObjectKey) -> Self {
        self.about = Some(Box::new(key));
        self
    }

    /// The Status object.
    pub(crate) fn status(&self) -> Value {
        let mut details = json!({});
        if let Some(key) = &self.about {
            details["name"] = json!(key.qualified_name());
            details["kind"] = json!(key.kind.resource());
            details["group"] = json!(key.kind.api_version().split_once('/').map_or("", |(group, _)| group));
        }
        if !self.problems.is_empty() {
            details["causes"] = self.problems.iter().map(cause).collect();
        }
        if !self.causes.is_empty() {
            details["causes"] = json!(self.causes);
        }
        if !self.warnings.is_empty() {
            details["cuts"] = self.warnings.iter().take(NAMED_MAX).map(|warning| json!(warning)).collect();
            details["cutOff"] = json!(self.warnings.len());
        }
        json!({
            "apiVersion": "v1",
            "kind": "Status",
            "metadata": {},
            "status": "Failure",
            "reason": self.reason,
            "message": self.message,
            "code": self.code.as_u16(),
            "details": details,
        })
    }
}

fn cause(problem: &Problem) -> Value {
    // Clients of Kubernetes print field and message, and nothing else of it.
    let place =
        if problem.line == 0 { String::new() } else { format!(" ({}:{})", problem.line, problem.column) };
    let hint = problem.suggestion.as_ref().map_or_else(String::new, |word| format!("; did you mean {word}?"));
    let mut cause = json!({
        "reason": "FieldValueInvalid",
        "field": problem.path,
        "message": format!("{}{hint}{place}", problem.message),
        "source": problem.source,
        "line": problem.line,
        "column": problem.column,
    });
    if let Some(suggestion) = &problem.suggestion {
        cause["suggestion"] = json!(suggestion);
    }
    cause
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.code, Json(self.status())).into_response()
    }
}

impl From<WriteError> for Refusal {
    fn from(error: WriteError) -> Self {
        let message = error.to_string();
        match error {
            WriteError::Invalid(problems) => Self::invalid(problems),
            WriteError::AlreadyExists(key) => {
                Self::new(StatusCode::CONFLICT, "AlreadyExists", message).about(key)
            }
            WriteError::NotFound(key) => Self::not_found(message).about(key),
            WriteError::Conflict { key, .. } => {
                Self::new(StatusCode::CONFLICT, "Conflict", message).about(key)
            }
            WriteError::NoHistory(_) => Self::new(StatusCode::GONE, "Expired", message),
            WriteError::NotAllowed(_) | WriteError::Forbidden(_) => {
                Self::new(StatusCode::FORBIDDEN, "Forbidden", message)
            }
            WriteError::LockOut(warnings) => {
                Self { warnings, ..Self::new(StatusCode::CONFLICT, "LockOut", message) }
            }
            WriteError::Unjudged(_) => Self::new(StatusCode::CONFLICT, "LockOutUnknown", message),
            WriteError::Overtaken => Self::new(StatusCode::CONFLICT, "Conflict", message),
            WriteError::StillWaiting { .. } | WriteError::TooManyWait => {
                Self::new(StatusCode::CONFLICT, "ConfirmationPending", message)
            }
            WriteError::NoConfirmation(_) => Self::not_found(message),
            WriteError::AlreadyRolledBack { .. } => Self::new(StatusCode::CONFLICT, "RolledBack", message),
            WriteError::Store(error) => error.into(),
        }
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        let message = error.to_string();
        match error {
            StoreError::Conflict { .. } => Self::new(StatusCode::CONFLICT, "Conflict", message),
            StoreError::Compacted { .. } | StoreError::Ahead { .. } => {
                Self::new(StatusCode::GONE, "Expired", message)
            }
            StoreError::Key(_) | StoreError::DuplicateKey(_) | StoreError::NoLease(_) => {
                Self::bad_request(message)
            }
            StoreError::TooManyOps(_) | StoreError::TooManyBytes(_) | StoreError::ServerLimit { .. } => {
                Self::new(StatusCode::PAYLOAD_TOO_LARGE, "RequestEntityTooLarge", message)
            }
            StoreError::Full { .. } => {
                Self::new(StatusCode::INSUFFICIENT_STORAGE, "InsufficientStorage", message)
            }
            StoreError::Locked { .. }
            | StoreError::Corrupt { .. }
            | StoreError::Io { .. }
            | StoreError::TooManyLeases
            | StoreError::Unavailable { .. }
            | StoreError::OutcomeUnknown { .. }
            | StoreError::Refused { .. }
            | StoreError::Closed => Self::new(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable", message),
        }
    }
}

/// What has no line in the audit log is not done.
impl From<AuditError> for Refusal {
    fn from(error: AuditError) -> Self {
        let message = format!("nothing was changed, since the audit log cannot be written: {error}");
        Self::new(StatusCode::INSUFFICIENT_STORAGE, "AuditLogUnavailable", message)
    }
}

impl From<FlowError> for Refusal {
    fn from(error: FlowError) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", error.to_string())
    }
}
