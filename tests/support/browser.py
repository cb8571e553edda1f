"""A headless browser for pages, without network; what it cannot do without is skipped by name."""

import re
import shutil
import subprocess

import pytest

CHROMIUM = shutil.which("chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
FLAGS += ["--virtual-time-budget=8000", "--timeout=30000"]


def dom(page, folder, size: str, *more: str) -> str:
    """What a page is after its scripts have run, in a window of "width,height"."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: the page has no browser to be tested in")
    profile = folder / "profile"
    profile.mkdir(exist_ok=True)
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"--window-size={size}", *more, "--dump-dom"]
    return subprocess.run([*command, f"file://{page}"], capture_output=True, text=True, timeout=120).stdout


def foreign(text: str) -> list[str]:
    """What of a page would be loaded from elsewhere."""
    return re.findall(r"https?:|\ssrc=|url\(|@import", text)
