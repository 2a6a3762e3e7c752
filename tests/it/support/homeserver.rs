//! A Matrix homeserver as the service sees it: `userinfo` and the server's well-known file, over TLS.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use serde_json::json;

use super::ca::Ca;
use super::neighbour::{Neighbour, Reply, Request};
use super::{secrets, unique_loopback};

pub(crate) const USERINFO: &str = "/_matrix/federation/v1/openid/userinfo";
pub(crate) const WELL_KNOWN: &str = "/.well-known/matrix/server";
pub(crate) const CLIENT_WELL_KNOWN: &str = "/.well-known/matrix/client";

pub(crate) struct Homeserver {
    /// Its Matrix server name.
    pub(crate) name: String,
    /// The HTTP server under it: connections, requests, refusing.
    pub(crate) http: Neighbour,
    scripts: Arc<Scripts>,
}

#[derive(Default)]
struct Scripts {
    tokens: Mutex<HashMap<String, Reply>>,
    /// For every `userinfo` request, whatever its token.
    userinfo: Mutex<Option<Reply>>,
    /// The same, by its token.
    by_token: Mutex<Option<Box<ByToken>>>,
    well_known: Mutex<Option<Reply>>,
    client_well_known: Mutex<Option<Reply>>,
}

type ByToken = dyn Fn(Option<Reply>) -> Reply + Send;

/// How a homeserver differs from the plain one.
pub(crate) struct Builder {
    address: SocketAddr,
    name: Option<String>,
    names: Vec<String>,
    ca: &'static Ca,
}

impl Builder {
    /// Listens there; port 0 takes any.
    pub(crate) fn at(mut self, ip: impl Into<IpAddr>, port: u16) -> Self {
        self.address = SocketAddr::new(ip.into(), port);
        self
    }

    /// Its server name, where that is not its address.
    pub(crate) fn named(mut self, name: &str) -> Self {
        self.name = Some(name.into());
        self
    }

    /// DNS names or addresses in its certificate besides the address it listens on.
    pub(crate) fn certified_for<'a>(mut self, names: impl IntoIterator<Item = &'a str>) -> Self {
        self.names.extend(names.into_iter().map(str::to_owned));
        self
    }

    /// Its certificate is signed by `ca`.
    pub(crate) fn signed_by(mut self, ca: &'static Ca) -> Self {
        self.ca = ca;
        self
    }

    pub(crate) fn start(mut self) -> Homeserver {
        self.names.push(self.address.ip().to_string());
        let scripts = Arc::new(Scripts::default());
        let answering = scripts.clone();
        let http = Neighbour::start(self.address, Some(self.ca.server(&self.names)), move |request| {
            answering.reply(request)
        });
        let name = self.name.unwrap_or_else(|| http.address().to_string());
        Homeserver { name, http, scripts }
    }
}

impl Homeserver {
    /// On an address of its own, which is its server name.
    pub(crate) fn start() -> Self {
        Self::builder().start()
    }

    pub(crate) fn builder() -> Builder {
        Builder {
            address: SocketAddr::new(unique_loopback().into(), 0),
            name: None,
            names: Vec::new(),
            ca: Ca::trusted(),
        }
    }

    /// A user ID of this server.
    pub(crate) fn user(&self, localpart: &str) -> String {
        format!("@{localpart}:{}", self.name)
    }

    /// A fresh OpenID token of one of its users.
    pub(crate) fn token(&self, localpart: &str) -> String {
        self.token_of(&self.user(localpart))
    }

    /// A fresh OpenID token for which it claims this `sub`.
    pub(crate) fn token_of(&self, sub: &str) -> String {
        self.token_with(Reply::json(200, &json!({ "sub": sub })))
    }

    /// A fresh OpenID token to which it answers so.
    pub(crate) fn token_with(&self, reply: Reply) -> String {
        let token = secrets::token();
        self.scripts.tokens.lock().unwrap().insert(token.clone(), reply);
        token
    }

    /// The token's hour is over.
    pub(crate) fn end_token(&self, token: &str) {
        self.scripts.tokens.lock().unwrap().remove(token);
    }

    /// Answers every `userinfo` request so, whatever its token; `None` goes back to the table.
    pub(crate) fn answer_userinfo(&self, reply: Option<Reply>) {
        *self.scripts.userinfo.lock().unwrap() = reply;
    }

    /// Changes every answer to `userinfo`: what the table has for its token, or none.
    pub(crate) fn change_userinfo(&self, change: impl Fn(Option<Reply>) -> Reply + Send + 'static) {
        *self.scripts.by_token.lock().unwrap() = Some(Box::new(change));
    }

    /// The well-known file; a homeserver has none until this is called.
    pub(crate) fn answer_well_known(&self, reply: Reply) {
        *self.scripts.well_known.lock().unwrap() = Some(reply);
    }

    /// The well-known file for clients; a homeserver has none until this is called.
    pub(crate) fn answer_client_well_known(&self, reply: Reply) {
        *self.scripts.client_well_known.lock().unwrap() = Some(reply);
    }

    /// How often `userinfo` was asked about this token.
    pub(crate) fn asked_about(&self, token: &str) -> usize {
        self.http.count(|r| r.path == USERINFO && r.query("access_token") == Some(token))
    }

    /// How often `userinfo` was asked at all.
    pub(crate) fn asked(&self) -> usize {
        self.http.count(|r| r.path == USERINFO)
    }
}

impl Scripts {
    fn reply(&self, request: &Request) -> Reply {
        match request.path.as_str() {
            USERINFO => {
                if let Some(reply) = &*self.userinfo.lock().unwrap() {
                    return reply.clone();
                }
                let known = request
                    .query("access_token")
                    .and_then(|token| self.tokens.lock().unwrap().get(token).cloned());
                if let Some(change) = &*self.by_token.lock().unwrap() {
                    return change(known);
                }
                known.unwrap_or_else(unknown_token)
            }
            WELL_KNOWN => self.well_known.lock().unwrap().clone().unwrap_or_else(not_found),
            CLIENT_WELL_KNOWN => self.client_well_known.lock().unwrap().clone().unwrap_or_else(not_found),
            _ => not_found(),
        }
    }
}

/// As Synapse refuses a token.
pub(crate) fn unknown_token() -> Reply {
    Reply::json(
        401,
        &json!({"errcode": "M_UNKNOWN_TOKEN", "error": "Access Token unknown or expired"}),
    )
}

fn not_found() -> Reply {
    Reply::json(404, &json!({"errcode": "M_UNRECOGNIZED", "error": "Unrecognized request"}))
}
