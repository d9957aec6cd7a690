//! Manifests from files, directories, patterns and standard input, read here and not by a controller.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bulkhead_model::document::{Document, parse};
use bulkhead_model::{ObjectKey, Problem, Resource};

use crate::failure::Failure;
use crate::suite::is_test_file;

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

/// The files that a text names, relative to a directory: a file, the manifests of a directory, or what a pattern
/// matches.
///
/// # Errors
/// If that is nothing.
pub(crate) fn named(base: &Path, text: &str) -> Result<Vec<PathBuf>, Failure> {
    let mut all = Vec::new();
    for path in matching(base, text)? {
        // A pattern may well match what lies beside manifests.
        let skipped = path.is_file() && is_test_file(&path) && path != base.join(text);
        if !skipped {
            all.extend(files(&path)?);
        }
    }
    Ok(all)
}

/// The paths that a text means: itself, or if there is nothing of that name what it matches as a pattern.
///
/// # Errors
/// If there is nothing.
pub(crate) fn matching(base: &Path, text: &str) -> Result<Vec<PathBuf>, Failure> {
    let path = base.join(text);
    if path.exists() || !text.contains(['*', '?', '[']) {
        return Ok(vec![path]);
    }
    let wrong = |why: String| Failure::no(format!("cannot read {}: {why}", path.display()));
    // Only the text is a pattern: a directory may have brackets in its name.
    let pattern = Path::new(&glob::Pattern::escape(&base.display().to_string())).join(text);
    let found = glob::glob(&pattern.display().to_string()).map_err(|error| wrong(error.to_string()))?;
    let mut paths = Vec::new();
    for path in found.take(FILES_MAX) {
        paths.push(path.map_err(|error| wrong(error.to_string()))?);
    }
    if paths.is_empty() { Err(wrong("nothing matches this pattern".into())) } else { Ok(paths) }
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
        if matches!(extension, Some("yaml" | "yml" | "json")) && !is_test_file(&file) {
            files.push(file);
        }
    }
    if files.is_empty() {
        return Err(Failure::no(format!("{} holds no .yaml, .yml or .json file", path.display())));
    }
    files.sort();
    Ok(files)
}

/// All objects of all texts, each once.
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
    let mut places: BTreeMap<ObjectKey, &Document> = BTreeMap::new();
    for document in &documents {
        let key = document.resource.key();
        if let Some(first) = places.get(&key) {
            let at = first.position_of("metadata.name");
            let message =
                format!("{key} is given twice, first at {}:{}:{}", first.source, at.line, at.column);
            problems.push(document.problem("metadata.name", message, None));
        } else {
            places.insert(key, document);
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
