//! What readers and writers at once see can be put into one order in which each call happens at some moment between its
//! beginning and its end (linearizability), checked for each key by itself, which is enough.
//!
//! The checker searches for such an order as Wing and Gong did, and as Lowe made it fast: a set of calls that are done and the
//! value that they left is looked at once. A write without an answer may have happened at any time from its beginning on, or
//! never. It is a hundred lines; stateright's tester does the same among 39 crates.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bulkhead_store::{
    Embedded, Etcd, EtcdOptions, Memory, Precondition, Revision, Store, StoreError, Transaction,
};

use crate::etcd_server::EtcdServer;

const KEYS: usize = 3;
const CLIENTS: u64 = 6;
/// Calls of each client.
const CALLS: u64 = 60;
/// Who waits longer for an answer than this does not want it any more. Short, so that a killed etcd leaves such.
const PATIENCE: Duration = Duration::from_millis(250);
/// How often etcd is killed while the clients go on.
const KILLS: usize = 3;

/// Every value is written once; `None` is no such key.
type Value = Option<u64>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    /// What was read.
    Get(Value),
    /// Compare and set.
    Set { expected: Value, new: Value, outcome: Outcome },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Done,
    Refused,
    Unknown,
}

/// A call, and when it began and ended by a clock that all clients read.
#[derive(Debug, Clone, Copy)]
struct Event {
    call: Call,
    began: u64,
    ended: u64,
}

impl Call {
    /// What the key holds after it, if it can have happened when the key held `before`.
    fn after(self, before: Value) -> Option<Value> {
        match self {
            Self::Get(seen) => (seen == before).then_some(before),
            Self::Set { expected, outcome: Outcome::Refused, .. } => (expected != before).then_some(before),
            Self::Set { expected, new, .. } => (expected == before).then_some(new),
        }
    }

    /// Whether it may as well never have happened.
    fn is_optional(self) -> bool {
        matches!(self, Self::Set { outcome: Outcome::Unknown, .. })
    }
}

/// Whether there is an order that explains a key's calls, which begins without the key.
fn is_linearizable(events: &[Event]) -> bool {
    let mut events = events.to_vec();
    for event in &mut events {
        if event.call.is_optional() {
            event.ended = u64::MAX;
        }
    }
    events.sort_by_key(|event| event.began);
    let done = vec![0_u64; events.len().div_ceil(64)];
    let mut seen = HashSet::new();
    let mut stack = vec![(done, None)];
    while let Some((done, value)) = stack.pop() {
        let is_done = |at: usize| done[at / 64] & (1 << (at % 64)) != 0;
        let open = || events.iter().enumerate().filter(|(at, _)| !is_done(*at));
        if open().all(|(_, event)| event.call.is_optional()) {
            return true;
        }
        // What begins after another has ended cannot come before it.
        let first_end = open().map(|(_, event)| event.ended).min().unwrap_or(u64::MAX);
        for (at, event) in open().take_while(|(_, event)| event.began < first_end) {
            if let Some(after) = event.call.after(value) {
                let mut next = done.clone();
                next[at / 64] |= 1 << (at % 64);
                if seen.insert((next.clone(), after)) {
                    stack.push((next, after));
                }
            }
        }
    }
    false
}

/// What all clients did, by key.
#[derive(Debug, Default)]
struct History {
    clock: AtomicU64,
    values: AtomicU64,
    events: Mutex<HashMap<usize, Vec<Event>>>,
}

impl History {
    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn note(&self, key: usize, began: u64, call: Call) {
        let event = Event { call, began, ended: self.now() };
        self.events.lock().unwrap().entry(key).or_default().push(event);
    }

    fn count(&self, which: impl Fn(&Call) -> bool) -> usize {
        self.events.lock().unwrap().values().flatten().filter(|event| which(&event.call)).count()
    }

    fn is_linearizable(&self) -> bool {
        self.events.lock().unwrap().values().all(|events| is_linearizable(events))
    }
}

