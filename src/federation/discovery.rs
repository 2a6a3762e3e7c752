//! The steps from a server name to a route, in the order of the specification.

use std::time::Duration;

use super::dial::{Attempt, Dialer, Dialled};
use super::failure::Failure;
use super::guard::Trust;
use super::route::{Route, Via, host_header, tls_name};
use super::well_known::{WellKnown, fetch};
use crate::server_name::{Host, ServerName};

/// Federation port of a literal address without a port.
const DEFAULT_PORT: u16 = 8448;

/// A route, and how long it may be used without asking again.
pub(super) struct Found {
    pub(super) route: Route,
    /// How long the way counts; for ever without a value.
    pub(super) life: Option<Duration>,
    /// Whether a well-known file gave the way.
    pub(super) file: File,
    /// Step of the specification, for the log.
    pub(super) step: &'static str,
}

/// Source of the way to a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum File {
    /// The name alone, or the operator.
    NotAsked,
    /// The well-known file of the server.
    Read,
    /// There is no usable file: the specification's fallbacks. It is asked for again soon.
    Missing,
    /// The file could not be asked for: the fallbacks, unless more is known.
    Unreachable,
}

pub(super) async fn discover<'a>(dialer: &'a Dialer, server: &ServerName, trust: Trust, attempt: &Attempt<'a>) -> Result<Found, Failure> {
    if let Some(url) = dialer.overrides.get(server) {
        return Ok(Found {
            route: Route::to_url(url, Dialled::Override)?,
            life: None,
            file: File::NotAsked,
            step: "override",
        });
    }
    let dialled = Dialled::Guarded(trust);
    let (host, port) = server.parts();
    let name = match &host {
        Host::Name(name) if port.is_none() => name,
        Host::Ip(_) | Host::Name(_) => {
            return Ok(Found {
                route: direct(server, dialled)?,
                life: None,
                file: File::NotAsked,
                step: "1 or 2: literal or port",
            });
        }
    };
    let well_known = fetch(dialer, name, trust, attempt).await?;
    match well_known {
        WellKnown::Delegated(delegated, life) => {
            let route = match delegated.parts() {
                (Host::Name(_), None) => by_srv(&delegated, dialled)?,
                (Host::Ip(_) | Host::Name(_), _) => direct(&delegated, dialled)?,
            };
            Ok(Found {
                route,
                life: Some(life),
                file: File::Read,
                step: "3: well-known",
            })
        }
        WellKnown::Invalid => Err(Failure::BadDelegation(server.as_str().to_owned())),
        WellKnown::None | WellKnown::Unreachable => Ok(Found {
            route: by_srv(server, dialled)?,
            life: None,
            file: if well_known == WellKnown::None {
                File::Missing
            } else {
                File::Unreachable
            },
            step: "4 to 6: SRV or port 8448",
        }),
    }
}

/// Steps 1, 2, 3.1 and 3.2: the name itself says where.
fn direct(name: &ServerName, dialled: Dialled) -> Result<Route, Failure> {
    let (host, port) = name.parts();
    Ok(Route {
        tls_name: Some(tls_name(&host)?),
        via: Via::Fixed(host, port.unwrap_or(DEFAULT_PORT)),
        host_header: host_header(name.as_str())?,
        base_path: String::new(),
        dialled,
    })
}

/// Steps 3.3 to 3.5 and 4 to 6: SRV records, else port 8448. Header and certificate carry the name, not the target.
fn by_srv(name: &ServerName, dialled: Dialled) -> Result<Route, Failure> {
    let (host, _) = name.parts();
    Ok(Route {
        tls_name: Some(tls_name(&host)?),
        via: Via::Srv(name.as_str().into()),
        host_header: host_header(name.as_str())?,
        base_path: String::new(),
        dialled,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(text: &str) -> ServerName {
        ServerName::parse(text).unwrap()
    }

    #[test]
    fn header_port_and_certificate_name_follow_the_specification() {
        let guarded = Dialled::Guarded(Trust::Stranger);
        for (name, host_header, port, tls) in [
            ("1.2.3.4", "1.2.3.4", 8448, "1.2.3.4"),
            ("1.2.3.4:443", "1.2.3.4:443", 443, "1.2.3.4"),
            ("[2001:4860::1]", "[2001:4860::1]", 8448, "2001:4860::1"),
            ("example.com:8448", "example.com:8448", 8448, "example.com"),
        ] {
            let route = direct(&server(name), guarded).unwrap();
            assert_eq!(route.host_header, host_header);
            assert!(matches!(route.via, Via::Fixed(_, p) if p == port), "{name}");
            assert_eq!(route.tls_name.unwrap().to_str(), tls);
        }
        let route = by_srv(&server("example.com"), guarded).unwrap();
        assert_eq!((route.host(), &route.via), ("example.com", &Via::Srv("example.com".into())));
    }

    #[test]
    fn an_override_is_taken_as_it_stands() {
        for (url, host_header, port, path, tls) in [
            ("https://hs.internal", "hs.internal", 443, "", true),
            ("https://hs.internal:8448/base/", "hs.internal:8448", 8448, "/base", true),
            ("http://10.0.0.1:8008", "10.0.0.1:8008", 8008, "", false),
            ("http://[::1]", "[::1]", 80, "", false),
        ] {
            let route = Route::to_url(&url.parse().unwrap(), Dialled::Override).unwrap();
            assert_eq!((route.host(), route.base_path.as_str()), (host_header, path), "{url}");
            assert!(matches!(route.via, Via::Fixed(_, p) if p == port), "{url}");
            assert_eq!(route.tls_name.is_some(), tls, "{url}");
            assert_eq!(route.dialled, Dialled::Override);
        }
    }
}
