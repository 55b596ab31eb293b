"""Model cards: README.md files for the Hugging Face hub, with summary, usage, provenance and license of a model."""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from depth_anything.disk import atomic_write
from depth_anything.licenses import card_license_fields
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.encoder import ENCODERS
from depth_anything.model.masked_autoencoder import MaskedAutoencoder
from depth_anything.model.metadata import printable_line

CARD_NAME = "README.md"
_FOOTER = re.compile(
    r"\n<!-- depth-anything wrote this card of (.+), sha256 (\w{64}); once edited, it stays -->\n?$"
)


def build_card(
    model: DepthAnything, *, file: str, form: str, title: str, measured: Mapping[str, str] | None = None
) -> str:
    """Build the card of a saved model.

    Args:
        model: The model.
        file: Name of its file or folder.
        form: Its format: "safetensors", "transformers", "official", "onnx" or "torch".
        title: Title of the card.
        measured: Heading to text or table, for sections with results.

    Returns:
        Markdown with YAML front matter.
    """
    front = _front_matter(model, form).to_yaml(line_break="\n")
    lines = ["---", front.rstrip("\n"), "---", "", f"# {_escape_markdown(title)}", "", *_summary(model), ""]
    lines += ["## How to use it", "", *_usage(model, file, form), ""]
    lines += ["## Where it comes from", "", *_provenance(model), ""]
    for heading, text in (measured or {}).items():
        lines += [f"## {heading}", "", text, ""]
    return _with_footer(lines, file)


def build_encoder_card(model: MaskedAutoencoder, *, file: str, title: str) -> str:
    """Build the card of an encoder that stage=pretrain has trained; arguments and result as `build_card`."""
    base = (model.origin.get("start") or {}).get("base")
    front = ModelCardData(
        **card_license_fields(model.licence),
        library_name="depth-anything",
        pipeline_tag="image-feature-extraction",
        tags=["depth-anything", "masked-autoencoder", "vit"],
        base_model=printable_line(base) if base else None,
    )
    parameters = sum(p.numel() for p in model.pretrained.parameters())
    lines = [
        "---",
        front.to_yaml(line_break="\n").rstrip("\n"),
        "---",
        "",
        f"# {_escape_markdown(title)}",
        "",
    ]
    lines += [
        f"An image encoder ({_markdown_code(model.encoder)}, {parameters:,} parameters) trained by masked autoencoding "
        "(arXiv 2111.06377) on images without labels. It predicts no depth.",
        "",
        f"Input: RGB, ImageNet-normalized; it was trained on crops of {model.input_size} px with patches of "
        f"{model.patch_size} px.",
        "",
        "## How to use it",
        "",
        "```sh",
        f"python train.py stage=teacher encoder={model.encoder} init=path/to/{shlex.quote(file)}",
        "```",
        "",
        "## Where it comes from",
        "",
        *_provenance(model),
    ]
    return _with_footer(lines, file)


def _with_footer(lines: list[str], file: str) -> str:
    body = "\n".join(lines).rstrip() + "\n"
    digest = hashlib.sha256(body.encode()).hexdigest()
    return (
        f"{body}\n<!-- depth-anything wrote this card of {file}, sha256 {digest}; once edited, it stays -->\n"
    )


def write_card(text: str, folder: Path, *, file: str) -> Path | None:
    """Write a card to a folder: README.md, or FILE.md if README.md is the card of another file.

    Args:
        text: Result of `build_card`.
        folder: Folder of the model.
        file: The `file` of `build_card`.

    Returns:
        The card's path; None if a user has edited the card, which is then kept.
    """
    path = folder / CARD_NAME
    if (other := _generated_for(path)) is not None and other != file:
        path = folder / f"{file}.md"
    if not is_replaceable_card(path):
        return None
    atomic_write(path, text.encode())
    return path


def is_replaceable_card(path: Path) -> bool:
    """Return whether a card may be written to `path`: there is none, or an unedited one of `build_card`."""
    return not path.exists() or _generated_for(path) is not None


