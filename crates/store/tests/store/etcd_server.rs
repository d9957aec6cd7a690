//! A real etcd on free ports of this machine, with its data in a directory of its own. Ends with the value.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Longest that a member may take until it answers.
const START_TIME_MAX: Duration = Duration::from_secs(20);
/// How often it is looked whether it does.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How often other ports are tried, since somebody may take one before etcd does.
const STARTS_MAX: usize = 5;

/// A member of an etcd, as a rule the only one.
#[derive(Debug)]
pub(crate) struct EtcdServer {
    directory: tempfile::TempDir,
    client_port: u16,
    peer_port: u16,
    /// `NAME=URL` of all members.
    members: String,
    arguments: Vec<String>,
    process: Option<Child>,
}

impl EtcdServer {
    /// Starts one and waits until it serves.
    pub(crate) fn start() -> Self {
        Self::with(&[])
    }

    /// With flags of its own.
    pub(crate) fn with(arguments: &[&str]) -> Self {
        for _ in 0..STARTS_MAX {
            let mut servers = Self::members(1, arguments);
            if servers[0].run() {
                return servers.remove(0);
            }
        }
        panic!("etcd does not start on any ports");
    }

    /// Starts a cluster and waits until all its members serve.
    pub(crate) fn cluster(count: usize) -> Vec<Self> {
        for _ in 0..STARTS_MAX {
            let mut servers = Self::members(count, &[]);
            // None serves before most are there.
            servers.iter_mut().for_each(Self::spawn);
            if servers.iter_mut().all(Self::serves) {
                return servers;
            }
        }
        panic!("etcd does not start on any ports");
    }

    fn members(count: usize, arguments: &[&str]) -> Vec<Self> {
        let mut servers: Vec<_> = (0..count)
            .map(|_| Self {
                directory: tempfile::tempdir().unwrap(),
                client_port: free_port(),
                peer_port: free_port(),
                members: String::new(),
                arguments: arguments.iter().map(ToString::to_string).collect(),
                process: None,
            })
            .collect();
        let members: Vec<_> =
            servers.iter().map(|server| format!("{}={}", server.name(), server.peer())).collect();
        servers.iter_mut().for_each(|server| server.members = members.join(","));
        servers
    }

    fn name(&self) -> String {
        format!("test{}", self.peer_port)
    }

    fn peer(&self) -> String {
        format!("http://127.0.0.1:{}", self.peer_port)
    }

    /// `HOST:PORT` of the member.
    pub(crate) fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.client_port)
    }

    /// As `kill -9` ends it.
    pub(crate) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// Starts it again after [`EtcdServer::kill`], with the data that it had.
    pub(crate) fn restart(&mut self) {
        assert!(self.run(), "etcd does not come back:\n{}", self.log());
    }

    /// Runs etcd's command line client.
    pub(crate) fn ctl(&self, arguments: &[&str]) -> String {
        let endpoint = format!("--endpoints={}", self.endpoint());
        let output = Command::new("etcdctl").env("ETCDCTL_API", "3").arg(endpoint).args(arguments).output();
        let output =
            output.expect("etcdctl of Debian's package etcd-client is needed: make test-deps installs it");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn run(&mut self) -> bool {
        self.spawn();
        self.serves()
    }

    fn spawn(&mut self) {
        let client = format!("http://127.0.0.1:{}", self.client_port);
        let peer = self.peer();
        let log = std::fs::File::create(self.log_file()).unwrap();
        let tls = self.arguments.iter().any(|argument| argument == "--cert-file");
        let scheme = if tls { "https" } else { "http" };
        let process = Command::new("etcd")
            .args(["--name", &self.name(), "--logger", "zap", "--log-level", "warn"])
            .arg("--data-dir")
            .arg(self.directory.path().join("data"))
            .args(["--listen-client-urls", &client.replace("http", scheme)])
            .args(["--advertise-client-urls", &client.replace("http", scheme)])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &self.members])
            .args(&self.arguments)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        let process =
            process.expect("etcd of Debian's package etcd-server is needed: make test-deps installs it");
        self.process = Some(process);
    }

    /// Waits until it serves, or has ended.
    fn serves(&mut self) -> bool {
        let Some(process) = &mut self.process else { return false };
        let deadline = Instant::now() + START_TIME_MAX;
        while Instant::now() < deadline {
            // The port is listened on only once the member has joined its cluster.
            if std::net::TcpStream::connect(("127.0.0.1", self.client_port)).is_ok() {
                return true;
            }
            if process.try_wait().unwrap().is_some() {
                break;
            }
            std::thread::sleep(LOOK_EVERY);
        }
        self.kill();
        false
    }

    fn log_file(&self) -> PathBuf {
        self.directory.path().join("log")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    /// Where its files are.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A port that nobody listens on now.
fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}
