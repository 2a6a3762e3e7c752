// Whether media gets through, one way after the other: a room of LiveKit's client for each, without the SFU's addresses of the other
// ways. STUN servers, which may be somebody else's, are never asked.
"use strict";

(() => {
	const TIMEOUT = 9000;
	const PRIVATE = /^(10\.|127\.|169\.254\.|192\.168\.|172\.(1[6-9]|2\d|3[01])\.|100\.(6[4-9]|[7-9]\d|1[01]\d|12[0-7])\.|f[cd]|fe80:|::1$)/i;

	/** What is seen of the way at hand. */
	let way;

	const servers = (list) => {
		const relays = (list ?? []).map((one) => ({ ...one, urls: [one.urls].flat().filter((url) => /^turns?:/i.test(url)) }))
			.filter((one) => one.urls.length);
		way.relays = relays.length > 0 || way.relays;
		return way.name === "turn" ? relays : [];
	};
	const limited = (config) => ({
		...config,
		iceServers: servers(config?.iceServers),
		iceTransportPolicy: way.name === "turn" ? "relay" : "all",
	});
	/** Whether an address of the SFU, as ICE writes it, is one of the way at hand; it is noted in any case. */
	const isWanted = (line) => {
		const [, , kind, , address, port] = line.replace(/^(a=)?candidate:/, "").split(" ");
		if (!port) return true;
		const protocol = kind.toLowerCase();
		way.offered.add(`${protocol} ${address}:${port}`);
		return way.name === "turn" || protocol === way.name;
	};

	const Original = window.RTCPeerConnection;
	window.RTCPeerConnection = class extends Original {
		constructor(config, ...more) {
			super(limited(config), ...more);
			way.connections.push(this);
			this.addEventListener("icecandidate", ({ candidate }) => {
				if (candidate?.address) addresses.add(candidate.address);
			});
		}
		setConfiguration(config) {
			return super.setConfiguration(limited(config));
		}
		setRemoteDescription(description) {
			const lines = description.sdp?.split("\r\n").filter((line) => !line.startsWith("a=candidate:") || isWanted(line));
			return super.setRemoteDescription(lines ? { type: description.type, sdp: lines.join("\r\n") } : description);
		}
		async addIceCandidate(candidate) {
			if (!candidate?.candidate || isWanted(candidate.candidate)) return super.addIceCandidate(candidate);
		}
	};
	const addresses = new Set();

	/** The pair of addresses that media goes by, once there is one. */
	async function pair() {
		for (const connection of way.connections) {
			const stats = await connection.getStats().catch(() => new Map());
			const all = [...stats.values()];
			const chosen = all.find((one) => one.type === "transport" && one.selectedCandidatePairId)?.selectedCandidatePairId;
			const found = stats.get(chosen) ?? all.find((one) => one.type === "candidate-pair" && one.nominated && one.state === "succeeded");
			if (found) return { remote: stats.get(found.remoteCandidateId), roundTrip: found.currentRoundTripTime };
		}
	}

	async function attempt(name, url, token) {
		way = { name, relays: false, offered: new Set(), connections: [], signal: false };
		const { Room, RoomEvent, setLogLevel } = window.LivekitClient;
		setLogLevel("silent");
		const room = new Room();
		room.on(RoomEvent.SignalConnected, () => (way.signal = true));
		const end = new Promise((_, late) => setTimeout(late, 2 * TIMEOUT, new Error("time-out")));
		const options = { autoSubscribe: false, maxRetries: 0, peerConnectionTimeout: TIMEOUT, websocketTimeout: TIMEOUT };
		try {
			await Promise.race([room.connect(url, token, options), end]);
			way.pair = await pair();
		} catch (error) {
			way.error = String(error?.message ?? error).slice(0, 200);
		}
		await room.disconnect().catch(() => {});
		return way;
	}

	const list = (offered) => [...offered].join(", ");

	/** Why the WebSocket does not stand: the SFU is asked by an ordinary request with the same token. */
	async function why(url, token) {
		const address = `${url.replace(/\/*$/, "").replace(/^ws/i, "http")}/rtc/validate`;
		const headers = { authorization: `Bearer ${token}` };
		const answer = await fetch(address, { headers, cache: "no-store", signal: AbortSignal.timeout(TIMEOUT) }).catch(() => null);
		if (!answer) return ["sfu-public-unreachable", "nor does it answer an ordinary request"];
		const { status } = answer;
		if (status === 200) return ["sfu-websocket", "an ordinary request goes through, a WebSocket does not"];
		if (status >= 502 && status <= 504) return ["sfu-public-unreachable", `a proxy answers ${status}`];
		const text = await answer.text();
		if (status === 401 || text.startsWith("requested room does not exist")) return ["sfu-public-other", `the SFU there answers ${status}`];
		return ["sfu-public-path", `the address is answered with ${status}`];
	}

	window.tryMedia = async ({ url, token }, note, skip, working) => {
		working("signal");
		const udp = await attempt("udp", url, token);
		if (!udp.signal) {
			const [fault, saw] = await why(url, token);
			note("signal", "fail", `${url}: ${saw} (${udp.error})`, fault);
			skip(["udp", "tcp", "turn"], "there is no connection to the media server");
			return [];
		}
		note("signal", "ok", `a WebSocket goes through to ${url}`);
		working("tcp");
		const tcp = await attempt("tcp", url, token);
		const offered = new Set([...udp.offered, ...tcp.offered]);
		const works = { udp: Boolean(udp.pair), tcp: Boolean(tcp.pair) };
		for (const [name, seen] of [["udp", udp], ["tcp", tcp]]) {
			const of = [...offered].filter((one) => one.startsWith(name));
			if (seen.pair) {
				const trip = seen.pair.roundTrip === undefined ? "" : `, ${Math.round(seen.pair.roundTrip * 1000)} ms there and back`;
				note(name, "ok", `it gets through to ${seen.pair.remote?.address}:${seen.pair.remote?.port}${trip}`);
				continue;
			}
			const result = works.udp || works.tcp ? "warn" : "fail";
			if (!offered.size) note(name, result, "the SFU names no address", "sfu-candidates");
			else if (!of.length) note(name, result, `the SFU names no address for ${name.toUpperCase()}, only ${list(offered)}`, `sfu-${name}`);
			else if (of.every((one) => PRIVATE.test(one.slice(name.length + 1)))) note(name, result, `the SFU names ${list(of)}`, "sfu-node-ip");
			else note(name, result, `no way to ${list(of)}`, `sfu-${name}`);
		}
		if (!udp.relays && !tcp.relays) skip(["turn"], "the media server offers no relay");
		else {
			working("turn");
			const turn = await attempt("turn", url, token);
			if (turn.pair) note("turn", "ok", "it gets through");
			else note("turn", "warn", "the relay that the SFU names does not lead to it", "sfu-turn");
		}
		return [...addresses];
	};
})();
