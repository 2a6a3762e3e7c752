"""The steps of ./tests/demo, which installs and builds what they need: demo.py SERVICE_BINARY [--keep]"""

import argparse
import base64
import contextlib
import ctypes
import hashlib
import hmac
import json
import os
import pathlib
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

sys.dont_write_bytecode = True
import certificates  # noqa: E402
import synapse  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
TOP = HERE.parent.parent
KEY = "devkey"
SECRET = "secretsecretsecretsecretsecretsecret"
SLOT = "m.call#ROOM"
# The neighbours are on this machine: no proxy of the environment, and none of its LIVEKIT_* settings.
ENVIRONMENT = {
    k: v for k, v in os.environ.items() if not k.startswith("LIVEKIT_") and not k.lower().endswith("_proxy")
}
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def main():
    parser = argparse.ArgumentParser(prog="./tests/demo")
    parser.add_argument("service", type=pathlib.Path)
    parser.add_argument("--keep", action="store_true", help="leave everything running until Ctrl-C")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    try:
        with Stage() as stage:
            show(stage, args.service.resolve(), args.keep)
    except Interrupted:
        print("\nEnded; nothing is left running.", file=sys.stderr)
        sys.exit(0 if args.keep else 130)
    except BrokenPipeError:  # nobody reads on: ./tests/demo | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Failed as failure:
        sys.exit(f"\nFAILED: {failure}")


def show(stage, service, keep):
    began = time.monotonic()
    heading("A homeserver, an SFU, and the service between them")
    url, homeserver, livekit, server_name = start(stage, service)
    print(f"\n   all three answer, {time.monotonic() - began:.1f} s after the start")

    heading("Alice asks her homeserver for an OpenID token")
    alice = register(homeserver, server_name, "alice", "ALICEPHONE")
    room_id = call("POST", f"{homeserver}/_matrix/client/v3/createRoom", {"preset": "public_chat"}, alice)[1]["room_id"]
    openid = request_token(homeserver, alice, loud=True)

    heading("The service verifies it at the homeserver, opens the room on the SFU, and answers with a LiveKit token")
    status, granted = get_token(url, room_id, alice, openid, loud=True)
    expect(status == 200, "/get_token did not answer 200")

    heading("What the token says")
    claims = decode(granted["jwt"])

    heading("A real LiveKit client joins with it")
    stay = 30 * 24 * 3600 if keep else 60
    join(stage, "alice", granted, claims, stay)

    heading("Bob does the same, and meets Alice")
    bob = register(homeserver, server_name, "bob", "BOBSLAPTOP")
    status, granted = get_token(url, room_id, bob, request_token(homeserver, bob))
    expect(status == 200, "/get_token did not answer 200")
    join(stage, "bob", granted, decode(granted["jwt"], loud=False), stay, meets=claims["sub"])
    print(f"\n   in room {claims['video']['room']}, says the SFU:")
    for participant in participants(livekit, claims["video"]["room"], expected=2):
        print(f"     {participant['identity']}  {participant['sid']}  {participant['state']}")

    heading("A made-up OpenID token gets nobody in")
    status, _ = get_token(url, room_id, alice, {**openid, "access_token": "x" * 24}, loud=True)
    expect(status == 401, "a made-up token was not answered with 401")

    print(f"\n{bold('All of it works')}, shown in {time.monotonic() - began:.1f} s.")
    if keep:
        leave_running(stage, url, homeserver, livekit, server_name, alice, room_id)


def start(stage, service):
    """Starts the three at once and returns the service's, the homeserver's and the SFU's URL, and the server name."""
    federation, client, sfu, sfu_tcp, sfu_udp, own = free_ports(6)
    server_name = f"127.0.0.1:{federation}"
    homeserver, url = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{own}"
    livekit = f"ws://127.0.0.1:{sfu}"
    certificates.write(stage.dir / "tls")
    tls = {name: stage.dir / "tls" / f"{name}.pem" for name in ("ca", "cert", "key")}

    print("   Synapse           ", server_name, "its name, and where it answers servers, with TLS")
    print("                     ", homeserver, "where it answers its users")
    stage.start(
        "synapse", synapse.prepare(stage.dir / "synapse", federation, client, tls["cert"], tls["key"]), f"{homeserver}/health"
    )
    print("   livekit-server    ", livekit, "rooms exist when the service opened them: auto_create: false")
    config = {
        "port": sfu,
        "bind_addresses": ["127.0.0.1"],
        "rtc": {
            "tcp_port": sfu_tcp,
            "udp_port": sfu_udp,
            "use_external_ip": False,
            "node_ip": "127.0.0.1",
            "interfaces": {"includes": ["lo"]},
            "enable_loopback_candidate": True,
        },
        "keys": {KEY: SECRET},
        "room": {"auto_create": False},
    }
    (stage.dir / "livekit.yaml").write_text(json.dumps(config))
    livekit_server = TOP / "target/tools/livekit-server"
    stage.start("livekit-server", [livekit_server, "--config", stage.dir / "livekit.yaml"], http(livekit))
    settings = {
        "LIVEKIT_URL": livekit,
        "LIVEKIT_KEY": KEY,
        "LIVEKIT_SECRET": SECRET,
        "LIVEKIT_JWT_BIND": f"127.0.0.1:{own}",
        "LIVEKIT_FULL_ACCESS_HOMESERVERS": server_name,
        "LIVEKIT_FEDERATION_ALLOWED_NETWORKS": "127.0.0.0/8",
        "SSL_CERT_FILE": str(tls["ca"]),
    }
    print("   lk-jwt-service    ", url)
    for name, value in settings.items():
        shown = os.path.relpath(value, TOP) if name == "SSL_CERT_FILE" else shlex.quote(value)
        print(f"       {name}={shown}")
    stage.start("lk-jwt-service", [service], f"{url}/healthz", settings)
    stage.wait()
    return url, homeserver, livekit, server_name


