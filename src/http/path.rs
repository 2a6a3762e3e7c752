//! Paths as clients and proxies write them (decision H1), in one spelling.

/// Paths that are served in this spelling only (decision H1), so that a proxy which blocks it blocks the route.
const EXACT: [&str; 1] = ["/metrics"];

/// The path in its one spelling and without the prefix (decision H1), where it differs.
pub(super) fn normalise(path: &str, prefix: Option<&str>) -> Option<String> {
    let respelled = respelled(path);
    let clean = respelled.as_deref().unwrap_or(path);
    let clean = match prefix.and_then(|prefix| clean.strip_prefix(prefix)) {
        Some("") => "/",
        Some(rest) if rest.starts_with('/') => rest,
        Some(_) | None => clean,
    };
    (clean != path && !EXACT.contains(&clean)).then(|| clean.to_owned())
}

/// A path without dot segments, doubled and trailing slashes, and without percent-encoding where none is needed (RFC 3986, 6.2.2).
/// `None` where there is nothing of the kind, or something broken.
fn respelled(path: &str) -> Option<String> {
    let is_plain = !path.contains('%') && !path.contains("//") && !path.contains("/.") && (path == "/" || !path.ends_with('/'));
    if is_plain || !path.starts_with('/') {
        return None;
    }
    let mut out = String::with_capacity(path.len());
    for segment in path.split('/') {
        let begin = out.len();
        out.push('/');
        push_decoded(&mut out, segment)?;
        match &out[begin..] {
            "/" | "/." => out.truncate(begin),
            "/.." => {
                out.truncate(begin);
                out.truncate(out.rfind('/').unwrap_or(0));
            }
            _ => {}
        }
    }
    if out.is_empty() {
        out.push('/');
    }
    Some(out)
}

/// Decodes letters, digits and `-._~`; whatever else is encoded means something else than the character itself. `None` where an
/// encoding is broken.
fn push_decoded(out: &mut String, segment: &str) -> Option<()> {
    let mut parts = segment.split('%');
    out.extend(parts.next());
    for part in parts {
        let (hex, rest) = part.split_at_checked(2)?;
        let byte = u8::from_str_radix(hex, 16).ok().filter(|_| !hex.starts_with('+'))?;
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(byte.into());
            out.push_str(rest);
        } else {
            out.push('%');
            out.push_str(part);
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_found_as_proxies_leave_them() {
        let clean = |path| normalise(path, Some("/livekit/jwt")).unwrap_or_else(|| path.to_owned());
        for (path, expected) in [
            ("/get_token", "/get_token"),
            ("/get_token/", "/get_token"),
            ("//get_token//", "/get_token"),
            ("/livekit/jwt/sfu/get", "/sfu/get"),
            ("/livekit//jwt///sfu/get/", "/sfu/get"),
            ("/livekit/jwt", "/"),
            ("/livekit/jwt/", "/"),
            ("/livekit/jwtx/get_token", "/livekit/jwtx/get_token"),
            ("/", "/"),
            ("//", "/"),
            ("/x/livekit/jwt/get_token", "/x/livekit/jwt/get_token"),
            ("/get%5Ftoken", "/get_token"),
            ("/%67et%5ftoken", "/get_token"),
            ("/./get_token", "/get_token"),
            ("/a/../get_token/.", "/get_token"),
            ("/a/b/%2E%2e/.%2e/get_token", "/get_token"),
            ("/../../get_token", "/get_token"),
            ("/get_token/x/..", "/get_token"),
            ("/a//../get_token", "/get_token"),
            ("/%6civekit/x/../jwt/get%5ftoken", "/get_token"),
            ("/livekit/jwt/../get_token", "/livekit/get_token"),
            ("/..", "/"),
            ("/...", "/..."),
            ("/.well-known/x", "/.well-known/x"),
            // Other characters, and encodings of encodings, are not the same.
            ("/sfu%2Fget", "/sfu%2Fget"),
            ("/get%255Ftoken", "/get%255Ftoken"),
            ("/a%40%c3%A4/%7Ealice", "/a%40%c3%A4/~alice"),
            // Broken: nobody's.
            ("/get_token%", "/get_token%"),
            ("/get_token/%5", "/get_token/%5"),
            ("/%zz/../get_token", "/%zz/../get_token"),
            ("/%+5/../get_token", "/%+5/../get_token"),
            ("/%\u{e4}/../get_token", "/%\u{e4}/../get_token"),
            ("/%5\u{e4}/../get_token", "/%5\u{e4}/../get_token"),
            ("*", "*"),
            ("", ""),
            // Never in another spelling.
            ("/metrics", "/metrics"),
            ("/metrics/", "/metrics/"),
            ("//metrics", "//metrics"),
            ("/%6detrics", "/%6detrics"),
            ("/x/../metrics", "/x/../metrics"),
            ("/livekit/jwt/metrics", "/livekit/jwt/metrics"),
        ] {
            assert_eq!(clean(path), expected, "{path}");
        }
        assert_eq!(normalise("/livekit/jwt/get_token", None), None);
    }
}
