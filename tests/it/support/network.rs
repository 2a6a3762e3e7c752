//! The network that a test runs in: the machine's, or one of its own in which every address of the internet is ours.

use std::any::type_name;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::process::Command;
use std::sync::LazyLock;

use tokio::net::{TcpSocket, TcpStream};

use super::process::{self, Process};
use super::{nothing_may_be_left_out, runtime, unique_loopback};

/// Set for a test that was started again inside its own network.
const INSIDE: &str = "LK_TESTS_OWN_NETWORK";

/// Every address is local, so that a listener can sit anywhere.
const SCRIPT: &str = "ip link set lo up && ip route add local default dev lo table main \
    && ip -6 route add local default dev lo table main && exec \"$0\" \"$@\"";

/// Runs `body`, which listens on the ports 443 and 8448 of addresses of its own.
#[track_caller]
pub(crate) fn with_low_ports<F: FnOnce()>(body: F) {
    static ALLOWED: LazyLock<bool> = LazyLock::new(|| TcpListener::bind((unique_loopback(), 443)).is_ok());
    if *ALLOWED { body() } else { in_own_network(body) }
}

/// Runs `body` in a network of its own (Linux namespaces): every port of every address can be listened on, and nothing
/// leaves the machine. `body` must be written directly in the test function, whose name is taken from its type.
#[track_caller]
pub(crate) fn in_own_network<F: FnOnce()>(body: F) {
    if std::env::var_os(INSIDE).is_some() {
        return body();
    }
    let test = type_name::<F>()
        .split_once("::")
        .and_then(|(_, path)| path.strip_suffix("::{{closure}}"))
        .expect("a closure in a test function");
    let Some(options) = &*OPTIONS else {
        assert!(
            !nothing_may_be_left_out(),
            "{test} needs a network namespace: unshare and iproute2, and root or user namespaces"
        );
        eprintln!("left out, no network namespace can be made here (unshare, iproute2): {test}");
        return;
    };
    let output = enter(options)
        .arg(std::env::current_exe().expect("this program"))
        .args([test, "--exact", "--include-ignored", "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .output()
        .expect("unshare");
    let out = String::from_utf8_lossy(&output.stdout);
    eprintln!("{out}{}", String::from_utf8_lossy(&output.stderr));
    assert!(
        output.status.success() && out.contains("1 passed"),
        "{test} failed in its own network"
    );
}

/// How namespaces can be made here: as root, or by mapping ourselves to root.
static OPTIONS: LazyLock<Option<Vec<&str>>> = LazyLock::new(|| {
    let plain = vec!["--net", "--mount"];
    let mapped = vec!["--net", "--mount", "--map-root-user"];
    [plain, mapped]
        .into_iter()
        .find(|options| enter(options).arg("true").output().is_ok_and(|o| o.status.success()))
});

fn enter(options: &[&str]) -> Command {
    let mut command = Command::new("unshare");
    command.args(options).args(["sh", "-c", SCRIPT]);
    command
}

/// Puts a file of ours in the place of one of the system's, in an own network. Where it is: what is written there counts.
#[track_caller]
pub(crate) fn replace_file(file: &str, text: &str) -> String {
    assert!(std::env::var_os(INSIDE).is_some(), "not in an own network");
    let ours = format!("{}/{}-{}", env!("CARGO_TARGET_TMPDIR"), file.replace('/', "-"), std::process::id());
    std::fs::write(&ours, text).expect("a file");
    let mounted = Command::new("mount").args(["--bind", &ours, file]).status().expect("mount");
    assert!(mounted.success(), "{file} cannot be replaced");
    ours
}

/// Makes `address` one of ours in an own network. (An IPv4 address is without it, an IPv6 address can only be dialled.)
pub(crate) fn own(address: IpAddr) {
    assert!(std::env::var_os(INSIDE).is_some(), "not in an own network");
    // It may be ours already.
    let _ = Command::new("ip")
        .args(["address", "add", &address.to_string(), "dev", "lo"])
        .args(address.is_ipv6().then_some("nodad"))
        .output()
        .expect("ip");
}

/// Another machine: a network whose one cable leads to this one, where the internet is.
pub(crate) struct OtherMachine(Process);

impl OtherMachine {
    /// Gives it this address, which is nobody else's. Must be called in an own network.
    pub(crate) fn at(address: Ipv4Addr) -> Self {
        assert!(std::env::var_os(INSIDE).is_some(), "not in an own network");
        let mut holder = Command::new("unshare");
        holder.args(["--net", "sleep", "infinity"]);
        let holder = Process::start("other-machine", &holder, &process::directory("other-machine"));
        let pid = holder.pid().to_string();
        let own = std::fs::read_link("/proc/self/ns/net").expect("a network");
        let other = || std::fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|network| network != own);
        holder.wait_ready(other);
        let cable =
            format!("ip link add cable type veth peer name cable netns {pid} && ip link set cable up && ip route add {address} dev cable");
        let there =
            format!("ip link set lo up && ip address add {address} dev cable && ip link set cable up && ip route add default dev cable");
        let machine = Self(holder);
        for (prefix, script) in [(vec![], cable), (machine.prefix(), there)] {
            let words: Vec<_> = prefix.into_iter().chain(["sh", "-c", &script].map(str::to_owned)).collect();
            let status = Command::new(&words[0]).args(&words[1..]).status().expect("ip");
            assert!(status.success(), "{words:?}");
        }
        machine
    }

    /// Words before a command that is to run there.
    pub(crate) fn prefix(&self) -> Vec<String> {
        let pid = self.0.pid().to_string();
        ["nsenter", "--net", "--target", &pid].map(str::to_owned).to_vec()
    }
}

/// How many TCP connections were begun in this network so far, whatever became of them.
pub(crate) fn connections_begun() -> u64 {
    assert!(std::env::var_os(INSIDE).is_some(), "only counted in an own network");
    let snmp = std::fs::read_to_string("/proc/self/net/snmp").expect("snmp");
    let mut tcp = snmp.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let at = tcp
        .next()
        .and_then(|names| names.split(' ').position(|n| n == "ActiveOpens"))
        .expect("names");
    tcp.next()
        .and_then(|values| values.split(' ').nth(at)?.parse().ok())
        .expect("ActiveOpens")
}

/// A port at which packets get lost: its queue is full and nobody takes from it.
pub(crate) struct Lost {
    _listener: tokio::net::TcpListener,
    _queue: Vec<TcpStream>,
}

impl Lost {
    pub(crate) fn at(address: SocketAddr) -> Self {
        let _guard = runtime().enter();
        let socket = if address.is_ipv4() {
            TcpSocket::new_v4()
        } else {
            TcpSocket::new_v6()
        }
        .expect("socket");
        socket.set_reuseaddr(true).expect("SO_REUSEADDR");
        socket.bind(address).unwrap_or_else(|e| panic!("cannot take {address}: {e}"));
        let listener = socket.listen(0).expect("listening");
        let address = listener.local_addr().expect("address");
        let mut queue = Vec::new();
        // One that takes long may be late only.
        let wait = std::time::Duration::from_millis(300);
        let mut missed = 0;
        while missed < 2 {
            match runtime().block_on(async { tokio::time::timeout(wait, TcpStream::connect(address)).await }) {
                Ok(Ok(stream)) => queue.push(stream),
                _ => missed += 1,
            }
        }
        Self {
            _listener: listener,
            _queue: queue,
        }
    }
}
