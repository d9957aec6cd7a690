use std::time::SystemTime;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::{Authority, Identity, JoinToken, Key, LIFETIME};

fn authority() -> Authority {
    Authority::generate("test", SystemTime::now()).unwrap()
}

fn controller(authority: &Authority, now: SystemTime) -> Credentials {
    let identity = Identity::controller("c1").unwrap();
    authority.issue(&identity, LIFETIME, now, &["127.0.0.1".into()]).unwrap()
}

fn agent(authority: &Authority, now: SystemTime) -> Credentials {
    authority.issue(&Identity::agent("h1").unwrap(), LIFETIME, now, &[]).unwrap()
}

/// A server that shows `own`, trusts `authorities` and says who it takes its callers for.
async fn serve(own: &Credentials, authorities: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let identity = ServerIdentity::new(own).unwrap();
    let mut incoming = listen(listener, server_config(&identity, authorities, "test").unwrap());
    tokio::spawn(async move {
        while let Some((mut stream, peer)) = incoming.recv().await {
            let who = peer.holder.map_or_else(|| "nobody".into(), |holder| holder.identity.to_string());
            stream.write_all(who.as_bytes()).await.unwrap();
            let _ = stream.shutdown().await;
        }
    });
    address
}

async fn ask(address: &str, config: &Arc<ClientConfig>) -> io::Result<String> {
    let mut stream = connect(address, config).await?;
    let mut text = String::new();
    // In TLS 1.3 a client hears that it was refused with the first bytes.
    stream.read_to_string(&mut text).await?;
    Ok(text)
}

#[tokio::test]
async fn both_ends_recognise_each_other() {
    let authority = authority();
    let now = SystemTime::now();
    let address = serve(&controller(&authority, now), authority.bundle()).await;
    let own = agent(&authority, now);
    let config = client_config(authority.bundle(), Some(&own), "test").unwrap();
    assert_eq!(ask(&address, &config).await.unwrap(), "agent/h1");
    let config = client_config(authority.bundle(), None, "test").unwrap();
    assert_eq!(ask(&address, &config).await.unwrap(), "nobody");
}

#[tokio::test]
async fn strangers_and_impostors_are_refused() {
    let (authority, other) = (authority(), authority());
    let now = SystemTime::now();
    let address = serve(&controller(&authority, now), authority.bundle()).await;
    let long_ago = now - 2 * LIFETIME;
    for (what, own) in [("another authority's", agent(&other, now)), ("expired", agent(&authority, long_ago))]
    {
        let config = client_config(authority.bundle(), Some(&own), "test").unwrap();
        assert!(ask(&address, &config).await.is_err(), "{what}");
    }
    // A client trusts no other authority's controller, no expired one, and no agent that plays one.
    for (what, server) in [
        ("another authority's", controller(&other, now)),
        ("expired", controller(&authority, long_ago)),
        ("an agent", agent(&authority, now)),
    ] {
        let address = serve(&server, authority.bundle()).await;
        let config = client_config(authority.bundle(), None, "test").unwrap();
        assert!(ask(&address, &config).await.is_err(), "{what}");
    }
}

#[tokio::test]
async fn a_machine_that_joins_knows_the_controller_by_the_token() {
    let (authority, other) = (authority(), authority());
    let now = SystemTime::now();
    let token = JoinToken::generate(authority.certificate());
    let config = joining_client_config(&token.authority, "test").unwrap();
    let address = serve(&controller(&authority, now), authority.bundle()).await;
    assert_eq!(ask(&address, &config).await.unwrap(), "nobody");
    let address = serve(&controller(&other, now), other.bundle()).await;
    assert!(ask(&address, &config).await.is_err(), "another authority");
    // The right authority is shown by somebody whom it has not made a controller.
    let mut forged = controller(&other, now);
    forged.authorities = authority.bundle().to_owned();
    let address = serve(&forged, authority.bundle()).await;
    assert!(ask(&address, &config).await.is_err(), "a forged chain");
    let address = serve(&agent(&authority, now), authority.bundle()).await;
    assert!(ask(&address, &config).await.is_err(), "an agent");
}

