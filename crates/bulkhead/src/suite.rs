//! Files of policy tests: read here, run by `commands::test`.
//!
//! They are no resources: nothing stores them, and `apply` of a directory passes them by.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use bulkhead_model::document::{Decoder, Document, Node, Position, Problem, Value, of_nodes, read};
use bulkhead_model::ports::{PortMatch, Protocol};
use bulkhead_model::time::Timestamp;
use bulkhead_model::{Direction, Verdict};

/// How the names of files with policy tests end.
pub(crate) const SUFFIXES: [&str; 2] = [".test.yaml", ".test.yml"];
/// Most tests in one document.
const TESTS_MAX: usize = 10_000;
/// Most entries in one list of manifests, ends, ports or addresses.
const LIST_MAX: usize = 1_000;
/// Most connections that one test may mean: ends × ends × ports.
const CONNECTIONS_MAX: usize = 10_000;

/// One document of a test file.
#[derive(Debug)]
pub(crate) struct Suite {
    /// What people call it.
    pub(crate) name: String,
    /// The file.
    pub(crate) source: String,
    pub(crate) manifests: Vec<Manifest>,
    pub(crate) dns: BTreeMap<String, Vec<IpAddr>>,
    /// What time it is; absent: now.
    pub(crate) at: Option<Timestamp>,
    pub(crate) cases: Vec<Case>,
}

/// Where objects come from.
#[derive(Debug)]
pub(crate) enum Manifest {
    /// A file, a directory or a pattern, relative to the test file.
    Path(Placed<String>),
    /// Written into the test file.
    Inline(Vec<Document>),
}

/// A value and where it stands.
#[derive(Debug, Clone)]
pub(crate) struct Placed<T> {
    pub(crate) value: T,
    pub(crate) position: Position,
}

/// One expectation, about one connection or several.
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) from: Vec<Placed<String>>,
    pub(crate) to: Vec<Placed<String>>,
    pub(crate) ports: Vec<Port>,
    pub(crate) source_port: Option<u16>,
    pub(crate) verdict: Placed<Verdict>,
    pub(crate) by: Option<By>,
    pub(crate) audit: Option<Verdict>,
}

/// What is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Port {
    pub(crate) protocol: Protocol,
    /// Of ICMP, type and code as in a packet's first two bytes.
    pub(crate) number: u16,
}

/// Who is to have decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum By {
    /// A policy as verdicts call it, or the whole author as `explain` writes it.
    Named(String),
    /// What is given must hold.
    Rule { policy: Option<String>, rule: Option<u32>, tier: Option<String>, direction: Option<Direction> },
}

/// Whether a directory's file holds policy tests.
pub(crate) fn is_test_file(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
}

/// All suites of a text.
///
/// # Errors
/// With every problem found; then nothing of the text is to be used.
pub(crate) fn parse(source: &str, text: &str) -> Result<Vec<Suite>, Vec<Problem>> {
    let nodes = read(source, text).map_err(|problem| vec![problem])?;
    let mut decoder = Decoder::new(source);
    let several = nodes.len() > 1;
    let mut suites = Vec::new();
    for (index, node) in nodes.iter().enumerate() {
        let default = if several { format!("{source}#{}", index + 1) } else { source.to_owned() };
        suites.extend(suite(&mut decoder, node, source, default));
    }
    if suites.is_empty() && decoder.problems.is_empty() {
        let nothing = Node { position: Position { line: 1, column: 1 }, value: Value::Null };
        decoder.problem(&nothing, "expected a document with \"tests\", found nothing");
    }
    if decoder.problems.is_empty() { Ok(suites) } else { Err(decoder.problems) }
}

