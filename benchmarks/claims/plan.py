"""The claims, the networks that each compares, and what the papers report."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

EMBEDDED, REAL = "embedded", "real"
WORLDS = (EMBEDDED, REAL)
"""Where the photographs come from: procedural scenes, or a folder of real ones."""

TEACHER_STEPS, STUDENT_STEPS, PRETRAIN_STEPS = 900, 250, 600
"""Optimizer steps of configs/experiment_by_stage/claims/."""

SECONDS_PER_STEP = {"vitn": 0.32, "vitn_reg4": 0.33, "vitt": 0.55, "vits": 2.0}
"""Seconds of a step of 8 images of 70 px on one of two busy cores (AMD EPYC), for the first estimate of the time."""

HIGHER_IS_BETTER = {"abs_rel": False, "d1": True, "boundary_f1": True}


@dataclass(frozen=True)
class Run:
    """One call of train.py, which depends on a seed and, with `photographs`, on the world.

    Attributes:
        name: Name of its folder below that of the seed (and of the world, with `photographs`).
        experiment: File of configs/experiment/claims/.
        stage: Stage of train.py.
        encoder: Encoder of the network that is trained, or that labels.
        typed: Further overrides.
        needs: Names of the runs that must be finished before.
        photographs: Whether photographs are labeled or trained on, so that each world has a run of its own.
        all_seeds: Whether the seeds share one run, as DINOv2's weights are one for all.
    """

    name: str
    experiment: str
    stage: str
    encoder: str
    typed: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    photographs: bool = False
    all_seeds: bool = False

    @property
    def is_judged(self) -> bool:
        """Whether the run writes a network that predicts depth."""
        return self.stage in ("teacher", "student")


PRETRAIN = Run("pretrain", "baseline", "pretrain", "vitn", photographs=True, all_seeds=True)
"""Makes the encoder of claim (g)."""


@dataclass(frozen=True)
class Comparison:
    """Two runs of which the claim says that the first is better.

    Attributes:
        better: Name of a run.
        worse: Name of a run.
        metric: "abs_rel", "d1" or "boundary_f1".
        tests: World to the name of the test images.
    """

    better: str
    worse: str
    metric: str
    tests: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Claim:
    """A claim of the papers.

    Attributes:
        key: Letter.
        title: Heading.
        text: What the papers say.
        arms: Label of a row to the run that it shows.
        comparisons: What decides.
        paper: What the papers report, as markdown.
        limits: What networks of this size cannot show.
    """

    key: str
    title: str
    text: str
    arms: tuple[tuple[str, str], ...]
    comparisons: tuple[Comparison, ...]
    paper: str
    limits: str


PHOTOGRAPHIC = ((EMBEDDED, "photographic"), (REAL, "real"))
"""Tests of a network's accuracy: unseen procedural photographs, or real RGB-D frames."""
SHARP = ((EMBEDDED, "synthetic"), (REAL, "sharp"))
"""Tests of detail, which needs dense and sharp truth: unseen synthetic scenes, or real frames of structured light."""


def accuracy(better: str, worse: str) -> Comparison:
    """The first run should have the lower AbsRel on photographs."""
    return Comparison(better, worse, "abs_rel", PHOTOGRAPHIC)


def detail(better: str, worse: str) -> Comparison:
    """The first run should have the higher boundary F1."""
    return Comparison(better, worse, "boundary_f1", SHARP)


def list_runs(sizes: Sequence[str], encoder_file: Path | None) -> dict[str, Run]:
    """List all runs of a seed by name.

    Args:
        sizes: Encoders of the students of claim (c).
        encoder_file: Pretrained encoder (vitn) for claim (g); None: a run of stage=pretrain makes one.
    """
    labels = {"needs": ("labeling",), "photographs": True}
    runs = [
        Run("teacher", "baseline", "teacher", "vitt"),
        Run("labeling", "baseline", "pseudolabel", "vitt", needs=("teacher",), photographs=True),
        Run("noisy-labels-vitn", "noisy-labels", "student", "vitn"),
        Run("keep-all-pixels-vitn", "keep-all-pixels", "student", "vitn"),
        Run("small-teacher", "small-teacher", "teacher", "vitn"),
        Run(
            "small-labeling",
            "small-teacher",
            "pseudolabel",
            "vitn",
            needs=("small-teacher",),
            photographs=True,
        ),
        Run(
            "small-teacher-student-vitn",
            "small-teacher",
            "student",
            "vitn",
            needs=("small-labeling",),
            photographs=True,
        ),
        Run("mixed-vitn", "mixed", "student", "vitn", **labels),  # type: ignore[arg-type]
        Run("registers", "registers", "student", "vitn_reg4", **labels),  # type: ignore[arg-type]
        replace(
            Run("baseline-all-pixels-vitn", "baseline", "student", "vitn", **labels),  # type: ignore[arg-type]
            typed=("recipe.trim=0",),
        ),
    ]
    runs += [
        Run(
            f"gradient-weight-{weight}-vitn",
            "gradient-weight",
            "student",
            "vitn",
            typed=(f"recipe.gm_weight={weight}",),
        )
        for weight in (0.5, 1.0, 4.0)
    ]
    for encoder in dict.fromkeys(("vitn", *sizes)):
        runs += [
            Run(f"baseline-{encoder}", "baseline", "student", encoder, **labels),  # type: ignore[arg-type]
            Run(f"synthetic-only-{encoder}", "synthetic-only", "student", encoder),
        ]
    if encoder_file is None:
        runs.append(PRETRAIN)
    for name, weight in (("alignment-vitn", 1.0), ("no-alignment-vitn", 0.0)):
        typed = (f"recipe.alignment_weight={weight}", *([f"init='{encoder_file}'"] if encoder_file else []))
        needs = ("labeling",) if encoder_file else ("labeling", "pretrain")
        runs.append(Run(name, "alignment", "student", "vitn", typed=typed, needs=needs, photographs=True))
    return {run.name: run for run in runs}


