"""Official weights: file names, download locations and licenses."""

import huggingface_hub
import pytest

from depth_anything.model.official_weights import (
    find_official_weights,
    name_hints,
    official_license,
    official_repository,
)


class Hub:
    """A fake huggingface_hub with a cache, and a network that may be down."""

    def __init__(self, monkeypatch, *, cached=None, down=None):
        self.cached, self.down, self.asked = cached, down, []
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", self.cache)
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", self.head)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)

    def cache(self, repository, file, *, repo_type):
        return self.cached

    def head(self, url):
        if self.down:
            raise self.down
        self.asked.append(url)

    def download(self, repository, file, *, repo_type):
        return f"cache/{repository}/{repo_type}/{file}"


FILES = [
    (("vits", None, 2), "depth_anything_v2_vits.pth", "depth-anything/Depth-Anything-V2-Small/model"),
    (("vitb", None, 2), "depth_anything_v2_vitb.pth", "depth-anything/Depth-Anything-V2-Base/model"),
    (
        ("vitl", "hypersim", 2),
        "depth_anything_v2_metric_hypersim_vitl.pth",
        "depth-anything/Depth-Anything-V2-Metric-Hypersim-Large/model",
    ),
    (
        ("vits", "vkitti", 2),
        "depth_anything_v2_metric_vkitti_vits.pth",
        "depth-anything/Depth-Anything-V2-Metric-VKITTI-Small/model",
    ),
    (("vitl", None, 1), "depth_anything_vitl14.pth", "LiheYoung/Depth-Anything/space/checkpoints"),
]


@pytest.mark.parametrize(("wanted", "file", "place"), FILES)
@pytest.mark.filterwarnings("ignore:.*no commercial use")
def test_weights_are_found_in_the_folder_or_downloaded(monkeypatch, tmp_path, wanted, file, place):
    encoder, metric, version = wanted
    hub = Hub(monkeypatch)
    found = find_official_weights(encoder, metric=metric, version=version, folder=tmp_path)
    assert found.as_posix() == f"cache/{place}/{file}"
    assert len(hub.asked) == 1 and hub.asked[0].endswith(file)
    (tmp_path / file).touch()
    assert find_official_weights(encoder, metric=metric, version=version, folder=tmp_path) == tmp_path / file
    assert len(hub.asked) == 1


def test_the_cache_is_used_before_the_network(monkeypatch, tmp_path):
    Hub(monkeypatch, cached="elsewhere/depth_anything_v2_vitl.pth", down=OSError("no network"))
    assert find_official_weights("vitl", folder=tmp_path).as_posix() == "elsewhere/depth_anything_v2_vitl.pth"


def test_downloading_non_commercial_weights_warns(monkeypatch, tmp_path):
    Hub(monkeypatch)
    with pytest.warns(UserWarning, match="depth_anything_v2_vitb.pth .*Base .*CC-BY-NC-4.0"):
        find_official_weights("vitb", folder=tmp_path)
    find_official_weights("vits", folder=tmp_path)  # without a warning


def test_a_failed_download_names_file_page_and_license(monkeypatch, tmp_path):
    Hub(monkeypatch, down=OSError("Name or service not known\nand a trace"))
    with pytest.raises(ValueError) as raised:
        find_official_weights("vitl", metric="vkitti", folder=tmp_path / "checkpoints")
    said = str(raised.value)
    assert "\n" not in said and "Name or service not known" in said
    assert str(tmp_path / "checkpoints" / "depth_anything_v2_metric_vkitti_vitl.pth") in said
    assert "https://huggingface.co/depth-anything/Depth-Anything-V2-Metric-VKITTI-Large" in said
    assert "CC-BY-NC-4.0" in said
    with pytest.raises(ValueError, match="https://huggingface.co/spaces/LiheYoung/Depth-Anything "):
        find_official_weights("vits", version=1, folder=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"encoder": "vitg"}, "vitg.*vitl"),
        ({"encoder": "vitn"}, "encoder=vitn; .*vits, vitb, vitl"),
        ({"encoder": "vits", "metric": "kitti"}, "metric=kitti .*hypersim, vkitti"),
        ({"encoder": "vits", "metric": "vkitti", "version": 1}, "version 1 .*vkitti .*version=2"),
        ({"encoder": "vits", "version": 3}, "version=3 "),
    ],
)
def test_unpublished_weights_are_not_requested(monkeypatch, tmp_path, arguments, said):
    hub = Hub(monkeypatch)
    with pytest.raises(ValueError, match=said):
        find_official_weights(**arguments, folder=tmp_path)
    assert not hub.asked


def test_unpublished_weights_are_found_in_the_folder(monkeypatch, tmp_path):
    Hub(monkeypatch)
    (tmp_path / "depth_anything_v2_vitg.pth").touch()
    assert find_official_weights("vitg", folder=tmp_path) == tmp_path / "depth_anything_v2_vitg.pth"


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("depth_anything_v2_vits.pth", "Apache-2.0"),
        ("depth_anything_v2_vitb.pth", "CC-BY-NC-4.0"),
        ("somewhere/depth_anything_v2_vitl (1).pth", "CC-BY-NC-4.0"),
        ("Depth_Anything_V2_ViTG.pth", "CC-BY-NC-4.0"),
        ("depth_anything_v2_metric_hypersim_vits.pth", "Apache-2.0"),
        ("depth_anything_v2_metric_vkitti_vitl.pth", "CC-BY-NC-4.0"),
        ("depth_anything_vitl14.pth", "Apache-2.0"),
        ("depth_anything_vitl.pth", None),
        ("depth_anything_metric_hypersim_vitl14.pth", None),
        ("model.safetensors", None),
    ],
)
def test_license_by_file_name(name, licence):
    assert official_license(name) == licence
    assert name_hints(name).get("licence") == licence


def test_version_and_range_by_file_name():
    assert name_hints("depth_anything_v2_metric_vkitti_vitb.pth") == {
        "version": 2,
        "max_depth": 80.0,
        "licence": "CC-BY-NC-4.0",
    }
    assert name_hints("depth_anything_vits14.pth") == {
        "version": 1,
        "max_depth": None,
        "licence": "Apache-2.0",
    }
    assert name_hints("mine.pth") == {}


def test_hub_repository_by_file_name():
    assert official_repository("x/depth_anything_v2_vitb.pth") == "depth-anything/Depth-Anything-V2-Base"
    metric = "depth_anything_v2_metric_vkitti_vits.pth"
    assert official_repository(metric) == "depth-anything/Depth-Anything-V2-Metric-VKITTI-Small"
    assert official_repository("depth_anything_vitl14.pth") == "LiheYoung/depth_anything_vitl14"
    for name in ("depth_anything_v2_vitg.pth", "dinov2_vits14_pretrain.pth", "model.safetensors"):
        assert official_repository(name) is None
    assert official_license("dinov2_vitg14_reg4_pretrain.pth") == "Apache-2.0"
