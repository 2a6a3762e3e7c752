//! `livekit-server --dev` beside `lk-jwt-service --dev`: nothing to configure.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;

use crate::support::homeserver::Homeserver;
use crate::support::livekit::{Client, Livekit};
use crate::support::process::{program, real_neighbours};
use crate::support::service::Setup;
use crate::support::{bodies, unique_room};

const INSIDE: &str = "LK_TESTS_INSIDE_NAMESPACE";

/// Loopback, and an interface as any machine has one: media does not go over loopback in LiveKit's dev mode.
const NETWORK: &str = r#"PATH=$PATH:/usr/sbin:/sbin
    ip link set lo up
    ip link add net0 type veth peer name net1
    ip link set net0 up
    ip link set net1 up
    ip address add 192.168.77.2/24 dev net0
    exec "$0" "$@""#;

/// Both on their default ports. So that these are free, the test starts itself once more in a network namespace.
#[test]
fn the_two_dev_modes_work_together() {
    if !real_neighbours() {
        return;
    }
    if std::env::var_os(INSIDE).is_some() {
        return inside();
    }
    let myself = std::env::current_exe().expect("this program");
    let mut command = Command::new(program("unshare"));
    command
        .args(["--map-root-user", "--net", "--", "/bin/sh", "-ec", NETWORK])
        .arg(myself)
        .args(["real::dev::the_two_dev_modes_work_together", "--exact", "--nocapture"])
        .env(INSIDE, "1");
    let output = command.output().expect("unshare");
    let said = [output.stdout, output.stderr]
        .map(|text| String::from_utf8_lossy(&text).into_owned())
        .join("\n");
    assert!(
        output.status.success() && said.contains("1 passed"),
        "in a network namespace of its own ({}):\n{said}",
        output.status
    );
}

fn inside() {
    let livekit = Livekit::start_dev();
    let home = Homeserver::start();
    // What the two commands of the README take from the network of a developer: a homeserver that can be reached.
    let service = Setup::bare()
        .unset("LIVEKIT_JWT_BIND")
        .env("LIVEKIT_FEDERATION_ALLOWED_NETWORKS", "127.0.0.0/8")
        .argument("--dev")
        .reached_at(SocketAddr::from((Ipv4Addr::LOCALHOST, 8080)))
        .start();
    assert!(service.warns_of(&["--dev", "not for production"]));
    for (path, body) in [
        ("/get_token", bodies::get_token_of(&home, "alice", &unique_room())),
        ("/sfu/get", bodies::sfu_get_of(&home, "alice", &unique_room())),
    ] {
        let answer = service.post(path, &body);
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        let answer = answer.json();
        assert_eq!(answer["url"], "ws://localhost:7880");
        let claims = super::claims(&answer, &livekit);
        let (_client, identity) = Client::join(&answer);
        assert_eq!(claims["sub"], identity);
    }
}
