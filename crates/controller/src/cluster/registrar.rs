//! Writes which sessions there are here: whatever waits is written together, so that a fleet that comes back at once costs
//! few transactions. No session waits for it.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_store::{Precondition, Revision, StoreError, Transaction};
use tokio::sync::watch;
use tonic::Status;

use super::records::{SessionRecord, encode, expired_key, session_key};
use super::{Cluster, follow};
use crate::context::{Context, stopped};
use crate::guard::Ends;
use crate::members::SessionId;

/// Hosts in one transaction, each with up to two operations: etcd takes 128 unless told otherwise, the store adds one.
const HOSTS_TOGETHER: usize = 60;
const _: () = assert!(HOSTS_TOGETHER * 2 < 128, "more than etcd takes unless told otherwise");
/// How long to wait before writing again what could not be written.
const RETRY_AFTER: Duration = Duration::from_millis(500);
/// Longest that the table may take to show what was written, before the check behind it is left to the next change.
const CATCH_UP_MAX: Duration = Duration::from_secs(10);

/// A session that is to stand in the store.
#[derive(Debug, Clone)]
struct Live {
    record: SessionRecord,
    admitted: Instant,
    /// The view's revision when it began: what the agent's workloads are compared with is not older.
    began: Revision,
    /// Whether it has stood in the store, and so may be older than what stands there now.
    known: bool,
}

/// What a host is to have in the store, and what it has.
#[derive(Debug, Default)]
struct Registration {
    live: Option<Live>,
    /// Revision in which we wrote its key, if it is there.
    written: Option<Revision>,
    queued: bool,
}

/// The sessions of this controller.
#[derive(Debug, Default)]
pub(super) struct Registrations {
    hosts: HashMap<Arc<str>, Registration>,
    queue: VecDeque<Arc<str>>,
}

impl Registrations {
    fn queue(&mut self, host: &Arc<str>) {
        if let Some(registration) = self.hosts.get_mut(host)
            && !std::mem::replace(&mut registration.queued, true)
        {
            self.queue.push_back(Arc::clone(host));
        }
    }

    /// Another controller has registered the host. Answers our session, if that is the older one.
    pub(super) fn taken(&mut self, host: &str, revision: Revision) -> Option<SessionId> {
        let registration = self.hosts.get_mut(host)?;
        // One that is still to be written is newer, or will find out.
        if registration.written.is_none_or(|written| written > revision) {
            return None;
        }
        registration.written = None;
        let session = registration.live.take().map(|live| live.record.session);
        if !registration.queued {
            self.hosts.remove(host);
        }
        session
    }

    /// A session is not to stand in the store any more. Answers whether it was to.
    fn lose(&mut self, host: &Arc<str>, session: SessionId) -> bool {
        let Some(registration) = self.hosts.get_mut(host) else { return false };
        let lost = registration.live.take_if(|live| live.record.session == session).is_some();
        if lost {
            self.queue(host);
        }
        lost
    }

    /// The host's key was removed. Answers whether it has to be written again.
    pub(super) fn removed(&mut self, host: &Arc<str>, revision: Revision) -> bool {
        let Some(registration) = self.hosts.get_mut(host) else { return false };
        if registration.written.is_none_or(|written| written > revision) {
            return false;
        }
        registration.written = None;
        self.queue(host);
        true
    }

    /// Nothing of what was written is there any more.
    pub(super) fn all_lost(&mut self) {
        let hosts: Vec<_> = self.hosts.keys().cloned().collect();
        for host in &hosts {
            if let Some(registration) = self.hosts.get_mut(host) {
                registration.written = None;
            }
            self.queue(host);
        }
    }

    fn take(&mut self) -> Vec<Arc<str>> {
        let count = self.queue.len().min(HOSTS_TOGETHER);
        let hosts: Vec<_> = self.queue.drain(..count).collect();
        for host in &hosts {
            if let Some(registration) = self.hosts.get_mut(host) {
                registration.queued = false;
            }
        }
        hosts
    }
}

/// Something of each of some hosts.
type ByHost<T> = Vec<(Arc<str>, T)>;

/// What is to be written of one host.
#[derive(Debug)]
enum Step {
    /// Its session.
    Put {
        live: Live,
        precondition: Precondition,
        /// The revision in which its workloads were removed, as far as is known.
        expired: Option<Revision>,
    },
    /// The key that was written in a revision goes.
    Delete(Revision),
}

impl Cluster {
    /// A session begins here. `began`: the view's revision.
    pub(crate) fn begin(
        &self,
        host: &Arc<str>,
        session: SessionId,
        since_ms: u64,
        ends: Option<Ends>,
        began: u64,
    ) {
        let end = |end: fn(&Ends) -> std::net::SocketAddr| {
            ends.as_ref().map_or_else(String::new, |ends| end(ends).to_string())
        };
        let record = SessionRecord {
            controller: self.own.name.clone(),
            since_ms,
            session,
            remote: end(|ends| ends.remote),
            local: end(|ends| ends.local),
        };
        let live = Live { record, admitted: Instant::now(), began: Revision(began), known: false };
        {
            let mut registrations = self.registrations();
            registrations.hosts.entry(Arc::clone(host)).or_default().live = Some(live);
            registrations.queue(host);
        }
        self.waiting.notify_one();
    }

