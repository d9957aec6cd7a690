//! What other systems' policies mean survives being said in Bulkhead's own words, printed and read again.

use bulkhead_model::Resource;
use bulkhead_model::document::parse;
use proptest::prelude::*;
use serde_json::{Value, json};

fn labels() -> impl Strategy<Value = Value> {
    let keys = prop::sample::select(vec!["app", "tier", "kubernetes.io/metadata.name", "a.b/c"]);
    let values = prop::sample::select(vec!["web", "db", "it's", "", "1.10"]);
    prop::collection::btree_map(keys, values, 0..3).prop_map(|map| json!(map))
}

fn label_selector() -> impl Strategy<Value = Value> {
    let expression = prop_oneof![
        prop::collection::vec(prop::sample::select(vec!["x", "y"]), 0..3)
            .prop_map(|values| json!({"key": "env", "operator": "In", "values": values})),
        Just(json!({"key": "env", "operator": "NotIn", "values": ["x"]})),
        Just(json!({"key": "team", "operator": "Exists"})),
        Just(json!({"key": "team", "operator": "DoesNotExist"})),
    ];
    (labels(), prop::collection::vec(expression, 0..3))
        .prop_map(|(labels, expressions)| json!({"matchLabels": labels, "matchExpressions": expressions}))
}

fn network_policy() -> impl Strategy<Value = Value> {
    let peer = prop_oneof![
        label_selector().prop_map(|pods| json!({"podSelector": pods})),
        (label_selector(), label_selector())
            .prop_map(|(pods, namespaces)| json!({"podSelector": pods, "namespaceSelector": namespaces})),
        label_selector().prop_map(|namespaces| json!({"namespaceSelector": namespaces})),
        Just(json!({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}})),
        Just(json!({"ipBlock": {"cidr": "2001:db8::/32"}})),
    ];
    let port = prop_oneof![
        Just(json!({"port": 80})),
        Just(json!({"protocol": "UDP"})),
        Just(json!({"protocol": "SCTP", "port": 1, "endPort": 99})),
        Just(json!({"port": "http"})),
    ];
    let rule = move |peers: &'static str| {
        let lists = (prop::collection::vec(peer.clone(), 0..3), prop::collection::vec(port.clone(), 0..3));
        lists.prop_map(move |(peer, ports)| json!({peers: peer, "ports": ports}))
    };
    let types = prop::sample::subsequence(vec!["Ingress", "Egress"], 0..=2);
    let lists = (prop::collection::vec(rule("from"), 0..3), prop::collection::vec(rule("to"), 0..3));
    (label_selector(), types, lists).prop_map(|(pods, types, (ingress, egress))| {
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": "p", "namespace": "n", "annotations": {"a": "b"}},
            "spec": {"podSelector": pods, "policyTypes": types, "ingress": ingress, "egress": egress},
        })
    })
}

fn cluster_policy() -> impl Strategy<Value = Value> {
    let egress_peer = prop_oneof![
        label_selector().prop_map(|selector| json!({"namespaces": selector})),
        (label_selector(), label_selector())
            .prop_map(|(ns, pods)| json!({"pods": {"namespaceSelector": ns, "podSelector": pods}})),
        label_selector().prop_map(|selector| json!({"nodes": selector})),
        Just(json!({"networks": ["10.0.0.0/8", "::/0"]})),
        Just(json!({"domainNames": ["example.org.", "*.Example.com"]})),
        Just(json!({"planets": {}})),
    ];
    let protocol = prop_oneof![
        Just(json!({"tcp": {"destinationPort": {"number": 80}}})),
        Just(json!({"udp": {"destinationPort": {"range": {"start": 1, "end": 9}}}})),
        Just(json!({"destinationNamedPort": "web"})),
    ];
    let actions = prop::sample::select(vec!["Accept", "Deny", "Pass"]);
    let lists = (prop::collection::vec(egress_peer, 1..3), prop::collection::vec(protocol, 0..3));
    let rule = (actions, lists).prop_map(|(action, (to, protocols))| {
        let mut rule = json!({"action": action, "to": to});
        if !protocols.is_empty() {
            rule["protocols"] = json!(protocols);
        }
        rule
    });
    let tiers = prop::sample::select(vec!["Admin", "Baseline"]);
    (tiers, 0..1000u32, label_selector(), prop::collection::vec(rule, 0..4)).prop_map(
        |(tier, priority, subject, egress)| {
            json!({
                "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
                "metadata": {"name": "c"},
                "spec": {"tier": tier, "priority": priority, "subject": {"namespaces": subject}, "egress": egress},
            })
        },
    )
}

