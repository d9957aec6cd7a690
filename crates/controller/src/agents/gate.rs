//! What whoever has no certificate may do at the agents' port: ask to join, in a few kilobytes, and not too often.

use std::convert::Infallible;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::task::{Context as Poller, Poll};

use bulkhead_identity::door::{Seldom, network_of};
use bulkhead_identity::tls::Peer;
use bulkhead_wire::MESSAGE_BYTES_MAX;
use bulkhead_wire::proto::distribution_server::{Distribution, DistributionServer, SERVICE_NAME};
use governor::clock::DefaultClock;
use governor::{Quota, RateLimiter, state::keyed::HashMapStateStore};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::NamedService;

/// Largest message of somebody without a certificate: a request for one takes a kilobyte, or two with a long RSA key.
const ENROLL_BYTES_MAX: usize = 8 << 10;
/// Attempts to join that an address may make in a second, and at once: a rack behind one address.
const ENROLLS_PER_SECOND: u32 = 10;
const ENROLLS_AT_ONCE: u32 = 300;
/// Addresses that are remembered before those that have been quiet are forgotten.
const ADDRESSES_MAX: usize = 10_000;

/// How often each address has tried to join lately.
#[derive(Debug)]
pub(crate) struct Enrolling {
    rates: RateLimiter<IpAddr, HashMapStateStore<IpAddr>, DefaultClock>,
    /// Refusals in the log.
    pub(super) log: Seldom,
}

impl Default for Enrolling {
    fn default() -> Self {
        let per_second = NonZeroU32::new(ENROLLS_PER_SECOND).unwrap_or(NonZeroU32::MIN);
        let at_once = NonZeroU32::new(ENROLLS_AT_ONCE).unwrap_or(NonZeroU32::MIN);
        let rates = RateLimiter::hashmap(Quota::per_second(per_second).allow_burst(at_once));
        Self { rates, log: Seldom::default() }
    }
}

impl Enrolling {
    /// Counts an attempt; whether it may be made.
    pub(super) fn may_try(&self, from: IpAddr) -> bool {
        if self.rates.len() > ADDRESSES_MAX {
            self.rates.retain_recent();
        }
        self.rates.check_key(&network_of(from)).is_ok()
    }
}

/// The call whose messages are not framed by the library.
const SYNC: &str = "/Sync";

/// Answers that call.
pub(super) trait Sync {
    fn sync(&self, request: http::Request<Body>) -> http::Response<Body>;
}

/// The service, once for those who are known and once for others.
pub(super) struct Gate<T> {
    service: Arc<T>,
    known: DistributionServer<T>,
    strangers: DistributionServer<T>,
}

impl<T> Clone for Gate<T> {
    fn clone(&self) -> Self {
        let (known, strangers) = (self.known.clone(), self.strangers.clone());
        Self { service: Arc::clone(&self.service), known, strangers }
    }
}

impl<T: Distribution> Gate<T> {
    pub(super) fn new(service: T) -> Self {
        let service = Arc::new(service);
        let of = |bytes| {
            let server = DistributionServer::from_arc(Arc::clone(&service));
            server.max_decoding_message_size(bytes).max_encoding_message_size(MESSAGE_BYTES_MAX)
        };
        let (known, strangers) = (of(MESSAGE_BYTES_MAX), of(ENROLL_BYTES_MAX));
        Self { service, known, strangers }
    }
}

impl<T> NamedService for Gate<T> {
    const NAME: &'static str = SERVICE_NAME;
}

impl<T: Distribution + Sync> Service<http::Request<Body>> for Gate<T> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _poller: &mut Poller<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let is_known = request.extensions().get::<Arc<Peer>>().is_some_and(|peer| peer.holder.is_some());
        if is_known && request.uri().path().ends_with(SYNC) {
            let answer = self.service.sync(request);
            return Box::pin(async move { Ok(answer) });
        }
        if is_known {
            return self.known.call(request);
        }
        if !request.uri().path().ends_with("/Enroll") {
            let message = "agents need a certificate: join with a token of bulkhead token create";
            return Box::pin(async move { Ok(Status::unauthenticated(message).into_http()) });
        }
        self.strangers.call(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_tries_too_often_is_refused_and_others_are_not() {
        let enrolling = Enrolling::default();
        let from: IpAddr = "10.0.0.9".parse().unwrap();
        let tries = (0..2 * ENROLLS_AT_ONCE).take_while(|_| enrolling.may_try(from)).count();
        assert!(tries >= ENROLLS_AT_ONCE as usize && tries < 2 * ENROLLS_AT_ONCE as usize, "{tries}");
        assert!(enrolling.may_try("10.0.0.8".parse().unwrap()));
    }
}
