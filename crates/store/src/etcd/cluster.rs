//! The members of a cluster: which of them is asked, for how long, and what an error means.

use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use etcd_client::{Client, ConnectOptions, Error, KvClient, ResponseHeader};
use tokio::sync::OnceCell;
use tonic::Code;

use crate::types::{Revision, StoreError};

use super::options::EtcdOptions;

/// Longest that opening a connection to a member may take.
pub(super) const CONNECT_TIME_MAX: Duration = Duration::from_secs(2);
/// How often an idle connection is tried, so that a dead member's watches end. etcd refuses less than five seconds.
pub(super) const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(10);
/// Longest that a member may take to answer that.
pub(super) const KEEP_ALIVE_TIME_MAX: Duration = Duration::from_secs(5);
/// Longest that one attempt may take: beyond an election (1 s unless configured otherwise), within which writes wait.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(3);
/// Longest that an operation is tried: a member's restart and an election fit into it.
pub(super) const OPERATION_TIME_MAX: Duration = Duration::from_secs(15);
/// First and longest pause between two attempts.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Longest answer: as in etcd's own client, since a watch that is behind gets many revisions at once.
pub(super) const ANSWER_BYTES_MAX: usize = i32::MAX as usize;

/// What etcd says of a revision that it has no more.
pub(super) const COMPACTED: &str = "required revision has been compacted";

/// Why an attempt gave no answer, or which.
#[derive(Debug)]
pub(super) enum Failed {
    /// Whether it was done is unknown.
    NoAnswer(String),
    /// It was not done.
    Refused(Code, String),
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        match error {
            Error::GRpcStatus(status) => {
                let message = status.message().to_owned();
                match status.code() {
                    Code::Unavailable
                    | Code::DeadlineExceeded
                    | Code::Cancelled
                    | Code::Unknown
                    | Code::Internal
                    | Code::Aborted
                    | Code::DataLoss => Self::NoAnswer(message),
                    // A queue that is full for now, and no quota.
                    Code::ResourceExhausted if message.contains("too many requests") => {
                        Self::NoAnswer(message)
                    }
                    code => Self::Refused(code, message),
                }
            }
            Error::TransportError(_) | Error::IoError(_) | Error::WatchError(_) | Error::EndpointError(_) => {
                Self::NoAnswer(error.to_string())
            }
            Error::LeaseKeepAliveError(reason) => Self::Refused(Code::NotFound, reason),
            other => Self::Refused(Code::InvalidArgument, other.to_string()),
        }
    }
}

/// Pauses that become longer.
#[derive(Debug)]
pub(super) struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(PAUSE_MIN)
    }
}

impl Backoff {
    pub(super) async fn pause(&mut self) {
        tokio::time::sleep(self.0).await;
        self.0 = (self.0 * 2).min(PAUSE_MAX);
    }
}

