# shellcheck shell=bash
# README's first screen as somebody reads it who has just come, for ./tests/packages. To be sourced.

# A fresh clone, and nothing else than what the screen says: its two commands, and three values in between. `docker` is a program of ours
# that does what these commands ask of it with the image that buildah has made; certificates are Caddy's own (laboratory.yaml).
readme() {
  local here=$work/readme began=$SECONDS builder clone commands
  [ "$(cat "$work/image.built" 2>/dev/null)" = "$(image_inputs)" ] || fail "there is no image of this source yet: the section image makes it"
  install_compose
  install_neighbours
  rm -rf "$here" && mkdir -p "$here/bin" "$here/stage"
  install -m 755 "$helpers/docker" "$here/bin/docker"
  clone=$here/lk-jwt-service
  git clone --quiet "file://$top" "$clone"
  builder=$(here=$work/image engine buildah from --pull-never lk-jwt-service)
  cp "$(here=$work/image engine buildah mount "$builder")"/lk-jwt-service* "$here/bin/"
  here=$work/image engine buildah rm "$builder" >/dev/null

  mapfile -t commands < <(awk '/^```sh$/ { inside = 1; next } /^```$/ { exit } inside' "$clone/README.md")
  [ ${#commands[@]} = 2 ] || fail "the first screen has ${#commands[@]} commands: ${commands[*]}"
  printf '     $ %s\n' "${commands[@]}"
  cd "$clone"
  export PATH=$here/bin:$PATH STAGE=$here HELPERS=$helpers LK_TOOLS=$tools
  eval "${commands[0]}"
  sed -i -e 's/^DOMAIN=.*/DOMAIN=example.org/' -e 's/^PUBLIC_IP=.*/PUBLIC_IP=8.8.4.10/' -e "s/^SECRET=.*/SECRET=$(openssl rand -hex 32)/" .env
  eval "${commands[1]}"
  cd "$top"
  ok "from a fresh clone to a stack in which doctor finds nothing, by the first screen alone: $((SECONDS - began)) s, and the image's $(cat "$work/image.took")"
}
