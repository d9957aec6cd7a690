//! Who is let in: certificates, tokens, revocations; and who is not.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bulkhead_controller::{Config, StoreKind};
use bulkhead_identity::tls::{self, ClientConfig};
use bulkhead_identity::{Authority, Credentials, Identity, JoinToken, Key, LIFETIME};
use bulkhead_wire::proto::distribution_client::DistributionClient;
use bulkhead_wire::proto::{EnrollRequest, Enrollment, RenewRequest};
use http_body_util::BodyExt;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::harness::{Fixture, Site, config, credentials};

const V1: &str = "/apis/bulkhead.dev/v1";

impl Site {
    async fn make(&self, path: &str, body: Value) -> (StatusCode, Value) {
        self.call(Method::POST, &format!("{V1}/{path}"), body.to_string()).await
    }

    pub(crate) async fn token(&self, body: Value) -> (JoinToken, Value) {
        let (status, made) = self.make("tokens", body).await;
        assert_eq!(status, StatusCode::CREATED, "{made}");
        (made["token"].as_str().unwrap().parse().unwrap(), made)
    }

    /// A machine that has nothing but a token.
    pub(crate) fn stranger(&self, token: &JoinToken) -> DistributionClient<Channel> {
        self.client_over(tls::joining_client_config(&token.authority, "h2").unwrap())
    }

    pub(crate) async fn join(&self, token: &JoinToken, host: &str, key: &Key) -> Result<Enrollment, Status> {
        let request = EnrollRequest {
            token_id: token.id.clone(),
            token_secret: token.secret.reveal(),
            host: host.into(),
            signing_request: key.request().unwrap(),
            relay: false,
        };
        self.stranger(token).enroll(request).await.map(tonic::Response::into_inner)
    }
}

pub(crate) fn own(key: &Key, enrollment: Enrollment) -> Credentials {
    Credentials { certificate: enrollment.certificate, key: key.pem(), authorities: enrollment.authorities }
}

/// How a session ends that is opened with these credentials for a host; `None`: it is welcome.
async fn session(fixture: &Fixture, own: &Credentials, host: &str) -> Option<Code> {
    let (up, messages) = tokio::sync::mpsc::channel(4);
    let hello = bulkhead_wire::proto::Hello {
        protocol: bulkhead_wire::PROTOCOL,
        host: host.into(),
        ..Default::default()
    };
    let body = Some(bulkhead_wire::proto::agent_message::Body::Hello(hello));
    up.send(bulkhead_wire::proto::AgentMessage { body }).await.unwrap();
    let mut down = match fixture.client_with(own).sync(ReceiverStream::new(messages)).await {
        Ok(down) => down.into_inner(),
        Err(status) => return Some(status.code()),
    };
    match down.message().await {
        Ok(_) => None,
        Err(status) => Some(status.code()),
    }
}

#[tokio::test]
async fn a_machine_joins_once_with_a_token_and_is_its_host_from_then_on() {
    let fixture = Fixture::new().await;
    let (token, made) = fixture.token(json!({})).await;
    assert!(made["usesLeft"] == 1 && made["for"] == "join", "{made}");
    let key = Key::generate().unwrap();
    let h1 = own(&key, fixture.join(&token, "h1", &key).await.unwrap());
    assert_eq!(h1.holder().unwrap().identity.to_string(), "agent/h1");
    assert_eq!(session(&fixture, &h1, "h1").await, None);
    assert_eq!(session(&fixture, &h1, "h2").await, Some(Code::PermissionDenied), "another host's name");

    // The answer may have been lost: whoever has the key may ask again, and nobody else.
    fixture.join(&token, "h1", &key).await.unwrap();
    let replayed = fixture.join(&token, "h1", &Key::generate().unwrap()).await.unwrap_err();
    assert_eq!(replayed.code(), Code::PermissionDenied, "{replayed}");
    assert!(fixture.join(&token, "h2", &Key::generate().unwrap()).await.is_err(), "it was for one machine");
    assert_eq!(fixture.get(&format!("{V1}/tokens")).await["items"], json!([]));
}

