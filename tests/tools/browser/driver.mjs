// Headless Chromium with pages in which livekit-client runs, steered by lines of JSON.
//
//   node driver.mjs CHROMIUM DIRECTORY BUNDLE [FLAGS OF CHROMIUM]
//
// Orders on standard input, each answered by {"id", "ok"} or {"id", "error"}:
//   {"id", "do": "open"}                            a tab; its name
//   {"id", "do": "join", "page", "url", "token"}    {identity, sid} once the tab is in the room
//   {"id", "do": "simulate", "page", "scenario"}    livekit-client's simulateScenario
//   {"id", "do": "leave" | "reload" | "close" | "state", "page"}
//   {"id", "do": "order", "page", "order": {"do", ...}}    what the page's own `order` does with it
//   {"id", "do": "visit", "page", "url"}            the tab shows another page; every request of it is kept from here on
//   {"id", "do": "requests", "page"}                addresses that the tab has asked, with its frames and WebSockets
//   {"id", "do": "run", "page", "script"}           what the script comes to
//   {"id", "do": "look", "page", "width", "height", "scheme", "file"}    a size, light or dark; a picture of the whole, where asked
//   {"id", "do": "kill"}                            kill -9 of the whole browser
// What happens in a tab comes as {"page", "event", "at", ...}. DIRECTORY (new) holds the profile and the browser's log.

