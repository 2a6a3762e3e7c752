// What a page does in the tests: a call by livekit-client, with a tone as its microphone. Bundled by install.sh.
//
// The driver calls join, simulate, leave and state; what happens to the room is told by window.report.

import { ConnectionState, DisconnectReason, Room, RoomEvent } from "livekit-client";

let room;

const tell = (event, more = {}) => window.report(JSON.stringify({ event, at: Date.now(), ...more }));

window.join = async (url, token) => {
  room = new Room();
  room.on(RoomEvent.Connected, () => tell("Connected"));
  room.on(RoomEvent.SignalReconnecting, () => tell("SignalReconnecting"));
  room.on(RoomEvent.Reconnecting, () => tell("Reconnecting"));
  room.on(RoomEvent.Reconnected, () => tell("Reconnected", { sid: room.localParticipant.sid }));
  room.on(RoomEvent.Disconnected, (reason) => tell("Disconnected", { reason: DisconnectReason[reason] ?? null }));
  room.on(RoomEvent.ParticipantConnected, (who) => tell("ParticipantConnected", { identity: who.identity, sid: who.sid }));
  room.on(RoomEvent.ParticipantDisconnected, (who) => tell("ParticipantDisconnected", { identity: who.identity, sid: who.sid }));
  await room.connect(url, token);
  await room.localParticipant.publishTrack(tone(), { name: "tone" });
  return { identity: room.localParticipant.identity, sid: room.localParticipant.sid };
};

window.simulate = (scenario) => {
  // Some scenarios wait for an end that never comes; what they did is seen in the events.
  // The number is what subscriber-bandwidth asks for.
  room.simulateScenario(scenario, 100_000).catch((error) => tell("SimulateFailed", { why: String(error) }));
};

window.leave = () => room.disconnect();

window.state = () => ({ state: room?.state ?? ConnectionState.Disconnected, sid: room?.localParticipant.sid ?? "" });

function tone() {
  const context = new AudioContext();
  const oscillator = context.createOscillator();
  const out = context.createMediaStreamDestination();
  oscillator.connect(out);
  oscillator.start();
  return out.stream.getAudioTracks()[0];
}

// One who has all rights in a room, and sees what others do there.
window.watch = async (url, token) => {
  await window.join(url, token);
  const seen = (window.seen = { people: [], tracks: 0, data: 0 });
  room.on(RoomEvent.ParticipantConnected, (who) => seen.people.push(who.identity));
  room.on(RoomEvent.TrackPublished, () => seen.tracks++);
  room.on(RoomEvent.DataReceived, () => seen.data++);
  setInterval(() => room.localParticipant.publishData(new Uint8Array([1]), { reliable: true }), 200);
};
window.watched = () => window.seen;

// One who tries what its token may not allow, whatever livekit-client thinks of it.
window.tryEverything = async (url, token) => {
  const connections = [];
  const Original = window.RTCPeerConnection;
  window.RTCPeerConnection = class extends Original {
    constructor(...more) {
      super(...more);
      connections.push(this);
    }
  };
  room = new Room();
  let [heard, received] = [0, 0];
  room.on(RoomEvent.TrackSubscribed, () => heard++);
  room.on(RoomEvent.DataReceived, () => received++);
  await room.connect(url, token);
  const me = room.localParticipant;
  const all = { canPublish: true, canPublishData: true, canSubscribe: true, canUpdateMetadata: true, canPublishSources: [] };
  Object.defineProperty(me, "permissions", { get: () => all });
  const attempt = (work) => Promise.race([work, new Promise((_, late) => setTimeout(late, 12_000, "no answer"))])
    .then(() => "done", (error) => String(error?.message ?? error));
  const [publish, name, metadata, attributes] = await Promise.all([
    attempt(me.publishTrack(tone(), { name: "tone" })),
    attempt(me.setName("another")),
    attempt(me.setMetadata("another")),
    attempt(me.setAttributes({ a: "b" })),
  ]);
  const data = await attempt(me.publishData(new Uint8Array([1]), { reliable: true }));
  room.remoteParticipants.forEach((who) => who.trackPublications.forEach((one) => one.setSubscribed(true)));
  await new Promise((done) => setTimeout(done, 2000));
  const ice = connections.some((one) => ["connected", "completed"].includes(one.iceConnectionState)) ? "connected" : "none";
  return { state: room.state, ice, publish, name, metadata, attributes, data, heard, received };
};
