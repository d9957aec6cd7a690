//! Connections: mutual TLS made of [`Credentials`], and a listener that no slow caller holds up.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub use rustls::ClientConfig;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError as TlsCertificateError, DigitallySignedStruct, Error, RootCertStore, ServerConfig,
    SignatureScheme,
};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::certificate::Holder;
use crate::credentials::{Credentials, CredentialsError, certificates, wrong};
use crate::door::{Door, Limits, Place};
use crate::name::Identity;
use crate::token::authority_digest;

/// What every controller's certificate is for, besides its addresses: clients ask for this name, whatever address they
/// reached it by, and no authority of a fleet gives it to anybody but controllers, and to relays, which are told apart by
/// the URI in their certificate: [`connect`] refuses them, [`connect_as_agent`] does not.
pub const CONTROLLER_NAME: &str = "controller.bulkhead";

/// Most certificates of a chain that are looked at.
const CHAIN_LEN_MAX: usize = 8;

/// Longest that a handshake may take.
pub const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(10);
/// Connections that are through and wait to be taken.
const ACCEPTED_LEN: usize = 64;
/// A listener that cannot accept, for want of file descriptors as a rule, tries again after this.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Its address.
    pub remote: SocketAddr,
    /// Ours.
    pub local: SocketAddr,
    /// Who holds its certificate; `None` if it showed none.
    pub holder: Option<Arc<Holder>>,
    /// What it showed, DER, its own certificate first.
    pub chain: Arc<Vec<Vec<u8>>>,
    /// Its place among the listener's connections: to be kept as long as the connection.
    _place: Arc<Place>,
}

/// A connection that came in.
pub type Incoming = (tokio_rustls::server::TlsStream<TcpStream>, Peer);

/// A server's own certificate, which can be replaced while it serves.
#[derive(Debug)]
pub struct ServerIdentity {
    current: RwLock<Arc<CertifiedKey>>,
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

impl ServerIdentity {
    /// Of a server that shows these credentials.
    ///
    /// # Errors
    /// If they cannot be used.
    pub fn new(credentials: &Credentials) -> Result<Arc<Self>, CredentialsError> {
        Ok(Arc::new(Self { current: RwLock::new(certified(credentials)?) }))
    }

    /// Shows others from the next handshake on.
    ///
    /// # Errors
    /// If they cannot be used; the ones before stay.
    pub fn replace(&self, credentials: &Credentials) -> Result<(), CredentialsError> {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = certified(credentials)?;
        Ok(())
    }
}

impl ResolvesServerCert for ServerIdentity {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// The whole chain up to the authority is shown: a machine that joins knows the authority by its digest only.
fn certified(credentials: &Credentials) -> Result<Arc<CertifiedKey>, CredentialsError> {
    let mut chain = credentials.chain()?;
    chain.extend(certificates("authority", &credentials.authorities)?);
    let key = CertifiedKey::from_der(chain, credentials.private_key()?, &provider());
    key.map(Arc::new).map_err(|error| wrong("certificate", &error))
}

fn roots(authorities: &str) -> Result<Arc<RootCertStore>, CredentialsError> {
    let mut roots = RootCertStore::empty();
    // A system's bundle has some that only others can read.
    let (usable, _others) = roots.add_parsable_certificates(certificates("authority", authorities)?);
    if usable == 0 {
        return Err(wrong("authority", &"no certificate in it can be used"));
    }
    Ok(Arc::new(roots))
}

/// What a listener shows and whom it trusts; both can be replaced while it serves.
#[derive(Debug)]
pub struct ServerSettings {
    identity: Arc<ServerIdentity>,
    protocol: String,
    current: RwLock<Arc<ServerConfig>>,
}

impl ServerSettings {
    /// Asks callers for a certificate of these authorities from the next handshake on.
    ///
    /// # Errors
    /// If they cannot be used; the ones before stay.
    pub fn trust(&self, authorities: &str) -> Result<(), CredentialsError> {
        // A whole new one: with the old one's memory of sessions, callers would come in unasked.
        let new = made(&self.identity, authorities, &self.protocol)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(())
    }

