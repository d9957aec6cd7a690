//! Workloads registered by hand: every `*.yaml` and `*.json` in a directory.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bulkhead_model::registration::{self, Attachment, Registration};
use bulkhead_model::{Facts, facts};
use tokio::sync::mpsc;

use crate::{Found, FoundWorkload, NotManaged, groups, links};

/// How often the directory is looked at. A namespace whose interface is not there yet is looked at as often.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Largest file that is read, in bytes.
pub const FILE_BYTES_MAX: u64 = 1 << 20;
/// Most files that are read.
pub const FILES_MAX: usize = 10_000;

/// Watches `directory` and sends what is there, at once and after every change, until nobody listens.
/// A message on `nudge` makes it look without waiting.
pub async fn watch(directory: PathBuf, mut nudge: mpsc::Receiver<()>, found: mpsc::Sender<Found>) {
    let mut last: Option<Found> = None;
    let mut good = LastGood::new();
    loop {
        let path = directory.clone();
        let looking = tokio::task::spawn_blocking(move || {
            let now = look_again(&path, &mut good);
            (now, good)
        });
        // A look that panicked is none; what was good is found out again.
        let now = match looking.await {
            Ok((now, known)) => {
                good = known;
                Ok(now)
            }
            Err(error) => {
                good = LastGood::new();
                Err(error)
            }
        };
        if let Ok(mut now) = now {
            if let Some(last) = &last {
                now.keep_from(last);
            }
            if last.as_ref() != Some(&now) {
                last = Some(now.clone());
                if found.send(now).await.is_err() {
                    return;
                }
            }
        }
        // A closed nudge channel answers at once and for ever: then only time counts.
        let nudged = tokio::time::timeout(LOOK_INTERVAL, nudge.recv()).await;
        if matches!(nudged, Ok(None)) {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }
}

/// What each file said when it could last be read.
type LastGood = BTreeMap<PathBuf, Vec<Registration>>;

/// What the directory says now.
pub fn look(directory: &Path) -> Found {
    look_again(directory, &mut LastGood::new())
}

/// What the directory says now; a file that cannot be read still says what it said before.
fn look_again(directory: &Path, good: &mut LastGood) -> Found {
    let mut found = Found::default();
    let files = match files(directory) {
        Ok(files) => files,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            found.not_managed.push(not_managed(&directory.display().to_string(), &error));
            good.keys().cloned().collect()
        }
    };
    good.retain(|file, _| files.contains(file));
    // Once for all of them: a list of interfaces is as long as there are workloads.
    let mut here: Option<Vec<links::Link>> = None;
    let mut names: BTreeMap<String, PathBuf> = BTreeMap::new();
    for file in files {
        let source = file.display().to_string();
        let text = match read(&file) {
            Ok(text) => registration::parse(&source, &text)
                .map_err(|problems| problems.iter().map(ToString::to_string).collect::<Vec<_>>()),
            // It went away since it was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(vec![error.to_string()]),
        };
        let registrations = match text {
            Ok(registrations) => {
                good.insert(file.clone(), registrations.clone());
                registrations
            }
            Err(reasons) => {
                let named = |reason| NotManaged { subject: source.clone(), reason };
                found.not_managed.extend(reasons.into_iter().map(named));
                good.get(&file).cloned().unwrap_or_default()
            }
        };
        for registration in registrations {
            if let Some(first) = names.insert(registration.name.clone(), file.clone()) {
                let reason = format!("the name is already taken by {}", first.display());
                found.not_managed.push(NotManaged { subject: registration.name, reason });
                continue;
            }
            match resolve_among(&registration, &mut here) {
                Ok(workload) => found.workloads.push(workload),
                Err(error) => {
                    found.not_managed.push(not_managed(&registration.name, &error));
                    if error.is_passing() {
                        found.unseen.push(registration.name);
                    }
                }
            }
        }
    }
    found
}