fn suite(decoder: &mut Decoder, node: &Node, source: &str, default_name: String) -> Option<Suite> {
    let mut fields = decoder.fields(node, "a mapping with manifests and tests")?;
    let name = fields.optional(decoder, "name", Decoder::scalar_text);
    let manifests = fields.required(decoder, "manifests", |decoder, node| {
        decoder.list(node, LIST_MAX, |decoder, node| manifest(decoder, node, source))
    });
    let dns = fields.optional(decoder, "dns", dns);
    let at = fields.optional(decoder, "at", Decoder::parsed);
    let cases = fields.required(decoder, "tests", |decoder, node| {
        let cases = decoder.list(node, TESTS_MAX, case)?;
        if cases.is_empty() { decoder.expected(node, "at least one test") } else { Some(cases) }
    });
    fields.finish(decoder);
    Some(Suite {
        name: name.unwrap_or(default_name),
        source: source.to_owned(),
        manifests: manifests?,
        dns: dns.unwrap_or_default(),
        at,
        cases: cases?,
    })
}

fn manifest(decoder: &mut Decoder, node: &Node, source: &str) -> Option<Manifest> {
    match &node.value {
        Value::String(path) => Some(Manifest::Path(Placed { value: path.clone(), position: node.position })),
        Value::Mapping(_) => match of_nodes(source, vec![node.clone()]) {
            Ok(documents) => Some(Manifest::Inline(documents)),
            Err(problems) => {
                decoder.problems.extend(problems);
                None
            }
        },
        _ => decoder.expected(node, "a path or an object"),
    }
}

fn dns(decoder: &mut Decoder, node: &Node) -> Option<BTreeMap<String, Vec<IpAddr>>> {
    let Value::Mapping(entries) = &node.value else {
        return decoder.expected(node, "a mapping of DNS names to lists of addresses");
    };
    let mut names = BTreeMap::new();
    for (key, value) in entries {
        let name = decoder.scalar_text(key)?;
        if bulkhead_model::settings::domain(&name, false).is_none() {
            return decoder.expected(key, "a DNS name");
        }
        let addresses =
            decoder.within(&name, |decoder| one_or_list(decoder, value, Decoder::parsed::<IpAddr>))?;
        if names.insert(name.clone(), addresses).is_some() {
            decoder.problem(key, format!("the name {name:?} is given twice"));
        }
    }
    Some(names)
}

fn one_or_list<T>(
    decoder: &mut Decoder,
    node: &Node,
    mut decode: impl FnMut(&mut Decoder, &Node) -> Option<T>,
) -> Option<Vec<T>> {
    match &node.value {
        Value::Sequence(items) if items.is_empty() => decoder.expected(node, "at least one item"),
        Value::Sequence(_) => decoder.list(node, LIST_MAX, decode),
        _ => decode(decoder, node).map(|one| vec![one]),
    }
}

fn case(decoder: &mut Decoder, node: &Node) -> Option<Case> {
    let mut fields = decoder.fields(node, "a test with from, to, port and verdict")?;
    let name = fields.optional(decoder, "name", Decoder::scalar_text);
    let from = fields.required(decoder, "from", |decoder, node| one_or_list(decoder, node, end));
    let to = fields.required(decoder, "to", |decoder, node| one_or_list(decoder, node, end));
    let protocol = fields.optional(decoder, "protocol", |decoder, node| {
        let text = decoder.scalar_text(node)?.to_ascii_lowercase();
        let protocol = text.parse::<PortMatch>().ok().and_then(|port| match port {
            PortMatch::Protocol(protocol) => Some(protocol),
            _ => None,
        });
        protocol.or_else(|| decoder.expected(node, "a protocol, like TCP or a number"))
    });
    // A protocol without ports says all there is to say.
    let whole = protocol.filter(|protocol| !protocol.has_ports() && node.child("port").is_none());
    let ports = match whole {
        Some(protocol) => Some(vec![Port { protocol, number: 0 }]),
        None => fields.required(decoder, "port", |decoder, node| {
            one_or_list(decoder, node, |decoder, node| port(decoder, node, protocol))
        }),
    };
    let source_port = fields.optional(decoder, "sourcePort", |decoder, node| {
        decoder.number::<u16>(node, "a port from 0 to 65535")
    });
    let verdict = fields.required(decoder, "verdict", |decoder, node| {
        Some(Placed { value: verdict(decoder, node)?, position: node.position })
    });
    let by = fields.optional(decoder, "by", by);
    let audit = fields.optional(decoder, "audit", self::verdict);
    fields.finish(decoder);
    let (from, to, ports, verdict) = (from?, to?, ports?, verdict?);
    let connections = from.len().saturating_mul(to.len()).saturating_mul(ports.len());
    if connections > CONNECTIONS_MAX {
        decoder.problem(
            node,
            format!("this means {connections} connections, {CONNECTIONS_MAX} at most are possible"),
        );
        return None;
    }
    if let (Some(_), Some(port)) = (source_port, ports.iter().find(|port| !port.protocol.has_ports())) {
        let at = node.child("sourcePort").unwrap_or(node);
        decoder.problem(at, format!("{} has no source ports", port.protocol));
        return None;
    }
    let name = name.unwrap_or_else(|| {
        let ends = |ends: &[Placed<String>]| {
            ends.iter().map(|end| end.value.as_str()).collect::<Vec<_>>().join(", ")
        };
        let ports = ports.iter().map(Port::to_string).collect::<Vec<_>>().join(", ");
        format!("{} → {} on {ports}: {}", ends(&from), ends(&to), verdict.value)
    });
    Some(Case { name, from, to, ports, source_port, verdict, by, audit })
}

