"""Certificates for TLS servers: one that no client trusts, and one of a private authority."""

import hashlib
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def self_signed(folder: Path) -> ssl.SSLContext:
    """A server's context with a new certificate for localhost, whose files are kept in the folder."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("localhost")
    return _context(folder, key, _certificate("localhost", key, name, key))


class PrivateAuthority:
    """An authority that no system knows.

    Args:
        folder: Where its certificate is kept, as ``SSL_CERT_FILE`` and as ``SSL_CERT_DIR`` have it.
    """

    # Small letters and single spaces: the hash that is a file's name is made of this form.
    NAME = "a private authority"

    def __init__(self, folder: Path) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._folder = folder
        certificate = _certificate(self.NAME, self._key, _name(self.NAME), self._key, authority=True)
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        self.file = folder / "authority.pem"
        self.file.write_bytes(pem)
        self.directory = folder / "authorities"
        self.directory.mkdir()
        # As `openssl rehash` names it: a hash of the name, without the header of the outer sequence.
        digest = hashlib.sha1(_name(self.NAME).public_bytes()[2:], usedforsecurity=False).digest()
        number = int.from_bytes(digest[:4], "little")
        (self.directory / f"{number:08x}.0").write_bytes(pem)

    def server(self) -> ssl.SSLContext:
        """A server's context with a certificate of this authority for localhost."""
        key = ec.generate_private_key(ec.SECP256R1())
        return _context(self._folder, key, _certificate("localhost", key, _name(self.NAME), self._key))


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _certificate(
    subject: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuers_key: ec.EllipticCurvePrivateKey,
    *,
    authority: bool = False,
) -> x509.Certificate:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuers_key.public_key()), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    )
    if authority:
        signs = dict.fromkeys(
            ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"), False
        )
        usage = x509.KeyUsage(
            **signs,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        builder = builder.add_extension(usage, critical=True)
    return builder.sign(issuers_key, hashes.SHA256())


def _context(folder: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> ssl.SSLContext:
    pem = folder / "server.pem"
    encoded = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem.write_bytes(encoded + certificate.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context
