"""The pictures of the pages in the README and in docs/ui.md.

    python -m benchmarks.pictures [--runs FOLDER]

trains two short runs of the built-in model and compares three recipes (or takes what is in a folder), opens the pages
in the system's chromium, and writes docs/images/*.png.
"""

import argparse
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from benchmarks.measuring import ROOT
from keel.compare.record import names
from keel.core.errors import UserError
from keel.store.listing import RolloutFilter, list_rollouts
from keel.store.store import Store
from keel.ui.app import create_app

IMAGES = ROOT / "docs" / "images"
STEPS = 30
COMPARED = ("grpo", "dr_grpo", "grpo_forward_kl")
SETTINGS: dict[str, Any] = {"train.max_steps": STEPS, "train.log_completions": 5, "beta": 0.02}


def train(folder: Path) -> None:
    """Two runs with the same settings, and a comparison."""
    import keel

    for recipe in ("grpo", "kl_cov"):
        keel.train(recipe, task="countdown", name=recipe, runs=folder, seed=0, **SETTINGS)
    keel.compare(COMPARED, seeds=3, budget=f"{STEPS}steps", runs=folder)


def mixed_group(folder: Path) -> int:
    """A right completion of the newest stored group that has right and wrong ones."""
    with Store(folder / "keel.sqlite", readonly=True) as store:
        groups: dict[tuple[str, int, int], dict[float, int]] = {}
        for one in list_rollouts(store, RolloutFilter(), limit=400):
            place = (one.run, one.rollout.step, one.rollout.group)
            groups.setdefault(place, {})[one.rollout.reward] = one.rollout.id
    for rewards in groups.values():
        if len(rewards) > 1:
            return rewards[max(rewards)]
    raise UserError("no stored group has both right and wrong answers", str(folder), "Train longer.")


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of the pages."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(folder), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def draw(folder: Path, images: Path) -> None:
    """Open the pages and write the pictures."""
    from playwright.sync_api import sync_playwright

    images.mkdir(parents=True, exist_ok=True)
    number = mixed_group(folder)
    wide, phone = {"width": 1120, "height": 640}, {"width": 390, "height": 780}
    shots: list[tuple[str, str, Any, Any, str | None]] = [
        ("tokens", f"/tokens/{number}/group#token=17", wide, "light", "entropy"),
        ("tokens-dark", f"/tokens/{number}/group", phone, "dark", "gradient"),
        ("runs", "/runs", {**wide, "height": 370}, "light", None),
        ("run", "/runs/kl_cov?against=grpo", {**wide, "height": 900}, "light", None),
        ("compare", f"/compare/{names(folder)[0]}#report", {**wide, "height": 980}, "light", None),
        ("verify", "/verify", {**wide, "height": 880}, "light", None),
        ("method", "/methods/kl_cov", {**wide, "height": 760}, "light", None),
        ("papers", "/papers?q=KL+divergence+to+a+reference", {**wide, "height": 640}, "light", None),
    ]
    with serving(folder) as address, sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        for name, place, size, scheme, by in shots:
            page = browser.new_page(viewport=size, color_scheme=scheme)
            page.goto(address + place)
            page.wait_for_load_state("networkidle")
            if by:
                page.select_option(".chooser select", by)
            page.screenshot(path=images / f"{name}.png")
            page.close()
        browser.close()


def main() -> None:
    """Train, draw, and say how large the pictures are."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, help="runs grpo and kl_cov, and a comparison, made before")
    parser.add_argument("--to", type=Path, default=IMAGES)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.runs or Path(temporary)
        if not given.runs:
            train(folder)
        draw(folder, given.to)
    for image in sorted(given.to.glob("*.png")):
        print(f"{image}  {image.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
