//! What the audience sees.

use std::io::IsTerminal;
use std::time::Duration;

use bulkhead_testbed::{Component, Example, Matrix, Outcome};

/// Prints scenes and remembers whether everything was as expected.
#[derive(Debug)]
pub(crate) struct Show {
    colour: bool,
    scene: u32,
    figures: u32,
    wrong: Vec<String>,
}

impl Show {
    pub(crate) fn new() -> Self {
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { colour, scene: 0, figures: 0, wrong: Vec::new() }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    pub(crate) fn title(&self, text: &str) {
        println!("\n{}\n", self.paint("1;4", text));
    }

    pub(crate) fn scene(&mut self, text: &str) {
        self.scene += 1;
        println!("\n{}\n", self.paint("1", &format!("{}  {text}", self.scene)));
    }

    pub(crate) fn note(&self, text: &str) {
        println!("   {}", self.paint("2", text));
    }

    /// Text that the product itself printed.
    pub(crate) fn quote(&self, command: &str, text: &str) {
        println!("   {}", self.paint("36", &format!("$ {command}")));
        for line in text.lines() {
            println!("   {line}");
        }
        println!();
    }

    /// A figure that is right or wrong.
    pub(crate) fn figure(&mut self, what: &str, observed: &str, expected: &str, right: bool) {
        self.figures += 1;
        let mark = if right { self.paint("32", "✓") } else { self.paint("31;1", "✗") };
        let padding = 46usize.saturating_sub(what.chars().count());
        let observed_padding = 18usize.saturating_sub(observed.chars().count());
        println!(
            "   {mark} {what} {} {observed}{} {}",
            self.paint("2", &".".repeat(padding)),
            " ".repeat(observed_padding),
            self.paint("2", &format!("expected {expected}"))
        );
        if !right {
            self.wrong.push(format!("scene {}: {what}: {observed}, expected {expected}", self.scene));
        }
    }

    /// A figure that must be exactly so.
    pub(crate) fn equal<T: PartialEq + std::fmt::Display + Copy>(
        &mut self,
        what: &str,
        observed: T,
        expected: T,
    ) {
        let right = observed == expected;
        self.figure(what, &observed.to_string(), &expected.to_string(), right);
    }

    /// Something that could not be shown to its end.
    pub(crate) fn broken(&mut self, error: &str) {
        println!("   {} {error}", self.paint("31;1", "✗"));
        self.wrong.push(format!("scene {}: {error}", self.scene));
    }

    /// The observed matrix, and the expected one beside it.
    pub(crate) fn matrices(
        &mut self,
        example: &Example,
        observed: &Matrix,
        expect: impl Fn(&Component, &Component) -> bool,
    ) {
        let letters: Vec<char> = ('a'..='z').take(example.members.len()).collect();
        let heading: String = letters.iter().map(|letter| format!(" {letter}")).collect();
        let width = heading.len();
        println!("   from ↓  to →        {:<width$}    expected", "observed");
        println!("   {:<18}  {heading}   {heading}", "");
        let mut application = "";
        for ((letter, (from, _)), row) in letters.iter().zip(&example.members).zip(&observed.rows) {
            if from.application != application {
                application = from.application;
                println!("   {}", self.paint("2", application));
            }
            let zone = match from.zone {
                Some("dmz") => "D",
                Some(_) => "R",
                None => " ",
            };
            let (mut left, mut right) = (String::new(), String::new());
            for ((to, _), outcome) in example.members.iter().zip(row) {
                let wanted = expect(from, to);
                let Some(outcome) = outcome else {
                    left.push_str("  ");
                    right.push_str("  ");
                    continue;
                };
                left.push(' ');
                left.push_str(&self.cell(*outcome, wanted));
                right.push(' ');
                right.push_str(&self.mark(wanted));
            }
            println!("   {letter} {:<16}{}  {left}   {right}", from.name, self.paint("2", zone));
        }
        println!();
        self.note("✓ reached   · no answer   ✗ not as expected        D zone=dmz   R zone=restricted");
        println!();
        let cells = observed.rows.iter().flatten().flatten().count();
        let differences = example.differences(observed, expect).len();
        self.equal("pairs that are as expected", cells - differences, cells);
    }

    fn mark(&self, reached: bool) -> String {
        if reached { self.paint("32", "✓") } else { self.paint("2", "·") }
    }

    fn cell(&self, outcome: Outcome, wanted: bool) -> String {
        match (outcome, wanted) {
            (Outcome::Reached, true) => self.mark(true),
            (Outcome::Silent, false) => self.mark(false),
            _ => self.paint("31;1", "✗"),
        }
    }

    /// Whether everything was as expected.
    pub(crate) fn all_as_expected(&self) -> bool {
        self.wrong.is_empty()
    }

    pub(crate) fn summary(&self, took: Duration) {
        println!();
        let took = format!("{:.0} s", took.as_secs_f64());
        if self.all_as_expected() {
            let text = format!("All {} figures as expected, in {took}.", self.figures);
            println!("{}\n", self.paint("32;1", &text));
            return;
        }
        let text = format!("{} of {} figures NOT as expected, in {took}:", self.wrong.len(), self.figures);
        println!("{}", self.paint("31;1", &text));
        for wrong in &self.wrong {
            println!("  {wrong}");
        }
        println!();
    }
}
