use super::*;
use proptest::prelude::*;

const NONE: Unreadable = Unreadable("it is no record of a token");

fn text(token: &StoredToken<'_>) -> String {
    serde_json::to_string(token).unwrap()
}

#[test]
fn what_is_stored_stays_readable() {
    let token = StoredToken {
        room: "krj2dgxw2K6EOm9he4GfQJ6JsSVWfJ8a7BkyjZcSmxs".into(),
        identity: "@a:x:D<1>".into(),
        room_id: "!r:x".into(),
        user_id: "@a:x".into(),
        expires_at: 1_784_798_931_123,
        last_seen: Some(7),
        member: true,
        left: false,
    };
    assert_eq!(
        text(&token),
        r#"{"roomId":"!r:x","userId":"@a:x","expiresAt":1784798931123,"lastSeen":7,"member":true,"left":false}"#
    );
    let field = field(&token.room, &token.identity);
    assert_eq!(StoredToken::read(field.as_bytes(), text(&token).as_bytes()), Ok(token.clone()));
    let least = br#"{"userId":"@a:x","later":[1],"roomId":"!r:x","expiresAt":5}"#;
    let read = StoredToken::read(field.as_bytes(), least).unwrap();
    assert_eq!((read.expires_at, read.member, read.last_seen), (5, false, None));
}

#[test]
fn what_is_none_is_not_read() {
    let (field, value) = (r#"["r","i"]"#, r#"{"roomId":"!r:x","userId":"@a:x","expiresAt":5}"#);
    assert!(StoredToken::read(field.as_bytes(), value.as_bytes()).is_ok());
    for none in ["", "{}", "[\"r\"]", "[\"\",\"i\"]", "[1,2]", "\u{7f}"] {
        assert_eq!(StoredToken::read(none.as_bytes(), value.as_bytes()), Err(NONE), "{none}");
    }
    for none in [
        "",
        "[]",
        "{}",
        r#"{"roomId":"","userId":"@a:x","expiresAt":5}"#,
        r#"{"roomId":"!r:x","expiresAt":5}"#,
    ] {
        assert_eq!(StoredToken::read(field.as_bytes(), none.as_bytes()), Err(NONE), "{none}");
    }
    let long = " ".repeat(MAX_TOKEN_BYTES) + value;
    assert_eq!(StoredToken::read(field.as_bytes(), long.as_bytes()), Err(NONE));
}

proptest! {
    #[test]
    fn nothing_panics(field in prop::collection::vec(any::<u8>(), 0..40), value in "\\PC{0,60}|[{}\":a-zA-Z0-9,]{0,60}") {
        let _ = StoredToken::read(&field, value.as_bytes());
    }
}
