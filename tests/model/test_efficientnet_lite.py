from copy import deepcopy

import pytest
import torch
from transformers import AutoModel

from modeling_nrccr import length_groups
from modeling_nrccr.configuration_nrccr import EfficientNetLiteConfig, NrccrConfig
from modeling_nrccr.modeling_efficientnet_lite import (
    STAGES,
    EfficientNetLiteConv,
    EfficientNetLiteModel,
    scale_channels,
)
from modeling_nrccr.towers import NrccrVisualTower


@pytest.fixture(scope="module")
def model() -> EfficientNetLiteModel:
    torch.manual_seed(0)
    return EfficientNetLiteModel(EfficientNetLiteConfig(width_coefficient=0.25, hidden_size=37)).eval()


@pytest.mark.parametrize(
    "coefficient, expected",
    [(1.1, [16, 24, 48, 88, 120, 208, 352]), (1.4, [24, 32, 56, 112, 160, 272, 448])],  # widths of B2 and B4
)
def test_channels_scale_as_published(coefficient, expected):
    assert [scale_channels(channels, coefficient) for _, channels, *_ in STAGES] == expected


def test_lite0_and_lite4_have_their_published_size():
    def blocks_and_parameters(**config):
        with torch.device("meta"):
            model = EfficientNetLiteModel(EfficientNetLiteConfig(**config))
        return len(model.blocks), model.num_parameters() + 1000 * (model.config.hidden_size + 1)  # the classifier's

    blocks, parameters = blocks_and_parameters()
    assert blocks == 16 and round(parameters / 1e6, 1) == 4.7
    blocks, parameters = blocks_and_parameters(width_coefficient=1.4, depth_coefficient=1.8)
    assert blocks == 30 and round(parameters / 1e6, 1) == 13.0


@pytest.mark.parametrize("height, width", [(64, 96), (37, 131)])
def test_output_shapes(model, height, width):
    with torch.inference_mode():
        output = model(torch.randn(2, 3, height, width))
    assert output.last_hidden_state.shape == (2, 37, -(-height // 32), -(-width // 32))
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state.mean(dim=(2, 3)))


def test_the_odd_pixel_of_padding_goes_right_and_below():
    layer = EfficientNetLiteConv(
        EfficientNetLiteConfig(batch_norm_eps=0.0), 1, 1, 3, stride=2, activation=False
    ).eval()
    torch.nn.init.ones_(layer.convolution.weight)
    counted = layer(torch.ones(1, 1, 4, 4))
    assert counted[0, 0].tolist() == [[9, 6], [6, 4]]


def test_a_picture_does_not_depend_on_its_batch(model):
    pixel_values = torch.randn(5, 3, 64, 64)
    with torch.inference_mode():
        together = model(pixel_values).pooler_output
        alone = torch.cat([model(picture[None]).pooler_output for picture in pixel_values])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_an_untrained_tower_tells_pictures_apart(model):
    with torch.inference_mode():
        one, other = model(torch.stack([torch.ones(3, 64, 64), -torch.ones(3, 64, 64)])).pooler_output
    assert one.norm() > 0.01 and torch.cosine_similarity(one, other, dim=0) < 0.999


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is EfficientNetLiteModel
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(pixel_values).pooler_output, model(pixel_values).pooler_output)


def test_every_parameter_gets_a_gradient(model):
    trained = deepcopy(model).train()
    trained(torch.randn(4, 3, 64, 64)).pooler_output.pow(2).sum().backward()
    assert not [name for name, parameter in trained.named_parameters() if not parameter.grad.abs().sum() > 0]


def test_a_large_batch_goes_through_in_passes(model, monkeypatch):
    tower = NrccrVisualTower(NrccrConfig(vision_config=model.config)).eval()
    sizes = []
    tower.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    monkeypatch.setattr(length_groups, "PIXELS", 2 * 64 * 64)
    videos = torch.randn(3, 3, 3, 64, 64)
    with torch.no_grad():
        parts = tower(videos)
    whole = tower(videos)  # with a gradient
    assert sizes == [2, 2, 2, 2, 1, 9] and parts.shape == (3, 3, 37)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)
