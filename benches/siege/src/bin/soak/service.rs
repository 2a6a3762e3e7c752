//! The service as it runs and is replaced, and what it takes.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use siege::cage::Cage;
use siege::http;
use siege::places::{LISTED, Places};
use tokio::time::sleep;

use crate::neighbours::signal_to;
use crate::town::Town;

pub struct Stage {
    pub binary: String,
    pub nice: i32,
    pub places: Places,
    pub cage: Cage,
    pub folder: PathBuf,
    pub town: Arc<Town>,
    /// Who answers at the moment.
    pub now: Mutex<Option<Instance>>,
}

#[derive(Clone, Copy)]
pub struct Instance {
    pub pid: u32,
    pub began: Instant,
    pub address: SocketAddr,
    /// Which one it is.
    pub number: u32,
}

pub struct Service {
    pub child: Child,
    pub is: Instance,
    reader: JoinHandle<()>,
}

#[derive(Clone, Copy, Default)]
pub struct Taken {
    pub rss: u64,
    /// Of it, not shared with a file.
    pub anonymous: u64,
    pub files: u64,
    pub threads: u64,
    /// Bytes that went to a disk.
    pub written: u64,
    /// Descriptors of files that are open for writing.
    pub writable: u64,
    pub cpu_s: f64,
    /// For a core to run on.
    pub waited_s: f64,
}

impl Stage {
    pub fn keys(&self) -> PathBuf {
        self.folder.join("keys.yaml")
    }

    /// Where it runs; whatever it writes without being told where is seen there.
    pub fn home(&self) -> PathBuf {
        self.folder.join("home")
    }

    /// Starts one at `address`; it is the one that everybody asks once it is healthy.
    pub async fn start(&self, address: SocketAddr, number: u32) -> Result<Service, String> {
        let places = self.places;
        let mut command = self.cage.command(&self.binary, None, self.nice)?;
        let mut child = command
            .env("LIVEKIT_URL", format!("ws://{}", places.sfu()))
            .env("LIVEKIT_KEY_FILE", self.keys())
            .env("LIVEKIT_JWT_BIND", address.to_string())
            .env("LIVEKIT_FULL_ACCESS_HOMESERVERS", LISTED)
            .env(
                "LIVEKIT_CS_API_URL_OVERRIDES",
                format!("{LISTED}=http://{}", places.listed_client_api()),
            )
            .env("LIVEKIT_FEDERATION_ALLOWED_NETWORKS", "127.0.0.0/8")
            .env("LIVEKIT_DNS_SERVERS", places.dns().to_string())
            .env("LIVEKIT_REDIS_URL", format!("redis://{}", places.redis()))
            .env("LIVEKIT_LOG_FORMAT", "json")
            .env("SSL_CERT_FILE", self.folder.join("ca.pem"))
            .current_dir(self.home())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| format!("the service cannot be started: {e}"))?;
        let pipe = child.stderr.take().ok_or("no stderr")?;
        let town = self.town.clone();
        let is = Instance {
            pid: child.id(),
            number,
            began: Instant::now(),
            address,
        };
        let service = Service {
            child,
            is,
            reader: std::thread::spawn(move || town.ledger.read(pipe)),
        };
        let end = Instant::now() + Duration::from_secs(30);
        let request = format!("GET /healthz HTTP/1.1\r\nHost: {address}\r\n\r\n");
        let limit = Duration::from_secs(1);
        while http::ask([127, 0, 0, 1].into(), address, request.as_bytes(), limit).await.status != 200 {
            if Instant::now() > end {
                return Err(format!("{} does not become healthy; see --log FILE", self.binary));
            }
            sleep(Duration::from_millis(10)).await;
        }
        *self.town.service.lock().unwrap() = address;
        *self.now.lock().unwrap() = Some(is);
        Ok(service)
    }
}

impl Service {
    /// SIGTERM, and the end of its log; an error where it ends otherwise than well.
    pub async fn stop(mut self) -> Result<Duration, String> {
        let began = Instant::now();
        signal_to(self.is.pid, Signal::TERM);
        loop {
            if let Some(status) = self.child.try_wait().map_err(|e| e.to_string())? {
                let _ = self.reader.join();
                return match status.success() {
                    true => Ok(began.elapsed()),
                    false => Err(format!("instance {} ended with {status}", self.is.number)),
                };
            }
            if began.elapsed() > Duration::from_secs(40) {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return Err(format!("instance {} did not end within 40 s of SIGTERM", self.is.number));
            }
            sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Instance {
    pub fn taken(&self) -> Taken {
        let read = |name: &str| std::fs::read_to_string(format!("/proc/{}/{name}", self.pid)).unwrap_or_default();
        let field = |text: &str, name: &str| -> u64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0)
        };
        let (status, maps, io, stat) = (read("status"), read("smaps_rollup"), read("io"), read("stat"));
        let waited = read("schedstat").split_whitespace().nth(1).and_then(|n| n.parse::<f64>().ok());
        let times = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
        let mut taken = Taken {
            rss: field(&status, "VmRSS:") * 1024,
            anonymous: field(&maps, "Anonymous:") * 1024,
            threads: field(&status, "Threads:"),
            written: field(&io, "write_bytes:"),
            cpu_s: times.filter_map(|n| n.parse::<f64>().ok()).sum::<f64>() / 100.0,
            waited_s: waited.unwrap_or(0.0) / 1e9,
            ..Taken::default()
        };
        for entry in std::fs::read_dir(format!("/proc/{}/fd", self.pid)).into_iter().flatten().flatten() {
            taken.files += 1;
            let leads = std::fs::read_link(entry.path()).unwrap_or_default();
            if leads.starts_with("/") && !leads.starts_with("/dev") {
                let info = read(&format!("fdinfo/{}", entry.file_name().to_string_lossy()));
                let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap_or_default();
                let flags = u32::from_str_radix(flags.trim(), 8).unwrap_or(0);
                taken.writable += u64::from(flags & 3 != 0);
            }
        }
        taken
    }
}
