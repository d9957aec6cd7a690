//! The guard in a world cut down, against the reference evaluator in the whole one.

use bulkhead_model::document;

use super::*;

/// xorshift64*: enough to choose with, and repeatable.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }

    fn one<'a>(&mut self, words: &[&'a str]) -> &'a str {
        words[self.below(words.len() as u64) as usize]
    }
}

fn read(text: &str) -> Vec<Resource> {
    let documents = document::parse("test", text).unwrap_or_else(|problems| panic!("{problems:?}\n{text}"));
    documents.into_iter().map(|document| document.resource).collect()
}

/// Some object of a small universe in which everything meets everything.
fn object(random: &mut Random) -> String {
    let selectors =
        ["all()", "a == '1'", "a == '2'", "has(b)", "!has(a)", "bulkhead.dev/kind == 'HostEndpoint'"];
    let number = random.below(3);
    let address = random.below(5);
    let labels = random.one(&["{}", "{a: '1'}", "{a: '2', b: x}", "{b: y}"]).to_owned();
    let (kind, name, spec) = match random.below(12) {
        0 => {
            let posture = random.one(&["Allow", "Deny"]);
            let ports = random.one(&["[]", "[tcp/7441]", "[tcp/22]"]);
            let spec =
                format!("{{defaultPosture: {posture}, failSafePorts: {{ingress: {ports}, egress: []}}}}");
            ("Settings", "default".to_owned(), spec)
        }
        1 => {
            let action = random.one(&["Deny", "Pass"]);
            ("Tier", "admin".into(), format!("{{order: {}, defaultAction: {action}}}", random.below(3) * 900))
        }
        2 => ("NetworkSet", format!("s{number}"), format!("{{cidrs: [10.0.0.{}/31]}}", address / 2 * 2)),
        3 => ("Host", format!("h{number}"), format!("{{addresses: [10.0.0.{address}]}}")),
        4 | 5 => (
            "HostEndpoint",
            format!("e{number}"),
            format!("{{host: h{number}, addresses: [10.0.0.{address}]}}"),
        ),
        6 => {
            ("Workload", format!("w{number}"), format!("{{host: h{number}, addresses: [10.0.0.{address}]}}"))
        }
        _ => {
            let rule = |random: &mut Random, side: &str| {
                let action = random.one(&["Allow", "Deny", "Pass"]);
                let peer = match random.below(4) {
                    0 => String::new(),
                    1 => format!("{side}: {{cidrs: [10.0.0.{}/31]}}, ", random.below(3) * 2),
                    2 => format!("{side}: {{networkSets: \"{}\"}}, ", random.one(&selectors)),
                    _ => format!("{side}: {{selector: \"{}\"}}, ", random.one(&selectors)),
                };
                format!(
                    "[{{action: {action}, {peer}ports: [{}]}}]",
                    random.one(&["tcp/7441", "tcp", "udp/53"])
                )
            };
            let (from, to) = (rule(random, "from"), rule(random, "to"));
            let rules = random.one(&["ingress", "egress", "both"]).to_owned();
            let rules = match rules.as_str() {
                "ingress" => format!("ingress: {from}"),
                "egress" => format!("egress: {to}"),
                _ => format!("ingress: {from}, egress: {to}"),
            };
            let tier = random.one(&["admin", "application"]);
            let mode = random.one(&["Enforce", "Enforce", "Audit"]);
            let applies = random.one(&selectors);
            let spec = format!("{{tier: {tier}, mode: {mode}, appliesTo: \"{applies}\", {rules}}}");
            ("Policy", format!("p{number}"), spec)
        }
    };
    let labels =
        if kind == "Settings" || kind == "Tier" { String::new() } else { format!(", labels: {labels}") };
    format!(
        "---\napiVersion: bulkhead.dev/v1\nkind: {kind}\nmetadata: {{name: {name}{labels}}}\nspec: {spec}\n"
    )
}

fn whole(objects: &BTreeMap<ObjectKey, Resource>) -> World {
    let (mut assembly, mut world) = (Assembly::default(), World::new());
    for (key, object) in objects {
        world.change(&assembly.set(key, Some(object.clone())));
    }
    world
}