#[tokio::test]
async fn tokens_are_bound_counted_expire_and_can_be_deleted() {
    let fixture = Fixture::new().await;
    let key = || Key::generate().unwrap();
    // For two machines, at once as it happens: the store counts.
    let (token, _) = fixture.token(json!({ "uses": 2 })).await;
    let (a, b, c) = (key(), key(), key());
    let (first, second, third) = tokio::join!(
        fixture.join(&token, "a", &a),
        fixture.join(&token, "b", &b),
        fixture.join(&token, "c", &c),
    );
    assert_eq!([&first, &second, &third].iter().filter(|joined| joined.is_ok()).count(), 2);
    // A name that has joined is nobody else's, unless a token says so.
    let name = if first.is_ok() { "a" } else { "b" };
    let (other, _) = fixture.token(json!({})).await;
    let taken = fixture.join(&other, name, &key()).await.unwrap_err();
    assert!(taken.message().contains("--host"), "{taken}");
    let (bound, _) = fixture.token(json!({ "host": name })).await;
    assert!(fixture.join(&bound, "x", &key()).await.is_err(), "bound to another");
    fixture.join(&bound, name, &key()).await.unwrap();

    let (short, _) = fixture.token(json!({ "ttl": "1s" })).await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert!(fixture.join(&short, "d", &key()).await.is_err(), "expired");
    let (gone, _) = fixture.token(json!({})).await;
    assert_eq!(fixture.delete(&format!("tokens/{}", gone.id)).await, StatusCode::OK);
    assert_eq!(fixture.delete(&format!("tokens/{}", gone.id)).await, StatusCode::NOT_FOUND);
    assert!(fixture.join(&gone, "e", &key()).await.is_err(), "deleted");
    let forged = JoinToken::generate(fixture.authority().certificate());
    assert!(fixture.join(&forged, "e", &key()).await.is_err(), "never made");
    let guessed = JoinToken { id: other.id.clone(), ..forged };
    assert!(fixture.join(&guessed, "e", &key()).await.is_err(), "another's id");
    fixture.join(&other, "e", &key()).await.unwrap();

    for nonsense in [
        json!({ "uses": 0 }),
        json!({ "ttl": "100y" }),
        json!({ "host": "a/b" }),
        json!({ "hosts": "a" }),
        json!({ "host": "a", "operator": { "name": "ann" } }),
        json!({ "operator": { "name": "an n" } }),
    ] {
        assert_eq!(fixture.make("tokens", nonsense.clone()).await.0, StatusCode::BAD_REQUEST, "{nonsense}");
    }
}

#[tokio::test]
async fn what_is_sent_to_join_must_be_a_request() {
    let fixture = Fixture::new().await;
    let (token, _) = fixture.token(json!({})).await;
    let request = |host: &str, signing_request: &str| EnrollRequest {
        token_id: token.id.clone(),
        token_secret: token.secret.reveal(),
        host: host.into(),
        signing_request: signing_request.into(),
        relay: false,
    };
    let good = Key::generate().unwrap().request().unwrap();
    for (host, signing_request) in
        [("h1", "nonsense"), ("h1", ""), ("", good.as_str()), ("a/b", good.as_str())]
    {
        let refused = fixture.stranger(&token).enroll(request(host, signing_request)).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    }
    // None of them has used the token up.
    fixture.stranger(&token).enroll(request("h1", &good)).await.unwrap();
}

