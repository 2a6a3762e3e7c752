//! What is written beside the code says what the code says: `docs/decisions.md` has all rules that are cited, README's limits are those
//! of `src`, and every doc comment can be understood by a reader of its page alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// All files below a folder that end so, with their paths from the root. What was built or installed is left out.
fn files(below: &str, ending: &str) -> Vec<(String, String)> {
    let (mut found, mut folders) = (Vec::new(), vec![root().join(below)]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
            if path.is_dir() && !["target", "node_modules"].contains(&path.file_name().unwrap().to_str().unwrap()) {
                folders.push(path);
            } else if name.ends_with(ending) {
                found.push((name.clone(), read(&name)));
            }
        }
    }
    found.sort();
    found
}

// --- docs/decisions.md ---

/// Reads a code of a rule: the letter of a chapter, a number, perhaps a small letter.
fn code(word: &str) -> Option<String> {
    let (chapter, rest) = word.split_at_checked(1)?;
    let number = rest.trim_end_matches(|c: char| c.is_ascii_lowercase());
    let is_number = (1..=2).contains(&number.len()) && number.bytes().all(|digit| digit.is_ascii_digit());
    ("PHOTLABCD".contains(chapter) && is_number && rest.len() <= number.len() + 1).then(|| word.to_owned())
}

/// The codes in a text, with those that a range stands for. Percent-encoded bytes look like codes and are none.
fn codes(text: &str) -> Vec<String> {
    let (mut found, mut rest) = (Vec::<String>::new(), text);
    let mut before = "";
    while let Some(start) = rest.find(|c: char| c.is_alphanumeric()) {
        let gap = &rest[..start];
        let word = &rest[start..];
        let end = word.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(word.len());
        if let Some(code) = code(&word[..end])
            && !gap.ends_with(['%', '_', '&'])
        {
            if before == "to"
                && let Some(first) = found.last()
                && first[..1] == code[..1]
                && let (Ok(from), Ok(to)) = (first[1..].parse::<u32>(), code[1..].parse::<u32>())
            {
                let chapter = code[..1].to_owned();
                found.extend((from + 1..to).map(|number| format!("{chapter}{number}")));
            }
            found.push(code);
        }
        before = &word[..end];
        rest = &word[end..];
    }
    found
}

/// The codes that a line of Rust cites: in its comment, at the beginning of a text that is printed, or in the name of a test.
fn cited(line: &str) -> Vec<String> {
    let comment = line
        .find("//")
        .filter(|&at| !line[..at].ends_with(':'))
        .map_or("", |at| &line[at..]);
    let mut found = codes(comment);
    let code_only = &line[..line.len() - comment.len()];
    for text in code_only.split('"').skip(1) {
        let text = text.trim_start_matches("figure: ");
        let word = text.split([' ', ':']).next().unwrap_or_default();
        found.extend(code(word).filter(|code| text.len() > code.len()));
    }
    if let Some((_, name)) = code_only.split_once("fn ") {
        let first = name.split('_').next().unwrap_or_default();
        let (chapter, number) = first.split_at_checked(1).unwrap_or_default();
        found.extend(code(&format!("{}{number}", chapter.to_uppercase())));
    }
    found
}

#[test]
fn every_rule_that_is_cited_has_a_row_and_every_row_is_cited() {
    let mut places = BTreeMap::<String, Vec<String>>::new();
    for folder in ["src", "tests", "benches"] {
        for (path, text) in files(folder, ".rs") {
            for (line, text) in text.lines().enumerate() {
                for code in cited(text) {
                    places.entry(code).or_default().push(format!("{path}:{}", line + 1));
                }
            }
        }
    }
    for path in ["README.md", "benches/README.md", "docs/architecture.md", "docs/CHANGELOG.md"] {
        for code in codes(&read(path)) {
            places.entry(code).or_default().push(path.to_owned());
        }
    }
    let decisions = read("docs/decisions.md");
    let mut rows = BTreeSet::new();
    for line in decisions.lines() {
        let heading = line.strip_prefix("### ").and_then(|heading| heading.split_once(':'));
        let case = line.strip_prefix("| ").and_then(|row| row.split_once(" |"));
        if let Some(code) = heading.or(case).and_then(|(word, _)| code(word)) {
            assert!(rows.insert(code.clone()), "{code} has two rows");
        }
    }
    let mut wrong = Vec::new();
    for (code, places) in &places {
        if !rows.contains(code) {
            wrong.push(format!(
                "{code} has no row in docs/decisions.md, and is cited in {}",
                places.join(", ")
            ));
        }
    }
    for code in rows.iter().filter(|code| !places.contains_key(*code)) {
        wrong.push(format!("nothing cites the row {code} of docs/decisions.md"));
    }
    for code in codes(&decisions).iter().filter(|code| !rows.contains(*code)) {
        wrong.push(format!("docs/decisions.md names {code}, which has no row in it"));
    }
    assert!(places.len() > 80, "{} codes were found", places.len());
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// What counts as a citation.
#[test]
fn a_citation_is_told_from_what_looks_like_one() {
    let line = |text: &str| cited(text).join(" ");
    assert_eq!(
        line("/// Decisions Q1, \u{50}1 and \u{4c}2a, not TLS1 or %\u{43}3%\u{41}9."),
        "P1 L2a"
    );
    assert_eq!(line("let url = \"https://\u{50}1.example\";"), "");
    assert_eq!(line("println!(\"figure: \u{42}6 lost\")"), "B6");
    assert_eq!(line("fn \u{6c}5a_of_something() {"), "L5a");
    assert_eq!(codes("\u{4f}4 to \u{4f}6"), ["O4", "O5", "O6"]);
}

// --- docs/architecture.md ---

/// Whether a word is in the sources, as a word.
fn names(sources: &str, word: &str) -> bool {
    let is_part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    sources.match_indices(word).any(|(at, _)| {
        let before = sources[..at].chars().next_back();
        !is_part(before) && !is_part(sources[at + word.len()..].chars().next())
    })
}

#[test]
fn the_architecture_names_what_there_is() {
    let sources: String = files("src", ".rs").into_iter().map(|(_, text)| text).collect();
    let architecture = read("docs/architecture.md");
    let mut wrong = Vec::new();
    for name in architecture.split('`').skip(1).step_by(2) {
        let is_there = if name.contains(".rs") {
            root().join(name).is_file()
        } else {
            name.split(|c: char| !(c.is_alphanumeric() || c == '_'))
                .filter(|word| !word.is_empty())
                .all(|word| names(&sources, word))
        };
        if !is_there {
            wrong.push(name);
        }
    }
    let count = architecture.split('`').count() / 2;
    assert!(count > 80, "{count} names were found");
    assert!(wrong.is_empty(), "not in the tree any more: {wrong:#?}");
}
