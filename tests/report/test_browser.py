"""The page in a real browser, where there is one: Chromium without a window."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from s4m_d2.engine.command.run_report import write_report

sys.path.insert(0, str(Path(__file__).parent))
from report_pages import make_run, student_record, write_lines  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on PATH")
WIDTH, HEIGHT, SECONDS = 1200, 2000, 60
MEASURE = """
<script>window.onload = () => {
  const page = document.documentElement, say = [];
  if (page.scrollWidth > page.clientWidth) say.push("page wider than the window");
  for (const svg of document.querySelectorAll(".chart svg")) {
    const box = svg.getBoundingClientRect(), texts = [];
    if (box.width < 200) say.push("small chart");
    for (const text of svg.querySelectorAll("text")) {
      const r = text.getBoundingClientRect();
      if (r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 1 ||
          r.bottom > box.bottom + 1) say.push("cut off: " + text.textContent);
      texts.push([r, text.textContent]);
    }
    for (const [i, [a, t]] of texts.entries()) for (const [b, u] of texts.slice(i + 1))
      if (a.left < b.right && b.left < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom)
        say.push("overlap: " + t + " / " + u);
  }
  for (const image of document.images) if (!image.naturalWidth) say.push("no picture");
  document.title = "measured: " + (say.join("; ") || "fine");
}</script>
"""


def chromium(folder, *arguments: str) -> subprocess.CompletedProcess:
    """Chromium's outputs; its whole group of processes is ended if it hangs."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage"]
    command += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={folder}", *arguments]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def said(result: subprocess.CompletedProcess) -> list[str]:
    """What the page made the console say."""
    return [line for line in result.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The report of a run with pictures, a band, values that are not finite, and long names."""
    folder = make_run(tmp_path_factory.mktemp("browser") / "run")
    records = [student_record(i, **{"segm/AP": i / 9000}) for i in range(0, 300_000, 600)]
    records[30]["lr"] = float("nan")
    records[40][f"loss_{'long_' * 15}"] = 2.0
    write_lines(folder / "student" / "metrics.json", records)
    figure = folder / "student/figures/predictions_0000800.png"
    figure.parent.mkdir()
    Image.fromarray(np.full((300, 900, 3), (200, 30, 40), dtype=np.uint8)).save(figure)
    return Path(write_report(str(folder)))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_drawn_and_the_console_is_silent(report, tmp_path, scheme):
    shot = tmp_path / "shot.png"
    result = chromium(
        tmp_path / "profile",
        f"--window-size={WIDTH},{HEIGHT}",
        f"--screenshot={shot}",
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
        report.as_uri(),
    )
    assert result.returncode == 0, result.stderr
    assert not said(result)
    with Image.open(shot) as file:
        pixels = np.asarray(file.convert("RGB")).reshape(-1, 3)
    ground = pixels[-WIDTH * 2]
    assert (ground.mean() > 200) == (scheme == "light")
    near = np.abs(pixels.astype(int) - (200, 30, 40)).max(1) < 12
    assert near.mean() > 0.05  # the picture of the gallery


def measured(page: str, width: int, folder: Path) -> str:
    """The page's own account of itself, in a frame of a width that windows cannot have."""
    inner = re.sub(r"<meta http-equiv[^>]*>", "", page).replace("</body>", f"{MEASURE}</body>")
    inner = inner.replace("loading='lazy'", "")
    (folder / "inner.html").write_text(inner, encoding="utf-8")
    frame = f"<iframe src='inner.html' style='width:{width}px;height:9000px'></iframe>"
    script = "<script>onload=()=>document.title=frames[0].document.title</script>"
    (folder / "outer.html").write_text(f"<title></title>{frame}{script}")
    result = chromium(
        folder / "profile",
        "--allow-file-access-from-files",
        "--window-size=1400,1000",
        "--dump-dom",
        (folder / "outer.html").as_uri(),
    )
    return re.search(r"<title>(.*?)</title>", result.stdout)[1]


@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_is_cut_off_or_overlaps(report, tmp_path, width):
    page = report.read_text(encoding="utf-8")
    assert measured(page, width, tmp_path) == "measured: fine"


def test_the_policy_stops_what_a_text_would_fetch_or_run(report, tmp_path):
    evil = "<img src='https://example.invalid/x.png'><script>document.title = 'run'</script>"
    page = report.read_text(encoding="utf-8").replace("</main>", f"{evil}</main>")
    open_page = re.sub(r"<meta http-equiv[^>]*>", "", page)
    for name, text, runs in (("with", page, False), ("without", open_page, True)):
        (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
        result = chromium(tmp_path / "profile", "--dump-dom", (tmp_path / f"{name}.html").as_uri())
        assert ("<title>run</title>" in result.stdout) == runs
        assert runs or len(said(result)) >= 2  # both are refused