    /// A session has ended here.
    pub(crate) fn end(&self, host: &Arc<str>, session: SessionId) {
        {
            let mut registrations = self.registrations();
            let Some(registration) = registrations.hosts.get_mut(host) else { return };
            if registration.live.take_if(|live| live.record.session == session).is_none() {
                return;
            }
            registrations.queue(host);
        }
        self.waiting.notify_one();
    }

    /// What is to be written now of hosts that wait, and sessions that others have overtaken.
    fn steps(&self, hosts: &[Arc<str>]) -> (ByHost<Step>, ByHost<SessionId>) {
        let table = self.table();
        let mut registrations = self.registrations();
        let (mut steps, mut lost) = (Vec::with_capacity(hosts.len()), Vec::new());
        for host in hosts {
            let Some(registration) = registrations.hosts.get_mut(host) else { continue };
            match (&registration.live, registration.written) {
                (None, None) => drop(registrations.hosts.remove(host)),
                (None, Some(written)) => steps.push((Arc::clone(host), Step::Delete(written))),
                (Some(live), Some(_)) if live.known => {}
                (Some(live), _) => {
                    // What has waited for longer than a lease lasts may be older than what stands there.
                    let newest = !live.known && live.admitted.elapsed() < self.ttl;
                    let precondition = match table.session(host) {
                        _ if newest => Precondition::Any,
                        None => Precondition::Absent,
                        Some((there, revision)) if there.controller == self.own.name => {
                            Precondition::AtRevision(revision)
                        }
                        Some(_) => {
                            lost.push((Arc::clone(host), live.record.session));
                            continue;
                        }
                    };
                    let (live, expired) = (live.clone(), table.expired(host));
                    steps.push((Arc::clone(host), Step::Put { live, precondition, expired }));
                }
            }
        }
        lost.retain(|(host, session)| registrations.lose(host, *session));
        (steps, lost)
    }

    fn transaction(&self, steps: &[(Arc<str>, Step)]) -> Transaction {
        let lease = self.lease();
        let mut transaction = Transaction::new();
        for (host, step) in steps {
            let key = session_key(host);
            transaction = match step {
                Step::Put { live, precondition, expired } => {
                    let transaction = match expired {
                        Some(_) => transaction.delete(expired_key(host), Precondition::Any),
                        None => transaction,
                    };
                    transaction.put_under(lease, key, encode(&live.record), *precondition)
                }
                Step::Delete(written) => transaction.delete(key, Precondition::AtRevision(*written)),
            };
        }
        transaction
    }

    /// Notes what was written. A session that has ended meanwhile is queued again.
    fn written(&self, steps: &[(Arc<str>, Step)], revision: Revision) {
        let mut registrations = self.registrations();
        for (host, step) in steps {
            let Some(registration) = registrations.hosts.get_mut(host) else { continue };
            match step {
                Step::Delete(written) => {
                    registration.written.take_if(|known| known == written);
                    if registration.live.is_none() && registration.written.is_none() && !registration.queued {
                        registrations.hosts.remove(host);
                    }
                }
                Step::Put { live, .. } => {
                    registration.written = Some(revision);
                    let session = live.record.session;
                    if let Some(live) = &mut registration.live
                        && live.record.session == session
                    {
                        live.known = true;
                    }
                }
            }
        }
    }
}

/// Writes what waits until `shutdown`; what is left then ends with the lease.
pub(crate) async fn register(context: Arc<Context>, mut shutdown: watch::Receiver<bool>) {
    loop {
        let hosts = context.cluster.registrations().take();
        if hosts.is_empty() {
            tokio::select! {
                () = context.cluster.waiting.notified() => continue,
                () = stopped(&mut shutdown) => return,
            }
        }
        tokio::select! {
            () = write(&context, &hosts) => {}
            () = stopped(&mut shutdown) => return,
        }
    }
}

