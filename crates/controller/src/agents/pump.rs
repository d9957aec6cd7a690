//! What an agent has to be told: computed from the view as of one revision, whenever something concerns it.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use bulkhead_engine::SelectorId;
use bulkhead_model::Selector;
use bulkhead_wire::proto;
use tonic::Status;

use super::messages::{self, Message};
use super::source::{Answers, Source};
use crate::members::{Audience, Subscriber};
use crate::repository::View;

/// Most subscriptions of one agent.
const SUBSCRIPTIONS_MAX: usize = 20_000;
/// Most subscriptions of a relay: of a site's agents together.
pub(crate) const RELAY_SUBSCRIPTIONS_MAX: usize = 100_000;

#[derive(Debug)]
struct Subscription {
    selector: SelectorId,
    /// The agent knows the members as of this revision, and of a later one if nothing has changed until then; `None`:
    /// nothing.
    known: Option<u64>,
}

/// How far an agent has been told.
#[derive(Debug)]
pub(crate) struct Pump {
    subscriber: Arc<Subscriber>,
    /// It knows tiers and policies as of this revision; `None`: nothing.
    resources_known: Option<u64>,
    subscriptions: HashMap<u32, Subscription>,
    /// Subscriptions of each selector: mostly one.
    by_selector: HashMap<SelectorId, Vec<u32>>,
    /// Subscriptions that have not been answered yet.
    new: BTreeSet<u32>,
    /// Whether it can read packed resources.
    unpacks: bool,
    /// Whether it waits for a barrier even if there is nothing before it.
    unanswered: bool,
}

impl Pump {
    /// For an agent that says it knows everything up to `resources_known`.
    pub(crate) fn new(subscriber: Arc<Subscriber>, resources_known: Option<u64>, unpacks: bool) -> Self {
        Self {
            subscriber,
            resources_known,
            subscriptions: HashMap::new(),
            by_selector: HashMap::new(),
            new: BTreeSet::new(),
            unpacks,
            unanswered: true,
        }
    }

    pub(crate) fn subscriptions(&self) -> usize {
        self.subscriptions.len()
    }

    /// Takes in a subscription; `known` is the revision that the agent says it knows the members as of.
    pub(crate) fn subscribe(
        &mut self,
        source: &mut impl Source,
        subscribe: &proto::Subscribe,
        known: Option<u64>,
    ) -> Result<(), Status> {
        let proto::Subscribe { handle, selector, .. } = subscribe;
        let most = match self.subscriber.audience {
            Audience::Host(_) => SUBSCRIPTIONS_MAX,
            Audience::Relay(_) => RELAY_SUBSCRIPTIONS_MAX,
        };
        if self.subscriptions.len() >= most {
            return Err(Status::resource_exhausted(format!("there may be {most} subscriptions")));
        }
        if self.subscriptions.contains_key(handle) {
            return Err(Status::invalid_argument(format!("handle {handle} is in use")));
        }
        let selector = Selector::parse_canonical(selector)
            .map_err(|error| Status::invalid_argument(format!("subscription {handle}: {error}")))?;
        let selector = source.subscribe(&selector, &self.subscriber)?;
        self.subscriptions.insert(*handle, Subscription { selector, known });
        self.by_selector.entry(selector).or_default().push(*handle);
        self.new.insert(*handle);
        Ok(())
    }

    /// Ends a subscription.
    pub(crate) fn unsubscribe(&mut self, source: &mut impl Source, handle: u32) {
        let Some(gone) = self.subscriptions.remove(&handle) else { return };
        self.new.remove(&handle);
        let handles = self.by_selector.entry(gone.selector).or_default();
        handles.retain(|other| *other != handle);
        let still_read = !handles.is_empty();
        if !still_read {
            self.by_selector.remove(&gone.selector);
        }
        source.unsubscribe(gone.selector, self.subscriber.id, still_read);
    }

