#!/usr/bin/env python3
"""Real LiveKit clients in many rooms at once, in one process. Orders come on standard input, one a line:

    join ID URL JWT        answered by `joined ID` or `refused ID WHY`
    leave ID               with a proper goodbye; answered by `left ID`

Kill the process for an abrupt end of all of them.
"""

import asyncio
import logging
import re
import sys

from livekit import rtc

TOKEN = re.compile(r"eyJ[\w=.-]+")


async def main():
    logging.getLogger("livekit").setLevel(logging.CRITICAL)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    rooms, tasks = {}, set()
    say("ready")
    while line := await reader.readline():
        order, who, *rest = line.decode().split()
        work = join(rooms, who, *rest) if order == "join" else leave(rooms, who)
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def join(rooms, who, url, jwt):
    room = rtc.Room()
    try:
        await asyncio.wait_for(room.connect(url, jwt), 15)
    except (rtc.ConnectError, asyncio.TimeoutError) as error:
        say("refused", who, TOKEN.sub("<token>", " ".join(str(error).split())) or "no answer within 15 s")
        return
    rooms[who] = room
    say("joined", who)


async def leave(rooms, who):
    if room := rooms.pop(who, None):
        await room.disconnect()
    say("left", who)


def say(*words):
    print(*words, flush=True)


if __name__ == "__main__":
    asyncio.run(main())
