"""The digest tells what is new, as a mail that parses, over a server on this machine."""

import email
import email.policy
import socketserver
import ssl
import threading
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest

from keel.core.errors import ConfigError, KeelError, UserError
from keel.papers.catalogue import Paper, catalogue
from keel.papers.digest import digest, digest_mail, digest_text, send_mail, server_address, write_mail
from keel.papers.library import Library

NEW = Paper(
    1, "Entropy Bonuses <again>", family="online", links=("https://arxiv.org/abs/2601.1?a&b",), abstract="Bonus & more."
)
OLD = Paper(1, "An Entropy bonus of old")


@pytest.fixture
def library(tmp_path: Path) -> Library:
    found = Library(tmp_path / "papers.sqlite")
    found.add([OLD], date(2030, 1, 1))
    found.add([NEW, Paper(1, "Bonus alone")], date(2030, 2, 1))
    found.subscribe("entropy bonus")
    return found


def test_a_topic_gets_what_has_all_its_words_and_is_new(library: Library) -> None:
    (section,) = digest(date(2030, 1, 2), library)
    assert [paper.title for paper in section.papers] == [NEW.title]
    (both,) = digest(date(2030, 1, 1), library)
    assert [paper.title for paper in both.papers] == [NEW.title, OLD.title], "the latest first, the day itself included"


def test_families_and_themes_are_topics(library: Library) -> None:
    library.unsubscribe("entropy bonus")
    library.subscribe("online")
    assert [paper.title for paper in digest(date(2030, 1, 1), library)[0].papers] == [NEW.title]
    library.unsubscribe("online")
    library.subscribe("Divergence")
    since = date(2026, 1, 1)
    found = digest(since, library)[0].papers
    themed = {p.n for p in catalogue() if "divergence" in p.themes and p.known_since and p.known_since >= since}
    assert {1, 12} <= themed <= {paper.n for paper in found}
    assert all("diverg" in str(paper.to_json()).casefold() for paper in found)


def test_without_a_day_it_goes_on_from_the_last_one_that_was_sent(library: Library) -> None:
    with pytest.raises(UserError, match=r"no digest of 'entropy bonus' was sent yet.*--since"):
        digest(None, library)
    library.told(["entropy bonus"], date(2030, 1, 15))
    assert [paper.title for paper in digest(None, library)[0].papers] == [NEW.title]
    library.unsubscribe("entropy bonus")
    with pytest.raises(UserError, match="there are no subscriptions"):
        digest(date(2030, 1, 1), library)


def test_the_mail_has_both_parts_and_escapes_what_titles_hold(library: Library, tmp_path: Path) -> None:
    file = tmp_path / "digest.eml"
    write_mail(
        digest_mail(digest(date(2030, 1, 2), library), "Keel <keel@example.org>", "a@example.org, b@example.org"), file
    )
    mail = email.message_from_bytes(file.read_bytes(), policy=email.policy.default)
    assert (mail["Subject"], mail["To"]) == ("Keel: 1 new paper", "a@example.org, b@example.org")
    assert mail["Date"] and mail["Message-ID"].endswith("@example.org>")
    text, page = (part.get_content() for part in mail.iter_parts())
    assert "Entropy Bonuses <again>" in text and "https://arxiv.org/abs/2601.1?a&b" in text
    assert "Entropy Bonuses &lt;again&gt;" in page and "Bonus &amp; more." in page and "?a&amp;b" in page
    assert digest_text(digest(date(2040, 1, 1), library)).startswith("entropy bonus: 0 new papers since 2040-01-01")


@pytest.mark.parametrize("address", ["nobody", "a@b\nBcc: c@d", ""])
def test_addresses_cannot_smuggle_headers(address: str, library: Library) -> None:
    sections = digest(date(2030, 1, 2), library)
    with pytest.raises(ConfigError, match="--from"):
        digest_mail(sections, address, "a@example.org")
    with pytest.raises(ConfigError, match="--to"):
        digest_mail(sections, "a@example.org", address)


