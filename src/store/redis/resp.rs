//! RESP2, as far as a hash needs it. Whatever a server says, memory and time are bounded.

use std::io;
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

use super::Wire;
use crate::store::Entry;
use crate::store::record::MAX_BYTES;

/// Longest line; the lines that matter are short.
const MAX_LINE: usize = 8 * 1024;
/// Most bytes of all fields and values: more than the longest records of as many jobs as there may be.
const MAX_TOTAL: u64 = 8 * 1024 * 1024 * 1024;
/// Counted for each, so that empty ones do not go on for ever.
const OVERHEAD: u64 = 16;
/// Read at once.
const CHUNK: usize = 64 * 1024;

/// Redis cannot do what it should. Nothing that the server said is repeated, but the code of an error.
#[derive(Debug, thiserror::Error)]
pub enum RedisError {
    /// No connection.
    #[error("cannot connect: {0}")]
    Unreachable(String),
    /// TLS.
    #[error("cannot connect by TLS: {0}")]
    Tls(String),
    /// Nothing in time.
    #[error("no answer in time")]
    Timeout,
    /// It closed the connection.
    #[error("the connection was closed")]
    Closed,
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Broken(io::ErrorKind),
    /// It refused a command.
    #[error("{command} was refused ({code})")]
    Refused {
        /// Which one.
        command: &'static str,
        /// The first word of its answer.
        code: Box<str>,
    },
    /// It does not speak the protocol.
    #[error("the answer is not Redis's")]
    Protocol,
    /// The hash is larger than we read.
    #[error("the hash is larger than 8 GiB")]
    TooLarge,
}

impl RedisError {
    /// Whether a change was refused by a server that may take others: for want of memory, for its size, or since its key is
    /// another program's.
    pub(super) fn concerns_one_change(&self) -> bool {
        matches!(self, Self::Refused { code, .. } if matches!(&**code, "OOM" | "ERR" | "NOPERM" | "WRONGTYPE"))
    }

    /// What the operator can do.
    pub(crate) fn remedy(&self) -> &'static str {
        match self {
            Self::Unreachable(_) => "check that Redis runs, and the host and port of LIVEKIT_REDIS_URL",
            Self::Tls(_) => {
                "check that Redis speaks TLS on this port (rediss://), that its certificate names the host of LIVEKIT_REDIS_URL, and SSL_CERT_FILE"
            }
            Self::Timeout => "check Redis's load, and the network between",
            Self::Closed | Self::Broken(_) => "check Redis's log; a rediss:// port must not be spoken to by redis://",
            Self::Refused { command, code } => match (*command, &**code) {
                ("AUTH", _) | (_, "WRONGPASS") => "check the user name in LIVEKIT_REDIS_URL, and LIVEKIT_REDIS_PASSWORD",
                (_, "NOAUTH") => "Redis wants a password: set LIVEKIT_REDIS_PASSWORD",
                ("SELECT", _) => "check the number of the database in LIVEKIT_REDIS_URL",
                (_, "NOPERM") => "the Redis user needs PING, HSET, HDEL and HGETALL on the keys lk-jwt:jobs and lk-jwt:tokens (~lk-jwt:*)",
                (_, "WRONGTYPE") => "the key lk-jwt:jobs or lk-jwt:tokens holds something that is no hash: another program uses it",
                (_, "READONLY") => "LIVEKIT_REDIS_URL must lead to the primary, not to a replica",
                (_, "MOVED" | "ASK" | "CLUSTERDOWN") => {
                    "LIVEKIT_REDIS_URL must lead to the node of a cluster that has lk-jwt:jobs and lk-jwt:tokens"
                }
                (_, "OOM") => "Redis is out of memory: raise maxmemory",
                (_, "LOADING" | "BUSY" | "MASTERDOWN" | "TRYAGAIN") => "Redis is busy: this should pass",
                (_, "MISCONF") => "Redis cannot write to its disk: check its log",
                (_, "DENIED") => "Redis is in protected mode: set a password there, or bind it to this network",
                _ => "check Redis's log; PING, HSET, HDEL and HGETALL are needed",
            },
            Self::Protocol => "check that LIVEKIT_REDIS_URL leads to Redis and to nothing else",
            Self::TooLarge => "something else writes to lk-jwt:jobs or lk-jwt:tokens; remove what is not ours",
        }
    }
}

/// A connection, and what was read ahead of it.
pub(super) struct Connection {
    wire: Box<dyn Wire>,
    patience: Duration,
    read: BytesMut,
    unsent: BytesMut,
    total: u64,
}

impl Connection {
    /// `patience` is for each read and each send.
    pub(super) fn new(wire: Box<dyn Wire>, patience: Duration) -> Self {
        Self {
            wire,
            patience,
            read: BytesMut::new(),
            unsent: BytesMut::new(),
            total: 0,
        }
    }

    /// Prepares a command.
    pub(super) fn command(&mut self, parts: &[&[u8]]) {
        let head = |out: &mut BytesMut, kind: &[u8], number: usize| {
            out.extend_from_slice(kind);
            out.extend_from_slice(number.to_string().as_bytes());
            out.extend_from_slice(b"\r\n");
        };
        head(&mut self.unsent, b"*", parts.len());
        for part in parts {
            head(&mut self.unsent, b"$", part.len());
            self.unsent.extend_from_slice(part);
            self.unsent.extend_from_slice(b"\r\n");
        }
    }

