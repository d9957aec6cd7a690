//! HTTP to the controller (TLS or its Unix socket) and to the agent (Unix socket), and errors that say what to do.

use std::path::Path;
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

use bulkhead_identity::tls;

use crate::cli::Common;
use crate::failure::Failure;

mod server;

pub(crate) use server::{ClientConfig, Server, client_config, default_config_path};

/// How long opening a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where to ask.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target<'a> {
    Controller(&'a Common),
    Agent(&'a Path),
}

/// Path below which all resources are.
pub(crate) const API: &str = "/apis/bulkhead.dev/v1";

impl Common {
    pub(crate) fn controller(&self) -> Target<'_> {
        Target::Controller(self)
    }

    /// Where the controller is, for people.
    pub(crate) fn server_name(&self) -> String {
        server::find(self).map_or_else(|_unknown| "an unknown place".into(), |server| server.to_string())
    }

    pub(crate) fn agent(&self) -> Target<'_> {
        Target::Agent(&self.agent_socket)
    }
}

/// Asks and reads the whole answer.
pub(crate) async fn call(
    target: Target<'_>,
    method: Method,
    path: &str,
    body: Option<String>,
) -> Result<Value, Failure> {
    let response = send(target, method, path, body).await?;
    let status = response.status();
    let bytes = response.into_body().collect().await.map_err(|error| broken(target, &error))?.to_bytes();
    let value: Value = if bytes.is_empty() {
        Value::Null
    } else {
        serde_json::from_slice(&bytes)
            .map_err(|error| Failure::Other(format!("{} gave no JSON: {error}", target.name())))?
    };
    if status.is_success() { Ok(value) } else { Err(refused(status, &value)) }
}

/// Asks and hands over each line of the answer as it comes.
pub(crate) async fn lines(
    target: Target<'_>,
    path: &str,
    mut each: impl FnMut(Value) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let response = send(target, Method::GET, path, None).await?;
    let status = response.status();
    let mut body = response.into_body();
    if !status.is_success() {
        let bytes = body.collect().await.map_err(|error| broken(target, &error))?.to_bytes();
        return Err(refused(status, &serde_json::from_slice(&bytes).unwrap_or_default()));
    }
    let mut rest: Vec<u8> = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| broken(target, &error))?;
        let Ok(data) = frame.into_data() else { continue };
        rest.extend_from_slice(&data);
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let value = serde_json::from_slice(&line)
                .map_err(|error| Failure::Other(format!("{} gave no JSON: {error}", target.name())))?;
            each(value)?;
        }
    }
    Err(Failure::Unreachable(format!("{} closed the stream", target.name())))
}

/// Asks and hands over the whole answer as it came.
pub(crate) async fn whole(target: Target<'_>, path: &str) -> Result<Bytes, Failure> {
    let response = send(target, Method::GET, path, None).await?;
    let status = response.status();
    let bytes = response.into_body().collect().await.map_err(|error| broken(target, &error))?.to_bytes();
    if status.is_success() {
        return Ok(bytes);
    }
    Err(refused(status, &serde_json::from_slice(&bytes).unwrap_or_default()))
}

async fn send(
    target: Target<'_>,
    method: Method,
    path: &str,
    body: Option<String>,
) -> Result<Response<Incoming>, Failure> {
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", "bulkhead")
        .header("content-type", "application/json");
    let server = match target {
        Target::Controller(common) => Some(server::find(common)?),
        Target::Agent(_) => None,
    };
    if let Some(Server::Tls { token: Some(token), .. }) = &server {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let request = request
        .body(Full::new(Bytes::from(body.unwrap_or_default())))
        .map_err(|error| Failure::Usage(error.to_string()))?;
    match (target, server) {
        (_, Some(Server::Tls { address, config, token: _ })) => {
            let connect = tokio::time::timeout(CONNECT_TIMEOUT, tls::connect(&address, &config)).await;
            match connect {
                Ok(Ok(stream)) => exchange(target, TokioIo::new(stream), request).await,
                Ok(Err(error)) => Err(target.unreachable(&error.to_string())),
                Err(_elapsed) => Err(target.unreachable("no answer")),
            }
        }
        (_, Some(Server::Unix(path))) => over_socket(target, &path, request).await,
        (Target::Agent(path), None) => over_socket(target, path, request).await,
        (Target::Controller(_), None) => Err(target.unreachable("it is nowhere")),
    }
}

async fn over_socket(
    target: Target<'_>,
    path: &Path,
    request: Request<Full<Bytes>>,
) -> Result<Response<Incoming>, Failure> {
    let stream = UnixStream::connect(path).await;
    let stream = stream.map_err(|error| target.unreachable(&error.to_string()))?;
    exchange(target, TokioIo::new(stream), request).await
}

async fn exchange<IO>(
    target: Target<'_>,
    io: IO,
    request: Request<Full<Bytes>>,
) -> Result<Response<Incoming>, Failure>
where
    IO: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(io).await.map_err(|error| broken(target, &error))?;
    tokio::spawn(connection);
    sender.send_request(request).await.map_err(|error| broken(target, &error))
}

impl Target<'_> {
    fn name(self) -> String {
        match self {
            Self::Controller(common) => match server::find(common) {
                Ok(server) => format!("the controller at {server}"),
                Err(_unknown) => "the controller".into(),
            },
            Self::Agent(path) => format!("the agent at {}", path.display()),
        }
    }

    fn unreachable(self, why: &str) -> Failure {
        let hint = match self {
            Self::Controller(_) => {
                "is it running? Start one with \"bulkhead standalone\" or name it with --server"
            }
            Self::Agent(_) => "is it running on this host, and are you root?",
        };
        Failure::Unreachable(format!("cannot reach {}: {why}\n{hint}", self.name()))
    }
}

fn broken(target: Target<'_>, error: &hyper::Error) -> Failure {
    Failure::Unreachable(format!("{} broke off: {error}", target.name()))
}

fn refused(status: StatusCode, value: &Value) -> Failure {
    let message = value.get("message").and_then(Value::as_str).map(str::to_owned);
    let message = message.unwrap_or_else(|| format!("refused with {status}"));
    if status.is_server_error() { Failure::Other(message) } else { Failure::no(message) }
}

/// Percent-encoding for one part of a path or a query value (RFC 3986 section 2.3).
pub(crate) fn encode(text: &str) -> String {
    use std::fmt::Write as _;
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}
