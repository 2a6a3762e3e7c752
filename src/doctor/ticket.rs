//! Tickets of `doctor`: proof that whoever asks has the secret that signs, or was sent a link by somebody who has. A JWT under a key
//! that is derived from that secret, so that it opens nothing on the SFU, and a token of the SFU opens nothing here. What may be asked
//! stands in its claims and nowhere else. Pure.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::{hkdf, hmac};
use serde_json::Value;

use super::check::Group;
use super::{json_of, texts};
use crate::secret::Secret;

/// Life of a ticket in seconds.
pub(super) const LIFE_SECONDS: u64 = 60;
/// Longest life of a ticket in a link, in seconds.
pub(super) const MAX_LINK_SECONDS: u64 = 4 * 60 * 60;
/// How far the clock of whoever asks may be ahead, in seconds: it is mostly the same one.
const LEEWAY_SECONDS: u64 = 60;
/// Longest ticket in bytes: options hold at most 20 server names and a token.
const MAX_TICKET_BYTES: usize = 12 * 1024;
/// Most homeservers in one run.
pub(super) const MAX_SERVERS: usize = 20;

/// Labels of the derived keys: one for the command, one for links that users get, so that a ticket for one is none for the other.
const OF_DOCTOR: &[u8] = b"lk-jwt-service doctor 1";
const OF_LINKS: &[u8] = b"lk-jwt-service check 1";
/// Header of each ticket, `{"alg":"HS256","typ":"JWT"}`, letter by letter: no other algorithm is ever read.
const HEADER: &str = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9";
/// Audience of a ticket that starts a run.
const RUN: &str = "lk-jwt-service/doctor";
/// Audience of a ticket that asks who answers.
const WHO: &str = "lk-jwt-service/doctor/who";
/// Audience of a ticket that asks for a slow answer.
const SLOW: &str = "lk-jwt-service/doctor/slow";
/// Audience of a ticket in a link to the page.
const LINK: &str = "lk-jwt-service/check";

/// Use of a ticket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Starts a run.
    Run,
    /// Asks which instance answers a public route.
    Who,
    /// Asks a public route for an answer that takes long.
    Slow,
    /// Tries media from the page of a user.
    Link,
}

impl Use {
    const fn audience(self) -> &'static str {
        match self {
            Self::Run => RUN,
            Self::Who => WHO,
            Self::Slow => SLOW,
            Self::Link => LINK,
        }
    }

    const fn max_life(self) -> u64 {
        match self {
            Self::Run | Self::Who | Self::Slow => LIFE_SECONDS,
            Self::Link => MAX_LINK_SECONDS,
        }
    }
}

/// Wishes of whoever asks: which checks, about whom.
#[derive(Default)]
pub struct Wishes {
    /// Groups to check; all without one.
    pub only: Vec<Group>,
    /// Whether to wait for a slow answer.
    pub slow: bool,
    /// Homeservers to check instead of those of the configuration.
    pub servers: Vec<String>,
    /// Access token of a user whose call is tried.
    pub user_token: Option<String>,
    /// Matrix room of that call.
    pub room: Option<String>,
}

impl Wishes {
    /// Whether this group is to be checked.
    #[must_use]
    pub fn wants(&self, group: Group) -> bool {
        self.only.is_empty() || self.only.contains(&group)
    }

    /// Writes wishes as they stand in a ticket.
    fn write(&self) -> Value {
        let mut value = texts(&[]);
        if self.slow {
            value["slow"] = true.into();
        }
        for (name, text) in [("user_token", &self.user_token), ("room", &self.room)] {
            if let Some(text) = text {
                value[name] = text.as_str().into();
            }
        }
        let only: Vec<_> = self.only.iter().map(|group| group.word()).collect();
        let servers: Vec<_> = self.servers.iter().map(String::as_str).collect();
        for (name, list) in [("only", only), ("servers", servers)] {
            if !list.is_empty() {
                value[name] = list.into();
            }
        }
        value
    }

    /// Reads wishes as they stand in a ticket. What is missing is not wished for.
    fn read(value: &Value) -> Option<Self> {
        let text = |name: &str| value.get(name).and_then(Value::as_str).map(str::to_owned);
        let texts = |name: &str| value.get(name).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        Some(Self {
            only: texts("only")
                .iter()
                .map(|word| Group::named(word.as_str()?))
                .collect::<Option<_>>()?,
            slow: value.get("slow").and_then(Value::as_bool).unwrap_or_default(),
            servers: texts("servers")
                .iter()
                .map(|name| Some(name.as_str()?.to_owned()))
                .collect::<Option<_>>()?,
            user_token: text("user_token"),
            room: text("room"),
        })
    }
}

