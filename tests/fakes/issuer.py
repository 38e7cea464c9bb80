"""A scriptable OpenID Connect issuer: its keys, tokens that no library makes, its documents on a server."""

from __future__ import annotations

import base64
import json
import secrets
import threading
import time
from collections import Counter
from functools import lru_cache
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, Self

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.fakes.http_server import EndingHttpServer
from tests.fakes.waiting import Watched

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DISCOVERY", "JWKS", "FakeIssuer", "SigningKey", "encoded"]

DISCOVERY = "/.well-known/openid-configuration"
JWKS = "/keys"
AUDIENCE = "llm-api"


def _rsa() -> Any:
    return rsa.generate_private_key(65_537, 2_048)


MAKE: dict[str, Callable[[], Any]] = {
    **{
        f"{kind}{size}": lambda: rsa.generate_private_key(65_537, 2_048)
        for kind in ("RS", "PS")
        for size in (256, 384, 512)
    },
    "ES256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ES384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ES512": lambda: ec.generate_private_key(ec.SECP521R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate,
}


def encoded(part: bytes) -> str:
    """Base64 as tokens have it."""
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()


class SigningKey:
    """A private key, and its public half as it is published.

    Args:
        algorithm: Of its signatures.
        kid: Its id; a new one without.
        private: The key; a new one without.
    """

    def __init__(self, algorithm: str = "ES256", kid: str | None = None, private: Any = None) -> None:
        self.algorithm = algorithm
        self.kid = kid or secrets.token_hex(8)
        self.private = private or MAKE[algorithm]()

    def jwk(self, **changed: Any) -> dict[str, Any]:
        """The entry in a JWK Set, but for these; None leaves a member out."""
        made = jwt.get_algorithm_by_name(self.algorithm).to_jwk(self.private.public_key(), as_dict=True)
        entry = {**made, "kid": self.kid, "alg": self.algorithm, "use": "sig", **changed}
        entry.pop("key_ops", None)
        return {name: value for name, value in entry.items() if value is not None}

    @property
    def pem(self) -> bytes:
        """The public key as a text."""
        found: bytes = self.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return found

    def sign(self, claims: Any, header: dict[str, Any] | None = None, algorithm: str | None = None) -> str:
        """A token with this key's signature, whatever its header says; None leaves a field out."""
        whole = {"alg": self.algorithm, "typ": "JWT", "kid": self.kid, **(header or {})}
        whole = {name: value for name, value in whole.items() if value is not None}
        parts = [encoded(json.dumps(part).encode()) for part in (whole, claims)]
        maker = jwt.get_algorithm_by_name(algorithm or self.algorithm)
        return ".".join([*parts, encoded(maker.sign(".".join(parts).encode(), self.private))])


@lru_cache
def _some_key(number: int) -> SigningKey:
    return SigningKey("RS256", kid=f"key-{number}")


class FakeIssuer(Watched):
    """An issuer with one RSA key. Its documents are had by ``fetch``, or from its server inside a ``with``.

    Attributes:
        keys: The entries of its JWK Set.
        named: The issuer that its configuration names.
        jwks_uri: Where its configuration says that the keys are.
        status: Of every answer of its server.
        body: Sent in the place of every document.
        headers: Sent with each answer.
        hang: Send one byte of the body, and no more.
        down: ``fetch`` fails with this reason.
    """

    def __init__(self, url: str = "https://login.example.org", number: int = 0) -> None:
        super().__init__()
        self.url = url
        self.key = _some_key(number)
        self.keys: list[Any] = [self.key.jwk()]
        self.named: Any = None
        self.jwks_uri: Any = None
        self.status = 200
        self.body: bytes | None = None
        self.headers: dict[str, str] = {}
        self.hang = False
        self.down: Exception | None = None
        self.requests: Counter[str] = Counter()
        self._server: EndingHttpServer | None = None
        self._released = threading.Event()

    def claims(self, **changed: Any) -> dict[str, Any]:
        """Valid claims, but for these; None leaves one out."""
        now = int(time.time())
        claims = {"iss": self.url, "sub": "alice", "aud": AUDIENCE, "iat": now, "exp": now + 600, **changed}
        return {name: value for name, value in claims.items() if value is not None}

    def token(self, *, header: dict[str, Any] | None = None, **changed: Any) -> str:
        """A token with these claims over the valid ones."""
        return self.key.sign(self.claims(**changed), header)

    def rotate(self, *, keep: bool = False) -> None:
        """Sign with a new key from now on, and publish it, beside the others or alone."""
        self.key = SigningKey("ES256")
        self.keys = [*(self.keys if keep else ()), self.key.jwk()]

    def document(self, path: str) -> Any:
        """What is published under a path; None for any other."""
        match path.removeprefix("/realm"):
            case "/.well-known/openid-configuration":
                return {"issuer": self.named or self.url, "jwks_uri": self.jwks_uri or f"{self.url}{JWKS}"}
            case "/keys":
                return {"keys": self.keys}
            case _:
                return None

    async def fetch(self, url: str) -> object:
        """A document without a network, as the service's fetcher returns it."""
        path = url.removeprefix(self.url)
        with self._changed:
            self.requests[path] += 1
            self._changed.notify_all()
        if self.down is not None:
            raise self.down
        return self.document(path)

    # ---- The server ----------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def start(self, port: int = 0) -> None:
        """Serve on a port of this machine; ``url`` is where, and stays the same after a stop."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                fake._answer(self)

            def log_message(self, *_arguments: object) -> None:
                """Say nothing."""

        self._released.clear()
        self._server = EndingHttpServer(port or self._port, Handler)
        if "127.0.0.1" not in self.url:
            self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), name="issuer").start()

    @property
    def _port(self) -> int:
        return int(self.url.rpartition(":")[2]) if "127.0.0.1" in self.url else 0

    def stop(self) -> None:
        """Refuse connections from now on."""
        if self._server is not None:
            self._released.set()
            self._server.shutdown()
            self._server.drop_connections()
            self._server.server_close()
            self._server = None

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        with self._changed:
            self.requests[handler.path] += 1
            self._changed.notify_all()
        document = self.document(handler.path)
        body = json.dumps(document).encode() if self.body is None else self.body
        handler.send_response(self.status if document is not None else 404)
        for name, value in {"Content-Type": "application/json", **self.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if self.hang:
            handler.wfile.write(body[:1])
            self._released.wait()
        else:
            handler.wfile.write(body)
