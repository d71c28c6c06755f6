"""torch's layers with Detectron2's additions."""

from torch import Tensor, nn


class Conv2d(nn.Conv2d):
    """nn.Conv2d, then `norm` (a module), then `activation` (a callable), where given."""

    def __init__(self, *args, norm: nn.Module | None = None, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)