/// Claims of a ticket.
pub struct Claims {
    exp: u64,
    /// Name of the ticket, which is used once.
    pub jti: String,
    /// Wishes of whoever asks.
    pub wishes: Wishes,
}

impl Claims {
    /// When the ticket ends, in seconds since 1970.
    #[must_use]
    pub const fn ends(&self) -> u64 {
        self.exp
    }
}

/// Key that signs tickets, derived from the secret that signs tokens.
pub struct TicketKey(hmac::Key);

impl TicketKey {
    /// Derives the key of the command (RFC 5869) from the signing secret.
    #[must_use]
    pub fn derive(secret: &Secret) -> Self {
        Self::labelled(secret, OF_DOCTOR)
    }

    /// Derives the key of links from the signing secret.
    #[must_use]
    pub fn of_links(secret: &Secret) -> Self {
        Self::labelled(secret, OF_LINKS)
    }

    fn labelled(secret: &Secret, label: &[u8]) -> Self {
        let mut bytes = [0; 32];
        let derived = hkdf::Salt::new(hkdf::HKDF_SHA256, &[]).extract(secret.expose().as_bytes());
        // 32 bytes are one block of SHA-256, and always to be had.
        let filled = derived.expand(&[label], hkdf::HKDF_SHA256).and_then(|key| key.fill(&mut bytes));
        debug_assert!(filled.is_ok(), "one block of the hash can always be had");
        Self(hmac::Key::new(hmac::HMAC_SHA256, &bytes))
    }

    /// Signs a ticket at `now`, in seconds since 1970; `jti` is its name.
    #[must_use]
    pub fn sign(&self, purpose: Use, jti: &str, wishes: &Wishes, now: u64) -> String {
        self.sign_for(purpose, jti, wishes, now, LIFE_SECONDS)
    }

    /// Signs the ticket of a link, which lives for so many seconds from `now` on; `jti` is its name.
    #[must_use]
    pub fn sign_link(&self, jti: &str, now: u64, seconds: u64) -> String {
        self.sign_for(Use::Link, jti, &Wishes::default(), now, seconds)
    }

    fn sign_for(&self, purpose: Use, jti: &str, wishes: &Wishes, now: u64, seconds: u64) -> String {
        let mut claims = texts(&[("aud", purpose.audience()), ("jti", jti)]);
        claims["iat"] = now.into();
        claims["exp"] = (now + seconds).into();
        claims["wishes"] = wishes.write();
        let payload = claims.to_string();
        let signed = format!("{HEADER}.{}", URL_SAFE_NO_PAD.encode(payload.as_bytes()));
        let signature = hmac::sign(&self.0, signed.as_bytes());
        signed + "." + &URL_SAFE_NO_PAD.encode(signature.as_ref())
    }

