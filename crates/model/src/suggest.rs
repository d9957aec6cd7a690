//! "Did you mean": the nearest right word to a wrong one.

/// The candidate closest to `word`, if one is close enough to be a likely typing error: at most one
/// edit per three characters (rounded up), two at least (Damerau-Levenshtein, restricted).
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let limit = word.chars().count().div_ceil(3).max(2);
    candidates
        .into_iter()
        .map(|candidate| (edits(word, candidate), candidate))
        .filter(|(edits, candidate)| *edits <= limit && *edits < candidate.chars().count())
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, candidate)| candidate)
}

/// How many typing errors lie between two words, whatever their case.
pub fn edits(a: &str, b: &str) -> usize {
    distance(&a.to_lowercase(), &b.to_lowercase())
}

fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut two_up = vec![0; b.len() + 1];
    let mut up: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let cost = usize::from(a[i - 1] != b[j - 1]);
            row[j] = (up[j] + 1).min(row[j - 1] + 1).min(up[j - 1] + cost);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(two_up[j - 2] + 1);
            }
        }
        two_up = std::mem::replace(&mut up, row);
    }
    up[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_likely_word_and_nothing_far_fetched() {
        assert_eq!(nearest("ingres", ["ingress", "egress"]), Some("ingress"));
        assert_eq!(nearest("selectro", ["selector", "cidrs"]), Some("selector"));
        assert_eq!(nearest("tpc", ["tcp", "udp"]), Some("tcp"));
        assert_eq!(nearest("applyTo", ["tier", "appliesTo"]), Some("appliesTo"));
        assert_eq!(nearest("banana", ["ingress", "egress"]), None);
    }
}
