//! Messages to agents, cut to a size that every agent accepts.

use std::sync::Arc;

use bulkhead_model::ObjectKey;
use bulkhead_wire::proto::controller_message::Body;
use bulkhead_wire::{pack, port_to_wire, prefix_to_wire, proto};
use bytes::Bytes;

use crate::members::Member;

/// Objects in a message are cut off at this size; far below [`bulkhead_wire::MESSAGE_BYTES_MAX`], so that
/// one message never holds up the stream for long.
const CHUNK_BYTES: usize = 1 << 20;
/// Objects that are packed together are cut off at this size before they are: a tenth of it and less afterwards. The
/// buffer that a connection keeps is as large as its largest message.
const PACKED_TOGETHER_BYTES: usize = 1 << 18;
/// Members in one message.
const CHUNK_MEMBERS: usize = 4096;

/// Tiers and policies. A snapshot is the first message with the rest as changes to it.
pub(super) fn resources(
    snapshot: bool,
    revision: u64,
    upserts: Vec<Bytes>,
    removes: Vec<ObjectKey>,
) -> Vec<Body> {
    let removes = removes.into_iter().map(object_key).collect();
    let first = proto::Resources { snapshot, revision, removes, ..Default::default() };
    let mut messages = vec![first];
    let mut bytes = 0;
    for upsert in upserts {
        bytes += upsert.len();
        if bytes > CHUNK_BYTES {
            bytes = upsert.len();
            messages.push(proto::Resources { revision, ..Default::default() });
        }
        if let Some(last) = messages.last_mut() {
            last.upserts.push(upsert);
        }
    }
    messages.into_iter().map(Body::Resources).collect()
}

/// Objects that all agents are told alike, packed once for all of them.
pub(crate) fn packed(objects: impl IntoIterator<Item = Bytes>) -> Vec<Bytes> {
    let (mut parts, mut together, mut bytes) = (Vec::new(), Vec::new(), 0);
    for object in objects {
        bytes += object.len();
        together.push(object);
        if bytes >= PACKED_TOGETHER_BYTES {
            parts.push(pack(std::mem::take(&mut together)));
            bytes = 0;
        }
    }
    if !together.is_empty() {
        parts.push(pack(together));
    }
    parts
}

/// A snapshot of packed objects and such that this agent alone is told.
pub(super) fn packed_resources(revision: u64, parts: &[Bytes], own: Vec<Bytes>) -> Vec<Body> {
    let mut messages = resources(true, revision, own, Vec::new());
    let parts =
        parts.iter().map(|part| proto::Resources { revision, packed: part.clone(), ..Default::default() });
    messages.extend(parts.map(Body::Resources));
    messages
}

fn object_key(key: ObjectKey) -> proto::ObjectKey {
    proto::ObjectKey {
        kind: key.kind.as_str().into(),
        namespace: key.namespace.unwrap_or_default(),
        name: key.name,
    }
}

/// Members of a selector, cut likewise.
pub(super) fn members(
    handle: u32,
    snapshot: bool,
    revision: u64,
    joins: &[Member],
    leaves: &[Arc<str>],
) -> Vec<Body> {
    let first = joins.len().min(CHUNK_MEMBERS);
    let mut messages = vec![proto::Members {
        handle,
        snapshot,
        revision,
        joins: joins[..first].iter().map(member).collect(),
        leaves: leaves.iter().map(ToString::to_string).collect(),
    }];
    for chunk in joins[first..].chunks(CHUNK_MEMBERS) {
        let joins = chunk.iter().map(member).collect();
        messages.push(proto::Members { handle, snapshot: false, revision, joins, leaves: Vec::new() });
    }
    messages.into_iter().map(Body::Members).collect()
}

fn member(member: &Member) -> proto::Member {
    proto::Member {
        entity: member.entity.to_string(),
        host: member.host.as_deref().unwrap_or_default().to_owned(),
        prefixes: member.prefixes.iter().copied().map(prefix_to_wire).collect(),
        ports: member.ports.iter().map(port_to_wire).collect(),
    }
}

/// The barrier.
pub(super) fn synced(revision: u64) -> Body {
    Body::Synced(proto::Synced { revision })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_snapshot_is_cut_and_only_its_first_part_says_so() {
        let upserts = vec![Bytes::from(vec![b' '; CHUNK_BYTES / 2]); 5];
        let messages = resources(true, 7, upserts, Vec::new());
        let parts: Vec<_> = messages
            .iter()
            .map(|message| match message {
                Body::Resources(resources) => (resources.snapshot, resources.upserts.len()),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(parts, [(true, 2), (false, 2), (false, 1)]);
    }
}
