//! What sessions are told from: a controller's view of the repository, or a relay's copy of what it was told.

use std::sync::Arc;

use bulkhead_engine::SelectorId;
use bulkhead_model::Selector;
use tonic::Status;

use crate::members::{Audience, Difference, Member, SessionId, Subscriber};
use crate::repository::View;

/// Whether a selector's members are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answers {
    Now,
    /// They have been asked for: a barrier waits for them.
    Soon,
    /// Nobody can be asked now: barriers go on without them.
    Later,
}

/// Everything as of one revision, and who wants to hear of it.
pub(crate) trait Source {
    /// What is told to all agents, and for single hosts, with the sessions that are told, as of its revision.
    fn view(&self) -> &View;

    fn view_mut(&mut self) -> &mut View;

    fn answers(&self, id: SelectorId) -> Answers;

    /// Puts a selector in force for a session.
    fn subscribe(&mut self, selector: &Selector, subscriber: &Arc<Subscriber>) -> Result<SelectorId, Status>;

    /// Takes back one [`Source::subscribe`]; `still_read` says that the session has another of the same selector.
    fn unsubscribe(&mut self, id: SelectorId, session: SessionId, still_read: bool);

    /// What somebody that knows a selector's members as of `revision` has to be told; `None` if what changed since is no
    /// longer known.
    fn members_since(&self, id: SelectorId, to: &Audience, revision: u64) -> Option<Difference>;

    /// All members that somebody hears of, by name.
    fn members(&self, id: SelectorId, to: &Audience) -> Vec<Member>;
}

impl Source for View {
    fn view(&self) -> &View {
        self
    }

    fn view_mut(&mut self) -> &mut View {
        self
    }

    fn answers(&self, _id: SelectorId) -> Answers {
        Answers::Now
    }

    fn subscribe(&mut self, selector: &Selector, subscriber: &Arc<Subscriber>) -> Result<SelectorId, Status> {
        let revision = self.revision;
        Ok(self.members.subscribe(selector, subscriber, revision))
    }

    fn unsubscribe(&mut self, id: SelectorId, session: SessionId, still_read: bool) {
        self.members.unsubscribe(id, session, still_read);
    }

    fn members_since(&self, id: SelectorId, to: &Audience, revision: u64) -> Option<Difference> {
        Self::members_since(self, id, to, revision)
    }

    fn members(&self, id: SelectorId, to: &Audience) -> Vec<Member> {
        self.members.all(id, to)
    }
}
