"""The digest: what is new on the topics that a user subscribed to, as text, as a mail, and sent."""

from __future__ import annotations

import html
import os
import smtplib
import ssl
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import formatdate, make_msgid
from pathlib import Path

from keel.core.errors import ConfigError, KeelError, UserError
from keel.papers.catalogue import FAMILIES, STATUSES, THEMES, Paper
from keel.papers.library import Library, Subscription
from keel.papers.search import containing

TIMEOUT = 30.0  # seconds that a mail server has for each answer


@dataclass(frozen=True)
class Section:
    """What is new on one topic.

    Args:
        topic: as subscribed to.
        since: the first day that counts.
        papers: the latest first.
    """

    topic: str
    since: date
    papers: tuple[Paper, ...]


def digest(since: date | None = None, library: Library | None = None) -> list[Section]:
    """What became known on each subscribed topic since a day, that day included.

    A paper is on a topic if every word of it (stemmed; in either spelling) is in its title, summary, abstract, family
    or components, or if the topic is the name of its family or of one of its themes.

    Args:
        since: the day; without it, for each topic the day of its last digest that was sent.
        library: with papers and subscriptions; the user's own without it.

    Raises:
        UserError: there are no subscriptions, or no day for one of them.
    """
    library = library or Library()
    subscriptions = library.subscriptions()
    if not subscriptions:
        raise UserError("there are no subscriptions", None, "For example: keel papers subscribe entropy bonus")
    papers = library.papers()
    sections = []
    for one in subscriptions:
        first = since or one.told
        if first is None:
            raise UserError(f"no digest of '{one.topic}' was sent yet", None, "Say from when: --since 2026-01-01.")
        sections.append(Section(one.topic, first, tuple(_new(one, first, papers))))
    return sections


def digest_text(sections: Sequence[Section]) -> str:
    """The digest as plain text."""
    lines = []
    for section in sections:
        lines += [f"{section.topic}: {_count(section)} since {section.since}", ""]
        for paper in section.papers:
            for said in (paper.title, _facts(paper), _said(paper)):
                lines += textwrap.wrap(said, 78, initial_indent="  ", subsequent_indent="  ")
            lines += [*(f"  {link}" for link in paper.links), ""]
    return "\n".join(lines)


def digest_mail(sections: Sequence[Section], sender: str, to: str) -> EmailMessage:
    """The digest as a mail with a part in plain text and one in HTML.

    Args:
        sections: of `digest`.
        sender, to: addresses; several recipients with commas.

    Raises:
        ConfigError: an address that cannot stand in a mail.
    """
    for name, address in (("--from", sender), ("--to", to)):
        if "@" not in address or any(c in address for c in "\r\n"):
            raise ConfigError(f"is no mail address: {address!r}", name)
    mail = EmailMessage(policy=SMTP)
    total = len({paper.n for section in sections for paper in section.papers})
    mail["Subject"] = f"Keel: {total} new paper{'' if total == 1 else 's'}"
    mail["From"], mail["To"] = sender, to
    mail["Date"] = formatdate(localtime=True)
    mail["Message-ID"] = make_msgid(domain=sender.rpartition("@")[2].strip("> ") or None)
    mail.set_content(digest_text(sections))
    mail.add_alternative(_html(sections), subtype="html")
    return mail


