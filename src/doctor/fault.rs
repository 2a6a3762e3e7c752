//! All faults that `doctor` knows: what each means, and what to do. The README has the same table; a test holds them together. Pure.

/// A fault that a check can find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Stable name, which is an anchor in the README.
    pub id: &'static str,
    /// Consequence for those who make calls.
    pub means: &'static str,
    /// Remedy for the operator.
    pub remedy: &'static str,
    /// Text to paste, where it is always the same.
    pub snippet: Option<&'static str>,
}

/// Declares faults, and the list of all of them.
macro_rules! faults {
    ($($name:ident = $id:literal: $means:literal; $remedy:literal $(; $snippet:literal)?)*) => {
        $(
            #[doc = concat!("The fault `", $id, "`: ", $means, ".")]
            pub static $name: Fault = Fault {
                id: $id,
                means: $means,
                remedy: $remedy,
                snippet: faults!(@snippet $($snippet)?),
            };
        )*

        /// All faults, in the order of the README.
        pub static ALL: &[&Fault] = &[$(&$name,)*];
    };
    (@snippet) => { None };
    (@snippet $snippet:literal) => { Some($snippet) };
}

faults! {
    SFU_UNREACHABLE = "sfu-unreachable":
        "the service cannot open rooms: nobody gets a token";
        "start livekit-server; LIVEKIT_API_URL can name an address at which it is reached from inside"
    SFU_CERTIFICATE = "sfu-certificate":
        "the certificate of the SFU is not trusted by the service, which cannot open rooms";
        "correct the certificate, put its CA into SSL_CERT_FILE, or name an inner address without TLS in LIVEKIT_API_URL"
    SFU_KEY = "sfu-key":
        "livekit-server does not know LIVEKIT_KEY and refuses every token";
        "LIVEKIT_KEY must be one of the keys in livekit-server's `keys:` (have key and secret been swapped?)"
    SFU_SECRET = "sfu-secret":
        "livekit-server has another secret for LIVEKIT_KEY and refuses every token";
        "LIVEKIT_SECRET must be the secret of LIVEKIT_KEY in livekit-server's `keys:`; look for stray spaces or quotes"
    SFU_CLOCK = "sfu-clock":
        "the clocks of the service and of the SFU differ: tokens are too old or not valid yet, webhooks are refused";
        "set both clocks by NTP (timedatectl set-ntp true)"
    SFU_PATH = "sfu-path":
        "the path of LIVEKIT_URL does not lead to livekit-server's API";
        "let the proxy strip the prefix before livekit-server, or set LIVEKIT_API_URL to livekit-server itself, as http://livekit:7880"
    SFU_NOT_LIVEKIT = "sfu-not-livekit":
        "something else answers in livekit-server's place: a proxy's page, a login, a firewall";
        "let /twirp and /rtc through, correct the address, or set LIVEKIT_API_URL to livekit-server itself"
    SFU_TROUBLE = "sfu-trouble":
        "livekit-server is there and cannot do what it is asked";
        "look at livekit-server's log, its load and its Redis"
    SFU_AUTO_CREATE = "sfu-auto-create":
        "anybody who has a token opens rooms by joining: full access means nothing";
        "switch it off in livekit-server's config.yaml and restart it";
        "room:\n  auto_create: false"
    SFU_PUBLIC_NAME = "sfu-public-name":
        "the host of LIVEKIT_URL does not exist in DNS: no client can join";
        "correct LIVEKIT_URL, or add the DNS record"
    SFU_PUBLIC_UNREACHABLE = "sfu-public-unreachable":
        "LIVEKIT_URL cannot be reached: clients get a token and cannot join with it";
        "open the port to the proxy before livekit-server; from inside this may be NAT without hairpin: run `doctor --url` elsewhere"
    SFU_PUBLIC_CERTIFICATE = "sfu-public-certificate":
        "browsers do not trust the certificate at LIVEKIT_URL and cannot join";
        "get a certificate for that host that browsers trust, and let the proxy load it"
    SFU_PUBLIC_SCHEME = "sfu-public-scheme":
        "browsers on pages that came by https refuse an address that is not encrypted";
        "write wss:// in LIVEKIT_URL, with a proxy that does TLS before livekit-server"
    SFU_WEBSOCKET = "sfu-websocket":
        "the proxy before livekit-server does not pass WebSocket upgrades on: nobody can join";
        "pass the headers Upgrade and Connection on with HTTP/1.1";
        "proxy_http_version 1.1;\nproxy_set_header Upgrade $http_upgrade;\nproxy_set_header Connection \"upgrade\";"
    SFU_PUBLIC_PATH = "sfu-public-path":
        "the path of LIVEKIT_URL does not lead to livekit-server: nobody can join";
        "let the proxy route that path to livekit-server and strip it on the way, or correct LIVEKIT_URL"
    SFU_PUBLIC_OTHER = "sfu-public-other":
        "LIVEKIT_URL leads to another SFU than the one in which the service opens rooms";
        "LIVEKIT_URL and LIVEKIT_API_URL must lead to the same livekit-server"
    SFU_PUBLIC_UNREADABLE = "sfu-public-unreadable":
        "something answers at LIVEKIT_URL that browsers may not read: a proxy's error page, or livekit-server without its CORS headers";
        "see that LIVEKIT_URL leads to livekit-server, and that the proxy passes its headers on"
    SFU_NODE_IP = "sfu-node-ip":
        "the SFU tells clients a private address for media: those outside see \"Waiting for media\"";
        "let livekit-server find its public address, or name it";
        "rtc:\n  use_external_ip: true    # or: node_ip: <public address>"
    SFU_CANDIDATES = "sfu-candidates":
        "the SFU names no address for media";
        "set rtc.udp_port (or port_range_start and port_range_end), rtc.tcp_port and rtc.node_ip in livekit-server's config.yaml"
    SFU_UDP = "sfu-udp":
        "media cannot go by UDP: calls fall back to TCP, or have none";
        "open rtc.udp_port, or the range of ports, for UDP in firewall, NAT and container"
    SFU_TCP = "sfu-tcp":
        "media cannot go by TCP: users whose network blocks UDP see \"Waiting for media\"";
        "set rtc.tcp_port and open it in firewall, NAT and container"
    SFU_TURN = "sfu-turn":
        "the TURN server that the SFU names does not relay: users whose network lets nothing else through see \"Waiting for media\"";
        "see that the domain, ports and certificate of turn: in livekit-server's config.yaml are right, and that the ports are open"
    WEBHOOK_MISSING = "webhook-missing":
        "the SFU does not tell who leaves: departures are found by asking, and reported late";
        "name this service in livekit-server's config.yaml by an address that the SFU reaches"
    WEBHOOK_PATH = "webhook-path":
        "the SFU calls this service at a path that is none of its own";
        "webhook.urls must end in /sfu_webhook"
    WEBHOOK_KEY = "webhook-key":
        "webhooks are signed with a key that this service does not have, and are refused";
        "webhook.api_key must be LIVEKIT_KEY, or name both pairs in LIVEKIT_KEY_FILE"
    WEBHOOK_REFUSED = "webhook-refused":
        "webhooks arrive and are refused";
        "let the SFU call this service directly, by http and without a proxy that changes headers or bodies; compare the clocks"
    WELL_KNOWN_UNREACHABLE = "well-known-unreachable":
        "clients cannot find this service (MISSING_MATRIX_RTC_TRANSPORT)";
        "serve https://<server name>/.well-known/matrix/client; from inside this may be NAT without hairpin: run `doctor --url` elsewhere"
    WELL_KNOWN_CERTIFICATE = "well-known-certificate":
        "browsers do not trust the server of the well-known file, and find no calls";
        "get a certificate for the server name that browsers trust"
    WELL_KNOWN_MISSING = "well-known-missing":
        "there is no /.well-known/matrix/client: clients do not find this service (MISSING_MATRIX_RTC_TRANSPORT)";
        "serve the file on the server name itself, as application/json, with Access-Control-Allow-Origin: *"
    WELL_KNOWN_STATUS = "well-known-status":
        "the server of the well-known file answers with an error";
        "look at the log of the web server of the server name"
    WELL_KNOWN_NOT_JSON = "well-known-not-json":
        "the well-known file is not a JSON object, so clients ignore it";
        "serve exactly this, without a page around it"
    WELL_KNOWN_TYPE = "well-known-type":
        "the well-known file has another content type than application/json, which some clients refuse";
        "serve it as application/json"
    WELL_KNOWN_CORS = "well-known-cors":
        "the well-known file has no Access-Control-Allow-Origin: browsers may not read it";
        "add the header in the web server of the server name";
        "add_header Access-Control-Allow-Origin * always;"
    WELL_KNOWN_CORS_TWICE = "well-known-cors-twice":
        "the well-known file has several values of Access-Control-Allow-Origin: browsers refuse that";
        "add the header in one place only"
    WELL_KNOWN_REDIRECT = "well-known-redirect":
        "the well-known file is behind a redirect, which not all clients follow, and browsers only with CORS headers on it";
        "serve the file itself at the server name"
    WELL_KNOWN_ENTRY = "well-known-entry":
        "the well-known file has no usable entry of this service: clients find no calls (MISSING_MATRIX_RTC_TRANSPORT)";
        "add the entry"
    SERVICE_URL_SCHEME = "service-url-scheme":
        "livekit_service_url is not an https address: clients cannot call it";
        "it is the https address of this service, not the wss address of LiveKit"
    SERVICE_URL_SLASH = "service-url-slash":
        "livekit_service_url ends in a slash, from which some clients make //get_token";
        "leave the slash out"
    TRANSPORTS_EMPTY = "transports-empty":
        "the homeserver says that it has no transports for calls: clients believe it for a day and do not look at the well-known file";
        "name the transport in homeserver.yaml, or switch the endpoint off (msc4143_enabled: false); then clear the clients' caches"
    TRANSPORTS_URL = "transports-url":
        "the homeserver's transport has another address than LIVEKIT_URL: requests for it are refused";
        "url must be LIVEKIT_URL, livekit_service_url the https address of this service"
    TRANSPORTS_UNREADABLE = "transports-unreadable":
        "the homeserver's answer about transports cannot be used";
        "see that no proxy answers in the homeserver's place"
    ROUTE_NAME = "route-name":
        "the host of livekit_service_url does not exist in DNS: no client gets a token";
        "correct livekit_service_url, or add the DNS record"
    ROUTE_UNREACHABLE = "route-unreachable":
        "the public address of this service cannot be reached: no client gets a token";
        "open the port to the proxy; from inside this may be NAT without hairpin: run `doctor --url` elsewhere"
    ROUTE_CERTIFICATE = "route-certificate":
        "browsers do not trust the certificate before this service: no client gets a token";
        "get a certificate for that host that browsers trust, and let the proxy load it"
    ROUTE_OTHER = "route-other":
        "something else than this service answers at livekit_service_url: no client gets a token";
        "correct livekit_service_url, or route that path to this service"
    ROUTE_MISSING = "route-missing":
        "the proxy does not route this path to this service: clients take it for not supported, silently";
        "route all of /get_token, /sfu/get, /delegate_delayed_leave and /token_source here"
    ROUTE_PREFIX = "route-prefix":
        "the path arrives here with a prefix that this service does not know, or without its beginning";
        "let the proxy strip what stands before the route, or set LIVEKIT_JWT_PATH_PREFIX to it"
    ROUTE_GATEWAY = "route-gateway":
        "the proxy answers for this service with an error of its own";
        "correct the address of this service in the proxy's configuration, and look at its log"
    ROUTE_CORS_MISSING = "route-cors-missing":
        "the proxy removes Access-Control-Allow-Origin: browsers may not read the answers";
        "let the header of this service through"
    ROUTE_CORS_TWICE = "route-cors-twice":
        "the proxy adds a second Access-Control-Allow-Origin: browsers refuse the answers";
        "add no CORS headers in the proxy: this service sends them on every answer"
    ROUTE_CUT_OFF = "route-cut-off":
        "the proxy ends answers that take long: users see an error while the service still waits for a homeserver";
        "give answers of this service 25 s at least (nginx: proxy_read_timeout 30s, HAProxy: timeout server 30s)"
    ROUTE_INSTANCE = "route-instance":
        "another lk-jwt-service answers there, with another secret";
        "see which instance the proxy routes to, and reload the one that runs with an old secret"
    SERVER_NAME = "server-name":
        "this name does not exist in DNS: nobody is of that homeserver";
        "correct the name in the list (a typo?)"
    LISTS_CONTRADICT = "lists-contradict":
        "a homeserver stands in two lists that contradict each other: its users get nothing";
        "take the homeserver from one of the two lists"
    FEDERATION_UNREACHABLE = "federation-unreachable":
        "the homeserver's federation API cannot be reached from here: its users get no tokens (OPEN_ID_ERROR)";
        "open port 8448 or delegate to 443 by /.well-known/matrix/server; LIVEKIT_FEDERATION_URL_OVERRIDES can name an inner address"
    FEDERATION_CERTIFICATE = "federation-certificate":
        "the certificate of the homeserver's federation API is not valid: its users get no tokens (OPEN_ID_ERROR)";
        "renew it, for the name that is asked for; a CA of your own goes into SSL_CERT_FILE"
    FEDERATION_CERTIFICATE_ENDS = "federation-certificate-ends":
        "the certificate of the homeserver's federation API expires soon";
        "see that it is renewed, and that the server loads the new one"
    FEDERATION_ADDRESS = "federation-address":
        "the homeserver is at an address that may not be dialled";
        "name the homeserver in LIVEKIT_FULL_ACCESS_HOMESERVERS, or its network in LIVEKIT_FEDERATION_ALLOWED_NETWORKS"
    FEDERATION_DELEGATION = "federation-delegation":
        "/.well-known/matrix/server, or the SRV record, cannot be used";
        "m.server must be host or host:port, without https://";
        "{\"m.server\": \"matrix.example.com:443\"}"
    FEDERATION_FORBIDDEN = "federation-forbidden":
        "something before the homeserver, or the homeserver, refuses federation: its users get no tokens (OPEN_ID_ERROR)";
        "let /_matrix/federation/v1/openid/userinfo through; a firewall or a CDN that challenges must not stand before it"
    FEDERATION_PAGE = "federation-page":
        "something else than a homeserver answers in its place: its users get no tokens (OPEN_ID_ERROR)";
        "route /_matrix/federation to the homeserver, and correct /.well-known/matrix/server"
    OPENID_MISSING = "openid-missing":
        "the homeserver does not serve OpenID there: its users get no tokens (OPEN_ID_ERROR)";
        "add `openid` to the resources of the federation listener";
        "resources:\n  - names: [federation, openid]"
    CLIENT_API = "client-api":
        "the homeserver's client-server API cannot be found: leaves cannot be delegated";
        "serve m.homeserver.base_url in /.well-known/matrix/client, or name the address in LIVEKIT_CS_API_URL_OVERRIDES"
    DELAYED_EVENTS_OFF = "delayed-events-off":
        "the homeserver has no delayed events: who vanishes stays in the call until the membership expires";
        "switch them on in homeserver.yaml and restart the homeserver";
        "max_event_delay_duration: 24h"
    HOMESERVER_FEATURES = "homeserver-features":
        "the homeserver has no room summaries (MSC3266): users who are not in the room yet cannot knock or see what call it is";
        "switch them on, or update the homeserver";
        "experimental_features:\n  msc3266_enabled: true"
    AS_UNREACHABLE = "as-unreachable":
        "our homeserver cannot be asked: its MatrixRTC endpoints fail";
        "see that it runs; LIVEKIT_CS_API_URL_OVERRIDES names the address at which it is reached from here"
    AS_TOKEN = "as-token":
        "our homeserver does not know the as_token: it has another registration, or none";
        "list the same file in app_service_config_files and in LIVEKIT_AS_REGISTRATION_FILE, and restart the homeserver"
    AS_SERVER_NAME = "as-server-name":
        "the homeserver that has our registration is another one than LIVEKIT_HS_SERVER_NAME";
        "set LIVEKIT_HS_SERVER_NAME to its server_name, or correct LIVEKIT_CS_API_URL_OVERRIDES"
    AS_MEMBERSHIP = "as-membership":
        "our homeserver does not say who is in a room (MSC4502): nobody gets a token";
        "switch it on in homeserver.yaml, and restart the homeserver";
        "experimental_features:\n  msc4502_enabled: true"
    AS_SCOPE = "as-scope":
        "the registration does not allow this service to ask who is in a room";
        "print one that has all scopes: lk-jwt-service generate-registration"
    AS_PROXY_OFF = "as-proxy-off":
        "our homeserver does not forward the MatrixRTC endpoints (MSC4512): clients get 404";
        "switch it on in homeserver.yaml, and see that the registration has proxy_prefix; then restart the homeserver";
        "experimental_features:\n  msc4512_enabled: true"
    AS_PROXY_ELSEWHERE = "as-proxy-elsewhere":
        "our homeserver forwards the MatrixRTC endpoints to somewhere else than this service";
        "correct proxy_url in the registration (with the key io.element.msc4512.proxy_url), and restart the homeserver"
    STORE_UNREACHABLE = "store-unreachable":
        "the store cannot be used: a restart forgets delegated leaves";
        "see that it runs, and correct LIVEKIT_REDIS_URL or LIVEKIT_STATE_PATH"
    STORE_RIGHTS = "store-rights":
        "the store refuses what has to be written: a restart forgets delegated leaves";
        "allow what is needed";
        "ACL SETUSER lk-jwt on >password ~lk-jwt:* +ping +hset +hdel +hgetall +hscan"
    STORE_SHARED = "store-shared":
        "somebody else writes delegated leaves into the same place: leaves may be sent twice, or for people who are there";
        "give each instance that does not share its work a Redis database of its own, as redis://redis:6379/1"
    STORE_MEMORY = "store-memory":
        "nothing is kept: a restart forgets delegated leaves, and people stay in calls until the delay is over";
        "set LIVEKIT_REDIS_URL, or LIVEKIT_STATE_PATH to a directory on a volume"
    FLEET_UNWATCHED = "fleet-unwatched":
        "none of the replicas on this Redis watches: nobody's leave is restarted or sent";
        "see the log of the replicas for what keeps them: Redis, rights in it, or replicas that serve another SFU"
    FLEET_TWO_WATCHERS = "fleet-two-watchers":
        "two replicas watch at once: events are restarted twice as often as they need to be";
        "see that all replicas have the same LIVEKIT_REDIS_URL, LIVEKIT_REDIS_SHARED=true, and a way to Redis that answers"
    FLEET_DIFFERS = "fleet-differs":
        "replicas on this Redis serve different SFUs or homeservers: the newer ones watch nobody's leaves";
        "give all replicas on one Redis the same LIVEKIT_URL and homeserver, or a Redis database of their own"
    FLEET_GUESTS = "fleet-guests":
        "this replica cannot hand over leaves to the one that watches: if it ends, they are left to the homeserver's timers";
        "see that Redis takes writes (its memory, its rights), and the log of this replica"
    USER_TOKEN = "user-token":
        "the homeserver does not take the access token";
        "use the access token of a session that is not signed out, of a user of --server"
    USER_OPENID = "user-openid":
        "the homeserver gives the user no OpenID token";
        "see that /_matrix/client/v3/user/{userId}/openid/request_token reaches the homeserver"
    USER_REFUSED = "user-refused":
        "the service gives this user no token";
        "look at the other checks, and search the log for the request id"
    USER_JOIN = "user-join":
        "the user has a token and cannot join with it";
        "look at the checks of the SFU"
    USER_POWER_LEVEL = "user-power-level":
        "the user may not say in that room that they are in a call: others do not see them";
        "lower the power level for org.matrix.msc3401.call.member in the room's permissions, or raise the user's"
    CLIENT_CLOCK = "client-clock":
        "the clocks of the user's device and of the service differ: certificates and memberships look too old, or not valid yet";
        "set the service's clock by NTP (timedatectl set-ntp true); if it is right, the user's device is wrong"
    CLIENT_WEBRTC = "client-webrtc":
        "the user's browser has no WebRTC, or an add-on or a setting switches it off";
        "let the user try another browser, or switch WebRTC on"
    LINK_USED = "link-used":
        "the link to /check was used five times (in this process)";
        "make another one: lk-jwt-service doctor --link"
    LINK_EXPIRED = "link-expired":
        "the time of the link to /check is over";
        "make another one, perhaps for longer: lk-jwt-service doctor --link --for 4h"
    LINK_INVALID = "link-invalid":
        "the link to /check is cut, of another service, or was made with another secret";
        "see that the whole link was sent; make another one: lk-jwt-service doctor --link"
    TOO_SLOW = "too-slow":
        "the check did not end in time";
        "look at the neighbour that it is about; run doctor again with --only"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_plain() {
        for (at, fault) in ALL.iter().enumerate() {
            assert!(
                fault.id.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-'),
                "{}",
                fault.id
            );
            assert!(ALL[..at].iter().all(|other| other.id != fault.id), "{}", fault.id);
            assert!(fault.means.len() > 20 && fault.remedy.len() > 10, "{}", fault.id);
        }
    }
}
