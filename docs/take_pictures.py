"""Takes the pictures of the README: the terminal while the quickstart trains, its TensorBoard page, what it learned.

    python docs/take_pictures.py [DIRECTORY]

Needs tmux, and Chromium for the page. DIRECTORY is that of the quickstart, which is run if it has not been yet.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
from PIL import Image
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
COLUMNS, LINES = 118, 12
TMUX = ["tmux", "-L", "pipelite-pictures"]
SHOWN = r"train/(loss|stages|norms_map|norms_by)|eval/loss|stage_(busy|waiting)"
COMMAND = "pipelite fit --config configs/quickstart.yaml"


def main() -> None:
    directory = Path(sys.argv[1] if sys.argv[1:] else "quickstart").resolve()
    if not (directory / "base" / "config.json").exists():
        subprocess.run([sys.executable, str(ROOT / "examples" / "quickstart.py"), str(directory)], check=True)
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        take_terminal(directory, Path(made))
        take_page(Path(made))
    take_analysis(directory)


def take_terminal(directory: Path, logs: Path) -> None:
    """Train in a terminal; save its appearance after two thirds of the steps."""
    program = [sys.executable, "-m", "lightning_pipelite", "fit", "--config", str(ROOT / "configs" / "quickstart.yaml")]
    options = ["--overwrite", f"--trainer.logger.init_args.save_dir={logs}", "--trainer.log_every_n_steps=1"]
    command = f"cd {shlex.quote(str(directory))} && {shlex.join([*program, *options])}; sleep 5"
    size = ["-x", str(COLUMNS), "-y", str(LINES)]
    subprocess.run([*TMUX, "new-session", "-d", "-s", "fit", *size, command], check=True)
    kept = seen = ""
    while subprocess.run([*TMUX, "has-session", "-t", "fit"], capture_output=True).returncode == 0:
        done = re.search(r"step ([\d,]+)/([\d,]+), .*tokens/s", seen)
        if done and int(done[1]) >= int(done[2]) * 2 / 3 and "evaluating" not in seen and not kept:
            kept = seen
        time.sleep(0.2)
        capture = subprocess.run([*TMUX, "capture-pane", "-e", "-p", "-t", "fit"], capture_output=True, text=True)
        seen = capture.stdout
    if not kept:
        raise SystemExit(f"training ended too early: {seen}")
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(f"$ {COMMAND}\n{kept.rstrip()}"), soft_wrap=True)
    console.save_svg(str(PICTURES / "terminal.svg"), title="lightning_pipelite")


def take_page(logs: Path) -> None:
    """Show the logs in TensorBoard in a headless browser; save a screenshot."""
    browser = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit("neither chromium nor google-chrome was found")
    with tensorboard(logs) as address, tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1400,1320"]
        devtools = ["--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen([browser, *options, *devtools], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            page = asyncio.run(screenshot(Path(profile), address))
        finally:
            process.terminate()
            process.wait()
        Image.open(io.BytesIO(page)).convert("RGB").quantize(128).save(PICTURES / "tensorboard.png", optimize=True)


def take_analysis(directory: Path) -> None:
    """Plot the singular values of what was learned."""
    with tempfile.TemporaryDirectory() as made:
        files = ["--adapter", "adapter", "--base", "base", "--output", f"{made}/analysis"]
        subprocess.run([sys.executable, "-m", "lightning_pipelite", "analyze", *files], check=True, cwd=directory)
        picture = Image.open(f"{made}/analysis/spectra.png").convert("RGB")
        picture.quantize(256).save(PICTURES / "spectra.png", optimize=True)


async def screenshot(profile: Path, address: str) -> bytes:
    """Take a screenshot over the DevTools protocol, since only the page itself can write TensorBoard's settings."""
    chosen = {"ignoreOutliers": False, "scalarSmoothing": 0, "timeSeriesSettingsPaneOpened": False}
    chosen |= {"stepSelectorEnabled": False, "sideBarWidthInPercent": 0, "timeSeriesCardMinWidth": 330}
    store = f"localStorage.setItem('_tb_global_settings', {json.dumps(json.dumps(chosen))})"
    tags = urllib.parse.quote(SHOWN, safe="")
    port_file = profile / "DevToolsActivePort"
    while not (port_file.exists() and port_file.read_text()):
        await asyncio.sleep(0.2)
    port = port_file.read_text().split()[0]
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
            target = next(each for each in await response.json() if each["type"] == "page")
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:

            async def call(method: str, **params: Any) -> Any:
                await socket.send_json({"id": 1, "method": method, "params": params})
                while "id" not in (answer := await socket.receive_json()):
                    pass
                return answer["result"]

            await call("Page.navigate", url=address)
            await asyncio.sleep(10)
            await call("Runtime.evaluate", expression=store)
            await call("Page.navigate", url="about:blank")
            await call("Page.navigate", url=f"{address}/?tagFilter={tags}&smoothing=0#timeseries")
            await asyncio.sleep(20)
            return base64.b64decode((await call("Page.captureScreenshot"))["data"])


@contextlib.contextmanager
def tensorboard(logs: Path) -> Iterator[str]:
    """Serve the logs on localhost; yield the address."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--host=127.0.0.1", f"--port={port}"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/data/runs")
                break
            time.sleep(0.5)
        time.sleep(5)  # until it has read the logs
        yield address
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
