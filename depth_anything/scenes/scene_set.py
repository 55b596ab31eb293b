"""What a set of procedural scenes holds: the settings that a config, a command or a test gives to `write_scenes`."""

from dataclasses import dataclass

from depth_anything.errors import UserError

LOOKS = ("synthetic", "photographic")
LAYOUTS = ("classic", "varied")


@dataclass(frozen=True, kw_only=True)
class SceneSetSpec:
    """Everything that determines the scenes of a set. Scene i has the seed `seed * 10_000_000 + i`.

    Attributes:
        look: "synthetic" or "photographic", as for `render_scene`.
        count: Number of scenes, up to 10 million.
        seed: Seed of the set.
        height: Height of the images in pixels.
        width: Width of the images in pixels.
        labelled: Write depth; False writes images only.
        layout: "classic" or "varied", as for `render_scene`.
        classes: Also write class maps, of `SCENE_CLASSES`; images and depth are the same as without.
        captioned: Write a caption of each scene.
        fov: Lowest and highest horizontal field of view, degrees, as for `render_scene`.
        degraded: Write the depth of a poor sensor (`ingest.degrade`) in place of exact depth.
    """

    look: str
    count: int
    seed: int
    height: int
    width: int
    labelled: bool = True
    layout: str = "classic"
    classes: bool = False
    captioned: bool = False
    fov: tuple[float, float] | None = None
    degraded: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: The look or the layout is unknown, there is no scene, or a field of view is out of range.
        """
        for name, value, known in (("look", self.look, LOOKS), ("layout", self.layout, LAYOUTS)):
            if value not in known:
                raise UserError(f'{name}="{value}" is unknown', f"use {' or '.join(known)}")
        if self.count < 1:
            raise UserError(f"count={self.count} must be at least 1")
        if self.fov is not None and not 1 <= self.fov[0] <= self.fov[1] <= 179:
            raise UserError(
                f"fov={self.fov[0]:g} {self.fov[1]:g} must rise, from 1 to 179 degrees",
                "give for example 40 80",
            )