    fn current(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// For a listener: asks callers for a certificate of the authorities, and lets those without one in as nobody.
/// `protocol` is what is spoken inside (ALPN).
///
/// # Errors
/// If the authorities cannot be used.
pub fn server_config(
    identity: &Arc<ServerIdentity>,
    authorities: &str,
    protocol: &str,
) -> Result<Arc<ServerSettings>, CredentialsError> {
    let current = RwLock::new(made(identity, authorities, protocol)?);
    Ok(Arc::new(ServerSettings { identity: Arc::clone(identity), protocol: protocol.to_owned(), current }))
}

fn made(
    identity: &Arc<ServerIdentity>,
    authorities: &str,
    protocol: &str,
) -> Result<Arc<ServerConfig>, CredentialsError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(authorities)?, provider());
    let verifier = verifier.allow_unauthenticated().build().map_err(|error| wrong("authority", &error))?;
    let config = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let mut config = config
        .map_err(|error| wrong("TLS", &error))?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::clone(identity) as _);
    config.alpn_protocols = vec![protocol.into()];
    Ok(Arc::new(config))
}

/// For a client of controllers: trusts those that have a certificate of the authorities, and shows its own if it has one.
///
/// # Errors
/// If something in it cannot be used.
pub fn client_config(
    authorities: &str,
    own: Option<&Credentials>,
    protocol: &str,
) -> Result<Arc<ClientConfig>, CredentialsError> {
    let config = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let config = config.map_err(|error| wrong("TLS", &error))?.with_root_certificates(roots(authorities)?);
    let mut config = match own {
        Some(own) => {
            let with_own = config.with_client_auth_cert(own.chain()?, own.private_key()?);
            with_own.map_err(|error| wrong("certificate", &error))?
        }
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![protocol.into()];
    Ok(Arc::new(config))
}

/// For a machine that joins: trusts a controller whose chain ends in the authority with this digest (of a
/// [`crate::JoinToken`]).
///
/// # Errors
/// If TLS cannot be used at all.
pub fn joining_client_config(authority: &str, protocol: &str) -> Result<Arc<ClientConfig>, CredentialsError> {
    let config = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
    let mut config = config
        .map_err(|error| wrong("TLS", &error))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Pinned { authority: authority.into() }))
        .with_no_client_auth();
    config.alpn_protocols = vec![protocol.into()];
    Ok(Arc::new(config))
}

/// Verifies as usual, with the one authority of the chain that has the digest.
#[derive(Debug)]
struct Pinned {
    authority: String,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let pinned = intermediates.iter().find(|shown| authority_digest(shown) == self.authority);
        let pinned = pinned.ok_or(Error::InvalidCertificate(TlsCertificateError::UnknownIssuer))?;
        let mut roots = RootCertStore::empty();
        roots.add(pinned.clone().into_owned())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider()).build();
        let verifier = verifier.map_err(|error| Error::General(error.to_string()))?;
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = provider().signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signed, &algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Opens a connection to a controller at `address` (`HOST:PORT`).
///
/// # Errors
/// If nobody answers there, or somebody who is no controller.
pub async fn connect(
    address: &str,
    config: &Arc<ClientConfig>,
) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let stream = connect_as_agent(address, config).await?;
    let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let holder = shown.and_then(|certificate| Holder::of(certificate).ok());
    if let Some(Identity::Relay(name)) = holder.map(|holder| holder.identity) {
        return Err(io::Error::other(format!(
            "{address} is relay {name:?}, which is a controller for agents only"
        )));
    }
    Ok(stream)
}

/// The same for an agent, whose controller may be a relay.
///
/// # Errors
/// If nobody answers there, or somebody who is neither controller nor relay.
pub async fn connect_as_agent(
    address: &str,
    config: &Arc<ClientConfig>,
) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    connect_to(address, CONTROLLER_NAME, config).await
}

/// Whose a certificate is that somebody else was shown: `chain` as DER, the certificate first. That it was made by one of
/// the authorities and is valid at `now` is checked; that whoever shows it has its key is not.
///
/// # Errors
/// If it is none of theirs, has ended, or names nobody.
pub fn verify(
    authorities: &str,
    chain: &[impl AsRef<[u8]>],
    now: SystemTime,
) -> Result<Holder, CredentialsError> {
    let mut chain = chain.iter().map(|one| CertificateDer::from(one.as_ref()));
    let first = chain.next().ok_or_else(|| wrong("certificate", &"none found"))?;
    let others: Vec<_> = chain.take(CHAIN_LEN_MAX).collect();
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(authorities)?, provider()).build();
    let verifier = verifier.map_err(|error| wrong("authority", &error))?;
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let verified = verifier.verify_client_cert(&first, &others, UnixTime::since_unix_epoch(since));
    verified.map_err(|error| wrong("certificate", &error))?;
    Ok(Holder::of(&first)?)
}

