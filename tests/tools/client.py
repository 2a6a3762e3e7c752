#!/usr/bin/env python3
"""Joins a LiveKit room the way a client does, with what the service returned.

    client.py URL JWT [SECONDS] [--expect-refused]

Prints, one fact a line:
    joined <identity> <sid>         once connected: who we are for the SFU
    present <identity> <sid>        one for each participant who is there already
    arrived <identity> <sid>        somebody joined while we stayed
    gone <identity> <sid>           somebody left while we stayed
    disconnected <reason>           the SFU ended it, by LiveKit's name of the reason
    left                            after SECONDS (default 0), with a proper goodbye; kill the process for an abrupt end
Exit code 0; 1 and `failed <why>` when the room could not be joined.

With --expect-refused: exit code 0 and `refused <why>` when the SFU answers that it will not have us;
1 when it lets us in, and also when it cannot be reached at all, which is no refusal.
"""

import argparse
import asyncio
import logging
import re
import signal
import sys

from livekit import rtc

REFUSED = re.compile(r"client error: 4\d\d")
TOKEN = re.compile(r"eyJ[\w=.-]+")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("jwt")
    parser.add_argument("seconds", nargs="?", type=float, default=0.0)
    parser.add_argument("--expect-refused", action="store_true")
    args = parser.parse_args()
    # The SDK logs whole tokens; what matters is printed.
    logging.getLogger("livekit").setLevel(logging.CRITICAL)
    sys.exit(asyncio.run(run(args)))


async def run(args):
    room, stop = rtc.Room(), asyncio.Event()
    room.on("participant_connected", lambda who: say("arrived", who.identity, who.sid))
    room.on("participant_disconnected", lambda who: say("gone", who.identity, who.sid))
    try:
        await asyncio.wait_for(room.connect(args.url, args.jwt), 15)
    except (rtc.ConnectError, asyncio.TimeoutError) as error:
        why = TOKEN.sub("<token>", " ".join(str(error).split())) or "no answer within 15 s"
        refused = args.expect_refused and REFUSED.search(why)
        say("refused" if refused else "failed", why)
        return 0 if refused else 1

    say("joined", room.local_participant.identity, room.local_participant.sid)
    for who in room.remote_participants.values():
        say("present", who.identity, who.sid)
    if args.expect_refused:
        await room.disconnect()
        say("failed", "the room let us in")
        return 1

    ended = None

    def disconnected(reason):
        nonlocal ended
        ended = reason
        stop.set()

    room.on("disconnected", disconnected)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        await asyncio.wait_for(stop.wait(), args.seconds)
    except asyncio.TimeoutError:
        pass
    if ended is not None:
        say("disconnected", rtc.DisconnectReason.Name(ended))
        return 0
    await room.disconnect()
    say("left")
    return 0


def say(*words):
    print(*words, flush=True)


if __name__ == "__main__":
    main()
