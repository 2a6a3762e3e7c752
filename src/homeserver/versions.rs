//! Reads from a homeserver's `/versions` which proposals it offers. Pure.
//!
//! Each of them has an unstable path and a stable one. A missing flag is never an error (decision A4): the paths are tried
//! all the same, in the order that is said here.

use serde_json::Value;

/// How a homeserver offers one proposal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Offer {
    Stable,
    Unstable,
    Both,
    /// The homeserver says nothing of it, or could not be asked.
    #[default]
    Unknown,
}

/// The two paths, or beginnings of paths, of one endpoint.
#[derive(Clone, Copy)]
pub(super) struct Paths {
    pub(super) stable: &'static str,
    pub(super) unstable: &'static str,
}

impl Offer {
    fn read(flags: Option<&Value>, unstable: &str, stable: &str) -> Self {
        let has = |flag| flags.and_then(|flags| flags.get(flag)) == Some(&Value::Bool(true));
        match (has(stable), has(unstable)) {
            (true, true) => Self::Both,
            (true, false) => Self::Stable,
            (false, true) => Self::Unstable,
            (false, false) => Self::Unknown,
        }
    }

    /// The path to try first and the one to try when that is unknown there.
    pub(super) const fn order(self, paths: Paths, prefers_stable: bool) -> [&'static str; 2] {
        match self {
            Self::Stable => [paths.stable, paths.unstable],
            Self::Both if prefers_stable => [paths.stable, paths.unstable],
            Self::Both | Self::Unstable | Self::Unknown => [paths.unstable, paths.stable],
        }
    }
}

/// All offers of a homeserver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Offers {
    /// Delayed events, MSC4140.
    pub(super) delayed_events: Offer,
    /// Questions about membership, MSC4502.
    pub(super) is_joined: Offer,
    /// Requests to other homeservers, MSC4512.
    pub(super) fed_proxy: Offer,
}

impl Offers {
    pub(super) fn read(body: &[u8]) -> Self {
        let answer = serde_json::from_slice::<Value>(body).unwrap_or_default();
        let flags = answer.get("unstable_features");
        Self {
            delayed_events: Offer::read(flags, "org.matrix.msc4140", "org.matrix.msc4140.stable"),
            is_joined: Offer::read(flags, "io.element.msc4502", "io.element.msc4502.stable"),
            fed_proxy: Offer::read(flags, "io.element.msc4512", "io.element.msc4512.stable"),
        }
    }

    /// Whether the answer says nothing of use.
    pub(super) fn is_empty(self) -> bool {
        self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATHS: Paths = Paths {
        stable: "stable",
        unstable: "unstable",
    };

    #[test]
    fn versions_decide_the_path() {
        let read = |flags: &str| Offers::read(format!("{{\"versions\":[],\"unstable_features\":{{{flags}}}}}").as_bytes()).delayed_events;
        let (stable_first, unstable_first) = (["stable", "unstable"], ["unstable", "stable"]);
        assert_eq!(read(r#""org.matrix.msc4140":true"#).order(PATHS, true), unstable_first);
        let both = read(r#""org.matrix.msc4140":true,"org.matrix.msc4140.stable":true"#);
        assert_eq!(both.order(PATHS, false), unstable_first);
        assert_eq!(both.order(PATHS, true), stable_first);
        assert_eq!(read(r#""org.matrix.msc4140.stable":true"#).order(PATHS, false), stable_first);
        assert_eq!(read(r#""org.matrix.msc4140":"yes""#).order(PATHS, true), unstable_first);
    }

    #[test]
    fn each_proposal_has_its_own_flags() {
        let read = |flags: &str| Offers::read(format!("{{\"unstable_features\":{{{flags}}}}}").as_bytes());
        let offers = read(r#""io.element.msc4502":true,"io.element.msc4502.stable":true,"io.element.msc4512.stable":true"#);
        assert_eq!(
            (offers.delayed_events, offers.is_joined, offers.fed_proxy),
            (Offer::Unknown, Offer::Both, Offer::Stable)
        );
        for nothing in ["", "<html>", "[]", "{}", r#"{"unstable_features":5}"#] {
            assert!(Offers::read(nothing.as_bytes()).is_empty(), "{nothing}");
        }
    }
}
