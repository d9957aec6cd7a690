//! etcd's watch as ours: it survives the loss of a member, and knows how far it has come.
//!
//! Everything below the store's prefix is watched and what does not concern the caller left out here. Each of our
//! transactions writes its slot there, so a watch hears of every one of them, in order with the objects, and its position
//! passes over those that do not concern it at once. (etcd's progress on demand would be the other way, but before
//! 3.4.25 and 3.5.8 it may run ahead of the changes.) Of what others write outside the prefix it hears when etcd tells
//! its progress by itself, every ten minutes.

use std::sync::Arc;

use etcd_client::{Event, EventType, GetOptions, WatchOptions, WatchResponse, WatchStream};
use tokio::sync::{mpsc, watch as signal};

use crate::types::{Change, Commit, Revision, StoreError};

use super::cluster::{ANSWER_BYTES_MAX, Backoff, COMPACTED, Cluster, Failed, revision, revision_of};
use super::number;

/// Messages of etcd that wait for a slow reader; etcd keeps what comes after.
const QUEUE_LEN: usize = 16;
/// The revision of an empty etcd, before which nothing was.
const FIRST: Revision = Revision(1);

/// A watch's end at the reader.
#[derive(Debug)]
pub(crate) struct EtcdWatch {
    incoming: mpsc::Receiver<Result<Step, StoreError>>,
    /// What was received while waiting.
    next: Option<Result<Step, StoreError>>,
    /// Why there is no more.
    over: Option<StoreError>,
    position: Revision,
}

/// One message.
#[derive(Debug)]
struct Step {
    commits: Vec<Arc<Commit>>,
    position: Revision,
}

impl EtcdWatch {
    pub(super) fn start(
        cluster: Arc<Cluster>,
        epoch: String,
        prefix: &str,
        from: Revision,
        stream: WatchStream,
        closed: signal::Receiver<()>,
    ) -> Self {
        let (outgoing, incoming) = mpsc::channel(QUEUE_LEN);
        let follower = Follower { cluster, epoch, prefix: prefix.to_owned(), position: from, outgoing };
        tokio::spawn(follower.run(stream, closed));
        Self { incoming, next: None, over: None, position: from }
    }

    pub(crate) fn position(&self) -> Revision {
        self.position
    }

    pub(crate) fn ready(&mut self) -> Result<Vec<Arc<Commit>>, StoreError> {
        loop {
            if let Some(over) = &self.over {
                return Err(over.clone());
            }
            let step = match self.next.take() {
                Some(step) => step,
                None => match self.incoming.try_recv() {
                    Ok(step) => step,
                    Err(mpsc::error::TryRecvError::Empty) => return Ok(Vec::new()),
                    Err(mpsc::error::TryRecvError::Disconnected) => Err(StoreError::Closed),
                },
            };
            match step {
                Ok(step) => {
                    self.position = self.position.max(step.position);
                    if !step.commits.is_empty() {
                        return Ok(step.commits);
                    }
                }
                Err(error) => self.over = Some(error),
            }
        }
    }

    pub(crate) async fn more(&mut self) -> Result<(), StoreError> {
        if self.next.is_none() && self.over.is_none() {
            self.next = Some(self.incoming.recv().await.unwrap_or(Err(StoreError::Closed)));
        }
        Ok(())
    }
}

/// Begins to watch after a revision, if this is possible.
pub(super) async fn connect(
    cluster: &Cluster,
    epoch: &str,
    from: Revision,
) -> Result<WatchStream, StoreError> {
    let failed = |failed| match failed {
        Failed::NoAnswer(reason) => cluster.unavailable(reason),
        Failed::Refused(_, reason) => cluster.refused(reason),
    };
    let key = cluster.epoch_key();
    let found = cluster.attempt(|client| async move { client.kv_client().get(key, None).await });
    let found = found.await.map_err(failed)?;
    let current = revision_of(found.header());
    let same = found.kvs().first().is_some_and(|pair| pair.value() == epoch.as_bytes());
    // Another epoch below the same prefix is another store: what was seen of ours means nothing in it.
    if from > current || !same {
        return Err(StoreError::Ahead { from, current });
    }
    let first = from.max(FIRST);
    let key = cluster.epoch_key();
    let options = GetOptions::new().with_count_only().with_revision(number(first.0));
    let known = cluster.attempt(|client| async move { client.kv_client().get(key, Some(options)).await });
    match known.await {
        Ok(_) => {}
        Err(Failed::Refused(_, reason)) if reason.contains(COMPACTED) => {
            let oldest = compacted(cluster).await?;
            return Err(StoreError::Compacted { from, oldest });
        }
        Err(other) => return Err(failed(other)),
    }
    begin(cluster, first).await.map_err(failed)
}

async fn begin(cluster: &Cluster, from: Revision) -> Result<WatchStream, Failed> {
    let options = WatchOptions::new()
        .with_prefix()
        .with_start_revision(number(from.0).saturating_add(1))
        .with_progress_notify();
    let begun = cluster.attempt(|client| async move {
        let mut client = client.watch_client().max_decoding_message_size(ANSWER_BYTES_MAX);
        client.watch(cluster.everything(), Some(options)).await
    });
    begun.await
}