/// A cluster, and where in it the store is.
pub(super) struct Cluster {
    name: String,
    objects: String,
    prefix: String,
    connect: ConnectOptions,
    members: Vec<(String, OnceCell<Client>)>,
    /// Index of the member that is asked, until it does not answer.
    asked: AtomicUsize,
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The options hold a password.
        f.debug_struct("Cluster").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Cluster {
    pub(super) fn new(options: &EtcdOptions) -> Result<Self, StoreError> {
        Ok(Self {
            name: options.name(),
            objects: format!("{}/objects", options.prefix),
            prefix: options.prefix.clone(),
            connect: options.connect_options()?,
            members: options.urls().into_iter().map(|url| (url, OnceCell::new())).collect(),
            asked: AtomicUsize::new(0),
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Where an object of the store is.
    pub(super) fn object_key(&self, key: &str) -> Vec<u8> {
        format!("{}{key}", self.objects).into_bytes()
    }

    /// Inverse of [`Cluster::object_key`]; `None` for keys that are no objects.
    pub(super) fn key_of<'a>(&self, full: &'a [u8]) -> Option<&'a str> {
        std::str::from_utf8(full.strip_prefix(self.objects.as_bytes())?).ok()
    }

    /// Where the epoch is.
    pub(super) fn epoch_key(&self) -> Vec<u8> {
        format!("{}/epoch", self.prefix).into_bytes()
    }

    /// Where what a writer did last is.
    pub(super) fn writer_key(&self, writer: i64, number: u64) -> Vec<u8> {
        format!("{}/writers/{writer:016x}/{number}", self.prefix).into_bytes()
    }

    /// What all keys of the store begin with, and none of another.
    pub(super) fn everything(&self) -> Vec<u8> {
        format!("{}/", self.prefix).into_bytes()
    }

    pub(super) fn unavailable(&self, reason: impl Into<String>) -> StoreError {
        StoreError::Unavailable { store: self.name.clone(), reason: reason.into() }
    }

    pub(super) fn refused(&self, reason: impl Into<String>) -> StoreError {
        StoreError::Refused { store: self.name.clone(), reason: reason.into() }
    }

    /// Asks one member, once. After no answer the next one is asked.
    pub(super) async fn attempt<T, F, Fut>(&self, call: F) -> Result<T, Failed>
    where
        F: FnOnce(Client) -> Fut,
        Fut: Future<Output = Result<T, Error>>,
    {
        let asked = self.asked.load(Ordering::Relaxed);
        let (url, client) = &self.members[asked % self.members.len()];
        let answer = tokio::time::timeout(REQUEST_TIME_MAX, async {
            let connect = || Client::connect([url], Some(self.connect.clone()));
            call(client.get_or_try_init(connect).await?.clone()).await
        });
        let failed = match answer.await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => Failed::from(error),
            Err(_elapsed) => Failed::NoAnswer(format!("no answer from {url} in {REQUEST_TIME_MAX:?}")),
        };
        if let Failed::NoAnswer(reason) = &failed {
            tracing::debug!(member = %url, %reason, "etcd did not answer");
            // If another caller has moved on already, all is well.
            let _moved = self.asked.compare_exchange(asked, asked + 1, Ordering::Relaxed, Ordering::Relaxed);
        }
        Err(failed)
    }

    /// Asks until there is an answer, for a bounded time: only for what may be done more than once.
    pub(super) async fn ask<T, F, Fut>(&self, call: F) -> Result<T, StoreError>
    where
        F: Fn(Client) -> Fut,
        Fut: Future<Output = Result<T, Error>>,
    {
        let deadline = Instant::now() + OPERATION_TIME_MAX;
        let mut backoff = Backoff::default();
        loop {
            match self.attempt(&call).await {
                Ok(answer) => return Ok(answer),
                Err(Failed::Refused(_, reason)) => return Err(self.refused(reason)),
                Err(Failed::NoAnswer(reason)) if Instant::now() >= deadline => {
                    return Err(self.unavailable(reason));
                }
                Err(Failed::NoAnswer(_)) => backoff.pause().await,
            }
        }
    }

    /// [`Cluster::ask`] for keys and values.
    pub(super) async fn call<T, F, Fut>(&self, call: F) -> Result<T, StoreError>
    where
        F: Fn(KvClient) -> Fut,
        Fut: Future<Output = Result<T, Error>>,
    {
        self.ask(|client| call(client.kv_client().max_decoding_message_size(ANSWER_BYTES_MAX))).await
    }
}

/// The end of the range of all keys that begin with a prefix, which is never empty here nor ends in the last byte.
pub(super) fn after_prefix(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

/// etcd's revisions are signed, and never below 0.
pub(super) fn revision(number: i64) -> Revision {
    Revision(u64::try_from(number).unwrap_or_default())
}

pub(super) fn revision_of(header: Option<&ResponseHeader>) -> Revision {
    header.map_or(Revision(0), |header| revision(header.revision()))
}
