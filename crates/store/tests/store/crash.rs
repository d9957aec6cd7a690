//! `kill -9` in the midst of writing. The writer is this test binary itself, started again with a variable.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use bulkhead_store::{Embedded, Precondition, Revision, Store, Transaction};

const CHILD_DIRECTORY: &str = "BULKHEAD_STORE_CRASH_DIRECTORY";
/// Keys that each transaction writes with the same number: different numbers are a torn transaction.
const KEYS: [&str; 3] = ["/x/1", "/x/2", "/y/1"];
const ROUNDS: u64 = 4;
/// Acknowledgements after which the writer is killed, rising with each round.
const ACKNOWLEDGED_BEFORE_KILL: u64 = 40;

/// What the child does: writes until it is killed, and prints each number once it is acknowledged.
#[tokio::test]
async fn child() {
    let Ok(directory) = std::env::var(CHILD_DIRECTORY) else { return };
    let store = Embedded::open(directory).unwrap();
    let mut number = store.revision().await.unwrap().0;
    let mut out = std::io::stdout();
    loop {
        number += 1;
        let value = number.to_string();
        let mut transaction = Transaction::new().put(format!("/log/{number:08}"), "x", Precondition::Absent);
        for key in KEYS {
            transaction = transaction.put(key, value.clone(), Precondition::Any);
        }
        assert_eq!(store.apply(transaction).await.unwrap().revision, Revision(number));
        writeln!(out, "acknowledged {number}").unwrap();
        out.flush().unwrap();
    }
}

/// Lets the child write and kills it; answers the last number that it said was acknowledged.
fn write_and_kill(directory: &std::path::Path, acknowledgements: u64) -> u64 {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["crash::child", "--exact", "--nocapture"])
        .env(CHILD_DIRECTORY, directory)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let number = |line: String| -> Option<u64> {
        line.split_once("acknowledged ").and_then(|(_, number)| number.parse().ok())
    };
    let mut seen = 0;
    let mut last = 0;
    while seen < acknowledgements {
        if let Some(number) = number(lines.next().unwrap().unwrap()) {
            seen += 1;
            last = number;
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
    lines.map_while(Result::ok).filter_map(number).last().unwrap_or(last)
}

#[tokio::test]
async fn kill_9_loses_nothing_acknowledged_and_tears_nothing() {
    let directory = tempfile::tempdir().unwrap();
    for round in 1..=ROUNDS {
        let acknowledged = write_and_kill(directory.path(), ACKNOWLEDGED_BEFORE_KILL * round);
        let store = Embedded::open(directory.path()).unwrap();
        let revision = store.revision().await.unwrap().0;
        assert!(revision >= acknowledged, "{revision} is before {acknowledged}");
        for key in KEYS {
            let object = store.get(key).await.unwrap().unwrap();
            assert_eq!(object.value, revision.to_string(), "a torn transaction");
        }
        assert_eq!(store.list("/log/").await.unwrap().0.len() as u64, revision);
        let mut watch = store.watch("/log/", Revision(0)).await.unwrap();
        let mut logged = 0;
        while watch.position().0 < revision {
            logged += watch.next().await.unwrap().len() as u64;
        }
        assert_eq!(logged, revision);
    }
}
