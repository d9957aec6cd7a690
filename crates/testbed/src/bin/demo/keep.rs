//! Leaving the demo running.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use bulkhead_testbed::{Example, HOSTS, Member, OTHER_PORT, Process, Server};

/// Leaves everything running but `extras`, and says how to play with it.
pub(crate) fn leave(example: Example, extras: &[Member]) -> Result<()> {
    for extra in extras {
        example.bulkhead.unregister(&extra.workload)?;
    }
    let Example { members, mut bulkhead } = example;
    let directory = bulkhead.lab.directory().to_owned();
    let mut list = String::new();
    for (component, member) in members {
        let mut workload = member.workload;
        writeln!(list, "{} {}", workload.netns.path().display(), component.port)?;
        workload.netns.keep();
        // The next process takes over its ports.
        drop(member.server);
    }
    let file = directory.join("servers");
    fs::write(&file, list)?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--serve").arg(&file);
    let ledger = bulkhead.lab.ledger();
    Process::start(&bulkhead.lab.fabric, command, &directory.join("servers.log"), &ledger)?.keep();
    bulkhead.keep();
    let script = script(&directory, &bulkhead.server(), bulkhead.binary(), &bulkhead.lab.fabric.path())?;
    println!("It goes on running. To play with it:\n");
    println!("  alias b={}", script.display());
    println!("  b get workloads");
    println!("  b flows --follow");
    println!("  b explain --from geo-web --to map-db --port tcp/5432");
    println!("  b delete policies inside-an-application");
    println!("  b apply -f examples/applications");
    println!("  nsenter --net=/run/netns/{0}-w-geo-check ping -c 3 10.100.0.1", bulkhead.lab.prefix());
    for host in HOSTS.iter().take(1) {
        let socket = &bulkhead.agent(host).socket;
        println!("  b status --agent-socket {}", socket.display());
    }
    println!("\nLogs: {}/*.log\nTo remove it: bulkhead-demo --clean\n", directory.display());
    Ok(())
}

/// A command that runs the product's command line against this controller.
fn script(directory: &Path, server: &str, binary: &Path, fabric: &Path) -> Result<PathBuf> {
    let path = directory.join("bulkhead");
    let text = format!(
        "#!/bin/sh\nBULKHEAD_SERVER={server} exec nsenter --net={} {} \"$@\"\n",
        fabric.display(),
        binary.display()
    );
    fs::write(&path, text)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// Serves in every namespace of a list until it is killed.
pub(crate) fn serve(list: &Path) -> Result<()> {
    let text = fs::read_to_string(list).with_context(|| format!("{}", list.display()))?;
    let mut servers = Vec::new();
    for line in text.lines() {
        let (namespace, port) = line.split_once(' ').context("expected a namespace and a port")?;
        servers.push(Server::start_at(Path::new(namespace), &[port.parse()?, OTHER_PORT])?);
    }
    loop {
        std::thread::park();
    }
}
