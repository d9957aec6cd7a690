//! Tokens and revocations: written through the store, and read from what its watch has told.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use bulkhead_identity::{Holder, Identity, JoinToken, Secret, SecretDigest};
use bulkhead_store::{Change, Precondition, Revision, Store, StoreError, Transaction};
use tokio::sync::watch;
use tonic::Status;

use super::caller::{Caller, Who};
use super::records::{
    Grant, Joined, Key, PREFIX, Relay, Revocation, Revoked, Token, joined_key, of_holder, of_operator,
    read_key, relay_key, revocation_key, token_key,
};
use crate::clock;
use crate::context::{Context, stopped};

/// Most tokens that are valid at once.
const TOKENS_MAX: usize = 10_000;
/// Most revocations.
pub(crate) const REVOCATIONS_MAX: usize = 100_000;
/// Most relays.
pub(crate) const RELAYS_MAX: usize = 10_000;
/// What an operator's token begins with.
const OPERATOR_PREFIX: &str = "bho1";
/// How long a machine whose answer was lost may ask again, in milliseconds.
const AGAIN_MS_MAX: u64 = 3_600_000;
/// How often a write is tried if others write the same.
const ATTEMPTS_MAX: usize = 5;
/// Most tokens that are removed in one transaction.
const REMOVED_AT_ONCE: usize = 100;

/// What the repository says about tokens and revocations, as of one revision.
#[derive(Debug, Default)]
struct State {
    tokens: BTreeMap<String, (Token, Revision)>,
    revocations: BTreeMap<Revoked, Revocation>,
    relays: BTreeMap<String, (Relay, Revision)>,
}

/// Tokens and revocations.
#[derive(Debug)]
pub(crate) struct Grants {
    store: Arc<dyn Store>,
    state: RwLock<State>,
    revision: watch::Sender<Revision>,
}

/// Why a token does not let somebody in. Strangers hear no more than this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotGranted {
    #[error("the token is unknown, used up, or expired: make another with bulkhead token create")]
    Token,
    #[error("the token is for another host or relay")]
    Host,
    #[error(
        "a host of this name has joined before: make a token for it with bulkhead token create --host NAME"
    )]
    Joined,
}

impl State {
    fn valid_tokens(&self) -> impl Iterator<Item = &Token> {
        let now = clock::now_ms();
        self.tokens.values().map(|(token, _)| token).filter(move |token| token.expires_ms > now)
    }

    fn take_in(&mut self, change: &Change) {
        let Some(key) = read_key(&change.key) else { return };
        let value = change.object.as_ref().map(|stored| (&stored.value, stored.modified));
        match (key, value) {
            (Key::Token(id), None) => drop(self.tokens.remove(id)),
            (Key::Relay(name), None) => drop(self.relays.remove(name)),
            (Key::Relay(name), Some((value, revision))) => match serde_json::from_slice(value) {
                Ok(relay) => drop(self.relays.insert(name.to_owned(), (relay, revision))),
                Err(error) => {
                    tracing::error!(key = %change.key, %error, "what a relay may do cannot be read: nothing, then");
                    self.relays.remove(name);
                }
            },
            (Key::Revocation(of), None) => drop(self.revocations.remove(&of)),
            (Key::Token(id), Some((value, revision))) => match serde_json::from_slice(value) {
                Ok(token) => drop(self.tokens.insert(id.to_owned(), (token, revision))),
                // Nobody gets in by what cannot be read.
                Err(error) => tracing::error!(key = %change.key, %error, "a token cannot be read"),
            },
            (Key::Revocation(of), Some((value, _))) => {
                let revocation = serde_json::from_slice(value).unwrap_or_else(|error| {
                    tracing::error!(key = %change.key, %error, "a revocation cannot be read: it counts from now on");
                    Revocation {
                        of: of.clone(),
                        since_ms: clock::now_ms(),
                        by: String::new(),
                        reason: String::new(),
                    }
                });
                self.revocations.insert(of, revocation);
            }
        }
    }
}

