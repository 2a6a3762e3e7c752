//! Warnings about settings of features that this version does not have. Empty this file as they arrive.

use super::reader::Reader;

pub(super) fn warn(reader: &mut Reader<'_>) {
    for (feature, variables) in [(
        "application-service mode",
        &[
            "LIVEKIT_HS_SERVER_NAME",
            "LIVEKIT_AS_REGISTRATION_FILE",
            "LIVEKIT_AS_TOKEN",
            "LIVEKIT_HS_TOKEN",
            "LIVEKIT_REQUIRE_MEMBERSHIP",
            "LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS",
        ] as &[_],
    )] {
        let set: Vec<_> = variables.iter().copied().filter(|name| reader.value(name).is_some()).collect();
        if let [first, others @ ..] = set.as_slice() {
            let (verb, names) = if others.is_empty() {
                ("is", (*first).to_owned())
            } else {
                ("are", set.join(", "))
            };
            reader.warn(format!(
                "{feature} is not part of this version yet: {names} {verb} checked and otherwise unused"
            ));
        }
    }
}
