"""Segmentation networks: their heads learn, files keep them exactly, and an encoder moves between kinds unchanged."""

import json

import pytest
import torch
from made_segmentation import CLASSES, HEAD_OPTIONS
from safetensors.torch import load_file

from depth_anything.errors import UserError
from depth_anything.model.depth_anything import DepthAnything
from depth_anything.model.mask_heads import MaskPrediction, mask_loss, pixel_scores
from depth_anything.model.segmentation import HEADS, MASK_HEADS, SegmentationModel, WindowRule
from depth_anything.model.segmentation_files import is_segmentation_file, load_segmentation
from depth_anything.model.segmentation_heads import pixel_loss
from depth_anything.model.weights import load_encoder, load_model, save_model


def build(head, **changes):
    if head in MASK_HEADS:
        pytest.importorskip("transformers")
        pytest.importorskip("scipy")
    torch.manual_seed(0)
    return SegmentationModel("vitn", classes=CLASSES, head=head, head_options=HEAD_OPTIONS[head], **changes)


def batch(seed=0):
    draw = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 3, 28, 42, generator=draw)
    target = torch.randint(0, 3, (2, 28, 42), generator=draw).to(torch.uint8)
    target[0, :9] = 255
    return image, target


@pytest.mark.parametrize("head", HEADS)
def test_every_head_scores_trains_and_survives_its_file(head, tmp_path):
    model = build(head)
    model.input_size, model.window, model.licence = 42, WindowRule(84, 28), "CC0-1.0"
    image, target = batch()
    losses = model.losses(image, target, [4, 9])
    losses["loss"].backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused and torch.isfinite(losses["loss"])
    for parameter in model.parameters():
        assert torch.isfinite(parameter).all()
    state = torch.get_rng_state()
    again = model.losses(image, target, [4, 9])
    assert (
        torch.equal(again["loss"], losses["loss"]) or head == "linear"
    )  # whose statistics are not used in training
    assert torch.equal(torch.get_rng_state(), state)  # the loss draws nothing from the global generator
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_segmentation(tmp_path / "model.safetensors")
    assert (loaded.head, loaded.input_size, loaded.window, loaded.licence) == (
        head,
        42,
        WindowRule(84, 28),
        "CC0-1.0",
    )
    assert loaded.classes == CLASSES and loaded.taps == model.taps
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with torch.no_grad():
        scores = loaded(image)
        assert torch.equal(scores, model.eval()(image))
    assert scores.shape == (2, 3, 28, 42) and (scores >= 0).all()


@pytest.mark.parametrize("head", ["dpt", "mask2former", "eomt"])
def test_the_loss_does_not_depend_on_how_a_batch_is_divided(head):
    model = build(head)
    image, target = batch()
    with torch.no_grad():
        whole = model.losses(image, target, [4, 9])["loss"]
        parts = [model.losses(image[n : n + 1], target[n : n + 1], [[4, 9][n]])["loss"] for n in range(2)]
    torch.testing.assert_close(whole, torch.stack(parts).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["dpt", "mask2former", "eomt"])
def test_an_image_of_ignored_pixels_only_adds_nothing(head):
    model = build(head)
    image, target = batch()
    target[1] = 255
    loss = model.losses(image, target, [0, 1])["loss"]
    alone = model.losses(image[:1], target[:1], [0])["loss"]
    torch.testing.assert_close(loss, alone / 2, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_pixel_loss_by_hand():
    logits = torch.zeros(2, 3, 1, 2)
    logits[0, 1, 0, 0] = 2.0
    target = torch.tensor([[[1, 255]], [[0, 2]]], dtype=torch.uint8)
    first = -torch.log_softmax(torch.tensor([0.0, 2.0, 0.0]), 0)[1]
    expected = (first + torch.log(torch.tensor(3.0))) / 2
    torch.testing.assert_close(pixel_loss(logits, target), expected)


def test_pixel_scores_add_the_class_probabilities_of_the_masks_at_a_pixel():
    classes = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 1.0, 3.0]]])  # two queries; the last logit is "no object"
    masks = torch.tensor([[[[4.0]], [[-1.0]]]])
    expected = torch.zeros(2)
    for query in range(2):
        expected += classes[0, query].softmax(0)[:2] * masks[0, query, 0, 0].sigmoid()
    torch.testing.assert_close(pixel_scores(MaskPrediction(classes, masks), (1, 1))[0, :, 0, 0], expected)


