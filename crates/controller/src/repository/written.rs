//! Objects that this process is writing: what comes back by the store's watch need not be read again.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bulkhead_model::Resource;
use bulkhead_store::Stored;
use bytes::Bytes;

use super::keys;

/// Objects by their keys in the store, with the very bytes that were handed to it. Never more than the writers under way
/// have in their transactions.
#[derive(Debug, Default)]
pub(super) struct Written {
    objects: Mutex<HashMap<String, (Bytes, Resource)>>,
}

impl Written {
    fn objects(&self) -> MutexGuard<'_, HashMap<String, (Bytes, Resource)>> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Some are about to be written.
    pub(super) fn expect(&self, objects: impl IntoIterator<Item = (String, Bytes, Resource)>) {
        let objects = objects.into_iter().map(|(key, bytes, resource)| (key, (bytes, resource)));
        self.objects().extend(objects);
    }

    /// The write has ended: whatever is still there was not taken.
    pub(super) fn forget<'a>(&self, keys: impl IntoIterator<Item = &'a String>) {
        let mut objects = self.objects();
        for key in keys {
            objects.remove(key);
        }
    }

    /// The resource in the store. The same bytes at the same place are those that were handed over: they are held here, so
    /// nothing else can be there.
    pub(super) fn read(&self, stored: &Stored) -> Result<Resource, keys::Undecodable> {
        let same = |(bytes, _): &(Bytes, Resource)| {
            (bytes.as_ptr(), bytes.len()) == (stored.value.as_ptr(), stored.value.len())
        };
        let mut objects = self.objects();
        if objects.get(&*stored.key).is_none_or(|expected| !same(expected)) {
            drop(objects);
            return keys::decode(stored);
        }
        let taken = objects.remove(&*stored.key);
        drop(objects);
        let Some((_, mut resource)) = taken else { return keys::decode(stored) };
        resource.metadata_mut().resource_version = Some(stored.modified.to_string());
        Ok(resource)
    }
}
