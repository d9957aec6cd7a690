//! Manifests from files, directories, patterns and standard input, read here and not by a controller.

use std::path::PathBuf;

use bulkhead_model::document::{Document, parse};
use bulkhead_model::{Problem, Resource};

use crate::failure::Failure;

/// Largest directory that is read, in files.
const FILES_MAX: usize = 10_000;

/// A text and what it is called in messages.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub(crate) name: String,
    pub(crate) text: String,
}

/// The texts of files, of all manifests in directories, and of standard input (`-`).
pub(crate) fn sources(names: &[PathBuf]) -> Result<Vec<Source>, Failure> {
    let mut sources = Vec::new();
    for name in names {
        if name.as_os_str() == "-" {
            let text = std::io::read_to_string(std::io::stdin());
            let text =
                text.map_err(|error| Failure::Other(format!("cannot read standard input: {error}")))?;
            sources.push(Source { name: "standard input".into(), text });
            continue;
        }
        for file in files(name)? {
            let text = std::fs::read_to_string(&file)
                .map_err(|error| Failure::no(format!("cannot read {}: {error}", file.display())))?;
            sources.push(Source { name: file.display().to_string(), text });
        }
    }
    Ok(sources)
}

/// The file itself, or the manifests of a directory.
pub(crate) fn files(path: &PathBuf) -> Result<Vec<PathBuf>, Failure> {
    let fail = |error: std::io::Error| Failure::no(format!("cannot read {}: {error}", path.display()));
    if !std::fs::metadata(path).map_err(fail)?.is_dir() {
        return Ok(vec![path.clone()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(fail)?.take(FILES_MAX) {
        let file = entry.map_err(fail)?.path();
        let extension = file.extension().and_then(|extension| extension.to_str());
        if matches!(extension, Some("yaml" | "yml" | "json")) {
            files.push(file);
        }
    }
    if files.is_empty() {
        return Err(Failure::no(format!("{} holds no .yaml, .yml or .json file", path.display())));
    }
    files.sort();
    Ok(files)
}

/// All objects of all texts.
///
/// # Errors
/// With every problem of every text; then nothing is to be used.
pub(crate) fn documents(sources: &[Source]) -> Result<Vec<Document>, Vec<Problem>> {
    let mut documents = Vec::new();
    let mut problems = Vec::new();
    for Source { name, text } in sources {
        match parse(name, text) {
            Ok(mut more) => documents.append(&mut more),
            Err(mut more) => problems.append(&mut more),
        }
    }
    if problems.is_empty() { Ok(documents) } else { Err(problems) }
}

/// All objects of files.
pub(crate) fn read(names: &[PathBuf]) -> Result<Vec<Resource>, Failure> {
    let documents = documents(&sources(names)?).map_err(|problems| refused(&problems))?;
    Ok(documents.into_iter().map(|document| document.resource).collect())
}

/// Problems as one refusal.
pub(crate) fn refused(problems: &[Problem]) -> Failure {
    let lines: Vec<_> = problems.iter().map(ToString::to_string).collect();
    Failure::no(lines.join("\n"))
}
