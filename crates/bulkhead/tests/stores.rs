//! `store` as people run it: copies of a running controller's repository, and its way from a file into etcd and back.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

// The same as in the store's own tests.
#[path = "../../store/tests/store/etcd_server.rs"]
#[allow(dead_code, reason = "the store's tests use more of it")]
mod etcd_server;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

use etcd_server::EtcdServer;

const BINARY: &str = env!("CARGO_BIN_EXE_bulkhead");

fn policy(name: &str) -> String {
    format!(
        "apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {{name: {name}}}\nspec: {{appliesTo: role == 'db', ingress: []}}\n"
    )
}

fn run(arguments: &[&str]) -> Output {
    Command::new(BINARY).args(arguments).output().unwrap()
}

/// The answer of a command that must succeed.
fn done(arguments: &[&str]) -> Value {
    let output = run(&[arguments, &["-o", "json"]].concat());
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

/// The message of a command that must fail with a code.
fn refused(code: i32, arguments: &[&str]) -> String {
    let output = run(arguments);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
    message
}

/// Sends a signal, by which the process must end well.
fn end(process: &mut Child, signal: &str) {
    let sent = Command::new("kill").args([signal, &process.id().to_string()]).status().unwrap();
    assert!(sent.success());
    assert!(process.wait().unwrap().success());
}

/// A controller, killed if a test fails before it is stopped.
struct Controller {
    process: Option<Child>,
    server: String,
    /// Where its socket is.
    _directory: tempfile::TempDir,
}

impl Controller {
    fn start(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("controller.sock");
        let mut process = Command::new(BINARY)
            .args(["controller", "--listen", "127.0.0.1:0", "--listen-agents", "127.0.0.1:0"])
            .args(["--log-format", "json"])
            .arg("--socket")
            .arg(&socket)
            .args(arguments)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let mut controller = Self { process: Some(process), server: String::new(), _directory: directory };
        let mut log = String::new();
        while controller.server.is_empty() {
            let line = lines.next().unwrap_or_else(|| panic!("the controller ended:\n{log}")).unwrap();
            let event: Value = serde_json::from_str(&line).unwrap_or_default();
            if event["fields"]["api"].is_string() {
                controller.server = format!("unix://{}", socket.display());
            }
            log.push_str(&line);
        }
        // Read on, so that it can write.
        std::thread::spawn(move || lines.for_each(drop));
        controller
    }

    fn apply(&self, directory: &Path, name: &str) {
        let file = directory.join(format!("{name}.yaml"));
        std::fs::write(&file, policy(name)).unwrap();
        done(&["--server", &self.server, "apply", "-f", &file.display().to_string()]);
    }

    fn policies(&self) -> Vec<String> {
        let list = done(&["--server", &self.server, "get", "policies"]);
        let items = list["items"].as_array().unwrap().iter();
        items.map(|item| item["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    }

    fn stop(mut self) {
        end(&mut self.process.take().unwrap(), "-TERM");
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }
}

#[test]
fn a_running_controller_is_copied_and_a_copy_restored() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let controller = Controller::start(&["--data-dir", &path("data")]);
    controller.apply(directory.path(), "one");
    let (file, store) = (path("copy"), format!("embedded://{}", path("data")));
    let copy = done(&["--server", &controller.server, "store", "backup", "--file", &file]);
    assert_eq!(
        copy["objects"], 3,
        "a policy, the record of the change, and that operators have changed something"
    );
    for command in [
        &["store", "backup", &store, "--file", &path("other")][..],
        &["store", "restore", &store, "--file", &file],
        &["store", "compact", &store],
        &["store", "info", &store],
    ] {
        let message = refused(1, command);
        assert!(
            message.contains("in use by another process") && message.contains("store backup"),
            "{message}"
        );
    }
    controller.apply(directory.path(), "two");
    controller.stop();

    let info = done(&["store", "info", &store]);
    assert_eq!((&info["objects"], &info["epoch"]), (&5.into(), &copy["epoch"]));
    let message = refused(1, &["store", "restore", &store, "--file", &file]);
    assert!(
        message.contains("5 objects are in the store already") && message.contains("--replace"),
        "{message}"
    );
    done(&["store", "restore", &store, "--file", &file, "--replace"]);
    done(&["store", "compact", &store]);
    let controller = Controller::start(&["--store", &store]);
    assert_eq!(controller.policies(), ["one"]);
    controller.stop();

    let text = std::fs::read(&file).unwrap();
    std::fs::write(path("cut"), &text[..text.len() - 2]).unwrap();
    let new = format!("embedded://{}", path("new"));
    let message = refused(1, &["store", "restore", &new, "--file", &path("cut")]);
    assert!(message.contains("damaged") && message.contains("nothing was changed"), "{message}");
    assert!(!directory.path().join("new").exists(), "nothing was made");
    let message = refused(1, &["store", "info", &new]);
    assert!(message.contains("there is no store"), "{message}");
    refused(2, &["store", "info", "/var/lib/bulkhead"]);
    refused(2, &["store", "compact", "etcd://127.0.0.1:1"]);
}

#[test]
fn a_repository_moves_into_etcd_and_back_while_it_is_in_use() {
    let etcd = EtcdServer::start();
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let (first, last) = (format!("embedded://{}", path("first")), format!("embedded://{}", path("last")));
    let cluster = format!("etcd://{}/fleet", etcd.endpoint());
    let controller = Controller::start(&["--store", &first]);
    controller.apply(directory.path(), "one");
    controller.stop();
    let moved = done(&["store", "migrate", &first, &cluster]);
    assert_eq!(
        (&moved["objects"], &moved["completeTo"]),
        // With the record of the change.
        (&3.into(), &done(&["store", "info", &first])["revision"])
    );

    let controller = Controller::start(&["--store", &cluster, "--data-dir", &path("flows")]);
    assert_eq!(controller.policies(), ["one"]);
    controller.apply(directory.path(), "two");
    let mut following = Command::new(BINARY)
        .args(["store", "migrate", &cluster, &last, "--follow"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut notes = BufReader::new(following.stderr.take().unwrap()).lines();
    let note = notes.next().unwrap().unwrap();
    assert!(note.contains("5 objects are copied"), "{note}");
    controller.apply(directory.path(), "three");
    end(&mut following, "-INT");
    let again = format!("{cluster}/");
    // Three policies and their records, that operators have changed something, and the registration of the controller.
    assert_eq!(done(&["store", "info", &again])["objects"], 8);
    controller.stop();

    let controller = Controller::start(&["--store", &last]);
    let mut names = controller.policies();
    names.sort();
    assert_eq!(names, ["one", "three", "two"]);
    // What was done elsewhere is remembered; revisions of elsewhere are not those of here.
    let history = done(&["--server", &controller.server, "history"]);
    assert_eq!(history["items"].as_array().unwrap().len(), 3);
    let message = refused(1, &["--server", &controller.server, "rollback", "--to", "0"]);
    assert!(message.contains("a copy of another repository"), "{message}");
    controller.stop();
    refused(2, &["store", "migrate", &last, &last]);
}
