# shellcheck shell=bash
# The Debian package in a systemd that is booted for it, for ./tests/packages. To be sourced.

deb() {
  local package said
  for version in 1.0.0 1.0.1; do
    package=$(DEB_VERSION=$version contrib/debian/build "$binaries/lk-jwt-service" "$work/deb" 2>/dev/null) || fail "it does not build"
  done
  said=$(dpkg-deb --contents "$package")
  [ -z "$(awk '$2 != "root/root"' <<<"$said")" ] || fail "not all of it is root's: $said"
  expect "$said" "-rw-r-----"
  expect "$(dpkg-deb --info "$package" conffiles)" /etc/lk-jwt-service/env
  ok "dpkg-deb --root-owner-group: $(stat --format %s "$package") bytes, the variables are a conffile of mode 0640"
  fill() { cp "$work"/deb/*.deb "$1/tried/"; }
  boot deb-root deb_inside.sh
}
