"""RedNet: ResNet with its 3x3 convolutions replaced by involution (Li et al., CVPR 2021, section 4 and table 1)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rednet.model.nn.involution import ConvModule, Involution
from rednet.model.nn.pointwise import PointwiseConv2d
from rednet.model.ops.batch_norm import batch_norm

BLOCKS: Mapping[int, tuple[int, int, int, int]] = {  # depth -> bottleneck blocks per stage
    26: (1, 2, 4, 1),
    38: (2, 3, 5, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
LARGEST, LARGEST_KERNEL = 1 << 16, 63  # far beyond any use; a hostile checkpoint must not overflow a product
EXPANSION = 4  # a bottleneck's output has this many times the channels of its middle


@dataclass(frozen=True, kw_only=True)
class RedNetConfig:
    """The shape of a RedNet. The defaults are the official RedNet-50.

    Raises:
        ValueError: the fields do not describe a network.
    """

    depth: int = 50
    num_classes: int = 1000
    in_channels: int = 3
    stem_channels: int = 64
    base_channels: int = 64  # in the middle of the first stage's blocks; doubles from stage to stage
    strides: tuple[int, int, int, int] = (1, 2, 2, 2)
    kernel_size: int = 7
    stem_kernel_size: int = 3
    reduction_ratio: int = 4
    group_channels: int = 16

    def __post_init__(self) -> None:
        if self.depth not in BLOCKS:
            raise ValueError(f"depth must be one of {', '.join(map(str, BLOCKS))}, got {self.depth}")
        if len(self.strides) != len(BLOCKS[self.depth]):
            raise ValueError(f"strides must name one stride for each of the four stages, got {self.strides}")
        numbers = [value for name, value in vars(self).items() if name != "strides"]
        if not all(isinstance(number, int) for number in (*numbers, *self.strides)):
            raise ValueError(f"every field must be a whole number, got {self}")
        sizes = (self.num_classes, self.in_channels, self.stem_channels, self.base_channels, *self.strides)
        if min(sizes) < 1 or max(sizes) > LARGEST:
            raise ValueError(f"every size and stride must be at least 1 and at most {LARGEST}, got {self}")
        unit = self.group_channels
        if unit < 1 or self.base_channels % unit or self.stem_channels % (2 * unit):
            raise ValueError(
                f"base_channels must be a multiple of group_channels ({unit}) and stem_channels of twice that, "
                f"got {self.base_channels} and {self.stem_channels}"
            )
        ratio = self.reduction_ratio
        if ratio < 1 or self.base_channels % ratio or self.stem_channels // 2 % ratio:
            raise ValueError(f"reduction_ratio must divide base_channels and half of stem_channels, got {ratio}")
        for size in (self.kernel_size, self.stem_kernel_size):
            if not 1 <= size <= LARGEST_KERNEL or size % 2 == 0:
                raise ValueError(f"kernel sizes must be odd and at most {LARGEST_KERNEL}, got {size}")

    @property
    def name(self) -> str:
        return f"rednet{self.depth}"

    @property
    def feature_channels(self) -> int:
        """Channels of the last stage, the length of a feature vector: 2048 at full width."""
        return self.base_channels * EXPANSION * 8


class Downsample(nn.Sequential):
    """A convolution and a batch norm, under the names of the checkpoints: 0 and 1."""

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm(self[1], self[0](x), relu=False)


class Bottleneck(nn.Module):
    """1x1 convolution, involution, 1x1 convolution, and the way around them. Names are those of the checkpoints."""

    def __init__(self, in_channels: int, channels: int, stride: int, config: RedNetConfig) -> None:
        super().__init__()
        out_channels = channels * EXPANSION
        self.conv1 = PointwiseConv2d(in_channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = Involution(channels, config.kernel_size, stride, config.reduction_ratio, config.group_channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = PointwiseConv2d(channels, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: Downsample | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = Downsample(
                PointwiseConv2d(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = batch_norm(self.bn1, self.conv1(x))
        out = batch_norm(self.bn2, self.conv2(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return batch_norm(self.bn3, self.conv3(out), shortcut)


class Backbone(nn.Module):
    """From pixels to the four stage maps."""

    def __init__(self, config: RedNetConfig) -> None:
        super().__init__()
        half = config.stem_channels // 2
        self.stem = nn.Sequential(
            ConvModule(config.in_channels, half, 3, stride=2),
            Involution(half, config.stem_kernel_size, 1, config.reduction_ratio, config.group_channels),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            ConvModule(half, config.stem_channels, 3),
        )
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        in_channels = config.stem_channels
        for stage, (blocks, stride) in enumerate(zip(BLOCKS[config.depth], config.strides, strict=True)):
            channels = config.base_channels << stage
            layers = []
            for block in range(blocks):
                layers.append(Bottleneck(in_channels, channels, stride if block == 0 else 1, config))
                in_channels = channels * EXPANSION
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x1 = self.get_submodule("layer1")(self.maxpool(self.stem(x)))  # [B, 4*base, H/4, W/4] at full width: 256
        x2 = self.get_submodule("layer2")(x1)
        x3 = self.get_submodule("layer3")(x2)
        x4 = self.get_submodule("layer4")(x3)  # [B, 32*base, H/32, W/32] at full width: 2048
        return x1, x2, x3, x4


class Head(nn.Module):
    """The linear classifier."""

    def __init__(self, config: RedNetConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.feature_channels, config.num_classes)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.fc(features)
        return logits


class RedNet(nn.Module):
    """The classifier. Inputs are normalised pixels x [B, 3, H, W]; any H and W of at least one pixel are defined."""

    def __init__(self, config: RedNetConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.head = Head(config)
        if not self.head.fc.weight.is_meta:  # for weights without memory torch would load its compiler: a second
            self._initialise()

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        logits: Tensor = self.head(self.features(x))
        return logits

    def features(self, x: Tensor) -> Tensor:
        """The last stage map, averaged over all positions: [B, config.feature_channels]."""
        return self.stages(x)[-1].mean(dim=(2, 3))

    def stages(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The maps after each stage, at strides 4, 8, 16 and 32."""
        maps: tuple[Tensor, Tensor, Tensor, Tensor] = self.backbone(x)
        return maps

    def _initialise(self) -> None:
        """He initialisation, and each block starts as the identity: its last batch norm scales by zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)


def create_rednet(name: str, **fields: Any) -> RedNet:
    """A RedNet with fresh weights: `create_rednet("rednet26", num_classes=10)`.

    Args:
        name: rednet26, rednet38, rednet50, rednet101 or rednet152.
        fields: any other field of `RedNetConfig`.

    Raises:
        ValueError: there is no network of that name, or the fields do not describe one.
    """
    depths = {f"rednet{depth}": depth for depth in BLOCKS}
    if name not in depths:
        raise ValueError(f"unknown network {name!r}; there are {', '.join(depths)}")
    return RedNet(RedNetConfig(depth=depths[name], **fields))