def list_claims(sizes: Sequence[str]) -> list[Claim]:
    """List the claims; `sizes` are the encoders of claim (c)."""
    return [
        Claim(
            "a",
            "Synthetic images beat noisy labels for detail",
            "Real labels have holes, mixed pixels at edges and coarse shapes; a network that learns from them is "
            "blurred, and one that learns from exact depth is sharp (V2 §2, §3). Here both learn from the same "
            "images; the depth of one is degraded as sensors do "
            "(`depth_anything/ingest/degrade.py`).",
            (
                ("exact depth", "synthetic-only-vitn"),
                ("degraded depth", "noisy-labels-vitn"),
                ("degraded depth, none dropped", "keep-all-pixels-vitn"),
            ),
            (detail("synthetic-only-vitn", "noisy-labels-vitn"),),
            "V2 shows it in pictures. Table 6, DA-2K accuracy of a network trained on "
            "DIML with its own labels 80.2 %, with pseudo-labels 89.7 %. Appendix B.9: adding 5 % HRWSI images with "
            "real labels visibly spoils the sharpness.",
            "The networks see 10 × 10 patches, so the finest detail that they can learn is several pixels wide. "
            "Sharp real truth exists for a few frames only (Middlebury).",
        ),
        Claim(
            "b",
            "More weight on gradient matching, sharper maps",
            "V2 appendix B.7 raises the weight of the gradient-matching loss from 0.5 (MiDaS) to 4: maps get sharper, "
            "and 2 is a good trade-off. It helps on synthetic images only.",
            (
                ("weight 0.5", "gradient-weight-0.5-vitn"),
                ("weight 1", "gradient-weight-1.0-vitn"),
                ("weight 2 (default)", "synthetic-only-vitn"),
                ("weight 4", "gradient-weight-4.0-vitn"),
            ),
            (
                detail("synthetic-only-vitn", "gradient-weight-0.5-vitn"),
                detail("gradient-weight-4.0-vitn", "gradient-weight-0.5-vitn"),
            ),
            "Appendix B.7: weights from 0.5 to 4.0, sharper with the weight; 2.0 is chosen "
            "(L_ssi : L_gm = 1 : 2, §7.1).",
            "At 70 px an edge is a pixel or two wide in any map.",
        ),
        Claim(
            "c",
            "Pseudo-labeled photographs beat synthetic images for a student",
            "The main claim: a student that learns from a teacher's labels of photographs beats the same student on "
            "synthetic images with exact depth (V2 table 5), more so the smaller the student.",
            (
                ("mean map of synthetic scenes", "mean-map"),
                ("teacher (vitt)", "teacher"),
                *(
                    (f"{label} ({encoder})", f"{name}-{encoder}")
                    for encoder in dict.fromkeys(("vitn", *sizes))
                    for label, name in (
                        ("student on labels", "baseline"),
                        ("student, no labels", "synthetic-only"),
                    )
                ),
            ),
            tuple(
                accuracy(f"baseline-{encoder}", f"synthetic-only-{encoder}")
                for encoder in dict.fromkeys(("vitn", *sizes))
            ),
            "Table 5, AbsRel of synthetic (D^l) and of pseudo-labeled images (D^u):\n\n"
            "| student | KITTI D^l | D^u | NYU D^l | D^u | DIODE D^l | D^u | DA-2K D^l | D^u |\n"
            "|---|---|---|---|---|---|---|---|---|\n"
            "| ViT-S | .104 | .078 | .084 | .053 | .087 | .073 | 89.8 % | 95.3 % |\n"
            "| ViT-B | .094 | .078 | .062 | .049 | .076 | .068 | 92.9 % | 97.0 % |\n"
            "| ViT-L | .081 | .074 | .048 | .045 | .071 | .066 | 96.0 % | 97.1 % |",
            "The paper's teacher starts from DINOv2, which has seen 142 million photographs; this one starts from "
            "random weights or from a few hundred photographs. With 62 million photographs the paper's student also "
            "sees what no synthetic set has; here a few hundred are all there are.",
        ),
        Claim(
            "d",
            "Dropping the 10 % of largest loss helps with noisy labels",
            "The student ignores the 10 % of each image's pixels with the largest loss, which are probably wrong "
            "labels (V2 §5.2; per image, says the author in issue #108).",
            (
                ("degraded depth, 10 % dropped", "noisy-labels-vitn"),
                ("degraded depth, none dropped", "keep-all-pixels-vitn"),
                ("pseudo-labels, 10 % dropped", "baseline-vitn"),
                ("pseudo-labels, none dropped", "baseline-all-pixels-vitn"),
            ),
            (
                accuracy("noisy-labels-vitn", "keep-all-pixels-vitn"),
                accuracy("baseline-vitn", "baseline-all-pixels-vitn"),
            ),
            "§5.2 states it; an ablation is not known to us.",
            "An early network's largest losses are its own mistakes, not the label's; these never get beyond that.",
        ),
        Claim(
            "e",
            "A larger teacher makes a better student",
            "V2 takes the largest DINOv2, ViT-G, as its teacher.",
            (
                ("teacher vitt (2.6 M)", "teacher"),
                ("teacher vitn (0.8 M)", "small-teacher"),
                ("student of vitt", "baseline-vitn"),
                ("student of vitn", "small-teacher-student-vitn"),
            ),
            (accuracy("baseline-vitn", "small-teacher-student-vitn"),),
            "A student of a smaller teacher is not known to us. Networks trained on synthetic images alone "
            "(tables 3 and 5), AbsRel KITTI / NYU / DIODE: S .104 / .084 / .087, B .094 / .062 / .076, "
            "L .081 / .048 / .071, G .075 / .044 / .066.",
            "Between DINOv2-S and DINOv2-G lies a factor of 50 in parameters; here it is 3.",
        ),
        Claim(
            "f",
            "Pseudo-labels alone are at least as good as the mix",
            "Adding synthetic images to the pseudo-labeled ones does not help the student (V2 table 5).",
            (
                ("pseudo-labels only", "baseline-vitn"),
                ("both", "mixed-vitn"),
                ("synthetic images only", "synthetic-only-vitn"),
            ),
            (accuracy("mixed-vitn", "synthetic-only-vitn"), accuracy("baseline-vitn", "mixed-vitn")),
            "Table 5, AbsRel:\n\n"
            "| ViT-S trained on | KITTI | NYU | Sintel | ETH3D | DIODE | DA-2K |\n"
            "|---|---|---|---|---|---|---|\n"
            "| synthetic images | .104 | .084 | .518 | .155 | .087 | 89.8 % |\n"
            "| both | .085 | .054 | .491 | .143 | .074 | 94.1 % |\n"
            "| pseudo-labels | .078 | .053 | .500 | .142 | .073 | 95.3 % |",
            "All students make equally many steps, so the mix sees fewer photographs.",
        ),
        Claim(
            "g",
            "Feature alignment with a frozen encoder helps",
            "V1 keeps the student's features close to those of the frozen encoder that it starts from (§3.3); V2 "
            "keeps that loss.",
            (
                ("pretrained, aligned", "alignment-vitn"),
                ("pretrained, not aligned", "no-alignment-vitn"),
                ("random encoder", "baseline-vitn"),
            ),
            (accuracy("alignment-vitn", "no-alignment-vitn"),),
            "V1 table 9, ViT-L, AbsRel:\n\n"
            "| | KITTI | NYU | Sintel | DDAD | ETH3D | DIODE |\n"
            "|---|---|---|---|---|---|---|\n"
            "| with perturbations | .081 | .048 | .469 | .235 | .134 | .068 |\n"
            "| and feature alignment | .076 | .043 | .458 | .230 | .127 | .066 |",
            "DINOv2's features know what objects are. This encoder is pretrained on a few hundred images for minutes, "
            "by masked autoencoding (docs/pretraining.md), and knows textures and edges at best. One encoder serves "
            "all seeds.",
        ),
        Claim(
            "h",
            "Encoders without registers are better",
            "V2 takes DINOv2 without registers (appendix B.6).",
            (("no registers", "baseline-vitn"), ("4 registers", "registers")),
            (accuracy("baseline-vitn", "registers"),),
            "Table 13, AbsRel on synthetic images alone:\n\n"
            "| encoder | KITTI | NYU | Sintel | ETH3D | DIODE |\n"
            "|---|---|---|---|---|---|\n"
            "| DINOv2-L | .081 | .048 | .516 | .133 | .071 |\n"
            "| DINOv2-L with registers | .078 | .049 | .522 | .138 | .068 |\n"
            "| DINOv2-G | .075 | .044 | .530 | .131 | .066 |\n"
            "| DINOv2-G with registers | .084 | .061 | .753 | .141 | .086 |",
            "Registers mend artifacts that large encoders get in long pretraining. A tiny encoder has none, so equal "
            "results are expected.",
        ),
    ]


def runs_of(claims: Sequence[Claim], runs: dict[str, Run]) -> list[Run]:
    """Return the runs that claims show, and those that they need, in an order that satisfies `needs`."""
    ordered: dict[str, Run] = {}

    def add(name: str) -> None:
        if name in ordered or name not in runs:
            return
        for need in runs[name].needs:
            add(need)
        ordered[name] = runs[name]

    for claim in claims:
        for _, name in claim.arms:
            add(name)
    return list(ordered.values())