class Server(socketserver.ThreadingTCPServer):
    """A mail server on loopback that keeps what it is told.

    Args:
        offers: extensions that it names.
        refuses: recipients that it does not take.
        context: with which it speaks TLS; without one it offers TLS and then talks nonsense.
    """

    allow_reuse_address = daemon_threads = True

    def __init__(self, offers: tuple[str, ...] = (), refuses: str = "", context: ssl.SSLContext | None = None) -> None:
        self.offers, self.refuses, self.context = offers, refuses, context
        self.said: list[str] = []
        self.mails: list[bytes] = []
        self.encrypted: list[bool] = []
        super().__init__(("127.0.0.1", 0), Session)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class Session(socketserver.StreamRequestHandler):
    server: Server
    timeout = 5

    def handle(self) -> None:
        self.answer("220 loopback")
        encrypted = False
        while line := self.rfile.readline():
            said = line.decode().strip()
            self.server.said.append(said)
            word = said.split(" ")[0].upper()
            if word == "EHLO":
                offers = [] if encrypted else list(self.server.offers)
                for i, name in enumerate(lines := ["loopback", *offers]):
                    self.answer(f"250{' ' if i == len(lines) - 1 else '-'}{name}")
            elif word == "STARTTLS":
                self.answer("220 go on")
                if self.server.context is None:
                    return self.answer("this is no handshake")
                try:
                    self.request = self.server.context.wrap_socket(self.request, server_side=True)
                except (ssl.SSLError, OSError):
                    return None
                self.rfile, self.wfile = self.request.makefile("rb"), self.request.makefile("wb", 0)
                encrypted = True
            elif word == "RCPT" and self.server.refuses and self.server.refuses in said:
                self.answer("550 not here")
            elif word == "DATA":
                self.answer("354 end with a dot")
                body = b""
                while not body.endswith(b"\r\n.\r\n"):
                    body += self.rfile.readline()
                self.server.mails.append(body)
                self.server.encrypted.append(encrypted)
                self.answer("250 taken")
            elif word == "QUIT":
                return self.answer("221 bye")
            else:
                self.answer("250 fine")
        return None

    def answer(self, text: str) -> None:
        self.wfile.write(f"{text}\r\n".encode())


@pytest.fixture
def start() -> Iterator:
    servers: list[Server] = []

    def started(**options) -> Server:
        server = Server(**options)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        servers.append(server)
        return server

    yield started
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def mail(library: Library) -> email.message.EmailMessage:
    return digest_mail(digest(date(2030, 1, 2), library), "keel@example.org", "a@example.org, b@example.org")


def test_a_server_gets_the_mail_for_every_recipient(start, mail) -> None:
    server = start()
    send_mail(mail, server.address, timeout=5)
    assert len(server.mails) == 1 and b"Entropy Bonuses" in server.mails[0]
    recipients = [said.split("<")[1].split(">")[0] for said in server.said if said.lower().startswith("rcpt")]
    assert recipients == ["a@example.org", "b@example.org"]


def test_a_server_that_offers_tls_and_fails_at_it_gets_nothing(start, mail) -> None:
    server = start(offers=("STARTTLS",))
    with pytest.raises(KeelError, match=r"the mail was not sent.*--email FILE"):
        send_mail(mail, server.address, timeout=5)
    assert not server.mails and server.said[-1] == "STARTTLS"


def test_tls_is_used_where_it_is_offered_and_the_certificate_counts(start, mail, tmp_path: Path) -> None:
    certificate = tmp_path / "cert.pem"
    context = certified(certificate)
    server = start(offers=("STARTTLS",), context=context)
    with pytest.raises(KeelError, match="CERTIFICATE_VERIFY_FAILED"):
        send_mail(mail, server.address, timeout=5)
    assert not server.mails
    send_mail(mail, server.address, timeout=5, trust=ssl.create_default_context(cafile=str(certificate)))
    assert server.encrypted == [True]


def test_a_password_is_never_sent_in_the_clear(start, mail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEL_SMTP_USER", "ada")
    monkeypatch.setenv("KEEL_SMTP_PASSWORD", "secret")
    server = start(offers=("AUTH PLAIN LOGIN",))
    with pytest.raises(ConfigError, match="offers no TLS"):
        send_mail(mail, server.address, timeout=5)
    assert not server.mails and not any("AUTH" in said for said in server.said)


def test_refusals_and_dead_servers_are_errors(start, mail) -> None:
    with pytest.raises(KeelError, match=r"the server refused b@example\.org; the others have the mail"):
        send_mail(mail, start(refuses="b@example.org").address, timeout=5)
    with pytest.raises(KeelError, match="the mail was not sent"):
        send_mail(mail, start(refuses="@example.org").address, timeout=5)
    dead = Server()
    dead.server_close()
    with pytest.raises(KeelError, match=r"the mail was not sent: .*refused"):
        send_mail(mail, dead.address, timeout=5)


@pytest.mark.parametrize("server", ["", ":25", "host:", "host:0", "host:70000", "host:smtp"])
def test_addresses_of_servers(server: str) -> None:
    with pytest.raises(ConfigError, match="--smtp: must be HOST or HOST:PORT"):
        server_address(server)


def certified(path: Path) -> ssl.SSLContext:
    """A context for 127.0.0.1 with a fresh key, whose certificate goes to `path`."""
    import shutil
    import subprocess

    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificate")
    key = path.with_name("key.pem")
    made = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=127.0.0.1"
    made += " -addext subjectAltName=IP:127.0.0.1 -addext keyUsage=critical,digitalSignature,keyCertSign"
    command = ["openssl", *made.split(), "-keyout", str(key), "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, key)
    return context
