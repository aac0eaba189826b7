"""The system's browser, and pages of the explorer opened in it."""

import pytest

from tests.visualize.browser import Explorer


@pytest.fixture
def opened(chromium, tmp_path):
    """Opens pages; at the end, none has asked for anything beside itself or had anything to complain of."""
    context = chromium.new_context(viewport={"width": 1280, "height": 1000})
    said = []
    context.on("request", lambda request: said.append(request.url))
    context.on("console", lambda message: said.append(message.text))
    context.on("weberror", lambda error: said.append(str(error.error)))

    def of(html):
        path = tmp_path / f"page{len(context.pages)}.html"
        path.write_text(html, encoding="utf-8")
        page = Explorer(context.new_page(), path.as_uri())
        assert said == [path.as_uri()]
        said.clear()
        return page

    yield of
    assert said == []
    context.close()
