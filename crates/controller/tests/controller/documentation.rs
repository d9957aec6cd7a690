//! Every manifest that the documentation shows, and every file of examples, is applied to a repository.

use std::path::{Path, PathBuf};

use hyper::StatusCode;

use crate::harness::Fixture;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path, ending));
        } else if path.to_string_lossy().ends_with(ending) {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Blocks between ```yaml and ``` that hold objects.
fn blocks(text: &str) -> impl Iterator<Item = &str> {
    let blocks = text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next());
    blocks.filter(|block| block.contains("apiVersion:") && !block.contains("\ntests:"))
}

/// The tiers that examples take for granted.
const BEFORE: &str =
    "apiVersion: bulkhead.dev/v1\nkind: Tier\nmetadata: {name: compliance}\nspec: {order: 5000}\n";

#[tokio::test(flavor = "multi_thread")]
async fn every_example_of_the_documentation_is_applied() {
    let root = root();
    let mut pages = files(&root.join("docs"), ".md");
    pages.extend(["README.md", "ARCHITECTURE.md"].map(|page| root.join(page)));
    let mut applied = 0;
    for page in pages {
        let text = std::fs::read_to_string(&page).unwrap();
        for block in blocks(&text) {
            // Each by itself: pages show several ways to say one thing.
            let fixture = Fixture::new().await;
            fixture.apply(BEFORE).await;
            let (status, answer) = fixture.try_apply("apply", &[("block.yaml", block)]).await;
            assert_eq!(status, StatusCode::OK, "{}:\n{block}\n{answer}", page.display());
            let again = fixture.apply(block).await;
            let unchanged =
                again["items"].as_array().unwrap().iter().all(|item| item["outcome"] == "unchanged");
            assert!(unchanged, "{}:\n{block}\n{again}", page.display());
            applied += 1;
        }
    }
    assert!(applied > 10, "only {applied} examples were found: has the check gone blind?");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_folder_of_examples_is_applied_at_once() {
    let root = root();
    let folders = ["docs/reference", "examples/applications"].map(|folder| root.join(folder));
    for folder in folders {
        let texts: Vec<(String, String)> = files(&folder, ".yaml")
            .into_iter()
            .filter(|file| !file.to_string_lossy().ends_with(".test.yaml"))
            .map(|file| (file.display().to_string(), std::fs::read_to_string(&file).unwrap()))
            .collect();
        assert!(!texts.is_empty(), "{}", folder.display());
        let sources: Vec<_> = texts.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
        let fixture = Fixture::new().await;
        let (status, answer) = fixture.try_apply("apply", &sources).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
    }
}
