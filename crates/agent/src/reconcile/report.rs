//! Answers to the agent's own socket.

use std::collections::BTreeMap;

use bulkhead_model::RuleRef;
use bulkhead_model::host_policy::{CompiledId, HostPolicy, Row, RuleId};
use serde_json::{Map, Value, json};

use super::Agent;
use crate::api::{AgentReport, Programmed, Request};

/// Most flow records in one answer.
const FLOWS_MAX: usize = crate::config::FLOW_RING_LEN;

impl Agent {
    pub(super) fn answer(&self, request: &Request) -> Value {
        match request {
            Request::Status => json!(self.report()),
            Request::Flows(limit) => json!(self.flows.recent((*limit).min(FLOWS_MAX)).collect::<Vec<_>>()),
            Request::Plan => tables(self.engine.policy(), &self.engine.policy().rules),
            Request::Dump => self.dump(),
            Request::Lookup(lookup) => self.look_up(lookup),
        }
    }

    fn report(&self) -> AgentReport {
        let policy = self.engine.policy();
        let endpoints = policy.endpoints.iter().map(|(name, binding)| Programmed {
            workload: name.strip_prefix("Workload/").unwrap_or(name).to_owned(),
            attachment: binding.attachment,
            labels: self
                .locals
                .endpoints
                .get(name)
                .map(|l| l.entity.labels.without_reserved())
                .unwrap_or_default(),
            addresses: binding.addresses.clone(),
            ingress: binding.ingress != CompiledId::NONE,
            egress: binding.egress != CompiledId::NONE,
        });
        let stats = self.dataplane.stats().unwrap_or_default();
        AgentReport {
            host: self.config.host.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            controller: self.conversation.membership.controller().to_owned(),
            connected: self.link.is_some() && self.disconnected_because.is_none(),
            disconnected_because: self.disconnected_because.clone(),
            revision: policy.revision,
            dataplane: self.dataplane.name().into(),
            dataplane_because: self.dataplane.chosen_because().map(str::to_owned),
            programmed: self.programmed,
            endpoints: endpoints.collect(),
            not_enforced: self.not_enforced(),
            drops: stats
                .drops
                .iter()
                .map(|(reason, count)| (json!(reason).as_str().unwrap_or("?").to_owned(), *count))
                .collect(),
            tables: stats.tables.iter().map(|t| (t.table.to_owned(), (t.used, t.capacity))).collect(),
            entries_written: self.entries_written,
            flow_records_lost: self.flows.lost(),
            events_lost: stats.lost_events,
            refusals_unrecorded: stats.unrecorded_denials,
            refusals_untold: stats.untold_refusals,
        }
    }
}

/// Tables as values: addresses by class, compiled policies with their rows, endpoints. `rules` tells what ids mean.
pub(super) fn tables(policy: &HostPolicy, rules: &BTreeMap<RuleId, RuleRef>) -> Value {
    let addresses: Map<String, Value> =
        policy.addresses.iter().map(|(prefix, class)| (prefix.to_string(), json!(class))).collect();
    let policies: Map<String, Value> = policy
        .policies
        .values()
        .map(|compiled| {
            let rows = compiled.rows.iter().map(|(class, r)| (class.0.to_string(), json!(row(r, rules))));
            let rows: Map<String, Value> = rows.collect();
            let table = json!({ "defaultRow": row(&compiled.default_row, rules), "rows": rows });
            (compiled.id.0.to_string(), table)
        })
        .collect();
    let endpoints: Map<String, Value> = policy
        .endpoints
        .iter()
        .map(|(name, binding)| {
            let binding = json!({
                "attachment": binding.attachment,
                "addresses": binding.addresses,
                "ingress": binding.ingress,
                "egress": binding.egress,
            });
            (name.to_string(), binding)
        })
        .collect();
    json!({
        "revision": policy.revision,
        "addresses": addresses,
        "policies": policies,
        "endpoints": endpoints,
    })
}

fn row(row: &Row, rules: &BTreeMap<RuleId, RuleRef>) -> Vec<Value> {
    let rule = |id| rules.get(&id).map(ToString::to_string);
    let variants = row.variants().flat_map(|(from, steps)| steps.iter().map(move |step| (from, step)));
    variants
        .map(|(source_port, column)| {
            let mut step = json!({
                "from": { "protocol": column.first >> 16, "port": column.first & 0xffff },
                "verdict": column.cell.verdict,
                "rule": rule(column.cell.rule),
                "auditVerdict": column.cell.audit_verdict,
                "auditRule": rule(column.cell.audit_rule),
            });
            if column.cell.reject {
                step["reject"] = json!(true);
            }
            if row.reads_source_port() {
                step["fromSourcePort"] = json!(source_port);
            }
            step
        })
        .collect()
}