    /// Sends what is prepared.
    pub(super) async fn send(&mut self) -> Result<(), RedisError> {
        let unsent = self.unsent.split();
        let sending = async {
            self.wire.write_all(&unsent).await?;
            self.wire.flush().await
        };
        timeout(self.patience, sending)
            .await
            .map_err(|_| RedisError::Timeout)?
            .map_err(broken)
    }

    /// The answer to a command that brings nothing back but its success.
    pub(super) async fn done(&mut self, command: &'static str) -> Result<(), RedisError> {
        let line = self.line().await?;
        match line.split_first() {
            Some((b'+' | b':', _)) => Ok(()),
            Some((b'-', error)) => Err(refused(command, error)),
            Some(_) | None => Err(RedisError::Protocol),
        }
    }

    /// The head of an answer of fields and values: how many pairs follow.
    pub(super) async fn pairs(&mut self, command: &'static str) -> Result<u64, RedisError> {
        let line = self.line().await?;
        match line.split_first() {
            Some((b'*', b"-1")) => Ok(0),
            Some((b'*', digits)) => {
                let items = length(digits)?;
                if items % 2 == 0 { Ok(items / 2) } else { Err(RedisError::Protocol) }
            }
            Some((b'-', error)) => Err(refused(command, error)),
            Some(_) | None => Err(RedisError::Protocol),
        }
    }

    /// The head of an answer to `HSCAN`: the next cursor; fields and values follow.
    pub(super) async fn cursor(&mut self) -> Result<Box<[u8]>, RedisError> {
        match self.pairs("HSCAN").await? {
            1 => self.bulk().await?.ok_or(RedisError::Protocol),
            _ => Err(RedisError::Protocol),
        }
    }

    /// Waits until the connection is closed, or brings what nobody has asked for.
    pub(super) async fn closed(&mut self) {
        let _ = self.wire.read_buf(&mut self.read).await;
    }

    /// A field and its value; `None` where one of them is so long that it is no record.
    pub(super) async fn pair(&mut self) -> Result<Option<Entry>, RedisError> {
        let (field, value) = (self.bulk().await?, self.bulk().await?);
        Ok(field.zip(value).map(|(field, value)| Entry { field, value }))
    }

    async fn bulk(&mut self) -> Result<Option<Box<[u8]>>, RedisError> {
        let line = self.line().await?;
        let Some((b'$', digits)) = line.split_first() else {
            return Err(RedisError::Protocol);
        };
        let mut left = length(digits)?;
        self.total = self.total.saturating_add(left).saturating_add(OVERHEAD);
        if self.total > MAX_TOTAL {
            return Err(RedisError::TooLarge);
        }
        let bulk = match usize::try_from(left) {
            Ok(length) if length <= MAX_BYTES => {
                self.fill(length).await?;
                Some(self.read.split_to(length).as_ref().into())
            }
            Ok(_) | Err(_) => {
                while left > 0 {
                    self.fill(1).await?;
                    let skipped = self.read.len().min(left.try_into().unwrap_or(usize::MAX));
                    self.read.advance(skipped);
                    left -= skipped as u64;
                }
                None
            }
        };
        self.fill(2).await?;
        if self.read.split_to(2).as_ref() == b"\r\n" {
            Ok(bulk)
        } else {
            Err(RedisError::Protocol)
        }
    }

    /// A line without its end.
    async fn line(&mut self) -> Result<BytesMut, RedisError> {
        let mut seen = 0;
        loop {
            if let Some(at) = self.read.iter().skip(seen).position(|byte| *byte == b'\n') {
                let mut line = self.read.split_to(seen + at + 1);
                line.truncate(seen + at);
                return if line.ends_with(b"\r") {
                    line.truncate(line.len() - 1);
                    Ok(line)
                } else {
                    Err(RedisError::Protocol)
                };
            }
            seen = self.read.len();
            if seen > MAX_LINE {
                return Err(RedisError::Protocol);
            }
            self.fill(seen + 1).await?;
        }
    }

    /// Reads until so many bytes are there.
    async fn fill(&mut self, wanted: usize) -> Result<(), RedisError> {
        while self.read.len() < wanted {
            self.read.reserve(CHUNK);
            let reading = self.wire.read_buf(&mut self.read);
            if timeout(self.patience, reading)
                .await
                .map_err(|_| RedisError::Timeout)?
                .map_err(broken)?
                == 0
            {
                return Err(RedisError::Closed);
            }
        }
        Ok(())
    }
}

fn length(digits: &[u8]) -> Result<u64, RedisError> {
    // No sign, and not so many digits that they overflow.
    if digits.is_empty() || digits.len() > 15 || !digits.iter().all(u8::is_ascii_digit) {
        return Err(RedisError::Protocol);
    }
    Ok(digits.iter().fold(0, |number, digit| number * 10 + u64::from(digit - b'0')))
}

fn refused(command: &'static str, error: &[u8]) -> RedisError {
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

fn broken(error: io::Error) -> RedisError {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        RedisError::Closed
    } else {
        RedisError::Broken(error.kind())
    }
}

#[cfg(test)]
mod tests;
