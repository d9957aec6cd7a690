//! The smallest case that still fails: without steps, objects, rules, labels and connections that do not matter.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::case::Case;

/// A case from which nothing more can be taken.
#[derive(Debug, Clone)]
pub struct Shrunk {
    /// The case.
    pub case: Case,
    /// How many were tried.
    pub runs: usize,
    /// How long that took.
    pub took: Duration,
}

/// Takes away from a case that fails whatever it fails without. Stops when time is over, too.
pub fn smallest(case: &Case, budget: Duration, fails: &mut dyn FnMut(&Case) -> bool) -> Shrunk {
    let mut shrinker = Shrinker { case: case.clone(), runs: 0, began: Instant::now(), budget, fails };
    shrinker.cut();
    loop {
        let before = shrinker.case.clone();
        shrinker.without_chunks(&flows);
        shrinker.without_chunks(&changes);
        shrinker.one_by_one(&steps);
        shrinker.one_by_one(&parts);
        if shrinker.case == before || shrinker.is_late() {
            break;
        }
    }
    Shrunk { case: shrinker.case, runs: shrinker.runs, took: shrinker.began.elapsed() }
}

struct Shrinker<'a> {
    case: Case,
    runs: usize,
    began: Instant,
    budget: Duration,
    fails: &'a mut dyn FnMut(&Case) -> bool,
}

impl Shrinker<'_> {
    fn is_late(&self) -> bool {
        self.began.elapsed() > self.budget
    }

    /// Whether this fails too; then it is the case from now on.
    fn is_enough(&mut self, smaller: Case) -> bool {
        if self.is_late() {
            return false;
        }
        self.runs += 1;
        let fails = (self.fails)(&smaller);
        if fails {
            self.case = smaller;
        }
        fails
    }

    /// Nothing after the step that shows it.
    fn cut(&mut self) {
        for len in 1..self.case.steps.len() {
            let steps = self.case.steps[..len].to_vec();
            if self.is_enough(Case { steps, ..self.case.clone() }) {
                return;
            }
        }
    }

    /// Large parts of a list first, then smaller ones, down to one.
    fn without_chunks(&mut self, list: &dyn Fn(&Case) -> Vec<Item>) {
        let mut size = list(&self.case).len();
        while size > 0 {
            let mut start = 0;
            loop {
                let items = list(&self.case);
                if start >= items.len() {
                    break;
                }
                let chunk = &items[start..items.len().min(start + size)];
                if !self.is_enough(without(&self.case, chunk)) {
                    start += size;
                }
            }
            size /= 2;
        }
    }

    /// Every case that is a little smaller, one after the other.
    fn one_by_one(&mut self, smaller: &dyn Fn(&Case) -> Vec<Case>) {
        let mut index = 0;
        while let Some(candidate) = smaller(&self.case).into_iter().nth(index) {
            if !self.is_enough(candidate) {
                index += 1;
            }
        }
    }
}

/// Something in a step, by its list and place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Item {
    Set(usize, usize),
    Remove(usize, usize),
    Flow(usize, usize),
}

fn flows(case: &Case) -> Vec<Item> {
    let of = |(step, content): (usize, &super::case::Step)| {
        (0..content.flows.len()).map(move |index| Item::Flow(step, index))
    };
    case.steps.iter().enumerate().flat_map(of).collect()
}

fn changes(case: &Case) -> Vec<Item> {
    let of = |(step, content): (usize, &super::case::Step)| {
        let set = (0..content.set.len()).map(move |index| Item::Set(step, index));
        set.chain((0..content.remove.len()).map(move |index| Item::Remove(step, index)))
    };
    case.steps.iter().enumerate().flat_map(of).collect()
}

fn without(case: &Case, items: &[Item]) -> Case {
    let mut case = case.clone();
    for (number, step) in case.steps.iter_mut().enumerate() {
        let mut index = 0;
        step.set.retain(|_| (!items.contains(&Item::Set(number, index)), index += 1).0);
        index = 0;
        step.remove.retain(|_| (!items.contains(&Item::Remove(number, index)), index += 1).0);
        index = 0;
        step.flows.retain(|_| (!items.contains(&Item::Flow(number, index)), index += 1).0);
    }
    case
}

