//! RESP2, as far as a hash needs it. Whatever a server says, memory and time are bounded.

use std::io;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::time::timeout;

use super::{TIMEOUT, Wire, in_time};
use crate::store::Entry;
use crate::store::record::MAX_BYTES;

/// Longest line; the lines that matter are short.
const MAX_LINE_BYTES: u64 = 8 * 1024;
/// Read at once, at most.
const CHUNK_BYTES: usize = 64 * 1024;

/// Redis cannot do what it should. Nothing that the server said is repeated, but the code of an error.
#[derive(Debug, thiserror::Error)]
pub(in crate::store) enum RedisError {
    #[error("cannot connect: {0}")]
    Unreachable(String),
    #[error("cannot connect by TLS: {0}")]
    Tls(String),
    #[error("no answer in time")]
    Timeout,
    #[error("the connection was closed")]
    Closed,
    #[error("the connection broke: {0}")]
    Broken(io::ErrorKind),
    #[error("{command} was refused ({code})")]
    Refused { command: &'static str, code: Box<str> },
    #[error("the answer is not Redis's")]
    Protocol,
}

impl RedisError {
    /// Whether a change was refused by a server that may take others: for want of memory, for its size, or since its key is
    /// another program's.
    pub(super) fn concerns_one_change(&self) -> bool {
        matches!(self, Self::Refused { code, .. } if matches!(&**code, "OOM" | "ERR" | "NOPERM" | "WRONGTYPE"))
    }

    /// Whether another server has to be found: this one takes no writes (any more), or has not our key.
    pub(in crate::store) fn is_of_another_server(&self) -> bool {
        let codes = ["READONLY", "LOADING", "MASTERDOWN", "MOVED", "ASK", "CLUSTERDOWN", "TRYAGAIN"];
        matches!(self, Self::Refused { code, .. } if codes.contains(&&**code))
    }

    /// Advice to the operator.
    pub(in crate::store) fn remedy(&self) -> &'static str {
        match self {
            Self::Unreachable(_) => "check that Redis runs, and the host and port of LIVEKIT_REDIS_URL",
            Self::Tls(_) => {
                "check that Redis speaks TLS on this port (rediss://), that its certificate names the host of LIVEKIT_REDIS_URL, and SSL_CERT_FILE"
            }
            Self::Timeout => "check Redis's load, and the network between",
            Self::Closed | Self::Broken(_) => "check that Redis runs, and its log; a rediss:// port must not be spoken to by redis://",
            Self::Refused { command, code } => match (*command, &**code) {
                ("AUTH", _) | (_, "WRONGPASS") => "check the user name in LIVEKIT_REDIS_URL, and LIVEKIT_REDIS_PASSWORD",
                (_, "NOAUTH") => "Redis wants a password: set LIVEKIT_REDIS_PASSWORD",
                ("SELECT", _) => "check the number of the database in LIVEKIT_REDIS_URL",
                ("CLUSTER", "NOPERM") => "the Redis user needs +cluster|slots and +cluster|keyslot",
                (_, "NOPERM") => {
                    "the Redis user needs PING, HSET, HDEL and HGETALL on the keys lk-jwt:jobs and lk-jwt:tokens (~lk-jwt:*); with several \
                     replicas the rights in docs/replicas.md"
                }
                (_, "WRONGTYPE") => "the key lk-jwt:jobs or lk-jwt:tokens holds something that is no hash: another program uses it",
                (_, "READONLY") => "LIVEKIT_REDIS_URL must lead to the primary, not to a replica",
                ("CLUSTER", "ERR") => "this Redis is no cluster: write redis:// for redis+cluster:// in LIVEKIT_REDIS_URL",
                (_, "MOVED" | "ASK") => {
                    "this Redis is a cluster: name nodes of it in LIVEKIT_REDIS_URL, as redis+cluster://h1:6379,h2:6379; with such a URL, this should pass"
                }
                (_, "CLUSTERDOWN") => "the cluster lacks nodes: see `redis-cli cluster info` on one of them",
                (_, "OOM") => "Redis is out of memory: raise maxmemory",
                (_, "LOADING" | "BUSY" | "MASTERDOWN" | "TRYAGAIN") => "Redis is busy: this should pass",
                (_, "MISCONF") => "Redis cannot write to its disk: check its log",
                (_, "DENIED") => "Redis is in protected mode: set a password there, or bind it to this network",
                _ => "check Redis's log; PING, HSET, HDEL and HGETALL are needed",
            },
            Self::Protocol => "check that LIVEKIT_REDIS_URL leads to Redis and to nothing else",
        }
    }
}

/// Most bytes and items of one answer that is read whole.
const MAX_REPLY_BYTES: usize = 16 * 1024 * 1024;
const MAX_REPLY_ITEMS: usize = 64 * 1024;
/// Deepest list in a list.
const MAX_DEPTH: usize = 5;

