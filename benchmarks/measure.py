"""What the benchmark scripts share: paired runs, spread, the machine, tables as Markdown and as data.

A script makes a `Section`, fills it with tables and calls `finish`: that prints Markdown and, with `--out folder`,
writes a JSON file from which report.py composes docs/benchmarks.md.
"""

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "numpy", "keras", "jax", "optax", "torchao", "transformers", "scikit-learn")
PACKAGES += ("skorch", "lightning")


def now():
    """Seconds, when all work that waits on the default device is done."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_default_device().type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def paired(jobs, rounds, budget=None, before=lambda name: None, clock=now):
    """{job: seconds of each round}, the jobs taking turns, A B A B, after one round that isn't counted.

    Args:
        jobs: {name: function}.
        rounds: how often each is timed.
        budget: seconds after which no further round begins, once there are three.
        before: called with the name ahead of each run, outside the time.
        clock: seconds now.
    """
    seconds = {name: [] for name in jobs}
    gc.collect()
    began = clock() if budget is not None else 0
    for number in range(rounds + 1):
        for name, job in jobs.items():
            before(name)
            start = clock()
            job()
            if number:
                seconds[name].append(clock() - start)
        if budget is not None and number >= 3 and clock() - began > budget:
            break
    return seconds


def quartiles(values):
    """Lower quartile, median, upper quartile."""
    values = sorted(values)
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(seconds, job, base):
    """Quartiles of the paired ratios: seconds of the job over those of the base in the same round."""
    return quartiles([a / b for a, b in zip(seconds[job], seconds[base], strict=True)])


def digits(value):
    """Three digits that count."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def spread(values, scale=1.0):
    """Median and quartiles as text."""
    low, middle, high = (value * scale for value in quartiles(values))
    return f"{digits(middle)} ({digits(low)} – {digits(high)})"


def times(triple):
    """Quartiles of a ratio as text."""
    low, middle, high = triple
    return f"{middle:.2f} ({low:.2f} – {high:.2f})"


def judged(value, at_most=None, at_least=None):
    """Whether a figure reaches its goal, as a cell; without a figure or a goal an empty one."""
    if value is None or (at_most is None and at_least is None):
        return ""
    met = value <= at_most if at_most is not None else value >= at_least
    return f"{'≤' if at_most is not None else '≥'} {at_most if at_most is not None else at_least:g}: " + (
        "met" if met else "**not met**"
    )


@dataclass
class Section:
    """What one script found."""

    script: str
    title: str
    text: str = ""
    tables: list = field(default_factory=list)
    pictures: list = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def table(self, title, columns, rows, note=""):
        """Add a table; cells are text."""
        rows = [[str(cell) for cell in row] for row in rows]
        self.tables.append({"title": title, "columns": list(columns), "rows": rows, "note": note})
        print(markdown_table(self.tables[-1]), flush=True)

    def finish(self, out=None, quick=False):
        """Write the data that report.py reads; those of tiny sizes never become the page of docs."""
        data = {key: value for key, value in vars(self).items() if key != "began"}
        data |= {
            "quick": quick,
            "script": Path(self.script).name,
            "seconds": time.perf_counter() - self.began,
            "machine": machine(),
        }
        if out is not None:
            Path(out).mkdir(parents=True, exist_ok=True)
            path = Path(out, Path(self.script).stem + ".json")
            path.write_text(json.dumps(data, indent=1, ensure_ascii=False), "utf-8")
        print(f"\n{data['script']}: {data['seconds']:.0f} s", flush=True)


def markdown_table(table):
    """A table as Markdown."""
    lines = [f"\n### {table['title']}\n"]
    lines += ["| " + " | ".join(cells) + " |" for cells in (table["columns"], ["---"] * len(table["columns"]))]
    lines += ["| " + " | ".join(row) + " |" for row in table["rows"]]
    return "\n".join(lines) + (f"\n\n{table['note']}" if table["note"] else "")


def machine():
    """Processor, cores, memory, versions, and the date."""
    found = {"processor": processor(), "cores": cores(), "system": platform.platform(terse=True)}
    with contextlib.suppress(ValueError, OSError, AttributeError):
        found["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["card"] = torch.cuda.get_device_name()
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    return {**found, "versions": versions, "date": datetime.date.today().isoformat()}


def processor():
    """The processor's name, where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def options(doc, *extra):
    """The command line of a script: --quick, --out, --threads, and what else it takes as (name, settings)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that it runs, not to measure")
    parser.add_argument("--out", type=Path, help="a folder for the data of docs/benchmarks.md")
    parser.add_argument("--threads", type=int, default=min(2, cores()))
    for name, settings in extra:
        parser.add_argument(name, **settings)
    return parser.parse_args()


def child(script, *arguments, environment=None, cpus=None, timeout=600):
    """What a script prints as its last line, JSON, in a process of its own; {"missing": why} where that fails.

    Args:
        script: a file beside this one.
        environment: variables to change; None takes one away.
        cpus: that many processors at most, where the system can say so; threads of libraries follow.
    """
    given = dict(os.environ)
    if cpus is not None:
        given |= {name: str(cpus) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        environment = {"BENCH_CPUS": str(cpus), **(environment or {})}
    for name, value in (environment or {}).items():
        given.pop(name, None) if value is None else given.__setitem__(name, value)
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    try:
        done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"missing": f"not done after {timeout} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines and lines[-1].startswith("{"):
        return json.loads(lines[-1])
    errors = [line.strip() for line in done.stderr.strip().splitlines() if line.strip()]
    print(f"{' '.join(command[1:])}: {' / '.join(errors[-3:])}", file=sys.stderr)
    return {"missing": errors[-1][:120] if errors else f"ended with {done.returncode}"}


def keep_to_cpus():
    """In a child: as few processors as `child` asked for; before anything is imported that counts them."""
    wanted = os.environ.get("BENCH_CPUS")
    if wanted and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(wanted)])


def peak_rss():
    """The most memory that this process has held, MiB."""
    import resource

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / 2**20 if sys.platform == "darwin" else held / 2**10