def register(homeserver, server_name, name, device):
    body = {"username": name, "password": "secret", "device_id": device, "auth": {"type": "m.login.dummy"}}
    status, user = call("POST", f"{homeserver}/_matrix/client/v3/register", body)
    expect(status == 200, f"{name} could not register: {user}")
    return {**user, "server_name": server_name, "member_id": f"{name}-{random.randrange(10**6):06}"}


def request_token(homeserver, user, loud=False):
    path = f"/_matrix/client/v3/user/{user['user_id']}/openid/request_token"
    status, openid = call("POST", homeserver + path, {}, user, loud)
    expect(status == 200, f"no OpenID token: {openid}")
    return openid


def get_token(url, room_id, user, openid, loud=False):
    member = {
        "id": user["member_id"],
        "claimed_user_id": user["user_id"],
        "claimed_device_id": user["device_id"],
    }
    body = {"room_id": room_id, "slot_id": SLOT, "openid_token": openid, "member": member}
    return call("POST", f"{url}/get_token", body, loud=loud)


def decode(jwt, loud=True):
    """Checks the signature, as the SFU will, and returns the claims."""
    signed, _, signature = jwt.rpartition(".")
    header, claims = (json.loads(unbase64(part)) for part in signed.split("."))
    good = hmac.compare_digest(hmac.new(SECRET.encode(), signed.encode(), hashlib.sha256).digest(), unbase64(signature))
    expect(good, "the token is not signed with the secret of the SFU")
    if loud:
        print("   header   ", json.dumps(header))
        print("   claims   ", indented(claims))
        lasts = claims["exp"] - time.time()
        print(f"   signature good: made with LIVEKIT_SECRET; valid for {lasts / 60:.0f} minutes")
    return claims


def join(stage, name, granted, claims, stay, meets=None):
    command = [sys.executable, HERE / "client.py", granted["url"], granted["jwt"], str(stay)]
    print(f"   tests/tools/client.py {granted['url']} {short(granted['jwt'])}")
    client = stage.spawn(f"client of {name}", command, stdout=subprocess.PIPE)
    said = client.stdout.readline().split()
    expect(said[:1] == ["joined"], f"{name} could not join: {' '.join(said) or stage.tail(f'client of {name}')}")
    print(f"   joined as {said[1]}  {said[2]}")
    expect(said[1] == claims["sub"], "the SFU knows the client by another name than the token's `sub`")
    if meets:
        said = client.stdout.readline().split()
        expect(said[:2] == ["present", meets], f"{name} meets nobody: {' '.join(said)}")
        print(f"   meets     {said[1]}  {said[2]}")


def participants(livekit, room, expected):
    def part(value):
        return base64.urlsafe_b64encode(value).rstrip(b"=")

    claims = {"iss": KEY, "exp": int(time.time()) + 60, "video": {"roomAdmin": True, "room": room}}
    signed = part(b'{"alg":"HS256","typ":"JWT"}') + b"." + part(json.dumps(claims).encode())
    jwt = signed + b"." + part(hmac.new(SECRET.encode(), signed, hashlib.sha256).digest())
    deadline = time.monotonic() + 5
    while True:
        _, answer = call(
            "POST",
            f"{http(livekit)}/twirp/livekit.RoomService/ListParticipants",
            {"room": room},
            {"access_token": jwt.decode()},
        )
        found = answer.get("participants", [])
        if len(found) == expected:
            return found
        expect(time.monotonic() < deadline, f"{expected} participants expected, the SFU says {answer}")
        time.sleep(0.1)


def leave_running(stage, url, homeserver, livekit, server_name, alice, room_id):
    python = os.path.relpath(sys.executable, TOP)
    print(
        f"""
Still running, with Alice and Bob in the room, {bold('until Ctrl-C')}:
   service       {url}
   SFU           {livekit}   key {KEY}, secret {SECRET}
   homeserver    {homeserver}   called {server_name}; alice and bob, password: secret
   logs          {os.path.relpath(stage.dir, TOP)}/*.log

Another of Alice's devices, by hand:
   OPENID=$(curl -s -X POST -H 'Authorization: Bearer {alice["access_token"]}' -d '{{}}' \\
      {homeserver}/_matrix/client/v3/user/{alice["user_id"]}/openid/request_token)
   curl -s {url}/get_token -d '{{"room_id": "{room_id}", "slot_id": "{SLOT}", "openid_token": '"$OPENID"',
      "member": {{"id": "by-hand", "claimed_user_id": "{alice["user_id"]}", "claimed_device_id": "ALICETABLET"}}}}'
   {python} tests/tools/client.py {livekit} JWT 60""",
        flush=True,
    )
    while True:
        time.sleep(1)
        stage.check()


