//! Test results as JUnit XML, which every CI system reads.
//!
//! Written by hand: four elements and one escape do not need a crate that writes and reads all of XML.

use std::fmt::Write as _;
use std::time::Duration;

/// The tests of one suite.
#[derive(Debug)]
pub(crate) struct JunitSuite<'a> {
    pub(crate) name: &'a str,
    pub(crate) cases: Vec<JunitCase<'a>>,
    pub(crate) time: Duration,
}

/// One test.
#[derive(Debug)]
pub(crate) struct JunitCase<'a> {
    pub(crate) name: &'a str,
    pub(crate) file: &'a str,
    pub(crate) line: u32,
    pub(crate) time: Duration,
    pub(crate) outcome: JunitOutcome<'a>,
}

/// What came of a test. Message first, then everything.
#[derive(Debug, Clone, Copy)]
pub(crate) enum JunitOutcome<'a> {
    Passed,
    Failed(&'a str, &'a str),
    /// It could not be asked.
    Error(&'a str),
}

/// The whole file.
pub(crate) fn document(suites: &[JunitSuite<'_>]) -> String {
    let cases = || suites.iter().flat_map(|suite| &suite.cases);
    let time: Duration = suites.iter().map(|suite| suite.time).sum();
    let mut text = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites name=\"bulkhead test\" {}>\n",
        numbers(cases(), time)
    );
    for suite in suites {
        let numbers = numbers(suite.cases.iter(), suite.time);
        let _ = writeln!(text, "  <testsuite name=\"{}\" {numbers}>", escaped(suite.name));
        for case in &suite.cases {
            write_case(&mut text, suite.name, case);
        }
        text.push_str("  </testsuite>\n");
    }
    text.push_str("</testsuites>\n");
    text
}

fn numbers<'a>(cases: impl Iterator<Item = &'a JunitCase<'a>> + Clone, time: Duration) -> String {
    let failures = cases.clone().filter(|case| matches!(case.outcome, JunitOutcome::Failed(..))).count();
    let errors = cases.clone().filter(|case| matches!(case.outcome, JunitOutcome::Error(_))).count();
    let tests = cases.count();
    format!(
        "tests=\"{tests}\" failures=\"{failures}\" errors=\"{errors}\" time=\"{:.6}\"",
        time.as_secs_f64()
    )
}

fn write_case(text: &mut String, suite: &str, case: &JunitCase<'_>) {
    let _ = write!(
        text,
        "    <testcase name=\"{}\" classname=\"{}\" file=\"{}\" line=\"{}\" time=\"{:.6}\"",
        escaped(case.name),
        escaped(suite),
        escaped(case.file),
        case.line,
        case.time.as_secs_f64()
    );
    let _ = match case.outcome {
        JunitOutcome::Passed => writeln!(text, "/>"),
        JunitOutcome::Failed(message, all) => writeln!(
            text,
            ">\n      <failure message=\"{}\" type=\"verdict\">{}</failure>\n    </testcase>",
            escaped(message),
            content(all)
        ),
        JunitOutcome::Error(message) => {
            writeln!(
                text,
                ">\n      <error message=\"{}\" type=\"error\"/>\n    </testcase>",
                escaped(message)
            )
        }
    };
}

/// An attribute's value: line ends are escaped, since a reader would make blanks of them.
fn escaped(text: &str) -> String {
    content(text).replace('\n', "&#10;").replace('\t', "&#9;")
}

/// Text between tags. What XML 1.0 cannot hold at all (section 2.2) becomes U+FFFD.
fn content(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\n' | '\t' => out.push(character),
            // A reader would make a line end of it.
            '\r' => out.push_str("&#13;"),
            '\u{0}'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_a_name_holds_the_file_reads_back_the_same() {
        let name = "a < b && \"c\" ' >\n\ttab";
        let case = |outcome| JunitCase { name, file: "x", line: 3, time: Duration::from_millis(1), outcome };
        let cases = vec![
            case(JunitOutcome::Passed),
            case(JunitOutcome::Failed("m", "one\ntwo ]]> \u{1}")),
            case(JunitOutcome::Error("e")),
        ];
        let text = document(&[JunitSuite { name: "s", cases, time: Duration::from_secs(1) }]);
        let xml = roxmltree::Document::parse(&text).unwrap();
        let suite = xml.root_element().first_element_child().unwrap();
        assert_eq!(suite.attribute("tests"), Some("3"));
        assert_eq!(suite.attribute("failures"), Some("1"));
        assert_eq!(suite.attribute("errors"), Some("1"));
        let cases: Vec<_> = suite.children().filter(|node| node.is_element()).collect();
        assert_eq!(cases[0].attribute("name"), Some(name));
        assert_eq!(cases[1].first_element_child().unwrap().text(), Some("one\ntwo ]]> \u{fffd}"));
    }
}
