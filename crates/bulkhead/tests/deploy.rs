//! What `deploy/` holds is right: every setting with its default, units that systemd understands, and what it hears of us.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use bulkhead_model::document;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

const BINARY: &str = env!("CARGO_BIN_EXE_bulkhead");

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy")
}

/// Keys of a value, with those of what is in it.
fn keys(value: &Value, path: &str, all: &mut BTreeSet<String>) {
    for (key, value) in value.as_object().into_iter().flatten() {
        let path = format!("{path}.{key}");
        keys(value, &path, all);
        all.insert(path);
    }
}

/// A file of settings says what the defaults are, and leaves out nothing but `absent`.
fn has_every_default<T>(file: &str, absent: &[&str])
where
    T: Default + Serialize + DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let text = std::fs::read_to_string(deploy().join(file)).unwrap();
    let documents = document::read(file, &text).unwrap();
    let written = documents[0].to_json();
    assert_eq!(serde_json::from_value::<T>(written.clone()).unwrap(), T::default(), "{file}");
    let (mut known, mut named) = (BTreeSet::new(), BTreeSet::new());
    keys(&serde_json::to_value(T::default()).unwrap(), "", &mut known);
    keys(&written, "", &mut named);
    let missing: Vec<_> = known.difference(&named).filter(|key| !absent.contains(&key.as_str())).collect();
    assert!(missing.is_empty(), "{file} lacks {missing:?}");
}

#[test]
fn the_files_of_settings_name_every_setting_with_its_default() {
    has_every_default::<bulkhead_controller::Config>("controller.yaml", &[]);
    // The machine's own name.
    has_every_default::<bulkhead_agent::Config>("agent.yaml", &[".host"]);
    has_every_default::<bulkhead_controller::relay::Config>("relay.yaml", &[".name"]);
}

#[test]
fn an_unknown_setting_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("controller.yaml");
    std::fs::write(&file, "listenApi: 127.0.0.1:0\nlease: 5\n").unwrap();
    let output = Command::new(BINARY).args(["controller", "--config"]).arg(&file).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("unknown field `lease`") && said.contains("leaseMs"), "{said}");
}

#[test]
fn systemd_understands_the_units() {
    let directory = tempfile::tempdir().unwrap();
    for unit in ["bulkhead-controller.service", "bulkhead-agent.service", "bulkhead-relay.service"] {
        let text = std::fs::read_to_string(deploy().join("systemd").join(unit)).unwrap();
        let installed = text.replace("/usr/local/bin/bulkhead", BINARY);
        assert_ne!(text, installed);
        // The manual pages are not installed here.
        let installed: String = installed
            .lines()
            .filter(|line| !line.starts_with("Documentation="))
            .fold(String::new(), |all, line| all + line + "\n");
        let path = directory.path().join(unit);
        std::fs::write(&path, installed).unwrap();
        let output = Command::new("systemd-analyze").arg("verify").arg(&path).output();
        let output = output.expect("systemd-analyze is missing: install systemd");
        let said = String::from_utf8_lossy(&output.stderr);
        let ours: Vec<_> = said.lines().filter(|line| line.contains("bulkhead")).collect();
        assert!(output.status.success() && ours.is_empty(), "{said}");
    }
}

#[test]
fn a_supervisor_hears_when_a_controller_is_ready_and_when_it_stops() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let supervisor = UnixDatagram::bind(path("notify")).unwrap();
    supervisor.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut controller = Command::new(BINARY)
        .args(["controller", "--listen", "127.0.0.1:0", "--listen-agents", "127.0.0.1:0", "--data-dir"])
        .arg(path("data"))
        .arg("--socket")
        .arg(path("controller.sock"))
        .env("NOTIFY_SOCKET", path("notify"))
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let heard = || {
        let mut bytes = [0; 64];
        let length = supervisor.recv(&mut bytes).unwrap_or_default();
        String::from_utf8_lossy(&bytes[..length]).into_owned()
    };
    let ready = heard();
    // Whoever was told so is answered.
    let server = format!("unix://{}", path("controller.sock").display());
    let asked = Command::new(BINARY).args(["whoami", "--server", &server]).output().unwrap();
    let signalled = Command::new("kill").args(["-TERM", &controller.id().to_string()]).status().unwrap();
    let stopping = heard();
    let ended = controller.wait().unwrap();
    assert_eq!((ready.as_str(), stopping.as_str()), ("READY=1", "STOPPING=1"));
    assert!(asked.status.success() && signalled.success() && ended.success());
}

