//! In which order agents are told of what all of them hear of.
//!
//! A changed policy goes to every agent, and most have nobody whom it selects. Were thousands woken together, those who wait for
//! it would stand anywhere in the queue, and so would whoever is told about workloads meanwhile. So the agents that it is for are
//! woken first, and the others a few at a time.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_model::{Meaning, Selector};
use tokio::time::Instant;

use crate::members::{Audience, Members, SessionId, Subscriber};

/// Agents that are woken together, for each core.
const TOGETHER: usize = 32;
/// Time from some to the next: 6400 agents in a second for each core, as many as one can tell.
const PAUSE: Duration = Duration::from_millis(5);

/// Agents that a change concerns, and all others.
#[derive(Debug, Default)]
pub(crate) struct Hearers {
    pub(crate) concerned: Vec<Arc<Subscriber>>,
    pub(crate) others: Vec<Arc<Subscriber>>,
}

/// Whom a change of what all agents hear of is for.
#[derive(Debug, Default)]
pub(super) enum Reach {
    #[default]
    Nobody,
    /// The hosts of those whom these select.
    Selected(Vec<Selector>),
    Everybody,
}

impl Reach {
    /// Takes in what an object meant or means.
    pub(super) fn add(&mut self, meaning: &Meaning) {
        let Meaning { tiers, policies, entities, bequests, settings, .. } = meaning;
        let only_policies =
            tiers.is_empty() && entities.is_empty() && bequests.is_empty() && settings.is_none();
        match self {
            _ if !only_policies => *self = Self::Everybody,
            Self::Everybody => {}
            Self::Nobody => {
                *self =
                    Self::Selected(policies.iter().map(|(_, policy)| policy.applies_to.clone()).collect());
            }
            Self::Selected(all) => all.extend(policies.iter().map(|(_, policy)| policy.applies_to.clone())),
        }
    }

    /// The sessions that it concerns, and the others.
    pub(super) fn hearers<'a>(
        &self,
        members: &mut Members,
        sessions: impl Iterator<Item = &'a Arc<Subscriber>>,
    ) -> Hearers {
        let hosts = match self {
            Self::Nobody => return Hearers::default(),
            Self::Selected(selectors) => members.hosts_of(selectors),
            Self::Everybody => None,
        };
        let is_concerned = |session: &Arc<Subscriber>| match (&hosts, &session.audience) {
            (Some(hosts), Audience::Host(host)) => hosts.contains(host),
            // A relay has others to tell.
            (None, _) | (_, Audience::Relay(_)) => true,
        };
        let (concerned, others) = sessions.cloned().partition(is_concerned);
        Hearers { concerned, others }
    }
}

/// Sessions in a row, each once.
#[derive(Debug, Default)]
struct Row {
    sessions: VecDeque<Arc<Subscriber>>,
    known: HashSet<SessionId>,
}

impl Row {
    fn push(&mut self, session: Arc<Subscriber>) {
        if self.known.insert(session.id) {
            self.sessions.push_back(session);
        }
    }

    fn pop(&mut self) -> Option<Arc<Subscriber>> {
        let session = self.sessions.pop_front()?;
        self.known.remove(&session.id);
        Some(session)
    }
}

/// Who is still to be woken: never more than twice as many as there are sessions.
#[derive(Debug)]
pub(super) struct Herald {
    together: usize,
    concerned: Row,
    others: Row,
    /// When the next ones are woken, if anybody waits.
    due: Option<Instant>,
}

impl Herald {
    /// For a machine of so many cores.
    pub(super) fn new(cores: usize) -> Self {
        Self { together: TOGETHER * cores, concerned: Row::default(), others: Row::default(), due: None }
    }

    /// These are to be told; the first of them are woken now if nobody else waits.
    pub(super) fn add(&mut self, hearers: Hearers) {
        let idle = self.is_idle();
        hearers.concerned.into_iter().for_each(|session| self.concerned.push(session));
        hearers.others.into_iter().for_each(|session| self.others.push(session));
        if idle {
            self.wake_some();
        }
    }

    /// Whether nobody waits.
    pub(super) fn is_idle(&self) -> bool {
        self.concerned.sessions.is_empty() && self.others.sessions.is_empty()
    }

    /// Wakes the next ones.
    pub(super) fn wake_some(&mut self) {
        self.due = None;
        for _ in 0..self.together {
            let Some(session) = self.concerned.pop().or_else(|| self.others.pop()) else { return };
            session.wake.notify_one();
        }
        self.due = Some(Instant::now() + PAUSE);
    }

    /// Completes when it is time to wake the next ones; never if nobody waits.
    pub(super) async fn pause(&self) {
        match self.due {
            Some(due) => tokio::time::sleep_until(due).await,
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn sessions(ids: std::ops::Range<u64>) -> Vec<Arc<Subscriber>> {
        ids.map(|id| Arc::new(Subscriber::new(id, format!("h{id}").into()))).collect()
    }

    fn woken(sessions: &[Arc<Subscriber>]) -> usize {
        sessions.iter().filter(|session| session.wake.notified().now_or_never().is_some()).count()
    }

    #[test]
    fn whom_it_concerns_is_woken_first_and_everybody_in_the_end() {
        let (first, second, others) = (sessions(0..10), sessions(10..20), sessions(20..220));
        let mut herald = Herald::new(2);
        herald.add(Hearers { concerned: first.clone(), others: others.clone() });
        assert_eq!((woken(&first), woken(&others)), (10, 54));
        // Somebody who waits as one of the others is concerned by the next change.
        let both = vec![Arc::clone(&others[199])];
        herald.add(Hearers { concerned: [second.clone(), both].concat(), others: others[100..150].to_vec() });
        assert_eq!(woken(&second), 0);
        herald.wake_some();
        assert_eq!((woken(&second), woken(&others[199..])), (10, 1));
        let mut turns = 0;
        while !herald.is_idle() {
            herald.wake_some();
            turns += 1;
        }
        assert_eq!(turns, 2, "each waits once: of 200 others 54 and then 53 were woken before");
    }
}