/// A registration with its interface and addresses found.
///
/// # Errors
/// If the namespace or the interface is not there.
pub fn resolve(registration: &Registration) -> Result<FoundWorkload, links::LinksError> {
    resolve_among(registration, &mut None)
}

/// `here` is filled with this host's interfaces when they are first needed.
fn resolve_among(
    registration: &Registration,
    here: &mut Option<Vec<links::Link>>,
) -> Result<FoundWorkload, links::LinksError> {
    let Registration { name, labels, attachment, addresses, identity } = registration;
    let mut group = None;
    let (interfaces, seen) = match attachment {
        Attachment::Netns(path) => {
            let here = match here {
                Some(here) => here,
                None => here.insert(links::links()?),
            };
            let namespace = links::namespace_among(Path::new(path), here)?;
            (namespace.interfaces, namespace.addresses)
        }
        Attachment::Interface(interface) => {
            (vec![(links::interface(interface)?, interface.clone())], Vec::new())
        }
        Attachment::Cgroup(text) => {
            let found = groups::find(text).map_err(links::LinksError::NoGroup)?;
            group = Some((found.inode, found.path.display().to_string()));
            let own = links::addresses()?.into_iter().map(|(_, address)| address);
            (Vec::new(), own.collect())
        }
    };
    let mut addresses = if addresses.is_empty() { seen } else { addresses.clone() };
    addresses.sort_unstable();
    addresses.dedup();
    let (name, labels) = (name.clone(), labels.clone());
    let observed = group.iter().map(|(_, path): &(u32, String)| (facts::PROCESS_GROUP, path.as_str()));
    let (facts, _too_long) = Facts::from_observed(observed);
    Ok(FoundWorkload { name, labels, addresses, interfaces, group, facts, identity: identity.clone() })
}

fn not_managed(subject: &str, error: &dyn std::error::Error) -> NotManaged {
    NotManaged { subject: subject.into(), reason: error.to_string() }
}

fn files(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)?.take(FILES_MAX) {
        let path = entry?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if matches!(extension, Some("yaml" | "yml" | "json")) {
            // The older file keeps a name that two files claim.
            let modified = fs::metadata(&path)?.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            files.push((modified, path));
        }
    }
    files.sort();
    Ok(files.into_iter().map(|(_, path)| path).collect())
}

fn read(file: &Path) -> io::Result<String> {
    if fs::metadata(file)?.len() > FILE_BYTES_MAX {
        return Err(io::Error::other(format!("larger than {FILE_BYTES_MAX} bytes")));
    }
    fs::read_to_string(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_files_are_named_and_the_others_still_count() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        write("a.yaml", "name: web\ninterface: lo\naddresses: [192.0.2.1]\n");
        write("b.yaml", "name: web2\ninterfcae: lo\n");
        write("c.yaml", "name: web3\nnetns: /run/netns/none\n");
        write("ignored.txt", "not ours");
        let found = look(directory.path());
        assert_eq!(found.workloads.len(), 1);
        assert_eq!(found.workloads[0].interfaces[0].1, "lo");
        assert_eq!(found.not_managed.len(), 3, "{:?}", found.not_managed);
        assert!(look(Path::new("/no/such/directory")).workloads.is_empty());
    }

    #[test]
    fn a_file_that_breaks_lets_nothing_go_and_one_that_is_removed_does() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a.yaml");
        fs::write(&file, "name: web\ninterface: lo\naddresses: [192.0.2.1]\n").unwrap();
        let mut good = LastGood::new();
        let before = look_again(directory.path(), &mut good);
        fs::write(&file, "name: web\ninterface: lo\naddresses: [192.0.2.1\n").unwrap();
        let broken = look_again(directory.path(), &mut good);
        assert_eq!((broken.workloads, broken.not_managed.len()), (before.workloads, 1));
        fs::write(directory.path().join("b.yaml"), "name: [").unwrap();
        fs::remove_file(&file).unwrap();
        assert!(look_again(directory.path(), &mut good).workloads.is_empty());
    }
}
