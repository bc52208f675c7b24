"""A person with a browser without scripts, who fills in the forms of an issuer's pages until there are none left."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from urllib.parse import urljoin

import httpx

PAGE_SECONDS = 30.0
MOST_PAGES = 12


@dataclass
class Form:
    """A form of a page: what it sends unless it is changed, and its buttons."""

    action: str
    method: str
    name: str
    values: dict[str, str] = field(default_factory=dict)
    fillable: set[str] = field(default_factory=set)
    buttons: list[tuple[str, str]] = field(default_factory=list)


class _Forms(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.forms: list[Form] = []
        self._is_open = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "form":
            self.forms.append(Form(given.get("action", ""), given.get("method", "get").lower(), given.get("id", "")))
            self._is_open = True
        elif tag in ("input", "button"):
            owner = next((form for form in self.forms if form.name and form.name == given.get("form")), None)
            form = owner or (self.forms[-1] if self._is_open else None)
            if form is not None:
                self._take(form, tag, given)

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._is_open = False

    def _take(self, form: Form, tag: str, given: Mapping[str, str]) -> None:
        name, kind = given.get("name", ""), given.get("type", "submit" if tag == "button" else "text")
        if kind in ("submit", "image"):
            form.buttons.append((name, given.get("value", "")))
        elif name and (kind not in ("checkbox", "radio") or "checked" in given):
            form.values[name] = given.get("value", "on" if kind == "checkbox" else "")
            if kind != "hidden":
                form.fillable.add(name)


def visit(url: str, knows: Mapping[str, str], says_yes: Collection[tuple[str, str]] = ()) -> str:
    """Open `url` and go on until a page asks for nothing that the person knows; return that page's text.

    `knows` is what goes into fields, by their names; `says_yes` the names and values of buttons that allow what was
    asked for.
    """
    with httpx.Client(follow_redirects=True, trust_env=False, timeout=PAGE_SECONDS) as browser:

        def is_loopback(_: httpx.Response) -> None:
            # Browsers take it for a safe place, where cookies that are `Secure` may go without TLS.
            for cookie in browser.cookies.jar:
                cookie.secure = False

        browser.event_hooks = {"response": [is_loopback]}
        page = browser.get(url)
        for _ in range(MOST_PAGES):
            assert page.status_code < 400, f"{page.url} answered {page.status_code}: {page.text[-3000:]}"
            form = _form(page.text, knows, says_yes)
            if form is None:
                return page.text
            page = browser.request(form.method, urljoin(str(page.url), form.action), data=form.values)
    raise AssertionError(f"there is no end to the pages; the last was {page.url}: {page.text}")


def _form(text: str, knows: Mapping[str, str], says_yes: Collection[tuple[str, str]]) -> Form | None:
    parser = _Forms()
    parser.feed(text)
    for form in parser.forms:
        asked = form.fillable & knows.keys()
        yes = next((button for button in form.buttons if button in says_yes), None)
        # A form with nothing to fill in and one button without a name, as it is where there is nothing to choose.
        is_question = not form.fillable and form.buttons[:1] == [("", "")]
        if form.method != "post" or not (asked or yes or is_question):
            continue
        form.values.update({name: knows[name] for name in asked if not form.values[name]})
        name, value = yes or (form.buttons or [("", "")])[0]
        if name:
            form.values[name] = value
        return form
    return None
