import { TokenSource } from "livekit-client";

export async function matrixEndpoint(service, client) {
  // A plain object, which is changed later: a `Headers` instance, an array or a function is lost without a word.
  const headers = {};
  // To be called before the hour of an OpenID token is over, and when a fetch failed with 401 `token_rejected`.
  const renew = async () => {
    const openid = await client.getOpenIdToken();
    headers.Authorization = `Bearer ${openid.access_token}`;
    return openid.matrix_server_name;
  };
  const query = new URLSearchParams({ matrix_server_name: await renew(), device_id: client.getDeviceId() });
  return { source: TokenSource.endpoint(`${service}/token_source?${query}`, { headers }), renew };
}
