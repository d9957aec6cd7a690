//! A controller, a kubeconfig for an administrator, and kubectl.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

const BINARY: &str = env!("CARGO_BIN_EXE_bulkhead");

/// A process that ends with the test.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub(crate) struct Setup {
    directory: TempDir,
    api: String,
    socket: String,
    kubectl: PathBuf,
    _controller: Running,
}

/// The client to try; another version by `BULKHEAD_KUBECTL`.
fn find_kubectl() -> PathBuf {
    if let Some(path) = std::env::var_os("BULKHEAD_KUBECTL") {
        return path.into();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join("kubectl")).find(|file| file.exists());
    found.unwrap_or_else(|| panic!("there is no kubectl: make test installs it (Debian's kubernetes-client)"))
}

fn succeeded(what: &[&str], output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{what:?}: {error}{text}");
    text
}

impl Setup {
    pub(crate) fn new() -> Self {
        let kubectl = find_kubectl();
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("controller.sock");
        let mut process = Command::new(BINARY)
            .args(["controller", "--listen", "127.0.0.1:0", "--listen-agents", "127.0.0.1:0"])
            .args(["--log-format", "json"])
            .arg("--socket")
            .arg(&socket)
            .arg("--data-dir")
            .arg(directory.path().join("data"))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let controller = Running(process);
        let (mut log, mut api) = (String::new(), None);
        while api.is_none() {
            let line = lines.next().unwrap_or_else(|| panic!("the controller ended:\n{log}")).unwrap();
            let event: Value = serde_json::from_str(&line).unwrap_or_default();
            api = event["fields"]["api"].as_str().map(ToOwned::to_owned);
            log.push_str(&line);
        }
        // Read on, so that it can write.
        std::thread::spawn(move || lines.for_each(drop));
        let socket = format!("unix://{}", socket.display());
        let setup = Self { directory, api: api.unwrap(), socket, kubectl, _controller: controller };
        setup.kubeconfig("ann", &["--group", "bulkhead:admins"]);
        setup
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn file(&self, name: &str, text: &str) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    /// The kubeconfig of an operator.
    pub(crate) fn kubeconfig(&self, name: &str, groups: &[&str]) -> String {
        let (client, kube) = (self.path(&format!("{name}.yaml")), self.path(&format!("{name}.kubeconfig")));
        let api = format!("https://{}", self.api);
        let mut make = Command::new(BINARY);
        make.args([
            "--server",
            &self.socket,
            "certificate",
            "create",
            &format!("operator/{name}"),
            "--api",
            &api,
        ]);
        make.args(groups).arg("--write").arg(&client);
        succeeded(&["certificate"], &make.output().unwrap());
        let mut make = Command::new(BINARY);
        make.arg("--client-config").arg(&client).arg("kubeconfig").arg("--write").arg(&kube);
        succeeded(&["kubeconfig"], &make.output().unwrap());
        kube.display().to_string()
    }

    /// The kubeconfig of a program that has a token instead of a certificate.
    pub(crate) fn token_kubeconfig(&self, name: &str, group: &str) -> String {
        let made = self.bulkhead(&["token", "create", "--operator", name, "--group", group, "-o", "json"]);
        let made: Value = serde_json::from_str(&made).unwrap();
        let kube = self.path(&format!("{name}.kubeconfig"));
        let mut make = Command::new(BINARY);
        make.env("BULKHEAD_TOKEN", made["token"].as_str().unwrap());
        make.arg("--client-config").arg(self.path("ann.yaml")).arg("kubeconfig").arg("--write").arg(&kube);
        succeeded(&["kubeconfig"], &make.output().unwrap());
        kube.display().to_string()
    }

    pub(crate) fn bulkhead(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(BINARY);
        command.current_dir(self.directory.path()).args(["--server", &self.socket]).args(arguments);
        succeeded(arguments, &command.output().unwrap())
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(self.directory.path())
            .env("KUBECONFIG", self.path("ann.kubeconfig"))
            .env("HOME", self.directory.path());
        command
    }

    pub(crate) fn kubectl_output(&self, environment: &[(&str, &str)], arguments: &[&str]) -> Output {
        let mut command = self.command(&self.kubectl);
        command.envs(environment.iter().copied()).args(arguments).output().unwrap()
    }

    pub(crate) fn kubectl(&self, arguments: &[&str]) -> String {
        self.kubectl_with(&[], arguments)
    }

    pub(crate) fn kubectl_with(&self, environment: &[(&str, &str)], arguments: &[&str]) -> String {
        succeeded(arguments, &self.kubectl_output(environment, arguments))
    }

    pub(crate) fn kubectl_as(&self, kubeconfig: &str, arguments: &[&str]) -> String {
        self.kubectl_with(&[("KUBECONFIG", kubeconfig)], arguments)
    }

    /// What it says on standard error when it fails with a code.
    pub(crate) fn kubectl_fails(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.kubectl_output(&[], arguments);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
        message
    }

    pub(crate) fn spawn(&self, arguments: &[&str]) -> Running {
        let mut command = self.command(&self.kubectl);
        Running(command.args(arguments).stdout(Stdio::piped()).spawn().unwrap())
    }

    /// How this version calls the list of what may be pruned.
    pub(crate) fn prune_flag(&self) -> &'static str {
        let help = self.kubectl(&["apply", "--help"]);
        if help.contains("--prune-allowlist") { "--prune-allowlist" } else { "--prune-whitelist" }
    }

    /// Runs lines of a shell, with `kubectl` and `bulkhead` as somebody who has only just got his client configuration.
    pub(crate) fn script(&self, text: &str) {
        let programs = self.path("bin");
        std::fs::create_dir_all(&programs).unwrap();
        for (name, program) in [("kubectl", &*self.kubectl), ("bulkhead", Path::new(BINARY))] {
            let text = format!("#!/bin/sh\nexec {} \"$@\"\n", program.display());
            let path = programs.join(name);
            std::fs::write(&path, text).unwrap();
            let made = Command::new("chmod").arg("+x").arg(&path).status().unwrap();
            assert!(made.success());
        }
        let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap_or_default());
        let mut command = self.command(Path::new("bash"));
        command.env_remove("KUBECONFIG").env("PATH", path);
        command.env("BULKHEAD_CLIENT_CONFIG", self.path("ann.yaml"));
        let output = command.args(["-euxo", "pipefail", "-c", text]).output().unwrap();
        succeeded(&[text], &output);
    }
}
