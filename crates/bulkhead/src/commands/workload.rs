//! `workload`: registrations by hand, through this host's agent.

use bulkhead_model::Labels;
use bulkhead_model::ports::{NamedPort, PortMatch, is_port_name};
use bulkhead_model::registration::{Attachment, Identity, Registration};
use bulkhead_model::resource::is_name;
use hyper::Method;
use serde_json::Value;

use crate::cli::{Common, WorkloadArgs, WorkloadCommand};
use crate::client::{call, encode};
use crate::failure::Failure;
use crate::output::{self, labels, table, text};

pub(crate) async fn workload(common: &Common, args: &WorkloadArgs) -> Result<(), Failure> {
    match &args.command {
        WorkloadCommand::Add {
            name,
            netns,
            interface,
            cgroup,
            address,
            label,
            namespace,
            service_account,
            named_port,
        } => {
            let attachment = match (netns, interface, cgroup) {
                (Some(netns), ..) => Attachment::Netns(netns.clone()),
                (None, Some(interface), _) => Attachment::Interface(interface.clone()),
                (None, None, Some(group)) => Attachment::Cgroup(group.clone()),
                (None, None, None) => {
                    return Err(Failure::Usage("--netns, --interface or --cgroup is needed".into()));
                }
            };
            if !is_name(name) {
                let what = "lower-case letters, digits, '-' and '.'";
                return Err(Failure::Usage(format!("{name:?} is no name: use {what}")));
            }
            let registration = Registration {
                name: name.clone(),
                labels: parse_labels(label)?,
                attachment,
                addresses: address.clone(),
                identity: Identity {
                    namespace: namespace.clone(),
                    service_account: service_account.clone(),
                    ports: named_port.iter().map(|text| parse_port(text)).collect::<Result<_, _>>()?,
                },
            };
            let body = serde_json::to_string(&registration).map_err(anyhow::Error::from)?;
            let added = call(common.agent(), Method::POST, "/workloads", Some(body)).await?;
            output::show(common.output, &added, || {
                let addresses = addresses(&added);
                let note = if addresses.is_empty() { "no address yet".into() } else { addresses };
                Ok(format!("workload {name} registered: {note}\n"))
            })
        }
        WorkloadCommand::Remove { name } => {
            let path = format!("/workloads/{}", encode(name));
            call(common.agent(), Method::DELETE, &path, None).await?;
            output::line(&format!("workload {name} removed"))
        }
        WorkloadCommand::List => {
            let found = call(common.agent(), Method::GET, "/workloads", None).await?;
            output::show(common.output, &found, || {
                let rows: Vec<_> = found["workloads"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .map(|w| {
                        let at = [text(w, "/interfaces/0/1"), text(w, "/group/1")].concat();
                        vec![text(w, "/name"), at, addresses(w), labels(&w["labels"])]
                    })
                    .collect();
                let mut page = table(&["NAME", "AT", "ADDRESSES", "LABELS"], &rows);
                for entry in found["notManaged"].as_array().into_iter().flatten() {
                    page.push_str(&format!("{}: {}\n", text(entry, "/subject"), text(entry, "/reason")));
                }
                Ok(page)
            })
        }
    }
}

fn addresses(workload: &Value) -> String {
    let addresses = workload["addresses"].as_array().into_iter().flatten();
    addresses.filter_map(Value::as_str).collect::<Vec<_>>().join(",")
}

/// `NAME=tcp/PORT`.
fn parse_port(text: &str) -> Result<NamedPort, Failure> {
    let wrong = || Failure::Usage(format!("--named-port {text}: expected NAME=tcp/PORT, like http=tcp/8080"));
    let (name, port) = text.split_once('=').ok_or_else(wrong)?;
    match port.parse() {
        Ok(PortMatch::Ports { protocol, first, last }) if first == last && is_port_name(name) => {
            Ok(NamedPort { name: name.to_owned(), protocol, port: first })
        }
        _ => Err(wrong()),
    }
}

fn parse_labels(pairs: &[String]) -> Result<Labels, Failure> {
    let mut labels = Labels::new();
    for pair in pairs {
        let Some((key, value)) = pair.split_once('=') else {
            return Err(Failure::Usage(format!("--label {pair}: expected KEY=VALUE")));
        };
        labels.insert(key, value).map_err(|error| Failure::Usage(format!("--label {pair}: {error}")))?;
    }
    Ok(labels)
}
