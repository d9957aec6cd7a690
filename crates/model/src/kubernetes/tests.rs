use std::sync::Arc;

use crate::document::{Problem, parse};
use crate::labels::Labels;
use crate::meaning::Meaning;
use crate::policy::{Peer, PolicySpec};
use crate::ports::PortMatch;
use crate::resource::Resource;

fn object(text: &str) -> Result<Arc<Meaning>, Vec<Problem>> {
    let resource = parse("f", text)?.remove(0).resource;
    let Resource::Foreign(foreign) = resource else { panic!("{resource:?}") };
    Ok(foreign.meaning)
}

fn policy(text: &str) -> PolicySpec {
    object(text).unwrap().policies[0].1.clone()
}

const NETWORK_POLICY: &str = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: a, namespace: n}
spec:
  podSelector: {matchLabels: {app: web}}
";

/// N3: what a policy speaks of if it does not say.
#[test]
fn n3_types_default_to_ingress_and_to_egress_if_it_has_rules() {
    let spec = policy(NETWORK_POLICY);
    assert_eq!((spec.ingress, spec.egress), (Some(vec![]), None));
    let spec = policy(&format!("{NETWORK_POLICY}  egress: [{{}}]\n"));
    assert!(spec.ingress.is_some() && spec.egress.is_some());
    let spec = policy(&format!("{NETWORK_POLICY}  policyTypes: [Egress]\n  ingress: [{{}}]\n"));
    assert_eq!((spec.ingress, spec.egress), (None, Some(vec![])));
}

/// N7: one entry joins its selectors, and never means addresses outside.
#[test]
fn n7_peers_join_namespace_and_pod_selectors() {
    let peer = |text: &str| {
        let spec = policy(&format!("{NETWORK_POLICY}  ingress: [{{from: [{text}]}}]\n"));
        spec.ingress.unwrap().remove(0).peers.remove(0)
    };
    let Peer { selector, namespace_selector, .. } = peer("{podSelector: {}}");
    assert!(selector.is_some() && namespace_selector.is_none());
    let Peer { selector, namespace_selector, .. } = peer(
        "{namespaceSelector: {}, podSelector: {matchExpressions: [{key: a, operator: NotIn, values: [x]}]}}",
    );
    assert_eq!(namespace_selector.unwrap().to_string(), "all()");
    assert_eq!(selector.unwrap().to_string(), "(a not in {\"x\"} && bulkhead.dev/kind == \"Workload\")");
}

/// N8, N9, N10.
#[test]
fn ports_are_numbers_ranges_and_names_of_one_protocol() {
    let ports = |text: &str| {
        let spec = policy(&format!("{NETWORK_POLICY}  ingress: [{{ports: [{text}]}}]\n"));
        spec.ingress.unwrap().remove(0).ports.remove(0).to_string()
    };
    assert_eq!(ports("{}"), "tcp");
    assert_eq!(ports("{protocol: UDP, port: 53}"), "udp/53");
    assert_eq!(ports("{port: 80, endPort: 90}"), "tcp/80-90");
    assert_eq!(ports("{port: http}"), "tcp/http");
    assert!(
        object(&format!("{NETWORK_POLICY}  ingress: [{{ports: [{{port: http, endPort: 90}}]}}]\n")).is_err()
    );
}

#[test]
fn unknown_fields_of_policies_are_refused_with_the_nearest_word() {
    let problems = object(&NETWORK_POLICY.replace("podSelector", "podSelectr")).unwrap_err();
    assert_eq!(problems[0].suggestion.as_deref(), Some("podSelector"));
    assert!(object("apiVersion: v1\nkind: Secret\nmetadata: {name: a}\n").is_err());
}

/// C14: a peer that nobody knows must not open anything.
#[test]
fn c14_an_unknown_peer_fails_closed() {
    let spec = |action: &str| {
        policy(&format!(
            "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {{name: a}}\nspec:\n  \
             tier: Admin\n  priority: 1\n  subject: {{namespaces: {{}}}}\n  ingress:\n  - action: {action}\n    \
             from: [{{planets: {{}}}}]\n"
        ))
    };
    let rule = |action| spec(action).ingress.unwrap().remove(0);
    let (accept, pass) = (rule("Accept"), rule("Pass"));
    assert_eq!(accept.peers.len(), 1);
    assert!(!accept.peers[0].selector.as_ref().unwrap().matches(&Labels::new()));
    assert_eq!((pass.action, pass.peers.len()), (crate::policy::Action::Deny, 0));
    assert_eq!(PortMatch::Any.to_string(), "any");
}

#[test]
fn pods_on_the_nodes_network_are_no_workloads() {
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: n}\nspec: {hostNetwork: true}\nstatus: {podIP: 10.0.0.1}\n";
    let entity = |text: &str| object(text).unwrap().entities[0].clone();
    assert!(!entity(pod).is_endpoint());
    let entity = entity(&pod.replace("true", "false"));
    assert_eq!((&*entity.name, entity.is_endpoint()), ("Pod/n/p", true));
    assert_eq!(entity.labels.get("bulkhead.dev/namespace"), Some("n"));
}

/// The text of a selector is what is stored and sent: nothing may stand in it that ends a value early.
#[test]
fn label_selectors_that_no_text_could_name_are_refused() {
    let with = |selector: &str| {
        object(
            &NETWORK_POLICY
                .replace("podSelector: {matchLabels: {app: web}}", &format!("podSelector: {selector}")),
        )
    };
    for selector in [
        r#"{matchLabels: {a: "x'\" || all()"}}"#,
        "{matchLabels: {'a == b': c}}",
        "{matchLabels: {'': c}}",
        r#"{matchExpressions: [{key: a, operator: In, values: ["'\""]}]}"#,
        "{matchExpressions: [{key: 'has(a)', operator: Exists}]}",
    ] {
        assert!(with(selector).is_err(), "{selector}");
    }
    assert!(with("{matchLabels: {a.b/c: \"it's\"}}").is_ok());
}

/// Kubernetes reads such a block as the one around it, and takes it.
#[test]
fn n11_bits_beyond_the_length_of_a_block_do_not_count() {
    let spec = policy(&format!(
        "{NETWORK_POLICY}  ingress: [{{from: [{{ipBlock: {{cidr: 10.1.2.3/8, except: [10.2.3.4/16]}}}}]}}]\n"
    ));
    let peer = &spec.ingress.unwrap()[0].peers[0];
    assert_eq!(
        (peer.cidrs[0].to_string(), peer.not_cidrs[0].to_string()),
        ("10.0.0.0/8".into(), "10.2.0.0/16".into())
    );
    let outside = format!(
        "{NETWORK_POLICY}  ingress: [{{from: [{{ipBlock: {{cidr: 10.0.0.0/8, except: [11.0.0.0/16]}}}}]}}]\n"
    );
    assert!(object(&outside).is_err());
}
