//! Failovers: a primary, its replica and three real sentinels.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::length;
use super::scenes::{HOUR, SHORT, crowd};
use super::stage::{SYNC_AT_ONCE, Stage, TIMEOUT, WRITES_AGAIN, states, within};
use crate::support::process::program;
use crate::support::redis::RedisServer;
use crate::support::{lateness, unique, unique_loopback, wait_until, webhook};

const DOWN_AFTER: Duration = Duration::from_secs(2);
/// A beat where delays are short.
const A_BEAT: Duration = Duration::from_millis(400);
/// What a failover has lost is watched, and on record, so long after its end.
const WATCHED_AGAIN: Duration = Duration::from_secs(5);

struct Sentinels {
    children: Vec<Child>,
    addresses: Vec<String>,
    directory: PathBuf,
}

impl Sentinels {
    fn start(primary: &RedisServer) -> Self {
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("sentinels-{}-{}", std::process::id(), unique()));
        std::fs::create_dir_all(&directory).expect("a directory");
        let mut sentinels = Self {
            children: Vec::new(),
            addresses: Vec::new(),
            directory,
        };
        for number in 0..3 {
            let address = unique_loopback();
            let file = sentinels.directory.join(format!("{number}.conf"));
            let text = format!(
                "bind {address}\nsentinel announce-ip {address}\nport 26379\nprotected-mode no\ndir {}\nsentinel monitor lk {} 6379 2\n\
                 sentinel down-after-milliseconds lk {}\nsentinel failover-timeout lk 5000\n",
                sentinels.directory.display(),
                primary.address().ip(),
                DOWN_AFTER.as_millis()
            );
            std::fs::write(&file, text).expect("a file");
            let mut command = Command::new(program("redis-server"));
            command.arg(&file).arg("--sentinel").stdout(Stdio::null()).stderr(Stdio::null());
            sentinels.children.push(command.spawn().expect("a sentinel"));
            sentinels.addresses.push(format!("{address}:26379"));
        }
        wait_until("the sentinels to know each other and the replica", TIMEOUT, || {
            let all = &sentinels.addresses;
            all.iter().all(|at| {
                let known = ask(at, &["SENTINEL", "master", "lk"]);
                known.contains("num-slaves\r\n$1\r\n1") && known.contains("num-other-sentinels\r\n$1\r\n2")
            })
        });
        sentinels
    }

    fn url(&self) -> String {
        format!("redis+sentinel://{}/lk", self.addresses.join(","))
    }

    fn primary(&self) -> String {
        ask(&self.addresses[0], &["SENTINEL", "get-master-addr-by-name", "lk"])
    }
}

impl Drop for Sentinels {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// What one command is answered, as it comes over the wire; nothing, where nobody answers.
fn ask(address: &str, command: &[&str]) -> String {
    use std::io::{Read as _, Write as _};
    let asked = || -> std::io::Result<String> {
        let address = address.parse().expect("an address");
        let mut stream = std::net::TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_millis(200)))?;
        let mut text = format!("*{}\r\n", command.len());
        for word in command {
            text += &format!("${}\r\n{word}\r\n", word.len());
        }
        stream.write_all(text.as_bytes())?;
        let mut answer = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(read) = stream.read(&mut buffer) {
            if read == 0 {
                break;
            }
            answer.extend(&buffer[..read]);
        }
        Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    asked().unwrap_or_default()
}

/// A stage of three replicas that know sentinels only, and the replica of its Redis, whose clock may be off.
fn stage(off_seconds: i64) -> Option<(Stage, Sentinels, RedisServer)> {
    let mut stage = Stage::with(0, &SYNC_AT_ONCE)?;
    let host = stage.redis.address().ip().to_string();
    let replica = RedisServer::start_by(off_seconds, &["--replicaof", &host, "6379"])?;
    // One that has nothing yet may become the primary.
    wait_until("the replica to have all", TIMEOUT, || {
        ask(&replica.address().to_string(), &["INFO", "replication"]).contains("master_link_status:up")
    });
    let sentinels = Sentinels::start(&stage.redis);
    for _ in 0..3 {
        stage.add(|setup| setup.env("LIVEKIT_REDIS_URL", &sentinels.url()));
    }
    stage.wait_one_watcher();
    Some((stage, sentinels, replica))
}

