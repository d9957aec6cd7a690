use proptest::prelude::*;

use super::*;

fn labels(pairs: &[(&str, &str)]) -> Labels {
    let mut labels = Labels::new();
    for (key, value) in pairs {
        labels.insert(key, value).unwrap();
    }
    labels
}

fn matches(text: &str, pairs: &[(&str, &str)]) -> bool {
    let selector = Selector::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
    let direct = selector.matches(&labels(pairs));
    let again = Selector::parse(selector.canonical()).unwrap();
    assert_eq!(again, selector, "canonical text parses to itself");
    assert_eq!(again.matches(&labels(pairs)), direct);
    direct
}

#[test]
fn operators_mean_what_calico_means() {
    let b = &[("a", "b")][..];
    for (text, pairs, expected) in [
        ("a == \"b\"", b, true),
        ("a == 'c'", b, false),
        ("a != 'b'", b, false),
        ("a != 'b'", &[], true),
        ("a not in {'b'}", &[], true),
        ("a in {'b', 'c'}", b, true),
        ("a in {}", b, false),
        ("a not in {}", b, true),
        ("a in {'b',}", b, true),
        ("a contains 'b'", &[("a", "xbx")], true),
        ("a contains 'b'", &[], false),
        ("a starts with 'x'", &[("a", "xb")], true),
        ("a startswith 'b'", &[("a", "xb")], false),
        ("a ends with 'b'", &[("a", "xb")], true),
        ("a\tends   with 'x'", &[("a", "xb")], false),
        ("has(a)", b, true),
        ("!has(a)", b, false),
        ("!!has(a)", b, true),
        ("! ! !has(a)", b, false),
        ("", b, true),
        ("  ", &[], true),
        ("all()", &[], true),
        ("global()", &[], true),
        ("!a == 'b'", b, false),
        ("!a == 'b' && has(a)", b, false),
        ("has(a) && !has(c) || has(d)", b, true),
        ("!(has(c) || !has(a))", b, true),
        // Words that are operators elsewhere are labels here.
        ("contains contains 'contains'", &[("contains", "contains")], true),
        ("in in{'x'}", &[("in", "x")], true),
        ("all == 'x'", &[("all", "x")], true),
        ("has == 'x'", &[("has", "x")], true),
        ("a contains\"b\"", b, true),
        ("not not in {'b'}", &[], true),
    ] {
        assert_eq!(matches(text, pairs), expected, "{text} on {pairs:?}");
    }
}

#[test]
fn wrong_selectors_are_refused_with_position_and_hint() {
    for (text, offset, hint) in [
        ("b == b", 5, Some("'b'")),
        ("role = 'web'", 5, Some("==")),
        ("role", 4, None),
        ("a b", 2, None),
        ("'b1' == b", 0, Some("a label key without quotes")),
        ("foo == \"bar\" &", 13, Some("&&")),
        ("foo == \"bar\" and baz == 'x'", 13, Some("&&")),
        ("foo != ||", 7, None),
        ("foo in {\"\", ||", 12, None),
        ("foo in {,}", 8, None),
        ("foo in \"\"", 7, None),
        ("\"FOO", 0, Some("a label key without quotes")),
        ("a == 'FOO", 9, None),
        ("(", 1, None),
        ("(a == \"foo\"", 11, None),
        (")", 0, None),
        ("()", 1, None),
        ("%", 0, None),
        ("!", 1, None),
        ("has(foo) &&", 11, None),
        ("ha(foo)", 0, Some("has(…)")),
        ("a not in b", 9, None),
        ("a contians 'x'", 2, Some("contains")),
        ("a not 'b'", 2, None),
        ("a ==\n'b'", 4, None),
        ("a inx {'b'}", 2, Some("in")),
    ] {
        let error = Selector::parse(text).expect_err(text);
        assert_eq!(error.offset, offset, "{text}: {error}");
        if hint.is_some() {
            assert_eq!(error.suggestion.as_deref(), hint, "{text}");
        }
    }
}

#[test]
fn nesting_and_length_are_bounded() {
    let deep = format!("{}a == 'b'{}", "(".repeat(10_000), ")".repeat(10_000));
    assert!(Selector::parse(&deep).is_err());
    assert!(Selector::parse(&"!".repeat(8000)).is_err());
    let deep = format!("{}a == 'b'{}", "(".repeat(4000), ")".repeat(4000));
    assert!(Selector::parse(&deep).unwrap_err().expected.contains("nested"));
    let fine = format!("{}a == 'b'{}", "(".repeat(64), ")".repeat(64));
    assert_eq!(Selector::parse(&fine).unwrap().to_string(), "a == \"b\"");
}

