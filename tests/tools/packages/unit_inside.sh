# shellcheck shell=bash
# What is tried with the unit of contrib/systemd.
. /tried/inside.sh

mkdir -p /etc/lk-jwt-service
(umask 077; echo $secret >/etc/lk-jwt-service/secret; echo LIVEKIT_JWT_BIND=nonsense >/etc/lk-jwt-service/env)
! systemctl start lk-jwt-service 2>/dev/null || fail "it starts without its variables"
poll 10 says LIVEKIT_URL
poll 10 says LIVEKIT_JWT_BIND
! says "listening" || fail "it was started all the same"
ok "a configuration with two mistakes is refused by check-config, which names both in the journal; nothing was started"

fill_in
neighbours
systemctl reset-failed lk-jwt-service
systemctl start lk-jwt-service
poll 20 healthy
user=$(stat --format %u "/proc/$(pid)")
[ "$user" -ge 61184 ] && [ "$user" -le 65519 ] || fail "it runs as $user"
status=$(cat "/proc/$(pid)/status")
expect "$status" $'CapEff:\t0000000000000000'
expect "$status" $'Seccomp:\t2'
expect "$status" $'NoNewPrivs:\t1'
! tr '\0' '\n' <"/proc/$(pid)/environ" | grep -q "$secret" || fail "the secret is in its environment"
ok "it starts as user $user of its own, without a capability, under the filter of system calls; the secret is in no environment"

# Discovery and public routes are not here.
said=$(doctor --only sfu,webhook,store) || fail "$said"
for check in api webhook websocket store store-write; do expect "$said" "ok    $check "; done
ok "doctor --pid, as root: SFU, WebSocket, webhook and store; ${said##*$'\n'}"
expect "$(curl --silent http://127.0.0.1:9091/metrics)" process_resident_memory_bytes
ok "metrics of the process under ProcSubset=pid; $(grep VmRSS "/proc/$(pid)/status" | tr -s "[:space:]" " ")"

delegate >/dev/null
kept 1 || fail "the leave is not kept"
before=$(pid)
systemctl reload lk-jwt-service
sleep 0.2
poll 10 healthy
[ "$(pid)" = "$before" ] || fail "a reload starts it anew"
poll 10 says "read again"
ok "systemctl reload: the same process has read its keys again"

systemctl restart lk-jwt-service
poll 20 healthy
[ "$(pid)" != "$before" ]
poll 10 kept 1
ok "systemctl restart: the delegated leave is still there"

kill -KILL "$(pid)"
sleep 0.5
poll 20 healthy
poll 10 kept 1
ok "killed, it is there again with the delegated leave"

began=$(date +%s%3N)
systemctl stop lk-jwt-service
took=$(($(date +%s%3N) - began))
[ "$(systemctl show --property Result --value lk-jwt-service)" = success ] || fail "it did not end well"
! healthy || fail "it is still there"
[ -n "$(find /var/lib/private/lk-jwt-service -type f -size +0)" ] || fail "its state is gone"
ok "systemctl stop: ended well in $took ms; the state stays"

systemctl start lk-jwt-service
poll 20 healthy
poll 10 kept 1
ok "started again: the delegated leave is still there"
touch /tried/ended