/// R7: the primary is killed.
#[test]
fn a_failover_moves_no_watch_and_loses_nothing() {
    fails_over("kill", 0, |stage, _| stage.redis.kill());
}

/// R7: the primary is changed by command.
#[test]
fn a_failover_by_command_moves_no_watch_and_loses_nothing() {
    fails_over("command", 0, |_, sentinels| {
        wait_until("a failover to be possible", TIMEOUT, || {
            ask(&sentinels.addresses[0], &["SENTINEL", "failover", "lk"]).starts_with("+OK")
        });
    });
}

/// R7: the primary stands still, and wakes up when another one has taken its place.
#[test]
fn a_primary_that_wakes_up_after_a_failover_changes_nothing() {
    fails_over("stop", 0, |stage, _| stage.redis.freeze());
}

/// R7b: the new primary's clock is 40 s behind.
#[test]
fn a_failover_to_a_clock_that_is_behind_moves_no_watch_and_loses_nothing() {
    fails_over("kill, 40 s behind", -40, |stage, _| stage.redis.kill());
}

fn fails_over(how: &str, off_seconds: i64, begin: impl Fn(&mut Stage, &Sentinels)) {
    let Some((mut stage, sentinels, replica)) = stage(off_seconds) else {
        return;
    };
    let mut people = crowd(&stage, 12, SHORT);
    let (watcher, epoch) = (stage.wait_one_watcher(), stage.epoch());
    let seconds = |server: &RedisServer| {
        let answer = server.ask(&["EVAL", "return redis.call('TIME')[1]", "0"]);
        answer.lines().nth(1).and_then(|line| line.parse::<i64>().ok()).expect("seconds")
    };
    assert!((seconds(&replica) - seconds(&stage.redis) - off_seconds).abs() <= 1);
    let (began, former) = (Instant::now(), sentinels.primary());
    begin(&mut stage, &sentinels);
    // One leaves, and whoever is told of it cannot tell the others yet.
    let (left, session) = people.remove(5);
    stage.sfu.leave(&session.room, &session.identity);
    let mut others = Vec::new();
    let mut longest = Duration::ZERO;
    for node in 0..3 {
        let person = stage.person(SHORT);
        let asked = Instant::now();
        assert_eq!(stage.delegate_at(stage.nodes[node].as_ref().expect("a node"), &person), 200);
        assert!(asked.elapsed() <= within(WRITES_AGAIN, asked), "{:?}", asked.elapsed());
        longest = longest.max(asked.elapsed());
        let session = stage.sfu.join(&person.alias, &person.identity);
        others.push((person, session));
    }
    stage.tell(&webhook::left(&session, "CLIENT_INITIATED"));
    let told = Instant::now();
    wait_until("another primary", TIMEOUT, || {
        let primary = sentinels.primary();
        primary != former && !primary.is_empty()
    });
    stage.wait_handed_over();
    let handed_over = began.elapsed();
    let reported = stage.wait_sent(&left, told, TIMEOUT * 2);
    if stage.redis.is_frozen() {
        stage.redis.thaw();
        // Until the sentinels see that, ten seconds later, it takes itself for the primary.
        if length::is_full() {
            let (awake, former) = (Instant::now(), stage.redis.address().to_string());
            wait_until("the former primary to be a replica", TIMEOUT * 2, || {
                ask(&former, &["ROLE"]).contains("slave")
            });
            eprintln!(
                "R7, by {how}: the former primary is one no more {:?} after it woke up",
                awake.elapsed()
            );
        }
    }
    eprintln!(
        "R7, by {how}: delegations answered within {longest:?}, all is handed over after {handed_over:?}, the departure reported \
         {reported:?} after it was told"
    );
    // A machine that stands still for a second moves the watch.
    let late = lateness::since(began);
    assert!(
        (stage.wait_one_watcher(), stage.epoch()) == (watcher, epoch) || late > A_BEAT,
        "{late:?}: {:?}",
        states(&stage)
    );
    let after = Instant::now();
    stage.wait_restarted(&people, after);
    stage.wait_restarted(&others, after);
    stage.assert_there(&people);
    let records = || replica.ask(&["HLEN", "lk-jwt:jobs"]) == format!(":{}\r\n", people.len() + others.len());
    wait_until("all records to be there", TIMEOUT, records);
    let gone = stage.leave(&others[0].1);
    let took = stage.wait_sent(&others[0].0, gone, TIMEOUT);
    assert!(took <= within(Duration::from_millis(2300), gone), "{took:?}");
}

