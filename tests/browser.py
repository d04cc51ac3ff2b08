"""A headless Chromium for the tests of pages, driven by Playwright."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright


# Names under which distributions and vendors install it, the one that `.ci/run` installs first.
PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@contextmanager
def headless_chromium() -> Iterator[Browser]:
    """A browser that was started for the `with` block.

    Raises:
        RuntimeError: none is installed.
    """
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        raise RuntimeError(
            f"none of {', '.join(PROGRAMS)} is installed, which the tests of pages drive: "
            "apt-get install chromium-headless-shell fonts-dejavu-core, or any Chromium"
        )
    with sync_playwright() as playwright:
        # A container's root has no sandbox; the pages are this package's own.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
