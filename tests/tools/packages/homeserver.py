#!/usr/bin/env python3
"""As much of a homeserver as a delegated leave needs, on a port of this machine: homeserver.py PORT"""

import http.server
import json
import sys

ANSWERS = {
    "/_matrix/federation/v1/openid/userinfo": {"sub": "@alice:example.org"},
    "/_matrix/client/versions": {"versions": ["v1.11"], "unstable_features": {"org.matrix.msc4140": True}},
}


class Homeserver(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.dumps(ANSWERS.get(self.path.partition("?")[0], {})).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_):
        pass


http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Homeserver).serve_forever()
