"""EfficientNet-Lite, a vision tower small enough for a laptop without a GPU.

Source: EfficientNet, https://arxiv.org/abs/1905.11946; MBConv blocks from MobileNetV2, https://arxiv.org/abs/1801.04381.
The Lite variants drop squeeze-and-excitation, replace SiLU by ReLU6, and keep stem, head and the first and last stage
at their base size.
"""

import math

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_nrccr import EfficientNetLiteConfig


STEM_CHANNELS = 32
# (expand_ratio, channels, repeats, stride, kernel_size): Table 1 of arXiv 1905.11946, which Lite0 keeps
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


def scale_channels(channels: int, coefficient: float, divisor: int = 8) -> int:
    """Return scaled channels, rounded to a multiple of `divisor` without losing more than a tenth."""
    scaled = channels * coefficient
    rounded = max(divisor, int(scaled / divisor + 0.5) * divisor)
    return rounded if rounded >= 0.9 * scaled else rounded + divisor


class EfficientNetLiteConv(nn.Module):
    """Convolution, BatchNorm and, unless `activation=False`, ReLU6; `stride=2` halves both sides, rounding up."""

    def __init__(
        self,
        config: EfficientNetLiteConfig,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: bool = True,
    ):
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, kernel_size, stride, groups=groups, bias=False)
        self.normalization = nn.BatchNorm2d(
            out_channels, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum
        )
        self.activation = nn.ReLU6(inplace=True) if activation else nn.Identity()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        convolution, norm = self.convolution, self.normalization
        kernel_size, stride = convolution.kernel_size[0], convolution.stride[0]
        height, width = (
            max((math.ceil(size / stride) - 1) * stride + kernel_size - size, 0) for size in hidden_states.shape[2:]
        )
        # As TensorFlow's "same", under which the weights were trained: the odd pixel goes right and below. A kernel
        # that begins with zeros does the same as a copy of all states with that pixel, and costs a quarter of it.
        around = {"padding": ((height + 1) // 2, (width + 1) // 2), "stride": stride, "groups": convolution.groups}
        weight = convolution.weight
        if height % 2 or width % 2:
            weight = nn.functional.pad(weight, (width % 2, 0, height % 2, 0))
        if norm.training:
            return self.activation(norm(nn.functional.conv2d(hidden_states, weight, **around)))
        # its statistics are constants: they go into the convolution, which saves a walk through all states
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        weight, bias = weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
        return self.activation(nn.functional.conv2d(hidden_states, weight, bias, **around))


class EfficientNetLiteBlock(nn.Module):
    """Mobile inverted bottleneck: widen, filter each channel alone, narrow; plus the input where the shape allows."""

    def __init__(
        self,
        config: EfficientNetLiteConfig,
        in_channels: int,
        out_channels: int,
        expand_ratio: int,
        kernel_size: int,
        stride: int,
    ):
        super().__init__()
        width = in_channels * expand_ratio
        self.has_residual = stride == 1 and in_channels == out_channels
        self.expand = EfficientNetLiteConv(config, in_channels, width) if expand_ratio > 1 else nn.Identity()
        self.depthwise = EfficientNetLiteConv(config, width, width, kernel_size, stride, groups=width)
        self.project = EfficientNetLiteConv(config, width, out_channels, activation=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = self.project(self.depthwise(self.expand(hidden_states)))
        return output + hidden_states if self.has_residual else output


class EfficientNetLiteModel(PreTrainedModel):
    """EfficientNet-Lite without its classifier. Stochastic depth is left out: the tower is meant to be used frozen."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "efficientnet_lite"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.stem = EfficientNetLiteConv(config, config.num_channels, STEM_CHANNELS, kernel_size=3, stride=2)
        blocks, in_channels = [], STEM_CHANNELS
        for stage, (expand_ratio, channels, repeats, stride, kernel_size) in enumerate(STAGES):
            out_channels = scale_channels(channels, config.width_coefficient)
            if 0 < stage < len(STAGES) - 1:
                repeats = math.ceil(repeats * config.depth_coefficient)
            for repeat in range(repeats):
                stride = stride if repeat == 0 else 1
                blocks.append(
                    EfficientNetLiteBlock(config, in_channels, out_channels, expand_ratio, kernel_size, stride)
                )
                in_channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.head = EfficientNetLiteConv(config, in_channels, config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            # as published; a fixed small range would let the signal fade before BatchNorm has seen any data
            fan_out = module.kernel_size[0] ** 2 * module.out_channels // module.groups
            init.normal_(module.weight, std=math.sqrt(2 / fan_out))

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """
        Encode pictures.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`): Normalised pictures.

        Returns:
            `last_hidden_state` of shape `(batch_size, hidden_size, ceil(height / 32), ceil(width / 32))` and its mean,
            `pooler_output` of shape `(batch_size, hidden_size)`.
        """
        # depthwise convolutions run up to twice as fast on a CPU in this layout; the values stay the same
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        last_hidden_state = self.head(self.blocks(self.stem(pixel_values)))
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state, pooler_output=last_hidden_state.mean(dim=(2, 3))
        )


AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)

__all__ = ["EfficientNetLiteModel"]