import { spawn } from "node:child_process";
import { mkdirSync, openSync, readFileSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import { createInterface } from "node:readline";

const [chromium, directory, bundle, ...flags] = process.argv.slice(2);
mkdirSync(directory, { recursive: true });
const log = openSync(`${directory}/chromium.log`, "a");

// A page of its own, as loopback counts as secure and about:blank does not.
const script = readFileSync(bundle);
const server = createServer((request, response) => {
  const isScript = request.url === "/page.js";
  response.setHeader("Content-Type", isScript ? "text/javascript" : "text/html");
  response.end(isScript ? script : "<!doctype html><title>call</title><script src=/page.js></script>");
});
await new Promise((done) => server.listen(0, "127.0.0.1", done));
const home = `http://127.0.0.1:${server.address().port}/`;

// A group of its own, so that all of it can be killed at once; setpriv, so that it does not outlive us.
const browser = spawn(
  "setpriv",
  [
    "--pdeathsig", "KILL", chromium,
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--mute-audio", "--autoplay-policy=no-user-gesture-required", "--no-proxy-server",
    // Tabs that nobody looks at work as fast as others; and calls over loopback are calls.
    "--disable-background-timer-throttling", "--disable-backgrounding-occluded-windows", "--disable-renderer-backgrounding",
    "--allow-loopback-in-peer-connection", "--disable-features=WebRtcHideLocalIpsWithMdns",
    `--user-data-dir=${directory}/profile`, "--remote-debugging-pipe", ...flags, "about:blank",
  ],
  { stdio: ["ignore", log, log, "pipe", "pipe"], detached: true },
);
browser.on("exit", (code, signal) => say({ event: "BrowserEnded", code, signal, at: Date.now() }));
browser.on("error", (error) => say({ event: "BrowserEnded", why: String(error), at: Date.now() }));
const [to, from] = [browser.stdio[3], browser.stdio[4]];
to.on("error", () => {});

function say(what) {
  process.stdout.write(`${JSON.stringify(what)}\n`);
}

// Chromium's DevTools protocol: JSON, each message ended by a zero byte.
const waiting = new Map();
let number = 0;
function call(method, params = {}, sessionId = undefined) {
  return new Promise((resolve, reject) => {
    waiting.set(++number, { resolve, reject });
    to.write(`${JSON.stringify({ id: number, method, params, sessionId })}\0`);
  });
}
let rest = "";
from.setEncoding("utf8");
from.on("data", (chunk) => {
  const messages = (rest + chunk).split("\0");
  rest = messages.pop();
  messages.forEach((message) => heard(JSON.parse(message)));
});

const pages = new Map(); // name -> {target, session}
const names = new Map(); // session -> name
const loads = new Map(); // session -> what waits for the end of a load
const requests = new Map(); // session -> addresses that were asked; those of frames and workers are their tab's

function heard(message) {
  if (message.id !== undefined) {
    const { resolve, reject } = waiting.get(message.id);
    waiting.delete(message.id);
    message.error ? reject(new Error(message.error.message)) : resolve(message.result);
  } else if (message.method === "Runtime.bindingCalled") {
    say({ page: names.get(message.sessionId), ...JSON.parse(message.params.payload) });
  } else if (message.method === "Page.loadEventFired") {
    loads.get(message.sessionId)?.();
  } else if (message.method === "Network.requestWillBeSent") {
    requests.get(message.sessionId)?.push(message.params.request.url);
  } else if (message.method === "Network.webSocketCreated") {
    requests.get(message.sessionId)?.push(message.params.url);
  } else if (message.method === "Target.attachedToTarget" && requests.has(message.sessionId)) {
    const { sessionId: child } = message.params;
    requests.set(child, requests.get(message.sessionId));
    recorded(child).then(() => call("Runtime.runIfWaitingForDebugger", {}, child)).catch(() => {});
  } else if (message.method === "Inspector.targetCrashed") {
    say({ page: names.get(message.sessionId), event: "Crashed", at: Date.now() });
  }
}

// Before anything of it runs, a frame of another process is listened to, too.
async function recorded(session) {
  await call("Network.enable", {}, session);
  await call("Target.setAutoAttach", { autoAttach: true, waitForDebuggerOnStart: true, flatten: true }, session);
}

async function load(session, method, params) {
  const loaded = new Promise((done) => loads.set(session, done));
  await call(method, params, session);
  await loaded;
}

async function run(page, expression) {
  const { session } = pages.get(page);
  const { result, exceptionDetails: failed } = await call(
    "Runtime.evaluate",
    { expression, awaitPromise: true, returnByValue: true, userGesture: true },
    session,
  );
  if (failed) throw new Error(failed.exception?.description ?? failed.text);
  return result.value ?? null;
}

const orders = {
  async open() {
    const { targetId: target } = await call("Target.createTarget", { url: "about:blank" });
    const { sessionId: session } = await call("Target.attachToTarget", { targetId: target, flatten: true });
    const name = `tab${pages.size + 1}`;
    pages.set(name, { target, session });
    names.set(session, name);
    await call("Runtime.addBinding", { name: "report" }, session);
    await Promise.all(["Runtime.enable", "Page.enable", "Inspector.enable"].map((method) => call(method, {}, session)));
    await load(session, "Page.navigate", { url: home });
    return name;
  },
  join: ({ page, url, token }) => run(page, `join(${JSON.stringify(url)}, ${JSON.stringify(token)})`),
  simulate: ({ page, scenario }) => run(page, `simulate(${JSON.stringify(scenario)})`),
  leave: ({ page }) => run(page, "leave()"),
  state: ({ page }) => run(page, "state()"),
  order: ({ page, order }) => run(page, `order(${JSON.stringify(order.do)}, ${JSON.stringify(order)})`),
  reload: ({ page }) => load(pages.get(page).session, "Page.reload"),
  close: ({ page }) => call("Target.closeTarget", { targetId: pages.get(page).target }),
  async visit({ page, url }) {
    const { session } = pages.get(page);
    requests.set(session, []);
    await recorded(session);
    // The page may be there already, but for the part behind the #.
    await load(session, "Page.navigate", { url: "about:blank" });
    await load(session, "Page.navigate", { url });
  },
  requests: ({ page }) => requests.get(pages.get(page).session),
  run: ({ page, script }) => run(page, script),
  async look({ page, width, height, scheme, file }) {
    const { session } = pages.get(page);
    await call("Emulation.setDeviceMetricsOverride", { width, height, deviceScaleFactor: 1, mobile: width < 600 }, session);
    await call("Emulation.setEmulatedMedia", { features: [{ name: "prefers-color-scheme", value: scheme }] }, session);
    if (!file) return null;
    const { data } = await call("Page.captureScreenshot", { captureBeyondViewport: true }, session);
    writeFileSync(file, data, "base64");
    return file;
  },
  kill() {
    process.kill(-browser.pid, "SIGKILL");
    return null;
  },
};

createInterface({ input: process.stdin })
  .on("line", async (line) => {
    const { id, do: what, ...more } = JSON.parse(line);
    try {
      say({ id, ok: (await orders[what](more)) ?? null });
    } catch (error) {
      say({ id, error: String(error?.message ?? error) });
    }
  })
  .on("close", () => {
    try {
      process.kill(-browser.pid, "SIGKILL");
    } catch {}
    process.exit(0);
  });
