"""Write what the runs have shown: claims.json, claims.md, and on request docs/claims.md with its pictures."""

import argparse
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims.__main__ import figures_file
from benchmarks.claims.figures import read_figures
from benchmarks.claims.plan import EMBEDDED, HIGHER_IS_BETTER, REAL, Claim, Comparison, Run
from benchmarks.claims.verdict import NOISE, RULE, combine, compare, spread
from depth_anything.disk import atomic_write

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = (
    ("photographic", "abs_rel", "scenes: AbsRel ↓"),
    ("photographic", "boundary_f1", "scenes: F1 ↑"),
    ("synthetic", "abs_rel", "synthetic: AbsRel ↓"),
    ("synthetic", "boundary_f1", "synthetic: F1 ↑"),
    ("real", "abs_rel", "real: AbsRel ↓"),
    ("sharp", "boundary_f1", "real: F1 ↑"),
)
"""Test, metric and heading of the columns of each table."""
SET_ROWS = {
    "mean-map": "mean map",
    "teacher": "teacher",
    "baseline-vitn": "student on labels",
    "synthetic-only-vitn": "student on synthetic images",
}
"""Runs of the table of real sets."""
WORLD_TITLES = {EMBEDDED: "procedural scenes", REAL: "real photographs"}


class Figures:
    """The figures of all networks, read once."""

    def __init__(self, output: Path, runs: dict[str, Run], seeds: Sequence[int]) -> None:
        """Read nothing yet."""
        self.output, self.runs, self.seeds = output, runs, seeds
        self._files: dict[Path, list[dict[str, Any]]] = {}

    def sets(self, run: str, seed: int, test: str) -> list[dict[str, Any]]:
        """Return the rows of a test's sets for a network; real tests of a run on photographs are of its real twin."""
        world = REAL if test in ("real", "sharp") else EMBEDDED
        path = figures_file(run, seed, world, self.output, self.runs)
        if path not in self._files:
            self._files[path] = read_figures(path)
        return [row for row in self._files[path] if row["test"] == test]

    def value(self, run: str, seed: int, test: str, metric: str) -> float | None:
        """Return the mean over the sets of a test; None if the network was not judged on it."""
        rows = self.sets(run, seed, test)
        values = [row[metric] for row in rows if metric in row]
        return statistics.mean(values) if values and all(map(math.isfinite, values)) else None

    def values(self, run: str, test: str, metric: str) -> dict[int, float]:
        """Return the figure of each seed that has one."""
        found = {seed: self.value(run, seed, test, metric) for seed in self.seeds}
        return {seed: value for seed, value in found.items() if value is not None}


def compare_runs(comparison: Comparison, world: str, figures: Figures) -> dict[str, Any] | None:
    """Compare two runs in a world; None if no seed has both."""
    test, metric = dict(comparison.tests)[world], comparison.metric
    better, worse = (figures.values(run, test, metric) for run in (comparison.better, comparison.worse))
    seeds = [seed for seed in better if seed in worse]
    if not seeds:
        return None
    values = [[side[seed] for seed in seeds] for side in (better, worse)]
    verdict = compare(*values, higher_is_better=HIGHER_IS_BETTER[metric])
    return {
        "better": comparison.better,
        "worse": comparison.worse,
        "metric": metric,
        "test": test,
        "world": world,
        "seeds": seeds,
        "better_values": values[0],
        "worse_values": values[1],
        "margin": verdict.margin,
        "noise": verdict.noise,
        "differences": verdict.differences,
        "verdict": verdict.word,
    }


def summarize_claim(claim: Claim, figures: Figures) -> dict[str, Any]:
    """Collect the figures, comparisons and verdicts of a claim."""
    arms = []
    for label, run in claim.arms:
        cells = {
            f"{test} {metric}": list(figures.values(run, test, metric).values())
            for test, metric, _ in COLUMNS
        }
        arms.append({"label": label, "run": run, "figures": {key: row for key, row in cells.items() if row}})
    compared = [compare_runs(one, world, figures) for world in WORLD_TITLES for one in claim.comparisons]
    comparisons = [row for row in compared if row is not None]
    verdicts = {
        world: combine([row["verdict"] for row in comparisons if row["world"] == world])
        for world in WORLD_TITLES
    }
    return {
        "key": claim.key,
        "title": claim.title,
        "verdicts": verdicts,
        "arms": [arm for arm in arms if arm["figures"]],
        "comparisons": comparisons,
    }


def format_number(value: float) -> str:
    """Format a figure as papers do, without the zero before the point."""
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def format_spread(values: Sequence[float]) -> str:
    """Format the mean and standard deviation of seeds."""
    mean = format_number(statistics.mean(values))
    return f"{mean} ± {format_number(spread(values))}" if len(values) > 1 else mean


