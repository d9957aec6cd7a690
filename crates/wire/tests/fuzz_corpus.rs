//! The committed corpus of the fuzzer, and every beginning of each file of it, through the fuzzer's own functions.
//! It stands here since this is the lowest crate that sees all readers of foreign bytes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;

#[allow(unreachable_pub, reason = "public in the package it belongs to")]
#[path = "../../../fuzz/src/lib.rs"]
mod bodies;

/// Files up to this size are tried with every length.
const CUT_BYTES_MAX: usize = 1024;

fn run(target: &str, body: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let files: Vec<_> = fs::read_dir(&corpus).unwrap().map(|file| file.unwrap().path()).collect();
    assert!(!files.is_empty(), "{} is empty", corpus.display());
    for file in files {
        let bytes = fs::read(&file).unwrap();
        // The test's output names the file if it panics.
        println!("{}", file.display());
        body(&bytes);
        if bytes.len() <= CUT_BYTES_MAX {
            (0..bytes.len()).for_each(|length| body(&bytes[..length]));
        }
    }
}

#[test]
fn selectors() {
    run("selector", bodies::selector);
}

#[test]
fn documents() {
    run("document", bodies::document);
}

#[test]
fn port_matches() {
    run("port_match", bodies::port_match);
}

#[test]
fn kubernetes_objects() {
    run("kubernetes", bodies::kubernetes);
}

#[test]
fn wire_messages() {
    run("wire", bodies::wire);
}