/// Whether there is such an end is known only with the manifests.
fn end(decoder: &mut Decoder, node: &Node) -> Option<Placed<String>> {
    let value = decoder.string(node)?;
    let known = ["pod:", "workload:", "host:", "ip:"].iter().any(|kind| value.starts_with(kind));
    if !known {
        return decoder.expected(node, "pod:NAMESPACE/NAME, workload:NAME, host:NAME or ip:ADDRESS");
    }
    Some(Placed { value, position: node.position })
}

fn verdict(decoder: &mut Decoder, node: &Node) -> Option<Verdict> {
    decoder.word(node, &[("allow", Verdict::Allow), ("deny", Verdict::Deny)])
}

/// `tcp/5432` as in rules, or the number of a protocol that is given beside it. A number alone would be a protocol to
/// a rule and a port to most people.
fn port(decoder: &mut Decoder, node: &Node, beside: Option<Protocol>) -> Option<Port> {
    if let Some(protocol) = beside {
        let expected = "a port from 0 to 65535, since \"protocol\" is given";
        let number = decoder.number::<u16>(node, expected)?;
        if protocol.has_ports() || protocol.is_icmp() {
            return Some(Port { protocol, number });
        }
        decoder.problem(node, format!("the protocol {protocol} has no ports: leave \"port\" out"));
        return None;
    }
    if let Value::Number(number) = &node.value {
        decoder.problem_at(node.position, "which protocol?", Some(format!("tcp/{number}")));
        return None;
    }
    let text = decoder.string(node)?;
    let port = match text.parse::<PortMatch>() {
        Ok(port) => port,
        Err(error) => {
            decoder.problem(node, error.to_string());
            return None;
        }
    };
    match port {
        PortMatch::Ports { protocol, first, last } if first == last => Some(Port { protocol, number: first }),
        PortMatch::Icmp { protocol, kind, code } => {
            Some(Port { protocol, number: u16::from_be_bytes([kind, code.unwrap_or(0)]) })
        }
        PortMatch::Protocol(protocol) if !protocol.has_ports() && !protocol.is_icmp() => {
            Some(Port { protocol, number: 0 })
        }
        _ => decoder.expected(node, "one port, like tcp/5432, icmp/8/0 or a protocol without ports"),
    }
}

fn by(decoder: &mut Decoder, node: &Node) -> Option<By> {
    if !matches!(node.value, Value::Mapping(_)) {
        return decoder.scalar_text(node).map(By::Named);
    }
    let mut fields = decoder.fields(node, "a policy's name, or policy, rule, tier and direction")?;
    let by = By::Rule {
        policy: fields.optional(decoder, "policy", Decoder::scalar_text),
        rule: fields.optional(decoder, "rule", |decoder, node| {
            decoder.number::<u32>(node, "the rule's place in the list, from 0")
        }),
        tier: fields.optional(decoder, "tier", Decoder::scalar_text),
        direction: fields.optional(decoder, "direction", |decoder, node| {
            decoder.word(node, &[("ingress", Direction::Ingress), ("egress", Direction::Egress)])
        }),
    };
    fields.finish(decoder);
    Some(by)
}