def arms_table(summary: dict[str, Any]) -> list[str]:
    """Return the lines of the table of a claim: a row per network."""
    shown = [
        (f"{test} {metric}", title)
        for test, metric, title in COLUMNS
        if any(f"{test} {metric}" in arm["figures"] for arm in summary["arms"])
    ]
    lines = [f"| | {' | '.join(title for _, title in shown)} |", "|---" * (len(shown) + 1) + "|"]
    for arm in summary["arms"]:
        cells = [format_spread(arm["figures"][key]) if key in arm["figures"] else "" for key, _ in shown]
        lines.append(f"| {arm['label']} | {' | '.join(cells)} |")
    return lines


def comparison_lines(summary: dict[str, Any]) -> list[str]:
    """Return a list item per comparison: difference, noise, seeds and verdict."""
    labels = {arm["run"]: arm["label"] for arm in summary["arms"]}
    lines = []
    for row in summary["comparisons"]:
        metric = {"abs_rel": "AbsRel", "boundary_f1": "boundary F1", "d1": "δ1"}[row["metric"]]
        seeds = ", ".join(("+" if d > 0 else "") + format_number(d) for d in row["differences"])
        text = (
            f"{WORLD_TITLES[row['world']]}: *{labels.get(row['better'], row['better'])}* against "
            f"*{labels.get(row['worse'], row['worse'])}*, {metric} better by {format_number(row['margin'])} "
            f"(noise {format_number(row['noise'])}; seeds {seeds}): **{row['verdict']}**"
        )
        lines += textwrap.wrap(text, 116, initial_indent="- ", subsequent_indent="  ", break_long_words=False)
    return lines


def wrap(text: str) -> str:
    """Wrap the paragraphs of a text that are not tables."""
    parts = [part if part.startswith("|") else textwrap.fill(part, 118, break_on_hyphens=False, break_long_words=False)
             for part in text.split("\n\n")]  # fmt: skip
    return "\n\n".join(parts)


def claim_section(claim: Claim, summary: dict[str, Any], *, picture: str | None) -> str:
    """Write the section of a claim."""
    words = ", ".join(
        f"{summary['verdicts'][world]} on {title}"
        for world, title in WORLD_TITLES.items()
        if summary["verdicts"][world] != "not measured"
    )
    parts = [f"## ({claim.key}) {claim.title}", wrap(claim.text), f"**Verdict: {words or 'not measured'}.**"]
    if summary["arms"]:
        parts.append("\n".join(arms_table(summary)))
    if summary["comparisons"]:
        parts.append("\n".join(comparison_lines(summary)))
    if picture:
        parts.append(f"![Unseen scenes: image, truth, and the networks of the table]({picture})")
    parts += [wrap("The paper. " + claim.paper), wrap("What this cannot show. " + claim.limits)]
    return "\n\n".join(parts)


def verdict_table(claims: Sequence[Claim], summaries: Sequence[dict[str, Any]]) -> str:
    """Write the table of all verdicts."""
    lines = ["| Claim | procedural scenes | real photographs |", "|---|---|---|"]
    for claim, summary in zip(claims, summaries, strict=True):
        words = " | ".join(summary["verdicts"][world] for world in WORLD_TITLES)
        lines.append(f"| ({claim.key}) {claim.title} | {words} |")
    return "\n".join(lines)


def sets_table(figures: Figures) -> tuple[str, dict[str, dict[str, list[float]]]]:
    """Write the AbsRel of the main networks on each judged real set; also return the figures by set and run."""
    table: dict[str, dict[str, list[float]]] = {}
    counts: dict[str, int] = {}
    for run in SET_ROWS:
        for seed in figures.seeds if run != "mean-map" else figures.seeds[:1]:
            for row in figures.sets(run, seed, "real"):
                table.setdefault(row["set"], {}).setdefault(run, []).append(row["abs_rel"])
                counts[row["set"]] = row["images"]
    if not table:
        return "", {}
    shown = [run for run in SET_ROWS if any(run in row for row in table.values())]
    lines = [
        f"| set | frames | {' | '.join(SET_ROWS[run] for run in shown)} |",
        "|---" * (len(shown) + 2) + "|",
    ]

    def cells(row: dict[str, list[float]]) -> str:
        means = {run: statistics.mean(row[run]) for run in shown if run in row}
        best = min(means.values())
        texts = [
            "" if run not in means else f"**{format_number(means[run])}**" if means[run] == best
            else format_number(means[run])
            for run in shown
        ]  # fmt: skip
        return " | ".join(texts)

    for name in sorted(table):
        lines.append(f"| {name} | {counts[name]} | {cells(table[name])} |")
    means = {
        run: [statistics.mean(statistics.mean(row[run]) for row in table.values() if run in row)]
        for run in shown
    }
    lines.append(f"| mean over sets | {sum(counts.values())} | {cells(means)} |")
    return "\n".join(lines), table


