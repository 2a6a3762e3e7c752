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
