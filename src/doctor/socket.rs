//! A WebSocket (RFC 6455) as far as LiveKit's signalling needs it: whole binary messages, in both directions.

use std::io::{self, ErrorKind};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Largest message that is read, in bytes.
const MAX_MESSAGE_BYTES: usize = 256 * 1024;

const CONTINUATION: u8 = 0;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// An open WebSocket, of which this is the client.
pub(super) struct Socket<S> {
    stream: S,
    /// Each frame of a client is masked; with which bytes, nobody needs to be surprised by here.
    mask: [u8; 4],
}

impl<S: AsyncRead + AsyncWrite + Unpin> Socket<S> {
    /// Takes over a connection after its upgrade.
    pub(super) const fn new(stream: S, mask: [u8; 4]) -> Self {
        Self { stream, mask }
    }

    /// Reads the next message; `None` where the other side says goodbye.
    ///
    /// # Errors
    /// When the connection breaks, or what comes is no WebSocket.
    pub(super) async fn read(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut message = Vec::new();
        loop {
            let mut head = [0; 10];
            self.stream.read_exact(&mut head[..2]).await?;
            let [first, second, ..] = head;
            let more = match second & 0x7f {
                126 => 2,
                127 => 8,
                _ => 0,
            };
            self.stream.read_exact(&mut head[2..2 + more]).await?;
            let length = match more {
                0 => u64::from(second & 0x7f),
                _ => head[2..2 + more].iter().fold(0, |length, byte| length << 8 | u64::from(*byte)),
            };
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            // Servers do not mask.
            if second & 0x80 != 0 || length > MAX_MESSAGE_BYTES - message.len() {
                return Err(ErrorKind::InvalidData.into());
            }
            let begin = message.len();
            message.resize(begin + length, 0);
            self.stream.read_exact(&mut message[begin..]).await?;
            match first & 0x0f {
                CONTINUATION | TEXT | BINARY if first & 0x80 != 0 => return Ok(Some(message)),
                CONTINUATION | TEXT | BINARY => {}
                CLOSE => return Ok(None),
                PING => {
                    let payload = message.split_off(begin);
                    self.frame(PONG, &payload).await?;
                }
                PONG => message.truncate(begin),
                _ => return Err(ErrorKind::InvalidData.into()),
            }
        }
    }

    /// Sends one binary message.
    ///
    /// # Errors
    /// When the connection breaks.
    pub(super) async fn write(&mut self, message: &[u8]) -> io::Result<()> {
        self.frame(BINARY, message).await
    }

    async fn frame(&mut self, kind: u8, payload: &[u8]) -> io::Result<()> {
        let mut frame = Vec::with_capacity(payload.len() + 14);
        frame.push(0x80 | kind);
        match (u8::try_from(payload.len()), u16::try_from(payload.len())) {
            (Ok(length @ 0..126), _) => frame.push(0x80 | length),
            (_, Ok(length)) => {
                frame.push(0x80 | 126);
                frame.extend(length.to_be_bytes());
            }
            (_, Err(_)) => return Err(ErrorKind::InvalidInput.into()),
        }
        frame.extend(self.mask);
        frame.extend(payload.iter().zip(self.mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        self.stream.write_all(&frame).await?;
        self.stream.flush().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn messages_go_both_ways() {
        let (ours, mut theirs) = tokio::io::duplex(1 << 20);
        let mut socket = Socket::new(ours, [1, 2, 3, 4]);
        socket.write(b"hello").await.unwrap();
        let mut frame = [0; 11];
        theirs.read_exact(&mut frame).await.unwrap();
        assert_eq!(&frame[..6], [0x82, 0x85, 1, 2, 3, 4]);
        let unmasked: Vec<u8> = frame[6..].iter().zip([1, 2, 3, 4].iter().cycle()).map(|(a, b)| a ^ b).collect();
        assert_eq!(unmasked, b"hello");
        // In two parts with a ping between them, then a long one, then a goodbye.
        theirs.write_all(b"\x02\x02ab\x89\x01p\x80\x01c").await.unwrap();
        assert_eq!(socket.read().await.unwrap().as_deref(), Some(&b"abc"[..]));
        let mut pong = [0; 7];
        theirs.read_exact(&mut pong).await.unwrap();
        assert_eq!(pong[..2], [0x8a, 0x81]);
        theirs
            .write_all(&[&b"\x82\x7f\0\0\0\0\0\x01\0\0"[..], &[7; 65536]].concat())
            .await
            .unwrap();
        assert_eq!(socket.read().await.unwrap().unwrap(), vec![7; 65536]);
        theirs.write_all(b"\x88\x00").await.unwrap();
        assert_eq!(socket.read().await.unwrap(), None);
    }

    #[tokio::test]
    async fn what_is_too_long_or_none_is_refused() {
        for bytes in [
            &b"\x82\x7f\xff\xff\xff\xff\xff\xff\xff\xff"[..],
            b"\x82\x81aaaab",
            b"\x85\x00",
            b"\x82",
        ] {
            let (ours, mut theirs) = tokio::io::duplex(64);
            theirs.write_all(bytes).await.unwrap();
            drop(theirs);
            assert!(Socket::new(ours, [0; 4]).read().await.is_err(), "{bytes:?}");
        }
    }
}
