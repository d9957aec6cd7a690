//! What holds for arbitrary bytes. Each function panics if it does not.
//!
//! The fuzzer calls them, and so does a test of the workspace (`crates/wire/tests/fuzz_corpus.rs`, which includes
//! this file) with the committed corpus. A crash that the fuzzer found becomes a file of the corpus.

use bulkhead_model::flow::FlowRecord;
use bulkhead_model::labels::NAMESPACE_LABELS_PREFIX;
use bulkhead_model::ports::{NamedPort, PORT_KEY_END, PortMatch};
use bulkhead_model::selector::Restriction;
use bulkhead_model::{Labels, Resource, Selector, document, registration};
use bulkhead_wire::proto::agent_message::Body as Up;
use bulkhead_wire::proto::controller_message::Body as Down;
use bulkhead_wire::{port_from_wire, port_to_wire, prefix_from_wire, prefix_to_wire, proto};
use prost::Message;

/// A selector that is read is read again from its canonical text, also when it is about a namespace's labels; its
/// restriction is necessary.
pub fn selector(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(selector) = Selector::parse(text) else { return };
    let again = Selector::parse(selector.canonical()).expect("the canonical text is a selector");
    assert_eq!(again.expr(), selector.expr(), "the canonical text means the same");
    assert_eq!(again.id(), selector.id());
    let prefixed = selector.with_prefix(NAMESPACE_LABELS_PREFIX);
    let again = Selector::parse_canonical(prefixed.canonical()).expect("a prefix changes no meaning");
    assert_eq!(again.expr(), prefixed.expr());
    for value in ["", "a", "5", "-1.50", "5.10.0-21-amd64", "6.1~rc1", "v1:0", "it's"] {
        let (labels, _) = Labels::from_foreign(["a", "b", "has", "host.kernel"].map(|key| (key, value)));
        if !selector.matches(&labels) {
            continue;
        }
        match selector.restriction() {
            Restriction::None => {}
            Restriction::Nothing => panic!("nothing can match {selector}, and {labels} does"),
            Restriction::Present(key) => assert!(labels.get(&key).is_some(), "{selector}: {labels}"),
            Restriction::OneOf(key, values) => {
                let actual = labels.get(&key).expect("the restriction's label is there");
                assert!(values.iter().any(|value| **value == *actual), "{selector}: {labels}");
            }
        }
    }
}

/// What is read is printed and read again as the same.
pub fn document(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    // The other reader of what people write.
    let _ = registration::parse("fuzz", text);
    let Ok(documents) = document::parse("fuzz", text) else { return };
    for document in documents {
        let json = document.resource.to_json();
        let again = Resource::from_json(&json).expect("what was printed is a resource");
        assert_eq!(again, document.resource);
        let again = document::parse("fuzz", &json.to_string()).expect("its text is one");
        assert_eq!(again.len(), 1);
        assert_eq!(again[0].resource, document.resource);
    }
}

/// What is read is printed and read again as the same, and its interval is one.
pub fn port_match(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(ports) = text.parse::<PortMatch>() else { return };
    assert_eq!(ports.to_string().parse::<PortMatch>().as_ref(), Ok(&ports));
    if let Some((first, last)) = ports.interval() {
        assert!(first <= last && last < PORT_KEY_END, "{ports}");
        assert!(ports.matches(first, &[]) && ports.matches(last, &[]), "{ports}");
    }
}

/// Whatever it is, it is objects or a list of problems, and the selectors of what objects of other systems mean can be
/// read again.
pub fn kubernetes(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match document::parse("fuzz", text) {
        Err(problems) => assert!(!problems.is_empty(), "a refusal has its reasons"),
        Ok(documents) => {
            for document in documents {
                let meaning = document.resource.meaning();
                for (_, spec) in &meaning.policies {
                    let rules = [&spec.ingress, &spec.egress].into_iter().flatten().flatten();
                    let peers = rules.flat_map(|rule| &rule.peers);
                    let selectors =
                        peers.flat_map(|peer| [&peer.selector, &peer.namespace_selector, &peer.hosts]);
                    // What is stored and sent is their text.
                    for selector in selectors.flatten().chain([&spec.applies_to]) {
                        assert_eq!(Selector::parse_canonical(selector.canonical()).as_ref(), Ok(selector));
                    }
                }
            }
        }
    }
}

