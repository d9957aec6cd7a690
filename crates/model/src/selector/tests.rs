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
        ("a => 5", 2, Some(">=")),
        ("a =< 5", 2, Some("<=")),
        ("a < 'b'", 4, None),
        ("a < '5'", 4, Some("5")),
        ("a < 5.10.3", 4, Some("version('5.10.3')")),
        ("a >= '5.10.3'", 5, Some("version('5.10.3')")),
        ("host.kernel == 5.10.3", 15, Some("version('5.10.3')")),
        ("host.kernel < '5'", 14, Some("version('5')")),
        ("a < -", 4, None),
        ("a < 5x", 4, Some("version('5x')")),
        ("a < 1e3", 4, Some("version('1e3')")),
        ("a < ", 4, None),
        ("a < version(5)", 12, Some("'5'")),
        ("a < version ('5')", 4, None),
        ("a < version('latest')", 12, None),
        ("a < version('5)", 15, None),
        ("a < version('5'", 15, None),
        ("a contains 5", 11, Some("'5'")),
        ("a < = 5", 4, None),
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

#[test]
fn typed_comparisons_mean_what_they_say() {
    let kernel = &[("host.kernel", "5.10.0-21-amd64")][..];
    let number = |value| vec![("n", value)];
    for (text, pairs, expected) in [
        ("host.kernel >= version('5.10')", kernel.to_vec(), true),
        ("host.kernel<version(\"5.9\")", kernel.to_vec(), false),
        ("host.kernel < version( '5.10.0-28' )", kernel.to_vec(), true),
        ("host.kernel == version('5.10.0-21-AMD64')", kernel.to_vec(), true),
        ("host.kernel != version('5.10')", kernel.to_vec(), true),
        ("n > 0", number("2"), true),
        ("n>0&&n<=2", number("2.0"), true),
        ("n == 2", number("2.00"), true),
        ("n == '2'", number("2.00"), false),
        ("n != 2", number("2.00"), false),
        ("n < -0.5", number("-1"), true),
        ("n <= -1", number("-1"), true),
        ("n > 9", number("10"), true),
        ("!n > 9", number("10"), false),
        ("version == version('1')", vec![("version", "1.0")], true),
        ("n >= version('1.9')", number("1.10"), true),
        ("n >= 1.9", number("1.10"), false),
    ] {
        assert_eq!(matches(text, &pairs), expected, "{text} on {pairs:?}");
    }
}

#[test]
fn an_absent_or_incomparable_value_is_only_unequal() {
    for pairs in [&[][..], &[("n", "many")], &[("n", "")], &[("n", "NaN")], &[("n", "1e3")]] {
        for (op, expected) in
            [("==", false), ("!=", true), ("<", false), ("<=", false), (">", false), (">=", false)]
        {
            assert_eq!(matches(&format!("n {op} 5"), pairs), expected, "n {op} 5 on {pairs:?}");
            if pairs != [("n", "1e3")] {
                let text = format!("n {op} version('5')");
                assert_eq!(matches(&text, pairs), expected, "{text} on {pairs:?}");
            }
        }
    }
}

#[test]
fn canonical_forms_of_typed_comparisons_are_one_for_what_means_the_same() {
    for (text, canonical) in [
        ("n>5", "n > 5"),
        ("n > 5.00", "n > 5"),
        ("n > 05", "n > 5"),
        ("n == -0.50", "n == -0.5"),
        ("n != -0", "n != 0"),
        ("k <= version( ' 5.10.0 ' )", "k <= version(\"5.10.0\")"),
        ("n>1&&n<2", "(n > 1 && n < 2)"),
    ] {
        let selector = Selector::parse(text).unwrap();
        assert_eq!(selector.to_string(), canonical, "{text}");
        assert_eq!(selector.id(), Selector::parse(canonical).unwrap().id());
    }
}

/// What is stored was checked where it was written, by a catalogue that may have been another.
#[test]
fn canonical_texts_are_read_whatever_the_catalogue_says() {
    let text = "host.kernel > 5";
    assert!(Selector::parse(text).is_err());
    assert_eq!(Selector::parse_canonical(text).unwrap().to_string(), text);
    let long = (0..1000).map(|n| format!("a{n} == 'x'")).collect::<Vec<_>>().join(" && ");
    assert!(Selector::parse(&long).is_err());
    let joined = Selector::parse_canonical(&long).unwrap().with_prefix("bulkhead.dev/namespace.");
    assert_eq!(Selector::parse_canonical(joined.canonical()).unwrap(), joined);
    let key = Selector::parse(&format!("has({})", "a".repeat(500))).unwrap();
    let joined = key.with_prefix("bulkhead.dev/namespace.");
    assert_eq!(Selector::parse_canonical(joined.canonical()).unwrap(), joined);
}

/// The canonical text is stored: it must be within the limits too.
#[test]
fn what_is_accepted_is_accepted_again_in_its_canonical_form() {
    let mut deep = "has(a)".to_owned();
    for _ in 0..SELECTOR_DEPTH_MAX {
        deep = format!("has(a)&&({deep}||has(b))");
    }
    assert!(Selector::parse(&deep).unwrap_err().expected.contains("nested"));
    let long = vec!["a<1"; SELECTOR_LEN_MAX / 5].join("||");
    assert!(long.len() <= SELECTOR_LEN_MAX);
    assert!(Selector::parse(&long).unwrap_err().expected.contains("canonical form"));
    assert_eq!(Selector::parse("!(!has(a))").unwrap().to_string(), "has(a)");
}

fn any_typed() -> impl Strategy<Value = TypedValue> {
    let numbers = prop::sample::select(vec!["0", "-1", "1", "1.50", "2", "012"]);
    let versions = prop::sample::select(vec!["0", "1", " 1.0", "1-rc1", "1-2", "1.10"]);
    prop_oneof![
        numbers.prop_map(|text| TypedValue::number(text).unwrap()),
        versions.prop_map(|text| TypedValue::version(text).unwrap()),
    ]
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
        (label(), any_typed(), 0..6usize).prop_map(|(label, value, op)| {
            use TypedOp::{Eq, Ge, Gt, Le, Lt, Ne};
            Expr::Typed { label, value, op: [Eq, Ne, Lt, Le, Gt, Ge][op] }
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
        prop::sample::select(vec!["", "1", "2", "12", "it's", "1.0", "-1", "1-rc1"]),
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
    fn no_text_makes_the_parser_panic(text in "[ab(){}!&|=<>15',\"in has.v-]{0,40}") {
        if let Ok(selector) = Selector::parse(&text) {
            prop_assert_eq!(Selector::parse(selector.canonical()).unwrap(), selector);
        }
    }
}
