//! What `contrib/` and the pages of `docs/` say is so: names, links, the stack of Compose. That they also work, `./tests/packages` shows.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lk_jwt_service::config::VARIABLES;
use lk_jwt_service::internals::doctor::fault;
use yaml_rust2::{Yaml, YamlLoader};

use crate::docs::{files, read, root};

const COMPOSE: &str = "contrib/compose/compose.yaml";
const LABORATORY: &str = "contrib/compose/laboratory.yaml";

/// Pages for those who run the service.
fn pages() -> Vec<(String, String)> {
    let mut pages = files("docs", ".md");
    pages.extend(files("contrib", ".md"));
    pages.push(("README.md".to_owned(), read("README.md")));
    pages
}

// --- variables ---

/// The words of a text that are names of variables of this service, or look like ones.
fn variables(text: &str) -> BTreeSet<&str> {
    text.split(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'))
        .filter(|word| (word.starts_with("LIVEKIT_") || word.starts_with("LK_JWT_")) && !word.ends_with('_'))
        .collect()
}

#[test]
fn every_variable_in_contrib_and_in_the_pages_exists() {
    let known: BTreeSet<_> = VARIABLES.iter().map(|variable| variable.name).collect();
    let mut texts = files("contrib", "");
    texts.extend(files("docs", ".md").into_iter().filter(|(path, _)| {
        // These two tell of names that are wrong, or no variables.
        !["docs/CHANGELOG.md", "docs/decisions.md"].contains(&path.as_str())
    }));
    let (mut count, mut wrong) = (0, Vec::new());
    for (path, text) in &texts {
        for name in variables(text) {
            count += 1;
            if !known.contains(name) {
                wrong.push(format!("{path}: {name}"));
            }
        }
    }
    assert!(count > 60, "{count} names were found");
    assert!(wrong.is_empty(), "no such variable: {wrong:#?}");
    assert_eq!(
        variables("LIVEKIT_URL=x $LIVEKIT_KEYS_ LK_JWT_PORT"),
        BTreeSet::from(["LIVEKIT_URL", "LK_JWT_PORT"])
    );
}

/// What nobody has run says so, where it would be copied from.
#[test]
fn what_was_not_run_says_so() {
    for path in [
        "contrib/proxy/traefik.yaml",
        "contrib/ess-helm/values.yaml",
        "contrib/matrix-docker-ansible-deploy/vars.yml",
        "contrib/nixos/lk-jwt-service.nix",
    ] {
        assert!(read(path).contains("NOT RUN"), "{path}");
    }
    for path in [
        "contrib/proxy/traefik.yaml",
        "contrib/ess-helm/values.yaml",
        "contrib/matrix-docker-ansible-deploy/vars.yml",
    ] {
        YamlLoader::load_from_str(&read(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    }
}

/// The image has neither.
#[test]
fn nothing_looks_at_our_health_with_wget_or_curl() {
    for (path, text) in files("contrib", "") {
        for line in text.lines().filter(|line| line.contains("8080") || line.contains("healthz")) {
            assert!(!line.contains("curl") && !line.contains("wget"), "{path}: {line}");
        }
    }
}

// --- links ---

/// The anchors of a page: its headings as GitHub writes them, and what it names itself.
fn anchors(page: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut is_code = false;
    for line in page.lines() {
        is_code ^= line.trim_start().starts_with("```");
        if let Some(heading) = line.strip_prefix('#').filter(|_| !is_code) {
            let words = heading.trim_start_matches('#').trim().to_lowercase();
            let kept = words.chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
            found.insert(kept.map(|c| if c == ' ' { '-' } else { c }).collect());
        }
        for named in line.split("<a id=\"").skip(1) {
            found.insert(named.split('"').next().unwrap_or_default().to_owned());
        }
    }
    found
}

/// The places that a page links to, but for those on the internet.
fn links(page: &str) -> Vec<&str> {
    let targets = page.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    targets
        .filter(|target| !target.contains("://") && !target.contains(char::is_whitespace))
        .collect()
}

#[test]
fn every_link_of_the_pages_leads_somewhere() {
    let anchors: BTreeMap<_, _> = pages().into_iter().map(|(path, text)| (path, anchors(&text))).collect();
    let (mut count, mut wrong) = (0, Vec::new());
    for (path, text) in pages() {
        for link in links(&text) {
            count += 1;
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() {
                path.clone()
            } else {
                within(Path::new(&path).parent().unwrap_or_else(|| Path::new("")), file)
            };
            let is_there = root().join(&target).exists()
                && (anchor.is_empty() || anchors.get(&target).is_some_and(|anchors| anchors.contains(anchor)));
            if !is_there {
                wrong.push(format!("{path}: {link}"));
            }
        }
    }
    assert!(count > 120, "{count} links were found");
    assert!(wrong.is_empty(), "these lead nowhere: {wrong:#?}");
}

/// A path of a link, from the root of the repository.
fn within(folder: &Path, link: &str) -> String {
    let mut parts: Vec<_> = folder.iter().map(|part| part.to_string_lossy().into_owned()).collect();
    for part in link.split('/') {
        match part {
            "." | "" => {}
            ".." => drop(parts.pop()),
            _ => parts.push(part.to_owned()),
        }
    }
    parts.join("/")
}

#[test]
fn links_and_anchors_are_read_as_github_does() {
    let page = "# A *b* & c\n## `doctor`\n```\n# no heading\n```\n<a id=\"x-y\"></a>[l](a.md#b) [m](https://x) [n](#doctor)";
    assert_eq!(anchors(page), ["a-b--c", "doctor", "x-y"].map(str::to_owned).into());
    assert_eq!(links(page), ["a.md#b", "#doctor"]);
    assert_eq!(within(Path::new("docs"), "../contrib/x"), "contrib/x");
}

// --- docs/troubleshooting.md ---

#[test]
fn the_page_on_troubleshooting_has_every_fault_of_doctor_and_no_other() {
    let page = read("docs/troubleshooting.md");
    let shown: Vec<_> = page
        .split("](../README.md#")
        .zip(page.split("](../README.md#").skip(1))
        .filter_map(|(before, after)| {
            let name = before.strip_suffix('`')?.rsplit('`').next()?;
            (after.split(')').next() == Some(name)).then_some(name)
        })
        .collect();
    let ids: BTreeSet<_> = fault::ALL.iter().map(|fault| fault.id).collect();
    let once: BTreeSet<_> = shown.iter().copied().collect();
    assert_eq!(once, ids, "left: the page, right: doctor");
    assert_eq!(shown.len(), once.len(), "a fault stands there twice");
}

/// The picture of the first screen is of a real run, whose words are still doctor's.
#[test]
fn the_picture_of_doctor_shows_what_doctor_says() {
    let picture = read("docs/doctor.svg").replace("&#160;", " ");
    let shown = fault::ALL.iter().find(|fault| picture.contains(&format!("README.md#{}", fault.id)));
    let shown = shown.expect("a fault that exists");
    assert!(picture.contains(shown.means), "{}", shown.means);
    assert!(picture.contains(&shown.remedy.replace('\'', "&#x27;")), "{}", shown.remedy);
    for private in ["/root/", "/home/", "/tmp/", "/var/"] {
        assert!(!picture.contains(private), "{private}");
    }
}

// --- contrib/compose ---

fn yaml(path: &str) -> Yaml {
    let mut documents = YamlLoader::load_from_str(&read(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    assert_eq!(documents.len(), 1, "{path}");
    documents.remove(0)
}

/// The pairs of a mapping; nothing where there is none.
fn pairs(yaml: &Yaml) -> Vec<(&str, &Yaml)> {
    let pairs = yaml.as_hash().into_iter().flatten();
    pairs.map(|(key, value)| (key.as_str().expect("a word"), value)).collect()
}

/// The words of a list, or the keys of a mapping.
fn words(yaml: &Yaml) -> Vec<&str> {
    match yaml.as_vec() {
        Some(list) => list.iter().filter_map(Yaml::as_str).collect(),
        None => pairs(yaml).into_iter().map(|(key, _)| key).collect(),
    }
}

/// The part of the schema that the stack keeps to; `./tests/packages` asks Compose's own loader.
#[test]
fn the_stack_of_compose_is_one() {
    const KEYS: &[&str] = &[
        "<<",
        "image",
        "build",
        "command",
        "environment",
        "configs",
        "volumes",
        "ports",
        "depends_on",
        "healthcheck",
        "restart",
        "network_mode",
        "read_only",
        "user",
        "cap_drop",
        "security_opt",
    ];
    let stack = yaml(COMPOSE);
    assert_eq!(
        words(&stack),
        ["name", "x-lk-jwt-service", "services", "volumes", "configs"],
        "the top level"
    );
    let services = pairs(&stack["services"]);
    let names: Vec<_> = services.iter().map(|(name, _)| *name).collect();
    for (name, service) in &services {
        for key in words(service) {
            assert!(KEYS.contains(&key), "{name}: {key}");
        }
        let image = service["image"]
            .as_str()
            .or_else(|| service["<<"]["image"].as_str())
            .expect("an image");
        assert!(
            image == "lk-jwt-service" || image.contains(':') && !image.ends_with(":latest"),
            "{name}: {image}"
        );
        for other in words(&service["depends_on"]) {
            assert!(names.contains(&other), "{name} depends on {other}");
        }
        for config in service["configs"].as_vec().into_iter().flatten() {
            let source = config["source"].as_str().expect("a source");
            assert!(stack["configs"][source]["content"].as_str().is_some(), "{name}: {source}");
        }
        for volume in words(&service["volumes"]) {
            let (kept, _) = volume.split_once(':').expect("a place");
            assert!(words(&stack["volumes"]).contains(&kept), "{name}: {volume}");
        }
    }
    assert_eq!(names.last(), Some(&"doctor"), "doctor is the last step");
    for config in ["synapse", "livekit"] {
        let content = stack["configs"][config]["content"].as_str().expect("text");
        YamlLoader::load_from_str(content).unwrap_or_else(|error| panic!("{config}: {error}"));
    }
}

/// What is in `${…}`, with what may follow the name.
fn expansions(text: &str) -> BTreeSet<&str> {
    let inner = text.split("${").skip(1).filter_map(|rest| rest.split('}').next());
    inner.map(|inner| inner.split([':', '-', '?']).next().unwrap_or_default()).collect()
}

#[test]
fn the_stack_of_compose_wants_three_values() {
    let example = read("contrib/compose/.env.example");
    let values: Vec<_> = example.lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(values, ["DOMAIN=", "PUBLIC_IP=", "SECRET="]);
    assert_eq!(
        expansions(&read(COMPOSE)),
        BTreeSet::from(["DOMAIN", "PUBLIC_IP", "SECRET", "CADDY_OPTIONS"])
    );
    assert!(expansions(&read(LABORATORY)).is_empty());
    for value in ["DOMAIN", "PUBLIC_IP", "SECRET"] {
        assert!(read(COMPOSE).contains(&format!("${{{value}:?")), "{value} may be left out");
    }
}

/// The routes in the stack's Caddy are those of the file for everybody's Caddy.
#[test]
fn the_proxy_of_the_stack_is_the_one_of_contrib() {
    let stack = yaml(COMPOSE);
    let whole = stack["configs"]["caddy"]["content"].as_str().expect("a Caddyfile");
    let of_the_stack = whole.split_once("livekit.${DOMAIN} {").expect("a site").1;
    let of_everybody = read("contrib/proxy/Caddyfile");
    let of_everybody = of_everybody.split_once("livekit.example.com {").expect("a site").1;
    let of_everybody = of_everybody
        .replace("127.0.0.1:8080", "lk-jwt-service:8080")
        .replace("127.0.0.1:7880", "livekit:7880");
    assert_eq!(of_the_stack.trim_end(), of_everybody.trim_end());
}
