//! MatrixRTC authorization service: exchanges a Matrix OpenID token for a LiveKit token.
//!
//! # Layout
//!
//! Every file and what is decided in it; below a module's name, set in, the files of its directory.
//!
//! ```text
//! main.rs                   arguments -> configuration -> telemetry -> server::run -> exit code
//! bin/healthcheck.rs        lk-jwt-service-healthcheck, the same code as `lk-jwt-service healthcheck`
//! cli.rs                    the words of the command line, --help, which of them ends with which exit code
//!   doctor.rs               the options of `doctor`
//! healthcheck.rs            asks /healthz for the container: where, how long
//! registration.rs           generate-registration
//!
//! config.rs                 every LIVEKIT_* variable: default, check, error; those that belong to no group below
//!   variables.rs            the text of each variable in --help
//!   reader.rs               how a value is written: trimmed, empty, a number, true or false; the form of an error
//!   keys.rs                 LIVEKIT_KEY, _SECRET, _KEYS, key files; how short a secret may be
//!   livekit.rs              LIVEKIT_URL, LIVEKIT_API_URL
//!   listen.rs               LIVEKIT_JWT_BIND, the port, the path prefix, LIVEKIT_METRICS_BIND
//!   lists.rs                full access, allowed, blocked, own homeservers; overrides, private networks, DNS servers
//!   policy.rs               publish sources, participants per room, rates: their limits and defaults
//!   app_service.rs          LIVEKIT_HS_SERVER_NAME, as_token, hs_token, membership
//!   redis.rs                the Redis URL
//!   log.rs                  level, format, who is shown
//!   check_page.rs           LIVEKIT_CHECK_PAGE
//!   outgoing.rs             HTTP_PROXY, SSL_CERT_FILE: what libraries read by themselves
//!   files.rs                files that variables name: how large, how long
//!   unknown.rs              a variable that is misspelt, or that other services have
//!   unexpanded.rs           `${VALUE}` that nobody filled in
//!   summary.rs              the line with all settings at start; check-config
//! secret.rs                 values that are never printed
//! bind.rs                   addresses to listen on, the backlog
//!
//! telemetry.rs              which lines are written, escaping
//!   line.rs                 a line as text or JSON, its time, names as hashes
//!   writer.rs               the thread that writes: how long a line may be, how much waits, what is dropped
//! runtime.rs                the one thread in which everything runs
//! request_line.rs           one line for each request: its fields, its level, how many a second
//! log_throttle.rs           how often the same thing is logged
//! outcome.rs                the one vocabulary: how a request ended, on which route
//! metrics.rs                what is counted, buckets, the text for Prometheus
//! state.rs                  whether a neighbour can be used, since when; one line for each change
//!
//! server.rs                 accept, serve, stop: time-outs for heads, kept-alive connections, scrapes, the drain
//!   build.rs                the wiring: each part is built once
//! reload.rs                 SIGHUP: keys and tokens that are read again, how long the former ones count
//! connections.rs            what each connection holds: bytes of a head, pots for bodies, slow readers
//! limits.rs                 how many connections, requests and jobs there is room for: memory limit, descriptors
//!
//! http.rs                   the route table and its state
//!   edge.rs                 around every request: id, client's address, CORS, headers of every answer
//!   path.rs                 the one spelling of a path, without the prefix that a proxy left
//!   body.rs                 how a body is read: time, bytes of all together
//!   request.rs              a body of JSON: how many bytes, its type; an answer in JSON
//!   place.rs                places for complete requests
//!   report.rs               the error table: status, errcode, text, reason, Retry-After; log level, message, remedy
//!   get_token.rs sfu_get.rs token_source.rs delegate_delayed_leave.rs sfu_webhook.rs
//!   healthz.rs readyz.rs metrics.rs doctor.rs check.rs
//!                           a file per URL
//!   appservice.rs           the endpoints behind our homeserver: their paths, who may call
//!   appservice/get_token.rs appservice/federation_get_token.rs appservice/delegate_delayed_leave.rs
//!   appservice/ping.rs appservice/transactions.rs
//!                           a file per endpoint
//! wire.rs                   request and reply JSON of clients: fields, how long each may be
//!   homeserver.rs           the bodies that come through a homeserver
//!   token_source.rs         LiveKit's token sources: head, query, body; fields that are refused
//!
//! exchange.rs               THE PIPELINE: who is asking -> what they may do -> room -> token
//! app_service.rs            the same behind our homeserver, which has settled who is asking
//! openid.rs                 1. who is asking: userinfo, its answer, whose user that may be; refused tokens remembered
//! access.rs                 2. what they may do: full or restricted, blocked, publish rights
//! sfu.rs                    3. LiveKit: the room is opened, with which time-outs and how many participants
//!   api.rs                  RoomService: one call each, its time-out, the token it carries
//!   endpoint.rs             addresses of the SFU, connecting to it
//!   probe.rs                whether the SFU is there: its base address
//!   refusal.rs              what a refusal meant, and the remedy
//!   room_memory.rs          how long a room need not be opened again
//!   webhook.rs              a webhook: signature, age, contents
//!   trial.rs                what doctor and the page try on the SFU
//! token.rs                  4. the LiveKit JWT: claims, grants, how long it counts
//! identity.rs               names on the SFU: room alias, participant identity
//! server_name.rs            the grammar of server names
//! members.rs                who is in which Matrix room, and how long that is remembered
//!
//! federation.rs             asking a homeserver as a server: how many at once
//!   discovery.rs            the steps from a server name to addresses: literal, port, well-known, SRV
//!   well_known.rs           /.well-known/matrix/server: size, time, how long it counts
//!   follow.rs               redirects of such files
//!   guard.rs                addresses that are never dialled
//!   dial.rs                 a connection with TLS: time-outs, IPv6 and IPv4 in turn
//!   dial_limiter.rs         waiting for what admission/dials.rs decides
//!   pool.rs                 kept connections, an answer: bytes of its head and rest
//!   route.rs                where one name's requests go
//!   homeservers.rs          what is remembered of each homeserver, how many, how long
//!   rediscovery.rs          when that is asked for again
//!   client_api.rs           /.well-known/matrix/client, or the override of the operator
//!   look.rs                 the same way step by step, for doctor
//!   failure.rs              why a homeserver could not be asked, in words
//! homeserver.rs             the C-S API: base URL, calls, how long a failure is remembered
//!   versions.rs             proposals that /versions offers
//!   delayed_events.rs       restart, send, cancel of a delayed event, and what an answer means
//!   own.rs                  our own homeserver, with the as_token: membership, its server name, relays
//!   own/trial.rs            what doctor tries on it
//!   question_limiter.rs     whose question to our homeserver is next
//! admission.rs              classes: listed, verified, stranger
//!   room.rs                 whose complete request goes first, and who gives way
//!   fair_queue.rs           shares and turns by group
//!   limiter.rs              waiting for a turn
//!   verified.rs             homeservers that have verified a token: how long they are known
//!   budget.rs               dials and questions that one request may cause
//!   dials.rs                pace for each dialled address
//!   lookups.rs              whose look-up of a stranger's name goes on
//!   rates.rs                how often a user or a homeserver may ask
//!   rate_limiter.rs         the same by the clock, with names hashed
//!   crowd.rs                which connection is closed where there are too many
//!
//! presence.rs               the SFU as it is known: who is there, which rooms stand, who is asked next, sweeps. Pure
//!   participant.rs          one participant: which news counts, when to ask, how long to wait for a return
//!   room.rs                 one room: its sid, whether lists can be believed
//!   event.rs                which webhooks are repeats; when each happened on our clock
//!   health.rs               when the SFU is asked whether it lives; whether webhooks come
//! delayed_leave.rs          delegated leaves: the table of all, bounds per user. Pure
//!   order.rs                two delegations of one participant: which counts, when the other event is cancelled. Pure
//!   leave.rs                one leave: when it is restarted, sent, given up
//!   order.rs                two delegations of one seat: which event counts, what is cancelled
//!   scheduler.rs            calls to homeservers: the order, 429, overload
//! driver.rs                 the one driver of both: facts in, calls out, time-outs, lines about leaves; the leaves at SIGTERM
//!   core.rs                 presence and leaves together. Pure
//!   reservation.rs          a delegation is checked before anything is done for it
//!   fleet.rs                several replicas: beats, messages, takeover, guests, hand-over
//! kick.rs                   who left the Matrix room leaves the call: calls and clock
//!   membership.rs           whom to ask about, how often, what is done. Pure
//!   shares.rs               how many tokens are watched, per user and homeserver. Pure
//!   name.rs                 names on the SFU in little space. Pure
//! fleet.rs                  several replicas on one Redis: who watches, who is next, who gives the watch away. Pure
//!   liveness.rs             who is dead: a counter that stands still
//!   inbox.rs                messages, as far as they are dealt with
//!   kept.rs                 delegations that were handed over, until the watcher has dealt with them
//!   readings.rs             when the watcher reads all records again
//!   entry.rs                a replica's entry in Redis
//!
//! store.rs                  jobs, tokens and verified homeservers: in Redis, in a file or nowhere
//!   queue.rs                the order of writes, batches, pauses after a failure, reading again
//!   jobs.rs                 the table of leaves: reading at start, records of other services
//!   record.rs               a job as it is stored, unknown keys
//!   record/time.rs          its times
//!   token.rs                a watched token as it is stored
//!   homeservers.rs          verified homeservers as they are stored
//!   file.rs                 LIVEKIT_STATE_PATH: the database file, one that is damaged
//!   redis.rs                Redis: connecting, time-outs, commands
//!   redis/resp.rs           its protocol: bytes of an answer
//!   shared.rs               Redis for several replicas: keys, messages, rights
//!   shared/<script>.lua     what Redis runs: beat, bound, change, delegate, put, tell
//!
//! doctor.rs                 `lk-jwt-service doctor`: who runs which checks, for how long
//!   command.rs ask.rs       the command: finds the service, or checks by itself
//!   command/link.rs         --link: a link to the page
//!   ticket.rs               proof that somebody may ask; how long a link counts
//!   gate.rs                 how often it runs
//!   check.rs paint.rs       a finding; how it is drawn, JSON, --anonymize
//!   fault.rs                all faults and their remedies
//!   settings.rs             checks: of the settings
//!   routes.rs discovery.rs  checks: public routes, CORS; the well-known files and transports
//!   homeserver.rs user.rs   checks: federation, OpenID, delayed events; a call as one user
//!   application_service.rs  checks: registration, forwarding
//!   sfu.rs media.rs socket.rs signal.rs arrivals.rs
//!                           checks: key, clock, WebSocket, candidates, UDP; webhooks that arrive
//!   store.rs                checks: the store
//! check.rs                  the page "Why does my call not work?": its rooms and when they end
//!   uses.rs                 how often a link is used
//!   report.rs               the report that users send
//!   page/                   the page itself: its sentences and checks are in page.js, those about media in media.js
//!
//! dns.rs                    look-ups: how many for strangers at once, time-outs, former answers
//!   question.rs             the resolver: resolv.conf, hosts, how many addresses
//!   memory.rs               how long an answer counts
//! tls.rs                    roots, sessions that are resumed, what a certificate's refusal means
//! retry.rs                  how long a request is held, what is tried again
//! backoff.rs                pauses between tries
//! single_flight.rs          one call for all who want the same
//! clock.rs time.rs timers.rs
//!                           the clocks; moments; what is due next
//! cache.rs slab.rs text.rs  bounded memories; numbered values; short texts
//! livekit.rs delayed_event.rs
//!                           LiveKit's and MSC4140's words
//! internals.rs              what the tests in tests/ look into; all else that is `pub` here, main.rs needs
//! ```
//!
//! A module uses only what is below it (`tests/it/layers.rs` reads all imports):
//!
//! ```text
//! delivery   main -> server -> reload -> http/*
//! use cases  check ; doctor ; app_service ; exchange ; driver ; kick ; members
//! adapters   openid ; sfu ; homeserver ; store ; federation
//! pure       presence ; delayed_leave ; fleet ; driver::core ; kick::{membership, shares, name} ; store::record ; sfu::{room_memory, refusal, webhook} ;
//!            federation::guard ; admission (but its waiting)
//! tools      config ; dns ; tls ; retry ; clock ; telemetry ; runtime ; request_line ; connections ; limits ; log_throttle ; single_flight ; state
//! values     outcome ; metrics ; wire ; token ; access ; identity ; server_name ; secret ; livekit ; delayed_event ; time ; backoff ; slab ; cache ; text
//! ```
#![forbid(unsafe_code)]

mod access;
mod admission;
mod app_service;
mod backoff;
mod bind;
mod cache;
mod check;
pub mod cli;
mod clock;
pub mod config;
mod connections;
mod delayed_event;
mod delayed_leave;
mod dns;
mod doctor;
mod driver;
mod exchange;
mod federation;
mod fleet;
pub mod healthcheck;
mod homeserver;
mod http;
mod identity;
#[doc(hidden)]
pub mod internals;
mod kick;
mod limits;
mod livekit;
mod log_throttle;
mod members;
mod metrics;
mod openid;
mod outcome;
mod presence;
pub mod registration;
mod reload;
mod request_line;
mod retry;
pub mod runtime;
pub mod secret;
pub mod server;
mod server_name;
mod sfu;
mod single_flight;
mod slab;
mod state;
mod store;
pub mod telemetry;
mod text;
mod time;
mod timers;
mod tls;
mod token;
mod wire;

pub use doctor::command as run_doctor;
