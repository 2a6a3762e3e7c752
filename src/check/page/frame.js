// Asks for the page what an app of another origin asks: the origin of this frame is nobody's (its policy is `sandbox`), so that CORS
// counts here, as it never does for the page itself.
"use strict";

const TIMEOUT = 8000;
const MOST = 65536;
const HEADERS = ["content-type", "x-served-by"];

async function ask({ url, method, body }) {
	const options = { method, body, credentials: "omit", cache: "no-store", referrerPolicy: "no-referrer" };
	const once = (more) => fetch(url, { ...options, ...more, signal: AbortSignal.timeout(TIMEOUT) });
	try {
		const answer = await once(body === undefined ? {} : { headers: { "content-type": "application/json" } });
		const headers = Object.fromEntries(HEADERS.map((name) => [name, answer.headers.get(name) ?? ""]));
		const text = (await answer.text()).slice(0, MOST);
		return { kind: "read", status: answer.status, headers, text, redirected: answer.redirected };
	} catch {
		// There, and not for browsers? Or not there?
		return once({ mode: "no-cors" }).then(() => ({ kind: "hidden" }), () => ({ kind: "away" }));
	}
}

parent.postMessage({ ready: true }, "*");
addEventListener("message", async (event) => {
	if (event.source !== parent) return;
	const { id, ...what } = event.data;
	parent.postMessage({ id, answer: await ask(what) }, event.origin);
});
