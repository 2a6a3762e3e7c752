# shellcheck shell=bash
# The unit in a systemd that is booted for it, for ./tests/packages. To be sourced.

# boot ROOT SCRIPT: boots a copy of the Debian with what `fill` puts into it, and lets its systemd run the script, whose output is ours.
boot() {
  local root=$work/$1 script=$2
  apt_install systemd-container
  install_neighbours
  bootstrap unit-base bookworm systemd systemd-sysv dbus ca-certificates curl python3
  rm -rf "$root"
  cp -a --reflink=auto "$work/unit-base" "$root"
  mkdir "$root/tried"
  install -m 755 "$tools/livekit-server" "$root/tried/"
  install -m 644 "$helpers/homeserver.py" "$helpers/inside.sh" "$helpers/$script" "$root/tried/"
  cat >"$root/etc/systemd/system/tried.service" <<EOF
[Service]
Environment=HOME=/root section=$section
ExecStart=/bin/bash /tried/$script
ExecStopPost=/bin/systemctl poweroff --no-block
StandardOutput=append:/tried/said
StandardError=append:/tried/said
EOF
  mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
  ln -sf ../tried.service "$root/etc/systemd/system/multi-user.target.wants/tried.service"
  fill "$root"
  timeout 300 systemd-nspawn --quiet --directory "$root" --register=no --keep-unit --private-network --boot \
    </dev/null >"$work/$1.console" 2>&1 || { cat "$root/tried/said" "$work/$1.console"; fail "systemd did not end well"; }
  cat "$root/tried/said"
  [ -e "$root/tried/ended" ] || fail "it did not come to its end"
  rm -rf "$root"
}

unit() {
  fill() {
    install -D -m 755 "$binaries/lk-jwt-service" "$1/usr/bin/lk-jwt-service"
    install -D -m 644 contrib/systemd/lk-jwt-service.service "$1/etc/systemd/system/lk-jwt-service.service"
  }
  boot unit-root unit_inside.sh
}
