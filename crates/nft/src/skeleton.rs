//! Everything in the tables that no policy changes, as one transaction.

use std::collections::BTreeMap;

use bulkhead_model::host_policy::ClassId;

use crate::fresh::Place;
use crate::guard;
use crate::message::Request;
use crate::object::{Devices, Element, Table};
use crate::rules::{self, Chains, Shape};
use crate::schema::{self, COUNTERS, EDGE, FAMILIES, JUDGE, LAYOUT, LOG_GROUP, UNRECORDED, UNTOLD};

/// After destination NAT (-100) and everybody's filters (0), before source NAT (100): the caller's own address and
/// the one that is really reached.
const PRIORITY: i32 = 50;
/// `NF_INET_LOCAL_IN`, `NF_INET_FORWARD`, `NF_INET_LOCAL_OUT`, and what is asked there one after the other.
const JUDGE_HOOKS: [(&str, u32, &[&str]); 3] = [
    ("input", 1, &["packet", "process_input", "host_input"]),
    ("forward", 2, &["packet", "forwarded"]),
    ("output", 3, &["packet", "process_output", "host_output"]),
];
/// `NF_NETDEV_INGRESS` and `NF_NETDEV_EGRESS`.
pub(crate) const INGRESS: u32 = 0;
pub(crate) const EGRESS: u32 = 1;
/// What the kernel calls at an interface, and the chain that each leads to.
const EDGE_HOOKS: [(&str, u32, &str); 2] =
    [("from", INGRESS, "from_workload"), ("to", EGRESS, "to_workload")];

/// Packets counted before, by table and counter.
pub(crate) type Counted = BTreeMap<(Table, String), u64>;

/// What a table says of itself to whoever finds it, as the comment that `nft` shows: its layout, and `settings` of the
/// kernel as they were before us.
pub(crate) fn user_data(settings: &str) -> Vec<u8> {
    let comment = format!("bulkhead layout {LAYOUT}; {settings}\0");
    let comment = &comment.as_bytes()[..comment.len().min(COMMENT_BYTES_MAX)];
    // Type 0 of libnftnl's user data.
    let mut bytes = vec![0, u8::try_from(comment.len()).unwrap_or(u8::MAX)];
    bytes.extend(comment);
    bytes
}

/// The settings in a table's comment, if the layout is ours.
pub(crate) fn settings(user_data: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(user_data.get(2..)?).ok()?.trim_end_matches('\0');
    text.strip_prefix(&format!("bulkhead layout {LAYOUT}; "))
}

/// `NFTNL_UDATA_COMMENT_MAXLEN` of libnftnl.
const COMMENT_BYTES_MAX: usize = 128;

/// Both tables with sets, counters, chains and rules; all closed. `counted` goes on counting.
pub(crate) fn create(user_data: &[u8], counted: &Counted, shape: Shape) -> Vec<Request> {
    let mut requests = Vec::new();
    let mut set_id = 0;
    for table in [JUDGE, EDGE] {
        requests.push(table.create(user_data));
        for name in COUNTERS.iter().map(|(name, _)| *name).chain([UNRECORDED, UNTOLD]) {
            let packets = counted.get(&(table, name.to_owned())).copied().unwrap_or(0);
            requests.push(table.counter(name, packets));
        }
        for set in schema::sets(table) {
            set_id += 1;
            requests.push(set.create(set_id));
        }
    }
    for family in &FAMILIES {
        for (set, class) in [(family.classes, schema::ASK_BLOCKS), (family.blocks, ClassId::NOBODY.0)] {
            let otherwise = Element::Otherwise { data: class.to_be_bytes().to_vec() };
            set.add(&[otherwise], &mut requests);
        }
    }
    put_chains(JUDGE, &rules::judging_chains(LOG_GROUP, shape), &mut requests);
    put_chains(EDGE, &rules::edge::chains(LOG_GROUP), &mut requests);
    for (name, hook, asked) in JUDGE_HOOKS {
        requests.push(JUDGE.base_chain(name, hook, PRIORITY, Devices::All));
        // Before anything is let pass for what its connection is: whose an interface is comes first.
        requests.push(JUDGE.rule(name, &rules::jump(guard::CHAIN)));
        let place = if name == "forward" { Place::Forward } else { Place::Local };
        requests.extend(rules::pass_fresh(place).iter().map(|rule| JUDGE.rule(name, rule)));
        requests.extend(asked.iter().map(|chain| JUDGE.rule(name, &rules::jump(chain))));
        requests.push(JUDGE.rule(name, &rules::note_fresh(place)));
    }
    requests
}

/// The rules of another shape in the place of those in `chains`, all that there are in the table.
pub(crate) fn rewrite(shape: Shape, chains: &[String]) -> Vec<Request> {
    let wanted = rules::judging_chains(LOG_GROUP, shape);
    let ours = chains.iter().filter(|name| !is_called(name));
    let mut requests: Vec<_> = ours.clone().map(|name| JUDGE.flush_chain(name)).collect();
    put_chains(JUDGE, &wanted, &mut requests);
    let gone = ours.filter(|name| wanted.iter().all(|(kept, _)| kept != *name));
    requests.extend(gone.map(|name| JUDGE.delete_chain(name)));
    requests
}

fn put_chains(table: Table, chains: &Chains, into: &mut Vec<Request>) {
    into.extend(chains.iter().map(|(name, _)| table.chain(name)));
    put_rules(table, chains, into);
}

fn put_rules(table: Table, chains: &Chains, into: &mut Vec<Request>) {
    for (name, rules) in chains {
        into.extend(rules.iter().map(|rule| table.rule(name, rule)));
    }
}

/// The chains that the kernel calls at an interface.
pub(crate) fn hook(ifindex: u32, device: &str) -> Vec<Request> {
    let mut requests = Vec::new();
    for (name, hook, chain) in EDGE_HOOKS {
        let name = format!("{name}_{ifindex}");
        requests.push(EDGE.base_chain(&name, hook, 0, Devices::One(device)));
        requests.push(EDGE.rule(&name, &rules::jump(chain)));
    }
    requests
}

/// Whether the kernel calls a chain of this name.
pub(crate) fn is_called(name: &str) -> bool {
    let at_interface = |start: &str| {
        let number = name.strip_prefix(start).and_then(|rest| rest.strip_prefix('_'));
        number.is_some_and(|number| number.parse::<u32>().is_ok())
    };
    JUDGE_HOOKS.iter().any(|(hook, ..)| *hook == name)
        || EDGE_HOOKS.iter().any(|(hook, ..)| at_interface(hook))
}

/// Chains of [`hook`].
pub(crate) fn hook_chains(ifindex: u32) -> [String; 2] {
    EDGE_HOOKS.map(|(name, ..)| format!("{name}_{ifindex}"))
}
