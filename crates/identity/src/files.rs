//! Keys and certificates in files: whole or not at all, and secrets for their owner only.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A file that cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}")]
pub struct FileError {
    /// Its path.
    pub path: PathBuf,
    /// Why.
    pub source: std::io::Error,
}

/// Largest file that is read; a bundle of certificates has some kilobytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Writes a file that only its owner can read.
///
/// # Errors
/// If it cannot be written; the one before is then still there.
pub fn write_private(path: &Path, text: &str) -> Result<(), FileError> {
    write(path, text, 0o600)
}

/// Writes a file that everybody can read.
///
/// # Errors
/// As [`write_private`].
pub fn write_public(path: &Path, text: &str) -> Result<(), FileError> {
    write(path, text, 0o644)
}

/// Beside, made durable, and then in place: a crash leaves the old or the new.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), FileError> {
    let fail = |source| FileError { path: path.to_owned(), source };
    let directory = path.parent().unwrap_or(Path::new("."));
    if !directory.as_os_str().is_empty() {
        fs::create_dir_all(directory).map_err(fail)?;
    }
    let beside = path.with_extension(format!("new-{}", std::process::id()));
    let write = || -> std::io::Result<()> {
        let _not_there = fs::remove_file(&beside);
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
        fs::File::open(directory)?.sync_all()
    };
    write().map_err(|source| {
        let _not_there = fs::remove_file(&beside);
        fail(source)
    })
}

/// The text of a file, or `None` if there is none.
///
/// # Errors
/// If it is there and cannot be read, or is larger than a megabyte.
pub fn read_text(path: &Path) -> Result<Option<String>, FileError> {
    let fail = |source| FileError { path: path.to_owned(), source };
    match fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fail(error)),
        Ok(file) if file.len() > FILE_BYTES_MAX => {
            return Err(fail(std::io::Error::other("larger than a megabyte")));
        }
        Ok(_) => {}
    }
    fs::read_to_string(path).map(Some).map_err(fail)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn secrets_are_for_their_owner_and_are_replaced_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/ca.key");
        assert_eq!(read_text(&path).unwrap(), None);
        for text in ["one", "two"] {
            write_private(&path, text).unwrap();
            assert_eq!(read_text(&path).unwrap().as_deref(), Some(text));
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing is left beside it");
    }
}
