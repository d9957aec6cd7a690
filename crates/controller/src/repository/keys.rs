//! How objects stand in the store: `/bulkhead.dev/v1/PLURAL/NAMESPACE/NAME`, `_` for no namespace, with the
//! manifest as JSON. `resourceVersion` is left out: it is the store's own revision.

use bulkhead_model::resource::NO_NAMESPACE;
use bulkhead_model::{Kind, ObjectKey, Problem, Resource};
use bulkhead_store::Stored;
use bytes::Bytes;

/// What all keys begin with.
pub(crate) const PREFIX: &str = "/bulkhead.dev/v1/";
/// A key that every change by an operator sets, under the condition that it is as the change's validation has seen it: so
/// what several controllers change at once is validated one after the other. No object is there.
pub(crate) const OPERATORS: &str = "/bulkhead.dev/system/operators";

/// What the keys of a kind (in a namespace, or in all) begin with.
pub(crate) fn prefix(kind: Kind, namespace: Option<&str>) -> String {
    match namespace {
        Some(namespace) => format!("{PREFIX}{}/{namespace}/", kind.plural()),
        None => format!("{PREFIX}{}/", kind.plural()),
    }
}

/// Where an object stands.
pub(crate) fn store_key(key: &ObjectKey) -> String {
    let namespace = key.namespace.as_deref().unwrap_or(NO_NAMESPACE);
    format!("{PREFIX}{}/{namespace}/{}", key.kind.plural(), key.name)
}

/// Inverse of [`store_key`].
pub(crate) fn object_key(store_key: &str) -> Option<ObjectKey> {
    let mut parts = store_key.strip_prefix(PREFIX)?.splitn(3, '/');
    let (plural, namespace, name) = (parts.next()?, parts.next()?, parts.next()?);
    let kind = Kind::ALL.iter().find(|kind| kind.plural() == plural).copied()?;
    let namespace = (namespace != NO_NAMESPACE).then(|| namespace.to_owned());
    Some(ObjectKey { kind, namespace, name: name.to_owned() })
}

/// The value to store.
pub(crate) fn encode(resource: &Resource) -> Bytes {
    if resource.metadata().resource_version.is_none() {
        return resource.to_json_text().into();
    }
    let mut resource = resource.clone();
    resource.metadata_mut().resource_version = None;
    resource.to_json_text().into()
}

/// What stands in the store does not say what it should.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
pub(crate) struct Undecodable(Vec<Problem>);

/// The resource in the store, with its `resourceVersion`.
pub(crate) fn decode(stored: &Stored) -> Result<Resource, Undecodable> {
    let mut resource = Resource::from_json_text(&stored.value).map_err(Undecodable)?;
    resource.metadata_mut().resource_version = Some(stored.modified.to_string());
    Ok(resource)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_back() {
        for (namespace, text) in
            [(None, "/bulkhead.dev/v1/policies/_/a.b"), (Some("shop"), "/bulkhead.dev/v1/policies/shop/a.b")]
        {
            let key =
                ObjectKey { kind: Kind::Policy, namespace: namespace.map(Into::into), name: "a.b".into() };
            assert_eq!(store_key(&key), text);
            assert_eq!(object_key(text), Some(key));
        }
        assert_eq!(object_key("/bulkhead.dev/v1/secrets/_/a"), None);
    }
}
