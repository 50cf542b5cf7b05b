"""RedNet: ResNet with its 3x3 convolutions replaced by involution (Li et al., CVPR 2021, section 4 and table 1)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
# Far beyond any use, so that the products of a hostile checkpoint cannot overflow.
MAX_SIZE, MAX_KERNEL_SIZE = 1 << 16, 63
EXPANSION = 4  # ratio of a bottleneck's output channels to its inner channels


@dataclass(frozen=True, kw_only=True)
class RedNetConfig:
    """The architecture of a RedNet. The defaults are the official RedNet-50.

    Attributes:
        depth: 26, 38, 50, 101 or 152.
        num_classes: length of the logits.
        in_channels: channels of the input.
        stem_channels: channels of the stem's output.
        base_channels: channels inside the first stage's blocks. They double from stage to stage.
        strides: of each stage's first block.
        kernel_size, stem_kernel_size: K of the involutions, odd.
        reduction_ratio, group_channels: as for `Involution`.

    Raises:
        ValueError: the fields do not describe a network.

    Example:
        >>> RedNetConfig(depth=26, base_channels=32).feature_channels
        1024
    """

    depth: int = 50
    num_classes: int = 1000
    in_channels: int = 3
    stem_channels: int = 64
    base_channels: int = 64
    strides: tuple[int, int, int, int] = (1, 2, 2, 2)
    kernel_size: int = 7
    stem_kernel_size: int = 3
    reduction_ratio: int = 4
    group_channels: int = 16

    def __post_init__(self) -> None:
        if self.depth not in BLOCKS:
            raise ValueError(f"depth must be one of {', '.join(map(str, BLOCKS))}, got {self.depth}")
        if len(self.strides) != len(BLOCKS[self.depth]):
            raise ValueError(f"strides must have one stride for each of the four stages, got {self.strides}")
        for name, value in vars(self).items():
            numbers = self.strides if name == "strides" else (value,)
            if not all(isinstance(number, int) for number in numbers):
                raise ValueError(f"{name} must be an integer, got {value!r}")
            is_size = name in ("num_classes", "in_channels", "stem_channels", "base_channels", "strides")
            if is_size and not all(1 <= number <= MAX_SIZE for number in numbers):
                raise ValueError(f"{name} must be at least 1 and at most {MAX_SIZE}, got {value}")
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
            if not 1 <= size <= MAX_KERNEL_SIZE or size % 2 == 0:
                raise ValueError(f"kernel sizes must be odd and at most {MAX_KERNEL_SIZE}, got {size}")

    @property
    def name(self) -> str:
        return f"rednet{self.depth}"

    @property
    def feature_channels(self) -> int:
        """Channels of the last stage, the length of a feature vector: 2048 for the official networks."""
        return self.base_channels * EXPANSION * 8


class Downsample(nn.Sequential):
    """A convolution and a batch norm, named 0 and 1 as in the checkpoints."""

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm(self[1], self[0](x), relu=False)


class Bottleneck(nn.Module):
    """1x1 convolution, involution, 1x1 convolution, and a shortcut. Attribute names are those of the checkpoints."""

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
    """The stem and the four stages."""

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
        x1 = self.get_submodule("layer1")(self.maxpool(self.stem(x)))  # [B, 4 * base_channels, H / 4, W / 4]
        x2 = self.get_submodule("layer2")(x1)
        x3 = self.get_submodule("layer3")(x2)
        x4 = self.get_submodule("layer4")(x3)  # [B, 32 * base_channels, H / 32, W / 32]
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
    """The classifier. It also has the method names of timm's ResNets.

    Inputs are normalised images x [B, 3, H, W], float32. Every H and W of at least one pixel is defined: a map at
    stride s is [ceil(H / s), ceil(W / s)].

    Args:
        config: the architecture.

    Example:
        >>> import torch
        >>> net = RedNet(RedNetConfig(depth=26, num_classes=10)).eval()
        >>> with torch.inference_mode():
        ...     logits = net(torch.zeros(2, 3, 64, 64))
        >>> logits.shape
        torch.Size([2, 10])
    """

    def __init__(self, config: RedNetConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.head = Head(config)
        _initialise(self)

    @property
    def num_classes(self) -> int:
        """Length of the logits; 0 after `reset_classifier(0)`."""
        return self.config.num_classes if isinstance(self.get_classifier(), nn.Linear) else 0

    @property
    def num_features(self) -> int:
        """Length of a feature vector, the channels of the last stage."""
        return self.config.feature_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def features(self, x: Tensor) -> Tensor:
        """Return the last stage's map averaged over all positions, [B, num_features]."""
        return self.forward_head(self.forward_features(x), pre_logits=True)

    def stages(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the map of each stage, [B, C, ceil(H / s), ceil(W / s)] at strides s of 4, 8, 16 and 32.

        Example:
            >>> import torch
            >>> net = create_rednet("rednet26").eval()
            >>> [list(stage.shape) for stage in net.stages(torch.zeros(1, 3, 64, 64))]
            [[1, 256, 16, 16], [1, 512, 8, 8], [1, 1024, 4, 4], [1, 2048, 2, 2]]
        """
        maps: tuple[Tensor, Tensor, Tensor, Tensor] = self.backbone(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's map, [B, num_features, ceil(H / 32), ceil(W / 32)]. Name and meaning are timm's.

        Example:
            >>> import torch
            >>> net = create_rednet("rednet26").eval()
            >>> net.forward_features(torch.zeros(1, 3, 224, 224)).shape
            torch.Size([1, 2048, 7, 7])
        """
        return self.stages(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a map and classify it. Name and meaning are timm's.

        Args:
            x: a map of `forward_features`, [B, num_features, h, w].
            pre_logits: return the pooled features instead.

        Returns:
            Logits [B, num_classes], or features [B, num_features].

        Example:
            >>> import torch
            >>> net = create_rednet("rednet26", num_classes=10).eval()
            >>> last_map = net.forward_features(torch.zeros(1, 3, 64, 64))
            >>> net.forward_head(last_map).shape, net.forward_head(last_map, pre_logits=True).shape
            (torch.Size([1, 10]), torch.Size([1, 2048]))
        """
        x = x.mean(dim=(2, 3))
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module:
        """Return the last layer: `nn.Linear`, or `nn.Identity` after `reset_classifier(0)`. The name is timm's."""
        return self.head.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer by a new one with random weights, on the same device. Name and meaning are timm's.

        Args:
            num_classes: length of the new logits; 0: no classifier, the network returns features. Such a network
                cannot be prepared or saved.

        Raises:
            ValueError: `num_classes` is negative or too large.

        Example:
            >>> net = create_rednet("rednet26", num_classes=1000)
            >>> net.reset_classifier(10)
            >>> net.get_classifier()
            Linear(in_features=2048, out_features=10, bias=True)
        """
        if num_classes == 0:
            self.head.set_submodule("fc", nn.Identity())
            return
        self.config = replace(self.config, num_classes=num_classes)
        weight = next(self.parameters())
        self.head = Head(self.config).to(weight.device, weight.dtype).train(self.training)
        _initialise(self.head)


def create_rednet(name: str, **fields: Any) -> RedNet:
    """Make a RedNet with random weights.

    Args:
        name: rednet26, rednet38, rednet50, rednet101 or rednet152.
        fields: any other field of `RedNetConfig`.

    Returns:
        A network in training mode, float32, on the CPU.

    Raises:
        ValueError: there is no network of that name, or the fields do not describe one.

    Example:
        >>> import torch
        >>> net = create_rednet("rednet26", num_classes=10)
        >>> net(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """
    depths = {f"rednet{depth}": depth for depth in BLOCKS}
    if name not in depths:
        raise ValueError(f"unknown network {name!r}; there are {', '.join(depths)}")
    return RedNet(RedNetConfig(depth=depths[name], **fields))


def _initialise(root: nn.Module) -> None:
    """He initialisation; every block starts as the identity, because its last batch norm scales by zero."""
    if next(
        root.parameters()
    ).is_meta:  # meta tensors hold no data; random numbers would import torch's compiler for a second
        return
    for module in root.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Bottleneck):
            nn.init.zeros_(module.bn3.weight)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
