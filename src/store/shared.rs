//! Redis as several replicas share it: who is there, who watches, and what they tell each other. Every step that must not be torn is
//! a script; each calls `TIME` itself, may run twice without harm, and answers with what is true afterwards.
//!
//! ```text
//! {lk-jwt:jobs}:watcher   who watches, under which epoch
//! {lk-jwt:jobs}:nodes     what each node says of itself
//! {lk-jwt:jobs}:in        what nodes tell each other; a hint, never the truth
//! {lk-jwt:jobs}:full      users and homeservers that are at their bound, and `all` where the watcher is
//! ```
//!
//! The records stay where one replica has them, `lk-jwt:jobs`. All these keys are in one slot of a cluster.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex as Lock;
use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use tokio::sync::{Mutex, Notify};
use tokio::time::{Instant, timeout, timeout_at};

use super::record::JobRecord;
use super::redis::{Connection, Redis, RedisError, Reply, encoded};
use super::{Failure, StoreError};
use crate::fleet::{Answer, Counts, Entry, MAX_MESSAGES, NodeId, Position, Watch};

const JOBS: &str = "lk-jwt:jobs";
const WATCHER: &str = "{lk-jwt:jobs}:watcher";
const NODES: &str = "{lk-jwt:jobs}:nodes";
const MESSAGES: &str = "{lk-jwt:jobs}:in";
const FULL: &str = "{lk-jwt:jobs}:full";

/// Time for an answer.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(1);
/// How much longer than its own time a reader waits for an answer.
const READ_GRACE: Duration = Duration::from_secs(2);
/// Messages that are read at once.
const MESSAGES_AT_ONCE: &[u8] = b"256";
/// Records from which on no more are taken.
const MAX_RECORDS: &str = "200000";
/// How often a record that others change meanwhile is read again.
const MAX_ATTEMPTS: usize = 8;
/// Two delegations nearer than this: the later call wins.
const NEAR_MS: i64 = 250;

/// A script, and the hash under which Redis remembers it.
pub(super) struct Script {
    text: &'static str,
    sha1: std::sync::OnceLock<String>,
}

impl Script {
    const fn new(text: &'static str) -> Self {
        Self {
            text,
            sha1: std::sync::OnceLock::new(),
        }
    }

    fn sha1(&self) -> &str {
        self.sha1.get_or_init(|| {
            let digest = digest(&SHA1_FOR_LEGACY_USE_ONLY, self.text.as_bytes());
            digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
        })
    }

    /// The call of the script by its hash.
    fn by_hash(&self, keys: &[&str], arguments: &[&[u8]]) -> Vec<u8> {
        Self::call(&[b"EVALSHA", self.sha1().as_bytes()], keys, arguments)
    }

    /// The call of the script by its text, after which Redis knows its hash.
    fn by_text(&self, keys: &[&str], arguments: &[&[u8]]) -> Vec<u8> {
        Self::call(&[b"EVAL", self.text.as_bytes()], keys, arguments)
    }

    fn call(how: &[&[u8]], keys: &[&str], arguments: &[&[u8]]) -> Vec<u8> {
        let count = keys.len().to_string();
        let keys: Vec<_> = keys.iter().map(|key| key.as_bytes()).collect();
        encoded(&[how, &[count.as_bytes()], &keys, arguments].concat())
    }
}

/// Sends what is encoded, and reads so many answers. A refusal is an answer; that the server takes no writes is none.
async fn exchange(
    connection: &mut Connection,
    encoded: &[u8],
    answers: usize,
    command: &'static str,
) -> Result<Vec<Result<Reply, RedisError>>, RedisError> {
    connection.send_encoded(encoded).await?;
    let mut all = Vec::with_capacity(answers);
    for _ in 0..answers {
        all.push(match connection.reply(command).await {
            Err(error @ RedisError::Refused { .. }) if !error.is_of_another_server() => Err(error),
            answer => Ok(answer?),
        });
    }
    Ok(all)
}

/// The one answer of an exchange.
fn only(mut answers: Vec<Result<Reply, RedisError>>) -> Result<Reply, RedisError> {
    answers.pop().unwrap_or(Err(RedisError::Protocol))
}

