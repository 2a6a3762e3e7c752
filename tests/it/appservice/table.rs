//! A table of errors, and the check that a service follows it: each row alone, and before every later row.

use super::{Ask, Done, Stage};

/// One row: what is wrong, and what follows.
pub(super) struct Row {
    pub(super) what: &'static str,
    pub(super) fault: fn(&Stage, &mut Ask),
    pub(super) answer: (u16, &'static str),
    /// A part of the text, where another row has the same code.
    pub(super) says: &'static str,
    /// What had been asked of neighbours until then.
    pub(super) done: Done,
}

impl Row {
    pub(super) const fn new(what: &'static str, fault: fn(&Stage, &mut Ask), status: u16, errcode: &'static str) -> Self {
        Self {
            what,
            fault,
            answer: (status, errcode),
            says: "",
            done: Done::NOTHING,
        }
    }

    pub(super) const fn says(mut self, text: &'static str) -> Self {
        self.says = text;
        self
    }

    pub(super) const fn after(mut self, done: Done) -> Self {
        self.done = done;
        self
    }
}

/// Rows are in the order in which they are checked; a request with two faults answers the earlier one.
#[track_caller]
pub(super) fn check(stage: &Stage, good: fn(&Stage) -> Ask, rows: &[Row]) {
    let answer = stage.call(&good(stage));
    assert_eq!(answer.status, 200, "without a fault: {}", answer.text());
    for (at, row) in rows.iter().enumerate() {
        refused(stage, good(stage), row, None);
        for later in &rows[at + 1..] {
            refused(stage, good(stage), row, Some(later));
        }
    }
    assert_eq!(stage.sfu.complaints(), [""; 0]);
}

/// Fails unless the request is answered as this row says, a later fault or none beside it.
#[track_caller]
pub(super) fn refused(stage: &Stage, mut ask: Ask, row: &Row, later: Option<&Row>) {
    stage.sfu.fail(None);
    stage.own.unscript();
    if let Some(later) = later {
        (later.fault)(stage, &mut ask);
    }
    (row.fault)(stage, &mut ask);
    let what = format!("{}, {}", row.what, later.map_or("alone", |later| later.what));
    let before = stage.done();
    let answer = stage.call(&ask);
    let seen = (answer.status, answer.field("errcode"));
    assert_eq!(seen, (row.answer.0, row.answer.1.to_owned()), "{what}: {}", answer.text());
    assert!(answer.field("error").contains(row.says), "{what}: {}", answer.text());
    answer.assert_errcode(row.answer.0, row.answer.1);
    if answer.status == 405 {
        assert_eq!(answer.header("allow"), Some("POST"), "{what}");
    }
    assert_eq!(stage.done() - before, row.done, "{what}: what was asked of neighbours");
}

/// The rows that all endpoints have in common.
pub(super) fn common() -> Vec<Row> {
    type Authorization = (&'static str, fn(&Stage, &mut Ask), &'static str);
    let authorization: [Authorization; 7] = [
        ("no token", |_, ask| ask.authorization = None, "M_MISSING_TOKEN"),
        (
            "an empty token",
            |_, ask| ask.authorization = Some("Bearer ".into()),
            "M_MISSING_TOKEN",
        ),
        (
            "another scheme",
            |stage, ask| ask.authorization = Some(format!("Basic {}", stage.own.hs_token)),
            "M_MISSING_TOKEN",
        ),
        (
            "no scheme",
            |stage, ask| ask.authorization = Some(stage.own.hs_token.clone()),
            "M_MISSING_TOKEN",
        ),
        (
            "a wrong token",
            |_, ask| ask.authorization = Some("Bearer nope".into()),
            "M_UNKNOWN_TOKEN",
        ),
        (
            "the other token",
            |stage, ask| ask.authorization = Some(format!("Bearer {}", stage.own.as_token)),
            "M_UNKNOWN_TOKEN",
        ),
        (
            "a token that begins well",
            |stage, ask| ask.authorization = Some(format!("Bearer {}x", stage.own.hs_token)),
            "M_UNKNOWN_TOKEN",
        ),
    ];
    let mut rows = vec![Row::new("a GET", |_, ask| ask.method = "GET".into(), 405, "M_UNRECOGNIZED")];
    rows.extend(authorization.map(|(what, fault, errcode)| Row::new(what, fault, 401, errcode)));
    rows.extend([
        Row::new(
            "a large body",
            |_, ask| ask.raw = Some(vec![b' '; 64 * 1024 + 1]),
            413,
            "M_TOO_LARGE",
        ),
        Row::new("no JSON", |_, ask| ask.raw = Some(b"{x".to_vec()), 400, "M_NOT_JSON"),
        Row::new("no object", |_, ask| ask.raw = Some(b"[]".to_vec()), 400, "M_NOT_JSON"),
        Row::new("no url", |_, ask| ask.body["url"] = "".into(), 400, "M_BAD_JSON").says("`url`"),
        Row::new("no room", |_, ask| ask.body["room_id"] = "".into(), 400, "M_BAD_JSON").says("`room_id`"),
        Row::new(
            "a slot of the wrong type",
            |_, ask| ask.body["slot_id"] = 5.into(),
            400,
            "M_BAD_JSON",
        )
        .says("wrong type"),
        Row::new(
            "no member",
            |_, ask| ask.body["member_id"] = serde_json::Value::Null,
            400,
            "M_BAD_JSON",
        )
        .says("`member_id`"),
    ]);
    rows
}

/// Every field that has to be there, missing in every way.
#[track_caller]
pub(super) fn fields(stage: &Stage, good: fn(&Stage) -> Ask, names: &[&str]) {
    use serde_json::{Value, json};
    for name in names {
        for value in [
            None,
            Some(Value::Null),
            Some(json!("")),
            Some(json!(5)),
            Some(json!(["x"])),
            Some(json!({})),
        ] {
            let mut ask = good(stage);
            match &value {
                Some(value) => ask.body[*name] = value.clone(),
                None => drop(ask.body.as_object_mut().expect("an object").remove(*name)),
            }
            let before = stage.done();
            stage.call(&ask).assert_errcode(400, "M_BAD_JSON");
            assert_eq!(stage.done() - before, Done::NOTHING, "{name} {value:?}");
        }
    }
}
