//! The warning about settings of a feature that this version does not have. Remove this file when it arrives.

use super::reader::Reader;

const VARIABLES: [&str; 6] = [
    "LIVEKIT_HS_SERVER_NAME",
    "LIVEKIT_AS_REGISTRATION_FILE",
    "LIVEKIT_AS_TOKEN",
    "LIVEKIT_HS_TOKEN",
    "LIVEKIT_REQUIRE_MEMBERSHIP",
    "LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS",
];

pub(super) fn warn(reader: &mut Reader<'_>) {
    let set: Vec<_> = VARIABLES.into_iter().filter(|name| reader.value(name).is_some()).collect();
    if let [first, others @ ..] = set.as_slice() {
        let (verb, names) = if others.is_empty() {
            ("is", (*first).to_owned())
        } else {
            ("are", set.join(", "))
        };
        reader.warn(format!(
            "application-service mode is not part of this version yet: {names} {verb} checked and otherwise unused"
        ));
    }
}
