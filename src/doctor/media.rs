//! Words of the SFU about media, and a question to it by UDP: the candidates of its offer (RFC 8839), an answer to the offer,
//! and one connectivity check (STUN, RFC 8489 and RFC 8445). Pure.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use ring::hmac;

/// A place at which the SFU takes media.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Candidate {
    /// Whether it is for TCP; for UDP else.
    pub is_tcp: bool,
    /// Address and port of it.
    pub address: SocketAddr,
}

/// Names and passwords under which the SFU takes connectivity checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ice {
    /// Name of the SFU's side.
    pub ufrag: String,
    /// Password of the SFU's side.
    pub password: String,
}

impl Candidate {
    /// Reads a candidate of the kind `host` or `srflx`; relayed ones belong to somebody else.
    #[must_use]
    pub(super) fn parse(text: &str) -> Option<Self> {
        let text = text.trim().trim_start_matches("a=").strip_prefix("candidate:")?;
        let words: Vec<_> = text.split_ascii_whitespace().collect();
        let [_, _, transport, _, ip, port, "typ", kind, ..] = words[..] else {
            return None;
        };
        let is_tcp = transport.eq_ignore_ascii_case("tcp");
        let ip: IpAddr = ip.parse().ok()?;
        let is_usable = (is_tcp || transport.eq_ignore_ascii_case("udp")) && matches!(kind, "host" | "srflx");
        is_usable.then_some(Self {
            is_tcp,
            address: SocketAddr::new(ip, port.parse().ok()?),
        })
    }
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", if self.is_tcp { "tcp" } else { "udp" }, self.address)
    }
}

impl Ice {
    /// Reads them from the SFU's offer.
    #[must_use]
    pub(super) fn parse(sdp: &str) -> Option<Self> {
        let value = |name: &str| sdp.lines().find_map(|line| line.trim().strip_prefix(name)).map(str::to_owned);
        Some(Self {
            ufrag: value("a=ice-ufrag:")?,
            password: value("a=ice-pwd:")?,
        })
    }
}

/// All candidates in an offer.
pub(super) fn candidates(sdp: &str) -> impl Iterator<Item = Candidate> {
    sdp.lines().filter_map(Candidate::parse)
}

/// Answers an offer of one data channel under our name and password, so that connectivity checks are taken. No media ever comes of it:
/// the fingerprint is nobody's.
#[must_use]
pub(super) fn answer(ufrag: &str, password: &str) -> String {
    let fingerprint = vec!["00"; 32].join(":");
    format!(
        "v=0\r\no=- 1 1 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\na=group:BUNDLE 0\r\nm=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\n\
         c=IN IP4 0.0.0.0\r\na=setup:active\r\na=mid:0\r\na=sendrecv\r\na=sctp-port:5000\r\na=max-message-size:65535\r\n\
         a=ice-ufrag:{ufrag}\r\na=ice-pwd:{password}\r\na=fingerprint:sha-256 {fingerprint}\r\n"
    )
}

const MAGIC: [u8; 4] = [0x21, 0x12, 0xa4, 0x42];
const HEADER: usize = 20;

/// Asks as the peer called `ufrag` whether the SFU is there, in the transaction `id`.
#[must_use]
pub(super) fn binding_request(ice: &Ice, ufrag: &str, id: [u8; 12]) -> Vec<u8> {
    let mut message = vec![0x00, 0x01, 0, 0];
    message.extend(MAGIC);
    message.extend(id);
    // USERNAME, PRIORITY, ICE-CONTROLLED.
    attribute(&mut message, 0x0006, format!("{}:{ufrag}", ice.ufrag).as_bytes());
    attribute(&mut message, 0x0024, &0x7eff_ffff_u32.to_be_bytes());
    attribute(&mut message, 0x8029, &id[..8]);
    // MESSAGE-INTEGRITY is over the message as if it ended with it, FINGERPRINT likewise.
    length(&mut message, 24);
    let key = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, ice.password.as_bytes());
    let integrity = hmac::sign(&key, &message);
    attribute(&mut message, 0x0008, integrity.as_ref());
    length(&mut message, 8);
    let fingerprint = crc32(&message) ^ 0x5354_554e;
    attribute(&mut message, 0x8028, &fingerprint.to_be_bytes());
    message
}

/// Whether `message` is an answer in the transaction `id`: a yes, or a no of whoever speaks STUN there.
#[must_use]
pub(super) fn is_answer(message: &[u8], id: [u8; 12]) -> bool {
    message.len() >= HEADER && matches!(message[..2], [0x01, 0x01 | 0x11]) && message[4..8] == MAGIC && message[8..HEADER] == id
}

fn attribute(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    message.extend(kind.to_be_bytes());
    message.extend(u16::try_from(value.len()).unwrap_or_default().to_be_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
    length(message, 0);
}

/// Writes the length of the message, with so many bytes that are still to come.
fn length(message: &mut [u8], more: usize) {
    let length = u16::try_from(message.len() - HEADER + more).unwrap_or_default();
    message[2..4].copy_from_slice(&length.to_be_bytes());
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 }
        })
    };
    !bytes.iter().fold(u32::MAX, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_read() {
        let udp = "candidate:1822363234 1 udp 2130706431 10.9.8.7 27882 typ host ufrag CDhZ";
        let tcp = "a=candidate:3513548674 1 TCP 1671430143 2a00::1 27881 typ host tcptype passive";
        assert_eq!(
            Candidate::parse(udp),
            Some(Candidate {
                is_tcp: false,
                address: "10.9.8.7:27882".parse().unwrap()
            })
        );
        assert_eq!(candidates(&format!("v=0\r\n{tcp}\r\n")).count(), 1);
        for none in [
            "",
            "candidate:",
            "candidate:1 1 udp 1 example.local 9 typ host",
            "candidate:1 1 udp 1 10.0.0.1 9 typ relay raddr 0.0.0.0 rport 9",
            "candidate:1 1 udp 1 10.0.0.1 99999 typ host",
        ] {
            assert_eq!(Candidate::parse(none), None, "{none}");
        }
        let ice = Ice::parse("v=0\r\na=ice-ufrag:abc\r\na=ice-pwd:def\r\n").unwrap();
        assert_eq!((ice.ufrag.as_str(), ice.password.as_str()), ("abc", "def"));
        assert_eq!(Ice::parse("v=0\r\n"), None);
    }

    /// The request of RFC 5769, 2.1 has other attributes; its CRC and HMAC are checked by the rules that they follow.
    #[test]
    fn a_question_is_well_formed() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        let ice = Ice {
            ufrag: "srv".into(),
            password: "VOkJxbRl1RmTxUk/WvJxBt".into(),
        };
        let id = *b"0123456789ab";
        let message = binding_request(&ice, "us", id);
        assert_eq!(usize::from(u16::from_be_bytes([message[2], message[3]])) + HEADER, message.len());
        assert_eq!(message.len() % 4, 0);
        let (rest, fingerprint) = message.split_at(message.len() - 4);
        let crc = u32::from_be_bytes(fingerprint.try_into().unwrap()) ^ 0x5354_554e;
        assert_eq!(crc, crc32(&rest[..rest.len() - 4]));
        assert!(!is_answer(&message, id), "a question is no answer");
        for (kind, is) in [([0x01, 0x01], true), ([0x01, 0x11], true), ([0x00, 0x11], false)] {
            let answer = [&kind[..], &[0, 0], &MAGIC, &id].concat();
            assert_eq!(is_answer(&answer, id), is);
        }
        assert!(!is_answer(b"HTTP/1.1 400 Bad", id) && !is_answer(b"", id));
    }
}