/// The revision up to which etcd has forgotten. It says so only to a watch that begins before.
async fn compacted(cluster: &Cluster) -> Result<Revision, StoreError> {
    let unavailable = |reason: String| cluster.unavailable(reason);
    let mut stream =
        begin(cluster, Revision(0)).await.map_err(|failed| unavailable(format!("{failed:?}")))?;
    loop {
        let message = cluster.attempt(|_client| stream.message());
        match message.await {
            Ok(Some(message)) if message.compact_revision() > 0 => {
                return Ok(revision(message.compact_revision()));
            }
            Ok(Some(message)) if message.created() => {}
            other => return Err(unavailable(format!("it does not say how far it was compacted: {other:?}"))),
        }
    }
}

/// The task behind a watch. It ends when nobody reads any more, when the store is closed, and with an error that the
/// reader must hear of; an etcd that does not answer is none: it is waited for, however long that takes.
struct Follower {
    cluster: Arc<Cluster>,
    epoch: String,
    prefix: String,
    position: Revision,
    outgoing: mpsc::Sender<Result<Step, StoreError>>,
}

/// Why a stream is followed no longer.
enum Ended {
    /// It broke off.
    Lost(String),
    /// The reader must be told.
    Over(StoreError),
    /// There is no reader.
    Unread,
}

impl Follower {
    async fn run(mut self, stream: WatchStream, mut closed: signal::Receiver<()>) {
        let outgoing = self.outgoing.clone();
        let over = tokio::select! {
            over = self.follow_for_ever(stream) => over,
            _ = closed.changed() => Some(StoreError::Closed),
            () = outgoing.closed() => None,
        };
        if let Some(error) = over {
            // If nobody reads any more, nobody is to be told.
            outgoing.send(Err(error)).await.ok();
        }
    }

    async fn follow_for_ever(&mut self, mut stream: WatchStream) -> Option<StoreError> {
        let mut backoff = Backoff::default();
        loop {
            let before = self.position;
            match self.follow(stream).await {
                Ended::Lost(reason) => {
                    tracing::warn!(store = self.cluster.name(), %reason, "a watch was lost and begins again");
                }
                Ended::Over(error) => return Some(error),
                Ended::Unread => return None,
            }
            if self.position > before {
                backoff = Backoff::default();
            }
            stream = loop {
                backoff.pause().await;
                match connect(&self.cluster, &self.epoch, self.position).await {
                    Ok(stream) => break stream,
                    Err(StoreError::Unavailable { .. }) => {}
                    Err(error) => return Some(error),
                }
            };
        }
    }

    async fn follow(&mut self, mut stream: WatchStream) -> Ended {
        loop {
            let message = match stream.message().await {
                Ok(Some(message)) => message,
                Ok(None) => return Ended::Lost("it ended".into()),
                Err(error) => {
                    return match Failed::from(error) {
                        Failed::NoAnswer(reason) => Ended::Lost(reason),
                        Failed::Refused(_, reason) => Ended::Over(self.cluster.refused(reason)),
                    };
                }
            };
            if message.compact_revision() > 0 {
                let oldest = revision(message.compact_revision());
                return Ended::Over(StoreError::Compacted { from: self.position, oldest });
            }
            if message.canceled() {
                let reason = message.cancel_reason().to_owned();
                return if reason.contains("permission denied") {
                    Ended::Over(self.cluster.refused(reason))
                } else {
                    Ended::Lost(reason)
                };
            }
            if message.created() {
                continue;
            }
            if let Err(ended) = self.pass_on(&message).await {
                return ended;
            }
        }
    }

    async fn pass_on(&mut self, message: &WatchResponse) -> Result<(), Ended> {
        let mut commits: Vec<Commit> = Vec::new();
        for event in message.events() {
            let Some(pair) = event.kv() else { continue };
            let at = revision(pair.mod_revision());
            // After a watch was begun again nothing comes twice, but this costs nothing.
            if at <= self.position {
                continue;
            }
            match commits.last() {
                Some(last) if last.revision == at => {}
                _ => commits.push(Commit { revision: at, changes: Vec::new() }),
            }
            if let (Some(commit), Some(change)) =
                (commits.last_mut(), self.change(event).map_err(Ended::Over)?)
            {
                commit.changes.push(change);
            }
        }
        // A message without events tells how far a watch is that has nothing to hear. One with events holds whole
        // revisions, but there may be more to come before its header's.
        let position = commits.last().map_or_else(|| revision_of(message.header()), |last| last.revision);
        self.position = self.position.max(position);
        let commits = commits.into_iter().filter(|commit| !commit.changes.is_empty()).map(Arc::new).collect();
        let step = Step { commits, position: self.position };
        self.outgoing.send(Ok(step)).await.map_err(|_unread| Ended::Unread)
    }

    /// The change that an event tells of, if it concerns the reader.
    fn change(&self, event: &Event) -> Result<Option<Change>, StoreError> {
        let Some(pair) = event.kv() else { return Ok(None) };
        let Some(key) = self.cluster.key_of(pair.key()).filter(|key| key.starts_with(&self.prefix)) else {
            return Ok(None);
        };
        let object = match event.event_type() {
            EventType::Put => Some(self.cluster.stored(pair)?),
            EventType::Delete => None,
        };
        Ok(Some(Change { key: key.into(), object }))
    }
}