    /// Claims of `ticket`, if it is one for `purpose` and valid at `now`.
    #[must_use]
    pub fn verify(&self, ticket: &str, purpose: Use, now: u64) -> Option<Claims> {
        if ticket.len() > MAX_TICKET_BYTES {
            return None;
        }
        let (signed, signature) = ticket.rsplit_once('.')?;
        let (header, payload) = signed.split_once('.')?;
        // No other spelling is ever read, `none` included.
        if header != HEADER {
            return None;
        }
        let signature = URL_SAFE_NO_PAD.decode(signature).ok()?;
        hmac::verify(&self.0, signed.as_bytes(), &signature).ok()?;
        let claims = json_of(&URL_SAFE_NO_PAD.decode(payload).ok()?);
        let text = |name: &str| claims.get(name).and_then(Value::as_str);
        let number = |name: &str| claims.get(name).and_then(Value::as_u64);
        let (iat, exp, jti) = (number("iat")?, number("exp")?, text("jti")?);
        let wishes = claims.get("wishes").map_or_else(|| Some(Wishes::default()), Wishes::read)?;
        let is_now = iat <= now + LEEWAY_SECONDS && now < exp && exp <= iat.checked_add(purpose.max_life())?;
        let is_short = wishes.servers.len() <= MAX_SERVERS && (16..=64).contains(&jti.len());
        (text("aud") == Some(purpose.audience()) && is_now && is_short).then(|| Claims {
            exp,
            jti: jti.to_owned(),
            wishes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const NOW: u64 = 1_700_000_000;
    const JTI: &str = "0123456789abcdef";

    fn key(secret: &str) -> TicketKey {
        TicketKey::derive(&Secret::new(secret))
    }

    #[test]
    fn a_ticket_says_what_was_wished_for() {
        let wishes = Wishes {
            only: vec![Group::AppService],
            slow: true,
            servers: vec!["example.com".into()],
            user_token: Some("token".into()),
            room: Some("!room".into()),
        };
        let ticket = key("a").sign(Use::Run, JTI, &wishes, NOW);
        let claims = key("a").verify(&ticket, Use::Run, NOW + 59).unwrap();
        assert_eq!((claims.jti.as_str(), claims.ends()), (JTI, NOW + 60));
        assert!(claims.wishes.slow && claims.wishes.wants(Group::AppService) && !claims.wishes.wants(Group::Sfu));
        assert_eq!(claims.wishes.servers, ["example.com"]);
        assert!(Wishes::default().wants(Group::Sfu));
    }

    #[test]
    fn a_link_is_a_ticket_of_its_own() {
        let links = TicketKey::of_links(&Secret::new("a"));
        let link = links.sign_link(JTI, NOW, MAX_LINK_SECONDS);
        let claims = links.verify(&link, Use::Link, NOW + MAX_LINK_SECONDS - 1).unwrap();
        assert_eq!((claims.jti.as_str(), claims.ends()), (JTI, NOW + MAX_LINK_SECONDS));
        assert!(links.verify(&link, Use::Link, NOW + MAX_LINK_SECONDS).is_none(), "over");
        assert!(links.verify(&link, Use::Run, NOW).is_none(), "for a run");
        assert!(key("a").verify(&link, Use::Link, NOW).is_none(), "under the command's key");
        let longer = links.sign_link(JTI, NOW, MAX_LINK_SECONDS + 1);
        assert!(links.verify(&longer, Use::Link, NOW).is_none(), "longer than may be");
        let run = key("a").sign(Use::Link, JTI, &Wishes::default(), NOW);
        assert!(links.verify(&run, Use::Link, NOW).is_none(), "signed with the command's key");
        assert!(links.verify(&link[..link.len() - 1], Use::Link, NOW).is_none(), "cut");
    }

    #[test]
    fn nothing_else_is_a_ticket() {
        let ours = key("a");
        let ticket = ours.sign(Use::Run, JTI, &Wishes::default(), NOW);
        assert!(ours.verify(&ticket, Use::Run, NOW).is_some());
        for (now, why) in [(NOW + 60, "old"), (NOW - 61, "of the future")] {
            assert!(ours.verify(&ticket, Use::Run, now).is_none(), "{why}");
        }
        assert!(ours.verify(&ticket, Use::Who, NOW).is_none(), "for something else");
        assert!(key("b").verify(&ticket, Use::Run, NOW).is_none(), "another secret");
        let claims = |change: Value| {
            let mut claims = json!({"aud": RUN, "iat": NOW, "exp": NOW + 60, "jti": JTI});
            claims.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            claims
        };
        const OURS: &str = r#"{"alg":"HS256","typ":"JWT"}"#;
        let sign = |header: &str, claims: &Value, key: &hmac::Key| {
            let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims.to_string()));
            let signature = hmac::sign(key, signed.as_bytes());
            format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
        };
        assert!(ours.verify(&sign(OURS, &claims(json!({})), &ours.0), Use::Run, NOW).is_some());
        for change in [
            json!({"exp": NOW + 3600}),
            json!({"iat": NOW - 3600}),
            json!({"jti": "short"}),
            json!({"jti": "x".repeat(65)}),
            json!({"aud": "lk-jwt-service"}),
            json!({"wishes": {"servers": vec!["x"; MAX_SERVERS + 1]}}),
            json!({"wishes": {"only": ["everything"]}}),
            json!({"exp": "soon"}),
        ] {
            let forged = sign(OURS, &claims(change.clone()), &ours.0);
            assert!(ours.verify(&forged, Use::Run, NOW).is_none(), "{change}");
        }
        // The signing secret itself is not the key, nor is another algorithm ever read.
        let itself = hmac::Key::new(hmac::HMAC_SHA256, b"a");
        assert!(ours.verify(&sign(OURS, &claims(json!({})), &itself), Use::Run, NOW).is_none());
        for header in [
            r#"{"alg":"none"}"#,
            r#"{"alg":"HS512","typ":"JWT"}"#,
            r#"{"typ":"JWT","alg":"HS256"}"#,
        ] {
            assert!(
                ours.verify(&sign(header, &claims(json!({})), &ours.0), Use::Run, NOW).is_none(),
                "{header}"
            );
        }
        let unsigned = ticket.rsplit_once('.').unwrap().0;
        for broken in ["", ".", "..", "a.b.c", unsigned, &format!("{unsigned}."), &"x".repeat(20_000)] {
            assert!(ours.verify(broken, Use::Run, NOW).is_none(), "{broken:.40}");
        }
    }
}