/// The same to any server, which must have a certificate for `name` (a DNS name or an address).
///
/// # Errors
/// If nobody answers there, or somebody else.
pub async fn connect_to(
    address: &str,
    name: &str,
    config: &Arc<ClientConfig>,
) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let name = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
    let stream = TcpStream::connect(address).await?;
    // Requests are small, and somebody waits for them.
    stream.set_nodelay(true)?;
    let handshake = TlsConnector::from(Arc::clone(config)).connect(name, stream);
    match tokio::time::timeout(HANDSHAKE_TIME_MAX, handshake).await {
        Ok(connected) => connected,
        Err(_elapsed) => Err(io::Error::new(io::ErrorKind::TimedOut, "the TLS handshake took too long")),
    }
}

/// Accepts until the receiver is dropped, with the usual [`Limits`]. Handshakes run beside each other, so that a caller that
/// says nothing holds up nobody.
pub fn listen(listener: TcpListener, config: Arc<ServerSettings>) -> mpsc::Receiver<Incoming> {
    listen_within(listener, config, "tls", Limits::default()).0
}

/// The same within these limits, by a `name` for the log; the [`Door`] tells who is there.
pub fn listen_within(
    listener: TcpListener,
    config: Arc<ServerSettings>,
    name: &'static str,
    limits: Limits,
) -> (mpsc::Receiver<Incoming>, Arc<Door>) {
    let (accepted, incoming) = mpsc::channel(ACCEPTED_LEN);
    let door = Door::new(name, limits);
    let own = Arc::clone(&door);
    tokio::spawn(async move {
        loop {
            let stream = tokio::select! {
                stream = listener.accept() => stream,
                () = accepted.closed() => return,
            };
            let (stream, remote) = match stream {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                    continue;
                }
            };
            // Closed if there is none.
            let Some(place) = own.pending(remote.ip()) else { continue };
            let acceptor = TlsAcceptor::from(config.current());
            let (accepted, door) = (accepted.clone(), Arc::clone(&own));
            tokio::spawn(async move {
                // Boxed, since thousands may wait and few are at it.
                let handshake = async {
                    let _turn = door.handshake(remote.ip()).await.ok_or(io::ErrorKind::Interrupted)?;
                    Box::pin(accept(&acceptor, stream, remote, &door)).await
                };
                let handshake = tokio::time::timeout(HANDSHAKE_TIME_MAX, handshake).await;
                drop(place);
                match handshake.unwrap_or_else(|_elapsed| Err(io::ErrorKind::TimedOut.into())) {
                    // If nobody takes it any more, it is closed.
                    Ok(Some(through)) => drop(accepted.send(through).await),
                    Ok(None) => {}
                    Err(error) => {
                        door.note_failed();
                        tracing::debug!(%remote, %error, "a TLS handshake failed");
                    }
                }
            });
        }
    });
    (incoming, door)
}

/// A connection that is through; `None` if there are too many.
async fn accept(
    acceptor: &TlsAcceptor,
    stream: TcpStream,
    remote: SocketAddr,
    door: &Arc<Door>,
) -> io::Result<Option<Incoming>> {
    stream.set_nodelay(true)?;
    let local = stream.local_addr()?;
    let stream = acceptor.accept(stream).await?;
    let shown = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let holder =
        shown.first().map(|certificate| Holder::of(certificate).map_err(io::Error::other)).transpose()?;
    let chain = shown.iter().take(CHAIN_LEN_MAX).map(|certificate| certificate.to_vec()).collect();
    let name = holder.as_ref().map(|holder| holder.identity.to_string());
    let Some(place) = door.through(remote.ip(), name) else { return Ok(None) };
    let peer =
        Peer { remote, local, holder: holder.map(Arc::new), chain: Arc::new(chain), _place: Arc::new(place) };
    Ok(Some((stream, peer)))
}

#[cfg(test)]
mod tests;
