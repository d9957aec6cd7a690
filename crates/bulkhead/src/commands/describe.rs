//! `describe`: an object and everything about it that the repository knows.

use std::fmt::Write as _;

use bulkhead_model::policy::Order;
use bulkhead_model::{Direction, Entity, Kind, Resource};
use hyper::Method;
use serde_json::Value;

use super::get::without_owners;
use super::{kind_and_name, object_path};
use crate::cli::{Common, Format, ObjectArgs};
use crate::client::{API, call};
use crate::failure::Failure;
use crate::output::{self, Style, paint, table, text};
use crate::yaml;

/// Most members that a list shows.
const SHOWN_MAX: usize = 50;

pub(crate) async fn describe(common: &Common, args: &ObjectArgs) -> Result<(), Failure> {
    let (kind, name) = kind_and_name(&args.kind, args.name.as_deref())?;
    let Some(name) = name else {
        return Err(Failure::Usage(format!("which of the {}? Give a name", kind.plural())));
    };
    let path = object_path(kind, Some(&name));
    let mut object = call(common.controller(), Method::GET, &path, None).await?;
    without_owners(&mut object);
    if common.output != Format::Table {
        return output::show(common.output, &object, || Ok(String::new()));
    }
    let mut page = yaml::document(&object);
    match kind {
        Kind::Policy => policy(common, &object, &mut page).await?,
        Kind::Workload => workload(common, &object, &mut page).await?,
        Kind::Tier => tier(common, &name, &mut page).await?,
        Kind::Host => host(common, &name, &mut page).await?,
        _ => {}
    }
    output::print(&page)
}

async fn all(common: &Common, kind: Kind) -> Result<Vec<Resource>, Failure> {
    let answer = call(common.controller(), Method::GET, &object_path(kind, None), None).await?;
    let items = answer["items"].as_array().cloned().unwrap_or_default();
    Ok(items.iter().filter_map(|item| Resource::from_json(item).ok()).collect())
}

fn heading(page: &mut String, title: &str) {
    let _ = writeln!(page, "\n{}", paint(Style::Bold, title));
}

async fn policy(common: &Common, object: &Value, page: &mut String) -> Result<(), Failure> {
    let Ok(Resource::Policy(policy)) = Resource::from_json(object) else { return Ok(()) };
    let workloads = all(common, Kind::Workload).await?;
    let selected =
        workloads.iter().filter_map(Entity::of).filter(|e| policy.spec.applies_to.matches(&e.labels));
    let names: Vec<_> = selected.map(|entity| plain(&entity.name)).collect();
    heading(page, &format!("Applies to {} workloads", names.len()));
    output::list(page, &names, SHOWN_MAX, "none now: check the selector against `bulkhead get workloads`");
    for direction in Direction::BOTH {
        for (index, rule) in policy.spec.rules(direction).unwrap_or_default().iter().enumerate() {
            for selector in rule.peers.iter().filter_map(|peer| peer.selector.as_ref()) {
                let matched = workloads.iter().filter_map(Entity::of).filter(|e| selector.matches(&e.labels));
                let names: Vec<_> = matched.map(|entity| plain(&entity.name)).collect();
                heading(page, &format!("{direction}[{index}] peers of {selector}: {}", names.len()));
                output::list(page, &names, SHOWN_MAX, "none now");
            }
        }
    }
    Ok(())
}

async fn workload(common: &Common, object: &Value, page: &mut String) -> Result<(), Failure> {
    let Ok(resource) = Resource::from_json(object) else { return Ok(()) };
    let Some(entity) = Entity::of(&resource) else { return Ok(()) };
    let tiers = all(common, Kind::Tier).await?;
    let order_of = |name: &str| {
        tiers
            .iter()
            .find_map(|tier| match tier {
                Resource::Tier(tier) if tier.metadata.name == name => Some(tier.spec.order),
                _ => None,
            })
            .unwrap_or(Order::LAST)
    };
    let mut policies: Vec<_> = all(common, Kind::Policy)
        .await?
        .into_iter()
        .filter_map(|resource| match &resource {
            Resource::Policy(policy) if policy.spec.applies_to.matches(&entity.labels) => {
                let key = resource.key();
                let rank = (order_of(&policy.spec.tier), policy.spec.tier.clone(), policy.spec.order, key);
                Some((rank, policy.clone()))
            }
            _ => None,
        })
        .collect();
    policies.sort_by(|(a, _), (b, _)| a.cmp(b));
    for direction in Direction::BOTH {
        let rows: Vec<_> = policies
            .iter()
            .filter_map(|((_, tier, _, key), policy)| {
                let rules = policy.spec.rules(direction)?;
                let mode = format!("{:?}", policy.spec.mode);
                Some(vec![tier.clone(), key.qualified_name(), mode, rules.len().to_string()])
            })
            .collect();
        heading(page, &format!("Policies for {direction}, in order"));
        if rows.is_empty() {
            page.push_str("  none: the default posture decides\n");
        } else {
            page.push_str(&table(&["TIER", "POLICY", "MODE", "RULES"], &rows));
        }
    }
    Ok(())
}

async fn tier(common: &Common, name: &str, page: &mut String) -> Result<(), Failure> {
    let mut policies: Vec<_> = all(common, Kind::Policy)
        .await?
        .into_iter()
        .filter_map(|resource| match &resource {
            Resource::Policy(policy) if policy.spec.tier == name => {
                Some((policy.spec.order, resource.key().qualified_name()))
            }
            _ => None,
        })
        .collect();
    policies.sort();
    let names: Vec<_> = policies.into_iter().map(|(_, name)| name).collect();
    heading(page, "Policies, in order");
    output::list(page, &names, SHOWN_MAX, "none");
    Ok(())
}

async fn host(common: &Common, name: &str, page: &mut String) -> Result<(), Failure> {
    let status = call(common.controller(), Method::GET, &format!("{API}/status"), None).await?;
    let agents = status["agents"].as_array().cloned().unwrap_or_default();
    heading(page, "Agent");
    match agents.iter().find(|agent| agent["host"] == name) {
        Some(agent) => page.push_str(&yaml::document(agent)),
        None => page.push_str("  never seen since the controller started\n"),
    }
    let names: Vec<_> = all(common, Kind::Workload)
        .await?
        .iter()
        .filter(|resource| matches!(resource, Resource::Workload(w) if w.spec.host == name))
        .map(|resource| text(&resource.to_json(), "/metadata/name"))
        .collect();
    heading(page, &format!("Workloads: {}", names.len()));
    output::list(page, &names, SHOWN_MAX, "none");
    Ok(())
}

fn plain(entity: &str) -> String {
    entity.strip_prefix("Workload/").unwrap_or(entity).to_owned()
}