impl Grants {
    /// Reads the store. [`follow`] must be run from then on.
    pub(crate) async fn open(store: Arc<dyn Store>) -> Result<Self, StoreError> {
        let mut state = State::default();
        let (all, revision) = store.list(PREFIX).await?;
        for stored in all {
            state.take_in(&Change { key: Arc::clone(&stored.key), object: Some(stored) });
        }
        Ok(Self { store, state: RwLock::new(state), revision: watch::Sender::new(revision) })
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    async fn put(&self, transaction: Transaction) -> Result<(), StoreError> {
        let revision = self.store.apply(transaction).await?.revision;
        let mut newest = self.revision.subscribe();
        // Whoever writes reads what he wrote; if the follower has ended, so does the controller.
        let _ended = newest.wait_for(|newest| *newest >= revision).await;
        Ok(())
    }

    /// Tokens that are still good for something.
    pub(crate) fn tokens(&self) -> Vec<Token> {
        self.state().valid_tokens().cloned().collect()
    }

    /// Whether another token may be made.
    pub(crate) fn has_room(&self) -> bool {
        self.state().valid_tokens().count() < TOKENS_MAX
    }

    /// Writes a token, with what a relay may do if it is for one, and removes those that have expired.
    pub(crate) async fn add_token(&self, token: &Token, relay: Option<&Relay>) -> Result<(), StoreError> {
        let now = clock::now_ms();
        let expired: Vec<_> = {
            let state = self.state();
            let expired = state.tokens.values().filter(|(token, _)| token.expires_ms <= now);
            expired.take(100).map(|(token, _)| token.id.clone()).collect()
        };
        let text = serde_json::to_vec(token).unwrap_or_default();
        let mut transaction = Transaction::new().put(token_key(&token.id), text, Precondition::Absent);
        if let Some(relay) = relay {
            let text = serde_json::to_vec(relay).unwrap_or_default();
            transaction = transaction.put(relay_key(&relay.name), text, Precondition::Any);
        }
        for id in expired {
            transaction = transaction.delete(token_key(&id), Precondition::Any);
        }
        self.put(transaction).await
    }

    /// Removes a token; whether there was one.
    pub(crate) async fn remove_token(&self, id: &str) -> Result<bool, StoreError> {
        let known = self.state().tokens.contains_key(id);
        if known {
            self.put(Transaction::new().delete(token_key(id), Precondition::Any)).await?;
        }
        Ok(known)
    }

    /// All relays.
    pub(crate) fn relays(&self) -> Vec<Relay> {
        self.state().relays.values().map(|(relay, _)| relay.clone()).collect()
    }

    /// What a relay may do, and since which revision.
    pub(crate) fn relay(&self, name: &str) -> Option<(Relay, Revision)> {
        self.state().relays.get(name).cloned()
    }

    /// Removes what a relay may do, with its tokens; its certificates are revoked, lest whoever has one comes back when
    /// the name is given away anew. What it could do; `None`: there is no such relay.
    pub(crate) async fn remove_relay(&self, revocation: &Revocation) -> Result<Option<Relay>, StoreError> {
        let Revoked::Holder(holder) = &revocation.of else { return Ok(None) };
        let Some(name) = holder.strip_prefix("relay/") else { return Ok(None) };
        let mut attempts = 0;
        loop {
            let (relay, unchanged, tokens) = {
                let state = self.state();
                let Some((relay, revision)) = state.relays.get(name).cloned() else { return Ok(None) };
                let is_its = |token: &Token| matches!(&token.grant, Grant::Relay { name: of } if of == name);
                let tokens = state.tokens.values().filter(|(token, _)| is_its(token));
                let tokens: Vec<_> =
                    tokens.take(REMOVED_AT_ONCE + 1).map(|(token, _)| token.id.clone()).collect();
                (relay, Precondition::AtRevision(revision), tokens)
            };
            let remove =
                |transaction: Transaction, id: &String| transaction.delete(token_key(id), Precondition::Any);
            if tokens.len() > REMOVED_AT_ONCE {
                self.put(tokens.iter().take(REMOVED_AT_ONCE).fold(Transaction::new(), remove)).await?;
                continue;
            }
            let text = serde_json::to_vec(revocation).unwrap_or_default();
            let transaction = Transaction::new()
                // A token that is made meanwhile writes it: then there is another token to remove.
                .delete(relay_key(name), unchanged)
                .delete(joined_key(holder), Precondition::Any)
                .put(revocation_key(&revocation.of), text, Precondition::Any);
            match self.put(tokens.iter().fold(transaction, remove)).await {
                Ok(()) => return Ok(Some(relay)),
                Err(StoreError::Conflict { .. }) if attempts < ATTEMPTS_MAX => attempts += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes one use of a relay's token for the key that it joins with.
    pub(super) async fn use_relay_token(
        &self,
        token: (&str, &str),
        name: &str,
        key: &str,
    ) -> Result<Result<(), NotGranted>, StoreError> {
        self.use_token(token, &format!("relay/{name}"), key, |grant| match grant {
            Grant::Relay { name: only } if only == name => Ok(true),
            Grant::Relay { .. } => Err(NotGranted::Host),
            Grant::Join { .. } | Grant::Operator { .. } => Err(NotGranted::Token),
        })
        .await
    }

    /// Takes one use of a join token for a host and the key that it joins with.
    pub(super) async fn use_join_token(
        &self,
        token: (&str, &str),
        host: &str,
        key: &str,
    ) -> Result<Result<(), NotGranted>, StoreError> {
        self.use_token(token, host, key, |grant| match grant {
            Grant::Join { host: Some(only) } if only == host => Ok(true),
            Grant::Join { host: Some(_) } => Err(NotGranted::Host),
            Grant::Join { host: None } => Ok(false),
            Grant::Relay { .. } | Grant::Operator { .. } => Err(NotGranted::Token),
        })
        .await
    }

    /// Takes one use of a token for somebody and the key that it joins with; `is_his` says whether the token is for nobody
    /// else. The store decides, so that no two controllers give the last use away.
    async fn use_token(
        &self,
        (id, secret): (&str, &str),
        who: &str,
        key: &str,
        is_his: impl Fn(&Grant) -> Result<bool, NotGranted>,
    ) -> Result<Result<(), NotGranted>, StoreError> {
        for _ in 0..ATTEMPTS_MAX {
            let joined = self.store.get(&joined_key(who)).await?;
            let before =
                joined.as_ref().and_then(|stored| serde_json::from_slice::<Joined>(&stored.value).ok());
            let now = clock::now_ms();
            // Only whoever has the key can use what is answered, and he was let in with this token.
            let again = |before: &Joined| {
                before.token == id && before.key == key && now.saturating_sub(before.joined_ms) < AGAIN_MS_MAX
            };
            if before.as_ref().is_some_and(again) {
                return Ok(Ok(()));
            }
            let Some((token, revision)) = self.valid_token(id, secret).await? else {
                return Ok(Err(NotGranted::Token));
            };
            let unchanged = match (is_his(&token.grant), &joined) {
                (Err(refused), _) => return Ok(Err(refused)),
                (Ok(false), Some(_)) => return Ok(Err(NotGranted::Joined)),
                (Ok(true), Some(joined)) => Precondition::AtRevision(joined.modified),
                (Ok(_), None) => Precondition::Absent,
            };
            let record = Joined { token: id.into(), key: key.into(), joined_ms: now };
            let text = serde_json::to_vec(&record).unwrap_or_default();
            let mut transaction = Transaction::new().put(joined_key(who), text, unchanged);
            let unchanged = Precondition::AtRevision(revision);
            transaction = if token.uses_left > 1 {
                let token = Token { uses_left: token.uses_left - 1, ..token };
                let text = serde_json::to_vec(&token).unwrap_or_default();
                transaction.put(token_key(id), text, unchanged)
            } else {
                transaction.delete(token_key(id), unchanged)
            };
            match self.put(transaction).await {
                Ok(()) => return Ok(Ok(())),
                Err(StoreError::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Err(NotGranted::Token))
    }

    /// A token whose secret this is, and which is still good for something.
    async fn valid_token(&self, id: &str, secret: &str) -> Result<Option<(Token, Revision)>, StoreError> {
        let Some(stored) = self.store.get(&token_key(id)).await? else { return Ok(None) };
        let Ok(token) = serde_json::from_slice::<Token>(&stored.value) else { return Ok(None) };
        let Some(secret) = Secret::parse(secret) else { return Ok(None) };
        let good = secret.digest() == SecretDigest::from_text(token.digest.as_str())
            && token.uses_left > 0
            && token.expires_ms > clock::now_ms();
        Ok(good.then_some((token, stored.modified)))
    }

    /// The operator whose token this is.
    pub(crate) fn operator(&self, text: &str) -> Option<(Who, Arc<[String]>)> {
        let mut parts = text.split('.');
        let (Some(OPERATOR_PREFIX), Some(id), Some(secret), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return None;
        };
        let secret = Secret::parse(secret)?;
        let state = self.state();
        let (token, _) = state.tokens.get(id)?;
        let Grant::Operator { name, groups } = &token.grant else { return None };
        let revoked = state.revocations.get(&of_operator(name));
        let revoked = revoked.is_some_and(|revoked| revoked.covers_token(name, token.created_ms));
        let good = secret.digest() == SecretDigest::from_text(token.digest.as_str())
            && token.expires_ms > clock::now_ms()
            && !revoked;
        good.then(|| (Who::Operator(name.clone()), groups.clone().into()))
    }

    /// Revokes from now on.
    pub(crate) async fn revoke(&self, revocation: &Revocation) -> Result<(), StoreError> {
        let text = serde_json::to_vec(revocation).unwrap_or_default();
        self.put(Transaction::new().put(revocation_key(&revocation.of), text, Precondition::Any)).await
    }

    /// All revocations.
    pub(crate) fn revocations(&self) -> Vec<Revocation> {
        self.state().revocations.values().cloned().collect()
    }

    /// Whether another revocation may be made.
    pub(crate) fn has_room_for_revocation(&self) -> bool {
        self.state().revocations.len() < REVOCATIONS_MAX
    }

    /// The moment as of which somebody's certificates are revoked, if they are, in milliseconds since 1970.
    pub(super) fn revoked_since(&self, identity: &Identity) -> Option<u64> {
        self.state().revocations.get(&of_holder(identity)).map(|revocation| revocation.since_ms)
    }

    /// Whether a certificate is revoked.
    pub(crate) fn is_revoked(&self, holder: &Holder) -> bool {
        let state = self.state();
        let of = [Revoked::Serial(holder.serial.clone()), of_holder(&holder.identity)];
        of.iter().filter_map(|of| state.revocations.get(of)).any(|revocation| revocation.covers(holder))
    }
}

/// An operator's token: what is kept of it, and its text.
pub(crate) fn operator_token(join: &JoinToken) -> String {
    format!("{OPERATOR_PREFIX}.{}.{}", join.id, join.secret.reveal())
}

/// Follows the store until `shutdown`, and ends the sessions of whoever is revoked.
pub(crate) async fn follow(
    context: Arc<Context>,
    mut shutdown: watch::Receiver<bool>,
) -> Result<(), StoreError> {
    let grants = &context.grants;
    let from = *grants.revision.borrow();
    let mut watch = grants.store.watch(PREFIX, from).await?;
    loop {
        let commits = tokio::select! {
            commits = watch.next() => commits?,
            () = stopped(&mut shutdown) => return Ok(()),
        };
        let changes = || commits.iter().flat_map(|commit| &commit.changes);
        {
            let mut state = grants.state.write().unwrap_or_else(PoisonError::into_inner);
            changes().for_each(|change| state.take_in(change));
        }
        grants.revision.send_replace(watch.position());
        // What a relay may do is asked anew when it comes back.
        let changed: Vec<_> = changes()
            .filter_map(|change| match read_key(&change.key)? {
                Key::Relay(name) => Some(Identity::Relay(name.to_owned())),
                Key::Token(_) | Key::Revocation(_) => None,
            })
            .collect();
        if !changed.is_empty() {
            context.sessions.registry.close_where(
                |holder| changed.contains(&holder.identity),
                || Status::unavailable("the hosts of this relay have changed"),
            );
        }
        // Most of what is written there is about sessions.
        if !changes().any(|change| matches!(read_key(&change.key), Some(Key::Revocation(_)))) {
            continue;
        }
        let revoked = |holder: &Holder| grants.is_revoked(holder);
        context
            .sessions
            .registry
            .close_where(revoked, || Status::unauthenticated("the certificate is revoked"));
        context.repository.view().wake_relays();
    }
}

impl Caller {
    /// Whoever a token says, from where this one comes.
    pub(crate) fn speaks_for(self, (who, groups): (Who, Arc<[String]>)) -> Self {
        Self { who, groups, certificate: None, ..self }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use bulkhead_identity::Authority;
    use bulkhead_store::Memory;

    use super::*;
    use crate::clock::jumps;

    #[tokio::test]
    async fn a_token_ends_by_the_time_of_day_and_a_revocation_does_not() {
        let authority = Authority::generate("test", SystemTime::now()).unwrap();
        let secret = JoinToken::generate(authority.certificate());
        let hour_ms = 3_600_000;
        let token = Token {
            id: secret.id.clone(),
            digest: secret.secret.digest().text().to_owned(),
            grant: Grant::Operator { name: "ann".into(), groups: Vec::new() },
            uses_left: 0,
            created_ms: clock::now_ms(),
            expires_ms: clock::now_ms() + 2 * hour_ms,
            by: "root".into(),
        };
        let ann = Identity::operator("ann", &[]).unwrap();
        let own = authority.issue(&ann, Duration::from_secs(86_400), SystemTime::now(), &[]).unwrap();
        let (holder, text) = (own.holder().unwrap(), operator_token(&secret));
        let store: Arc<dyn Store> = Arc::new(Memory::new());
        let put = Transaction::new().put(
            token_key(&token.id),
            serde_json::to_vec(&token).unwrap(),
            Precondition::Absent,
        );
        store.apply(put).await.unwrap();
        let grants = Grants::open(Arc::clone(&store)).await.unwrap();
        for (hours, good) in [(0, true), (1, true), (3, false), (-5, true), (0, true)] {
            jumps::set(hours);
            assert_eq!(grants.operator(&text).is_some(), good, "{hours} h");
            assert_eq!(grants.tokens().len(), usize::from(good), "{hours} h");
        }
        let revocation = Revocation {
            of: of_holder(&ann),
            since_ms: clock::now_ms() + 1,
            by: "root".into(),
            reason: String::new(),
        };
        let put = Transaction::new().put(
            revocation_key(&revocation.of),
            serde_json::to_vec(&revocation).unwrap(),
            Precondition::Absent,
        );
        store.apply(put).await.unwrap();
        let grants = Grants::open(store).await.unwrap();
        for hours in [0, 1, -5] {
            jumps::set(hours);
            assert!(grants.is_revoked(&holder) && grants.operator(&text).is_none(), "{hours} h");
        }
    }
}
