//! The healthcheck of the container: does `/healthz` answer 200 where the service listens?
//!
//! No runtime and no client library, so that it costs next to nothing every few seconds. It reads the same variables as the
//! service, and answers within three seconds, whatever the other side does.
#![expect(clippy::disallowed_methods, reason = "a program of its own, with a deadline")]

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::config::{self, ConfigErrors};

/// For everything together: the image allows three seconds.
const TIMEOUT: Duration = Duration::from_millis(2500);

/// No status line is longer.
const MAX_STATUS_LINE_BYTES: usize = 1024;

/// Asks once. Success is 0 without a word; anything else is 1 with one line on stdout.
pub fn run(get: &dyn Fn(&str) -> Option<String>) -> ExitCode {
    match check(get, Instant::now() + TIMEOUT) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // The exit code says it too, so a closed stdout changes nothing.
            let _ = writeln!(io::stdout(), "{failure}");
            ExitCode::FAILURE
        }
    }
}

/// Why the service is not healthy.
#[derive(Debug)]
enum Failure {
    Config(ConfigErrors),
    Status(u16),
    /// By address, since more than one may have been tried.
    Connection(Vec<(String, io::Error)>),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config(errors) => write!(f, "Configuration error: {}", errors.to_string().replace('\n', "; ")),
            Self::Status(code) => write!(f, "Healthcheck failed with status code {code}"),
            Self::Connection(errors) => {
                f.write_str("Connection error: ")?;
                for (index, (address, error)) in errors.iter().enumerate() {
                    let separator = if index == 0 { "" } else { "; " };
                    write!(f, "{separator}{address}: {error}")?;
                }
                Ok(())
            }
        }
    }
}

fn check(get: &dyn Fn(&str) -> Option<String>, deadline: Instant) -> Result<(), Failure> {
    let targets = config::bind(get).map_err(Failure::Config)?.healthcheck_targets();
    let mut addresses = Vec::new();
    let mut errors = Vec::new();
    for (host, port) in targets {
        match resolve(&host, port, deadline) {
            Ok(found) => addresses.extend(found),
            Err(error) => errors.push((host, error)),
        }
    }
    let mut wrong_status = None;
    for (index, address) in addresses.iter().enumerate() {
        // A silent address leaves the others their share.
        let left = remaining(deadline) / u32::try_from(addresses.len() - index).unwrap_or(u32::MAX);
        match status(*address, Instant::now() + left) {
            Ok(200) => return Ok(()),
            Ok(code) => wrong_status = Some(code),
            Err(error) => errors.push((address.to_string(), error)),
        }
    }
    Err(wrong_status.map_or(Failure::Connection(errors), Failure::Status))
}

/// Addresses need no resolver; names go to the system's, which may take longer than we have.
fn resolve(host: &str, port: u16, deadline: Instant) -> io::Result<Vec<SocketAddr>> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    let (send, receive) = mpsc::channel();
    let host = host.to_owned();
    std::thread::Builder::new().spawn(move || {
        let found = (host, port).to_socket_addrs().map(Iterator::collect);
        // Nobody listens any more after the deadline.
        let _ = send.send(found);
    })?;
    receive.recv_timeout(remaining(deadline)).unwrap_or_else(|_| Err(too_slow()))
}

fn status(address: SocketAddr, deadline: Instant) -> io::Result<u16> {
    let mut stream = TcpStream::connect_timeout(&address, within(deadline)?)?;
    stream.set_write_timeout(Some(within(deadline)?))?;
    write!(
        stream,
        "GET /healthz HTTP/1.1\r\nHost: {address}\r\nUser-Agent: lk-jwt-service-healthcheck\r\nConnection: close\r\n\r\n"
    )?;
    let mut head = Vec::new();
    while !head.contains(&b'\n') && head.len() < MAX_STATUS_LINE_BYTES {
        stream.set_read_timeout(Some(within(deadline)?))?;
        let mut chunk = [0; 256];
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => head.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // What a read time-out looks like on Unix.
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(too_slow()),
            Err(error) => return Err(error),
        }
    }
    parse_status(&head).ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "the answer is not HTTP"))
}

