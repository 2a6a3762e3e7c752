#!/usr/bin/env python3
"""Joins a LiveKit room and publishes a microphone and a camera.

    publish.py URL JWT

Prints, one fact a line:
    joined <identity>
    published microphone <sid>      the SFU has taken the track
    refused camera <why>            it has not; the SDK finds out by waiting ten seconds
Then it stays until it is killed.
"""

import asyncio
import logging
import sys

from livekit import rtc


async def main(url, jwt):
    # The SDK logs whole tokens; what matters is printed.
    logging.getLogger("livekit").setLevel(logging.CRITICAL)
    room = rtc.Room()
    await asyncio.wait_for(room.connect(url, jwt), 30)
    say("joined", room.local_participant.identity)
    microphone = rtc.LocalAudioTrack.create_audio_track("microphone", rtc.AudioSource(48000, 1))
    camera = rtc.LocalVideoTrack.create_video_track("camera", rtc.VideoSource(64, 64))
    for name, track, source in [
        ("microphone", microphone, rtc.TrackSource.SOURCE_MICROPHONE),
        ("camera", camera, rtc.TrackSource.SOURCE_CAMERA),
    ]:
        try:
            publication = await room.local_participant.publish_track(track, rtc.TrackPublishOptions(source=source))
            say("published", name, publication.sid)
        except rtc.participant.PublishTrackError as error:
            say("refused", name, " ".join(str(error).split()))
    await asyncio.Event().wait()


def say(*words):
    print(*words, flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
