"""What a run writes down: metrics.jsonl always, TensorBoard and Weights & Biases on request, a plot, a report."""

import importlib.metadata
import json
import math
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("bytelm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, with "+" when it is modified; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*args):
        return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10)

    try:
        head, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


class MetricsLog:
    """Appends records to metrics.jsonl, and passes their numbers on to TensorBoard and Weights & Biases if asked."""

    def __init__(
        self, run_dir: Path, resume_step: int, tensorboard: bool = False, wandb_project: str = "", writes: bool = True
    ):
        """Records past `resume_step` (from a run that was cut off) are taken out, so that each step stands once.
        `writes`: of several processes one writes.

        Raises ImportError naming the extra when an optional logger is not installed.
        """
        self.path = run_dir / "metrics.jsonl"
        self._writers: list[Any] = []
        self._file = None
        if not writes:
            return
        _truncate(self.path, resume_step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise ImportError("train.tensorboard needs the extra: pip install 'bytelm[tensorboard]'") from None
            writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)
            self._writers.append((lambda n, s: [writer.add_scalar(k, v, s) for k, v in n.items()], writer.close))
        if wandb_project:
            try:
                import wandb  # pyrefly: ignore[missing-import]
            except ImportError:
                raise ImportError("train.wandb_project needs the extra: pip install 'bytelm[wandb]'") from None
            run = wandb.init(project=wandb_project, dir=str(run_dir), name=run_dir.name, resume="allow")
            self._writers.append((lambda n, s: run.log(n, step=s), run.finish))

    def write(self, record: dict[str, Any]) -> None:
        """Writes one record now (the file is flushed, so that a killed run keeps it)."""
        if self._file is None:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        numbers = {k: v for k, v in clean.items() if isinstance(v, (int, float)) and k != "step"}
        for send, _ in self._writers:
            send(numbers, record.get("step", 0))

    def write_once(self, record: dict[str, Any]) -> None:
        """Writes a record unless the file holds the same one (a finished run that is looked at again)."""
        if self._file is not None and json.loads(json.dumps(record)) not in read_metrics(self.path):
            self.write(record)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        for _, finish in self._writers:
            finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics file; a last line cut off by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _truncate(path: Path, step: int) -> None:
    if path.exists():
        keep = [r for r in read_metrics(path) if r.get("step", 0) <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in keep), encoding="utf-8")
        temporary.replace(path)


def plot_losses(metrics: Path, picture: Path, lines: dict[str, float] | None = None) -> None:
    """Draws bits per byte against bytes seen: training (thin: each log line; thick: smoothed), held-out points, and
    labelled horizontal `lines` (bits per byte of compressors, say)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = read_metrics(metrics)
    train = [(r["bytes"], r["bpb"]) for r in records if r.get("bpb") is not None]
    held = [(r["bytes"], r["heldout_bpb"]) for r in records if r.get("heldout_bpb") is not None]
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    if train:
        x, y = zip(*train)
        axes.plot(x, y, color="#9dbbe0", linewidth=0.8)
        smooth, mean = [], y[0]
        for value in y:
            mean += 0.15 * (value - mean)
            smooth.append(mean)
        axes.plot(x, smooth, color="#2b5f9e", linewidth=1.6, label="training (smoothed)")
    if held:
        axes.plot(*zip(*held), "o-", color="#c8502d", markersize=4, linewidth=1.4, label="held-out")
        low = min(v for _, v in held)
        axes.annotate(f"{held[-1][1]:.3f}", held[-1], textcoords="offset points", xytext=(0, 8), ha="right")
        marks = [low, min(max(v for _, v in held), 5), *(lines or {}).values()]
        axes.set_ylim(min(marks) - 0.15, max(marks) + 0.4)
    for name, value in (lines or {}).items():
        axes.axhline(value, color="#666666", linewidth=0.9, linestyle="--")
        axes.annotate(f"{name} {value:.3f}", (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                      fontsize=8, color="#444444", xytext=(-4, 2), textcoords="offset points")  # fmt: skip
    axes.set_xlabel("bytes of training text seen")
    axes.set_ylabel("bits per byte")
    axes.xaxis.set_major_formatter(lambda v, _: f"{v / 1e6:g} MB" if v else "0")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if train or held:
        axes.legend(frameon=False, loc="upper center")
    figure.savefig(picture)
    plt.close(figure)
