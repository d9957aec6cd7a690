//! Just enough HTTP to ask the product: one request, one answer with a length, one connection.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// GET over a Unix socket.
pub(crate) fn get_unix(socket: &Path, path: &str) -> Result<Value> {
    let stream = UnixStream::connect(socket).with_context(|| format!("{}", socket.display()))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    exchange(stream, path)
}

fn exchange(mut stream: impl Read + Write, path: &str) -> Result<Value> {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: bulkhead\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8(answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer without end of its head")?;
    let status = head.split_whitespace().nth(1).unwrap_or_default();
    ensure!(status == "200", "{path}: {status} {body}");
    ensure!(!head.to_ascii_lowercase().contains("transfer-encoding"), "{path}: a stream, not an answer");
    serde_json::from_str(body).with_context(|| format!("{path}: {body}"))
}
