//! What a person means by a name.

use std::net::IpAddr;
use std::sync::Arc;

use bulkhead_model::labels::HOST_LABEL;
use bulkhead_model::suggest::nearest;
use bulkhead_model::{Entity, ObjectKey};

use crate::judgement::Endpoint;
use crate::world::World;

/// Most names that an ambiguous name lists.
const CANDIDATES_MAX: usize = 10;

/// Why a name means nothing, or too much. The text says what was expected, and what is near.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    /// Nothing has this name.
    #[error("{0}")]
    Unknown(String),
    /// Several things have this name, or it cannot be used.
    #[error("{0}")]
    Ambiguous(String),
}

/// The endpoint of a name: whole (`Workload/web.h1`), without the kind, or without the host if only one has it.
///
/// # Errors
/// If none has it, or several.
pub fn find_endpoint<'a>(world: &'a World, text: &str) -> Result<&'a Entity, FindError> {
    let endpoints = || world.entities.values().filter(|entity| entity.is_endpoint());
    if let Some(entity) = world.entities.get(text).filter(|entity| entity.is_endpoint()) {
        return Ok(entity);
    }
    let own = |entity: &'a Entity| entity.name.split_once('/').map_or(&*entity.name, |(_, name)| name);
    let short = |entity: &'a Entity| {
        let host = entity.labels.get(HOST_LABEL)?;
        own(entity).strip_suffix(host)?.strip_suffix('.')
    };
    let exact: Vec<&Entity> = endpoints().filter(|entity| own(entity) == text).collect();
    let found = if exact.is_empty() {
        endpoints().filter(|entity| short(entity) == Some(text)).collect()
    } else {
        exact
    };
    one_of("workload", text, &found, own, || endpoints().map(own).collect())
}

/// The policy of a name: as verdicts call it, or without the kind if only one has it.
///
/// # Errors
/// If none has it, or several.
pub fn find_policy<'a>(world: &'a World, text: &str) -> Result<&'a ObjectKey, FindError> {
    let exact: Vec<_> = world.policies.keys().filter(|key| key.policy_name() == text).collect();
    let qualified = || world.policies.keys().filter(|key| key.qualified_name() == text);
    let found: Vec<&ObjectKey> = if exact.is_empty() { qualified().collect() } else { exact };
    let names: Vec<String> = world.policies.keys().map(ObjectKey::policy_name).collect();
    match found.as_slice() {
        [only] => Ok(only),
        // One object can stand for several policies, which are alike but for whom they select.
        [first, rest @ ..] if rest.iter().all(|key| key.policy_name() == first.policy_name()) => Ok(first),
        several => {
            let labels: Vec<String> = several.iter().map(|key| key.policy_name()).collect();
            Err(failure("policy", text, &labels, &names))
        }
    }
}

/// One end of a connection: an address, or [`find_endpoint`] and its first address.
///
/// # Errors
/// If there is no such endpoint, or it has no address.
pub fn find_end(world: &World, text: &str) -> Result<Endpoint, FindError> {
    if let Ok(address) = text.parse::<IpAddr>() {
        let mut endpoints = world.entities.values().filter(|entity| entity.is_endpoint());
        let holder = endpoints.find(|entity| {
            entity.prefixes.iter().any(|prefix| prefix.is_host() && prefix.contains_address(address))
        });
        return Ok(Endpoint { workload: holder.map(|entity| Arc::clone(&entity.name)), address });
    }
    let entity = find_endpoint(world, text)?;
    let address = entity.prefixes.first().map(|prefix| prefix.address());
    let address = address.ok_or_else(|| FindError::Ambiguous(format!("{} has no address", entity.name)))?;
    Ok(Endpoint { workload: Some(Arc::clone(&entity.name)), address })
}

fn one_of<'a, T>(
    what: &str,
    text: &str,
    found: &[&'a T],
    name: impl Fn(&'a T) -> &'a str,
    all: impl FnOnce() -> Vec<&'a str>,
) -> Result<&'a T, FindError> {
    match found {
        [only] => Ok(only),
        several => {
            let several: Vec<&str> = several.iter().map(|one| name(one)).collect();
            Err(failure(what, text, &several, &all()))
        }
    }
}

fn failure<S: AsRef<str>, A: AsRef<str>>(what: &str, text: &str, several: &[S], all: &[A]) -> FindError {
    if several.is_empty() {
        let near = nearest(text, all.iter().map(AsRef::as_ref));
        let hint = near.map_or_else(String::new, |near| format!("; did you mean {near}?"));
        return FindError::Unknown(format!("there is no {what} {text:?}{hint}"));
    }
    let names: Vec<&str> = several.iter().take(CANDIDATES_MAX).map(AsRef::as_ref).collect();
    FindError::Ambiguous(format!("{text:?} could be any of {}: say which", names.join(", ")))
}