/// An answer that is read whole.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::store) enum Reply {
    /// Null, or a text that is longer than any record.
    Nil,
    /// A text or a number.
    Text(Box<[u8]>),
    /// A list of answers.
    List(Vec<Self>),
}

impl Reply {
    pub(in crate::store) fn text(self) -> Result<Box<[u8]>, RedisError> {
        match self {
            Self::Text(text) => Ok(text),
            Self::Nil => Ok(Box::default()),
            Self::List(_) => Err(RedisError::Protocol),
        }
    }

    pub(in crate::store) fn list(self) -> Result<Option<Vec<Self>>, RedisError> {
        match self {
            Self::List(list) => Ok(Some(list)),
            Self::Nil => Ok(None),
            Self::Text(_) => Err(RedisError::Protocol),
        }
    }

    /// Reads a list of texts.
    pub(in crate::store) fn texts(self) -> Result<Vec<Box<[u8]>>, RedisError> {
        self.list()?.unwrap_or_default().into_iter().map(Self::text).collect()
    }
}

/// A connection, and what was read ahead of it.
pub(in crate::store) struct Connection {
    wire: BufReader<Box<dyn Wire>>,
    unsent: Vec<u8>,
}

impl Connection {
    pub(super) fn new(wire: Box<dyn Wire>) -> Self {
        Self {
            wire: BufReader::with_capacity(CHUNK_BYTES, wire),
            unsent: Vec::new(),
        }
    }

    /// Prepares a command.
    pub(in crate::store) fn command(&mut self, parts: &[&[u8]]) {
        self.unsent.extend(encoded(parts));
    }

    /// Sends what is prepared.
    pub(in crate::store) async fn send(&mut self) -> Result<(), RedisError> {
        let unsent = std::mem::take(&mut self.unsent);
        self.send_encoded(&unsent).await
    }

    /// Sends commands that are encoded already.
    pub(in crate::store) async fn send_encoded(&mut self, commands: &[u8]) -> Result<(), RedisError> {
        in_time(async {
            self.wire.write_all(commands).await?;
            Ok(self.wire.flush().await?)
        })
        .await
    }

    /// Sends a command that brings nothing back but its success, and waits for it.
    pub(super) async fn ask(&mut self, command: &'static str, arguments: &[&[u8]]) -> Result<(), RedisError> {
        self.command(&[&[command.as_bytes()], arguments].concat());
        self.send().await?;
        self.done(command).await
    }

    /// The answer to a command that brings nothing back but its success.
    pub(super) async fn done(&mut self, command: &'static str) -> Result<(), RedisError> {
        self.head(command, b"+:").await.map(drop)
    }

    /// The head of an answer of fields and values: how many pairs follow.
    pub(super) async fn pairs(&mut self, command: &'static str) -> Result<u64, RedisError> {
        let digits = self.head(command, b"*").await?;
        let items = if digits == b"-1" { 0 } else { length(&digits)? };
        if items % 2 == 0 { Ok(items / 2) } else { Err(RedisError::Protocol) }
    }

    /// The head of an answer to `HSCAN`: the next cursor; fields and values follow.
    pub(super) async fn cursor(&mut self) -> Result<Box<[u8]>, RedisError> {
        match self.pairs("HSCAN").await? {
            1 => self.bulk().await?.ok_or(RedisError::Protocol),
            _ => Err(RedisError::Protocol),
        }
    }

    /// An answer of any form, which is bounded.
    pub(in crate::store) async fn reply(&mut self, command: &'static str) -> Result<Reply, RedisError> {
        // Lists that are not complete yet, and how many items each still lacks.
        let mut open: Vec<(Vec<Reply>, usize)> = Vec::new();
        let (mut items, mut bytes) = (0, 0);
        loop {
            let line = self.line().await?;
            let mut done = match line.split_first() {
                Some((b'-', error)) if open.is_empty() => return Err(refused(command, error)),
                Some((b'+' | b':', rest)) => Reply::Text(rest.into()),
                Some((b'$' | b'*', b"-1")) => Reply::Nil,
                Some((b'$', digits)) => self.text(length(digits)?).await?.map_or(Reply::Nil, Reply::Text),
                Some((b'*', digits)) => match usize::try_from(length(digits)?).ok().filter(|length| *length <= MAX_REPLY_ITEMS) {
                    Some(0) => Reply::List(Vec::new()),
                    Some(length) if open.len() < MAX_DEPTH => {
                        open.push((Vec::new(), length));
                        continue;
                    }
                    Some(_) | None => return Err(RedisError::Protocol),
                },
                Some(_) | None => return Err(RedisError::Protocol),
            };
            items += 1;
            if let Reply::Text(text) = &done {
                bytes += text.len();
            }
            if items > MAX_REPLY_ITEMS || bytes > MAX_REPLY_BYTES {
                return Err(RedisError::Protocol);
            }
            loop {
                let Some((mut list, lacks)) = open.pop() else { return Ok(done) };
                list.push(done);
                if lacks > 1 {
                    open.push((list, lacks - 1));
                    break;
                }
                done = Reply::List(list);
            }
        }
    }

