#!/usr/bin/env python3
"""Starts the services of a compose file without a container engine: compose.py PROJECT.json DIRECTORY BINARY ANSWER

PROJECT.json is what Compose's own loader made of the files (tests/tools/compose). Every service gets a root of its own (an overlay of
this machine's), the volumes and configuration files of the file at their places, its environment, user and capabilities, its command
as the image's entry point would run it, its healthcheck, and its turn as `depends_on` says; what stands in a published port must be
the port itself. All are in one network without a way out, in which the public names lead to PUBLIC_IP. The last one is `doctor`, whose
exit code and output count; then a user registers, and `doctor --user-token` makes a call. ANSWER gets what doctor said.
Must be run as root in network, mount and process namespaces of its own.
"""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time
import urllib.request

TOOLS = pathlib.Path(os.environ["LK_TOOLS"])
INNER = "172.30.0.2"
PATIENCE = 180
# README's picture is of this.
SHOWN = "/lk-jwt-service doctor --only sfu,webhook,discovery,routes"


def main():
    project = json.loads(pathlib.Path(sys.argv[1]).read_text())
    directory, binary, answer = (pathlib.Path(word) for word in sys.argv[2:])
    services = project["services"]
    network(services)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], check=True)
    stage = Stage(project, directory, binary)
    began = time.monotonic()
    for name in stage.order():
        stage.begin(name)
    ok(f"all {len(services) - 2} services run, started as depends_on says ({time.monotonic() - began:.0f} s)")

    said, code = stage.output("doctor"), stage.ended["doctor"]
    answer.write_text(said)
    print("".join(f"     {line}\n" for line in said.splitlines()), end="")
    expect(code == 0, f"doctor ended with {code}")
    ok(f"doctor, as the last service: {said.strip().splitlines()[-1]}")

    token = stage.directory / "roots/doctor/token"
    token.write_text(register(stage, services["synapse-setup"]["environment"]["SYNAPSE_SERVER_NAME"]))
    command = ["/lk-jwt-service", "doctor", "--only", "user", "--user-token", "/token"]
    made = stage.run("doctor", command, stdout=subprocess.PIPE, text=True, timeout=60)
    expect(made.returncode == 0, f"doctor --user-token ended with {made.returncode}:\n{made.stdout}")
    ok(f"a user of it makes a call: {made.stdout.strip().splitlines()[-1]}")

    fault(stage, answer.with_suffix(".ansi"))

    records = stage.run("redis", ["redis-cli", "--raw", "KEYS", "*"], stdout=subprocess.PIPE, text=True).stdout.split()
    expect(all(record.startswith("lk-jwt:") for record in records), f"Redis holds {records}")
    ok(f"Redis is its store: {' '.join(records) or 'empty'}")


