#!/usr/bin/env python3
"""Makes a certificate authority and a server certificate signed by it, for tests.

    certificates.py DIR [NAME_OR_ADDRESS...]      (default: 127.0.0.1 ::1 localhost)

Writes DIR/ca.pem (for SSL_CERT_FILE), DIR/cert.pem and DIR/key.pem. Valid for 30 days.
"""

import datetime
import ipaddress
import pathlib
import sys

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DEFAULT_NAMES = ["127.0.0.1", "::1", "localhost"]


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    write(pathlib.Path(sys.argv[1]), sys.argv[2:] or DEFAULT_NAMES)


def write(directory, names=DEFAULT_NAMES):
    """Two certificates, not one: rustls refuses an authority that serves as the end entity."""
    directory.mkdir(parents=True, exist_ok=True)
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = sign(
        builder("lk-jwt-service test authority", authority_key)
        .issuer_name(name("lk-jwt-service test authority"))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(key_cert_sign=True, crl_sign=True), critical=True),
        authority_key,
    )
    server_key = ec.generate_private_key(ec.SECP256R1())
    server = sign(
        builder(names[0], server_key)
        .issuer_name(authority.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([general_name(n) for n in names]), critical=False),
        authority_key,
    )
    pem = serialization.Encoding.PEM
    (directory / "ca.pem").write_bytes(authority.public_bytes(pem))
    (directory / "cert.pem").write_bytes(server.public_bytes(pem))
    (directory / "key.pem").write_bytes(
        server_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def builder(subject, key):
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def sign(certificate, authority_key):
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    return certificate.add_extension(identifier, critical=False).sign(authority_key, hashes.SHA256())


def key_usage(**used):
    names = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement "
        "key_cert_sign crl_sign encipher_only decipher_only"
    ).split()
    return x509.KeyUsage(**{n: used.get(n, False) for n in names})


def name(common):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def general_name(text):
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


if __name__ == "__main__":
    main()
