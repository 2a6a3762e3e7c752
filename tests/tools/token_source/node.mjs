// livekit-client's token sources in Node: orders are lines of JSON. Bundled by install.sh.

import { createInterface } from "node:readline";
import { orders } from "./orders.mjs";

createInterface({ input: process.stdin }).on("line", async (line) => {
  const { id, do: name, ...order } = JSON.parse(line);
  let said;
  try {
    said = { id, ok: (await orders[name](order)) ?? null };
  } catch (error) {
    said = { id, error: String(error?.message ?? error) };
  }
  process.stdout.write(`${JSON.stringify(said)}\n`);
});