/// A step less: gone, or one with the next; or only no restart and no other time.
fn steps(case: &Case) -> Vec<Case> {
    let mut smaller = Vec::new();
    for number in 0..case.steps.len() {
        if case.steps.len() > 1 {
            let mut less = case.clone();
            less.steps.remove(number);
            smaller.push(less);
        }
        if number + 1 < case.steps.len() {
            let mut less = case.clone();
            let first = less.steps.remove(number);
            let next = &mut less.steps[number];
            next.restart |= first.restart;
            next.now = next.now.or(first.now);
            next.set.splice(0..0, first.set);
            next.remove.splice(0..0, first.remove);
            smaller.push(less);
        }
        let mut less = case.clone();
        less.steps[number].restart = false;
        smaller.push(less.clone());
        less.steps[number].restart = case.steps[number].restart;
        less.steps[number].now = None;
        smaller.push(less);
    }
    smaller.retain(|less| less != case);
    smaller
}

/// One thing less in one object.
fn parts(case: &Case) -> Vec<Case> {
    let mut smaller = Vec::new();
    for (number, step) in case.steps.iter().enumerate() {
        for (index, object) in step.set.iter().enumerate() {
            for less in simpler("", object) {
                let mut one = case.clone();
                one.steps[number].set[index] = less;
                smaller.push(one);
            }
        }
    }
    smaller
}

/// What an object is known by, and cannot be without.
const KEPT: [&str; 6] = ["apiVersion", "kind", "metadata", "name", "namespace", "spec"];
const SELECTORS: [&str; 7] =
    ["appliesTo", "selector", "notSelector", "namespaceSelector", "networkSets", "hosts", "endpoint"];

/// Every value with one thing less in it: an element, a field, what a selector asks.
fn simpler(field: &str, value: &Value) -> Vec<Value> {
    let mut simpler = Vec::new();
    match value {
        Value::Array(items) => {
            for index in 0..items.len() {
                let mut less = items.clone();
                less.remove(index);
                simpler.push(json!(less));
            }
            for (index, item) in items.iter().enumerate() {
                for less in self::simpler(field, item) {
                    let mut items = items.clone();
                    items[index] = less;
                    simpler.push(json!(items));
                }
            }
        }
        Value::Object(fields) => {
            for name in fields.keys().filter(|name| !KEPT.contains(&name.as_str())) {
                let mut less = fields.clone();
                less.remove(name);
                simpler.push(Value::Object(less));
            }
            for (name, item) in fields {
                for less in self::simpler(name, item) {
                    let mut fields = fields.clone();
                    fields.insert(name.clone(), less);
                    simpler.push(Value::Object(fields));
                }
            }
        }
        Value::String(text) if SELECTORS.contains(&field) && text != "all()" => simpler.push("all()".into()),
        _ => {}
    }
    simpler
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::differential::random_case;

    #[test]
    fn what_does_not_matter_goes() {
        // "Fails" where some policy denies by a rule that asks for a port, in a step of two or more.
        let has = |case: &Case| {
            let denies = |object: &Value| {
                let rules = object["spec"]["ingress"].as_array().into_iter().flatten();
                rules.clone().any(|rule| rule["action"] == "Deny" && rule.get("ports").is_some())
            };
            case.steps.len() > 1 && case.steps.iter().flat_map(|step| &step.set).any(denies)
        };
        let case = (0..).map(random_case).find(|case| has(case)).expect("one of many");
        let shrunk = smallest(&case, Duration::from_secs(60), &mut |case| has(case));
        assert!(has(&shrunk.case));
        let Case { steps, .. } = &shrunk.case;
        assert_eq!(
            (steps.len(), shrunk.case.changes(), shrunk.case.flows()),
            (2, 1, 0),
            "{}",
            shrunk.case.text()
        );
        let object = steps.iter().flat_map(|step| &step.set).next().expect("one");
        let spec = json!({ "ingress": [{ "action": "Deny", "ports": [] }] });
        assert_eq!(object["spec"], spec);
    }
}
