# shellcheck shell=bash
# What is tried with the image in namespaces of its own: a livekit-server, and the container beside it. To be sourced.

section=image
ok() { printf 'ok   %s: %s\n' "$section" "$*"; }
fail() { printf 'FAIL %s: %s\n' "$section" "$*" >&2; exit 1; }
# It would like a systemd for its timers of healthchecks.
podman() {
  command podman --storage-driver vfs --root "$work/image/storage" --runroot "$work/image/run" "$@" 2> >(grep -v 'systemd connection' >&2)
}

image_inside() {
  local secret=0123456789abcdef0123456789abcdef said code
  cat >"$work/image/livekit.yaml" <<EOF
port: 7880
bind_addresses: ["127.0.0.1"]
rtc: {tcp_port: 7881, udp_port: 7882, use_external_ip: false, node_ip: 127.0.0.1, interfaces: {includes: [lo]}, enable_loopback_candidate: true}
keys: {calls: $secret}
room: {auto_create: false}
webhook: {api_key: calls, urls: ["http://127.0.0.1:8080/sfu_webhook"]}
EOF
  "$LK_TOOLS/livekit-server" --config "$work/image/livekit.yaml" >"$work/image/livekit.log" 2>&1 &
  for user in 0:0 10033:10033 65534:0; do
    podman run --detach --name service --network host --cgroups disabled --ulimit nofile=1024:1024 --ulimit nproc=1000:1000 \
      --read-only --cap-drop all --user "$user" --log-driver k8s-file --log-opt path="$work/image/service.log" \
      -e LIVEKIT_URL=ws://127.0.0.1:7880 -e LIVEKIT_KEY=calls -e LIVEKIT_SECRET=$secret \
      -e LIVEKIT_FULL_ACCESS_HOMESERVERS=example.org lk-jwt-service >/dev/null || fail "podman does not start it as $user"
    for _ in $(seq 100); do
      podman healthcheck run service >/dev/null 2>&1 && break
      sleep 0.1
    done
    podman healthcheck run service || fail "podman healthcheck run, as $user: $(cat "$work/image/service.log")"
    ok "podman runs it as user $user with a read-only root and no capability; podman healthcheck run"
    [ "$user" = 65534:0 ] || podman rm --force --time 5 service >/dev/null
  done
  code=0
  said=$(podman exec service /lk-jwt-service doctor --only sfu,webhook,store) || code=$?
  printf '%s\n' "$said" | sed 's/^/     /'
  [ $code = 0 ] && [[ $said == *"ok    api "* && $said == *"ok    webhook "* && $said == *"ok    websocket "* ]] ||
    fail "podman exec doctor: $code"
  ok "doctor by podman exec: ${said##*$'\n'}"
  podman stop --time 10 service >/dev/null
  [ "$(podman inspect --format '{{.State.ExitCode}}' service)" = 0 ] || fail "it ended with $(podman inspect --format '{{.State.ExitCode}}' service)"
  ok "podman stop ends it with 0, as process 1"
  said=$(podman run --rm --network none --cgroups disabled --ulimit nofile=1024:1024 --ulimit nproc=1000:1000 lk-jwt-service /lk-jwt-service --version)
  ok "another command takes the whole place of the image's: $said"
  podman rm --force service >/dev/null
  kill %1
}
