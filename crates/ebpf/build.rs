//! Compiles the kernel programs with clang.

use std::env;
use std::path::PathBuf;
use std::process::Command;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    println!("cargo::rerun-if-changed=bpf");
    println!("cargo::rerun-if-env-changed=CLANG");
    compile("policy")?;
    compile("gate")?;
    compile("process")?;
    compile("empty")
}

fn compile(name: &str) -> Result<(), Failure> {
    let source = format!("bpf/{name}.bpf.c");
    let object = PathBuf::from(env::var("OUT_DIR")?).join(format!("{name}.bpf.o"));
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
    command.args(["-c", &source, "-o"]).arg(&object);
    let status = command.status().map_err(|error| {
        format!(
            "cannot run {clang:?}, which compiles the kernel programs (Debian: apt install clang): {error}"
        )
    })?;
    if status.success() { Ok(()) } else { Err(format!("{clang} failed on {source}: {status}").into()) }
}
