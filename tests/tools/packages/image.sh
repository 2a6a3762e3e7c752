# shellcheck shell=bash
# The image, for ./tests/packages. To be sourced.

engine() { "$1" --storage-driver vfs --root "$here/storage" --runroot "$here/run" "${@:2}"; }

# cpu_of PROCESS: seconds of what it has started and waited for.
cpu_of() { awk '{ printf "%d", ($16 + $17) / 100 }' "/proc/$1/stat"; }

# What the Dockerfile copies, and itself.
image_inputs() { find Dockerfile .dockerignore .cargo Cargo.toml Cargo.lock src -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum; }

# On a root file system of Debian with the toolchain in it, under the name of the base image, which no registry of packages has.
image() {
  apt_install buildah podman
  local here=$work/image
  if [ "$(cat "$work/image.built" 2>/dev/null)" = "$(image_inputs)" ] && engine podman image exists lk-jwt-service; then
    ok "buildah has built the Dockerfile as it is before, in $(cat "$work/image.took")"
  else
    image_build
  fi
  image_run
}

image_build() {
  local base=$work/image-base me=$BASHPID toolchain builder began before name
  name=$(sed -n 's/^FROM \(rust:.*\) AS build$/\1/p' Dockerfile)
  [ -n "$name" ] || fail "the Dockerfile builds on another base than it did"
  bootstrap image-base trixie gcc libc6-dev ca-certificates
  trust_our_authorities "$base"
  engine podman rm --all --force >/dev/null 2>&1 || true
  rm -rf "$here" && mkdir -p "$here"
  if ! [ -e "$base/usr/local/cargo" ]; then
    toolchain=$(rustc --print sysroot)
    mkdir -p "$base/usr/local/rustup/toolchains" "$base/usr/local/cargo/bin"
    cp -rL "$toolchain" "$base/usr/local/rustup/toolchains/${toolchain##*/}"
    rm -rf "$base/usr/local/rustup/toolchains"/*/share/doc
    cp "${RUSTUP_HOME:-$HOME/.rustup}/settings.toml" "$base/usr/local/rustup/"
    sed -i "s/^default_toolchain = .*/default_toolchain = \"${toolchain##*/}\"/" "$base/usr/local/rustup/settings.toml"
    cp -L "$(command -v rustup)" "$base/usr/local/cargo/bin/rustup"
    for builder in cargo rustc; do ln -s rustup "$base/usr/local/cargo/bin/$builder"; done
  fi
  builder=$(engine buildah from scratch)
  engine buildah add --quiet "$builder" "$base" / >/dev/null
  engine buildah config --env RUSTUP_HOME=/usr/local/rustup --env CARGO_HOME=/usr/local/cargo \
    --env PATH=/usr/local/cargo/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$builder"
  engine buildah commit --quiet --rm "$builder" "docker.io/library/$name" >/dev/null
  began=$SECONDS before=$(cpu_of "$me")
  logged image.log "the image, by buildah (10 minutes and more)" \
    engine buildah bud --pull-never --format docker --isolation chroot -t lk-jwt-service .
  echo "$((SECONDS - began)) s ($(($(cpu_of "$me") - before)) s of the processors)" >"$work/image.took"
  ok "buildah builds the Dockerfile as it is, in $(cat "$work/image.took")"
  image_inputs >"$work/image.built"
}

# Without a container engine's network and cgroups, which this kind of machine does not have.
image_run() {
  local said
  engine podman rm --all --force >/dev/null 2>&1 || true
  said=$(engine buildah inspect --type image --format '{{.Docker.Config.Cmd}} {{.Docker.Config.Entrypoint}} {{.Docker.Config.Healthcheck.Test}}' lk-jwt-service)
  expect "$said" "[/lk-jwt-service] [] [CMD /lk-jwt-service-healthcheck]"
  ok "its command is /lk-jwt-service, without an entry point, with a healthcheck: $(engine podman image inspect --format '{{.Size}}' lk-jwt-service) bytes"
  unshare --mount --net --pid --fork --kill-child --mount-proc bash -c '
    set -euo pipefail
    ! mountpoint -q /sys/fs/cgroup/unified || umount /sys/fs/cgroup/unified
    ip link set lo up
    work=$1
    . "$0"
    image_inside
  ' "$helpers/image_inside.sh" "$work" || fail "see above"
}
