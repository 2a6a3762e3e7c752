# shellcheck shell=bash
# The image, for ./tests/packages. To be sourced.

engine() { "$1" --storage-driver vfs --root "$here/storage" --runroot "$here/run" "${@:2}"; }

# On a root file system of Debian with the toolchain in it, under the name of the base image, which no registry of packages has.
image() {
  apt_install buildah podman
  local here=$work/image base=$work/image-base toolchain builder began
  local name
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
  began=$SECONDS
  logged image.log "the image, by buildah (10 minutes and more)" \
    engine buildah bud --pull-never --format docker --isolation chroot -t lk-jwt-service .
  ok "buildah builds the Dockerfile as it is, in $((SECONDS - began)) s"
  image_run
}

# Without a container engine's network and cgroups, which this kind of machine does not have.
image_run() {
  local said
  said=$(engine buildah inspect --type image --format '{{.Docker.Config.Cmd}} {{.Docker.Config.Entrypoint}} {{.Docker.Config.Healthcheck.Test}}' lk-jwt-service)
  expect "$said" "[/lk-jwt-service] [] [CMD /lk-jwt-service-healthcheck]"
  ok "its command is /lk-jwt-service, without an entry point, with a healthcheck: $(engine podman image inspect --format '{{.Size}}' lk-jwt-service) bytes"
  unshare --mount --net --pid --fork --kill-child --mount-proc bash -c '
    set -euo pipefail
    ! mountpoint -q /sys/fs/cgroup/unified || umount /sys/fs/cgroup/unified
    ip link set lo up
    . "$0"
    image_inside
  ' "$helpers/image_inside.sh" || fail "see above"
}