class Stage:
    """Everything the demo starts, and the directory it works in: both are gone when it ends, however it ends."""

    def __enter__(self):
        (TOP / "target").mkdir(exist_ok=True)
        for left_by_a_killed_demo in (TOP / "target").glob("demo.*"):
            if not alive(int(left_by_a_killed_demo.name.split(".")[1])):
                shutil.rmtree(left_by_a_killed_demo, ignore_errors=True)
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix=f"demo.{os.getpid()}.", dir=TOP / "target"))
        self.processes = {}
        self.awaited = {}
        return self

    def start(self, name, command, ready, environment=None):
        self.spawn(name, command, environment)
        self.awaited[name] = ready

    def spawn(self, name, command, environment=None, stdout=None):
        with (self.dir / f"{name}.log").open("w") as log:
            self.processes[name] = subprocess.Popen(
                [str(word) for word in command],
                env={**ENVIRONMENT, **(environment or {})},
                cwd=self.dir,
                stdin=subprocess.DEVNULL,
                stdout=stdout or log,
                stderr=log,
                text=True,
                start_new_session=True,
                preexec_fn=die_with_us,
            )
        return self.processes[name]

    def wait(self):
        deadline = time.monotonic() + 60
        for name, url in self.awaited.items():
            while not answers(url):
                self.check()
                expect(time.monotonic() < deadline, f"{name} does not answer at {url}:\n{self.tail(name)}")
                time.sleep(0.05)
        self.check()

    def check(self):
        for name, process in self.processes.items():
            code = process.poll()
            expect(code is None, f"{name} ended by itself with code {code}:\n{self.tail(name)}")

    def tail(self, name):
        return "".join((self.dir / f"{name}.log").read_text(errors="replace").splitlines(keepends=True)[-20:])

    def __exit__(self, *_):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        # The newest first: the clients say goodbye while there is still an SFU.
        for process in reversed(self.processes.values()):
            end(process)
        shutil.rmtree(self.dir, ignore_errors=True)


def end(process):
    for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def die_with_us():
    """Even a demo that is killed outright leaves nothing running (PR_SET_PDEATHSIG, Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Failed(Exception):
    pass


class Interrupted(BaseException):
    pass


def interrupted(*_):
    raise Interrupted


def expect(condition, otherwise):
    if not condition:
        raise Failed(otherwise)


def call(method, url, body, user=None, loud=False):
    """Returns the status and the JSON of the answer; a loud call is shown, without what would let others in."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method=method)
    if user:
        request.add_header("Authorization", f"Bearer {user['access_token']}")
    if loud:
        print(f"   {method} {url}")
        if user:
            print(f"   Authorization: Bearer {short(user['access_token'])}")
        print("  ", indented(body))
    began = time.monotonic()
    try:
        with DIRECT.open(request, timeout=30) as answer:
            status, text = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read()
    except (urllib.error.URLError, OSError) as error:
        raise Failed(f"{method} {url}: {error}") from None
    took = time.monotonic() - began
    try:
        answer = json.loads(text)
    except ValueError:
        raise Failed(f"{method} {url}: {status} and no JSON: {text[:300]!r}") from None
    if loud:
        print(f"\n   {bold(status)} after {took * 1000:.0f} ms\n  ", indented(answer))
    return status, answer


def answers(url):
    try:
        with DIRECT.open(url, timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def free_ports(count):
    """Below the range that the system gives to outgoing connections, so that none of those takes one meanwhile."""
    with contextlib.ExitStack() as held:
        ports = []
        for port in random.sample(range(20_000, 32_000), 1_000):
            with contextlib.suppress(OSError):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    held.enter_context(socket.socket(socket.AF_INET, kind)).bind(("127.0.0.1", port))
                ports.append(port)
            if len(ports) == count:
                return ports
    raise Failed("no free ports")


def http(url):
    return url.replace("ws://", "http://", 1)


def unbase64(text):
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def indented(value):
    return json.dumps(shortened(value), indent=2).replace("\n", "\n   ")


def shortened(value):
    if isinstance(value, dict):
        return {k: short(v) if k in ("access_token", "jwt") else shortened(v) for k, v in value.items()}
    return value


def short(token):
    return ".".join(part[:8] + "..." for part in token.split("."))


def heading(text):
    heading.number = getattr(heading, "number", 0) + 1
    print(f"\n{bold(f'{heading.number}. {text}')}\n", flush=True)


def bold(text):
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() else str(text)


if __name__ == "__main__":
    main()
