//! Operators whom an OpenID Connect provider knows: a provider of our own, over TLS.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bulkhead_controller::{Config, OidcConfig};
use bulkhead_identity::tls::{self, ServerIdentity};
use bulkhead_identity::{Authority, Identity, LIFETIME};
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::harness::{Fixture, config};

/// What a provider serves, and how often it was asked.
struct Provider {
    key: rcgen::KeyPair,
    url: String,
    asked: Arc<AtomicUsize>,
}

impl Provider {
    async fn start(directory: &std::path::Path) -> Self {
        let authority = Authority::generate("provider", SystemTime::now()).unwrap();
        std::fs::write(directory.join("provider.crt"), authority.bundle()).unwrap();
        let identity = Identity::controller("provider").unwrap();
        let own = authority.issue(&identity, LIFETIME, SystemTime::now(), &["localhost".into()]).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
        let identity = ServerIdentity::new(&own).unwrap();
        let server = tls::server_config(&identity, authority.bundle(), "http/1.1").unwrap();
        let mut incoming = tls::listen(listener, server);
        let key = rcgen::KeyPair::generate().unwrap();
        let point = rcgen::PublicKeyData::der_bytes(&key).to_vec();
        let part = |range: std::ops::Range<usize>| URL_SAFE_NO_PAD.encode(&point[range]);
        let keys = json!({ "keys": [
            { "kty": "EC", "crv": "P-256", "alg": "ES256", "kid": "k1", "x": part(1..33), "y": part(33..65) },
        ] });
        let document = json!({ "issuer": url, "jwks_uri": format!("{url}/keys") });
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&asked);
        tokio::spawn(async move {
            while let Some((stream, _)) = incoming.recv().await {
                let (keys, document, counted) = (keys.clone(), document.clone(), Arc::clone(&counted));
                let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                    counted.fetch_add(1, Ordering::Relaxed);
                    let answer =
                        if request.uri().path() == "/keys" { keys.clone() } else { document.clone() };
                    async move {
                        Ok::<_, std::convert::Infallible>(Response::new(Full::new(Bytes::from(
                            answer.to_string(),
                        ))))
                    }
                });
                let connection = hyper::server::conn::http1::Builder::new();
                tokio::spawn(connection.serve_connection(TokioIo::new(stream), service));
            }
        });
        Self { key, url, asked }
    }

    fn claims(&self) -> Value {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        json!({
            "iss": self.url, "aud": "bulkhead", "exp": now + 600, "nbf": now - 10, "sub": "1234",
            "email": "ann@example.org", "groups": ["net", "has blanks", "bulkhead:admins"],
        })
    }

    fn token(&self, claims: &Value) -> String {
        self.signed(claims, Some("k1"), &self.key)
    }

    fn signed(&self, claims: &Value, kid: Option<&str>, key: &rcgen::KeyPair) -> String {
        let header = Header { kid: kid.map(Into::into), ..Header::new(Algorithm::ES256) };
        encode(&header, claims, &EncodingKey::from_ec_pem(key.serialize_pem().as_bytes()).unwrap()).unwrap()
    }
}

async fn who(fixture: &Fixture, token: &str) -> (StatusCode, Value) {
    use http_body_util::BodyExt;
    let nobody = fixture.nobody("http/1.1");
    let value = format!("Bearer {token}");
    let headers = [("authorization", value.as_str())];
    let path = "/apis/bulkhead.dev/v1/whoami";
    let response = fixture.send_with(&nobody, Method::GET, path, &headers, String::new()).await.unwrap();
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&body).unwrap())
}