fn is_unknown(answer: &Result<Reply, RedisError>) -> bool {
    matches!(answer, Err(RedisError::Refused { code, .. }) if &**code == "NOSCRIPT")
}

static BEAT: Script = Script::new(include_str!("shared/beat.lua"));
static CHANGE: Script = Script::new(include_str!("shared/change.lua"));
static PUT: Script = Script::new(include_str!("shared/put.lua"));
static DELEGATE: Script = Script::new(include_str!("shared/delegate.lua"));
static TELL: Script = Script::new(include_str!("shared/tell.lua"));
static BOUND: Script = Script::new(include_str!("shared/bound.lua"));

/// The watch under which the records of this node are written; they are written under none by a node that only serves.
#[derive(Default)]
pub struct Fence {
    watch: Lock<Option<Watch>>,
    refused: Notify,
    /// Fields that could not be written any more.
    void: Lock<HashSet<Arc<str>>>,
}

impl Fence {
    /// Writes under this watch from now on.
    pub fn set(&self, watch: Option<Watch>) {
        *self.watch.lock() = watch;
        self.void.lock().clear();
    }

    /// Fields of the records that were not written, since another node watches.
    #[must_use]
    pub fn void(&self) -> Vec<Arc<str>> {
        self.void.lock().iter().cloned().collect()
    }

    /// Waits until a write was refused, since another node watches.
    pub async fn refused(&self) {
        self.refused.notified().await;
    }

    /// Writes what is changed. What another watcher keeps us from is no error: every leave is handed over then.
    pub(super) async fn write(&self, connection: &mut Connection, changes: &[super::Change]) -> Result<(), RedisError> {
        let Some(watch) = *self.watch.lock() else { return Ok(()) };
        let watch = watch.to_string();
        let mut arguments: Vec<&[u8]> = vec![watch.as_bytes()];
        for super::Change { field, value } in changes {
            let (kind, value): (&[u8], _) = match value {
                Some(value) => (b"s", value.as_bytes()),
                None => (b"d", &b""[..]),
            };
            arguments.extend([kind, field.as_bytes(), value]);
        }
        let keys = [WATCHER, JOBS];
        let mut answer = only(exchange(connection, &PUT.by_hash(&keys, &arguments), 1, "EVALSHA").await?);
        if is_unknown(&answer) {
            answer = only(exchange(connection, &PUT.by_text(&keys, &arguments), 1, "EVAL").await?);
        }
        let found = answer?.texts()?;
        if found.first().is_none_or(|found| **found != *watch.as_bytes()) {
            self.void.lock().extend(changes.iter().map(|change| change.field.clone()));
            self.refused.notify_one();
        }
        Ok(())
    }
}

/// A message that nodes send each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Place of the message among all.
    pub at: Position,
    /// Content of the message.
    pub news: News,
}

/// Content of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// A delegation: field and value of the record.
    Job(Box<[u8]>, Box<[u8]>),
    /// A webhook that this node has verified.
    Webhook(NodeId, Box<[u8]>),
    /// A message of a kind that is not known here.
    Other,
}

/// How a delegation by script ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handed {
    /// The record is written; the watcher is told by this message, or, where there are too many, reads all records again.
    Done(Position),
    /// The user, the homeserver, the watcher or the table is at its bound.
    Full,
    /// The participant's record is of another user.
    Foreign,
}

/// The shared Redis.
pub struct Shared {
    redis: Redis,
    /// Connection for commands.
    commands: Mutex<Option<Connection>>,
    /// There was a connection for commands, and there is another one by now: behind it may be another server.
    was_connected: AtomicBool,
    is_renewed: AtomicBool,
    /// Connection for reading, which waits in Redis.
    reader: Mutex<Option<(Connection, Position)>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Shared")
    }
}

impl Shared {
    pub(super) fn new(redis: Redis) -> Self {
        Self {
            redis,
            commands: Mutex::default(),
            was_connected: AtomicBool::new(false),
            is_renewed: AtomicBool::new(false),
            reader: Mutex::default(),
        }
    }

