//! What is written beside the code says what the code says: `docs/decisions.md` has all rules that are cited, README's limits are those
//! of `src`, and every doc comment can be understood by a reader of its page alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}

pub(crate) fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// All files below a folder that end so, with their paths from the root. What was built or installed is left out.
pub(crate) fn files(below: &str, ending: &str) -> Vec<(String, String)> {
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

// --- the map in src/lib.rs ---

#[test]
fn every_file_is_on_the_map() {
    let map = read("src/lib.rs");
    let map = map.split("```text\n").nth(1).unwrap().split("//! ```").next().unwrap();
    let (mut shown, mut module) = (Vec::new(), String::new());
    for line in map
        .lines()
        .map(|line| line.trim_start_matches("//!").strip_prefix(' ').unwrap_or_default())
    {
        let names = line.trim_start().split("  ").next().unwrap();
        for name in names.split(' ').filter(|name| name.ends_with(".rs")) {
            match line.starts_with(' ') {
                true => shown.push(format!("src/{module}/{name}")),
                false => {
                    shown.push(format!("src/{name}"));
                    name.trim_end_matches(".rs").clone_into(&mut module);
                }
            }
        }
    }
    shown.sort();
    let there: Vec<_> = files("src", ".rs")
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| !["/tests", "/fuzz.rs", "src/lib.rs"].iter().any(|part| name.contains(part)))
        .collect();
    let missing = |of: &[String], among: &[String]| -> Vec<String> { of.iter().filter(|name| !among.contains(name)).cloned().collect() };
    assert_eq!(
        (missing(&there, &shown), missing(&shown, &there)),
        (vec![], vec![]),
        "not on the map, not in the tree"
    );
}

// --- the limits in README.md ---

/// A figure of the table that no constant stands for: a status, the width of a network, what the HTTP library does.
const NO_CONSTANT: (&str, &str) = ("", "");

