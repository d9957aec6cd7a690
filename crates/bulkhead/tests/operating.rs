//! The commands of docs/operating.md, each of them run in the order in which they stand there, on a machine of its own (see
//! `operating/prelude.sh`). What cannot be run as it stands is listed in [`STEPS`] with the reason. Its blocks of settings are
//! loaded by the programs whose they are.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_model::document;
use serde_json::{Map, Value};

const BINARY: &str = env!("CARGO_BIN_EXE_bulkhead");

/// How a command is run.
enum How {
    /// As it stands.
    AsItStands,
    /// With something in place of something else.
    With(&'static str, &'static str),
    /// It goes on, under this name, until it is stopped.
    GoesOn(&'static str),
    /// The same with something in place of something else.
    GoesOnWith(&'static str, &'static str, &'static str),
    /// Not at all, for this reason.
    Not(&'static str),
}
use How::{AsItStands, GoesOn, GoesOnWith, Not, With};

/// A command of the document that needs something before or after it. All others are run as they stand.
struct Step {
    command: &'static str,
    how: How,
    before: &'static str,
    after: &'static str,
}

const fn step(command: &'static str, how: How, before: &'static str, after: &'static str) -> Step {
    Step { command, how, before, after }
}

/// `LINE` is the number of the command's line.
const STEPS: &[Step] = &[
    step("make build", Not("it builds the binary that this test is given"), "", ""),
    step(
        "systemctl enable --now bulkhead-controller",
        Not("there is no systemd to talk to: its unit is verified, and its ExecStart run as its user"),
        "",
        "at LINE 'systemd-analyze verify --man=no /etc/systemd/system/bulkhead-controller.service'
         start_controller LINE",
    ),
    step(
        "systemctl enable --now bulkhead-agent",
        Not("the same; its ExecStart is run once this host has joined"),
        "",
        "at LINE 'systemd-analyze verify --man=no /etc/systemd/system/bulkhead-agent.service'",
    ),
    step(
        "bulkhead token list; bulkhead token delete 57cd727bfdbc8d27",
        With("57cd727bfdbc8d27", "$(bulkhead token list -o json | answer 'a[\"items\"][0][\"id\"]')"),
        "",
        "",
    ),
    step(
        "bulkhead agent --controller https://c1:7441,https://c2:7441 --join-token-file /run/secrets/join",
        GoesOn("agent"),
        "mkdir -p /run/secrets
         bulkhead token create -o json | answer 'a[\"token\"]' > /run/secrets/join",
        "eventually LINE connected
         stop agent
         start_agent LINE",
    ),
    step(
        "bulkhead certificate create operator/ann --group bulkhead:admins --api https://c1:7440 --write ann.yaml",
        AsItStands,
        "",
        "at LINE 'bulkhead whoami --client-config ann.yaml'",
    ),
    step(
        "bulkhead certificate revoke operator/ann --reason left",
        AsItStands,
        "",
        "refused LINE 'bulkhead whoami --client-config ann.yaml'",
    ),
    step(
        "bulkhead certificate revoke 48a1f3…",
        With(
            "48a1f3…",
            "$(openssl x509 -in db7/identity/agent.crt -noout -serial | cut -d= -f2 | tr A-F a-f | sed s/^0*//)",
        ),
        "",
        "",
    ),
    step(
        "bulkhead diff --revision 41..57",
        // It ends with 1 if there is a difference, as diff does.
        With("41..57", "$from..$to || test $? = 1"),
        "policy one web > one.yaml; policy two web > two.yaml
         at LINE 'bulkhead apply -f one.yaml'
         export from=$(revision)
         at LINE 'bulkhead apply -f two.yaml'
         export to=$(revision)",
        "at LINE 'grep -q two last'",
    ),
    step(
        "bulkhead rollback --to 41 --dry-run",
        With("41", "$from"),
        "",
        "at LINE 'bulkhead get policy two'",
    ),
    step("bulkhead apply --confirm-within 2m -f hosts.yaml", AsItStands, "policy hosts web > hosts.yaml", ""),
    step(
        "bulkhead confirm --rollback",
        AsItStands,
        "policy hosts other > hosts.yaml
         at LINE 'bulkhead apply --confirm-within 2m -f hosts.yaml'",
        "at LINE 'bulkhead get policy hosts -o yaml | grep -q web'",
    ),
    step(
        "bulkhead store backup embedded:///var/lib/bulkhead/controller -f …",
        With("…", "stopped.backup"),
        "stop controller",
        "",
    ),
    step(
        "bulkhead store restore embedded:///var/lib/bulkhead/controller -f fleet.backup",
        AsItStands,
        "rm /var/lib/bulkhead/controller/store.*",
        "",
    ),
    step(
        "chown -R bulkhead: /var/lib/bulkhead/controller",
        AsItStands,
        "",
        "start_controller LINE
         at LINE 'bulkhead get policy hosts'
         eventually LINE connected",
    ),
    step(
        "bulkhead store migrate embedded:///var/lib/bulkhead/controller etcd://10.0.0.1:2379/bulkhead",
        AsItStands,
        "stop agent; stop controller
         daemon LINE etcd 'etcd --data-dir /src/etcd --listen-client-urls http://0.0.0.0:2379 --advertise-client-urls http://10.0.0.1:2379 --max-txn-ops 10000'
         eventually LINE 'bulkhead store info etcd://10.0.0.1:2379/other || etcdctl --endpoints 10.0.0.1:2379 endpoint health'",
        "",
    ),
    step(
        "bulkhead controller --name c1 --store etcd://10.0.0.1:2379,10.0.0.2:2379,10.0.0.3:2379/bulkhead --listen 0.0.0.0:7440 --listen-agents 0.0.0.0:7441 --advertise c1.example.org:7440 --advertise-agents c1.example.org:7441",
        GoesOn("c1"),
        "mv /var/lib/bulkhead/controller /var/lib/bulkhead/alone
         mkdir -p /var/lib/bulkhead/controller/identity
         cp identity/ca.crt identity/ca.key /var/lib/bulkhead/controller/identity",
        "eventually LINE 'bulkhead whoami'
         at LINE 'bulkhead get policy hosts'",
    ),
    step(
        "bulkhead agent --controller https://c1.example.org:7441,https://c2.example.org:7441,https://c3.example.org:7441",
        GoesOn("agent"),
        "mv /var/lib/bulkhead/agent /var/lib/bulkhead/agent-alone
         at LINE 'bulkhead certificate create agent/web1 --write /var/lib/bulkhead/agent/identity'",
        "eventually LINE connected",
    ),
    step("bulkhead status", AsItStands, "", "at LINE 'grep -q web1 last'"),
    step(
        "bulkhead token create --relay site1 --hosts 'site1-*,gate7'",
        With("gate7", "web1"),
        "stop agent",
        "bulkhead token create --relay site1 -o json | answer 'a[\"token\"]' > /run/secrets/join",
    ),
    step(
        "bulkhead relay --name site1 --upstream https://c1:7441,https://c2:7441 --join-token-file /run/secrets/join --listen-agents 0.0.0.0:7441 --advertise-agents relay.site1.example.org:7441",
        // It is on the controller's host here.
        GoesOnWith("relay", "0.0.0.0:7441", "0.0.0.0:7451"),
        "",
        "eventually LINE 'curl -sf http://127.0.0.1:7442/readyz'",
    ),
    step(
        "bulkhead agent --controller https://relay.site1.example.org:7441",
        GoesOnWith("agent", ":7441", ":7451"),
        "",
        "eventually LINE connected",
    ),
    step(
        "bulkhead certificate revoke relay/site1",
        AsItStands,
        "at LINE 'bulkhead status | grep site1'",
        "eventually LINE '! connected'",
    ),
    step(
        "bulkhead relay list",
        AsItStands,
        "",
        "at LINE 'grep -E \"^site1 +site1-\\*,web1 +20\" last'
         at LINE 'bulkhead relay list -o json | answer \"a[\\\"items\\\"][0][\\\"hosts\\\"] == [\\\"site1-*\\\", \\\"web1\\\"]\"'",
    ),
    step(
        "bulkhead relay delete site1",
        AsItStands,
        "",
        "at LINE 'grep \"relay site1 is deleted\" last'
         refused LINE 'bulkhead relay list | grep site1'
         refused LINE 'bulkhead relay delete site1'
         refused LINE 'bulkhead relay --name site1 list'
         at LINE 'bulkhead token create --relay site1 --hosts web1'
         at LINE 'bulkhead relay delete site1 --output json | answer \"a[\\\"hosts\\\"] == [\\\"web1\\\"]\"'
         stop agent; stop relay; stop c1; stop etcd KILL",
    ),
];

/// `When all is lost`, with the words of the document that each part does.
const LOST: &[(&str, &str)] = &[
    (
        "`bulkhead store backup --file …`",
        "rm -r /var/lib/bulkhead/controller /var/lib/bulkhead/agent
         mv /var/lib/bulkhead/alone /var/lib/bulkhead/controller
         mv /var/lib/bulkhead/agent-alone /var/lib/bulkhead/agent
         start_controller LINE; start_agent LINE
         at LINE 'bulkhead store backup --file COPY'
         cp -r /var/lib/bulkhead/controller/identity kept",
    ),
    (
        "`bulkhead store restore embedded:///var/lib/bulkhead/controller --file COPY`",
        "policy after web > after.yaml
         at LINE 'bulkhead apply -f after.yaml'
         stop controller KILL
         rm -r /var/lib/bulkhead/controller
         mkdir -p /var/lib/bulkhead/controller
         cp -r kept /var/lib/bulkhead/controller/identity
         at LINE 'bulkhead store restore embedded:///var/lib/bulkhead/controller --file COPY'
         at LINE 'chown -R bulkhead: /var/lib/bulkhead/controller'
         start_controller LINE
         eventually LINE connected
         at LINE 'bulkhead get policy hosts'
         refused LINE 'bulkhead get policy after'",
    ),
    (
        "Start with a new one; every host joins again with a token of its own (`--host`",
        "stop controller KILL
         rm -r /var/lib/bulkhead/controller/identity
         start_controller LINE
         stop agent
         bulkhead token create --host web1 -o json | answer 'a[\"token\"]' > /run/secrets/join
         daemon LINE agent 'bulkhead agent --config /etc/bulkhead/agent.yaml --join-token-file /run/secrets/join'
         eventually LINE connected",
    ),
    (
        "`bulkhead certificate revoke agent/HOST`",
        "at LINE 'bulkhead certificate revoke agent/web1'
         eventually LINE '! connected'
         sleep 1
         refused LINE connected
         bulkhead token create --host web1 -o json | answer 'a[\"token\"]' > /run/secrets/join
         stop agent
         daemon LINE agent 'bulkhead agent --config /etc/bulkhead/agent.yaml --join-token-file /run/secrets/join'
         eventually LINE connected",
    ),
    (
        "`bulkhead rollback --to REVISION --dry-run`",
        "export REVISION=$(revision)
         policy broken none > broken.yaml
         at LINE 'bulkhead apply -f broken.yaml'
         at LINE 'bulkhead history'
         at LINE 'bulkhead rollback --to $REVISION --dry-run'
         at LINE 'bulkhead get policy broken'
         at LINE 'bulkhead rollback --to $REVISION'
         refused LINE 'bulkhead get policy broken'
         stop agent; stop controller",
    ),
];

fn manual() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/operating.md")
}

/// A command with the number of its line.
type Found = (usize, String);

/// All commands of fenced blocks of `sh` and indented ones, and objects of fenced blocks of `yaml`, in order.
fn commands(text: &str) -> Vec<Found> {
    let (mut found, mut fence, mut begun): (Vec<Found>, Option<String>, Option<Found>) =
        (Vec::new(), None, None);
    let mut yaml = String::new();
    for (number, line) in text.lines().enumerate().map(|(number, line)| (number + 1, line)) {
        if let Some(language) = line.strip_prefix("```") {
            if fence.take().is_none() {
                fence = Some(language.to_owned());
            } else if yaml.contains("kind:") {
                found.push((number, format!("bulkhead apply -f - <<'EOF'\n{yaml}EOF\n")));
            }
            yaml.clear();
            continue;
        }
        let line = match fence.as_deref() {
            Some("sh") => line,
            Some("yaml") => {
                yaml = yaml + line + "\n";
                continue;
            }
            Some(_) => continue,
            None => match line.strip_prefix("    ") {
                Some(line) if ["bulkhead ", "chown "].iter().any(|word| line.starts_with(word)) => line,
                Some(_) | None => continue,
            },
        };
        let command = line.split_once(" #").map_or(line, |(command, _)| command).trim();
        let (at, text) = begun.take().unwrap_or((number, String::new()));
        let text = format!("{text} {command}").trim().to_owned();
        match text.strip_suffix('\\') {
            Some(more) => begun = Some((at, more.trim().to_owned())),
            None if text.is_empty() || text.starts_with('#') => {}
            None => found.push((at, text)),
        }
    }
    found
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn script(text: &str) -> String {
    let mut script = include_str!("operating/functions.sh").to_owned();
    let found = commands(text);
    for Step { command, how, .. } in STEPS {
        let why = if let Not(reason) = how { reason } else { "" };
        assert!(found.iter().any(|(_, text)| text == command), "no longer in the document: {command} {why}");
    }
    for (line, text) in found {
        let step = STEPS.iter().find(|step| step.command == text);
        let hook = |script: &mut String, text: &str| {
            writeln!(script, "{}", text.replace("LINE", &line.to_string())).unwrap();
        };
        let (how, before, after) =
            step.map_or((&AsItStands, "", ""), |step| (&step.how, step.before, step.after));
        hook(&mut script, before);
        match how {
            AsItStands => writeln!(script, "at {line} {}", quoted(&text)).unwrap(),
            With(from, to) => writeln!(script, "at {line} {}", quoted(&text.replace(from, to))).unwrap(),
            GoesOnWith(name, from, to) => {
                writeln!(script, "daemon {line} {name} {}", quoted(&text.replace(from, to))).unwrap()
            }
            GoesOn(name) => writeln!(script, "daemon {line} {name} {}", quoted(&text)).unwrap(),
            Not(reason) => {
                writeln!(script, "echo 'line {line}, not run ({reason}):' {}", quoted(&text)).unwrap()
            }
        }
        hook(&mut script, after);
    }
    for (words, part) in LOST {
        // The document breaks its lines where it likes.
        let flat = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(flat(text).contains(&flat(words)), "no longer in the document: {words}");
        let line = text.lines().position(|line| line == "## When all is lost").unwrap() + 1;
        writeln!(script, "{}", part.replace("LINE", &line.to_string())).unwrap();
    }
    script + "echo all done\n"
}

#[test]
fn every_command_of_the_document_runs() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    std::fs::create_dir_all(path("target/release")).unwrap();
    std::fs::copy(BINARY, path("target/release/bulkhead")).unwrap();
    let copied = Command::new("cp").arg("-r").arg(repository.join("deploy")).arg(path("deploy")).status();
    assert!(copied.unwrap().success());
    std::fs::write(path("script.sh"), script(&std::fs::read_to_string(manual()).unwrap())).unwrap();
    let prelude = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/operating/prelude.sh");
    let output = Command::new("unshare")
        .args(["--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child"])
        .args(["--propagation", "private", "bash"])
        .args([&prelude, directory.path()])
        .output()
        .unwrap();
    let (said, wrong) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{said}");
    assert!(output.status.success() && said.ends_with("all done\n"), "{said}\n{wrong}");
}

/// Blocks of settings, by their first line, with the program whose they are.
const SETTINGS: &[(&str, &str)] = &[("oidc:", "controller"), ("store: etcd", "controller")];

/// Fenced blocks of `yaml` that hold no objects.
fn settings(text: &str) -> Vec<&str> {
    let blocks = text.split("\n```yaml\n").skip(1).map(|rest| rest.split("\n```").next().unwrap());
    blocks.filter(|block| !block.contains("kind:")).collect()
}

/// What a program says of settings: no more than that one of its flags cannot be used, which it looks at after them.
fn said_of(program: &str, settings: &str) -> String {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    std::fs::write(path("settings.yaml"), settings).unwrap();
    let mut command = Command::new(BINARY);
    command.arg(program).arg("--config").arg(path("settings.yaml"));
    match program {
        // Below a file no directory can be made.
        "controller" => {
            command.args(["--store", "memory:", "--socket", "none", "--data-dir"]);
            command.arg(path("settings.yaml").join("data"));
        }
        _ => {
            command.arg("--join-token-file").arg(path("token"));
        }
    }
    let output = command.output().unwrap();
    assert!(!output.status.success(), "{program}: {output:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// The same settings with a key that nobody knows, in each mapping that there is.
fn with_unknown_keys(settings: &Value) -> Vec<Value> {
    let Value::Object(map) = settings else { return Vec::new() };
    let mut all = vec![settings.clone()];
    all[0]["nobodyKnows"] = Value::from(1);
    for (key, value) in map {
        all.extend(with_unknown_keys(value).into_iter().map(|value| {
            let mut whole = settings.clone();
            whole[key] = value;
            whole
        }));
    }
    all
}

#[test]
fn every_block_of_settings_is_loaded() {
    let text = std::fs::read_to_string(manual()).unwrap();
    let blocks = settings(&text);
    for (first, _) in SETTINGS {
        let found = blocks.iter().any(|block| block.lines().next() == Some(*first));
        assert!(found, "no longer in the document: {first}");
    }
    let mut programs = vec![("controller", ""), ("agent", ""), ("relay", "")];
    for block in blocks {
        let first = block.lines().next();
        let known = SETTINGS.iter().find(|(line, _)| Some(*line) == first);
        let (_, program) = known.unwrap_or_else(|| panic!("whose settings are these?\n{block}"));
        programs.push((program, block));
    }
    for (program, block) in programs {
        let said = said_of(program, block);
        let last = if program == "controller" { "Not a directory" } else { "cannot read" };
        assert!(said.contains(last) && !said.contains("settings.yaml:"), "{program}:\n{block}\n{said}");
        let documents = document::read("operating.md", block).unwrap();
        let read = documents.first().map_or_else(|| Value::Object(Map::new()), |one| one.to_json());
        for wrong in with_unknown_keys(&read) {
            let said = said_of(program, &wrong.to_string());
            assert!(said.contains("unknown field `nobodyKnows`"), "{program}:\n{wrong}\n{said}");
        }
    }
}

/// Commands in running text are at least commands that there are.
#[test]
fn commands_that_are_spoken_of_exist() {
    let text = std::fs::read_to_string(manual()).unwrap();
    let spoken = text.split('`').skip(1).step_by(2).filter(|code| code.starts_with("bulkhead "));
    let is_word = |word: &&str| word.bytes().all(|byte| byte.is_ascii_lowercase());
    let mut count = 0;
    for code in spoken {
        let words: Vec<&str> = code.split_whitespace().skip(1).take_while(is_word).take(2).collect();
        // The second word may be an argument.
        let exists = |words: &[&str]| {
            let output = Command::new(BINARY).args(words).arg("--help").output().unwrap();
            output.status.success()
        };
        assert!(!words.is_empty() && (exists(&words) || exists(&words[..1])), "there is no {code:?}");
        count += 1;
    }
    assert!(count > 20, "{count}");
}
