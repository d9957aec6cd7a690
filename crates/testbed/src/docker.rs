//! A Docker engine of a host's own, with an image made here.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::mount::{UnmountFlags, unmount};

use crate::lab::{Host, Lab};
use crate::process::Process;
use crate::wait::eventually_within;

/// Name of the image with nothing but busybox in it.
const IMAGE: &str = "bulkhead-busybox";
/// An engine may take this long to start.
const START_TIME: Duration = Duration::from_secs(40);

/// A running engine; stopped when dropped.
#[derive(Debug)]
pub struct Docker {
    process: Process,
    socket: PathBuf,
    netns: PathBuf,
}

impl Docker {
    /// Starts an engine in a host's namespace that leaves netfilter alone, and imports the image. Nothing is fetched.
    ///
    /// # Errors
    /// If `dockerd`, `docker` or `busybox` is missing or does not work.
    pub fn start(lab: &Lab, host: &Host) -> Result<Self> {
        Self::start_with(lab, host, &["--iptables=false", "--ip6tables=false", "--ip-masq=false"])
    }

    /// As [`Self::start`], with an engine that publishes ports and hides its containers as it does by default.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_rewriting(lab: &Lab, host: &Host) -> Result<Self> {
        Self::start_with(lab, host, &[])
    }

    fn start_with(lab: &Lab, host: &Host, arguments: &[&str]) -> Result<Self> {
        let directory = lab.directory().join(format!("{}.docker", host.name));
        fs::create_dir_all(&directory)?;
        let socket = directory.join("docker.sock");
        let mut command = Command::new("dockerd");
        command
            .args(arguments)
            .arg("--userland-proxy=false")
            .args(["--storage-driver", "vfs", "--bip", &host.container_gateway()])
            .arg(format!("--data-root={}", directory.join("data").display()))
            .arg(format!("--exec-root={}", directory.join("exec").display()))
            .arg(format!("--pidfile={}", directory.join("pid").display()))
            .arg(format!("--host=unix://{}", socket.display()));
        let log = lab.directory().join(format!("{}.docker.log", host.name));
        let process = Process::start(&host.netns, command, &log, &lab.ledger())
            .context("no Docker engine: install docker.io")?;
        let mut docker = Self { process, socket, netns: host.netns.path() };
        eventually_within(START_TIME, "the Docker engine answers", || {
            docker.run(&["version"]).map_err(|error| match docker.process.ended() {
                Some(status) => error.context(format!("it ended with {status}: {}", docker.process.log())),
                None => error,
            })
        })?;
        docker.import()?;
        Ok(docker)
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Runs `docker` with these arguments; answers what it prints.
    ///
    /// # Errors
    /// If it fails.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        let output = self.command(arguments).output().context("cannot run docker: install docker.io")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "docker {}: {said}", arguments.join(" "));
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Starts a container that answers HTTP on `port`; answers its address.
    ///
    /// # Errors
    /// If it does not start.
    pub fn container(&self, name: &str, labels: &[(&str, &str)], port: u16) -> Result<String> {
        self.published(name, labels, port, None)
    }

    /// As [`Self::container`], also reached by a port of the host.
    ///
    /// # Errors
    /// As [`Self::container`].
    pub fn published(
        &self,
        name: &str,
        labels: &[(&str, &str)],
        port: u16,
        host_port: Option<u16>,
    ) -> Result<String> {
        let mut arguments: Vec<String> = ["run", "--detach", "--name", name].map(Into::into).to_vec();
        if let Some(host_port) = host_port {
            arguments.push(format!("--publish={host_port}:{port}"));
        }
        for (key, value) in labels {
            arguments.extend(["--label".into(), format!("{key}={value}")]);
        }
        let serve = format!("httpd -f -p {port} -h /");
        arguments.extend([IMAGE, "/bin/busybox", "sh", "-c", &serve].map(Into::into));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        self.run(&arguments)?;
        self.address(name)
    }

    /// A container's address.
    ///
    /// # Errors
    /// If it does not run.
    pub fn address(&self, name: &str) -> Result<String> {
        self.run(&["inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", name])
    }

    /// The host's namespace.
    pub fn netns(&self) -> &Path {
        &self.netns
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command.arg(format!("--host=unix://{}", self.socket.display())).args(arguments);
        command
    }

    /// An image of one static busybox and its names.
    fn import(&self) -> Result<()> {
        let root = self.socket.with_file_name("image");
        fs::create_dir_all(root.join("bin"))?;
        fs::copy("/bin/busybox", root.join("bin/busybox"))
            .context("no /bin/busybox: install busybox-static")?;
        for name in ["sh", "sleep", "httpd", "nc", "wget"] {
            let link = root.join("bin").join(name);
            let _ = fs::remove_file(&link);
            std::os::unix::fs::symlink("busybox", link)?;
        }
        self.import_directory(&root, IMAGE)
    }

    fn import_directory(&self, root: &Path, image: &str) -> Result<()> {
        let tar = Command::new("tar").arg("-C").arg(root).args(["-c", "."]).output()?;
        ensure!(tar.status.success(), "tar: {}", String::from_utf8_lossy(&tar.stderr));
        let mut import =
            self.command(&["import", "-", image]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        import.stdin.take().context("no standard input")?.write_all(&tar.stdout)?;
        ensure!(import.wait()?.success(), "docker import failed");
        Ok(())
    }

    /// An image with a shell and the libraries that a program of this machine needs: what a distribution's image has, where
    /// none can be fetched.
    ///
    /// # Errors
    /// If the program's libraries cannot be found.
    pub fn import_system(&self, image: &str, program: &Path) -> Result<()> {
        let root = self.socket.with_file_name(image);
        for directory in ["bin", "tmp", "run"] {
            fs::create_dir_all(root.join(directory))?;
        }
        for name in ["busybox", "sh", "grep"] {
            fs::copy("/bin/busybox", root.join("bin").join(name)).context("install busybox-static")?;
        }
        let listed = Command::new("ldd").arg(program).output()?;
        let listed = String::from_utf8(listed.stdout)?;
        let libraries: Vec<&str> = listed.split_whitespace().filter(|word| word.starts_with('/')).collect();
        for library in &libraries {
            let place = root.join(library.trim_start_matches('/'));
            fs::create_dir_all(place.parent().context("a directory")?)?;
            fs::copy(library, place)?;
        }
        // Says what a real one would say.
        let says = format!("#!/bin/sh\necho '{}'\n", libraries.join(" "));
        let path = root.join("bin/ldconfig");
        fs::write(&path, says)?;
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        self.import_directory(&root, image)
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let containers = self.run(&["ps", "--all", "--quiet"]).unwrap_or_default();
        let mut arguments = vec!["rm", "--force"];
        arguments.extend(containers.split_whitespace());
        if arguments.len() > 2 {
            let _ = self.run(&arguments);
        }
        self.process.stop();
        if let Some(directory) = self.socket.parent() {
            unmount_below(directory);
        }
    }
}

/// Unmounts what an engine has mounted below a directory, so that it can be removed.
pub(crate) fn unmount_below(directory: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split_whitespace().nth(1));
    for point in points.filter(|point| Path::new(point).starts_with(directory)) {
        let _ = unmount(point, UnmountFlags::DETACH);
    }
}
