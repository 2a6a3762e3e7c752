//! The one vocabulary of requests: how one ended, and on which route. The same word is `outcome` in the log, `reason` in the
//! body of an error and the label of a metric. Pure.

/// An enum whose variants each are one word, and the table of all of them.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)*
        }

        impl $name {
            /// All of them, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The word in logs, answers and metrics.
            #[must_use]
            pub const fn word(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)*
                }
            }
        }
    };
}
pub(crate) use words;

words! {
    /// How a request ended.
    Outcome {
        /// The request was carried out.
        Ok = "ok",
        /// The client, or a proxy before it, gave up before there was an answer.
        ClientGone = "client_gone",
        /// The request is not one that can be understood.
        BadRequest = "bad_request",
        /// There is no such path, or no such thing.
        NotFound = "not_found",
        /// The path exists, with other methods.
        MethodNotAllowed = "method_not_allowed",
        /// The head or the body is larger than any honest one.
        TooLarge = "too_large",
        /// The body did not arrive in time.
        BodyTimeout = "body_timeout",
        /// `matrix_server_name` is not a server name.
        InvalidServerName = "invalid_server_name",
        /// There is no OpenID token.
        TokenMissing = "token_missing",
        /// The homeserver does not know the OpenID token.
        TokenRejected = "token_rejected",
        /// The token belongs to another user or another server.
        UserMismatch = "user_mismatch",
        /// The homeserver could not be reached from here.
        HomeserverUnreachable = "homeserver_unreachable",
        /// The homeserver answered something that is not in the specification.
        HomeserverError = "homeserver_error",
        /// The homeserver limits how often it is asked.
        HomeserverLimited = "homeserver_limited",
        /// The homeserver's client-server API cannot be found.
        ClientApiNotFound = "client_api_not_found",
        /// The SFU could not be reached from here.
        SfuUnreachable = "sfu_unreachable",
        /// The SFU refused the service itself: its key, its path, its clock.
        SfuRejected = "sfu_rejected",
        /// The user, or a homeserver, is not in the Matrix room.
        NotJoined = "not_joined",
        /// The operator does not deal with the homeserver.
        BlockedHomeserver = "blocked_homeserver",
        /// The policy, or another homeserver's service, does not allow it.
        NotAllowed = "not_allowed",
        /// `url` is another SFU than the one of this service.
        OtherSfu = "other_sfu",
        /// As many as may be are delegated or watched already.
        LimitReached = "limit_reached",
        /// The user, or the homeserver, asks more often than the policy allows.
        RateLimited = "rate_limited",
        /// The service has just started, or is stopping.
        NotReady = "not_ready",
        /// Too much is going on.
        Busy = "busy",
        /// The `hs_token` is missing or wrong.
        HsTokenRejected = "hs_token_rejected",
        /// The homeserver does not say for whom it asks.
        IdentityMissing = "identity_missing",
        /// The call of the webhook does not prove that it is the SFU's.
        WebhookRejected = "webhook_rejected",
        /// A defect of this service.
        InternalError = "internal_error",
    }
}

words! {
    /// Where a request went: a fixed set, since strangers choose paths.
    Route {
        /// The route `/get_token`.
        GetToken = "get_token",
        /// The route `/sfu/get`.
        SfuGet = "sfu_get",
        /// The route `/token_source`.
        TokenSource = "token_source",
        /// The route `/delegate_delayed_leave`.
        DelegateDelayedLeave = "delegate_delayed_leave",
        /// The route `/sfu_webhook`.
        SfuWebhook = "sfu_webhook",
        /// The route `/healthz`.
        Healthz = "healthz",
        /// The route `/readyz`.
        Readyz = "readyz",
        /// The route `/metrics`.
        Metrics = "metrics",
        /// The route `/doctor`.
        Doctor = "doctor",
        /// The page `/check` and all below it.
        Check = "check",
        /// The route `…/client/…/rtc/livekit/get_token`.
        ClientGetToken = "client_get_token",
        /// The route `…/client/…/rtc/livekit/delegate_delayed_leave`.
        ClientDelegate = "client_delegate_delayed_leave",
        /// The route `…/federation/…/rtc/livekit/get_token`.
        FederationGetToken = "federation_get_token",
        /// The route `/_matrix/app/…`.
        AppService = "application_service",
        /// Any other path.
        Other = "other",
    }
}

impl Outcome {
    /// How many there are.
    pub const COUNT: usize = Self::ALL.len();
}

impl Route {
    /// How many there are.
    pub const COUNT: usize = Self::ALL.len();

    /// The route of a path in its one spelling.
    #[must_use]
    pub fn of(path: &str) -> Self {
        match path {
            "/get_token" => Self::GetToken,
            "/sfu/get" => Self::SfuGet,
            "/token_source" => Self::TokenSource,
            "/delegate_delayed_leave" => Self::DelegateDelayedLeave,
            "/sfu_webhook" => Self::SfuWebhook,
            "/healthz" => Self::Healthz,
            "/readyz" => Self::Readyz,
            "/metrics" => Self::Metrics,
            "/doctor" => Self::Doctor,
            "/check" => Self::Check,
            _ if path.starts_with("/check/") => Self::Check,
            _ => match path.strip_prefix("/_matrix/") {
                Some(rest) if rest.starts_with("app/") => Self::AppService,
                Some(rest) if rest.starts_with("client/") && rest.ends_with("/rtc/livekit/get_token") => Self::ClientGetToken,
                Some(rest) if rest.starts_with("client/") && rest.ends_with("/rtc/livekit/delegate_delayed_leave") => Self::ClientDelegate,
                Some(rest) if rest.starts_with("federation/") && rest.ends_with("/rtc/livekit/get_token") => Self::FederationGetToken,
                Some(_) | None => Self::Other,
            },
        }
    }

    /// Asked by machines all the time, or by anybody who likes, and of interest to nobody while it goes well.
    #[must_use]
    pub const fn is_for_anybody(self) -> bool {
        matches!(self, Self::Healthz | Self::Readyz | Self::Metrics | Self::Check)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_another_and_in_the_readme() {
        let readme = include_str!("../README.md");
        let table = readme.split_once("| `outcome` |").unwrap().1.split_once("\n\n").unwrap().0;
        for (number, outcome) in Outcome::ALL.iter().enumerate() {
            assert_eq!(*outcome as usize, number);
            let word = outcome.word();
            assert!(word.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{word}");
            assert_eq!(table.matches(&format!("\n| `{word}` |")).count(), 1, "{word}");
        }
        assert_eq!(
            table.matches("\n| `").count(),
            Outcome::COUNT,
            "the README has a word that does not exist"
        );
        for (number, route) in Route::ALL.iter().enumerate() {
            assert_eq!(*route as usize, number);
            assert!(Route::ALL.iter().filter(|other| other.word() == route.word()).count() == 1);
        }
    }
}