def write_mail(mail: EmailMessage, path: Path) -> None:
    """The mail as a file that mail programs open.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.write_bytes(mail.as_bytes())
    except OSError as error:
        raise UserError(f"cannot be written: {error}", str(path)) from error


def send_mail(mail: EmailMessage, server: str, timeout: float = TIMEOUT, trust: ssl.SSLContext | None = None) -> None:
    """Hand the mail to a server; over TLS where the server offers it, and from the first byte on port 465.

    `$KEEL_SMTP_USER` and `$KEEL_SMTP_PASSWORD` log in, over TLS only.

    Args:
        mail: of `digest_mail`.
        server: HOST or HOST:PORT; port 25 without one.
        timeout: seconds for each answer.
        trust: which certificates count; those of this machine without it.

    Raises:
        ConfigError: an address of a server that cannot be read.
        KeelError: the server cannot be reached, is not who it claims to be, or refused the mail; nothing was sent then.
    """
    host, port = server_address(server)
    trust = trust or ssl.create_default_context()
    user, password = os.environ.get("KEEL_SMTP_USER"), os.environ.get("KEEL_SMTP_PASSWORD", "")
    try:
        if port == 465:
            connection: smtplib.SMTP = smtplib.SMTP_SSL(host, port, timeout=timeout, context=trust)
        else:
            connection = smtplib.SMTP(host, port, timeout=timeout)
        with connection:
            connection.ehlo()
            safe = port == 465
            if not safe and connection.has_extn("starttls"):
                connection.starttls(context=trust)
                connection.ehlo()
                safe = True
            if user:
                if not safe:
                    raise ConfigError("offers no TLS, and a password is not sent without it", f"--smtp {server}")
                connection.login(user, password)
            refused = connection.send_message(mail)
    except (OSError, smtplib.SMTPException) as error:  # ssl.SSLError is an OSError
        raise KeelError(
            f"the mail was not sent: {error}", f"--smtp {server}", "--email FILE writes it instead."
        ) from error
    if refused:
        raise KeelError(f"the server refused {', '.join(refused)}; the others have the mail", f"--smtp {server}")


def server_address(server: str) -> tuple[str, int]:
    """Host and port of HOST, HOST:PORT, or [IPV6]:PORT.

    Raises:
        ConfigError: it is none of these.

    >>> server_address("mail.example.org"), server_address("[::1]:2525")
    (('mail.example.org', 25), ('::1', 2525))
    """
    host, mark, port = server.rpartition(":")
    if not mark or server.endswith("]"):
        host, port = server, "25"
    if not host.strip("[]") or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"must be HOST or HOST:PORT, not '{server}'", "--smtp", "For example localhost:25.")
    return host.strip("[]"), int(port)


def _new(subscription: Subscription, since: date, papers: Sequence[Paper]) -> Iterable[Paper]:
    recent = tuple(p for p in papers if p.known_since is not None and p.known_since >= since)
    topic = subscription.topic.casefold()
    named = {p.n for p in containing(topic, recent)}
    for paper in recent:
        names = (paper.family, FAMILIES[paper.family], *paper.themes, *(THEMES[theme] for theme in paper.themes))
        if topic in (name.casefold() for name in names):
            named.add(paper.n)
    return sorted((p for p in recent if p.n in named), key=lambda p: (p.known_since or since, p.n), reverse=True)


def _count(section: Section) -> str:
    return f"{len(section.papers)} new paper{'' if len(section.papers) == 1 else 's'}"


def _facts(paper: Paper) -> str:
    facts = [str(paper.date or ""), FAMILIES[paper.family], paper.command or STATUSES[paper.status]]
    return "; ".join(fact for fact in facts if fact)


def _said(paper: Paper) -> str:
    return paper.summary or textwrap.shorten(paper.abstract, 400, placeholder=" ...")


def _html(sections: Sequence[Section]) -> str:
    parts = ['<!doctype html><html lang="en"><body>']
    for section in sections:
        parts.append(f"<h2>{html.escape(section.topic)}</h2><p>{_count(section)} since {section.since}</p><ul>")
        for paper in section.papers:
            title = html.escape(paper.title)
            if paper.links:
                title = f'<a href="{html.escape(paper.links[0])}">{title}</a>'
            said = html.escape(_said(paper))
            parts.append(f"<li><p><b>{title}</b><br>{html.escape(_facts(paper))}</p><p>{said}</p></li>")
        parts.append("</ul>")
    return "".join([*parts, "</body></html>"])