fn calico_policy() -> impl Strategy<Value = Value> {
    let selectors = || {
        let texts =
            ["", "all()", "role == 'a'", "projectcalico.org/namespace == 'n'", "pcns.env != 'x'", "global()"];
        prop::sample::select(texts.to_vec())
    };
    let nets = || prop::collection::vec(prop::sample::select(vec!["10.0.0.0/8", "2001:db8::/32"]), 0..2);
    let ports = || prop::collection::vec(prop_oneof![Just(json!(80)), Just(json!("1:99"))], 0..2);
    let accounts = prop_oneof![
        Just(json!({})),
        Just(json!({"names": ["x", "y"]})),
        Just(json!({"selector": "team == 'red'", "names": ["x"]})),
    ];
    let end = (selectors(), selectors(), selectors(), (nets(), nets()), (ports(), ports()), accounts)
        .prop_map(|(selector, not_selector, namespaces, (nets, not_nets), (ports, not_ports), accounts)| {
            json!({
                "selector": selector, "notSelector": not_selector, "namespaceSelector": namespaces,
                "nets": nets, "notNets": not_nets, "ports": ports, "notPorts": not_ports,
                "serviceAccounts": accounts,
            })
        });
    let actions = prop::sample::select(vec!["Allow", "Deny", "Pass", "Log"]);
    let protocols = prop::sample::select(vec![json!("TCP"), json!("udp"), json!(132), json!("UDPLite")]);
    let rule = (actions, protocols, end.clone(), end, any::<bool>()).prop_map(
        |(action, protocol, source, destination, six)| {
            json!({
                "action": action, "protocol": protocol, "source": source, "destination": destination,
                "ipVersion": if six { 6 } else { 4 },
            })
        },
    );
    let lists = (prop::collection::vec(rule.clone(), 0..3), prop::collection::vec(rule, 0..3));
    let kinds = prop::sample::select(vec![
        ("NetworkPolicy", Some("n")),
        ("GlobalNetworkPolicy", None),
        ("StagedNetworkPolicy", Some("n")),
        ("StagedGlobalNetworkPolicy", None),
    ]);
    let orders = prop::option::of(-5..2000i32);
    (kinds, orders, (selectors(), selectors()), lists).prop_map(
        |((kind, namespace), order, (selector, accounts), (ingress, egress))| {
            let mut metadata = json!({"name": "g"});
            if let Some(namespace) = namespace {
                metadata["namespace"] = namespace.into();
            }
            json!({
                "apiVersion": "projectcalico.org/v3", "kind": kind, "metadata": metadata,
                "spec": {"order": order, "selector": selector, "serviceAccountSelector": accounts,
                    "ingress": ingress, "egress": egress},
            })
        },
    )
}

fn read(text: &str) -> Resource {
    let problems = |problems: Vec<bulkhead_model::Problem>| panic!("{problems:#?}\n{text}");
    parse("test", text).unwrap_or_else(problems).remove(0).resource
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// As Bulkhead's own, printed and read: the same policies. As it was written, printed and read: the same object.
    #[test]
    fn policies_mean_the_same_in_our_own_words(
        manifest in prop_oneof![network_policy(), cluster_policy(), calico_policy()],
    ) {
        let foreign = read(&manifest.to_string());
        prop_assert_eq!(&Resource::from_json(&foreign.to_json()).unwrap(), &foreign);
        let specs: Vec<_> = foreign.meaning().policies.iter().map(|(_, spec)| spec.clone()).collect();
        match foreign.to_native() {
            Ok(native) => {
                let again: Vec<_> = native
                    .iter()
                    .map(|native| read(&native.to_json().to_string()))
                    .flat_map(|native| native.meaning().policies.clone())
                    .collect();
                prop_assert_eq!(again.iter().map(|(_, spec)| spec.clone()).collect::<Vec<_>>(), specs);
                for (key, _) in &again {
                    prop_assert_eq!(&key.namespace, &foreign.metadata().namespace);
                }
            }
            Err(why) => prop_assert!(specs.iter().all(|s| s.ingress.is_none() && s.egress.is_none()), "{}", why),
        }
    }
}

#[test]
fn inventory_means_the_same_in_our_own_words() {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "web-0", "namespace": "shop", "labels": {"app": "web"}},
        "spec": {"nodeName": "n1", "serviceAccountName": "web",
            "containers": [{"ports": [{"name": "http", "containerPort": 8080}]}]},
        "status": {"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "2001:db8::1"}]},
    });
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1", "labels": {"zone": "a"}},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}});
    let set = json!({"apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkSet",
        "metadata": {"name": "blocked", "labels": {"feed": "x"}}, "spec": {"nets": ["198.51.100.0/24"]}});
    for manifest in [pod, node, set] {
        let foreign = read(&manifest.to_string());
        let native = foreign.to_native().unwrap();
        let (before, after) = (foreign.meaning(), read(&native[0].to_json().to_string()));
        let (before, after) = (&before.entities[0], &after.meaning().entities[0]);
        same_to_selectors(before, after);
    }
    let namespace =
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "labels": {"a": "b"}}});
    let foreign = read(&namespace.to_string());
    let native = foreign.to_native().unwrap();
    assert_eq!(native[0].meaning().bequests[0], foreign.meaning().bequests[0]);
}

fn same_to_selectors(before: &bulkhead_model::Entity, after: &bulkhead_model::Entity) {
    assert_eq!(before.labels, after.labels);
    assert_eq!(before.prefixes, after.prefixes);
    assert_eq!(before.ports, after.ports);
    assert_eq!(before.parents, after.parents);
}
