//! Compiles the kernel programs with clang.

use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    println!("cargo::rerun-if-changed=bpf");
    println!("cargo::rerun-if-env-changed=CLANG");
    let object = PathBuf::from(env::var("OUT_DIR")?).join("policy.bpf.o");
    let clang = env::var("CLANG").unwrap_or_else(|_unset| "clang".into());
    let mut command = Command::new(&clang);
    command.args(["-target", "bpf", "-mcpu=v3", "-g", "-O2", "-Wall", "-Wextra", "-Werror"]);
    // No build path in the object: the same source gives the same bytes.
    command.args(["-fdebug-compilation-dir", "."]);
    // libbpf's own headers come with libbpf-sys, so that they fit the library that loads the object.
    if let Ok(include) = env::var("DEP_BPF_INCLUDE") {
        command.arg(format!("-I{include}"));
    }
    // For <asm/types.h>, which Debian keeps per architecture.
    command.arg(format!("-I/usr/include/{}-linux-gnu", env::var("CARGO_CFG_TARGET_ARCH")?));
    command.args(["-c", "bpf/policy.bpf.c", "-o"]).arg(&object);
    let status = command.status().map_err(|error| {
        format!("cannot run {clang:?} (needed for the kernel programs; Debian: apt install clang): {error}")
    })?;
    if !status.success() {
        return Err(format!("{clang} failed on bpf/policy.bpf.c: {status}").into());
    }
    fs::metadata(&object)?;
    Ok(())
}
