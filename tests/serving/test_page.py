import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lib.data.events import EVENT_KINDS

PAGE = Path(__file__).resolve().parents[2] / "serving" / "page.html"
INTERFACE = {
    "v1/users?limit=50",
    "v1/users/{id}/recommendations?k=10",
    "v1/users/{id}/export",
    "v1/items/{id}/similar?k=5",
    "v1/events",
    "v1/status",
}
VOID = {"meta", "link", "input", "br"}


class Document(HTMLParser):
    """Collects the elements and checks that what is opened is closed, in order."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + data


@pytest.fixture(scope="module")
def page():
    return Document(PAGE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def script(page):
    return page.texts["script"]


def attributes(page: Document, name: str) -> list[str]:
    return [value for _, found in page.elements if (value := found.get(name)) is not None]


def test_the_page_is_one_whole_document(page):
    tags = [tag for tag, _ in page.elements]
    assert [tags.count(tag) for tag in ("html", "head", "body", "main", "h1", "style", "script")] == [1] * 7
    assert page.texts["title"] == "Afterclick"


def test_nothing_is_loaded_from_elsewhere(page):
    assert attributes(page, "src") == []
    assert attributes(page, "href") == ["data:,"]
    assert not re.search(r"https?:|wss?:|@import|url\(|\bimport\b|//[a-z]", PAGE.read_text(encoding="utf-8"))


def test_a_content_security_policy_forbids_everything_else(page):
    [policy] = [found["content"] for tag, found in page.elements if "http-equiv" in found]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert not any("*" in rule or "http" in rule or "unsafe-eval" in rule for rule in rules.values())


def test_data_never_becomes_markup(script):
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|srcdoc|setHTML"
    assert not re.search(markup, script)
    assert not re.search(r"\beval\b|Function\(", script)
    assert "textContent" in script


def test_only_the_interface_is_called(script):
    literals = re.findall(r'["`](v1/[^"`]*)["`]', script)
    called = {re.sub(r"\$\{[^}]*\}", "{id}", literal) for literal in literals}
    assert called == INTERFACE
    assert len(re.findall(r"\bv1/", script)) == len(literals)
    assert script.count("fetch(") == 1  # every call goes through the one place that shows errors


def test_every_id_in_an_address_is_escaped(script):
    for literal in re.findall(r"`(v1/[^`]*)`", script):
        for expression in re.findall(r"\$\{([^}]*)\}", literal):
            assert expression.startswith("idPath(")
    assert "idPath = (id) => encodeURIComponent(id)" in script


def test_the_events_that_are_sent_exist(script):
    [reactions] = re.findall(r"const REACTIONS = \{([^}]*)\}", script)
    sent = {*re.findall(r"(\w+):", reactions), *re.findall(r'(?:react|send)\((?:\w+, )?"(\w+)"', script)}
    assert sent == {"click", "like", "dislike", "cart", "purchase"}
    assert sent <= set(EVENT_KINDS)


def test_every_element_that_the_script_names_is_there_once(page, script):
    ids = attributes(page, "id")
    assert len(ids) == len(set(ids))
    named = set(re.findall(r'element\("([\w-]+)"\)', script))
    assert named
    assert named <= set(ids)
    assert set(attributes(page, "aria-labelledby")) <= set(ids)


def test_the_page_can_be_used_with_a_keyboard_a_reader_and_a_phone(page):
    assert ("html", {"lang": "en"}) in page.elements
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [
        found for _, found in page.elements
    ]
    tags = [tag for tag, _ in page.elements]
    for place, tag in enumerate(tags):
        assert tag not in ("select", "input") or tags[place - 1] == "label"
    errors = next(found for _, found in page.elements if found.get("id") == "errors")
    assert errors["role"] == "alert"
    assert attributes(page, "aria-live") == ["polite"]
    assert not [value for value in attributes(page, "tabindex") if int(value) > 0]
    style = page.texts["style"]
    assert "prefers-color-scheme: dark" in style
    assert ":focus-visible" in style
    assert "outline: none" not in style