#[tokio::test]
async fn strangers_reach_nothing_of_the_agents_port() {
    let fixture = Fixture::new().await;
    let (up, messages) = tokio::sync::mpsc::channel(4);
    let nobody = fixture.nobody("h2");
    let refused = fixture.client_over(nobody.clone()).sync(ReceiverStream::new(messages)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert!(refused.message().contains("token create"), "{refused}");
    drop(up);
    let (_batches, flows) = tokio::sync::mpsc::channel(4);
    let refused =
        fixture.client_over(nobody.clone()).report_flows(ReceiverStream::new(flows)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    let renew =
        RenewRequest { signing_request: Key::generate().unwrap().request().unwrap(), ..Default::default() };
    assert_eq!(
        fixture.client_over(nobody).renew(renew.clone()).await.unwrap_err().code(),
        Code::Unauthenticated
    );
    // An operator is no agent.
    let operator = credentials(fixture.authority(), &Identity::operator("ann", &[]).unwrap());
    assert_eq!(session(&fixture, &operator, "ann").await, Some(Code::PermissionDenied));
    assert_eq!(fixture.client_with(&operator).renew(renew).await.unwrap_err().code(), Code::PermissionDenied);
    // Another fleet's agent, and one whose certificate has ended, do not get through the handshake.
    let other = Authority::generate("other", SystemTime::now()).unwrap();
    let stranger = other.issue(&Identity::agent("h1").unwrap(), LIFETIME, SystemTime::now(), &[]).unwrap();
    assert_eq!(session(&fixture, &stranger, "h1").await, Some(Code::Unknown));
    let long_ago = SystemTime::now() - 2 * LIFETIME;
    let ended = fixture.authority().issue(&Identity::agent("h1").unwrap(), LIFETIME, long_ago, &[]).unwrap();
    assert_eq!(session(&fixture, &ended, "h1").await, Some(Code::Unknown));
}

#[tokio::test]
async fn a_certificate_is_renewed_by_its_holder_and_ends_its_session_when_it_ends() {
    let fixture = Fixture::with(Config { certificate_lifetime_s: 2, ..config() }).await;
    let (token, _) = fixture.token(json!({})).await;
    let key = Key::generate().unwrap();
    let first = own(&key, fixture.join(&token, "h1", &key).await.unwrap());
    let next = Key::generate().unwrap();
    let renew = RenewRequest { signing_request: next.request().unwrap(), ..Default::default() };
    let second = own(&next, fixture.client_with(&first).renew(renew).await.unwrap().into_inner());
    assert_eq!(second.holder().unwrap().identity, first.holder().unwrap().identity);
    assert_ne!(second.holder().unwrap().serial, first.holder().unwrap().serial);

    let (up, messages) = tokio::sync::mpsc::channel(4);
    let hello = bulkhead_wire::proto::Hello {
        protocol: bulkhead_wire::PROTOCOL,
        host: "h1".into(),
        ..Default::default()
    };
    let body = Some(bulkhead_wire::proto::agent_message::Body::Hello(hello));
    up.send(bulkhead_wire::proto::AgentMessage { body }).await.unwrap();
    let mut down =
        fixture.client_with(&second).sync(ReceiverStream::new(messages)).await.unwrap().into_inner();
    let ended = loop {
        match tokio::time::timeout(Duration::from_secs(5), down.message()).await.unwrap() {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it ended without a word"),
            Err(status) => break status,
        }
    };
    assert_eq!(ended.code(), Code::Unauthenticated, "{ended}");
}

#[tokio::test]
async fn a_revocation_counts_at_once_and_over_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let config = Config { store: StoreKind::Embedded, data_directory: directory.path().into(), ..config() };
    let config = Config { identity_directory: Some(directory.path().join("identity")), ..config };
    let fixture = Fixture::with(config.clone()).await;
    let h1 = credentials(fixture.authority(), &Identity::agent("h1").unwrap());
    let h2 = credentials(fixture.authority(), &Identity::agent("h2").unwrap());
    let mut live = fixture.agent("h1").await;
    let ann = fixture.operator("ann", &["bulkhead:admins"]);
    let asks = async |ann: Arc<ClientConfig>| {
        fixture.send_as(&ann, Method::GET, &format!("{V1}/tiers"), String::new()).await.status()
    };
    assert_eq!(asks(ann.clone()).await, StatusCode::OK);
    // A certificate of the same second as the revocation would be told from a later one only by luck.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    for holder in ["agent/h1", "operator/ann"] {
        assert_eq!(fixture.make("revocations", json!({ "holder": holder })).await.0, StatusCode::CREATED);
    }
    let ended = live.receive().await.unwrap_err();
    assert_eq!(ended.code(), Code::Unauthenticated, "{ended}");
    assert_eq!(session(&fixture, &h1, "h1").await, Some(Code::Unauthenticated));
    assert_eq!(asks(ann).await, StatusCode::UNAUTHORIZED);
    let renew =
        RenewRequest { signing_request: Key::generate().unwrap().request().unwrap(), ..Default::default() };
    assert_eq!(fixture.client_with(&h1).renew(renew).await.unwrap_err().code(), Code::Unauthenticated);
    assert_eq!(session(&fixture, &h2, "h2").await, None, "nobody else");
    let serial = h2.holder().unwrap().serial;
    fixture.make("revocations", json!({ "serial": serial, "reason": "stolen" })).await;
    assert_eq!(session(&fixture, &h2, "h2").await, Some(Code::Unauthenticated));
    assert_eq!(fixture.make("revocations", json!({ "holder": "h1" })).await.0, StatusCode::BAD_REQUEST);

    // Whoever was revoked may be let in again, by somebody who may do that.
    let (token, _) = fixture.token(json!({ "host": "h1" })).await;
    let key = Key::generate().unwrap();
    let again = own(&key, fixture.join(&token, "h1", &key).await.unwrap());
    assert_eq!(session(&fixture, &again, "h1").await, None);
    fixture.controller.shutdown().await.unwrap();

    let fixture = Fixture::with(config).await;
    assert_eq!(session(&fixture, &h1, "h1").await, Some(Code::Unauthenticated));
    assert_eq!(session(&fixture, &again, "h1").await, None);
    let list = fixture.get(&format!("{V1}/revocations")).await;
    assert_eq!(list["items"].as_array().unwrap().len(), 3, "{list}");
}

