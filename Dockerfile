# The image: two static binaries and the authorities they trust, nothing else.
#
# Plain `docker build .` on amd64, arm64, armv7, and wherever else the base image and Rust's musl target exist. Some who
# build it have neither build arguments nor BuildKit: nothing here needs more than the classic builder.

FROM rust:1.95.0-slim-trixie AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates make musl-tools \
    && rm -rf /var/lib/apt/lists/*
# The musl twin of the target that the base image is for: ...-linux-gnueabihf becomes ...-linux-musleabihf.
RUN rustc -vV | sed -n 's/^host: \(.*\)-gnu/\1-musl/p' > /target \
    && rustup target add "$(cat /target)"
# For ring and jemalloc, which have C and assembly.
ENV TARGET_CC=musl-gcc
# Kernels of arm64 have pages of 4, 16 (Raspberry Pi 5) or 64 KiB, and jemalloc does not start where they are larger than it
# was built for.
RUN [ "$(uname -m)" != aarch64 ] \
    || printf '[env]\nJEMALLOC_SYS_WITH_LG_PAGE = "16"\n' >> "$CARGO_HOME/config.toml"
WORKDIR /src

# The dependencies first, under an empty program: a layer that lasts until Cargo.lock changes.
COPY .cargo .cargo
COPY Cargo.toml Cargo.lock ./
RUN mkdir -p src/bin tests/it \
    && echo 'fn main() {}' | tee src/main.rs src/bin/healthcheck.rs tests/it/main.rs > src/lib.rs \
    && cargo build --release --locked --bins --target "$(cat /target)" \
    && rm -r src
COPY src src
# Touched, since cargo compares times: a checkout may be older than the layer above.
RUN find src -name '*.rs' -exec touch {} + \
    && cargo build --release --locked --bins --target "$(cat /target)"

RUN mkdir -p /image/etc/ssl/certs \
    && cp "target/$(cat /target)/release/lk-jwt-service" "target/$(cat /target)/release/lk-jwt-service-healthcheck" /image/ \
    && cp --dereference /etc/ssl/certs/ca-certificates.crt /image/etc/ssl/certs/ \
    && echo 'hosts: files dns' > /image/etc/nsswitch.conf

FROM scratch
LABEL org.opencontainers.image.title="lk-jwt-service" \
      org.opencontainers.image.description="MatrixRTC authorization service: exchanges a Matrix OpenID token for a LiveKit token" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /image /
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=3s --retries=3 CMD ["/lk-jwt-service-healthcheck"]
# No ENTRYPOINT: what is given to `docker run` replaces the whole command, as it always did.
CMD ["/lk-jwt-service"]
