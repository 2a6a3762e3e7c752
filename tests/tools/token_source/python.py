#!/usr/bin/env python3
"""Joins as the README's example does: python.py SERVICE SERVER TOKEN DEVICE ROOM

Prints `joined <identity> <room>`, and stays until it is killed.
"""

import asyncio
import logging
import sys

from join import join


async def main(service, server, token, device, room_id):
    logging.getLogger("livekit").setLevel(logging.CRITICAL)
    room = await join(service, {"access_token": token, "matrix_server_name": server}, device, room_id)
    print("joined", room.local_participant.identity, room.name, flush=True)
    await asyncio.Event().wait()


asyncio.run(main(*sys.argv[1:]))
