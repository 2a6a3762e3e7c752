//! Follows SIGHUP: keys, secrets and the registration are read again while the service runs (decision P19).
#![expect(clippy::disallowed_methods, reason = "counts the day of a former key, and has new tokens tried")]

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use crate::config::{AppServiceConfig, Config};
use crate::homeserver::OwnHomeserver;
use crate::http::App;
use crate::secret::{KeyPair, Keys};
use crate::sfu::Sfu;
use crate::token::Minter;

/// How long webhooks that are signed with a former key are taken.
const FORMER_KEYS_LIFE: Duration = Duration::from_secs(24 * 60 * 60);

/// Keys and tokens that are read again while the service runs, and who uses them (decision P19).
pub struct Reloaded {
    app: Arc<App>,
    minter: Arc<Minter>,
    sfu: Arc<Sfu>,
    own: Option<Arc<OwnHomeserver>>,
    keys: Keys,
    former: FormerKeys,
    tokens: Option<AppServiceConfig>,
}

/// Keys that are in the file no longer, and until when they verify webhooks.
#[derive(Default)]
struct FormerKeys(Vec<(KeyPair, Instant)>);

impl FormerKeys {
    /// Gives `keys`, which are used no longer, their day from now on.
    fn add(&mut self, keys: &Keys, now: Instant) {
        self.0.extend(keys.iter().map(|pair| (pair.clone(), now + FORMER_KEYS_LIFE)));
    }

    /// All keys that verify now: those in use, and those whose day is not over.
    fn with(&mut self, keys: &Keys, now: Instant) -> Keys {
        self.0.retain(|(pair, until)| *until > now && !keys.has(pair));
        keys.with_former(self.0.iter().map(|(pair, _)| pair))
    }

    /// When the next one's day is over.
    fn next_end(&self) -> Option<Instant> {
        self.0.iter().map(|(_, until)| *until).min()
    }
}

impl Reloaded {
    /// Begins with the `keys` and `tokens` of the start, which the others use now.
    #[must_use]
    pub fn new(
        app: Arc<App>,
        minter: Arc<Minter>,
        sfu: Arc<Sfu>,
        own: Option<Arc<OwnHomeserver>>,
        keys: Keys,
        tokens: Option<AppServiceConfig>,
    ) -> Self {
        Self {
            app,
            minter,
            sfu,
            own,
            keys,
            former: FormerKeys::default(),
            tokens,
        }
    }

    /// Uses what `reload` brings, and forgets former keys when their day is over.
    pub async fn follow(mut self, mut reload: mpsc::Receiver<Config>) {
        loop {
            let next = self.former.next_end();
            let end = async {
                match next {
                    Some(until) => sleep_until(until).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                config = reload.recv() => match config {
                    Some(config) => {
                        self.use_tokens(config.app_service);
                        self.use_keys(config.livekit.keys);
                    }
                    None => return,
                },
                () = end => self.verify(),
            }
        }
    }

    /// Signs with other keys from now on.
    fn use_keys(&mut self, keys: Keys) {
        if let Err(error) = self.minter.sign_with(keys.signing()) {
            tracing::error!(name: "keys_unusable", reason = error.to_string(), "the keys cannot be used; the former ones go on");
            return;
        }
        self.sfu.forget_tokens();
        self.former.add(&self.keys, Instant::now());
        self.keys = keys;
        self.verify();
        tracing::info!(name: "keys_reloaded",
            key = self.keys.signing().shown_key(),
            "the keys were read again: tokens are signed with the first of them"
        );
    }

    fn verify(&mut self) {
        self.app.verify_with(self.former.with(&self.keys, Instant::now()));
    }

    /// Takes other tokens of the registration. There are no former ones: the homeserver reads its own when it is started again.
    fn use_tokens(&mut self, tokens: Option<AppServiceConfig>) {
        let (Some(own), Some(tokens)) = (&self.own, tokens) else { return };
        let is_same = |former: &AppServiceConfig| {
            former.as_token.expose() == tokens.as_token.expose() && former.hs_token.expose() == tokens.hs_token.expose()
        };
        if self.tokens.as_ref().is_some_and(is_same) {
            return;
        }
        own.use_token(tokens.as_token.clone());
        self.app.admit_homeserver_with(tokens.hs_token.clone());
        self.tokens = Some(tokens);
        tracing::info!(name: "registration_reloaded",
            "the registration was read again: its tokens are used from now on; the homeserver must have the same"
        );
        let own = own.clone();
        tokio::spawn(async move { own.check(Duration::ZERO).await });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Secret;

    #[test]
    fn a_former_key_verifies_for_a_day_however_often_the_files_are_read() {
        let keys = |name: &str| {
            let (key, secret) = (name.to_owned(), Secret::new(name));
            Keys::new(KeyPair { key, secret }, Vec::new())
        };
        let names = |keys: Keys| keys.iter().map(|pair| pair.key.clone()).collect::<Vec<_>>();
        let (mut former, began, hour) = (FormerKeys::default(), Instant::now(), Duration::from_secs(3600));
        former.add(&keys("a"), began);
        assert_eq!(names(former.with(&keys("b"), began)), ["b", "a"]);
        // The same file again, and another one.
        former.add(&keys("b"), began + hour);
        assert_eq!(names(former.with(&keys("b"), began + hour)), ["b", "a"]);
        former.add(&keys("b"), began + hour * 2);
        assert_eq!(names(former.with(&keys("c"), began + hour * 2)), ["c", "a", "b"]);
        assert_eq!(former.next_end(), Some(began + hour * 24));
        assert_eq!(names(former.with(&keys("c"), began + hour * 24)), ["c", "b"]);
        // A key that comes back is in use.
        former.add(&keys("c"), began + hour * 25);
        assert_eq!(names(former.with(&keys("b"), began + hour * 25)), ["b", "c"]);
        assert_eq!(names(former.with(&keys("b"), began + hour * 49)), ["b"]);
        assert_eq!(former.next_end(), None);
    }
}
