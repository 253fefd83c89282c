"""The report in a real browser: no console message, no overflow on a phone or a desktop, light and
dark, tooltips.
"""

import pytest

from tests.eval.browser import available, browser
from tests.eval.page_material import make_run
from vlp.eval.report import page

OVERFLOWING = """
return [...document.querySelectorAll('body *')].filter(e => {
  const box = e.getBoundingClientRect();
  return box.right > innerWidth + 1 && !e.closest('.wide') && !e.closest('nav');
}).map(e => e.tagName + '.' + e.className + ': ' + e.textContent.slice(0, 40));
"""
MOVE = """
const svg = document.querySelector('svg.chart'), box = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.right - 5, clientY: box.top + 20}));
return document.getElementById('tip').textContent;
"""
LOADED = """
return performance.getEntriesByType('resource').map(r => r.name)
    .filter(name => !name.startsWith('data:'))
"""


@pytest.mark.skipif(not available(), reason="chromium and chromedriver are not installed")
def test_page_in_chromium(tmp_path, scenes):
    run = make_run(tmp_path / "a-run-with-quite-a-long-name-for-a-phone", scenes)
    other = make_run(tmp_path / "other", scenes)
    files = [
        page.write(run, samples=20, data=[str(scenes / "order")]),
        page.write(run, other, both=True, samples=20),
    ]
    with browser(tmp_path) as session:
        colors = set()
        for file in files:
            for width in (360, 1280):
                for dark in (False, True):
                    session.open(file, width, dark=dark)
                    session.run(
                        "document.querySelectorAll('details').forEach(d => { d.open = true; })"
                    )
                    assert session.run("return document.documentElement.scrollWidth") <= width
                    assert session.run(OVERFLOWING) == []
                    assert session.run(
                        "return [...document.images].every(i => i.complete && i.naturalWidth > 0)"
                    )
                    assert "step 6: 0.5" in session.run(MOVE)
                    colors.add(
                        session.run("return getComputedStyle(document.body).backgroundColor")
                    )
            assert session.run(LOADED) == []
        assert session.messages() == []
        assert len(colors) == 2