/// Ends a daemon however the test ends.
struct Daemon(std::process::Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_relay_joins_with_a_token_says_when_it_is_ready_and_is_probed() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let free = || std::net::TcpListener::bind(("127.0.77.1", 0)).unwrap().local_addr().unwrap().to_string();
    let (agents, probes) = (free(), free());
    let notified = |name: &str| {
        let socket = UnixDatagram::bind(path(name)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        move || {
            let mut bytes = [0; 64];
            let length = socket.recv(&mut bytes).unwrap_or_default();
            String::from_utf8_lossy(&bytes[..length]).into_owned()
        }
    };
    let of_controller = notified("notify-controller");
    let controller = Command::new(BINARY)
        .args(["controller", "--listen", "127.0.0.1:0", "--listen-agents", &agents, "--data-dir"])
        .arg(path("data"))
        .arg("--socket")
        .arg(path("controller.sock"))
        .env("NOTIFY_SOCKET", path("notify-controller"))
        .stderr(std::process::Stdio::null())
        .spawn();
    let _controller = Daemon(controller.unwrap());
    assert_eq!(of_controller(), "READY=1");
    let server = format!("unix://{}", path("controller.sock").display());
    let ask = |arguments: &[&str]| {
        let output = Command::new(BINARY).args(arguments).args(["--server", &server]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let made = ask(&["token", "create", "--relay", "site1", "--hosts", "s1-*,gate"]);
    assert!(made.contains("may speak for s1-*, gate"), "{made}");
    std::fs::write(path("token"), made.lines().next().unwrap()).unwrap();
    assert!(ask(&["token", "list"]).contains("joins as relay/site1"));

    let of_relay = notified("notify-relay");
    let upstream = format!("https://{agents}");
    let relay = Command::new(BINARY)
        .args(["relay", "--name", "site1", "--upstream", &upstream, "--listen-agents", "127.0.0.1:0"])
        .args(["--listen-probes", &probes, "--advertise-agents", "relay.example.org:7441"])
        .args(["--log-format", "json", "--join-token-file"])
        .arg(path("token"))
        .arg("--state-dir")
        .arg(path("relay"))
        .env("NOTIFY_SOCKET", path("notify-relay"))
        .stderr(std::process::Stdio::null())
        .spawn();
    let mut relay = Daemon(relay.unwrap());
    assert_eq!(of_relay(), "READY=1");
    let probe = |page: &str| {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(&probes).unwrap();
        write!(stream, "GET {page} HTTP/1.1\r\nHost: relay\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    assert!(probe("/healthz").ends_with("ok\n"));
    let began = std::time::Instant::now();
    while !probe("/readyz").ends_with("ok\n") {
        assert!(began.elapsed() < Duration::from_secs(20), "{}", probe("/readyz"));
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(probe("/metrics").contains("bulkhead_relay_upstream_connected 1\n"));
    let status = ask(&["status"]);
    assert!(status.contains("site1") && status.contains("relay.example.org:7441"), "{status}");

    let signalled = Command::new("kill").args(["-TERM", &relay.0.id().to_string()]).status().unwrap();
    assert_eq!(of_relay(), "STOPPING=1");
    assert!(signalled.success() && relay.0.wait().unwrap().success());
    ask(&["certificate", "revoke", "relay/site1"]);
    let status = ask(&["status"]);
    assert!(status.lines().any(|line| line.starts_with("site1") && line.contains("away")), "{status}");
}