    /// Waits until the connection is closed, or brings what nobody has asked for.
    pub(super) async fn closed(&mut self) {
        let _ = self.wire.fill_buf().await;
    }

    /// A field and its value; `None` where one of them is so long that it is no record.
    pub(super) async fn pair(&mut self) -> Result<Option<Entry>, RedisError> {
        let (field, value) = (self.bulk().await?, self.bulk().await?);
        Ok(field.zip(value).map(|(field, value)| Entry { field, value }))
    }

    /// A text of any bytes. What is too long for a record is read, and dropped as it comes.
    async fn bulk(&mut self) -> Result<Option<Box<[u8]>>, RedisError> {
        let line = self.line().await?;
        self.text(length(line.strip_prefix(b"$").ok_or(RedisError::Protocol)?)?).await
    }

    /// A text of so many bytes, without its head.
    async fn text(&mut self, mut left: u64) -> Result<Option<Box<[u8]>>, RedisError> {
        let fits = usize::try_from(left).ok().filter(|length| *length <= MAX_BYTES);
        let mut bulk = fits.map(Vec::with_capacity);
        while left > 0 {
            let come = timeout(TIMEOUT, self.wire.fill_buf()).await.map_err(|_| RedisError::Timeout)??;
            if come.is_empty() {
                return Err(RedisError::Closed);
            }
            let length = come.len().min(left.try_into().unwrap_or(usize::MAX));
            if let Some(bulk) = &mut bulk {
                bulk.extend_from_slice(&come[..length]);
            }
            self.wire.consume(length);
            left -= length as u64;
        }
        if self.line().await?.is_empty() {
            Ok(bulk.map(Into::into))
        } else {
            Err(RedisError::Protocol)
        }
    }

    /// The first line of an answer of one of these kinds, without its kind.
    async fn head(&mut self, command: &'static str, kinds: &[u8]) -> Result<Vec<u8>, RedisError> {
        let line = self.line().await?;
        match line.split_first() {
            Some((b'-', error)) => Err(refused(command, error)),
            Some((kind, rest)) if kinds.contains(kind) => Ok(rest.to_vec()),
            Some(_) | None => Err(RedisError::Protocol),
        }
    }

    /// Reads a line without its end.
    async fn line(&mut self) -> Result<Vec<u8>, RedisError> {
        let mut line = Vec::new();
        let mut bounded = (&mut self.wire).take(MAX_LINE_BYTES);
        in_time(async { Ok(bounded.read_until(b'\n', &mut line).await?) }).await?;
        if line.ends_with(b"\r\n") {
            line.truncate(line.len() - 2);
            Ok(line)
        } else if line.ends_with(b"\n") || bounded.limit() == 0 {
            Err(RedisError::Protocol)
        } else {
            Err(RedisError::Closed)
        }
    }
}

/// A command as it is sent.
pub(in crate::store) fn encoded(parts: &[&[u8]]) -> Vec<u8> {
    let mut command = format!("*{}\r\n", parts.len()).into_bytes();
    for part in parts {
        command.extend(format!("${}\r\n", part.len()).as_bytes());
        command.extend_from_slice(part);
        command.extend_from_slice(b"\r\n");
    }
    command
}

fn length(digits: &[u8]) -> Result<u64, RedisError> {
    // No sign, and not so many digits that they overflow.
    if digits.is_empty() || digits.len() > 15 || !digits.iter().all(u8::is_ascii_digit) {
        return Err(RedisError::Protocol);
    }
    Ok(digits.iter().fold(0, |number, digit| number * 10 + u64::from(digit - b'0')))
}

fn refused(command: &'static str, error: &[u8]) -> RedisError {
    // Before version 7 the error of a command in a script comes behind one of the script.
    let inner = error
        .starts_with(b"ERR Error running script")
        .then(|| error.windows(2).position(|two| two == b" -"));
    let error = inner.flatten().map_or(error, |at| &error[at + 2..]);
    let code: String = error
        .iter()
        .take(20)
        .take_while(|byte| byte.is_ascii_uppercase())
        .map(|byte| char::from(*byte))
        .collect();
    RedisError::Refused {
        command,
        code: if code.is_empty() { "ERR".into() } else { code.into() },
    }
}

impl From<io::Error> for RedisError {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            Self::Closed
        } else {
            Self::Broken(error.kind())
        }
    }
}

#[cfg(test)]
mod tests;
