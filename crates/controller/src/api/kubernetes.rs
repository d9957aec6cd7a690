//! What clients of Kubernetes expect of an API: discovery, its schemas, tables, patches, field ownership, reviews.
//!
//! Objects of other systems are served below their own group and version; Bulkhead's own where they always were. There is one
//! set of objects, and one way to change them: [`super::change`].

pub(super) mod discovery;
pub(super) mod form;
pub(super) mod json_patch;
pub(super) mod patch;
pub(super) mod place;
pub(super) mod protobuf;
pub(super) mod reviews;
pub(super) mod schemas;
pub(super) mod selection;
mod server_side_apply;