/// Each row of the table of limits, by its beginning: the file and the name of the constant of each figure in it, in order.
const LIMITS: &[(&str, &[(&str, &str)])] = &[
    (
        "| request body |",
        &[
            ("http/request.rs", "MAX_BODY_BYTES"),
            ("http/sfu_webhook.rs", "MAX_BODY_BYTES"),
            ("http/appservice/transactions.rs", "MAX_BODY_BYTES"),
            ("limits.rs", "MAX_BODY_BYTES"),
            ("http/body.rs", "TIMEOUT"),
            NO_CONSTANT,
        ],
    ),
    ("| requests in flight |", &[("limits.rs", "MAX_IN_FLIGHT"), NO_CONSTANT]),
    ("| requests of your homeserver (application-service mode) |", &[NO_CONSTANT]),
    (
        "| one homeserver |",
        &[("federation.rs", "IN_FLIGHT[0]"), ("federation.rs", "IN_FLIGHT[2]")],
    ),
    (
        "| connections to homeservers |",
        &[
            ("limits.rs", "MAX_CONNECTIONS_OUT"),
            ("limits.rs", "BYTES_PER_CONNECTION_OUT"),
            NO_CONSTANT,
            NO_CONSTANT,
        ],
    ),
    (
        "| one request about a homeserver that is not listed |",
        &[
            ("admission/budget.rs", "MAX_DIALS"),
            ("admission/budget.rs", "MAX_FETCHES"),
            ("admission/budget.rs", "MAX_QUESTIONS"),
            ("admission/dials.rs", "INTERVAL"),
            ("admission/dials.rs", "BURST"),
        ],
    ),
    (
        "| requests of one user |",
        &[
            ("config/policy.rs", "USER_RATE"),
            ("admission/rates.rs", "MAX_BUCKETS"),
            ("admission/rates.rs", "BUCKET_BYTES"),
        ],
    ),
    (
        "| a homeserver's no to a token |",
        &[("openid.rs", "REFUSED_FOR"), ("openid.rs", "MAX_REFUSED")],
    ),
    (
        "| one verification |",
        &[("retry.rs", "RETRY_BUDGET"), ("federation/well_known.rs", "TIMEOUT")],
    ),
    (
        "| homeservers remembered |",
        &[
            ("federation/homeservers.rs", "MAX_KNOWN"),
            ("federation/homeservers.rs", "MAX_STRANGERS"),
            ("homeserver.rs", "MAX_UNUSED"),
            ("homeserver.rs", "MAX_UNUSED"),
        ],
    ),
    (
        "| names in DNS |",
        &[("dns/memory.rs", "MAX_NAMES"), ("dns/question.rs", "MAX_ADDRESSES")],
    ),
    (
        "| answers read |",
        &[
            ("openid.rs", "MAX_REPLY_BYTES"),
            ("federation/well_known.rs", "MAX_BODY_BYTES"),
            ("federation/client_api.rs", "MAX_FILE_BYTES"),
            ("homeserver.rs", "MAX_REPLY_BYTES"),
            ("homeserver/own.rs", "MAX_MEMBERS_BYTES"),
            ("sfu/api.rs", "MAX_REPLY_BYTES"),
            ("federation/pool.rs", "MAX_REST_BYTES"),
        ],
    ),
    (
        "| connections |",
        &[("limits.rs", "MAX_CONNECTIONS"), ("limits.rs", "BYTES_PER_CONNECTION")],
    ),
    ("| memory limit |", &[("limits.rs", "DEFAULT_MEMORY_BYTES")]),
    (
        "| head of a request |",
        &[
            ("connections.rs", "MAX_HEAD_BYTES"),
            NO_CONSTANT,
            NO_CONSTANT,
            ("connections.rs", "OWN_HEAD_BYTES"),
        ],
    ),
    (
        "| names of headers that a preflight asks for |",
        &[("http/edge.rs", "MAX_ASKED_HEADERS_BYTES")],
    ),
    (
        "| an answer that the client does not read |",
        &[("connections.rs", "WRITE_TIMEOUT")],
    ),
    (
        "| a client that has shut down its writing side, or has gone |",
        &[("connections.rs", "HALF_CLOSED_TIMEOUT")],
    ),
    (
        "| tokens that are watched (application-service mode) |",
        &[
            ("limits.rs", "MAX_RECORDS"),
            ("limits.rs", "BYTES_PER_RECORD"),
            ("kick/shares.rs", "MAX_PER_HOMESERVER"),
            ("kick/shares.rs", "MAX_PER_ROOM_AND_HOMESERVER"),
            ("kick/shares.rs", "MAX_PER_USER"),
            ("kick/shares.rs", "MAX_UNSEEN_PER_USER"),
            NO_CONSTANT,
        ],
    ),
    (
        "| ids in a request |",
        &[
            ("wire.rs", "MAX_ID_BYTES"),
            ("wire.rs", "MAX_MEMBER_ID_BYTES"),
            ("wire.rs", "MAX_ACCESS_TOKEN_BYTES"),
            ("wire.rs", "MAX_URL_BYTES"),
        ],
    ),
    (
        "| log |",
        &[
            ("telemetry/writer.rs", "MAX_WAITING_BYTES"),
            ("telemetry/writer.rs", "MAX_LINE_BYTES"),
        ],
    ),
    (
        "| look-ups of names of strangers |",
        &[("dns.rs", "MAX_STRANGER_LOOKUPS"), ("dns.rs", "STRANGER_LOOKUP_TIMEOUT")],
    ),
    (
        "| connections that are kept |",
        &[
            ("federation/pool.rs", "MAX_IDLE"),
            ("federation/pool.rs", "IDLE_TIMEOUT"),
            ("federation/pool.rs", "MAX_STRANGER_IDLE"),
            ("federation/pool.rs", "STRANGER_IDLE_TIMEOUT"),
            ("federation/pool.rs", "MAX_STRANGERS_IDLE"),
        ],
    ),
    (
        "| first request on a connection |",
        &[("server.rs", "FIRST_HEAD_TIMEOUT"), ("server.rs", "NEXT_HEAD_TIMEOUT")],
    ),
    (
        "At most 100 leaves per user",
        &[
            ("delayed_leave.rs", "per_user"),
            ("delayed_leave.rs", "per_homeserver"),
            ("delayed_leave.rs", "total"),
            ("time.rs", "MAX"),
            ("delayed_leave.rs", "never_seen"),
        ],
    ),
];