/// Whether a lifeline passes, said by the reference evaluator about everything there is.
fn passes(world: &World, line: &Lifeline) -> bool {
    let owners = |end: SocketAddr| {
        let has = |entity: &&Entity| {
            entity.is_endpoint() && entity.prefixes.iter().any(|prefix| prefix.contains_address(end.ip()))
        };
        let names: Vec<_> =
            world.entities.values().filter(has).map(|entity| Some(Arc::clone(&entity.name))).collect();
        if names.is_empty() { vec![None] } else { names }
    };
    let pairs = owners(line.source).into_iter().flat_map(|source| {
        owners(line.destination).into_iter().map(move |destination| (source.clone(), destination))
    });
    pairs.into_iter().all(|(source, destination)| {
        let flow = Flow {
            source: Endpoint { workload: source, address: line.source.ip() },
            destination: Endpoint { workload: destination, address: line.destination.ip() },
            key: Protocol::TCP.key(line.destination.port()),
            source_port: line.source.port(),
        };
        decide(world, &flow).verdict == Verdict::Allow
    })
}

#[test]
fn what_the_whole_world_would_cut_the_guard_finds_and_nothing_else() {
    let mut random = Random(0x0bad_cafe);
    let lifelines: Vec<Lifeline> = (0..5u8)
        .flat_map(|source| (0..5u8).map(move |destination| (source, destination)))
        .map(|(source, destination)| Lifeline {
            source: ([10, 0, 0, source], 50_000).into(),
            destination: ([10, 0, 0, destination], 7441).into(),
        })
        .collect();
    let mut found = 0;
    for round in 0..900 {
        let mut objects = BTreeMap::new();
        for _ in 0..random.below(14) {
            objects.extend(read(&object(&mut random)).into_iter().map(|object| (object.key(), object)));
        }
        let mut after = objects.clone();
        let mut changes = BTreeMap::new();
        for _ in 0..=random.below(2) {
            let object = read(&object(&mut random)).remove(0);
            let gone = random.below(3) == 0;
            if gone {
                after.remove(&object.key())
            } else {
                after.insert(object.key(), object.clone())
            };
            changes.insert(object.key(), (!gone).then_some(object));
        }
        let (then, thereafter) = (whole(&objects), whole(&after));
        let expected: Vec<usize> = (0..lifelines.len())
            .filter(|line| passes(&then, &lifelines[*line]) && !passes(&thereafter, &lifelines[*line]))
            .collect();
        let all: Vec<&Resource> = objects.values().collect();
        let changes = changes.iter().map(|(key, object)| (key.clone(), object.as_ref())).collect();
        let cuts = cuts(&all, &changes, &lifelines, then.now).unwrap();
        let cut: Vec<usize> = cuts.iter().map(|cut| cut.lifeline).collect();
        assert_eq!(cut, expected, "round {round}: {changes:#?}\n{objects:#?}");
        found += cut.len();
    }
    assert!(found > 500, "only {found} lifelines were ever cut: has the test gone blind?");
}

#[test]
fn fail_safe_ports_hold_for_hosts_and_not_for_workloads() {
    let text = |kind: &str| {
        format!(
            "apiVersion: bulkhead.dev/v1\nkind: {kind}\nmetadata: {{name: x}}\n\
             spec: {{host: h, addresses: [10.0.0.9]}}\n"
        )
    };
    let policy = read(
        "apiVersion: bulkhead.dev/v1\nkind: Policy\nmetadata: {name: shut}\n\
         spec: {appliesTo: all(), ingress: [], egress: []}\n",
    );
    let line = Lifeline { source: ([10, 0, 0, 9], 40_000).into(), destination: ([10, 0, 0, 1], 7441).into() };
    let changes = BTreeMap::from([(policy[0].key(), Some(&policy[0]))]);
    let judge = |kind: &str, line: Lifeline| {
        let end = read(&text(kind)).remove(0);
        cuts(&[&end], &changes, &[line], Timestamp { seconds: 0 }).unwrap()
    };
    assert_eq!(judge("HostEndpoint", line), []);
    let other_port = Lifeline { destination: ([10, 0, 0, 1], 9441).into(), ..line };
    for (kind, line) in [("HostEndpoint", other_port), ("Workload", line)] {
        let expected = Cut {
            lifeline: 0,
            endpoint: format!("{kind}/x").into(),
            direction: Direction::Egress,
            rule: RuleRef::TierDefault { tier: "application".into() },
            policies: vec![policy[0].key()],
        };
        assert_eq!(judge(kind, line), [expected]);
    }
}