fn with(provider: &Provider, directory: &std::path::Path) -> Config {
    let oidc = OidcConfig {
        issuer: provider.url.clone(),
        audience: "bulkhead".into(),
        username_claim: "email".into(),
        groups_claim: "groups".into(),
        authorities: directory.join("provider.crt"),
    };
    Config { oidc: Some(oidc), ..config() }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_token_names_its_operator_who_is_nobody_of_ours() {
    let directory = tempfile::tempdir().unwrap();
    let provider = Provider::start(directory.path()).await;
    let fixture = Fixture::with(with(&provider, directory.path())).await;
    let token = provider.token(&provider.claims());
    let (status, me) = who(&fixture, &token).await;
    assert_eq!(status, StatusCode::OK, "{me}");
    assert_eq!(me["caller"], "operator/oidc:ann@example.org");
    // The provider's groups are its own: none of them makes an administrator here.
    assert_eq!(me["groups"], json!(["oidc:net", "oidc:bulkhead:admins"]));
    assert_eq!(me["admin"], false);
    let role = "apiVersion: bulkhead.dev/v1\nkind: RoleBinding\nmetadata: {name: a}\nspec: {role: Viewer, groups: ['oidc:net']}\n";
    fixture.apply(role).await;
    let headers = [("authorization", format!("Bearer {token}"))];
    let headers = [(headers[0].0, headers[0].1.as_str())];
    let path = "/apis/bulkhead.dev/v1/policies";
    let nobody = fixture.nobody("http/1.1");
    let listed = fixture.send_with(&nobody, Method::GET, path, &headers, String::new()).await.unwrap();
    assert_eq!(listed.status(), StatusCode::OK);
    // One document and one list of keys, however many tokens.
    assert_eq!(provider.asked.load(Ordering::Relaxed), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_tokens_let_nobody_in() {
    let directory = tempfile::tempdir().unwrap();
    let provider = Provider::start(directory.path()).await;
    let fixture = Fixture::with(with(&provider, directory.path())).await;
    let changed = |name: &str, value: Value| {
        let mut claims = provider.claims();
        claims[name] = value;
        provider.token(&claims)
    };
    let without = |name: &str| {
        let mut claims = provider.claims();
        claims.as_object_mut().unwrap().remove(name);
        provider.token(&claims)
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let stranger = rcgen::KeyPair::generate().unwrap();
    let shared = encode(
        &Header { kid: Some("k1".into()), ..Header::new(Algorithm::HS256) },
        &provider.claims(),
        &EncodingKey::from_secret(b"secret"),
    )
    .unwrap();
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let unsigned = format!("{}.{}.", part(&json!({ "alg": "none", "kid": "k1" })), part(&provider.claims()));
    let good = provider.token(&provider.claims());
    for (what, token) in [
        ("expired", changed("exp", json!(now - 120))),
        ("without an end", without("exp")),
        ("not yet valid", changed("nbf", json!(now + 600))),
        ("another issuer's", changed("iss", json!("https://else.example"))),
        ("without issuer", without("iss")),
        ("for another client", changed("aud", json!("other"))),
        ("without audience", without("aud")),
        ("nameless", without("email")),
        ("of a name that cannot be one", changed("email", json!("a b"))),
        ("signed by a stranger", provider.signed(&provider.claims(), Some("k1"), &stranger)),
        ("of an unknown key", provider.signed(&provider.claims(), Some("k2"), &stranger)),
        ("signed with a shared secret", shared),
        ("not signed", unsigned),
        ("cut off", good[..good.len() - 3].to_owned()),
    ] {
        let (status, answer) = who(&fixture, &token).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED, "{what}: {answer}");
    }
    assert_eq!(who(&fixture, &good).await.0, StatusCode::OK);
    // Unknown keys do not make us ask again and again.
    assert!(provider.asked.load(Ordering::Relaxed) <= 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_cannot_be_reached_or_trusted_lets_nobody_in() {
    let directory = tempfile::tempdir().unwrap();
    let provider = Provider::start(directory.path()).await;
    let mut config = with(&provider, directory.path());
    let other = Authority::generate("other", SystemTime::now()).unwrap();
    std::fs::write(directory.path().join("provider.crt"), other.bundle()).unwrap();
    let fixture = Fixture::with(config.clone()).await;
    let token = provider.token(&provider.claims());
    let (status, answer) = who(&fixture, &token).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED, "{answer}");
    assert!(answer["message"].as_str().unwrap().contains("cannot be fetched"), "{answer}");
    config.oidc = None;
    let fixture = Fixture::with(config).await;
    let started = SystemTime::now();
    assert_eq!(who(&fixture, &token).await.0, StatusCode::UNAUTHORIZED);
    assert!(started.elapsed().unwrap() < Duration::from_secs(5));
}