async fn write(context: &Context, hosts: &[Arc<str>]) {
    let cluster = &context.cluster;
    let mut hosts = hosts.to_vec();
    loop {
        let (steps, lost) = cluster.steps(&hosts);
        for (host, session) in lost {
            close(context, &host, session);
        }
        if steps.is_empty() {
            return;
        }
        let lease = cluster.lease();
        match cluster.store.apply(cluster.transaction(&steps)).await {
            Ok(applied) => {
                context.metrics.registrations.add(1);
                cluster.written(&steps, applied.revision);
                settle(context, &steps, applied.revision).await;
                return;
            }
            Err(StoreError::Conflict { key, found, .. }) => {
                let Some((host, step)) = steps.iter().find(|(host, _)| session_key(host) == *key) else {
                    continue;
                };
                // Somebody was quicker. What is there now decides, once the table shows it.
                if let Step::Delete(written) = step {
                    let mut registrations = cluster.registrations();
                    if let Some(registration) = registrations.hosts.get_mut(host) {
                        registration.written.take_if(|known| known == written);
                    }
                }
                if let Some(found) = found {
                    cluster.catch_up(found).await;
                } else {
                    tokio::time::sleep(RETRY_AFTER).await;
                }
            }
            Err(StoreError::NoLease(_)) => {
                if let Err(error) = cluster.replace_lease(lease).await {
                    tracing::warn!(%error, "sessions cannot be registered: trying again");
                    tokio::time::sleep(RETRY_AFTER).await;
                }
            }
            Err(error) => {
                tracing::warn!(%error, hosts = hosts.len(), "sessions cannot be registered: trying again");
                tokio::time::sleep(RETRY_AFTER).await;
            }
        }
        // Those of which nothing is to be written any more are left out.
        hosts = steps.into_iter().map(|(host, _)| host).collect();
    }
}

/// Ends sessions that were overtaken while they were being registered. From the registration on nothing of their hosts
/// expires.
async fn settle(context: &Context, steps: &[(Arc<str>, Step)], revision: Revision) {
    let cluster = &context.cluster;
    cluster.catch_up(revision).await;
    for (host, step) in steps {
        let Step::Put { live, expired, .. } = step else { continue };
        let session = live.record.session;
        let (expired, overtaken) = {
            let table = cluster.table();
            let other = |there: &SessionRecord| there.controller != cluster.own.name;
            let overtaken = table.session(host).is_some_and(|(there, at)| other(there) && at > revision);
            (table.expired(host).or(*expired), overtaken)
        };
        if expired.is_some_and(|expired| expired > live.began) {
            let reason = "the host's workloads had expired: connect and publish again";
            context.sessions.registry.close_session(host, session, Status::aborted(reason));
        } else if overtaken && cluster.registrations().lose(host, session) {
            close(context, host, session);
        }
    }
}

fn close(context: &Context, host: &str, session: SessionId) {
    let by = context.cluster.table().session(host).map(|(there, _)| there.controller.clone());
    context.metrics.sessions_moved.add(1);
    context.sessions.registry.close_session(host, session, follow::moved(host, &by.unwrap_or_default()));
}

impl Cluster {
    /// Waits until the table shows a revision.
    pub(super) async fn catch_up(&self, revision: Revision) {
        let mut position = self.position.subscribe();
        let reached = position.wait_for(|position| *position >= revision);
        if tokio::time::timeout(CATCH_UP_MAX, reached).await.is_err() {
            tracing::error!(%revision, "what the controllers know of each other does not catch up with the store");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live(session: SessionId) -> Live {
        let none = String::new;
        let record =
            SessionRecord { controller: "a".into(), since_ms: 0, session, remote: none(), local: none() };
        Live { record, admitted: Instant::now(), began: Revision(1), known: false }
    }

    fn registered(session: SessionId, written: Option<u64>) -> (Registrations, Arc<str>) {
        let (mut registrations, host) = (Registrations::default(), Arc::<str>::from("h"));
        let registration =
            Registration { live: Some(live(session)), written: written.map(Revision), queued: false };
        registrations.hosts.insert(Arc::clone(&host), registration);
        (registrations, host)
    }

    #[test]
    fn of_two_controllers_the_one_that_registered_earlier_ends_its_session() {
        let (mut ours, host) = registered(7, Some(10));
        assert_eq!(ours.taken(&host, Revision(9)), None, "ours is the later one");
        assert_eq!(ours.taken(&host, Revision(11)), Some(7));
        assert!(ours.hosts.is_empty(), "nothing is left to be written");
        let (mut ours, host) = registered(8, None);
        assert_eq!(
            ours.taken(&host, Revision(11)),
            None,
            "ours is still to be written, and is the later one"
        );
    }

    #[test]
    fn a_key_that_is_gone_is_written_again_unless_it_was_an_earlier_one() {
        let (mut ours, host) = registered(7, Some(10));
        assert!(!ours.removed(&host, Revision(9)));
        assert!(ours.take().is_empty());
        assert!(ours.removed(&host, Revision(12)));
        assert_eq!(ours.take(), [host]);
    }

    #[test]
    fn a_fleet_that_comes_back_is_written_in_few_parts_and_each_host_once() {
        let mut ours = Registrations::default();
        for number in 0..5000 {
            let host: Arc<str> = format!("h{number}").into();
            ours.hosts.entry(Arc::clone(&host)).or_default().live = Some(live(number));
            ours.queue(&host);
            ours.queue(&host);
        }
        let parts: Vec<_> =
            std::iter::from_fn(|| Some(ours.take()).filter(|part| !part.is_empty())).collect();
        assert_eq!(parts.len(), 5000_usize.div_ceil(HOSTS_TOGETHER));
        assert_eq!(parts.iter().map(Vec::len).sum::<usize>(), 5000);
    }
}
