//! The controller's API for operators, as far as the simulation needs it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bulkhead_identity::tls::{self, ClientConfig};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};

/// Path below which all resources are.
const API: &str = "/apis/bulkhead.dev/v1";
/// Longest wait for an answer; the list of a hundred thousand workloads takes seconds.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(60);

/// Where operators are served.
#[derive(Debug, Clone)]
pub(crate) struct Rest {
    address: String,
    config: Arc<ClientConfig>,
}

impl Rest {
    /// For `HOST:PORT`.
    pub(crate) fn new(address: &str, config: Arc<ClientConfig>) -> Self {
        Self { address: address.to_owned(), config }
    }

    async fn call(&self, method: Method, path: &str, body: String) -> anyhow::Result<Value> {
        let stream = tls::connect(&self.address, &self.config).await.with_context(|| self.address.clone())?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "bulkhead")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))?;
        let exchange = async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            anyhow::Ok((status, response.into_body().collect().await?.to_bytes()))
        };
        let answer = tokio::time::timeout(ANSWER_TIME_MAX, exchange).await;
        let (status, bytes) = answer.with_context(|| format!("no answer to {path}"))??;
        if !status.is_success() {
            bail!("{path}: {status}: {}", String::from_utf8_lossy(&bytes));
        }
        Ok(serde_json::from_slice(&bytes)?)
    }

    /// All objects of a kind.
    pub(crate) async fn list(&self, plural: &str) -> anyhow::Result<Vec<Value>> {
        let mut answer = self.call(Method::GET, &format!("{API}/{plural}"), String::new()).await?;
        match answer["items"].take() {
            Value::Array(items) => Ok(items),
            other => bail!("{plural}: expected a list, found {other}"),
        }
    }

    /// Creates or changes objects, all or none.
    pub(crate) async fn apply(&self, manifests: &[Value]) -> anyhow::Result<()> {
        let sources: Vec<Value> = manifests
            .iter()
            .map(|manifest| json!({ "name": "simulation", "text": manifest.to_string() }))
            .collect();
        let body = json!({ "sources": sources }).to_string();
        self.call(Method::POST, &format!("{API}/apply?force=true"), body).await.map(drop)
    }
}
