# shellcheck shell=bash
# What unit_inside.sh and deb_inside.sh have in common: neighbours, and words. To be sourced, in the systemd that was booted.

set -euo pipefail
secret=0123456789abcdef0123456789abcdef
ok() { printf 'ok   %s: %s\n' "$section" "$*"; }
fail() {
  printf 'FAIL %s: %s\n' "$section" "$*"
  journalctl --no-pager -u lk-jwt-service | tail -n 40
  exit 1
}
trap 'code=$?; [ $code -eq 0 ] || echo "FAIL $section: line $LINENO (exit code $code)"' EXIT
expect() { [[ $1 == *"$2"* ]] || fail "$(printf '%s\nis missing in\n%s' "$2" "$1")"; }
poll() {
  local until=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $until ] || fail "not after all this time: $*"
    sleep 0.2
  done
}
log() { journalctl --no-pager --output=cat -u lk-jwt-service; }
# says TEXT: the journal has it, which comes a moment later.
says() { [[ $(log) == *"$1"* ]]; }
pid() { systemctl show --property MainPID --value lk-jwt-service; }
healthy() { curl --silent --fail http://127.0.0.1:8080/healthz; }
doctor() { lk-jwt-service doctor --pid "$(pid)" "$@"; }

neighbours() {
  cat >/tried/livekit.yaml <<EOF
port: 7880
bind_addresses: ["127.0.0.1"]
rtc: {tcp_port: 7881, udp_port: 7882, use_external_ip: false, node_ip: 127.0.0.1, interfaces: {includes: [lo]}, enable_loopback_candidate: true}
keys: {calls: $(cat /etc/lk-jwt-service/secret)}
room: {auto_create: false}
webhook: {api_key: calls, urls: ["http://127.0.0.1:8080/sfu_webhook"]}
EOF
  /tried/livekit-server --config /tried/livekit.yaml >/tried/livekit.log 2>&1 &
  python3 /tried/homeserver.py 8008 &
  poll 20 curl --silent --fail http://127.0.0.1:7880/
  poll 20 curl --silent --fail http://127.0.0.1:8008/_matrix/client/versions
}

fill_in() {
  cat >>/etc/lk-jwt-service/env <<EOF
LIVEKIT_URL=ws://127.0.0.1:7880
LIVEKIT_KEY=calls
LIVEKIT_FULL_ACCESS_HOMESERVERS=example.org
LIVEKIT_JWT_BIND=127.0.0.1:8080
LIVEKIT_FEDERATION_URL_OVERRIDES=example.org=http://127.0.0.1:8008
LIVEKIT_CS_API_URL_OVERRIDES=example.org=http://127.0.0.1:8008
LIVEKIT_METRICS_BIND=127.0.0.1:9091
EOF
}

# A user asks for a token and hands over a leave.
delegate() {
  local body
  body='{"room": "!room:example.org", "openid_token": {"access_token": "t", "token_type": "Bearer", "matrix_server_name": "example.org",
    "expires_in": 3600}, "device_id": "DEVICE", "delay_id": "leave1", "delay_timeout": 3600000}'
  curl --silent --show-error --fail-with-body --data "$body" http://127.0.0.1:8080/sfu/get || fail "no token"
}

# kept NUMBER: as many leaves are in the store, says doctor.
kept() {
  local said
  said=$(doctor --only store) || fail "doctor: $said"
  [[ $said == *"  $1 delegated leave"* ]] || { echo "$said"; return 1; }
}
