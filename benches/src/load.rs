//! The load generator: TCP between two namespaces, one stream at a time.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::netns::Namespace;
use crate::stats::median;

/// Where a server answers each byte with a byte.
const ECHO_PORT: u16 = 7001;
/// Where a server takes whatever comes.
const SINK_PORT: u16 = 7002;
/// Bytes that are written or read at once in bulk.
const CHUNK_BYTES: usize = 256 << 10;
/// What makes a batch of about a millisecond.
const REQUESTS_PER_BATCH: u32 = 32;
const CONNECTIONS_PER_BATCH: u32 = 8;
const CHUNKS_PER_BATCH: u32 = 32;
/// Where the client runs, and the server of requests too: what the kernel does for one exchange is then all
/// on one processor and adds up, and no idle processor has to wake up. The server of bulk is on the other.
pub(crate) const CLIENT_CPU: usize = 0;
/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(5);
/// The first byte of a connection that asks for it to be closed after the answer.
const ONCE: u8 = 1;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Test {
    /// Request and response of one byte: µs each.
    RequestResponse,
    /// Connect, request, response, close: µs each.
    Connect,
    /// One direction, as fast as it goes: Gbit/s.
    Bulk,
}

impl Test {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::RequestResponse, Self::Connect, Self::Bulk];
}

/// Starts the servers in a namespace; they end with the process.
pub(crate) fn serve(namespace: &Namespace) -> anyhow::Result<()> {
    namespace.exec(|| -> anyhow::Result<()> {
        let echo = TcpListener::bind((Ipv4Addr::UNSPECIFIED, ECHO_PORT))?;
        let sink = TcpListener::bind((Ipv4Addr::UNSPECIFIED, SINK_PORT))?;
        std::thread::Builder::new().name("echo".into()).spawn(move || {
            pin(CLIENT_CPU);
            // A connection that breaks is the client's to complain about.
            echo.incoming().flatten().for_each(|stream| drop(answer(stream)));
        })?;
        std::thread::Builder::new().name("sink".into()).spawn(move || {
            pin(1 - CLIENT_CPU);
            sink.incoming().flatten().for_each(|stream| drop(swallow(stream)));
        })?;
        Ok(())
    })?
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 {
        stream.write_all(&byte)?;
        if byte[0] == ONCE {
            break;
        }
    }
    Ok(())
}

fn swallow(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut chunk = vec![0; CHUNK_BYTES];
    while stream.read(&mut chunk)? > 0 {}
    // Tells the client that all has arrived.
    stream.write_all(&[0])
}

/// Measures for about `time` in the calling thread's namespace.
pub(crate) fn measure(test: Test, server: Ipv4Addr, time: Duration) -> anyhow::Result<f64> {
    pin(CLIENT_CPU);
    let result = match test {
        Test::RequestResponse => request_response(server, time),
        Test::Connect => connect(server, time),
        Test::Bulk => bulk(server, time),
    };
    result.with_context(|| format!("{test:?} to {server}"))
}

/// Keeps the calling thread on one processor, if there are two.
pub(crate) fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    // With one processor there is nothing to choose.
    let _ = sched_setaffinity(None, &set);
}

fn open(server: Ipv4Addr, port: u16) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&SocketAddr::from((server, port)), PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Does something again and again for about `time`; the median of what one batch takes, in seconds. Batches
/// of about a millisecond: when another process takes the processor away, the few that it hits do not count.
fn batches(time: Duration, mut batch: impl FnMut() -> std::io::Result<()>) -> std::io::Result<f64> {
    batch()?;
    let (started, mut seconds) = (Instant::now(), Vec::new());
    while started.elapsed() < time {
        let begun = Instant::now();
        batch()?;
        seconds.push(begun.elapsed().as_secs_f64());
    }
    Ok(median(&seconds))
}

fn request_response(server: Ipv4Addr, time: Duration) -> std::io::Result<f64> {
    let mut stream = open(server, ECHO_PORT)?;
    let mut byte = [0];
    let batch = batches(time, || {
        (0..REQUESTS_PER_BATCH).try_for_each(|_| {
            stream.write_all(&[0])?;
            stream.read_exact(&mut byte)
        })
    })?;
    Ok(batch * 1e6 / f64::from(REQUESTS_PER_BATCH))
}

fn connect(server: Ipv4Addr, time: Duration) -> std::io::Result<f64> {
    let mut byte = [0];
    let mut exchange = || -> std::io::Result<()> {
        let mut stream = open(server, ECHO_PORT)?;
        stream.write_all(&[ONCE])?;
        stream.read_exact(&mut byte)?;
        // The server closes first, so that the client's ports are free again at once.
        match stream.read(&mut byte) {
            Ok(0) => Ok(()),
            Ok(_) => Err(ErrorKind::InvalidData.into()),
            Err(error) => Err(error),
        }
    };
    let batch = batches(time, || (0..CONNECTIONS_PER_BATCH).try_for_each(|_| exchange()))?;
    Ok(batch * 1e6 / f64::from(CONNECTIONS_PER_BATCH))
}

fn bulk(server: Ipv4Addr, time: Duration) -> std::io::Result<f64> {
    let mut stream = open(server, SINK_PORT)?;
    let chunk = vec![0; CHUNK_BYTES];
    let mut send = |time| batches(time, || (0..CHUNKS_PER_BATCH).try_for_each(|_| stream.write_all(&chunk)));
    // The window opens first.
    send(time / 5)?;
    let batch = send(time)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    stream.read_exact(&mut [0])?;
    #[expect(clippy::cast_precision_loss, reason = "a chunk is small")]
    let bits = f64::from(CHUNKS_PER_BATCH) * CHUNK_BYTES as f64 * 8.0;
    Ok(bits / batch / 1e9)
}