@pytest.mark.parametrize("head", MASK_HEADS)
def test_the_loss_of_masks_is_the_weighted_sum_of_its_parts(head):
    image, target = batch()
    losses = build(head).losses(image, target, [4, 9])
    expected = (
        2 * losses["classes"] + 5 * losses["masks"] + 5 * losses["dice"]
    )  # arXiv 2112.01527, section 4.1
    torch.testing.assert_close(losses["loss"], expected)


class DrawnLoss(torch.nn.Module):
    """A criterion whose losses are random numbers, and which keeps them and the masks that it is given."""

    weight_dict = {"loss_cross_entropy": 1.0, "loss_mask": 10.0, "loss_dice": 100.0}

    def __init__(self):
        super().__init__()
        self.drawn, self.given = [], []

    def forward(self, masks, classes, mask_labels, class_labels, auxiliary):
        self.drawn.append(torch.rand(()))
        self.given.append((mask_labels[0], class_labels[0]))
        return dict.fromkeys(self.weight_dict, self.drawn[-1])


def test_the_points_of_a_loss_are_drawn_by_the_number_of_the_sample():
    prediction = MaskPrediction(torch.zeros(2, 5, 4), torch.zeros(2, 5, 7, 7))
    target = batch()[1]
    criterion = DrawnLoss()
    losses = mask_loss([prediction, prediction], target, [4, 9], criterion)
    first = criterion.drawn
    assert len({float(value) for value in first}) == 4  # two images of two layers
    torch.testing.assert_close(losses["classes"], sum(first) / 2)
    torch.testing.assert_close(losses["loss"], 111 * sum(first) / 2)
    criterion.drawn = []
    mask_loss([prediction, prediction], target[[1, 0]], [9, 4], criterion)
    assert criterion.drawn == [*first[2:], *first[:2]]
    masks, classes = criterion.given[0]
    assert classes.tolist() == [0, 1, 2] and (masks.sum(0) == (target[0] != 255)).all()


def test_masks_of_eomt_fade_out_one_block_after_another():
    head = build("eomt").segmentation_head
    span = 5 / 14  # of two blocks, between a seventh and six sevenths of the run
    for done, shares in (
        (0.0, [1, 1]),
        (1 / 7, [1, 1]),
        (1 / 7 + span / 2, [0.5**0.9, 1]),
        (1 / 7 + span, [0, 1]),
        (1 / 7 + 1.5 * span, [0, 0.5**0.9]),
        (6 / 7, [0, 0]),
        (1.0, [0, 0]),
    ):
        head.anneal(done)
        assert head.mask_share.tolist() == pytest.approx(shares, abs=1e-6)


def test_masked_queries_of_eomt_attend_to_their_mask_only():
    head = build("eomt").segmentation_head
    masks = torch.full((1, 5, 8, 8), -1.0)
    masks[:, :, :, :4] = 1.0  # the left half
    left = torch.tensor([True, True, False, False] * 4)
    chosen = torch.tensor([[True, False, True, True, False]])
    length = 5 + 1 + 16
    for queries, rows in ((None, [True] * 5), (chosen, chosen[0].tolist())):
        allowed = head._attention_mask(masks, (4, 4), length, queries)[0, 0]
        for query, masked in enumerate(rows):
            assert torch.equal(allowed[query, 6:], left if masked else torch.ones(16, dtype=torch.bool))
        assert allowed[:5, :6].all() and allowed[5:].all()


