"""The README and the documentation: every Python block runs, every link leads somewhere, and the pages open."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def _somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class TwoBranchBlock(torch.nn.Module):
    """What the example adapter of docs/adapters.md is written for."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.wide, self.narrow = ConvBN(channels, out_channels, 3), ConvBN(channels, out_channels, 1)
        self.skip = torch.nn.BatchNorm2d(channels)
        self.act = torch.nn.ReLU()

    def forward(self, x):
        out = self.wide(x) + self.narrow(x)
        if self.skip is not None:
            out = out + self.skip(x)
        return self.act(out)


class ConvBN(torch.nn.Module):
    def __init__(self, channels, out_channels, k):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, out_channels, k, padding=k // 2, bias=False)
        self.bn = torch.nn.BatchNorm2d(out_channels)

    def forward(self, x):
        return self.bn(self.conv(x))


@pytest.mark.usefixtures("_somewhere")
@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=name_of)
def test_every_python_block_runs(page, monkeypatch):
    """In the page's order, each with the names of those before it, and torch."""
    for needed in ("timm", "torchvision", "onnxscript"):
        if needed in page.read_text():
            pytest.importorskip(needed, reason="its networks are in the page: extras `test` and `export`")
    from acnet_kernels import adapters

    monkeypatch.setattr(adapters, "ADAPTERS", list(adapters.ADAPTERS))
    names = {"torch": torch, "TwoBranchBlock": TwoBranchBlock}
    for code in BLOCK.findall(page.read_text()):
        exec(compile(code, str(page), "exec"), names)


def test_the_readme_is_short_and_names_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    for command in ("make demo", "make test", "--no-build-isolation"):
        assert command in text


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_into_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if not re.match(r"https?://|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The documentation, built with warnings as errors."""
    pytest.importorskip("mkdocs", reason="the site's builder is not installed: extra `docs`")
    target = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(target)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_the_site_builds_without_a_warning(site):
    built = {page.stem for page in site.glob("*.html")}
    assert built == {page.stem for page in (ROOT / "docs").glob("*.md")} | {"404"}
    assert "memory_saver" in (site / "api.html").read_text()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the pages in")
def test_pages_open_in_a_browser(site):
    """No image, link or request of any page is broken, and the console has no error."""
    api = pytest.importorskip(
        "playwright.sync_api", reason="what drives the browser is not installed: extra `docs`"
    )
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *request: Quiet(*request, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    faults: list[str] = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page()
        page.on("console", lambda m: faults.append(f"{page.url}: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(f"{page.url}: {error}"))
        page.on("response", lambda r: faults.append(f"{page.url}: {r.status} {r.url}") if r.status >= 400 else None)
        linked: set[str] = set()
        for path in sorted(site.glob("*.html")):
            page.goto(f"{address}/{path.name}", wait_until="networkidle")
            broken = "all => all.filter(i => !(i.complete && i.naturalWidth)).map(i => i.src)"
            faults += [f"{path.name}: image {source}" for source in page.eval_on_selector_all("img", broken)]
            linked |= set(page.eval_on_selector_all("a[href]", "all => all.map(a => a.href)"))
            anchors = (
                "all => all.filter(a => a.hash && a.pathname === location.pathname && !document.getElementById("
            )
            anchors += "decodeURIComponent(a.hash.slice(1)))).map(a => a.href)"
            faults += [f"{path.name}: {href}" for href in page.eval_on_selector_all("a[href]", anchors)]
        browser.close()
    server.shutdown()
    own = {url.partition("#")[0].removeprefix(address) for url in linked if url.startswith(address)}
    faults += [f"link to {url}" for url in own if not (site / (url.lstrip("/") or "index.html")).exists()]
    assert faults == []
    assert len(own) >= len(list((ROOT / "docs").glob("*.md")))