    /// Everything ends.
    pub(crate) fn close(&mut self, source: &mut impl Source) {
        for (_, gone) in self.subscriptions.drain() {
            source.unsubscribe(gone.selector, self.subscriber.id, false);
        }
        source.view_mut().remove_session(self.subscriber.id);
    }

    /// What there is to tell now, with the barrier last; empty if there is nothing, or a subscription is about to be answered
    /// for which the barrier waits.
    pub(crate) fn messages(&mut self, source: &impl Source) -> Vec<Message> {
        let answers = |handle: &u32| {
            let subscription = self.subscriptions.get(handle);
            subscription.map_or(Answers::Now, |one| source.answers(one.selector))
        };
        if self.new.iter().any(|handle| answers(handle) == Answers::Soon) {
            return Vec::new();
        }
        let later: BTreeSet<u32> =
            self.new.iter().filter(|handle| answers(handle) == Answers::Later).copied().collect();
        let view = source.view();
        let mut messages = self.resources(view);
        let to = &self.subscriber.audience;
        // Of the others nothing has changed, but perhaps for workloads of its own host, of which it does not hear.
        let changed = self.subscriber.take_changed();
        let changed = changed.iter().filter_map(|selector| self.by_selector.get(selector)).flatten();
        let changed: BTreeSet<u32> = changed.chain(&self.new).copied().collect();
        for handle in changed.difference(&later).copied() {
            let Some(subscription) = self.subscriptions.get_mut(&handle) else { continue };
            messages.extend(subscription.messages(source, handle, to, self.new.contains(&handle)));
        }
        self.new = later;
        if messages.is_empty() && !self.unanswered {
            return messages;
        }
        self.unanswered = false;
        messages.push(messages::synced(view.revision));
        messages
    }

    fn resources(&mut self, view: &View) -> Vec<Message> {
        let known = self.resources_known.replace(view.revision);
        if known.is_some_and(|known| known <= view.revision && known >= view.resources_newest()) {
            return Vec::new();
        }
        match known.and_then(|known| view.resources_since(known, &self.subscriber.audience)) {
            Some(changes) if changes.is_empty() => Vec::new(),
            Some(changes) => {
                let (mut upserts, mut removes) = (Vec::new(), Vec::new());
                for (key, object) in changes {
                    match object {
                        Some(object) => upserts.push(object.json().clone()),
                        None => removes.push(key),
                    }
                }
                messages::resources(false, view.revision, upserts, removes)
            }
            None => {
                // Predefined tiers that nobody has written are known to every agent.
                let own = view.resources_of_host(&self.subscriber.audience);
                let own = own.map(|object| object.json().clone());
                if self.unpacks {
                    return messages::packed_resources(
                        view.revision,
                        &view.packed_resources(),
                        own.collect(),
                    );
                }
                let upserts = view.written_resources().chain(own).collect();
                messages::resources(true, view.revision, upserts, Vec::new())
            }
        }
    }
}

impl Subscription {
    /// Also if nothing changed, where it must be answered.
    fn messages(
        &mut self,
        source: &impl Source,
        handle: u32,
        to: &Audience,
        unanswered: bool,
    ) -> Vec<Message> {
        let revision = source.view().revision;
        let known = self.known.replace(revision);
        match known.and_then(|known| source.members_since(self.selector, to, known)) {
            Some(difference) => {
                if !unanswered && difference.joins.is_empty() && difference.leaves.is_empty() {
                    return Vec::new();
                }
                messages::members(handle, false, revision, &difference.joins, difference.leaves)
            }
            None => {
                let joins = source.members(self.selector, to);
                messages::members(handle, true, revision, &joins, Vec::new())
            }
        }
    }
}

#[cfg(test)]
impl Pump {
    /// [`Pump::messages`] as the agent reads them.
    pub(crate) fn bodies(&mut self, source: &impl Source) -> Vec<proto::controller_message::Body> {
        self.messages(source).iter().map(Message::body).collect()
    }
}

#[cfg(test)]
mod tests;