/// R8: the new primary lacks what was written in the last two seconds, and the watcher has not read what of it came last.
#[test]
fn what_a_failover_loses_is_watched_soon_after_it() {
    let Some((mut stage, sentinels, replica)) = stage(0) else { return };
    let people = crowd(&stage, 6, HOUR);
    let watcher = stage.wait_one_watcher();
    let former = sentinels.primary();
    wait_until("the replica to have all", TIMEOUT, || {
        replica.ask(&["HLEN", "lk-jwt:jobs"]) == format!(":{}\r\n", people.len())
    });
    // The replica gets nothing from here on, and knows nothing of it.
    assert_eq!(stage.redis.ask(&["ACL", "SETUSER", "default", "-psync", "-sync"]), "+OK\r\n");
    assert_eq!(stage.redis.ask(&["CLIENT", "KILL", "TYPE", "replica"]), ":1\r\n");
    let mut others = Vec::new();
    let delegate = |others: &mut Vec<_>, at: usize| {
        let person = stage.person(HOUR);
        assert_eq!(stage.delegate_at(stage.nodes[at].as_ref().expect("a node"), &person), 200);
        let answered = Instant::now();
        let session = stage.sfu.join(&person.alias, &person.identity);
        others.push((person, session, answered));
    };
    for at in 0..9 {
        delegate(&mut others, at % 3);
    }
    // Shorter than anybody would notice.
    let node = stage.nodes[watcher].as_ref().expect("a node");
    node.signal("STOP");
    for at in 0..6 {
        delegate(&mut others, (watcher + 1 + at % 2) % 3);
    }
    let records = people.len() + others.len();
    assert_eq!(replica.ask(&["HLEN", "lk-jwt:jobs"]), format!(":{}\r\n", people.len()));
    stage.redis.kill();
    let node = stage.nodes[watcher].as_ref().expect("a node");
    node.signal("CONT");
    let began = Instant::now();
    wait_until("another primary", TIMEOUT, || {
        replica.try_ask(&["SET", "written", "1"]).is_some_and(|answer| answer == "+OK\r\n")
    });
    let ended = Instant::now();
    wait_until("all to be watched", TIMEOUT, || {
        others.iter().all(|(person, ..)| stage.api.count("restart", &person.delay_id) > 0)
    });
    let since = others.iter().map(|(person, _, answered)| {
        let first = stage.api.times("restart", &person.delay_id)[0];
        first.saturating_duration_since(ended.max(*answered))
    });
    let watched = since.max().unwrap_or_default();
    wait_until("all records to be there", TIMEOUT, || {
        replica.try_ask(&["HLEN", "lk-jwt:jobs"]) == Some(format!(":{records}\r\n"))
    });
    let recorded = ended.elapsed();
    eprintln!(
        "R8: the failover took {:?}; {} delegations are watched {watched:?} after its end, all records are there after {recorded:?}",
        ended - began,
        others.len()
    );
    assert!(watched <= within(WATCHED_AGAIN, ended), "{watched:?}");
    assert!(recorded <= within(WATCHED_AGAIN, ended), "{recorded:?}");
    assert_ne!(sentinels.primary(), former);
    assert_eq!(stage.wait_one_watcher(), watcher);
    stage.kill(watcher);
    stage.wait_other_watcher(watcher, TIMEOUT);
    let others: Vec<_> = others.into_iter().map(|(person, session, _)| (person, session)).collect();
    for (person, session) in [&others[0], &others[14]] {
        let gone = stage.leave(session);
        stage.wait_sent(person, gone, TIMEOUT);
    }
    stage.assert_there(&others[1..14]);
}
