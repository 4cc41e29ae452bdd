"""TLS as a company has it: a certificate authority of its own.

authority = Authority(folder)
authority.pem                    the path of its certificate
authority.folder                 a folder with that certificate alone
authority.alone                  variables by which nobody else is trusted
Registry(tls=authority.context())
"""

import ssl

NAMES = ("localhost", "127.0.0.1")
NOWHERE = "/nonexistent"  # for a folder of certificates: to read all of the system takes long


class Authority:
    def __init__(self, folder):
        import trustme  # takes as long as many a test, and few want it

        self.folder = folder / "certs"
        self.folder.mkdir(parents=True)
        self.pem = self.folder / "company.pem"
        self._ca = trustme.CA()
        self._ca.cert_pem.write_to_path(str(self.pem))
        self.alone = {"SSL_CERT_FILE": str(self.pem), "SSL_CERT_DIR": NOWHERE}

    def context(self, *names, **validity):
        """Return a server's context, with a certificate for these names (NAMES).

        not_before, not_after: datetimes.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._ca.issue_cert(*(names or NAMES), **validity).configure_cert(context)
        return context