    /// Tries each command by itself: a script that is refused names none. A Redis that is away is waited for later.
    ///
    /// # Errors
    /// When a command is refused.
    pub async fn check(&self) -> Result<(), StoreError> {
        let Ok(mut connection) = self.redis.connect().await else {
            return Ok(());
        };
        const TRIAL: &str = "{lk-jwt:jobs}:trial";
        const TRIAL_STREAM: &str = "{lk-jwt:jobs}:trial-in";
        let trials: [(&'static str, &[&str]); 18] = [
            ("TIME", &[]),
            ("HSET", &[NODES, "", ""]),
            ("HGET", &[NODES, ""]),
            ("HDEL", &[NODES, ""]),
            ("HGETALL", &[FULL]),
            ("HLEN", &[JOBS]),
            ("HSCAN", &[JOBS, "0", "COUNT", "1"]),
            ("HGET", &[JOBS, ""]),
            ("GET", &[WATCHER]),
            ("SET", &[TRIAL, "1", "PX", "1"]),
            ("XADD", &[TRIAL_STREAM, "NOMKSTREAM", "*", "trial", "1"]),
            ("XLEN", &[MESSAGES]),
            ("XREAD", &["COUNT", "1", "STREAMS", TRIAL_STREAM, "0"]),
            ("XRANGE", &[MESSAGES, "0", "0"]),
            ("XTRIM", &[TRIAL_STREAM, "MINID", "0"]),
            ("EVAL", &["return { redis.call('TIME')[1] }", "0"]),
            ("EVALSHA", &["0000000000000000000000000000000000000000", "0"]),
            ("PING", &[]),
        ];
        for (command, arguments) in trials {
            let words: Vec<&[u8]> = [command].iter().chain(arguments).map(|word| word.as_bytes()).collect();
            let tried = async {
                connection.command(&words);
                connection.send().await?;
                connection.reply(command).await
            };
            match timeout(COMMAND_TIMEOUT, tried).await {
                Ok(Err(RedisError::Refused { code, .. })) if &*code == "NOSCRIPT" => {}
                Ok(Err(error @ RedisError::Refused { .. })) => return Err(self.error(error)),
                Ok(Err(_)) | Err(_) => return Ok(()),
                Ok(Ok(_)) => {}
            }
        }
        Ok(())
    }

    /// Says that this node works, and asks about all others. Where `trim` is a message and `own` is still the watch, messages before it go;
    /// `remove` are nodes that are dead for long.
    ///
    /// # Errors
    /// When Redis does not answer within a second, or refuses.
    pub async fn beat(
        &self,
        node: NodeId,
        entry: &Entry,
        own: Option<Watch>,
        trim: Position,
        remove: &[NodeId],
    ) -> Result<Answer, StoreError> {
        let own = own.map(|watch| watch.to_string()).unwrap_or_default();
        let trim = if trim == Position::FIRST { String::new() } else { trim.to_string() };
        let (node, entry) = (node.to_string(), entry.to_json());
        let remove: Vec<_> = remove.iter().map(ToString::to_string).collect();
        let mut arguments = vec![node.as_bytes(), entry.as_bytes(), own.as_bytes(), trim.as_bytes()];
        arguments.extend(remove.iter().map(String::as_bytes));
        let texts = self.run(&BEAT, &[NODES, WATCHER, JOBS, MESSAGES], &arguments, deadline()).await?;
        read_answer(&texts).ok_or_else(|| self.error(RedisError::Protocol))
    }

    /// Makes `wanted` the watcher, if it is `seen` still; answers with who watches afterwards.
    ///
    /// # Errors
    /// When Redis does not answer within a second, or refuses.
    pub async fn change(&self, seen: Option<Watch>, wanted: Watch) -> Result<Option<Watch>, StoreError> {
        let seen = seen.map(|watch| watch.to_string()).unwrap_or_default();
        let wanted = wanted.to_string();
        let arguments = [seen.as_bytes(), wanted.as_bytes()];
        let texts = self.run(&CHANGE, &[WATCHER, NODES], &arguments, deadline()).await?;
        Ok(texts.first().and_then(|text| parse(text)))
    }

    /// Names those that are at their bound: users, homeservers, the watcher itself.
    ///
    /// # Errors
    /// When Redis does not answer within a second, or refuses.
    pub async fn bound(&self, own: Watch, full: &[String]) -> Result<(), StoreError> {
        let own = own.to_string();
        let mut arguments = vec![own.as_bytes()];
        arguments.extend(full.iter().map(String::as_bytes));
        self.run(&BOUND, &[WATCHER, FULL], &arguments, deadline()).await.map(drop)
    }

    /// Tells all nodes of a webhook; `false` where they have too much to read already.
    ///
    /// # Errors
    /// When Redis does not answer within a second, or refuses.
    pub async fn tell_webhook(&self, node: NodeId, webhook: &str) -> Result<bool, StoreError> {
        let node = node.to_string();
        let most = MAX_MESSAGES.to_string();
        let arguments = [most.as_bytes(), b"webhook", node.as_bytes(), webhook.as_bytes()];
        let texts = self.run(&TELL, &[MESSAGES], &arguments, deadline()).await?;
        Ok(texts.first().is_some_and(|id| !id.is_empty()))
    }

    /// Writes the record of a leave, in order with what stands there (decision L14), and tells the watcher. Nobody is refused by the
    /// `full` names of a leave that was taken already.
    ///
    /// # Errors
    /// When Redis does not answer until `deadline`, or refuses.
    pub async fn delegate(&self, record: &JobRecord<'_>, full: &[String], until: Instant) -> Result<Handed, StoreError> {
        let (field, most) = (record.field(), MAX_MESSAGES.to_string());
        let mut expected = Box::<[u8]>::default();
        let mut now_ms = None;
        for _ in 0..MAX_ATTEMPTS {
            let stored = JobRecord::read(field.as_bytes(), &expected).ok();
            let Some(merged) = record.in_order_with(stored.as_ref(), now_ms, NEAR_MS) else {
                return Ok(Handed::Foreign);
            };
            let value = merged.value_over(std::str::from_utf8(&expected).unwrap_or_default());
            let mut arguments = vec![
                field.as_bytes(),
                &*expected,
                value.as_bytes(),
                MAX_RECORDS.as_bytes(),
                most.as_bytes(),
            ];
            arguments.extend(full.iter().map(String::as_bytes));
            let texts = self.run(&DELEGATE, &[JOBS, MESSAGES, FULL], &arguments, until).await?;
            let [seconds, micros, outcome, more] = &texts[..] else {
                return Err(self.error(RedisError::Protocol));
            };
            let redis_ms = millis(seconds, micros).ok_or_else(|| self.error(RedisError::Protocol))?;
            match &**outcome {
                b"full" => return Ok(Handed::Full),
                b"done" => {
                    let at = read_place(seconds, micros, more);
                    return at.map(Handed::Done).ok_or_else(|| self.error(RedisError::Protocol));
                }
                // There is something, and it is longer than any record: another program's.
                _ if more.is_empty() && expected.is_empty() => return Ok(Handed::Foreign),
                _ => (expected, now_ms) = (more.clone(), Some(redis_ms)),
            }
        }
        Err(self.error(RedisError::Timeout))
    }

    /// Delegates many leaves that were taken already, in two round trips; `None` for those whose record was changed meanwhile, or that were
    /// refused: [`Self::delegate`] tells.
    ///
    /// # Errors
    /// When Redis does not answer until `deadline`.
    pub async fn delegate_all(&self, records: &[JobRecord<'_>], until: Instant) -> Result<Vec<Option<Handed>>, StoreError> {
        let fields: Vec<_> = records.iter().map(JobRecord::field).collect();
        let mut asked = Vec::new();
        for field in &fields {
            asked.extend(encoded(&[b"HGET", JOBS.as_bytes(), field.as_bytes()]));
        }
        let stored = self.exchange(&asked, fields.len(), "HGET", until).await?;
        let stored = stored.into_iter().map(|answer| answer?.text()).collect::<Result<Vec<_>, _>>();
        let stored = stored.map_err(|error| self.redis.failed(error))?;
        let merged: Vec<_> = records
            .iter()
            .zip(&fields)
            .zip(&stored)
            .map(|((record, field), stored)| {
                let read = JobRecord::read(field.as_bytes(), stored).ok();
                let merged = record.in_order_with(read.as_ref(), None, NEAR_MS)?;
                Some(merged.value_over(std::str::from_utf8(stored).unwrap_or_default()))
            })
            .collect();
        let most = MAX_MESSAGES.to_string();
        let mut asked = Vec::new();
        for ((field, stored), value) in fields.iter().zip(&stored).zip(&merged) {
            let Some(value) = value else { continue };
            let bounds = [MAX_RECORDS.as_bytes(), most.as_bytes()];
            let arguments = [&[field.as_bytes(), stored, value.as_bytes()][..], &bounds].concat();
            asked.extend(DELEGATE.by_hash(&[JOBS, MESSAGES, FULL], &arguments));
        }
        let wanted = merged.iter().flatten().count();
        let answers = self.exchange(&asked, wanted, "EVALSHA", until).await?;
        let answers: Vec<_> = answers
            .into_iter()
            .map(|answer| answer.and_then(Reply::texts).unwrap_or_default())
            .collect();
        let mut answers = answers.iter();
        Ok(merged
            .iter()
            .map(|value| match value.as_ref().and_then(|_| answers.next()).map(Vec::as_slice) {
                Some([seconds, micros, outcome, id]) if **outcome == *b"done" => read_place(seconds, micros, id).map(Handed::Done),
                Some(_) | None => None,
            })
            .collect())
    }

    /// Waits for messages that this reader has not had; nothing, where none comes within `block`. Says after which one it was read: after
    /// a reconnection all that are there come again, since a new primary may number new messages below what was read.
    ///
    /// # Errors
    /// When Redis does not answer, or refuses.
    pub async fn read(&self, block: Duration) -> Result<(Position, Vec<Message>), StoreError> {
        let mut reader = self.reader.lock().await;
        let known = reader.take();
        let read = async {
            let (mut connection, from) = match known {
                Some(known) => known,
                None => (self.redis.connect().await?, Position::FIRST),
            };
            let (block, after) = (block.as_millis().max(1).to_string(), from.to_string());
            let words: [&[u8]; 8] = [
                b"XREAD",
                b"COUNT",
                MESSAGES_AT_ONCE,
                b"BLOCK",
                block.as_bytes(),
                b"STREAMS",
                MESSAGES.as_bytes(),
                after.as_bytes(),
            ];
            connection.command(&words);
            connection.send().await?;
            let messages = read_messages(connection.reply("XREAD").await?)?;
            Ok((connection, messages, from))
        };
        let (connection, messages, from) = timeout(block + READ_GRACE, read)
            .await
            .unwrap_or(Err(RedisError::Timeout))
            .map_err(|error| self.redis.failed(error))?;
        *reader = Some((connection, messages.last().map_or(from, |last| last.at)));
        Ok((from, messages))
    }

    /// Whether commands go over another connection than when this was asked last: to another server, maybe, that lacks what was written.
    #[must_use]
    pub fn was_renewed(&self) -> bool {
        self.is_renewed.swap(false, Ordering::Relaxed)
    }

    /// Begins with the first message again.
    pub async fn read_from_the_first(&self) {
        if let Some((_, from)) = &mut *self.reader.lock().await {
            *from = Position::FIRST;
        }
    }

    async fn run(&self, script: &Script, keys: &[&str], arguments: &[&[u8]], until: Instant) -> Result<Vec<Box<[u8]>>, StoreError> {
        let mut answer = only(self.exchange(&script.by_hash(keys, arguments), 1, "EVALSHA", until).await?);
        if is_unknown(&answer) {
            answer = only(self.exchange(&script.by_text(keys, arguments), 1, "EVAL", until).await?);
        }
        answer.and_then(Reply::texts).map_err(|error| self.redis.failed(error))
    }

    /// Sends what is encoded over the connection for commands, which is kept where so many answers have come.
    async fn exchange(
        &self,
        encoded: &[u8],
        answers: usize,
        command: &'static str,
        until: Instant,
    ) -> Result<Vec<Result<Reply, RedisError>>, StoreError> {
        let work = async {
            let mut commands = self.commands.lock().await;
            let known = commands.take();
            let is_new = known.is_none();
            let mut connection = match known {
                Some(known) => known,
                None => self.connect().await?,
            };
            let mut all = timeout(COMMAND_TIMEOUT, exchange(&mut connection, encoded, answers, command)).await;
            // Idle connections are closed by servers and proxies: that is no trouble.
            if let (Ok(Err(RedisError::Closed | RedisError::Broken(_))), false) = (&all, is_new) {
                connection = self.connect().await?;
                all = timeout(COMMAND_TIMEOUT, exchange(&mut connection, encoded, answers, command)).await;
            }
            let all = all.unwrap_or(Err(RedisError::Timeout))?;
            *commands = Some(connection);
            Ok(all)
        };
        timeout_at(until, work)
            .await
            .unwrap_or(Err(RedisError::Timeout))
            .map_err(|error| self.redis.failed(error))
    }

    async fn connect(&self) -> Result<Connection, RedisError> {
        let connection = timeout(COMMAND_TIMEOUT, self.redis.connect())
            .await
            .unwrap_or(Err(RedisError::Timeout))?;
        if self.was_connected.swap(true, Ordering::Relaxed) {
            self.is_renewed.store(true, Ordering::Relaxed);
        }
        Ok(connection)
    }

    fn error(&self, error: RedisError) -> StoreError {
        Failure::Redis(self.redis.shown().into(), error).into()
    }
}

#[expect(clippy::disallowed_methods, reason = "an adapter: waits for an answer")]
fn deadline() -> Instant {
    Instant::now() + COMMAND_TIMEOUT
}

fn parse<T: std::str::FromStr>(text: &[u8]) -> Option<T> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn millis(seconds: &[u8], micros: &[u8]) -> Option<i64> {
    let (seconds, micros): (i64, i64) = (parse(seconds)?, parse(micros)?);
    Some(seconds.saturating_mul(1000).saturating_add(micros / 1000))
}

/// The place of the message; the present, where there were too many to send one.
fn read_place(seconds: &[u8], micros: &[u8], id: &[u8]) -> Option<Position> {
    parse(id).or_else(|| {
        let millis = millis(seconds, micros)?.unsigned_abs();
        Some(Position { millis, number: 0 })
    })
}

fn read_answer(texts: &[Box<[u8]>]) -> Option<Answer> {
    let [seconds, micros, watch, records, messages, entries @ ..] = texts else {
        return None;
    };
    let entries = entries.chunks_exact(2).filter_map(|pair| match pair {
        [node, entry] => Some((parse(node)?, Entry::read(entry)?)),
        _ => None,
    });
    Some(Answer {
        redis_ms: millis(seconds, micros)?,
        watch: parse(watch),
        counts: Counts {
            records: parse(records)?,
            messages: parse(messages)?,
        },
        entries: entries.collect(),
    })
}

fn read_messages(reply: Reply) -> Result<Vec<Message>, RedisError> {
    let Some(streams) = reply.list()? else { return Ok(Vec::new()) };
    let mut messages = Vec::new();
    for stream in streams {
        let Some(Ok([_, all])) = stream.list()?.map(<[Reply; 2]>::try_from) else {
            return Err(RedisError::Protocol);
        };
        for message in all.list()?.unwrap_or_default() {
            let Some(Ok([id, fields])) = message.list()?.map(<[Reply; 2]>::try_from) else {
                return Err(RedisError::Protocol);
            };
            let at = parse(&id.text()?).ok_or(RedisError::Protocol)?;
            let fields = fields.texts()?;
            let news = match &fields[..] {
                [kind, field, _, value] if **kind == *b"job" => News::Job(field.clone(), value.clone()),
                [kind, node, _, value] if **kind == *b"webhook" => match parse(node) {
                    Some(node) => News::Webhook(node, value.clone()),
                    None => News::Other,
                },
                _ => News::Other,
            };
            messages.push(Message { at, news });
        }
    }
    Ok(messages)
}

/// Handle to the shared Redis and to the fence of the records' queue.
#[derive(Clone)]
pub struct SharedStore {
    /// Watcher, nodes and messages.
    pub shared: Arc<Shared>,
    /// The watch under which records are written.
    pub fence: Arc<Fence>,
}