/// What a client knows of a key.
type Known = (Value, Option<Revision>);

/// Reads a key; a read without an answer says nothing and is not noted.
async fn get(store: &dyn Store, history: &History, key: usize) -> Option<Known> {
    let began = history.now();
    let answer = tokio::time::timeout(PATIENCE, store.get(&format!("/{key}"))).await.ok()?.ok()?;
    let value = answer.as_ref().map(|object| std::str::from_utf8(&object.value).unwrap().parse().unwrap());
    history.note(key, began, Call::Get(value));
    Some((value, answer.map(|object| object.modified)))
}

async fn set(store: &dyn Store, history: &History, key: usize, (expected, at): Known, remove: bool) {
    let name = format!("/{key}");
    let when = at.map_or(Precondition::Absent, Precondition::AtRevision);
    let new = (!remove).then(|| history.values.fetch_add(1, Ordering::Relaxed));
    let transaction = match new {
        Some(value) => Transaction::new().put(name, value.to_string(), when),
        None => Transaction::new().delete(name, when),
    };
    let began = history.now();
    let outcome = match tokio::time::timeout(PATIENCE, store.apply(transaction)).await {
        Ok(Ok(_)) => Outcome::Done,
        Ok(Err(StoreError::Conflict { .. })) => Outcome::Refused,
        Ok(Err(StoreError::OutcomeUnknown { .. })) | Err(_) => Outcome::Unknown,
        Ok(Err(error)) => panic!("{error}"),
    };
    history.note(key, began, Call::Set { expected, new, outcome });
}

/// Numbers that look random, and are the same each time.
fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// Reads, and writes under the condition that nothing has changed since it read, now and then with what it knew before.
async fn client(store: Arc<dyn Store>, history: Arc<History>, number: u64) {
    let mut random = number;
    let mut known: [Option<Known>; KEYS] = [None; KEYS];
    for _ in 0..CALLS {
        let key = usize::try_from(next_random(&mut random)).unwrap() % KEYS;
        let old = known[key];
        if let Some(fresh) = get(&*store, &history, key).await {
            known[key] = Some(fresh);
            match next_random(&mut random) % 8 {
                0 => {}
                1 => {
                    set(&*store, &history, key, old.filter(|old| old.0.is_some()).unwrap_or(fresh), false)
                        .await
                }
                2 if fresh.0.is_some() => set(&*store, &history, key, fresh, true).await,
                _ => set(&*store, &history, key, fresh, false).await,
            }
        }
    }
}

/// Lets the clients work on the stores, which are one and the same beneath.
async fn record(stores: &[Arc<dyn Store>]) -> Arc<History> {
    let history = Arc::new(History::default());
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let store = Arc::clone(&stores[usize::try_from(number).unwrap() % stores.len()]);
            tokio::spawn(client(store, Arc::clone(&history), number))
        })
        .collect();
    for client in clients {
        client.await.unwrap();
    }
    history
}

fn is_done(call: &Call) -> bool {
    matches!(call, Call::Set { outcome: Outcome::Done, .. })
}