def test_the_share_of_masked_queries_is_that_of_the_block():
    head = build("eomt").segmentation_head
    assert head._masked_queries(1.0, 0, [1, 2], 2) is None and head._masked_queries(0.3, 0, None, 2) is None
    drawn = torch.stack([head._masked_queries(0.3, 0, [n], 1)[0] for n in range(200)]).float()
    assert abs(float(drawn.mean()) - 0.3) < 0.06
    assert not head._masked_queries(0.0, 1, [1, 2], 2).any()
    again = head._masked_queries(0.3, 1, [5, 6, 7, 8], 4)
    assert torch.equal(again, head._masked_queries(0.3, 1, [5, 6, 7, 8], 4))
    assert not torch.equal(again, head._masked_queries(0.3, 0, [5, 6, 7, 8], 4))


@pytest.mark.parametrize("head", HEADS)
def test_the_encoder_moves_to_segmentation_and_back_unchanged(head, tmp_path):
    torch.manual_seed(7)
    depth = DepthAnything("vitn")
    save_model(depth, tmp_path / "depth.safetensors")
    model = build(head)
    load_encoder(model, tmp_path / "depth.safetensors")
    save_model(model, tmp_path / "segmentation.safetensors")
    back = DepthAnything("vitn")
    load_encoder(back, tmp_path / "segmentation.safetensors")
    for name, tensor in depth.pretrained.state_dict().items():
        assert torch.equal(back.pretrained.state_dict()[name], tensor), name


def test_commands_of_one_kind_refuse_files_of_the_other(tmp_path):
    save_model(build("linear"), tmp_path / "s.safetensors")
    save_model(DepthAnything("vitn"), tmp_path / "d.safetensors")
    assert is_segmentation_file(tmp_path / "s.safetensors") and not is_segmentation_file(
        tmp_path / "d.safetensors"
    )
    assert not is_segmentation_file(tmp_path / "missing")
    with pytest.raises(UserError, match="classes"):
        load_model(tmp_path / "s.safetensors")
    with pytest.raises(UserError, match="not a segmentation model"):
        load_segmentation(tmp_path / "d.safetensors")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("classes", "[]"),
        ("classes", '[{"name": 1, "color": [0, 0, 0]}]'),
        ("window", '{"stride": 0}'),
        ("head", "os.system"),
    ],
)
def test_a_file_with_wrong_metadata_is_refused(name, value, tmp_path):
    from depth_anything.model.segmentation_files import build_segmentation_metadata
    from depth_anything.model.tensor_files import save_safetensors

    model = build("linear")
    metadata = build_segmentation_metadata(model) | {name: value}
    save_safetensors(model.state_dict(), tmp_path / "m.safetensors", metadata)
    with pytest.raises(UserError, match="m.safetensors"):
        load_segmentation(tmp_path / "m.safetensors")
    assert load_file(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("head", "options", "named"),
    [
        ("dpt", {"queries": 5}, "queries"),
        ("mask2former", {"querys": 5}, "querys"),
        ("mask2former", {"channels": 33}, "33"),
        ("mask2former", {"queries": "many"}, "many"),
        ("eomt", {"blocks": 99}, "blocks"),
        ("unet", None, "unet"),
    ],
)
def test_impossible_heads_and_options_are_named(head, options, named):
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match=named):
        SegmentationModel("vitn", classes=CLASSES, head=head, head_options=options)


def test_mask2former_has_v1s_numbers_and_reads_the_last_four_blocks():
    pytest.importorskip("transformers")
    with torch.device("meta"):
        model = SegmentationModel("vits", classes=CLASSES, head="mask2former")
    config = model.segmentation_head.parts.config
    assert (config.num_queries, config.encoder_layers, config.feature_size) == (200, 6, 384)
    assert len(model.segmentation_head.parts.transformer_module.decoder.layers) == 9
    assert model.taps == (8, 9, 10, 11)
    levels = model.segmentation_head.pyramid([torch.zeros(1, 4, 384, device="meta")] * 4, (2, 2))
    assert [tuple(level.shape[2:]) for level in levels] == [(8, 8), (4, 4), (2, 2), (1, 1)]


