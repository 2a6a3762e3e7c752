import { TokenSource } from "livekit-client";

// `service` is the URL of lk-jwt-service, `client` a MatrixClient of matrix-js-sdk.
// Called only when the SDK has no token left that is good for a minute: then with a fresh OpenID token.
export function matrixTokenSource(service, client) {
  return TokenSource.custom(async ({ roomName }) => {
    const openid = await client.getOpenIdToken();
    const query = new URLSearchParams({
      matrix_server_name: openid.matrix_server_name,
      device_id: client.getDeviceId(),
    });
    const response = await fetch(`${service}/token_source?${query}`, {
      method: "POST",
      headers: { Authorization: `Bearer ${openid.access_token}`, "Content-Type": "application/json" },
      body: JSON.stringify({ room_name: roomName }),
    });
    if (!response.ok) throw new Error(`no LiveKit token: ${response.status} ${await response.text()}`);
    return response.json();
  });
}

// join(new Room(), matrixTokenSource(service, client), "!room:example.com")
export async function join(room, source, roomName) {
  const { serverUrl, participantToken } = await source.fetch({ roomName });
  await room.connect(serverUrl, participantToken);
}
