//! Measurements in processes of their own, so that the peak of memory of each is its own.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, anyhow, bail};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::report::Line;
use crate::stats::median;
use crate::{memory, progress};

/// What a child measures.
pub(crate) type Body = fn() -> anyhow::Result<Outcome>;

/// Calico's numbers are of an i9-8950HK at 2.9 GHz.
pub(crate) const CALICO: &str = "calico (published)";
/// Antrea's, from the comments of its tests, of a machine that is not told.
pub(crate) const ANTREA: &str = "antrea (published)";

/// What a child measured.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// Processor time from the first input to the last output.
    pub(crate) seconds: f64,
    /// Growth of the peak of memory meanwhile.
    pub(crate) megabytes: f64,
    /// What came out, as a check that the work was done.
    pub(crate) made: usize,
    /// Numbers about parts of it.
    pub(crate) parts: BTreeMap<String, f64>,
}

impl Outcome {
    /// Refuses another result than the expected one.
    pub(crate) fn checked(self, expected: usize) -> anyhow::Result<Self> {
        if self.made != expected {
            bail!("{} came out where {expected} were expected", self.made);
        }
        Ok(self)
    }
}

/// Seconds of processor time of this process. What is measured has one thread, so on an idle machine this is what a
/// clock says; on a busy one it leaves out the time in which others ran.
pub(crate) fn processor() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    let nanos = u64::try_from(time.tv_sec).unwrap_or_default() * 1_000_000_000
        + u64::try_from(time.tv_nsec).unwrap_or_default();
    std::time::Duration::from_nanos(nanos).as_secs_f64()
}

/// Measures something from the first input to the last output. It says how much came out, and hands back what it has
/// built: taking that down again does not count.
pub(crate) fn timed<T>(act: impl FnOnce() -> anyhow::Result<(usize, T)>) -> anyhow::Result<Outcome> {
    let before = memory::start()?;
    let started = processor();
    let (made, _built) = act()?;
    let seconds = processor() - started;
    Ok(Outcome { seconds, megabytes: memory::peak()? - before, made, parts: BTreeMap::new() })
}

/// Measures so many repetitions of something, and says what came out of all of them.
pub(crate) fn repeated(
    times: u32,
    mut act: impl FnMut(u32) -> anyhow::Result<usize>,
) -> anyhow::Result<Outcome> {
    let mut outcome = timed(|| Ok(((0..times).try_fold(0, |sum, time| anyhow::Ok(sum + act(time)?))?, ())))?;
    outcome.seconds /= f64::from(times);
    Ok(outcome)
}

/// Runs one measurement in this process and prints its outcome.
pub(crate) fn here(name: &str, bodies: &[&[(&str, Body)]]) -> anyhow::Result<()> {
    let body = bodies.iter().copied().flatten().find(|(known, _)| *known == name);
    let (_, body) = body.ok_or_else(|| anyhow!("there is no measurement {name:?}"))?;
    println!("{}", serde_json::to_string(&body()?)?);
    Ok(())
}

/// Runs one measurement in a process of its own.
fn elsewhere(name: &str) -> anyhow::Result<Outcome> {
    let program = std::env::current_exe()?;
    let output = Command::new(program).args(["--child", name]).output()?;
    if !output.status.success() {
        bail!("{name}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    serde_json::from_slice(&output.stdout).with_context(|| format!("answer of {name}"))
}

/// Runs measurements some rounds each, one after the other in each round, and answers the medians.
pub(crate) fn medians(rounds: usize, names: &[&str]) -> anyhow::Result<BTreeMap<String, Outcome>> {
    let mut outcomes: BTreeMap<String, Vec<Outcome>> = BTreeMap::new();
    let begun = Instant::now();
    for round in 1..=rounds {
        for name in names {
            outcomes.entry((*name).to_owned()).or_default().push(elsewhere(name)?);
        }
        progress(&format!("round {round} of {rounds}, {:.0} s", begun.elapsed().as_secs_f64()));
    }
    Ok(outcomes.into_iter().map(|(name, outcomes)| (name, middle(&outcomes))).collect())
}

fn middle(outcomes: &[Outcome]) -> Outcome {
    let of = |field: &dyn Fn(&Outcome) -> f64| median(&outcomes.iter().map(field).collect::<Vec<_>>());
    let first = outcomes.first().cloned().unwrap_or_default();
    let part = |name: &String| of(&|outcome: &Outcome| outcome.parts.get(name).copied().unwrap_or_default());
    Outcome {
        seconds: of(&|outcome| outcome.seconds),
        megabytes: of(&|outcome| outcome.megabytes),
        made: first.made,
        parts: first.parts.keys().map(|name| (name.clone(), part(name))).collect(),
    }
}

/// Time and memory of one shape, beside what others published and what the design promises.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Shape<'a> {
    /// What is measured.
    pub(crate) name: &'a str,
    /// Seconds and megabytes that somebody published.
    pub(crate) published: Option<(&'a str, f64, f64)>,
    /// Seconds and megabytes that the design promises.
    pub(crate) budget: Option<(f64, f64)>,
}

impl Shape<'_> {
    /// Two lines.
    pub(crate) fn lines(&self, outcome: &Outcome) -> Vec<Line> {
        let Self { name, published, budget } = self;
        let line = |what: &str, unit: &str, ours: f64, others: Option<(&str, f64)>, most: Option<f64>| {
            let mut line = Line::new(format!("{name}: {what}"), unit, ours);
            if let Some((peer, number)) = others {
                line = line.beside(peer, number).ratio(ours / number);
            }
            match most {
                Some(most) => line.budget(format!("<= {most} {unit}"), ours <= most),
                None => line,
            }
        };
        let seconds = published.map(|(peer, seconds, _)| (peer, seconds));
        let megabytes = published.map(|(peer, _, megabytes)| (peer, megabytes));
        vec![
            line("time", "s", outcome.seconds, seconds, budget.map(|budget| budget.0)),
            line("memory", "MB", outcome.megabytes, megabytes, budget.map(|budget| budget.1)),
        ]
    }
}