def write_results(
    options: argparse.Namespace, claims: Sequence[Claim], runs: dict[str, Run], *, minutes: float
) -> str:
    """Write claims.json and claims.md into the output folder; with --publish also docs/ and benchmarks/results/.

    Returns:
        The table of verdicts.
    """
    figures = Figures(options.output, runs, options.seeds)
    summaries = [summarize_claim(claim, figures) for claim in claims]
    sets_text, sets = sets_table(figures)
    mean_map = figures.value("mean-map", options.seeds[0], "real", "abs_rel")
    facts = {
        "command": _typed_command(sys.argv[1:]),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "minutes": round(minutes, 1),
        "seeds": options.seeds,
        "teacher_steps": options.teacher_steps,
        "student_steps": options.student_steps,
        "jobs": options.jobs,
        "rule": RULE,
    }
    content = {**facts, "claims": summaries, "real_sets": sets, "real_mean_map": mean_map}
    body = [
        wrap(
            f"Mean ± standard deviation over seeds {', '.join(map(str, options.seeds))}; {options.teacher_steps} steps "
            f"of a teacher, {options.student_steps} of a student; the last call of the command took {minutes:.0f} "
            f"minutes ({facts['machine']}, {facts['date']}, commit {facts['commit']})."
        ),
        verdict_table(claims, summaries),
        wrap(RULE),
    ]
    sections = [claim_section(c, s, picture=None) for c, s in zip(claims, summaries, strict=True)]
    tail = ["## Real frames, set by set", _sets_sentence(options), sets_text] if sets_text else []
    text = "\n\n".join(["# Claims", *body, *sections, *tail]) + "\n"
    atomic_write(options.output / "claims.json", json.dumps(content, indent=1).encode())
    atomic_write(options.output / "claims.md", text.encode())
    if options.publish:
        publish(options, claims, summaries, body=body, tail=tail, content=content)
    return verdict_table(claims, summaries) + f"\n\nresults: {options.output / 'claims.md'}"


def publish(
    options: argparse.Namespace,
    claims: Sequence[Claim],
    summaries: Sequence[dict[str, Any]],
    *,
    body: Sequence[str],
    tail: Sequence[str],
    content: dict[str, Any],
) -> None:
    """Write docs/claims.md, its pictures of procedural scenes, and benchmarks/results/claims_NAME.json and .md.

    Pictures of real photographs are never copied: their licenses may not allow it.
    """
    docs, results = ROOT / "docs", ROOT / "benchmarks" / "results"
    name = f"claims_{options.publish}"
    sections = []
    for claim, summary in zip(claims, summaries, strict=True):
        picture, target = (
            options.output / f"claim-{claim.key}-{EMBEDDED}.jpg",
            f"pictures/claim-{claim.key}.jpg",
        )
        if picture.is_file():
            shutil.copyfile(picture, docs / target)
        sections.append(claim_section(claim, summary, picture=target if (docs / target).is_file() else None))
    intro = (Path(__file__).parent / "introduction.md").read_text(encoding="utf-8").strip()
    earlier = (Path(__file__).parent / "earlier.md").read_text(encoding="utf-8").strip()
    figures = f"[All figures](../benchmarks/results/{name}.json), by seed and by set."
    page = "\n\n".join([intro, "## Results", *body, figures, *sections, *tail, earlier]) + "\n"
    atomic_write(docs / "claims.md", page.encode())
    atomic_write(results / f"{name}.json", (json.dumps(content, indent=1) + "\n").encode())
    plain = [claim_section(c, s, picture=None) for c, s in zip(claims, summaries, strict=True)]
    title = f"# The papers' claims with tiny networks: {content['machine']}, {content['date']}"
    command = f"`{content['command']}`. The page with pictures is [docs/claims.md](../../docs/claims.md)."
    text = "\n\n".join([title, wrap(command), *body, *plain, *tail]) + "\n"
    atomic_write(results / f"{name}.md", text.encode())


def _sets_sentence(options: argparse.Namespace) -> str:
    return wrap(
        "AbsRel, mean over seeds, on the sets that were reserved for judging. No network was trained or tuned on them. "
        "The mean map is the mean disparity of the synthetic training scenes, which ignores the picture; it is fitted "
        "to each frame as the others are."
    )


def _typed_command(words: Sequence[str]) -> str:
    """Return the command as others would type it: without folders of this machine."""
    return shlex.join(
        ["python", "-m", "benchmarks.claims", *("DIR" if word[0:1] == "/" else word for word in words)]
    )


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


__all__ = ["NOISE", "Figures", "publish", "write_results"]
