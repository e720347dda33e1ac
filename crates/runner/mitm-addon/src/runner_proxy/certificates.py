"""Certificates that guests see: one for each host, signed by the runner's CA.

The CA's key arrives on a descriptor, stays in this process's memory and signs certificates; it never takes part in a
handshake. All leaves share one P-256 key that lives as long as the process: a handshake then costs a tenth of one with RSA.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import cast

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from mitmproxy import certs, connection
from mitmproxy.addons.tlsconfig import TlsConfig
from mitmproxy.proxy.context import Context

from .limits import CERTIFICATES

# Guests' clocks may be behind: a clone's is set only when its job begins.
BACKDATED = timedelta(days=2)
LIFETIME = timedelta(days=30)
# A leaf is made anew long before the longest job could see it end.
RENEWED_BEFORE_END = timedelta(days=10)
_LONGEST_COMMON_NAME = 64

SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


class CaError(ValueError):
    """A CA that cannot be used; a sentence."""


class Authority:
    """The CA: its certificate and key."""

    def __init__(self, pem: bytes) -> None:
        try:
            key = serialization.load_pem_private_key(pem, None)
            self.certificate = x509.load_pem_x509_certificate(pem)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise CaError("The CA is no unencrypted PEM with one private key and one certificate.") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
            raise CaError("The CA's key is neither an elliptic curve's nor RSA.")
        if key.public_key() != self.certificate.public_key():
            raise CaError("The CA's key does not belong to its certificate.")
        self.key: SigningKey = key

    def sign(self, host: str, public_key: ec.EllipticCurvePublicKey, now: datetime) -> x509.Certificate:
        """A server certificate for one name or address."""
        try:
            name: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            name = x509.DNSName(host)
        fits = len(host) <= _LONGEST_COMMON_NAME
        subject = [x509.NameAttribute(NameOID.COMMON_NAME, host)] if fits else []
        return (
            x509.CertificateBuilder()
            .issuer_name(self.certificate.subject)
            .subject_name(x509.Name(subject))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATED)
            .not_valid_after(min(now + LIFETIME, self.certificate.not_valid_after_utc))
            # RFC 5280, 4.2.1.6: critical where the subject is empty.
            .add_extension(x509.SubjectAlternativeName([name]), critical=not subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(self._authority_key(), critical=False)
            .sign(self.key, hashes.SHA256())
        )

    def _authority_key(self) -> x509.AuthorityKeyIdentifier:
        """What OpenSSL compares with the CA's own identifier, however that was computed."""
        try:
            own = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        except x509.ExtensionNotFound:
            return x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def _usage() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


class Leaves:
    """Certificates by host, made when they are first asked for."""

    def __init__(self, authority: Authority, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._authority = authority
        self._clock = clock
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._kept: OrderedDict[str, tuple[datetime, certs.CertStoreEntry]] = OrderedDict()

    def get(self, host: str) -> certs.CertStoreEntry:
        now = self._clock()
        kept = self._kept.get(host)
        if kept is not None and now < kept[0]:
            self._kept.move_to_end(host)
            return kept[1]
        certificate = self._authority.sign(host, self._key.public_key(), now)
        entry = certs.CertStoreEntry(
            cert=certs.Cert(certificate),
            # Annotated as RSA there, and used as any key.
            privatekey=cast("rsa.RSAPrivateKey", self._key),
            chain_file=None,
            chain_certs=[certs.Cert(self._authority.certificate)],
        )
        self._kept[host] = (now + LIFETIME - RENEWED_BEFORE_END, entry)
        if len(self._kept) > CERTIFICATES:
            self._kept.popitem(last=False)
        return entry


class GuestTls(TlsConfig):
    """mitmproxy's TLS settings with our certificates. Takes the place of the addon of the same name."""

    # mitmproxy finds addons by this.
    name = "tlsconfig"

    def __init__(self, authority: Authority) -> None:
        self._leaves = Leaves(authority)
        self.certstore = _NoStore()

    def load(self, loader: object) -> None:
        """Its options were added by the addon whose place it takes."""

    def configure(self, updated: object) -> None:
        """There is no store on disk to be read, nor one to be made."""

    def running(self) -> None:
        """The same."""

    def get_cert(self, conn_context: Context) -> certs.CertStoreEntry:
        client: connection.Client = conn_context.client
        if client.sni:
            return self._leaves.get(client.sni.lower().removesuffix("."))
        return self._leaves.get(client.sockname[0])


class _NoStore(certs.CertStore):
    """What is left of a certificate store when certificates come from elsewhere."""

    def __init__(self) -> None:
        # No finite-field Diffie-Hellman: every client of the last ten years has elliptic curves.
        self.dhparams = cast("certs.DHParams", None)
