"""Takes the pictures of the README: the terminal while the quickstart trains, and its TensorBoard page afterwards.

    python docs/take_pictures.py [DIRECTORY]

Needs tmux, and Chromium for the page. DIRECTORY is the quickstart's, which is filled if it is not there.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
COLUMNS, LINES = 112, 12
TMUX = ["tmux", "-L", "pipelite-pictures"]
SHOWN = r"train/(loss|tokens|norms_avg|stages|norms_map)|eval/loss|stage_(busy|waiting)"
COMMAND = "pipelite fit --config configs/quickstart.yaml"


def main() -> None:
    directory = Path(sys.argv[1] if sys.argv[1:] else "quickstart").resolve()
    if not (directory / "base" / "config.json").exists():
        subprocess.run([sys.executable, str(ROOT / "examples" / "quickstart.py"), str(directory)], check=True)
    PICTURES.mkdir(exist_ok=True)
    logs = directory / "pictures"
    shutil.rmtree(logs, ignore_errors=True)
    take_terminal(directory, logs)
    take_page(logs)


def take_terminal(directory: Path, logs: Path) -> None:
    """Train in a terminal; keep as it looks after two thirds of the steps."""
    program = [sys.executable, "-m", "lightning_pipelite", "fit", "--config", str(ROOT / "configs" / "quickstart.yaml")]
    options = [f"--trainer.logger.init_args.save_dir={logs}", "--trainer.log_every_n_steps=1"]
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
        raise SystemExit(f"the training did not come so far: {seen}")
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(f"$ {COMMAND}\n{kept.rstrip()}"), soft_wrap=True)
    console.save_svg(str(PICTURES / "terminal.svg"), title="lightning_pipelite")


def take_page(logs: Path) -> None:
    """Show the logs on TensorBoard's page, in a browser without a window."""
    browser = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit("neither chromium nor google-chrome is there")
    with tensorboard(logs) as address, tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch) / "page.png"
        tags = urllib.request.quote(SHOWN, safe="")  # type: ignore[attr-defined]
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=30000"]
        window = ["--window-size=1560,1370", f"--screenshot={picture}"]
        page = f"{address}/#timeseries&tagFilter={tags}&smoothing=0"
        subprocess.run([browser, *options, *window, page], check=True, capture_output=True, timeout=180)
        image = Image.open(picture).convert("RGB").quantize(128)
        image.save(PICTURES / "tensorboard.png", optimize=True)


@contextlib.contextmanager
def tensorboard(logs: Path) -> Iterator[str]:
    """Serve the logs on this machine alone; the address."""
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
        time.sleep(5)  # it reads the logs
        yield address
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