/// The code of `HTTP/1.1 200 OK`.
fn parse_status(head: &[u8]) -> Option<u16> {
    let line = head.split(|byte| *byte == b'\n').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    words.next().filter(|version| version.starts_with("HTTP/1."))?;
    words
        .next()
        .filter(|code| code.len() == 3 && code.bytes().all(|byte| byte.is_ascii_digit()))?
        .parse()
        .ok()
}

fn remaining(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

/// As a time-out for a socket, which must not be zero.
fn within(deadline: Instant) -> io::Result<Duration> {
    Some(remaining(deadline)).filter(|left| !left.is_zero()).ok_or_else(too_slow)
}

fn too_slow() -> io::Error {
    io::Error::new(ErrorKind::TimedOut, "no answer in time")
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// Serves every connection with `answer`, and returns the port.
    fn serve(listener: TcpListener, answer: impl Fn(&mut TcpStream) + Send + 'static) -> u16 {
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut request = Vec::new();
                while !request.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    stream.read_exact(&mut byte).unwrap();
                    request.push(byte[0]);
                }
                assert!(request.starts_with(b"GET /healthz HTTP/1.1\r\nHost: "));
                answer(&mut stream);
            }
        });
        port
    }

    fn server(address: &str, answer: impl Fn(&mut TcpStream) + Send + 'static) -> u16 {
        serve(TcpListener::bind(address).unwrap(), answer)
    }

    fn answering(address: &str, answer: &'static str) -> u16 {
        server(address, move |stream| stream.write_all(answer.as_bytes()).unwrap())
    }

    const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";

    fn check_with(name: &str, value: &str) -> Result<(), String> {
        let get = |asked: &str| (asked == name).then(|| value.to_owned());
        check(&get, Instant::now() + TIMEOUT).map_err(|failure| failure.to_string())
    }

    fn check_bind(value: &str) -> Result<(), String> {
        check_with("LIVEKIT_JWT_BIND", value)
    }

    #[test]
    fn finds_the_service_by_every_form_of_address() {
        let v4 = answering("127.0.0.1:0", OK);
        assert_eq!(check_bind(&format!(":{v4}")), Ok(()), "IPv4 only, found after IPv6 was refused");
        assert_eq!(check_bind(&v4.to_string()), Ok(()));
        assert_eq!(check_bind(&format!("0.0.0.0:{v4}")), Ok(()));
        assert_eq!(check_bind(&format!("127.0.0.1:{v4}")), Ok(()));
        assert_eq!(check_bind(&format!("localhost:{v4}")), Ok(()));
        assert_eq!(check_with("LIVEKIT_JWT_PORT", &v4.to_string()), Ok(()));
        assert_eq!(check_with("LK_JWT_PORT", &v4.to_string()), Ok(()));
        // Not where loopback leads; not every system has more than one such address.
        if TcpListener::bind("127.0.0.2:0").is_ok() {
            let elsewhere = answering("127.0.0.2:0", OK);
            assert_eq!(check_bind(&format!("127.0.0.2:{elsewhere}")), Ok(()));
            assert!(check_bind(&format!("127.0.0.1:{elsewhere}")).is_err());
        }
        if TcpListener::bind("[::1]:0").is_ok() {
            let v6 = answering("[::1]:0", OK);
            assert_eq!(check_bind(&format!(":{v6}")), Ok(()));
            assert_eq!(check_bind(&format!("[::]:{v6}")), Ok(()));
            assert_eq!(check_bind(&format!("[::1]:{v6}")), Ok(()));
            assert!(check_bind(&format!("0.0.0.0:{v6}")).is_err(), "nobody listens on IPv4");
        }
    }

    #[test]
    fn finds_the_listener_of_the_service() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        for (form, host) in [(":0", ""), ("0.0.0.0:0", "0.0.0.0"), ("localhost:0", "localhost")] {
            let listener = runtime
                .block_on(crate::bind::Bind::parse(form).unwrap().listen())
                .unwrap()
                .into_std()
                .unwrap();
            listener.set_nonblocking(false).unwrap();
            let port = serve(listener, |stream| stream.write_all(OK.as_bytes()).unwrap());
            assert_eq!(check_bind(&format!("{host}:{port}")), Ok(()), "{form}");
        }
    }

    #[test]
    fn only_200_is_healthy() {
        for (answer, expected) in [
            (
                "HTTP/1.1 503 Service Unavailable\r\n\r\n",
                "Healthcheck failed with status code 503",
            ),
            ("HTTP/1.1 204 No Content\r\n\r\n", "Healthcheck failed with status code 204"),
            (
                "HTTP/1.1 301 Moved\r\nLocation: /\r\n\r\n",
                "Healthcheck failed with status code 301",
            ),
            ("HTTP/1.0 404\r\n", "Healthcheck failed with status code 404"),
        ] {
            assert_eq!(
                check_bind(&format!("127.0.0.1:{}", answering("127.0.0.1:0", answer))),
                Err(expected.to_owned())
            );
        }
        assert_eq!(
            check_bind(&format!("127.0.0.1:{}", answering("127.0.0.1:0", "HTTP/1.0 200\n"))),
            Ok(())
        );
    }

    #[test]
    fn says_what_is_wrong_with_the_connection() {
        for garbage in [
            "",
            "\n",
            "SSH-2.0-OpenSSH_9\r\n",
            "HTTP/2 200\r\n",
            "HTTP/1.1 2000\r\n",
            "HTTP/1.1 +20\r\n\0",
        ] {
            let port = answering("127.0.0.1:0", garbage);
            let expected = format!("Connection error: 127.0.0.1:{port}: the answer is not HTTP");
            assert_eq!(check_bind(&format!("127.0.0.1:{port}")), Err(expected), "{garbage:?}");
        }
        let endless = server("127.0.0.1:0", |stream| while stream.write_all(&[b'x'; 4096]).is_ok() {});
        assert!(check_bind(&format!("127.0.0.1:{endless}")).is_err());
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let error = check_bind(&closed.to_string()).unwrap_err();
        assert!(
            error.starts_with(&format!("Connection error: {closed}: ")) && error.contains("refused"),
            "{error}"
        );
    }

    #[test]
    fn a_wrong_address_is_a_line_about_its_variable() {
        let error = check_bind("nonsense").unwrap_err();
        assert!(error.starts_with("Configuration error: LIVEKIT_JWT_BIND has no port"), "{error}");
        let both = |name: &str| name.starts_with("LIVEKIT_JWT_").then(|| "80".to_owned());
        let error = check(&both, Instant::now() + TIMEOUT).unwrap_err().to_string();
        assert!(error.contains("must not be set together") && error.lines().count() == 1, "{error}");
    }

    #[test]
    fn a_silent_or_dripping_server_takes_less_than_three_seconds() {
        let silent = server("127.0.0.1:0", |_| std::thread::sleep(Duration::from_secs(60)));
        let dripping = server("127.0.0.1:0", |stream| {
            while stream.write_all(b"H").is_ok() {
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        // Never accepted: the kernel answers, nobody else does.
        let unaccepted = TcpListener::bind("0.0.0.0:0").unwrap();
        let tests = [
            format!("127.0.0.1:{silent}"),
            format!("localhost:{dripping}"),
            format!(":{}", unaccepted.local_addr().unwrap().port()),
        ];
        let threads = tests.map(|bind| {
            std::thread::spawn(move || {
                let started = Instant::now();
                (check_bind(&bind), started.elapsed(), bind)
            })
        });
        for thread in threads {
            let (result, elapsed, bind) = thread.join().unwrap();
            let error = result.unwrap_err();
            assert!(
                error.starts_with("Connection error: ") && error.contains("no answer in time"),
                "{bind}: {error}"
            );
            assert!(elapsed < Duration::from_secs(3), "{bind}: {elapsed:?}");
        }
    }

    #[test]
    fn the_exit_code_says_it_too() {
        let port = answering("127.0.0.1:0", OK).to_string();
        let get = |name: &str| (name == "LIVEKIT_JWT_PORT").then(|| port.clone());
        assert_eq!(format!("{:?}", run(&get)), format!("{:?}", ExitCode::SUCCESS));
        assert_eq!(format!("{:?}", run(&|_| Some("x".to_owned()))), format!("{:?}", ExitCode::FAILURE));
    }
}