#[tokio::test]
async fn a_server_trusts_other_authorities_from_the_next_handshake_on() {
    let (authority, other) = (authority(), authority());
    let now = SystemTime::now();
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let identity = ServerIdentity::new(&controller(&authority, now)).unwrap();
    let settings = server_config(&identity, authority.bundle(), "test").unwrap();
    let mut incoming = listen(listener, Arc::clone(&settings));
    tokio::spawn(async move {
        while let Some((mut stream, _peer)) = incoming.recv().await {
            stream.write_all(b"in").await.unwrap();
            let _ = stream.shutdown().await;
        }
    });
    let of = |by: &Authority| client_config(authority.bundle(), Some(&agent(by, now)), "test").unwrap();
    // The same all along, so that they may remember their sessions.
    let (before, after) = (of(&authority), of(&other));
    let both = format!("{}{}", authority.bundle(), other.bundle());
    for (trusted, lets_in) in
        [(None, [true, false]), (Some(both.as_str()), [true, true]), (Some(other.bundle()), [false, true])]
    {
        if let Some(authorities) = trusted {
            settings.trust(authorities).unwrap();
        }
        let comes_in = [ask(&address, &before).await.is_ok(), ask(&address, &after).await.is_ok()];
        assert_eq!(comes_in, lets_in, "{trusted:?}");
    }
    assert!(settings.trust("nothing").is_err());
    assert!(ask(&address, &after).await.is_ok(), "the ones before stay");
}

#[tokio::test]
async fn a_server_shows_its_new_certificate_from_the_next_handshake_on() {
    let authority = authority();
    let now = SystemTime::now();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let identity = ServerIdentity::new(&controller(&authority, now - 2 * LIFETIME)).unwrap();
    let _incoming = listen(listener, server_config(&identity, authority.bundle(), "test").unwrap());
    let config = client_config(authority.bundle(), None, "test").unwrap();
    assert!(connect(&address, &config).await.is_err(), "expired");
    identity.replace(&controller(&authority, now)).unwrap();
    connect(&address, &config).await.unwrap();
}

#[tokio::test]
async fn a_caller_that_says_nothing_holds_up_nobody() {
    let authority = authority();
    let address = serve(&controller(&authority, SystemTime::now()), authority.bundle()).await;
    let _silent: Vec<_> = futures_of(&address, 20).await;
    let config = client_config(authority.bundle(), None, "test").unwrap();
    assert_eq!(ask(&address, &config).await.unwrap(), "nobody");
}

async fn futures_of(address: &str, count: usize) -> Vec<TcpStream> {
    let mut streams = Vec::new();
    for _ in 0..count {
        streams.push(TcpStream::connect(address).await.unwrap());
    }
    streams
}

#[test]
fn requests_give_a_key_and_nothing_else() {
    let authority = authority();
    let now = SystemTime::now();
    let key = Key::generate().unwrap();
    let identity = Identity::operator("ann", &["net".into(), "ops".into()]).unwrap();
    let certificate = authority.sign(&key.request().unwrap(), &identity, LIFETIME, now).unwrap();
    let credentials = Credentials { certificate, key: key.pem(), authorities: authority.bundle().into() };
    let holder = credentials.holder().unwrap();
    assert_eq!(holder.identity, identity);
    assert!(
        credentials.valid_at(now + LIFETIME / 2).unwrap() && !credentials.valid_at(now + LIFETIME).unwrap()
    );
    assert!(holder.renew_at() > now && holder.renew_at() < holder.not_after);
    // A request that asks to be a controller gets what the authority says.
    let mut asks = rcgen::CertificateParams::new(vec![CONTROLLER_NAME.to_owned()]).unwrap();
    asks.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let pair = rcgen::KeyPair::generate().unwrap();
    let request = asks.serialize_request(&pair).unwrap().pem().unwrap();
    let certificate = authority.sign(&request, &Identity::agent("h1").unwrap(), LIFETIME, now).unwrap();
    let der = certificates("it", &certificate).unwrap().remove(0);
    let (_, parsed) = x509_parser::parse_x509_certificate(&der).unwrap();
    assert!(!parsed.is_ca());
    assert!(
        !format!("{:?}", parsed.subject_alternative_name().unwrap().unwrap().value).contains(CONTROLLER_NAME)
    );
    assert!(authority.sign("nonsense", &identity, LIFETIME, now).is_err());
}

#[test]
fn an_authority_is_read_back_and_never_overwritten() {
    let directory = tempfile::tempdir().unwrap();
    assert!(Authority::load(directory.path()).unwrap().is_none());
    let one = authority();
    one.save(directory.path()).unwrap();
    assert!(authority().save(directory.path()).is_err());
    let loaded = Authority::load(directory.path()).unwrap().unwrap();
    let agent = agent(&loaded, SystemTime::now());
    assert_eq!(agent.authorities, one.bundle());
    agent.save(directory.path(), "agent").unwrap();
    let read = Credentials::load(directory.path(), "agent").unwrap().unwrap();
    assert_eq!(read.holder().unwrap(), agent.holder().unwrap());
    // A key of another authority beside the certificate.
    let other = tempfile::tempdir().unwrap();
    authority().save(other.path()).unwrap();
    std::fs::copy(other.path().join("ca.key"), directory.path().join("ca.key")).unwrap();
    assert!(Authority::load(directory.path()).unwrap_err().to_string().contains("not the key"));
}
