"""The list of clips in a video file, a folder or a list file."""

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from depth_anything.errors import UserError
from depth_anything.inference.clips import AnimatedWebP, Clip, FrameFolder, VideoFile, natural_sort_key
from depth_anything.ingest.find_files import IMAGE_SUFFIXES

VIDEO_SUFFIXES = {
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wmv", ".flv", ".mpg", ".mpeg", ".vob"),
    *(".ts", ".mts", ".m2ts", ".3gp", ".mxf", ".ogv", ".gif"),
}
"""Suffixes of files that are expected to be videos. Other files are tried, too."""

FRAME_SUFFIXES = set(IMAGE_SUFFIXES) - VIDEO_SUFFIXES
"""Suffixes of the frames of a folder."""


def list_clips(
    source: str | Path, *, rate: Fraction = Fraction(24), leave_out: str | Path | None = None
) -> tuple[list[Clip], dict[str, str]]:
    """Find the clips of a video file, a folder or a list.

    A folder is searched recursively. A folder with images and without videos is one clip of frames. A list is a .txt
    file with one path per line, relative to the list, of a video or a folder of frames.

    Args:
        source: The file, folder or list.
        rate: Frames per second of folders of frames.
        leave_out: A folder that is not searched: the output folder.

    Returns:
        The clips in natural order of their names, and each skipped file with the reason.

    Raises:
        ValueError: `source` does not exist or has no clip.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(
            f"{source} does not exist", "give a video, a folder of videos or of frames, or a list"
        )
    search = _ClipSearch(rate)
    if path.is_dir():
        search.add_tree(path, Path(leave_out).resolve() if leave_out else None)
    elif path.suffix.lower() == ".txt":
        for line in path.read_text(encoding="utf-8-sig").splitlines():
            if line.strip():
                search.add_path(line.strip(), path.parent / line.strip())
    else:
        search.add_if_readable(path.name, lambda: _open_clip(path.name, path))
    if not search.clips:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(search.skipped.items())[:3])
        raise ValueError(f"no video in {source} ({reasons or 'it is empty'})")
    return sorted(search.clips, key=lambda clip: natural_sort_key(clip.name)), search.skipped


class _ClipSearch:
    """Collects the clips of a folder or list, and the reasons why files are skipped."""

    def __init__(self, rate: Fraction) -> None:
        self.clips: list[Clip] = []
        self.skipped: dict[str, str] = {}
        self._rate = rate

    def add_tree(self, root: Path, leave_out: Path | None) -> None:
        for here, folders, files in os.walk(root):
            folder = Path(here)
            folders[:] = [
                name for name in folders if leave_out is None or (folder / name).resolve() != leave_out
            ]
            images = [name for name in files if Path(name).suffix.lower() in FRAME_SUFFIXES]
            videos_before = len(self.clips)
            for name in sorted(set(files) - set(images)):
                self.add_path((folder / name).relative_to(root).as_posix(), folder / name)
            if images and len(self.clips) == videos_before:
                is_root = folder == root
                name = folder.resolve().name if is_root else folder.relative_to(root).as_posix()
                self._add_frames(name, folder, images)
            else:
                for name in images:
                    self.skipped[(folder / name).relative_to(root).as_posix()] = "a picture next to a video"

    def add_path(self, name: str, path: Path) -> None:
        if not path.is_dir():
            self.add_if_readable(name, lambda: _open_clip(name, path))
            return
        images = [file.name for file in path.iterdir() if file.suffix.lower() in FRAME_SUFFIXES]
        if images:
            self._add_frames(name, path, images)
        else:
            self.skipped[name] = "a folder without frames"

    def _add_frames(self, name: str, folder: Path, images: list[str]) -> None:
        self.add_if_readable(name, lambda: FrameFolder(name, folder, images, rate=self._rate))

    def add_if_readable(self, name: str, open_clip: Callable[[], Clip]) -> None:
        try:
            self.clips.append(open_clip())
        except OSError as error:
            self.skipped[name] = error.strerror or str(error)
        except (ValueError, MemoryError) as error:
            self.skipped[name] = str(error) or "it takes more memory than there is"


def _open_clip(name: str, path: Path) -> Clip:
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(12)
        if head[:4] == b"RIFF" and head[8:] == b"WEBP":
            return AnimatedWebP(name, path)
    return VideoFile(name, path)
