//! LiveKit's signalling as far as it is needed: fields of protobuf messages by their numbers. The types of all its messages would be a
//! tenth of the program. Pure.

use prost::encoding::{bytes, decode_varint, string};

/// Field `number` of a message that holds a message, the last one where there are several; `None` too where this is no protobuf.
pub(super) fn field(mut message: &[u8], number: u64) -> Option<&[u8]> {
    let mut found = None;
    while !message.is_empty() {
        let key = decode_varint(&mut message).ok()?;
        let length = match key & 7 {
            0 => decode_varint(&mut message).ok().map(|_| 0)?,
            1 => 8,
            2 => usize::try_from(decode_varint(&mut message).ok()?).ok()?,
            5 => 4,
            _ => return None,
        };
        let value = message.split_off(..length)?;
        if key == number << 3 | 2 {
            found = Some(value);
        }
    }
    found
}

/// Field `number` of a message that holds text.
pub(super) fn text(message: &[u8], number: u64) -> Option<&str> {
    str::from_utf8(field(message, number)?).ok()
}

/// `SignalRequest` with an answer to an offer.
pub(super) fn answer_request(sdp: String) -> Vec<u8> {
    let (mut description, mut request) = (Vec::new(), Vec::new());
    string::encode(1, &"answer".to_owned(), &mut description);
    string::encode(2, &sdp, &mut description);
    bytes::encode(2, &description, &mut request);
    request
}

#[cfg(test)]
mod tests {
    use super::*;
    use livekit_protocol::signal_request::Message as Request;
    use livekit_protocol::signal_response::Message as Response;
    use livekit_protocol::{JoinResponse, ServerInfo, SessionDescription, SignalRequest, SignalResponse, TrickleRequest};
    use prost::Message as _;

    fn sent(message: Response) -> Vec<u8> {
        SignalResponse { message: Some(message) }.encode_to_vec()
    }

    #[test]
    fn fields_are_those_of_livekit() {
        let server_info = Some(ServerInfo {
            version: "1.9.0".into(),
            protocol: 16,
            ..Default::default()
        });
        let join = sent(Response::Join(JoinResponse {
            ping_timeout: 15,
            server_info,
            ..Default::default()
        }));
        let version = field(&join, 1).and_then(|join| text(field(join, 12)?, 2));
        assert_eq!((version, field(&join, 3)), (Some("1.9.0"), None));
        let offer = sent(Response::Offer(SessionDescription {
            r#type: "offer".into(),
            sdp: "v=0".into(),
            ..Default::default()
        }));
        assert_eq!(field(&offer, 3).and_then(|offer| text(offer, 2)), Some("v=0"));
        let trickle = sent(Response::Trickle(TrickleRequest {
            candidate_init: "{}".into(),
            ..Default::default()
        }));
        assert_eq!(field(&trickle, 4).and_then(|trickle| text(trickle, 1)), Some("{}"));
        let request = SignalRequest::decode(answer_request("v=0".into()).as_slice()).unwrap();
        let Some(Request::Answer(answer)) = request.message else { panic!() };
        assert_eq!((answer.r#type.as_str(), answer.sdp.as_str()), ("answer", "v=0"));
    }

    #[test]
    fn what_is_no_message_has_no_fields() {
        for broken in [
            &b"\x0a\x05ab"[..],
            b"\x0a",
            b"\x0b",
            b"\x08",
            b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        ] {
            assert_eq!(field(broken, 1), None, "{broken:?}");
        }
        // The last one counts, and others are passed over.
        assert_eq!(field(b"\x0a\x01a\x10\x96\x01\x1d1234\x0a\x01b", 1), Some(&b"b"[..]));
        assert_eq!(text(b"\x0a\x01\xff", 1), None);
    }
}
