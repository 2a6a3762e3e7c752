// Makes src/check/page/livekit-client.js.br: livekit-client as its package has it, with the licences of all that is in it, compressed.
//
//   node bundle.mjs NODE_MODULES FILE           makes FILE
//   node bundle.mjs NODE_MODULES FILE --check   fails where FILE holds something else
//
// NODE_MODULES is what `npm ci` makes of the package-lock.json beside this script, which pins each package by its hash. What counts is
// what FILE holds, not how it is compressed: versions of brotli differ in that.

import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { brotliCompressSync, brotliDecompressSync, constants } from "node:zlib";

const [modules, file, check] = process.argv.slice(2);
const read = (name, path) => readFileSync(`${modules}/${name}/${path}`, "utf8");
const manifest = (name) => JSON.parse(read(name, "package.json"));

// All packages that may be in it; types leave nothing behind.
const names = new Set();
const add = (name) => {
  if (names.has(name) || name.startsWith("@types/") || !existsSync(`${modules}/${name}/package.json`)) return;
  names.add(name);
  Object.keys(manifest(name).dependencies ?? {}).forEach(add);
};
add("livekit-client");

// A text that several have stands once.
const texts = new Map();
for (const name of [...names].sort()) {
  const { version, license } = manifest(name);
  const files = readdirSync(`${modules}/${name}`).filter((one) => /^(licen[cs]e|notice)/i.test(one)).sort();
  const text = files.map((one) => read(name, one).trim()).join("\n\n") || "(the package has no file of its licence)";
  texts.set(text, [...(texts.get(text) ?? []), `${name} ${version} (${license})`]);
}
const notices = [...texts].map(([text, of]) => `${of.join(", ")}\n\n${text}`).join("\n\n----\n\n").replaceAll("*/", "* /");
const { version } = manifest("livekit-client");
const script = read("livekit-client", "dist/livekit-client.umd.js");
const made = Buffer.from(`/*! livekit-client ${version}, unchanged, and what is in it:\n\n${notices}\n*/\n${script}`);

if (check === "--check") {
  const is = brotliDecompressSync(readFileSync(file));
  if (!is.equals(made)) {
    console.error(`${file} is not what this script makes: run it without --check`);
    process.exit(1);
  }
} else {
  const { BROTLI_PARAM_QUALITY, BROTLI_PARAM_LGWIN, BROTLI_PARAM_SIZE_HINT } = constants;
  const params = { [BROTLI_PARAM_QUALITY]: 11, [BROTLI_PARAM_LGWIN]: 24, [BROTLI_PARAM_SIZE_HINT]: made.length };
  const compressed = brotliCompressSync(made, { params });
  writeFileSync(file, compressed);
  console.log(`${file}: ${made.length} bytes, ${compressed.length} compressed; ${[...names].sort().join(", ")}`);
}
