// What any visitor can see from where they are; with a ticket, whether media gets through (media.js).
// Texts for operators are those of `doctor` (faults.json); each fault has a sentence for users below.
"use strict";

(() => {
	const TIMEOUT = 8000;
	const CLOCK_FAIL = 60;
	const CLOCK_WARN = 20;
	const ROUTES = ["get_token", "sfu/get", "delegate_delayed_leave"];
	const WORDS = { ok: "works", warn: "weak", fail: "fails", skip: "not tried" };
	const TITLES = {
		browser: "Your browser can make calls",
		service: "The call service answers",
		clock: "The clock of your device is right",
		"well-known": "Your server tells apps where calls are",
		entry: "The address that it tells is usable",
		transports: "Your homeserver's own list of media servers",
		routes: "Apps can use the call service",
		livekit: "The media server answers",
		link: "Your link is good",
		signal: "Your device connects to the media server",
		udp: "Sound and video by the fast way (UDP)",
		tcp: "Sound and video by the way round (TCP)",
		turn: "Sound and video by a relay (TURN)",
	};
	const THEIRS = "Only those who run the server can mend this.";
	const ADDRESS = "The address of the call service is not right in the settings of your server. " + THEIRS;
	const BLOCKED = "Apps in a browser are not allowed to read the answers of the server, so calls fail before they begin. " + THEIRS;
	const AWAY = "The call service does not answer. It may be down, or your network blocks it: try another network, and a little later.";
	const MEDIA_AWAY = "The media server does not answer: you get into no call. Try another network; otherwise those who run it must look.";
	const USERS = {
		"client-webrtc": "Your browser cannot make calls, or an add-on or setting switches that off (WebRTC). Try another browser.",
		"client-clock": "Your device and the call service disagree about the time. Let your device set its clock by itself.",
		"well-known-unreachable": "Your server does not answer. Is the name right? Otherwise it is down, or your network blocks it.",
		"well-known-missing": "Your server does not tell apps where calls are. " + THEIRS,
		"well-known-status": "Your server answers with an error when apps ask where calls are. " + THEIRS,
		"well-known-not-json": "Your server's answer about calls cannot be understood. " + THEIRS,
		"well-known-cors": BLOCKED,
		"well-known-cors-twice": BLOCKED,
		"well-known-entry": "Your server does not tell apps where calls are. " + THEIRS,
		"service-url-scheme": ADDRESS,
		"service-url-slash": "Calls may fail in some apps. " + THEIRS,
		"transports-empty": "Your homeserver tells newer apps that it has no calls, and they remember that for a day. " + THEIRS,
		"route-unreachable": AWAY,
		"route-gateway": "The call service is down. Try again in a few minutes; if that does not help, tell those who run it.",
		"route-other": ADDRESS,
		"route-missing": "A part of the call service cannot be reached: some apps wait half a minute, or fail. " + THEIRS,
		"route-prefix": ADDRESS,
		"route-cors-missing": BLOCKED,
		"route-cors-twice": BLOCKED,
		"sfu-unreachable": "The call service cannot use the media server at the moment: nobody gets into a call. " + THEIRS,
		"sfu-public-unreachable": MEDIA_AWAY,
		"sfu-public-scheme": "The address of the media server is not one that browsers may use. " + THEIRS,
		"sfu-public-path": "The address of the media server leads to something else: nobody gets into a call. " + THEIRS,
		"sfu-public-unreadable": MEDIA_AWAY,
		"sfu-public-other": "Your device is led to another media server than the one where calls are. " + THEIRS,
		"sfu-websocket": "Your device reaches the media server and cannot connect to it. Try another network, or without VPN; otherwise those who run it must look.",
		"sfu-candidates": "The media server names no address for sound and video. " + THEIRS,
		"sfu-node-ip": "The media server tells your device an address that only works inside its own network: you hear and see nobody. " + THEIRS,
		"sfu-udp": "The fast way for sound and video is blocked, by your network or at the server. Calls may be slow or silent: try another network, or without VPN.",
		"sfu-tcp": "The way round for sound and video does not work. Those whose network blocks the fast way hear and see nobody.",
		"sfu-turn": "The relay for strict networks does not work.",
		"link-used": "This link was used as often as it may be. Ask whoever sent it for another one.",
		"link-expired": "This link is too old. Ask whoever sent it for another one.",
		"link-invalid": "This link is not good: it may be cut, or for another server. Ask whoever sent it for another one.",
	};

	const below = new URL(".", document.currentScript.src).href;
	const service = new URL("..", below).href.replace(/\/$/, "");
	const { livekit, tickets } = document.documentElement.dataset;
	const $ = (id) => document.getElementById(id);
	const state = (word) => (document.documentElement.dataset.state = word);

	// At once: what stands in the address bar is seen and kept.
	let ticket = new URLSearchParams(location.hash.slice(1)).get("t");
	if (location.hash) history.replaceState(null, "", location.pathname + location.search);
	let faults = {};
	/** Seconds that the clock here is ahead. */
	let ahead = 0;
	let found = [];
	let addresses = [];
	let server = "";
	let mayReport = false;

	// --- asking

	const own = (url, options = {}) =>
		fetch(url, { cache: "no-store", credentials: "omit", ...options, signal: AbortSignal.timeout(options.timeout ?? TIMEOUT) });

	const frame = document.createElement("iframe");
	const waiting = new Map();
	/** Whether the frame is there. */
	const framed = new Promise((done) => {
		addEventListener("message", ({ source, data }) => {
			if (source !== frame.contentWindow) return;
			if (data.ready) done(true);
			waiting.get(data.id)?.(data.answer);
			waiting.delete(data.id);
		});
		setTimeout(done, TIMEOUT, false);
	});
	Object.assign(frame, { src: below + "frame", title: "Asks as an app would", hidden: true });
	frame.setAttribute("sandbox", "allow-scripts");
	document.body.append(frame);

	async function ask(url, method = "GET", body = undefined) {
		const id = crypto.getRandomValues(new Uint32Array(1))[0];
		const answer = new Promise((done) => {
			waiting.set(id, done);
			setTimeout(done, 2.5 * TIMEOUT, { kind: "away" });
		});
		frame.contentWindow.postMessage({ id, url, method, body }, "*");
		const seen = await answer;
		// What the frame may not read, the page may where the origin is its own.
		if (seen.kind !== "hidden" || new URL(url).origin !== location.origin) return seen;
		const headers = body === undefined ? {} : { "content-type": "application/json" };
		const read = await own(url, { method, body, headers }).catch(() => null);
		if (!read) return seen;
		const values = read.headers.get("access-control-allow-origin");
		return {
			kind: "hidden",
			cors: values === null ? "missing" : values.includes(",") ? "twice" : "odd",
			status: read.status,
			headers: { "content-type": read.headers.get("content-type") ?? "", "x-served-by": read.headers.get("x-served-by") ?? "" },
			text: (await read.text()).slice(0, 65536),
		};
	}

	const CORS = {
		missing: "it has no Access-Control-Allow-Origin",
		twice: "it has several values of Access-Control-Allow-Origin",
		odd: "the answer to OPTIONS has no Access-Control-Allow-Origin, or it is not *",
		undefined: "it is there, and Access-Control-Allow-Origin is missing or doubled (which of the two cannot be seen from another origin)",
	};

	// --- checks

	const note = (check, result, saw, fault = "") => {
		found.push({ check, result, fault, saw });
		draw();
		return result === "ok" || result === "warn";
	};
	const skip = (checks, saw) => checks.forEach((check) => note(check, "skip", saw));

	async function checkService() {
		if (!window.RTCPeerConnection) note("browser", "fail", "window.RTCPeerConnection is missing", "client-webrtc");
		else note("browser", "ok", "it has WebRTC");
		const asked = Date.now();
		const answer = await own(below + "faults.json").catch(() => null);
		const date = object((await answer?.text()) ?? "")?.now;
		if (!answer?.ok || !date) {
			const gone = "the service that sent this page";
			if (answer) note("service", "fail", `${gone} is answered for with ${answer.status}`, "route-gateway");
			else note("service", "fail", `${gone} does not answer`, "route-unreachable");
			return skip(["clock"], "the service does not answer");
		}
		note("service", "ok", `it answers at ${service}`);
		// Whole seconds, and the middle of the way there and back.
		ahead = Math.round((asked + Date.now()) / 2000 - date - 0.5);
		const saw = Math.abs(ahead) < 2 ? "the same time here as there"
			: `your device is ${Math.abs(ahead)} s ${ahead > 0 ? "ahead of" : "behind"} the service`;
		const result = Math.abs(ahead) >= CLOCK_FAIL ? "fail" : Math.abs(ahead) >= CLOCK_WARN ? "warn" : "ok";
		note("clock", result, saw, result === "ok" ? "" : "client-clock");
	}

	const object = (text) => {
		try {
			const value = JSON.parse(text);
			return value && typeof value === "object" && !Array.isArray(value) ? value : null;
		} catch {
			return null;
		}
	};

	/** The address of the call service that the well-known file names. */
	async function checkFile() {
		const url = `https://${server}/.well-known/matrix/client`;
		const answer = await ask(url);
		const fail = (fault, saw) => {
			note("well-known", "fail", saw, fault);
			skip(["entry", "transports"], "they are in that file");
		};
		if (answer.kind === "away") return fail("well-known-unreachable", `${url} does not answer`);
		if (answer.kind === "hidden" && (answer.status ?? 200) === 200) {
			return fail(answer.cors === "twice" ? "well-known-cors-twice" : "well-known-cors", `${url}: ${CORS[answer.cors]}`);
		}
		if (answer.status === 404) return fail("well-known-missing", `${url} is answered with 404`);
		if (answer.status !== 200) return fail("well-known-status", `${url} is answered with ${answer.status}`);
		const file = object(answer.text);
		if (!file) return fail("well-known-not-json", `${url} is no JSON object`);
		note("well-known", "ok", `${url} is there${answer.redirected ? ", behind a redirect" : ""}`);
		const base = file["m.homeserver"]?.base_url;
		const address = checkEntry(file["org.matrix.msc4143.rtc_foci"]);
		await checkTransports(typeof base === "string" ? base.replace(/\/$/, "") : `https://${server}`);
		return address;
	}

	function checkEntry(foci) {
		const entry = Array.isArray(foci) ? foci.find((one) => one?.type === "livekit") : undefined;
		const text = entry?.livekit_service_url;
		if (typeof text !== "string") {
			const saw = "it has no entry of the type livekit in org.matrix.msc4143.rtc_foci, or one without livekit_service_url";
			return void note("entry", "fail", saw, "well-known-entry");
		}
		const isUsable = /^https:\/\/[^/]/i.test(text) || (/^http:\/\/[^/]/i.test(text) && location.protocol === "http:");
		if (!isUsable) return void note("entry", "fail", `livekit_service_url is ${text}`, "service-url-scheme");
		if (text.endsWith("/")) note("entry", "warn", `livekit_service_url is ${text}`, "service-url-slash");
		else note("entry", "ok", `it is ${text}${text === service ? "" : `, and not ${service}, of which this page is`}`);
		return text.replace(/\/$/, "");
	}

	async function checkTransports(base) {
		let answer;
		for (const path of ["unstable/org.matrix.msc4143/rtc/transports", "v1/rtc/transports"]) {
			answer = await ask(`${base}/_matrix/client/${path}`);
			if (answer.status !== 404) break;
		}
		if (answer.kind === "away") return skip(["transports"], `${base} does not answer`);
		const body = object(answer.text ?? "");
		if (answer.status === 404 || body?.errcode === "M_UNRECOGNIZED") return note("transports", "ok", "it has none: apps use the file above");
		if (answer.status !== 200 || !body) return skip(["transports"], "it is told to apps that are signed in only");
		const list = Array.isArray(body.rtc_transports) ? body.rtc_transports : [];
		const entry = list.find((one) => String(one?.type).endsWith("livekit"));
		if (!entry) return note("transports", "fail", `it is ${answer.text.slice(0, 80)}`, "transports-empty");
		note("transports", "ok", `it names ${entry.url ?? entry.livekit_service_url}`);
	}

	/** What is wrong with the answer of a route of the service. */
	function judge(answer) {
		const { kind, cors, status, headers, text } = answer;
		if (kind === "away") return ["route-unreachable", "no answer"];
		if (kind === "hidden" && status === undefined) return ["route-cors-missing", CORS[undefined]];
		const isOurs = headers["x-served-by"].startsWith("lk-jwt-service");
		if (status >= 502 && status <= 504) return ["route-gateway", `a proxy answers ${status}`];
		if (isOurs && status === 404) return ["route-prefix", "the service answers 404, since the path that arrives there is none of its own"];
		if (!isOurs) {
			const who = text.trim() === "404 page not found" ? "LiveKit (or Traefik)" : "something else than this service";
			return ["route-missing", `${who} answers ${status}`];
		}
		if (kind === "hidden") return [cors === "twice" ? "route-cors-twice" : "route-cors-missing", CORS[cors]];
	}

	async function checkRoutes(address) {
		const wrong = [];
		for (const route of ROUTES) {
			const [fault, saw] = judge(await ask(`${address}/${route}`, "POST", "{}")) ?? [];
			if (fault) wrong.push({ route, fault, saw });
			// The others would be waited for in vain.
			if (fault === "route-unreachable") break;
		}
		if (!wrong.length) return note("routes", "ok", `${ROUTES.length} of ${ROUTES.length} are there, for browsers too`);
		const { fault } = wrong[0];
		const isElsewhere = wrong.length === ROUTES.length && fault === "route-missing";
		const all = [...new Set(wrong.map(({ saw }) => saw))].map((saw) => {
			const routes = wrong.filter((one) => one.saw === saw).map(({ route }) => `/${route}`);
			return `POST ${routes.join(", ")}: ${saw}`;
		});
		note("routes", "fail", `at ${address}, ${all.join("; ")}`, isElsewhere ? "route-other" : fault);
	}

	async function checkLivekit() {
		const url = livekit.replace(/\/*$/, "");
		if (location.protocol === "https:" && !/^(wss|https):/i.test(url)) {
			return note("livekit", "fail", `LIVEKIT_URL is ${url}`, "sfu-public-scheme");
		}
		const answer = await ask(`${url.replace(/^ws/i, "http")}/rtc/validate`);
		if (answer.kind === "away") return note("livekit", "fail", `${url} does not answer`, "sfu-public-unreachable");
		const { status } = answer;
		if (status >= 502 && status <= 504) return note("livekit", "fail", `${url}: a proxy answers ${status}`, "sfu-public-unreachable");
		if (answer.kind === "hidden") return note("livekit", "fail", `${url}: ${CORS[answer.cors]}`, "sfu-public-unreadable");
		if (status !== 401) return note("livekit", "fail", `${url}/rtc/validate is answered with ${status}`, "sfu-public-path");
		note("livekit", "ok", `it answers at ${url}`);
	}

	// --- with a ticket

	const MEDIA = ["signal", "udp", "tcp", "turn"];

	const script = (url) => new Promise((done, failed) => {
		document.head.append(Object.assign(document.createElement("script"), { src: url, onload: done, onerror: failed }));
	});

	async function checkMedia() {
		const fail = (fault, saw) => {
			note("link", "fail", saw, fault);
			skip(MEDIA, "the link is not good");
		};
		// First what takes long: from the token on there is a minute.
		try {
			if (!window.tryMedia) {
				await script(below + "livekit-client-2.23.0.js");
				await script(below + "media.js");
			}
		} catch {
			return skip(["link", ...MEDIA], "the client of LiveKit cannot be loaded: this page has to come by https");
		}
		const answer = await own(below + "token", { method: "POST", headers: { authorization: `Bearer ${ticket}` }, timeout: 15000 }).catch(() => null);
		if (!answer) return skip(["link", ...MEDIA], "the service does not answer");
		const body = object(await answer.text());
		mayReport = answer.ok || answer.status === 500;
		if (answer.status === 401) {
			let ends = 0;
			try {
				ends = JSON.parse(atob(ticket.split(".")[1].replaceAll("-", "+").replaceAll("_", "/"))).exp;
			} catch { /* It is cut. */ }
			return ends && ends <= Date.now() / 1000 - ahead ? fail("link-expired", "its time is over") : fail("link-invalid", "the service does not know it");
		}
		if (answer.status === 403) return fail("link-used", "it was used five times");
		if (answer.status === 429) return skip(["link", ...MEDIA], `too many are trying it: again in ${answer.headers.get("retry-after")} s`);
		if (!answer.ok || !body) {
			note("link", "fail", `the service cannot open a room (${answer.status}, request ${body?.request_id})`, "sfu-unreachable");
			return skip(MEDIA, "there is no room to try it in");
		}
		note("link", "ok", `${body.uses_left} uses are left`);
		addresses = await window.tryMedia(body, note, skip, working);
	}

	// --- showing

	const element = (name, properties = {}, ...children) => {
		const made = Object.assign(document.createElement(name), properties);
		made.append(...children);
		return made;
	};

	const working = (check) => ($("status").textContent = `Trying: ${TITLES[check].toLowerCase()} …`);

	/** What the operator is told of a finding. */
	function forOperator({ fault, saw }) {
		const { means, remedy, snippet } = faults[fault] ?? { means: "", remedy: "" };
		return element("div", { className: "for" },
			element("b", { textContent: "For those who run the server" }),
			element("p", {}, element("code", { textContent: fault }), `: ${means}. What to do: ${remedy}.`),
			...(snippet ? [element("pre", { textContent: snippet })] : []),
			element("p", { className: "saw", textContent: `Seen: ${saw}.` }));
	}

	function draw() {
		$("found").hidden = false;
		$("checks").replaceChildren(...found.map((finding) => {
			const { check, result, fault, saw } = finding;
			const line = [element("span", { textContent: TITLES[check] }), element("span", { className: "word", textContent: WORDS[result] })];
			const more = element("div", { className: "more" }, element("p", { textContent: USERS[fault] ?? `${saw[0].toUpperCase()}${saw.slice(1)}.` }));
			if (fault) more.append(forOperator(finding));
			const item = element("li", { className: result }, element("details", {}, element("summary", { className: "line" }, ...line), more));
			item.dataset.check = check;
			return item;
		}));
	}

	function conclude() {
		const of = (result) => found.find((finding) => finding.result === result);
		const worst = of("fail") ?? of("warn");
		const result = worst?.result ?? "ok";
		$("verdict").className = result;
		$("headline").textContent = worst?.check === "link" && worst.fault.startsWith("link-") ? "Your link cannot be used" : {
			fail: "Something is broken",
			warn: "Calls work, with a weakness",
			ok: "Nothing is wrong, as far as this page can see",
		}[result];
		$("sentence").textContent = worst ? USERS[worst.fault]
			: ticket ? "Sound and video get through from where you are. If calls fail all the same, send this to whoever runs the server."
				: "Whether sound and video get through is not seen without a link from whoever runs the server.";
		$("operator").replaceChildren(...(worst ? [forOperator(worst)] : []));
		$("send-text").textContent = mayReport ? "Send what was found, or copy it into a message." : "Copy what was found into a message to them.";
		$("report").hidden = !mayReport;
		$("report").disabled = false;
		$("tick").hidden = !addresses.length;
		for (const part of ["verdict", "send"]) $(part).hidden = false;
		$("verdict").focus({ preventScroll: true });
		$("verdict").scrollIntoView({ block: "nearest" });
	}

	const told = () => ($("addresses").checked ? addresses : []);

	function asText() {
		const lines = [`Why does my call not work? ${service}${server ? `, ${server}` : ""}, ${new Date().toISOString()}`, navigator.userAgent];
		for (const { check, result, fault, saw } of found) {
			lines.push(`${result.padEnd(4)}  ${check}${fault ? ` (${fault})` : ""}: ${saw}`);
			if (faults[fault]) lines.push(`      ${faults[fault].means}. ${faults[fault].remedy}.`);
		}
		return lines.concat(told().map((address) => `address of the device: ${address}`)).join("\n");
	}

	// --- what the visitor does

	$("copy").onclick = async () => {
		const text = asText();
		try {
			await navigator.clipboard.writeText(text);
			$("sent").textContent = "Copied.";
		} catch {
			Object.assign($("text"), { hidden: false, value: text }).select();
			$("sent").textContent = "Copy the text below.";
		}
	};

	$("report").onclick = async () => {
		$("report").disabled = true;
		const report = { server, browser: navigator.userAgent.slice(0, 300), addresses: told(), checks: [...found] };
		// The service takes 8 KiB.
		for (const one of report.checks.keys()) report.checks[one] = { ...found[one], saw: found[one].saw.slice(0, 300) };
		const headers = { authorization: `Bearer ${ticket}`, "content-type": "application/json" };
		const answer = await own(below + "report", { method: "POST", headers, body: JSON.stringify(report) }).catch(() => null);
		$("sent").textContent = answer?.ok ? "Sent. Thank you." : "It could not be sent: copy it instead.";
	};

	$("form").onsubmit = async (event) => {
		event.preventDefault();
		server = $("name").value.trim().replace(/^@[^:]*:/, "").replace(/^https?:\/\//i, "").replace(/\/.*$/, "").toLowerCase();
		const isName = /^(\[[0-9a-f:.]+\]|[a-z0-9.-]+)(:\d{1,5})?$/.test(server);
		$("problem").textContent = isName || (!server && ticket) ? "" : "Write the part of your Matrix ID behind the colon, such as example.org.";
		$("name").setAttribute("aria-invalid", String(Boolean($("problem").textContent)));
		if ($("problem").textContent) return $("name").focus();
		state("busy");
		$("go").disabled = true;
		[found, addresses, mayReport] = [[], [], false];
		for (const part of ["verdict", "send", "text"]) $(part).hidden = true;
		$("sent").textContent = "";
		try {
			working("service");
			await checkService();
			let address = service;
			if (await framed) {
				if (server) {
					working("well-known");
					address = await checkFile();
				}
				working("routes");
				if (address) await checkRoutes(address);
				else skip(["routes"], "no usable address of it is known");
				working("livekit");
				await checkLivekit();
			} else skip(["well-known", "routes", "livekit"], "a part of this page cannot be loaded");
			if (ticket) await checkMedia();
		} finally {
			$("status").textContent = "";
			$("go").disabled = false;
			$("go").textContent = "Test again";
			conclude();
			state("done");
		}
	};

	if (ticket) {
		$("link").hidden = false;
		$("link").textContent = tickets === "on"
			? "With the link that you were sent, this page also tries whether sound and video get through. Your Matrix ID is not needed for that; with it, more is tried."
			: "You were sent a link that tries sound and video. That is switched off here (LIVEKIT_CHECK_PAGE): the page does the rest.";
		if (tickets !== "on") ticket = null;
	}
	$("form").hidden = false;
	own(below + "faults.json").then((answer) => answer.json()).then((all) => {
		faults = all.faults;
		state("ready");
	}, () => state("ready"));
})();
