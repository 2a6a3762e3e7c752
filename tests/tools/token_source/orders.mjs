// What the tests order livekit-client's token sources to do, in Node and in a page.

import { Room, TokenSource } from "livekit-client";
import { join, matrixTokenSource } from "./custom.mjs";
import { matrixEndpoint } from "./endpoint.mjs";

let service, openid, sources, room;

// As of matrix-js-sdk; hands out the token that the test gave last.
const client = (device) => ({ getOpenIdToken: async () => ({ ...openid }), getDeviceId: () => device });

const RealDate = Date;

export const orders = {
  async start(order) {
    orders.token(order);
    service = order.service;
    const matrix = client(order.device);
    sources = { custom: matrixTokenSource(service, matrix), endpoint: await matrixEndpoint(service, matrix) };
  },
  token({ token, server }) {
    openid = { access_token: token, matrix_server_name: server, token_type: "Bearer", expires_in: 3600 };
  },
  renew: () => sources.endpoint.renew(),
  async fetch({ source, room, name, force }) {
    const options = name ? { roomName: room, participantName: name } : { roomName: room };
    const { serverUrl, participantToken } = await (sources[source].source ?? sources[source]).fetch(options, force);
    return { url: serverUrl, jwt: participantToken };
  },
  // Lost without a word, says the README.
  async fetchWithHeadersInstance({ room }) {
    const headers = new Headers({ Authorization: `Bearer ${openid.access_token}` });
    const query = new URLSearchParams({ matrix_server_name: openid.matrix_server_name, device_id: "DEVICE" });
    await TokenSource.endpoint(`${service}/token_source?${query}`, { headers }).fetch({ roomName: room });
  },
  // The client's clock is so many seconds slow.
  clock({ slow }) {
    globalThis.Date = class extends RealDate {
      constructor(...given) {
        given.length ? super(...given) : super(RealDate.now() - slow * 1000);
      }
      static now = () => RealDate.now() - slow * 1000;
    };
  },
  async join({ source, room: name }) {
    room = new Room();
    await join(room, sources[source].source ?? sources[source], name);
    return { identity: room.localParticipant.identity, room: room.name };
  },
  leave: () => room.disconnect(),
};
