"""Layer 2. Google Drive's web pages: what a page that came instead of a file means.

Before it: nothing. After it: `fetch` follows a confirmation and reports the rest. gdown does this too, but for Google's
own host names only: no test could play Drive to it, and its retries know neither our hashes nor our mirrors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from html.parser import HTMLParser
from urllib.parse import urlencode, urljoin, urlsplit

__all__ = ["Page", "drive_url", "drive_view_url", "looks_like_page", "read_page"]

DRIVE = "https://drive.google.com"
"""Where Drive is; tests put a loopback server here."""

_OWN_HOSTS = re.compile(r"([a-z0-9-]+\.)*(google|googleusercontent)\.com", re.IGNORECASE)
_QUOTA = re.compile(r"quota exceeded|too many users have viewed or downloaded|download quota", re.IGNORECASE)
_SIGN_IN = re.compile(r"sign in|need access|request access", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What a page says: either where the file is, or why there is none."""

    confirmed_url: str | None = None
    """The address behind the button "Download anyway"."""
    reason: str = ""


def drive_url(file_id: str) -> str:
    """Where a file of that id is downloaded."""
    return f"{DRIVE}/uc?{urlencode({'export': 'download', 'id': file_id})}"


def drive_view_url(file_id: str) -> str:
    """Where a person sees it in a browser."""
    return f"{DRIVE}/file/d/{file_id}/view"


def looks_like_page(content_type: str, head: bytes) -> bool:
    """Whether a body is a web page, whatever its status says."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:15].lower()
    return content_type.lower().startswith("text/html") or start.startswith((b"<!doctype html", b"<html"))


def read_page(text: str, url: str) -> Page:
    """What the page at `url` says.

    Parameters
    ----------
    text : its HTML, or the beginning of it.
    url : where it came from. A confirmation leads to the same host or one of Google's, never from https to http.
    """
    forms = _Forms()
    forms.feed(text)
    if forms.action is not None:
        target = urlsplit(urljoin(url, forms.action))
        here = urlsplit(url)
        safe = target.scheme == "https" or target.scheme == here.scheme == "http"
        if safe and (target.netloc == here.netloc or _OWN_HOSTS.fullmatch(target.hostname or "")):
            query = "&".join(part for part in (target.query, urlencode(forms.fields)) if part)
            return Page(confirmed_url=target._replace(query=query, fragment="").geturl())
    if _QUOTA.search(text):
        return Page(reason="its download quota is used up for today (too many people fetched it)")
    if _SIGN_IN.search(text):
        return Page(reason="it wants a sign-in")
    title = " ".join(forms.title.split())[:80]
    return Page(reason=f"a web page came instead of the archive{f' ({title})' if title else ''}")


class _Forms(HTMLParser):
    """The first form with id `download-form`, or the link `uc-download-link` of older pages; and the title."""

    def __init__(self) -> None:
        super().__init__()
        self.action: str | None = None
        self.fields: list[tuple[str, str]] = []
        self.title = ""
        self._in_form = self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        match tag, values.get("id"):
            case "form", "download-form" if self.action is None:
                self.action, self._in_form = values.get("action", ""), True
            case "a", "uc-download-link" if self.action is None:
                self.action = values.get("href", "")
            case "input", _ if self._in_form and values.get("type", "").lower() == "hidden" and values.get("name"):
                self.fields.append((values["name"], values.get("value", "")))
            case "title", _:
                self._in_title = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._in_form = False
        elif tag == "title":
            self._in_title = False

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