def _generated_for(path: Path) -> str | None:
    """Return the file that the card at `path` was generated for; None if it was edited or written by others."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    mark = _FOOTER.search(text)
    if mark is None or hashlib.sha256(text[: mark.start()].encode()).hexdigest() != mark[2]:
        return None
    return mark[1]


def _front_matter(model: DepthAnything, form: str) -> ModelCardData:
    tags = ["depth-anything", "relative-depth" if model.quantity == "disparity" else "metric-depth"]
    tags += ["dinov2"] if model.encoder in ENCODERS else ["vit"]
    tags += {"onnx": ["onnx"], "torch": ["torch-export"]}.get(form, [])
    base = (model.origin.get("start") or {}).get("base")
    return ModelCardData(
        **card_license_fields(model.licence),
        library_name={"transformers": "transformers", "onnx": "onnx"}.get(form, "depth-anything"),
        pipeline_tag="depth-estimation",
        tags=tags,
        base_model=printable_line(base) if base else None,
    )


def _escape_markdown(text: object) -> str:
    """Escape untrusted text for Markdown, on one line."""
    return re.sub(r"([\\`|*<>\[\]#])", r"\\\1", printable_line(text))


def _markdown_code(text: object) -> str:
    """Format untrusted text as Markdown code, also for table cells."""
    return f"`{printable_line(text).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def _summary(model: DepthAnything) -> list[str]:
    head = _markdown_code(model.head) if model.head else "DPT head"
    parameters = sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)
    if model.max_depth is not None:
        output = f"**Output: depth in meters**, 0 to {model.max_depth:g}; larger is farther."
    else:
        output = (
            "**Output: disparity** (inverse depth) up to an unknown scale and shift, 0 or more; larger is nearer. "
            "It is not in meters and not comparable between images."
        )
    if model.calibration is not None:
        scale, shift = model.calibration
        output += (
            f" It is calibrated: 1 / ({scale:.6g} · output + {shift:.6g}) is depth in meters, which `Predictor` and "
            "exported programs return."
        )
    return [
        "Depth from a single image: the network of Depth Anything "
        f"(encoder {_markdown_code(model.encoder)}, taps {', '.join(map(str, model.taps))}, {head}; "
        f"{parameters:,} parameters).",
        "",
        output,
        "",
        f"Input: RGB, ImageNet-normalized, short side {model.input_size} px, sides multiples of {model.multiple}.",
    ]


def _usage(model: DepthAnything, file: str, form: str) -> list[str]:
    name, typed_name = json.dumps(file, ensure_ascii=False), shlex.quote(file)
    # The official format has tensors only, so the caller must pass the rest.
    depth = f", max_depth={model.max_depth:g}" if form == "official" and model.max_depth else ""
    size = f", input_size={model.input_size}" if form == "official" else ""
    flags = f" --input-size {model.input_size}" if form == "official" else ""
    flags += f" --max-depth {model.max_depth:g}" if depth else ""
    ours = [
        "```python",
        "import cv2",
        "from depth_anything import Predictor, load_model",
        "",
        f"predictor = Predictor(load_model({name}{depth}){size})  # resizes images to {model.input_size} px",
        'image = cv2.cvtColor(cv2.imread("photo.jpg"), cv2.COLOR_BGR2RGB)',
        "depth = predictor.predict(image)  # float32 (H, W)",
        "```",
    ]
    typed = ["```sh", f"depth-anything predict photo.jpg --weights {typed_name}{flags} --output maps", "```"]
    theirs = [
        "```python",
        "from transformers import pipeline",
        "",
        f'depth = pipeline("depth-estimation", model={name})("photo.jpg")["predicted_depth"]',
        "```",
    ]
    official = [
        "```python",
        "import torch",
        "from depth_anything_v2.dpt import DepthAnythingV2  # the official code",
        "",
        f"model = DepthAnythingV2({_official_arguments(model)})",
        f'model.load_state_dict(torch.load({name}, map_location="cpu"))',
        "```",
    ]
    if form in ("onnx", "torch"):
        return _program_usage(model, name, form)
    ways = {"transformers": [theirs, ours, typed], "official": [official, ours, typed]}.get(
        form, [ours, typed]
    )
    lines = [line for way in ways for line in (*way, "")]
    if form == "safetensors":
        lines += [
            "For transformers, ONNX Runtime or the authors' code:",
            "",
            "```sh",
            f"depth-anything export --weights {typed_name} --to transformers --output folder",
            "```",
            "",
        ]
    return lines[:-1]


def _program_usage(model: DepthAnything, name: str, form: str) -> list[str]:
    opened = {
        "onnx": [
            "import onnxruntime",
            "",
            f"session = onnxruntime.InferenceSession({name})",
            "metadata = session.get_modelmeta().custom_metadata_map",
            'program = lambda image: session.run(None, {"image": image})[0]',
        ],
        "torch": [
            "import json",
            "import torch",
            "",
            'files = {"metadata.json": ""}',
            f"module = torch.export.load({name}, extra_files=files).module()",
            'metadata = json.loads(files["metadata.json"])',
            "program = lambda image: module(torch.from_numpy(image))",
        ],
    }
    return [
        "```python",
        "import cv2",
        *opened[form],
        "",
        "from depth_anything.preprocess import preprocess_image  # or your own code, with the same sizes",
        "",
        'photo = cv2.cvtColor(cv2.imread("photo.jpg"), cv2.COLOR_BGR2RGB)',
        'image = preprocess_image(photo, int(metadata["input_size"]), int(metadata["multiple"]))',
        "output = program(image[None])  # float32 (B, 3, H, W) to (B, H, W)",
        "```",
        "",
        f"It was trained with a short side of {model.input_size} px and sides that are multiples of {model.multiple}. "
        f"It runs with any batch size and any sides of three or more patches of {model.patch_size} px.",
    ]


def _official_arguments(model: DepthAnything) -> str:
    spec = ENCODERS.get(model.encoder)
    if spec is None:
        return f'encoder="{model.encoder}"'
    limit = f", max_depth={model.max_depth:g}" if model.max_depth else ""
    return (
        f'encoder="{model.encoder}", features={spec.features}, out_channels={list(spec.out_channels)}{limit}'
    )


def _provenance(model: DepthAnything | MaskedAutoencoder) -> list[str]:
    origin = model.origin
    lines = [f"License of the weights: **{_escape_markdown(model.licence or 'unknown')}**."]
    if origin.get("start"):
        start = origin["start"]
        verb = "Started from" if origin.get("stage") else "These are the weights of"
        lines += [
            "",
            f"{verb} {_markdown_code(start['from'])} (license: {_escape_markdown(start.get('licence') or 'unknown')}).",
        ]
    elif origin.get("stage"):
        lines += ["", "Started from random weights."]
    if origin.get("stage"):
        lora = f" lora={origin['lora']}" if origin.get("lora") else ""
        command = f"train.py stage={origin['stage']}{lora}"
        lines += [
            "",
            f"Trained by {_markdown_code(command)} on:",
            "",
            *_data_table(origin.get("data", []), origin["stage"]),
        ]
    elif not origin.get("start"):
        lines += ["", "Its file does not say how it was trained."]
    return lines


def _data_table(data: list[dict[str, Any]], stage: str) -> list[str]:
    if stage == "pretrain":
        rows = ["| set | records | license |", "|---|---|---|"]
        for row in data:
            set_license = _escape_markdown(row.get("licence") or "unknown")
            rows.append(f"| {_escape_markdown(row['set'])} | {row['records']:,} | {set_license} |")
        return rows
    rows = ["| set | records | license | labeled by | license of the labels |", "|---|---|---|---|---|"]
    for row in data:
        teacher = row.get("teacher")
        labeled = _markdown_code(teacher["file"]) if teacher else "ground truth"
        licence = _escape_markdown(teacher.get("licence") or "unknown") if teacher else "–"
        set_license = _escape_markdown(row.get("licence") or "unknown")
        rows.append(
            f"| {_escape_markdown(row['set'])} | {row['records']:,} | {set_license} | {labeled} | {licence} |"
        )
    return rows
