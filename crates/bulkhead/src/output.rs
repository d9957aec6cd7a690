//! What people see: tables, colour, progress.

use std::fmt::Write as _;
use std::future::Future;
use std::io::{IsTerminal, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

pub(crate) use bulkhead_model::columns::{labels, text};
use bulkhead_model::host_policy::Attachment;
use serde_json::Value;

use crate::cli::{Colour, Format};
use crate::failure::Failure;
use crate::yaml;

static COLOUR: AtomicBool = AtomicBool::new(false);

/// Progress is shown for what takes longer than this.
const PROGRESS_AFTER: Duration = Duration::from_secs(1);

/// How a cell is to be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    Good,
    Bad,
    Dim,
    Bold,
}

pub(crate) fn choose_colour(colour: Colour) {
    let on = match colour {
        Colour::Always => true,
        Colour::Never => false,
        // https://no-color.org
        Colour::Auto => std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
    };
    COLOUR.store(on, Ordering::Relaxed);
}

pub(crate) fn paint(style: Style, text: &str) -> String {
    if !COLOUR.load(Ordering::Relaxed) {
        return text.to_owned();
    }
    let code = match style {
        Style::Good => "32",
        Style::Bad => "31",
        Style::Dim => "2",
        Style::Bold => "1",
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}

/// A verdict, coloured.
pub(crate) fn verdict(text: &str) -> String {
    paint(if text == "allow" { Style::Good } else { Style::Bad }, text)
}

/// Where an endpoint's packets are met, in words.
pub(crate) fn attachment(value: &Value) -> String {
    serde_json::from_value::<Attachment>(value.clone()).map_or_else(|_| "?".into(), |one| one.to_string())
}

/// Writes to standard output; a reader that has gone (`| head`) ends the program quietly.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Err(Failure::No(None)),
        Err(error) => Err(Failure::Other(format!("cannot write: {error}"))),
    }
}

pub(crate) fn line(text: &str) -> Result<(), Failure> {
    print(&format!("{text}\n"))
}

/// Says something beside the answer, on standard error.
pub(crate) fn note(text: &str) {
    // Nobody to tell if this fails.
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

pub(crate) fn error(message: &str) {
    let mut err = std::io::stderr().lock();
    let label = if std::io::stderr().is_terminal() { "\x1b[31merror:\x1b[0m" } else { "error:" };
    // Nobody to tell if this fails.
    let _ = writeln!(err, "{label} {message}");
}

/// A value in the form asked for, or `table` if it is for eyes.
pub(crate) fn show(
    format: Format,
    value: &Value,
    table: impl FnOnce() -> Result<String, Failure>,
) -> Result<(), Failure> {
    match format {
        Format::Table => print(&table()?),
        Format::Json => line(&serde_json::to_string_pretty(value).unwrap_or_default()),
        Format::Yaml => print(&yaml::document(value)),
    }
}

/// Rows under headings, columns as wide as they must be. Colour codes do not count as width.
pub(crate) fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = headings.iter().map(|heading| heading.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(visible(cell));
        }
    }
    let mut text = String::new();
    let headings: Vec<_> = headings.iter().map(|heading| paint(Style::Bold, heading)).collect();
    for row in std::iter::once(&headings).chain(rows) {
        let last = row.len().saturating_sub(1);
        for (index, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let padding = if index == last { 0 } else { width.saturating_sub(visible(cell)) + 3 };
            let _ = write!(text, "{cell}{}", " ".repeat(padding));
        }
        text.push('\n');
    }
    text
}

fn visible(text: &str) -> usize {
    plain(text).chars().count()
}

/// Adds names to a page, one per line, `max` at most; or what is said of none.
pub(crate) fn list(page: &mut String, names: &[String], max: usize, nothing: &str) {
    if names.is_empty() {
        let _ = writeln!(page, "  {nothing}");
    }
    for name in names.iter().take(max) {
        let _ = writeln!(page, "  {name}");
    }
    if names.len() > max {
        let _ = writeln!(page, "  … and {} more", names.len() - max);
    }
}

/// Without colours.
pub(crate) fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut escape = false;
    for character in text.chars() {
        match (escape, character) {
            (false, '\x1b') => escape = true,
            (false, _) => plain.push(character),
            (true, 'm') => escape = false,
            (true, _) => {}
        }
    }
    plain
}

/// Runs `work`; if it takes long and somebody watches, says so.
pub(crate) async fn with_progress<T>(what: &str, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    if !std::io::stderr().is_terminal() {
        return work.await;
    }
    let started = tokio::time::Instant::now();
    let mut tick = tokio::time::interval_at(started + PROGRESS_AFTER, Duration::from_millis(200));
    let mut shown = false;
    loop {
        tokio::select! {
            result = &mut work => {
                if shown {
                    let _ = write!(std::io::stderr(), "\r\x1b[K");
                }
                return result;
            }
            _ = tick.tick() => {
                shown = true;
                let _ = write!(std::io::stderr(), "\r\x1b[K{what}… {:.0} s", started.elapsed().as_secs_f32());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_whatever_the_colour() {
        let rows =
            vec![vec!["\x1b[32mallow\x1b[0m".into(), "x".into()], vec!["deny".into(), "longer".into()]];
        let table = table(&["VERDICT", "B"], &rows);
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(lines[0], "VERDICT   B");
        assert_eq!(lines[2], "deny      longer");
        assert_eq!(visible(lines[1]), visible("allow     x"));
    }
}
