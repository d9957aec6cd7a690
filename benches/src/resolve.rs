//! From policies to one host's tables, in the shapes of Cilium's benchmarks of policy resolution.
//!
//! Cilium publishes no times for them; of one it tells how many entries come out.

use std::net::Ipv4Addr;
use std::sync::Arc;

use bulkhead_engine::{HostEngine, LocalEndpoint, Member};
use bulkhead_model::host_policy::Attachment;
use bulkhead_model::policy::{Action, Peer, PolicySpec, Rule};
use bulkhead_model::{Prefix, Selector};

use crate::child::{Body, Outcome, medians, timed};
use crate::engine_speed::program;
use crate::report::Line;
use crate::{Effort, fixtures, progress};

const RULES: u32 = 1_000;
const IDENTITIES: u32 = 3_000;
const NOT_MATCHING: u32 = 20_000;
/// What Cilium's test expects in the map of an endpoint with 1000 CIDR rules.
const CILIUM_ENTRIES: f64 = 44_596.0;

/// What runs in processes of its own.
pub(crate) const BODIES: &[(&str, Body)] = &[
    ("ingress-rules", || label_rules(true, Action::Allow)),
    ("egress-rules", || label_rules(false, Action::Allow)),
    ("deny-rules", || label_rules(true, Action::Deny)),
    ("cidr-rules", cidr_rules),
    ("not-matching", not_matching),
];

/// Measures all of them.
pub(crate) fn measure(effort: Effort) -> anyhow::Result<Vec<Line>> {
    progress("policies to tables");
    let names: Vec<&str> = BODIES.iter().map(|(name, _)| *name).collect();
    let outcomes = medians(effort.pick(5, 1), &names)?;
    let mut lines = Vec::new();
    for (name, what) in [
        ("ingress-rules", "1000 ingress rules x 3000 label sets"),
        ("egress-rules", "1000 egress rules x 3000 label sets"),
        ("deny-rules", "1000 ingress rules that deny x 3000 label sets"),
        ("cidr-rules", "1000 egress rules of one CIDR each"),
        ("not-matching", "20 000 policies for others"),
    ] {
        let outcome = &outcomes[name];
        lines.push(Line::new(format!("{what}: policies to tables"), "ms", outcome.seconds * 1e3));
        lines.push(Line::new(format!("{what}: memory"), "MB", outcome.megabytes));
        if let Some(entries) = outcome.parts.get("entries") {
            lines.push(
                Line::new(format!("{what}: table entries"), "entries", *entries)
                    .beside("cilium (its test)", CILIUM_ENTRIES)
                    .ratio(entries / CILIUM_ENTRIES),
            );
        }
        if let Some(seconds) = outcome.parts.get("endpoint") {
            lines.push(Line::new(format!("{what}: one more endpoint"), "µs", seconds * 1e6));
        }
    }
    Ok(lines)
}

fn add_foo(engine: &mut HostEngine, number: u32) -> anyhow::Result<()> {
    let here: Arc<str> = "here".into();
    let ip = fixtures::address((1 << 20) + number);
    let entity = fixtures::workload(&format!("foo{number}"), &here, &[("id", "foo")], ip)?;
    engine.set_local(
        &Arc::clone(&entity.name),
        Some(LocalEndpoint { entity, attachment: Attachment::Interface(number + 2) }),
    );
    Ok(())
}

/// Many rules for one endpoint whose peers are everybody with a label: as many label sets as identities in Cilium.
fn label_rules(ingress: bool, action: Action) -> anyhow::Result<Outcome> {
    let (subject, bar) = (fixtures::selector("id == 'foo'")?, fixtures::selector("has(bar)")?);
    timed(|| {
        let mut index = bulkhead_engine::MemberIndex::new();
        let elsewhere: Arc<str> = "elsewhere".into();
        for number in 0..IDENTITIES {
            let value = number.to_string();
            let labels = [("bar", ""), ("id", &value), ("zone", "z"), ("team", "t"), ("app", "shop")];
            let name = format!("w{number}");
            index.upsert(&fixtures::workload(&name, &elsewhere, &labels, fixtures::address(number))?);
        }
        let mut engine = HostEngine::new("here");
        for number in 0..RULES {
            let peers = vec![Peer { selector: Some(bar.clone()), ..Peer::default() }];
            let rules = Some(vec![Rule { peers, ..Rule::new(action) }]);
            let mut spec = PolicySpec::new(subject.clone());
            *if ingress { &mut spec.ingress } else { &mut spec.egress } = rules;
            engine.set_policy(&fixtures::policy_key(&format!("p{number}")), Some(&spec));
        }
        add_foo(&mut engine, 0)?;
        program(&mut engine, |selector| {
            let id = index.subscribe(selector);
            index.members(id).map(Member::from).collect::<Vec<_>>().into_iter()
        });
        Ok((engine.policy().addresses.len(), (engine, index)))
    })?
    .checked(IDENTITIES as usize)
}

/// One CIDR per rule, of lengths from 8 to 32.
fn cidr_rules() -> anyhow::Result<Outcome> {
    let subject = fixtures::selector("id == 'foo'")?;
    let mut entries = 0;
    let mut outcome = timed(|| {
        let mut engine = HostEngine::new("here");
        for number in 0..RULES {
            let address = Ipv4Addr::from_bits(number.wrapping_mul(0x9e37_79b9));
            let length = u8::try_from(8 + number % 25)?;
            let cidrs = vec![Prefix::new(address.into(), length)];
            let rule = Rule { peers: vec![Peer { cidrs, ..Peer::default() }], ..Rule::new(Action::Allow) };
            let spec = PolicySpec { egress: Some(vec![rule]), ..PolicySpec::new(subject.clone()) };
            engine.set_policy(&fixtures::policy_key(&format!("p{number}")), Some(&spec));
        }
        add_foo(&mut engine, 0)?;
        loop {
            entries += engine.flush().entries_written();
            if !engine.needs_flush() {
                break;
            }
        }
        Ok((engine.policy().policies.len(), engine))
    })?;
    if outcome.made == 0 {
        anyhow::bail!("no tables came out");
    }
    let entries = u32::try_from(entries)?;
    outcome.parts.insert("entries".into(), f64::from(entries));
    Ok(outcome)
}

/// Policies of which none selects the endpoint; then what one more endpoint costs.
fn not_matching() -> anyhow::Result<Outcome> {
    let peer = fixtures::selector("id == 'bar'")?;
    let mut engine = HostEngine::new("here");
    let mut outcome = timed(|| {
        for number in 0..NOT_MATCHING {
            let subject = Selector::equals("id", &format!("other-{number}"));
            let spec = fixtures::allow_from(subject, std::slice::from_ref(&peer));
            engine.set_policy(&fixtures::policy_key(&format!("p{number}")), Some(&spec));
        }
        add_foo(&mut engine, 0)?;
        engine.flush();
        Ok((engine.policy().endpoints.len(), ()))
    })?
    .checked(1)?;
    let more = crate::child::repeated(50, |number| {
        add_foo(&mut engine, number + 1)?;
        Ok(engine.flush().endpoints.len())
    })?
    .checked(50)?;
    outcome.parts.insert("endpoint".into(), more.seconds);
    Ok(outcome)
}