fn is_refused(call: &Call) -> bool {
    matches!(call, Call::Set { outcome: Outcome::Refused, .. })
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_linearizable() {
    let history = record(&[Arc::new(Memory::new())]).await;
    assert!(history.count(is_done) > 100);
    assert!(history.is_linearizable(), "{history:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn embedded_is_linearizable() {
    let directory = tempfile::tempdir().unwrap();
    let history = record(&[Arc::new(Embedded::open(directory.path()).unwrap())]).await;
    assert!(history.count(is_done) > 50 && history.count(is_refused) > 10);
    assert!(history.is_linearizable(), "{history:?}");
}

/// Two stores at one etcd, as two controllers have them, while it is killed and started again.
#[tokio::test(flavor = "multi_thread")]
async fn etcd_is_linearizable_though_it_is_killed() {
    let mut server = EtcdServer::start();
    let options = EtcdOptions::new(vec![server.endpoint()], "/bulkhead");
    let mut stores: Vec<Arc<dyn Store>> = Vec::new();
    for _ in 0..2 {
        stores.push(Arc::new(Etcd::open(&options).await.unwrap()));
    }
    let watched = Arc::clone(&stores[0]);
    let mut watch = watched.watch("/", Revision(0)).await.unwrap();
    let recording = tokio::spawn(async move { record(&stores).await });
    let mut position = Revision(0);
    for _ in 0..KILLS {
        // Somebody has written since: they are in the midst of it.
        while watch.position() <= position && !recording.is_finished() {
            tokio::time::timeout(Duration::from_secs(20), watch.step()).await.unwrap().unwrap();
        }
        position = watch.position();
        server.kill();
        server.restart();
    }
    let history = recording.await.unwrap();
    let unknown = history.count(|call| matches!(call, Call::Set { outcome: Outcome::Unknown, .. }));
    println!("{} done, {} refused, {unknown} unknown", history.count(is_done), history.count(is_refused));
    assert!(history.count(is_done) > 10, "the clients came through");
    assert!(history.is_linearizable(), "{history:?}");
}

/// A store that reads from what was there a while ago must be found out.
#[tokio::test(flavor = "multi_thread")]
async fn stale_reads_are_found_out() {
    let store = Memory::new();
    let history = History::default();
    let mut stale = None;
    for round in 0..20 {
        let fresh = get(&store, &history, 0).await.unwrap();
        if round % 7 == 0 {
            stale = Some(fresh.0);
        }
        set(&store, &history, 0, fresh, false).await;
    }
    assert!(history.is_linearizable());
    let began = history.now();
    history.note(0, began, Call::Get(stale.unwrap()));
    assert!(!history.is_linearizable());
}

#[test]
fn wrong_histories_are_refused_and_right_ones_are_not() {
    let get = |value, began, ended| Event { call: Call::Get(value), began, ended };
    let set = |expected, new, outcome, began, ended| Event {
        call: Call::Set { expected, new, outcome },
        began,
        ended,
    };
    use Outcome::{Done, Refused, Unknown};
    let right: [&[Event]; 6] = [
        &[set(None, Some(1), Done, 0, 1), get(Some(1), 2, 3)],
        // At the same time, either order will do.
        &[set(None, Some(1), Done, 0, 3), get(None, 1, 2)],
        &[set(None, Some(1), Done, 0, 3), get(Some(1), 1, 2)],
        // Nobody knows of a write: it may be seen late, or never.
        &[set(None, Some(1), Unknown, 0, 1), get(None, 2, 3), get(Some(1), 4, 5)],
        &[set(None, Some(1), Unknown, 0, 1), get(None, 2, 3)],
        &[set(None, Some(1), Done, 0, 4), set(None, Some(2), Refused, 1, 5)],
    ];
    for events in right {
        assert!(is_linearizable(events), "{events:?}");
    }
    let wrong: [&[Event]; 7] = [
        // An acknowledged write is lost.
        &[set(None, Some(1), Done, 0, 1), get(None, 2, 3)],
        // Two have written in place of the same value.
        &[set(None, Some(1), Done, 0, 2), set(None, Some(2), Done, 1, 3)],
        // A value that nobody has written.
        &[get(Some(1), 0, 1)],
        // Back to an old value.
        &[set(None, Some(1), Done, 0, 5), get(Some(1), 1, 2), get(None, 3, 4)],
        // Refused, though there was no reason.
        &[set(None, Some(1), Refused, 0, 1)],
        // A refused write is seen.
        &[set(None, Some(1), Done, 0, 1), set(None, Some(2), Refused, 2, 3), get(Some(2), 4, 5)],
        // A write that nobody knows of has happened, and then has not.
        &[set(None, Some(1), Unknown, 0, 1), get(Some(1), 2, 3), get(None, 4, 5)],
    ];
    for events in wrong {
        assert!(!is_linearizable(events), "{events:?}");
    }
}