/// The first byte tells the message, the rest is it. What is decoded is encoded and decoded as the same, and what
/// it carries is checked like anything else.
pub fn wire(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 4 {
        3 => {
            let objects = bulkhead_wire::unpack(data).unwrap_or_default();
            objects.iter().for_each(|json| resource(json));
        }
        0 => {
            let Some(message) = decoded::<proto::AgentMessage>(data) else { return };
            match message.body {
                Some(Up::Inventory(inventory)) => inventory.upserts.iter().for_each(|json| resource(json)),
                Some(Up::Subscribe(subscribe)) => {
                    if let Ok(selector) = Selector::parse_canonical(&subscribe.selector) {
                        assert_eq!(Selector::parse_canonical(selector.canonical()).as_ref(), Ok(&selector));
                    }
                }
                Some(Up::Hello(hello)) => {
                    let pairs = |map: &std::collections::HashMap<String, String>| {
                        map.iter().map(|(key, value)| (key.clone(), value.clone())).collect::<Vec<_>>()
                    };
                    let (labels, facts) = (pairs(&hello.labels), pairs(&hello.facts));
                    let _ = Labels::from_foreign(labels.iter().map(|(k, v)| (k.as_str(), v.as_str())));
                    let _ = bulkhead_model::Facts::from_observed(
                        facts.iter().map(|(k, v)| (k.as_str(), v.as_str())),
                    );
                }
                Some(Up::Unsubscribe(_) | Up::Status(_)) | None => {}
            }
        }
        1 => {
            let Some(message) = decoded::<proto::ControllerMessage>(data) else { return };
            match message.body {
                Some(Down::Resources(resources)) => resources.upserts.iter().for_each(|json| resource(json)),
                Some(Down::Members(members)) => members.joins.iter().for_each(member),
                Some(Down::Welcome(_) | Down::Synced(_) | Down::InventoryAck(_) | Down::Revocations(_))
                | None => {}
            }
        }
        _ => {
            let Some(batch) = decoded::<proto::FlowBatch>(data) else { return };
            for record in batch.records {
                let Ok(record) = serde_json::from_slice::<FlowRecord>(&record) else { continue };
                let text = serde_json::to_string(&record).expect("a record is JSON");
                assert_eq!(serde_json::from_str::<FlowRecord>(&text).expect("and is one again"), record);
            }
        }
    }
}

fn decoded<M: Message + Default + PartialEq + std::fmt::Debug>(data: &[u8]) -> Option<M> {
    let message = M::decode(data).ok()?;
    let again = M::decode(message.encode_to_vec().as_slice()).expect("what was encoded is a message");
    assert_eq!(again, message);
    Some(message)
}

fn resource(json: &[u8]) {
    let Ok(json) = serde_json::from_slice::<serde_json::Value>(json) else { return };
    let Ok(resource) = Resource::from_json(&json) else { return };
    assert_eq!(Resource::from_json(&resource.to_json()).expect("what was printed is a resource"), resource);
}

fn member(member: &proto::Member) {
    for wire in &member.prefixes {
        if let Ok(prefix) = prefix_from_wire(wire) {
            assert_eq!(prefix_from_wire(&prefix_to_wire(prefix)), Ok(prefix));
        }
    }
    let ports: Vec<NamedPort> = member.ports.iter().filter_map(port_from_wire).collect();
    for port in ports {
        assert_eq!(port_from_wire(&port_to_wire(&port)), Some(port));
    }
}
