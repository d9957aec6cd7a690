use proptest::prelude::*;

use super::*;

fn entity(name: &str, pairs: &[(&str, &str)], address: u8) -> Entity {
    let mut labels = Labels::new();
    for (key, value) in pairs {
        labels.insert_any(key, value).unwrap();
    }
    labels.insert_any(NAME_LABEL, name).unwrap();
    let prefixes = vec![Prefix::host([10, 0, 0, address].into())];
    Entity { name: name.into(), labels, prefixes, host: Some("h".into()), ..Entity::default() }
}

fn names(index: &MemberIndex, id: SelectorId) -> BTreeSet<String> {
    index.members(id).map(|member| member.entity.to_string()).collect()
}

#[test]
fn replicas_share_one_label_set_and_one_evaluation() {
    let mut index = MemberIndex::new();
    for number in 0..20 {
        index.upsert(&entity(&format!("web-{number}"), &[("role", "web")], number));
    }
    assert_eq!((index.entities(), index.label_sets()), (20, 1));
    let id = index.subscribe(&Selector::parse("role == 'web'").unwrap());
    assert_eq!(names(&index, id).len(), 20);
    let one = index.subscribe(&Selector::parse("bulkhead.dev/name == 'web-7'").unwrap());
    assert_eq!(names(&index, one), BTreeSet::from(["web-7".into()]));
}

#[test]
fn an_unconcerned_selector_hears_nothing() {
    let mut index = MemberIndex::new();
    index.subscribe(&Selector::parse("role == 'db'").unwrap());
    assert_eq!(index.upsert(&entity("web", &[("role", "web")], 1)), []);
    assert_eq!(index.upsert(&entity("web", &[("role", "web"), ("extra", "x")], 1)), []);
    assert_eq!(index.remove("web"), []);
}

#[test]
fn a_new_address_is_told_and_a_new_label_that_nobody_reads_is_not() {
    let mut index = MemberIndex::new();
    index.subscribe(&Selector::parse("has(role)").unwrap());
    assert_eq!(index.upsert(&entity("web", &[("role", "web")], 1)).len(), 1);
    assert_eq!(index.upsert(&entity("web", &[("role", "api")], 1)), []);
    let changes = index.upsert(&entity("web", &[("role", "api")], 2));
    assert!(matches!(&changes[..], [MemberChange { change: Change::Join { .. }, .. }]));
    assert_eq!(index.upsert(&entity("web", &[], 2))[0].change, Change::Leave);
}

const SELECTORS: [&str; 14] = [
    "all()",
    "a == '1'",
    "a != '1'",
    "has(b)",
    "a in {'1', '2'} && b == '1'",
    "a == '1' || b == '2'",
    "!has(a)",
    "bulkhead.dev/name == 'e1'",
    "bulkhead.dev/name in {'e1', 'e2'} || a == '2'",
    "a in {}",
    "a > 1",
    "a != 2",
    "a >= version('2') && b < 2",
    "a == 1 || bulkhead.dev/name == 'e2'",
];

#[derive(Debug, Clone)]
enum Step {
    Upsert(usize, Option<u8>, Option<u8>, u8),
    Remove(usize),
    Subscribe(usize),
    Unsubscribe(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0..5usize, prop::option::of(1..4u8), prop::option::of(1..3u8), 0..3u8)
            .prop_map(|(e, a, b, ip)| Step::Upsert(e, a, b, ip)),
        (0..5usize).prop_map(Step::Remove),
        (0..SELECTORS.len()).prop_map(Step::Subscribe),
        (0..SELECTORS.len()).prop_map(Step::Unsubscribe),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    /// After every step each selector's members, as kept and as told by changes, are what a walk over all
    /// entities finds.
    #[test]
    fn members_are_always_what_a_walk_would_find(steps in steps()) {
        let mut index = MemberIndex::new();
        let mut entities: BTreeMap<String, Entity> = BTreeMap::new();
        let mut ids: BTreeMap<usize, SelectorId> = BTreeMap::new();
        let mut told: HashMap<SelectorId, BTreeMap<String, Vec<Prefix>>> = HashMap::new();
        for step in steps {
            let changes = match step {
                Step::Upsert(e, a, b, ip) => {
                    let mut pairs = Vec::new();
                    let (a, b) = (a.map(|a| a.to_string()), b.map(|b| b.to_string()));
                    if let Some(a) = &a { pairs.push(("a", a.as_str())); }
                    if let Some(b) = &b { pairs.push(("b", b.as_str())); }
                    let entity = entity(&format!("e{e}"), &pairs, ip);
                    entities.insert(format!("e{e}"), entity.clone());
                    index.upsert(&entity)
                }
                Step::Remove(e) => {
                    entities.remove(&format!("e{e}"));
                    index.remove(&format!("e{e}"))
                }
                Step::Subscribe(s) => {
                    if let std::collections::btree_map::Entry::Vacant(vacant) = ids.entry(s) {
                        let id = *vacant.insert(index.subscribe(&Selector::parse(SELECTORS[s]).unwrap()));
                        let now = index.members(id).map(|m| (m.entity.to_string(), m.prefixes.to_vec())).collect();
                        told.insert(id, now);
                    }
                    Vec::new()
                }
                Step::Unsubscribe(s) => {
                    if let Some(id) = ids.remove(&s) {
                        index.unsubscribe(id);
                        told.remove(&id);
                    }
                    Vec::new()
                }
            };
            for MemberChange { selector, entity, change } in changes {
                let members = told.get_mut(&selector).expect("only subscribed selectors are told of");
                match change {
                    Change::Join { prefixes, .. } => { members.insert(entity.to_string(), prefixes.to_vec()); }
                    Change::Leave => { prop_assert!(members.remove(&*entity).is_some()); }
                }
            }
            for (s, id) in &ids {
                let selector = Selector::parse(SELECTORS[*s]).unwrap();
                let walk: BTreeMap<_, _> = entities.iter()
                    .filter(|(_, entity)| selector.matches(&entity.labels))
                    .map(|(name, entity)| (name.clone(), entity.prefixes.clone()))
                    .collect();
                prop_assert_eq!(&told[id], &walk);
                prop_assert_eq!(names(&index, *id), walk.keys().cloned().collect::<BTreeSet<_>>());
            }
        }
    }
}
