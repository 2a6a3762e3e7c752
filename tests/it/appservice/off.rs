//! Without application-service mode none of its endpoints exist.

use super::{CLIENT, FEDERATION};
use crate::support::client::Call;
use crate::support::service::beside_a_homeserver;
use crate::support::world::World;

/// Else the second pass of `tests/run` would show nothing.
#[test]
fn the_suites_run_in_the_mode_that_is_asked_for() {
    let world = World::shared();
    let (status, errcode) = if beside_a_homeserver() {
        (401, "M_MISSING_TOKEN")
    } else {
        (404, "M_UNRECOGNIZED")
    };
    world.service.get("/_matrix/app/v1/ping").assert_errcode(status, errcode);
}

#[test]
fn its_paths_are_unknown() {
    let world = World::with(|setup| {
        let names = [
            "LIVEKIT_HS_SERVER_NAME",
            "LIVEKIT_AS_TOKEN",
            "LIVEKIT_HS_TOKEN",
            "LIVEKIT_REQUIRE_MEMBERSHIP",
        ];
        names.into_iter().fold(setup, crate::support::service::Setup::unset)
    });
    let mut paths = vec![
        "/_matrix/app/v1/ping".to_owned(),
        "/_matrix/app/v1/transactions/1".to_owned(),
        "/_matrix/app/v1/users/x".to_owned(),
    ];
    for base in CLIENT {
        paths.extend([format!("{base}/get_token"), format!("{base}/delegate_delayed_leave")]);
    }
    paths.extend(FEDERATION.map(|base| format!("{base}/get_token")));
    for path in paths {
        for method in ["GET", "POST", "PUT"] {
            for prefix in ["", "/livekit/jwt"] {
                let call = Call::with_body(method, &format!("{prefix}{path}"), "{}").header("Authorization", "Bearer x");
                world.service.call(&call).assert_errcode(404, "M_UNRECOGNIZED");
            }
        }
    }
}
