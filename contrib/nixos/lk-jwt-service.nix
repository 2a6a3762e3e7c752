# For the configuration of a NixOS machine that has a homeserver: livekit-server and this service in the place of the package that nixpkgs
# brings. NOT RUN: no test has Nix; that every variable exists is checked (tests/it/contrib.rs). The module's sandbox (no address families
# but IPv4 and IPv6, no memory that is writable and executable, no @resources) is the one that the service is made for.
{ config, pkgs, ... }:
let
  # One line, `calls: <32 random bytes>`: LiveKit's own form, which both read.
  keyFile = "/run/secrets/livekit-keys";
in
{
  services.livekit = {
    enable = true;
    openFirewall = true;
    inherit keyFile;
    settings = {
      room.auto_create = false;
      webhook = {
        api_key = "calls";
        urls = [ "http://127.0.0.1:8080/sfu_webhook" ];
      };
    };
  };

  services.lk-jwt-service = {
    enable = true;
    # A checkout of this repository; it needs make besides the Rust toolchain.
    package = pkgs.rustPlatform.buildRustPackage {
      pname = "lk-jwt-service";
      version = "1.1.0";
      src = ./lk-jwt-service;
      cargoLock.lockFile = ./lk-jwt-service/Cargo.lock;
      doCheck = false;
      meta.mainProgram = "lk-jwt-service";
    };
    livekitUrl = "wss://livekit.example.com/livekit/sfu";
    port = 8080;
    inherit keyFile;
  };

  systemd.services.lk-jwt-service = {
    environment = {
      LIVEKIT_API_URL = "http://127.0.0.1:7880";
      LIVEKIT_FULL_ACCESS_HOMESERVERS = "example.com";
      LIVEKIT_STATE_PATH = "%S/lk-jwt-service";
    };
    serviceConfig.StateDirectory = "lk-jwt-service";
  };

  services.nginx.virtualHosts."livekit.example.com" = {
    enableACME = true;
    forceSSL = true;
    locations."= /livekit/jwt/metrics".return = "404";
    # No CORS headers here: the service sends them.
    locations."/livekit/jwt/" = {
      proxyPass = "http://127.0.0.1:8080/";
      recommendedProxySettings = true;
    };
    locations."/livekit/sfu/" = {
      proxyPass = "http://127.0.0.1:7880/";
      proxyWebsockets = true;
    };
  };
}
