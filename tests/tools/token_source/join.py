import json
import urllib.parse
import urllib.request

from livekit import rtc


def livekit_token(service, openid, device_id, room_id):
    """`openid`: the answer to POST /_matrix/client/v3/user/{userId}/openid/request_token."""
    query = {"matrix_server_name": openid["matrix_server_name"], "device_id": device_id}
    request = urllib.request.Request(
        f"{service}/token_source?{urllib.parse.urlencode(query)}",
        data=json.dumps({"room_name": room_id}).encode(),
        headers={"Authorization": f"Bearer {openid['access_token']}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        answer = json.load(response)
    return answer["server_url"], answer["participant_token"]


async def join(service, openid, device_id, room_id):
    room = rtc.Room()
    await room.connect(*livekit_token(service, openid, device_id, room_id))
    return room
