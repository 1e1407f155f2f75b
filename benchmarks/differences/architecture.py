"""What the repairs of the model change: padding, scales, norms, dropout."""

import json

import torch
from torch.nn import functional as F

from benchmarks import ROOT
from benchmarks.differences.effects import TEXT, arrow, caption, cosine, effect, models, unit
from modeling_nrccr import EfficientNetLiteConfig, LanguageDiscriminator, NrccrConfig, NrccrModel
from modeling_nrccr.training.conversion import check_options


@effect("Padding of captions")
@torch.no_grad()
def padded_caption() -> str:
    values = [
        cosine(*(model.get_text_features(*caption(4, length)).pooler_output for length in (4, 38)))
        for model in models()
    ]
    return f"a caption of 4 tokens alone and padded to 38, cosine {arrow(*values)}"


@effect("Padding of videos")
@torch.no_grad()
def padded_video() -> str:
    frames, values = unit(1, 3, 64, seed=2) * 8, []
    for model in models():
        mask = F.pad(torch.ones(1, 3), (0, 61))
        alone = model.get_image_features(visual_feats=frames).pooler_output
        padded = model.get_image_features(visual_feats=F.pad(frames, (0, 0, 0, 61)), visual_attention_mask=mask)
        values.append(cosine(alone, padded.pooler_output))
    return f"a video of 3 frames alone and padded to 64, cosine {arrow(*values)}"


@effect("Padding in the discriminator")
@torch.no_grad()
def padded_discriminator() -> str:
    values = []
    tower = models()[1].text_tower
    states, mask = tower(*caption(4, 4)), caption(4, 38)[1]
    padded = tower(*caption(4, 38))
    for pool_padding in (True, False):
        torch.manual_seed(0)
        judge = LanguageDiscriminator(64, "weak", pool_padding)
        values.append((judge(states, mask[:, :4]) - judge(padded, mask)).abs().max().item())
    return f"the same caption moves a logit by {arrow(*values)}"


@effect("Scale of attention scores")
def score_scale() -> str:
    scales = {width: (512 / width) ** 0.5 for width in (768, 1024)}
    return "scores " + ", ".join(f"x{scale:.2f} at width {width}" for width, scale in scales.items()) + " -> x1"


@effect("BatchNorm in the projections")
@torch.no_grad()
def batch_norm() -> str:
    values = []
    for model in models(projection_dropout=0.0):
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
        mine, *others = unit(63, 64, seed=3).split([1, 31, 31])
        values.append(cosine(*(model.text_projection(torch.cat([mine, rest]))[0] for rest in others)))
    return f"a row in two training batches of 32, cosine {arrow(*values)}"


@effect("Layers of the video head")
def video_layers() -> str:
    options = json.loads((ROOT / "tests/fixtures/reference/forward_video.json").read_text())["opt"]
    try:
        check_options(options | {"video_layer": 2})
    except ValueError as error:
        return f"a checkpoint with two is refused: `{error}`"
    raise AssertionError("a checkpoint with two video layers was taken")


@effect("Dropout inside frozen layers")
@torch.no_grad()
def frozen_dropout() -> str:
    values = []
    for dropout in (True, False):
        model = models()[1]
        model.set_trained_layers(0, frozen_dropout=dropout)
        model.train()
        torch.manual_seed(4)
        values.append(cosine(*(model.text_tower(*caption(12, 12)) for _ in range(2))))
    return f"two passes of one caption through a frozen encoder, cosine {arrow(*values)}"


@effect("Training the picture tower")
def picture_tower() -> str:
    tower = EfficientNetLiteConfig(width_coefficient=0.25, depth_coefficient=0.3, hidden_size=16)
    model = NrccrModel(NrccrConfig(text_config=TEXT, vision_config=tower, projection_dim=16))
    model.set_trained_layers(0, vision=True)
    features = model.visual_tower(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)))
    counts = []
    for handed_on in (torch.tensor(features.tolist(), requires_grad=True), features):  # re-wrapped, as released
        model.visual_tower.zero_grad()
        model.visual_projection(model.visual_head(handed_on, torch.ones(2, 1)))[0, 0].backward(retain_graph=True)
        counts.append(sum(p.grad is not None for p in model.visual_tower.parameters()))
    return f"tensors of a tower in training that get a gradient: {counts[0]} -> {counts[1]}"