def test_eomt_equals_transformers_own_network():
    """Its weights in transformers' EomtForUniversalSegmentation, without masks in the attention."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = SegmentationModel(
        "vitn", classes=CLASSES, head="eomt", head_options={"queries": 5, "blocks": 2}
    ).eval()
    ours.segmentation_head.anneal(1.0)
    assert ours.segmentation_head.mask_share.tolist() == [0.0, 0.0]
    encoder = ours.pretrained
    width, depth, heads = encoder.embed_dim, len(encoder.blocks), encoder.blocks[0].attn.num_heads
    config = transformers.EomtConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, image_size=70, patch_size=7,
        num_queries=5, num_blocks=2, num_labels=3, num_register_tokens=0,
    )  # fmt: skip
    theirs = transformers.EomtForUniversalSegmentation(config).eval()
    state = {}
    head = {k: v for k, v in ours.segmentation_head.state_dict().items() if k != "mask_share"}
    state |= head | {"attn_mask_probs": torch.zeros(2)}
    mine = encoder.state_dict()
    state |= {
        "embeddings.cls_token": mine["cls_token"],
        "embeddings.register_tokens": torch.zeros(1, 0, width),
        "embeddings.patch_embeddings.projection.weight": mine["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": mine["patch_embed.proj.bias"],
        "embeddings.position_embeddings.weight": mine["pos_embed"][0, 1:],
        "layernorm.weight": mine["norm.weight"],
        "layernorm.bias": mine["norm.bias"],
    }
    for n in range(depth):
        block = f"blocks.{n}."
        qkv = {kind: mine[f"{block}attn.qkv.{kind}"].chunk(3) for kind in ("weight", "bias")}
        for place, part in enumerate(("q_proj", "k_proj", "v_proj")):
            for kind in ("weight", "bias"):
                state[f"layers.{n}.attention.{part}.{kind}"] = qkv[kind][place]
        for kind in ("weight", "bias"):
            state[f"layers.{n}.attention.out_proj.{kind}"] = mine[f"{block}attn.proj.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"layers.{n}.{name}.{kind}"] = mine[f"{block}{name}.{kind}"]
        state[f"layers.{n}.layer_scale1.lambda1"] = mine[f"{block}ls1.gamma"]
        state[f"layers.{n}.layer_scale2.lambda1"] = mine[f"{block}ls2.gamma"]
    found = theirs.load_state_dict(state, strict=False)
    assert not found.unexpected_keys, found.unexpected_keys
    assert {key for key in found.missing_keys if "position_ids" not in key} == set()
    with torch.no_grad():
        encoder.pos_embed[:, 0] = 0  # theirs adds none to the class token
        image = torch.randn(1, 3, 70, 70, generator=torch.Generator().manual_seed(1))
        expected = theirs(image)
        prediction = ours.segmentation_head(encoder, image, "official")[-1]
    torch.testing.assert_close(prediction.classes, expected.class_queries_logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(prediction.masks, expected.masks_queries_logits, rtol=1e-3, atol=1e-4)


def test_a_lightning_checkpoint_names_its_kind(tmp_path):
    from depth_anything.model.segmentation_files import build_segmentation_metadata

    model = build("linear")
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    metadata = build_segmentation_metadata(model)
    torch.save({"state_dict": state, "depth_anything": metadata}, tmp_path / "step.ckpt")
    assert is_segmentation_file(tmp_path / "step.ckpt")
    assert load_segmentation(tmp_path / "step.ckpt").classes == CLASSES
    assert json.loads(metadata["classes"])[0]["name"] == "red"
