//! `trace`: connections of this host as they happen, with the deciding rule.

use super::{flows, query};
use crate::cli::{Common, TraceArgs};
use crate::client::lines;
use crate::failure::Failure;
use crate::output;

pub(crate) async fn trace(common: &Common, args: &TraceArgs) -> Result<(), Failure> {
    let parameters = query(&[
        ("from", args.from.as_deref()),
        ("to", args.to.as_deref()),
        ("port", args.port.as_deref()),
        ("verdict", args.verdict.as_deref()),
        ("policy", args.policy.as_deref()),
    ]);
    let mut follow = flows::follower(common.output);
    let mut left = args.count;
    let path = format!("/trace{parameters}");
    let shown = lines(common.agent(), &path, |record| {
        if let Some(missed) = record["missed"].as_u64() {
            output::note(&format!("{missed} records were too quick for this trace and are missing\n"));
            return Ok(());
        }
        follow(&record)?;
        left = left.map(|left| left - 1);
        // Enough was seen.
        if left == Some(0) { Err(Failure::No(None)) } else { Ok(()) }
    });
    match shown.await {
        Err(Failure::No(None)) if left == Some(0) => Ok(()),
        other => other,
    }
}
