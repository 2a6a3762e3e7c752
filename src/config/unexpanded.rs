//! Values that a shell, a template or a deployment tool should have filled in and did not (decision P17).
//!
//! A message names the form only: what stands between the braces may be a secret's default.

/// Keys, secrets and tokens: any text may be one, so only a value that is nothing but a placeholder counts.
const SECRETS: [&str; 8] = [
    "LIVEKIT_KEY",
    "LIVEKIT_KEYS",
    "LIVEKIT_SECRET",
    "LIVEKIT_API_KEY",
    "LIVEKIT_API_SECRET",
    "LIVEKIT_REDIS_PASSWORD",
    "LIVEKIT_AS_TOKEN",
    "LIVEKIT_HS_TOKEN",
];

/// No value of these stops a start.
const LENIENT: [&str; 5] = [
    "LIVEKIT_LOG_LEVEL",
    "LIVEKIT_LOG_FORMAT",
    "RUST_LOG",
    "LIVEKIT_CAN_UPDATE_OWN_METADATA",
    "LIVEKIT_INSECURE_SKIP_VERIFY_TLS",
];

/// The form of a placeholder that `variable` must not hold, if `value` holds one.
pub(super) fn in_variable(variable: &str, value: &str) -> Option<&'static str> {
    if LENIENT.contains(&variable) {
        None
    } else if SECRETS.contains(&variable) {
        whole(value)
    } else if may_hold_a_password(variable) {
        let (credentials, address) = value
            .split_once("://")
            .and_then(|(_, rest)| rest.rsplit_once('@'))
            .unwrap_or(("", value));
        let (user, password) = credentials.split_once(':').unwrap_or((credentials, ""));
        inside(address).or_else(|| whole(user)).or_else(|| whole(password))
    } else {
        inside(value)
    }
}

/// An address with a secret in it that is used.
fn may_hold_a_password(variable: &str) -> bool {
    variable == "LIVEKIT_REDIS_URL" || variable.to_ascii_uppercase().ends_with("_PROXY")
}

/// A closed placeholder anywhere in an address or a list.
fn inside(text: &str) -> Option<&'static str> {
    let closed = |open: &str, close: &str| text.split_once(open).is_some_and(|(_, rest)| rest.contains(close));
    let mut braces = text.match_indices("${").map(|(at, open)| &text[at + open.len()..]);
    if closed("{{", "}}") {
        Some("{{ … }}")
    } else if braces.any(|rest| rest.starts_with(is_name_start) && rest.contains('}')) {
        Some("${…}")
    } else if closed("$(", ")") {
        Some("$(…)")
    } else {
        whole(text)
    }
}

/// A text that is a placeholder from its first to its last character, quotes aside.
pub(crate) fn whole(text: &str) -> Option<&'static str> {
    let text = unquoted(text.trim()).trim();
    let between = |open: &str, close: &str| text.strip_prefix(open).and_then(|rest| rest.strip_suffix(close));
    if between("{{", "}}").is_some() || between("${{", "}}").is_some() {
        Some("{{ … }}")
    } else if between("${", "}").is_some_and(|name| name.starts_with(is_name_start)) {
        Some("${…}")
    } else if between("$(", ")").is_some() {
        Some("$(…)")
    } else if between("<", ">").is_some_and(|name| !name.is_empty()) {
        Some("<…>")
    } else {
        None
    }
}

const fn is_name_start(c: char) -> bool {
    c.is_ascii_alphabetic() || c == '_'
}

fn unquoted(text: &str) -> &str {
    ['"', '\'']
        .into_iter()
        .find_map(|mark| text.strip_prefix(mark)?.strip_suffix(mark))
        .unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_placeholders_in_addresses_and_lists() {
        for (text, form) in [
            ("wss://${HOST}/x", "${…}"),
            ("${SERVER_NAME:-example.com}", "${…}"),
            ("a.example,${_B}", "${…}"),
            ("wss://{{ livekit_host }}", "{{ … }}"),
            ("${{ secrets.URL }}", "{{ … }}"),
            ("{{.Values.url}}", "{{ … }}"),
            ("wss://$(hostname)/", "$(…)"),
            ("<your domain>", "<…>"),
            ("\"<your domain>\"", "<…>"),
        ] {
            assert_eq!(inside(text), Some(form), "{text}");
        }
        for text in [
            "wss://livekit.example.com",
            "wss://${HOST",
            "wss://${}/",
            "wss://${1}/",
            "a}}b{{c",
            "$)x$(",
            "a<b>",
            "<>",
            "<",
            "",
        ] {
            assert_eq!(inside(text), None, "{text}");
        }
    }

    #[test]
    fn a_password_in_an_address_is_a_secret() {
        for (url, form) in [
            ("redis://:${PASSWORD}@redis", Some("${…}")),
            ("redis://<user>:x@redis", Some("<…>")),
            ("redis://:x@${HOST}", Some("${…}")),
            ("redis://${HOST}:6379", Some("${…}")),
            ("${REDIS_URL}", Some("${…}")),
            ("redis://:a${b}c@redis", None),
            ("redis://me:a$(b)@{{c}}@redis", None),
        ] {
            assert_eq!(in_variable("LIVEKIT_REDIS_URL", url), form, "{url}");
        }
        assert_eq!(in_variable("https_proxy", "http://me:a$(b)@proxy"), None);
        assert!(in_variable("HTTPS_PROXY", "http://$(proxy)").is_some());
    }

    #[test]
    fn a_secret_may_hold_anything_but_be_no_placeholder() {
        for text in [
            "${SECRET}",
            "'${SECRET}'",
            "{{ secret }}",
            "${{ secrets.S }}",
            "$(cat x)",
            "<secret>",
            " <secret>\n",
        ] {
            assert!(whole(text).is_some(), "{text}");
        }
        for text in [
            "a${SECRET}",
            "${SECRET}b",
            "<a>b",
            "x$(y)",
            "{{a}}b",
            "$SECRET",
            "<",
            "${}",
            "$2y$10${x",
        ] {
            assert_eq!(whole(text), None, "{text}");
        }
    }
}
