# shellcheck shell=bash
# What is tried with the Debian package.
. /tried/inside.sh
export DEBIAN_FRONTEND=noninteractive
state() { dpkg-query --show --showformat '${db:Status-Status} ${Version}' lk-jwt-service 2>/dev/null; }
mode() { stat --format '%a %U:%G' "$1"; }

said=$(dpkg --install /tried/lk-jwt-service_1.0.0_*.deb 2>&1) || fail "$said"
expect "$said" "fill in /etc/lk-jwt-service/env"
[ "$(state)" = "installed 1.0.0" ] || fail "$(state)"
[ "$(mode /etc/lk-jwt-service/env)" = "640 root:root" ] && [ "$(mode /etc/lk-jwt-service/secret)" = "600 root:root" ] || fail "modes"
[ "$(wc -c </etc/lk-jwt-service/secret)" = 65 ] || fail "the secret that was made: $(wc -c </etc/lk-jwt-service/secret) bytes"
systemctl is-enabled --quiet lk-jwt-service || fail "not enabled"
! systemctl is-active --quiet lk-jwt-service || fail "it was started without its variables"
ok "installed: enabled, not started before it is filled in; a secret of 256 bits was made, for root alone"

fill_in
neighbours
systemctl start lk-jwt-service
poll 20 healthy
delegate >/dev/null
poll 10 kept 1
ok "filled in and started, with one delegated leave"

before=$(pid) made=$(cat /etc/lk-jwt-service/secret) filled=$(cat /etc/lk-jwt-service/env)
said=$(dpkg --install /tried/lk-jwt-service_1.0.1_*.deb 2>&1 </dev/null) || fail "$said"
[ "$(state)" = "installed 1.0.1" ] || fail "$(state)"
poll 20 healthy
[ "$(pid)" != "$before" ] || fail "the old process runs on"
[ "$(cat /etc/lk-jwt-service/secret)" = "$made" ] && [ "$(cat /etc/lk-jwt-service/env)" = "$filled" ] || fail "an upgrade changes the configuration"
poll 10 kept 1
ok "upgraded without a question: started anew, with its secret, its variables and the delegated leave"

systemctl stop lk-jwt-service
said=$(dpkg --install /tried/lk-jwt-service_1.0.1_*.deb 2>&1 </dev/null) || fail "$said"
! systemctl is-active --quiet lk-jwt-service || fail "an upgrade starts what was stopped"
systemctl start lk-jwt-service
poll 20 healthy
ok "an upgrade of a stopped service leaves it stopped"

dpkg --remove lk-jwt-service >/dev/null 2>&1
[ "$(state)" = "config-files 1.0.1" ] || fail "$(state)"
! healthy || fail "it still runs"
[ ! -e /usr/bin/lk-jwt-service ] || fail "the program is still there"
[ "$(cat /etc/lk-jwt-service/env)" = "$filled" ] && [ -n "$(find /var/lib/private/lk-jwt-service -type f)" ] || fail "what was to stay is gone"
ok "removed: stopped and gone; variables, secret and state stay"

said=$(dpkg --install /tried/lk-jwt-service_1.0.0_*.deb 2>&1 </dev/null) || fail "$said"
systemctl start lk-jwt-service
poll 20 healthy
poll 10 kept 1
ok "installed again: it goes on with them"

dpkg --purge lk-jwt-service >/dev/null 2>&1
! state || fail "$(state)"
left=$(find / -xdev -path /proc -prune -o -path /tried -prune -o -path /var/log -prune -o -name '*lk-jwt*' -print)
[ -z "$left" ] || fail "left behind: $left"
ok "purged: nothing is left"
touch /tried/ended
