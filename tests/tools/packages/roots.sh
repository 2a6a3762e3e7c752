# shellcheck shell=bash
# Root file systems for ./tests/packages. To be sourced.

# logged FILE TITLE COMMAND...: a long step, whose output is shown when it fails.
logged() {
  local log=$work/$1
  say "$2"
  "${@:3}" >"$log" 2>&1 </dev/null || { tail -n 40 "$log" >&2; fail "$2"; }
}

# bootstrap NAME SUITE PACKAGE...: a fresh Debian at $work/NAME, made once.
bootstrap() {
  local name=$1 suite=$2 list
  shift 2
  list=$(IFS=,; echo "$*")
  [ "$(cat "$work/$name.made" 2>/dev/null)" = "$suite $list" ] && return
  apt_install debootstrap
  rm -rf "${work:?}/$name"
  logged "$name.log" "Debian $suite with $*, by debootstrap" \
    debootstrap --variant=minbase --include="$list" "$suite" "$work/$name"
  echo "$suite $list" >"$work/$name.made"
}

# trust_our_authorities ROOT: those that this machine was given besides the system's.
trust_our_authorities() {
  local given
  for given in /usr/local/share/ca-certificates/*.crt; do
    [ -e "$given" ] || continue
    cp "$given" "$1/usr/local/share/ca-certificates/"
    chroot "$1" update-ca-certificates >/dev/null 2>&1
  done
}