/// The figures of a text with their units in one: bytes, milliseconds, or a count.
fn figures(text: &str) -> Vec<u64> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find(|c: char| c.is_ascii_digit()) {
        let is_part = rest[..start].ends_with(char::is_alphanumeric);
        let end = rest[start..]
            .find(|c: char| !(c.is_ascii_digit() || c == ','))
            .map_or(rest.len(), |end| start + end);
        let number = rest[start..end].trim_end_matches(',').replace(',', "").parse::<u64>().unwrap();
        rest = &rest[end..];
        if is_part {
            continue;
        }
        let unit = rest.trim_start().split(|c: char| !c.is_alphabetic()).next().unwrap_or_default();
        found.push(match unit {
            "KiB" => number << 10,
            "MiB" => number << 20,
            "s" => number * 1_000,
            "h" => number * 3_600_000,
            _ => number,
        });
    }
    found
}

/// What a constant, or a field of a default, of a source stands for: bytes, milliseconds, or a count.
fn value(source: &str, name: &str) -> u64 {
    let (name, index) = name.split_once('[').map_or((name, None), |(name, index)| (name, Some(index)));
    let (constant, field) = (format!("const {name}: "), format!(" {name}: "));
    let text = source.split_once(&constant).map_or_else(
        || {
            let fields = source.split(&field).skip(1);
            let field = fields
                .map(|rest| rest.split(',').next().unwrap())
                .find(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
            field.unwrap_or_else(|| panic!("no {name}"))
        },
        |(_, rest)| rest.split_once(" = ").unwrap().1.split(';').next().unwrap(),
    );
    let text = index.map_or(text, |index| {
        let index = index.trim_end_matches(']').parse().unwrap();
        text.trim_matches(['[', ']']).split(',').nth(index).unwrap()
    });
    let product = |text: &str| text.split('*').map(|factor| factor_of(source, factor.trim())).product::<u64>();
    match text.split_once('(') {
        Some((of, arguments)) => {
            let inner = product(arguments.split(')').next().unwrap());
            inner * if of.ends_with("from_secs") { 1_000 } else { 1 }
        }
        None => text.split('+').map(product).sum(),
    }
}

fn factor_of(source: &str, factor: &str) -> u64 {
    factor.replace('_', "").parse().unwrap_or_else(|_| value(source, factor))
}

#[test]
fn the_limits_in_the_readme_are_those_of_the_source() {
    let readme = read("README.md");
    let table = readme.split_once("### Limits").unwrap().1.split_once("\n## ").unwrap().0;
    let rows = table.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| What |"));
    let mut wrong = Vec::new();
    for row in rows {
        if !LIMITS.iter().any(|(beginning, _)| row.starts_with(beginning)) {
            wrong.push(format!("nothing is known of the row {row}"));
        }
    }
    for (beginning, constants) in LIMITS {
        let place = if beginning.starts_with('|') { table } else { &readme };
        let Some((_, text)) = place.split_once(&format!("\n{beginning}")) else {
            wrong.push(format!("there is no row {beginning}"));
            continue;
        };
        let text = format!(
            "{beginning}{}",
            text.split_once(if beginning.starts_with('|') { "\n" } else { "\n\n" }).unwrap().0
        );
        let shown = figures(&text);
        if shown.len() != constants.len() {
            wrong.push(format!(
                "{beginning}: {} figures are shown, {} are known: {shown:?}",
                shown.len(),
                constants.len()
            ));
        }
        for (shown, (file, name)) in shown.iter().zip(*constants).filter(|(_, constant)| **constant != NO_CONSTANT) {
            let value = value(&read(&format!("src/{file}")), name);
            if *shown != value {
                wrong.push(format!("{beginning}: {shown} is shown, {name} of src/{file} is {value}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

// --- doc comments ---

/// Pronouns: a doc comment that begins with one is about something that stands elsewhere.
const PRONOUNS: &str = "it it's its itself this that these those they them their theirs he him his she her hers we us ours you your \
                        yours i mine one ones who whose whom whoever what whatever which whichever somebody someone anybody anyone \
                        everybody everyone nobody none nothing anything everything something others both";
/// A comment with fewer words says what the name says, or is a riddle.
const FEWEST_WORDS: usize = 3;

/// The doc comments of a source, each with its line.
fn doc_comments(source: &str) -> Vec<(usize, String)> {
    let mut found = Vec::<(usize, String)>::new();
    let mut is_inside = "";
    for (line, text) in source.lines().enumerate() {
        let text = text.trim_start();
        let mark = ["///", "//!"].into_iter().find(|mark| text.starts_with(mark)).unwrap_or_default();
        let comment = text[mark.len()..].trim();
        match found.last_mut() {
            Some((_, whole)) if !mark.is_empty() && mark == is_inside => {
                whole.push(' ');
                whole.push_str(comment);
            }
            _ if !mark.is_empty() => found.push((line + 1, comment.to_owned())),
            _ => {}
        }
        is_inside = mark;
    }
    found
}

/// What is wrong with a doc comment, if anything.
fn fault(comment: &str) -> Option<&'static str> {
    let lower = comment.to_lowercase();
    let first = lower
        .split(|c: char| !(c.is_alphanumeric() || c == '\''))
        .next()
        .unwrap_or_default();
    if PRONOUNS.split_whitespace().any(|pronoun| pronoun == first) {
        Some("begins with a pronoun")
    } else if lower.starts_with("the same") {
        Some("begins with \"the same\"")
    } else if comment.split_whitespace().count() < FEWEST_WORDS {
        Some("is too short")
    } else {
        None
    }
}

#[test]
fn every_doc_comment_stands_alone() {
    let (mut count, mut wrong) = (0, Vec::new());
    for (path, source) in files("src", ".rs") {
        if path.contains("tests") || path.ends_with("fuzz.rs") {
            continue;
        }
        for (line, comment) in doc_comments(&source) {
            count += 1;
            if let Some(fault) = fault(&comment) {
                wrong.push(format!("{path}:{line} {fault}: {comment}"));
            }
        }
    }
    assert!(count > 2_000, "{count} doc comments were found");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_doc_comment_that_leans_on_another_is_told() {
    for (comment, is_wrong) in [
        ("Its delay.", true),
        ("What the SFU says of a room.", true),
        ("The same for webhooks.", true),
        ("Status.", true),
        ("Itemises the bill.", false),
        ("HTTP status of the answer.", false),
    ] {
        assert_eq!(fault(comment).is_some(), is_wrong, "{comment}");
    }
    let two = doc_comments("//! A file.\n\n/// A thing\n/// of two lines.\nstruct Thing;\n    /// A field.\n");
    let lines: Vec<_> = two.iter().map(|(line, comment)| (*line, comment.as_str())).collect();
    assert_eq!(lines, [(1, "A file."), (3, "A thing of two lines."), (6, "A field.")]);
}

// --- the log ---

/// What stands between the parenthesis that `text` begins with and the one that closes it. Those in texts count, too: each is closed.
fn in_parentheses(text: &str) -> &str {
    let mut depth = 0;
    let end = text.find(|c| {
        depth += i32::from(c == '(') - i32::from(c == ')');
        depth == 0
    });
    end.map_or(text, |end| &text[1..end])
}

/// Alerts name the `event`, and so do the tests: words of a line may be mended.
#[test]
fn every_line_of_the_log_has_an_event() {
    let mut wrong = Vec::new();
    for (path, text) in files("src", ".rs") {
        let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        for level in ["error!(", "warn!(", "info!("] {
            for (at, _) in code.match_indices(level) {
                let named = code[at + level.len()..]
                    .trim_start()
                    .strip_prefix("name: \"")
                    .and_then(|rest| rest.split_once("\","));
                let is_word = |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
                if !named.is_some_and(|(name, _)| is_word(name)) {
                    wrong.push(format!("{path}:{}", code[..at].lines().count()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "no `name: \"…\",` first: {wrong:#?}");
}

/// At most five places wait for the words of a line; the others wait for its fields, for a metric or for what a neighbour saw.
#[test]
fn tests_do_not_wait_for_words() {
    let mut places = Vec::new();
    for (path, text) in files("tests/it", ".rs") {
        let code = text.split("\n// --- the log ---").next().unwrap();
        for wait in ["wait_until(", "while ", "wait_log("] {
            for (at, _) in code.match_indices(wait) {
                let rest = &code[at..];
                let waits_for = match wait {
                    "wait_until(" => in_parentheses(&rest[wait.len() - 1..]),
                    _ => rest.split('{').next().unwrap(),
                };
                if wait == "wait_log(" || waits_for.contains(".log()") {
                    places.push(format!("{path}:{}", code[..at].lines().count()));
                }
            }
        }
    }
    assert!(places.len() <= 5, "{} places wait for words of the log: {places:#?}", places.len());
}