#[tokio::test]
async fn every_path_but_the_probes_wants_to_know_who_asks() {
    let fixture = Fixture::new().await;
    let document = fixture.get("/openapi.json").await;
    let nobody = fixture.nobody("http/1.1");
    let agent = credentials(fixture.authority(), &Identity::agent("h1").unwrap());
    let agent = tls::client_config(fixture.authority().bundle(), Some(&agent), "http/1.1").unwrap();
    let mut tried = 0;
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys().filter(|key| *key != "parameters") {
            let method: Method = method.to_uppercase().parse().unwrap();
            let public = document["paths"][path]["get"]["security"] == json!([]);
            let path = path.replace(['{', '}'], "");
            let status = |response: hyper::Response<_>| response.status();
            let asked = status(fixture.send_as(&nobody, method.clone(), &path, String::new()).await);
            assert_eq!(asked == StatusCode::UNAUTHORIZED, !public, "{method} {path}: {asked}");
            let asked = status(fixture.send_as(&agent, method.clone(), &path, String::new()).await);
            assert_eq!(asked == StatusCode::FORBIDDEN, !public, "{method} {path}: {asked}");
            tried += 1;
        }
    }
    assert!(tried > 20, "{tried}");
}

#[tokio::test]
async fn a_token_lets_a_program_ask() {
    let fixture = Fixture::new().await;
    let body = json!({ "operator": { "name": "ci", "groups": ["bulkhead:admins"] }, "ttl": "1h" });
    let (_, made) = fixture.make("tokens", body).await;
    let token = made["token"].as_str().unwrap().to_owned();
    let nobody = fixture.nobody("http/1.1");
    let ask = async |value: String| {
        let headers = [("authorization", value.as_str())];
        let path = format!("{V1}/whoami");
        let response = fixture.send_with(&nobody, Method::GET, &path, &headers, String::new()).await.unwrap();
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice::<Value>(&body).unwrap())
    };
    let (status, me) = ask(format!("Bearer {token}")).await;
    assert_eq!((status, &me["caller"], &me["admin"]), (StatusCode::OK, &json!("operator/ci"), &json!(true)));
    for wrong in [
        format!("Bearer {token}x"),
        format!("Basic {token}"),
        "Bearer ".into(),
        format!("Bearer {}", token.replace("bho1", "bhj1")),
    ] {
        assert_eq!(ask(wrong.clone()).await.0, StatusCode::UNAUTHORIZED, "{wrong}");
    }
    // A token for machines lets nobody ask, and the other way round.
    let (join, _) = fixture.token(json!({})).await;
    let as_operator = format!("bho1.{}.{}", join.id, join.secret.reveal());
    assert_eq!(ask(format!("Bearer {as_operator}")).await.0, StatusCode::UNAUTHORIZED);
    let parts: Vec<&str> = token.split('.').collect();
    let as_join = format!("bhj1.{}.{}.{}", parts[1], parts[2], join.authority).parse().unwrap();
    assert!(fixture.join(&as_join, "h1", &Key::generate().unwrap()).await.is_err());
    tokio::time::sleep(Duration::from_millis(5)).await;
    fixture.make("revocations", json!({ "holder": "operator/ci" })).await;
    assert_eq!(ask(format!("Bearer {token}")).await.0, StatusCode::UNAUTHORIZED, "revoked");
}

#[tokio::test]
async fn somebody_elses_authority_signs_in_files() {
    let directory = tempfile::tempdir().unwrap();
    let external = Authority::generate("corp", SystemTime::now()).unwrap();
    std::fs::write(directory.path().join("ca.crt"), external.bundle()).unwrap();
    let config = Config { identity_directory: Some(directory.path().into()), ..config() };
    let error = bulkhead_controller::start(config.clone()).await.unwrap_err().to_string();
    assert!(error.contains("controller.crt"), "{error}");
    let controller = Identity::controller("c1").unwrap();
    let own = external.issue(&controller, LIFETIME, SystemTime::now(), &[]).unwrap();
    own.save(directory.path(), "controller").unwrap();
    let running = bulkhead_controller::start(config).await.unwrap();
    let admin = Identity::operator("ann", &["bulkhead:admins".into()]).unwrap();
    let admin = external.issue(&admin, LIFETIME, SystemTime::now(), &[]).unwrap();
    let admin = tls::client_config(external.bundle(), Some(&admin), "http/1.1").unwrap();
    tls::connect(&running.api.to_string(), &admin).await.unwrap();
    assert!(running.agent_credentials("h1").is_err(), "it cannot sign");
    running.shutdown().await.unwrap();
}

#[tokio::test]
async fn the_machines_own_socket_knows_its_callers() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("run/controller.sock");
    let fixture = Fixture::with(Config { socket: Some(socket.clone()), ..config() }).await;
    let mut stream = tokio::net::UnixStream::connect(&socket).await.unwrap();
    let request = format!("GET {V1}/whoami HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert!(text.contains("local/0") && text.contains("bulkhead:admins"), "{text}");
    let second = bulkhead_controller::start(Config {
        socket: Some(socket),
        identity_directory: Some(directory.path().join("identity")),
        ..config()
    });
    assert!(second.await.is_err(), "another controller's socket is not taken over");
    fixture.controller.shutdown().await.unwrap();
}
