//! What an agent has to be told: computed from the view as of one revision, whenever something concerns it.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use bulkhead_engine::SelectorId;
use bulkhead_model::Selector;
use bulkhead_wire::proto;
use bulkhead_wire::proto::controller_message::Body;
use tonic::Status;

use super::messages;
use crate::members::Subscriber;
use crate::repository::View;

/// Most subscriptions of one agent.
const SUBSCRIPTIONS_MAX: usize = 20_000;

#[derive(Debug)]
struct Subscription {
    selector: SelectorId,
    /// The agent knows the members as of this revision, and of a later one if nothing has changed until then; `None`:
    /// nothing.
    known: Option<u64>,
}

/// How far an agent has been told.
#[derive(Debug)]
pub(super) struct Pump {
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
    pub(super) fn new(subscriber: Arc<Subscriber>, resources_known: Option<u64>, unpacks: bool) -> Self {
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

    pub(super) fn subscriptions(&self) -> usize {
        self.subscriptions.len()
    }

    /// Takes in a subscription; `known` is the revision that the agent says it knows the members as of.
    pub(super) fn subscribe(
        &mut self,
        view: &mut View,
        subscribe: &proto::Subscribe,
        known: Option<u64>,
    ) -> Result<(), Status> {
        let proto::Subscribe { handle, selector, .. } = subscribe;
        if self.subscriptions.len() >= SUBSCRIPTIONS_MAX {
            return Err(Status::resource_exhausted(format!(
                "an agent may have {SUBSCRIPTIONS_MAX} subscriptions"
            )));
        }
        if self.subscriptions.contains_key(handle) {
            return Err(Status::invalid_argument(format!("handle {handle} is in use")));
        }
        let selector = Selector::parse_canonical(selector)
            .map_err(|error| Status::invalid_argument(format!("subscription {handle}: {error}")))?;
        let revision = view.revision;
        let selector = view.members.subscribe(&selector, &self.subscriber, revision);
        self.subscriptions.insert(*handle, Subscription { selector, known });
        self.by_selector.entry(selector).or_default().push(*handle);
        self.new.insert(*handle);
        Ok(())
    }

    /// Ends a subscription.
    pub(super) fn unsubscribe(&mut self, view: &mut View, handle: u32) {
        let Some(gone) = self.subscriptions.remove(&handle) else { return };
        self.new.remove(&handle);
        let handles = self.by_selector.entry(gone.selector).or_default();
        handles.retain(|other| *other != handle);
        let still_read = !handles.is_empty();
        if !still_read {
            self.by_selector.remove(&gone.selector);
        }
        view.members.unsubscribe(gone.selector, self.subscriber.id, still_read);
    }

    /// Everything ends.
    pub(super) fn close(&mut self, view: &mut View) {
        for (_, gone) in self.subscriptions.drain() {
            view.members.unsubscribe(gone.selector, self.subscriber.id, false);
        }
        view.remove_session(self.subscriber.id);
    }

    /// What there is to tell now, with the barrier last; empty if there is nothing.
    pub(super) fn messages(&mut self, view: &View) -> Vec<Body> {
        let mut messages = self.resources(view);
        let host = &self.subscriber.host;
        // Of the others nothing has changed, but perhaps for workloads of its own host, of which it does not hear.
        let changed = self.subscriber.take_changed();
        let changed = changed.iter().filter_map(|selector| self.by_selector.get(selector)).flatten();
        let changed: BTreeSet<u32> = changed.chain(&self.new).copied().collect();
        for handle in changed {
            let Some(subscription) = self.subscriptions.get_mut(&handle) else { continue };
            messages.extend(subscription.messages(view, handle, host, self.new.contains(&handle)));
        }
        self.new.clear();
        if messages.is_empty() && !self.unanswered {
            return messages;
        }
        self.unanswered = false;
        messages.push(messages::synced(view.revision));
        messages
    }

    fn resources(&mut self, view: &View) -> Vec<Body> {
        let known = self.resources_known.replace(view.revision);
        if known.is_some_and(|known| known <= view.revision && known >= view.resources_newest()) {
            return Vec::new();
        }
        match known.and_then(|known| view.resources_since(known, &self.subscriber.host)) {
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
                let own = view.resources_of_host(&self.subscriber.host);
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
    fn messages(&mut self, view: &View, handle: u32, host: &str, unanswered: bool) -> Vec<Body> {
        let known = self.known.replace(view.revision);
        match known.and_then(|known| view.members_since(self.selector, host, known)) {
            Some(difference) => {
                if !unanswered && difference.joins.is_empty() && difference.leaves.is_empty() {
                    return Vec::new();
                }
                messages::members(handle, false, view.revision, &difference.joins, &difference.leaves)
            }
            None => {
                let joins = view.members.all(self.selector, host);
                messages::members(handle, true, view.revision, &joins, &[])
            }
        }
    }
}

#[cfg(test)]
mod tests;
