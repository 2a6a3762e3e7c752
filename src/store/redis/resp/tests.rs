use super::*;
use proptest::prelude::*;
use std::time::Duration;
use tokio::runtime::Builder;

const TIMEOUT: Duration = Duration::from_secs(3);

/// Runs on a connection to a server that says this and closes.
fn hearing<T>(said: &[u8], then: impl AsyncFnOnce(&mut Connection) -> T) -> T {
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async { then(&mut Connection::new(wire_of(said))).await })
}

fn wire_of(said: &[u8]) -> Box<dyn Wire> {
    let said = io::Cursor::new(said.to_vec());
    Box::new(tokio::io::join(said, tokio::io::sink()))
}

async fn all(connection: &mut Connection) -> Result<Vec<(String, String)>, RedisError> {
    let mut found = Vec::new();
    for _ in 0..connection.pairs("HGETALL").await? {
        if let Some(entry) = connection.pair().await? {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            found.push((text(&entry.field), text(&entry.value)));
        }
    }
    Ok(found)
}

#[test]
fn reads_answers() {
    let long = format!("*4\r\n$1\r\na\r\n${}\r\n{}\r\n$1\r\nb\r\n$0\r\n\r\n", 100_000, "x".repeat(100_000));
    for (said, found) in [
        ("*0\r\n", vec![]),
        ("*-1\r\n", vec![]),
        ("*2\r\n$1\r\na\r\n$4\r\n1\r\n2\r\n", vec![("a", "1\r\n2")]),
        (&long, vec![("b", "")]),
    ] {
        let found: Vec<_> = found.into_iter().map(|(f, v)| (f.to_owned(), v.to_owned())).collect();
        assert_eq!(hearing(said.as_bytes(), all).unwrap(), found);
    }
    hearing(b"+PONG\r\n:1\r\n-NOPERM no\r\n+OK\r\n", async |connection| {
        connection.done("PING").await.unwrap();
        connection.done("HSET").await.unwrap();
        let refused = connection.done("HSET").await.unwrap_err();
        assert_eq!(refused.to_string(), "HSET was refused (NOPERM)");
        connection.done("HSET").await.unwrap();
        assert!(matches!(connection.done("HSET").await.unwrap_err(), RedisError::Closed));
    });
}

#[test]
fn the_error_in_a_script_is_that_of_the_command_that_failed() {
    for (said, code) in [
        (
            "ERR Error running script (call to f_0): @user_script:1: @user_script: 1: -READONLY You can't write",
            "READONLY",
        ),
        (
            "ERR Error running script (call to f_0): @user_script:1: attempt to call a nil value",
            "ERR",
        ),
        (
            "READONLY You can't write against a read only replica. script: 0, on @user_script:1.",
            "READONLY",
        ),
        ("ERR value - READONLY", "ERR"),
    ] {
        let refused = hearing(format!("-{said}\r\n").as_bytes(), async |connection| {
            connection.done("EVAL").await.unwrap_err()
        });
        assert_eq!(refused.to_string(), format!("EVAL was refused ({code})"), "{said}");
    }
}

#[test]
fn believes_no_length_and_repeats_nothing() {
    for said in [
        "*3\r\n",
        "*999999999999999999999\r\n",
        "*-2\r\n",
        "%1\r\n",
        "*2\r\n$-1\r\n",
        "*2\r\n$1\r\nab\r\n",
        "*2\r\n+OK\r\n",
        "HTTP/1.1 400 Bad Request\r\n",
        "*2\n",
    ] {
        assert!(matches!(hearing(said.as_bytes(), all).unwrap_err(), RedisError::Protocol), "{said}");
    }
    for said in ["*2\r\n$999999999999\r\n", "*999999999998\r\n"] {
        assert!(matches!(hearing(said.as_bytes(), all).unwrap_err(), RedisError::Closed), "{said}");
    }
    assert!(matches!(hearing(&[b'+'; 20_000], all).unwrap_err(), RedisError::Protocol));
    let error = hearing(
        b"-ERR unknown command 'AUTH', with args beginning with: 'hunter2'\r\n",
        async |connection| connection.done("AUTH").await.unwrap_err(),
    );
    assert!(!format!("{error} {error:?} {}", error.remedy()).contains("hunter2"));
    assert_eq!(error.to_string(), "AUTH was refused (ERR)");
}

#[test]
fn waits_no_longer_than_it_should() {
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let (ours, _theirs) = tokio::io::duplex(16);
        let mut connection = Connection::new(Box::new(ours));
        let began = tokio::time::Instant::now();
        assert!(matches!(connection.done("PING").await.unwrap_err(), RedisError::Timeout));
        connection.command(&[&[b'x'; 100]]);
        assert!(matches!(connection.send().await.unwrap_err(), RedisError::Timeout));
        assert_eq!(began.elapsed(), TIMEOUT * 2);
    });
}

proptest! {
    // A million cases: PROPTEST_CASES=1000000 cargo test --lib store::redis
    #[test]
    fn no_answer_is_a_panic(said in prop_oneof![
        prop::collection::vec(any::<u8>(), 0..64),
        "([*$+:-]-?[0-9]{0,3}(\r\n)?[a-z]{0,3}(\r\n)?){0,9}".prop_map(String::into_bytes),
    ]) {
        let _ = hearing(&said, all);
    }
}
