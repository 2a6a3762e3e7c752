//! Whatever a homeserver answers, and whatever a delayed event is called. `tests/fuzz` tries a million of each.

use http::StatusCode;
use proptest::prelude::*;
use url::Url;

use super::*;
use crate::homeserver::versions::Offers;

fn almost_a_hint() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40),
        "[-+]?[0-9]{0,40}(\\.[0-9]{0,5})?([eE][-+]?[0-9]{1,4})?".prop_map(String::into_bytes),
        "(Mon|Sun|Xyz), [0-9]{1,3} (Nov|Feb|Abc) [0-9]{1,9} [0-9]{2}:[0-9]{2}:[0-9]{2} (GMT|UTC)".prop_map(String::into_bytes),
        "[ \\t]{0,3}[0-9]{1,3}[ \\t]{0,3}".prop_map(String::into_bytes),
    ]
}

fn almost_an_error() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..60),
        "[-+]?[0-9]{0,40}(\\.[0-9]{0,5})?([eE][-+]?[0-9]{1,4})?|null|\"5\"|\\[\\]"
            .prop_map(|number| format!("{{\"errcode\":\"M_LIMIT_EXCEEDED\",\"retry_after_ms\":{number}}}").into_bytes()),
        (0..3_000usize).prop_map(|deep| b"{\"retry_after_ms\":".repeat(deep)),
    ]
}

proptest! {
    #[test]
    fn any_retry_after_is_a_hint_or_none(value in prop::option::of(almost_a_hint()), body in almost_an_error(), now in 0u64..4_000_000_000) {
        let mut headers = HeaderMap::new();
        if let Some(value) = value.as_deref().and_then(|value| http::HeaderValue::from_bytes(value).ok()) {
            headers.insert(header::RETRY_AFTER, value);
        }
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(now);
        let hint = retry_after(&headers, &body, now);
        let plain = value.as_deref().and_then(|value| std::str::from_utf8(value).ok()).and_then(|text| text.parse::<u32>().ok());
        if let Some(seconds) = plain {
            prop_assert_eq!(hint, Some(Duration::from_secs(seconds.into())));
        }
        for status in [200, 404, 409, 401, 403, 429, 500] {
            let status = StatusCode::from_u16(status).expect("a status");
            let _ = read(&Reply { status, headers: headers.clone(), body: body.clone().into(), took: Duration::ZERO });
        }
    }

    #[test]
    fn any_id_is_one_segment(id in "\\PC{1,40}|[./%?#\\\\a]{1,12}|.{1,20}") {
        let tail = tail(&id, DelayedEventAction::Send, None);
        let segment = tail.strip_suffix("/send").expect("an action");
        prop_assert!(segment.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.~%".contains(&b)));
        let url = Url::parse("https://example.org/a/b/").and_then(|base| base.join(&tail)).expect("a URL");
        if id != "." && id != ".." {
            prop_assert_eq!(url.path(), format!("/a/b/{segment}/send"));
            let back: Vec<u8> = percent_decoded(segment);
            prop_assert_eq!(back, id.as_bytes());
        }
    }

    #[test]
    fn any_versions_answer_leaves_a_path(body in almost_an_error()) {
        prop_assert_eq!(Offers::read(&body).delayed_events.order(PATHS, false).len(), 2);
    }
}

fn percent_decoded(segment: &str) -> Vec<u8> {
    let mut bytes = segment.bytes();
    let mut out = Vec::new();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let hex = [bytes.next(), bytes.next()].map(|digit| digit.and_then(|digit| char::from(digit).to_digit(16)));
            out.push(hex.iter().fold(0, |sum, digit| sum * 16 + digit.expect("hexadecimal") as u8));
        } else {
            out.push(byte);
        }
    }
    out
}
