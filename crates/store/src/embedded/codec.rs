//! How objects and commits stand in the file. Integers are little-endian; a length stands before each text.

use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes};

use crate::types::{Change, Commit, Revision, Stored};

/// Marks of a change in a commit.
const DELETE: u8 = 0;
const PUT: u8 = 1;

/// A row that is not what this program writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a row ends early or has an unknown mark")]
pub(super) struct Malformed;

/// Row of the objects table.
pub(super) fn object_to_row(object: &Stored) -> Vec<u8> {
    let mut row = Vec::with_capacity(16 + object.value.len());
    row.put_u64_le(object.created.0);
    row.put_u64_le(object.modified.0);
    row.put_slice(&object.value);
    row
}

/// Inverse of [`object_to_row`].
pub(super) fn object_from_row(key: &str, mut row: &[u8]) -> Result<Stored, Malformed> {
    let created = Revision(row.try_get_u64_le().map_err(|_short| Malformed)?);
    let modified = Revision(row.try_get_u64_le().map_err(|_short| Malformed)?);
    Ok(Stored { key: key.into(), value: Bytes::copy_from_slice(row), created, modified, lease: None })
}

/// Row of the log table.
pub(super) fn commit_to_row(commit: &Commit) -> Vec<u8> {
    let mut row = Vec::new();
    for change in &commit.changes {
        row.put_u8(if change.object.is_some() { PUT } else { DELETE });
        put_text(&mut row, change.key.as_bytes());
        if let Some(object) = &change.object {
            row.put_u64_le(object.created.0);
            put_text(&mut row, &object.value);
        }
    }
    row
}

/// Inverse of [`commit_to_row`].
pub(super) fn commit_from_row(revision: Revision, mut row: &[u8]) -> Result<Commit, Malformed> {
    let mut changes = Vec::new();
    while !row.is_empty() {
        let mark = row.get_u8();
        let key = take_text(&mut row)?;
        let key: Arc<str> = std::str::from_utf8(key).map_err(|_bytes| Malformed)?.into();
        let object = match mark {
            DELETE => None,
            PUT => {
                let created = Revision(row.try_get_u64_le().map_err(|_short| Malformed)?);
                let value = Bytes::copy_from_slice(take_text(&mut row)?);
                Some(Stored { key: Arc::clone(&key), value, created, modified: revision, lease: None })
            }
            _ => return Err(Malformed),
        };
        changes.push(Change { key, object });
    }
    Ok(Commit { revision, changes })
}

fn put_text(row: &mut Vec<u8>, text: &[u8]) {
    // Keys and values are bounded far below 2^32 by `Transaction::check`.
    row.put_u32_le(u32::try_from(text.len()).unwrap_or(u32::MAX));
    row.put_slice(text);
}

fn take_text<'a>(row: &mut &'a [u8]) -> Result<&'a [u8], Malformed> {
    let len = row.try_get_u32_le().map_err(|_short| Malformed)?;
    let len = usize::try_from(len).map_err(|_wide| Malformed)?;
    let (text, rest) = row.split_at_checked(len).ok_or(Malformed)?;
    *row = rest;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_as_they_went_and_short_ones_are_refused() {
        let object = Stored {
            key: "/a".into(),
            value: Bytes::from_static(b"value"),
            created: Revision(3),
            modified: Revision(7),
            lease: None,
        };
        assert_eq!(object_from_row("/a", &object_to_row(&object)), Ok(object.clone()));
        let changes = vec![
            Change { key: "/a".into(), object: Some(object) },
            Change { key: "/b".into(), object: None },
        ];
        let commit = Commit { revision: Revision(7), changes };
        let row = commit_to_row(&commit);
        assert_eq!(commit_from_row(Revision(7), &row), Ok(commit));
        assert_eq!(commit_from_row(Revision(7), &row[..row.len() - 1]), Err(Malformed));
        assert_eq!(object_from_row("/a", &[0; 15]), Err(Malformed));
    }
}
