"""What classifies the last map of an encoder."""

from __future__ import annotations

from torch import Tensor, nn


class MapClassifier(nn.Module):
    """Gives an encoder of maps a classifier: the mean over all places, then one linear layer, with timm's methods.

    The encoder has `num_features` channels in its last map, and calls `reset_classifier` when it has its other modules.
    """

    num_features: int
    num_classes: int
    global_pool: str
    head: nn.Module

    @property
    def head_hidden_size(self) -> int:
        """Channels that the classifier takes."""
        return self.num_features

    def init_head(self) -> None:
        """Initialises the classifier alone: what a task starts with on top of pretrained weights."""
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one for `num_classes` (0 for none), and the pooling when given.

        Raises:
            ValueError: For a pooling other than "avg".
        """
        global_pool = self.global_pool if global_pool is None else global_pool
        if global_pool != "avg":
            raise ValueError(f"global_pool is {global_pool!r}; it must be 'avg', forward_features goes without")
        self.num_classes, self.global_pool = num_classes, global_pool
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head = head.to(next(self.parameters()))
        self.init_head()

    def get_classifier(self) -> nn.Module:
        """The classifier, an identity when there is none."""
        return self.head

    def forward_features(self, x: Tensor) -> Tensor:
        """Volumes (B, in_chans, D, H, W) to the last map (B, C, d, h, w)."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools a map (B, C, d, h, w) to (B, C) and, unless `pre_logits`, classifies it to (B, num_classes)."""
        x = x.mean(dim=(2, 3, 4))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Volumes (B, in_chans, D, H, W) to class scores (B, num_classes), or to pooled features (B, C) without."""
        return self.forward_head(self.forward_features(x))