/// Ids that Calico publishes for these texts.
#[test]
fn canonical_forms_and_ids_are_calicos() {
    for (text, canonical, id) in [
        ("", "all()", "s:5y5I3VdRZfDU01O--xXAPx2yxCQQqMf0M6IWug"),
        (" (all() )", "all()", "s:5y5I3VdRZfDU01O--xXAPx2yxCQQqMf0M6IWug"),
        ("! (has( b)||! has(a ))", "!(has(b) || !has(a))", "s:Iss0uCleLYv1GSv_pNm7hAO58kE9jAx1NKyG3Q"),
        (
            "! (a == \"b\"&&! c != \"d\")",
            "!(a == \"b\" && !c != \"d\")",
            "s:lh3haoY1ikTRkd4UZu0nWSaIBknYLPJLX16d-w",
        ),
    ] {
        let selector = Selector::parse(text).unwrap();
        assert_eq!((selector.to_string().as_str(), selector.id().as_str()), (canonical, id));
    }
    for (text, canonical) in [
        ("a == '\"'", "a == '\"'"),
        ("a startswith 'x'", "a starts with \"x\""),
        ("a!='x'", "a != \"x\""),
        ("a in {'z', \"z\", 'x', 'a'}", "a in {\"a\", \"x\", \"z\"}"),
        ("k == 'v' && x == 'y'", "(k == \"v\" && x == \"y\")"),
        (
            "!(!(k == 'v' && has(t) || all()) && (a in {'b', 'c'}))",
            "!(!((k == \"v\" && has(t)) || all()) && a in {\"b\", \"c\"})",
        ),
    ] {
        assert_eq!(Selector::parse(text).unwrap().to_string(), canonical);
    }
}

fn any_expr() -> impl Strategy<Value = Expr> {
    let label = || prop::sample::select(vec!["a", "b", "in", "x/y"]).prop_map(Arc::<str>::from);
    let value = || prop::sample::select(vec!["", "1", "2", "12", "it's"]).prop_map(Arc::<str>::from);
    let leaf = prop_oneof![
        Just(Expr::All),
        label().prop_map(Expr::Has),
        (label(), value(), 0..5usize).prop_map(|(label, value, op)| {
            use CompareOp::{Contains, EndsWith, Eq, Ne, StartsWith};
            Expr::Compare { label, value, op: [Eq, Ne, Contains, StartsWith, EndsWith][op] }
        }),
        (label(), prop::collection::btree_set(value(), 0..3), any::<bool>()).prop_map(
            |(label, values, negated)| Expr::In { label, negated, values: values.into_iter().collect() }
        ),
    ];
    leaf.prop_recursive(4, 24, 3, |inner| {
        prop_oneof![
            inner
                .clone()
                .prop_filter("runs of ! collapse", |e| !matches!(e, Expr::Not(_)))
                .prop_map(|e| Expr::Not(Box::new(e))),
            prop::collection::vec(inner.clone(), 2..4).prop_map(Expr::And),
            prop::collection::vec(inner, 2..4).prop_map(Expr::Or),
        ]
    })
}

fn any_labels() -> impl Strategy<Value = Labels> {
    let pair = (
        prop::sample::select(vec!["a", "b", "in", "x/y"]),
        prop::sample::select(vec!["", "1", "2", "12", "it's"]),
    );
    prop::collection::vec(pair, 0..4).prop_map(|pairs| labels(&pairs))
}

proptest! {
    #[test]
    fn canonical_text_parses_to_the_same_tree(expr in any_expr()) {
        let selector = Selector::from_expr(expr);
        let again = Selector::parse(selector.canonical()).unwrap();
        prop_assert_eq!(again.expr(), selector.expr());
    }

    #[test]
    fn the_restriction_is_necessary(expr in any_expr(), labels in any_labels()) {
        let selector = Selector::from_expr(expr);
        if selector.matches(&labels) {
            match selector.restriction() {
                Restriction::None => {}
                Restriction::Nothing => prop_assert!(false, "nothing can match {}", selector),
                Restriction::Present(key) => prop_assert!(labels.get(&key).is_some()),
                Restriction::OneOf(key, values) => {
                    let value = labels.get(&key);
                    prop_assert!(values.iter().any(|one| Some(&**one) == value));
                }
            }
        }
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in "[ab(){}!&|=',\"in has.]{0,40}") {
        if let Ok(selector) = Selector::parse(&text) {
            prop_assert_eq!(Selector::parse(selector.canonical()).unwrap(), selector);
        }
    }
}
