//! Control groups, and servers and clients in them.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use bulkhead_model::host_policy::Attachment;
use bulkhead_model::registration::unified_hierarchy;

/// Answers datagrams and connections on a port.
pub const SERVER: &str = "
import socket, sys, threading
port = int(sys.argv[1])
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(('0.0.0.0', port))
t = socket.socket(); t.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); t.bind(('0.0.0.0', port)); t.listen()
def datagrams():
    while True:
        _, peer = u.recvfrom(64)
        try: u.sendto(b'here', peer)
        except OSError: pass
threading.Thread(target=datagrams, daemon=True).start()
print('ready', flush=True)
while True:
    c, _ = t.accept()
    try: c.sendall(b'here')
    except OSError: pass
    c.close()
";

/// Says whether a datagram and a connection were answered.
pub const CLIENT: &str = "
import socket, sys
to = (sys.argv[1], int(sys.argv[2]))
def one(kind):
    s = socket.socket(socket.AF_INET, kind); s.settimeout(0.4)
    try:
        s.connect(to)
        if kind == socket.SOCK_DGRAM: s.send(b'?')
        return s.recv(64) != b''
    except OSError: return False
print(int(one(socket.SOCK_DGRAM)), int(one(socket.SOCK_STREAM)))
";

/// A control group of its own, with whatever runs in it.
#[derive(Debug)]
pub struct Group {
    path: PathBuf,
    servers: Vec<Child>,
}

impl Group {
    /// Below the root.
    pub fn new(name: &str) -> Self {
        let thread = fs::read_link("/proc/thread-self").unwrap();
        let unique = thread.file_name().unwrap().to_string_lossy().into_owned();
        Self::at(&format!("bulkhead-{unique}-{name}"))
    }

    /// Within this one.
    pub fn inner(&self, name: &str) -> Self {
        Self::at(&format!("{}/{name}", self.path.file_name().unwrap().to_string_lossy()))
    }

    fn at(name: &str) -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mount = unified_hierarchy(&mounts).unwrap();
        let path = PathBuf::from(mount).join(name);
        fs::create_dir(&path).unwrap();
        Self { path, servers: Vec::new() }
    }

    pub fn attachment(&self) -> Attachment {
        Attachment::Cgroup(u32::try_from(fs::metadata(&self.path).unwrap().ino()).unwrap())
    }

    /// A process of this group.
    pub fn command(&self, script: &str, arguments: &[&str]) -> Command {
        python(Some(&self.path), script, arguments)
    }

    pub fn serve(&mut self, port: u16) {
        self.servers.push(ready(self.command(SERVER, &[&port.to_string()])));
    }

    /// A server of this text, which says when it is ready.
    pub fn run(&mut self, script: &str, arguments: &[&str]) {
        self.servers.push(ready(self.command(script, arguments)));
    }

    /// A process that answers each line with a number, once it has said that it is ready.
    pub fn talk(&self, script: &str, arguments: &[&str]) -> Talker {
        let mut command = self.command(script, arguments);
        command.stdin(Stdio::piped());
        Talker(ready(command))
    }

    pub fn calls(&self, to: &str, port: u16) -> bool {
        answered(self.command(CLIENT, &[to, &port.to_string()]))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for server in &mut self.servers {
            let _ = server.kill();
            let _ = server.wait();
        }
        // The kernel takes the processes out of it a moment later.
        for _ in 0..100 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

/// A process that is asked.
#[derive(Debug)]
pub struct Talker(Child);

impl Talker {
    /// Its next number.
    pub fn ask(&mut self) -> usize {
        writeln!(self.0.stdin.as_mut().unwrap()).unwrap();
        let mut answer = Vec::new();
        while answer.last() != Some(&b'\n') {
            let mut byte = [0];
            self.0.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
            answer.push(byte[0]);
        }
        String::from_utf8(answer).unwrap().trim().parse().unwrap()
    }
}

impl Drop for Talker {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process of a group, or of none.
pub fn python(group: Option<&PathBuf>, script: &str, arguments: &[&str]) -> Command {
    let enter = group.map_or_else(String::new, |path| format!("echo $$ > {}/cgroup.procs; ", path.display()));
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{enter}exec python3 -c \"$0\" \"$@\""), script]).args(arguments);
    command.stdout(Stdio::piped());
    command
}

/// Waits until a server is there.
pub fn ready(mut command: Command) -> Child {
    let mut server = command.spawn().unwrap();
    server.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
    server
}

/// Both protocols, which must agree.
pub fn answered(mut command: Command) -> bool {
    let text = String::from_utf8(command.output().unwrap().stdout).unwrap();
    match text.trim() {
        "1 1" => true,
        "0 0" => false,
        other => panic!("{other:?}"),
    }
}
