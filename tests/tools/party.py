#!/usr/bin/env python3
"""Several clients of LiveKit's Python SDK in one process, steered by lines of JSON; kill it for an abrupt end of all.

    party.py

Orders on standard input, each answered by {"id", "ok"} or {"id", "error"}; an order does not wait for the one before:
    {"id", "do": "join", "name", "url", "token"}    {identity, sid} once the client is in the room
    {"id", "do": "leave", "name"}                   with a proper goodbye
    {"id", "do": "listen"}                          answered once orders are heard
What happens to a client comes as {"name", "event", "at", ...}. With the end of its input it ends, without goodbyes.
"""

import asyncio
import json
import logging
import os
import re
import sys
import time

from livekit import rtc

TOKEN = re.compile(r"eyJ[\w=.-]+")
rooms = {}


async def main():
    # The SDK logs whole tokens; what matters is printed.
    logging.getLogger("livekit").setLevel(logging.CRITICAL)
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    tasks = set()
    while line := await lines.readline():
        task = asyncio.create_task(obey(json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    os._exit(0)


async def obey(order):
    try:
        done = await {"join": join, "leave": leave, "listen": listen}[order["do"]](order)
        say({"id": order["id"], "ok": done})
    except (rtc.ConnectError, asyncio.TimeoutError, KeyError) as error:
        why = TOKEN.sub("<token>", " ".join(repr(error).split()))
        say({"id": order["id"], "error": why})


async def join(order):
    name, room = order["name"], rtc.Room()

    def tell(event, **more):
        say({"name": name, "event": event, "at": time.time_ns() // 1_000_000, **more})

    room.on("reconnecting", lambda: tell("Reconnecting"))
    room.on("reconnected", lambda: tell("Reconnected"))
    room.on("disconnected", lambda reason: tell("Disconnected", reason=rtc.DisconnectReason.Name(reason)))
    await asyncio.wait_for(room.connect(order["url"], order["token"]), 30)
    rooms[name] = room
    return {"identity": room.local_participant.identity, "sid": room.local_participant.sid}


async def leave(order):
    await rooms.pop(order["name"]).disconnect()


async def listen(_):
    pass


def say(what):
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