def fault(stage, shown):
    """Starts livekit-server with a mistake that many make, and lets doctor say so on a terminal: README's picture."""
    config = stage.directory / "roots/livekit/livekit.yaml"
    config.write_text(config.read_text().replace("auto_create: false", "auto_create: true"))
    process = stage.processes["livekit"]
    process.terminate()
    process.wait(20)
    log = (stage.directory / "livekit.log").open("a")
    stage.processes["livekit"] = stage.start("livekit", stage.command("livekit"), stdout=log, stderr=subprocess.STDOUT)
    until = time.monotonic() + PATIENCE
    while stage.run("livekit", ["curl", "-fsS", "http://livekit:7880/"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
        expect(time.monotonic() < until, "livekit-server does not come back")
        time.sleep(0.2)
    terminal = ["script", "--quiet", "--return", "--command", SHOWN, "/dev/null"]
    said = stage.run("doctor", terminal, stdout=subprocess.PIPE, text=True, timeout=60)
    shown.write_text(said.stdout)
    expect(said.returncode == 1 and "#sfu-auto-create" in said.stdout, f"a planted fault is not named:\n{said.stdout}")
    ok("with auto_create on in livekit-server, doctor ends with 1 and says what to do")


def ok(text):
    print(f"ok   compose: {text}", flush=True)


def expect(condition, otherwise):
    if not condition:
        sys.exit(f"FAIL compose: {otherwise}")


def network(services):
    address = services["livekit"]["environment"]["NODE_IP"]
    for command in (
        "ip link set lo up",
        "ip link add eth0 type veth peer name beyond",
        f"ip address add {address}/32 dev eth0",
        f"ip address add {INNER}/24 dev eth0",
        "ip link set eth0 up",
        "ip link set beyond up",
    ):
        subprocess.run(command.split(), check=True)
    published = {}
    for name, service in services.items():
        for port in service.get("ports", []):
            expect(str(port["target"]) == port["published"], f"{name} publishes {port}")
            key = (port["published"], port["protocol"])
            expect(key not in published, f"{name} and {published.get(key)} both publish {key}")
            published[key] = name


class Stage:
    def __init__(self, project, directory, binary):
        self.project, self.directory, self.binary = project, directory, binary
        self.services = project["services"]
        self.processes, self.ended = {}, {}
        domain = self.services["synapse-setup"]["environment"]["SYNAPSE_SERVER_NAME"]
        public = self.services["livekit"]["environment"]["NODE_IP"]
        self.hosts = "127.0.0.1 localhost\n::1 localhost\n"
        self.hosts += f"{public} {domain} matrix.{domain} livekit.{domain}\n{INNER} {' '.join(self.services)}\n"

    def order(self):
        """Every service after all that it depends on."""
        done = []
        while len(done) < len(self.services):
            ready = [n for n, s in self.services.items() if n not in done and set(s.get("depends_on", {})) <= set(done)]
            expect(ready, f"a circle of depends_on among {set(self.services) - set(done)}")
            done.append(ready[0])
        return done

    def begin(self, name):
        for other, how in self.services[name].get("depends_on", {}).items():
            self.await_condition(other, how["condition"])
        self.make_root(name)
        log = (self.directory / f"{name}.log").open("w")
        self.processes[name] = self.start(name, self.command(name), stdout=log, stderr=subprocess.STDOUT)
        if self.services[name]["restart"] == "no":
            self.await_condition(name, "ended")

    def await_condition(self, name, condition):
        process, until = self.processes[name], time.monotonic() + PATIENCE
        while time.monotonic() < until:
            code = process.poll()
            if self.services[name]["restart"] == "no" and code is not None:
                self.ended[name] = code
                if condition == "service_completed_successfully":
                    expect(code == 0, f"{name} ended with {code}:\n{self.output(name)}")
                return
            if self.services[name]["restart"] != "no":
                expect(code is None, f"{name} has ended with {code}:\n{self.output(name)}")
            if condition == "service_started" or condition == "service_healthy" and self.is_healthy(name):
                return
            time.sleep(0.2)
        sys.exit(f"FAIL compose: {name} is not {condition} after {PATIENCE} s:\n{self.output(name)}")

    def is_healthy(self, name):
        check = self.services[name]["healthcheck"]
        kind, *words = check["test"]
        words = ["/bin/sh", "-c", *words] if kind == "CMD-SHELL" else words
        limit = sum(float(n) * {"m": 60, "s": 1}[unit] for n, unit in re.findall(r"([\d.]+)([ms])", check["timeout"]))
        return self.run(name, words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=limit).returncode == 0

    def make_root(self, name):
        service, root = self.services[name], self.directory / "roots" / name
        for part in ("roots", "upper", "work"):
            (self.directory / part / name).mkdir(parents=True)
        layers = f"lowerdir=/,upperdir={self.directory}/upper/{name},workdir={self.directory}/work/{name}"
        mount("-t", "overlay", "overlay", "-o", layers, root)
        for place in ("/dev", "/sys"):
            mount("--rbind", place, root / place[1:])
        mount("-t", "proc", "proc", root / "proc")
        (root / "etc/hosts").write_text(self.hosts)
        (root / "etc/resolv.conf").unlink(missing_ok=True)
        (root / "etc/resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
        for program in ("lk-jwt-service", "lk-jwt-service-healthcheck"):
            (root / program).write_bytes((self.binary / program).read_bytes())
            (root / program).chmod(0o755)
        for config in service.get("configs", []):
            target = root / config["target"].lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(self.project["configs"][config["source"]]["content"])
        for volume in service.get("volumes", []):
            expect(volume["type"] == "volume" and volume["source"] in self.project["volumes"], f"{name} mounts {volume}")
            kept, target = self.directory / "volumes" / volume["source"], root / volume["target"].lstrip("/")
            kept.mkdir(parents=True, exist_ok=True)
            target.mkdir(parents=True, exist_ok=True)
            mount("--bind", *(["-o", "ro"] if volume.get("read_only") else []), kept, target)
        if service.get("read_only") and name != "doctor":
            mount("-o", "remount,ro", root)

    def command(self, name):
        """As the entry point of the image runs it."""
        service = self.services[name]
        image, words = service["image"].rsplit(":", 1)[0], service.get("command") or []
        expect(service.get("entrypoint") is None, f"{name} has an entry point of its own")
        if image == "matrixdotorg/synapse":
            python = [str(TOOLS / "py/bin/python"), "-m", "synapse.app.homeserver"]
            if words == ["generate"]:
                env = service["environment"]
                server = ["--server-name", env["SYNAPSE_SERVER_NAME"], "--report-stats", env["SYNAPSE_REPORT_STATS"]]
                places = ["--config-directory", "/data", "--data-directory", "/data"]
                return [*python, *server, "--config-path", "/data/homeserver.yaml", *places, "--generate-config"]
            expect(words[0] == "run", f"{name} is told to {words}")
            return [*python, *words[1:]]
        if image == "livekit/livekit-server":
            return [str(TOOLS / "livekit-server"), *words]
        if image == "caddy":
            return words or ["caddy", "run", "--config", "/etc/caddy/Caddyfile", "--adapter", "caddyfile"]
        if image == "redis":
            return words
        expect(image == "lk-jwt-service", f"nothing is known of the image {image}")
        return words or ["/lk-jwt-service"]

    def inside(self, name, command):
        service, words = self.services[name], ["setpriv", "--clear-groups"]
        env = {"PATH": os.environ["PATH"], "HOME": "/root", **(service.get("environment") or {})}
        if service["image"].startswith("caddy"):
            env |= {"XDG_CONFIG_HOME": "/config", "XDG_DATA_HOME": "/data"}
        if service["image"].startswith("matrixdotorg"):
            env |= {"PYTHONDONTWRITEBYTECODE": "1"}
        if "user" in service:
            uid, gid = service["user"].split(":")
            words += ["--reuid", uid, "--regid", gid]
        if service.get("cap_drop") == ["ALL"]:
            words += ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
        workdir = "/data" if any(v["target"] == "/data" for v in service.get("volumes", [])) else "/"
        script = f"cd {workdir} && exec {shlex.join([*words, *command])}"
        return ["chroot", str(self.directory / "roots" / name), "/bin/sh", "-c", script], env

    def start(self, name, command, **more):
        words, env = self.inside(name, command)
        return subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL, **more)

    def run(self, name, command, **more):
        words, env = self.inside(name, command)
        return subprocess.run(words, env=env, stdin=subprocess.DEVNULL, **more)

    def output(self, name):
        return (self.directory / f"{name}.log").read_text(errors="replace")


def mount(*words):
    subprocess.run(["mount", *map(str, words)], check=True)


def register(stage, domain):
    """An access token, from a user that is made as docs/install.md says."""
    program = str(TOOLS / "py/bin/register_new_matrix_user")
    user = ["-u", "alice", "-p", "a password", "--no-admin", "-c", "/data/homeserver.yaml", "http://localhost:8008"]
    made = stage.run("synapse", [program, *user], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    expect(made.returncode == 0, f"no user could be registered:\n{made.stdout}")
    body = {
        "type": "m.login.password",
        "identifier": {"type": "m.id.user", "user": f"@alice:{domain}"},
        "password": "a password",
    }
    url = f"http://{INNER}:8008/_matrix/client/v3/login"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["access_token"]


if __name__ == "__main__":
    main()