impl std::fmt::Display for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { protocol, number } = self;
        let [kind, code] = number.to_be_bytes();
        if protocol.is_icmp() {
            write!(f, "{protocol}/{kind}/{code}")
        } else if protocol.has_ports() {
            write!(f, "{protocol}/{number}")
        } else {
            write!(f, "{protocol}")
        }
    }
}

impl std::fmt::Display for By {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self::Rule { policy, rule, tier, direction } = self else {
            let Self::Named(name) = self else { return Ok(()) };
            return f.write_str(name);
        };
        let parts = [
            tier.as_ref().map(|tier| format!("tier {tier}")),
            policy.as_ref().map(|policy| format!("policy {policy}")),
            direction.map(|direction| direction.to_string()),
            rule.map(|rule| format!("rule {rule}")),
        ];
        f.write_str(&parts.into_iter().flatten().collect::<Vec<_>>().join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> Vec<String> {
        parse("t", text).unwrap_err().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn reads_every_form() {
        let text = "\
name: n
manifests: [../applications]
dns: {api.example.com: 192.0.2.7}
at: 2026-11-01T12:00:00Z
tests:
- {from: workload:a, to: [workload:b, 'ip:192.0.2.1'], port: [tcp/80, icmp/8, '47'], verdict: deny}
- {from: 'pod:n/a', to: host:h, port: 53, protocol: UDP, verdict: allow, by: {policy: p, rule: 1}, audit: deny}
";
        let suite = &parse("t", text).unwrap()[0];
        let ports: Vec<_> = suite.cases[0].ports.iter().map(ToString::to_string).collect();
        assert_eq!(ports, ["tcp/80", "icmp/8/0", "47"]);
        assert_eq!(
            suite.cases[0].name,
            "workload:a → workload:b, ip:192.0.2.1 on tcp/80, icmp/8/0, 47: deny"
        );
        assert_eq!(suite.cases[1].ports[0].to_string(), "udp/53");
        assert_eq!(suite.cases[1].verdict.position, Position { line: 7, column: 67 });
        assert_eq!(suite.cases[1].by.as_ref().unwrap().to_string(), "policy p, rule 1");
    }

    #[test]
    fn every_mistake_has_a_place_and_what_was_meant() {
        assert_eq!(
            problems(
                "manifests: []\ntests:\n- {form: workload:a, to: workload:b, port: tcp/80, verdict: alow}\n"
            ),
            [
                "t:3:3: tests[0]: the field \"from\" is missing",
                "t:3:61: tests[0].verdict: expected allow, deny, found \"alow\"; did you mean allow?",
                "t:3:4: tests[0]: unknown field \"form\", expected one of name, from, to, protocol, port, \
                 sourcePort, verdict, by, audit; did you mean from?",
            ]
        );
        let one = |test: &str| problems(&format!("manifests: []\ntests: [{test}]\n")).join("\n");
        let ends = "from: workload:a, to: workload:b, verdict: deny";
        assert!(one(&format!("{{{ends}, port: tcp/80-90}}")).contains("expected one port"));
        assert!(one(&format!("{{{ends}, port: 80}}")).contains("which protocol?; did you mean tcp/80?"));
        assert!(one(&format!("{{{ends}, port: tpc/80}}")).contains("did you mean"));
        assert!(
            one(&format!("{{{ends}, port: icmp/8, sourcePort: 5}}")).contains("icmp has no source ports")
        );
        assert!(one("{from: a, to: 'ip:192.0.2.1', port: 80, verdict: deny}").contains("workload:NAME"));
        assert!(problems("")[0].contains("found nothing"));
        assert!(problems("manifests: []\ntests: []\n")[0].contains("at least one test"));
        assert!(problems("manifests: [{kind: Policy}]\ntests: []\n")[0].starts_with("t:1:13: the field"));
    }
    #[test]
    fn the_documentation_shows_test_files_that_can_be_read() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/testing.md");
        let text = std::fs::read_to_string(file).unwrap();
        let blocks = text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next());
        let suites: Vec<Suite> = blocks.flat_map(|block| parse("testing.md", block).unwrap()).collect();
        assert!(!suites.is_empty());
    }
}
