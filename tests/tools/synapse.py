#!/usr/bin/env python3
"""Writes the configuration of one real Synapse for tests and prints the command that starts it.

    synapse.py DIR FEDERATION_PORT CLIENT_PORT CERT KEY [--appservice FILE]... [--default-delayed-event-limits]
               [--server-name NAME] [--merge JSON]
    synapse.py --template                     only prepares the database that later homeservers start from

The homeserver is called 127.0.0.1:FEDERATION_PORT: an address with a port needs no DNS and no .well-known. With --server-name
it has that name. What is in JSON comes over the configuration, objects in objects.
    https://127.0.0.1:FEDERATION_PORT     federation and openid, with CERT and KEY
    http://127.0.0.1:CLIENT_PORT          client-server API, ready when GET /health is 200 (also /_matrix/client/versions)
Everybody may register (m.login.dummy), nothing is rate-limited (but with --default-delayed-event-limits, the management
of delayed events as Synapse does it by itself: 1/s for an address after a burst of 5), and hashing a password costs next to nothing.
The log is DIR/synapse.log. One line is printed: the command, quoted for a shell; it stays in the foreground.
"""

import argparse
import json
import os
import pathlib
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from importlib.metadata import version

BIN = pathlib.Path(sys.executable).parent
# Creating the schema takes most of the time of a first start, so it is done once and copied. It holds no server name.
TEMPLATE = BIN.parent.parent / f"synapse-{version('matrix-synapse')}.db"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", nargs="?", type=pathlib.Path)
    parser.add_argument("federation_port", nargs="?", type=int)
    parser.add_argument("client_port", nargs="?", type=int)
    parser.add_argument("cert", nargs="?", type=pathlib.Path)
    parser.add_argument("key", nargs="?", type=pathlib.Path)
    parser.add_argument("--appservice", action="append", default=[], type=pathlib.Path)
    parser.add_argument("--default-delayed-event-limits", action="store_true")
    parser.add_argument("--server-name")
    parser.add_argument("--merge", type=json.loads, default={})
    parser.add_argument("--template", action="store_true")
    args = parser.parse_args()
    if args.template:
        template()
        return
    if args.key is None:
        parser.error("DIR, FEDERATION_PORT, CLIENT_PORT, CERT and KEY are needed")
    command = prepare(
        args.dir,
        args.federation_port,
        args.client_port,
        args.cert,
        args.key,
        args.appservice,
        args.default_delayed_event_limits,
        args.server_name,
        args.merge,
    )
    print(shlex.join(command))


def prepare(directory, federation_port, client_port, cert, key, appservices=(), limits=False, name=None, more=None):
    """Returns the command that starts the homeserver."""
    directory.mkdir(parents=True, exist_ok=True)
    directory = directory.resolve()
    if not (directory / "homeserver.db").exists():
        shutil.copyfile(template(), directory / "homeserver.db")
    return write(
        directory, federation_port, client_port, cert.resolve(), key.resolve(), appservices, limits, name, more
    )


def write(directory, federation_port, client_port, cert, key, appservices=(), limits=False, name=None, more=None):
    unlimited = {"per_second": 100_000, "burst_count": 100_000}
    config = {
        "server_name": name or f"127.0.0.1:{federation_port}",
        "public_baseurl": f"http://127.0.0.1:{client_port}/",
        "report_stats": False,
        "pid_file": str(directory / "homeserver.pid"),
        "log_config": str(directory / "log.yaml"),
        "media_store_path": str(directory / "media"),
        "signing_key_path": str(directory / "signing.key"),
        "registration_shared_secret": "registration secret of a test",
        "macaroon_secret_key": "macaroon secret of a test",
        "form_secret": "form secret of a test",
        "database": {"name": "sqlite3", "args": {"database": str(directory / "homeserver.db")}},
        "listeners": [
            listener(client_port, ["client"], tls=False),
            listener(federation_port, ["federation", "openid"], tls=True),
        ],
        "tls_certificate_path": str(cert),
        "tls_private_key_path": str(key),
        # The homeservers of a test know one another by address and need not trust the test's authority themselves.
        "federation_verify_certificates": False,
        "trusted_key_servers": [],
        "ip_range_blacklist": [],
        "federation_ip_range_blacklist": [],
        "enable_registration": True,
        "enable_registration_without_verification": True,
        "bcrypt_rounds": 4,
        "url_preview_enabled": False,
        "presence": {"enabled": False},
        "rc_registration": unlimited,
        "rc_message": unlimited,
        "rc_delayed_event_mgmt": unlimited,
        "rc_admin_redaction": unlimited,
        "rc_room_creation": unlimited,
        "rc_key_requests": unlimited,
        "rc_login": {"address": unlimited, "account": unlimited, "failed_attempts": unlimited},
        "rc_joins": {"local": unlimited, "remote": unlimited},
        "rc_joins_per_room": unlimited,
        "rc_invites": {"per_room": unlimited, "per_user": unlimited, "per_issuer": unlimited},
        "rc_federation": {"sleep_limit": 100_000, "reject_limit": 100_000, "concurrent": 100},
        "max_event_delay_duration": "24h",
        "experimental_features": {
            "msc4143_enabled": True,
            "msc4502_enabled": True,
            "msc4512_enabled": True,
        },
        "app_service_config_files": [str(path.resolve()) for path in appservices],
    }
    if limits:
        del config["rc_delayed_event_mgmt"]
    merge(config, more or {})
    logging = {
        "version": 1,
        "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s %(message)s"}},
        "handlers": {
            "file": {"class": "logging.FileHandler", "filename": str(directory / "synapse.log"), "formatter": "line"}
        },
        "root": {"level": "INFO", "handlers": ["file"]},
        "disable_existing_loggers": False,
    }
    # JSON is YAML, and needs no quoting rules.
    (directory / "homeserver.yaml").write_text(json.dumps(config, indent=2))
    (directory / "log.yaml").write_text(json.dumps(logging, indent=2))
    signing_key(directory / "signing.key")
    return [str(BIN / "synapse_homeserver"), "-c", str(directory / "homeserver.yaml")]


def merge(config, more):
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            merge(config[key], value)
        else:
            config[key] = value


def listener(port, resources, tls):
    return {
        "port": port,
        "bind_addresses": ["127.0.0.1"],
        "type": "http",
        "tls": tls,
        "resources": [{"names": resources, "compress": False}],
    }


def signing_key(path):
    if path.exists():
        return
    from signedjson.key import generate_signing_key, write_signing_keys

    with path.open("w") as file:
        write_signing_keys(file, [generate_signing_key("test")])


def template():
    """Makes the template database unless it is there; safe when several do so at once, or one is interrupted."""
    if TEMPLATE.exists():
        return TEMPLATE
    with tempfile.TemporaryDirectory(prefix="synapse-template-", dir=TEMPLATE.parent) as scratch:
        directory = pathlib.Path(scratch)
        write(directory, 1, 2, directory / "cert.pem", directory / "key.pem")
        made = subprocess.run(
            [
                str(BIN / "update_synapse_database"),
                "--database-config",
                str(directory / "homeserver.yaml"),
                "--run-background-updates",
            ],
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if made.returncode != 0:
            sys.exit(f"update_synapse_database failed:\n{made.stdout}")
        database = sqlite3.connect(directory / "homeserver.db")
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.execute("PRAGMA journal_mode = DELETE")
        database.execute("VACUUM")
        database.close()
        os.replace(directory / "homeserver.db", TEMPLATE)
    return TEMPLATE


if __name__ == "__main__":
    main()
